"""Edits of states: channels set, tokens overwritten, scaled and moved.

``mask`` and ``live`` are ``[batch pos]`` bool: the tokens to edit, and the live ones; ``state`` is the run's
scratch space, ``layout`` the packed positions of a packed tower, or None. All return the edited states
and the effect.
"""

from __future__ import annotations

import torch

from sinkscope.kernels.residual import mean_over, rows_of


def state_effect(mask, before=None, after=None):
    """The effect of an edit of states, which a kernel returns beside them.

    ``mask`` ``[batch pos]`` bool are the tokens it was to edit, ``before`` and ``after`` all states ``[batch
    pos d_model]``, or None where those tokens surely change.
    """
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
    """Set the channels ``dims`` of chosen tokens.

    ``how`` is ``"zero"``, ``"mean"`` (over the row's tokens in the mask ``value``), ``"set"`` (to
    ``value``, a number) or ``"clamp"`` (magnitude at most ``value``).
    """
    rows = rows_of(states, layout)
    part = rows[..., dims]
    if how == "mean":
        new = mean_over(part, value).to(part.dtype)
    elif how == "clamp":
        new = part.clamp(min=-value, max=value)
    else:
        new = 0.0 if how == "zero" else value
    edited = rows.clone()
    edited[..., dims] = new
    return put_back(states, edited, mask, layout), state_effect(mask, rows, edited)


def edit_states(states, state, mask, donor, layout=None):
    """Overwrite chosen tokens with donor states ``[batch pos d_model]``."""
    donor = donor.to(states.dtype)
    return put_back(states, donor, mask, layout), state_effect(mask, rows_of(states, layout), donor)


def scale_states(states, state, mask, factor):
    """Multiply chosen tokens by a factor (DIYSink's reweighting)."""
    scaled = (states.float() * factor).to(states.dtype)
    return put_back(states, scaled, mask, None), state_effect(mask, states, scaled)


def permute_states(states, state, order):
    """Reorder tokens: position ``i`` gets the token at ``order[i]``, ``[batch pos]``."""
    moved = order != torch.arange(order.shape[1], device=order.device)
    rows = states.gather(1, order[..., None].expand_as(states))
    return put_back(states, rows, moved, None), state_effect(moved, states, rows)


def append_tokens(states, state, live, count):
    """Append ``count`` zero tokens to ``[image pos d_model]``; a negative one removes the last again."""
    return torch.nn.functional.pad(states, (0, 0, 0, count)), state_effect(live)


def shift_neurons(states, state, live, neurons, count, scale, fill):
    """Move register neurons' activity from the image tokens to the registers (2506.08010).

    At the ``count`` registers, the last of ``[image pos d_mlp]``, each neuron gets ``scale`` times its
    largest activation over the tokens (with its sign); at the others 0, their mean, or what it was
    (``fill`` is ``"zero"``, ``"mean"`` or ``"keep"``).
    """
    tokens = states[:, :-count, neurons]
    peak = tokens.gather(1, tokens.abs().argmax(dim=1, keepdim=True)) * scale
    out = states.clone()
    out[:, -count:, neurons] = peak.expand(-1, count, -1)
    if fill != "keep":
        out[:, :-count, neurons] = 0.0 if fill == "zero" else tokens.mean(dim=1, keepdim=True)
    return out, state_effect(live)


def peak_neurons(states, state, mask):
    """Mean ``|activation|`` of every neuron over the chosen tokens, ``[image d_mlp]``."""
    return mean_over(states[:, : mask.shape[1]].abs(), mask)[:, 0]
