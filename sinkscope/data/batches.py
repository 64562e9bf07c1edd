"""Datasets of questions with answers, as padded batches, and how well a model predicts the answers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import nll_loss
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from sinkscope.checks import check_whole, is_number
from sinkscope.data.items import Lazy, check_texts, read_record
from sinkscope.errors import InputError
from sinkscope.models.inputs import Processed, positions_for, process
from sinkscope.models.lvlm import LVLM
from sinkscope.models.pictures import ImageIds, clusters_of
from sinkscope.models.prompts import Marks, marks_of, question_of
from sinkscope.models.wrapping import moved
from sinkscope.tokens import TokenMap

IGNORED = -100  # the label of positions whose prediction does not count, as in PyTorch
# Inputs with one entry per position, and the entry of a text token after the prompt.
EXTENDED = {"attention_mask": 1, "token_type_ids": 0, "mm_token_type_ids": 0}
Ids = tuple[int, ...]


def answer_ids(tokenizer: Any, prompt: str, answer: str) -> Ids:
    """The tokens of an answer behind a rendered prompt, which is how generation continues it.

    A prompt that ends in a word gets a space between, as ``ASSISTANT: circle``, unless the answer begins
    with one; a prompt that ends in a new line does not. The prompt's tokens must stay as they are.
    """
    if not answer.strip():
        raise InputError(f"Got the answer {answer!r}, which has no token; expected some text.")
    between = "" if not prompt or prompt[-1].isspace() or answer[0].isspace() else " "
    before = tokenizer(prompt, add_special_tokens=False)["input_ids"] if prompt else []
    both = tokenizer(prompt + between + answer, add_special_tokens=False)["input_ids"]
    if both[: len(before)] != before or len(both) == len(before):
        raise InputError(
            f"Got the answer {answer[:40]!r} behind a prompt that ends in {prompt[-12:]!r}, whose tokens "
            "change with it; expected them to stay. Let the chat template end without a space."
        )
    return tuple(both[len(before) :])


def with_answers(
    inputs: Mapping[str, Any], tails: Sequence[Sequence[int]], pad: int = 0
) -> tuple[dict[str, Any], Tensor]:
    """Append answers' tokens ``tails`` (or none) to processor output, padded on the left with ``pad`` again.

    Also returns labels ``[row pos]``: the answers' tokens, and `IGNORED` elsewhere.
    """
    ids, live = inputs["input_ids"], inputs["attention_mask"].bool()
    if len(ids) != len(tails):
        raise InputError(f"Got {len(ids)} rows and {len(tails)} answers; expected one per row.")
    out = dict(inputs)
    for name, value in inputs.items():
        if name == "input_ids" or name in EXTENDED:
            more = [tail if name == "input_ids" else [EXTENDED[name]] * len(tail) for tail in tails]
            parts = zip(value, live, more, strict=True)
            rows = [torch.cat([old[mask], value.new_tensor(list(end))]) for old, mask, end in parts]
            out[name] = padded(rows, pad if name == "input_ids" else 0, "left")
        elif (
            isinstance(value, Tensor) and value.shape == ids.shape and not value.is_floating_point()
        ):
            raise InputError(
                f"Got the input {name!r} with one entry per position; expected input_ids and "
                f"{sorted(EXTENDED)}: what an answer's tokens have there is not known."
            )
    width = out["input_ids"].shape[1]
    ends = [torch.tensor([IGNORED] * (width - len(tail)) + list(tail)) for tail in tails]
    return out, torch.stack(ends)


def extend(inputs: Mapping[str, Any], continuation: Sequence[int]) -> dict[str, Any]:
    """`with_answers` of one row; the tokens may be none."""
    return with_answers(inputs, [continuation])[0]


def padded(rows: Sequence[Tensor], value: int, side: str) -> Tensor:
    """Rows of unequal lengths as one tensor ``[row n]``."""
    return pad_sequence(list(rows), batch_first=True, padding_value=value, padding_side=side)


@dataclass(frozen=True, eq=False)
class TokenScores:
    """How well a model that reads an answer (teacher forcing) predicts each of its tokens."""

    logs: Tensor  # float ``[row n vocab]``: log-probabilities at the positions that predict the tokens
    greedy: Tensor  # int ``[row n]``: the likeliest token
    tokens: Tensor  # int ``[row n]``, or several ``[row n option]``; `IGNORED` where there is none

    @classmethod
    def of(cls, logits: Tensor, tokens: Tensor) -> TokenScores:
        """The scores of ``tokens`` under ``logits`` ``[row n vocab]``."""
        logs = logits.float().log_softmax(dim=-1)
        return cls(logs, logits.detach().argmax(dim=-1), moved(tokens, logits.device))

    @property
    def logprobs(self) -> Tensor:
        """Log-probability of every token in nats, of the shape of ``tokens``; 0 where there is none."""
        index = self.tokens.clamp(min=0).reshape(*self.greedy.shape, -1)
        picked = self.logs.gather(2, index).reshape(self.tokens.shape)
        return picked.masked_fill(self.tokens == IGNORED, 0.0)

    @property
    def sums(self) -> Tensor:
        """Log-probability of every answer, ``[row]``."""
        return sum(self.logprobs.unbind(1), torch.zeros(()))

    @property
    def means(self) -> Tensor:
        """The same per token."""
        return self.sums / (self.tokens != IGNORED).sum(dim=1)

    @property
    def exact(self) -> Tensor:
        """Bool ``[row]``: whether every token is the likeliest, so that greedy decoding writes it."""
        return ((self.greedy == self.tokens) | (self.tokens == IGNORED)).all(dim=1)

    @property
    def loss(self) -> Tensor:
        """The next-token loss of all tokens, summed: PyTorch's cross-entropy to the bit."""
        logs, tokens = self.logs.flatten(0, 1), self.tokens.flatten()
        return nll_loss(logs, tokens, ignore_index=IGNORED, reduction="sum")


