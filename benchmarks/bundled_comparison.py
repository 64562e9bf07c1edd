"""Prior methods and Layer-wise Sink Gating on the bundled model, on held-out questions.

    python benchmarks/bundled_comparison.py
    python benchmarks/bundled_comparison.py --render     # tables and figures again, from the JSON

Gates and LoRA are trained on training scenes, with three seeds each; layers, pairs of coefficients and
stacks are chosen on validation scenes; everything is scored on test scenes. Once on scenes as the
model knows them, where it is near its ceiling, and once with so much pixel noise that it is right in about
three of four answers. By the published criteria the model has no sinks. So every method is run twice: with
that finding, where all image tokens are "rest", and with a rule that flags as many patches as one
likes, those of the highest norm in the vision tower, which are *not* sinks by the published criteria.
"""

import argparse
import json
import re
import time
from pathlib import Path

import pandas as pd
import torch

import sinkscope as ss
from sinkscope import baselines
from sinkscope.bundled import TEST_SEEDS, TRAIN_SEEDS, VALIDATION_SEEDS, scene_questions
from sinkscope.detectors import Norm, RandomTokens, Received
from sinkscope.experiments import Comparison, per_seed
from sinkscope.viz import plot_effects
from sinkscope.viz.effects import comparison_markdown

OUT = Path(__file__).parent / "results"
SEEDS = (0, 1, 2)
DATA = {"standard": {}, "noisy": {"noise": 40.0}}
TITLES = {
    "standard": "Scenes as the model knows them",
    "noisy": "Noisy scenes: pixel noise of 40 grey levels instead of 5",
}
WEIGHTS = [(0.0, 1.0), (0.5, 1.0), (2.0, 1.0), (1.0, 0.5), (1.0, 2.0)]
FLAGGED = (
    4  # patches per image that the rule of high norms flags, on average of a few validation scenes
)
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


def flagged_by(lvlm, rule, records):
    """Patches that a V rule flags per image: the mean, and the share of images with any."""
    images = list({q["image_id"]: q for q in records}.values())
    counts = []
    for sample in samples_of(lvlm, images):
        found = ss.detectors.detect(
            lvlm, sample, rule, tower="vision", layers=[lvlm.anatomy.feed_layers[-1]]
        )
        patches = sample.tokens.vision.select("patch")
        counts.append(int((found.mask[:, 0] & patches).sum()))
    some = sum(count > 0 for count in counts) / len(counts)
    return {"mean": sum(counts) / len(counts), "images": some}


def choose_cell(lvlm, held, rules):
    """Layer and pair of the fixed coefficients, by the log-probability of the answers.

    Without sinks the pair (0, 1) changes nothing; what is best here is the best that does something.
    """
    made = ss.sweep(lvlm, held, v_detector=rules["v_detector"], progress=False)
    cells = made.map("all", column="logprob", draws=100)
    cells = cells[cells["delta"] != 0]
    top = cells.loc[cells["delta"].idxmax()]
    layer = "embed" if top["edited"] == 0 else int(top["edited"]) - 1
    pair = float(top["s_v"]), float(top["s_rest"])
    text = f"{layer}: {pair[0]:g}, {pair[1]:g}"
    return baselines.fixed_coefficients(layer, *pair), text, float(top["delta"])


def choose_weights(lvlm, held, rules):
    """Weights of tokens, by right answers; those that change nothing are left out."""
    made = {f"{s:g}, {r:g}": baselines.token_weights(s, r) for s, r in WEIGHTS}
    table = ss.compare(lvlm, held, {"base": [], **made}, **rules, progress=False).table
    touched = table.groupby("condition")["touched"].any()
    table = table[table["condition"].map(touched)]
    name = table.groupby("condition", sort=False)["correct"].mean().idxmax()
    return made[name], name


def train_gates(lvlm, train, layers, v_detector, args, seeds=SEEDS, folder=None):
    """Seed -> layer -> gate; with a folder, training goes on where it was killed."""
    out = {}
    for seed in seeds:
        result = ss.train_lsg(
            lvlm,
            train,
            layers=layers,
            v_detector=v_detector,
            seed=seed,
            epochs=args.epochs,
            batch=args.batch,
            lr=args.lr,
            validation=0.1,
            out=None if folder is None else folder / f"seed-{seed}",
            progress=False,
        )
        out[seed] = result.gates
    return out


def choose_layer(stacks):
    """The layer whose gates, over all seeds, have the lowest loss on validation scenes."""
    loss = {}
    for stack in stacks:
        for layer, value in zip(stack.order, stack.single, strict=True):
            loss.setdefault(layer, []).append(value)
    means = {layer: sum(values) / len(values) for layer, values in loss.items()}
    return min(means, key=means.get), {
        str(k): round(v, 4) for k, v in sorted(means.items(), key=str)
    }


