"""Questions to the residual stream, and edits of states: channels set, tokens overwritten, scaled, moved.

All take states ``[batch pos d_model]``. Questions are answered in fp32, since squared norms of large towers
overflow fp16, or with numbers of the states as they are; edits return the edited states and the effect. ``state`` is the run's scratch space,
``layout`` the ``[row pos]`` packed positions of a packed tower, or None; ``mask`` and ``live`` are ``[batch
pos]`` bool, the tokens to edit and the live ones.
"""

import torch


def rows_of(states, layout):
    """States of a packed tower, ``[packed d]`` or ``[1 packed d]``, as ``[image pos d]``."""
    return states if layout is None else states.reshape(-1, states.shape[-1])[layout.clamp(min=0)]


def live_at(live, states):
    """The live mask cut or extended to the positions of ``states`` (decode steps are live)."""
    if live.shape[1] == states.shape[1]:
        return live
    return torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)


def mean_over(x, mask):
    """The mean of ``x`` ``[batch pos any]`` over the positions in ``mask``, ``[batch 1 any]`` in fp32."""
    total = torch.where(mask[..., None], x.float(), 0.0).sum(1, keepdim=True)
    return total / mask.sum(1)[:, None, None].clamp(min=1)


def massive(states, state, live, k=4, layout=None):
    """The ``k`` largest absolute channels of every token and the median of ``|h|`` (Sun et al. 2024).
    ``{"values": [batch pos k] signed, "channels": [batch pos k], "median": [batch]}``, of live tokens."""
    states = rows_of(states, layout)
    h, every = states.float(), ("every", id(live))
    size, mine = h.abs(), live_at(live, h)
    if every not in state:
        state[every] = bool(live.all()), live
    if state[every][0] and len(live) == len(h):
        medians = size.flatten(1).median(dim=1).values
    else:
        few = [row[alive] for row, alive in zip(size, mine, strict=True)]
        medians = torch.stack(
            [x.median() if x.numel() else x.new_tensor(float("nan")) for x in few]
        )
    top = size.topk(min(k, h.shape[-1])).indices
    values, whole = states.gather(-1, top), torch.int16 if h.shape[-1] <= 2**15 else torch.int32
    return {"values": values, "channels": top.to(whole), "median": medians}


def norms(states, state, layout=None):
    """L2 norm of every token, ``[batch pos]``."""
    return rows_of(states, layout).float().norm(dim=-1)


def dimension_scores(states, state, dims, rms=True, layout=None):
    """Sink-dimension value ``max over dims of |h_d|``, with ``rms`` over ``sqrt(mean_d h_d^2 + 1e-6)``."""
    h = rows_of(states, layout).float()
    peak = h[..., dims].abs().amax(dim=-1)
    return peak / (h.pow(2).mean(dim=-1) + 1e-6).sqrt() if rms else peak


def cosine_to(states, state, anchor, layout=None):
    """Absolute cosine of every token with the token at position ``anchor`` ``[batch]``."""
    h = rows_of(states, layout).float()
    reference = h[torch.arange(h.shape[0], device=h.device), anchor.clamp(max=h.shape[1] - 1)]
    dot = torch.einsum("bpd,bd->bp", h, reference).abs()
    return dot / (h.norm(dim=-1) * reference.norm(dim=-1)[:, None]).clamp(min=1e-12)


def logits_of(out, scale=1.0, cap=0.0):
    """What a model makes of what its LM head puts out: times a number, and soft-capped unless it is 0."""
    out = out if scale == 1.0 else out * scale
    return torch.tanh(out / cap) * cap if cap else out


def lens(
    states, state, norm, head, positions=None, k=5, scale=1.0, cap=0.0, wanted=None, layout=None
):
    """Logit lens: the modules ``norm`` and ``head`` of the model's output applied to earlier states, with the
    ``scale`` and ``cap`` of `logits_of`.
    ``positions`` ``[batch row]`` are read, -1 where absent, or all; the ``k`` likeliest tokens are kept, and
    the log-probabilities of tokens ``wanted``, ``[batch row option]`` or such that it broadcasts, -1 for none.
    ``{"tokens": [batch row k], "logprobs": [batch row k], "entropy": [batch row]}``, NaN / -1 where absent,
    and ``"scores": [batch row option]``.
    """
    gone = torch.zeros(states.shape[:2], dtype=torch.bool, device=states.device)
    if positions is not None and states.shape[1] > 1:
        index = positions.clamp(min=0)[..., None].expand(-1, -1, states.shape[-1])
        states, gone = states.gather(1, index), positions < 0
    logprobs = logits_of(head(norm(states)), scale, cap).float().log_softmax(dim=-1)
    gone = gone.to(logprobs.device)  # where the head is
    entropy = -(logprobs.exp() * logprobs).sum(dim=-1).masked_fill(gone, float("nan"))
    values, tokens = logprobs.topk(min(k, logprobs.shape[-1]))
    values = values.masked_fill(gone[..., None], float("nan"))
    out = {
        "tokens": tokens.masked_fill(gone[..., None], -1),
        "logprobs": values,
        "entropy": entropy,
    }
    if wanted is not None:
        wanted = wanted.expand(*logprobs.shape[:2], -1)
        scores, none = logprobs.gather(2, wanted.clamp(min=0)), gone[..., None] | (wanted < 0)
        out["scores"] = scores.masked_fill(none, float("nan"))
    return out


