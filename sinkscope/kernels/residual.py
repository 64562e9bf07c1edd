"""Questions asked to the residual stream. Every function takes states ``[batch pos d_model]``.

Everything is computed in fp32: squared norms of large towers overflow fp16. ``state`` is the run's
scratch space, ``layout`` the ``[row pos]`` packed positions of a packed tower, or None.
"""

from __future__ import annotations

import torch


def rows_of(states, layout):
    """States of a packed tower, ``[packed d]`` or ``[1 packed d]``, as ``[image pos d]``."""
    if layout is None:
        return states
    return states.reshape(-1, states.shape[-1])[layout.clamp(min=0)]


def live_at(live, states):
    """The live mask cut or extended to the positions of ``states`` (decode steps are live)."""
    if live.shape[1] == states.shape[1]:
        return live
    return torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)


def mean_over(x, mask):
    """The mean of ``x`` ``[batch pos any]`` over the positions in ``mask``, ``[batch 1 any]`` in fp32."""
    total = torch.where(mask[..., None], x.float(), 0.0).sum(1, keepdim=True)
    return total / mask.sum(1)[:, None, None].float().clamp(min=1)


def massive(states, state, live, k=4, layout=None):
    """The ``k`` largest absolute channels of every token and the median of ``|h|`` (Sun et al. 2024).

    ``{"values": [batch pos k] signed, "channels": [batch pos k], "median": [batch]}``; the median is over
    the tokens in ``live`` ``[batch pos]``.
    """
    h, medians = rows_of(states, layout).float(), []
    top = h.abs().topk(min(k, h.shape[-1]), dim=-1).indices
    for row, alive in zip(h, live_at(live, h), strict=True):
        mine = row[alive]
        medians.append(mine.abs().median() if mine.numel() else h.new_tensor(float("nan")))
    return {"values": h.gather(-1, top), "channels": top, "median": torch.stack(medians)}


def norms(states, state, layout=None):
    """L2 norm of every token, ``[batch pos]``."""
    return rows_of(states, layout).float().norm(dim=-1)


def dimension_scores(states, state, dims, rms=True, layout=None):
    """Sink-dimension value ``max over dims of |h_d|``, ``[batch pos]``.

    With ``rms`` it is divided by ``sqrt(mean_d h_d^2 + 1e-6)``, which bounds it by sqrt(D).
    """
    h = rows_of(states, layout).float()
    peak = h[..., dims].abs().amax(dim=-1)
    return peak / (h.pow(2).mean(dim=-1) + 1e-6).sqrt() if rms else peak


def cosine_to(states, state, anchor, layout=None):
    """Absolute cosine of every token with the token at position ``anchor`` ``[batch]``."""
    h = rows_of(states, layout).float()
    rows = torch.arange(h.shape[0], device=h.device)
    reference = h[rows, anchor.clamp(max=h.shape[1] - 1)]
    dot = torch.einsum("bpd,bd->bp", h, reference).abs()
    return dot / (h.norm(dim=-1) * reference.norm(dim=-1)[:, None]).clamp(min=1e-12)


def lens(states, state, norm, head, positions=None, k=5, layout=None):
    """Logit lens: the modules ``norm`` and ``head`` of the model's output applied to earlier states.

    ``positions`` ``[batch row]`` are read, -1 where absent, or all; the ``k`` likeliest tokens are kept.
    ``{"tokens": [batch row k], "logprobs": [batch row k], "entropy": [batch row]}``, NaN / -1 where absent.
    """
    gone = None
    if positions is not None and states.shape[1] > 1:
        index = positions.clamp(min=0)[..., None].expand(-1, -1, states.shape[-1])
        states, gone = states.gather(1, index), positions < 0
    logprobs = head(norm(states)).float().log_softmax(dim=-1)
    entropy = -(logprobs.exp() * logprobs).sum(dim=-1)
    values, tokens = logprobs.topk(min(k, logprobs.shape[-1]), dim=-1)
    if gone is not None:
        values = values.masked_fill(gone[..., None], float("nan"))
        tokens = tokens.masked_fill(gone[..., None], -1)
        entropy = entropy.masked_fill(gone, float("nan"))
    return {"tokens": tokens, "logprobs": values, "entropy": entropy}


def channels(states, state, index, layout=None):
    """The values of given channels, ``[batch pos channel]`` in fp32."""
    return rows_of(states, layout).float()[..., index]


def keep(states, state, layout=None):
    """The states themselves, ``[batch pos d_model]`` in fp32."""
    return rows_of(states, layout).float()


def group_means(states, state, groups, layout=None):
    """The mean state of every token group ``[batch pos group]`` bool, and how many tokens it has.

    ``{"means": [batch group d_model] fp32, NaN for an empty group; "count": [batch group]}``.
    """
    h = rows_of(states, layout).float()
    h = h.masked_fill(~groups.any(dim=-1, keepdim=True), 0.0)  # padding may hold anything
    count = groups.sum(dim=1)
    total = torch.einsum("bpg,bpd->bgd", groups.float(), h)
    means = total / count.clamp(min=1)[..., None]
    return {"means": means.masked_fill((count == 0)[..., None], float("nan")), "count": count}
