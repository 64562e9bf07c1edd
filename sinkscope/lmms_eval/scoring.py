"""Answers to the prompts of a harness under one condition, and a record of what the edit did."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from sinkscope.checks import check_flags, check_whole, is_number
from sinkscope.cli.experiments import condition as make_condition
from sinkscope.cli.recipes import check_keys, read_recipe
from sinkscope.data.answers import score_options, touched_rows
from sinkscope.data.batches import batches_of
from sinkscope.data.items import Item
from sinkscope.errors import InputError, nearest
from sinkscope.experiments.comparing import compare, needs_trace, settle
from sinkscope.experiments.harness import RECORD
from sinkscope.experiments.tracing import trace_sinks
from sinkscope.files import seal, version_of, writable, write_whole
from sinkscope.interventions.application import allowing_noop, check_interventions
from sinkscope.models.inputs import Sample, reads_words_only
from sinkscope.models.lvlm import LVLM
from sinkscope.models.pictures import ImageIds
from sinkscope.models.prompts import PLACE, render
from sinkscope.models.requests import GREEDY

LONGEST = 1024  # tokens of an answer, where a task says nothing
# Setting of a task -> values that greedy decoding honours, the first to write; None for any.
HONOURED: dict[str, tuple[Any, ...] | None] = {"do_sample": (False, None), "num_beams": (1, None)}
HONOURED |= {"temperature": (0, None), "image_aspect_ratio": ("original", None)}
HONOURED |= dict.fromkeys(("top_p", "top_k", "max_new_tokens", "max_gen_toks", "until"))
OPTIONS = ("dtype", "device_map", "revision", "attn_implementation", "trust_remote_code")


@dataclass(frozen=True)
class Prompt:
    """One prompt about one document of a task; ``see()`` opens its images, or gives none."""

    task: str
    doc_id: int
    text: str
    see: Callable[[], Any]


def decoding(settings: Mapping[str, Any]) -> tuple[int, tuple[str, ...]]:
    """The most new tokens of an answer, and the texts that end it; InputError if it would not be greedy."""
    for name, value in settings.items():
        if name not in HONOURED:
            raise InputError(f"Got {name}={value!r} of a task. {nearest(name, HONOURED)}")
        allowed = HONOURED[name]
        unread = name == "temperature" and settings.get("do_sample") is False
        if allowed and not unread and value not in allowed:
            raise InputError(
                f"Got {name}={value!r} of a task; expected {allowed[0]!r}, for greedy answers, which can be "
                f"paired. Write --gen_kwargs {name}={allowed[0]}."
            )
    longest = settings.get("max_new_tokens") or settings.get("max_gen_toks") or LONGEST
    check_whole(1, max_new_tokens=longest)
    until = settings.get("until") or ()
    ends = [until] if isinstance(until, str) else list(until)
    if not all(isinstance(end, str) for end in ends):
        raise InputError(f"Got until={until!r} of a task; expected a text, or a list of texts.")
    return longest, tuple(filter(None, ends))


def with_places(text: str, images: int) -> Any:
    """A text with one ``<image>`` per image inside of its words, as a chat message; else as it is."""
    first, *rest = text.split(PLACE)
    if not rest or len(rest) != images or not any(map(str.strip, (first, *rest[:-1]))):
        return text
    parts = [{"type": "text", "text": first}]
    for piece in rest:
        parts += [{"type": "image"}, {"type": "text", "text": piece}]
    return [{"role": "user", "content": [part for part in parts if part.get("text") != ""]}]


def words_alone(lvlm: LVLM, text: str) -> Sample:
    """A sample of one prompt without an image."""
    if reads_words_only(lvlm.module):
        return lvlm.prepare(text=text)
    prompt = render(lvlm.processor, 0, text, rendered=False, row=0)
    bos = lvlm.tokenizer.bos_token
    special = not (bos and prompt.startswith(bos))
    inputs = lvlm.processor(text=[prompt], return_tensors="pt", add_special_tokens=special)
    return replace(lvlm.prepare(inputs=dict(inputs)), texts=(prompt,))


@dataclass(frozen=True, eq=False)
class EditedModel:
    """Answer prompts under one condition of `compare`, ``what``, and note what its edit did.

    ``rules`` are detectors for `trace_sinks`, ``batch`` prompts go through one pass, and scores of options are
    means over their tokens if ``normalized``. ``out`` is the folder of the record, ``about`` what else it holds.
    """

    lvlm: LVLM
    what: Any = ()
    name: str = "base"
    rules: Mapping[str, Any] = field(default_factory=dict)
    batch: int = 1
    normalized: bool = True
    out: Path | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    notes: dict[tuple[str, int], dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        base: Any = None,
        recipe: Any = None,
        condition: Any = None,
        out: Any = None,
        batch_size: Any = 1,
        device: Any = None,
        **options: Any,
    ) -> "EditedModel":
        """Load a model and one condition of a recipe of ``sinkscope compare``.

        Args:
            base: The model, as the command line's MODEL; None for that of the recipe.
            recipe: A YAML file with ``conditions``; its data are not read.
            condition: Which of them; None for the only one that edits, or without a recipe for no edit.
            out: A folder for the record of what the edit did: the ``--output_path``.
            batch_size: Prompts per forward pass.
            device: For ``device_map``, if that is not given.
            options: Those of `OPTIONS`, as of ``LVLM.from_pretrained``.
        """
        check_keys(options, OPTIONS, "in --model_args")
        size = int(batch_size) if str(batch_size).isdecimal() else batch_size
        check_whole(1, batch_size=size)
        trust = options.pop("trust_remote_code", False)
        check_flags(trust_remote_code=trust)
        place = None if out is None else Path(str(out)).expanduser()
        if place and (place / RECORD).exists():
            what = f"which holds {RECORD} of another run; expected a folder of its own"
            raise InputError(f"Got out={str(out)!r}, {what}. Write that of --output_path.")
        if place:
            with writable(place):
                place.mkdir(parents=True, exist_ok=True)
        model = {"device_map": device, **options, "name": base}
        model = {key: str(value) for key, value in model.items() if value is not None}
        flags = {"model": model, "data": "scenes"}  # lmms-eval has the data
        read = read_recipe("compare", recipe and str(recipe), flags, compare, trust)
        name, what = chosen(read.conditions, None if condition is None else str(condition))
        about = {"model": dict(read.model), "condition": {name: what}}
        lvlm, normalized = read.load(), read.options.get("length_normalized", True)
        ready, rules = make_condition(name, what, lvlm), read.detectors(lvlm)
        return cls(lvlm, ready, name, rules, size, normalized, place, about)

    def generate(
        self, prompts: Sequence[Prompt], settings: Sequence[Mapping[str, Any]]
    ) -> list[str]:
        """A greedy answer to every prompt, cut before the first text that ends it; see `decoding`."""
        how, answers = [decoding(one) for one in settings], {}
        for (longest, ends), group in groupby(range(len(how)), how.__getitem__):
            work = partial(self._write, longest)
            for row, text in self._each(prompts, [*group], work):
                answers[row] = text[: min((text.find(e) for e in ends if e in text), default=None)]
        return [answers[row] for row in range(len(prompts))]

    def score(self, prompts: Sequence[Prompt], options: Sequence[str]) -> list[tuple[float, bool]]:
        """The loss of one option after every prompt, and whether greedy decoding begins with it.

        The loss is the negative log-probability in nats, by token or summed: lmms-eval takes the option with
        the lowest number. Options of one prompt stand together, and are scored together.
        """
        keys = [(one.task, one.doc_id, one.text) for one in prompts]
        groups = [[*group] for _, group in groupby(range(len(keys)), keys.__getitem__)]
        texts = [tuple(options[i].strip() for i in group) for group in groups]
        out, work = {}, partial(self._choose, texts)
        firsts = [prompts[group[0]] for group in groups]
        for row, found in self._each(firsts, range(len(firsts)), work):
            out |= dict(zip(groups[row], found, strict=False))  # padded where others have more
        return [out[i] for i in range(len(prompts))]

    def finish(self) -> tuple[str, bool]:
        """Write the record, and say what the edit did: a line, and whether it did nothing at all."""
        touched = sum(note["touched"] for note in self.notes.values())
        idle = bool(self.notes) and bool(self.what) and not touched
        said = f"sinkscope: {self.name!r} touched {touched} of {len(self.notes)} documents."
        said += " NOTHING was edited: these are the model's own answers." if idle else ""
        if self.out is not None:
            documents = [{"task": t, "doc_id": i, **note} for (t, i), note in self.notes.items()]
            whole = {"sinkscope": version_of("sinkscope"), **self.about, "documents": documents}
            with writable(self.out):
                write_whole(self.out / RECORD, json.dumps(seal(whole)))
        return said, idle

    def _write(self, longest: int, rows: Any, sample: Sample, edits: Any) -> Any:
        out = self.lvlm.generate(sample, [], edits, max_new_tokens=longest, **GREEDY)
        return out.text, touched_rows(out.steps, [len(out.steps)] * len(rows))

    def _choose(self, texts: Any, rows: Any, sample: Sample, edits: Any) -> Any:
        items = [Item(None, "", texts[i][0], choices=texts[i]) for i in rows]
        logs, touched, exact = score_options(self.lvlm, sample, items, edits, self.normalized)
        pairs = zip((-logs).tolist(), exact.tolist(), strict=True)
        return [[*zip(*pair, strict=True)] for pair in pairs], touched

    def _each(
        self, prompts: Sequence[Prompt], rows: Sequence[int], work: Callable[..., Any]
    ) -> Iterator[tuple[int, Any]]:
        """Every row and what ``work(rows, sample, edits)`` answers, with notes taken, batch by batch."""
        for part in tqdm(batches_of(rows, self.batch), desc=self.name, unit="batch"):
            for some, images, sample in self._samples(prompts, part):
                traced = needs_trace(self.what)
                trace = trace_sinks(self.lvlm, sample, **self.rules) if traced else None
                on = settle(self.lvlm, self.name, self.what, trace, len(some))
                edits = [*map(allowing_noop, check_interventions(on.edits))]
                with on.block:
                    answers, touched = work(some, sample, edits)
                for at, row in enumerate(some):
                    key = (prompts[row].task, prompts[row].doc_id)
                    before = self.notes.get(key, {}).get("touched", False)
                    self.notes[key] = {
                        "touched": bool(before or on.whole or touched[at]),
                        "sinks": on.sinks[at] if is_number(on.sinks[at]) else None,
                        "uncontrolled": bool(on.uncontrolled[at]),
                        "image": images[at],
                    }
                yield from zip(some, answers, strict=True)

    def _samples(
        self, prompts: Sequence[Prompt], part: Iterable[int]
    ) -> Iterator[tuple[Any, Any, Sample]]:
        """Rows, the ids of their pictures, and their sample; a prompt without images is one of its own."""
        seen = {row: prompts[row].see() or [] for row in part}
        seen = {row: [*x] if isinstance(x, (list, tuple)) else [x] for row, x in seen.items()}
        if shown := [row for row in seen if seen[row]]:
            texts = [with_places(prompts[row].text, len(seen[row])) for row in shown]
            ids = [ImageIds().add(prompts[row].doc_id, seen[row])[0] for row in shown]
            yield shown, ids, self.lvlm.prepare(images=[seen[row] for row in shown], text=texts)
        for row in seen:
            if not seen[row]:
                yield [row], [None], words_alone(self.lvlm, prompts[row].text)


def chosen(conditions: Any, name: str | None) -> tuple[str, Any]:
    """The name of one condition of a recipe, and what the recipe says of it."""
    if not isinstance(conditions, Mapping):
        raise InputError(
            f"Got conditions: {conditions!r}; expected names: {{gated: {{gate: folder}}}}."
        )
    known = {"base": [], **{str(key): what for key, what in conditions.items()}}
    edits = [key for key, what in known.items() if what not in ([], {}, None, "base")]
    if name is None and len(edits) > 1:
        raise InputError(f"Got a recipe with {edits}; expected one. Write condition={edits[0]}.")
    name = (edits or ["base"])[0] if name is None else name
    if name not in known:
        raise InputError(f"Got condition={name!r}. {nearest(name, known)}")
    return name, known[name]
