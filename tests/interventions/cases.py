"""Every intervention on attention, beside the formula that it claims to compute."""

from dataclasses import dataclass
from typing import Any

import torch

import sinkscope as ss
from tests.interventions import reference as by_hand
from tests.reference import projected_values


@dataclass(frozen=True)
class Pair:
    """``edit(case)`` is ours, ``change(case)`` the reference; ``neutral(case)`` changes nothing."""

    edit: Any
    change: Any
    neutral: Any = None


SIX = (
    "MaskKeys of heads, layers, queries",
    "ScaleKeys",
    "ScaleAttention",
    "Redistribute",
    "AblateValues mean",
    "PatchActivations of values",
)
"""Edits of attention that stand for all where every model and dtype is crossed with them."""


def crossed(names, models, full=1, few=SIX):
    """``(*model, name)``: every name on the first ``full`` models, ``few`` of them on the others."""
    names = list(names)
    chosen = [name for name in names if name in few]
    return [(*m, name) for i, m in enumerate(models) for name in (names if i < full else chosen)]


def per_layer(case):
    """Other tokens in every layer, ``[batch layer pos]``."""
    layers = range(case.lvlm.anatomy.language.n_layers)
    return torch.stack([case.some.roll(-i, 1) & case.live for i in layers], dim=1)


def mean_of_others(case, live, keys):
    """The mean value over prompt tokens that are not edited."""
    donors = live & ~keys

    def values(v, at):
        n = donors.shape[1]
        weight = donors[:, None, :, None].double()
        mean = (v[:, :, :n] * weight).sum(2, keepdim=True) / weight.sum(2, keepdim=True)
        return mean.expand_as(v)

    return values


def resampled(case):
    """The values of the donors that ss.AblateValues draws for seed 3."""
    from sinkscope.interventions.values import random_donors

    tokens = case.sample.tokens
    at = random_donors(case.some, tokens.live, tokens.image >= 0, 3)
    for b, p in case.some.nonzero().tolist():
        donor = int(at[b, p])
        assert tokens.live[b, donor]
        assert not case.some[b, donor]
        assert (tokens.image[b, donor] >= 0) == (tokens.image[b, p] >= 0)

    def values(v, layer):
        grown = torch.arange(v.shape[2]).expand(v.shape[0], -1).clone()
        grown[:, : at.shape[1]] = at
        return v.gather(2, grown[:, None, :, None].expand_as(v))

    return values


