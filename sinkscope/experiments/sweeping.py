"""sweep: the layer x coefficient map of key gating, exact, resumable, and with everything reused."""

from __future__ import annotations

import functools
import hashlib
import re
import sys
import sysconfig
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import TYPE_CHECKING, Any

import joblib
import numpy as np
from torch import Tensor
from tqdm.auto import tqdm

from sinkscope.checks import check_flags, check_whole
from sinkscope.data.answers import Score, choose_score
from sinkscope.data.items import Item, as_items, check_tasks
from sinkscope.detectors.calibration import Calibration
from sinkscope.detectors.choice import SinkRules
from sinkscope.detectors.detection import check_detector
from sinkscope.detectors.rules import Detector, NoSinks
from sinkscope.errors import InputError
from sinkscope.experiments.sweep_cost import SweepCost, estimate
from sinkscope.experiments.sweep_grid import Batch, Cells, Pair, check_grid, check_layers, lsg_grid
from sinkscope.experiments.sweep_images import Numbered, Rules, sweep_image
from sinkscope.experiments.sweep_result import (
    FORMATS,
    Folder,
    Sweep,
    as_frame,
    as_table,
    check_by,
    check_out,
)
from sinkscope.models.identity import identity_of
from sinkscope.models.pictures import ImageIds
from sinkscope.models.prompts import check_questions
from sinkscope.models.replay import check_replay
from sinkscope.models.wrapping import evaluated
from sinkscope.tokens import check_merge

if TYPE_CHECKING:
    import pyarrow as pa

    from sinkscope.models.inputs import Sample
    from sinkscope.models.lvlm import LVLM


CALIBRATION_IMAGES = 6
SHOWN_FROM = 50
"""Questions from which a progress bar is shown unasked."""
LIBRARIES = tuple(Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib"))


def check_rules(detector: Any, l_detector: Any, calibration: Any, *, with_l: bool) -> None:
    """Require one rule of a kind at most, and none for L-sinks where they have no coefficient."""
    for name, one in (("v_detector", detector), ("l_detector", l_detector)):
        if one is not None and calibration is not None:
            raise InputError(
                f"Got {name} and calibration; expected one of them. Write only one, or "
                "v_detector=... and l_detector=calibration.l_detector."
            )
        if one is not None:
            check_detector(one)
    if l_detector is not None and not with_l:
        raise InputError(
            f"Got l_detector={l_detector!r} and a grid of pairs (s_V, s_rest), in which L-sinks are "
            "among the rest; expected none. Write grid=ss.lsg_grid(groups=3) for triples (s_V, s_L, "
            "s_rest)."
        )
    if calibration is not None and not isinstance(calibration, Calibration):
        raise InputError(
            f"Got calibration of type {type(calibration).__name__}; expected what "
            "ss.calibrate(lvlm, samples) gives."
        )


def check_usable(lvlm: LVLM, *, weights: bool) -> None:
    """Require a processor and, if they are needed, weights."""
    if lvlm.tokenizer is None:
        raise InputError("Got an LVLM without a processor; expected one, to read answers.")
    if weights and lvlm.device.type == "meta":
        raise InputError(
            "Got an LVLM without weights; expected them here: a sweep resumes passes, which a remote "
            "run cannot. Write ss.LVLM.from_pretrained(name) without remote=True, or dry_run=True to "
            "see what it would cost."
        )


def digest_function(function: Callable[..., Any]) -> str:
    """Digest what a function computes: bytecode, constants, defaults, and the values it refers to.

    Functions and classes among those values count in the same way; of modules and of what belongs to an
    installed library the name is taken. Other versions of Python compile to other bytecode, so the
    interpreter's tag stands in front.

    Args:
        function: A function, a method, a ``functools.partial`` or an object with ``__call__``.

    Raises:
        InputError: If it refers to a value whose content cannot be read.
    """
    return f"{sys.implementation.cache_tag} {joblib.hash(_content(function, 'the score function', ()))}"


def _content(value: Any, where: str, above: tuple[int, ...]) -> Any:
    """The content of a value as plain lists and numbers; ``above`` are the values around it."""
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, type(...))):
        return [type(value).__name__, repr(value)]
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        return np.asarray(value.detach().cpu().double() if isinstance(value, Tensor) else value)
    if id(value) in above:  # a function that calls itself
        return "again"
    inside = (*above, id(value))
    if isinstance(value, (set, frozenset)):
        return sorted(str(joblib.hash(_content(each, where, inside))) for each in value)
    if above and _of_a_library(value):
        name = getattr(value, "__qualname__", getattr(value, "__name__", ""))
        return f"{getattr(value, '__module__', '')} {name}"
    parts = _parts(value, where)
    found = [[name, _content(inner, f"{name} of {where}", inside)] for name, inner in parts.items()]
    return [type(value).__qualname__, found]


