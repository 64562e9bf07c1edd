"""The three long commands: ``sinkscope sweep``, ``train-lsg`` and ``compare``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from sinkscope.checks import is_whole
from sinkscope.cli import recipes
from sinkscope.errors import InputError
from sinkscope.files import check_place

Dtype = Literal["auto", "bfloat16", "float16", "float32"]
Repeated = Annotated[tuple[str, ...], Parameter(consume_multiple=False)]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the three commands share. What is no flag can be set in a recipe, or with --set NAME=VALUE.

    Attributes:
        recipe: A YAML file with the settings; flags win over it.
        data: scenes, a .jsonl/.json/.csv/.parquet file, or a data set.
        split: Of the data (train for train-lsg, else test).
        limit: The most questions.
        v_detector: Rule for V-sinks, such as norm:100.
        l_detector: Rule for L-sinks, where they matter.
        calibrate: Other questions, to find the rules on.
        out: Folder of the results (sinkscope-sweep, sinkscope-gates, sinkscope-compare).
        dtype: What to compute in.
        device_map: Such as auto or cuda:0 (the CPU).
        revision: Branch, tag or commit of the repository.
        trust_remote_code: Run the code that the model's repository brings; read it first.
        set: NAME=VALUE: any other argument, in YAML; repeatable.
        dry_run: Print the cost and run nothing.
    """

    recipe: str | None = None
    data: str | None = None
    split: str | None = None
    limit: int | None = None
    v_detector: str | None = None
    l_detector: str | None = None
    calibrate: str | None = None
    out: str | None = None
    dtype: Dtype | None = None
    device_map: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    set: Repeated = ()
    dry_run: bool = False

    def read(
        self, section: str, function: Callable[..., Any], model: str | None, **own: Any
    ) -> recipes.Recipe:
        """The settings of one command, from its recipe and its flags; ``own`` are arguments of its function.

        Flags take the shape of a recipe: what was not given is left out, what was set to null is None.
        """
        names = {"name": model} | {k: getattr(self, k) for k in ("dtype", "device_map", "revision")}
        out: dict[str, Any] = {
            "model": _present(names),
            "data": _present({"source": self.data, "split": self.split, "limit": self.limit}),
            **{k: getattr(self, k) for k in ("v_detector", "l_detector", "calibrate", "out")},
            **own,
        }
        if own.get("layers"):
            out["layers"] = [int(x) if x.lstrip("-").isdigit() else x for x in own["layers"]]
        asked: dict[str, Any] = {}
        for words in self.set:
            name, equals, value = words.partition("=")
            if not equals or not name:
                raise InputError(f"Got --set {words}; expected NAME=VALUE, such as --set batch=8.")
            asked[name] = recipes.parse_yaml(value, f"--set {words}")
        flags = recipes.merged({k: v for k, v in _present(out).items() if v != {}}, asked)
        trust = self.trust_remote_code
        return recipes.read_recipe(section, self.recipe, flags, function, trust_remote_code=trust)


def _present(mapping: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in mapping.items() if value is not None}


def sweep(
    model: str | None = None,
    /,
    *,
    settings: Settings = Settings(),
    layers: tuple[str, ...] | None = None,
    score: str | None = None,
    grid: int | None = None,
) -> int:
    """Score questions with image keys scaled, layer by layer and pair by pair; resumable.

    Args:
        model: 'example' (a small real model), 'bundled' (a toy inside the package), a folder, or a hub repository.
        layers: Layers that are read; keys are scaled in the next block (all), or embed.
        score: choice, exact or logprob.
        grid: Pairs from (0, 1) to (1, 0) (11).
        settings: What the three commands share.
    """
    from sinkscope.experiments import sweep as run

    recipe = settings.read("sweep", run, model, layers=layers, score=score, grid=grid)
    options, dry = dict(recipe.options), settings.dry_run
    if options.get("grid") is not None:
        options["grid"] = grid_of(options["grid"])
    out = Path(recipe.out or "sinkscope-sweep").expanduser()
    if not dry:
        check_place(out, "manifest.json", "sweep")
    lvlm = recipe.load(weights=not dry)
    rules = recipe.detectors(None if dry else lvlm)
    if all(len(cell) == 2 for cell in options.get("grid", ())):  # (s_V, s_rest): no L-sinks
        rules.pop("l_detector")
    how = options | rules | {"out": None if dry else out, "progress": sys.stderr.isatty()}
    made: Any = run(lvlm, recipe.data, **how, dry_run=dry)
    if dry:
        print(made)
        return 0
    best = made.best()
    print(made.observations())
    print("\nBest cell per task, chosen on one half of the images and scored on the other:")
    print(best.to_string(index=False, float_format=lambda x: f"{x:.3f}"))
    folder = write_report(out, {"map": made.map(), "best": best}, "map", made)
    (folder / "observations.txt").write_text(made.observations() + "\n", encoding="utf-8")
    print(f"\nMap and tables: {folder}; every answer: {out}")
    return 0


