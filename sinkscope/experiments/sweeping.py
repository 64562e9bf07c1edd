"""sweep: the layer x coefficient map of key gating, exact, resumable, and with everything reused."""

import hashlib
import pickle
import sys
import sysconfig
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import numpy as np
from joblib.hashing import NumpyHasher
from torch import Tensor
from tqdm.auto import tqdm

from sinkscope.checks import check_choice, check_whole, typed
from sinkscope.data.answers import Score, choose_score
from sinkscope.data.items import Item, as_items, check_tasks
from sinkscope.detectors import Calibration, Detector, NoSinks, SinkRules
from sinkscope.detectors.detection import check_detector
from sinkscope.errors import InputError
from sinkscope.experiments import sweep_grid
from sinkscope.experiments.statistics import BY
from sinkscope.experiments.sweep_away import sweep_away
from sinkscope.experiments.sweep_grid import Cells, Groups, Numbered, Pair, SweepCost
from sinkscope.experiments.sweep_images import Batch, Line, Rules, sweep_image
from sinkscope.experiments.sweep_result import MANIFEST, Folder, Sweep, as_frame, as_table
from sinkscope.files import check_place, held, version_of
from sinkscope.models.loading import identity_of, is_away
from sinkscope.models.lvlm import LVLM
from sinkscope.models.pictures import ImageIds
from sinkscope.models.prompts import check_questions
from sinkscope.models.replay import check_replay
from sinkscope.models.wrapping import evaluated
from sinkscope.scale.engine import Prepared, Ray, check_engine, each_part
from sinkscope.tokens import check_merge


@typed
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
    engine: str | Ray = "local",
    progress: bool | None = None,
    dry_run: bool = False,
) -> Sweep | SweepCost:
    """Score every question with the keys of image tokens scaled, layer by layer and pair by pair.

    In the cell of layer l and pair ``(s_V, s_rest)`` the keys of V-sinks are multiplied by s_V and those of
    all other image tokens by s_rest, in block l + 1, after RoPE and k-norm (Choi et al. 2604.03316: a gate
    that reads layer l edits block l + 1). The base, (1, 1), is run once per question. Triples
    ``(s_V, s_L, s_rest)`` take L-sinks out of the rest, as a gate with ``groups=("V", "L", "rest")``: image
    tokens that meet ``l_detector`` on what block l + 1 reads and are no V-sinks. Nothing is approximated;
    what an edit cannot change is computed once, but for a model that is not here (``remote=True``): there every
    question has one request per block and batch of edits, and one for the base.

    Args:
        dataset: Records as for `compare`.
        layers: Layers l from 0, ``"embed"`` to edit block 0, or None for all of both.
        grid: Pairs ``(s_V, s_rest)`` or triples ``(s_V, s_L, s_rest)``; None for `lsg_grid`.
        by: ``"task"``, or ``"all"``.
        score: ``"choice"`` (the option with the highest mean log-probability per token is right),
            ``"exact"`` (greedy decoding begins with the answer), ``"logprob"`` (of the answer, in nats,
            always kept too), or a function of an item and an `Answered`, known by its code and the values
            it refers to. None is ``"choice"`` if items have choices, else ``"exact"``.
        v_detector: The rule for V-sinks; ``l_detector`` for L-sinks, with triples only. Or give a
            ``calibration``, on other images. With none of them, published constants of this model are used,
            else the first images of the dataset calibrate, which the result notes.
        merge: See `trace_sinks`.
        out: A folder to write to and to continue from, or None to keep all in memory.
        batch: Pairs per forward pass; ``"auto"`` begins with all and halves when memory runs out.
        engine: ``"local"``, ``"ray"`` or a `sinkscope.scale.Ray`: the images are shared among its workers, which
            get ``score`` with all it refers to.
        progress: None shows a bar from 50 questions on.
        dry_run: Check all options and return the cost, a `SweepCost` to print. Nothing is run or left on
            disk, and no weights are needed (``remote=True`` will do).

    Raises:
        InputError: If an option is malformed, another sweep is or runs in ``out``, or a log-probability
            or score is not finite; nothing of that image is then written.
        CheckpointError: If ``out`` cannot be written or read, or a file in it was damaged or is of another
            sweep. What was done before stays.
        ModelError: If a resumed pass would not be the model's own.
    """
    check_choice(BY, by=by)
    pairs = sweep_grid.check_grid(grid)
    chosen = sweep_grid.check_layers(layers, lvlm.anatomy.language.n_layers)
    cells = Cells(chosen, tuple(pairs))
    if batch != "auto":
        check_whole(1, batch=batch, hint="Or write batch='auto'.")
    check_merge(merge)
    check_engine(engine)
    given = {"v_detector": v_detector, "l_detector": l_detector}
    _check_rules(given, calibration, cells.with_l)
    if lvlm.tokenizer is None:
        raise InputError("Got an LVLM without a processor; expected one, to read answers.")
    if is_away(lvlm) and not dry_run and (why := lvlm.anatomy.lens.why):
        raise InputError(
            f"Got an LVLM without weights whose logits no probe reads ({why}); expected weights here. "
            "Write ss.LVLM.from_pretrained(name) without remote=True, or dry_run=True for its cost."
        )
    items = as_items(dataset)
    check_tasks(items)
    check_questions(lvlm.processor, items)
    name, scoring = choose_score(score, items)
    code = digest_function(scoring) if out is not None and callable(score) else None
    groups = sweep_grid.by_image(items)
    if dry_run:
        if out is not None:
            check_place(Path(out).expanduser(), MANIFEST, "sweep")
        low = getattr(calibration, "l_detector", l_detector)
        return sweep_grid.estimate(lvlm, groups, cells, low)
    wanted = {name[0]: rule for name, rule in given.items() if name[0] == "v" or cells.with_l}
    found, said, notes = _choose_rules(lvlm, groups, wanted, calibration)
    settings: dict[str, Any] = {"format": len(pairs[0]), "model": identity_of(lvlm)}
    settings |= {"dataset": _digest_of(items), "groups": len(groups)}
    settings |= {"grid": [list(pair) for pair in pairs], "layers": list(cells.layers)}
    settings |= {"score": name, "score_code": code, **said, "merge": merge, "notes": notes}
    settings["versions"] = {p: version_of(p) for p in ("sinkscope", "torch", "transformers")}
    folder = None if out is None else Folder(out, settings)
    low = found.l_rule if cells.with_l else None
    rules = Rules(cells, scoring, found.v, merge, Batch(batch, len(pairs)), low)
    hidden = len(items) < 50 if progress is None else not progress
    busy = folder is not None and folder.missing()  # a finished one is only read
    with held(folder.path, "sweep") if folder and busy else nullcontext(), evaluated(lvlm.module):
        made, heard = _run(lvlm, groups, rules, folder, hidden, engine)
    if out is not None:
        return Sweep.load(out, by)
    notes = dict.fromkeys([*notes, *heard])
    return Sweep(as_frame([as_table(made, settings)], settings), settings, tuple(notes), by)