@dataclass(frozen=True, eq=False)
class AnswerData:
    """A dataset whose records were all read once and checked."""

    records: Any  # what gives a record by its index: dicts, or objects with such attributes
    images: tuple[str, ...]  # the image id of each record; see `sinkscope.models.pictures`
    groups: tuple[str, ...]  # one name for all that share an image, directly or through others
    fingerprint: str  # a digest of all questions, answers, image ids and pixels, in order

    def __len__(self) -> int:
        return len(self.images)

    def joined(self, other: AnswerData) -> AnswerData:
        """This dataset and then another one."""
        n, images = len(self), self.images + other.images
        records = Lazy(lambda i: self.records[i] if i < n else other.records[i - n], len(images))
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
        first = [index for index, name in enumerate(self.groups) if name not in held]
        return first, [index for index, name in enumerate(self.groups) if name in held]


@dataclass(frozen=True, eq=False)
class AnswerBatch:
    """Prompts with their answers, left-padded; see `with_answers`."""

    inputs: Mapping[str, Any]  # what the model is called with
    labels: Tensor  # int ``[row pos]``: the answer's tokens, `IGNORED` elsewhere
    tokens: TokenMap  # only the prompt is ``live``, so ``tokens.last`` is its end
    rows: Ids  # the records' indices in the dataset

    @property
    def answer_tokens(self) -> int:
        """How many labels there are."""
        return int((self.labels != IGNORED).sum())

    @property
    def targets(self) -> Tensor:
        """The labels of the last columns, as many as the longest answer has, ``[row n]``."""
        return self.labels[:, -int((self.labels != IGNORED).sum(dim=1).max()) :]

    @property
    def positions(self) -> Tensor:
        """Int ``[row n]``: the positions that predict `targets`."""
        end, longest = self.labels.shape[1], self.targets.shape[1]
        return torch.arange(end - longest - 1, end - 1).expand(len(self.rows), longest)


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
        tokenizer: What counts the answers' tokens, or None.
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
    return AnswerData(records, tuple(names), tuple(clusters_of(names)), digest.hexdigest())


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
    how: Any = {"marks": marks_of(lvlm.processor), "image_token": lvlm.anatomy.image_token_id}
    how["max_answer_tokens"] = max_answer_tokens

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


def batches_of(rows: Sequence[int], size: int) -> list[Ids]:
    """Rows in groups of a size; the last may be smaller."""
    return [tuple(rows[start : start + size]) for start in range(0, len(rows), size)]


def read_rows(processor: Any, data: AnswerData, rows: Sequence[int]) -> tuple[Processed, list[str]]:
    """Model inputs of some rows, whose images are opened now, and their answers."""
    records = [_texts(data.records[row], row) for row in rows]
    images, questions, answers = ([r[k] for r in records] for k in ("image", "question", "answer"))
    images = [list(one) if isinstance(one, (list, tuple)) else [one] for one in images]
    return process(processor, images, questions), answers


def make_batch(
    lvlm: LVLM, data: AnswerData, rows: Sequence[int], *, append_end: bool = True, read: Any = None
) -> AnswerBatch:
    """The records of some rows, ``read`` before or now, as one batch, with `end_token` behind answers."""
    (inputs, _, prompts), answers = read or read_rows(lvlm.processor, data, rows)
    end = end_token(lvlm) if append_end else None
    last, both = () if end is None else (end,), zip(prompts, answers, strict=True)
    tails = [answer_ids(lvlm.tokenizer, prompt, answer) + last for prompt, answer in both]
    ready, labels = with_answers(inputs, tails, lvlm.tokenizer.pad_token_id or 0)
    tokens = lvlm.prepare(inputs=ready).tokens
    sees = (tokens.image >= 0).any(dim=1)
    if blind := [row for row, image in zip(rows, sees, strict=True) if not image]:
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
    ready = positions_for(module, ready)
    prompt = replace(tokens, live=tokens.live & (labels == IGNORED))
    return AnswerBatch(ready, labels, prompt, tuple(rows))


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
