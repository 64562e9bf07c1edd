"""What ``sinkscope sweep``, ``train-lsg`` and ``compare`` do; their settings are `sinkscope.recipes`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from sinkscope.errors import InputError
from sinkscope.recipes import Recipe, read_recipe

if TYPE_CHECKING:
    from sinkscope.models import LVLM

RECIPE = "What is not a flag here can be set in a recipe, or with --set NAME=VALUE."
SWEEP = "score questions with image keys scaled, layer by layer and pair by pair; resumable"
TRAIN = "train Layer-wise Sink Gates on questions and answers, the model frozen; resumable"
COMPARE = "answer questions under several conditions: gates, edits, prior methods; with intervals"


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    """The parsers of the three commands."""
    sweep = _parser(commands, common, "sweep", SWEEP, run_sweep)
    sweep.add_argument("--score", metavar="NAME", help="choice, exact or logprob")
    sweep.add_argument("--grid", type=int, metavar="N", help="pairs from (0, 1) to (1, 0) (11)")
    _layers(sweep, "layers that are read; keys are scaled in the next block (all)")
    train = _parser(commands, common, "train-lsg", TRAIN, run_train)
    _layers(train, "layers that gates read, one gate each, in one pass over the data")
    train.add_argument("--epochs", type=int, metavar="N", help="passes over the data (2)")
    train.add_argument("--batch", type=int, metavar="N", help="rows per forward pass (8)")
    train.add_argument("--lr", type=float, metavar="X", help="highest learning rate (0.001)")
    train.add_argument("--seed", type=int, metavar="N", help="of weights, split and order (0)")
    compare = _parser(commands, common, "compare", COMPARE, run_compare)
    compare.add_argument(
        "--gate", action="append", default=[], metavar="DIR", help="a saved gate; repeatable"
    )
    compare.add_argument("--batch", type=int, metavar="N", help="questions per forward pass (16)")


def _parser(
    commands: Any, common: argparse.ArgumentParser, name: str, text: str, run: Any
) -> argparse.ArgumentParser:
    """A parser with what the three share."""
    parser = commands.add_parser(
        name,
        parents=[common],
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog=RECIPE,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", nargs="?", help="hub repository, folder, or 'bundled'")
    add("--recipe", metavar="FILE", help="a YAML file with the settings; flags win over it")
    add("--data", metavar="SOURCE", help="scenes, a .jsonl/.json/.csv/.parquet file, or a data set")
    add("--split", metavar="NAME", help="of the data (test)")
    add("--limit", type=int, metavar="N", help="the most questions")
    add("--v-detector", metavar="SPEC", help="rule for V-sinks, such as norm:100")
    add("--l-detector", metavar="SPEC", help="rule for L-sinks, where they matter")
    add("--calibrate", metavar="SOURCE", help="other questions, to find the rules on")
    add("--out", metavar="DIR", help="folder of the results (%(default)s)", default=None)
    add("--dtype", choices=("auto", "bfloat16", "float16", "float32"), help="what to compute in")
    add("--device-map", metavar="MAP", help="such as auto or cuda:0 (the CPU)")
    add("--revision", metavar="REV", help="branch, tag or commit of the repository")
    add("--set", action="append", default=[], metavar="NAME=VALUE", help="any other argument")
    add("--dry-run", action="store_true", help="print the cost and run nothing")
    parser.set_defaults(command=run)
    return parser


def _layers(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("--layers", nargs="+", metavar="L", help=text + ", or embed")


def flags_of(given: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Flags in the shape of a recipe; what was not given is left out.

    Args:
        given: The parsed flags.
        names: Flags of this command that are arguments of its function.

    Raises:
        InputError: If ``--set`` is not of the form NAME=VALUE.
    """
    model = {"name": given.model, "dtype": given.dtype, "device_map": given.device_map}
    model = _present(model | {"revision": given.revision})
    data = _present({"source": given.data, "split": given.split, "limit": given.limit})
    out: dict[str, Any] = {"model": model or None, "data": data or None}
    for name in ("v_detector", "l_detector", "calibrate", "out"):
        out[name] = getattr(given, name)
    if getattr(given, "layers", None) is not None:
        out["layers"] = [int(x) if x.lstrip("-").isdigit() else x for x in given.layers]
    for name in names:
        out[name] = getattr(given, name)
    for words in given.set:
        name, equals, value = words.partition("=")
        if not equals or not name:
            raise InputError(f"Got --set {words}; expected NAME=VALUE, such as --set batch=8.")
        out[name] = yaml.safe_load(value)
    return {name: value for name, value in out.items() if value is not None}


def _present(mapping: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in mapping.items() if value is not None}


def run_sweep(given: argparse.Namespace) -> int:
    """Sweep, print what was seen, write the map."""
    from sinkscope.experiments import lsg_grid, sweep

    recipe = read_recipe("sweep", given.recipe, flags_of(given, "score", "grid"), sweep)
    options = dict(recipe.options)
    if isinstance(options.get("grid"), int):
        options["grid"] = lsg_grid(options["grid"])
    if options.get("grid") is not None:
        options["grid"] = [tuple(pair) for pair in options["grid"]]
    lvlm = recipe.load()
    rules = {} if given.dry_run else recipe.detectors(lvlm)
    rules.pop("l_detector", None)
    out = recipe.out or "sinkscope-sweep"
    made: Any = sweep(
        lvlm,
        recipe.data,
        **options,
        **rules,
        out=None if given.dry_run else out,
        progress=sys.stderr.isatty(),
        dry_run=given.dry_run,
    )
    print(made if given.dry_run else made.observations())
    if given.dry_run:
        return 0
    for note in made.notes:
        print(f"Note: {note}")
    table = made.best()
    print("\nBest cell per task, chosen on one half of the images and scored on the other:")
    print(table.to_string(index=False, float_format=lambda x: f"{x:.3f}"))
    folder = report_folder(out)
    made.map().to_csv(folder / "map.csv", index=False)
    table.to_csv(folder / "best.csv", index=False)
    (folder / "observations.txt").write_text(made.observations() + "\n", encoding="utf-8")
    save_figure(made.plot(), folder / "map.png")
    print(f"\nMap and tables: {folder}; every answer: {out}")
    return 0


