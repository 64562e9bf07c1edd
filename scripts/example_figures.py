"""The figures of the example model in README and on the site: heads, prompt, and an answer step by step.

The model sees a drawn scene with two shapes and describes it. The rules are given here, so that the figures do
not change with the defaults: in the LLM spikes above 100 and 300 medians of the layer; in the vision tower, where
nothing spikes, at least 12 times uniform attention in some head, which only its CLS token receives.

    python scripts/example_figures.py
    python scripts/example_figures.py --model folder-of-a-model --out elsewhere
"""

from __future__ import annotations

import argparse
from pathlib import Path

from matplotlib.figure import Figure

import sinkscope as ss
from sinkscope.viz import plot_tokens

ASSETS = Path(__file__).parent.parent / "docs" / "assets"
SCENE = 11_000_029
QUESTION = "describe the picture."
L_RULE = ss.detectors.Massive(absolute=100.0, ratio=300.0)
V_RULE = ss.detectors.Received(times_null=12.0)
LARGEST = 150_000
"""Bytes of a picture: they are part of the repository."""


def make_figures(lvlm: ss.LVLM) -> dict[str, Figure]:
    """Name -> figure; prints what the figures show."""
    scene = ss.bundled.draw_scene(seed=SCENE)
    sample = lvlm.prepare(images=scene.image, text=QUESTION)
    trace = ss.trace_sinks(lvlm, sample, V_RULE, L_RULE)
    print(trace.summary(), "\n")
    mass = ss.AttentionMass(trace.groups)
    heads = lvlm.run(sample, [mass], logits="last")[mass]
    spoken = ss.trace_generation(lvlm, sample, L_RULE, trace=trace, max_new_tokens=48)
    print(spoken.summary())
    return {
        "example_heads": heads.plot_heads("text sinks"),
        "example_tokens": plot_tokens(trace),
        "example_generation": spoken.plot(),
    }


def main() -> None:
    """Draw and save them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", metavar="FOLDER", help="another model than the example")
    parser.add_argument("--out", type=Path, default=ASSETS, help=f"where to write ({ASSETS})")
    given = parser.parse_args()
    lvlm = ss.LVLM.from_pretrained(given.model) if given.model else ss.load_example()
    given.out.mkdir(parents=True, exist_ok=True)
    for name, figure in make_figures(lvlm).items():
        path = given.out / f"{name}.png"
        figure.savefig(path, dpi=120, facecolor="white")
        size = path.stat().st_size
        print(f"{path}: {size / 1000:.0f} kB")
        if size > LARGEST:
            raise SystemExit(f"{path} has {size} bytes; expected at most {LARGEST}.")


if __name__ == "__main__":
    main()
