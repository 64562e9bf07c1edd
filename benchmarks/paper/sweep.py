"""The layer x coefficient map with the ViT's CLS in the place of V-sinks."""

import sinkscope as ss
from benchmarks.paper.setting import V_RULE, Kept, columns_of, questions, records_of, told, write
from scripts.bundled_sweep import report

NAME = "example_sweep"
VARIANTS = {"cls": {}}
"""Name -> further options of `sinkscope.sweep`. Three groups would be ``{"grid": ss.lsg_grid(groups=3),
"l_detector": L_RULE}``, but no image token of this model's scenes is an L-sink: there is nothing to split."""
TITLES = {"cls": "the ViT's CLS, which is the first image token, in the place of V-sinks"}


def layers_of(names):
    """Layers from the command line; None for all."""
    return [n if n == "embed" else int(n) for n in names] if names else None


def measure(lvlm, args, clock):
    records = questions("test", args.images, args.per_image, args.noise, args.start)
    for name, options in VARIANTS.items():
        settings = {
            "model": args.model,
            "noise": args.noise,
            "per_image": args.per_image,
            "start": args.start,
            "chunk": args.chunk,
            "layers": args.layers,
            "v_rule": repr(V_RULE),
            "options": options,
        }
        kept = Kept.open(args.keep / f"{NAME}_{name}", settings, lvlm, clock)

        def cells(records, kept=kept, options=options):
            made = ss.sweep(
                lvlm,
                records,
                layers_of(args.layers),
                v_detector=V_RULE,
                progress=False,
                **options,
            )
            kept.note("sweep", {"settings": made.settings, "notes": made.notes})
            return made.table

        kept.run(records, args, cells)


def read(kept):
    """The sweep of all rows there are."""
    body = kept.read("sweep")
    return ss.experiments.Sweep(kept.rows(), body["settings"], tuple(body["notes"]))


def render(args):
    made, bodies, figures, lines = {}, {}, {}, []
    for name in VARIANTS:
        kept = Kept(args.keep / f"{NAME}_{name}").check("sweep")
        made[name] = sweep = read(kept)
        body = {**kept.read("settings"), **kept.read("machine")}
        lines += [f"{name}: noise {body['noise']:g}, V rule `{body['v_rule']}`. {told(body)}", ""]
        bodies[name] = {**body, "best": records_of(sweep.best()), "cells": columns_of(sweep.map())}
        figures[f"{NAME}_{name}"] = sweep.plot()
    text = "\n".join([*lines, report(made, TITLES)])
    write(args.out, NAME, bodies, text, figures)
