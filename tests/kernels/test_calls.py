"""Questions to attention of several windows, steps, precisions and kernels, by hand."""

import pytest
import torch
from torch import nn

from sinkscope.kernels import (
    attention,
    edited_call,
    edits,
    received,
    writes,
)
from tests.kernels.by_hand import (
    DTYPES,
    HEADS,
    LAYOUT,
    NAN,
    SINK,
    WIDTH,
    N,
    as_images,
    blocks,
    bools,
    close,
    logits,
    make,
    output,
    plain_attention,
    run,
    softmax,
    weights,
    windows,
)


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
    got = attention.values(calls, {}, LAYOUT)
    assert got.dtype == dtype  # as they are
    close(got.float(), as_images(values, 2))
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
    assert len(asked) == portions  # the edit holds in all rows and heads
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


def test_the_pattern_of_a_decode_step_is_that_of_its_one_query():
    """Rows are positions of the prompt; a step has the newest token alone, and no row asked for is none."""
    call = make(n_query=1)
    got = attention.patterns([call], {"step": 3}, torch.tensor([[5, 2], [-1, -1]]))
    assert got.shape[2] == 1
    close(got[0, :, 0], weights(call)[0, :, 0])
    assert not bool(got[1].nan_to_num().any())
