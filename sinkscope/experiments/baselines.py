"""Conditions for `compare`: edits of sinks or of as many random tokens, and prior methods."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, cast

from sinkscope.checks import (
    among,
    check_choice,
    check_number,
    check_whole,
    is_number,
    typed,
)
from sinkscope.detectors import Detector, RandomTokens
from sinkscope.errors import InputError, InterventionError
from sinkscope.experiments.comparing import Comparison, Condition, compare
from sinkscope.experiments.gating import LoRA, lora
from sinkscope.experiments.sink_edits import (
    EDITS,
    KINDS,
    LIVE_KINDS,
    TOP,
    EditSinks,
    split,
    with_random_sinks,
)
from sinkscope.experiments.tracing import SinkTrace
from sinkscope.interventions import Redistribute, ScaleKeys, ScaleTokens, SinkToFront
from sinkscope.interventions.application import allowing_noop
from sinkscope.interventions.live import RULES
from sinkscope.lsg import LSG, describe
from sinkscope.lsg.config import check_layer
from sinkscope.models.lvlm import LVLM

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

BASE = "base"


@typed
def effect_conditions(
    *,
    edits: Sequence[str] = ("mask", "halve"),
    layers: Any = None,
    top: int = 4,
    controls: bool = True,
    seed: int = 0,
    rule: str = "frozen",
) -> dict[str, Condition]:
    """Make conditions for `compare`: every edit of every kind of sink, and of as many random tokens.

    ``edits``, ``layers`` and ``rule`` are those of `EditSinks`, ``rule`` for L-sinks and text sinks; the
    three replacements of values are best reported side by side. ``top`` of the image tokens that receive
    the most attention are edited too. ``controls`` adds the same edits of random tokens that are no sinks.
    Gives name -> condition, ``"base"`` first.
    """
    listed = [] if isinstance(edits, str) else [*edits]
    if not listed or not all(among(one, EDITS) for one in listed):
        raise InputError(f"Got edits={edits!r}; expected some of {list(EDITS)}, as a list.")
    check_choice(RULES, rule=rule)
    check_whole(0, hint="Write 0 for none.", top=top)
    named = [(kind, kind, kind, 1) for kind in KINDS]
    named += [(TOP, f"the top {top} attended", f"the top {top}", top)] if top else []
    out: dict[str, Condition] = {BASE: []}
    for (kind, name, number, k), edit in product(named, listed):
        how = rule if kind in LIVE_KINDS else "frozen"
        out[f"{edit} {name}"] = EditSinks(kind, edit, layers, k=k, rule=how)
        if controls:
            control = EditSinks(kind, edit, layers, True, k, seed)
            out[f"{edit} random, as many as {number}"] = control
    return out


@typed
def effect_table(
    lvlm: LVLM,
    dataset: Iterable[Any],
    *,
    v_detector: Detector | None = None,
    l_detector: Detector | None = None,
    batch: int = 16,
    progress: bool | None = None,
    **options: Any,
) -> Comparison:
    """Compare masked and scaled sinks, and as many random tokens, by a model's answers.

    The arguments are those of `compare`, ``options`` those of `effect_conditions`. ``.estimates()`` is the
    table, ``.plot()`` the figure, ``sinkscope.viz.effects_text(table.estimates())`` the lines for a terminal.
    """
    rules: Any = {"v_detector": v_detector, "l_detector": l_detector}
    made = effect_conditions(**options)
    return compare(lvlm, dataset, made, **rules, batch=batch, progress=progress)


@dataclass(frozen=True)
class Method:
    """A condition by name: a function from the trace of a batch to interventions, and its options."""

    name: str
    make: Callable[[SinkTrace], Sequence[Any]] = field(repr=False)
    options: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, trace: SinkTrace) -> list[Any]:
        """The interventions for the trace of a batch, for which touching nothing is fine."""
        return [allowing_noop(it) for it in self.make(trace)]


def var(
    preset: str = "paper",
    *,
    layers: Any = None,
    p: float = 0.6,
    rho: float | None = None,
    rule: str = "frozen",
) -> Method:
    """Move attention from sinks to the other image tokens: VAR (Kang et al. 2503.03321).

    `Redistribute` with the L rule of the trace, which flags V-sinks only where they meet it too, in
    ``layers``, None for all from 2 on, as published. ``"paper"`` recycles ``p`` and asks for a non-sink
    share of at least ``rho``, 0.8 (general tasks) if None; ``"code"``, the released one, keeps ``p`` and
    asks for a sink share of at most ``rho``, 0.5 if None. ``p`` is 0.6 in both. ``rule="frozen"`` takes the
    sinks of the trace; ``"live"``, as the released code, asks its L rule in every layer of the edited pass.
    """
    check_choice(("paper", "code"), preset=preset)
    check_choice(RULES, rule=rule)
    share = (0.8 if preset == "paper" else 0.5) if rho is None else rho
    for name, value in (("p", p), ("rho", share)):
        if not is_number(value, 0.0) or value > 1:
            raise InputError(f"Got {name}={value!r}; expected a share from 0 to 1.")
    build = Redistribute.var_paper if preset == "paper" else Redistribute.var_code
    options = {"preset": preset, "layers": layers, "p": p, "rho": share, "rule": rule}
    return Method("VAR", lambda trace: [build(trace, layers, p=p, rho=share, rule=rule)], options)


def sink_to_front(sinks: str = "V-sinks") -> Method:
    """Move sinks to the start of their image block: sink-to-the-front (2510.08510).

    Their embeddings move and the positions of the LLM stay, see `SinkToFront`. ``sinks`` is
    ``"V-sinks"`` as in the paper, ``"L-sinks"`` (at any layer) or ``"visual sinks"``, both. They are those of
    the trace: the embeddings move before any layer could judge them live.
    """
    _check_groups(sinks)
    options = {"sinks": sinks}
    return Method("sink to the front", lambda t: [SinkToFront(split(t, sinks)[0])], options)


def token_weights(sink: float = 1.0, rest: float = 1.0, *, sinks: str = "V-sinks") -> Method:
    """Multiply the embeddings of image tokens by group, as DIYSink's ReW does (2510.08510).

    ReW learns both weights from the question; these are constants: of ``sinks`` (see
    `sink_to_front`) and of all other image tokens; set before any layer too. InputError if both are 1.
    """
    options: Any = {"sink": sink, "rest": rest, "sinks": sinks}
    _check_groups(**options)
    return Method("token weights", lambda t: _scaled(t, sinks, (sink, rest), ScaleTokens), options)


def fixed_coefficients(
    layer: int | str, s_v: float, s_rest: float, *, sinks: str = "V-sinks"
) -> Method:
    """Scale keys as a gate with constant coefficients: one cell of the map of a sweep (2604.03316).

    ``layer`` is as for a gate: keys are scaled in block ``layer + 1``, or in block 0 for ``"embed"``, and
    a LayerError comes when it is used. Keys of ``sinks`` (see `sink_to_front`) are multiplied by ``s_v``,
    those of all other image tokens by ``s_rest``; InputError if both are 1, which is the base. The sinks are
    those of the trace: nothing is edited before the one block, so a live rule would flag the same there.
    """
    _check_groups(sinks, s_v=s_v, s_rest=s_rest)

    def make(trace: SinkTrace) -> Sequence[Any]:
        where = check_layer(layer, trace.n_layers)
        edited = [0 if isinstance(where, str) else where + 1]
        return _scaled(trace, sinks, (s_v, s_rest), ScaleKeys, edited)

    options = {"layer": layer, "s_v": s_v, "s_rest": s_rest, "sinks": sinks}
    return Method("fixed coefficients", make, options)


def _scaled(trace: SinkTrace, sinks: str, factors: Sequence[float], edit: Any, *where: Any) -> Any:
    """Edits of the sinks and of the other image tokens, where the factor is not 1."""
    pairs = zip(split(trace, sinks), factors, strict=True)
    return [edit(tokens, factor, *where) for tokens, factor in pairs if factor != 1.0]


def _check_groups(sinks: str, **factors: Any) -> None:
    check_choice(("V-sinks", "L-sinks", "visual sinks"), sinks=sinks)
    check_number(error=InterventionError, **factors)
    if factors and set(factors.values()) == {1.0}:
        said = " and ".join(f"{name}={factor}" for name, factor in factors.items())
        raise InputError(f"Got {said}, which change nothing; expected others. The base is [].")


def random_tokens(condition: Any, *, count: int | None = None, seed: int = 0) -> Any:
    """Make the control of a condition: random ordinary tokens in the place of the sinks.

    For gates the rule of every group of sinks is replaced by ``RandomTokens(count)``, with other tokens for
    V than for L (V wins), and the weights stay: ``count`` tokens of every image are V-sinks, and of every
    prompt's image tokens L-sinks. The draw depends on ``seed`` and on the images and texts.
    """
    check_whole(0, seed=seed)
    if isinstance(condition, EditSinks):
        return replace(condition, control=True, seed=seed)
    listed = isinstance(condition, (list, tuple)) and bool(condition)
    if listed and all(isinstance(it, LSG) for it in condition):
        if count is None:
            wanted = "how many random tokens count as sinks. Write count=4"
            raise InputError(f"Got gates without a count; expected {wanted}.")
        seeds = {"V": seed, "L": seed + 1_000_003}  # other tokens for L, also with the next seeds
        rules = {kind: describe(RandomTokens(count, own)) for kind, own in seeds.items()}
        gates = []
        for gate in condition:
            own = {f"{kind.lower()}_detector": rules[kind] for kind in rules if kind in gate.groups}
            gates.append(LSG(replace(gate.config, **own), allow_noop=gate.allow_noop))
            gates[-1].load_state_dict(gate.state_dict())
            gates[-1].to(next(gate.parameters()).device)
        return gates
    if isinstance(condition, (list, tuple, LSG, LoRA)) or not callable(condition):
        raise InputError(
            f"Got {condition!r}; expected a function of a trace, whose sinks can be others, or a list "
            "of gates. Write lambda trace: [ss.MaskKeys(trace.v_sinks)]."
        )
    if count is not None:
        came = f"Got count={count} for a function of a trace"
        raise InputError(f"{came}; expected none: as many as there are sinks.")
    options, made = {"condition": condition, "seed": seed}, cast("Callable[..., Any]", condition)
    return Method("random tokens", lambda t: made(with_random_sinks(t, seed)), options)
