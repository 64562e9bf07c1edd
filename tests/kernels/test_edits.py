"""Kernels that edit one attention call, against logits, weights and values by hand."""

import math

import pytest
import torch

from sinkscope.kernels import attention, edited_call, edits
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
    weights,
)

KEYS = bools("011000", "001010")
LIVE = bools("111111", "001111")
ROWS = bools("111101", "011111")
BIG = torch.finfo(torch.float16).min


def gate_of(call, keys, live=LIVE, rows=None, heads=None):
    """Live, chosen rows and heads that see a key, ``[batch head query]``."""
    sees = ((logits(call) > -math.inf) & keys[:, None, None]).any(-1)
    chosen = live if rows is None else live & rows
    mask = torch.tensor([heads is None or h in heads for h in range(HEADS)])
    return sees & chosen[:, None] & mask[None, :, None]


def check(call, made, gate, want, keys, after=None, atol=2e-6):
    """The output is ``want`` in the gate and bit for bit what it was elsewhere; so are the effect's numbers."""
    edited, effect = made
    got, inside = run(edited), gate.transpose(1, 2)
    assert torch.allclose(got.double()[inside], want[inside], atol=atol)
    assert torch.equal(got[~inside], run(call)[~inside])
    assert effect["rows"].tolist() == gate.any(1).sum(1).tolist()
    assert effect["count"].tolist() == gate.sum((1, 2)).tolist()
    assert effect["tokens"].tolist() == keys.sum(1).tolist()
    if after is None:
        assert set(effect) == {"rows", "empty", "tokens", "count"}
        return
    for name, attended in (("before", weights(call)), ("after", after)):
        mass = (attended * keys[:, None, None]).sum(-1)
        want = torch.where(gate, mass, 0.0).sum((1, 2))
        assert effect[name].dtype == torch.float32
        assert torch.allclose(effect[name].double(), want, atol=max(1e-5, atol))


FACTORS = {"keys": 0.5, "logits": 0.25, "weights": 1.5}
CHOICES = {"all": (None, None), "some": (ROWS, [1, 2])}
MASKS = {
    "implied": {},
    "all see all": {"is_causal": False},
    "bool": {"mask": torch.ones(2, 1, N, N, dtype=torch.bool).tril()},
    "window": {"sliding_window": 3},
    "soft cap": {"softcap": 2.0, "sliding_window": 4},
    "sink": {"s_aux": torch.tensor([0.5, -1.0, 2.0, 0.0])},
    "no scaling": {"scaling": None},
    "by head": {"mask": torch.ones(2, HEADS, N, N, dtype=torch.bool).tril()},
}
MASKS["by head"]["mask"][:, 2, :, 1:3] = False  # this head sees no edited key of the first row


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("stage", FACTORS)
@pytest.mark.parametrize("mask", MASKS)
def test_scaled_keys(mask, stage, choice):
    call, factor, (rows, heads) = make(**MASKS[mask]), FACTORS[stage], CHOICES[choice]
    by_key = torch.where(KEYS, factor, 1.0).double()[:, None, None]
    attended = scaled(call, by_key, stage)
    gate = gate_of(call, KEYS, LIVE, rows, heads)
    made = edits.edit_keys(call, {"stage": stage}, None, KEYS, LIVE, factor, rows, heads)
    check(call, made, gate, output(call, attended), KEYS, attended)
    assert made[1]["empty"].tolist() == [0, 0]


def scaled(call, by_key, stage):
    """The weights by hand, with ``[batch 1 1 key]`` factors of keys, of exp(logits) or of weights."""
    if stage == "keys":
        return weights(scaled_keys(call, by_key[:, 0]))
    return (
        weights(call) * by_key if stage == "weights" else weights(call, lambda x: x + by_key.log())
    )


def scaled_keys(call, factor):
    """The call with its keys scaled by ``[batch 1 key]``."""
    function, (module, query, key, value), options = call
    return function, (module, query, key * factor[..., None], value), options


def test_a_factor_for_every_key_and_no_measure():
    call, factor = make(), torch.rand(2, N) + 0.2
    made = edits.edit_keys(call, {"stage": "keys"}, None, KEYS, LIVE, factor, measure=False)
    by_key = torch.where(KEYS, factor, 1.0)[:, None]
    want = output(call, weights(scaled_keys(call, by_key)))
    check(call, made, gate_of(call, KEYS), want, KEYS)


