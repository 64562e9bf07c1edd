"""Datasets of questions with answers: read once, checked, and looked up again as padded batches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from sinkscope.checks import check_whole, is_number
from sinkscope.data.items import Lazy, check_texts, read_record
from sinkscope.data.tokens import IGNORED, answer_ids, with_answers
from sinkscope.errors import InputError
from sinkscope.models.inputs import process
from sinkscope.models.lvlm import LVLM
from sinkscope.models.pictures import ImageIds, clusters_of
from sinkscope.models.prompts import Marks, marks_of, question_of
from sinkscope.tokens import TokenMap


@dataclass(frozen=True, eq=False)
class AnswerData:
    """A dataset that was read once and found whole."""

    records: Any  # what gives a record by its index: dicts, or objects with such attributes
    images: tuple[str, ...]  # the image id of each record; see `sinkscope.models.pictures`
    groups: tuple[str, ...]  # one name for all that share an image, directly or through others
    fingerprint: str  # a digest of all questions, answers, image ids and pixels, in order

    def __len__(self) -> int:
        return len(self.images)

    def joined(self, other: AnswerData) -> AnswerData:
        """This dataset and then another one."""
        n, images = len(self), self.images + other.images
        records = Lazy(lambda i: self.records[i] if i < n else other.records[i - n], n + len(other))
        both = f"{self.fingerprint} {other.fingerprint}"
        return AnswerData(records, images, tuple(clusters_of(images)), both)

    def split(self, share: float, seed: int) -> tuple[list[int], list[int]]:
        """Indices of two parts without a common image, each in the dataset's order.

        The second holds this share (from 0 to below 1) of the groups of images, at least one if above 0.
        """
        if not is_number(share, 0, below=1):
            wanted = "expected a share of the images from 0 to below 1, or validation_data=dataset"
            raise InputError(f"Got validation={share!r}; {wanted}.")
        names = list(dict.fromkeys(self.groups))
        if share == 0:
            return list(range(len(self))), []
        if len(names) < 2:
            raise InputError(
                f"Got {len(self)} records about one image and validation={share}; expected two images or "
                "more that no record has both of. Write validation=0, or validation_data=dataset."
            )
        many = min(max(1, round(share * len(names))), len(names) - 1)
        order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
        held = {names[i] for i in order[:many]}
        parts: tuple[list[int], list[int]] = ([], [])
        for index, name in enumerate(self.groups):
            parts[name in held].append(index)
        return parts


@dataclass(frozen=True, eq=False)
class AnswerBatch:
    """Prompts with their answers, left-padded; see `with_answers`."""

    inputs: Mapping[str, Any]  # what the model is called with
    labels: Tensor  # int ``[row pos]``: the answer's tokens, `IGNORED` elsewhere
    tokens: TokenMap  # only the prompt is ``live``, so ``tokens.last`` is its end
    rows: tuple[int, ...]  # the records' indices in the dataset

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


def read_dataset(
    dataset: Iterable[Any],
    tokenizer: Any = None,
    *,
    max_answer_tokens: int = 256,
    image_token: int | None = None,
    marks: Marks | None = None,
    progress: bool = False,
) -> AnswerData:
    """Read a dataset once, check every record and keep no image.

    Args:
        dataset: Records with image, question, answer and, if you like, image_id: dicts, or objects
            with such attributes. Something with a length and an index (a list, ``datasets.Dataset``, a
            torch dataset) is read again whenever a batch is made; else a list of its records is kept.
        tokenizer: To count the answers' tokens, or None.
        image_token: The id that stands for an image in prompts, which no answer may hold.
        marks: The texts that stand for images, which no question may hold inside of words, or None.
    """
    check_whole(1, max_answer_tokens=max_answer_tokens)
    indexed = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    other = isinstance(dataset, (str, Mapping)) or hasattr(dataset, "itertuples")
    if other or not (indexed or isinstance(dataset, Iterable)):
        raise InputError(
            f"Got a {type(dataset).__name__} as dataset; expected records, such as a list of dicts. Write "
            "dataset['train'] for one split, dataset.to_dict(orient='records') for a DataFrame."
        )
    records: Any = dataset if indexed else list(dataset)
    if not len(records):
        raise InputError("Got an empty dataset; expected at least one question with an answer.")
    names, ids, digest = [], ImageIds(), hashlib.blake2b(digest_size=16)
    for index in tqdm(range(len(records)), desc="reading", unit="record", disable=not progress):
        record = _texts(records[index], index)
        question, answer = record["question"], record["answer"]
        if marks is not None:
            question_of(question, marks, who=f"Record {index} has")
        # as long as behind a prompt, or a token longer
        tokens = () if tokenizer is None else answer_ids(tokenizer, "", answer)
        leave, many = "or leave such records out", len(tokens)
        if image_token in tokens:
            what = f"has the answer {answer[:40]!r}, which holds the token that stands for an image"
            raise InputError(f"Record {index} {what}; expected words. Remove it, {leave}.")
        if many > max_answer_tokens:
            what = f"has an answer of {many} tokens; expected at most {max_answer_tokens}"
            raise InputError(f"Record {index} {what}. Write max_answer_tokens={many}, {leave}.")
        image = ids.add(index, record["image"], record.get("image_id"))
        names.append(image[0])
        digest.update("\x1f".join((question, answer, *image, "\x1e")).encode())
    groups = tuple(clusters_of(names))
    return AnswerData(records, tuple(names), groups, digest.hexdigest())


def _texts(record: Any, index: int) -> dict[str, Any]:
    """The fields of a record whose question and answer have words."""
    found = read_record(record, index)
    check_texts(index, {name: found[name] for name in ("question", "answer")}, blank=False)
    return found


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

    Without ``validation_data`` this share of the dataset's images is held out. ``progress`` None shows bars
    from 50 records on. Returns the data, and indices of the training and of the validation part.
    """
    how: dict[str, Any] = {"marks": marks_of(lvlm.processor)}
    how |= {"max_answer_tokens": max_answer_tokens, "image_token": lvlm.anatomy.image_token_id}

    def read(part: Iterable[Any]) -> AnswerData:
        shown = len(part) >= 50 if progress is None and isinstance(part, Sized) else progress
        return read_dataset(part, lvlm.tokenizer, progress=bool(shown), **how)

    data = read(dataset)
    rows, held = data.split(validation if validation_data is None else 0.0, seed)
    if validation_data is not None:
        data = data.joined(read(validation_data))
        held = list(range(len(rows), len(data)))
    for part in filter(None, (rows, held)):
        make_batch(lvlm, data, part[:1])
    return data, rows, held


