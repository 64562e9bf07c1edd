"""What masking the bundled model's sinks, and as many random tokens, does to its answers.

    python scripts/bundled_effects.py --images 100 --per-image 8

Detectors are calibrated on validation scenes; answers are scored on test scenes. Writes a JSON with
every number and a Markdown table, which the documentation includes.
"""

import argparse
import json
from pathlib import Path

import sinkscope as ss
from sinkscope.bundled import VALIDATION_SEEDS, scene_questions
from sinkscope.experiments import effect_table
from sinkscope.experiments.effects import BASE
from sinkscope.viz import effects_text

OUT = Path(__file__).parent.parent / "benchmarks" / "results"


def markdown(summary, found):
    """The table, one line per task and condition; conditions that touched no row say none found."""
    lines = [
        "| task | condition | n | images | accuracy | 95 % | change | 95 % |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in summary.itertuples():
        cells = ["none found", "", "", ""]
        if row.condition == BASE or row.touched > 0:
            cells = [
                f"{row.accuracy:.3f}",
                f"{row.low:.3f} to {row.high:.3f}",
                f"{row.delta:+.3f}",
                f"{row.delta_low:+.3f} to {row.delta_high:+.3f}",
            ]
        lines.append(
            f"| {row.task} | {row.condition} | {row.n} | {row.images} | {' | '.join(cells)} |"
        )
    return "\n".join([found, "", *lines, ""])


def main():
    """Calibrate, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=100, help="test scenes")
    parser.add_argument("--per-image", type=int, default=8, help="questions about each")
    parser.add_argument("--top", type=int, default=4, help="attended image tokens to mask")
    parser.add_argument("--out", type=Path, default=OUT, help="where to write")
    args = parser.parse_args()
    lvlm = ss.load_bundled()
    held = scene_questions(8, 1, seeds=VALIDATION_SEEDS)
    samples = [lvlm.prepare(images=q["image"], text=q["question"]) for q in held]
    calibration = ss.calibrate(lvlm, samples, progress=True)
    print(calibration.to_dataframe().to_string())
    result = effect_table(
        lvlm,
        scene_questions(args.images, args.per_image),
        v_detector=calibration.v_detector,
        l_detector=calibration.l_detector,
        edits=("mask", "halve", "mean value"),
        top=args.top,
    )
    summary = result.summary()
    found = (
        f"Calibrated on eight validation scenes. Vision tower: {calibration.vision.reason}. "
        f"Language model: {calibration.language.reason}."
    )
    text = markdown(summary, found)
    print(effects_text(summary))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "bundled_effects.md").write_text(text)
    body = {"found": found, "rows": json.loads(summary.to_json(orient="records"))}
    (args.out / "bundled_effects.json").write_text(json.dumps(body, indent=1))


if __name__ == "__main__":
    main()
