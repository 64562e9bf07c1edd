"""trace_dataset: the sinks of thousands of images, in constant memory, continued where it stopped."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from sinkscope.checks import check_choice, check_flags, check_number, check_whole, typed
from sinkscope.data.shown import Shown, chunks_of, source_of
from sinkscope.detectors import Calibration, Detector
from sinkscope.detectors.choice import published
from sinkscope.detectors.detection import check_rules
from sinkscope.detectors.gap import DRAWS
from sinkscope.errors import DetectorError, InputError
from sinkscope.experiments.controls import RandomControl
from sinkscope.experiments.dataset_files import IMAGES, MANIFEST, Parts
from sinkscope.experiments.dataset_part import TOWERS, Plan, others_of, trace_part
from sinkscope.experiments.dataset_result import DatasetTrace
from sinkscope.experiments.sweeping import digest_function
from sinkscope.files import claim, digest_of, held, version_of
from sinkscope.models.loading import identity_of
from sinkscope.models.lvlm import LVLM
from sinkscope.models.wrapping import evaluated
from sinkscope.scale.engine import Ray, check_engine, each_part
from sinkscope.tokens import check_merge


@typed
def trace_dataset(
    lvlm: LVLM,
    dataset: Any,
    out: str | Path,
    *,
    question: str = "Describe the image.",
    v_detector: Detector | None = None,
    l_detector: Detector | None = None,
    calibration: Calibration | None = None,
    merge: str = "max",
    draws: float = DRAWS,
    masses: bool = True,
    control: RandomControl | None = None,
    errors: str = "stop",
    batch: int = 1,
    part: int = 16,
    engine: str | Ray = "local",
    remote: bool | str | None = None,
    progress: bool | None = None,
) -> DatasetTrace:
    """Trace the sinks of every image of a data set: one line per sink and one per record, in a folder.

    Records are read as they are needed; never more than two parts of them are in memory. A run that was
    stopped goes on where it was: the same call reads the records again, and traces those that are not done.

    Args:
        lvlm: The model.
        dataset: A folder of pictures (all below it), a ``.jsonl``, ``.json``, ``.csv`` or ``.parquet`` file
            (paths are relative to it), a data set or stream of ``datasets``, or any iterable of pictures or
            of records: dicts or objects with ``image`` (or a list of them) and, if wanted, ``question`` or
            ``text`` and ``image_id``. Other columns of a dict are kept under their names.
        out: The folder to write to and to continue from.
        question: What is asked about images without a question.
        v_detector: As in `trace_sinks`, also ``l_detector``, ``calibration``, ``merge`` and ``draws``:
            without rules, published constants, else the gap rule on each image by itself. The rules are the
            same for the whole run; to judge all images by the same numbers, give a ``calibration`` on some of
            them.
        masses: Whether a second pass measures the attention mass on every group of tokens, and what other
            rules flag: the norm rule (`Norm`), massive activations, attention of 5 times uniform, and
            published constants of the model.
        control: A control of an edit, such as ``RandomControl(EditSinks("L-sinks"))``, made and run on every
            image; see `DatasetTrace.control`. It takes one record per pass.
        errors: ``"stop"`` at a record that cannot be read or traced, or ``"skip"`` it: its line says why.
        batch: Records per forward pass. Padding may change the last digits of what is measured.
        part: Records per file; what is lost when a run is stopped.
        engine: ``"local"``, ``"ray"`` or a `sinkscope.scale.Ray`: parts are shared among its workers, and three
            per worker are in memory.
        remote: As in `LVLM.run`.
        progress: None shows a bar from 50 images on, and where their number is unknown.

    Raises:
        InputError: If an option or a record is malformed, or another run or other records are in ``out``.
        CheckpointError: If ``out`` cannot be written or read, or a file in it was damaged.
        DetectorError: If a detector cannot work on this model.
    """
    plan = Plan(
        v_detector, l_detector, calibration, merge, draws, batch, errors, masses, control, remote
    )
    _check(plan, part, question)
    check_engine(engine)
    if lvlm.processor is None:
        raise InputError("Got an LVLM without a processor; expected one, to prepare the images.")
    folder, manifest = Path(out).expanduser(), _manifest(lvlm, plan, part, question)
    records: Any = source_of(dataset)
    chunks = chunks_of(records, part, question, IMAGES, skip=errors == "skip")
    total = len(records) if hasattr(records, "__len__") else None
    hidden = total is not None and total < 50 if progress is None else not progress
    manifest = claim(folder, MANIFEST, manifest, "trace of a data set")
    with held(folder, "trace of a data set"), evaluated(lvlm.module):
        parts, work = Parts(folder, manifest), partial(trace_part, plan=plan)
        sinks = sum(counts["sinks"] for counts in parts.known.values())
        with tqdm(total=total, desc="tracing", unit="image", disable=hidden) as bar:
            missing = _missing(chunks, parts, bar)
            with closing(each_part(lvlm, work, missing, engine)) as done:
                for name, tables in done:
                    counts = parts.write(name, tables)
                    sinks += counts["sinks"]
                    bar.set_postfix(sinks=sinks, refresh=False)
                    bar.update(counts["images"])
        if not parts.seen:
            raise InputError("Got an empty dataset; expected at least one record with an image.")
        parts.check_ended()
    return DatasetTrace(folder, manifest, tuple(sorted(parts.known)), parts.ended())


def _missing(
    chunks: Iterator[list[Shown]], parts: Parts, bar: Any
) -> Iterator[tuple[str, list[Shown]]]:
    """The parts that are not done; InputError where other records were traced in the place of one."""
    places = {name.partition("-")[0]: name for name in parts.known}
    for number, chunk in enumerate(chunks):
        parts.seen, place = number + 1, f"{number:06d}"
        name = f"{place}-{digest_of([one.digest for one in chunk])[:16]}"
        if name in parts.known:
            bar.update(len(chunk))
            continue
        if place in places:
            raise InputError(
                f"Got out={str(parts.path)!r}, where records {chunk[0].number} to {chunk[-1].number} were others "
                f"({places[place]}, here {name}); expected the same pictures, questions and columns in the same "
                "order. Write out='another folder'."
            )
        yield name, chunk
        del chunk


def _check(plan: Plan, part: int, question: str) -> None:
    """Refuse options before any work."""
    check_rules(plan.v_detector, plan.l_detector)
    check_merge(plan.merge)
    check_number(above=0, below=1, error=DetectorError, hint=f"Write {DRAWS}.", draws=plan.draws)
    check_choice(("stop", "skip"), errors=plan.errors)
    check_flags(masses=plan.masses)
    check_whole(1, batch=plan.batch, part=part)
    if not isinstance(question, str) or not question.strip():
        raise InputError(f"Got question={question!r}; expected a text for records without one.")
    if plan.control is None:
        return
    if not isinstance(plan.control, RandomControl) or not callable(plan.control.intervention):
        raise InputError(
            f"Got control={plan.control!r:.80}; expected a control of a function of a trace, for every image has "
            "its own sinks. Write control=ss.RandomControl(ss.experiments.EditSinks('L-sinks'))."
        )
    if plan.control.match == "position" or plan.batch > 1:
        raise InputError(
            f"Got a control with match={plan.control.match!r} and batch={plan.batch}; expected match='count' or "
            "'mass', which need no other image, and batch=1."
        )


def _manifest(lvlm: LVLM, plan: Plan, part: int, question: str) -> dict[str, Any]:
    """What is run, JSON-ready: two runs with the same are one."""
    names: Any = zip("vl", TOWERS, (plan.v_detector, plan.l_detector), strict=True)
    rules: dict[str, str] = {}
    known: Any = published(lvlm)
    for name, tower, given in names:
        own = getattr(plan.calibration, f"{name}_detector", "the gap rule on each image by itself")
        own = own if known[tower] is None else f"{known[tower][1]}: {known[tower][0]!r}"
        rules[name] = str(own if given is None else given)
    control: Any = plan.control
    if control is not None:
        made = control.intervention
        what = repr(made) if is_dataclass(made) else digest_function(made)
        control = {"edit": what, "match": control.match, "n": control.n, "seed": control.seed}
    compared = {tower: ["used", *others_of(lvlm, tower)] for tower in TOWERS}
    options = {name: getattr(plan, name) for name in ("merge", "draws", "batch", "masses")}
    return {
        "format": 1,
        "model": identity_of(lvlm),
        "rules": rules,
        **options,
        "part": part,
        "question": question,
        "control": control,
        "compared": compared,
        "layers": list(range(lvlm.anatomy.language.n_layers)),
        "versions": {name: version_of(name) for name in ("sinkscope", "torch", "transformers")},
    }
