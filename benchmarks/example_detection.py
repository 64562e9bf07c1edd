"""What the default rules flag on a real model, against plain `transformers`: precision and recall by layer.

    python benchmarks/example_detection.py --out benchmarks/results/example_detection.md

Truth comes from the eager model alone: hidden states and attention weights. A token of a layer **must be
found** if its largest ``|h|`` is at least 100 and at least 300 medians of the layer, and some head gives it
at least 0.2 of the other tokens' attention. It **must not** be found if it has under 60 medians, or no head
gives it 0.02. What lies between is listed and not scored; so are tokens that fewer than 8 others see.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from sklearn.datasets import load_sample_image

import sinkscope as ss
from sinkscope.bundled import draw_scene

SIZE, MEDIANS, SHARE = 100.0, 300.0, 0.2
FEW_MEDIANS, SMALL_SHARE, SEEING = 60.0, 0.02, 8
SENTENCE = (
    "The small red circle lies to the left of the large blue square, and both are on a grey table. "
)


def photo(name):
    return Image.fromarray(load_sample_image(name))


def prompts(lvlm):
    """Name -> sample: scenes, photographs, two images, a batch with padding, and texts of any length."""
    scene, other = (draw_scene(seed).image for seed in (11_000_000, 11_000_007))
    china, flower = photo("china.jpg"), photo("flower.jpg")

    def text(tokens):
        n = len(lvlm.tokenizer(SENTENCE, add_special_tokens=False)["input_ids"])
        return SENTENCE * -(-tokens // n)

    return {
        "scene, count": lvlm.prepare(images=scene, text="how many shapes are there?"),
        "scene, describe": lvlm.prepare(images=other, text="describe the picture."),
        "china.jpg": lvlm.prepare(images=china, text="What is in the picture?"),
        "flower.jpg": lvlm.prepare(images=flower, text="What colour is the flower?"),
        "two images": lvlm.prepare(images=[[scene, china]], text=["which of the two has a boat?"]),
        "batch of two": lvlm.prepare(
            images=[scene, flower], text=["what colour is the background?", "describe. " + text(40)]
        ),
        "text of 20": lvlm.prepare(images=other, text=text(20)),
        "text of 300": lvlm.prepare(images=scene, text=text(300)),
        "text of 1000": lvlm.prepare(images=scene, text=text(1000)),
    }


@dataclass(frozen=True, eq=False)
class Truth:
    """One prompt by the eager model: masks ``[batch layer pos]``, and the numbers behind them."""

    must: torch.Tensor
    must_not: torch.Tensor
    medians: torch.Tensor
    share: torch.Tensor


@torch.no_grad()
def truth_of(lvlm, sample):
    """What plain eager attention and hidden states say of every token of the LLM."""
    model = lvlm.module
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    inputs = {
        k: v.to(model.dtype) if v.is_floating_point() else v for k, v in sample.inputs.items()
    }
    out = model(**inputs, output_hidden_states=True, output_attentions=True)
    model.set_attn_implementation(before)
    live = sample.tokens.live
    sizes = torch.stack([h.float().abs().amax(-1) for h in out.hidden_states[:-1]], dim=1)
    middle = torch.stack(
        [
            torch.stack([h[row][live[row]].float().abs().median() for row in range(len(live))])
            for h in out.hidden_states[:-1]
        ],
        dim=1,
    )
    n = live.shape[1]
    pairs = (live[:, :, None] & live[:, None]).float() * torch.ones(n, n).tril(-1)
    seeing = pairs.sum(dim=1)
    share = torch.stack(
        [
            ((a.float() * pairs[:, None]).sum(dim=2) / seeing.clamp(min=1)[:, None]).amax(dim=1)
            for a in out.attentions
        ],
        dim=1,
    )
    medians = sizes / middle[..., None]
    scored = (live & (seeing >= SEEING))[:, None]
    must = (sizes >= SIZE) & (medians >= MEDIANS) & (share >= SHARE) & scored
    must_not = ((medians < FEW_MEDIANS) | (share < SMALL_SHARE)) & scored
    return Truth(must, must_not & ~must, medians, share)


@dataclass(frozen=True)
class Count:
    """How many tokens of a layer were found, missed, made up, and flagged between the two truths."""

    found: int = 0
    missed: int = 0
    wrong: int = 0
    between: int = 0

    def __add__(self, other):
        return Count(
            *(getattr(self, name) + getattr(other, name) for name in Count.__dataclass_fields__)
        )

    @property
    def recall(self):
        return self.found / (self.found + self.missed) if self.found + self.missed else 1.0

    @property
    def precision(self):
        return self.found / (self.found + self.wrong) if self.found + self.wrong else 1.0


def counts(flagged, truth):
    """A `Count` per layer."""
    out = []
    for layer in range(flagged.shape[1]):
        f, must, must_not = (m[:, layer] for m in (flagged, truth.must, truth.must_not))
        out.append(
            Count(
                int((f & must).sum()),
                int((~f & must).sum()),
                int((f & must_not).sum()),
                int((f & ~must & ~must_not).sum()),
            )
        )
    return out


def measure(lvlm, samples=None):
    """Per prompt: the trace by default rules, the truth, and counts per layer."""
    out = {}
    for name, sample in (samples or prompts(lvlm)).items():
        truth, trace = truth_of(lvlm, sample), ss.trace_sinks(lvlm, sample)
        out[name] = trace, truth, counts(trace.l_detection.mask, truth)
    return out


def table(measured):
    """Markdown: counts by layer over all prompts, then by prompt over all layers."""
    lines = ["| layer | must be found | found | made up | flagged between | recall | precision |"]
    lines.append("|---|---|---|---|---|---|---|")
    by_layer = [
        sum(layer, Count()) for layer in zip(*(m[2] for m in measured.values()), strict=True)
    ]
    by_prompt = {name: sum(m[2], Count()) for name, m in measured.items()}
    rows = [*enumerate(by_layer), ("all", sum(by_layer, Count()))]
    lines += [line(name, count) for name, count in rows]
    lines += ["", lines[0].replace("layer", "prompt"), lines[1]]
    lines += [line(name, count) for name, count in by_prompt.items()]
    return "\n".join(lines)


def line(name, c):
    return (
        f"| {name} | {c.found + c.missed} | {c.found} | {c.wrong} | {c.between} | {c.recall:.3f} | "
        f"{c.precision:.3f} |"
    )


def variants():
    """The gap rule with every constant halved and doubled."""
    rule = ss.detectors.Gap()
    out = {"as it is": rule}
    for name in ("gap", "medians", "draws", "growth"):
        for times in (0.5, 2.0):
            fields = {name: getattr(rule, name) * times}
            out[f"{name} x {times:g}"] = ss.detectors.Gap(**fields)
    return out


def robustness(lvlm, measured):
    """Markdown: found, missed and made up by every variant, over all prompts and layers."""
    lines = ["| rule | must be found | found | made up | flagged between | recall | precision |"]
    lines.append("|---|---|---|---|---|---|---|")
    for name, rule in variants().items():
        total = Count()
        for trace, truth, _ in measured.values():
            flagged = rule.spikes_in(trace.language) & rule.also(trace.language)
            total = total + sum(counts(flagged, truth), Count())
        lines.append(line(name, total))
    return "\n".join(lines)


def tower(measured):
    """Markdown: what the vision tower's CLS and its most attended patch receive, in the head that gives most."""
    lines = [
        "| ViT block | CLS, times uniform | most attended patch, times uniform |",
        "|---|---|---|",
    ]
    towers = [trace.vision for trace, _, _ in measured.values()]
    for block in range(len(towers[0].layers)):
        cls, patch = [], []
        for seen in towers:
            times = seen.received.times_null()[:, block].amax(dim=1)
            cls += times[:, 0].tolist()
            patch += times.masked_fill(~seen.judged, 0.0).amax(dim=1).tolist()
        cells = (f"{min(part):.0f} to {max(part):.0f}" for part in (cls, patch))
        lines.append(f"| {block} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def random_models(lvlm, n):
    """Sinks that the default rules find in models of the same shape with random weights."""
    found = []
    sample = lvlm.prepare(images=photo("china.jpg"), text="What is in the picture?")
    for seed in range(n):
        torch.manual_seed(seed)
        model = type(lvlm.module)(lvlm.module.config).eval()
        other = ss.LVLM(model, lvlm.processor, verify=False)
        found.append(len(ss.trace_sinks(other, sample).records))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument(
        "--random", type=int, default=10, help="random initialisations (%(default)s)"
    )
    parser.add_argument("--out", type=Path, help="where to write the Markdown")
    args = parser.parse_args()
    lvlm = ss.load_example(args.dtype)
    measured = measure(lvlm)
    parts = [f"## Default rules against the eager model, {args.dtype}", table(measured)]
    parts += ["## Every constant halved and doubled", robustness(lvlm, measured)]
    parts += ["## Attention in the vision tower, over the prompts' pictures", tower(measured)]
    if args.random:
        found = random_models(lvlm, args.random)
        parts += [
            "## Random weights",
            f"Sinks found in {args.random} models of the same shape: {found}",
        ]
    text = "\n\n".join(parts)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
