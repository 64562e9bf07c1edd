"""Questions asked to the model's own attention call, without an N x N matrix.

Let ``A`` be the attention weights of one call, ``[batch head query key]``. The model's kernel only
ever returns ``A @ v``. Two identities are enough for everything here:

* **values**: ``A @ x`` is the same call with ``x`` in place of the values. One-hot columns give the
  mass on token groups; ``1_g * v`` gives what group ``g`` writes.
* **weights**: ``w @ A`` is the gradient of ``sum(w * output)`` with respect to the values. Rows of
  ones give received attention; one-hot rows give attention patterns of chosen queries.

Both use the model's kernel, mask, scaling, soft-cap and window, so they are exact for it. The null
of any of them is the same call with ``q = 0``: uniform attention under the model's own mask.

An attention site is a list of ``calls``, because a packed vision tower calls once per window. A call
is ``(function, positional arguments, keyword arguments)`` with arguments
``module, query, key, value, mask`` as in ``transformers``' attention interface. Windows tile the
sequence: call ``i`` owns the queries and keys that follow those of call ``i - 1``.
"""

from __future__ import annotations

import torch

NAMES = ("module", "query", "key", "value", "attention_mask")


def arguments(call):
    """The call's arguments by name, and the remaining keyword arguments."""
    _, args, kwargs = call
    named = dict(zip(NAMES, args, strict=False))
    rest = {}
    for name, value in kwargs.items():
        if name in NAMES:
            named[name] = value
        else:
            rest[name] = value
    named.setdefault("attention_mask", None)
    return named, rest


def ask(call, query=None, key=None, value=None, float32=False, keep=None):
    """The model's own attention on other tensors.

    Args:
        call: One attention call.
        query: Replacement query ``[batch head query d_head]`` or None to keep the model's.
        key: Replacement key ``[batch kv_head key d_head]`` or None.
        value: Replacement value ``[batch kv_head key d_head]`` or None.
        float32: Whether to compute in fp32 whatever the model's dtype.
        keep: ``[batch key]`` weights of the values: what chosen keys write. Values that an edit
            replaced for some rows or heads are weighed after it.

    Returns:
        ``[batch query head d_head]``, as ``transformers`` lays it out.
    """
    named, rest = arguments(call)
    if keep is not None and hasattr(call[0], "recipe"):
        rest = {**rest, "keep": keep}
    elif keep is not None:
        value = (named["value"] if value is None else value) * keep[:, None, :, None].to(
            named["value"].dtype
        )
    mask = named["attention_mask"]
    tensors = [
        named["query"] if query is None else query,
        named["key"] if key is None else key,
        named["value"] if value is None else value,
    ]
    if float32:
        tensors = [t.float() for t in tensors]
        if mask is not None and mask.is_floating_point():
            mask = mask.float().clamp(min=torch.finfo(torch.float32).min)
    if mask is not None and mask.is_floating_point() and mask.dtype != tensors[0].dtype:
        mask = mask.to(tensors[0].dtype)
    # Autocast, which the model or a server may run under, would round what was asked for in fp32.
    device = tensors[0].device.type
    with torch.autocast(device, enabled=torch.is_autocast_enabled(device) and not float32):
        return call[0](named["module"], *tensors, mask, **rest)[0]


def spans(calls):
    """Where each call's queries and keys lie: ``[(query start, stop, key start, stop), ...]``."""
    out, q_at, k_at = [], 0, 0
    for call in calls:
        named, _ = arguments(call)
        q_to, k_to = q_at + named["query"].shape[2], k_at + named["key"].shape[2]
        out.append((q_at, q_to, k_at, k_to))
        q_at, k_at = q_to, k_to
    return out


def fit_keys(x, n_keys, step=0):
    """``x`` ``[batch pos group]`` of the prompt, brought to the keys that a call really has.

    Keys generated since the prompt get zeros; a sliding cache holds the last keys only.

    Args:
        x: Values of the prompt's positions.
        n_keys: Keys of the call.
        step: How many tokens were generated since the prompt.
    """
    missing = max(step, n_keys - x.shape[1])
    if missing > 0:
        pad = torch.zeros(x.shape[0], missing, x.shape[2], dtype=x.dtype, device=x.device)
        x = torch.cat([x, pad], dim=1)
    return x[:, -n_keys:]