def train_lsg(
    model: str | None = None,
    /,
    *,
    settings: Settings = Settings(),
    layers: tuple[str, ...] | None = None,
    epochs: int | None = None,
    batch: int | None = None,
    lr: float | None = None,
    seed: int | None = None,
) -> int:
    """Train Layer-wise Sink Gates on questions and answers, the model frozen; resumable.

    Args:
        model: 'example' (a small real model), 'bundled' (a toy inside the package), a folder, or a hub repository.
        layers: Layers that gates read, one gate each, in one pass over the data, or embed.
        epochs: Passes over the data (2).
        batch: Rows per forward pass (8).
        lr: Highest learning rate (0.001).
        seed: Of weights, split and order (0).
        settings: What the three commands share.
    """
    from sinkscope.lsg import train_lsg as run

    own = {"layers": layers, "epochs": epochs, "batch": batch, "lr": lr, "seed": seed}
    recipe = settings.read("train", run, model, **own)
    options, dry = recipe.options, settings.dry_run
    if not options.get("layers"):
        raise InputError("Got no layers to train gates at; expected some. Write --layers 10.")
    out = Path(recipe.out or "sinkscope-gates").expanduser()
    if not dry:
        check_place(out / "checkpoints", "run.json", "run")
        check_place(out / "report", "history.csv", "run")
    lvlm = recipe.load(weights=not dry)
    rules = {} if dry else recipe.detectors(lvlm)
    if "L" not in (options.get("choices") or {}).get("groups", ()):
        rules.pop("l_detector", None)
    place = None if dry else out / "checkpoints"
    how = {**options, **rules, "out": place, "progress": sys.stderr.isatty()}
    made: Any = run(lvlm, recipe.data.indexed(), **how, dry_run=dry)
    print(made)
    if dry:
        return 0
    folder = write_report(out, {"history": made.history}, "training", made)
    for layer, gate in made.gates.items():
        gate.save_pretrained(out / f"gate-{layer}")
        print(f"Gate of layer {layer}: {out / f'gate-{layer}'}")
        if made.record["results"][str(layer)]["best_step"] == 0:
            print("  Note: no look was better than the first, so this is the untrained gate.")
            print("  Train longer, on more data, or with another --lr.")
    print(f"History and curve: {folder}")
    return 0


def compare(
    model: str | None = None,
    /,
    *,
    settings: Settings = Settings(),
    gate: Repeated = (),
    batch: int | None = None,
) -> int:
    """Answer questions under several conditions: gates, edits, prior methods; with intervals.

    Args:
        model: 'example' (a small real model), 'bundled' (a toy inside the package), a folder, or a hub repository.
        gate: Folder of a saved gate to compare with the base; repeatable.
        batch: Questions per forward pass (16).
        settings: What the three commands share.
    """
    from sinkscope.experiments import compare as run

    recipe = settings.read("compare", run, model, batch=batch)
    conditions = with_gates(recipe.conditions, gate)
    out = Path(recipe.out or "sinkscope-compare").expanduser()
    if not settings.dry_run:
        check_place(out / "report", "answers.csv", "comparison")
    lvlm = recipe.load(weights=not settings.dry_run)
    made = {name: recipes.condition(name, what, lvlm) for name, what in conditions.items()}
    if settings.dry_run:
        count, traced = len(list(recipe.data)), any(callable(one) for one in made.values())
        how = f"{len(made)} conditions{' and a trace of each' if traced else ''}"
        prompts = count * (len(made) + traced)
        print(f"{count} questions x {how}: {prompts} prompts, each with its answer")
        return 0
    rules, bar = recipe.detectors(lvlm), sys.stderr.isatty()
    found = run(lvlm, recipe.data, made, **recipe.options, **rules, progress=bar)
    print(found.to_markdown())
    tables = {"answers": found.to_dataframe(), "summary": found.estimates()}
    print(f"\nAnswers, table and figure: {write_report(out, tables, 'comparison', found)}")
    return 0


def grid_of(asked: Any) -> list[tuple[Any, ...]]:
    """Pairs of coefficients, or triples: how many, what makes them, or a list as a recipe writes it."""
    from sinkscope.experiments import lsg_grid

    if is_whole(asked):
        return lsg_grid(asked)
    if isinstance(asked, Mapping):
        return lsg_grid(**recipes.arguments_for(lsg_grid, asked, "under grid"))
    if not (asked and isinstance(asked, list) and all(isinstance(pair, list) for pair in asked)):
        raise InputError(
            f"Got grid={asked!r}; expected how many pairs, or a list of pairs: [[0.0, 1.0], [0.5, 0.5]], "
            "or {steps: 6, groups: 3} for triples (s_V, s_L, s_rest)."
        )
    return [tuple(pair) for pair in asked]


def with_gates(conditions: Any, folders: Sequence[str]) -> dict[str, Any]:
    """The conditions of a recipe and those of ``--gate``."""
    if not isinstance(conditions, Mapping):
        raise InputError(
            f"Got conditions: {conditions!r}; expected names with what to do, such as "
            "{base: [], VAR: {var: {preset: code}}}."
        )
    out, gates = {str(k): what for k, what in conditions.items()}, recipes.named_gates(folders)
    if twice := sorted(set(out) & set(gates)):
        raise InputError(f"Got --gate for {twice[0]!r}, a condition of the recipe; rename one.")
    if gates:
        out.setdefault("base", [])
    out |= gates
    if len(out) < 2:
        raise InputError(
            f"Got the conditions {list(out)}; expected a base and something to compare. Write "
            "--gate DIR, or conditions in a recipe: {base: [], VAR: {var: {preset: code}}}."
        )
    return out


def write_report(out: Path, tables: Mapping[str, Any], name: str, result: Any) -> Path:
    """Write tables and the result's figure to ``report/`` beside the raw results."""
    import matplotlib.pyplot as plt

    folder = out / "report"
    folder.mkdir(parents=True, exist_ok=True)
    for file, table in tables.items():
        table.to_csv(folder / f"{file}.csv", index=False)
    figure = result.plot()
    figure.savefig(folder / f"{name}.png", dpi=150, bbox_inches="tight")
    plt.close(figure)
    return folder