def given_values(case):
    """Random values ``[batch kv_head pos d_head]``, and the same for every query head."""
    tower = case.lvlm.anatomy.language
    shape = (len(case.sample), tower.kv_heads, case.live.shape[1], tower.d_head)
    made = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    heads = made.repeat_interleave(tower.heads // tower.kv_heads, dim=1).double()

    def values(v, at):
        return torch.nn.functional.pad(heads, (0, 0, 0, v.shape[2] - heads.shape[2]))

    return made, values


def given_by_layer(case, layers, tower="language"):
    """Other random values in every layer ``[batch layer kv_head pos d_head]``, and as they are read."""
    anatomy, vision = case.lvlm.anatomy.tower(tower), case.sample.tokens.vision
    live = case.live if tower == "language" else vision.live
    shape = (live.shape[0], len(layers), anatomy.kv_heads, live.shape[1], anatomy.d_head)
    made = torch.randn(shape, generator=torch.Generator().manual_seed(6))
    layout = vision.layout if tower == "vision" else None
    if layout is None:
        return made, read_by_layer(case, made, layers, tower)
    packed = torch.zeros(1, *shape[1:3], int(live.sum()), anatomy.d_head)
    for image, pos in live.nonzero().tolist():
        packed[0, :, :, layout[image, pos]] = made[image, :, :, pos]
    return made, read_by_layer(case, packed, layers, tower)


def read_by_layer(case, given, layers, tower="language"):
    """``values(v, at)`` of given values ``[row layer kv_head pos d_head]``, zeros behind the prompt."""
    anatomy = case.lvlm.anatomy.tower(tower)
    heads = given.repeat_interleave(anatomy.heads // anatomy.kv_heads, dim=2).double()

    def values(v, at):
        if at.layer not in layers:
            return v
        mine = heads[:, layers.index(at.layer), :, at.start :][:, :, : v.shape[2]]
        return torch.nn.functional.pad(mine, (0, 0, 0, v.shape[2] - mine.shape[2]))

    return values


def turned(case):
    """The same prompt about the images in a mirror."""
    pixels = case.sample.inputs["pixel_values"].flip(-1)
    return case.lvlm.prepare(inputs={**case.sample.inputs, "pixel_values": pixels})


def run_of_turned(case, tower="language"):
    """A run of the other images whose probes keep all values, among other things."""
    other = turned(case)
    probes = [ss.probes.AttentionValues(tower=tower), ss.probes.ResidualStates(tower=tower)]
    return case.lvlm.run(other, probes=probes)


def visual(case):
    """The chosen image tokens."""
    return case.some & (case.sample.tokens.image >= 0)


def values_of_turned(case, layers, tower="language"):
    """The other images' values by hooks on the twin's projections, as they are read."""
    inputs = turned(case).inputs
    pixels = inputs["pixel_values"].to(next(case.twin.parameters()).dtype)
    inputs = {**inputs, "pixel_values": pixels}
    made = projected_values(case.twin, case.lvlm, inputs, tower)[:, list(layers)]
    return read_by_layer(case, made, layers, tower)


def image_centric(case, least, most):
    """VAR's rule, written from its formula: look at the image, and not mostly at its sinks."""
    visual = case.sample.tokens.image >= 0

    def narrower(w, at):
        n = visual.shape[1]
        on_image = (w[..., :n] * visual[:, None, None]).sum(-1)
        on_sinks = (w[..., :n] * (case.some & visual)[:, None, None]).sum(-1)
        return (on_image >= least) & (on_sinks / on_image.clamp(min=1e-30) <= most)

    return narrower


def zeros(v, at):
    return torch.zeros_like(v)


H = by_hand
LANGUAGE = {
    "MaskKeys": Pair(
        lambda c: ss.MaskKeys(c.some),
        lambda c: H.masks(c.some),
        lambda c: ss.MaskKeys(c.some & False, allow_noop=True),
    ),
    "MaskKeys of the first token": Pair(lambda c: ss.MaskKeys("first"), lambda c: H.masks(c.first)),
    "MaskKeys per layer": Pair(
        lambda c: ss.MaskKeys(per_layer(c)), lambda c: H.masks(per_layer(c))
    ),
    "MaskKeys of heads, layers, queries": Pair(
        lambda c: ss.MaskKeys(c.some | c.first, [0, 2], heads=[0, 3], queries=c.late),
        lambda c: H.masks(c.some | c.first, layers=(0, 2), heads=(0, 3), rows=c.late),
    ),
    "ScaleKeys": Pair(
        lambda c: ss.ScaleKeys(c.some, 0.3),
        lambda c: H.scales_keys(c.some, 0.3),
        lambda c: ss.ScaleKeys(c.some, 1.0, allow_noop=True),
    ),
    "ScaleKeys to nothing": Pair(
        lambda c: ss.ScaleKeys(c.some | c.first, 0.0),
        lambda c: H.scales_keys(c.some | c.first, 0.0),
    ),
    "ScaleKeys negative, of a head": Pair(
        lambda c: ss.ScaleKeys(c.some, -1.5, layers=[1], heads=[1], queries=c.late),
        lambda c: H.scales_keys(c.some, -1.5, layers=(1,), heads=(1,), rows=c.late),
    ),
    "ScaleAttention": Pair(
        lambda c: ss.ScaleAttention(c.some, 0.4),
        lambda c: H.scales_weights(c.some, 0.4),
        lambda c: ss.ScaleAttention(c.some, 1.0, allow_noop=True),
    ),
    "ScaleAttention up, of queries": Pair(
        lambda c: ss.ScaleAttention(c.some | c.first, 30.0, heads=[2], queries=c.late),
        lambda c: H.scales_weights(c.some | c.first, 30.0, heads=(2,), rows=c.late),
    ),
    "ScaleAttention to nothing": Pair(
        lambda c: ss.ScaleAttention("first", 0.0), lambda c: H.scales_weights(c.first, 0.0)
    ),
    "ScaleAttention as is": Pair(
        lambda c: ss.ScaleAttention(c.some, 0.4, renormalize=False),
        lambda c: H.scales_raw_weights(c.some, 0.4),
        lambda c: ss.ScaleAttention(c.some, 1.0, renormalize=False, allow_noop=True),
    ),
    "ScaleAttention as is, negative": Pair(
        lambda c: ss.ScaleAttention(c.some, -2.0, [1], renormalize=False, heads=[0]),
        lambda c: H.scales_raw_weights(c.some, -2.0, layers=(1,), heads=(0,)),
    ),
    "AttentionKnockout": Pair(
        lambda c: ss.AttentionKnockout(c.late, "image", layers=[1, 2]),
        lambda c: H.masks(c.sample.tokens.image >= 0, layers=(1, 2), rows=c.late),
        lambda c: ss.AttentionKnockout(c.late, c.some & False, allow_noop=True),
    ),
    "AttentionTemperature": Pair(
        lambda c: ss.interventions.AttentionTemperature(0.7),
        lambda c: H.Change("keys", H.every(c), lambda x, at: x / 0.7),
        lambda c: ss.interventions.AttentionTemperature(1.0, allow_noop=True),
    ),
    "AttentionTemperature of heads and queries": Pair(
        lambda c: ss.interventions.AttentionTemperature(3.0, [0, 2], heads=[1, 2], queries=c.late),
        lambda c: H.Change("keys", H.every(c), lambda x, at: x / 3, (0, 2), (1, 2), c.late),
    ),
    "Redistribute": Pair(
        lambda c: ss.Redistribute(c.some | c.first, c.other, 0.6),
        lambda c: H.redistributes(c.some | c.first, c.other, 0.6),
        lambda c: ss.Redistribute(c.some, c.other, 0.0, allow_noop=True),
    ),
    "Redistribute all, of queries": Pair(
        lambda c: ss.Redistribute(c.some, c.other, 1.0, queries=c.late, heads=[1, 2]),
        lambda c: H.redistributes(c.some, c.other, 1.0, rows=c.late, heads=(1, 2)),
    ),
    "Redistribute where image-centric": Pair(
        lambda c: ss.Redistribute(
            c.some | c.first,
            c.other,
            0.4,
            select=ss.interventions.ImageCentric(c.some & (c.sample.tokens.image >= 0)),
        ),
        lambda c: H.redistributes(
            c.some | c.first, c.other, 0.4, narrower=image_centric(c, 0.2, 0.5)
        ),
    ),
    "AblateValues": Pair(
        lambda c: ss.AblateValues(c.some),
        lambda c: H.replaces_values(c.some, zeros),
        lambda c: ss.AblateValues(c.some & False, allow_noop=True),
    ),
    "AblateValues of heads and queries": Pair(
        lambda c: ss.AblateValues(c.some, heads=[1, 2], queries=c.late),
        lambda c: H.replaces_values(c.some, zeros, heads=(1, 2), rows=c.late),
    ),
    "AblateValues mean": Pair(
        lambda c: ss.AblateValues(c.some, "mean"),
        lambda c: H.replaces_values(c.some, mean_of_others(c, c.live, c.some)),
    ),
    "AblateValues resample": Pair(
        lambda c: ss.AblateValues(c.some, "resample", seed=3),
        lambda c: H.replaces_values(c.some, resampled(c)),
    ),
    "AblateValues tensor": Pair(
        lambda c: ss.AblateValues(c.some, given_values(c)[0], layers=[0, 1]),
        lambda c: H.replaces_values(c.some, given_values(c)[1], layers=(0, 1)),
    ),
    "AblateValues tensor by layer": Pair(
        lambda c: ss.AblateValues(c.some, given_by_layer(c, (0, 2))[0], layers=[0, 2]),
        lambda c: H.replaces_values(c.some, given_by_layer(c, (0, 2))[1], layers=(0, 2)),
    ),
    "AblateValues of another run, of heads and queries": Pair(
        lambda c: ss.AblateValues(
            c.some, run_of_turned(c), layers=[0, 2], heads=[1, 2], queries=c.late
        ),
        lambda c: H.replaces_values(
            c.some, values_of_turned(c, (0, 2)), layers=(0, 2), heads=(1, 2), rows=c.late
        ),
    ),
    "PatchActivations of values": Pair(
        # Without the text token, whose value in block 0 is the donor's already.
        lambda c: ss.PatchActivations(run_of_turned(c), "values", visual(c), [0, 2]),
        lambda c: H.replaces_values(visual(c), values_of_turned(c, (0, 2)), layers=(0, 2)),
        lambda c: ss.PatchActivations(run_of_turned(c), "values", c.some & False, allow_noop=True),
    ),
}
V = {"tower": "vision"}
VISION = {
    "MaskKeys": Pair(
        lambda c: ss.MaskKeys(c.patches, **V),
        lambda c: H.masks(c.patches, **V),
        lambda c: ss.MaskKeys(c.patches & False, allow_noop=True, **V),
    ),
    "MaskKeys of heads, layers, queries": Pair(
        lambda c: ss.MaskKeys(c.patches, [1], heads=[0, 3], queries=c.few, **V),
        lambda c: H.masks(c.patches, layers=(1,), heads=(0, 3), rows=c.few, **V),
    ),
    "ScaleKeys": Pair(
        lambda c: ss.ScaleKeys(c.patches, -0.5, **V),
        lambda c: H.scales_keys(c.patches, -0.5, **V),
        lambda c: ss.ScaleKeys(c.patches, 1.0, allow_noop=True, **V),
    ),
    "AttentionTemperature of a head": Pair(
        lambda c: ss.interventions.AttentionTemperature(2.0, heads=[1], **V),
        lambda c: H.Change(
            "keys", c.sample.tokens.vision.live, lambda x, at: x / 2, None, (1,), **V
        ),
        lambda c: ss.interventions.AttentionTemperature(1.0, allow_noop=True, **V),
    ),
    "ScaleAttention": Pair(
        lambda c: ss.ScaleAttention(c.patches, 4.0, **V),
        lambda c: H.scales_weights(c.patches, 4.0, **V),
        lambda c: ss.ScaleAttention(c.patches, 1.0, allow_noop=True, **V),
    ),
    "ScaleAttention as is": Pair(
        lambda c: ss.ScaleAttention(c.patches, 0.2, renormalize=False, **V),
        lambda c: H.scales_raw_weights(c.patches, 0.2, **V),
        lambda c: ss.ScaleAttention(c.patches, 1.0, renormalize=False, allow_noop=True, **V),
    ),
    "AttentionKnockout": Pair(
        lambda c: ss.AttentionKnockout(c.few, c.patches, [0, 1], **V),
        lambda c: H.masks(c.patches, layers=(0, 1), rows=c.few, **V),
        lambda c: ss.AttentionKnockout(c.few, c.patches & False, allow_noop=True, **V),
    ),
    "AblateValues": Pair(
        lambda c: ss.AblateValues(c.patches, **V),
        lambda c: H.replaces_values(c.patches, zeros, **V),
        lambda c: ss.AblateValues(c.patches & False, allow_noop=True, **V),
    ),
    "AblateValues of a head": Pair(
        lambda c: ss.AblateValues(c.patches, heads=[1], **V),
        lambda c: H.replaces_values(c.patches, zeros, heads=(1,), **V),
    ),
    "AblateValues tensor by layer": Pair(
        lambda c: ss.AblateValues(c.patches, given_by_layer(c, (0, 1), "vision")[0], [0, 1], **V),
        lambda c: H.replaces_values(
            c.patches, given_by_layer(c, (0, 1), "vision")[1], layers=(0, 1), **V
        ),
    ),
    "PatchActivations of values": Pair(
        lambda c: ss.PatchActivations(run_of_turned(c, "vision"), "values", c.patches, [0, 1], **V),
        lambda c: H.replaces_values(
            c.patches, values_of_turned(c, (0, 1), "vision"), layers=(0, 1), **V
        ),
    ),
}
UNPACKED = {
    "AblateValues mean": Pair(
        lambda c: ss.AblateValues(c.patches, "mean", **V),
        lambda c: H.replaces_values(
            c.patches, mean_of_others(c, c.sample.tokens.vision.live, c.patches), **V
        ),
    ),
    "Redistribute": Pair(
        lambda c: ss.Redistribute(c.patches, c.few, 0.5, **V),
        lambda c: H.redistributes(c.patches, c.few, 0.5, **V),
        lambda c: ss.Redistribute(c.patches, c.few, 0.0, allow_noop=True, **V),
    ),
}
"""Where the vision tower has one row per image."""
