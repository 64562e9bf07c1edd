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
from sinkscope.experiments import Comparison, per_seed
from sinkscope.experiments.statistics import cluster_bootstrap
from sinkscope.viz import plot_effects
from sinkscope.viz.comparison import comparison_markdown

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
        return baselines.LoRA(**torch.load(path, weights_only=True))
    block = 0 if like.layer == "embed" else like.layer
    options = {"epochs": args.epochs, "batch": args.batch, "lr": args.lr}
    made = baselines.lora(lvlm, train, block, like=like, seed=seed, **options)
    torch.save({**vars(made), "factors": dict(made.factors), "history": ()}, path)
    return made


def seed_conditions(lvlm, data, seed, args, kept, clock):
    """Everything that is trained with one seed, and what was chosen on validation scenes."""
    layers = [n if n == "embed" else int(n) for n in args.layers]
    train, common = data["train"], (args, [seed])
    made = train_gates(lvlm, train, layers, gate_rule(), *common, kept.folder / "gates")
    gates = list(made[seed].values())
    clock.say(f"seed {seed}: {len(gates)} gates trained")
    stack = ss.greedy_stack(lvlm, gates, data["validation"], batch=32, progress=False)
    best = stack.ordered[0]
    clock.say(f"seed {seed}: layers by loss {stack.order}, stack {[g.layer for g in stack.gates]}")
    made = train_gates(
        lvlm, train, [best.layer], RandomTokens(1, seed), *common, kept.folder / "random"
    )
    (other,) = made[seed].values()
    clock.say(f"seed {seed}: a gate of a random token trained")
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
        "coefficients": coefficients(lvlm, best, data["validation"]),
    }


def coefficients(lvlm, gate, records):
    """Mean coefficients of V and rest that a gate gives, by task."""
    lines = []
    for start in range(0, len(records), 8):
        some = records[start : start + 8]
        sample = lvlm.prepare([q["image"] for q in some], [q["question"] for q in some])
        run = lvlm.run(sample, interventions=[gate], logits="last")
        found = run.effects[gate].extra["coefficients"].flatten(1)  # one layer, so [row group]
        for q, values in zip(some, found.tolist(), strict=True):
            lines.append({"task": q["task"], **dict(zip(gate.groups, values, strict=True))})
    return records_of(pd.DataFrame(lines).groupby("task").mean().reset_index())


def method_conditions(lvlm, data, args, clock):
    """Everything that is not trained, and what was chosen on validation scenes."""
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


def chosen_text(chosen):
    """What was chosen on validation scenes, in a few lines."""
    lines = []
    for name, c in chosen.items():
        if name == METHODS:
            lines.append(
                f"- Fixed coefficients at layer {c['fixed']} (V, rest), which raise the mean log-probability of "
                f"the validation answers by {c['gain']:.4f} nats; token weights {c['weights']} (sink, rest)."
            )
            continue
        losses = ", ".join(f"{layer} {loss:.4f}" for layer, loss in c["loss_by_layer"].items())
        rho = ", ".join(f"{r['task']} {r['V']:.2f} / {r['rest']:.2f}" for r in c["coefficients"])
        lines += [
            f"- Seed {c['seed']}: gate at layer {c['layer']}, stack {c['stack']}. Loss in nats per answer token "
            f"without a gate {c['loss_without_a_gate']:.4f}, with one at layer: {losses}.",
            f"  Coefficients of V / rest at layer {c['layer']}: {rho}. A gate has {c['gate_parameters']} "
            f"parameters, the LoRA {c['lora_parameters']}.",
        ]
    return "\n".join(lines)


def render(args):
    comparison, parts = read(args)
    names = [part.folder.name.removeprefix(f"{NAME}_") for part in parts]
    settings = {name: part.read("settings") for name, part in zip(names, parts, strict=True)}
    machines = {name: part.read("machine") for name, part in zip(names, parts, strict=True)}
    chosen = {name: part.read("chosen") for name, part in zip(names, parts, strict=True)}
    summary, table = comparison.summary(), comparison.table
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
        chosen_text(chosen),
    ]
    body = {
        "settings": settings,
        "machines": machines,
        "chosen": chosen,
        "rows": records_of(summary),
        "paired": records_of(differences),
    }
    write(args.out, NAME, body, "\n".join(text), {NAME: plot_effects(summary, base=BASE)})
