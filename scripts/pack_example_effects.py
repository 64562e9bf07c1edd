"""Put the measured effects of masking into the package, where `sinkscope demo` shows them.

python -m benchmarks.paper effects          # measures; hours on two cores, minutes on a GPU
python scripts/pack_example_effects.py      # benchmarks/results -> sinkscope/example/effects.json
"""

import json
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "benchmarks" / "results" / "example_effects.json"
TARGET = ROOT / "sinkscope" / "example" / "effects.json"


def cell(line):
    """``-19.4 [-25.0, -14.7]`` points, or the accuracy of the base."""
    if line["condition"] == "base":
        return f"{100 * line['accuracy']:.1f} %"
    if line["changed"] == 0:
        return "0 (none changed)"
    low, high = (100 * line[f"delta_{end}"] for end in ("low", "high"))
    return f"{100 * line['delta']:+.1f} [{low:+.1f}, {high:+.1f}]"


def main():
    """Read the results, write the table of the demo."""
    measured = json.loads(SOURCE.read_text(encoding="utf-8"))
    by_condition, counts = {}, {}
    for line in measured["scopes"]:
        if line["task"] in ("global", "local"):
            row = by_condition.setdefault(line["condition"], {"masked": line["condition"]})
            row[f"{line['task']} questions"] = cell(line)
            counts[line["task"]] = line["n"]
    rows = list(by_condition.values())
    for row in rows:
        row["masked"] = row["masked"].removeprefix("mask ")
    rows[0]["masked"] = "nothing (accuracy)"
    notes = [
        f"Change of accuracy in points with 95 % intervals over images: {measured['images']} test scenes with "
        f"noise of {measured['noise']:g} grey levels, {counts['global']} global and {counts['local']} local "
        "questions, whole answers. Masked in all layers, but where said. Masking a random word of the question hurts too, so it is no neutral control."
    ]
    TARGET.write_text(json.dumps({"rows": rows, "notes": notes}, indent=1) + "\n", encoding="utf-8")
    print(TARGET.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