def one_head(call):
    """The call on its first key-value head, with the query heads that share it.

    With ``q = 0`` every head sees the same, so a null needs no more. A call is returned whole if
    its heads may differ: learned sinks, or a tensor with an axis as long as there are heads.
    """
    named, rest = arguments(call)
    query, key, heads = named["query"], named["key"], named["query"].shape[1]
    extras = [named["attention_mask"], *rest.values()]
    by_head = any(torch.is_tensor(extra) and heads in extra.shape for extra in extras)
    if by_head or hasattr(named["module"], "sinks"):
        return call
    share = heads // key.shape[1]
    named = {
        **named,
        "query": query[:, :share],
        "key": key[:, :1],
        "value": named["value"][:, :1],
    }
    return call[0], (), {**named, **rest}


def weigh_values(call, x, null=False, float32=False):
    """``A @ x`` for every head.

    Args:
        call: One attention call.
        x: ``[batch key column]``; any number of columns.
        null: Whether to use ``q = 0``, so that ``A`` is uniform over the visible keys.
        float32: Whether to compute in fp32.

    Returns:
        ``[batch head query column]``.
    """
    if null:
        call = (getattr(call[0], "plain", call[0]), *call[1:])
    call = (getattr(call[0], "attends", call[0]), *call[1:])
    named, _ = arguments(call)
    value = named["value"]
    query = torch.zeros_like(named["query"]) if null else None
    width, out = value.shape[-1], []
    for start in range(0, x.shape[-1], width):
        part = x[..., start : start + width]
        columns = part.shape[-1]
        # Padded to the head dimension: another width would leave the fused kernel.
        padded = torch.zeros(
            value.shape[0], value.shape[2], width, dtype=value.dtype, device=value.device
        )
        padded[..., :columns] = part.to(value)
        padded = padded[:, None].expand(-1, value.shape[1], -1, -1)
        answer = ask(call, query=query, value=padded, float32=float32)
        out.append(answer[..., :columns].transpose(1, 2))
    return torch.cat(out, dim=-1)


