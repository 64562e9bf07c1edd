"""Edits of a key that outweighs all others by a planted logit gap, under Hugging Face's own kernels.

A quotient of two attention calls would be 0 / 0 here: at a gap of 95 the other keys' weights
underflow in every dtype. The reference is an explicit softmax in fp64 over the same rounded inputs.
Tolerances are absolute, on values of size about 1; they are what one plain call of the same kernel
in the same dtype is off by.
"""

import functools
import inspect
import itertools

import pytest
import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward as gemma2_eager
from transformers.models.llama.modeling_llama import eager_attention_forward

import sinkscope as ss
from sinkscope.kernels.edits import edit_keys, edit_mass, edit_values, evict_keys
from sinkscope.testing import TINY
from tests.interventions import reference as by_hand
from tests.interventions.conftest import make_case
from tests.interventions.test_exact import agree, off
from tests.interventions.test_untouched import half

KERNELS = {"sdpa": sdpa_attention_forward, "eager": eager_attention_forward}
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}
INF = float("inf")
GAPS = (10.0, 20.0, 95.0)
N, HEADS, KV_HEADS, SINK = 9, 4, 2, 2
EVERYWHERE = pytest.mark.parametrize(
    ("kernel", "dtype", "gap"), list(itertools.product(KERNELS, TOLERANCE, GAPS)), ids=str
)
WAYS = pytest.mark.parametrize(
    ("dtype", "how", "factor"),
    [
        (dtype, how, {"mask": 0.0, "scale": 0.5}.get(how, 0.3))
        for dtype in TOLERANCE
        for how in ("mask", "weight", "scale", "weight without renormalising")
    ],
    ids=str,
)


def planted(gap, dtype, width=16, scaling=None, seed=0):
    """A causal call of two rows in which key ``SINK`` has ``gap`` more logit than any other."""
    g = torch.Generator().manual_seed(seed)
    scaling = width**-0.5 if scaling is None else scaling
    query = torch.randn(2, HEADS, N, width, generator=g)
    key = torch.randn(2, KV_HEADS, N, width, generator=g) * 0.3
    value = torch.randn(2, KV_HEADS, N, width, generator=g)
    # The last channel belongs to the sink: every query has 4 there, and only its key reads it.
    query[..., -1], key[..., -1] = 4.0, 0.0
    key[:, :, SINK] = 0.0
    share = HEADS // KV_HEADS
    others = torch.einsum("bhqd,bhkd->bhqk", query, key.repeat_interleave(share, dim=1)) * scaling
    key[:, :, SINK, -1] = (others.max() + gap) / (4.0 * scaling)
    return [x.to(dtype) for x in (query, key, value)], scaling


class Module(nn.Module):
    num_key_value_groups = HEADS // KV_HEADS
    is_causal = True


def call_of(kernel, tensors, scaling, **rest):
    """A call as a decoder makes it; eager kernels get the causal mask that SDPA implies."""
    query, key, value = tensors
    mask = None
    if kernel != "sdpa":
        mask = torch.full((N, N), torch.finfo(query.dtype).min, dtype=query.dtype).triu(1)[
            None, None
        ]
    function = KERNELS.get(kernel, kernel)
    keywords = {"dropout": 0.0, "scaling": scaling, **rest}
    return function, (Module().eval(), query, key, value, mask), keywords


def explicit(tensors, scaling, edit=None, softcap=None, weigh=None, values=None):
    """fp64: explicit logits, causal mask, softmax, products; ``[batch query head d_head]``."""
    query, key, value = (x.double() for x in tensors)
    share = HEADS // KV_HEADS
    key, value = (x.repeat_interleave(share, dim=1) for x in (key, value))
    logits = torch.einsum("bhqd,bhkd->bhqk", query, key) * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits if edit is None else edit(logits)
    hidden = torch.ones(N, N, dtype=torch.bool).triu(1)
    weights = logits.masked_fill(hidden, -INF).softmax(-1)
    weights = weights if weigh is None else weigh(weights)
    value = value if values is None else values(value)
    return torch.einsum("bhqk,bhkd->bqhd", weights, value)


