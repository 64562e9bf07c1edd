"""The paper's analyses on a real model, with the ViT's CLS in the place of V-sinks.

    python -m benchmarks.paper effects                      # masking, beside random tokens
    python -m benchmarks.paper sweep                        # layer x coefficient
    python -m benchmarks.paper probes --jobs 2              # what CLS and patches say about a scene
    python -m benchmarks.paper gates                        # gates, fixed pairs, LoRA, prior methods
    python -m benchmarks.paper render effects sweep         # tables and figures of the rows there are

Rows are kept in --keep while it runs: after --seconds it stops, and started again it goes on. The parts
of the gates (one per seed, and "methods") may run in processes of their own, with --parts, and the images
of the others with --share; then add --rows-only, and render at the end. On two cores give --images 10 or so:
a question takes one to two seconds under each condition.
"""

import argparse
import warnings
from pathlib import Path

from benchmarks.paper import effects, gates, probes, sweep
from benchmarks.paper.setting import Clock, load

JOBS = {"effects": effects, "sweep": sweep, "probes": probes, "gates": gates}
GATED = ["embed", "2", "5", "8", "11", "15", "20"]
"""Layers that gates read: the last blocks leave little to change."""


def parser():
    made = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n    python")[0])
    made.add_argument("job", choices=[*JOBS, "render"])
    made.add_argument("of", nargs="*", choices=[[], *JOBS], help="what to render")
    add = made.add_argument
    add("--model", default="example", help="example, bundled, or a folder")
    add("--device", default="cpu", help="cpu or cuda")
    add("--images", type=int, help="test scenes (100; 48 for the sweep, 400 for probes)")
    add("--per-image", type=int, default=8, help="questions about each")
    add("--start", type=int, default=100, help="scenes of the test split to skip")
    add("--noise", type=float, help="grey levels (25; 40 for sweep and gates, which need room)")
    add("--chunk", type=int, default=5, help="images between two looks at the clock")
    add("--share", type=int, nargs=2, default=[0, 1], help="which of how many processes this is")
    add("--layers", nargs="+", help="layers of sweep, probes or gates")
    add("--seconds", type=float, default=float("inf"), help="when to stop measuring")
    add("--keep", type=Path, default=Path("build/paper"), help="rows on the way")
    add("--out", type=Path, default=Path("benchmarks/results"), help="tables and figures")
    add("--rows-only", action="store_true", help="leave tables and figures to render")
    add("--permutations", type=int, default=10, help="probes: shuffles for the null")
    add("--repeats", type=int, default=3, help="probes: draws of random tokens")
    add("--jobs", type=int, default=1, help="probes: processes that fit")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="gates: seeds")
    add("--parts", nargs="+", help="gates: some of the seeds, and methods; all by default")
    add(
        "--fixed",
        nargs=4,
        metavar=("LAYER", "S_V", "S_REST", "GAIN"),
        help="methods: the pair that an earlier search chose, with its gain in nats",
    )
    add("--train", type=int, default=150, help="gates: training scenes, 4 questions each")
    add("--held", type=int, default=25, help="gates: validation scenes, 8 questions each")
    add("--epochs", type=int, default=2)
    add("--batch", type=int, default=8)
    add("--lr", type=float, default=3e-3)
    return made


def main():
    args = parser().parse_args()
    warnings.filterwarnings("ignore")
    if args.job == "render":
        for name in args.of or JOBS:
            JOBS[name].render(args)
        return
    images, noise = {"sweep": (48, 40.0), "gates": (100, 40.0), "probes": (400, 25.0)}.get(
        args.job, (100, 25.0)
    )
    args.images = images if args.images is None else args.images
    args.noise = noise if args.noise is None else args.noise
    if args.job == "gates":
        args.layers = args.layers or GATED
        args.parts = args.parts or [gates.METHODS, *map(str, args.seeds)]
    clock = Clock.of(args.seconds)
    lvlm = load(args.model, args.device)
    clock.say(f"{lvlm} on {lvlm.device}")
    JOBS[args.job].measure(lvlm, args, clock)
    if not args.rows_only:
        JOBS[args.job].render(args)


if __name__ == "__main__":
    main()
