"""Precision and recall of detectors on models whose sinks we planted, by strength of the sinks.

    python benchmarks/planted_detectors.py --seeds 20 --out benchmarks/results/planted.json

Detectors with thresholds are calibrated on other seeds than they are scored on. The planted models
share their sink channels, as the models of one family do; positions, layers, background weights,
writers and decoys are drawn from the seed.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import sinkscope as ss
from sinkscope import detectors
from sinkscope.testing import plant

V_DIMS, L_DIMS = (90, 17), (41, 101)
CALIBRATION_SEEDS = range(1000, 1004)
STRENGTHS = (1.0, 0.5, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.0)
LAYOUTS = ("clip", "siglip")


@dataclass(frozen=True)
class Score:
    """Counts of found and planted tokens; `hits` are the planted tokens that were found."""

    hits: int = 0
    found: int = 0
    planted: int = 0

    @property
    def precision(self) -> float:
        """Share of the found tokens that were planted; 1 if nothing was found."""
        return self.hits / self.found if self.found else 1.0

    @property
    def recall(self) -> float:
        """Share of the planted tokens that were found; 1 if nothing was planted."""
        return self.hits / self.planted if self.planted else 1.0

    def __add__(self, other: "Score") -> "Score":
        return Score(self.hits + other.hits, self.found + other.found, self.planted + other.planted)


def score(found, planted) -> Score:
    """Count hits of one mask against another; ValueError if their shapes differ."""
    if found.shape != planted.shape:
        raise ValueError(
            f"Got masks of shapes {tuple(found.shape)} and {tuple(planted.shape)}; expected one shape"
        )
    return Score(int((found & planted).sum()), int(found.sum()), int(planted.sum()))


def make(seed, layout, strength=1.0):
    """A planted model: two V-sinks, two L-sinks, an overlap, decoys of both kinds, all by seed."""
    rng = np.random.default_rng(seed)
    patches = [int(p) for p in rng.permutation(64)[:8]]
    return plant(
        layout,
        v_sinks=tuple(patches[:3]),
        l_sinks=tuple(patches[2:5]),
        spike_decoys=(patches[5],),
        attention_decoys=(patches[6],),
        v_layer=int(rng.integers(0, 3)),
        l_layer=int(rng.integers(0, 5)),
        v_dims=V_DIMS,
        l_dims=L_DIMS,
        v_written_by=("mlp", "attention")[int(rng.integers(2))],
        strength=strength,
        seed=seed,
    )


def load(planted):
    lvlm = ss.LVLM(planted.model, planted.processor, verify=False)
    return lvlm, lvlm.prepare(inputs=planted.inputs())


def calibrated(layout, strength=1.0):
    """The median thresholds over the calibration seeds, and their channels."""
    v, low = [], []
    for seed in CALIBRATION_SEEDS:
        lvlm, sample = load(make(seed, layout, strength))
        found = ss.calibrate(lvlm, [sample])
        v.append(found.vision)
        low.append(found.language)
    assert all(set(t.dims) == set(V_DIMS) for t in v), [t.dims for t in v]
    assert all(set(t.dims) == set(L_DIMS) for t in low), [t.dims for t in low]
    return (
        detectors.SinkDimensions(V_DIMS, float(np.median([t.tau for t in v]))),
        detectors.SinkDimensions(L_DIMS, float(np.median([t.tau for t in low]))),
    )


def truth_of(planted, sample):
    """Masks of the planted kinds at LLM positions."""
    ids = sample.tokens.ids
    overlap = planted.tokens("overlap", ids)
    return {
        "V": planted.tokens("v_sinks", ids) | overlap,
        "L": planted.tokens("l_sinks", ids),
        "L rule": planted.tokens("l_sinks", ids) | overlap,
    }


def score_trace(planted, v_detector, l_detector):
    """Scores of the V-sinks and of the L-sinks in every layer after the one that writes them."""
    lvlm, sample = load(planted)
    trace = ss.trace_sinks(lvlm, sample, v_detector, l_detector)
    truth = truth_of(planted, sample)
    out = {"V": score(trace.v_sinks, truth["V"]), "L": Score()}
    for layer in range(trace.n_layers):
        there = truth["L"] if layer > planted.truth.l_layer else torch.zeros_like(truth["L"])
        out["L"] += score(trace.l_sinks(layer), there)
    return out


def single_detectors(v_detector, l_detector):
    """Detectors of one tower each, scored on every spiking or drawing token after its birth."""
    return {
        "vision": {
            "dims (calibrated)": v_detector,
            "massive 100 / 1000x": detectors.Massive(),
            "norm valley": detectors.Norm("valley"),
            "norm 3 sigma": detectors.Norm("3sigma"),
            "norm 100": detectors.Norm(100.0),
        },
        "language": {
            "dims (calibrated)": l_detector,
            "massive 100 / 1000x": detectors.Massive(),
            "received 5x null": detectors.Received(times_null=5.0),
            "cosine to first 0.9": detectors.CosineToBOS(0.9),
        },
    }


def score_singles(planted, singles):
    """Each detector alone: V-sinks in the feeding block, L-rule tokens in the last layer."""
    lvlm, sample = load(planted)
    truth = truth_of(planted, sample)
    feed = lvlm.anatomy.feed_layers[-1]
    last = lvlm.anatomy.language.n_layers - 1
    out = {}
    vision = ss.detectors.detect_all(lvlm, sample, singles["vision"], tower="vision", layers=[feed])
    for name, found in vision.items():
        carried = sample.tokens.from_vision(found.at(feed).float()).nan_to_num() > 0
        out["V", name] = score(carried, truth["V"])
    language = ss.detectors.detect_all(lvlm, sample, singles["language"], layers=[last])
    visual = sample.tokens.image >= 0
    for name, found in language.items():
        out["L", name] = score(found.at(last) & visual, truth["L rule"])
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20, help="seeds per layout and strength")
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    args = parser.parse_args()
    rules = {layout: calibrated(layout) for layout in LAYOUTS}
    rows = []
    for strength in tqdm(STRENGTHS, desc="strengths"):
        totals = {}
        for layout in LAYOUTS:
            singles = single_detectors(*rules[layout])
            for seed in range(args.seeds):
                planted = make(seed, layout, strength)
                got = score_singles(planted, singles)
                for kind, one in score_trace(planted, *rules[layout]).items():
                    got[kind, "trace_sinks"] = one
                for key, one in got.items():
                    totals[key] = totals.get(key, Score()) + one
        for (kind, name), total in totals.items():
            rows.append(
                {
                    "strength": strength,
                    "kind": kind,
                    "detector": name,
                    "precision": round(total.precision, 4),
                    "recall": round(total.recall, 4),
                }
            )
    text = table(rows)
    print(text)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.with_suffix(".md").write_text(text + "\n")
        body = {"seeds": args.seeds, "layouts": LAYOUTS, "rows": rows}
        args.out.write_text(json.dumps(body, indent=1))


def table(rows):
    """Precision / recall by detector and strength, as Markdown."""
    names = sorted({(r["kind"], r["detector"]) for r in rows})
    lines = [
        "| sinks | detector | " + " | ".join(f"{s:g}" for s in STRENGTHS) + " |",
        "|---|---|" + "---|" * len(STRENGTHS),
    ]
    for kind, name in names:
        cells = {r["strength"]: r for r in rows if (r["kind"], r["detector"]) == (kind, name)}
        values = [f"{cells[s]['precision']:.2f} / {cells[s]['recall']:.2f}" for s in STRENGTHS]
        lines.append(f"| {kind} | {name} | " + " | ".join(values) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
