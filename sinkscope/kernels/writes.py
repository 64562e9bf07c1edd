"""What attention writes into the residual stream: per key group, per key, and in how many directions.

A head's output passes the output projection, and in some blocks more: a factor per channel
(LayerScale), a number, or a norm. For one query all of it is linear, since a norm of the whole, ``t``,
is a fixed map once its statistics are known::

    norm(t) = w * (t - mean t) / size(t) + b      so a part x of t adds   w * (x - mean x) / size(t)

with no mean in an RMS norm. Parts add up to the whole; biases belong to no key. Neither ``w`` nor the
kind of norm is looked up: they are measured by asking the module.
"""

from __future__ import annotations

import torch

from sinkscope.kernels.attention import arguments, ask, fit_keys, spans, unpack


def near(x, y, dtype):
    """Whether two vectors are the same up to rounding in ``dtype``."""
    size = torch.maximum(x.abs().max(), y.abs().max())
    return bool((x - y).abs().max() <= 16 * torch.finfo(dtype).eps * size)


def measure(part, like):
    """One thing between the output projection and the stream, as a map per channel.

    Args:
        part: A module, or a number or parameter that multiplies.
        like: The projection's weight, ``[d_model, ...]``.

    Returns:
        A dict of ``weight`` ``[d_model]`` and ``bias``, ``centred`` (whether the mean over channels is
        taken away), ``norm`` (whether each token is divided by its size) and the ``part``.

    Raises:
        ValueError: If it is neither a factor per channel nor a norm.
    """
    width, dtype = like.shape[0], like.dtype
    if not callable(part):
        weight = torch.as_tensor(part, device=like.device).float().flatten()
        return {"weight": weight, "bias": 0.0, "centred": False, "norm": False, "part": part}

    def answer(x):
        return part(x.to(dtype)[None, None]).float().flatten()

    unit = torch.ones(width, device=like.device)
    # A norm that takes the mean away leaves nothing of ones.
    centred = near(answer(unit), answer(-unit), dtype)
    if centred:
        unit[1::2] = -1
    up, down = answer(unit), answer(-unit)
    weight, bias = (up - down) / 2 * unit, (up + down) / 2
    norm = not near(answer(2 * unit) - bias, 2 * (up - bias), dtype)
    made = {"weight": weight, "bias": bias, "centred": centred, "norm": norm, "part": part}
    ramp = torch.linspace(-1, 2, width, device=like.device).to(dtype).float()
    got, want = answer(ramp) - bias, onward(ramp, made)
    if norm:
        want = want * (got.norm() / want.norm().clamp(min=1e-30))
    if not near(got, want, dtype):
        raise ValueError(
            "What lies between attention and the residual stream is neither a factor per channel nor "
            "a norm; expected one of them, because parts of attention's output cannot be followed "
            "through anything else. Read site='attn_out' instead, and report this model."
        )
    return made


def onward(x, passed):
    """The linear part of a map: ``[... d_model]`` without the division by a token's size."""
    if passed["centred"]:
        x = x - x.mean(dim=-1, keepdim=True)
    return x * passed["weight"]


def way(projection, parts):
    """The map from heads to the stream, but for what norms divide by.

    Args:
        projection: The output projection, weight ``[d_model, head * d_head]``.
        parts: What lies between it and the stream, in order: modules, numbers and parameters.

    Returns:
        The matrix ``[d_model, head * d_head]`` in fp32, and what every part was measured to be.
    """
    passed = [measure(part, projection.weight) for part in parts]
    matrix = projection.weight.float()
    for one in passed:
        matrix = onward(matrix.T, one).T
    return matrix, passed


def shares(call, projection, passed):
    """By what norms between attention and the stream multiply every query.

    Args:
        call: One attention call.
        projection: The output projection.
        passed: From `way`.

    Returns:
        ``[batch query]`` in fp32; ones ``[1 1]`` without a norm.
    """
    scale = torch.ones(1, 1, device=projection.weight.device)
    if not any(one["norm"] for one in passed):
        return scale
    written = ask(call)
    total = projection(written.flatten(2)).float()
    for one in passed:
        made = onward(total, one)
        if one["norm"]:
            normed = one["part"](total.to(written.dtype)).float() - one["bias"]
            size = normed.norm(dim=-1) / made.norm(dim=-1).clamp(min=1e-30)
            scale, made = scale * size, made * size[..., None]
        total = made + one["bias"]
    return scale