def _of_a_library(value: Any) -> bool:
    """Whether a name says it all: modules, and functions and classes of what is installed."""
    if isinstance(value, (ModuleType, np.ufunc)):
        return True
    if isinstance(value, BuiltinFunctionType):
        return value.__self__ is None or isinstance(value.__self__, (ModuleType, type))
    if not isinstance(value, (FunctionType, type)):
        return False
    if value.__module__.partition(".")[0] in ("sinkscope", *sys.builtin_module_names):
        return True
    file = getattr(sys.modules.get(value.__module__), "__file__", None)
    return file is not None and any(folder in Path(file).parents for folder in LIBRARIES)


def _parts(value: Any, where: str) -> dict[str, Any]:
    """What a value consists of, by name."""
    if isinstance(value, CodeType):  # where its lines stood does not matter
        names = ("co_code", "co_names", "co_varnames", "co_freevars", "co_argcount", "co_consts")
        return {name: getattr(value, name) for name in names}
    if isinstance(value, FunctionType):
        code, found = value.__code__, value.__globals__
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        parts = {"code": code, "defaults": (value.__defaults__, value.__kwdefaults__)}
        return {
            **parts,
            **dict(zip(code.co_freevars, cells, strict=True)),
            **{name: found[name] for name in sorted(_names(code) & found.keys())},
        }
    if isinstance(value, (tuple, list)):
        return {str(i): each for i, each in enumerate(value)}
    if isinstance(value, Mapping):
        return {repr(key): each for key, each in value.items()}
    if isinstance(value, type):
        members = {n: getattr(m, "__func__", getattr(m, "fget", m)) for n, m in vars(value).items()}
        own = {n: m for n, m in members.items() if isinstance(m, FunctionType) or n[:2] != "__"}
        return {"bases": value.__bases__, **dict(sorted(own.items()))}
    if isinstance(value, BuiltinFunctionType):
        return {"name": value.__name__, "object": value.__self__}
    if isinstance(value, MethodType):
        own = value.__self__
        return {"function": value.__func__, "class": type(own), **getattr(own, "__dict__", {})}
    if isinstance(value, functools.partial):
        return {"function": value.func, "args": value.args, "keywords": value.keywords}
    if isinstance(value, re.Pattern):
        return {"pattern": value.pattern, "flags": int(value.flags)}
    if isinstance(value, Enum):
        return {"member": value.name, "value": value.value}
    if isinstance(getattr(value, "__wrapped__", None), FunctionType):
        return {"function": value.__wrapped__}
    if callable(value) and not _of_a_library(type(value)):
        return {"class": type(value), **dict(sorted(getattr(value, "__dict__", {}).items()))}
    raise InputError(
        f"Got {where}, of type {type(value).__name__}, whose content cannot be read; expected numbers, "
        "texts, tensors, lists of these or functions. Without that out= cannot tell when a sweep is "
        "continued with another score. Let the function use such values only, or write out=None."
    )


def _names(code: CodeType) -> set[str]:
    """The names that a function and the functions inside it use."""
    inner = [_names(one) for one in code.co_consts if isinstance(one, CodeType)]
    return set(code.co_names).union(*inner)


