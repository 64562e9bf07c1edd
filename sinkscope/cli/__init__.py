"""The command line, made from the signatures of its commands."""

import json
import sys
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, CycloptsError, Parameter

from sinkscope import __version__
from sinkscope.checks import check_whole
from sinkscope.cli import experiments, shows
from sinkscope.cli.experiments import WHICH, says
from sinkscope.cli.recipes import HELP, check_word, load_model, parse_detector, stages
from sinkscope.errors import CheckpointError, InputError, SinkscopeError
from sinkscope.files import check_place

WITHOUT = (
    "Without one: published constants of the model, else the gap rule on the image itself, or limits that were "
    "found on the images of --calibrate."
)
TAKEN = (
    "Models: any type of transformers with a decoder, with or without a vision tower. What connects the towers is "
    "measured when a model is loaded: sinkscope doctor MODEL. The table of what works on which type is "
    "docs/support.md of the repository. A part that is not found is named by ss.register_family in Python."
)
app = App(
    name="sinkscope",
    help="Attention sinks in vision-language models: see, trace, measure. With --debug, any command shows "
    "the traceback of an error.",
    version=f"sinkscope {__version__}",
    version_flags="--version",
    help_format="plaintext",
    default_parameter=Parameter(negative=(), consume_multiple=True),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command, of the words after ``sinkscope`` or of the process; returns the exit status.

    It is 0, 1 if ``doctor --check`` finds a wrong number, 2 after an error that was explained, and 130 if interrupted.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    words = [word for word in given if word != "--debug"]
    try:
        with warnings.catch_warnings():
            # transformers says once per class that torchvision, which is not needed, is not there.
            warnings.filterwarnings("ignore", message=".*torchvision.*")
            done = app(words, exit_on_error=False, print_error=False, result_action="return_value")
            return done or (0 if words else 2)
    except CycloptsError as error:
        command = f"{words[0]} " if words and words[0] in app else ""
        print(f"sinkscope: {error}\nusage: sinkscope {command}--help", file=sys.stderr)
        return 2
    except SinkscopeError as error:
        if words != given:
            raise
        print(f"sinkscope: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        if stop.args:  # it names a job that goes on elsewhere
            print(*stop.args, file=sys.stderr)
        return 130


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Loading(experiments.Loading):
    """How a model is loaded here or elsewhere."""

    remote: Annotated[bool, says("Run on NDIF; no weights are loaded here.")] = False


@app.command(name="demo")
def run_demo(
    *,
    out: Annotated[str, says("Folder of the report.")] = "sinkscope-demo",
    seed: Annotated[int, says("Seed of the scene.")] = 11_000_000,
    questions: Annotated[int, says("How many to ask.")] = 6,
    effects: Annotated[int, says("With --toy: scenes on which to edit sinks, 0 for none.")] = 8,
    toy: Annotated[bool, says("A toy model, which has no sinks and needs no download.")] = False,
    planted: Annotated[bool, says("A model with planted sinks, and the truth.")] = False,
) -> int:
    """A real model: what it answers, its attention sinks, what masking them does, and a report."""
    from sinkscope.bundled import TEST_SEEDS, all_questions, ask, draw_scene

    scene = draw_scene(seed)
    most = len(all_questions(scene))
    if not 1 <= questions <= most:
        raise InputError(f"Got --questions {questions}; expected 1 to {most} for scene {seed}.")
    drawn = ask(scene, 0, most)  # global and local questions by turns
    sides = [[q for q in drawn if q.scope == scope] for scope in ("global", "local")]
    asked = [s[i] for i in range(most) for s in sides if i < len(s)][:questions]
    check_whole(0, len(TEST_SEEDS), effects=effects)
    from sinkscope.viz.pages import check_folder  # it loads matplotlib: not before a wrong argument

    check_folder(out)
    if planted:
        return shows.show_planted(scene, out)
    if not toy:
        try:
            return shows.show_example(scene, asked, out)
        except CheckpointError as error:
            print(f"The example model cannot be had, so here is the toy.\n{error}\n", flush=True)
    return shows.show_toy(scene, asked, effects, out)


@app.command(help_epilogue=f"{HELP} {WITHOUT}")
def trace(
    model: Annotated[str, WHICH],
    /,
    *,
    image: Annotated[tuple[str, ...], says("One image or several; paths or URLs.")],
    prompt: Annotated[str, says("What to ask; the chat template is added.")],
    out: Annotated[str | None, says("Report folder (sinkscope-trace; with --json: none).")] = None,
    v_detector: Annotated[str | None, says("Rule for V-sinks, such as norm:100.")] = None,
    l_detector: Annotated[str | None, says("Rule for L-sinks, such as dims:1415,2533:20.")] = None,
    calibrate: Annotated[tuple[str, ...], says("Other images to find the detectors on.")] = (),
    as_json: Annotated[bool, says("Print JSON instead of a table.", name="--json")] = False,
    loading: Loading = Loading(),
) -> int:
    """Trace the sinks of an image and a prompt: a table here, a report in a folder."""
    v, low = parse_detector(v_detector), parse_detector(l_detector)
    check_word(model)
    from sinkscope import detectors  # torch: not before a wrong argument
    from sinkscope.experiments import trace_sinks
    from sinkscope.models.pictures import open_image
    from sinkscope.models.requests import GREEDY
    from sinkscope.viz.pages import check_folder

    pictures, others = ([open_image(path) for path in some] for some in (image, calibrate))
    folder = out or (None if as_json else "sinkscope-trace")
    if folder is not None:
        check_folder(folder)
    with stages(4 + bool(others), "loading the model") as step:
        lvlm = load_model(model, **asdict(loading))
        step("preparing")
        sample = lvlm.prepare(images=pictures, text=prompt)
        calibration = None
        if others:
            step(f"calibrating on {len(others)} images")
            samples = [lvlm.prepare(images=picture, text=prompt) for picture in others]
            calibration = detectors.calibrate(lvlm, samples, progress=sys.stderr.isatty())
        step("tracing")
        found = trace_sinks(lvlm, sample, v, low, calibration=calibration)
        step("answering")
        text = lvlm.generate(sample, max_new_tokens=64, **GREEDY).text or ()
        said = " | ".join(one.strip() for one in text)
    tables = {"What the model answers": shows.frame([{"prompt": prompt, "answer": said}])}
    if not as_json:
        print(f"{lvlm.name}: {prompt}\n\nAnswer: {said}\n")
        return shows.show(str(folder), lvlm, found, tables)
    print(json.dumps({"answer": said, **json.loads(found.to_json())}, indent=2))
    if folder is not None:
        shows.write_folder(folder, lvlm, found, tables)
    return 0


@app.command(
    help_epilogue=f"{HELP} Without one: published constants of the model, else the gap rule on each image."
)
def trace_dataset(
    model: Annotated[str, WHICH],
    data: Annotated[str, says("A folder of pictures, or a .jsonl/.json/.csv/.parquet file.")],
    /,
    *,
    prompt: Annotated[str, says("What to ask about images without one.")] = "Describe the image.",
    out: Annotated[
        str, says("Folder of the tables; continued if it is there.")
    ] = "sinkscope-dataset",
    v_detector: Annotated[str | None, says("Rule for V-sinks, such as norm:100.")] = None,
    l_detector: Annotated[str | None, says("Rule for L-sinks, such as dims:1415,2533:20.")] = None,
    batch: Annotated[int, says("Images per forward pass.")] = 1,
    skip: Annotated[bool, says("Leave out pictures that cannot be read, with the reason.")] = False,
    engine: experiments.Engine = None,
    workers: experiments.Workers = None,
    loading: Loading = Loading(),
) -> int:
    """Trace the sinks of many images: one line per sink and per image, and figures; resumable."""
    rules = {"v_detector": parse_detector(v_detector), "l_detector": parse_detector(l_detector)}
    check_word(model)
    folder = Path(out).expanduser()
    check_place(folder, "manifest.json", "trace of a data set")
    from sinkscope.experiments import trace_dataset as run

    with stages(1, "loading the model"):
        lvlm = load_model(model, **asdict(loading))
    errors = "skip" if skip else "stop"
    how: dict[str, Any] = {"question": prompt, "batch": batch, "errors": errors, **rules}
    how |= experiments.with_engine({} if engine is None else {"engine": engine}, workers)
    found = run(lvlm, data, folder, progress=sys.stderr.isatty(), **how)
    print(found.summary())
    tables = {"kinds": found.kinds(), "by_layer": found.by_layer(), "agreement": found.agreement()}
    report = experiments.write_report(folder, tables, "layers", found)
    print(f"\nFigure and tables: {report}; every sink: {folder}")
    return 0


for command in (experiments.sweep, experiments.train_lsg, experiments.compare):
    app.command(command)


@app.command
def doctor(
    model: Annotated[str, WHICH],
    /,
    *,
    check: Annotated[
        bool, says("Compare every number with plain passes; 1 if one is wrong.")
    ] = False,
    loading: Loading = Loading(),
) -> int:
    """What can be measured on a model, and how exactly."""
    with stages(1 + check, "loading the model") as step:
        lvlm = load_model(model, **asdict(loading))
        if not check:
            print(lvlm.report())
            return 0
        from sinkscope.testing import check_model

        step("checking")
        found = check_model(lvlm)
    print(f"{lvlm.report()}\n\n{found}")
    return int(bool(found.wrong))


@app.command
def models() -> int:
    """Which models are taken, and published sink constants."""
    from sinkscope.anatomy.families import HINTS
    from sinkscope.detectors import KNOWN

    print(textwrap.fill(TAKEN, 100))
    for name, hint in HINTS.items():
        parts = ", ".join(
            f"{part}={value!r}" for part, value in asdict(hint).items() if value not in ("", None)
        )
        print(f"  hint for {name}: {parts}")
    print("\nPublished sink constants (channels from 0, tau on the RMS score):")
    for row in KNOWN:
        use = "used by default" if row.default else "listed only, never used unasked"
        dims = ", ".join(str(d) for d in row.l_dims)
        rule = row.v_detector or "not published"
        print(f"  {row.name}: L channels {dims}, tau {row.tau:g}; V rule {rule}; {use}")
        print(textwrap.fill(row.source, 100, initial_indent="    ", subsequent_indent="    "))
    return 0
