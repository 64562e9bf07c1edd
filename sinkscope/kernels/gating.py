"""Layer-wise Sink Gating inside a trace: find the groups, read the signal, scale the keys.

A gate reads what feeds the projector (V-sinks), what the edited block reads (L-sinks) and what the block
before wrote (the signal), and edits the block's attention call. What it finds is kept in
``state["memory"]`` under its ``slot``, for decode steps too; the reading kernels report no effect. Edits
of attention with a live rule (`sinkscope.interventions.LiveRule`) find their tokens in the same way.

A rule is plain data: ``{"how": "dims", "dims", "tau", "rms", "strict"}``, ``{"how": "norm", "tau",
"strict"}``, ``{"how": "massive", "absolute", "ratio", "strict"}``, ``{"how": "random", "count",
"seed"}``, ``{"how": "all"}`` (every token that is to be judged) or ``{"how": "none"}``.
"""

import torch

from sinkscope.kernels.edits import edit_keys
from sinkscope.kernels.residual import dimension_scores, live_at, mean_over, norms, rows_of

ACTIVATIONS = ("gelu", "relu", "silu", "tanh")


def flags(states, rule, live, layout=None):
    """Tokens that meet a rule, among those to judge, ``live``; both ``[batch pos]`` bool."""
    how, h = rule["how"], rows_of(states, layout).float()
    if how in ("all", "none"):
        return live if how == "all" else torch.zeros_like(live)
    if how == "random":
        return (hashed(h.abs().argmax(dim=-1), live, rule["seed"]) < rule["count"]) & live
    if how == "dims":
        scores = dimension_scores(h, None, rule["dims"], rule["rms"])
    else:
        scores = norms(h, None) if how == "norm" else h.abs().amax(dim=-1)
    tau = rule["absolute"] if how == "massive" else rule["tau"]
    above = reaches(scores, tau, rule["strict"])
    if how == "massive":
        size = h.abs().masked_fill(~live[..., None], float("nan"))
        medians = size.flatten(1).nanmedian(dim=1).values
        above = above & reaches(scores / medians[:, None], rule["ratio"])
    return above & live


def reaches(scores, limit, strict=False):
    """Where scores reach a limit; if ``strict``, where they exceed it. Detectors ask it too."""
    return scores > limit if strict else scores >= limit


def hashed(peaks, live, seed):
    """The rank of every live token by a hash of its position and the row's largest channels, ``peaks``."""
    place = torch.arange(peaks.shape[1], device=peaks.device)[None]
    whole = (peaks * live).sum(1, keepdim=True)
    mixed = peaks * 40503 + place * 48271 + whole * 69621 + seed * 7919
    mixed = (mixed % 65521) * 52361 % 65519
    order = mixed.masked_fill(~live, -1).argsort(descending=True, stable=True)
    return order.argsort()


def note_v_sinks(states, state, slot, rule, live, image_index, sources, layout=None):
    """Remember which LLM positions are made of a ViT token that meets the rule, among ``live``
    ``[image pos]``. ``image_index`` ``[batch pos]`` and ``sources`` ``[batch pos source]`` are those of
    `sinkscope.tokens.TokenMap`."""
    found, kept = flags(states, rule, live, layout), memory_of(state, slot)
    picked = found[image_index[..., None], sources]
    carried = (picked & (sources >= 0)).any(-1) & (image_index >= 0)
    kept["V"] = kept["V"].to(carried.device) | carried if "V" in kept else carried
    return states, None


def note_l_sinks(states, state, slot, rule, live):
    """Remember which prompt tokens meet the L rule on what the edited block reads."""
    memory_of(state, slot)["L"] = flags(states, rule, live_at(live, states))
    return states, None


def note_flags(states, state, slot, rule, live):
    """Remember which prompt tokens meet a rule on what a block reads, for `edit_flagged`."""
    memory_of(state, slot)["flags"] = flags(states, rule, live)
    return states, None