def sweep(
    lvlm: LVLM,
    dataset: Iterable[Any],
    layers: Any = None,
    grid: Sequence[Pair] | None = None,
    by: str = "task",
    *,
    score: str | Score | None = None,
    v_detector: Detector | None = None,
    l_detector: Detector | None = None,
    calibration: Calibration | None = None,
    merge: str = "max",
    out: str | Path | None = None,
    batch: int | str = "auto",
    progress: bool | None = None,
    dry_run: bool = False,
) -> Sweep | SweepCost:
    """Score every question with the keys of image tokens scaled, layer by layer and pair by pair.

    In the cell of layer l and pair ``(s_V, s_rest)`` the keys of V-sinks are multiplied by s_V and
    those of all other image tokens by s_rest, in block l + 1, after RoPE and k-norm (Choi et al.
    2604.03316: a gate that reads layer l edits block l + 1). An image without V-sinks has "other"
    image tokens only. The base, (1, 1), is run once per question.

    A grid of triples ``(s_V, s_L, s_rest)`` splits the rest as the paper's third observation does: s_L
    is for L-sinks, image tokens that meet ``l_detector`` on what block l + 1 reads and are no
    V-sinks, and s_rest for the ordinary ones. These are the groups of a gate with
    ``groups=("V", "L", "rest")``.

    Nothing is approximated: the vision tower runs once per image (and once more where V-sinks are
    looked for), blocks before the edited one once per question, pairs as rows of one pass, and the
    prompt up to the end of the image once for all questions about it. With pairs that may be shared
    because V-sinks come from the image alone. L-sinks are decided for every question on the states of
    its own plain pass, and only questions with the same L-sinks share. A question whose prompt
    differs before the end of the image, as where a template puts its text first, runs on its own.

    Args:
        lvlm: The model, with its processor and weights.
        dataset: Records with ``image``, ``question``, ``answer`` and, if you like, ``task``,
            ``image_id`` and ``choices``: dicts or `Item`. Answers and options are tokenised as
            they follow the prompt, as in training (`sinkscope.data.answers`).
        layers: Layers l from 0, ``"embed"`` to edit block 0, or None for all of both.
        grid: Pairs ``(s_V, s_rest)`` or triples ``(s_V, s_L, s_rest)``; None for `lsg_grid`.
        by: How the result is split: ``"task"``, or ``"all"``.
        score: ``"choice"`` (the option with the highest mean log-probability per token is the
            right one), ``"exact"`` (at each position of the answer its token is the most likely one,
            given the prompt and the answer so far: greedy decoding begins with the answer),
            ``"logprob"`` (of the answer, in nats), or a function of an item and an `Answered`. None
            is ``"choice"`` if items have choices, else ``"exact"``. The log-probability is always
            kept too. With ``out``, a function is known by its code and the values it refers to.
        v_detector: The rule for V-sinks, best calibrated on other images.
        l_detector: The rule for L-sinks likewise, with triples only.
        calibration: Of `calibrate`; its rules are taken. Without rules, published constants of this
            model are used, else the first images of the dataset calibrate, which is noted in the
            result.
        merge: See `trace_sinks`.
        out: A folder to write to and to continue from, or None to keep all in memory.
        batch: Pairs per forward pass; ``"auto"`` begins with all and halves when memory runs out.
        progress: Whether to show a progress bar with the time left; None from 50 questions on.
        dry_run: Whether to return what it would cost instead: every option is checked, but nothing
            is run and nothing stays written. It needs no weights, so ``remote=True`` will do.

    Returns:
        The sweep, or, with ``dry_run``, a `SweepCost` to print.

    Raises:
        InputError: If dataset, grid or an option is malformed, ``out`` holds another sweep or is
            written to by another process, or a log-probability or score is not finite; nothing of
            that image is then written.
        CheckpointError: If ``out`` cannot be written or read.
        DetectorError: If a detector is none.
        SelectionError: If ``merge`` is unknown.
        LayerError: If there is no such layer.
        ModelError: If a resumed pass would not be the model's own.
    """
    check_flags(dry_run=dry_run)
    check_by(by)
    pairs = check_grid(lsg_grid() if grid is None else grid)
    cells = Cells(check_layers(layers, lvlm.anatomy.language.n_layers), tuple(pairs))
    if batch != "auto":
        check_whole(1, batch=batch, hint="Or write batch='auto'.")
    check_merge(merge)
    check_rules(v_detector, l_detector, calibration, with_l=cells.with_l)
    check_usable(lvlm, weights=not dry_run)
    items = as_items(dataset)
    check_tasks(items)
    check_questions(lvlm.processor, items)
    name, scoring = choose_score(score, items)
    code = digest_function(scoring) if out is not None and callable(score) else None
    groups = by_image(items)
    if dry_run:
        if out is not None:
            check_out(out)
        low = l_detector if calibration is None else calibration.l_detector
        return estimate(lvlm, groups, cells, len(items), low)
    given = {"v": v_detector, **({"l": l_detector} if cells.with_l else {})}
    detectors, said, notes = choose_rules(lvlm, groups, given, calibration)
    settings = {
        "format": FORMATS[len(pairs[0])],
        "model": identity_of(lvlm),
        "dataset": digest_of(items),
        "groups": len(groups),
        "grid": [list(pair) for pair in pairs],
        "layers": list(cells.layers),
        "score": name,
        "score_code": code,
        **said,
        "merge": merge,
        "notes": notes,
        "versions": {p: version(p) for p in ("sinkscope", "torch", "transformers")},
    }
    batches = Batch(batch, len(pairs))
    rules = Rules(cells, scoring, detectors["v"], merge, batches, detectors.get("l"))
    folder = None if out is None else Folder(out, settings)
    hidden = len(items) < SHOWN_FROM if progress is None else not progress
    with nullcontext() if folder is None else folder.held(), evaluated(lvlm.module):
        made = run_groups(lvlm, groups, rules, folder, hidden=hidden)
    if out is not None:
        return Sweep.load(out, by)
    tables = [part for part, _ in made]
    heard = dict.fromkeys([*notes, *(note for _, some in made for note in some)])
    return Sweep(as_frame(tables, settings), settings, tuple(heard), by)