def batches_of(rows: Sequence[int], size: int) -> Iterator[tuple[int, ...]]:
    """Rows in groups of a size; the last may be smaller."""
    for start in range(0, len(rows), size):
        yield tuple(rows[start : start + size])


def make_batch(
    lvlm: LVLM, data: AnswerData, rows: Sequence[int], *, append_end: bool = True
) -> AnswerBatch:
    """The records of some rows as one batch, with `end_token` behind answers; images are opened now."""
    records = [_texts(data.records[row], row) for row in rows]
    images, questions, answers = ([r[k] for r in records] for k in ("image", "question", "answer"))
    images = [list(one) if isinstance(one, (list, tuple)) else [one] for one in images]
    inputs, _, prompts = process(lvlm.processor, images, questions)
    end, both = end_token(lvlm) if append_end else None, zip(prompts, answers, strict=True)
    last = () if end is None else (end,)
    tails = [answer_ids(lvlm.tokenizer, prompt, answer) + last for prompt, answer in both]
    ready, labels = with_answers(inputs, tails, lvlm.tokenizer.pad_token_id or 0)
    tokens = lvlm.prepare(inputs=ready).tokens
    sees = (tokens.image >= 0).any(dim=1)
    if blind := [row for i, row in enumerate(rows) if not sees[i]]:
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
    # Qwen-VL derives positions from mask and image grid itself
    computed = callable(getattr(module.base_model, "get_rope_index", None))
    if not computed and not bool(ready["attention_mask"].all()):
        ready["position_ids"] = (ready["attention_mask"].cumsum(1) - 1).clamp(min=0)
    prompt = tokens.live & (labels == IGNORED)
    return AnswerBatch(ready, labels, replace(tokens, live=prompt), tuple(rows))


def end_token(lvlm: LVLM) -> int | None:
    """The token that stops generation, or None; of several the first that a chat template puts there."""
    tokenizer, settings = lvlm.tokenizer, getattr(lvlm.module, "generation_config", None)
    ends = getattr(settings, "eos_token_id", None)
    ends = tokenizer.eos_token_id if ends is None else ends
    if ends is None or isinstance(ends, int):
        return ends
    template = getattr(lvlm.processor, "chat_template", None) or tokenizer.chat_template
    if template and len(ends) > 1:
        said = [{"type": "text", "text": "yes"}]
        turns = [{"role": role, "content": said} for role in ("user", "assistant")]
        text = lvlm.processor.apply_chat_template(turns, chat_template=template, tokenize=False)
        closing = tokenizer(text[text.rindex("yes") :], add_special_tokens=False)["input_ids"]
        ends = [token for token in closing if token in ends] or ends
    return int(ends[0])