def _run(
    lvlm: LVLM, groups: Groups, rules: Rules, folder: Folder | None, hidden: bool, engine: Any
) -> tuple[list[Line], list[str]]:
    """Run the groups that are not there yet; lines and notes are kept only if there is no folder."""
    kept, each = {}, len(rules.cells.layers) * len(rules.cells.pairs)
    missing = list(range(len(groups))) if folder is None else folder.missing()
    if not missing:
        return [], []
    total, left = (each * sum(map(len, some)) for some in (groups, [groups[i] for i in missing]))
    bar = tqdm(total=total, initial=total - left, desc="sweeping", unit="cell", disable=hidden)
    one = sweep_away if is_away(lvlm) else sweep_image
    here = check_engine(engine) is None
    work = partial(one, rules=rules, tick=bar.update if here else None)
    if not is_away(lvlm):
        first = groups[missing[0]][0][1]
        sample = lvlm.prepare(images=first.image, text=first.question)
        check_replay(lvlm, sample.inputs, rules.cells.blocks)
    parts = ((i, groups[i]) for i in missing)
    with bar, closing(each_part(lvlm, Prepared(work, _items, apart=True), parts, engine)) as done:
        for i, (found, heard) in done:
            if not here:
                bar.update(len(found))
            if folder is None:
                kept[i] = found, heard
            else:
                folder.write(i, found, heard)
    sides = [[one for i in sorted(kept) for one in kept[i][side]] for side in (0, 1)]
    return sides[0], sides[1]


def _items(group: Sequence[Numbered]) -> list[Item]:
    return [item for _, item in group]


def _choose_rules(
    lvlm: LVLM, groups: Groups, given: Mapping[str, Any], calibration: Calibration | None
) -> tuple[SinkRules, dict[str, str], list[str]]:
    """The rules, those named in ``given`` (``"v"``, and ``"l"`` for triples) in words, and notes."""
    first = [group[0][1] for group in groups[:6]]
    what = f"the first {len(first)} images of the dataset"
    found = SinkRules.on_others(
        lvlm,
        lambda: [lvlm.prepare(images=item.image, text=item.question) for item in first],
        *(given["v"], given.get("l", NoSinks())),
        what=what,
        calibration=calibration,
    )
    made, said, notes = found.calibration, {}, []
    rules = {"v": (found.v, found.v_source), "l": (found.l_rule, found.l_source)}
    for name, own in given.items():
        rule, source = rules[name]
        named = own is not None or calibration is not None
        said[f"{name}_rule"] = repr(rule) if named else source
        if made is not None and not named and what in source:
            notes.append(
                f"{name.upper()}-sinks by a rule calibrated on {what}, which are scored too "
                f"({(made.vision if name == 'v' else made.language).reason}). Write "
                "calibration=ss.calibrate(lvlm, samples of other images)"
            )
    return found, said, notes


