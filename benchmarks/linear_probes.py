"""What the bundled model's states say about the scene, by layer and token group.

    python benchmarks/linear_probes.py --images 600
    python benchmarks/linear_probes.py --render     # the figure again, from the CSV
    python benchmarks/linear_probes.py --device cuda --dtype bfloat16 --out results-gpu

Scenes are test scenes, which the model has never seen; detectors are calibrated on validation scenes.
Writes a CSV with every number, a Markdown table and the figure, which the documentation includes.
"""

import argparse
import json
import sys
from pathlib import Path

import pandas as pd
import sklearn
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for what the benchmarks share

import sinkscope as ss
from benchmarks.placing import add_place, clock_of, device_of, dtype_of, machine_name
from sinkscope.bundled import VALIDATION_SEEDS, scene_attributes
from sinkscope.experiments import top_received
from sinkscope.viz import plot_probes

OUT = Path(__file__).parent / "results"
NAME = "linear_probes"


IN_FIRST_ROW = []  # for every one of the most attended tokens


def top_five(trace):
    chosen = top_received(trace, 5)
    IN_FIRST_ROW.extend((trace.sample.tokens.row[chosen] == 0).tolist())
    return chosen


def first_row(trace):
    return trace.ordinary() & (trace.sample.tokens.row == 0)


def markdown(summary, differences, conditions):
    """Means over layers, then differences of two groups by layer; keys are ``(group, base)``."""
    lines = [
        conditions,
        "",
        "| target | metric | group | mean over layers | 95 % | layers, worst to best | shuffled labels "
        "| most frequent class | layers above the null |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in summary.itertuples():
        cells = [row.note, "", "", "", "", ""]
        if not row.note:
            cells = [
                f"{row.accuracy:.3f}",
                f"{row.low:.3f} to {row.high:.3f}",
                f"{row.worst:.3f} to {row.best:.3f}",
                f"{row.null:.3f}",
                f"{row.majority:.3f}",
                f"{row.above_null:.0f} of {row.layers}",
            ]
        lines.append(f"| {row.target} | {row.metric} | {row.group} | {' | '.join(cells)} |")
    for (group, base), difference in differences.items():
        layers = sorted(set(difference["layer"]))
        lines += [
            "",
            f"{group} minus “{base}”, paired by image, with 95 % intervals:",
            "",
            "| target | metric | " + " | ".join(f"layer {layer}" for layer in layers) + " |",
            "|---|---|" + "---|" * len(layers),
        ]
        for (target, metric), part in difference.groupby(["target", "metric"], sort=False):
            cells = [f"{r.delta:+.3f} ({r.low:+.3f} to {r.high:+.3f})" for r in part.itertuples()]
            lines.append(f"| {target} | {metric} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def render(out):
    """The figure of the numbers in the CSV."""
    table = pd.read_csv(out / f"{NAME}.csv").fillna({"note": ""})
    plot_probes(table).savefig(out / f"{NAME}.png", dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=600, help="test scenes")
    parser.add_argument("--permutations", type=int, default=20, help="shuffles for the null")
    parser.add_argument("--layers", type=int, nargs="+", help="layers to probe (all)")
    add_place(parser)
    parser.add_argument("--out", type=Path, default=OUT, help="where to write")
    parser.add_argument("--render", action="store_true", help="draw what is there, measure nothing")
    args = parser.parse_args()
    if args.render:
        render(args.out)
        return
    device = device_of(args)
    lvlm = ss.load_bundled(dtype_of(args))
    lvlm.module.to(device)
    clock = clock_of(device, cpu_seconds=True)
    held = scene_attributes(8, seeds=VALIDATION_SEEDS)
    samples = [lvlm.prepare(images=r["image"], text=r["question"]) for r in held]
    calibration = ss.calibrate(lvlm, samples)
    groups = {
        **ss.experiments.sink_groups(),
        "top 5 attended": top_five,
        "all image tokens": "image",
        "last token": "last",
        "random, first row": ss.experiments.RandomGroup(5, 5, first_row),
    }
    start = clock()
    result = ss.linear_probes(
        lvlm,
        scene_attributes(args.images),
        groups=groups,
        v_detector=calibration.v_detector,
        l_detector=calibration.l_detector,
        permutations=args.permutations,
        layers=args.layers,
    )
    seconds = clock() - start
    differences = {
        ("The 5 most attended tokens", base): result.difference(base).query(
            "group == 'top 5 attended'"
        )
        for base in ("ordinary", "random, first row")
    }
    trained, tested = (len(part) for part in result.images)
    early = sum(IN_FIRST_ROW) / len(IN_FIRST_ROW)
    conditions = (
        f"{trained} test scenes train the probes and {tested} others test them; random tokens are 5, "
        f"drawn 5 times; the null is the mean of {args.permutations} shuffles. Detectors calibrated on "
        f"eight validation scenes. Vision tower: {calibration.vision.reason}. Language model: "
        f"{calibration.language.reason}. Of the 5 most attended tokens {early:.0%} lie in the first row "
        f"of the image. {machine_name(device)}, {torch.get_num_threads()} thread(s), "
        f"{args.dtype}, torch {torch.__version__}, scikit-learn {sklearn.__version__}: {seconds:.0f} "
        f"{'CPU ' if device.type == 'cpu' else ''}seconds."
    )
    args.out.mkdir(parents=True, exist_ok=True)
    text = markdown(result.estimates(), differences, conditions)
    print(text)
    (args.out / f"{NAME}.md").write_text(text)
    result.table.round(6).to_csv(args.out / f"{NAME}.csv", index=False)
    body = {"conditions": conditions, "not converged": int((~result.table["converged"]).sum())}
    (args.out / f"{NAME}.json").write_text(json.dumps(body, indent=1) + "\n")
    render(args.out)


if __name__ == "__main__":
    main()
