"""Gates with V := CLS beside a random token in its place, fixed pairs, LoRA and prior methods."""

import pandas as pd
import torch

import sinkscope as ss
from benchmarks.bundled_comparison import choose_cell, choose_weights, train_gates
from benchmarks.paper.setting import (
    L_RULE,
    V_RULE,
    Kept,
    gate_rule,
    questions,
    records_of,
    told,
    write,
)
from sinkscope import baselines
from sinkscope.detectors import RandomTokens
from sinkscope.experiments import Comparison, GateCoefficients, per_seed
from sinkscope.experiments.statistics import cluster_bootstrap
from sinkscope.viz import plot_effects
from sinkscope.viz.effects import comparison_markdown

NAME = "example_comparison"
BASE = "base"
GATE, LORA = "LSG, one layer", "LoRA"
USED, TRAINED = "LSG, used on a random token", "LSG, trained on a random token"
METHODS = "methods"
"""The conditions that are not trained, beside one part per seed."""
RULES = {"v_detector": V_RULE, "l_detector": L_RULE}


def data_of(args):
    return {
        "train": questions("train", args.train, 4, args.noise),
        "validation": questions("validation", args.held, 8, args.noise, 100),
        "test": questions("test", args.images, args.per_image, args.noise, args.start),
    }


def settings_of(args, part):
    names = ("model", "noise", "per_image", "start", "chunk", "layers", "train", "held")
    names += ("epochs", "batch", "lr")
    return {"part": part, "v_rule": repr(V_RULE), **{name: getattr(args, name) for name in names}}


def trained_lora(lvlm, train, like, seed, args, path):
    """A LoRA of the size of a gate, in the block whose output the gate reads; kept in a file."""
    if path.exists():
        return baselines.LoRA(**torch.load(path, map_location="cpu", weights_only=True))
    block = 0 if like.layer == "embed" else like.layer
    options = {"epochs": args.epochs, "batch": args.batch, "lr": args.lr}
    made = baselines.lora(lvlm, train, block, like=like, seed=seed, **options)
    factors = {name: (up.cpu(), down.cpu()) for name, (up, down) in made.factors.items()}
    torch.save({**vars(made), "factors": factors, "history": ()}, path)
    return made


def seed_conditions(lvlm, data, seed, args, kept, clock):
    """Everything that is trained with one seed, and what was chosen on validation scenes."""
    layers = [n if n == "embed" else int(n) for n in args.layers]
    train, common = data["train"], (args, [seed])
    made = train_gates(lvlm, train, layers, gate_rule(), *common, kept.folder / "gates")
    gates = list(made[seed].values())
    clock.say(f"seed {seed}: {len(gates)} gates trained")
    stack = ss.lsg.greedy_stack(lvlm, gates, data["validation"], batch=32, progress=False)
    best = stack.ordered[0]
    clock.say(f"seed {seed}: layers by loss {stack.order}, stack {[g.layer for g in stack.gates]}")
    made = train_gates(
        lvlm, train, [best.layer], RandomTokens(1, seed), *common, kept.folder / "random"
    )
    (other,) = made[seed].values()
    clock.say(f"seed {seed}: a gate of a random token trained")
    found = ss.gate_coefficients(lvlm, gates, data["validation"], progress=False)
    found.table.to_csv(kept.folder / "coefficients.csv.gz", index=False)
    adapter = trained_lora(lvlm, train, best, seed, args, kept.folder / "lora.pt")
    clock.say(f"seed {seed}: {adapter}")
    conditions = {
        BASE: [],
        GATE: [best],
        "LSG, stack": stack.gates,
        USED: baselines.random_tokens([best], count=1, seed=seed),
        TRAINED: [other],
        LORA: adapter,
    }
    losses = zip(map(str, stack.order), stack.single, strict=True)
    return conditions, {
        "seed": seed,
        "loss_without_a_gate": stack.base,
        "loss_by_layer": dict(losses),
        "layer": best.layer,
        "stack": [gate.layer for gate in stack.gates],
        "gate_parameters": adapter.wanted,
        "lora_parameters": adapter.parameters,
    }


