"""How many bytes a remote run sends and brings back, for a model of the shape of LLaVA-1.5-7B.

The model has the blocks, heads, tokens and vocabulary of LLaVA-1.5-7B (ViT of 24 blocks, 577 tokens and 16
heads; LLM of 32 blocks and heads; 576 image tokens and some text) with random weights of small width in
bf16, and the picture is noise, which compresses least. Every run takes nnsight's ``remote="local"``, which
makes the request and the result of a remote run; both are measured as they travel, compressed. Whole states
and value vectors depend on the width: for them the numbers of the 7B model are counted. Nothing is
downloaded.

    python -m benchmarks.remote_bytes
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported

import numpy as np
import torch
import transformers as hf
from PIL import Image

import sinkscope as ss
from sinkscope import detectors, probes
from sinkscope.probes.evidence import Closing
from sinkscope.testing import tiny
from sinkscope.testing.processors import llava_processor

OUT = Path(__file__).parent / "results"
TEXT = "what is on the table , and how many are red ? " * 4
WIDTH, VIT_WIDTH = 4096, 1024  # of the 7B model
PUBLISHED = detectors.Norm(100.0), detectors.SinkDimensions((17, 41), 10.0)


def model() -> tuple[ss.LVLM, Any]:
    """The model and its sample."""
    processor = llava_processor("clip", 336, 14)
    small = {"num_hidden_layers": 24, "num_attention_heads": 16, "hidden_size": 128}
    vision = hf.CLIPVisionConfig(**small, intermediate_size=64, image_size=336, patch_size=14)
    text = tiny.text_settings(processor, 32, 32, 32) | {"vocab_size": 32064, "hidden_size": 256}
    config = tiny.llava_config("clip", processor, vision, hf.LlamaConfig(**text, head_dim=8))
    made = tiny.build(hf.LlavaForConditionalGeneration, config, dtype=torch.bfloat16, init_std=0.05)
    lvlm = ss.LVLM(made, processor, verify=False)
    noise = np.random.default_rng(0).integers(0, 256, (336, 336, 3), dtype=np.uint8)
    return lvlm, lvlm.prepare(images=Image.fromarray(noise), text=TEXT)


def questions() -> dict[str, Any]:
    """Every probe as one would ask it of the LLM, in all layers."""
    groups = {"image": "image", "first": "first"}
    return {
        "AttentionEntropy, of the last token": probes.AttentionEntropy(groups, queries="last"),
        "AttentionMass, of the last token": ss.AttentionMass(groups, queries="last"),
        "AttentionMass, of every token": ss.AttentionMass(groups),
        "AttentionPatterns, of the last token": ss.AttentionPatterns("last"),
        "AttentionValues, of the first token": probes.AttentionValues(tokens="first"),
        "ChannelValues, two channels": probes.ChannelValues([17, 41]),
        "ContributionNorms": ss.ContributionNorms(groups),
        "CosineToFirst": probes.CosineToFirst(),
        "GroupMeans, two groups": probes.GroupMeans(groups),
        "HeadWrites": ss.HeadWrites(),
        "LogitLens": ss.LogitLens(),
        "MassiveActivations": ss.MassiveActivations(),
        "ReceivedAttention": ss.ReceivedAttention(),
        "ReceivedAttention, of others": ss.ReceivedAttention(others=True, events=True),
        "ResidualStates, of all tokens": probes.ResidualStates(),
        "SinkDimensionScores": ss.SinkDimensionScores([17, 41]),
        "SinkEvidence": probes.SinkEvidence(),
        "TokenNorms": ss.TokenNorms(),
        "ValueNorms": ss.ValueNorms(),
    }


def wide(tokens: int) -> dict[str, int]:
    """Bytes of answers that depend on the width, for the 7B model."""
    return {
        "AttentionValues, of the first token": 2 * 32 * WIDTH,
        "GroupMeans, two groups": 4 * 32 * 2 * WIDTH,
        "ResidualStates, of all tokens": 2 * 32 * tokens * WIDTH,
    }


def leaves(answer: Any, name: str = "") -> dict[str, torch.Tensor]:
    """The tensors of an answer by name."""
    if isinstance(answer, torch.Tensor):
        return {name: answer}
    found = {}
    for key, part in answer.items():
        found |= leaves(part, f"{name}.{key}".lstrip("."))
    return found


def traced(lvlm: ss.LVLM, sample: Any, **how: Any) -> tuple[Any, list[dict[str, Any]]]:
    """The traffic of a trace, and the tensors of its closing answers."""
    tensors, finish = [], Closing.finish

    def noted(self: Closing, answers: Any, context: Any) -> Any:
        for name, x in leaves(*answers.values()).items():
            size = {"bytes": x.nbytes, "shape": [*x.shape], "type": str(x.dtype)[6:]}
            tensors.append({"tower": self.tower, "tensor": name, **size})
        return finish(self, answers, context)

    Closing.finish = noted
    try:
        ss.trace_sinks(lvlm, sample, remote="local", **how)
    finally:
        Closing.finish = finish
    return lvlm.traffic, tensors


def main() -> None:
    """Measure and write the table."""
    lvlm, sample = model()
    tokens = sample.tokens.ids.shape[1]
    lvlm.run(sample, remote="local", logits="last")
    plain, lines = lvlm.traffic, []
    named = {"v_detector": PUBLISHED[0], "l_detector": PUBLISHED[1]}
    for said, how in {
        "trace_sinks, the gap rule": {},
        "trace_sinks, rules of channels and norms": named,
        "trace_sinks, detail='full'": {"detail": "full"},
    }.items():
        cost, tensors = traced(lvlm, sample, **how)
        lines.append({"what": said, "up": cost.up, "down": cost.down, "tensors": tensors})
    for said, probe in questions().items():
        lvlm.run(sample, [probe], remote="local", logits="last")
        line = {"what": said, "up": lvlm.traffic.up, "down": lvlm.traffic.down}
        if (count := wide(tokens).get(said)) is not None:
            line |= {"down": plain.down + count, "counted": True}
        lines.append(line)
    states = {"states of both towers": 2 * (33 * tokens * WIDTH + 25 * 577 * VIT_WIDTH)}
    states["attention matrices of both towers"] = 2 * (32 * 32 * tokens**2 + 24 * 16 * 577**2)
    body = {"tokens": tokens, "pass": vars(plain), "lines": lines, "whole": states}
    (OUT / "remote_bytes.json").write_text(json.dumps(body, indent=1) + "\n")
    (OUT / "remote_bytes.md").write_text(page(body))


def kilo(count: int) -> str:
    """A number of bytes."""
    return f"{count / 1e6:,.1f} MB" if count >= 1e6 else f"{count / 1e3:,.0f} kB"


def page(body: dict[str, Any]) -> str:
    """The tables."""
    out = [
        "# Bytes of a remote run\n",
        f"`benchmarks/remote_bytes.py`: the shape of LLaVA-1.5-7B, one question of {body['tokens']} tokens, "
        "bf16. As they travel, compressed; the inputs (pixels) are most of what goes up, and the logits of "
        "the last token are in what comes down.\n",
        "| what is asked | bytes up | bytes down |\n|---|---|---|",
        f"| nothing but the pass | {kilo(body['pass']['up'])} | {kilo(body['pass']['down'])} |",
    ]
    for x in body["lines"]:
        mark = " (counted)" if x.get("counted") else ""
        out.append(f"| {x['what']} | {kilo(x['up'])} | {kilo(x['down'])}{mark} |")
    out += [
        f"| for comparison: all {name}, bf16 | | {kilo(n)} |" for name, n in body["whole"].items()
    ]
    out += ["\nWhat `trace_sinks` brings back of each tower, by tensor, before compression:\n"]
    out += ["| tower | tensor | shape | type | bytes |\n|---|---|---|---|---|"]
    out += [
        f"| {x['tower']} | {x['tensor']} | {' x '.join(map(str, x['shape']))} | {x['type']} | {kilo(x['bytes'])} |"
        for x in body["lines"][0]["tensors"]
    ]
    return "\n".join(out) + "\n"


if __name__ == "__main__":
    main()
