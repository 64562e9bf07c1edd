"""Ready-made conditions for `compare`: mask and scale sinks, and the same for random tokens."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sinkscope.checks import check_flags, check_whole
from sinkscope.detectors.kinds import RandomTokens, describe
from sinkscope.errors import InputError, nearest
from sinkscope.experiments.comparing import Comparison, Condition, compare
from sinkscope.experiments.controls import RandomControl, drawable
from sinkscope.experiments.lora import LoRA, lora
from sinkscope.experiments.tracing import SinkTrace
from sinkscope.interventions import (
    AblateValues,
    MaskKeys,
    Redistribute,
    ScaleAttention,
    ScaleKeys,
    ScaleTokens,
    SinkToFront,
)
from sinkscope.interventions.application import allowing_noop
from sinkscope.interventions.keys import check_factor
from sinkscope.interventions.values import REPLACEMENTS
from sinkscope.lsg import LSG
from sinkscope.lsg.building import check_layer
from sinkscope.models.inputs import Sample

if TYPE_CHECKING:
    from sinkscope.detectors.rules import Detector
    from sinkscope.models.lvlm import LVLM

KINDS = ("V-sinks", "L-sinks", "text sinks")

TOP = "top attended"


@dataclass(frozen=True)
class Edit:
    """A kind of edit of a token mask, by name: mask, halve, or replace the values."""

    name: str
    make: Callable[[Any, Any], Any]


EDITS = (
    Edit("mask", lambda tokens, layers: MaskKeys(tokens, layers, allow_noop=True)),
    Edit("halve", lambda tokens, layers: ScaleAttention(tokens, 0.5, layers, allow_noop=True)),
    *(
        Edit(
            f"{how} value",
            lambda tokens, layers, how=how: AblateValues(tokens, how, layers, allow_noop=True),
        )
        for how in REPLACEMENTS
    ),
)


def sink_masks(trace: SinkTrace) -> dict[str, Tensor]:
    """The masks of a trace that can be edited, by name: `KINDS`."""
    masks = (trace.v_sinks, trace.l_sinks(), trace.text_sinks())
    return dict(zip(KINDS, masks, strict=True))


def top_received(trace: SinkTrace, k: int = 1) -> Tensor:
    """The ``k`` image tokens of every row that receive the most attention, bool ``[batch pos]``.

    Not sinks by any activation rule: what a model's strongest attractors are where no sink is found.
    """
    visual = trace.sample.tokens.image >= 0
    received = trace.received.nan_to_num().mean(dim=(1, 2)).masked_fill(~visual, -1.0)
    out = torch.zeros_like(visual)
    out.scatter_(1, received.topk(min(k, received.shape[1]), dim=1).indices, True)
    return out & visual


@dataclass(frozen=True)
class EditSinks:
    """A condition: one edit of one kind of sink, or of as many random ordinary tokens.

    Args:
        kind: A key of `sink_masks`, or ``"top attended"``.
        edit: A name among `EDITS`.
        layers: Block indices, or None for all.
        control: Whether to edit random tokens of the same number instead. A row with too few
            ordinary tokens is left unedited and counted; see `uncontrolled`.
        k: How many tokens ``"top attended"`` takes per row.
        seed: Of the control's draw, which also depends on the images and texts of the batch: other
            images, other positions.

    Raises:
        InputError: If the kind or the edit is unknown, or a number or a switch is of another type.
    """

    kind: str
    edit: str = "mask"
    layers: Any = None
    control: bool = False
    k: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        known = ("kind", self.kind, (*KINDS, TOP)), ("edit", self.edit, [e.name for e in EDITS])
        for name, value, choices in known:
            if value not in choices:
                raise InputError(f"Got {name}={value!r}; expected one of {tuple(choices)}.")
        check_flags(control=self.control)
        check_whole(1, k=self.k)
        check_whole(0, seed=self.seed)

    def __call__(self, trace: SinkTrace) -> Sequence[Any]:
        """The interventions for the trace of a batch; none if it has no such token."""
        mask = self._mask(trace)
        left = ~self.uncontrolled(trace)
        mask = mask & (left[:, None] if mask.ndim == 2 else left[:, None, None])
        make = next(edit.make for edit in EDITS if edit.name == self.edit)
        if not mask.any():
            return []
        real = make(mask, self.layers)
        if not self.control:
            return [real]
        seed = content_seed(trace.sample, self.seed)
        return list(RandomControl(real, "count", n=1, seed=seed).draws(trace))

    def uncontrolled(self, trace: SinkTrace) -> Tensor:
        """Bool ``[batch]``: rows with such tokens, for which no control could be drawn.

        `compare` puts them into its table, and summaries tell their share.
        """
        mask = self._mask(trace)
        return mask.flatten(1).any(dim=1) & ~drawable(mask, trace) & self.control

    def _mask(self, trace: SinkTrace) -> Tensor:
        """The tokens of this kind."""
        return top_received(trace, self.k) if self.kind == TOP else sink_masks(trace)[self.kind]


def content_seed(sample: Sample, seed: int) -> int:
    """A seed that differs from sample to sample, and is the same for the same one.

    With one seed for a whole data set the "random" tokens would be the same positions of every image.
    """
    digest = seed
    for name in sorted(sample.inputs):
        value = sample.inputs[name]
        if isinstance(value, Tensor):
            digest = zlib.crc32(value.detach().cpu().double().numpy().tobytes(), digest)
    return digest


BASE = "base"


def effect_conditions(
    *,
    edits: Sequence[str] = ("mask", "halve"),
    layers: Any = None,
    top: int = 4,
    controls: bool = True,
    seed: int = 0,
) -> dict[str, Condition]:
    """Conditions for `compare`: every edit of every kind of sink, and of as many random tokens.

    Args:
        edits: Among ``"mask"``, ``"halve"`` (the attention weights), and ``"zero value"``,
            ``"mean value"`` and ``"resample value"``, which are best reported side by side.
        layers: Block indices to edit in, or None for all.
        top: How many of the image tokens that receive the most attention to edit too, sinks or
            not; 0 for none.
        controls: Whether to add the same edits of as many random tokens that are no sinks.
        seed: Of the random tokens.

    Returns:
        Name -> condition; ``"base"``, without any edit, comes first.

    Raises:
        InputError: If an edit is unknown or ``top`` is negative.
    """
    known = [edit.name for edit in EDITS]
    unknown = [name for name in edits if name not in known]
    if isinstance(edits, str) or unknown or not edits:
        raise InputError(f"Got edits={edits!r}; expected some of {known}, as a list.")
    check_flags(controls=controls)
    if isinstance(top, bool) or not isinstance(top, int) or top < 0:
        raise InputError(f"Got top={top!r}; expected a number of tokens, 0 for none.")
    named = [(kind, kind, f"as many as {kind}", 1) for kind in KINDS]
    if top:
        named.append((TOP, f"the top {top} attended", f"as many as the top {top}", top))
    out: dict[str, Condition] = {BASE: []}
    for kind, name, number, k in named:
        for edit in edits:
            out[f"{edit} {name}"] = EditSinks(kind, edit, layers, k=k)
            if controls:
                out[f"{edit} random, {number}"] = EditSinks(kind, edit, layers, True, k, seed)
    return out


def effect_table(
    lvlm: LVLM,
    dataset: Iterable[Any],
    *,
    v_detector: Detector | None = None,
    l_detector: Detector | None = None,
    edits: Sequence[str] = ("mask", "halve"),
    layers: Any = None,
    top: int = 4,
    controls: bool = True,
    seed: int = 0,
    batch: int = 16,
    progress: bool | None = None,
) -> Comparison:
    """What masking and scaling sinks, and as many random tokens, does to a model's answers.

    Args:
        lvlm: The model.
        dataset: Questions; see `compare`.
        v_detector: For V-sinks, best calibrated on other images; None: see `trace_sinks`.
        l_detector: For L-sinks and text sinks, likewise.
        edits: See `effect_conditions`.
        layers: Block indices to edit in, or None for all.
        top: How many of the most attended image tokens to edit too; 0 for none.
        controls: Whether to edit random tokens too.
        seed: Of the random tokens.
        batch: The most questions per forward pass.
        progress: Whether to show a progress bar; None shows it from 50 questions on.

    Returns:
        The comparison: ``.summary()`` is the table, ``.plot()`` the figure, and
        ``sinkscope.viz.effects_text(table.summary())`` the lines for a terminal.

    Raises:
        InputError: If the dataset is empty or malformed, or an option is out of range.
    """
    conditions = effect_conditions(
        edits=edits, layers=layers, top=top, controls=controls, seed=seed
    )
    return compare(
        lvlm,
        dataset,
        conditions,
        v_detector=v_detector,
        l_detector=l_detector,
        batch=batch,
        progress=progress,
    )


__all__ = [
    "LoRA",
    "Method",
    "fixed_coefficients",
    "lora",
    "random_tokens",
    "sink_to_front",
    "token_weights",
    "var",
]

PRESETS = ("paper", "code")

VISUAL = "visual sinks"

SINKS = ("V-sinks", "L-sinks", VISUAL)

L_SEED = 1_000_003

"""Added to the seed of random L-sinks: not the tokens of random V-sinks, nor those of the next seeds."""


@dataclass(frozen=True)
class Method:
    """A condition by name: from the trace of a batch to interventions.

    Attributes:
        name: What it is called.
        make: The function.
        options: What it was made with.
    """

    name: str
    make: Callable[[SinkTrace], Sequence[Any]] = field(repr=False)
    options: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, trace: SinkTrace) -> list[Any]:
        """The interventions for the trace of a batch, for which touching nothing is fine."""
        return [allowing_noop(it) for it in self.make(trace)]


def var(
    preset: str = "paper", *, layers: Any = None, p: float = 0.6, rho: float | None = None
) -> Method:
    """VAR: move attention from sinks to the other image tokens (Kang et al. 2503.03321).

    `Redistribute` with the L rule of the trace, which flags V-sinks only where they meet it too.

    Args:
        preset: ``"paper"`` recycles ``p`` and asks for a non-sink share of at least ``rho``;
            ``"code"``, the released one, keeps ``p`` and asks for a sink share of at most ``rho``.
        layers: Block indices; None for all from 2 on, as published.
        p: 0.6 in both.
        rho: None for 0.8 (paper, general tasks) or 0.5 (code).

    Raises:
        InputError: If the preset is unknown.
        InterventionError: If p or rho is no share.
    """
    if preset not in PRESETS:
        raise InputError(
            f"Got preset={preset!r}; expected one of {PRESETS}. {nearest(str(preset), PRESETS)}"
        )
    share = (0.8 if preset == "paper" else 0.5) if rho is None else rho
    for name, value in (("p", p), ("rho", share)):
        if check_factor(name, value, 0.0) > 1:
            raise InputError(f"Got {name}={value!r}; expected a share from 0 to 1.")
    build = Redistribute.var_paper if preset == "paper" else Redistribute.var_code
    options = {"preset": preset, "layers": layers, "p": p, "rho": share}
    return Method("VAR", lambda trace: [build(trace, layers, p=p, rho=share)], options)


def sink_to_front(sinks: str = "V-sinks") -> Method:
    """Sink-to-the-front: move sinks to the start of their image block (2510.08510).

    Their embeddings move and the positions of the LLM stay, see `SinkToFront`. The paper moves the
    ViT's position embeddings along, which an embedding behind the ViT carries with it.

    Args:
        sinks: ``"V-sinks"`` as in the paper, ``"L-sinks"`` (at any layer) or ``"visual sinks"``, both.

    Raises:
        InputError: If the kind is unknown.
    """
    check_kind(sinks)

    def make(trace: SinkTrace) -> Sequence[Any]:
        return [SinkToFront(sinks_of(trace, sinks), allow_noop=True)]

    return Method("sink to the front", make, {"sinks": sinks})


def token_weights(sink: float = 1.0, rest: float = 1.0, *, sinks: str = "V-sinks") -> Method:
    """Weights of tokens by group, as DIYSink's ReW sets them (2510.08510), here fixed.

    ReW learns both weights from the question; these are constants. The embeddings of sinks and of all
    other image tokens are multiplied as they enter the LLM.

    Args:
        sink: The weight of sinks.
        rest: The weight of all other image tokens.
        sinks: See `sink_to_front`.

    Raises:
        InputError: If both weights are 1, or the kind is unknown.
    """
    check_kind(sinks)
    check_not_neutral("sink", sink, "rest", rest)

    def make(trace: SinkTrace) -> Sequence[Any]:
        pairs = zip(groups_of(trace, sinks), (sink, rest), strict=True)
        return [ScaleTokens(mask, s, allow_noop=True) for mask, s in pairs if s != 1.0]

    return Method("token weights", make, {"sink": sink, "rest": rest, "sinks": sinks})


def fixed_coefficients(
    layer: int | str, s_v: float, s_rest: float, *, sinks: str = "V-sinks"
) -> Method:
    """A gate that does not read: one cell of the paper's map of layers and pairs (2604.03316).

    Args:
        layer: As for a gate: keys are scaled in block ``layer + 1``, or in block 0 for ``"embed"``.
        s_v: What keys of sinks are multiplied by.
        s_rest: What keys of all other image tokens are multiplied by.
        sinks: See `sink_to_front`.

    Raises:
        InputError: If both coefficients are 1, which is the base, or the kind is unknown.
        LayerError: When it is used, if there is no such layer.
    """
    check_kind(sinks)
    check_not_neutral("s_v", s_v, "s_rest", s_rest)

    def make(trace: SinkTrace) -> Sequence[Any]:
        where = check_layer(layer, trace.n_layers)
        edited = 0 if isinstance(where, str) else where + 1
        pairs = zip(groups_of(trace, sinks), (s_v, s_rest), strict=True)
        return [ScaleKeys(mask, s, [edited], allow_noop=True) for mask, s in pairs if s != 1.0]

    options = {"layer": layer, "s_v": s_v, "s_rest": s_rest, "sinks": sinks}
    return Method("fixed coefficients", make, options)


def random_tokens(condition: Any, *, count: int | None = None, seed: int = 0) -> Any:
    """The control: the same condition, with random ordinary tokens in the place of the sinks.

    For a function of the trace, every visual sink trades places with a random image token that is a
    sink at no layer, so numbers, layers and overlaps stay as they were; text sinks stay. A row with
    fewer ordinary tokens than sinks is left without any. For gates, the rule of every group of sinks
    is replaced by ``RandomTokens(count)``, with other tokens for V than for L, and the weights stay.
    As with sinks, V wins over L where both rules take a token.

    Args:
        condition: A function of the trace, such as those of this module, or a list of gates.
        count: For gates only: how many tokens of every image count as V-sinks, and of every prompt's
            image tokens as L-sinks, where the gate has such a group.
        seed: Of the draw, which also depends on the images and texts.

    Returns:
        A condition of the same kind.

    Raises:
        InputError: If the condition is of another kind, or ``count`` does not fit it.
    """
    check_whole(0, seed=seed)
    if isinstance(condition, EditSinks):
        return replace(condition, control=True, seed=seed)
    gates = isinstance(condition, (list, tuple)) and bool(condition)
    if gates and all(isinstance(it, LSG) for it in condition):
        if count is None:
            raise InputError(
                "Got gates without a count; expected how many random tokens count as sinks. Write "
                "baselines.random_tokens([gate], count=4)."
            )
        return [with_random_rule(gate, count, seed) for gate in condition]
    if isinstance(condition, (list, tuple, LSG, LoRA)) or not callable(condition):
        raise InputError(
            f"Got {condition!r}; expected a function of a trace, whose sinks can be others, or a list "
            "of gates. Write lambda trace: [ss.MaskKeys(trace.v_sinks)]."
        )
    if count is not None:
        raise InputError(
            f"Got count={count} for a function of a trace; expected none: as many tokens are drawn as "
            "there are sinks."
        )

    function: Any = condition

    def make(trace: SinkTrace) -> Sequence[Any]:
        return function(elsewhere(trace, seed))

    return Method("random tokens", make, {"condition": condition, "seed": seed})


def with_random_rule(gate: LSG, count: int, seed: int) -> LSG:
    """A gate of the same weights whose sinks are random tokens, in every group that it has."""
    seeds = {"V": seed, "L": seed + L_SEED}
    rules = {
        f"{kind.lower()}_detector": describe(RandomTokens(count, own))
        for kind, own in seeds.items()
        if kind in gate.groups
    }
    out = LSG(replace(gate.config, **rules), allow_noop=gate.allow_noop)
    out.load_state_dict(gate.state_dict())
    return out.to(next(gate.parameters()).device)


def elsewhere(trace: SinkTrace, seed: int = 0) -> SinkTrace:
    """The trace with every visual sink in the place of a random ordinary image token.

    Args:
        trace: A trace.
        seed: Of the draw; see `content_seed`.

    Returns:
        A trace for conditions: ``v_sinks`` and ``l_detection`` are moved, measurements stay.
    """
    generator = torch.Generator().manual_seed(content_seed(trace.sample, seed))
    v, rule = trace.v_sinks.clone(), trace.l_detection.mask.clone()
    visual, ordinary = trace.sample.tokens.image >= 0, trace.ordinary()
    for b in range(len(v)):
        old = (visual[b] & ~ordinary[b]).nonzero().flatten()
        pool = ordinary[b].nonzero().flatten()
        new = pool[torch.randperm(len(pool), generator=generator)][: len(old)]
        for mask in (v[b], rule[b]):  # [pos] and [layer pos]
            moved = mask[..., old[: len(new)]].clone()
            mask[..., old] = False
            if len(new) == len(old):
                mask[..., new] = moved
    return replace(trace, v_sinks=v, l_detection=replace(trace.l_detection, mask=rule))


def sinks_of(trace: SinkTrace, kind: str) -> Tensor:
    """Visual sinks of a kind, bool ``[batch pos]``; L-sinks of any layer."""
    if kind == VISUAL:
        return sinks_of(trace, "V-sinks") | sinks_of(trace, "L-sinks")
    mask = sink_masks(trace)[kind]
    return mask if mask.ndim == 2 else mask.any(dim=1)


def groups_of(trace: SinkTrace, kind: str) -> tuple[Tensor, Tensor]:
    """Sinks of a kind and all other image tokens, bool ``[batch pos]``."""
    mask = sinks_of(trace, kind)
    return mask, (trace.sample.tokens.image >= 0) & ~mask


def check_kind(kind: str) -> None:
    """Refuse an unknown kind of sink.

    Raises:
        InputError: If it is none of `SINKS`.
    """
    if kind not in SINKS:
        raise InputError(f"Got sinks={kind!r}; expected one of {SINKS}. {nearest(kind, SINKS)}")


def check_not_neutral(one: str, first: float, other: str, second: float) -> None:
    """Refuse two factors of 1.

    Raises:
        InputError: If so.
        InterventionError: If one is no finite number.
    """
    if check_factor(one, first) == check_factor(other, second) == 1.0:
        raise InputError(
            f"Got {one}={first} and {other}={second}, which change nothing; expected another pair. "
            "The base is the condition []."
        )
