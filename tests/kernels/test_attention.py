"""Kernels on one attention call that is made here, against weights computed by hand."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from sinkscope.kernels import attention, edited_call, received, walk, writes

HEADS, KV_HEADS, WIDTH, N = 4, 2, 8, 6


class Module(nn.Module):
    """What a kernel function asks of its attention module."""

    num_key_value_groups = HEADS // KV_HEADS

    def __init__(self, is_causal=True):
        super().__init__()
        self.is_causal = is_causal


def visible(kind):
    """Which keys every query sees, ``[query key]``."""
    seen = torch.ones(N, N, dtype=torch.bool)
    if kind == "bidirectional":
        return seen
    seen = seen.tril()
    return seen.triu(-2) if kind == "window" else seen  # a window of 3 keys


def make_call(kind="causal", seed=0, batch=2):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, HEADS, N, WIDTH, generator=generator)
    key, value = (torch.randn(batch, KV_HEADS, N, WIDTH, generator=generator) for _ in range(2))
    mask = None
    if kind in ("bool", "additive", "window"):
        mask = visible(kind).expand(batch, 1, N, N)
    if kind == "additive":
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    module = Module(is_causal=kind != "bidirectional")
    return (
        sdpa_attention_forward,
        (module, query, key, value),
        {
            "attention_mask": mask,
            "scaling": 0.5,
            "dropout": 0.0,
        },
    )


def weights_of(call, kind):
    """Softmax weights by hand, ``[batch head query key]``."""
    _, (_, query, key, _), options = call
    logits = query @ key.repeat_interleave(2, dim=1).transpose(2, 3) * options["scaling"]
    return logits.masked_fill(~visible(kind), float("-inf")).softmax(dim=-1)


@pytest.mark.parametrize("kind", ["causal", "bidirectional", "bool", "additive", "window"])
@pytest.mark.parametrize("sharp", [1.0, 30.0])
def test_own_weights_by_hand(kind, sharp):
    """By a copy of every key, and by columns where the call is edited; also where one key takes all."""
    function, (module, query, key, value), options = make_call(kind)
    call = (function, (module, sharp * query, key, value), options)
    want = weights_of(call, kind).diagonal(dim1=2, dim2=3)
    assert torch.allclose(received.own_weights(call), want, atol=2e-6)
    edited = edited_call.attend(function, dict.fromkeys(edited_call.STAGES, ()))
    assert torch.allclose(received.own_weights((edited, *call[1:])), want, atol=2e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.allclose(received.own_weights(call), want, atol=2e-6)
    uniform = (1 / visible(kind).sum(dim=1)).expand_as(want)
    assert torch.allclose(received.own_weights(call, null=True), uniform, atol=1e-6)
    newest = (
        function,
        (module, sharp * query[:, :, -1:], key, value),
        {**options, "attention_mask": None},
    )
    if kind in ("causal", "bidirectional"):
        assert torch.allclose(received.own_weights(newest), want[..., -1:], atol=2e-6)


KINDS = ("causal", "bidirectional", "bool", "additive", "window")


@pytest.mark.parametrize("kind", KINDS)
def test_masses_received_and_patterns_by_hand(kind):
    call = make_call(kind)
    want = weights_of(call, kind)
    groups = torch.zeros(2, N, 2)
    groups[0, 1:3, 0] = groups[1, 0, 0] = groups[:, 4, 1] = 1
    out = attention.group_mass([call], {}, groups)
    assert torch.allclose(out["mass"], torch.einsum("bhqk,bkg->bhqg", want, groups), atol=1e-6)
    uniform = visible(kind).float() / visible(kind).sum(dim=1, keepdim=True)
    assert torch.allclose(out["null"], torch.einsum("qk,bkg->bqg", uniform, groups), atol=1e-6)

    live = torch.ones(2, N, dtype=torch.bool)
    live[1, :2] = False
    seen = torch.einsum("bq,qk->bk", live.float(), visible(kind).float())
    assert torch.equal(received.visible_queries(call, live), seen)
    got = received.received([call], {}, live, others=True)
    column = torch.einsum("bhqk,bq->bhk", want, live.float()) / seen[:, None]
    assert torch.allclose(got["received"].nan_to_num(), column.nan_to_num(), atol=1e-6)
    alone = 1 - torch.eye(N)
    seeing = torch.einsum("bq,qk->bk", live.float(), visible(kind).float() * alone)
    assert torch.equal(got["seeing"], seeing)
    for name, weights in (("others", want), ("others_null", uniform.expand_as(want))):
        column = torch.einsum("bhqk,bq->bhk", weights * alone, live.float()) / seeing[:, None]
        column = column[:, 0] if name == "others_null" else column
        assert torch.allclose(got[name].nan_to_num(), column.nan_to_num(), atol=1e-6)
    flat = torch.einsum("qk,bq->bk", uniform, live.float()) / seen
    assert torch.allclose(got["null"].nan_to_num(), flat.nan_to_num(), atol=1e-6)

    rows = torch.tensor([[5, 0], [3, -1]])
    pattern = attention.patterns([call], {}, rows)
    assert torch.allclose(pattern[0], want[0][:, [5, 0]], atol=1e-6)
    assert torch.allclose(pattern[1][:, 0], want[1][:, 3], atol=1e-6)
    assert pattern[1][:, 1].isnan().all()


def test_what_groups_write_adds_up_to_what_attention_writes():
    call = make_call()
    projection = nn.Linear(HEADS * WIDTH, 10, bias=False)
    want = torch.einsum(
        "bhqk,bhkd->bqhd", weights_of(call, "causal"), call[1][3].repeat_interleave(2, dim=1)
    )
    everything = torch.ones(2, N, 1)
    out = writes.contribution_norms([call], {}, everything, projection)
    assert torch.allclose(out["norms"][..., 0], projection(want.flatten(2)).norm(dim=-1), atol=1e-5)
    blocks = projection.weight.reshape(10, HEADS, WIDTH)
    by_head = torch.einsum("bqhd,ohd->bhqo", want, blocks).norm(dim=-1)
    assert torch.allclose(out["per_head"][..., 0], by_head, atol=1e-5)


def test_more_groups_than_head_dimensions():
    """Groups are asked for in portions of the head dimension; here 12 groups in heads of 8."""
    call, groups = make_call(), torch.eye(N).repeat(1, 2).expand(2, N, 2 * N)
    mass = attention.group_mass([call], {}, groups)["mass"]
    want = weights_of(call, "causal")
    assert torch.allclose(mass, torch.cat([want, want], dim=-1), atol=1e-6)


def test_nulls_are_shared_by_calls_with_one_mask_only():
    """Layers share a null, but not with another mask, another causality, or other queries."""
    groups = torch.eye(N)[None, :, :3].expand(2, -1, -1).contiguous()
    live = torch.ones(2, N, dtype=torch.bool)
    some = live.clone()
    some[:, :3] = False
    shared, asked = {}, []

    def counting(*args, **kwargs):
        asked.append(1)
        return sdpa_attention_forward(*args, **kwargs)

    for kind in ("causal", "bidirectional", "window", "causal"):
        call = (counting, *make_call(kind)[1:])
        for rows in (live, some):
            alone = received.received([call], {}, rows)["null"]
            beside = received.received([call], shared, rows)["null"]
            assert torch.equal(alone.nan_to_num(), beside.nan_to_num())
        alone = attention.group_mass([call], {}, groups)["null"]
        assert torch.equal(alone, attention.group_mass([call], shared, groups)["null"])
    asked.clear()
    attention.group_mass([call], shared, groups)
    assert len(asked) == 1  # the masses; their null is known


def test_heads_that_cannot_be_told_apart_are_refused():
    call = make_call()
    narrow = (call[0], (*call[1][:2], *(x[..., :1] for x in call[1][2:])), call[2])
    narrow[1][1].resize_(2, HEADS, N, 1)
    with pytest.raises(ValueError, match="2 query heads share one key-value head of 1 dimensions"):
        attention.weigh_queries(narrow, torch.ones(2, 1, N))


def test_nothing_is_written_in_place():
    call = make_call("additive")
    before = [tensor.clone() for tensor in (*call[1][1:], call[2]["attention_mask"])]
    groups, live = torch.ones(2, N, 1), torch.ones(2, N, dtype=torch.bool)
    attention.group_mass([call], {}, groups)
    received.received([call], {}, live)
    attention.patterns([call], {}, torch.zeros(2, 1, dtype=torch.long))
    writes.contribution_norms([call], {}, groups, nn.Linear(HEADS * WIDTH, 4))
    for tensor, copy in zip((*call[1][1:], call[2]["attention_mask"]), before, strict=True):
        assert torch.equal(tensor, copy)
        assert tensor.grad is None


class Norm(nn.Module):
    """An RMS norm whose weight is one more than its parameter, as Gemma's."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-0.5, 0.7, width))

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)


