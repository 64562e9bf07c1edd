"""Call the public API with one or two wrong arguments at a time, and sort what comes back.

    python scripts/fuzz_calls.py                      3,500 calls with seed 0
    python scripts/fuzz_calls.py --calls 500 --seed 7 --only sweep,LSG

A `SinkscopeError` that says what was expected is helpful. Any other exception is a raw error, unless
`ALLOWED` lists it with a reason. Calls that return are counted, and listed with --accepted. The exit status is
1 if there is a raw error or a message without advice.
"""

import argparse
import collections
import contextlib
import io
import math
import os
import random
import re
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pandas as pd
import torch
from PIL import Image

import sinkscope as ss
from sinkscope.errors import SinkscopeError

SECONDS = 6  # a call that takes longer is stopped
# Exception type and a pattern of its message -> why no SinkscopeError is expected.
ALLOWED: dict[tuple[str, str], str] = {
    (
        "TypeError",
        r"(unexpected keyword|required keyword|missing \d|positional argument)",
    ): "Python's own",
    ("TimeoutError", ""): "as long as was asked for: thousands of tokens or draws",
    ("TypeCheckError", ""): "the tests check annotations, as users do not",
}


HOSTS: list[Any] = []  # a Hugging Face model and its processor, where others are expected


def junk() -> list[Any]:
    """Wrong values of every kind; made anew for every call, because some can be used once."""
    return [
        *(None, True, False, -1, 0, 1, 2, 7, 10**9, 1.5, -0.5, math.nan, math.inf, 1e308, 3 + 1j),
        *("", "image", "x", "vision", "all", "last", "../..", "a" * 5000, "\0", b"x"),
        *([], [0], [-1], [1.9], [True], ["x"], [None], (), (0, 0), (1, 2, 3), {}, {"a": 1}, {1, 2}),
        *(
            object(),
            int,
            len,
            range(3),
            slice(0, 4),
            iter([]),
            ValueError("x"),
            Path("/nowhere"),
            ...,
        ),
        *(torch.zeros(0), torch.ones(2, 3), torch.tensor(True), torch.full((1, 9), math.nan)),
        *(np.zeros((0, 0)), np.int64(3), np.float32(0.5), np.array(["x"]), pd.DataFrame(), pd.NA),
        *HOSTS,
        *(
            Image.new("RGB", (1, 1)),
            torch.nn.Linear(2, 2),
            lambda *given: None,
            [[[]]],
            "5",
            [10**9],
        ),
    ]


