"""Which image tokens of a prompt are V-sinks and L-sinks, from one image and one captured pass.

V-sinks come from the image alone. L-sinks come from what the edited block reads. An image token's
state does not depend on the text behind it, but a rule may: one that compares with the median of the
whole prompt (`Massive`), or with the attention of later tokens (`Received`). So L-sinks are decided for
every question, on the prompt without its answer, and questions share what they agree on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sinkscope.detectors.rules import (
    STATE_SITE,
    CosineToBOS,
    Detector,
    Norm,
    NoSinks,
    SinkDimensions,
    decide,
)
from sinkscope.detectors.run import detect, visual_tokens
from sinkscope.experiments.trace import carry
from sinkscope.kernels.walk import detached, resolve
from sinkscope.models.context import Context

if TYPE_CHECKING:
    from sinkscope.models.lvlm import LVLM
    from sinkscope.models.prepare import Sample


def v_sinks(lvlm: LVLM, sample: Sample, detector: Detector, merge: str) -> Tensor:
    """V-sinks of the only row at their LLM positions, bool ``[pos]``.

    Args:
        lvlm: The model.
        sample: One prompt.
        detector: The rule.
        merge: See `sinkscope.trace_sinks`.
    """
    if isinstance(detector, NoSinks):
        return torch.zeros_like(sample.tokens.live[0])
    feeds = lvlm.anatomy.feed_layers
    found = detect(lvlm, sample, detector, tower="vision", layers=feeds)
    return carry(sample, found, list(range(len(feeds))), merge)[0]


def by_token(detector: Detector) -> bool:
    """Whether a rule for L-sinks surely judges an image token without the text behind it."""
    fixed = type(detector) is Norm and not isinstance(detector.tau, str)
    return fixed or type(detector) in (SinkDimensions, CosineToBOS, NoSinks)


def l_sinks(
    lvlm: LVLM, sample: Sample, detector: Detector, states: Mapping[int, Tensor]
) -> dict[int, Tensor]:
    """Visual tokens of the only row that meet the L rule, V-sinks among them: block -> bool ``[pos]``.

    The same as ``trace_sinks(...).l_sinks(block) | overlap(block)``, up to rounding of the states.

    Args:
        lvlm: The model.
        sample: One prompt.
        detector: The rule.
        states: Block -> what it reads, ``[1 pos d_model]``, of the plain prompt. A rule that looks at
            anything else, such as attention, has a pass of its own.
    """
    blocks = sorted(states)
    anatomy = lvlm.anatomy.language
    visual, live = visual_tokens(sample, "language")
    probe = detector.probe("language", blocks, anatomy)
    context = Context(lvlm.anatomy, sample.tokens)
    reads = probe.reads(context)
    here = all(
        (read.site.tower, read.site.name) == ("language", STATE_SITE["language"])
        and read.site.layer in states
        for read in reads
    )
    if here:
        answers = {}
        for read in reads:
            state = states[read.site.layer]
            given = resolve(None, read.parameters, state.device, {})
            answers[read.site] = detached(read.kernel(state, {}, **given))
        result = probe.finish(answers, context)
        mask = decide(detector, result, visual, live, "language", anatomy).mask
    else:
        mask = detect(lvlm, sample, detector, layers=blocks).mask
    return {block: mask[0, i] & visual[0] for i, block in enumerate(blocks)}