def weigh_queries(call, weights, null=False):
    """``w @ A`` for every head, in fp32.

    Args:
        call: One attention call.
        weights: ``[batch row query]``; any number of rows.
        null: Whether to use ``q = 0``.

    Returns:
        ``[batch head row key]``.
    """
    if null:
        call = (getattr(call[0], "plain", call[0]), *call[1:])
    call = (getattr(call[0], "attends", call[0]), *call[1:])
    named, _ = arguments(call)
    query, value = named["query"].detach(), named["value"]
    heads, kv_heads, width = query.shape[1], value.shape[1], value.shape[-1]
    share = heads // kv_heads
    if share > width:
        raise ValueError(
            f"{share} query heads share one key-value head of {width} dimensions; expected at most "
            f"{width}, because each head is told apart by one dimension."
        )
    if null:
        query = torch.zeros_like(query)
    at_once, out = max(1, width // share), []
    for start in range(0, weights.shape[1], at_once):
        part = weights[:, start : start + at_once].float()
        rows = part.shape[1]
        with torch.enable_grad():
            probe = torch.zeros(
                value.shape, dtype=torch.float32, device=value.device, requires_grad=True
            )
            answer = ask(call, query=query, key=named["key"].detach(), value=probe, float32=True)
            seed = torch.zeros_like(answer)
            for head in range(heads):
                first = (head % share) * rows
                seed[:, :, head, first : first + rows] = part.transpose(1, 2)
            (grad,) = torch.autograd.grad(answer, probe, seed)
        # grad: [batch kv_head key d_head]; head h of group g sits in columns (h % share) * rows.
        grad = grad[..., : share * rows].reshape(*grad.shape[:3], share, rows)
        grad = grad.permute(0, 1, 3, 4, 2)
        out.append(grad.reshape(grad.shape[0], heads, rows, grad.shape[-1]))
    return torch.cat(out, dim=2).detach()


def visible_queries(call, live):
    """How many live queries can see each key.

    Args:
        call: One attention call.
        live: ``[batch query]`` bool, False at padding.

    Returns:
        ``[batch key]`` fp32 counts.
    """
    named, rest = arguments(call)
    query, key, mask = named["query"], named["key"], named["attention_mask"]
    n_query, n_key = query.shape[2], key.shape[2]
    weights = live.float()
    if mask is not None and mask.ndim == 4:
        seen = mask[..., :n_key]
        if seen.dtype != torch.bool:
            seen = seen > torch.finfo(seen.dtype).min / 2
        seen = seen[:, 0].expand(weights.shape[0], -1, -1)
        return torch.einsum("bq,bqk->bk", weights, seen.float())
    causal = rest.get("is_causal")
    if causal is None:
        causal = getattr(named["module"], "is_causal", True)
    if not causal or n_query == 1:
        return weights.sum(1, keepdim=True).expand(-1, n_key)
    from_here = weights.flip(1).cumsum(1).flip(1)
    window = rest.get("sliding_window")
    if window is not None and window < n_query:
        later = torch.cat([from_here[:, window:], torch.zeros_like(from_here[:, :window])], dim=1)
        from_here = from_here - later
    return from_here


def pick(x, rows, dim):
    """The query rows ``[batch row]`` of ``x`` at ``dim``; NaN where a row is -1."""
    if rows is None or x.shape[dim] == 1:
        return x
    shape = [1] * x.ndim
    shape[0], shape[dim] = rows.shape
    size = list(x.shape)
    size[dim] = rows.shape[1]
    index = rows.clamp(min=0).reshape(shape).expand(size)
    return x.gather(dim, index).masked_fill((rows < 0).reshape(shape), float("nan"))


def visibility(call):
    """What decides which keys a query sees: calls that agree on it share their nulls."""
    named, rest = arguments(call)
    module = named["module"]
    causal = rest.get("is_causal")
    if causal is None:
        causal = getattr(module, "is_causal", True)
    learned = hasattr(module, "sinks") or rest.get("s_aux") is not None
    own = id(module) if learned else None
    return id(named["attention_mask"]), rest.get("sliding_window"), causal, own


def group_mass(calls, state, groups, rows=None, null=True, float32=False, layout=None):
    """Attention mass on each key group, per head and query, and its null.

    Args:
        calls: The attention calls of one site.
        state: The run's scratch space; nulls are shared by layers with the same mask.
        groups: ``[batch key group]`` one-hot (or any weights).
        rows: ``[batch row]`` query rows to keep, -1 where absent, or None for all.
        null: Whether to compute the null.
        float32: Whether to compute in fp32.
        layout: ``[row pos]`` packed positions of a packed tower, or None.

    Returns:
        ``{"mass": [batch head query group], "null": [batch query group]}``.
    """
    masses, nulls = [], []
    for call, (_, _, k_at, k_to) in zip(calls, spans(calls), strict=True):
        named, _ = arguments(call)
        part = (
            groups[:, k_at:k_to] if len(calls) > 1 else fit_keys(groups, k_to, state.get("step", 0))
        )
        masses.append(weigh_values(call, part, float32=float32).float())
        if null:
            mark = ("mass", id(groups), float32, visibility(call), k_at, k_to)
            shape = tuple(named["query"].shape)
            if (mark, shape) not in state:
                answer = weigh_values(one_head(call), part, null=True, float32=float32)
                # The mask is kept so that its id cannot be given to another one.
                state[(mark, shape)] = (answer[:, 0].float(), named["attention_mask"])
            nulls.append(state[(mark, shape)][0])
    out = {"mass": pick(unpack(torch.cat(masses, dim=2), layout, 2), rows, 2)}
    if null:
        out["null"] = pick(unpack(torch.cat(nulls, dim=1), layout, 1), rows, 1)
    return out


def patterns(calls, state, rows, layout=None):
    """Attention weights of chosen query rows, without the other rows.

    Args:
        calls: The attention calls of one site.
        state: The run's scratch space.
        rows: ``[batch row]`` positions of queries in the model's layout, -1 where a row is absent.
            At a decode step of one query the rows are that query.
        layout: ``[row pos]`` packed positions of a packed tower, or None.

    Returns:
        ``[batch head row key]``; rows that are absent are NaN, keys of another window are 0.
    """
    located = spans(calls)
    n_query, n_key = located[-1][1], located[-1][3]
    if len(calls) == 1 and n_query == 1:
        rows = torch.where(rows >= 0, torch.zeros_like(rows), rows)[:, :1]
    places = torch.arange(n_query, device=rows.device)
    onehot = (rows[..., None] == places).float()
    parts = [
        weigh_queries(call, onehot[..., q_at:q_to])
        for call, (q_at, q_to, _, _) in zip(calls, located, strict=True)
    ]
    pattern = torch.cat(parts, dim=-1)
    absent = (rows < 0)[:, None, :, None].expand(-1, pattern.shape[1], -1, n_key)
    pattern = pattern.masked_fill(absent, float("nan"))
    if layout is None:
        return pattern
    return by_image(pattern, rows, layout)


def by_image(pattern, rows, layout):
    """Patterns of a packed tower as ``[image head row key]``: each row beside its image's keys."""
    out = []
    for image in range(layout.shape[0]):
        index = layout[image].clamp(min=0)
        mine = torch.isin(rows[0], layout[image][layout[image] >= 0])
        part = pattern[0][:, mine][..., index]
        part = part.masked_fill((layout[image] < 0)[None, None], float("nan"))
        out.append(part)
    most = max(1, *(part.shape[1] for part in out))
    padded = [
        torch.nn.functional.pad(part, (0, 0, 0, most - part.shape[1]), value=float("nan"))
        for part in out
    ]
    return torch.stack(padded)


def value_norms(calls, state, layout=None):
    """L2 norm of the value vectors, ``[batch kv_head key]``; several query heads share a kv head.

    Raises:
        ValueError: If queries or heads read different ones.
    """
    one_value_per_key(calls, "ValueNorms")
    norms = [arguments(call)[0]["value"].float().norm(dim=-1) for call in calls]
    return unpack(torch.cat(norms, dim=2), layout, 2)


def values(calls, state, layout=None):
    """The value vectors themselves, ``[batch kv_head key d_head]`` in fp32.

    Raises:
        ValueError: If queries or heads read different ones.
    """
    one_value_per_key(calls, "AttentionValues")
    return unpack(
        torch.cat([arguments(call)[0]["value"].float() for call in calls], dim=2), layout, 2
    )


def one_value_per_key(calls, probe):
    """Refuse an edit under which heads or queries read different values of one key.

    Raises:
        ValueError: If there is one.
    """
    if any(getattr(call[0], "recipe", {}).get("values") for call in calls):
        raise ValueError(
            f"Got an edit of values for some heads or queries beside {probe}; expected edits for all "
            "of them, because here heads and queries of one key read different values. Read them in "
            "a run without that edit, or write heads=None and queries=None."
        )


def unpack(x, layout, dim):
    """A packed tower's result, ``[1 ... packed ...]``, as one row per image; others unchanged.

    Args:
        x: Result with batch first and the packed position axis at ``dim``.
        layout: ``[image pos]`` index of each image's tokens in the packed sequence, -1 for padding,
            or None if the tower already has one row per image.
        dim: The position axis.

    Returns:
        ``[image ... pos ...]`` with NaN at padding.
    """
    if layout is None:
        return x
    flat = layout.clamp(min=0).reshape(-1)
    picked = x[0].index_select(dim - 1, flat)
    shape = list(picked.shape)
    shape[dim - 1 : dim] = [layout.shape[0], layout.shape[1]]
    picked = picked.reshape(shape).movedim(dim - 1, 0)
    gone = layout < 0
    view = [layout.shape[0]] + [1] * (picked.ndim - 1)
    view[dim] = layout.shape[1]
    return picked.masked_fill(gone.reshape(view), float("nan"))
