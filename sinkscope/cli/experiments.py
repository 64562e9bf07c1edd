"""The three long commands: ``sinkscope sweep``, ``train-lsg`` and ``compare``."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from sinkscope.checks import is_whole
from sinkscope.cli import recipes
from sinkscope.errors import InputError
from sinkscope.files import check_place, writable, write_whole

if TYPE_CHECKING:
    from sinkscope.models import LVLM


def says(text: str, **more: Any) -> Parameter:
    """The help of an option."""
    return Parameter(help=text, **more)


WHICH = says(
    "'example' (a small real model), 'bundled' (a toy inside the package), a folder, or a hub repository."
)
Engine = Annotated[str | None, says("local, or ray: workers that hold a model each (local).")]
Workers = Annotated[int | None, says("How many, with --engine ray (one per GPU, or four cores).")]
Repeated = Annotated[tuple[str, ...], Parameter(consume_multiple=False)]
Words = tuple[str, ...] | None
Dtype = Literal["auto", "bfloat16", "float16", "float32"]
METHODS = ("var", "sink_to_front", "token_weights", "fixed_coefficients")  # made of plain values
PLAIN = ("AblateActivations", "AblateValues", "AttentionKnockout", "AttentionTemperature")
PLAIN += ("EvictKeys", "MaskKeys", "ScaleAttention", "ScaleKeys", "ScaleTokens")  # likewise


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Loading:
    """How a model is loaded."""

    dtype: Annotated[Dtype | None, says("What to compute in (auto).")] = None
    device_map: Annotated[str | None, says("Such as auto or cuda:0 (the CPU).")] = None
    revision: Annotated[str | None, says("Branch, tag or commit of the repository.")] = None
    trust_remote_code: Annotated[bool, says("Run code of the repository; read it first.")] = False


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Settings(Loading):
    """What the three commands share. What is no flag can be set in a recipe, or with --set NAME=VALUE."""

    recipe: Annotated[str | None, says("A YAML file with the settings; flags win over it.")] = None
    data: Annotated[str | None, says("scenes, a .jsonl/.json/.csv/.parquet file or data set.")] = (
        None
    )
    split: Annotated[str | None, says("Of the data (train for train-lsg, else test).")] = None
    limit: Annotated[int | None, says("The most questions.")] = None
    v_detector: Annotated[str | None, says("Rule for V-sinks, such as norm:100.")] = None
    l_detector: Annotated[str | None, says("Rule for L-sinks, where they matter.")] = None
    calibrate: Annotated[str | None, says("Other questions, to find the rules on.")] = None
    out: Annotated[str | None, says("Folder of results (sinkscope-sweep, -gates, -compare).")] = (
        None
    )
    set: Annotated[Repeated, says("NAME=VALUE: any other argument, in YAML; repeatable.")] = ()
    dry_run: Annotated[bool, says("Print the cost and run nothing.")] = False

    def read(
        self, section: str, function: Callable[..., Any], model: str | None, **own: Any
    ) -> recipes.Recipe:
        """The settings of one command, from its recipe and its flags; ``own`` are arguments of its function."""
        if own.get("layers"):
            own["layers"] = [int(x) if x.lstrip("-").isdigit() else x for x in own["layers"]]
        for key in ("v_detector", "l_detector", "calibrate", "out"):
            own[key] = getattr(self, key)
        own["data"] = _present({"source": self.data, "split": self.split, "limit": self.limit})
        names = {key: getattr(self, key) for key in ("dtype", "device_map", "revision")}
        own["model"], asked = _present({"name": model, **names}), {}
        for words in self.set:
            name, equals, value = words.partition("=")
            if not equals or not name:
                raise InputError(f"Got --set {words}; expected NAME=VALUE, such as --set batch=8.")
            asked[name] = recipes.parse_yaml(value, f"--set {words}")
        flags = recipes.merged({k: v for k, v in _present(own).items() if v != {}}, asked)
        return recipes.read_recipe(section, self.recipe, flags, function, self.trust_remote_code)


def _present(mapping: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in mapping.items() if value is not None}


def sweep(
    model: Annotated[str | None, WHICH] = None,
    /,
    *,
    settings: Settings = Settings(),
    layers: Annotated[Words, says("Layers to read (all), or embed; scales the next block.")] = None,
    score: Annotated[str | None, says("choice, exact or logprob.")] = None,
    grid: Annotated[int | None, says("Pairs from (0, 1) to (1, 0) (11).")] = None,
    engine: Engine = None,
    workers: Workers = None,
) -> int:
    """Score questions with image keys scaled, layer by layer and pair by pair; resumable."""
    from sinkscope.experiments import sweep as run

    own = {"layers": layers, "score": score, "grid": grid, "engine": engine}
    recipe = settings.read("sweep", run, model, **own)
    options, dry = with_engine(recipe.options, workers), settings.dry_run
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
    with writable(folder):
        write_whole(folder / "observations.txt", made.observations() + "\n")
    print(f"\nMap and tables: {folder}; every answer: {out}")
    return 0


def train_lsg(
    model: Annotated[str | None, WHICH] = None,
    /,
    *,
    settings: Settings = Settings(),
    layers: Annotated[Words, says("Layers to read, or embed: one gate each, in one pass.")] = None,
    epochs: Annotated[int | None, says("Passes over the data (2).")] = None,
    batch: Annotated[int | None, says("Rows per forward pass (8).")] = None,
    lr: Annotated[float | None, says("Highest learning rate (0.001).")] = None,
    seed: Annotated[int | None, says("Of weights, split and order (0).")] = None,
) -> int:
    """Train Layer-wise Sink Gates on questions and answers, the model frozen; resumable."""
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
    model: Annotated[str | None, WHICH] = None,
    /,
    *,
    settings: Settings = Settings(),
    gate: Annotated[Repeated, says("Folder of a saved gate to compare; repeatable.")] = (),
    batch: Annotated[int | None, says("Questions per forward pass (16).")] = None,
    engine: Engine = None,
    workers: Workers = None,
) -> int:
    """Answer questions under several conditions: gates, edits, prior methods; with intervals."""
    from sinkscope.experiments import compare as run

    recipe = settings.read("compare", run, model, batch=batch, engine=engine)
    options = with_engine(recipe.options, workers)
    conditions = with_gates(recipe.conditions, gate)
    out = Path(recipe.out or "sinkscope-compare").expanduser()
    if not settings.dry_run:
        check_place(out / "report", "answers.csv", "comparison")
    lvlm = recipe.load(weights=not settings.dry_run)
    made = {name: condition(name, what, lvlm) for name, what in conditions.items()}
    if settings.dry_run:
        count, traced = len(list(recipe.data)), any(callable(one) for one in made.values())
        how = f"{len(made)} conditions{' and a trace of each' if traced else ''}"
        prompts = count * (len(made) + traced)
        print(f"{count} questions x {how}: {prompts} prompts, each with its answer")
        return 0
    rules, bar = recipe.detectors(lvlm), sys.stderr.isatty()
    found = run(lvlm, recipe.data, made, **options, **rules, progress=bar)
    print(found.to_markdown())
    tables = {"answers": found.to_dataframe(), "summary": found.estimates()}
    print(f"\nAnswers, table and figure: {write_report(out, tables, 'comparison', found)}")
    return 0


def with_engine(options: Mapping[str, Any], workers: int | None) -> dict[str, Any]:
    """The options, with an engine of keys and values, or a number of workers, as one of Ray."""
    from sinkscope.scale import Ray

    made = options.get("engine", "local")
    if isinstance(made, Mapping):
        made = Ray(**recipes.arguments_for(Ray, made, "under engine"))
    if workers is not None:
        if made == "local":
            came = f"Got --workers {workers} for one process"
            raise InputError(f"{came}; expected an engine that has workers. Write --engine ray.")
        made = replace(made if isinstance(made, Ray) else Ray(), workers=workers)
    return {**options, "engine": made}


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


def write_report(out: Path, tables: Mapping[str, Any], name: str, result: Any) -> Path:
    """Write tables and the result's figure to ``report/`` beside the raw results."""
    from sinkscope.viz.tables import write_csv

    folder = out / "report"
    result.plot().savefig(drawn := BytesIO(), format="png", dpi=150, bbox_inches="tight")
    with writable(folder):
        if folder.is_symlink():
            raise OSError(f"{str(folder)!r} is a link; remove it first")
        folder.mkdir(parents=True, exist_ok=True)
        for file, table in tables.items():
            write_csv(table, folder / f"{file}.csv")
        write_whole(folder / f"{name}.png", drawn.getvalue())
    return folder


