"""What masking the bundled model's sinks, and as many random tokens, does to its answers.

    python scripts/bundled_effects.py --images 100 --per-image 8
    python scripts/bundled_effects.py --table-only

Detectors are calibrated on validation scenes; answers are scored on test scenes. Writes a JSON with
every number and a Markdown table, which the documentation includes; with --table-only the table alone,
from the numbers that are stored.
"""

import argparse
import json
from pathlib import Path

import pandas as pd

import sinkscope as ss
from sinkscope.bundled import VALIDATION_SEEDS, scene_questions
from sinkscope.experiments import effect_table
from sinkscope.experiments.baselines import BASE
from sinkscope.viz import effects_text
from sinkscope.viz.effects import comparison_markdown

OUT = Path(__file__).parent.parent / "benchmarks" / "results"


def markdown(summary, found):
    """What was found, the conditions that touched no row in one sentence, and the others as a table."""
    reached = summary.groupby("condition", sort=False)["touched"].max()
    idle = [name for name, touched in reached.items() if name != BASE and not touched > 0]
    shown = summary.loc[~summary["condition"].isin(idle)]
    lines = [found, ""]
    if idle:
        real = [name for name in idle if "random" not in name]
        lines += [
            f"None found: {len(idle)} of {len(reached) - 1} conditions had no token to edit in any row, so their "
            f"answers are those of the base and the table leaves them out. They are {', '.join(real)}, and "
            "for each of these the same edit of as many random tokens.",
            "",
        ]
    return "\n".join([*lines, comparison_markdown(shown, base=BASE)])


def main():
    """Calibrate, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=100, help="test scenes")
    parser.add_argument("--per-image", type=int, default=8, help="questions about each")
    parser.add_argument("--top", type=int, default=4, help="attended image tokens to mask")
    parser.add_argument("--out", type=Path, default=OUT, help="where to write")
    parser.add_argument("--table-only", action="store_true", help="measure nothing")
    args = parser.parse_args()
    if args.table_only:
        body = json.loads((args.out / "bundled_effects.json").read_text())
        text = markdown(pd.DataFrame(body["rows"]), body["found"])
        (args.out / "bundled_effects.md").write_text(text)
        return
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
    summary = result.estimates()
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