def edit_flagged(call, state, span, kernel, slots, frozen=None, **given):
    """Run an edit of attention with masks that hold only where a rule flagged a token in this pass.

    ``slots`` is the name of a mask -> the slot of `note_flags`. Of the first mask the effect has the number
    of tokens, ``"live"``, and beside ``frozen`` ``[batch key]`` bool, an earlier decision, its number,
    ``"frozen"``, and what differs, ``"entered"`` and ``"left"``.
    """
    counted = {}
    for name, slot in slots.items():
        among, noted = given[name], memory_of(state, slot)["flags"]
        given[name] = found = among & noted.to(among.device)
        if not counted:
            counted["live"] = found
            if frozen is not None:
                frozen = frozen & among
                counted |= {"frozen": frozen, "entered": found & ~frozen, "left": frozen & ~found}
    after, effect = kernel(call, state, span, **given)
    return after, {**effect, **{name: mask.sum(1) for name, mask in counted.items()}}


def note_coefficients(states, state, slot, signal, at, tokens, **gate):
    """Remember the `coefficients` that the ``gate`` gives for what it reads here: ``signal`` ``"last"``,
    position ``at`` ``[batch]`` (the newest one at a decode step), or ``"mean"``, over ``tokens``
    ``[batch pos]`` bool."""
    if signal == "mean":
        read = mean_over(states, tokens)[:, 0]
    elif state.get("step", 0):
        read = states[:, -1]
    else:
        read = states[torch.arange(states.shape[0], device=states.device), at]
    memory_of(state, slot)["coefficients"] = coefficients(read, **gate)
    return states, None


def coefficients(
    read, norm_weight, norm_bias, in_weight, in_bias, out_weight, out_bias, activation, scale
):
    """``scale * softmax(W2 act(W1 LayerNorm(read)))``, ``[batch group]`` in fp32 (2604.03316). ``in_weight``
    is ``[hidden d_model]``, ``out_weight`` ``[group hidden]``; the LayerNorm may have no weights."""
    norm, first, last = (
        [None if weight is None else weight.float() for weight in pair]
        for pair in ((norm_weight, norm_bias), (in_weight, in_bias), (out_weight, out_bias))
    )
    h = torch.nn.functional.layer_norm(read.float(), read.shape[-1:], *norm)
    h = torch.nn.functional.linear(h, *first)
    h = torch.tanh(h) if activation == "tanh" else getattr(torch.nn.functional, activation)(h)
    return scale * torch.nn.functional.linear(h, *last).softmax(dim=-1)


def factors_of(kept, visual, groups):
    """One factor per prompt key, ``[batch pos]``; 1 at text. ``kept`` has ``"V"``, ``"L"`` ``[batch pos]``
    and ``"coefficients"`` in the order of ``groups``, each where it was found. V wins over L, also without a
    group of its own."""
    kept = {name: value.to(visual.device) for name, value in kept.items()}
    of = dict(zip(groups, kept["coefficients"][..., None].unbind(1), strict=True))
    out = torch.where(visual, of["rest"], torch.ones_like(of["rest"]))
    if "L" in of:
        mine = kept["L"] & visual
        out = torch.where(mine & ~kept["V"] if "V" in kept else mine, of["L"], out)
    return torch.where(kept["V"] & visual, of["V"], out) if "V" in of else out


def gate_keys(call, state, span, slot, visual, live, groups, measure=True):
    """Scale the keys of every group, among ``visual`` ones, by its coefficient: ``softmax(q (s k)^T) v``."""
    kept = memory_of(state, slot)
    factors = factors_of(kept, visual, groups)
    keys = visual & (factors != 1)
    after, effect = edit_keys(call, state, span, keys, live, factors, measure=measure)
    return after, {**effect, "coefficients": kept["coefficients"]}


def memory_of(state, slot):
    """What one gate, or one live rule in one layer, remembers during one generation."""
    return state["memory"].setdefault(("gate", slot), {})
