"""Questions asked to the model's own attention call, without an N x N matrix.

Let ``A`` be the attention weights of one call, ``[batch head query key]``. The model's kernel only
ever returns ``A @ v``. Two identities are enough for everything here:

* **values**: ``A @ x`` is the same call with ``x`` in place of the values. One-hot columns give the
  mass on token groups; ``1_g * v`` gives what group ``g`` writes.
* **weights**: ``w @ A`` is the gradient of ``sum(w * output)`` with respect to the values. Rows of
  ones give received attention; one-hot rows give attention patterns of chosen queries.

The null of each is the same call with ``q = 0``: uniform attention under the model's own mask.

An attention site is a list of ``calls``, one per window of a packed vision tower, which tile the
sequence. A call is ``(function, positional arguments, keyword arguments)`` as in ``transformers``.
``state`` is the run's scratch space, ``layout`` the ``[row pos]`` of a packed tower, or None.
"""

import torch

from sinkscope.kernels.residual import picked

WRITTEN = ("sdpa_attention_forward", "eager_attention_forward")  # they take any mask
EXTRA = 8  # head dimensions are added in eights, which keeps fused kernels
NAMES = ("module", "query", "key", "value", "attention_mask")


def arguments(call):
    """The call's arguments by name, and the remaining keyword arguments."""
    _, args, kwargs = call
    named, rest = {"attention_mask": None, **dict(zip(NAMES, args, strict=False))}, {}
    for name, value in kwargs.items():
        (named if name in NAMES else rest)[name] = value
    return named, rest


def key_of(call):
    """The key of an attention call."""
    _, args, kwargs = call
    return args[2] if len(args) > 2 else kwargs["key"]


def query_of(call):
    """The query of an attention call."""
    _, args, kwargs = call
    return args[1] if len(args) > 1 else kwargs["query"]


def ask(call, query=None, key=None, value=None, float32=False, keep=None):
    """The model's own attention on other tensors ``[batch head pos d_head]``, ``[batch query head d_head]``.
    ``float32`` computes in fp32; ``keep`` ``[batch key]`` weighs the values after edits of them."""
    named, rest = arguments(call)
    given = {"query": query, "key": key, "value": value}
    tensors = [named[name] if x is None else x for name, x in given.items()]
    mask = named["attention_mask"]
    if keep is not None and hasattr(call[0], "recipe"):
        rest = {**rest, "keep": keep}
    elif keep is not None:
        tensors[2] = tensors[2] * keep[:, None, :, None].to(named["value"].dtype)
    tensors = [t.float() for t in tensors] if float32 else tensors
    if torch.is_tensor(mask) and mask.is_floating_point():
        mask = mask.float().clamp(min=torch.finfo(torch.float32).min) if float32 else mask
        mask = mask.to(tensors[0].dtype)
    device = tensors[0].device.type
    if not (float32 and torch.is_autocast_enabled(device)):
        return call[0](named["module"], *tensors, mask, **rest)[0]
    # Autocast, which the model or a server may run under, would round what was asked for in fp32.
    with torch.autocast(device, enabled=False):
        return call[0](named["module"], *tensors, mask, **rest)[0]


def is_causal(named, rest):
    """Whether a call without a mask hides later keys."""
    causal = rest.get("is_causal")
    return getattr(named["module"], "is_causal", True) if causal is None else causal


def attending(call, null):
    """The call without edits of values, which leave attention as it is; without any for a null."""
    function = getattr(call[0], "plain", call[0]) if null else call[0]
    return (getattr(function, "attends", function), *call[1:])


def learned_sink(call):
    """Whether a learned sink takes part of the attention."""
    return takes_sink(*arguments(call))


def takes_sink(named, rest):
    """The same for arguments."""
    return has_sinks(named["module"]) or rest.get("s_aux") is not None


def has_sinks(module):
    """Whether a module has sinks as a parameter, or as a plain attribute."""
    own = module.__dict__
    return "sinks" in own or "sinks" in own.get("_parameters", ())


