"""Questions with answers, as batches to train on.

A row of a batch is the prompt as it is generated from, and then the answer, padded on the left::

    position   0 ... 2    3      4 ... 67   68 ... 77     78        79
    input_ids  pad        bos    image      USER: ...     circle    </s>
    labels     -100       -100   -100       -100          circle    </s>
    live       False      True   True       True          False     False      (of the prompt)

Only the answer has labels. A dataset is read once to check it, and its images are opened again when
their batch is made, so no more than a batch of them is in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sinkscope.errors import InputError
from sinkscope.lsg.records import AnswerData, checked_texts, field_of, read_dataset
from sinkscope.models.answers import answer_ids
from sinkscope.models.decoder_inputs import EXTENDED
from sinkscope.models.prepare import process
from sinkscope.models.prompts import marks_of
from sinkscope.tokens import TokenMap

if TYPE_CHECKING:
    from sinkscope.models.lvlm import LVLM

IGNORED = -100
"""The label of positions whose prediction does not count, as in PyTorch."""


@dataclass(frozen=True, eq=False)
class AnswerBatch:
    """Prompts with their answers, left-padded.

    Attributes:
        inputs: What the model is called with; see the module for the layout.
        labels: Int ``[row pos]``: the answer's tokens, `IGNORED` elsewhere.
        tokens: What every position is. Only the prompt is ``live``, so ``tokens.last`` is the end of
            the prompt.
        rows: The records' indices in the dataset.
    """

    inputs: Mapping[str, Any]
    labels: Tensor
    tokens: TokenMap
    rows: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def answer_tokens(self) -> int:
        """How many labels there are."""
        return int((self.labels != IGNORED).sum())

    @property
    def targets(self) -> Tensor:
        """The labels of the last columns, as many as the longest answer has, ``[row n]``."""
        longest = int((self.labels != IGNORED).sum(dim=1).max())
        return self.labels[:, -longest:]

    @property
    def positions(self) -> Tensor:
        """Int ``[row n]``: the positions that predict `targets`."""
        end, longest = self.labels.shape[1], self.targets.shape[1]
        return torch.arange(end - longest - 1, end - 1).expand(len(self), longest)


def read_parts(
    lvlm: LVLM,
    dataset: Iterable[Any],
    validation_data: Iterable[Any] | None = None,
    *,
    validation: float = 0.1,
    seed: int = 0,
    max_answer_tokens: int = 256,
    progress: bool | None = None,
) -> tuple[AnswerData, list[int], list[int]]:
    """A dataset to train on and to validate on, with one batch of each made to see that it fits.

    Args:
        lvlm: The model.
        dataset: See `read_dataset`.
        validation_data: Records to validate on, or None to hold out some of the dataset.
        validation: Share of the images to hold out.
        seed: Of the split.
        max_answer_tokens: The longest answer that is accepted.
        progress: Whether to show progress bars; None shows them from 50 records on.

    Returns:
        The data, and indices of the training and of the validation part.

    Raises:
        InputError: If something is missing or does not fit the model.
    """
    given = []
    for part in (dataset, validation_data):
        if part is not None:
            shown = len(part) >= 50 if progress is None and isinstance(part, Sized) else progress
            options = {"max_answer_tokens": max_answer_tokens, "progress": bool(shown)}
            options["image_token"] = lvlm.anatomy.image_token_id
            options["marks"] = marks_of(lvlm.processor)
            given.append(read_dataset(part, lvlm.tokenizer, **options))
    data = given[0]
    rows, held = data.split(validation if validation_data is None else 0.0, seed)
    if validation_data is not None:
        data = data.joined(given[1])
        held = list(range(len(rows), len(data)))
    for part in (rows, held):
        if part:
            make_batch(lvlm, data, part[:1])
    return data, rows, held


def batches_of(rows: Sequence[int], size: int) -> Iterator[tuple[int, ...]]:
    """Rows in groups of a size; the last may be smaller."""
    for start in range(0, len(rows), size):
        yield tuple(rows[start : start + size])


def make_batch(
    lvlm: LVLM, data: AnswerData, rows: Sequence[int], *, append_end: bool = True
) -> AnswerBatch:
    """Some records as one batch; their images are opened now.

    Args:
        lvlm: The model; its chat template renders the prompts.
        data: The dataset.
        rows: Indices of records.
        append_end: Whether to train the token that ends an answer too, see `end_token`.

    Raises:
        InputError: If a record does not fit the model.
    """
    records = [data.records[row] for row in rows]
    texts = [checked_texts(record, row) for record, row in zip(records, rows, strict=True)]
    given = [field_of(record, "image") for record in records]
    images = [list(image) if isinstance(image, (list, tuple)) else [image] for image in given]
    inputs, _, prompts = process(lvlm.processor, images, [question for question, _ in texts])
    end = end_token(lvlm) if append_end else None
    last = () if end is None else (end,)
    tails = [
        answer_ids(lvlm.tokenizer, prompt, answer) + last
        for prompt, (_, answer) in zip(prompts, texts, strict=True)
    ]
    ready, labels = with_answers(inputs, tails, lvlm.tokenizer.pad_token_id or 0)
    tokens = lvlm.prepare(inputs=ready).tokens
    blind = [
        row for row, seen in zip(rows, (tokens.image >= 0).any(1).tolist(), strict=True) if not seen
    ]
    if blind:
        raise InputError(
            f"Records {blind} have no image token in their prompt; expected some, or there is nothing "
            "for a gate to scale. Check the processor's image_token and chat template."
        )
    module: Any = lvlm.module
    limit = module.config.get_text_config().max_position_embeddings
    if labels.shape[1] > limit:
        raise InputError(
            f"Records {list(rows)} make {labels.shape[1]} tokens; expected at most {limit}, the "
            "length of the model. Leave the longest out, or make the images smaller."
        )
    if not bool(ready["attention_mask"].all()) and not computes_positions(lvlm):
        ready["position_ids"] = (ready["attention_mask"].cumsum(1) - 1).clamp(min=0)
    prompt = tokens.live & (labels == IGNORED)
    return AnswerBatch(ready, labels, replace(tokens, live=prompt), tuple(rows))


def computes_positions(lvlm: LVLM) -> bool:
    """Whether the model derives positions from mask and image grid itself, as Qwen-VL does."""
    module: Any = lvlm.module
    return callable(getattr(module.base_model, "get_rope_index", None))


def end_token(lvlm: LVLM) -> int | None:
    """The token that ends an answer.

    It is the one that stops generation; among several (Qwen, Gemma) the first that the chat template
    puts behind an answer.

    Returns:
        Its id, or None if the model has none.
    """
    tokenizer, settings = lvlm.tokenizer, getattr(lvlm.module, "generation_config", None)
    ends = getattr(settings, "eos_token_id", None)
    ends = tokenizer.eos_token_id if ends is None else ends
    if ends is None or isinstance(ends, int):
        return ends
    template = getattr(lvlm.processor, "chat_template", None) or tokenizer.chat_template
    if template and len(ends) > 1:
        turns = [
            {"role": role, "content": [{"type": "text", "text": "yes"}]}
            for role in ("user", "assistant")
        ]
        text = lvlm.processor.apply_chat_template(turns, chat_template=template, tokenize=False)
        closing = tokenizer(text[text.rindex("yes") :], add_special_tokens=False)["input_ids"]
        ends = [token for token in closing if token in ends] or ends
    return int(ends[0])


def with_answers(
    inputs: Mapping[str, Any], tails: Sequence[Sequence[int]], pad: int
) -> tuple[dict[str, Any], Tensor]:
    """Inputs with an answer after every prompt, padded on the left again.

    Args:
        inputs: Processor output of the prompts.
        tails: The answer's tokens of every row.
        pad: The token to pad with.

    Returns:
        The inputs, and labels ``[row pos]``.

    Raises:
        InputError: If an input has one entry per position and it is unknown which an answer has.
    """
    ids = inputs["input_ids"]
    live = inputs["attention_mask"].bool()
    lengths = [int(mask.sum()) + len(tail) for mask, tail in zip(live, tails, strict=True)]
    shape = (len(tails), max(lengths))
    out = dict(inputs)
    labels = torch.full(shape, IGNORED)
    for row, tail in enumerate(tails):
        labels[row, shape[1] - len(tail) :] = torch.tensor(list(tail))
    for name, value in inputs.items():
        if name != "input_ids" and name not in EXTENDED:
            if (
                isinstance(value, Tensor)
                and value.shape == ids.shape
                and not value.is_floating_point()
            ):
                raise InputError(
                    f"Got the input {name!r} with one entry per position; expected input_ids and "
                    f"{sorted(EXTENDED)}: what an answer's tokens have there is not known."
                )
            continue
        made = value.new_full(shape, pad if name == "input_ids" else 0)
        for row, (mask, tail) in enumerate(zip(live, tails, strict=True)):
            more = list(tail) if name == "input_ids" else [EXTENDED[name]] * len(tail)
            whole = torch.cat([value[row][mask], value.new_tensor(more)])
            made[row, shape[1] - lengths[row] :] = whole
        out[name] = made
    return out, labels