SINKS = torch.zeros(2, N, dtype=torch.bool).index_fill(1, torch.tensor([SINK]), value=True)
OTHERS = torch.zeros(2, N, dtype=torch.bool).index_fill(1, torch.tensor([0, 1, 4, 5]), value=True)
LIVE = torch.ones(2, N, dtype=torch.bool)


LOGITS, VALUES = {"stage": "logits"}, {"stage": "values"}
STAGE_OF = {"scale": "keys", "mask": "logits", "weight": "logits"}


def edited(call, how, factor):
    state = {"stage": STAGE_OF.get(how, "weights")}
    after, _ = edit_keys(call, state, None, SINKS, LIVE, factor, measure=False)
    return after[0](*after[1], **after[2])[0]


def column(x):
    return x[:, None, None]


def halves(w):
    """Weights on the sink halved, the rest renormalised."""
    w = torch.where(column(SINKS), 0.5 * w, w)
    return w / w.sum(-1, keepdim=True)


@EVERYWHERE
def test_masking_a_dominant_key_equals_minus_infinity(kernel, dtype, gap):
    tensors, scaling = planted(gap, dtype)
    call = call_of(kernel, tensors, scaling)
    got = edited(call, how="mask", factor=0.0).double()
    want = explicit(tensors, scaling, lambda x: x.masked_fill(column(SINKS), -INF))
    assert (got - want).abs().max() <= TOLERANCE[dtype]
    # Before the sink nothing changes, and behind it nothing of its value is left.
    plain = call[0](*call[1], **call[2])[0]
    assert torch.equal(got[:, :SINK], plain[:, :SINK].double())
    assert (plain[:, SINK + 1 :] - got[:, SINK + 1 :]).abs().max() > 0.1


@EVERYWHERE
def test_scaling_a_dominant_key_equals_its_formula(kernel, dtype, gap):
    tensors, scaling = planted(gap, dtype)
    call, most = call_of(kernel, tensors, scaling), TOLERANCE[dtype]
    for factor in (0.0, 0.25, -0.5):
        got = edited(call, how="scale", factor=factor).double()
        want = explicit(tensors, scaling, lambda x, s=factor: torch.where(column(SINKS), s * x, x))
        assert (got - want).abs().max() <= most
    got = edited(call, how="weight", factor=0.5).double()
    assert (got - explicit(tensors, scaling, weigh=halves)).abs().max() <= most
    got = edited(call, how="weight without renormalising", factor=0.5).double()
    want = explicit(tensors, scaling, weigh=lambda w: torch.where(column(SINKS), 0.5 * w, w))
    assert (got - want).abs().max() <= most


@EVERYWHERE
def test_a_tiny_factor_undoes_the_gap(kernel, dtype, gap):
    """A factor of ``exp(-gap)`` puts the sink beside the others, if the bias is right to 1e-2: bf16,
    which holds 8 bits, could be off by 0.2 at 95."""
    tensors, scaling = planted(gap, dtype)
    bias = -(gap + 0.37)
    factor = torch.tensor(bias, dtype=torch.float64).exp().item()
    got = edited(call_of(kernel, tensors, scaling), how="weight", factor=factor).double()
    want = explicit(tensors, scaling, lambda x: torch.where(column(SINKS), x + bias, x))
    # The eager kernel rounds logits to its dtype before the softmax, whoever asks.
    most = TOLERANCE[dtype]
    if kernel == "eager" and dtype != torch.float32:
        most *= max(1.0, gap / 10)
    assert (got - want).abs().max() <= most


@EVERYWHERE
def test_moving_the_weight_of_a_dominant_key(kernel, dtype, gap):
    """What is given goes to the target in proportion, though exp(-95) is 0 in every dtype."""
    tensors, scaling = planted(gap, dtype)
    call = call_of(kernel, tensors, scaling)
    after, effect = edit_mass(call, {"stage": "weights"}, None, SINKS, OTHERS, LIVE, 0.6)
    got = after[0](*after[1], **after[2])[0].double()

    def moves(w):
        budget = 0.6 * (w * column(SINKS)).sum(-1, keepdim=True)
        aim = w * column(OTHERS)
        return torch.where(column(SINKS), 0.4 * w, w) + budget * aim / aim.sum(-1, keepdim=True)

    want = explicit(tensors, scaling, weigh=moves)
    assert (got - want).abs().max() <= TOLERANCE[dtype]
    assert effect["rows"].tolist() == [N - SINK, N - SINK]


