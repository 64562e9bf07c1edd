"""What `trace_generation` returns: the attention of every step, and one record per sink of prompt and answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sinkscope.detectors.choice import SinkRules
from sinkscope.detectors.detection import check_detector
from sinkscope.detectors.rules import Detector, NoSinks, decide
from sinkscope.errors import DetectorError, InputError
from sinkscope.experiments.tracing import SinkTrace
from sinkscope.models.inputs import Sample
from sinkscope.models.lvlm import LVLM
from sinkscope.models.runs import Generation
from sinkscope.models.token_map import words_of
from sinkscope.probes import CosineToFirst, ReceivedAttention, SinkEvidence
from sinkscope.results import Result

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

Words = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class SinkLife:
    """One sink while the model speaks.

    Attributes:
        kind: ``"V"``, ``"L"`` or ``"text"`` in the prompt, ``"generated"`` in the answer.
        batch: Row of the batch.
        pos: Position in prompt and answer, counted with the padding.
        word: The token's text.
        born_step: 0 in the prompt; in the answer the step whose pass computed the token's state.
        last_step: The last step at which it draws, None if it never does.
        seen_until: The last step at which a later query sees it in some layer, None if there is none.
        drawn_steps: At how many steps it draws.
        seen_steps: At how many steps a later query sees it.
        layers: LLM layers on whose input it meets the L rule.
        max_mass: The largest share that a head of a later query gives it, 0 to 1; NaN if none sees it.
        at: The step and the layer of that share, None if none sees it.
        null: What uniform attention gives it there.
    """

    kind: str
    batch: int
    pos: int
    word: str | None
    born_step: int
    last_step: int | None
    seen_until: int | None
    drawn_steps: int
    seen_steps: int
    layers: tuple[int, ...]
    max_mass: float
    at: tuple[int, int] | None
    null: float

    @property
    def fate(self) -> str:
        """``"alive"`` at the end, ``"dead"`` before, ``"draws nothing"`` or ``"not read"`` by any later query."""
        if self.seen_until is None:
            return "not read"
        if self.last_step is None:
            return "draws nothing"
        return "alive" if self.last_step == self.seen_until else "dead"

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON-ready values."""
        return {**asdict(self), "fate": self.fate}


@dataclass(frozen=True, eq=False)
class GenerationTrace(Result):
    """Sinks while the model speaks.

    Step 0 is the pass over the prompt, whose query is the prompt's last token; the query of step s is the
    token that step s - 1 wrote. Keys are the tokens of prompt and answer up to the last that was read.

    Attributes:
        sample: The prompt.
        sequences: Int ``[batch pos]``: prompt and answer.
        text: The answers, or None without a tokenizer.
        words: The text of every token of prompt and answer, or None likewise.
        layers: The LLM layers.
        mass_max: Float ``[batch step layer key]`` in [0, 1]: the share that the head which gives the most gives
            to every key. NaN where the query does not see the key, at padding and after the answer's end.
        mass_mean: The same, mean over heads.
        null: Float ``[batch step layer]``: what uniform attention gives to each key that the query sees.
        flags: Bool ``[batch layer key]``: the L rule on what each layer reads, at the token's own step.
        lives: One `SinkLife` per sink.
        draws: How much more than ``null`` a head must give for a token to draw.
        detector: The L rule.
        chosen: How it came about.
    """

    sample: Sample
    sequences: Int[Tensor, "batch pos"]
    text: tuple[str, ...] | None
    words: Words | None
    layers: tuple[int, ...]
    mass_max: Float[Tensor, "batch step layer key"]
    mass_mean: Float[Tensor, "batch step layer key"]
    null: Float[Tensor, "batch step layer"]
    flags: Bool[Tensor, "batch layer key"]
    lives: tuple[SinkLife, ...]
    draws: float
    detector: str
    chosen: str

    @property
    def n_steps(self) -> int:
        """Forward passes, which is how many tokens were generated."""
        return self.mass_max.shape[1]

    def by_step(self) -> Float[Tensor, "batch step key"]:
        """The largest share that a head of any layer gives to every key, without what a token gives to itself."""
        return nan_max(by_others(self.mass_max, self.sample.tokens.ids.shape[1]), dim=2)

    def to_dataframe(self) -> pd.DataFrame:
        """One line per sink: every field of its record, and its fate."""
        import pandas as pd

        names = [*SinkLife.__dataclass_fields__, "fate"]
        return pd.DataFrame([life.to_dict() for life in self.lives], columns=names)

    def summary(self) -> str:
        """The sinks and their fates in a few lines, for a terminal."""
        from sinkscope.viz.generation import generation_text

        return generation_text(self)

    def plot(self, row: int = 0) -> Figure:
        """What the sinks draw at every step, with births and deaths, beside the most attended other tokens.

        Args:
            row: The row of the batch.

        Returns:
            A matplotlib figure.

        Raises:
            SelectionError: If there is no such row.
        """
        from sinkscope.viz.generation import plot_generation

        return plot_generation(self, row)

    def __repr__(self) -> str:
        fates = [life.fate for life in self.lives]
        said = ", ".join(f"{fates.count(fate)} {fate}" for fate in dict.fromkeys(fates)) or "none"
        return f"GenerationTrace({self.n_steps} steps; sinks: {said}; rule {self.chosen})"


