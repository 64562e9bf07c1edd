"""Log-sum-exps of a fused kernel against softmax written out, and the fast ways against the general ones."""

from types import SimpleNamespace

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama.modeling_llama import eager_attention_forward

from sinkscope.kernels import attention, edits, logsumexp, received
from sinkscope.kernels.edited_call import totals

HEADS, WIDTH = 4, 8
HALVES = [torch.float32, torch.bfloat16, torch.float16]


def call_of(dtype=torch.float32, mask=None, causal=True, kv=2, n_query=21, n_key=21, **rest):
    """A call of torch's attention, with ``module`` and names as transformers makes it."""
    draw = torch.Generator().manual_seed(n_query + 3 * n_key + kv)
    shapes = ((HEADS, n_query), (kv, n_key), (kv, n_key))
    tensors = [torch.randn(2, h, n, WIDTH, generator=draw).mul(2).to(dtype) for h, n in shapes]
    module = SimpleNamespace(is_causal=causal, num_key_value_groups=HEADS // kv)
    return (
        sdpa_attention_forward,
        (module, *tensors, mask),
        {"scaling": 0.3, "dropout": 0.0, **rest},
    )


def masks(kind, dtype, n=21):
    """A padded batch, causal: none, as bool, or added in a dtype."""
    seen = torch.ones(2, 1, n, n).tril().bool()
    seen[1, :, :, :4] = False
    seen[1, :, :4, 0] = True  # rows of padding see something, as transformers has it
    lowest = torch.finfo(dtype).min
    added = torch.zeros(2, 1, n, n, dtype=dtype).masked_fill(~seen, lowest)
    return {"none": None, "bool": seen, "added": added}[kind]


def weights(call):
    """The weights written out in fp64, of the tensors as they are."""
    _, (module, query, key, _, mask), rest = call
    key = key.double().repeat_interleave(HEADS // key.shape[1], dim=1)
    logits = query.double() @ key.mT * rest["scaling"]
    if mask is not None:
        seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        logits = logits.masked_fill(~seen, float("-inf"))
    elif module.is_causal and query.shape[2] > 1:
        logits = logits.masked_fill(torch.ones_like(logits).triu(1).bool(), float("-inf"))
    return logits.softmax(-1), logits.logsumexp(-1)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    "given",
    [{}, {"kv": 4}, {"causal": False}, {"n_query": 1}, {"mask": "bool"}, {"mask": "added"}],
    ids=str,
)
@pytest.mark.parametrize("small", [True, False])
def test_what_follows_from_the_log_sum_exp(dtype, given, small, monkeypatch):
    """Column sums, own weights and those on one key per head, by writing logits down and in extra dimensions."""
    monkeypatch.setattr(logsumexp, "SMALL", logsumexp.SMALL if small else 0)
    given = {**given, "mask": masks(given.get("mask", "none"), dtype)}
    call = call_of(dtype, **given)
    of, (want, lse) = logsumexp.fused(call), weights(call)
    rows = torch.ones(2, want.shape[2], dtype=torch.bool)
    rows[1, :4] = want.shape[2] == 1
    near = 2e-5 if dtype == torch.float32 else 4e-4
    alive = rows[:, None].expand_as(lse)
    assert torch.allclose(of.lse[alive].double(), lse[alive], atol=near)
    sums = (want * rows[:, None, :, None]).sum(2)
    got, seen = logsumexp.column_sums(of, rows, {}).double(), sums > 0
    assert torch.allclose(got[seen], sums[seen], atol=near, rtol=near)
    own = want[..., -want.shape[2] :].diagonal(dim1=2, dim2=3)
    assert torch.allclose(logsumexp.own_weights(of)[alive].double(), own[alive], atol=near)
    at = torch.tensor([[0, 3, 20, 7], [5, 4, 11, 20]])
    one = want.gather(3, at[..., None, None].expand(-1, -1, want.shape[2], -1))[..., 0]
    assert torch.allclose(logsumexp.weights_on_key(of, at)[alive].double(), one[alive], atol=near)


def test_half_precision_needs_all_parts_of_a_number():
    """One part of -lse is off by more than a tenth of a percent; three are not."""
    call = call_of(torch.bfloat16, n_query=21)
    of, (want, _) = logsumexp.fused(call), weights(call)
    of.lse = of.lse + 60.0  # as if the logits were large; the sums shrink by exp(-60)
    rows, errors = torch.ones(2, 21, dtype=torch.bool), {}
    for parts in (1, 3):
        logsumexp.PARTS, kept = parts, logsumexp.PARTS
        try:
            got = logsumexp.column_sums(of, rows, {}).double() * torch.tensor(60.0).double().exp()
        finally:
            logsumexp.PARTS = kept
        errors[parts] = float(((got - want.sum(2)) / want.sum(2)).abs().max())
    assert errors[1] > 1e-2
    assert errors[3] < 1e-3


@pytest.mark.parametrize(
    ("why", "change"),
    [
        ("another function", lambda call: (lambda *a, **k: call[0](*a, **k), *call[1:])),
        (
            "a bias of positions",
            lambda call: (*call[:2], {**call[2], "position_bias": torch.ones(1)}),
        ),
        ("dropout", lambda call: (*call[:2], {**call[2], "dropout": 0.1})),
        ("a static cache", lambda _: call_of(n_key=30)),
        ("heads of 12", lambda call: widened(call, 4)),
    ],
)
def test_where_no_kernel_knows_it(why, change):
    """The general way stays, and gives the same."""
    assert logsumexp.fused(call_of()) is not None, why
    assert logsumexp.fused(change(call_of())) is None


def widened(call, more):
    function, (module, *tensors, mask), rest = call
    tensors = [torch.nn.functional.pad(x, (0, more)) for x in tensors]
    return function, (module, *tensors, mask), rest


@pytest.mark.parametrize("mask", ["none", "bool", "added"])
@pytest.mark.parametrize("asked", [{}, {"others": True, "events": True}], ids=str)
def test_received_attention_is_that_of_gradients(mask, asked, monkeypatch):
    call, live = call_of(mask=masks(mask, torch.float32)), torch.ones(2, 21, dtype=torch.bool)
    live[1, :4] = mask == "none"
    got = received.received([call], {}, live, **asked)
    monkeypatch.setattr(logsumexp, "kernel_for", lambda *_: None)
    assert logsumexp.fused(call) is None
    want = received.received([call], {}, live, **asked)
    for name in want:
        assert torch.allclose(got[name].nan_to_num(-1), want[name].nan_to_num(-1), atol=3e-6), name


@pytest.mark.parametrize("factor", [0.0, 0.5, 3.0, 1.02])
@pytest.mark.parametrize("mask", ["none", "bool"])
@pytest.mark.parametrize("n_query", [21, 1])
@pytest.mark.parametrize("few", [True, False])
def test_masses_of_an_edit_are_those_that_are_asked_for(factor, mask, n_query, few, monkeypatch):
    """From the log-sum-exps of two calls, or the model's own answer; by a mask or in extra dimensions."""
    monkeypatch.setattr(edits, "FEW", edits.FEW if few else 0)
    given = masks(mask, torch.float32)
    call = call_of(mask=given if n_query > 1 else None, n_query=n_query)
    keys = torch.zeros(2, 21, dtype=torch.bool)
    keys[0, :2] = keys[1, 5:9] = True
    live, told = torch.ones(2, n_query, dtype=torch.bool), []
    for fast in (True, False):
        if not fast:
            monkeypatch.setattr(logsumexp, "kernel_for", lambda *_: None)
            monkeypatch.setattr(edits, "made_at_once", lambda *_: None)
        state = {"stage": "logits"}
        with torch.no_grad():
            after, effect = edits.edit_keys(call, state, None, keys, live, factor)
            out = {("edit", 0): {"site": dict(effect)}}
            edits.settle(out, state)
            told.append((after[0](*after[1], **after[2])[0], out["edit", 0]["site"], after))
    (output, fast, made), (plain, slow, _) = told
    assert torch.allclose(output, plain, atol=2e-6)
    for name in ("rows", "empty", "tokens", "count", "before", "after"):
        assert torch.allclose(fast[name].float(), slow[name].float(), atol=3e-5), name
    before = attention.weigh_values(call, keys[..., None])[..., 0]
    assert float(slow["before"].sum()) <= float(before.sum()) + 1e-4
    assert not made[0].known  # it is computed once, and kept no longer than until it is used
    gate, (want, _) = output.ne(call[0](*call[1], **call[2])[0]).any(-1), weights(call)
    scale = torch.where(keys, factor, 1.0)[:, None, None].double()
    want = want * scale / (want * scale).sum(-1, keepdim=True)
    value = call[1][3].repeat_interleave(2, dim=1).double()
    there = gate.transpose(1, 2)
    assert torch.allclose((want @ value)[there], output.transpose(1, 2)[there].double(), atol=1e-5)


def test_a_plain_output_that_is_not_the_models_is_not_used(monkeypatch):
    """Its bits are compared with the model's own, once per pass."""
    call, state = call_of(), {"stage": "logits"}
    keys, live = torch.arange(21)[None].expand(2, -1) < 2, torch.ones(2, 21, dtype=torch.bool)
    with torch.no_grad():
        edits.edit_keys(call, state, None, keys, live, 0.0)
        (own,) = [key for key in state if key[0] == "fused"]
        assert state[own] is True
        real, other = logsumexp.run_fused, {"stage": "logits"}
        monkeypatch.setattr(logsumexp, "run_fused", lambda *a: (1.0001 * real(*a)[0], real(*a)[1]))
        _, effect = edits.edit_keys(call, other, None, keys, live, 0.0)
    assert other[own] is False
    assert "before" in effect


def test_a_graph_is_kept_where_one_is_wanted():
    """The fused kernel is asked without a graph, so that it makes no output of a pass with gradients."""
    call = call_of()
    call[1][1].requires_grad_(True)
    keys, live = torch.arange(21)[None].expand(2, -1) < 2, torch.ones(2, 21, dtype=torch.bool)
    after, _ = edits.edit_keys(call, {"stage": "logits"}, None, keys, live, 0.0)
    assert after[0](*after[1], **after[2])[0].requires_grad


def test_masses_of_rows_that_see_nothing_do_not_count():
    """A row that a mask hides everything from may have NaN in an answer of another kernel."""
    gate = torch.tensor([True, False]).reshape(1, 2, 1, 1)
    mass = torch.tensor([0.25, float("nan")]).expand(1, 3, 2)
    assert totals(gate, mass).tolist() == [0.75]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("mask", ["none", "bool", "added"])
@pytest.mark.parametrize(
    "function", [sdpa_attention_forward, eager_attention_forward], ids=["sdpa", "eager"]
)
def test_masses_of_few_queries_are_asked_for_these_alone(function, mask, causal):
    """Absent queries are NaN; eager attention hides nothing where it gets no mask, whatever the module says."""
    eager = function is eager_attention_forward
    given = masks("added" if eager and mask == "bool" else mask, torch.float32)
    call = (function, *call_of(mask=given, causal=causal)[1:])
    call[1][0].training = False
    groups = torch.zeros(2, 21, 2)
    groups[:, :3, 0] = groups[:, 6, 1] = 1
    every = attention.group_mass([call], {}, groups)
    for rows in (torch.tensor([[20, 5], [7, -1]]), torch.tensor([[20], [20]])):
        got = attention.group_mass([call], {}, groups, rows)
        for name, axis in (("mass", 2), ("null", 1)):
            want = attention.pick(every[name], rows, axis)
            assert torch.allclose(got[name].nan_to_num(-1), want.nan_to_num(-1), atol=1e-6)
        assert attention.only(call, rows, {}) is not None
    assert attention.only(call, torch.arange(21)[None].expand(2, -1), {}) is None  # no gain
