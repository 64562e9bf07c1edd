"""What ``sinkscope sweep``, ``train-lsg`` and ``compare`` do; their settings are `sinkscope.cli.recipes`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sinkscope.cli.names import MODEL, TRUST
from sinkscope.cli.recipes import (
    Recipe,
    arguments_for,
    by_name,
    conditions_of,
    merged,
    named_gates,
    parse_yaml,
    read_recipe,
)
from sinkscope.errors import InputError
from sinkscope.files import check_place

OUT = {"sweep": "sinkscope-sweep", "train-lsg": "sinkscope-gates", "compare": "sinkscope-compare"}
"""Where results go, if nothing else is said."""
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
    add("model", metavar="MODEL", nargs="?", help=MODEL)
    add("--recipe", metavar="FILE", help="a YAML file with the settings; flags win over it")
    add("--data", metavar="SOURCE", help="scenes, a .jsonl/.json/.csv/.parquet file, or a data set")
    add("--split", metavar="NAME", help="of the data (train for train-lsg, else test)")
    add("--limit", type=int, metavar="N", help="the most questions")
    add("--v-detector", metavar="SPEC", help="rule for V-sinks, such as norm:100")
    add("--l-detector", metavar="SPEC", help="rule for L-sinks, where they matter")
    add("--calibrate", metavar="SOURCE", help="other questions, to find the rules on")
    add("--out", metavar="DIR", help=f"folder of the results ({OUT[name]})")
    add("--dtype", choices=("auto", "bfloat16", "float16", "float32"), help="what to compute in")
    add("--device-map", metavar="MAP", help="such as auto or cuda:0 (the CPU)")
    add("--revision", metavar="REV", help="branch, tag or commit of the repository")
    add("--trust-remote-code", action="store_true", help=TRUST)
    add("--set", action="append", default=[], metavar="NAME=VALUE", help="any other argument")
    add("--dry-run", action="store_true", help="print the cost and run nothing")
    parser.set_defaults(command=run)
    return parser


def _layers(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("--layers", nargs="+", metavar="L", help=text + ", or embed")


def flags_of(given: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Flags in the shape of a recipe; what was not given is left out, what was set to null is None.

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
    asked: dict[str, Any] = {}
    for words in given.set:
        name, equals, value = words.partition("=")
        if not equals or not name:
            raise InputError(f"Got --set {words}; expected NAME=VALUE, such as --set batch=8.")
        asked[name] = parse_yaml(value, f"--set {words}")
    return merged(_present(out), asked)


def recipe_of(
    section: str, given: argparse.Namespace, function: Callable[..., Any], *names: str
) -> Recipe:
    """The settings of a command; ``names`` are flags that are arguments of its function."""
    flags, trust = flags_of(given, *names), given.trust_remote_code
    return read_recipe(section, given.recipe, flags, function, trust_remote_code=trust)


def _present(mapping: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in mapping.items() if value is not None}


def run_sweep(given: argparse.Namespace) -> int:
    """Sweep, print what was seen, write the map."""
    from sinkscope.experiments import lsg_grid, sweep

    recipe = recipe_of("sweep", given, sweep, "score", "grid")
    options = dict(recipe.options)
    grid = options.get("grid")
    if isinstance(grid, int) and not isinstance(grid, bool):
        options["grid"] = lsg_grid(grid)
    elif isinstance(grid, Mapping):
        options["grid"] = lsg_grid(**arguments_for(lsg_grid, grid, "under grid"))
    elif grid is not None:
        options["grid"] = as_pairs(grid)
    out = recipe.out or OUT["sweep"]
    if not given.dry_run:
        check_place(Path(out).expanduser(), "manifest.json", "sweep")
    lvlm = recipe.load(weights=not given.dry_run)
    rules = recipe.given_detectors() if given.dry_run else recipe.detectors(lvlm)
    if not any(len(pair) == len(("V", "L", "rest")) for pair in options.get("grid", ())):
        rules.pop("l_detector")
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

    recipe = recipe_of("train", given, train_lsg, "epochs", "batch", "lr", "seed")
    options = dict(recipe.options)
    if not options.get("layers"):
        raise InputError("Got no layers to train gates at; expected some. Write --layers 10.")
    out = recipe.out or OUT["train-lsg"]
    if not given.dry_run:
        check_place(Path(out).expanduser() / "checkpoints", "run.json", "run")
        check_place(Path(out).expanduser() / "report", "history.csv", "run")
    lvlm = recipe.load(weights=not given.dry_run)
    rules = {} if given.dry_run else recipe.detectors(lvlm)
    if "L" not in (options.get("choices") or {}).get("groups", ()):
        rules.pop("l_detector", None)
    made: Any = train_lsg(
        lvlm,
        recipe.data.indexed(),
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
        gate.save_pretrained(Path(out).expanduser() / f"gate-{layer}")
        print(f"Gate of layer {layer}: {Path(out).expanduser() / f'gate-{layer}'}")
        if made.record["results"][str(layer)]["best_step"] == 0:
            print(
                "  Note: no look was better than the first, so this is the untrained gate. Train longer, "
                "on more data, or with another --lr."
            )
    print(f"History and curve: {folder}")
    return 0


def run_compare(given: argparse.Namespace) -> int:
    """Compare, print the table, write answers, table and figure."""
    from sinkscope.experiments import compare

    recipe = recipe_of("compare", given, compare, "batch")
    conditions = with_gates(recipe.conditions, given.gate)
    out = recipe.out or OUT["compare"]
    if not given.dry_run:
        check_place(Path(out).expanduser() / "report", "answers.csv", "comparison")
    lvlm = recipe.load(weights=not given.dry_run)
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
    folder = report_folder(out)
    table.to_dataframe().to_csv(folder / "answers.csv", index=False)
    table.summary().to_csv(folder / "summary.csv", index=False)
    save_figure(table.plot(), folder / "comparison.png")
    print(f"\nAnswers, table and figure: {folder}")
    return 0


def as_pairs(grid: Any) -> list[tuple[Any, ...]]:
    """Pairs of coefficients, or triples, as a recipe writes them.

    Raises:
        InputError: If they are none.
    """
    listed = isinstance(grid, list) and all(isinstance(pair, list) for pair in grid)
    if not listed or not grid:
        raise InputError(
            f"Got grid={grid!r}; expected how many pairs, or a list of pairs: [[0.0, 1.0], [0.5, 0.5]], or "
            "{steps: 6, groups: 3} for triples (s_V, s_L, s_rest)."
        )
    return [tuple(pair) for pair in grid]


def with_gates(conditions: Any, folders: Sequence[str]) -> dict[str, Any]:
    """The conditions of a recipe and those of ``--gate``.

    Raises:
        InputError: If there is nothing to compare, or a name stands twice.
    """
    out, gates = by_name(conditions), named_gates(folders)
    twice = sorted(set(out) & set(gates))
    if twice:
        raise InputError(
            f"Got --gate for {twice[0]!r}, a condition of the recipe; expected another name. Rename the "
            "condition or the folder."
        )
    if gates:
        out.setdefault("base", [])
    out |= gates
    if len(out) < 2:
        raise InputError(
            f"Got the conditions {list(out)}; expected a base and something to compare. Write "
            "--gate DIR, or conditions in a recipe: {base: [], VAR: {var: {preset: code}}}."
        )
    return out


def cost_of_comparison(recipe: Recipe, conditions: Mapping[str, Any]) -> str:
    """How many prompts a comparison runs."""
    records = list(recipe.data)
    traced = sum(callable(condition) for condition in conditions.values()) > 0
    runs = len(records) * (len(conditions) + traced)
    return (
        f"{len(records)} questions x {len(conditions)} conditions"
        f"{' and a trace of each' if traced else ''}: {runs} prompts, each with its answer"
    )


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