@pytest.mark.parametrize("stage", FACTORS)
def test_at_a_decode_step_only_keys_of_the_prompt_are_scaled(stage):
    """Two tokens were made since the prompt of six; a window has dropped its first two."""
    call, factor = make(n_query=1, n_key=N), FACTORS[stage]
    kept = torch.cat([KEYS[:, 2:], bools("00", "00")], dim=1)
    by_key = torch.where(kept, factor, 1.0).double()[:, None, None]
    attended = scaled(call, by_key, stage)
    state = {"stage": stage, "step": 2}
    made = edits.edit_keys(call, state, None, KEYS, LIVE, factor)
    gate = gate_of(call, kept, bools("1", "1"))
    check(call, made, gate, output(call, attended), kept, attended)


@pytest.mark.parametrize("stage", FACTORS)
def test_a_window_of_a_packed_tower_has_its_part_of_every_mask(stage):
    call, factor = make(batch=1, n_query=4, n_key=4, is_causal=False), FACTORS[stage]
    keys, live, rows = bools("110100110"), bools("111111011"), bools("111011111")
    part = slice(3, 7)
    by_key = torch.where(keys[:, part], factor, 1.0).double()[:, None, None]
    attended = scaled(call, by_key, stage)
    gate = gate_of(call, keys[:, part], live[:, part], rows[:, part])
    made = edits.edit_keys(call, {"stage": stage}, (3, 7), keys, live, factor, rows)
    check(call, made, gate, output(call, attended), keys[:, part], attended)


