"""What masking position 0, CLS and the most attended patches does to answers, beside random tokens."""

from dataclasses import dataclass

import torch

import sinkscope as ss
from benchmarks.paper.setting import (
    L_RULE,
    V_RULE,
    Kept,
    questions,
    records_of,
    told,
    write,
)
from sinkscope.bundled.scenes import TASKS
from sinkscope.experiments import Comparison
from sinkscope.experiments.sink_edits import content_seed
from sinkscope.viz import plot_effects
from sinkscope.viz.effects import comparison_markdown

NAME = "example_effects"
TOP = 8
BASE = "base"


def first_token(trace):
    """Position 0, where the prompt begins."""
    return trace.sample.tokens.select("first")


def first_sink(trace):
    """Position 0, only in the layers in which the gap rule finds it a sink: ``[batch layer pos]``."""
    rule, seen = ss.detectors.Gap(), trace.language
    sinks = rule.spikes_in(seen) & rule.also(seen)
    return sinks & trace.sample.tokens.select("first")[:, None]


def cls_token(trace):
    """What the V rule flags."""
    return trace.v_sinks


@dataclass(frozen=True)
class TopPatches:
    """The patches that receive the most attention in the ViT block that feeds the projector.

    Attributes:
        feed: The block.
        k: How many per image.
    """

    feed: int
    k: int = TOP

    def __call__(self, trace):
        tokens, found = trace.sample.tokens, trace.v_detection
        scores = found.scores[:, found.layers.index(self.feed)]
        scores = scores.masked_fill(~tokens.vision.select("patch"), -1.0)
        chosen = torch.zeros_like(scores).scatter(1, scores.topk(self.k, dim=1).indices, 1.0)
        return tokens.from_vision(chosen).nan_to_num() > 0


def masked(choose):
    """Mask the keys of chosen tokens in all decoder layers."""
    return lambda trace: [ss.MaskKeys(choose(trace), allow_noop=True)]


def masked_random(choose, seed=0):
    """Mask as many ordinary tokens of the same kind, drawn anew for every row."""

    def make(trace):
        real = ss.MaskKeys(choose(trace), allow_noop=True)
        draw = content_seed(trace.sample, seed)
        return list(ss.RandomControl(real, "count", n=1, seed=draw).draws(trace))

    return make


def conditions(lvlm):
    top = TopPatches(lvlm.anatomy.feed_layers[-1])
    return {
        BASE: [],
        "mask position 0": masked(first_token),
        "mask position 0 where it is a sink": masked(first_sink),
        "mask 1 random text token": masked_random(first_token),
        "mask CLS": masked(cls_token),
        "mask 1 random patch": masked_random(cls_token),
        f"mask the {TOP} most attended patches": masked(top),
        f"mask {TOP} random patches": masked_random(top),
    }


def first_right(tokenizer, given, answer):
    """Whether the first token alone is the whole answer, so never for an answer of two tokens."""
    ids = tokenizer(given, add_special_tokens=False)["input_ids"]
    return bool(ids) and tokenizer.decode(ids[0]).strip() == answer


def measure(lvlm, args, clock):
    settings = {
        "model": args.model,
        "noise": args.noise,
        "per_image": args.per_image,
        "start": args.start,
        "chunk": args.chunk,
        "v_rule": repr(V_RULE),
        "l_rule": repr(L_RULE),
    }
    kept, made = Kept.open(args.keep / NAME, settings, lvlm, clock), conditions(lvlm)
    rules = {"v_detector": V_RULE, "l_detector": L_RULE}

    def answers(records):
        table = ss.compare(lvlm, records, made, **rules, progress=False).table
        pairs = zip(table["given"], table["answer"], strict=True)
        table["first"] = [first_right(lvlm.tokenizer, *pair) for pair in pairs]
        return table.drop(columns="question")

    records = questions("test", args.images, args.per_image, args.noise, args.start)
    kept.run(records, args, answers)


def by_scope(table):
    """The same answers, with global and local as tasks."""
    return Comparison(table.assign(task=table["task"].map(TASKS)), BASE)


def render(args):
    kept = Kept(args.keep / NAME).check("machine")
    table, body = kept.rows(), {**kept.read("settings"), **kept.read("machine")}
    whole, scopes = Comparison(table, BASE).estimates(), by_scope(table).estimates()
    first = by_scope(table.assign(correct=table["first"])).estimates()
    v = table.loc[table["condition"] == "mask CLS"]
    flagged = {
        "visual sinks per prompt": [v["sinks"].min(), v["sinks"].max()],
        "CLS masked in": v["touched"].mean(),
    }
    images = table["image_id"].nunique()
    text = [
        f"{images} test scenes (noise {body['noise']:g}, from scene {body['start']} on), {len(v)} questions. "
        "Keys are masked in all decoder layers (but where said), in the prompt and while answering. Changes of accuracy in "
        "points, with 95 % intervals by bootstrap over images. V rule "
        f"`{body['v_rule']}` in the block that feeds the projector: it flags {v['sinks'].min():.0f} to "
        f"{v['sinks'].max():.0f} image tokens per prompt (V- and L-sinks together), and CLS was masked in "
        f"{v['touched'].mean():.0%} of the prompts. Random tokens are drawn anew for every prompt, "
        "text tokens for a text token and patches for the others. " + told(body),
        "",
        "Global and local questions, whole answers:",
        "",
        comparison_markdown(scopes, base=BASE),
        "By task, whole answers:",
        "",
        comparison_markdown(whole, base=BASE),
        "Global and local questions, right if the first token alone is the answer (so never for “triangle”, which has two):",
        "",
        comparison_markdown(first, base=BASE),
    ]
    tables = {"scopes": scopes, "tasks": whole, "first_token": first}
    body |= {"images": images, "flagged": flagged}
    body |= {name: records_of(summary) for name, summary in tables.items()}
    figures = {NAME: scopes, f"{NAME}_tasks": whole.loc[whole["task"] != "all"]}
    drawn = {name: plot_effects(summary, base=BASE) for name, summary in figures.items()}
    write(args.out, NAME, body, "\n".join(text), drawn)
