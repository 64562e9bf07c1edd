"""The command line: ``sinkscope demo``, ``trace``, ``doctor``, ``models``, and those of a recipe."""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sinkscope.cli.commands import add_commands
from sinkscope.cli.names import HELP, MODEL, TRUST, check_word, load_model, parse_detector, stages
from sinkscope.errors import CheckpointError, SinkscopeError

if TYPE_CHECKING:
    from pandas import DataFrame
    from torch import Tensor

    from sinkscope.bundled import Scene
    from sinkscope.experiments import SinkTrace
    from sinkscope.models import LVLM, Sample

DEMO = "a real model: what it answers, its attention sinks, what masking them does, and a report"
TOY = "the same on the toy model inside the package, which has no sinks and needs no download"
ANSWER = "What the model answers"
LONGEST = 64
"""Tokens of an answer."""
PLANTED = "trace a model whose sinks were planted in its weights, and compare with the truth"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: The words after ``sinkscope``; None for those of the process.

    Returns:
        The exit status: 0, 2 after an error that was explained, 130 if interrupted.
    """
    given = make_parser().parse_args(argv)
    try:
        with warnings.catch_warnings():
            # transformers says once per class that torchvision, which is not needed, is not there.
            warnings.filterwarnings("ignore", message=".*torchvision.*")
            return given.command(given)
    except SinkscopeError as error:
        if given.debug:
            raise
        print(f"sinkscope: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    from sinkscope import __version__

    parser = argparse.ArgumentParser(
        prog="sinkscope",
        description="Attention sinks in vision-language models: see, trace, measure.",
    )
    parser.add_argument("--version", action="version", version=f"sinkscope {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    _demo_parser(commands, common)
    _trace_parser(commands, common)
    add_commands(commands, common)
    doctor = commands.add_parser(
        "doctor", parents=[common], help="what can be measured on a model, and how exactly"
    )
    _model_options(doctor)
    doctor.set_defaults(command=run_doctor)
    models = commands.add_parser(
        "models", parents=[common], help="supported families and published sink constants"
    )
    models.set_defaults(command=run_models)
    return parser


def _demo_parser(commands: Any, common: argparse.ArgumentParser) -> None:
    demo = commands.add_parser("demo", parents=[common], help=DEMO, description=DEMO + ".")
    demo.add_argument(
        "--out", default="sinkscope-demo", metavar="DIR", help="folder of the report (%(default)s)"
    )
    demo.add_argument(
        "--seed", type=int, default=11_000_000, metavar="N", help="seed of the scene (%(default)s)"
    )
    demo.add_argument(
        "--questions", type=int, default=6, metavar="K", help="how many to ask (%(default)s)"
    )
    demo.add_argument(
        "--effects",
        type=int,
        default=8,
        metavar="N",
        help="with --toy: scenes on which to edit sinks, 0 for none (%(default)s)",
    )
    demo.add_argument("--toy", action="store_true", help=TOY)
    demo.add_argument("--planted", action="store_true", help=PLANTED)
    demo.set_defaults(command=run_demo)


def _trace_parser(commands: Any, common: argparse.ArgumentParser) -> None:
    trace = commands.add_parser(
        "trace",
        parents=[common],
        help="trace the sinks of an image and a prompt",
        description="Trace the sinks of an image and a prompt: a table here, a report in a folder.",
        epilog=HELP + " Without one: published constants of the model, else a calibration on "
        "the image itself, or on the images of --calibrate, which is better.",
    )
    _model_options(trace)
    add = trace.add_argument
    add("--image", nargs="+", required=True, metavar="PATH", help="one image or several")
    add("--prompt", required=True, metavar="TEXT", help="what to ask; the chat template is added")
    add("--out", metavar="DIR", help="folder of the report (sinkscope-trace; with --json: none)")
    add("--v-detector", type=str, metavar="SPEC", help="rule for V-sinks, such as norm:100")
    add(
        "--l-detector", type=str, metavar="SPEC", help="rule for L-sinks, such as dims:1415,2533:20"
    )
    add("--calibrate", nargs="+", metavar="PATH", help="other images to find the detectors on")
    add("--json", action="store_true", help="print the trace as JSON instead of a table")
    trace.set_defaults(command=run_trace)


def _model_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help=MODEL)
    dtypes = ("auto", "bfloat16", "float16", "float32")
    add("--dtype", choices=dtypes, default="auto", help="what to compute in (%(default)s)")
    add("--device-map", metavar="MAP", help="such as auto or cuda:0 (the CPU)")
    add("--revision", metavar="REV", help="branch, tag or commit of the repository")
    add("--remote", action="store_true", help="run on NDIF; no weights are loaded here")
    add("--trust-remote-code", action="store_true", help=TRUST)


def run_demo(given: argparse.Namespace) -> int:
    """The demo on the example model, on the toy, or on a planted model."""
    from sinkscope.bundled import draw_scene
    from sinkscope.cli import demo
    from sinkscope.viz.pages import check_folder

    scene = draw_scene(given.seed)
    demo.choose_questions(scene, given.questions)
    demo.check_effects(given.effects)
    check_folder(given.out)
    if given.planted:
        print(f"sinkscope demo: {PLANTED}.", flush=True)
        return run_planted(given, scene)
    if not given.toy:
        print(f"sinkscope demo: {DEMO}.", flush=True)
        try:
            lvlm = load_model("example")
        except CheckpointError as error:
            print(f"The example model cannot be had, so here is the toy.\n{error}\n", flush=True)
        else:
            return run_real(given, lvlm, scene)
    print(f"sinkscope demo: {TOY}.", flush=True)
    return run_toy(given, scene)


def run_real(given: argparse.Namespace, lvlm: LVLM, scene: Scene) -> int:
    """The example model: a drawn scene, a photograph, and what masking does."""
    from sinkscope.cli import demo
    from sinkscope.cli import demo as real_demo

    with stages(5, "starting") as step:
        shown = real_demo.show(lvlm, scene, given.questions, step)
    print(f"\n{demo.describe(scene)}\n\n{real_demo.page_tables(shown.tables)}\n")
    print(f"Sinks of the drawn scene, block by block:\n{real_demo.life(shown.trace)}\n")
    photo = write_folder(Path(given.out) / "photo", lvlm, shown.photo, shown.photo_trace, {})
    print(f"Sinks of the photograph:\n{real_demo.life(shown.photo_trace)}\nReport: {photo}\n")
    shown.tables[real_demo.PHOTO].attrs["notes"].append("Its own page: photo/index.html.")
    return _show(given.out, lvlm, shown.sample, shown.trace, shown.tables)


def run_planted(given: argparse.Namespace, scene: Scene) -> int:
    """A model whose sinks were planted: what was planted, what is found, and where the decoys are."""
    from sinkscope.cli import demo

    lvlm, truth = demo.planted_model(scene.seed)
    sample = lvlm.prepare(images=scene.image, text="how many shapes are there?")
    from sinkscope.experiments import trace_sinks

    trace = trace_sinks(lvlm, sample)
    tables = demo.planted_and_found(trace, truth)
    for head, table in tables.items():
        print(f"\n{head}:\n{demo.as_text(table)}")
    print()
    return _show(given.out, lvlm, sample, trace, tables, decoys=demo.decoys_of(trace, truth))


def run_toy(given: argparse.Namespace, scene: Scene) -> int:
    """The bundled model: questions, trace, what editing does."""
    from sinkscope.cli import demo
    from sinkscope.experiments import trace_sinks

    questions = demo.choose_questions(scene, given.questions)
    with stages(3, "loading the model") as step:
        lvlm = load_model("bundled")
        step("asking")
        tables = {demo.ANSWERS: demo.ask_model(lvlm, scene, questions)}
        step("tracing")
        sample = lvlm.prepare(images=scene.image, text=questions[0].text)
        trace = trace_sinks(lvlm, sample)
    print(f"\n{demo.describe(scene)}")
    for head, table in tables.items():
        print(f"\n{head}:\n{demo.as_text(table)}")
    if given.effects:
        text, table = demo.effects_of(lvlm, given.effects)
        print(f"\n{demo.EFFECTS}:\n{text}")
        tables[demo.EFFECTS] = table
    print()
    hint = (
        ""
        if trace.records
        else "\nFor models that have sinks: sinkscope demo, sinkscope demo --planted"
    )
    return _show(given.out, lvlm, sample, trace, tables, hint)


def run_trace(given: argparse.Namespace) -> int:
    """Load, calibrate if asked, trace, show."""
    asked = (given.v_detector, given.l_detector)
    v, low = (None if spec is None else parse_detector(spec) for spec in asked)
    import pandas as pd

    from sinkscope.detectors import calibrate
    from sinkscope.experiments import trace_sinks
    from sinkscope.models.pictures import open_image
    from sinkscope.viz.pages import check_folder

    check_word(given.model)
    paths = given.calibrate or []
    pictures, others = ([open_image(path) for path in some] for some in (given.image, paths))
    out = given.out or (None if given.json else "sinkscope-trace")
    if out is not None:
        check_folder(out)
    with stages(4 + bool(paths), "loading the model") as step:
        lvlm = load(given)
        step("preparing")
        sample = lvlm.prepare(images=pictures, text=given.prompt)
        calibration = None
        if paths:
            step(f"calibrating on {len(paths)} images")
            samples = [lvlm.prepare(images=image, text=given.prompt) for image in others]
            calibration = calibrate(lvlm, samples, progress=sys.stderr.isatty())
        step("tracing")
        trace = trace_sinks(lvlm, sample, v, low, calibration=calibration)
        step("answering")
        said = answer(lvlm, sample)
    tables = {ANSWER: pd.DataFrame([{"prompt": given.prompt, "answer": said}])}
    if given.json:
        print(json.dumps({"answer": said, **json.loads(trace.to_json())}, indent=2))
        if out is not None:
            write_folder(out, lvlm, sample, trace, tables)
        return 0
    print(f"{lvlm.name}: {given.prompt}\n\nAnswer: {said}\n")
    return _show(str(out), lvlm, sample, trace, tables)


def answer(lvlm: LVLM, sample: Sample) -> str:
    """What the model says, greedy, in at most `LONGEST` tokens."""
    from sinkscope.models.requests import GREEDY

    out = lvlm.generate(sample, max_new_tokens=LONGEST, **GREEDY)
    return " | ".join(text.strip() for text in out.text or ())


def run_doctor(given: argparse.Namespace) -> int:
    """The model's report."""
    with stages(1, "loading the model"):
        lvlm = load(given)
    print(lvlm.report())
    return 0