def _digest_of(items: Sequence[Item]) -> str:
    """A digest of questions, answers, options, tasks, image ids and pixels, in order."""
    digest, ids = hashlib.blake2b(digest_size=16), ImageIds()
    for i, item in enumerate(items):
        image = ids.add(i, item.image, item.image_id)
        digest.update(repr((item.question, item.answer, item.task, *image, *item.choices)).encode())
    return digest.hexdigest()


def _check_rules(rules: Mapping[str, Any], calibration: Any, with_l: bool) -> None:
    """Require one rule of a kind at most, and none for L-sinks where they have no coefficient."""
    for name, rule in rules.items():
        if rule is not None and calibration is not None:
            wanted = "expected one of them. Write only one, or"
            own = "v_detector=... and l_detector=calibration.l_detector"
            raise InputError(f"Got {name} and calibration; {wanted} {own}.")
        if rule is not None:
            check_detector(rule)
    if (low := rules["l_detector"]) is not None and not with_l:
        raise InputError(
            f"Got l_detector={low!r} and a grid of pairs (s_V, s_rest), in which L-sinks are among the "
            "rest; expected none. Write grid=ss.lsg_grid(groups=3) for triples (s_V, s_L, s_rest)."
        )
    if calibration is not None and not isinstance(calibration, Calibration):
        came = f"Got calibration of type {type(calibration).__name__}"
        raise InputError(f"{came}; expected what ss.calibrate(lvlm, samples) gives.")


def digest_function(function: Callable[..., Any]) -> str:
    """Digest what a function computes: bytecode, constants, defaults, and the values it refers to.

    Functions and classes among those values count in the same way; of modules and installed libraries
    the name is taken. Python's own version stands in front: others compile to other bytecode.
    """
    return f"{sys.implementation.cache_tag} {ContentHasher(function).hash(function)}"


class ContentHasher(NumpyHasher):
    """Hashes functions and classes by content, where pickle, which is below it, would take their names."""

    def __init__(self, root: Any) -> None:
        super().__init__()
        self.root, self.names = root, {}

    def save(self, obj: Any) -> None:
        """Refuse what cannot be read."""
        try:
            super().save(obj)
        except (TypeError, pickle.PicklingError) as error:
            raise InputError(
                f"Got {self.names.get(id(obj), 'a value')} of the score function, of type "
                f"{type(obj).__name__}, whose content cannot be read; expected numbers, texts, tensors, "
                "lists of these or functions, so that out= can tell when a sweep is continued with another "
                "score. Let the function use such values only, or write out=None."
            ) from error

    def reducer_override(self, obj: Any) -> Any:
        """Give what pickle writes instead of a value."""
        content = None if obj is object else self._content(obj)
        return NotImplemented if content is None else (object, (type(obj).__name__,), content)

    def _content(self, value: Any) -> Any:
        own = getattr(value, "__dict__", {})
        if isinstance(value, Tensor):
            return value.detach().cpu().double().numpy()
        if isinstance(value, (set, frozenset)):
            return sorted(str(ContentHasher(self.root).hash(each)) for each in value)
        if isinstance(value, CodeType):  # where its lines stood does not matter
            names = ("code", "names", "varnames", "freevars", "argcount", "consts")
            return [getattr(value, f"co_{name}") for name in names]
        if value is not self.root and _of_a_library(value):
            name = getattr(value, "__qualname__", value.__name__)
            return f"{getattr(value, '__module__', '')} {name}"
        if isinstance(value, FunctionType):
            code, known = value.__code__, value.__globals__
            cells = [cell.cell_contents for cell in value.__closure__ or ()]
            found = dict(zip(code.co_freevars, cells, strict=True))
            found |= {name: known[name] for name in _names(code) & known.keys()}
            self.names |= {id(each): name for name, each in found.items()}
            return [code, value.__defaults__, value.__kwdefaults__, found]
        if isinstance(value, type):
            made = {n: getattr(m, "__func__", getattr(m, "fget", m)) for n, m in own.items()}
            kept = (n for n, m in made.items() if isinstance(m, FunctionType) or n[:2] != "__")
            return [value.__bases__, {name: made[name] for name in kept}]
        return own.get("__wrapped__")  # of a cache, say


def _of_a_library(value: Any) -> bool:
    """Whether a name says it all: modules, and functions and classes of what is installed."""
    if not isinstance(value, (FunctionType, type)):
        return isinstance(value, (ModuleType, np.ufunc))
    if str(value.__module__).partition(".")[0] in ("sinkscope", *sys.builtin_module_names):
        return True
    file = getattr(sys.modules.get(value.__module__), "__file__", None) or "."
    places = {sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")}
    return not places.isdisjoint(map(str, Path(file).parents))


def _names(code: CodeType) -> set[str]:
    """The names that a function and the functions inside it use."""
    inner = (_names(one) for one in code.co_consts if isinstance(one, CodeType))
    return set(code.co_names).union(*inner)
