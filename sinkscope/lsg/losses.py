"""The loss of answers under gates: one pass that all gates share, and the rest once per gate.

::

    share           vision tower, blocks 0 ... e        once per batch, no gradient
    answer_losses   blocks e ... N-1 with scaled keys   once per gate; a gradient reaches the gate only

``e`` is the block whose keys a gate scales; its coefficients hold for the answer too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sinkscope.data.batches import AnswerBatch, AnswerData, TokenScores, batches_of, make_batch
from sinkscope.kernels import gating as kernels
from sinkscope.kernels.walk import first_tensor
from sinkscope.lsg.gate import LSG
from sinkscope.lsg.passes import placed, signals_of
from sinkscope.models.lvlm import LVLM
from sinkscope.models.replay import Captured, capture, logits_at, resume
from sinkscope.models.wrapping import evaluated
from sinkscope.tokens import TokenMap
from sinkscope.training.loop import Losses, Sums


@dataclass(frozen=True, eq=False)
class Shared:
    """What all gates of a batch share."""

    batch: AnswerBatch
    captured: Captured  # the decoder states that gates read
    vision: Mapping[int, Tensor]  # what the vision blocks that feed the projector wrote, by block


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Freeze a model in evaluation mode until the block ends; then flags and modes are as before."""
    wanted = [(name, p.requires_grad) for name, p in module.named_parameters()]
    try:
        module.requires_grad_(False)
        with evaluated(module):
            yield
    finally:
        now = dict(module.named_parameters())  # those of offloaded parts are made anew at each use
        for name, flag in wanted:
            now[name].requires_grad_(flag)


def share(lvlm: LVLM, batch: AnswerBatch, blocks: Sequence[int], *, whole: bool = False) -> Shared:
    """Run a batch up to the last edited block, without gradient; arguments as in `gate_inputs`."""
    return Shared(batch, *gate_inputs(lvlm, batch.inputs, blocks, whole=whole))


def gate_inputs(
    lvlm: LVLM, inputs: Mapping[str, Any], blocks: Sequence[int], *, whole: bool = False
) -> tuple[Captured, dict[int, Tensor]]:
    """Run the plain model without gradient and keep what gates read that scale keys in ``blocks``.

    ``whole`` runs beyond the last of them, for the losses without a gate. Returns two fields of `Shared`.
    """
    vision: dict[int, Tensor] = {}

    def keep(layer: int, part: nn.Module, args: tuple, output: Any) -> None:
        vision[layer] = first_tensor(output).detach()

    with ExitStack() as stack:
        for layer in lvlm.anatomy.feed_layers:
            part = lvlm.module.get_submodule(lvlm.anatomy.vision.blocks[layer])
            stack.callback(part.register_forward_hook(partial(keep, layer)).remove)
        captured = capture(lvlm, inputs, sorted(set(blocks)), whole=whole)
    return captured, vision


def gate_signals(
    gate: LSG, tokens: TokenMap, vision: Mapping[int, Tensor], state: Tensor
) -> dict[str, Tensor]:
    """What a gate finds in a pass: ``"V"`` and ``"L"`` ``[row pos]``, ``"coefficients"`` ``[row group]``.

    ``vision`` is that of `gate_inputs`, and ``state`` ``[row pos d_model]`` what the edited block reads.
    """
    notes: dict[str, Any] = {"step": 0, "memory": {}}
    for signal in signals_of(gate, tokens):
        states = vision[signal.site.layer] if signal.site.tower == "vision" else state
        signal.kernel(states, notes, **placed(signal.parameters, states))
    found = notes["memory"][("gate", id(gate))]
    return placed(found, found["coefficients"])


def answer_losses(gates: Sequence[LSG], shared: Shared) -> Losses:
    """Compute the losses of a batch under a stack of gates, with a graph if gradients are on.

    Each gate reads what those before it left. Without gates it is the plain model, shared ``whole``.
    """
    captured, batch = shared.captured, shared.batch
    coefficients: dict[int, Tensor] = {}

    def factors(gate: LSG, state: Tensor) -> Tensor:
        found = gate_signals(gate, batch.tokens, shared.vision, state)
        coefficients[id(gate)] = rho = found["coefficients"]
        visual = (batch.tokens.image >= 0).to(rho.device)
        return kernels.factors_of(found, visual, list(gate.groups))

    ordered = sorted(gates, key=lambda gate: gate.config.edited)
    if not ordered:
        hidden = captured.hidden
    else:
        block = ordered[0].config.edited
        later = {gate.config.edited: partial(factors, gate) for gate in ordered[1:]}
        scale = factors(ordered[0], captured.state(block))
        hidden = resume(captured, block, scale, later=later)
    logits = logits_at(captured, hidden, batch.positions).float()
    total, correct = score(logits, batch.targets.to(logits.device))
    notes = {}
    for gate in ordered:
        means = coefficients[id(gate)].detach().mean(dim=0).tolist()
        notes |= {f"rho_{g}": value for g, value in zip(gate.groups, means, strict=True)}
    return Losses(total, batch.answer_tokens, correct, notes)


def score(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy of ``[row n vocab]``, -100 is no target; and which rows are all predicted."""
    scores = TokenScores.of(logits, targets)
    return scores.loss, scores.exact


@dataclass(frozen=True, eq=False)
class GateObjective:
    """Next-token loss of answers under gates, each alone; the model is frozen."""

    lvlm: LVLM
    gates: Mapping[str, LSG]
    data: AnswerData
    append_end: bool

    def share(self, rows: Sequence[int], *, whole: bool = False) -> Shared:
        """The batch and the states that gates read; see `share`."""
        batch = make_batch(self.lvlm, self.data, rows, append_end=self.append_end)
        return share(self.lvlm, batch, [g.config.edited for g in self.gates.values()], whole=whole)

    def losses(self, shared: Shared, name: str) -> Losses:
        """The losses under one gate."""
        return answer_losses([self.gates[name]], shared)

    @torch.no_grad()
    def base(self, rows: Sequence[int], batch: int) -> dict[str, float]:
        """Loss and accuracy of the model without a gate."""
        sums = Sums()
        for part in batches_of(rows, batch):
            sums.add(answer_losses([], self.share(part, whole=True)))
        return sums.line()