def by_others(mass: Tensor, prompt: int) -> Tensor:
    """Attention ``[batch step layer key]`` with NaN where the key is the query's own.

    Args:
        mass: The attention.
        prompt: Length of the prompt.
    """
    steps, keys = torch.arange(mass.shape[1]), torch.arange(mass.shape[3])
    own = keys == prompt - 1 + steps[:, None]
    return mass.masked_fill(own[:, None], float("nan"))


def nan_max(values: Tensor, dim: int) -> Tensor:
    """The largest value that is not NaN; NaN where there is none. Values are at least -1."""
    out = values.nan_to_num(-2.0).amax(dim=dim)
    return out.masked_fill(out < -1, float("nan"))


def collect_lives(
    sample: Sample,
    words: Words | None,
    flags: Tensor,
    v_sinks: Tensor,
    mass_max: Tensor,
    null: Tensor,
    draws: float,
) -> tuple[SinkLife, ...]:
    """One record per token that meets the L rule in some layer or is a V-sink, in batch and position order.

    Args:
        sample: The prompt.
        words: The text of every token, or None.
        flags: Bool ``[batch layer key]``.
        v_sinks: Bool ``[batch pos]`` of the prompt.
        mass_max: Float ``[batch step layer key]``.
        null: Float ``[batch step layer]``.
        draws: How much more than the null a head must give.
    """
    prompt = sample.tokens.ids.shape[1]
    shares = by_others(mass_max, prompt)
    over = nan_max(shares - null[..., None], dim=2)  # [batch step key]
    found = flags.any(dim=1)
    found[:, :prompt] |= v_sinks
    return tuple(
        SinkLife(
            kind=_kind(sample, v_sinks, batch, pos),
            batch=batch,
            pos=pos,
            word=words[batch][pos] if words else None,
            born_step=max(0, pos - prompt + 1),
            layers=tuple(flags[batch, :, pos].nonzero().flatten().tolist()),
            **_life(over[batch, :, pos], draws),
            **_most(shares[batch, :, :, pos], null[batch]),
        )
        for batch, pos in found.nonzero().tolist()
    )


def _kind(sample: Sample, v_sinks: Tensor, batch: int, pos: int) -> str:
    if pos >= v_sinks.shape[1]:
        return "generated"
    if bool(v_sinks[batch, pos]):
        return "V"
    return "L" if int(sample.tokens.image[batch, pos]) >= 0 else "text"


