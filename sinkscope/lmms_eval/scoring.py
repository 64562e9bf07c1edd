"""Answers to the prompts of a harness under one condition, and a record of what the edit did."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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
from sinkscope.experiments import compare
from sinkscope.experiments.comparing import needs_trace, settle
from sinkscope.experiments.harness import RECORD
from sinkscope.experiments.tracing import trace_sinks
from sinkscope.files import version_of, writable, write_whole
from sinkscope.interventions.application import allowing_noop, check_interventions
from sinkscope.models.inputs import Sample, process_words, reads_words_only
from sinkscope.models.lvlm import LVLM
from sinkscope.models.pictures import ImageIds
from sinkscope.models.prompts import PLACE, render
from sinkscope.models.requests import GREEDY

LONGEST = 1024  # tokens of an answer, where a task says nothing
# Setting -> values under which greedy decoding is what was asked for; None allows any.
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


@dataclass(frozen=True, eq=False)
class Place:
    """A batch of the model, and where in a list of prompts its rows stand."""

    sample: Sample
    rows: Sequence[int]
    images: Sequence[str | None]  # the id of each row's pictures


def decoding(settings: Mapping[str, Any]) -> tuple[int, tuple[str, ...]]:
    """The most new tokens and the texts that end an answer; InputError if a setting is not greedy decoding.

    Texts count by their first appearance. Settings of sampling, such as ``top_p``, change no greedy answer.
    """
    for name, value in settings.items():
        allowed = HONOURED.get(name)
        if name not in HONOURED:
            raise InputError(
                f"Got the setting {name}={value!r} of a task. {nearest(name, HONOURED)}"
            )
        if name == "temperature" and settings.get("do_sample") is False:
            continue  # then it is not read
        if allowed is not None and value not in allowed:
            raise InputError(
                f"Got {name}={value!r} of a task; expected {allowed[0]!r}: answers are greedy, so that runs "
                f"can be paired. Write --gen_kwargs {name}={allowed[0]}."
            )
    longest = settings.get("max_new_tokens") or settings.get("max_gen_toks") or LONGEST
    check_whole(1, max_new_tokens=longest)
    until = settings.get("until") or ()
    ends = [until] if isinstance(until, str) else list(until)
    if not all(isinstance(end, str) for end in ends):
        raise InputError(f"Got until={until!r} of a task; expected a text, or a list of texts.")
    return longest, tuple(end for end in ends if end)


def with_places(text: str, images: int) -> Any:
    """A text with one ``<image>`` per image inside of its words, as a chat message; else as it is."""
    words = text.split(PLACE)
    if not images or len(words) != images + 1 or not any(map(str.strip, words[:-1])):
        return text
    parts: list[dict[str, str]] = [{"type": "text", "text": words[0]}]
    for piece in words[1:]:
        parts += [{"type": "image"}, {"type": "text", "text": piece}]
    return [{"role": "user", "content": [part for part in parts if part.get("text", "x")]}]


def words_alone(lvlm: LVLM, text: str) -> Sample:
    """A sample of one prompt without an image."""
    if reads_words_only(lvlm.module):
        return lvlm.prepare(text=text)
    prompt = render(lvlm.processor, 0, text, rendered=False, row=0)
    inputs, texts = process_words(lvlm.tokenizer, None, prompt, rendered=True)
    return replace(lvlm.prepare(inputs=inputs), texts=tuple(texts))


class EditedModel:
    """A model under one condition of `compare`; it answers prompts and notes what its edit did.

    Args:
        what: The condition; see `compare`, and ``name`` what it is called.
        rules: Detectors for traces, as of `trace_sinks`.
        batch: Prompts per forward pass.
        normalized: Whether the log-probability of an option is the mean over its tokens or the sum.
        out: A folder for the record, or None.
        about: What else the record holds, JSON-ready.
    """

    def __init__(
        self,
        lvlm: LVLM,
        what: Any = (),
        *,
        name: str = "base",
        rules: Mapping[str, Any] | None = None,
        batch: int = 1,
        normalized: bool = True,
        out: Path | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        check_whole(1, batch_size=batch)
        if lvlm.tokenizer is None:
            raise InputError("Got an LVLM without a processor; expected one, to read prompts.")
        if out is not None and (out / RECORD).exists():
            raise InputError(
                f"Got out={str(out)!r}, which holds {RECORD} of another run; expected a folder of this run "
                "alone, the --output_path. Write another one."
            )
        self.lvlm, self.what, self.name, self.rules = lvlm, what, name, dict(rules or {})
        self.batch, self.normalized, self.out, self.about = (
            batch,
            normalized,
            out,
            dict(about or {}),
        )
        self.notes: dict[tuple[str, int], dict[str, Any]] = {}

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
            recipe: A YAML file with ``conditions``; the data and sections of other commands are not read.
            condition: Which of them; None for the only one that edits, or without a recipe for no edit.
            out: A folder for the record of what the edit did: the ``--output_path``.
            batch_size: Prompts per forward pass.
            device: For ``device_map``, if that is not given.
            options: ``dtype``, ``device_map``, ``revision``, ``attn_implementation``, ``trust_remote_code``.
        """
        check_keys(options, OPTIONS, "in --model_args")
        trust = options.pop("trust_remote_code", False)
        check_flags(trust_remote_code=trust)
        model = {k: v if v is None else str(v) for k, v in {"name": base, **options}.items()}
        if device is not None:
            model.setdefault("device_map", str(device))
        flags = {"model": {k: v for k, v in model.items() if v is not None}, "data": "scenes"}
        read = read_recipe("compare", recipe and str(recipe), flags, compare, trust)
        name, asked = chosen(read.conditions, None if condition is None else str(condition))
        size = int(batch_size) if str(batch_size).isdecimal() else batch_size
        check_whole(1, batch_size=size)
        lvlm = read.load()
        about = {"model": dict(read.model), "condition": {name: asked}}
        normalized = read.options.get("length_normalized", True)
        how: dict[str, Any] = dict(name=name, batch=size, normalized=normalized, about=about)
        how["out"] = None if out is None else Path(str(out)).expanduser()
        return cls(lvlm, make_condition(name, asked, lvlm), rules=read.detectors(lvlm), **how)

    def generate(
        self, prompts: Sequence[Prompt], settings: Sequence[Mapping[str, Any]]
    ) -> list[str]:
        """A greedy answer to every prompt, cut before the first text that ends it; see `decoding`."""
        how, answers = [decoding(one) for one in settings], [""] * len(prompts)
        for (longest, ends), group in groupby(range(len(prompts)), lambda i: how[i]):
            for place in self._places(prompts, [*group]):
                stop = {"stop_strings": list(ends), "tokenizer": self.lvlm.tokenizer}
                alone = ends and len(place.rows) == 1  # of several no token says which has ended
                options = {**GREEDY, "max_new_tokens": longest, **(stop if alone else {})}

                def answer(sample: Sample, edits: Any, options: Any = options) -> Any:
                    out = self.lvlm.generate(sample, [], edits, **options)
                    return out.text, touched_rows(out.steps, [len(out.steps)] * len(sample))

                for row, text in zip(place.rows, self._under(prompts, place, answer), strict=True):
                    cuts = [at for at in map(text.find, ends) if at >= 0]
                    answers[row] = text[: min(cuts)] if cuts else text
        return answers

    def score(self, prompts: Sequence[Prompt], options: Sequence[str]) -> list[tuple[float, bool]]:
        """The loss of one option after every prompt, and whether greedy decoding begins with it.

        The loss is the negative log-probability in nats, its mean over the option's tokens: lmms-eval takes
        the option with the lowest number. Options of one document stand together, and are scored together.
        """
        same = groupby(range(len(prompts)), lambda i: (*vars(prompts[i]).values(),)[:3])
        groups = [[*group] for _, group in same]
        firsts, scores = [prompts[group[0]] for group in groups], {}
        texts = [tuple(options[i].strip() for i in group) for group in groups]
        for place in self._places(firsts, [*range(len(firsts))]):
            items = [Item(None, firsts[i].text, texts[i][0], choices=texts[i]) for i in place.rows]

            def answer(sample: Sample, edits: Any, items: Any = items) -> Any:
                logs, touched, exact = score_options(
                    self.lvlm, sample, items, edits, self.normalized
                )
                return [*zip(logs.tolist(), exact.tolist(), strict=True)], touched

            found = self._under(firsts, place, answer)
            for i, (logs, exact) in zip(place.rows, found, strict=True):
                scores |= {j: (-logs[n], exact[n]) for n, j in enumerate(groups[i])}
        return [scores[i] for i in range(len(prompts))]

    def finish(self) -> tuple[str, bool]:
        """Write the record, and say what the edit did: a line, and whether it did nothing at all."""
        touched = sum(note["touched"] for note in self.notes.values())
        idle = bool(self.notes) and (callable(self.what) or bool(self.what)) and not touched
        said = f"sinkscope: {self.name!r} touched {touched} of {len(self.notes)} documents."
        if idle:
            said += " It did NOTHING: these are the answers of the unedited model."
        if self.out is not None:
            documents = [{"task": t, "doc_id": i, **note} for (t, i), note in self.notes.items()]
            whole = {"sinkscope": version_of("sinkscope"), **self.about, "documents": documents}
            with writable(self.out):
                self.out.mkdir(parents=True, exist_ok=True)
                write_whole(self.out / RECORD, json.dumps(whole, indent=1, default=str))
            said += f" Each: {self.out / RECORD}"
        return said, idle

    def _places(self, prompts: Sequence[Prompt], rows: Sequence[int]) -> Iterator[Place]:
        """Batches of some prompts in order; one without images has a batch of its own."""
        for part in tqdm(batches_of(rows, self.batch), desc=self.name, unit="batch"):
            seen = {i: prompts[i].see() or [] for i in part}
            seen = {i: x if isinstance(x, (list, tuple)) else [x] for i, x in seen.items()}
            shown = [i for i in part if seen[i]]
            if shown:
                images = [list(seen[i]) for i in shown]
                texts = [with_places(prompts[i].text, len(seen[i])) for i in shown]
                ids = [ImageIds().add(prompts[i].doc_id, list(seen[i]))[0] for i in shown]
                yield Place(self.lvlm.prepare(images=images, text=texts), shown, ids)
            for i in part:
                if not seen[i]:
                    yield Place(words_alone(self.lvlm, prompts[i].text), [i], [None])

    def _under(self, prompts: Sequence[Prompt], place: Place, answer: Any) -> Any:
        """What ``answer(sample, edits)`` gives under the condition; notes of its rows are taken."""
        sample, many = place.sample, len(place.rows)
        trace = trace_sinks(self.lvlm, sample, **self.rules) if needs_trace(self.what) else None
        on = settle(self.lvlm, self.name, self.what, trace, many)
        with on.block:
            answers, touched = answer(sample, [*map(allowing_noop, check_interventions(on.edits))])
        for row, i in enumerate(place.rows):
            note = self.notes.setdefault((prompts[i].task, prompts[i].doc_id), {"touched": False})
            note["touched"] |= bool(on.whole or touched[row])
            sinks = on.sinks[row]
            note |= {"sinks": sinks if is_number(sinks) else None, "image": place.images[row]}
            note["uncontrolled"] = bool(on.uncontrolled[row])
        return answers


def chosen(conditions: Any, name: str | None) -> tuple[str, Any]:
    """The name of one condition of a recipe, and what the recipe says of it."""
    if not isinstance(conditions, Mapping):
        raise InputError(
            f"Got conditions: {conditions!r}; expected names: {{gated: {{gate: folder}}}}."
        )
    known = {"base": [], **{str(key): what for key, what in conditions.items()}}
    edits = [key for key, what in known.items() if what not in ([], {}, None, "base")]
    if name is None and len(edits) > 1:
        raise InputError(
            f"Got a recipe with the conditions {edits}; expected condition= one of them."
        )
    name = (edits or ["base"])[0] if name is None else name
    if name not in known:
        raise InputError(f"Got condition={name!r}. {nearest(name, known)}")
    return name, known[name]