def method_conditions(lvlm, data, args, clock):
    """Everything that is not trained, and what was chosen on validation scenes."""
    if args.fixed:
        cell_name, *pair, gain = args.fixed
        layer = cell_name if cell_name == "embed" else int(cell_name)
        pair, gain = [float(number) for number in pair], float(gain)
        cell = baselines.fixed_coefficients(layer, *pair)
        cell_name = f"{layer}: {pair[0]:g}, {pair[1]:g}"
    else:
        cell, cell_name, gain = choose_cell(lvlm, data["validation"], RULES)
    clock.say("fixed coefficients", cell_name, gain)
    weights, weights_name = choose_weights(lvlm, data["validation"], RULES)
    clock.say("token weights", weights_name)
    controls = [baselines.random_tokens(cell, seed=seed) for seed in args.seeds]
    made = {
        BASE: [],
        "VAR, paper": baselines.var("paper"),
        "VAR, code": baselines.var("code"),
        "sink to the front": baselines.sink_to_front(),
        "token weights": weights,
        "fixed coefficients": cell,
        "fixed coefficients, random token": per_seed(*controls),
    }
    return made, {"fixed": cell_name, "gain": gain, "weights": weights_name}


def measure(lvlm, args, clock):
    """One part per seed, and one for what is not trained; each can run in a process of its own."""
    data = data_of(args)
    for part in args.parts:
        kept = Kept.open(args.keep / f"{NAME}_{part}", settings_of(args, part), lvlm, clock)
        if part == METHODS:
            made, chosen = method_conditions(lvlm, data, args, clock)
        else:
            made, chosen = seed_conditions(lvlm, data, int(part), args, kept, clock)
        kept.note("chosen", chosen)

        def answers(records, made=made, part=part):
            table = ss.compare(lvlm, records, made, **RULES, progress=False).table
            if part != METHODS:
                table["seed"] = int(part)
            return table.drop(columns="question")

        kept.run(data["test"], args, answers)


def read(args):
    """All parts as one comparison, on the images that every part has; the base counts once."""
    parts = [Kept(path) for path in sorted(args.keep.glob(f"{NAME}_*")) if path.is_dir()]
    tables = [(part, part.rows()) for part in parts]
    measured = {part: table for part, table in tables if len(table)}
    if not measured:
        raise SystemExit(f"{args.keep} holds no answers under {NAME}_*: measure first, see --help.")
    common = set.intersection(*(set(table["image_id"]) for table in measured.values()))
    table = pd.concat(measured.values(), ignore_index=True)
    table = table.loc[table["image_id"].isin(common)]
    is_base = table["condition"] == BASE
    base = table.loc[is_base].drop_duplicates("item").assign(seed=0)
    return Comparison(pd.concat([base, table.loc[~is_base]], ignore_index=True), BASE), [*measured]


def paired(comparison):
    """The gate minus its controls, question by question and seed by seed, by task."""
    table, lines = comparison.table, []
    gate = table.loc[table["condition"] == GATE]
    for other in (TRAINED, USED, LORA):
        both = gate.merge(
            table.loc[table["condition"] == other, ["item", "seed", "correct"]],
            on=["item", "seed"],
            suffixes=("", "_other"),
        )
        if both.empty:
            continue
        change = both["correct"].astype(float) - both["correct_other"].astype(float)
        for task in [*both["task"].unique(), "all"]:
            mine = (both["task"] == task) | (task == "all")
            some = both.loc[mine]
            ids, seeds = some["image_id"].tolist(), some["seed"].tolist()
            numbers = cluster_bootstrap(change[mine].tolist(), ids, seeds)
            names = ("delta", "low", "high")
            lines.append(
                {
                    "task": task,
                    "minus": other,
                    "n": len(some),
                    **dict(zip(names, numbers, strict=True)),
                }
            )
    return pd.DataFrame(lines)


def paired_text(table):
    if table.empty:
        return "no gate measured"
    tasks = list(dict.fromkeys(table["task"]))
    lines = [f"| {GATE}, minus | {' | '.join(tasks)} |", f"|---|{'---|' * len(tasks)}"]
    for other, part in table.groupby("minus", sort=False):
        cells = [
            f"{100 * r.delta:+.1f} [{100 * r.low:+.1f}, {100 * r.high:+.1f}]"
            for r in part.itertuples()
        ]
        lines.append(f"| {other} | {' | '.join(cells)} |")
    return "\n".join(lines)


