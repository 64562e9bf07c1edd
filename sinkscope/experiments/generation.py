"""trace_generation: the sinks of prompt and answer, followed step by step while the model speaks."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import pad

from sinkscope.checks import check_number, typed
from sinkscope.detectors import Detector, NoSinks, SinkRules
from sinkscope.detectors.detection import decide
from sinkscope.errors import DetectorError, InputError
from sinkscope.experiments.tracing import SinkTrace
from sinkscope.models import LVLM, Sample
from sinkscope.probes import CosineToFirst, ReceivedAttention, SinkEvidence
from sinkscope.results import Result
from sinkscope.tokens import words_of
from sinkscope.viz.tokens import generation_text, plot_generation

Words = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class SinkLife:
    """One sink while the model speaks.

    Attributes:
        kind: ``"V"``, ``"L"`` or ``"text"`` in the prompt, ``"generated"`` in the answer.
        pos: Position in prompt and answer, counted with the padding, of ``word`` in row ``batch``.
        born_step: 0 in the prompt; in the answer the step whose pass computed the token's state.
        last_step: The last of the ``drawn_steps`` steps at which it draws, None if it never does.
        seen_until: The last of the ``seen_steps`` steps at which a later query sees it in a layer, or None.
        layers: LLM layers on whose input it meets the L rule.
        max_mass: The largest share that a head of a later query gives it, 0 to 1, NaN if none sees it;
            ``at`` its step and layer, ``null`` what uniform attention gives there.
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
        """``"alive"`` at the end, ``"dead"`` before, ``"draws nothing"``, or ``"not read"`` by any query."""
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
    """Sinks while the model speaks: one `SinkLife` per sink, and what they are read from.

    Step 0 is the pass over the prompt, whose query is the prompt's last token; the query of step s is
    the token that step s - 1 wrote. Keys are the tokens of prompt and answer up to the last that was read.

    Attributes:
        text: The answers, or None without a tokenizer, as for ``words``: every token's text.
        mass_max: In [0, 1]: the most that a head gives to every key; NaN where the query does not see
            the key, at padding and after the answer's end. ``mass_mean``: the mean over heads.
        null: What uniform attention gives to each key that the query sees; ``draws``: how much more
            than that a head must give for a token to draw.
        flags: The L rule, ``detector``, on what each layer reads, at the token's own step.
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
        """The largest share that a head of any layer gives to every key, a token's own left out."""
        return nan_max(self._by_others(), dim=2)

    def _by_others(self) -> Tensor:
        """``mass_max``, NaN where the key is the query's own."""
        keys, first = torch.arange(self.mass_max.shape[3]), self.sample.tokens.ids.shape[1] - 1
        own = keys == first + torch.arange(self.n_steps)[:, None]
        return self.mass_max.masked_fill(own[:, None], float("nan"))

    def _lives(self, v_sinks: Tensor) -> tuple[SinkLife, ...]:
        """One record per token that meets the L rule in some layer or is a V-sink, by batch and position."""
        shares, prompt = self._by_others(), v_sinks.shape[1]
        over = nan_max(shares - self.null[..., None], dim=2)  # [batch step key]
        found, lives = self.flags.any(dim=1), []
        found[:, :prompt] |= v_sinks
        for batch, pos in found.nonzero().tolist():
            kind, share, extra = "generated", shares[batch, :, :, pos], over[batch, :, pos]
            if pos < prompt:
                visual = int(self.sample.tokens.image[batch, pos]) >= 0
                kind = "V" if bool(v_sinks[batch, pos]) else "L" if visual else "text"
            drawn = (extra >= self.draws).nonzero().flatten().tolist()
            seen = (~extra.isnan()).nonzero().flatten().tolist()
            at, most, null = None, float("nan"), float("nan")
            if seen:
                at = divmod(int(share.nan_to_num(-1.0).argmax()), share.shape[1])
                most, null = float(share[at]), float(self.null[batch][at])
            last, until = (steps[-1] if steps else None for steps in (drawn, seen))
            layers = tuple(self.flags[batch, :, pos].nonzero().flatten().tolist())
            word, born = self.words[batch][pos] if self.words else None, max(0, pos - prompt + 1)
            told = kind, batch, pos, word, born, last, until, len(drawn), len(seen)
            lives.append(SinkLife(*told, layers, most, at, null))
        return tuple(lives)

    def to_dataframe(self) -> pd.DataFrame:
        """One line per sink: every field of its record, and its fate."""
        names = [*SinkLife.__dataclass_fields__, "fate"]
        return pd.DataFrame([life.to_dict() for life in self.lives], columns=names)

    def summary(self) -> str:
        """The sinks and their fates in a few lines, for a terminal."""
        return generation_text(self)

    def plot(self, row: int = 0) -> Figure:
        """What the sinks of a row draw at every step, beside the most attended other tokens."""
        return plot_generation(self, row)

    def __repr__(self) -> str:
        fates = [life.fate for life in self.lives]
        said = ", ".join(f"{fates.count(fate)} {fate}" for fate in dict.fromkeys(fates)) or "none"
        return f"GenerationTrace({self.n_steps} steps; sinks: {said}; rule {self.chosen})"