def condition(name: str, what: Any, lvlm: "LVLM") -> Any:
    """Make one condition of a comparison, of a mapping with one key or a list of interventions.

    In the list each is a mapping of one of `PLAIN`: ``[{MaskKeys: {tokens: image, layers: [10]}}]``. Keys:
    ``gate: folder``; ``stack: folder`` of a saved stack or ``stack: [folder, ...]`` of gates; ``edit: {kind,
    edit, ...}`` (see `EditSinks`); ``random_tokens: {condition: ..., count, seed}``; or one of `METHODS`.
    """
    from sinkscope import interventions
    from sinkscope.experiments import EditSinks, baselines
    from sinkscope.lsg import LSG

    if isinstance(what, list) and what:
        made_of = []
        for one in what:
            if not isinstance(one, Mapping) or len(one) != 1 or next(iter(one)) not in PLAIN:
                raise InputError(
                    f"Got {one!r} in the condition {name}; expected one of {list(PLAIN)} with its arguments, "
                    "such as {MaskKeys: {tokens: image, layers: [10]}}."
                )
            ((key, value),) = one.items()
            kind, where = getattr(interventions, key), f"under {key} of the condition {name}"
            made_of.append(kind(**recipes.arguments_for(kind, value, where)))
        return made_of
    keys = ("gate", "stack", "edit", "random_tokens", *METHODS)
    if what in ([], {}, None, "base"):
        return []
    if not isinstance(what, Mapping) or len(what) != 1 or next(iter(what)) not in keys:
        raise InputError(
            f"Got the condition {name}: {what!r}; expected [] or one of the keys {list(keys)}, such as "
            "{gate: folder} or {var: {preset: code}}."
        )
    ((key, value),) = what.items()
    if key in ("gate", "stack"):
        folders: Any = value if key == "stack" and isinstance(value, list) else [value]
        if not folders or not all(isinstance(one, str) for one in folders):
            wanted = "a folder or a list of folders" if key == "stack" else "a folder"
            raise InputError(f"Got {key}: {value!r} in the condition {name}; expected {wanted}.")
        if key == "stack" and isinstance(value, str):
            return LSG.load_stack(value, lvlm=lvlm)
        return [LSG.from_pretrained(one, lvlm=lvlm) for one in folders]
    made = EditSinks if key == "edit" else getattr(baselines, key)
    arguments = recipes.arguments_for(made, value, f"under {key} of the condition {name}")
    if key == "random_tokens":
        arguments["condition"] = condition(name, arguments["condition"], lvlm)
    return made(**arguments)


def with_gates(conditions: Any, folders: Sequence[str]) -> dict[str, Any]:
    """The conditions of a recipe and those of ``--gate``."""
    if not isinstance(conditions, Mapping):
        raise InputError(
            f"Got conditions: {conditions!r}; expected names with what to do, such as "
            "{base: [], VAR: {var: {preset: code}}}."
        )
    out, gates = {str(k): what for k, what in conditions.items()}, named_gates(folders)
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


def named_gates(folders: Sequence[str]) -> dict[str, dict[str, str]]:
    """Name the conditions of ``--gate``, each by the shortest end of its path that tells it from the others."""
    paths = [Path(folder).expanduser().resolve() for folder in folders]
    if twice := sorted({str(path) for path in paths if paths.count(path) > 1}):
        raise InputError(f"Got --gate {twice[0]} more than once; expected every folder once.")
    out = {}
    for folder, path in zip(folders, paths, strict=True):
        depth = 1
        while sum(other.parts[-depth:] == path.parts[-depth:] for other in paths) > 1:
            depth += 1
        out["/".join(path.parts[-depth:])] = {"gate": folder}
    return out
