"""What attention writes into the residual stream: per key group, per key, and in how many directions.

A head's output passes the output projection, and in some blocks more: a factor per channel
(LayerScale), a number, or a norm. For one query all of it is linear, since a norm of the whole, ``t``,
is a fixed map once its statistics are known::

    norm(t) = w * (t - mean t) / size(t) + b      so a part x of t adds   w * (x - mean x) / size(t)

with no mean in an RMS norm. Parts add up to the whole; biases belong to no key. The modules are asked
and no weight is looked up, because adapters, 8 bit, hooks and offload apply others than they show. The
answers are compared with what the modules write in the pass, and that with what the block adds.

``projection`` is the output projection; ``parts`` what lies between it and the stream, in order: modules,
numbers and parameters; ``live`` ``[batch query]`` bool in the model's layout, or None for all.
"""

import torch

from sinkscope.kernels.attention import arguments, ask, by_call, unpack
from sinkscope.kernels.residual import live_at

SIZE = 256.0  # the largest number in a question to a projection: beside it a bias rounds little


def quantised(weight):
    """Whether a weight is kept in fewer bits: as whole numbers, or as a tensor that is made of others."""
    return not weight.is_floating_point() or hasattr(weight, "__tensor_flatten__")


def near(x, y, dtype):
    """Whether two vectors are the same up to rounding in ``dtype``."""
    return bool((x - y).abs().max() <= 16 * torch.finfo(dtype).eps * x.abs().max())


def measure(part, like):
    """One of the parts as a map per channel, from what the projection wrote, ``like`` ``[... d_model]``.
    ``centred``: the mean over channels is taken away; ``norm``: each token is divided by its size. ValueError
    if it is neither a factor per channel nor a norm."""
    width, dtype = like.shape[-1], like.dtype
    if not callable(part):
        weight = torch.as_tensor(part, device=like.device).float()
        return {"weight": weight, "bias": 0.0, "centred": False, "norm": False}

    def answer(x):
        return part(x.to(dtype)[None, None]).float()

    unit = torch.ones(width, device=like.device)
    # A norm that takes the mean away leaves nothing of ones.
    centred = near(answer(unit), answer(-unit), dtype)
    if centred:
        unit[1::2] = -1
    up, down = answer(unit), answer(-unit)
    weight, bias = (up - down) / 2 * unit, (up + down) / 2
    norm = not near(answer(2 * unit) - bias, 2 * (up - bias), dtype)
    made = {"weight": weight, "bias": bias, "centred": centred, "norm": norm, "part": part}
    ramp = torch.linspace(-1, 2, width, device=like.device)
    got, want = answer(ramp) - bias, onward(ramp, made)
    want = want * (got.norm() / want.norm()) if norm else want
    if not near(got, want, dtype):
        raise ValueError(
            "What lies between attention and the residual stream is neither a factor per channel nor "
            "a norm; expected one of them, because parts of attention's output cannot be followed "
            "through anything else. Read site='attn_out' instead, and report this model."
        )
    return made


def onward(x, *passed):
    """The linear part of maps of ``[... d_model]``, without the division by a token's size."""
    for one in passed:
        x = (x - x.mean(dim=-1, keepdim=True) if one["centred"] else x) * one["weight"]
    return x


def answers(projection, rows):
    """What a module adds to its answer to zero, ``[row d_model]``, and that answer, its bias, in fp32.
    Each of ``rows`` ``[row width]`` is asked times a power of two that brings it near `SIZE`."""
    peak = rows.float().abs().amax(dim=-1, keepdim=True).clamp(min=1e-30)
    times = (SIZE / peak).log2().floor().exp2()
    asked = (rows.float() * times).to(rows.dtype)
    out = projection(torch.cat([asked, torch.zeros_like(asked[:1])])[None])[0].float()
    return (out[:-1] - out[-1]) / times, out[-1]


def name_of(module, state):
    """Where a module lies and its class, for messages."""
    kind = module._get_name() if hasattr(module, "_get_name") else type(module).__name__
    path = state.get("paths", {}).get(id(module), getattr(module, "path", ""))
    return f"{path} ({kind})"


def check_same(got, want, size, live, dtype, what, state=None):
    """Refuse parts whose sum ``got`` ``[batch query d_model]`` is not the whole, ``want``; with a ``state`` at
    the end of the pass, for all layers at once (`proven`)."""
    want = want.reshape(got.shape).float()
    whole = want.norm(dim=-1)
    off = (got - want).norm(dim=-1) / torch.maximum(size, whole).clamp(min=1e-30)
    known = whole.isfinite() if live is None else whole.isfinite() & live_at(live, got)
    if off.numel():
        # Four roundings: of bf16 in half precision (8-bit maps make about one), of fp16 or TF32 in fp32.
        rough = torch.float16 if dtype == torch.float32 else torch.bfloat16
        told = off.masked_fill(~known, 0.0).amax(), 4 * torch.finfo(rough).eps, what
        late = {"same": []} if state is None else state
        late.setdefault("same", []).append(told)
        if state is None:
            proven(late)


