"""Prior methods and Layer-wise Sink Gating on the bundled model, on held-out questions.

    python benchmarks/bundled_comparison.py

Gates and LoRA are trained on training scenes, with three seeds each; layers, pairs of coefficients and
stacks are chosen on validation scenes; everything is scored on test scenes. Once on scenes as the
model knows them, where it is near its ceiling, and once with so much pixel noise that it is right in about
three of four answers. By the published criteria the model has no sinks. So every method is run twice: with
that finding, where all image tokens are "rest", and with a rule that flags as many patches as one
likes, those of the highest norm in the vision tower, which are *not* sinks by the published criteria.
"""

import argparse
import json
import time
from pathlib import Path

import pandas as pd
import torch

import sinkscope as ss
from sinkscope import baselines
from sinkscope.bundled import TEST_SEEDS, TRAIN_SEEDS, VALIDATION_SEEDS, scene_questions
from sinkscope.detectors import Norm, RandomTokens, Received
from sinkscope.experiments import Comparison, per_seed
from sinkscope.lsg import greedy_stack, train_lsg

OUT = Path(__file__).parent / "results"
SEEDS = (0, 1, 2)
DATA = {"standard": {}, "noisy": {"noise": 40.0}}
PAIRS = [(round(0.1 * i, 1), round(1 - 0.1 * i, 1)) for i in range(11)]
WEIGHTS = [(0.0, 1.0), (0.5, 1.0), (2.0, 1.0), (1.0, 0.5), (1.0, 2.0)]
FLAGGED = 4  # patches per image that the rule of high norms flags, on average
NONE, NORM = "no sinks", "high norm"
START = time.monotonic()


def say(*words):
    print(f"[{time.monotonic() - START:6.0f} s]", *words, flush=True)


def questions(split, images, per_image, options, start=0):
    return list(scene_questions(images, per_image, seeds=split, start=start, **options))


def samples_of(lvlm, records):
    return [lvlm.prepare(images=q["image"], text=q["question"]) for q in records]


def found_rules(lvlm, samples):
    """What calibration finds: rules that flag nothing, if there are no sinks."""
    found = ss.calibrate(lvlm, samples, progress=False)
    say("vision:", found.vision.reason, "| language:", found.language.reason)
    return {"v_detector": found.v_detector, "l_detector": found.l_detector}


def loose_rules(lvlm, samples):
    """The patches of highest norm, and the tokens that receive the most: not sinks, but as many."""
    share = 1 - FLAGGED / 64
    norms, received = ss.TokenNorms(None, "vision", "resid_post"), ss.ReceivedAttention()
    of_patches, of_tokens = [], []
    for sample in samples:
        run = lvlm.run(sample, [norms, received], logits="last")
        patches = sample.tokens.vision.select("patch")
        of_patches.append(run[norms].norms[:, lvlm.anatomy.feed_layers[-1]][patches])
        times = run[received].over_null().mean(dim=2)
        of_tokens.append(times[(sample.tokens.image >= 0)[:, None].expand_as(times)])
    limits = [float(torch.quantile(torch.cat(x), share)) for x in (of_patches, of_tokens)]
    return {
        "v_detector": Norm(limits[0]),
        "l_detector": Received(times_null=limits[1], heads="mean"),
    }


def best(lvlm, conditions, held, rules):
    """The condition with the most right answers on validation scenes, and how many it has."""
    got = ss.compare(lvlm, held, {"base": [], **conditions}, **rules, progress=False)
    table = got.table[got.table["condition"] != "base"]
    right = table.groupby("condition", sort=False)["correct"].mean()
    return right.idxmax(), right


def choose_cell(lvlm, held, rules):
    """Layer and pair of the fixed coefficients."""
    layers = ["embed", *range(lvlm.anatomy.language.n_layers - 1)]
    cells = {f"{layer}: {v}, {r}": (layer, v, r) for layer in layers for v, r in PAIRS}
    made = {name: baselines.fixed_coefficients(*cell) for name, cell in cells.items()}
    name, right = best(lvlm, made, held, rules)
    return made[name], name, float(right[name])


def choose_weights(lvlm, held, rules):
    made = {f"{s}, {r}": baselines.token_weights(s, r) for s, r in WEIGHTS}
    name, right = best(lvlm, made, held, rules)
    return made[name], name, float(right[name])


def train_gates(lvlm, train, layers, v_detector, args):
    """Seed -> layer -> gate."""
    out = {}
    for seed in SEEDS:
        result = train_lsg(
            lvlm,
            train,
            layers=layers,
            v_detector=v_detector,
            seed=seed,
            epochs=args.epochs,
            batch=args.batch,
            lr=args.lr,
            validation=0.1,
            progress=False,
        )
        out[seed] = result.gates
    return out


def choose_layer(lvlm, gates, held, rules):
    """The layer whose gates, over all seeds, answer best on validation scenes."""
    layers = list(gates[SEEDS[0]])
    made = {str(layer): per_seed(*[[gates[s][layer]] for s in SEEDS]) for layer in layers}
    name, right = best(lvlm, made, held, rules)
    chosen = next(layer for layer in layers if str(layer) == name)
    return chosen, {str(k): round(float(v), 4) for k, v in right.items()}


