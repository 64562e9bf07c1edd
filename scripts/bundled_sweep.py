"""The layer x coefficient map of the bundled model, twice, with tables and heat maps.

The model has no V-sinks by the published criteria, so in the first map s_V never applies and s_rest
scales every image token. The second map puts the most attended ViT tokens (at least five times their
null in some head of the block that feeds the projector) in the place of V-sinks. They are not sinks by
the paper's criteria; the map only shows what the machinery does where both coefficients act.

    python scripts/bundled_sweep.py
    python scripts/bundled_sweep.py --images 4 --out elsewhere
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

import sinkscope as ss

CALIBRATION_IMAGES = 8
TOP = ss.detectors.Received(times_null=5.0)
NAMES = {
    "published": "V-sinks by the published criteria (none in this model: s_rest scales every image token)",
    "attended": "the most attended ViT tokens in the place of V-sinks (not sinks by the paper's criteria)",
}


def sweeps(images: int, per_image: int, folder: Path | None) -> dict[str, ss.experiments.Sweep]:
    """Both sweeps, on test scenes; the rule for V-sinks is calibrated on validation scenes."""
    lvlm = ss.load_bundled()
    data = list(ss.bundled.scene_questions(images, per_image))
    seeds = ss.bundled.VALIDATION_SEEDS
    others = ss.bundled.scene_questions(CALIBRATION_IMAGES, 1, seeds=seeds)
    samples = [lvlm.prepare(images=q["image"], text=q["question"]) for q in others]
    rules = {"published": ss.calibrate(lvlm, samples).v_detector, "attended": TOP}
    made = {}
    for name, rule in rules.items():
        out = None if folder is None else folder / name
        result = ss.sweep(lvlm, data, v_detector=rule, out=out, progress=True)
        assert isinstance(result, ss.experiments.Sweep)
        made[name] = result
    return made


def report(made: dict[str, ss.experiments.Sweep], names: dict[str, str] = NAMES) -> str:
    """Sweeps in words and tables, as Markdown; their titles are in ``names``."""
    lines = []
    for name, sweep in made.items():
        once = sweep.table.drop_duplicates("item")
        head = names[name]
        lines += [
            f"**{head[0].upper()}{head[1:]}.** {len(once)} questions about "
            f"{once['image_id'].nunique()} test scenes; V-sinks per question: {once['n_v'].min()} to "
            f"{once['n_v'].max()}, mean {once['n_v'].mean():.1f} of {once['n_v'].add(once['n_rest']).max()}. "
            "The cell is chosen on half of the images and `change` is measured on the other half; "
            "`maximum` is the largest change of all cells on all images, without those that scale no key. "
            "`t` is the largest change in units of its own spread over images, beside the 95 % point of "
            "that where nothing has an effect.",
            "",
            "| task | n | base | best cell | change where chosen | change on others, 95 % | maximum | t | t 95 % | p |",
            "|---|---:|---:|---|---:|---:|---:|---:|---:|---:|",
        ]
        base = sweep.base().set_index("task")
        for row in sweep.best().to_dict("records"):
            layer = "embed" if row["layer"] == -1 else row["layer"]
            cells: list[Any] = [
                row["task"],
                base.loc[row["task"], "n"],
                f"{base.loc[row['task'], 'score']:.3f}",
                f"layer {layer}, ({row['s_v']:g}, {row['s_rest']:g})",
                f"{row['chosen_on']:+.3f}",
                f"{row['delta']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]",
                f"{row['maximum']:+.3f}",
                f"{row['t']:+.2f}",
                f"{row['t_95']:+.2f}",
                f"{row['p']:.3f}",
            ]
            lines.append(f"| {' | '.join(map(str, cells))} |")
        lines += ["", "```text", sweep.observations(), "```", ""]
    return "\n".join(lines)


def main() -> None:
    """Run, print, and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n    python")[0])
    parser.add_argument("--images", type=int, default=64, help="test scenes")
    parser.add_argument("--per-image", type=int, default=8, help="questions about each")
    parser.add_argument("--keep", type=Path, help="a folder for the sweeps themselves, to continue")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    made = sweeps(options.images, options.per_image, options.keep)
    options.out.mkdir(parents=True, exist_ok=True)
    text = report(made)
    print(text)
    (options.out / "bundled_sweep.md").write_text(text, encoding="utf-8")
    tables = {name: sweep.map().round(6).to_dict(orient="list") for name, sweep in made.items()}
    body = json.dumps(tables) + "\n"
    (options.out / "bundled_sweep.json").write_text(body, encoding="utf-8")
    for name, sweep in made.items():
        sweep.plot().savefig(options.out / f"bundled_sweep_{name}.png", dpi=110)


if __name__ == "__main__":
    main()
