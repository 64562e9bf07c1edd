"""Questions to calls of several windows, steps, precisions and kernels, and the loop that asks them, by hand."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sinkscope.kernels import (
    attention,
    edited_call,
    edits,
    gating,
    received,
    residual,
    walk,
    writes,
)
from tests.kernels.by_hand import (
    HEADS,
    KV_HEADS,
    WIDTH,
    N,
    bools,
    flash_attention,
    logits,
    make,
    output,
    plain_attention,
    run,
    softmax,
    weights,
)

NAN = float("nan")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SINK = torch.tensor([0.5, -1.0, 2.0, 0.0])


def close(got, want, atol=2e-6):
    assert got.dtype == torch.float32
    assert got.shape == want.shape
    assert torch.allclose(got.double(), want.double(), atol=atol, equal_nan=True)


def windows(dtype=torch.float32, sizes=(2, 4, 3), **options):
    """Windows of a packed tower: calls that tile one row, each with other tensors."""
    made = []
    for at, size in enumerate(sizes):
        call = make(batch=1, n_query=size, n_key=size, dtype=dtype, is_causal=False, **options)
        made.append((call[0], (call[1][0], *(x + at / 7 for x in call[1][1:])), call[2]))
    return made


def blocks(calls):
    """Their weights by hand as one matrix, 0 between windows."""
    size = sum(call[1][1].shape[2] for call in calls)
    out, at = torch.zeros(1, HEADS, size, size).double(), 0
    for call in calls:
        to = at + call[1][1].shape[2]
        out[..., at:to, at:to], at = weights(call), to
    return out


LAYOUT = torch.tensor([[0, 1, 2, 3, -1], [4, 5, 6, 7, 8]])  # two images in a packed row of nine


def as_images(x, dim):
    """``[1 ... packed ...]`` as ``[image ... pos ...]``, NaN at padding."""
    out = torch.stack([x[0].index_select(dim - 1, at.clamp(min=0)) for at in LAYOUT])
    out.select(dim, 4)[0] = NAN
    return out


@pytest.mark.parametrize("dtype", DTYPES)
def test_windows_of_a_packed_tower(dtype):
    calls, near = windows(dtype), 2e-6 if dtype == torch.float32 else 2e-2
    whole = blocks(calls)
    groups = torch.zeros(1, 9, 2)
    groups[0, [0, 3, 8], 0] = groups[0, 4:7, 1] = 1
    got = attention.group_mass(calls, {}, groups, layout=LAYOUT)
    close(got["mass"], as_images(torch.einsum("bhqk,bkg->bhqg", whole, groups.double()), 2), near)
    even = (whole > 0).double()[:, 0]
    even = even / even.sum(-1, keepdim=True)
    close(got["null"], as_images(torch.einsum("bqk,bkg->bqg", even, groups.double()), 1), near)
    rows = torch.tensor([[1, -1], [3, 0]])
    kept = attention.group_mass(calls, {}, groups, rows, layout=LAYOUT)
    for name, dim in (("mass", 2), ("null", 1)):
        for image in range(2):
            for at, row in enumerate(rows[image].tolist()):
                line = kept[name][image].select(dim - 1, at)
                assert (
                    line.isnan().all()
                    if row < 0
                    else torch.equal(line, got[name][image].select(dim - 1, row))
                )
    assert set(attention.group_mass(calls, {}, groups, null=False)) == {"mass"}
    exact = attention.group_mass(calls, {}, groups, float32=True)["mass"]
    close(exact, torch.einsum("bhqk,bkg->bhqg", whole, groups.double()))

    live = bools("111101011")
    got = received.received(calls, {}, live, LAYOUT, others=True)
    lit = live[0].double()
    seen = torch.einsum("q,qk->k", lit, (whole[0, 0] > 0).double())
    column = torch.einsum("bhqk,q->bhk", whole, lit) / seen
    close(got["received"], as_images(column, 2), 1e-5)
    close(got["null"], as_images(torch.einsum("bqk,q->bk", even, lit) / seen, 1), 1e-5)
    alone = 1 - torch.eye(9).double()
    seeing = torch.einsum("q,qk->k", lit, (whole[0, 0] > 0).double() * alone)
    close(got["seeing"], as_images(seeing[None], 1))
    close(
        got["others"], as_images(torch.einsum("bhqk,q->bhk", whole * alone, lit) / seeing, 2), 1e-5
    )
    null = torch.einsum("bqk,q->bk", even * alone, lit) / seeing
    close(got["others_null"], as_images(null, 1), 1e-5)
    assert set(received.received(calls, {}, live, null=False)) == {"received"}

    rows = torch.tensor([[2, 7, -1, 0, 5]])
    got = attention.patterns(calls, {}, rows)
    want = whole[:, :, rows[0].clamp(min=0)]
    want[:, :, 2] = NAN
    close(got, want, 1e-5)
    got = attention.patterns(calls, {}, rows, LAYOUT)
    first = torch.nn.functional.pad(whole[0][:, [2, 0], :4], (0, 1), value=NAN)
    close(got, torch.stack([first, whole[0][:, [7, 5], 4:]]), 1e-5)
    uneven = attention.patterns(calls, {}, torch.tensor([[2, 7, 5]]), LAYOUT)
    assert uneven.shape == (2, HEADS, 2, 5)
    assert uneven[0, :, 1].isnan().all()
    none = attention.patterns(calls, {}, torch.tensor([[-1, -1]]), LAYOUT)
    assert none.shape == (2, HEADS, 1, 5)
    assert none.isnan().all()

    values = torch.cat([call[1][3] for call in calls], dim=2).double()
    close(attention.values(calls, {}, LAYOUT), as_images(values, 2))
    close(attention.value_norms(calls, {}, LAYOUT), as_images(values.norm(dim=-1), 2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["plain", "window", "sink", "wide mask", "masks by head"])
def test_one_step_with_a_cache(kind, dtype):
    """Two tokens since the prompt; a window has dropped the first two of eight keys."""
    n_key = N if kind == "window" else N + 2
    options = {"window": {"sliding_window": 6}, "sink": {"s_aux": SINK.to(dtype)}}.get(kind, {})
    if kind == "wide mask":  # hides key 3, and has room for more keys
        options["mask"] = torch.zeros(2, 1, 1, n_key + 3, dtype=dtype)
        options["mask"][..., [3, -1, -2, -3]] = torch.finfo(dtype).min
    if kind == "masks by head":
        hidden = torch.zeros(2, HEADS, 1, n_key, dtype=torch.bool)
        hidden[:, 1, :, 2:4] = hidden[:, 3, :, 0] = True
        options["mask"] = ~hidden
    call, near = make(n_query=1, n_key=n_key, dtype=dtype, **options), 1e-2
    near = 2e-6 if dtype == torch.float32 else near
    whole, state = weights(call), {"step": 2}
    groups = torch.zeros(2, N, 2)
    groups[0, [1, 4], 0] = groups[1, 5, 0] = groups[:, 3, 1] = 1
    later = torch.nn.functional.pad(groups, (0, 0, 0, 2))[:, -n_key:].double()
    got = attention.group_mass([call], state, groups)
    close(got["mass"], torch.einsum("bhqk,bkg->bhqg", whole, later), near)
    flat = (call[0], (call[1][0], torch.zeros_like(call[1][1]), *call[1][2:]), call[2])
    close(got["null"], torch.einsum("bqk,bkg->bqg", weights(flat)[:, 0], later), near)
    # The rows of the prompt do not choose among queries of a step, which has one.
    kept = attention.group_mass([call], state, groups, torch.tensor([[4, 3], [-1, 2]]))
    assert all(torch.equal(kept[name], got[name]) for name in ("mass", "null"))

    live = bools("111111", "011111")
    got = received.received([call], state, live, others=True)
    seen = (whole[:, 0, 0] > 0).double()
    close(
        got["received"], (whole[:, :, 0] / seen[:, None]).masked_fill(seen[:, None] == 0, NAN), 1e-5
    )
    others = seen.clone()
    others[:, -1] = 0
    close(got["seeing"], others)
    want = (whole[:, :, 0] / others[:, None]).masked_fill(others[:, None] == 0, NAN)
    close(got["others"], want, 1e-5)

    rows = torch.tensor([[0, 5], [-1, 3]])
    got = attention.patterns([call], state, rows)
    close(got[0], whole[0], 1e-5)
    assert got.shape[2] == 1
    assert got[1].isnan().all()
    close(attention.weights_on(call, 1, 4).float(), whole[..., 1:4], near)


@pytest.mark.parametrize("window", [1, 3, 5, 6, 7, 8])
def test_a_window_that_is_implied(window):
    """Who sees a key, and what it receives, for windows shorter and longer than the prompt."""
    call, live = make(sliding_window=window), bools("111111", "001101")
    seen = logits(call)[:, 0] > -1e30
    want = torch.einsum("bq,bqk->bk", live.double(), seen.double())
    close(received.visible_queries(call, live), want)
    close(received.own_weights(call), weights(call).diagonal(dim1=2, dim2=3), 1e-5)
    got = received.received([call], {}, live)["received"]
    column = torch.einsum("bhqk,bq->bhk", weights(call), live.double()) / want[:, None]
    close(got, column, 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_who_sees_a_key_by_a_mask_of_numbers(dtype):
    """A bias of -3 hides nothing, the lowest number does; room for more keys is cut."""
    mask = torch.zeros(2, 1, N, N + 2, dtype=dtype)
    mask[..., 1] = -3.0
    hidden = torch.ones(N, N + 2, dtype=torch.bool).triu(1)
    mask = mask.masked_fill(hidden, torch.finfo(dtype).min)
    call, live = make(mask=mask, dtype=dtype), bools("111111", "011010")
    want = torch.einsum("bq,qk->bk", live.double(), (~hidden[:, :N]).double())
    close(received.visible_queries(call, live), want)
    close(received.own_weights(call), weights(call).diagonal(dim1=2, dim2=3), 1e-5)
    for bare in (mask[:1], mask[:1] > -5):
        call = make(mask=bare, dtype=dtype)
        close(received.visible_queries(call, live), want)
    free = make(is_causal=False, dtype=dtype)
    close(received.visible_queries(free, live), live.sum(1, keepdim=True).expand(-1, N))


def test_a_row_that_sees_nothing_by_infinities_is_no_nan_in_fp32():
    mask = torch.zeros(2, 1, N, N).masked_fill(torch.ones(N, N).triu(1).bool(), -torch.inf)
    mask[1, :, 0] = -torch.inf

    def sdpa(module, query, key, value, attention_mask, scaling, **rest):
        key, value = (x.repeat_interleave(2, dim=1) for x in (key, value))
        weights = (query @ key.mT * scaling + attention_mask).softmax(-1)
        return (weights @ value).transpose(1, 2), None

    call = make(sdpa, mask=mask)
    assert run(call)[1, 0].isnan().all()
    assert attention.ask(call, float32=True).isfinite().all()
    got = received.received([call], {}, bools("111111", "011111"))["received"]
    assert got.isfinite().all()


def test_questions_in_fp32_stay_in_fp32_under_autocast():
    call = make()
    _, (module, query, key, value), options = call

    def rounding(module, query, key, value, mask, **rest):
        return (query @ key.mT @ value[:, :1].expand(-1, HEADS, -1, -1)).transpose(1, 2), None

    wide = (rounding, (module, query, key.repeat(1, 2, 1, 1), value), options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attention.ask(wide, float32=True).dtype == torch.float32
        assert attention.ask(wide).dtype == torch.bfloat16
    assert attention.ask(wide).dtype == torch.float32


@pytest.mark.parametrize("kind", ["keys", "sinks", "s_aux", "masks by head", "module"])
def test_nulls_of_calls_whose_heads_differ_are_asked_of_all_heads(kind):
    options = {"s_aux": {"s_aux": SINK}}.get(kind, {})
    if kind == "masks by head":
        seen = torch.ones(2, HEADS, N, N, dtype=torch.bool).tril()
        seen[:, 2, 3:, 0] = False
        options["mask"] = seen
    call = make(**options)
    call[1][0].sinks = SINK if kind == "sinks" else None
    if kind != "sinks":
        del call[1][0].sinks
    whole = kind not in ("keys", "module")
    assert (attention.one_head(call) is call) == whole
    if not whole:
        named, rest = attention.arguments(attention.one_head(call))
        assert [named[x].shape[1] for x in ("query", "key", "value")] == [2, 1, 1]
        assert torch.equal(named["query"], call[1][1][:, :2])
        assert torch.equal(named["key"], call[1][2][:, :1])
        assert torch.equal(named["value"], call[1][3][:, :1])
        assert rest == {"scaling": 0.4, "dropout": 0.0}
    assert attention.learned_sink(call) == (kind in ("sinks", "s_aux"))


def test_nulls_are_not_shared_by_layers_with_sinks_of_their_own():
    groups, state = torch.eye(N)[None].repeat(2, 1, 1), {}
    low, high = (make(s_aux=SINK + more) for more in (-3.0, 3.0))
    first = attention.group_mass([low], state, groups)["null"]
    second = attention.group_mass([high], state, groups)["null"]
    assert (first - second).abs().max() > 0.01
    close(second, attention.group_mass([high], {}, groups)["null"])
    # Windows of one tower, which see other keys of the groups; and other rows of it.
    groups = torch.rand(1, 8, 2)
    pair = windows(sizes=(4, 4))
    shared = attention.group_mass(pair, {}, groups)["null"]
    close(shared[:, :4], groups[:, :4].mean(1, keepdim=True).expand(-1, 4, -1))
    close(shared[:, 4:], groups[:, 4:].mean(1, keepdim=True).expand(-1, 4, -1))
    got = received.received(pair, {}, bools("11110011"))["null"]
    close(got, torch.full((1, 8), 0.25))
    got = received.received(pair, {}, bools("11000111"))["received"]
    lit = bools("11000111")[0].double()
    want = torch.einsum("bhqk,q->bhk", blocks(pair), lit) / torch.tensor([2.0] * 4 + [3.0] * 4)
    close(got, want, 1e-5)
    assert received.mean(torch.tensor([-1e-9, 2, 0]), torch.tensor([1, 4, 0])).tolist()[:2] == [
        0,
        0.5,
    ]
    counted = received.received(pair, {}, bools("11110000"), others=True)
    assert counted["others_null"][:, 4:].isnan().all()


def test_questions_hold_no_graph_of_the_model():
    """Gradients with respect to values are asked of tensors cut from the model's graph."""
    asked = []

    def watched(module, query, key, *rest, **options):
        asked.append(query.requires_grad or key.requires_grad)
        return plain_attention(module, query, key, *rest, **options)

    call = make(watched)
    _, (module, *tensors), options = call
    call = (watched, (module, *(x.requires_grad_() for x in tensors)), options)
    live = torch.ones(2, N).bool()
    got = received.received([call], {}, live, others=True)
    pattern = attention.patterns([call], {}, torch.tensor([[1], [2]]))
    assert not any(asked)
    assert not any(x.requires_grad for x in (*got.values(), pattern))