def coefficients(parts):
    """What the gates of all seeds answer to the validation questions; a seed's questions count as others."""
    tables = []
    for part in parts:
        path = part.folder / "coefficients.csv.gz"
        if path.exists():
            tables.append(pd.read_csv(path).assign(seed=len(tables)))
    if not tables:
        return None
    table = pd.concat(tables, ignore_index=True)
    table["item"] += table["seed"] * (table["item"].max() + 1)
    return GateCoefficients(table)


def coefficients_text(table):
    """The coefficient of V by layer and task, beside 0.5, which an untrained gate gives."""
    v = table.loc[table["group"] == "V"]
    wide = v.assign(
        cell=[f"{r.coefficient:.2f} [{r.low:.2f}, {r.high:.2f}]" for r in v.itertuples()]
    ).pivot(index="layer", columns="task", values="cell")
    lines = [f"| layer | {' | '.join(wide.columns)} |", f"|---|{'---|' * len(wide.columns)}"]
    for layer, cells in zip(wide.index, wide.to_numpy(), strict=True):
        lines.append(f"| {'embed' if layer < 0 else layer} | {' | '.join(cells)} |")
    return "\n".join(lines)


def chosen_text(chosen, held):
    """What was chosen on validation scenes, in a few lines."""
    lines = []
    for name, c in chosen.items():
        if name == METHODS:
            lines.append(
                f"- Fixed coefficients at layer {c['fixed']} (V, rest), which raise the mean log-probability of "
                f"the validation answers by {c['gain']:.4f} nats; token weights {c['weights']} (sink, rest), chosen by "
                f"right answers on {held} validation scenes."
            )
            continue
        losses = ", ".join(f"{layer} {loss:.4f}" for layer, loss in c["loss_by_layer"].items())
        lines += [
            f"- Seed {c['seed']}: gate at layer {c['layer']}, stack {c['stack']}. Loss in nats per answer token "
            f"without a gate {c['loss_without_a_gate']:.4f}, with one at layer: {losses}.",
            f"  A gate has {c['gate_parameters']} parameters, the LoRA {c['lora_parameters']}.",
        ]
    return "\n".join(lines)


def render(args):
    comparison, parts = read(args)
    names = [part.folder.name.removeprefix(f"{NAME}_") for part in parts]
    settings = {name: part.read("settings") for name, part in zip(names, parts, strict=True)}
    machines = {name: part.read("machine") for name, part in zip(names, parts, strict=True)}
    chosen = {name: part.read("chosen") for name, part in zip(names, parts, strict=True)}
    summary, table = comparison.estimates(), comparison.table
    differences = paired(comparison)
    one = settings[names[0]]
    images = table["image_id"].nunique()
    text = [
        f"{images} test scenes (noise {one['noise']:g}), {table['item'].nunique()} questions; trained on "
        f"{one['train']} training scenes with 4 questions each, {one['epochs']} epochs, batches of {one['batch']}, "
        f"lr {one['lr']:g}; layers, pairs and stacks chosen on {one['held']} validation scenes. Changes of "
        "accuracy in points, with 95 % intervals by bootstrap over images and seeds. In gates V is the ViT's CLS, "
        f"by its kind; in the others the V rule is `{one['v_rule']}`. CLS is the first image token already, so "
        "sink-to-the-front moves nothing.",
        "",
        *[f"- {name}: {told(body)}" for name, body in machines.items() if body],
        "",
        comparison_markdown(summary, base=BASE),
        "The gate beside its controls, paired by question and seed:",
        "",
        paired_text(differences),
        "",
        "Chosen on validation scenes:",
        "",
        chosen_text(chosen, settings.get(METHODS, one)["held"]),
    ]
    figures = {NAME: plot_effects(summary, base=BASE)}
    learned = coefficients(parts)
    if learned is not None:
        text += [
            "",
            "Coefficient of V that the gates learned, by the layer that they read and task, on validation "
            "scenes, mean over seeds (rest has 1 minus it; an untrained gate gives 0.5):",
            "",
            coefficients_text(learned.to_dataframe()),
        ]
        figures["example_coefficients"] = learned.plot()
    body = {
        "coefficients": None if learned is None else records_of(learned.to_dataframe()),
        "settings": settings,
        "machines": machines,
        "chosen": chosen,
        "rows": records_of(summary),
        "paired": records_of(differences),
    }
    write(args.out, NAME, body, "\n".join(text), figures)