def one_setting(lvlm, name, data, rules, args):
    """All methods with one pair of detectors: conditions by name, and what was chosen."""
    layers = ["embed", *range(lvlm.anatomy.language.n_layers - 1)]
    cell, cell_name, cell_right = choose_cell(lvlm, data["validation"], rules)
    say(name, "fixed coefficients", cell_name, cell_right)
    weights, weights_name, _ = choose_weights(lvlm, data["validation"], rules)
    say(name, "token weights", weights_name)
    gates = train_gates(lvlm, data["train"], layers, rules["v_detector"], args)
    layer, by_layer = choose_layer(lvlm, gates, data["validation"], rules)
    say(name, "gates by layer", by_layer)
    stacks = [
        greedy_stack(lvlm, list(gates[s].values()), data["validation"], progress=False)
        for s in SEEDS
    ]
    members = [[gate.layer for gate in stack.gates] for stack in stacks]
    say(name, "stacks", members)
    made = {
        f"VAR, paper, {name}": baselines.var("paper"),
        f"VAR, code, {name}": baselines.var("code"),
        f"sink to the front, {name}": baselines.sink_to_front(),
        f"token weights, {name}": weights,
        f"fixed coefficients, {name}": cell,
        f"LSG, one layer, {name}": per_seed(*[[gates[s][layer]] for s in SEEDS]),
        f"LSG, stack, {name}": per_seed(*[stack.gates for stack in stacks]),
    }
    chosen = {
        "fixed": cell_name,
        "weights": weights_name,
        "layer": layer,
        "gates_by_layer": by_layer,
        "stacks": members,
        "v_detector": repr(rules["v_detector"]),
        "l_detector": repr(rules["l_detector"]),
    }
    if name == NORM:
        drawn = {}
        for seed in SEEDS:
            rule = RandomTokens(FLAGGED, seed)
            drawn[seed] = train_gates(lvlm, data["train"], [layer], rule, args)[seed][layer]
        made["LSG, random tokens"] = per_seed(*[[drawn[s]] for s in SEEDS])
        controls = [baselines.random_tokens(cell, seed=s) for s in SEEDS]
        made["fixed coefficients, random tokens"] = per_seed(*controls)
    return made, chosen, gates[SEEDS[0]][layer]


def train_lora(lvlm, train, gate, args):
    """One adapter per seed, of the size of the gate, in the block whose output the gate reads."""
    layer = 0 if gate.layer == "embed" else gate.layer
    options = {"like": gate, "epochs": args.epochs, "batch": args.batch, "lr": args.lr}
    return [baselines.lora(lvlm, train, layer, seed=s, **options) for s in SEEDS]


def one_kind(lvlm, kind, args):
    """Everything on one kind of scenes."""
    options = DATA[kind]
    data = {
        "train": questions(TRAIN_SEEDS, args.train, 4, options),
        "validation": questions(VALIDATION_SEEDS, args.held, 8, options, start=100),
        "test": questions(TEST_SEEDS, args.images, 8, options),
    }
    samples = samples_of(lvlm, questions(VALIDATION_SEEDS, 16, 1, options))
    rules = {NONE: found_rules(lvlm, samples), NORM: loose_rules(lvlm, samples)}
    tables, chosen = [], {}
    for name in (NONE, NORM):
        made, chosen[name], gate = one_setting(lvlm, f"{name}", data, rules[name], args)
        if name == NONE:
            adapters = train_lora(lvlm, data["train"], gate, args)
            say("LoRA", adapters[0])
            made["LoRA"] = per_seed(*adapters)
            chosen["lora"] = {
                "rank": adapters[0].rank,
                "parameters": adapters[0].parameters,
                "gate_parameters": adapters[0].wanted,
                "matrices": list(adapters[0].factors),
            }
        got = ss.compare(lvlm, data["test"], {"base": [], **made}, **rules[name], progress=False)
        keep = got.table if name == NONE else got.table[got.table["condition"] != "base"]
        tables.append(keep)
        say(kind, name, "scored")
    return Comparison(pd.concat(tables, ignore_index=True), "base"), chosen


def choices_text(chosen):
    """What was chosen on validation scenes, in a few lines."""
    lines = []
    for name in (NONE, NORM):
        c = chosen[name]
        lines.append(
            f"- {name}: V rule `{c['v_detector']}`, L rule `{c['l_detector']}`; fixed coefficients at "
            f"layer {c['fixed']} (V, rest); token weights {c['weights']} (sink, rest); gate at layer "
            f"{c['layer']}; stacks {', '.join(str(s) for s in c['stacks'])}."
        )
    size = chosen["lora"]
    lines.append(
        f"- LoRA: rank {size['rank']} on {len(size['matrices'])} matrices, {size['parameters']} "
        f"parameters; a gate has {size['gate_parameters']}."
    )
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=100, help="test scenes, 8 questions each")
    parser.add_argument("--train", type=int, default=250, help="training scenes, 4 questions each")
    parser.add_argument("--held", type=int, default=25, help="validation scenes, 8 questions each")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--out", type=Path, default=OUT, help="where to write")
    args = parser.parse_args()
    lvlm = ss.load_bundled()
    args.out.mkdir(parents=True, exist_ok=True)
    parts, frames, body = [], [], {"settings": {k: str(v) for k, v in vars(args).items()}}
    for kind in DATA:
        got, chosen = one_kind(lvlm, kind, args)
        summary = got.summary()
        title = (
            "Scenes as the model knows them" if not DATA[kind] else f"Noisy scenes, {DATA[kind]}"
        )
        parts += [f"### {title}", "", got.to_markdown(), "Chosen on validation scenes:", ""]
        parts += [choices_text(chosen), ""]
        frames.append(summary.assign(scenes=kind))
        rows = json.loads(summary.to_json(orient="records"))
        body[kind] = {"chosen": chosen, "rows": rows}
        got.plot().savefig(args.out / f"bundled_comparison_{kind}.png", dpi=110)
    (args.out / "bundled_comparison.md").write_text("\n".join(parts))
    pd.concat(frames).to_csv(args.out / "bundled_comparison.csv", index=False)
    body["seconds"] = round(time.monotonic() - START)
    (args.out / "bundled_comparison.json").write_text(json.dumps(body, indent=1, default=str))
    say("done")


if __name__ == "__main__":
    main()