def test_more_keys_than_dimensions():
    call = make(n_query=11, n_key=11)
    got = attention.weigh_values(call, torch.eye(11)[None])
    close(got, weights(call))
    close(attention.weigh_queries(call, torch.eye(11)[None].expand(2, -1, -1)), weights(call), 1e-5)
    edited, _ = edits.edit_keys(
        call, {"stage": "keys"}, None, torch.ones(2, 11).bool(), torch.ones(2, 11).bool(), 0.5
    )
    close(attention.values([edited], {}), call[1][3])


@pytest.mark.parametrize("size", [6, 11])
def test_weights_on_ones_own_key_and_how_many_calls_they_take(size):
    """One call where a copy of the keys will do, else one for every eight keys."""
    asked = []

    def counted(*args, **options):
        asked.append(1)
        return plain_attention(*args, **options)

    live, portions = torch.ones(2, size).bool(), -(-size // WIDTH)
    mask = torch.ones(2, 1, size, size, dtype=torch.bool).tril()
    more = make(counted, n_query=3, n_key=size, is_causal=False)  # a chunk with a cache
    edited, _ = edits.edit_keys(make(counted, n_query=size, n_key=size), {"stage": "keys"}, None, live,
                                live, 0.5)  # fmt: skip
    for call, count, first in (
        (make(counted, n_query=size, n_key=size), 1, 0),
        (make(counted, n_query=size, n_key=size, is_causal=False), 1, 0),
        (make(counted, n_query=size, n_key=size, sliding_window=size), 1, 0),
        (make(counted, n_query=size, n_key=size, scaling=None), 1, 0),
        (make(counted, n_query=size, n_key=size, mask=mask), 1, 0),
        (make(counted, n_query=size, n_key=size, mask=mask[:, :, :1]), portions, 0),
        (make(counted, n_query=size, n_key=size, sliding_window=2), portions, 0),
        (make(counted, n_query=1, n_key=size), 1, size - 1),
        (more, 1, size - 3),
    ):
        asked.clear()
        got = received.own_weights(call)
        assert len(asked) == count
        close(got, weights(call).diagonal(first, 2, 3), 1e-5)
    asked.clear()
    got = received.own_weights(edited)
    assert len(asked) == 2 * portions  # with and without the edit
    halved = weights(make(n_query=size, n_key=size), lambda x: x / 2)
    close(got, halved.diagonal(dim1=2, dim2=3), 1e-5)


def test_nulls_where_heads_differ_are_those_of_the_first():
    call, live = make(s_aux=SINK), torch.ones(2, N).bool()
    flat = (call[0], (call[1][0], torch.zeros_like(call[1][1]), *call[1][2:]), call[2])
    got, first = received.received([call], {}, live, others=True), weights(flat)[:, 0]
    count = torch.arange(N, 0, -1)
    close(got["null"], first.sum(1) / count)
    off = (first * (1 - torch.eye(N))).sum(1) / (count - 1)
    close(got["others_null"], off.masked_fill(count == 1, NAN))


def test_as_many_heads_may_share_a_key_as_it_has_dimensions():
    call = make()
    wide = torch.randn(2, 16, N, WIDTH, generator=torch.Generator().manual_seed(6))
    call = (call[0], (call[1][0], wide, *call[1][2:]), call[2])
    got = attention.weigh_queries(call, torch.eye(N)[None].expand(2, -1, -1))
    close(got, weights(call), 1e-5)


def test_arguments_by_place_and_by_name():
    function, (module, query, key, value), options = make()
    by_name = (
        function,
        (module, query),
        {**options, "key": key, "value": value, "is_causal": False},
    )
    named, rest = attention.arguments(by_name)
    assert [named[name] is x for name, x in (("key", key), ("value", value))] == [True, True]
    assert rest == {"scaling": 0.4, "dropout": 0.0, "is_causal": False}
    assert not attention.is_causal(named, rest)
    assert attention.is_causal(named, {"is_causal": None})
    assert attention.is_causal({"module": nn.Identity()}, {})
    assert (
        attention.arguments((function, (module, query, key, value), {}))[0]["attention_mask"]
        is None
    )
    assert attention.spans([make(), make(n_query=1, n_key=N)]) == [(0, 6, 0, 6), (6, 7, 6, 12)]


def test_prompt_masks_at_the_keys_of_a_step():
    x = torch.arange(1, 5)[None, :, None]
    for n_keys, step, fill, want in (
        (4, 0, 0, [1, 2, 3, 4]), (6, 2, 7, [1, 2, 3, 4, 7, 7]), (4, 2, 0, [3, 4, 0, 0]),
        (6, 0, 0, [1, 2, 3, 4, 0, 0]), (3, 0, 0, [2, 3, 4]),
    ):  # fmt: skip
        assert attention.fit_keys(x, n_keys, step, fill)[0, :, 0].tolist() == want
        got = edited_call.keys_of_call(x[..., 0], None, n_keys, {"step": step}, fill)
        assert got.tolist() == [want]
    assert edited_call.keys_of_call(x[..., 0], (1, 3), 9, {"step": 2}).tolist() == [[2, 3]]


@pytest.mark.parametrize("heads", [None, [0, 2]])
def test_values_that_differ_by_head_cannot_be_read(heads):
    call, keys, live = make(), bools("010000", "001000"), torch.ones(2, N).bool()
    made, _ = edits.edit_values(
        call, {"stage": "values"}, None, keys, live, "zero", None, None, heads
    )
    if heads is None:
        close(attention.values([made], {}), made[1][3])
        return
    for kernel, name in (
        (attention.values, "AttentionValues"),
        (attention.value_norms, "ValueNorms"),
    ):
        with pytest.raises(ValueError, match=f"for some heads or queries beside {name}; expected"):
            kernel([made], {})


@pytest.mark.parametrize("stage", ["logits", "weights", "values"])
@pytest.mark.parametrize("second", [0.5, None])
def test_probes_of_edited_calls(stage, second):
    """Weights are those of all edits but of values; nulls those of none; what groups write has all of them."""
    call, keys, live = make(), bools("011000", "000110"), torch.ones(2, N).bool()
    state, column = {"stage": stage}, keys[:, None, None].double()
    seen, value = (logits(call) > -1e30).double(), call[1][3].double()
    if stage == "values":
        own = call[1][3] * 3
        made, _ = edits.edit_values(call, state, None, keys, live, "tensor", own, None, [0, 2])
        attended, factor = weights(call), 1 + 2 * column
        mixed = torch.tensor([True, False, True, False])[None, :, None, None]
        factor = torch.where(mixed, factor, 1.0)
    else:
        made, _ = edits.edit_keys(call, state, None, keys, live, 0.3)
        by_key = 1 - 0.7 * column
        attended = (
            weights(call, lambda x: x + by_key.log())
            if stage == "logits"
            else weights(call) * by_key
        )
        factor = torch.ones(1)
        if second:
            made, _ = edits.edit_keys(made, {"stage": stage}, None, keys, live, second)
            by_key = by_key * (1 - 0.5 * column)
            log = by_key.log()
            attended = (
                weights(call, lambda x: x + log) if stage == "logits" else weights(call) * by_key
            )
    groups = torch.zeros(2, N, 2)
    groups[:, :3, 0] = groups[:, 3:, 1] = 1
    got = attention.group_mass([made], {}, groups)
    close(got["mass"], torch.einsum("bhqk,bkg->bhqg", attended, groups.double()), 1e-5)
    even = seen / seen.sum(-1, keepdim=True)
    close(
        got["null"],
        torch.einsum("bhqk,bkg->bqg", even[:, :1], groups.double()).expand(2, -1, -1),
        1e-5,
    )
    got = received.received([made], {}, live, others=True)
    count = seen.sum(2).expand(2, HEADS, N)
    close(got["received"], attended.sum(2) / count, 1e-5)
    off = attended * (1 - torch.eye(N).double())
    close(got["others"], (off.sum(2) / (count - 1)).masked_fill(count == 1, NAN), 1e-5)
    close(attention.patterns([made], {}, torch.tensor([[5, 2], [0, 3]])),
          torch.stack([attended[0][:, [5, 2]], attended[1][:, [0, 3]]]), 1e-5)  # fmt: skip
    projection = nn.Linear(HEADS * WIDTH, 10)
    out = writes.contribution_norms([made], {}, groups, projection)["norms"]
    value = value.repeat_interleave(2, dim=1)
    for g in range(2):
        part = attended * factor * groups[:, None, None, :, g].double()
        want = (part @ value).transpose(1, 2).flatten(2) @ projection.weight.T.double()
        close(out[..., g], want.norm(dim=-1), 1e-5)


@pytest.mark.parametrize("softer", [False, True])
def test_attention_moves_to_a_target_that_weighs_nothing_beside_a_sink(softer):
    """Also after an edit of keys: a quotient of masses would be 0 / 0."""
    function, (module, query, key, value), options = make(is_causal=False)
    query = query.abs() + 1
    key = torch.full_like(key, -20.0)
    key[:, :, 0] = 20.0  # the sink
    key[:, :, 5] = key[:, :, 5] + torch.rand(WIDTH) / 10
    call = (function, (module, query, key, value), options)
    source, target = bools("100000", "100000"), bools("000011", "000011")
    live, now = torch.ones(2, N).bool(), call
    if softer:
        now, _ = edits.edit_keys(
            call, {"stage": "keys"}, None, bools("001000", "001000"), live, 1.1
        )
    made, effect = edits.edit_mass(now, {"stage": "weights"}, None, source, target, live, 0.5)
    assert effect["count"].tolist() == [24, 24]
    among = softmax(logits(call).masked_fill(~target[:, None, None], -torch.inf))
    attended = weights(call)
    want = output(call, attended * (1 - 0.5 * source[:, None, None].double()) + 0.5 * among)
    assert torch.allclose(run(made).double(), want, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("step", [0, 2])
def test_writes_of_keys_and_directions_of_heads(step, dtype):
    """``u_j = W_O^h v_j``, and ``||U||_F^2 / sigma_1^2`` of ``U = A u`` over live queries, by SVD."""
    torch.manual_seed(1)
    call = make(n_query=1 if step else N, n_key=N + step, dtype=dtype)
    live, projection = bools("111111", "001101"), nn.Linear(HEADS * WIDTH, 10).to(dtype)
    out = writes.head_writes([call], {"step": step}, projection, live)
    value = call[1][3].double().repeat_interleave(2, dim=1)
    matrix = projection.weight.double().reshape(10, HEADS, WIDTH)
    u = torch.einsum("bhkd,ohd->bhko", value, matrix)
    near = 1e-5 if dtype == torch.float32 else 2e-2
    close(out["norms"], u.norm(dim=-1), near)
    rows = live[:, -1:] if step else live
    whole = (weights(call) @ u) * rows[:, None, :, None]
    spectrum = torch.linalg.svdvals(whole).square()
    close(out["stable_rank"], spectrum.sum(-1) / spectrum.amax(-1), 1e-4 if near < 1e-4 else 5e-2)
    # One query writes one direction only; behind a factor the direction is another.
    factor = nn.Parameter(torch.rand(10).to(dtype) + 0.5)
    scaled = writes.head_writes([call], {}, projection, live, [factor])["norms"]
    close(scaled.detach(), (u * factor.double()).norm(dim=-1).detach(), near)


def test_writes_of_a_packed_tower():
    torch.manual_seed(2)
    calls, projection = windows(), nn.Linear(HEADS * WIDTH, 10)
    live = bools("111101011")
    out = writes.head_writes(calls, {}, projection, live, layout=LAYOUT)
    value = torch.cat([call[1][3] for call in calls], dim=2).double().repeat_interleave(2, dim=1)
    matrix = projection.weight.double().reshape(10, HEADS, WIDTH)
    u = torch.einsum("bhkd,ohd->bhko", value, matrix)
    close(out["norms"], as_images(u.norm(dim=-1), 2), 1e-5)
    spectrum = torch.linalg.svdvals((blocks(calls) @ u) * live[:, None, :, None]).square()
    rank = spectrum.sum(-1) / spectrum.amax(-1)
    close(out["stable_rank"], rank.expand(2, -1), 1e-4)
    groups = torch.rand(1, 9, 3)
    for few in (groups, groups[..., :1].expand(-1, -1, 9)):  # by heads, and by dimensions of heads
        out = writes.contribution_norms(calls, {}, few, projection, [2.0], live, LAYOUT)
        by_group = torch.einsum("bhqk,bkg,bhko->bhqgo", blocks(calls), few.double(), 2 * u)
        close(out["per_head"], as_images(by_group.norm(dim=-1), 2), 1e-5)
        close(out["norms"], as_images(by_group.sum(1).norm(dim=-1), 1), 1e-5)


@pytest.mark.parametrize("groups", [1, 3, 9])
@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_few_queries_write(tokens, groups, dtype):
    """Heads are pushed one by one where that asks for fewer rows than heads have dimensions."""
    torch.manual_seed(3)
    call = make(batch=1, n_query=tokens, n_key=N, dtype=dtype, is_causal=False)
    projection, given = (
        nn.Linear(HEADS * WIDTH, 10).to(dtype),
        torch.rand(1, N, groups).to(dtype).float(),
    )
    asked = []
    projection.register_forward_pre_hook(lambda _, args: asked.append(args[0].shape[1]))
    out = writes.contribution_norms([call], {}, given, projection)
    by_one = tokens * (groups + 1) <= WIDTH
    assert (max(asked) == HEADS * WIDTH + 1) == (not by_one)
    value = call[1][3].double().repeat_interleave(2, dim=1)
    u = torch.einsum("bhkd,ohd->bhko", value, projection.weight.double().reshape(10, HEADS, WIDTH))
    want = torch.einsum("bhqk,bkg,bhko->bhqgo", weights(call), given.double(), u)
    near = 2e-5 if dtype == torch.float32 else 2e-2
    close(out["per_head"], want.norm(dim=-1), near)
    close(out["norms"], want.sum(1).norm(dim=-1), near)


@pytest.mark.parametrize("dtype", DTYPES)
def test_answers_of_a_module_to_large_and_to_small_rows(dtype):
    """Asked near 256: an fp16 answer to 1e-7 beside a bias of one would be nothing."""
    torch.manual_seed(4)
    projection = nn.Linear(8, 5).to(dtype)
    rows = torch.randn(3, 8) * torch.tensor([[1e-6], [1.0], [1e3]])
    rows = torch.cat([rows, torch.zeros(1, 8)]).to(dtype)
    asked = []
    projection.register_forward_pre_hook(lambda _, args: asked.append(args[0]))
    got, bias = writes.answers(projection, rows)
    assert got.dtype == bias.dtype == torch.float32
    assert torch.equal(bias, projection.bias.float())
    want = rows.double() @ projection.weight.double().T
    off = (got - want).norm(dim=-1) / want.norm(dim=-1).clamp(min=1e-30)
    assert off.max() < (1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps)
    peaks = asked[0][0].abs().amax(-1)
    assert ((peaks[:3] > 128) & (peaks[:3] <= 256)).all()
    assert peaks[4] == 0  # the question for the bias


def test_parts_whose_sum_is_not_the_whole():
    """Refused above four roundings of bf16 in half precision, of fp16 in fp32; only at live queries."""
    want, live = torch.ones(1, 2, 4), bools("10")
    size = torch.full((1, 2), 2.0)
    for dtype, least in ((torch.float32, 2**-8), (torch.bfloat16, 2**-5), (torch.float16, 2**-5)):
        for factor, ok in ((0.99, True), (1.01, False)):
            got = want.clone()
            got[0, 0, 0] += factor * least * 2
            got[0, 1] = 99  # not live

            def check(got=got, dtype=dtype, live=live):
                writes.check_same(got, want, size, live, dtype, "It bends")

            if ok:
                check()
                with pytest.raises(ValueError, match=r"It bends: off by up to .* of its size"):
                    check(live=None)
            else:
                with pytest.raises(ValueError, match=r"off by up to 0.0[0-9]* of its size"):
                    check()
    # The size that counts is the larger one, and what is not finite is not known.
    broken = want.clone()
    broken[0, 0, 1] = torch.inf
    bent = want.clone()
    bent[0, 1] = 2
    with pytest.raises(ValueError, match="off by up to"):
        writes.check_same(bent, broken, size, None, torch.float32, "")
    writes.check_same(want, broken, size, None, torch.float32, "")
    writes.check_same(want * 0, want * 0, size * 0, None, torch.float32, "")
    writes.check_same(want * 1000 + 1, want * 1000, size, None, torch.float32, "")


class Affine(nn.Module):
    """A factor and a bias per channel: no norm."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = torch.linspace(-2, 2, 10), torch.linspace(1, 0, 10)

    def forward(self, x):
        return x * self.weight + self.bias


@pytest.mark.parametrize(
    "kind", ["number", "parameter", "affine", "layer norm", "bare norm", "RMS"]
)
def test_what_a_part_does(kind):
    torch.manual_seed(5)
    norm = nn.LayerNorm(10)
    nn.init.uniform_(norm.weight, 0.5, 2)
    nn.init.uniform_(norm.bias)
    weight = torch.rand(10) + 0.5
    part, factor, bias, centred, is_norm = {
        "number": (0.5, torch.tensor(0.5), 0.0, False, False),
        "parameter": (nn.Parameter(weight), weight, 0.0, False, False),
        "affine": (Affine(), Affine().weight, Affine().bias, False, False),
        "layer norm": (norm, norm.weight, norm.bias, True, True),
        "bare norm": (nn.LayerNorm(10), torch.ones(10), torch.zeros(10), True, True),
        "RMS": (nn.RMSNorm(10), torch.ones(10), torch.zeros(10), False, True),
    }[kind]
    made = writes.measure(part, torch.zeros(2, 3, 10))
    assert (made["centred"], made["norm"]) == (centred, is_norm)
    assert torch.allclose(made["weight"], factor.detach(), atol=1e-4)
    assert torch.allclose(torch.as_tensor(made["bias"]), torch.as_tensor(bias), atol=1e-5)
    assert ("part" in made) == callable(part)
    x = torch.randn(2, 3, 10)
    want = (x - x.mean(-1, keepdim=True) if centred else x) * factor
    assert torch.allclose(writes.onward(x, made), want, atol=1e-3)


@pytest.mark.parametrize("part", [nn.GELU(), nn.Linear(10, 10), nn.Softmax(-1), nn.Hardshrink(0.5)])
def test_what_is_no_such_part(part):
    torch.manual_seed(5)
    with pytest.raises(ValueError, match="neither a factor per channel nor a norm"):
        writes.measure(part, torch.zeros(2, 3, 10))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bias_that_takes_nearly_all_of_it_is_rounded_by_its_own_size(dtype):
    torch.manual_seed(6)
    function, (module, query, key, value), options = make(dtype=dtype)
    value = torch.ones_like(value)
    projection = nn.Linear(HEADS * WIDTH, 10).to(dtype)
    with torch.no_grad():
        projection.bias.copy_(-projection.weight.sum(1))
    call, state = (function, (module, query, key, value), options), {}
    got = writes.contribution_norms([call], state, torch.ones(2, N, 1), projection)["norms"]
    want = projection.weight.double().sum(1).norm()
    assert torch.allclose(got.double(), want, rtol=1e-2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1.0, 300.0])
@torch.no_grad()
def test_what_arrives_in_the_stream(dtype, size):
    """It is compared in fp32: the norm of large fp16 states can be infinite, and beside that all is alike."""
    torch.manual_seed(7)
    call, projection = make(dtype=dtype), nn.Linear(HEADS * WIDTH, 400, bias=False).to(dtype)
    with torch.no_grad():
        projection.weight.mul_(size)
    wrote, live = projection(run(call).flatten(2)).detach(), torch.ones(2, N).bool()
    for factor in (1.0, 1.2):
        state = {"unedited": wrote * factor}
        writes.contribution_norms([call], state, torch.ones(2, N, 1), projection)
        assert state["arrived"].dtype == torch.float32
        names = SimpleNamespace(path="model.0.attn"), SimpleNamespace(path="model.0.attn.o")
        if factor == 1.0:
            assert writes.arrives(wrote, state, live, *names) == {}
            assert "arrived" not in state
            assert writes.arrives(wrote, state, live, *names) == {}  # nothing is known
        else:
            said = r"What 0.attn \(SimpleNamespace\) adds to the stream is not what .* 0.attn.o"
            with pytest.raises(ValueError, match=said):
                writes.arrives(wrote, state, live, *names)


@pytest.mark.parametrize("groups", [1, 9])
def test_heads_that_write_nothing_have_no_nan(groups):
    """Squares of rounding errors may be below zero; no live query has no direction."""
    torch.manual_seed(8)
    call, projection = make(), nn.Linear(HEADS * WIDTH, 10, bias=False)
    with torch.no_grad():  # every head writes one direction only, and none of values that are alike
        weight = torch.randn(10, HEADS, 1) * (torch.eye(WIDTH)[0] - torch.eye(WIDTH)[1])
        projection.weight.copy_(weight.flatten(1))
    value = torch.randn(2, KV_HEADS, N, 1).expand(-1, -1, -1, WIDTH) * 1.1
    call = (call[0], (*call[1][:3], value), call[2])
    out = writes.contribution_norms([call], {}, torch.rand(2, N, groups), projection)
    assert out["per_head"].isfinite().all()
    assert out["norms"].max() < 1e-3
    out = writes.head_writes([call], {}, projection, bools("000000", "111111"))
    assert out["norms"].isfinite().all()
    assert out["stable_rank"].isfinite().all()
    assert out["stable_rank"][0].tolist() == [0.0] * HEADS


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [-100.0, 0.01])
def test_what_is_near(size, dtype):
    """Up to 16 roundings of the largest number."""
    x, step = torch.tensor([size, 0.0]).double(), 16 * torch.finfo(dtype).eps * abs(size)
    assert writes.near(x, x + 0.9 * step, dtype)
    assert not writes.near(x, x + 1.1 * step, dtype)
    assert not writes.near(x, x - torch.tensor([0, 1.1 * step]), dtype)
    assert writes.near(x * 0, x * 0, dtype)
    made = writes.measure(nn.LayerNorm(10).to(dtype), torch.zeros(1, 1, 10, dtype=dtype))
    assert made["weight"].dtype == made["bias"].dtype == torch.float32


def test_a_large_whole_in_fp16_is_compared_in_fp32():
    want = torch.full((6, 400), 4000.0, dtype=torch.float16)  # its norm is beyond fp16
    got, none = want.float().reshape(2, 3, 400), torch.zeros(2, 3)
    writes.check_same(got, want, none, None, torch.float16, "")
    with pytest.raises(ValueError, match="off by up to"):
        writes.check_same(got * 1.2, want, none, None, torch.float16, "")


def test_names_of_modules():
    assert writes.name_of(nn.Linear(1, 1)) == " (Linear)"
    envoy = SimpleNamespace(path="model.layers.0.o_proj", _get_name=lambda: "Linear8bit")
    assert writes.name_of(envoy) == "layers.0.o_proj (Linear8bit)"


def test_places_in_a_model():
    weight = torch.ones(2)
    layer = SimpleNamespace(scale=0.5, gamma=torch.ones(2, device="meta"))
    layer._hf_hook = SimpleNamespace(weights_map={"gamma": weight})
    root = SimpleNamespace(model=SimpleNamespace(layers=[None, layer]))
    assert walk.locate(root, "model.layers.1") is layer
    assert walk.locate(root, "model.layers.1.scale") == 0.5
    assert walk.locate(root, "model.layers.1.gamma") is weight
    assert walk.factors_at(root, ("model.layers.1.scale",), "cpu") == [0.5]
    moved = walk.factors_at(root, ("model.layers.1.gamma",), "meta")
    assert moved[0].device.type == "meta"
    assert walk.first_tensor(((weight, 1), 2)) is weight
    assert walk.first_tensor([weight]) is weight
    assert walk.query_of((None, (1, 2), {})) == 2
    assert walk.query_of((None, (1,), {"query": 3})) == 3
    nested = walk.detached({"a": {"b": torch.ones(1, requires_grad=True)}})
    assert not nested["a"]["b"].requires_grad
    # On whatever device it was, what leaves the trace lies on the CPU.
    far = SimpleNamespace(detach=lambda: SimpleNamespace(cpu=lambda: "here"))
    assert walk.detached({"a": far}) == {"a": "here"}
    assert walk.last_logits(far) == "here"


def test_parameters_of_kernels():
    modules = [SimpleNamespace(), SimpleNamespace()]
    root, state, tensor = SimpleNamespace(layers=modules), {}, torch.ones(2)
    given = {"a": ("@module", "layers.1"), "b": ("@modules", ["layers.0", "layers.1"]), "c": tensor}
    given |= {"d": 3, "e": (0, 1)}
    got = walk.resolve(root, given, torch.device("meta"), state)
    assert got["a"] is modules[1]
    assert got["b"] == modules
    assert got["c"].device.type == "meta"
    assert got["d"] == 3
    assert got["e"] == (0, 1)
    # Moved once per run and device: kernels compare tensors by identity.
    assert walk.resolve(root, {"x": tensor}, torch.device("meta"), state)["x"] is got["c"]
    assert walk.resolve(root, {"x": tensor}, torch.device("cpu"), state)["x"] is tensor


def test_logits_of_chosen_positions():
    logits = torch.randn(2, 3, 5, requires_grad=True)
    got = walk.last_logits(logits)
    assert torch.equal(got, logits)
    assert not got.requires_grad
    assert walk.last_logits(logits, graph=True) is logits
    got = walk.last_logits(logits, torch.tensor([2, 0]), graph=True)
    assert torch.equal(got, torch.stack([logits[0, 2:], logits[1, :1]]))
    assert got.requires_grad


class Source:
    """What nnsight shows of a module's source: the binding of a function, and a call of it."""

    def __init__(self, calls):
        self.calls, self.written = calls, []
        self.bound = SimpleNamespace(output=calls[0][0])

    def __getattr__(self, name):
        if name != "call":
            raise AttributeError(name)
        return self

    @property
    def inputs(self):
        return self.calls[len(self.written)][1:]

    @inputs.setter
    def inputs(self, given):
        self.written.append(given)


def site(calls, length, **more):
    """A plan's step for an attention site, and the module of it."""
    source = Source(calls)
    here = SimpleNamespace(source=source, input=torch.zeros(length, 4), output=None)
    step = {"tower": "vision", "name": "attention", "layer": 3, "path": "block", "how": "attention"}
    step |= {
        "call": "call",
        "bind": "bound",
        "fires": "per window",
        "edits": [],
        "reads": [],
        "stages": [],
    }
    return SimpleNamespace(block=here), {**step, **more}, source


def test_windows_are_edited_one_after_the_other():
    """Each with its span, what it was before the edits, and the sum of all effects."""
    calls, seen = windows(), []

    def kernel(call, state, span, mark):
        seen.append((span, state["stage"], state["edit"], state["unedited"] is call, mark))
        _, args, kwargs = call
        effect = {"rows": torch.tensor([span[1]])}
        return ((lambda *a, **k: "edited"), (*args[:3], args[3] * 2), kwargs), effect

    edit = [("slot", kernel, {"mark": 7}), ("other", kernel, {"mark": 8})]
    root, step, source = site(calls, 9, edits=edit, stages=["keys", "values"])
    tracer = SimpleNamespace(iter=[0, 1, 2, 3])
    state, out = {}, {}
    # Every window writes its inputs once, which moves the source on to the next.
    got = walk.read_site(root, tracer, step, state, out)
    spans = [(0, 2), (2, 6), (6, 9)]
    assert [one[0] for one in seen] == [span for span in spans for _ in range(2)]
    assert seen[0][1:] == ("keys", ("slot", "vision", "attention", 3), True, 7)
    assert seen[1][1:] == ("values", ("other", "vision", "attention", 3), False, 8)
    assert source.bound.output() == "edited"
    assert len(source.written) == 3
    assert torch.equal(source.written[1][0][3], calls[1][1][3] * 4)
    assert torch.equal(got[1][1][3], calls[1][1][3] * 4)
    key = ("vision", "attention", 3)
    assert out[("edit", "slot")][key]["rows"].tolist() == [17]
    assert out[("edit", "other")][key]["rows"].tolist() == [17]


def test_a_source_that_is_not_as_the_anatomy_says():
    calls = windows(sizes=(2,))
    root, step, source = site(calls, 9)
    with pytest.raises(RuntimeError, match="windows of block cover 4 tokens; expected 9"):
        walk.read_site(root, SimpleNamespace(iter=[0, 1]), step, {}, {})
    source.bound.output = 3
    with pytest.raises(
        RuntimeError, match="block: bound holds int; expected the attention function"
    ):
        walk.read_site(root, SimpleNamespace(iter=[0]), step, {}, {})


def test_a_call_that_no_edit_changes_is_left_as_it_is():
    calls = windows(sizes=(2,))

    def look(call, state, span):
        return (flash_attention, *call[1:]), None

    root, step, source = site(calls, 2, fires="once", edits=[(0, look, {})], stages=["keys"])
    out = {}
    got = walk.read_site(root, None, step, {}, out)
    assert got[0][0] is flash_attention
    assert source.written == []
    assert out == {}
    root, step, source = site(calls, 2, fires="once")
    assert walk.read_site(root, None, step, {}, {})[0][0] is plain_attention
    assert source.bound.output is plain_attention


def test_a_plan_is_walked():
    """Reads see what edits left; the number of the step and the memory reach the kernels."""
    states, memory = torch.randn(2, 3, 4), {"kept": 1}
    here = SimpleNamespace(input=(states, "mask"), output=(states * 2, "weights"))
    root, seen = SimpleNamespace(block=here), []

    def double(x, state, by):
        seen.append((state["step"], state["memory"]))
        return x * by, {"rows": torch.ones(2)}

    def look(x, state):
        return {"sum": x.sum()}

    step = {"tower": "language", "layer": 0, "path": "block", "edits": [(5, double, {"by": 3})]}
    step |= {"reads": [(0, look, {}), (1, look, {})]}
    plan = [{**step, "name": "pre", "how": "input"}, {**step, "name": "post", "how": "output"}]
    out = walk.walk(root, None, plan, 4, memory)
    assert seen == [(4, memory)] * 2
    assert seen[0][1] is memory
    for name, factor in (("pre", 3), ("post", 6)):
        key = ("language", name, 0)
        for slot in (0, 1):
            assert torch.equal(out[slot][key]["sum"], (states * factor).sum())
        assert out[("edit", 5)][key]["rows"].tolist() == [1, 1]
    assert torch.equal(here.input, states * 3)
    assert torch.equal(here.output[0], states * 6)
    assert here.output[1] == "weights"
    walk.walk(root, None, plan[:1])
    assert seen[-1] == (0, {})
    inside, step, _ = site(
        [make()], 0, fires="once", reads=[(0, lambda calls, state: calls[0][1][1], {})]
    )
    out = walk.walk(inside, None, [step])
    assert torch.equal(out[0][("vision", "attention", 3)], make()[1][1])
    # A kernel that gives back what it got writes nothing, and a bare output stays bare.
    here.output = states
    same = {**plan[1], "edits": [(5, lambda x, state: (x, None), {})]}
    walk.walk(root, None, [same])
    assert here.output is states
    walk.walk(root, None, plan[1:])
    assert torch.equal(here.output, states * 3)


def test_lists_of_unequal_length_are_refused():
    """An edit without a stage, groups without coefficients, rows without live tokens."""
    calls = windows(sizes=(2,))
    root, step, _ = site(calls, 2, fires="once", edits=[(0, None, {})], stages=[])
    with pytest.raises(ValueError, match="shorter"):
        walk.read_site(root, None, step, {}, {})
    kept = {"coefficients": torch.ones(2, 2)}
    with pytest.raises(ValueError, match=r"longer|shorter"):
        gating.factors_of(kept, bools("1"), ("V", "L", "rest"))
    with pytest.raises(ValueError, match="shorter"):
        residual.massive(torch.ones(2, 3, 4), {}, bools("111"))