def _life(over: Tensor, draws: float) -> dict[str, Any]:
    """When a token draws and is seen, from what it gets over its null at every step, NaN where unseen."""
    drawn = (over >= draws).nonzero().flatten().tolist()
    seen = (~over.isnan()).nonzero().flatten().tolist()
    return {
        "last_step": drawn[-1] if drawn else None,
        "seen_until": seen[-1] if seen else None,
        "drawn_steps": len(drawn),
        "seen_steps": len(seen),
    }


def _most(shares: Tensor, null: Tensor) -> dict[str, Any]:
    """The largest share ``[step layer]``, where it is, and the null there."""
    if bool(shares.isnan().all()):
        return {"max_mass": float("nan"), "at": None, "null": float("nan")}
    step, layer = divmod(int(shares.nan_to_num(-1.0).argmax()), shares.shape[1])
    return {
        "max_mass": float(shares[step, layer]),
        "at": (step, layer),
        "null": float(null[step, layer]),
    }


DRAWS = 0.2

"""A head that gives a token a fifth of its attention more than uniform attention would."""


def trace_generation(
    lvlm: LVLM,
    sample: Sample,
    l_detector: Detector | None = None,
    *,
    trace: SinkTrace | None = None,
    draws: float = DRAWS,
    max_new_tokens: int | None = None,
    remote: bool | str | None = None,
    **options: Any,
) -> GenerationTrace:
    """Generate an answer, and follow every sink of the prompt and of the answer step by step.

    At each step the new query's attention to every token is kept, exact, as the largest and the mean
    over the heads of each layer. A token *draws* at a step if some head of the new query, in any layer,
    gives it at least ``draws`` more than uniform attention under the same mask would; what a token gives
    to itself does not count. A sink *lives* as long as it draws, and *dies* with the last step at which it
    does. A generated token is *born* a sink at the step whose pass computes its state, if it meets the L
    rule there and draws at a later step.

    Args:
        lvlm: The model.
        sample: From ``lvlm.prepare``, padded on the left.
        l_detector: The rule for sinks of the LLM, on what each layer reads. None for published constants
            of the model, else for limits that are calibrated on the prompt (`calibrate`). Each
            token is judged when it appears, among the states that exist then; what a rule compares with (the
            median of a layer) is that of the prompt.
        trace: A trace of the same sample, to tell V-sinks from L-sinks; without it, image tokens that meet the
            L rule count as L-sinks, and V-sinks that do not are not listed.
        draws: How much more than uniform attention a head must give, in (0, 1).
        max_new_tokens: See `LVLM.generate`.
        remote: See `LVLM.run`.
        options: See `LVLM.generate`.

    Returns:
        The trace: one record per sink, and the attention of every step.

    Raises:
        InputError: If ``draws`` is no share, or ``trace`` is of another sample.
        DetectorError: If the rule reads attention, or compares tokens with the first: neither can be judged
            from one new state.
    """
    if not 0 < draws < 1:
        raise InputError(f"Got draws={draws}; expected a share between 0 and 1, such as {DRAWS}.")
    if trace is not None and not torch.equal(trace.sample.tokens.ids, sample.tokens.ids):
        raise InputError(
            "Got a trace of another sample; expected one of this sample. Write "
            "ss.trace_generation(lvlm, trace.sample, trace=trace)."
        )
    rule, chosen = choose_rule(lvlm, sample, l_detector, remote)
    states = rule.probe("language", None, lvlm.anatomy.language)
    attention = ReceivedAttention(queries="last")
    out = lvlm.generate(
        sample,
        [states, attention],
        max_new_tokens=max_new_tokens,
        remote=remote,
        **options,
    )
    flags = judge(rule, [step[states] for step in out.steps], lvlm, sample)
    largest, mean, null = attention_of(out, attention)
    words = None
    if lvlm.tokenizer is not None:
        words = tuple(words_of(lvlm.tokenizer, row) for row in out.sequences.tolist())
    v_sinks = torch.zeros_like(sample.tokens.live) if trace is None else trace.v_sinks
    lives = collect_lives(sample, words, flags, v_sinks, largest, null, draws)
    return GenerationTrace(
        sample=sample,
        sequences=out.sequences,
        text=out.text,
        words=words,
        layers=lvlm.anatomy.language.layers(None),
        mass_max=largest,
        mass_mean=mean,
        null=null,
        flags=flags,
        lives=lives,
        draws=draws,
        detector=repr(rule),
        chosen=chosen,
    )


