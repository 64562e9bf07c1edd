"""trace_generation: sinks while the model speaks. Which live on, which are born, when they die.

::

    step    0             1             2        ...
    query   last token    1st new       2nd new  ...      the token that the pass reads
    writes  1st new       2nd new       3rd new  ...      the token that comes out of it

The state of a token never changes once it was computed: with a KV cache, later passes read the keys and
values that are there. So whether a token *spikes* is decided once, when its own pass runs, and whether it
*draws* is decided at every later step, by what the new query gives to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from sinkscope.detectors.choice import SinkRules
from sinkscope.detectors.rules import Detector, NoSinks, decide
from sinkscope.detectors.run import check_detector
from sinkscope.errors import DetectorError, InputError
from sinkscope.experiments.lives import GenerationTrace, collect_lives
from sinkscope.experiments.trace import SinkTrace
from sinkscope.models.lvlm import LVLM
from sinkscope.models.outputs import Generation
from sinkscope.models.prepare import Sample
from sinkscope.models.words import words_of
from sinkscope.probes import CosineToFirst, ReceivedAttention, SinkEvidence

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
        rule, chosen = rules.low, rules.l_source
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