def run_train(given: argparse.Namespace) -> int:
    """Train, print what came out, save gates, history and curve."""
    from sinkscope.lsg import train_lsg

    flags = flags_of(given, "epochs", "batch", "lr", "seed")
    recipe = read_recipe("train", given.recipe, flags, train_lsg)
    options = dict(recipe.options)
    if not options.get("layers"):
        raise InputError("Got no layers to train gates at; expected some. Write --layers 10.")
    lvlm = recipe.load()
    rules = recipe.detectors(lvlm)
    if "L" not in (options.get("choices") or {}).get("groups", ()):
        rules.pop("l_detector")
    out = recipe.out or "sinkscope-gates"
    made: Any = train_lsg(
        lvlm,
        list(recipe.data),
        **options,
        **rules,
        out=None if given.dry_run else str(Path(out).expanduser() / "checkpoints"),
        progress=sys.stderr.isatty(),
        dry_run=given.dry_run,
    )
    print(made)
    if given.dry_run:
        return 0
    folder = report_folder(out)
    made.history.to_csv(folder / "history.csv", index=False)
    save_figure(made.plot(), folder / "training.png")
    for layer, gate in made.gates.items():
        gate.save_pretrained(Path(out).expanduser() / f"gate-{layer}", record=made.record)
        print(f"Gate of layer {layer}: {Path(out).expanduser() / f'gate-{layer}'}")
    print(f"History and curve: {folder}")
    return 0


def run_compare(given: argparse.Namespace) -> int:
    """Compare, print the table, write answers, table and figure."""
    from sinkscope.experiments import compare

    recipe = read_recipe("compare", given.recipe, flags_of(given, "batch"), compare)
    conditions = dict(recipe.conditions)
    for folder in given.gate:
        conditions.setdefault("base", [])
        conditions[Path(folder).name] = {"gate": folder}
    if len(conditions) < 2:
        raise InputError(
            f"Got the conditions {list(conditions)}; expected a base and something to compare. Write "
            "--gate DIR, or conditions in a recipe: {base: [], VAR: {var: {preset: code}}}."
        )
    lvlm = recipe.load()
    made = conditions_of(conditions, lvlm)
    if given.dry_run:
        print(cost_of_comparison(recipe, made))
        return 0
    table = compare(
        lvlm,
        recipe.data,
        made,
        **recipe.options,
        **recipe.detectors(lvlm),
        progress=sys.stderr.isatty(),
    )
    print(table.to_markdown())
    folder = report_folder(recipe.out or "sinkscope-compare")
    table.to_dataframe().to_csv(folder / "answers.csv", index=False)
    table.summary().to_csv(folder / "summary.csv", index=False)
    save_figure(table.plot(), folder / "comparison.png")
    print(f"\nAnswers, table and figure: {folder}")
    return 0


def cost_of_comparison(recipe: Recipe, conditions: Mapping[str, Any]) -> str:
    """How many prompts a comparison runs."""
    records = list(recipe.data)
    traced = sum(callable(condition) for condition in conditions.values()) > 0
    runs = len(records) * (len(conditions) + traced)
    return (
        f"{len(records)} questions x {len(conditions)} conditions"
        f"{' and a trace of each' if traced else ''}: {runs} prompts, each with its answer"
    )


NOT_IN_RECIPES = ("LoRA", "Method", "lora", "random_tokens")
"""Baselines that need more than plain values."""


def report_folder(out: str) -> Path:
    """The folder beside the raw results that figures and tables are written to."""
    folder = Path(out).expanduser() / "report"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure and let go of it."""
    import matplotlib.pyplot as plt

    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


def conditions_of(given: Mapping[str, Any], lvlm: LVLM) -> dict[str, Any]:
    """The conditions of a comparison, by name.

    A condition is ``[]``, or a mapping with one key: ``gate: folder``, ``stack: folder``, ``edit:
    {kind, edit, ...}`` (see `EditSinks`), or a name in `sinkscope.baselines` with its arguments.

    Raises:
        InputError: If it is something else.
    """
    return {name: one_condition(name, what, lvlm) for name, what in given.items()}


def one_condition(name: str, what: Any, lvlm: LVLM) -> Any:
    """One condition; see `conditions_of`."""
    from sinkscope.experiments import EditSinks, baselines
    from sinkscope.lsg import LSG

    if what in ([], {}, None, "base"):
        return []
    if not isinstance(what, Mapping) or len(what) != 1:
        raise InputError(
            f"Got the condition {name}: {what!r}; expected [] or one key, such as {{gate: folder}} or "
            "{var: {preset: code}}."
        )
    key, value = next(iter(what.items()))
    if key == "gate":
        return [LSG.from_pretrained(value, lvlm=lvlm)]
    if key == "stack":
        return LSG.load_stack(value, lvlm=lvlm)
    if key == "edit":
        return EditSinks(**value)
    known = [name for name in baselines.__all__ if name not in NOT_IN_RECIPES]
    if key not in known:
        raise InputError(
            f"Got the condition {name}: {key}; expected gate, stack, edit, or one of {known}."
        )
    return getattr(baselines, key)(**(value or {}))
