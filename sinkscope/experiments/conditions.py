"""Ready-made conditions for `compare`: mask and scale sinks, and the same for random tokens."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sinkscope.checks import check_flags, check_whole
from sinkscope.errors import InputError
from sinkscope.experiments.trace import SinkTrace
from sinkscope.interventions import AblateValues, MaskKeys, RandomControl, ScaleAttention
from sinkscope.interventions.drawing import drawable
from sinkscope.interventions.values import REPLACEMENTS
from sinkscope.models.prepare import Sample

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
        for field, value, choices in known:
            if value not in choices:
                raise InputError(f"Got {field}={value!r}; expected one of {tuple(choices)}.")
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