class Bench:
    """A tiny model, samples, records and results that valid calls are made of."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
        os.chdir(self.folder)  # where files of wrong names may be written
        HOSTS[:] = ss.testing.tiny_llava()
        self.lvlm = ss.LVLM(*HOSTS)
        self.image = ss.testing.random_image()
        self.sample = self.lvlm.prepare(images=self.image, text="What is there?")
        self.batch = self.lvlm.prepare(
            images=[self.image] * 2, text=["What?", "Is it a red square?"]
        )
        self.records = [
            {
                "image": ss.testing.random_image(seed=i),
                "question": "What is it?",
                "answer": "a circle",
            }
            | {"image_id": i, "task": "ab"[i % 2]}
            for i in range(4)
        ]
        self.labelled = [
            {
                "image": ss.testing.random_image(seed=i),
                "attributes": {"even": i % 2, "third": i % 3},
            }
            for i in range(24)
        ]
        self.v, self.low = ss.detectors.Norm(30.0), ss.detectors.Massive(1.0, 9.0)
        self.trace = ss.trace_sinks(self.lvlm, self.sample, self.v, self.low)
        self.mass = ss.AttentionMass(self.trace.groups)
        self.received = ss.ReceivedAttention()
        self.run = self.lvlm.run(self.sample, [self.mass, self.received])
        self.gate = ss.LSG.for_model(self.lvlm, layer=0, v_detector=self.v)
        self.saved = self.folder / "gate"
        self.gate.save_pretrained(self.saved)
        rules = {"v_detector": self.v, "l_detector": self.low, "progress": False}
        self.compared = ss.compare(
            self.lvlm, self.records, {"base": [], "mask": [ss.MaskKeys("first")]}, **rules
        )
        self.rules = rules
        self.kept = self.run.save(self.folder / "run.safetensors")
        self.checkpoint = self.folder / "model"
        self.lvlm.module.save_pretrained(self.checkpoint)
        self.lvlm.processor.save_pretrained(self.checkpoint)
        other = self.lvlm.prepare(
            images=[ss.testing.random_image(seed=9)] * 2, text=["What?", "Is it a red square?"]
        )
        self.other = self.lvlm.run(other, [ss.probes.ResidualStates(layers=[1], site="resid_post")])

    def place(self) -> Path:
        """A folder that is not there yet."""
        return Path(tempfile.mkdtemp(dir=self.folder)) / "out"


Target = tuple[Callable[..., Any], dict[str, Any]]


def targets(b: Bench) -> Iterator[tuple[str, Target]]:
    """Every target: its name, what to call with keywords, and keywords that are valid."""
    lvlm, sample, batch = b.lvlm, b.sample, b.batch

    def probe(kind: Any) -> Callable[..., Any]:
        return lambda **given: lvlm.run(batch, [kind(**given)])

    def edit(kind: Any) -> Callable[..., Any]:
        return lambda **given: lvlm.run(batch, [], [kind(**given)])

    def in_trace(**given: Any) -> Any:
        with lvlm.trace(sample):
            kept = lvlm.site(**given).save()
        return kept  # noqa: RET504  it exists behind the block only

    def rule(kind: Any, tower: Any = "language") -> Callable[..., Any]:
        return lambda **given: ss.detect(lvlm, sample, kind(**given), tower=tower)

    some = {"layers": [1], "tower": "language"}
    late = batch.tokens.image >= 0
    late &= late.cumsum(1) == 2  # the second of the image tokens
    alone = (sample.tokens.image >= 0) & ((sample.tokens.image >= 0).cumsum(1) == 2)
    groups = {"groups": {"image": "image", "text": "text"}}
    p, i, d, e = ss.probes, ss.interventions, ss.detectors, ss.experiments
    for kind, given in (
        (
            p.AttentionMass,
            {**groups, **some, "queries": "last", "null": True, "precision": "model"},
        ),
        (p.AttentionEntropy, {**groups, **some, "queries": "last"}),
        (p.AttentionPatterns, {"rows": "last", **some}),
        (p.ReceivedAttention, {**some, "queries": None, "null": True, "others": True}),
        (p.ContributionNorms, {**groups, **some}),
        (p.HeadWrites, some),
        (p.ValueNorms, some),
        (p.AttentionValues, {**some, "tokens": "image"}),
        (p.MassiveActivations, {**some, "k": 2, "site": "resid_post"}),
        (p.TokenNorms, {**some, "site": "resid_pre"}),
        (p.SinkDimensionScores, {"dims": [1, 5], **some, "normalize": "rms", "site": "resid_pre"}),
        (p.CosineToFirst, {**some, "site": "resid_pre"}),
        (p.ResidualStates, {"tokens": "image", **some, "site": "resid_post"}),
        (p.GroupMeans, {**groups, **some, "site": "resid_pre"}),
        (p.ChannelValues, {"channels": [3], **some, "sites": ("resid_pre", "mlp_out")}),
        (p.LogitLens, {"positions": "last", **some, "k": 3, "site": "resid_post"}),
        (p.SinkEvidence, some),
    ):
        yield kind.__name__, (probe(kind), given)
    where = {"layers": [1], "steps": "all", "tower": "language", "allow_noop": False}
    calls = {**where, "heads": [0], "queries": "last"}
    for kind, given in (
        (i.MaskKeys, {"tokens": "image", **calls}),
        (i.ScaleKeys, {"tokens": "image", "factor": 0.5, **calls}),
        (i.ScaleAttention, {"tokens": "image", "factor": 0.5, "renormalize": False, **calls}),
        (i.AttentionTemperature, {"temperature": 0.5, **calls}),
        (i.AttentionKnockout, {"queries": "last", "keys": "image", **where, "heads": [0]}),
        (
            i.Redistribute,
            {"source": "first", "target": "image", "recycle": 0.5, **where, "heads": None},
        ),
        (i.AblateValues, {"tokens": "image", "replacement": "zero", **calls}),
        (
            i.AblateActivations,
            {"dims": [1], "tokens": "image", "replacement": "zero", "site": "resid_post"}
            | {**where, "steps": "prefill"},
        ),
        (
            i.ScaleTokens,
            {"tokens": "image", "factor": 0.5, "steps": "prefill", "tower": "language"},
        ),
        (i.EvictKeys, {"start": 2, "recent": 6, **where}),
        (i.SinkToFront, {"tokens": late, "steps": "prefill"}),
        (i.TestTimeRegister, {"neurons": {0: [1]}, "count": 1, "scale": 1.0, "fill": "zero"}),
        (
            i.PatchActivations,
            {"from_run": b.other, "site": "resid_post"} | {"tokens": "image", "layers": [1]},
        ),
    ):
        yield kind.__name__, (edit(kind), given)
    for kind, given in (
        (d.SinkDimensions, {"dims": (1, 5), "tau": 2.0, "normalize": "rms", "strict": True}),
        (d.Massive, {"absolute": 1.0, "ratio": 2.0, "strict": True}),
        (d.Norm, {"tau": 2.0, "gap": 1.5, "strict": False}),
        (d.ZScore, {"z": 1.0, "strict": True}),
        (d.Received, {"eps": 0.1, "times_null": None, "heads": "max", "strict": True}),
        (d.CosineToBOS, {"threshold": 0.5, "strict": True}),
        (d.Gap, {"gap": 3.0, "medians": 20.0, "draws": 0.06, "growth": 2.0, "strict": False}),
        (d.RandomTokens, {"count": 2, "seed": 0}),
        (d.Limits, {"score": "ratio", "limits": (1.0, 1.0, 1.0), "dims": (), "strict": False}),
    ):
        yield kind.__name__, (rule(kind), given)
    yield (
        "VisionTokens",
        (
            lambda **x: d.VisionTokens(**x).probe("vision", None, lvlm.anatomy.vision),
            {"kind": "cls"},
        ),
    )
    yield (
        "detect",
        (
            ss.detect,
            {"lvlm": lvlm, "sample": sample, "detector": b.low, "tower": "language", "layers": [1]},
        ),
    )
    yield (
        "detect_all",
        (d.detect_all, {"lvlm": lvlm, "sample": sample, "detectors": {"a": b.low}, "layers": [1]}),
    )
    yield (
        "agreement",
        (d.agreement, {"detections": {"a": b.trace.l_detection, "b": b.trace.l_detection}}),
    )
    yield "jaccard", (d.jaccard, {"one": b.trace.l_detection, "other": b.trace.l_detection})
    yield (
        "calibrate",
        (
            ss.calibrate,
            {
                "lvlm": lvlm,
                "samples": [sample, sample],
                "draws": 0.06,
                "spike": 2.0,
                "max_dims": 2,
                "towers": ("language",),
                "progress": False,
            },
        ),
    )
    yield (
        "trace_sinks",
        (
            ss.trace_sinks,
            {
                "lvlm": lvlm,
                "sample": sample,
                "v_detector": b.v,
                "l_detector": b.low,
                "calibration": None,
                "merge": "max",
                "draws": 0.06,
            },
        ),
    )
    yield (
        "trace_generation",
        (
            ss.trace_generation,
            {
                "lvlm": lvlm,
                "sample": sample,
                "l_detector": b.low,
                "trace": b.trace,
                "draws": 0.2,
                "max_new_tokens": 2,
            },
        ),
    )
    yield "prepare", (lvlm.prepare, {"images": b.image, "text": "What is there?"})
    yield "prepare batch", (lvlm.prepare, {"images": [b.image, b.image], "text": ["a b", "c"]})
    yield (
        "prepare inputs",
        (
            lambda **given: lvlm.run(lvlm.prepare(inputs=dict(sample.inputs) | given)),
            dict(sample.inputs),
        ),
    )
    yield (
        "run",
        (
            lvlm.run,
            {
                "sample": batch,
                "probes": [p.TokenNorms()],
                "interventions": [ss.MaskKeys("first")],
                "logits": "last",
            },
        ),
    )
    yield (
        "generate",
        (
            lvlm.generate,
            {
                "sample": batch,
                "probes": [p.TokenNorms()],
                "max_new_tokens": 2,
                "interventions": [ss.MaskKeys("first")],
                "do_sample": False,
                "use_cache": True,
            },
        ),
    )
    yield (
        "edited",
        (
            lambda **given: lvlm.edited(**given).__enter__(),
            {"interventions": [ss.MaskKeys("first")]},
        ),
    )
    yield "site", (in_trace, {"tower": "language", "layer": 1, "name": "resid_pre"})
    yield "LVLM", (ss.LVLM, {"module": lvlm.module, "processor": lvlm.processor, "verify": False})
    yield (
        "from_pretrained",
        (ss.LVLM.from_pretrained, {"name": b.checkpoint, "dtype": "auto", "verify": True}),
    )
    yield "draw_scene", (ss.bundled.draw_scene, {"seed": 3, "noise": 5.0, "contrast": 1.0})
    yield (
        "scene_questions",
        (
            lambda **given: list(ss.bundled.scene_questions(**given)),
            {"n_images": 1, "per_image": 2, "start": 0},
        ),
    )
    yield "LSG.for_model", (ss.LSG.for_model, {"lvlm": lvlm, "layer": 0, "v_detector": b.v})
    yield "LSG.from_pretrained", (ss.LSG.from_pretrained, {"path_or_repo": b.saved, "lvlm": lvlm})
    yield (
        "LSG.save_pretrained",
        (lambda **given: b.gate.save_pretrained(**given), {"folder": b.place()}),
    )
    yield "LSG.attach", (lambda **given: b.gate.attach(**given).detach(), {"model": lvlm.module})
    yield (
        "TrainingSettings",
        (
            ss.lsg.TrainingSettings,
            {
                "epochs": 1,
                "batch": 2,
                "accumulate": 1,
                "lr": 1e-3,
                "weight_decay": 0.0,
                "schedule": "cosine",
                "warmup": 0.1,
                "clip": 1.0,
                "evaluate_every": 0,
                "patience": 0,
            },
        ),
    )
    yield (
        "train_lsg",
        (
            ss.train_lsg,
            {
                "lvlm": lvlm,
                "dataset": b.records,
                "layers": [0],
                "v_detector": b.v,
                "epochs": 1,
                "batch": 4,
                "validation": 0.25,
                "progress": False,
                "dry_run": True,
            },
        ),
    )
    yield (
        "greedy_stack",
        (
            ss.lsg.greedy_stack,
            {
                "lvlm": lvlm,
                "gates": [b.gate],
                "dataset": b.records,
                "score": "loss",
                "batch": 4,
                "progress": False,
            },
        ),
    )
    yield (
        "gate_coefficients",
        (
            ss.gate_coefficients,
            {
                "lvlm": lvlm,
                "gates": b.gate,
                "dataset": b.records,
                "by": "task",
                "batch": 4,
                "progress": False,
            },
        ),
    )
    yield (
        "sweep",
        (
            ss.sweep,
            {
                "lvlm": lvlm,
                "dataset": b.records,
                "layers": [0],
                "grid": [(0.5, 0.5)],
                "by": "task",
                "score": "exact",
                "v_detector": b.v,
                "progress": False,
                "dry_run": True,
            },
        ),
    )
    yield "lsg_grid", (ss.lsg_grid, {"steps": 3, "groups": 2})
    yield (
        "compare",
        (
            ss.compare,
            {
                "lvlm": lvlm,
                "dataset": b.records,
                "batch": 4,
                **b.rules,
                "conditions": {"base": [], "mask": [ss.MaskKeys("first")]},
            },
        ),
    )
    yield "estimates", (b.compared.estimates, {"level": 0.9, "draws": 50, "seed": 0})
    yield (
        "linear_probes",
        (
            ss.linear_probes,
            {
                "lvlm": lvlm,
                "dataset": b.labelled,
                "targets": ["even"],
                "layers": [1],
                "v_detector": b.v,
                "l_detector": b.low,
                "progress": False,
            },
        ),
    )
    yield (
        "effect_conditions",
        (e.effect_conditions, {"edits": ("mask",), "layers": None, "top": 2, "controls": True}),
    )
    yield (
        "EditSinks",
        (
            lambda **given: e.EditSinks(**given)(b.trace),
            {
                "kind": "text sinks",
                "edit": "mask",
                "layers": [1],
                "control": False,
                "k": 1,
                "seed": 0,
            },
        ),
    )
    yield (
        "RandomControl",
        (
            lambda **given: ss.RandomControl(**given).run(lvlm, b.trace),
            {
                "intervention": ss.MaskKeys(alone),
                "match": "count",
                "n": 2,
                "seed": 0,
            },
        ),
    )
    yield (
        "cluster_bootstrap",
        (
            e.cluster_bootstrap,
            {
                "values": [1.0, 0.0, 1.0],
                "clusters": [1, 1, 2],
                "level": 0.95,
                "draws": 50,
                "seed": 0,
            },
        ),
    )
    yield (
        "sign_flip_maximum",
        (e.sign_flip_maximum, {"values": np.ones((3, 2)), "clusters": [1, 1, 2], "draws": 50}),
    )
    yield (
        "Questions",
        (
            lambda **given: list(e.Questions(**given)),
            {
                "source": "scenes",
                "split": "test",
                "limit": 2,
                "start": 0,
                "suffix": "",
                "per_image": 2,
            },
        ),
    )
    m, base = ss.published, ss.baselines
    tower = {"tower": "language"}
    for kind, given in (
        (m.sink_rate, {"eps": 0.3, "length": 20}),
        (m.massive_activations, {**tower, "layers": [1], "absolute": 1.0, "ratio": 2.0}),
        (m.outlier_tokens, {"tau": 20.0, "layer": 1}),
        (m.var, {"dims": [1, 5], "version": "paper", "tau": 1.5, "p": 0.6, "rho": 0.8}),
        (m.nop_broadcast, {**tower, "layers": [1]}),
    ):
        yield f"published.{kind.__name__}", (kind, {"lvlm": lvlm, "sample": sample, **given})
    given = {"norm": 20.0, "max_layer": 1, "top_k": 2, "layer": 1, "version": "code"}
    yield (
        "published.test_time_registers",
        (m.test_time_registers, {"lvlm": lvlm, "samples": [sample], **given}),
    )
    outliers = lvlm.run(sample, [p.TokenNorms(tower="vision")])["TokenNorms"].norms[:, -1] > 25.0
    yield (
        "find_register_neurons",
        (
            i.find_register_neurons,
            {"lvlm": lvlm, "samples": [sample], "tokens": [outliers], "top_k": 2, "max_layer": 1},
        ),
    )
    for kind, given in (
        (base.var, {"preset": "code", "layers": [2], "p": 0.6, "rho": 0.5, "rule": "live"}),
        (base.token_weights, {"sink": 0.5, "rest": 1.0, "sinks": "L-sinks"}),
        (base.sink_to_front, {"sinks": "L-sinks"}),
        (base.fixed_coefficients, {"layer": 0, "s_v": 0.5, "s_rest": 0.7}),
        (base.random_tokens, {"condition": e.EditSinks("L-sinks"), "count": None, "seed": 0}),
    ):
        yield f"baselines.{kind.__name__}", (kind, given)
    yield (
        "LiveRule",
        (
            lambda **x: lvlm.run(batch, [], [ss.MaskKeys(i.LiveRule(**x), allow_noop=True)]),
            {"detector": d.Norm(5.0), "among": "image", "frozen": None},
        ),
    )
    yield "scene_attributes", (lambda **x: list(ss.bundled.scene_attributes(**x)), {"n_images": 1})
    yield (
        "nop_or_broadcast",
        (e.nop_or_broadcast, {"ratio": 0.1, "stable_rank": 1.0, "event": True}),
    )
    yield (
        "cluster_intervals",
        (e.cluster_intervals, {"values": np.ones((3, 2)), "clusters": [1, 1, 2], "level": 0.9}),
    )
    yield (
        "replacement_table",
        (
            e.replacement_table,
            {"lvlm": lvlm, "trace": b.trace, "tokens": alone, "n": 2, "seed": 0},
        ),
    )
    yield "top_received", (e.top_received, {"trace": b.trace, "k": 2})
    yield "load_run", (ss.load_run, {"path": b.kept})
    yield "save", (lambda **given: b.run.save(**given), {"path": b.place()})
    yield (
        "l_sinks",
        (lambda **given: (b.trace.l_sinks(**given), b.trace.overlap(**given)), {"layer": 1}),
    )
    yield "to_json", (b.trace.to_json, {"path": b.folder / "trace.json"})
    yield "select", (lambda **given: b.sample.tokens.select(*given.values()), {"tokens": "image"})
    v = ss.viz
    yield (
        "write_report",
        (
            v.write_report,
            {"folder": b.place(), "trace": b.trace, "mass": None, "tables": None, "decoys": None}
            | {"title": "Sinks", "progress": False},
        ),
    )
    for plot, given in (
        (
            v.plot_sinks_on_image,
            {"trace": b.trace, "row": 0, "image": 0, "layer": 1, "decoys": None},
        ),
        (
            v.plot_received_map,
            {"trace": b.trace, "row": 0, "image": 0, "layer": 1, "heads": "mean", "unit": "null"},
        ),
        (v.plot_spikes, {"trace": b.trace, "row": 0}),
        (v.plot_tokens, {"trace": b.trace, "row": 0, "layer": 1}),
        (v.plot_heads, {"result": b.run[b.mass], "group": "text", "row": 0, "query": None}),
        (v.plot_received_heads, {"result": b.run[b.received], "pos": 3, "row": 0}),
        (v.plot_mass_by_layer, {"result": b.run[b.mass], "row": 0}),
        (v.plot_effects, {"summary": b.compared.estimates(draws=50), "tasks": None, "base": None}),
        (v.tokens_html, {"trace": b.trace, "row": 0, "layer": None}),
        (v.trace_summary, {"trace": b.trace, "limit": 3}),
        (v.trace_html, {"trace": b.trace, "limit": 3}),
        (v.plot_received_by_layer, {"trace": b.trace, "row": 0, "heads": "max"}),
        (v.plot_detections, {"trace": b.trace, "row": 0}),
        (v.plot_trace, {"trace": b.trace, "row": 0, "mass": b.run[b.mass]}),
        (v.effects_text, {"summary": b.compared.estimates(draws=50), "width": 100}),
    ):
        yield plot.__name__, (plot, given)


def shown(value: Any) -> str:
    """A value in few letters."""
    if torch.is_tensor(value):
        return f"tensor{tuple(value.shape)}:{value.dtype}"
    return re.sub(r"0x[0-9a-f]+", "0x", repr(value))[:40]


def call(function: Callable[..., Any], given: dict[str, Any]) -> tuple[str, str]:
    """What one call comes to: helpful, mute (an error without advice), raw or accepted; and details."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"over {SECONDS} s")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            function(**given)
    except SinkscopeError as error:
        said = str(error)
        advises = re.search(r"\b(expected|[Ww]rite|Did you mean|Known)\b", said)
        return ("helpful" if advises else "mute"), f"{type(error).__name__}: {said[:160]}"
    except Exception as error:  # noqa: BLE001  sorting all of them is the point
        for (kind, pattern), why in ALLOWED.items():
            if type(error).__name__ == kind and re.search(pattern, str(error)):
                return "allowed", why
        own = [f for f in traceback.extract_tb(error.__traceback__) if "/sinkscope/" in f.filename]
        at = (
            f"{own[-1].filename.rpartition('/sinkscope/')[2]}:{own[-1].lineno}"
            if own
            else "outside"
        )
        return (
            "raw",
            f"{type(error).__name__} at {at}: {str(error).splitlines()[0][:120] if str(error) else ''}",
        )
    finally:
        signal.alarm(0)
    return "accepted", ""


