"""What a gate does to the loss of answers: what all gates share once, and the rest per gate.

::

    share    vision tower, blocks 0 ... e        once per batch, no gradient
    losses   blocks e ... N-1 with scaled keys   once per gate; a gradient reaches the gate only

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
from sinkscope.models.replay import Captured, capture, logits_at, resume
from sinkscope.models.wrapping import evaluated

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


@dataclass(frozen=True, eq=False)
class Losses:
    """How well the answers of a batch are predicted.

    Attributes:
        total: The sum of the next-token losses of all answer tokens, in nats.
        tokens: How many there are.
        correct: Bool ``[row]``: whether every token of the answer is the likeliest one, so that it
            is what greedy decoding writes.
        notes: Means to write down, by name.
    """

    total: Tensor
    tokens: int
    correct: Tensor
    notes: Mapping[str, float]


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """A model in evaluation mode whose parameters take no gradient, as it was before at the end."""
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
    """Run a batch up to the last edited block, without gradient.

    Args:
        lvlm: The model.
        batch: The batch.
        blocks: The blocks whose keys gates scale.
        whole: Whether to run to the end too, for the losses without a gate.
    """
    return Shared(batch, *seen(lvlm, batch.inputs, blocks, whole=whole))


def seen(
    lvlm: LVLM, inputs: Mapping[str, Any], blocks: Sequence[int], *, whole: bool = False
) -> tuple[Captured, dict[int, Tensor]]:
    """What gates look at in a plain pass without gradient.

    Args:
        lvlm: The model.
        inputs: What it is called with.
        blocks: The blocks whose keys gates scale.
        whole: Whether to run beyond the last of them.

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


def looked(
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
    for look in gate.looks(tokens):
        states = vision[look.site.layer] if look.site.tower == "vision" else state
        given = {
            name: value.to(states.device) if isinstance(value, Tensor) else value
            for name, value in look.parameters.items()
        }
        look.kernel(states, notes, **given)
    found = notes["memory"][("gate", id(gate))]
    at = found["coefficients"].device
    return {name: value.to(at) for name, value in found.items()}


def gate_factors(gate: LSG, shared: Shared, state: Tensor) -> tuple[Tensor, Tensor]:
    """A gate's factors for every key, and its coefficients.

    Args:
        gate: The gate.
        shared: The batch.
        state: What the edited block reads, ``[row pos d_model]``; the gate reads the same.

    Returns:
        Float ``[row pos]``, 1 at text, and float ``[row group]``.
    """
    found = looked(gate, shared.batch.tokens, shared.vision, state)
    visual = (shared.batch.tokens.image >= 0).to(found["coefficients"].device)
    return kernels.factors_of(found, visual, list(gate.groups)), found["coefficients"]


def answer_losses(gates: Sequence[LSG], shared: Shared) -> Losses:
    """The losses of a batch under a stack of gates, with a graph if gradients are on.

    Args:
        gates: The gates; each reads what those before it left. None is the plain model, for which
            the whole pass must have been shared.
        shared: The batch, with the lowest edited block captured.
    """
    seen: dict[int, Tensor] = {}
    captured, ordered = shared.captured, sorted(gates, key=lambda gate: gate.config.edited)

    def decide(gate: LSG) -> Callable[[Tensor], Tensor]:
        def factors(state: Tensor) -> Tensor:
            out, seen[id(gate)] = gate_factors(gate, shared, state)
            return out

        return factors

    if ordered:
        first = ordered[0]
        block = first.config.edited
        factors = decide(first)(captured.state(block))
        later = {gate.config.edited: decide(gate) for gate in ordered[1:]}
        hidden = resume(captured, block, factors, later=later)
    else:
        hidden = captured.hidden
    total, correct = read_answers(captured, hidden, shared.batch)
    notes = {}
    for gate in ordered:
        means = seen[id(gate)].detach().mean(dim=0).tolist()
        notes |= {f"rho_{g}": value for g, value in zip(gate.groups, means, strict=True)}
    return Losses(total, shared.batch.answer_tokens, correct, notes)


def read_answers(captured: Captured, hidden: Any, batch: AnswerBatch) -> tuple[Tensor, Tensor]:
    """The summed loss of the answers' tokens, and which answers greedy decoding would write.

    Args:
        captured: The pass.
        hidden: After the final norm, ``[row pos d_model]``.
        batch: The batch.
    """
    logits = logits_at(captured, hidden, batch.positions).float()
    return score(logits, batch.targets.to(logits.device))


def score(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy, and which rows are predicted throughout.

    Args:
        logits: Float ``[row n vocab]``.
        targets: Int ``[row n]``, -100 where there is none.
    """
    scores = TokenScores.of(logits, targets)
    return scores.loss, scores.exact