@typed
def trace_generation(
    lvlm: LVLM,
    sample: Sample,
    l_detector: Detector | None = None,
    *,
    trace: SinkTrace | None = None,
    draws: float = 0.2,
    max_new_tokens: int | None = None,
    remote: bool | str | None = None,
    **options: Any,
) -> GenerationTrace:
    """Generate an answer, and follow every sink of the prompt and of the answer step by step.

    A token *draws* at a step if some head of the new query, in any layer, gives it at least ``draws``
    more than uniform attention under the same mask would; what a token gives to itself does not count. A
    sink *lives* as long as it draws, and *dies* with the last step at which it does. A generated token is
    *born* a sink at the step whose pass computes its state, if it meets the L rule there. InputError if
    ``trace`` is of another sample; DetectorError if the rule does not judge a token by its own state alone.

    Args:
        lvlm: The model, whose `LVLM.generate` documents ``max_new_tokens``, ``remote`` and ``options``.
        sample: From ``lvlm.prepare``, padded on the left.
        l_detector: The rule for sinks of the LLM, on what each layer reads; None for published constants
            of the model, else limits calibrated on the prompt. Each token is judged when it appears, against
            what the rule compares with (the median of a layer) in the prompt.
        trace: A trace of the same sample, to tell V-sinks from L-sinks; without it, image tokens that meet
            the L rule count as L-sinks, and other V-sinks are not listed.
        draws: How much more than uniform attention a head must give, in (0, 1).
    """
    check_number(above=0, below=1, hint="It is a share, such as 0.2.", draws=draws)
    if trace is not None and not torch.equal(trace.sample.tokens.ids, sample.tokens.ids):
        raise InputError(
            "Got a trace of another sample; expected one of this sample. Write "
            "ss.trace_generation(lvlm, trace.sample, trace=trace)."
        )
    rules = SinkRules.on_others(
        lvlm, lambda: [sample], NoSinks(), l_detector, what="the prompt", remote=remote
    )
    rule, attention = rules.l_rule, ReceivedAttention(queries="last")
    states = rule.probe("language", None, lvlm.anatomy.language)
    if isinstance(states, (ReceivedAttention, CosineToFirst, SinkEvidence)):
        raise DetectorError(
            f"Got {rule!r}, which does not judge a token by its own state; expected a rule that does, "
            "because a decode step has one token. Write ss.detectors.SinkDimensions(...) or "
            "ss.detectors.Massive(...)."
        )
    options |= {"max_new_tokens": max_new_tokens, "remote": remote}
    out = lvlm.generate(sample, [states, attention], **options)
    flags = judge(rule, [step[states] for step in out.steps], lvlm, sample)
    given = [step[attention] for step in out.steps]
    n_keys = out.sequences.shape[1] - 1  # the last token is written, and never read
    received = [one.received for one in given]
    each = [pad(one, (0, n_keys - one.shape[-1]), value=float("nan")) for one in received]
    over_heads = [one.amax(dim=2) for one in each], [one.mean(dim=2) for one in each]
    nulls = [nan_max(one.null, dim=2) for one in given]  # NaN where unseen
    reader, rows = lvlm.tokenizer, out.sequences.tolist()
    words = None if reader is None else tuple(words_of(reader, row) for row in rows)
    told = sample, out.sequences, out.text, words, lvlm.anatomy.language.layers(None)
    largest, mean, null = (torch.stack(part, dim=1) for part in (*over_heads, nulls))
    how = draws, repr(rule), rules.l_source
    found = GenerationTrace(*told, largest, mean, null, flags, (), *how)
    v_sinks = torch.zeros_like(sample.tokens.live) if trace is None else trace.v_sinks
    return replace(found, lives=found._lives(v_sinks))


def judge(rule: Detector, results: Sequence[Any], lvlm: LVLM, sample: Sample) -> Tensor:
    """Which tokens meet the rule by its probe at every step, each when it appears: ``[batch layer key]``."""
    visual, live, seen = sample.tokens.image >= 0, sample.tokens.live, results[0]
    flags, grown = [], {}
    for step, result in enumerate(results):
        if step:  # the new token's states stand behind the others; the rest stays the prompt's
            for name, old in vars(seen).items():
                axis = 1 if name == "positions" else 2
                if axis == 1 or (torch.is_tensor(old) and old.ndim > 2):
                    grown[name] = torch.cat([old, getattr(result, name)], dim=axis)
            seen = replace(seen, **grown)
            visual, live = pad(visual, (0, 1)), pad(live, (0, 1), value=True)
        mask = decide(rule, seen, visual, live, "language", lvlm.anatomy.language).mask
        flags.append(mask[..., -1:] if step else mask)
    return torch.cat(flags, dim=2)


def nan_max(values: Tensor, dim: int) -> Tensor:
    """The largest value that is not NaN; NaN where there is none. Values are at least -1."""
    out = values.nan_to_num(-2.0).amax(dim=dim)
    return out.masked_fill(out < -1, float("nan"))
