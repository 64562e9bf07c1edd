"""Edits of states: channels set, tokens overwritten, scaled and moved."""

from __future__ import annotations

import torch


def state_effect(mask, before=None, after=None):
    """The effect of an edit of states: how many of its tokens it changed.

    Args:
        mask: ``[batch pos]`` bool: the tokens it was to edit.
        before: Their states, ``[batch pos d_model]``, or None where all of them change.
        after: The same after the edit.

    Returns:
        ``{"rows", "empty", "tokens", "count": [batch]}``, what a kernel returns beside the states.
    """
    zero = torch.zeros(mask.shape[0], dtype=torch.long, device=mask.device)
    changed = mask if before is None else mask & (before != after).any(dim=-1)
    count = changed.sum(1)
    return {"rows": count, "empty": zero, "tokens": mask.sum(1), "count": count}


def by_row(states, layout):
    """States with one row per image: ``[packed d_model]`` of a packed tower as ``[image pos d_model]``."""
    if layout is None:
        return states
    return states.reshape(-1, states.shape[-1])[layout.clamp(min=0)]


def put_back(states, rows, mask, layout):
    """``states`` with chosen tokens of ``rows`` ``[image pos d_model]`` in their places."""
    if layout is None:
        return torch.where(mask[..., None], rows, states)
    flat = states.reshape(-1, states.shape[-1]).clone()
    flat[layout[mask]] = rows[mask]
    return flat.reshape(states.shape)


def edit_channels(states, state, mask, dims, how, value=None, layout=None):
    """Set chosen channels of chosen tokens.

    Args:
        states: ``[batch pos d_model]``, or ``[packed d_model]``.
        state: The run's scratch space.
        mask: ``[batch pos]`` bool.
        dims: Channel indices.
        how: ``"zero"``, ``"mean"`` (over the row's tokens in the mask ``value``), ``"set"`` (to
            ``value``, a number) or ``"clamp"`` (magnitude at most ``value``).
        value: See ``how``.
        layout: Packed layout or None.

    Returns:
        The edited states and the effect.
    """
    rows = by_row(states, layout)
    part = rows[..., dims]
    if how == "zero":
        new = torch.zeros_like(part)
    elif how == "mean":
        weight = value[..., None].float()
        total = torch.where(value[..., None], part.float(), 0.0).sum(1, keepdim=True)
        new = (total / weight.sum(1, keepdim=True).clamp(min=1)).to(part.dtype).expand_as(part)
    elif how == "clamp":
        new = part.clamp(min=-value, max=value)
    else:
        new = torch.full_like(part, value)
    edited = rows.clone()
    edited[..., dims] = new
    return put_back(states, edited, mask, layout), state_effect(mask, rows, edited)


def edit_states(states, state, mask, donor, layout=None):
    """Overwrite chosen tokens with donor states ``[batch pos d_model]``."""
    donor = donor.to(states.dtype)
    return put_back(states, donor, mask, layout), state_effect(mask, by_row(states, layout), donor)


def scale_states(states, state, mask, factor):
    """Multiply chosen tokens by a factor, ``[batch pos]`` mask (DIYSink's reweighting)."""
    scaled = (states.float() * factor).to(states.dtype)
    return put_back(states, scaled, mask, None), state_effect(mask, states, scaled)


def permute_states(states, state, order):
    """Reorder tokens: position ``i`` gets the token at ``order[i]``, ``[batch pos]``."""
    moved = order != torch.arange(order.shape[1], device=order.device)
    rows = states.gather(1, order[..., None].expand_as(states))
    return put_back(states, rows, moved, None), state_effect(moved, states, rows)


def append_tokens(states, state, live, count):
    """Append ``count`` zero tokens to ``[image pos d_model]``."""
    zeros = torch.zeros(
        states.shape[0], count, states.shape[2], dtype=states.dtype, device=states.device
    )
    state["registers"] = count
    return torch.cat([states, zeros], dim=1), state_effect(live)


def drop_tokens(states, state, live, count):
    """Remove the last ``count`` tokens again."""
    state["registers"] = 0
    return states[:, :-count], state_effect(live)


def shift_neurons(states, state, live, neurons, count, scale, fill):
    """Move register neurons' activity from the image tokens to the registers (2506.08010).

    At the registers each neuron gets ``scale`` times its largest activation over the tokens (with
    its sign); at the others 0, their mean, or what it was.

    Args:
        states: Neurons ``[image pos d_mlp]``, registers last.
        state: The run's scratch space (unused).
        live: ``[image pos]`` bool.
        neurons: Neuron indices.
        count: How many registers.
        scale: The factor.
        fill: ``"zero"``, ``"mean"`` or ``"keep"``.

    Returns:
        The edited neurons and the effect.
    """
    part = states[..., neurons]
    tokens = part[:, :-count]
    at = tokens.abs().argmax(dim=1, keepdim=True)
    peak = tokens.gather(1, at) * scale
    if fill == "zero":
        rest = torch.zeros_like(tokens)
    elif fill == "mean":
        rest = tokens.mean(dim=1, keepdim=True).expand_as(tokens)
    else:
        rest = tokens
    out = states.clone()
    out[..., neurons] = torch.cat([rest, peak.expand(-1, count, -1)], dim=1)
    return out, state_effect(live)


def peak_neurons(states, state, mask):
    """Mean ``|activation|`` of every neuron over the chosen tokens, ``[image d_mlp]``."""
    weight = mask[..., None].float()
    size = states[:, : mask.shape[1]].float().abs()
    return (size * weight).sum(1) / weight.sum(1).clamp(min=1)