def one_setting(lvlm, name, data, rules, args):
    """All methods with one pair of detectors: conditions by name, and what was chosen."""
    layers = ["embed", *range(lvlm.anatomy.language.n_layers - 1)]
    cell, cell_name, gain = choose_cell(lvlm, data["validation"], rules)
    say(name, "fixed coefficients", cell_name, gain)
    weights, weights_name = choose_weights(lvlm, data["validation"], rules)
    say(name, "token weights", weights_name)
    gates = train_gates(lvlm, data["train"], layers, rules["v_detector"], args)
    say(name, "gates trained")
    quiet = {"progress": False, "batch": 32}
    stacks = [
        ss.lsg.greedy_stack(lvlm, list(gates[s].values()), data["validation"], **quiet)
        for s in SEEDS
    ]
    layer, by_layer = choose_layer(stacks)
    members = [[gate.layer for gate in stack.gates] for stack in stacks]
    base = round(stacks[0].base, 4)
    say(name, "loss without a gate", base, "by layer", by_layer, "stacks", members)
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
        "loss_without_a_gate": base,
        "loss_by_layer": by_layer,
        "stacks": members,
        "v_detector": repr(rules["v_detector"]),
        "l_detector": repr(rules["l_detector"]),
    }
    if name == NORM:
        chosen["flagged"] = flagged_by(lvlm, rules["v_detector"], data["test"])
        seen = flagged_by(lvlm, rules["v_detector"], data["train"])
        chosen["random"] = max(1, round(seen["mean"]))
        say(name, "flags", chosen["flagged"], "in training", seen)
        drawn = {}
        for seed in SEEDS:
            rule = RandomTokens(chosen["random"], seed)
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
        stacks = ", ".join(str(s) if s else "none, because no stack gains" for s in c["stacks"])
        losses = ", ".join(f"{layer} {loss:.4f}" for layer, loss in c["loss_by_layer"].items())
        lines += [
            f"- {name}: V rule `{short(c['v_detector'])}`, L rule `{short(c['l_detector'])}`.",
            f"  Fixed coefficients at layer {c['fixed']} (V, rest); token weights {c['weights']} (sink, "
            f"rest). Gate at layer {c['layer']}; stack of each seed: {stacks}.",
            f"  Loss in nats per answer token without a gate {c['loss_without_a_gate']:.4f}, with one "
            f"at layer: {losses} (mean over seeds).",
        ]
        if "flagged" in c:
            flagged = c["flagged"]
            lines.append(
                f"  On test scenes the V rule flags {flagged['mean']:.2f} of 64 patches on average, and any "
                f"in {flagged['images']:.0%} of the images. The gate of random tokens takes {c['random']} "
                "in every image, the rounded mean of the training scenes."
            )
    size = chosen["lora"]
    lines.append(
        f"- LoRA: rank {size['rank']} on {len(size['matrices'])} matrices of one block, "
        f"{size['parameters']} parameters; a gate has {size['gate_parameters']}."
    )
    return "\n".join(lines)


def short(rule):
    """A detector's text without what is not used and with few digits."""
    text = re.sub(r"\d+\.\d{4,}", lambda found: f"{float(found[0]):.4g}", rule)
    return re.sub(r", gap=1.5|eps=0.3, |, strict=(True|False)", "", text)


def save(out, kind, got, chosen, args):
    """Put one kind of scenes beside those that are there."""
    path = out / "bundled_comparison.json"
    body = json.loads(path.read_text()) if path.is_file() else {}
    body[kind] = {
        "settings": {
            name: str(value) for name, value in vars(args).items() if name not in ("out", "render")
        },
        "chosen": chosen,
        "rows": json.loads(got.estimates().to_json(orient="records")),
        "seconds": round(time.monotonic() - START),
    }
    path.write_text(json.dumps(body, indent=1, default=str))
    render(out, body)


def render(out, body):
    """Tables and figures of the numbers in the JSON."""
    parts, frames = [], []
    for kind in (kind for kind in DATA if kind in body):
        rows = pd.DataFrame(body[kind]["rows"])
        frames.append(rows.assign(scenes=kind))
        parts += [f"### {TITLES[kind]}", "", comparison_markdown(rows)]
        parts += ["Chosen on validation scenes:", "", choices_text(body[kind]["chosen"]), ""]
        plot_effects(rows).savefig(out / f"bundled_comparison_{kind}.png", dpi=110)
    (out / "bundled_comparison.md").write_text("\n".join(parts))
    pd.concat(frames).to_csv(out / "bundled_comparison.csv", index=False)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenes", nargs="+", choices=list(DATA), default=list(DATA))
    parser.add_argument("--images", type=int, default=100, help="test scenes, 8 questions each")
    parser.add_argument("--train", type=int, default=120, help="training scenes, 4 questions each")
    parser.add_argument("--held", type=int, default=25, help="validation scenes, 8 questions each")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--out", type=Path, default=OUT, help="where to write")
    parser.add_argument("--render", action="store_true", help="draw what is there, measure nothing")
    args = parser.parse_args()
    if args.render:
        render(args.out, json.loads((args.out / "bundled_comparison.json").read_text()))
        return
    lvlm = ss.load_bundled()
    args.out.mkdir(parents=True, exist_ok=True)
    for kind in args.scenes:
        got, chosen = one_kind(lvlm, kind, args)
        save(args.out, kind, got, chosen, args)
    say("done")


if __name__ == "__main__":
    main()