def run_models(given: argparse.Namespace) -> int:
    """Families and constants."""
    from sinkscope.anatomy.families import FAMILIES
    from sinkscope.detectors import KNOWN

    print("Families, by model_type of the configuration:")
    for model_type, family in FAMILIES.items():
        print(f"  {model_type:<14} {family.name}")
    print("\nPublished sink constants (channels from 0, tau on the RMS score):")
    for row in KNOWN:
        use = "used by default" if row.default else "listed only, never used unasked"
        dims = ", ".join(str(d) for d in row.l_dims)
        rule = row.v_detector or "not published"
        print(f"  {row.name}: L channels {dims}, tau {row.tau:g}; V rule {rule}; {use}")
        print(textwrap.fill(row.source, 100, initial_indent="    ", subsequent_indent="    "))
    return 0


def load(given: argparse.Namespace) -> LVLM:
    """The model that was asked for.

    Raises:
        SinkscopeError: If it cannot be read.
    """
    return load_model(
        given.model,
        revision=given.revision,
        dtype=given.dtype,
        device_map=given.device_map,
        remote=given.remote,
        trust_remote_code=given.trust_remote_code,
    )


def _show(
    out: str,
    lvlm: LVLM,
    sample: Sample,
    trace: SinkTrace,
    tables: Mapping[str, DataFrame],
    hint: str = "",
    decoys: Mapping[str, Tensor] | None = None,
) -> int:
    """Print the table, write the folder, say where it is."""
    print(trace.summary() + hint, flush=True)
    page = write_folder(out, lvlm, sample, trace, tables, decoys)
    print(f"\nReport: {page}")
    return 0


def write_folder(
    out: str | Path,
    lvlm: LVLM,
    sample: Sample,
    trace: SinkTrace,
    tables: Mapping[str, DataFrame],
    decoys: Mapping[str, Tensor] | None = None,
) -> Path:
    """Measure the masses of the groups and write the report."""
    from sinkscope.probes import AttentionMass
    from sinkscope.viz import write_report

    mass = AttentionMass(trace.groups)
    result = lvlm.run(sample, [mass], logits="last")[mass]
    title = f"Attention sinks: {lvlm.name}"
    return write_report(out, trace, mass=result, title=title, tables=tables, decoys=decoys)