def contribution_norms(calls, state, groups, projection, parts=(), layout=None):
    """How much each key group adds to the residual stream through attention.

    ``||D sum_h W_O^h (A_h 1_g v_h)||_2`` per query, and the same for each head alone (Kobayashi et al.
    2020; used for sinks by Kang et al. 2503.03321). ``D`` is what lies between the output projection
    and the stream, at this query. The vectors of all groups and the biases add up to what attention
    adds.

    Args:
        calls: The attention calls of one site.
        state: The run's scratch space.
        groups: ``[batch key group]`` one-hot.
        projection: The attention module's output projection, ``[d_model, head * d_head]`` weight.
        parts: What lies between it and the stream, in order: modules, numbers and parameters.
        layout: ``[row pos]`` packed positions of a packed tower, or None.

    Returns:
        ``{"norms": [batch query group], "per_head": [batch head query group]}``.
    """
    matrix, passed = way(projection, parts)
    totals, heads_out, blocks, gram = [], [], None, None
    for call, (_, _, k_at, k_to) in zip(calls, spans(calls), strict=True):
        part = (
            groups[:, k_at:k_to] if len(calls) > 1 else fit_keys(groups, k_to, state.get("step", 0))
        )
        scale = shares(call, projection, passed)
        total, per_head = [], []
        for group in range(part.shape[-1]):
            written = ask(call, keep=part[..., group]).float()
            if gram is None:
                blocks = matrix.reshape(matrix.shape[0], *written.shape[2:])
                gram = torch.einsum("ohd,ohe->hde", blocks, blocks)
            square = torch.einsum("bqhd,hde,bqhe->bhq", written, gram, written)
            per_head.append(square.clamp(min=0).sqrt() * scale[:, None])
            total.append(torch.einsum("bqhd,ohd->bqo", written, blocks).norm(dim=-1) * scale)
        totals.append(torch.stack(total, dim=-1))
        heads_out.append(torch.stack(per_head, dim=-1))
    return {
        "norms": unpack(torch.cat(totals, dim=1), layout, 1),
        "per_head": unpack(torch.cat(heads_out, dim=2), layout, 2),
    }


def head_writes(calls, state, projection, live, parts=(), layout=None):
    """Per-head norm of every key's write, and the stable rank of every head's output.

    With ``u_j = D W_O^h v_j`` and ``U = S A u`` (Fesser et al. 2606.08105): ``||u_j||_2`` per key, and
    ``||U||_F^2 / sigma_1^2`` over the live queries, which is 1 if the head writes one direction only.
    ``D`` is what lies between the output projection and the stream. A norm there divides each query by
    a size of its own, which is in ``S`` and not in ``u``.

    Args:
        calls: The attention calls of one site.
        state: The run's scratch space (unused).
        projection: The output projection, weight ``[d_model, head * d_head]``.
        live: ``[batch query]`` bool in the model's layout.
        parts: What lies between it and the stream, in order: modules, numbers and parameters.
        layout: ``[row pos]`` packed positions of a packed tower, or None.

    Returns:
        ``{"norms": [batch head key], "rank": [batch head]}``. In a packed tower the rank is taken
        over all images together and repeated for each.
    """
    matrix, passed = way(projection, parts)
    norms, outputs, gram = [], [], None
    for call, (q_at, q_to, _, _) in zip(calls, spans(calls), strict=True):
        named, _ = arguments(call)
        value = named["value"].float()
        share = named["query"].shape[1] // value.shape[1]
        value = value.repeat_interleave(share, dim=1)
        if gram is None:
            blocks = matrix.reshape(matrix.shape[0], value.shape[1], value.shape[3])
            gram = torch.einsum("ohd,ohe->hde", blocks, blocks)
        square = torch.einsum("bhkd,hde,bhke->bhk", value, gram, value)
        norms.append(square.clamp(min=0).sqrt())
        rows = live[:, q_at:q_to] if len(calls) > 1 else live[:, -(q_to - q_at) :]
        scale = shares(call, projection, passed) * rows
        outputs.append(ask(call).float() * scale[:, :, None, None])
    written = torch.cat(outputs, dim=1)
    # U U^T and G^1/2 Y^T Y G^1/2 share their nonzero eigenvalues; the latter is d_head x d_head.
    values, vectors = torch.linalg.eigh(gram)
    root = vectors * values.clamp(min=0).sqrt()[:, None]
    inner = torch.einsum("bqhd,bqhe->bhde", written, written)
    spectrum = torch.linalg.eigvalsh(torch.einsum("hdi,bhde,hej->bhij", root, inner, root)).clamp(
        min=0
    )
    rank = spectrum.sum(-1) / spectrum.amax(-1).clamp(min=1e-30)
    if layout is not None:
        rank = rank.expand(layout.shape[0], -1)
    return {"norms": unpack(torch.cat(norms, dim=2), layout, 2), "rank": rank}
