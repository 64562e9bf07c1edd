"""The training loop of the baselines that have weights: next-token loss on the answers, AdamW."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from sinkscope.lsg.data import IGNORED, AnswerBatch, batches_of, make_batch, read_dataset

if TYPE_CHECKING:
    from sinkscope.models.lvlm import LVLM


def finetune(
    lvlm: LVLM,
    dataset: Iterable[Any],
    parameters: Sequence[nn.Parameter],
    epochs: int,
    lr: float,
    batch: int,
    seed: int,
    *,
    progress: bool = False,
) -> list[float]:
    """Train parameters that are part of the model's own forward pass.

    Args:
        lvlm: The model.
        dataset: Records with image, question and answer.
        parameters: What to train; everything else stays.
        epochs: How often every record is seen.
        lr: Learning rate.
        batch: Records per step.
        seed: Of the order of records.
        progress: Whether to show a progress bar.

    Returns:
        The loss of every step: the mean over the answers' tokens, in nats.
    """
    data = read_dataset(dataset, lvlm.tokenizer)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(list(parameters), lr=lr, weight_decay=0.0)
    losses = []
    steps = epochs * -(-len(data) // batch)
    with tqdm(total=steps, desc="LoRA", unit="step", disable=not progress) as bar:
        for _ in range(epochs):
            order = torch.randperm(len(data), generator=generator).tolist()
            for rows in batches_of(order, batch):
                optimizer.zero_grad(set_to_none=True)
                loss = answer_loss(lvlm, make_batch(lvlm, data, rows))
                loss.backward()
                optimizer.step()
                losses.append(float(loss.detach()))
                bar.update()
    return losses


def answer_loss(lvlm: LVLM, batch: AnswerBatch) -> Tensor:
    """Mean cross entropy of the answers' tokens under the model as it is now, in nats."""
    inputs = {k: v.to(lvlm.device) if isinstance(v, Tensor) else v for k, v in batch.inputs.items()}
    logits = lvlm.module(**inputs, use_cache=False).logits[:, :-1].float()
    targets = batch.labels[:, 1:].to(logits.device)
    return nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED
    )