def choose_rule(
    lvlm: LVLM, sample: Sample, l_detector: Detector | None, remote: Any
) -> tuple[Detector, str]:
    """The L rule and how it came about: given, published, or calibrated on the prompt.

    Raises:
        DetectorError: If it cannot judge a single new state.
    """
    if l_detector is None:
        rules = SinkRules.on_others(
            lvlm, lambda: [sample], NoSinks(), None, what="the prompt", remote=remote
        )
        rule, chosen = rules.l_rule, rules.l_source
    else:
        rule, chosen = check_detector(l_detector), "given"
    probe = rule.probe("language", None, lvlm.anatomy.language)
    if isinstance(probe, (ReceivedAttention, CosineToFirst, SinkEvidence)):
        raise DetectorError(
            f"Got {rule!r}, which does not judge a token by its own state; expected a rule that does, "
            "because a decode step has one token. Write ss.detectors.SinkDimensions(...) or "
            "ss.detectors.Massive(...)."
        )
    return rule, chosen


def judge(rule: Detector, results: Sequence[Any], lvlm: LVLM, sample: Sample) -> Tensor:
    """Which tokens meet the rule, each judged when it appears: bool ``[batch layer key]``.

    Args:
        rule: The rule.
        results: The results of its probe at the prompt and at every decode step.
        lvlm: The model.
        sample: The sample.
    """
    tokens, anatomy = sample.tokens, lvlm.anatomy.language
    visual, live, seen, flags = tokens.image >= 0, tokens.live, results[0], []
    for step, result in enumerate(results):
        if step:
            seen = appended(seen, result)
            visual = torch.cat([visual, torch.zeros_like(visual[:, :1])], dim=1)
            live = torch.cat([live, torch.ones_like(live[:, :1])], dim=1)
        mask = decide(rule, seen, visual, live, "language", anatomy).mask
        flags.append(mask[..., -1:] if step else mask)
    return torch.cat(flags, dim=2)


def appended(seen: Any, new: Any) -> Any:
    """The result of a probe of states with the new token's behind it.

    What has an axis of positions, ``[batch layer pos ...]`` or the positions themselves, grows; the
    rest, such as the median of a layer, stays that of the prompt.
    """
    grown = {}
    for field in fields(seen):
        old, late = getattr(seen, field.name), getattr(new, field.name)
        if field.name == "positions":
            grown[field.name] = torch.cat([old, late], dim=1)
        elif torch.is_tensor(old) and old.ndim >= 3:
            grown[field.name] = torch.cat([old, late], dim=2)
    return replace(seen, **grown)


def attention_of(out: Generation, probe: ReceivedAttention) -> tuple[Tensor, Tensor, Tensor]:
    """What the new query gives to every key at every step.

    Returns:
        The largest and the mean over heads, ``[batch step layer key]``, and what uniform attention gives
        to each key that the query sees, ``[batch step layer]``. NaN where there is no such key, at
        padding, behind a window, and where the answer has ended.
    """
    n_keys = out.sequences.shape[1] - 1  # the last token is written, and never read
    largest, mean, null = [], [], []
    for step in out.steps:
        result = step[probe]
        to_come = n_keys - result.received.shape[-1]
        got = torch.nn.functional.pad(result.received, (0, to_come), value=float("nan"))
        largest.append(got.amax(dim=2))
        mean.append(got.mean(dim=2))
        null.append(result.null.nan_to_num(-1.0).amax(dim=2))
    flat = torch.stack(null, dim=1)
    return (
        torch.stack(largest, dim=1),
        torch.stack(mean, dim=1),
        flat.masked_fill(flat < 0, float("nan")),
    )
