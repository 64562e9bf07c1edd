"""What CLS, the most attended patches, random patches and all patches say about a scene, by layer."""

import pandas as pd

import sinkscope as ss
from benchmarks.linear_probes import markdown
from benchmarks.paper.effects import TOP, TopPatches, cls_token
from benchmarks.paper.setting import (
    L_RULE,
    SPLITS,
    V_RULE,
    Kept,
    columns_of,
    records_of,
    told,
    write,
)
from sinkscope.bundled import draw_scene
from sinkscope.bundled.scenes import all_questions

NAME = "example_probes"
CLS, MOST = "CLS", f"{TOP} most attended patches"
ONE, SEVERAL = "1 random patch", f"{TOP} random patches"
PAIRS = ((CLS, ONE), (CLS, "all patches"), (MOST, SEVERAL))
"""Which groups are compared, layer by layer."""
SHOWN = (CLS, MOST, ONE, "all patches")
"""Which groups the figure shows."""


def scenes(images, noise, start):
    """Scenes and what is true about them; the prompt asks how many shapes there are."""
    for seed in SPLITS["test"][start : start + images]:
        scene = draw_scene(seed, noise=noise)
        yield {
            "image": scene.image,
            "question": all_questions(scene)[0].text,
            "attributes": {
                "background": scene.background,
                "count": scene.count,
                "largest size": scene.largest_size,
                "colours": set(scene.colours_present),
                "shapes": set(scene.shapes_present),
            },
            "image_id": seed,
        }


def patches(trace):
    """Image tokens other than CLS."""
    return (trace.sample.tokens.image >= 0) & ~trace.v_sinks


def groups_of(lvlm, repeats):
    return {
        CLS: cls_token,
        MOST: TopPatches(lvlm.anatomy.feed_layers[-1]),
        ONE: ss.experiments.RandomGroup(1, repeats, patches),
        SEVERAL: ss.experiments.RandomGroup(TOP, repeats, patches),
        "all patches": patches,
        "last token": "last",
    }


def measure(lvlm, args, clock):
    settings = {
        "model": args.model,
        "noise": args.noise,
        "start": args.start,
        "images": args.images,
        "layers": args.layers,
        "permutations": args.permutations,
        "repeats": args.repeats,
        "v_rule": repr(V_RULE),
    }
    kept = Kept.open(args.keep / NAME, settings, lvlm, clock)
    if kept.read("found"):
        return
    found = ss.linear_probes(
        lvlm,
        scenes(args.images, args.noise, args.start),
        groups=groups_of(lvlm, args.repeats),
        layers=[int(layer) for layer in args.layers] if args.layers else None,
        v_detector=V_RULE,
        l_detector=L_RULE,
        permutations=args.permutations,
        n_jobs=args.jobs,
        batch=8,
        progress=False,
    )
    found.table.to_csv(kept.folder / "table.csv", index=False)
    found.rows.to_csv(kept.folder / "rows.csv.gz", index=False)
    kept.note("found", {"classes": found.classes, "images": found.images, "site": found.site})
    kept.beat()


def read(kept):
    """The probes as they were."""
    body = kept.read("found")
    table = pd.read_csv(kept.folder / "table.csv").fillna({"note": ""})
    rows = pd.read_csv(kept.folder / "rows.csv.gz")
    return ss.experiments.LinearProbes(
        table, rows, body["classes"], tuple(body["images"]), body["site"], ""
    )


def render(args):
    kept = Kept(args.keep / NAME).check("found")
    found, body = read(kept), {**kept.read("settings"), **kept.read("machine")}
    pairs = {
        (group, base): found.difference(base).query("group == @group") for group, base in PAIRS
    }
    trained, tested = map(len, found.images)
    conditions = (
        f"{trained} test scenes (noise {body['noise']:g}) train the probes and {tested} others test them; random "
        f"tokens are drawn {body['repeats']} times; the null is the mean of {body['permutations']} shuffles. "
        f"CLS by the V rule `{body['v_rule']}`. {told(body)}"
    )
    body |= {"summary": records_of(found.estimates()), "cells": columns_of(found.table)}
    body |= {f"{one} minus {other}": records_of(table) for (one, other), table in pairs.items()}
    text = markdown(found.estimates(), pairs, conditions)
    write(args.out, NAME, body, text, {NAME: found.plot(groups=SHOWN)})
