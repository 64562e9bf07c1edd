"""What ``sinkscope sweep``, ``train-lsg`` and ``compare`` do; their settings are `sinkscope.recipes`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from sinkscope.errors import InputError
from sinkscope.recipes import Recipe, read_recipe

if TYPE_CHECKING:
    from sinkscope.models import LVLM

RECIPE = "What is not a flag here can be set in a recipe, or with --set NAME=VALUE."
SWEEP = "score questions with image keys scaled, layer by layer and pair by pair; resumable"


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    """The parsers of the three commands."""
    sweep = _parser(commands, common, "sweep", SWEEP, run_sweep)
    sweep.add_argument("--score", metavar="NAME", help="choice, exact or logprob")
    sweep.add_argument("--grid", type=int, metavar="N", help="pairs from (0, 1) to (1, 0) (11)")


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
    add("--layers", nargs="+", metavar="L", help="layers that are read; the next block is edited")
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
    if given.layers is not None:
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


def conditions_of(recipe: Recipe, lvlm: LVLM) -> dict[str, Any]:
    """The conditions of a comparison, by name.

    A condition is ``[]``, or a mapping with one key: ``gate: folder``, ``gates: [folders]``, ``edit:
    {kind, edit, ...}`` (see `EditSinks`), or a name in `sinkscope.baselines` with its arguments.

    Raises:
        InputError: If it is something else.
    """
    return {name: one_condition(name, what, lvlm) for name, what in recipe.conditions.items()}


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
    if key in ("gate", "gates"):
        folders: Sequence[str] = [value] if isinstance(value, str) else value
        gates = [LSG.from_pretrained(folder) for folder in folders]
        for gate in gates:
            gate.check_fits(lvlm)
        return gates
    if key == "edit":
        return EditSinks(**value)
    known = list(baselines.__all__)
    if key not in known:
        raise InputError(
            f"Got the condition {name}: {key}; expected gate, gates, edit, or one of {known}."
        )
    return getattr(baselines, key)(**(value or {}))