def run_groups(
    lvlm: LVLM,
    groups: Sequence[Sequence[Numbered]],
    rules: Rules,
    folder: Folder | None,
    *,
    hidden: bool,
) -> list[tuple[pa.Table, list[str]]]:
    """Run the groups that are not there yet; kept in memory only if there is no folder."""
    each = len(rules.cells.layers) * len(rules.cells.pairs)
    done = [folder is not None and folder.part(i).exists() for i in range(len(groups))]
    before = each * sum(len(group) for group, there in zip(groups, done, strict=True) if there)
    total = each * sum(len(group) for group in groups)
    kept = []
    proven = False
    with tqdm(total=total, initial=before, desc="sweeping", unit="cell", disable=hidden) as bar:
        for number, group in enumerate(groups):
            if done[number]:
                continue
            if not proven:
                first = group[0][1]
                sample = lvlm.prepare(images=first.image, text=first.question)
                check_replay(lvlm, sample.inputs, rules.cells.blocks)
                proven = True
            lines, notes = sweep_image(lvlm, group, rules, bar.update)
            if folder is None:
                kept.append((as_table(lines, with_l=rules.cells.with_l), notes))
            else:
                folder.write(number, lines, notes)
    return kept


def by_image(items: Sequence[Item]) -> list[list[Numbered]]:
    """Numbered questions in groups of one image id, in the order in which ids appear."""
    groups: dict[str, list[Numbered]] = {}
    for numbered in enumerate(items):
        groups.setdefault(numbered[1].image_id, []).append(numbered)
    return list(groups.values())


def choose_rules(
    lvlm: LVLM,
    groups: Sequence[Sequence[Numbered]],
    given: Mapping[str, Detector | None],
    calibration: Calibration | None,
) -> tuple[dict[str, Detector], dict[str, str], list[str]]:
    """The rules for sinks by the names of ``given``, both in words, and notes for a reader.

    ``given`` has ``"v"`` and, where L-sinks have a coefficient, ``"l"``, with the rule or None.
    """
    first = [group[0][1] for group in groups[:CALIBRATION_IMAGES]]
    what = f"the first {len(first)} images of the dataset"

    def samples() -> list[Sample]:
        return [lvlm.prepare(images=item.image, text=item.question) for item in first]

    low = given.get("l") if "l" in given else NoSinks()
    found = SinkRules.on_others(lvlm, samples, given["v"], low, what=what, calibration=calibration)
    both = {"v": (found.v, found.v_source), "l": (found.l_rule, found.l_source)}
    rules, said, notes = {}, {}, []
    for name in given:
        rule, source = both[name]
        named = given[name] is not None or calibration is not None
        rules[name], said[f"{name}_rule"] = rule, repr(rule) if named else source
        if found.calibration is not None and not named and what in source:
            tower = found.calibration.vision if name == "v" else found.calibration.language
            notes.append(
                f"{name.upper()}-sinks by a rule calibrated on {what}, which are scored too "
                f"({tower.reason}). Write calibration=ss.calibrate(lvlm, samples of other images)"
            )
    return rules, said, notes


def digest_of(items: Sequence[Item]) -> str:
    """A digest of questions, answers, options, tasks, image ids and pixels, in order."""
    digest, ids = hashlib.blake2b(digest_size=16), ImageIds()
    for i, item in enumerate(items):
        image = ids.add(i, item.image, item.image_id)
        digest.update(repr((item.question, item.answer, item.task, *image, *item.choices)).encode())
    return digest.hexdigest()