@EVERYWHERE
def test_replacing_the_value_of_a_dominant_key(kernel, dtype, gap):
    tensors, scaling = planted(gap, dtype)
    after, _ = edit_values(call_of(kernel, tensors, scaling), VALUES, None, SINKS, LIVE, "zero")
    got = after[0](*after[1], **after[2])[0].double()
    want = explicit(tensors, scaling, values=lambda v: v.masked_fill(SINKS[:, None, :, None], 0.0))
    assert (got - want).abs().max() <= TOLERANCE[dtype]


@EVERYWHERE
def test_patching_the_value_of_a_dominant_key(kernel, dtype, gap):
    tensors, scaling = planted(gap, dtype)
    given = torch.randn(2, KV_HEADS, N, 16, generator=torch.Generator().manual_seed(3)).to(dtype)
    after, _ = edit_values(
        call_of(kernel, tensors, scaling), VALUES, None, SINKS, LIVE, "tensor", given=given
    )
    got = after[0](*after[1], **after[2])[0].double()
    heads = given.double().repeat_interleave(HEADS // KV_HEADS, dim=1)
    want = explicit(
        tensors, scaling, values=lambda v: torch.where(SINKS[:, None, :, None], heads, v)
    )
    assert (got - want).abs().max() <= TOLERANCE[dtype]


@EVERYWHERE
def test_evicting_a_dominant_key(kernel, dtype, gap):
    """Without the first keys: rows lose the sink once it is no longer among their recent ones."""
    tensors, scaling = planted(gap, dtype)
    after, _ = evict_keys(call_of(kernel, tensors, scaling), LOGITS, None, LIVE, 0, 3, False)
    got = after[0](*after[1], **after[2])[0].double()
    gone = torch.ones(N, N, dtype=torch.bool).tril(-3)
    want = explicit(tensors, scaling, lambda x: x.masked_fill(gone, -INF))
    assert (got - want).abs().max() <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_quotient_that_we_do_not_use_fails(kernel, dtype):
    """``A (m v) / A m`` with the sink left out is 0 / 0: in half precision at 95, in fp32 at 110."""
    gap = 110.0 if dtype == torch.float32 else 95.0
    (query, key, value), scaling = planted(gap, dtype)
    keep = (~SINKS)[:, None, :, None].to(dtype)
    call = call_of(kernel, [query, key, value], scaling)
    ones = keep.expand_as(value).contiguous()
    part, rest = (
        call[0](call[1][0], query, key, x, call[1][4], **call[2])[0] for x in (value * keep, ones)
    )
    assert not torch.isfinite((part / rest)[:, SINK + 1 :]).all()


@WAYS
def test_heads_too_wide_for_more_dimensions_get_an_explicit_mask(dtype, how, factor):
    tensors, scaling = planted(20.0, dtype, width=256)
    for kernel in KERNELS:
        got = edited(call_of(kernel, tensors, scaling), how=how, factor=factor).double()
        assert (got - by_formula(tensors, scaling, how, factor)).abs().max() <= 2 * TOLERANCE[dtype]


@WAYS
def test_under_a_soft_cap_the_bias_comes_after_it(dtype, how, factor):
    """Gemma 2 squeezes logits by ``cap tanh(x / cap)``; a mask inside it would be capped too."""
    kernel = functools.partial(gemma2_eager)
    assert "softcap" in inspect.signature(gemma2_eager).parameters
    tensors, scaling = planted(20.0, dtype)
    call = call_of(kernel, tensors, scaling, softcap=15.0)
    got = edited(call, how=how, factor=factor).double()
    want = by_formula(tensors, scaling, how, factor, softcap=15.0)
    assert (got - want).abs().max() <= 2 * TOLERANCE[dtype]


def by_formula(tensors, scaling, how, factor, softcap=None):
    """The four ways of `edit_keys`, written out."""
    if how == "scale":
        query, key, value = tensors
        key = torch.where(SINKS[:, None, :, None], key.double() * factor, key.double())
        return explicit([query, key, value], scaling, softcap=softcap)

    def weigh(w):
        scaled = torch.where(column(SINKS), factor * w, w)
        if how == "weight without renormalising":
            return scaled
        kept = scaled / scaled.sum(-1, keepdim=True)
        return torch.where(scaled.sum(-1, keepdim=True) > 0, kept, w)

    return explicit(tensors, scaling, softcap=softcap, weigh=weigh)


# ----------------------------------------------------------------------------------- in a whole model


def plant_in(module, gap, case):
    """Give the first token of every row a logit gap in every layer and head of a LLaMA decoder.

    Channel 7 of a head turns by 3e-4 per position, so what it adds to a logit hardly depends on the
    distance: queries get 20 there, the first key ``gap * 4 / 20``, the other keys nothing.
    """
    first, tower = case.first, case.lvlm.anatomy.language

    def queries(m, args, out):
        out = out.clone()
        out.view(*out.shape[:2], -1, tower.d_head)[..., [7, 15]] = out.new_tensor([20.0, 0.0])
        return out

    def keys(m, args, out):
        out = out.clone()
        heads = out.view(*out.shape[:2], -1, tower.d_head)
        heads[..., [7, 15]] = 0.0
        heads[..., 7][first] = gap * 4 / 20
        return out

    for path in tower.attention:
        attention = module.get_submodule(path)
        attention.q_proj.register_forward_hook(queries)
        attention.k_proj.register_forward_hook(keys)


@pytest.fixture(scope="module")
def sunk(batch):
    """``sunk(gap, dtype)``: a case whose first tokens are real sinks, in model and twin."""
    made = {}

    def get(gap, dtype):
        if (gap, dtype) not in made:
            lvlm = ss.LVLM(*TINY["llava-clip-llama"](dtype=dtype))
            twin = TINY["llava-clip-llama"](attn_implementation="eager", dtype=dtype)[0]
            case = make_case(lvlm, twin, batch(lvlm))
            for module in (lvlm.module, twin):
                plant_in(module, gap, case)
            made[gap, dtype] = case
        return made[gap, dtype]

    return get


EDITS = {
    "mask": lambda c: (ss.MaskKeys("first"), by_hand.masks(c.first)),
    "halve": lambda c: (ss.ScaleAttention("first", 0.5), by_hand.scales_weights(c.first, 0.5)),
    "move": lambda c: (
        ss.Redistribute("first", "image", 0.6),
        by_hand.redistributes(c.first, c.sample.tokens.image >= 0, 0.6),
    ),
    "zero": lambda c: (
        ss.AblateValues("first"),
        by_hand.replaces_values(c.first, lambda v, at: torch.zeros_like(v)),
    ),
}


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("gap", GAPS)
def test_edits_of_a_real_sink_in_a_model(sunk, gap, name):
    c = sunk(gap, torch.float32)
    probe = ss.AttentionMass({"first": "first"})
    taken = c.lvlm.run(c.sample, probes=[probe])[probe].mass.nan_to_num()
    assert taken[c.late[:, None, None, :, None].expand_as(taken)].min() > (0.5 if gap > 10 else 0)
    edit, change = EDITS[name](c)
    answer = by_hand.reference_run(c, [change])
    agree(c, [edit], answer, "language")


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_edits_of_a_real_sink_in_half_precision(sunk, dtype, name):
    c = sunk(95.0, dtype)
    edit, change = EDITS[name](c)
    inputs = half(c.sample.inputs, dtype)
    answer = by_hand.reference_run(c, [change], inputs=inputs)
    run = c.lvlm.run(c.sample, interventions=[edit])
    most = {torch.bfloat16: 8e-2, torch.float16: 1e-2}[dtype]
    assert off(run.logits[c.live], answer.logits[c.live]) <= most
