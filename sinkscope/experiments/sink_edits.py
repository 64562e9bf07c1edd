"""EditSinks: edits of the sinks of a trace, of its most attended tokens, or of others in their place."""

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sinkscope.checks import check_choice, check_flags, check_whole, is_whole, plain, typed
from sinkscope.errors import InterventionError, LayerError, NoEffectError, TooFewTokensError
from sinkscope.experiments.tracing import SinkTrace
from sinkscope.interventions import AblateValues, LiveRule, MaskKeys, ScaleAttention
from sinkscope.interventions.live import RULES
from sinkscope.interventions.values import REPLACEMENTS
from sinkscope.models.inputs import Sample

KINDS = ("V-sinks", "L-sinks", "text sinks")
LIVE_KINDS = KINDS[1:]
TOP = "top attended"
EDITS: Mapping[str, Callable[[Any, Any], Any]] = {
    "mask": lambda tokens, layers: MaskKeys(tokens, layers, allow_noop=True),
    "halve": lambda tokens, layers: ScaleAttention(tokens, 0.5, layers, allow_noop=True),
    **{
        f"{how} value": lambda x, layers, how=how: AblateValues(x, how, layers, allow_noop=True)
        for how in REPLACEMENTS
    },
}


@typed
def top_received(trace: SinkTrace, k: int = 1) -> Tensor:
    """The ``k`` image tokens of every row that receive the most attention, bool ``[batch pos]``."""
    check_whole(1, k=k)
    visual = trace.sample.tokens.image >= 0
    mean: Any = trace.language.by_key.mean
    received = mean.nan_to_num().mean(dim=1).masked_fill(~visual, -1.0)
    most = received.topk(min(k, received.shape[1]), dim=1).indices
    return torch.zeros_like(visual).scatter(1, most, True) & visual


def sinks_of(trace: SinkTrace, kind: str, k: int = 1) -> Tensor:
    """Tokens of a kind, bool ``[batch pos]``, or by the L rule ``[batch layer pos]``."""
    if kind in (TOP, "V-sinks"):
        return top_received(trace, k) if kind == TOP else trace.v_sinks
    return trace.l_sinks() if kind == "L-sinks" else trace.text_sinks()


def split(trace: SinkTrace, kind: str) -> tuple[Tensor, Tensor]:
    """Visual sinks of a kind, at any layer, and all other image tokens, bool ``[batch pos]``."""
    chosen = ("V-sinks", "L-sinks") if kind == "visual sinks" else (kind,)
    masks = [sinks_of(trace, one) for one in chosen]
    mask = torch.stack([mask if mask.ndim == 2 else mask.any(1) for mask in masks]).any(dim=0)
    return mask, (trace.sample.tokens.image >= 0) & ~mask


def content_seed(sample: Sample, seed: int) -> int:
    """A seed that depends on the sample's inputs, so that other images get other positions."""
    for _, value in sorted(sample.inputs.items()):
        if isinstance(value, Tensor):
            seed = zlib.crc32(value.detach().cpu().double().numpy().tobytes(), seed)
    return seed


def with_random_sinks(trace: SinkTrace, seed: int = 0) -> SinkTrace:
    """The trace with every visual sink in the place of a random ordinary image token; measurements stay.

    A row with fewer ordinary tokens than sinks is left without any.
    """
    generator = torch.Generator().manual_seed(content_seed(trace.sample, seed))
    v, rule = trace.v_sinks.clone(), trace.l_detection.mask.clone()
    visual, ordinary = trace.sample.tokens.image >= 0, trace.ordinary()
    for b in range(len(v)):
        old, pool = (mask[b].nonzero().flatten() for mask in (visual & ~ordinary, ordinary))
        new = pool[torch.randperm(len(pool), generator=generator)][: len(old)]
        for mask in (v[b], rule[b]):  # [pos] and [layer pos]
            moved = mask[..., old[: len(new)]].clone()
            mask[..., old] = False
            if len(new) == len(old):
                mask[..., new] = moved
    low = replace(trace.l_detection, mask=rule, detector="random tokens in the place of sinks")
    return replace(trace, v_sinks=v, l_detection=low)


