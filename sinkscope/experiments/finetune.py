"""What a LoRA is trained for, in the loop that trains gates: the same loss on the same batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from sinkscope.lsg.data import AnswerBatch, AnswerData, make_batch, read_dataset
from sinkscope.lsg.loop import Loop
from sinkscope.lsg.passes import Losses, score
from sinkscope.lsg.runner import Trainee
from sinkscope.lsg.training_settings import TrainingSettings
from sinkscope.models.lending import undisturbed

if TYPE_CHECKING:
    from sinkscope.models.lvlm import LVLM

NAME = "LoRA"


class WholeObjective:
    """Next-token loss of the answers under the whole model, as it is now.

    Args:
        lvlm: The model; what is trained is part of its forward pass.
        data: The records.
    """

    def __init__(self, lvlm: LVLM, data: AnswerData) -> None:
        self.lvlm, self.data = lvlm, data

    def share(self, rows: Sequence[int]) -> AnswerBatch:
        """The batch."""
        return make_batch(self.lvlm, self.data, rows)

    def losses(self, shared: AnswerBatch, name: str) -> Losses:
        """The losses of the batch."""
        device = self.lvlm.device
        given = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in shared.inputs.items()}
        with undisturbed(self.lvlm.module):
            logits = self.lvlm.module(**given, use_cache=False).logits
        read = logits.gather(
            1, shared.positions.to(device)[..., None].expand(-1, -1, logits.shape[-1])
        )
        total, correct = score(read.float(), shared.targets.to(device))
        return Losses(total, shared.answer_tokens, correct, {})


def finetune(
    lvlm: LVLM,
    dataset: Iterable[Any],
    parameters: Mapping[str, nn.Parameter],
    settings: TrainingSettings,
    validation: float,
    *,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """Train parameters that are part of the model's own forward pass, as `train_lsg` trains gates.

    Args:
        lvlm: The model.
        dataset: Records with image, question and answer.
        parameters: What to train, by name; everything else stays. The weights of the lowest
            validation loss remain.
        settings: As for gates.
        validation: Share of the images to hold out.
        progress: Whether to show a progress bar.

    Returns:
        The history: one line per step and split, with the loss in nats per answer token.
    """
    data = read_dataset(dataset, lvlm.tokenizer)
    rows, held = data.split(validation, settings.seed)
    objective = WholeObjective(lvlm, data)
    loop = Loop([Trainee(NAME, parameters)], objective, rows, held, settings, progress=progress)
    loop.run()
    return loop.history
