"""Test-time registers: extra tokens in the vision tower that take over what outlier patches hold."""

from __future__ import annotations

import torch

from sinkscope.kernels.states import state_effect


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