@pytest.mark.parametrize("mask", ["implied", "window", "sink"])
def test_masked_keys_and_rows_that_see_nothing_else(mask):
    """Rows 0 and 1 of the first row of the batch see masked keys only, and so do all of a window."""
    call, keys = make(**MASKS[mask]), bools("111100", "001010")
    seen, sink = logits(call) > -math.inf, mask == "sink"
    empty = ~(seen & ~keys[:, None, None]).any(-1) & LIVE[:, None] & (not sink)
    attended = weights(call, lambda x: x.masked_fill(keys[:, None, None], -math.inf))
    gate = gate_of(call, keys) & ~empty
    made = edits.edit_keys(call, {"stage": "logits"}, None, keys, LIVE, 0)
    check(call, made, gate, output(call, attended), keys, attended)
    assert made[1]["empty"].tolist() == empty.any(1).sum(1).tolist() != [1, 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("stage", FACTORS)
def test_flash_kernels_are_asked_in_half_precision(stage, dtype):
    call, factor = make(flash_attention, dtype=dtype), FACTORS[stage]
    by_key = torch.where(KEYS, factor, 1.0).double()[:, None, None]
    attended = scaled(call, by_key, stage)
    made = edits.edit_keys(call, {"stage": stage}, None, KEYS, LIVE, factor)
    assert run(made[0]).dtype == dtype
    near = 20 * torch.finfo(dtype).eps
    check(call, made, gate_of(call, KEYS), output(call, attended), KEYS, attended, near)


@pytest.mark.parametrize("stage", ["weights", "values"])
def test_a_key_whose_weight_or_value_was_taken_is_still_seen(stage):
    call, state = make(), {"stage": stage}
    if stage == "weights":
        made, _ = edits.edit_keys(call, state, None, KEYS, LIVE, 0.0)
    else:
        made, _ = edits.edit_values(call, state, None, KEYS, LIVE, "zero", rows=LIVE)
    _, effect = edits.edit_keys(made, {"stage": "keys"}, None, KEYS, LIVE, 2.0)
    assert effect["count"].tolist() == gate_of(call, KEYS).sum((1, 2)).tolist()


def test_a_key_that_was_made_light_is_still_seen_in_fp16():
    """Its weight is about 1e-9, which is 0 in fp16."""
    call = make(dtype=torch.float16)
    light, _ = edits.edit_keys(call, {"stage": "logits"}, None, KEYS, LIVE, 1e-9, measure=False)
    _, effect = edits.edit_keys(light, {"stage": "logits"}, None, KEYS, LIVE, 2.0, measure=False)
    assert effect["count"].tolist() == gate_of(call, KEYS).sum((1, 2)).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_models_mask_made_explicit(dtype):
    """Causality, a window of 2, a bool mask and one with room for more keys, bit for bit."""
    query, key = torch.zeros(2, HEADS, 4, WIDTH, dtype=dtype), torch.zeros(2, KV_HEADS, 4, WIDTH)
    module, low = make()[1][0], torch.finfo(dtype).min
    named = {"module": module, "query": query, "key": key, "attention_mask": None}
    bias = torch.tensor([[0.0, -3.0, -1e4, 0.5], [1.0, 0.0, 0.0, 0.0]])
    see = bools("1000", "1100", "1110", "1111")
    within = bools("1000", "1100", "0110", "0011")

    def want(seen):
        return torch.where(seen, bias[:, None, None].to(dtype), low)

    for rest, seen in (({}, see), ({"sliding_window": 2}, within)):
        got = edits.masked(named, rest, bias)
        assert got.dtype == dtype
        assert torch.equal(got, want(seen))
        # As a bool mask, and as numbers with room for keys to come.
        given = seen.expand(2, 1, 4, 4)
        assert torch.equal(edits.masked({**named, "attention_mask": given}, rest, bias), want(seen))
        wide = torch.nn.functional.pad(torch.where(given, 0.0, low).to(dtype), (0, 3), value=low)
        got = edits.masked({**named, "attention_mask": wide}, rest, bias)
        # The lowest number and a bias is no infinity, which would be NaN in a row that sees nothing.
        raised = torch.where(
            given, bias[:, None, None].to(dtype), low + bias[:, None, None].to(dtype)
        )
        assert torch.equal(got, raised.clamp(min=low))
        assert got.isfinite().all()
    one = {**named, "query": query[:, :, :1]}
    assert torch.equal(edits.masked(one, {"sliding_window": 2}, bias), want(see[3:]))
    assert edits.masked({**named, "query": query[:1], "key": key[:1]}, {}, bias[:1]).shape[0] == 1
    two = {**named, "query": query[:, :, :2], "key": key[:, :, :2]}
    assert torch.equal(edits.masked(two, {}, bias[:, :2])[0, 0, 0], want(see)[0, 0, 0, :2])
    free = edits.masked({**named, "module": make(is_causal=False)[1][0]}, {}, bias)
    assert torch.equal(free, want(torch.ones(4, 4, dtype=torch.bool)))


@pytest.mark.parametrize("scaling", [None, 0.4, 1.0])
@pytest.mark.parametrize("size", [0.01, 3.0, 1e4])
def test_a_bias_of_16_bits_in_extra_dimensions(size, scaling):
    """A high and a low part: bf16 alone has 8 bits. Extra dimensions come in eights, the input is left."""
    _, (module, query, key, value), _ = make(dtype=torch.bfloat16)
    bias = -size * torch.rand(2, N, generator=torch.Generator().manual_seed(1))
    named = {"module": module, "query": query, "key": key, "value": value, "attention_mask": None}
    rest = {} if scaling is None else {"scaling": scaling}
    wide, options = edits.bias_keys(bias)(named, rest)
    used = WIDTH**-0.5 if scaling is None else scaling
    assert options == {"scaling": used}
    assert {wide[name].shape[-1] for name in ("query", "key", "value")} == {WIDTH + 8}
    assert wide["attention_mask"] is None
    got = wide["query"].double() @ wide["key"].double().repeat_interleave(2, dim=1).mT * used
    plain = query.double() @ key.double().repeat_interleave(2, dim=1).mT * used
    assert ((got - plain) - bias[:, None, None]).abs().max() <= size * 2**-16
    # Half of the bias is on either side, up to a power of two: neither overflows fp16.
    extra = wide["query"][..., WIDTH:].abs().max(), wide["key"][..., WIDTH:].abs().max()
    most = float(bias.abs().max())
    assert extra[0] == 2.0 ** round(math.log2(max(1.0, most / used)) / 2)
    assert extra[1] <= 4 * max(1, math.sqrt(size / used))


def test_heads_of_up_to_248_dimensions_stay_without_a_mask():
    for width, explicit in ((248, False), (249, True)):
        named = {
            "module": make()[1][0],
            "attention_mask": None,
            **{name: torch.zeros(1, 1, 3, width) for name in ("query", "key", "value")},
        }
        made, _ = edits.bias_keys(torch.zeros(1, 3))(named, {})
        assert (made["attention_mask"] is not None) == explicit


@pytest.mark.parametrize("step", [0, 2])
def test_divided_queries(step):
    """A row whose temperature is one is left alone, and the tokens are all live keys."""
    call = make(n_query=1 if step else N, n_key=N + step)
    live = bools("1", "1") if step else LIVE
    keys = torch.cat([LIVE, torch.ones(2, step, dtype=torch.bool)], dim=1)
    attended = weights(call, lambda x: x / 2.5)
    gate = gate_of(call, keys, live, None if step else ROWS, [0, 3])
    state = {"stage": "keys", "step": step}
    rows = None if step else ROWS
    made = edits.divide_queries(call, state, None, LIVE, LIVE, 2.5, rows, [0, 3])
    check(call, made, gate, output(call, attended), keys, attended)
    _, effect = edits.divide_queries(call, state, None, LIVE, LIVE, 1.0)
    assert [effect[name].tolist() for name in ("rows", "tokens", "count")] == [[0, 0]] * 3


TARGET = bools("000110", "000001")


@pytest.mark.parametrize("kernel", ["fp32", "half", "flash", "sink", "flash sink"])
def test_moved_attention(kernel):
    """``A - r A 1_s + r (A 1_s) A_t``, where ``A_t`` is attention among the target keys alone."""
    dtype = torch.float32 if kernel in ("fp32", "sink") else torch.bfloat16
    sink = MASKS["sink"] if "sink" in kernel else {}
    call = make(*[flash_attention] * ("flash" in kernel), dtype=dtype, **sink)
    first = weights(call)
    among = logits(call).masked_fill(~TARGET[:, None, None], -math.inf).softmax(-1).nan_to_num()
    taken = first * KEYS[:, None, None]
    attended = first - 0.6 * taken + 0.6 * taken.sum(-1, keepdim=True) * among
    gate = gate_of(call, KEYS, LIVE, ROWS) & gate_of(call, TARGET)
    state = {"stage": "weights"}
    made = edits.edit_mass(call, state, None, KEYS, TARGET, LIVE, 0.6, ROWS)
    near = 2e-6 if dtype == torch.float32 else 0.03
    check(call, made, gate, output(call, attended), KEYS, attended, near)
    # Once more: what the first one left is moved from the target to a key that both see.
    once, third = made[0], bools("100000", "001000")
    after = torch.where(gate[..., None], attended, first)
    share = after * third[:, None, None]
    taken = after * TARGET[:, None, None]
    budget = taken.sum(-1, keepdim=True) / share.sum(-1, keepdim=True).clamp(min=1e-30)
    twice = after - 0.5 * taken + 0.5 * budget * share
    again = gate_of(call, TARGET, LIVE) & (share.sum(-1) > 0)
    made, effect = edits.edit_mass(once, state, None, TARGET, third, LIVE, 0.5, measure=False)
    assert effect["count"].tolist() == again.sum((1, 2)).tolist()
    got, inside = run(made).double(), again.transpose(1, 2)
    assert torch.allclose(got[inside], output(call, twice)[inside], atol=near)


@pytest.mark.parametrize("least", [0.5, 0.51])
@pytest.mark.parametrize("most", [0.0, -1e-4])
def test_the_image_centric_rule_at_its_limits(least, most):
    """Two queries, and four keys with a quarter each: half on the image, half of that, but for 1e-6, on a visual sink."""
    _, (module, query, key, value), options = make(n_query=2, n_key=4, is_causal=False)
    call = (make()[0], (module, torch.zeros_like(query), key, value), options)
    image, sinks = bools("0110", "0110"), bools("0100", "0100")
    share = torch.tensor(0.25) / (torch.tensor(0.5) + torch.tensor(1e-6) * 2)
    rule = {"visual": image, "visual_sinks": sinks, "least_visual": least}
    rule |= {"most_sink_share": float(share) + most, "measure": False}
    source, target, live = bools("1000", "1000"), bools("0001", "0001"), torch.ones(2, 2).bool()
    made, effect = edits.edit_mass(
        call, {"stage": "weights"}, None, source, target, live, 1.0, **rule
    )
    holds = least == 0.5 and most == 0.0
    assert effect["count"].tolist() == ([8, 8] if holds else [0, 0])
    assert set(effect) == {"rows", "empty", "tokens", "count"}
    moved = torch.tensor([0.0, 0.25, 0.25, 0.5]) if holds else torch.full((4,), 0.25)
    assert torch.allclose(run(made).double(), output(call, moved.double().expand(2, 4, 2, 4)))


@pytest.mark.parametrize(
    "mask", ["implied", "window", "bool", "all see all", "half", "flash", "long"]
)
@pytest.mark.parametrize("step", [0, 2])
def test_evicted_keys(mask, step):
    """The first live key and the last two: of keys before them nothing is left, the empty row is spared."""
    dtype = torch.bfloat16 if mask in ("half", "flash") else torch.float32
    options = MASKS.get(mask, {})
    if step:
        options = {} if mask == "bool" else options
    kernel = flash_attention if mask == "flash" else plain_attention
    size = 11 if mask == "long" else N  # more keys than dimensions
    live = torch.cat([LIVE, torch.ones(2, size - N, dtype=torch.bool)], dim=1)
    call = make(kernel, n_query=1 if step else size, n_key=size, dtype=dtype, **options)
    # With two tokens since the prompt the cache holds the last six of eight.
    alive = torch.cat([live, torch.ones(2, step, dtype=torch.bool)], dim=1)
    rank = alive.cumsum(1) - 1
    place = torch.arange(size + step)
    at = place[-(1 if step else size) :]
    out = alive[:, None] & (rank[:, None] >= 1)
    out = out & (rank[:, at, None] - rank[:, None] >= 2)
    out = out[..., -size:]
    seen = logits(call) > -math.inf
    attended = weights(call, lambda x: x.masked_fill(out[:, None], -math.inf))
    gate = (seen & out[:, None]).any(-1) & alive[:, None, -len(at) :]
    made, effect = edits.evict_keys(
        call, {"stage": "logits"} | ({"step": step} if step else {}), None, live, 1, 2
    )
    got, inside, want = run(made), gate.transpose(1, 2), output(call, attended)
    near = 2e-6 if dtype == torch.float32 else 0.03
    assert torch.allclose(got.double()[inside], want[inside], atol=near)
    assert torch.equal(got[~inside], run(call)[~inside])
    lost = seen[:, :1] & out[:, None]
    assert effect["rows"].tolist() == gate.any(1).sum(1).tolist()
    assert effect["count"].tolist() == gate.sum((1, 2)).tolist()
    assert effect["tokens"].tolist() == lost[:, 0, -1].sum(-1).tolist()
    assert effect["empty"].tolist() == [0, 0]
    before = torch.where(gate, (weights(call) * lost).sum(-1), 0.0).sum((1, 2))
    assert torch.allclose(effect["before"].double(), before, atol=max(1e-5, near))
    assert torch.allclose(effect["after"], torch.zeros(2), atol=1e-6)


DONORS = bools("100101", "100100")  # a key that is replaced is no donor, whatever was asked


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("how", ["zero", "mean", "resample", "tensor"])
@pytest.mark.parametrize("choice", CHOICES)
def test_replaced_values(how, choice, dtype):
    """Twice: a second edit takes the model's own values as donors, not those of the first."""
    call, (rows, heads) = make(dtype=dtype), CHOICES[choice]
    value, sure = call[1][3], torch.full((1, 1, 1, 1), 2.0)
    at = torch.tensor([[5, 4, 3, 2, 1, 0], [0, 1, 2, 2, 2, 5]])
    given = {"zero": None, "mean": DONORS, "resample": at, "tensor": sure.expand_as(value)}[how]

    def new(keys):
        weight = (DONORS & ~keys)[:, None, :, None].double()
        mean = (value.double() * weight).sum(2, keepdim=True) / weight.sum(2, keepdim=True)
        return {
            "zero": torch.zeros_like(value),
            "mean": mean.to(dtype).expand_as(value),
            "resample": torch.stack([row[:, to] for row, to in zip(value, at, strict=True)]),
            "tensor": sure.to(dtype).expand_as(value),
        }[how]

    mixed = torch.where(KEYS[:, None, :, None], new(KEYS), value)
    gate = gate_of(call, KEYS & (mixed != value).any(-1).any(1).any(1, True), LIVE, rows, heads)
    want, near = output(call, weights(call), mixed), 2e-6 if dtype == torch.float32 else 5e-3
    state = {"stage": "values", "unedited": call, "memory": {}, "edit": "here"}
    made = edits.edit_values(call, state, None, KEYS, LIVE, how, given, rows, heads)
    assert state["memory"] == {}  # without a window the donors stay in the cache
    if choice == "all":  # rows that are not live write by the new values too
        assert torch.allclose(run(made[0]).double(), want, atol=near)
        assert made[1]["count"].tolist() == gate.sum((1, 2)).tolist()
        assert made[1]["rows"].tolist() == gate.any(1).sum(1).tolist()
        exact = 1e-6 if dtype == torch.float32 else 0  # fp16 is rounded once, at the end
        assert torch.allclose(made[0][1][3], mixed, atol=exact, rtol=0)
        assert made[0][1][3].dtype == dtype
        by_name = (call[0], call[1][:3], {**call[2], "value": value})
        named, _ = edits.edit_values(by_name, state, None, KEYS, LIVE, how, given)
        assert torch.equal(named[2]["value"], made[0][1][3])
    else:
        check(call, made, gate, want, KEYS, atol=near)
    other = bools("000001", "010000")
    twice, _ = edits.edit_values(made[0], state, None, other, LIVE, how, given)
    both = torch.where(other[:, None, :, None], new(other), mixed)
    first = torch.where(other[:, None, :, None], new(other), value)
    want = output(call, weights(call), both)
    if choice == "some":
        want = torch.where(
            gate.transpose(1, 2)[..., None], want, output(call, weights(call), first)
        )
    seen = gate_of(call, other).transpose(1, 2)
    assert torch.allclose(run(twice).double()[seen], want[seen], atol=near)


@pytest.mark.parametrize("how", ["mean", "resample", "tensor"])
def test_donors_that_a_window_has_dropped_are_remembered(how):
    """The prompt's six values; then a cache of six that holds its last four and two new ones."""
    prompt, later = make(sliding_window=6), make(n_query=1, sliding_window=6)
    at = torch.tensor([[5, 4, 3, 2, 1, 0], [3, 3, 3, 3, 3, 3]])
    tensor = torch.randn(2, KV_HEADS, N, WIDTH, generator=torch.Generator().manual_seed(9))
    given = {"mean": DONORS, "resample": at, "tensor": tensor}[how]
    state = {"stage": "values", "memory": {}, "edit": "here", "step": 0}
    edits.edit_values(prompt, state, None, KEYS, LIVE, how, given)
    state |= {"step": 2}
    made, effect = edits.edit_values(later, state, None, KEYS, LIVE, how, given)
    new = run_values(prompt, how, given)
    keys = torch.cat([KEYS[:, 2:], bools("00", "00")], dim=1)
    shifted = torch.cat([new[:, :, 2:], torch.zeros(2, KV_HEADS, 2, WIDTH)], dim=2)
    assert torch.allclose(made[1][3], torch.where(keys[:, None, :, None], shifted, later[1][3]))
    assert effect["tokens"].tolist() == keys.sum(1).tolist()
    kept = dict(state["memory"])
    whole = make(n_query=1, n_key=N + 2, sliding_window=9)  # its cache still holds the donors
    edits.edit_values(whole, state, None, KEYS, LIVE, how, given)
    assert all(state["memory"][name] is x for name, x in kept.items())
    if how != "tensor":
        with pytest.raises(ValueError, match="no longer holds the donors"):
            edits.edit_values(later, {**state, "memory": {}}, None, KEYS, LIVE, how, given)


def run_values(call, how, given):
    """What `edit_values` puts in place of the values."""
    value = call[1][3]
    if how == "resample":
        return torch.stack([row[:, to] for row, to in zip(value, given, strict=True)])
    weight = given[:, None, :, None].float() if how == "mean" else None
    mean = None if weight is None else (value * weight).sum(2, True) / weight.sum(2, True)
    return given if how == "tensor" else mean.expand_as(value)


def test_resampled_values_at_a_step_whose_cache_is_whole():
    """Without a window nothing is remembered: donors are looked up among the prompt's keys."""
    later = make(n_query=1, n_key=N + 2)
    at = torch.tensor([[5, 4, 3, 2, 1, 0], [3, 3, 3, 3, 3, 3]])
    state = {"stage": "values", "memory": {}, "edit": "here", "step": 2}
    made, _ = edits.edit_values(later, state, None, KEYS, LIVE, "resample", at)
    keys = torch.nn.functional.pad(KEYS, (0, 2))
    whole = torch.cat([at, torch.tensor([[6, 7], [6, 7]])], dim=1)
    new = torch.stack([row[:, to] for row, to in zip(later[1][3], whole, strict=True)])
    assert torch.equal(made[1][3], torch.where(keys[:, None, :, None], new, later[1][3]))
    assert state["memory"] == {}
    mean, _ = edits.edit_values(later, state, None, KEYS, LIVE, "mean", DONORS)
    new = run_values((None, (None, None, None, later[1][3][:, :, :N]), {}), "mean", DONORS)[
        :, :, :1
    ]
    assert torch.allclose(mean[1][3], torch.where(keys[:, None, :, None], new, later[1][3]))


def test_a_row_without_donors_keeps_its_values():
    call = make()
    donors = bools("100000", "000000") | (KEYS & bools("000000", "111111"))
    made, effect = edits.edit_values(call, {"stage": "values"}, None, KEYS, LIVE, "mean", donors)
    assert torch.equal(made[1][3][1], call[1][3][1])
    assert effect["rows"].tolist()[1] == 0 < effect["rows"].tolist()[0]


@pytest.mark.parametrize("kernel", [plain_attention, flash_attention])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parts_of_attention_are_added_in_fp32(dtype, kernel):
    """In half precision 0.7 times what is taken would be rounded before it is subtracted."""
    generator = torch.Generator().manual_seed(8)
    taken, given, whole = (
        torch.randn(2, N, HEADS, WIDTH, generator=generator).to(dtype) for _ in range(3)
    )
    value = torch.zeros(2, KV_HEADS, N, WIDTH, dtype=dtype)
    call, state = make(kernel, dtype=dtype), {"stage": "weights"}
    made, _ = edits.edit_keys(call, state, None, KEYS, LIVE, 0.3)
    ((_, change),) = made[0].recipe["weights"]
    got = change(lambda value, among=None: taken, value, whole)
    assert torch.equal(got, whole.float() + (0.3 - 1) * taken.float())
    made, _ = edits.edit_mass(call, state, None, KEYS, TARGET, LIVE, 0.7)
    ((_, change),) = made[0].recipe["weights"]

    def answers(*parts):
        left = list(parts)
        return change(lambda value, among=None: left.pop(0), value, whole)

    zero, one = torch.zeros_like(taken), torch.ones_like(taken)
    assert torch.equal(answers(taken, zero), whole.float() - 0.7 * taken.float())
    budget = change(
        lambda value, among=None: one if among else zero, value, torch.zeros_like(whole)
    )
    assert torch.equal(answers(zero, given), whole.float() + budget * given.float())
    exact = kernel is plain_attention
    mass = attention.weigh_values(call, KEYS[..., None], float32=exact).float().transpose(1, 2)
    assert torch.equal(budget, (0.7 * mass).expand_as(budget))


@pytest.mark.parametrize("turned", [False, True])
def test_a_target_that_holds_the_source(turned):
    """What gives does not receive: rows that see nothing else of the target are left alone."""
    call, source, target = make(), bools("100000", "001000"), bools("110000", "001100")
    source, target = (target, source) if turned else (source, target)
    live = torch.ones(2, N).bool()
    asked, target = target, target & ~source
    first = weights(call)
    among = logits(call).masked_fill(~target[:, None, None], -math.inf).softmax(-1).nan_to_num()
    taken = first * source[:, None, None]
    attended = first - 0.6 * taken + 0.6 * taken.sum(-1, keepdim=True) * among
    gate = gate_of(call, source, live) & gate_of(call, target, live)
    made = edits.edit_mass(call, {"stage": "weights"}, None, source, asked, live, 0.6)
    check(call, made, gate, output(call, attended), source, attended)
    assert made[1]["rows"].tolist() == ([0, 0] if turned else [5, 3])


def test_weight_moves_to_keys_that_an_edit_of_weights_made_light():
    """Their share is told by a quotient of masses; gradients are finite where they have none."""
    function, (module, query, *rest), options = make()
    call = (function, (module, query.requires_grad_(), *rest), options)
    state, live = {"stage": "weights"}, torch.ones(2, N).bool()
    light, _ = edits.edit_keys(call, state, None, TARGET, live, 1e-3)
    made, effect = edits.edit_mass(light, state, None, KEYS, TARGET, live, 0.6)
    first = weights(call)
    attended = first * torch.where(TARGET, 1e-3, 1.0).double()[:, None, None]
    share, taken = attended * TARGET[:, None, None], attended * KEYS[:, None, None]
    among = share / share.sum(-1, keepdim=True).clamp(min=1e-30)
    attended = attended - 0.6 * taken + 0.6 * taken.sum(-1, keepdim=True) * among
    gate = (gate_of(call, KEYS, live) & gate_of(call, TARGET, live)).transpose(1, 2)
    assert torch.allclose(run(made).double()[gate], output(call, attended)[gate], atol=1e-3)
    assert effect["count"].tolist() == gate.sum((1, 2)).tolist()
    run(made).sum().backward()
    assert query.grad.isfinite().all()


def test_values_of_a_packed_tower_take_donors_of_their_window():
    call = make(batch=1, n_query=4, n_key=4, is_causal=False)
    keys, donors, live = bools("110100110"), bools("000011100"), torch.ones(1, 9).bool()
    new = call[1][3][:, :, 1:3].mean(2, keepdim=True)  # 4 and 5: the key 6 is replaced itself
    state = {"stage": "values"}
    made, _ = edits.edit_values(call, state, (3, 7), keys, live, "mean", donors)
    want = torch.where(keys[:, None, 3:7, None], new, call[1][3])
    assert torch.allclose(made[1][3], want, atol=1e-6)
    tensor = torch.randn(1, KV_HEADS, 9, WIDTH)
    made, _ = edits.edit_values(call, state, (3, 7), keys, live, "tensor", tensor.double())
    assert made[1][3].dtype == torch.float32
    assert torch.equal(
        made[1][3], torch.where(keys[:, None, 3:7, None], tensor[:, :, 3:7], call[1][3])
    )


def test_values_that_are_what_they_were_touch_no_row():
    call = make()
    own = call[1][3].clone()
    own[1, 0, 2] += 1
    made, effect = edits.edit_values(call, {"stage": "values"}, None, KEYS, LIVE, "tensor", own)
    assert effect["rows"].tolist() == [0, 4]
    assert torch.equal(run(made)[0], run(call)[0])


def test_of_two_replacements_of_a_value_the_later_one_holds():
    call, state = make(), {"stage": "values"}
    some, _ = edits.edit_values(call, state, None, KEYS, LIVE, "zero", None, None, [1, 2])
    every, _ = edits.edit_values(
        some, state, None, KEYS, LIVE, "tensor", torch.ones_like(call[1][3])
    )
    new = torch.where(KEYS[:, None, :, None], 1.0, call[1][3])
    seen = gate_of(call, KEYS).transpose(1, 2)
    got, want = run(every).double()[seen], output(call, weights(call), new)[seen]
    assert torch.allclose(got, want, atol=2e-6)


def test_rows_that_see_replaced_values_only_have_them_replaced():
    call, keys = make(), bools("110000", "111111")
    made, effect = edits.edit_values(call, {"stage": "values"}, None, keys, LIVE, "zero")
    assert effect["rows"].tolist() == [6, 4]
    assert effect["empty"].tolist() == [0, 0]
    assert not run(made)[1].any()


def test_a_change_of_another_stage_is_refused():
    call = make()
    gate = torch.ones(2, N, HEADS, 1).bool()
    changes = {
        "keys": lambda named, rest: (named, rest),
        "logits": lambda named, rest: (named, rest),
        "weights": lambda ask, value, output: output,
        "values": lambda value: value,
    }
    for stage, change in changes.items():
        made = edited_call.with_change(call, {"stage": stage}, gate, change)
        assert torch.equal(run(made), run(call))
        other = "values" if stage != "values" else "keys"
        with pytest.raises(ValueError, match=f"stage='{other}' whose kernel makes a change of"):
            edited_call.with_change(call, {"stage": other}, gate, change)
