"""Prior methods as conditions of `compare`, one line each.

::

    from sinkscope import baselines

    ss.compare(lvlm, questions, {
        "base": [],
        "VAR": baselines.var("paper"),
        "to the front": baselines.sink_to_front(),
        "weights": baselines.token_weights(sink=0.5),
        "one cell": baselines.fixed_coefficients(layer=10, s_v=0.2, s_rest=0.8),
        "its control": baselines.random_tokens(baselines.fixed_coefficients(10, 0.2, 0.8)),
        "gate": [gate],
        "LoRA": baselines.lora(lvlm, train, layer=10, like=gate),
    })

Each gets the `SinkTrace` of a batch, so the detectors of `compare` decide what a sink is. Rows in which
a method has nothing to work with stay as they are, and the table says so (``touched``, ``sinks``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from sinkscope.checks import check_whole
from sinkscope.detectors.random import RandomTokens
from sinkscope.errors import InputError, nearest
from sinkscope.experiments.conditions import EditSinks, content_seed, sink_masks
from sinkscope.experiments.lora import LoRA, lora
from sinkscope.experiments.trace import SinkTrace
from sinkscope.interventions import Redistribute, ScaleKeys, ScaleTokens, SinkToFront
from sinkscope.interventions.attention import check_factor
from sinkscope.interventions.running import tolerant
from sinkscope.lsg import LSG
from sinkscope.lsg.choosing import check_layer
from sinkscope.lsg.config import describe

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
        return [tolerant(it) for it in self.make(trace)]


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