def by_layer(mask: Tensor) -> Tensor:
    """A mask with an axis of layers, ``[batch layer|1 pos]``."""
    return mask if mask.ndim == 3 else mask[:, None]


def kinds(trace: SinkTrace) -> dict[str, tuple[Tensor, Tensor]]:
    """Image and text: all tokens of the kind, and those that are sinks at no layer."""
    visual, live = trace.sample.tokens.image >= 0, trace.sample.tokens.live
    text, sinks = live & ~visual, trace.text_sinks().any(dim=1)
    return {"image": (visual, trace.ordinary()), "text": (text, text & ~sinks)}


def random_like(
    mask: Tensor,
    trace: SinkTrace,
    generator: torch.Generator,
    received: Any = None,
    layers: Sequence[int] = (),
) -> Tensor:
    """Random tokens in the place of the edited ones, image for image, text for text; sinks in no layer.

    All layers of a row take the first tokens of one random order, so a layer with fewer has some of those
    of a layer with more. ``received`` ``[batch layer pos]``, in the edited ``layers``, is for matching
    attention: in each layer of a mask by layer, else by their mean; None to match numbers.
    """
    edited, out = by_layer(mask), torch.zeros_like(by_layer(mask))
    said, other = "that receive {:.4g} of attention together", "count"
    if received is None or mask.ndim == 2:
        layers = range(edited.shape[1])
    if received is None:
        received = torch.ones(edited.shape)  # a number is an attention of 1 each
        said, other = "to draw from", "mass"
    elif mask.ndim == 2:
        received = received.mean(dim=1, keepdim=True)
    for kind, (all_of_kind, ordinary) in kinds(trace).items():
        mine, pool = edited & all_of_kind[:, None], ordinary & ~edited.any(dim=1)
        for b in range(len(mask) if mine.any() else 0):
            candidates = pool[b].nonzero().flatten()
            order = candidates[torch.randperm(len(candidates), generator=generator)]
            for at, layer in enumerate(layers):
                if not mine[b, layer].any():
                    continue
                given, wanted = received[b, at, order], float(received[b, at, mine[b, layer]].sum())
                if float(given.sum()) < wanted or not len(order):
                    where = f"Row {b}{f', layer {layer},' if mask.ndim == 3 else ''}"
                    raise TooFewTokensError(
                        f"{where} has {len(order)} ordinary {kind} tokens {said.format(given.sum())}; "
                        f"expected at least {wanted:.4g}, as the edited tokens. Edit fewer tokens, or "
                        f"write match={other!r}."
                    )
                chosen = given.cumsum(0) - given < wanted
                chosen[0] = True
                out[b, layer, order[chosen]] = True
    return out if mask.ndim == 3 else out[:, 0]


def other_positions(mask: Tensor, trace: SinkTrace, donor: SinkTrace) -> Tensor:
    """The sink positions of another image that are no sinks here, of the kind edited in the row."""
    check_trace(donor, "a donor")
    if donor.v_sinks.shape != trace.v_sinks.shape:
        raise InterventionError(
            f"Got a donor with a prompt of shape {tuple(donor.v_sinks.shape)}; expected "
            f"{tuple(trace.v_sinks.shape)}. Use the same question on another image."
        )
    there = donor.v_sinks | (donor.l_sinks() | donor.text_sinks()).any(dim=1)
    flat = by_layer(mask).any(dim=1)
    out = torch.zeros_like(flat)
    for kind, (all_of_kind, ordinary) in kinds(trace).items():
        edited = (flat & all_of_kind).any(dim=1)
        free = there & ordinary & ~flat & edited[:, None]
        without = (edited & ~free.any(dim=1)).nonzero().flatten().tolist()
        if without:
            raise NoEffectError(
                f"The other image's {kind} sinks lie where this one has sinks too in the rows "
                f"{without}, or there are none; expected other positions. Choose another donor."
            )
        out |= free
    return out if mask.ndim == 2 else out[:, None] & mask.any(dim=2, keepdim=True)


