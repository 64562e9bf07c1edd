"""What heads and keys write into the stream, and the maps that lie between, by hand."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sinkscope.kernels import (
    writes,
)
from tests.kernels.by_hand import (
    DTYPES,
    HEADS,
    KV_HEADS,
    LAYOUT,
    WIDTH,
    N,
    as_images,
    blocks,
    bools,
    close,
    make,
    run,
    weights,
    windows,
)


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
            said = r"What model.0.attn \(SimpleNamespace\) adds to the stream is not what .* model.0.attn.o"
            writes.arrives(wrote, state, live, *names)
            with pytest.raises(ValueError, match=said):
                writes.proven(state)


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
    assert writes.name_of(nn.Linear(1, 1), {}) == " (Linear)"
    envoy = SimpleNamespace(_get_name=lambda: "Linear8bit")
    known = {"paths": {id(envoy): "model.layers.0.o_proj"}}
    assert writes.name_of(envoy, known) == "model.layers.0.o_proj (Linear8bit)"


def test_which_half_writes_more_into_the_largest_channel():
    attention, mlp = torch.tensor([[[1.0, -9.0, 2.0]] * 2]), torch.tensor([[[5.0, 8.0, -2.5]] * 2])
    state, halves = {}, ("attn_out", "mlp_out")
    for half, value in zip(halves, (attention, mlp), strict=True):
        assert writes.keep_half(value, state, half) == {}
    after = torch.tensor([[[0.0, -17.0, 3.0], [0.0, 1.0, 3.0]]], dtype=torch.bfloat16)
    attention.zero_()  # a model that adds in place
    assert writes.more_written(after, state, halves).tolist() == [[1.0, -0.5]]
    assert state == {}