def layer_norm(width):
    """A layer norm with weights and biases of its own."""
    norm = nn.LayerNorm(width)
    nn.init.uniform_(norm.weight, 0.5, 2)
    nn.init.uniform_(norm.bias)
    return norm


@pytest.mark.parametrize("kind", ["rms", "layer", "both"])
def test_groups_and_biases_add_up_behind_a_norm(kind):
    """What a group writes behind norms, by hand from their statistics of the whole."""
    torch.manual_seed(3)
    call, width = make_call(), 10
    projection = nn.Linear(HEADS * WIDTH, width)
    factor = nn.Parameter(torch.rand(width))
    parts = {
        "rms": [Norm(width)],
        "layer": [layer_norm(width)],
        "both": [layer_norm(width), 0.3, factor, Norm(width)],
    }[kind]
    groups = torch.zeros(2, N, 3)
    groups[:, :2, 0], groups[:, 2:, 1], groups[..., 2] = 1, 1, 1
    value = call[1][3].repeat_interleave(2, dim=1)
    pieces = [
        torch.einsum("bhqk,bk,bhkd->bqhd", weights_of(call, "causal"), groups[..., g], value)
        for g in range(2)
    ]
    pieces = [piece.flatten(2) @ projection.weight.T for piece in pieces]
    pieces.append(projection.bias.expand_as(pieces[0]))
    for part in parts:
        total = sum(pieces)
        if not callable(part):
            pieces = [piece * part for piece in pieces]
        elif isinstance(part, Norm):
            size = (total.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
            pieces = [piece * (1 + part.weight) / size for piece in pieces]
        else:
            size = (total.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
            pieces = [(x - x.mean(-1, keepdim=True)) * part.weight / size for x in pieces]
            pieces[2] = pieces[2] + part.bias
    whole = sum(pieces[:2])
    got = writes.contribution_norms([call], {}, groups, projection, parts)["norms"]
    for g, piece in enumerate((*pieces[:2], whole)):
        assert torch.allclose(got[..., g], piece.norm(dim=-1), rtol=1e-4)
    heads = torch.einsum("bhqk,bhkd->bqhd", weights_of(call, "causal"), value)
    out = projection(heads.flatten(2))
    for part in parts:
        out = part(out) if callable(part) else out * part
    assert torch.allclose(sum(pieces), out, atol=1e-5)


@pytest.mark.parametrize("part", [nn.Linear(10, 10), nn.GELU(), nn.Softmax(dim=-1)], ids=str)
def test_parts_are_not_followed_through_anything_else(part):
    projection = nn.Linear(HEADS * WIDTH, 10)
    with pytest.raises(ValueError, match="neither a factor per channel nor a norm; expected one"):
        writes.contribution_norms([make_call()], {}, torch.ones(2, N, 1), projection, [part])


def test_an_edit_before_a_factor_keeps_the_bits_of_the_rest():
    """What the model multiplies by 0.22 is handed over divided by it, but where nothing changed."""
    made = torch.randn(2, 50, 8)
    factors = [0.22, torch.rand(8) + 0.5]

    def edit(states, state):
        return torch.where(torch.arange(50)[:, None] == 3, 2.5, states), None

    step = {"how": "output", "edits": [(0, edit, {})]}
    here = SimpleNamespace(output=(made, "weights"))
    read = walk.edit_value(here, step, made, factors, {}, {})
    rest = torch.arange(50) != 3
    assert torch.equal(here.output[0][:, rest], made[:, rest])
    assert not torch.equal((walk.times(made, factors) / factors[1] / 0.22)[:, rest], made[:, rest])
    assert torch.equal(read, here.output[0] * 0.22 * factors[1])
    assert (read[:, 3] - 2.5).abs().max() < 1e-6
    assert here.output[1] == "weights"