def proven(state):
    """ValueError with the first of the wholes of `check_same` that is not the sum of its parts."""
    told = state.pop("same", [])
    worst = torch.stack([off.to(told[0][0].device) for off, _, _ in told]).tolist() if told else []
    for off, (_, limit, what) in zip(worst, told, strict=True):
        if not off <= limit:
            raise ValueError(
                f"{what}: off by up to {off:.2g} of its size. Expected linear maps only, because parts "
                "of attention's output cannot be followed through anything else. Take off what changes "
                "it (a hook, a wrapper), or read site='attn_out' instead."
            )


def way(calls, state, projection, parts, live, asked=None):
    """The maps from heads to the stream, proven on attention's whole output, for `follow`.

    So many parts of attention's output will be ``asked`` for later; None for any number. ``written`` is
    ``[batch query head d_head]``, ``scale`` ``[batch query]`` by which norms multiply a query, ``matrix``
    ``[head d_head d_model]`` in fp32 or None if fewer rows are asked for than it has, so that heads are
    better pushed one by one. What should arrive in the stream is left in ``state`` for `arrives`.
    """
    x = torch.cat([ask(call) for call in calls], dim=1)
    heads, width = x.shape[2:]
    wrote = projection(x.flatten(2))
    passed = [measure(part, wrote) for part in parts]
    made = {"written": x, "projection": projection, "passed": passed, "matrix": None}
    if asked is not None and x.shape[0] * x.shape[1] * (asked + 1) <= width:
        by_head, bias = pushed(x, projection)
        total = by_head.sum(2)
    else:
        columns, bias = answers(
            projection, torch.eye(heads * width, dtype=x.dtype, device=x.device)
        )
        total = x.flatten(2).float() @ columns
        made["matrix"] = onward(columns, *passed).reshape(heads, width, -1)
    size = total.norm(dim=-1) + bias.norm()
    what = f"{name_of(projection, state)} is not a linear map of attention's output"
    weight = getattr(projection, "weight", None)
    # Quantised maps round what they read, or compute in bf16.
    rounded = torch.is_tensor(weight) and quantised(weight)
    check_same(total + bias, wrote, size, live, torch.bfloat16 if rounded else x.dtype, what, state)
    total, made["scale"] = wrote.float(), torch.ones_like(size)
    for part, one in zip(parts, passed, strict=True):
        mapped = onward(total, one)
        if one["norm"]:
            normed = part(total.to(x.dtype)) - one["bias"]
            size = normed.norm(dim=-1) / mapped.norm(dim=-1).clamp(min=1e-30)
            made["scale"], mapped = made["scale"] * size, mapped * size[..., None]
        total = mapped + one["bias"]
    state["arrived"] = total
    return made


def pushed(written, projection):
    """What every head writes, ``[batch query head d_model]`` in fp32, and the bias."""
    batch, queries, heads, width = written.shape
    alone = torch.eye(heads, dtype=written.dtype, device=written.device)[..., None]
    rows = (written[:, :, None] * alone).reshape(-1, heads * width)
    out, bias = answers(projection, rows)
    return out.reshape(batch, queries, heads, -1), bias


def follow(written, made):
    """Norm of every head's write ``[batch query head]`` and their sum, before norms divide a query."""
    if made["matrix"] is None:
        by_head = onward(pushed(written, made["projection"])[0], *made["passed"])
        return by_head.norm(dim=-1), by_head.sum(2)
    written, matrix = written.float(), made["matrix"]
    if "gram" not in made:
        made["gram"] = matrix @ matrix.transpose(1, 2)
    square = torch.einsum("bqhd,hde,bqhe->bqh", written, made["gram"], written)
    return square.clamp(min=0).sqrt(), torch.einsum("bqhd,hdo->bqo", written, matrix)


def arrives(states, state, live, attention, projection):
    """Refuse a block that does not add what its heads write, unless edits of it are the reason."""
    total = state.pop("arrived", None)
    if total is not None:
        what = f"What {name_of(attention, state)} adds to the stream is not what its heads write through "
        what, added = what + name_of(projection, state), state["unedited"]
        check_same(total, added, total.norm(dim=-1), live, added.dtype, what, state)
    return {}