def main() -> int:
    """Make the calls and print what they come to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=3500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="names of targets, with commas between")
    parser.add_argument("--accepted", action="store_true", help="list what was accepted")
    asked = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    bench, random_ = Bench(), random.Random(asked.seed)
    known = dict(targets(bench))
    if asked.only:
        known = {name: known[name] for name in asked.only.split(",")}
    for name, (
        function,
        given,
    ) in known.items():  # a base that fails would hide everything behind it
        state, why = call(function, given)
        if state not in ("accepted", "helpful"):
            print(f"base of {name}: {state} {why}")
    found: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    first: dict[str, str] = {}
    for number in range(asked.calls):
        name = list(known)[number % len(known)]
        function, given = known[name]
        chosen = random_.sample(list(given), min(len(given), 1 + (random_.random() < 0.25)))
        wrong = {key: random_.choice(junk()) for key in chosen}
        state, why = call(function, given | wrong)
        words = ", ".join(f"{key}={shown(value)}" for key, value in wrong.items())
        line = why if state == "raw" else f"{name}({words}) {why}"
        found[state][line] += 1
        first.setdefault(line, f"{name}({words})")
    print(
        f"seed {asked.seed}:",
        ", ".join(f"{sum(c.values())} {state}" for state, c in sorted(found.items())),
    )
    for state in ("raw", "mute", *(["accepted"] if asked.accepted else [])):
        for line, count in found[state].most_common():
            print(f"{state} x{count} {line}" + (f"   <- {first[line]}" if state == "raw" else ""))
    return int(bool(found["raw"] or found["mute"]))


if __name__ == "__main__":
    sys.exit(main())
