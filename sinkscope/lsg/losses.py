"""The loss of answers under gates: one pass that all gates share, and the rest once per gate.

::

    share           vision tower, blocks 0 ... e        once per batch, no gradient
    answer_losses   blocks e ... N-1 with scaled keys   once per gate; a gradient reaches the gate only

``e`` is the block whose keys a gate scales. The gate reads the end of the prompt, and its coefficients
hold for the answer too, which is what ``decode="frozen"`` generates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from sinkscope.data.batches import AnswerBatch
from sinkscope.data.tokens import TokenScores
from sinkscope.kernels import gating as kernels
from sinkscope.kernels.walk import first_tensor
from sinkscope.lsg.signals import placed, signals_of
from sinkscope.models.replay import Captured, capture, logits_at, resume
from sinkscope.models.wrapping import evaluated
from sinkscope.training.loop import Losses

if TYPE_CHECKING:
    from sinkscope.lsg.gate import LSG
    from sinkscope.models.lvlm import LVLM
    from sinkscope.tokens import TokenMap


@dataclass(frozen=True, eq=False)
class Shared:
    """What all gates of a batch share.

    Attributes:
        batch: The batch.
        captured: The decoder's states where gates read.
        vision: Vision block -> what it wrote, for the blocks that feed the projector.
    """

    batch: AnswerBatch
    captured: Captured
    vision: Mapping[int, Tensor]


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
    """Run the plain model without gradient and keep what gates read.

    Args:
        lvlm: The model.
        inputs: What it is called with.
        blocks: The blocks whose keys gates scale.
        whole: Whether to run beyond the last of them, for the losses without a gate.

    Returns:
        The pass, and what the vision blocks that feed the projector wrote.
    """
    vision: dict[int, Tensor] = {}

    def keep(layer: int) -> Callable[..., None]:
        def hook(part: nn.Module, args: tuple, output: Any) -> None:
            vision[layer] = first_tensor(output).detach()

        return hook

    with ExitStack() as stack:
        for layer in lvlm.anatomy.feed_layers:
            part = lvlm.module.get_submodule(lvlm.anatomy.vision.blocks[layer])
            stack.callback(part.register_forward_hook(keep(layer)).remove)
        captured = capture(lvlm, inputs, sorted(set(blocks)), whole=whole)
    return captured, vision


def gate_signals(
    gate: LSG, tokens: TokenMap, vision: Mapping[int, Tensor], state: Tensor
) -> dict[str, Tensor]:
    """What a gate finds in a pass: ``"V"`` and ``"L"`` ``[row pos]``, ``"coefficients"`` ``[row group]``.

    Args:
        gate: The gate.
        tokens: What every position is.
        vision: Vision block -> what it wrote, for the blocks that feed the projector.
        state: What the edited block reads, ``[row pos d_model]``; the gate reads the same.
    """
    notes: dict[str, Any] = {"step": 0, "memory": {}}
    for signal in signals_of(gate, tokens):
        states = vision[signal.site.layer] if signal.site.tower == "vision" else state
        signal.kernel(states, notes, **placed(signal.parameters, states))
    found = notes["memory"][("gate", id(gate))]
    return placed(found, found["coefficients"])


def answer_losses(gates: Sequence[LSG], shared: Shared) -> Losses:
    """Compute the losses of a batch under a stack of gates, with a graph if gradients are on.

    Args:
        gates: The gates; each reads what those before it left. None is the plain model, for which
            the whole pass must have been shared.
        shared: The batch, with the lowest edited block captured.
    """
    captured, batch = shared.captured, shared.batch
    ordered = sorted(gates, key=lambda gate: gate.config.edited)
    coefficients: dict[int, Tensor] = {}

    def factors_of(gate: LSG) -> Callable[[Tensor], Tensor]:
        def factors(state: Tensor) -> Tensor:
            found = gate_signals(gate, batch.tokens, shared.vision, state)
            coefficients[id(gate)] = found["coefficients"]
            visual = (batch.tokens.image >= 0).to(found["coefficients"].device)
            return kernels.factors_of(found, visual, list(gate.groups))

        return factors

    if ordered:
        block = ordered[0].config.edited
        factors = factors_of(ordered[0])(captured.state(block))
        later = {gate.config.edited: factors_of(gate) for gate in ordered[1:]}
        hidden = resume(captured, block, factors, later=later)
    else:
        hidden = captured.hidden
    logits = logits_at(captured, hidden, batch.positions).float()
    total, correct = score(logits, batch.targets.to(logits.device))
    notes = {}
    for gate in ordered:
        means = coefficients[id(gate)].detach().mean(dim=0).tolist()
        notes |= {f"rho_{g}": value for g, value in zip(gate.groups, means, strict=True)}
    return Losses(total, batch.answer_tokens, correct, notes)


def score(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy, and which rows are predicted throughout.

    Args:
        logits: Float ``[row n vocab]``.
        targets: Int ``[row n]``, -100 where there is none.
    """
    scores = TokenScores.of(logits, targets)
    return scores.loss, scores.exact