def channels(states, state, index, layout=None):
    """The values of given channels, ``[batch pos channel]``."""
    return rows_of(states, layout)[..., index]


def keep(states, state, layout=None, chosen=None):
    """The states themselves, ``[batch pos d_model]``, or those ``chosen``, see `picked`."""
    return picked(rows_of(states, layout), chosen, 1)


def picked(x, chosen, dim):
    """The positions ``chosen`` ``[batch chosen]`` along ``dim`` of a tensor ``[batch ... pos ...]``, the first
    where one is -1; all for None."""
    if chosen is None:
        return x
    shape = [len(chosen), *[1] * (dim - 1), -1, *[1] * (x.ndim - dim - 1)]
    index = chosen.clamp(min=0).reshape(shape)
    return x.gather(dim, index.expand(*x.shape[:dim], -1, *x.shape[dim + 1 :]))


def group_means(states, state, groups, layout=None):
    """The mean state of every token group ``[batch pos group]`` bool, and how many tokens it has.
    ``{"means": [batch group d_model] fp32, NaN for an empty group; "count": [batch group]}``."""
    h = rows_of(states, layout).float()
    h = h.masked_fill(~groups.any(dim=-1, keepdim=True), 0.0)  # padding may hold anything
    count = groups.sum(dim=1)
    means = torch.einsum("bpg,bpd->bgd", groups.float(), h) / count[..., None]  # 0 / 0 is NaN
    return {"means": means, "count": count}


def peak_neurons(states, state, mask):
    """Mean ``|activation|`` of every neuron over the chosen tokens, ``[image d_mlp]``."""
    return mean_over(states[:, : mask.shape[1]].abs(), mask)[:, 0]


def state_effect(mask, before=None, after=None):
    """The effect of an edit of states, which a kernel returns as its second value. ``mask`` ``[batch pos]``
    are the tokens to edit; ``before`` and ``after`` all states, or None where those tokens surely change."""
    changed = mask if before is None else mask & (before != after).any(dim=-1)
    count, tokens = changed.sum(1), mask.sum(1)
    return {"rows": count, "empty": torch.zeros_like(tokens), "tokens": tokens, "count": count}


def put_back(states, rows, mask, layout):
    """``states`` with chosen tokens of ``rows`` ``[image pos d_model]`` in their places."""
    if layout is None:
        return torch.where(mask[..., None], rows, states)
    flat = states.reshape(-1, states.shape[-1]).clone()
    flat[layout[mask]] = rows[mask]
    return flat.reshape(states.shape)


def edit_channels(states, state, mask, dims, how, value=None, layout=None):
    """Set the channels ``dims`` of chosen tokens. ``how`` is ``"zero"``, ``"mean"`` (over the row's tokens in
    the mask ``value``), ``"set"`` (to ``value``, a number) or ``"clamp"`` (magnitude at most ``value``)."""
    rows = rows_of(states, layout)
    part, edited = rows[..., dims], rows.clone()
    if how == "mean":
        edited[..., dims] = mean_over(part, value).to(part.dtype)
    elif how == "clamp":
        edited[..., dims] = part.clamp(min=-value, max=value)
    else:
        edited[..., dims] = 0.0 if how == "zero" else value
    return put_back(states, edited, mask, layout), state_effect(mask, rows, edited)


def edit_states(states, state, mask, donor, layout=None):
    """Overwrite chosen tokens with donor states ``[batch pos d_model]``."""
    donor = donor.to(states.dtype)
    return put_back(states, donor, mask, layout), state_effect(mask, rows_of(states, layout), donor)


def scale_states(states, state, mask, factor):
    """Multiply chosen tokens by a factor (DIYSink's reweighting)."""
    return edit_states(states, state, mask, states * factor)


def permute_states(states, state, order):
    """Reorder tokens: position ``i`` gets the token at ``order[i]``, ``[batch pos]``."""
    moved = order != torch.arange(order.shape[1], device=order.device)
    return edit_states(states, state, moved, states.gather(1, order[..., None].expand_as(states)))


def append_tokens(states, state, live, count):
    """Append ``count`` zero tokens to ``[image pos d_model]``; a negative one removes the last again."""
    grown = torch.nn.functional.pad(states, (0, 0, 0, max(count, 0)))
    return (grown if count >= 0 else states[:, :count]), state_effect(live)


def shift_neurons(states, state, live, neurons, count, scale, fill, shared=False):
    """Move register neurons' activity from the tokens ``live`` to the registers (2506.08010).

    At the ``count`` registers, the last of ``[image pos d_mlp]``, each neuron gets ``scale`` times its
    largest activation over all other tokens (with its sign), or if ``shared`` the largest of all neurons
    over all tokens and registers; at ``live`` ones 0, their mean, or what it was (``fill`` is ``"zero"``,
    ``"mean"`` or ``"keep"``).
    """
    tokens, out = states[:, :-count, neurons], states.clone()
    each = states[..., neurons].flatten(1)[..., None] if shared else tokens
    peak = each.gather(1, each.abs().argmax(dim=1, keepdim=True)) * scale
    out[:, -count:, neurons] = peak
    if fill != "keep":
        new = mean_over(tokens, live) if fill == "mean" else torch.zeros_like(tokens)
        out[:, :-count, neurons] = torch.where(live[..., None], new, tokens)
    return out, state_effect(live)