def spans(calls):
    """Where each call's queries and keys lie: ``[(query start, stop, key start, stop), ...]``."""
    out, q_to, k_to = [], 0, 0
    for call in calls:
        q_at, k_at = q_to, k_to
        q_to, k_to = q_at + query_of(call).shape[2], k_at + key_of(call).shape[2]
        out.append((q_at, q_to, k_at, k_to))
    return out


def fit_keys(x, n_keys, step=0, fill=0):
    """``x`` ``[... pos any]`` of the prompt at a call's last keys, with ``fill`` at generated ones."""
    missing = max(step, n_keys - x.shape[-2])
    return torch.nn.functional.pad(x, (0, 0, 0, missing), value=fill)[..., -n_keys:, :]


def by_call(calls, groups, state):
    """Every call with its span, and its part of ``groups`` ``[batch key group]``."""
    for call, span in zip(calls, spans(calls), strict=True):
        yield call, span, keys_in(groups, span, len(calls) > 1, state)


def keys_in(groups, span, windows, state):
    """The part of ``groups`` ``[batch key group]`` at the keys of a call, which may be one of several windows."""
    if windows:
        return groups[:, slice(*span[2:])]
    return fit_keys(groups, span[3], state.get("step", 0))


def one_head(call):
    """The call on its first key-value head, enough where ``q = 0``; whole if its heads may differ."""
    named, rest = arguments(call)
    key, heads = named["key"], named["query"].shape[1]
    extras = [named["attention_mask"], *rest.values()]
    by_head = any(torch.is_tensor(extra) and heads in extra.shape for extra in extras)
    if by_head or has_sinks(named["module"]):
        return call
    query, value = named["query"][:, : heads // key.shape[1]], named["value"][:, :1]
    return call[0], (), {**named, **rest, "query": query, "key": key[:, :1], "value": value}


def padded(x, value):
    """``x`` ``[batch key column]`` as values of a call, as many as these hold at once: ``[(columns, tensor)]``."""
    out, width = [], value.shape[-1]
    for part in x.split(width, dim=-1):
        # Padded to the head dimension: another width would leave the fused kernel.
        wide = torch.nn.functional.pad(part.to(value), (0, width - part.shape[-1]))
        wide = wide.expand(value.shape[0], -1, -1)[:, None].expand(-1, value.shape[1], -1, -1)
        out.append((part.shape[-1], wide))
    return out


def weigh_values(call, x, null=False, float32=False):
    """``A @ x`` of any ``[batch key column]``, ``[batch head query column]``; with ``null`` at ``q = 0``.
    ``x`` may also be what `padded` made of it."""
    call = attending(call, null)
    named, _ = arguments(call)
    query, out = torch.zeros_like(named["query"]) if null else None, []
    for columns, values in padded(x, named["value"]) if torch.is_tensor(x) else x:
        answer = ask(call, query=query, value=values, float32=float32)
        out.append(answer[..., :columns].transpose(1, 2))
    return torch.cat(out, dim=-1) if len(out) > 1 else out[0]


def weights_on(call, start, stop, float32=False):
    """Attention weights on the keys from ``start`` to ``stop``, ``[batch head query key]``."""
    key = arguments(call)[0]["key"]
    every = torch.arange(key.shape[2], device=key.device)
    return weigh_values(call, (every[:, None] == every[start:stop])[None], float32=float32)


def weigh_queries(call, weights, null=False):
    """``w @ A`` for every head, in fp32: any ``[batch row query]`` as ``[batch head row key]``."""
    call = attending(call, null)
    named, _ = arguments(call)
    query, value = named["query"].detach(), named["value"]
    heads, width = query.shape[1], value.shape[-1]
    share = heads // value.shape[1]
    if share > width:
        raise ValueError(
            f"{share} query heads share one key-value head of {width} dimensions; expected at most "
            f"{width}, because each head is told apart by one dimension."
        )
    query, key, out = torch.zeros_like(query) if null else query, named["key"].detach(), []
    for part in weights.split(width // share, dim=1):
        rows = part.shape[1]
        with torch.enable_grad():
            probe = torch.zeros(value.shape, device=value.device, requires_grad=True)
            answer = ask(call, query=query, key=key, value=probe, float32=True)
            seed = torch.zeros_like(answer)
            for head in range(heads):
                first = (head % share) * rows
                seed[:, :, head, first : first + rows] = part.transpose(1, 2)
            (grad,) = torch.autograd.grad(answer, probe, seed)
        # grad: [batch kv_head key d_head]; head h of group g sits in columns (h % share) * rows.
        grad = grad[..., : share * rows].unflatten(-1, (share, rows)).permute(0, 1, 3, 4, 2)
        out.append(grad.flatten(1, 2))
    return torch.cat(out, dim=2).detach()


def pick(x, rows, dim):
    """The query rows ``[batch row]`` of ``x`` at ``dim``; NaN where a row is -1."""
    if rows is None or x.shape[dim] == 1:
        return x
    rows = rows.reshape(len(rows), *[1] * (dim - 1), -1, *[1] * (x.ndim - dim - 1))
    index = rows.clamp(min=0).expand(*x.shape[:dim], -1, *x.shape[dim + 1 :])
    return x.gather(dim, index).masked_fill(rows < 0, float("nan"))


def shared_null(state, call, mark, make, *options):
    """What ``make(call, *options)`` gives, once per run for calls whose queries see the same keys."""
    named, rest = arguments(call)
    mask, own = named["attention_mask"], id(named["module"]) if takes_sink(named, rest) else None
    ends = rest.get("cu_seq_lens_q")  # in a packed tower under a flash kernel these are the windows
    seen = (id(mask), id(ends), rest.get("sliding_window"), is_causal(named, rest), own)
    key = (mark, seen, tuple(named["query"].shape))
    if key not in state:
        # What the key has by its id is kept, so that the id cannot be given to another one.
        state[key] = (make(one_head(call), *options), mask, ends, options)
    return state[key][0]


def group_mass(calls, state, groups, rows=None, null=True, float32=False, layout=None):
    """Attention mass on key groups: ``{"mass": [batch head query group], "null": [batch query group]}``.
    ``groups`` ``[batch key group]`` are one-hot, or any weights; ``rows`` ``[batch row]`` are the queries to
    keep, -1 where absent, or None for all."""
    masses, nulls, few = [], [], None
    for call, span in zip(calls, spans(calls), strict=True):
        mark, value = ("mass", id(groups), float32, *span[2:]), arguments(call)[0]["value"]
        key = ("columns", *mark, value.shape, value.dtype)
        if key not in state:
            part = keys_in(groups, span, len(calls) > 1, state)
            state[key] = part, padded(part, value), groups
        part, columns, _ = state[key]
        few = only(call, rows, state) if rows is not None and layout is None else None
        found = weigh_values(few or call, columns, float32=float32)
        # Its own memory: a view would hold all columns that the kernel was asked for.
        masses.append(found.to(torch.float32, memory_format=torch.contiguous_format, copy=True))
        if null:
            flat = shared_null(state, call, mark, weigh_values, part, True, float32)
            nulls.append(flat)
    mass = masses[0] if len(masses) == 1 else torch.cat(masses, dim=2)
    if few is None:
        mass = pick(unpack(mass, layout, 2), rows, 2)
    elif absent(rows, state):
        mass = mass.masked_fill((rows < 0)[:, None, :, None], float("nan"))
    out = {"mass": mass}
    if null:
        key = ("null", id(rows), *map(id, nulls))
        if key not in state:
            flat = torch.cat([flat[:, 0] for flat in nulls], dim=1).float()
            state[key] = pick(unpack(flat, layout, 1), rows, 1), rows, nulls
        out["null"] = state[key][0]
    return out


def absent(rows, state):
    """Whether some of the ``rows`` are -1; looked at once per pass."""
    key = ("absent", id(rows))
    if key not in state:
        state[key] = bool((rows < 0).any()), rows
    return state[key][0]


def only(call, rows, state):
    """The call of some queries ``[batch row]`` alone, under the mask that they have in it; None where that
    is no gain, or where more than queries, keys and the mask decides what they see."""
    named, rest = arguments(call)
    query, mask = named["query"], named["attention_mask"]
    n_query, n_key = query.shape[2], named["key"].shape[2]
    plain = getattr(call[0], "__name__", "") in WRITTEN
    extras = [rest.get("sliding_window") if mask is None else None, rest.get("position_bias")]
    if not plain or 4 * rows.shape[1] > n_query or any(x is not None for x in extras):
        return None
    # Eager attention hides nothing without a mask.
    causal = mask is None and call[0].__name__ == WRITTEN[0] and is_causal(named, rest)
    key = ("only", id(rows), id(mask), causal, n_query, n_key, query.dtype)
    if key not in state:
        index, seen = rows.clamp(min=0)[:, None, :, None], None
        if mask is not None:
            seen = mask.expand(len(rows), -1, -1, -1)[..., :n_key]
            seen = seen.gather(2, index.expand(-1, mask.shape[1], -1, n_key))
        elif causal and not bool((rows == n_key - 1).all()):
            hidden = torch.arange(n_key, device=rows.device) > index
            seen = torch.zeros(hidden.shape, dtype=query.dtype, device=rows.device)
            seen = seen.masked_fill_(hidden, float("-inf"))
        state[key] = index, seen, (rows, mask)
    index, seen, _ = state[key]
    query = query.gather(2, index.expand(-1, query.shape[1], -1, query.shape[-1]))
    return call[0], (), {**named, **rest, "query": query, "attention_mask": seen}


def patterns(calls, state, rows, layout=None):
    """Attention weights of chosen query rows, ``[batch head row key]``, without the other rows.

    ``rows`` ``[batch row]`` are positions in the model's layout, -1 where a row is absent; at a decode
    step of one query they are that query. Absent rows are NaN, keys of another window are 0. Those of a
    packed tower are ``[image head row key]``, each row with the keys of its image.
    """
    located = spans(calls)
    n_query, nan = located[-1][1], float("nan")
    if len(calls) == 1 and n_query == 1:
        rows = rows.clamp(max=0)[:, :1]
    onehot = (rows[..., None] == torch.arange(n_query, device=rows.device)).float()
    parts = [
        weigh_queries(call, onehot[..., q_at:q_to])
        for call, (q_at, q_to, _, _) in zip(calls, located, strict=True)
    ]
    pattern = torch.cat(parts, dim=-1).masked_fill((rows < 0)[:, None, :, None], nan)
    if layout is None:
        return pattern
    out = []
    for at in layout:
        part = pattern[0][:, torch.isin(rows[0], at[at >= 0])][..., at]
        out.append(part.masked_fill((at < 0)[None, None], nan))
    most, pad = max(1, *(part.shape[1] for part in out)), torch.nn.functional.pad
    return torch.stack([pad(part, (0, 0, 0, most - part.shape[1]), value=nan) for part in out])


def value_norms(calls, state, layout=None):
    """L2 norm of the value vectors, ``[batch kv_head key]``; several query heads share a kv head."""
    return values(calls, state, layout, norm=True)


def values(calls, state, layout=None, norm=False, chosen=None):
    """The value vectors, ``[batch kv_head key d_head]``, of all tokens or those ``chosen``, see `picked`; or
    with ``norm`` their L2 norms in fp32."""
    if any(getattr(call[0], "recipe", {}).get("values") for call in calls):
        probe = "ValueNorms" if norm else "AttentionValues"
        raise ValueError(
            f"Got an edit of values for some heads or queries beside {probe}; expected edits for all of "
            "them, because here heads and queries of one key read different values. Read them in a run "
            "without that edit, or write heads=None and queries=None."
        )
    found = torch.cat([arguments(call)[0]["value"] for call in calls], dim=2)
    return picked(unpack(found.float().norm(dim=-1) if norm else found, layout, 2), chosen, 2)


def unpack(x, layout, dim):
    """A packed tower's ``[1 ... packed ...]`` as ``[image ... pos ...]``, NaN at padding; others as is."""
    if layout is None:
        return x
    picked = x[0].index_select(dim - 1, layout.clamp(min=0).flatten())
    picked = picked.unflatten(dim - 1, tuple(layout.shape)).movedim(dim - 1, 0)
    absent = (layout < 0).reshape(len(layout), *[1] * (dim - 1), -1, *[1] * (picked.ndim - dim - 1))
    return picked.masked_fill(absent, float("nan"))