def check_trace(trace: Any, what: str) -> None:
    """Refuse what is no trace."""
    if not hasattr(trace, "v_sinks"):
        came = f"Got {type(trace).__name__} as {what}"
        raise InterventionError(f"{came}; expected a trace. Write ss.trace_sinks(lvlm, sample).")


@dataclass(frozen=True)
class EditSinks:
    """Edit one kind of sink, or as many random ordinary tokens: a condition.

    ``kind`` is ``"V-sinks"``, ``"L-sinks"``, ``"text sinks"`` or ``"top attended"``: ``k`` per row. ``edit``
    is ``"mask"``, ``"halve"`` (the attention weights), ``"zero value"``, ``"mean value"`` or ``"resample
    value"``, in the blocks ``layers``, None for all. ``control`` edits random tokens of the same number
    instead, drawn by ``seed`` and the images and texts of the batch. A row with too few is left unedited
    and counted; see `uncontrolled`.

    ``rule="frozen"`` edits the sinks of the trace, an unedited pass; ``"live"`` asks the trace's L rule anew
    in every layer of the edited pass (see `LiveRule`); the trace's V-sinks are no L-sinks there either. It is
    for L-sinks and text sinks, and not for ``"resample value"`` or a control, which are drawn beforehand.
    """

    kind: str
    edit: str = "mask"
    layers: Any = None
    control: bool = False
    k: int = 1
    seed: int = 0
    rule: str = "frozen"

    def __post_init__(self) -> None:
        check_choice((*KINDS, TOP), kind=self.kind)
        check_choice(RULES, rule=self.rule)
        check_choice(EDITS, edit=self.edit)
        check_flags(control=self.control)
        check_whole(1, k=self.k)
        check_whole(0, seed=self.seed)
        layers = plain(self.layers)
        several = isinstance(layers, Iterable) and not isinstance(layers, str)
        wanted: Any = layers if several else [0 if layers is None else layers]
        if not all(is_whole(layer, 0) for layer in wanted):
            raise LayerError(
                f"Got layers={self.layers!r}; expected block indices, or None for all."
            )
        fixed = {"kind": self.kind} if self.kind not in LIVE_KINDS else {}
        fixed |= {"edit": self.edit} if self.edit == "resample value" else {}
        fixed |= {"control": True} if self.control else {}
        if fixed and self.rule == "live":
            said = ", ".join(f"{name}={value!r}" for name, value in fixed.items())
            raise InterventionError(
                f"Got rule='live' with {said}; expected rule='frozen': that is settled before the decoder "
                f"runs, or drawn before the pass. A live rule judges {LIVE_KINDS}."
            )

    def __call__(self, trace: SinkTrace) -> Sequence[Any]:
        """The interventions for the trace of a batch; none if it has no such token."""
        mask = sinks_of(trace, self.kind, self.k).clone()
        mask[self.uncontrolled(trace)] = False
        if mask.any() and self.control:
            generator = torch.Generator().manual_seed(content_seed(trace.sample, self.seed))
            mask = random_like(mask, trace, generator)
        if not mask.any():  # then a live rule would flag nothing either
            return []
        return [EDITS[self.edit](self._live(trace) if self.rule == "live" else mask, self.layers)]

    def _live(self, trace: SinkTrace) -> LiveRule:
        """The L rule among the tokens of the kind."""
        visual, live = trace.sample.tokens.image >= 0, trace.sample.tokens.live
        among = visual & ~trace.v_sinks if self.kind == "L-sinks" else live & ~visual
        return LiveRule.of_trace(trace, among)

    def uncontrolled(self, trace: SinkTrace) -> Tensor:
        """Bool ``[batch]``: rows with such tokens, for which no control could be drawn."""
        mask = by_layer(sinks_of(trace, self.kind, self.k))
        short = torch.zeros(len(mask), dtype=torch.bool)
        for all_of_kind, ordinary in kinds(trace).values():
            pool = (ordinary & ~mask.any(dim=1)).sum(dim=1, keepdim=True)
            short |= ((mask & all_of_kind[:, None]).sum(dim=2) > pool).any(dim=1)
        return mask.flatten(1).any(dim=1) & short & self.control