def contribution_norms(calls, state, groups, projection, parts=(), live=None, layout=None):
    """How much each key group adds to the residual stream through attention.

    ``||D sum_h W_O^h (A_h 1_g v_h)||_2`` per query, and the same for each head alone (Kobayashi et al.
    2020; used for sinks by Kang et al. 2503.03321). ``D`` is what lies between the output projection and the
    stream, at this query. The vectors of all groups and the biases add up to what attention adds.
    ``{"norms": [batch query group], "per_head": [batch head query group]}``; ``groups`` are one-hot
    ``[batch key group]``.
    """
    made = way(calls, state, projection, parts, live, groups.shape[-1])
    totals, heads_out = [], []
    for call, (q_at, q_to, _, _), part in by_call(calls, groups, state):
        scale = made["scale"][:, q_at:q_to]
        followed = [follow(ask(call, keep=one), made) for one in part.unbind(-1)]
        per_head = [by_head.transpose(1, 2) * scale[:, None] for by_head, _ in followed]
        heads_out.append(torch.stack(per_head, dim=-1))
        totals.append(torch.stack([x.norm(dim=-1) * scale for _, x in followed], dim=-1))
    return {
        "norms": unpack(torch.cat(totals, dim=1), layout, 1),
        "per_head": unpack(torch.cat(heads_out, dim=2), layout, 2),
    }


def head_writes(calls, state, projection, live, parts=(), layout=None):
    """Per-head norm of every key's write, and the stable rank of every head's output.

    With ``u_j = D W_O^h v_j`` and ``U = S A u`` (Fesser et al. 2606.08105): ``||u_j||_2`` per key, and
    ``||U||_F^2 / sigma_1^2`` over the live queries, which is 1 if the head writes one direction only. ``D``
    is as in `contribution_norms`; a norm there divides each query by a size, which is in ``S`` and not in
    ``u``. ``{"norms": [batch head key], "stable_rank": [batch head]}``; that of a packed tower is over all
    images.
    """
    made = way(calls, state, projection, parts, live)
    # Inner products of what the dimensions of a head write, [head d_head d_head].
    gram, norms = made["matrix"] @ made["matrix"].transpose(1, 2), []
    for call in calls:
        named, _ = arguments(call)
        share = named["query"].shape[1] // named["value"].shape[1]
        value = named["value"].float().repeat_interleave(share, dim=1)
        square = torch.einsum("bhkd,hde,bhke->bhk", value, gram, value)
        norms.append(square.clamp(min=0).sqrt())
    scale = made["scale"] * live[:, -made["scale"].shape[1] :]
    written = made["written"] * scale[:, :, None, None]
    # U U^T and G^1/2 Y^T Y G^1/2 share their nonzero eigenvalues; the latter is d_head x d_head.
    # MPS has no eigenvalues, so they are taken on the CPU there.
    here = "cpu" if gram.device.type == "mps" else gram.device
    values, vectors = torch.linalg.eigh(gram.to(here))
    root = vectors * values.clamp(min=0).sqrt()[:, None]
    inner = torch.einsum("bqhd,bqhe->bhde", written, written).to(here)
    inner = torch.einsum("hdi,bhde,hej->bhij", root, inner, root)
    spectrum = torch.linalg.eigvalsh(inner).clamp(min=0)
    rank = spectrum.sum(-1) / spectrum.amax(-1).clamp(min=1e-30)
    rank = rank if layout is None else rank.expand(layout.shape[0], -1)
    return {"norms": unpack(torch.cat(norms, dim=2), layout, 2), "stable_rank": rank}


def keep_half(states, state, half):
    """Leave what attention or the MLP adds, ``half``, in ``state`` for `more_written`; no answer."""
    state["half", half] = states.clone()  # a model may add to it in place
    return {}


def more_written(states, state, halves):
    """By how much the first of two ``halves`` writes more than the second into every token's largest channel:
    the difference of ``|.|`` there, ``[batch pos]``, asked where the block's output is read next."""
    top = states.float().abs().argmax(dim=-1, keepdim=True)
    parts = [state.pop(("half", half)).reshape(states.shape) for half in halves]
    first, second = (part.gather(-1, top.to(part.device)).float().abs() for part in parts)
    return (first - second.to(first.device))[..., 0]


def over_others(norms):
    """Every key's norm over the mean norm of the other live keys."""
    live = ~norms.isnan()
    total = norms.nansum(dim=-1, keepdim=True)
    others = (live.sum(dim=-1, keepdim=True) - 1).clamp(min=1)
    return norms / ((total - norms) / others)
