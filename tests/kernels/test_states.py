"""Kernels on states, of the residual stream and of gates, against numbers by hand in fp64."""

import math

import pytest
import torch
from torch import nn

from sinkscope.kernels import gating, residual
from tests.kernels.by_hand import bools, logits, make, output, run, softmax

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUT = torch.tensor([[0, 1, -1], [2, 3, 4]])  # two images in a packed row of five
NAN = float("nan")


def states_of(dtype=torch.float32, *shape):
    generator = torch.Generator().manual_seed(2)
    return (torch.randn(*(shape or (2, 4, 6)), generator=generator) * 3).to(dtype)


def close(got, want, rtol=1e-5):
    """Equal to what is computed in fp64, and fp32 itself."""
    assert got.dtype == torch.float32
    assert torch.allclose(got.double(), want.double(), rtol=rtol, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_questions_are_answered_in_fp32(dtype, packed):
    """Half-precision states are read as they are, and nothing is rounded to half precision again."""
    states, layout = (
        states_of(dtype, *((5, 6) if packed else (2, 4, 6))),
        LAYOUT if packed else None,
    )
    h = (states[LAYOUT.clamp(min=0)] if packed else states).double()
    close(residual.norms(states, {}, layout), h.norm(dim=-1))
    for got, want in (  # numbers of the states themselves come back as they are
        (residual.keep(states, {}, layout), h),
        (residual.channels(states, {}, [4, 1], layout), h[..., [4, 1]]),
    ):
        assert got.dtype == dtype
        assert torch.equal(got.double(), want)
    peak = h[..., [1, 5]].abs().amax(-1)
    close(residual.dimension_scores(states, {}, [1, 5], False, layout), peak)
    rms = (h.square().mean(-1) + 1e-6).sqrt()
    close(residual.dimension_scores(states, {}, [1, 5], layout=layout), peak / rms)
    anchor = torch.tensor([2, 9])  # one behind the end is the last
    other = torch.stack([h[0, 2], h[1, -1]])
    cosine = (h * other[:, None]).sum(-1).abs() / h.norm(dim=-1) / other.norm(dim=-1)[:, None]
    close(residual.cosine_to(states, {}, anchor, layout), cosine)
    live = torch.ones(h.shape[:2]).bool()
    live[1, 1:] = False
    out = residual.massive(states, {}, live, 2, layout)
    top = h.abs().topk(2).indices
    assert (out["channels"].dtype, out["values"].dtype) == (torch.int16, dtype)
    assert torch.equal(out["channels"].long(), top)
    assert torch.equal(out["values"].double(), h.gather(-1, top))
    close(out["median"], torch.stack([h[0].abs().flatten().sort().values[h[0].numel() // 2 - 1],
                                      h[1, 0].abs().sort().values[2]]))  # fmt: skip
    groups = torch.zeros(*h.shape[:2], 3).bool()
    groups[0, :2, 0] = groups[1, 0, 0] = groups[0, 1, 1] = True
    out = residual.group_means(states, {}, groups, layout)
    assert out["count"].tolist() == [[2, 1, 0], [1, 0, 0]]
    empty = torch.full((6,), NAN).double()
    rows = [[h[0, :2].mean(0), h[0, 1], empty], [h[1, 0], empty, empty]]
    close(out["means"], torch.stack([torch.stack(row) for row in rows]))


def test_states_that_are_nothing_much():
    """Zeros have cosine 0, a small token its score with 1e-6, one step's states are live, none is NaN."""
    states = torch.zeros(1, 3, 4)
    states[0, 1] = 1e-3
    assert residual.cosine_to(states, {}, torch.tensor([1])).tolist()[0] == [0, pytest.approx(1), 0]
    assert residual.dimension_scores(states, {}, [0])[0, 1].item() == pytest.approx(0.5**0.5)
    out = residual.massive(states, {}, bools("000"), k=9)
    assert out["median"].isnan().all()
    assert out["values"].shape[-1] == 4
    assert residual.massive(torch.ones(1, 2, 9), {}, bools("11"))["values"].shape[-1] == 4
    assert residual.massive(states[:, 1:2], {}, bools("000"))["median"].tolist() == [
        pytest.approx(1e-3)
    ]
    assert residual.live_at(bools("010"), states).tolist() == [[False, True, False]]
    assert residual.live_at(bools("010"), states[:, :1]).tolist() == [[True]]
    states[0, 2] = NAN  # padding may hold anything
    assert residual.mean_over(states, bools("110")).tolist() == [[[pytest.approx(5e-4)] * 4]]
    assert residual.mean_over(states, bools("010")).tolist() == [[[pytest.approx(1e-3)] * 4]]
    assert residual.mean_over(states, bools("000")).tolist() == [[[0.0] * 4]]
    assert residual.group_means(states, {}, bools("110")[..., None])["means"].isfinite().all()
    mean = residual.mean_over(states_of(torch.bfloat16, 1, 64, 6), torch.ones(1, 64).bool())
    close(mean[0, 0], states_of(torch.bfloat16, 1, 64, 6).double().mean((0, 1)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_lens_by_hand(dtype):
    states, head = states_of(dtype), nn.Linear(6, 7, bias=False).to(dtype)
    positions = torch.tensor([[3, 0, -1], [1, -1, 2]])
    out = residual.lens(states, {}, nn.Identity(), head, positions, 2)
    for row in range(2):
        for at, place in enumerate(positions[row].tolist()):
            logprobs = head(states[row, place]).double().log_softmax(-1)
            got = [out[name][row, at] for name in ("tokens", "logprobs", "entropy")]
            if place < 0:
                assert got[0].tolist() == [-1, -1]
                assert got[1].isnan().all()
                assert got[2].isnan()
                continue
            best = logprobs.topk(2)
            assert got[0].tolist() == best.indices.tolist()
            close(got[1], best.values, 1e-2 if dtype != torch.float32 else 1e-5)
            close(
                got[2], -(logprobs.exp() * logprobs).sum(), 1e-2 if dtype != torch.float32 else 1e-5
            )
    assert residual.lens(states, {}, nn.Identity(), head)["tokens"].shape == (2, 4, 5)
    assert residual.lens(states, {}, nn.Identity(), head, k=99)["tokens"].shape == (2, 4, 7)
    two = residual.lens(states[:, :2], {}, nn.Identity(), head, torch.tensor([[1], [0]]))
    every = residual.lens(states, {}, nn.Identity(), head)
    close(two["entropy"][:, 0], every["entropy"][[0, 1], [1, 0]])
    step = residual.lens(states[:, :1], {}, nn.Identity(), head, positions)  # its one token is read
    assert step["entropy"].shape == (2, 1)
    assert step["entropy"].isfinite().all()


def test_peaks_of_neurons_over_tokens_of_the_image():
    states, mask = (
        states_of(torch.bfloat16, 2, 5, 6),
        bools("1101", "0010"),
    )  # the fifth was appended
    want = torch.stack([states[0, [0, 1, 3]].double().abs().mean(0), states[1, 2].double().abs()])
    close(residual.peak_neurons(states, {}, mask), want)


MASK = bools("0110", "0001")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", ["zero", "mean", "set", "clamp"])
def test_channels_that_are_set(how, dtype, packed):
    states = states_of(dtype, *((1, 5, 6) if packed else (2, 4, 6)))
    layout, mask = (LAYOUT, bools("010", "001")) if packed else (None, MASK)
    among = (
        bools("100", "110") if packed else bools("1000", "0110")
    )  # the first mean is of one token
    rows = (states[0][LAYOUT.clamp(min=0)] if packed else states).double()
    value = {"zero": None, "mean": among, "set": 7.0, "clamp": 1.5}[how]
    got, effect = residual.edit_channels(states, {}, mask, [0, 4], how, value, layout)
    want = states.clone()
    for row in range(2):
        for at in mask[row].nonzero()[:, 0].tolist():
            part = rows[row, at, [0, 4]]
            new = {
                "zero": torch.zeros(2),
                "mean": rows[row, among[row]][:, [0, 4]].mean(0),
                "set": torch.full((2,), 7.0),
                "clamp": part.clamp(-1.5, 1.5),
            }[how].to(dtype)
            place = (0, LAYOUT[row, at]) if packed else (row, at)
            want[place][[0, 4]] = new
    assert torch.allclose(got, want, rtol=1e-6, atol=0)
    assert got.shape == states.shape
    changed = (got != states).any(-1)
    count = changed.sum(1).tolist() if not packed else [1, 1]
    assert effect["count"].tolist() == effect["rows"].tolist() == count
    assert effect["tokens"].tolist() == mask.sum(1).tolist()
    assert effect["empty"].tolist() == [0, 0]


def test_states_that_are_put_scaled_and_moved():
    states, donor = states_of(), states_of().flip(1)
    donor[0, 1] = states[0, 1]  # what is given what it has is not counted
    got, effect = residual.edit_states(states, {}, MASK, donor)
    assert torch.equal(got, torch.where(MASK[..., None], donor, states))
    assert effect["count"].tolist() == [1, 1]
    assert effect["tokens"].tolist() == [2, 1]
    half = states.to(torch.bfloat16)
    got, _ = residual.edit_states(half, {}, MASK, donor)
    assert got.dtype == torch.bfloat16
    got, effect = residual.scale_states(half, {}, MASK, 0.3)
    want = torch.where(MASK[..., None], half.float() * 0.3, half.float()).to(torch.bfloat16)
    assert torch.equal(got, want)
    order = torch.tensor([[1, 0, 2, 3], [0, 1, 2, 3]])
    got, effect = residual.permute_states(states, {}, order)
    assert torch.equal(got, torch.stack([states[0, [1, 0, 2, 3]], states[1]]))
    assert effect["tokens"].tolist() == effect["count"].tolist() == [2, 0]
    got, effect = residual.append_tokens(states, {}, MASK, 2)
    assert torch.equal(got, torch.cat([states, torch.zeros(2, 2, 6)], dim=1))
    assert effect["count"].tolist() == [2, 1]
    assert torch.equal(residual.append_tokens(got, {}, MASK, -2)[0], states)
    assert torch.equal(residual.append_tokens(states, {}, MASK, 0)[0], states)


@pytest.mark.parametrize("fill", ["zero", "mean", "keep"])
def test_neurons_shifted_to_registers(fill):
    """Two registers at the end get twice the largest activation of all; the tokens asked for are changed."""
    states, mask = states_of(torch.float32, 2, 5, 6), bools("111", "101")
    states[0, 1, 2] = -30.0
    got, effect = residual.shift_neurons(states, {}, mask, [2, 5], 2, 2.0, fill)
    want = states.clone()
    for row in range(2):
        for neuron in (2, 5):
            tokens = states[row, :3, neuron]
            want[row, 3:, neuron] = 2 * max(tokens.tolist(), key=abs)
            if fill != "keep":
                mine = mask[row]
                want[row, :3, neuron][mine] = 0.0 if fill == "zero" else tokens[mine].mean()
    close(got, want)
    assert got[0, 3:, 2].tolist() == [-60, -60]
    assert effect["count"].tolist() == [3, 2]
    shared, _ = residual.shift_neurons(states, {}, mask, [2, 5], 2, 2.0, fill, shared=True)
    largest = [2 * max(states[row][:, [2, 5]].flatten().tolist(), key=abs) for row in range(2)]
    assert torch.equal(shared[:, 3:, [2, 5]], torch.tensor(largest)[:, None, None].expand(-1, 2, 2))


def test_the_rank_of_a_token_by_its_hash():
    """A random rule in a saved gate must choose the same tokens for ever."""
    peaks = torch.tensor([[3, 141, 59, 26, 535, 8], [97, 93, 23, 84, 62, 6]])
    live = bools("111110", "011111")
    got = gating.hashed(peaks, live, 7)
    for row in range(2):
        whole = sum(p for p, on in zip(peaks[row].tolist(), live[row], strict=True) if on)
        keys = {}
        for at, peak in enumerate(peaks[row].tolist()):
            mixed = (peak * 40503 + at * 48271 + whole * 69621 + 7 * 7919) % 65521
            keys[at] = mixed * 52361 % 65519 if live[row, at] else -1
        order = sorted(keys, key=lambda at: -keys[at])
        assert got[row].tolist() == [order.index(at) for at in range(6)]
    assert got.tolist() == GOLDEN


GOLDEN = [[4, 0, 3, 1, 2, 5], [5, 2, 4, 0, 1, 3]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_that_meet_a_rule(dtype):
    states, live = states_of(dtype), bools("1110", "1111")
    h = states.double()
    tall, wide = h.norm(dim=-1), h.abs().amax(-1)
    size = h[..., [1, 3]].abs().amax(-1) / (h.square().mean(-1) + 1e-6).sqrt()
    medians = torch.stack([row[on].abs().flatten().sort().values[(6 * int(on.sum()) - 1) // 2]
                           for row, on in zip(h, live, strict=True)])  # fmt: skip
    for strict in (True, False):
        for tau in (2.0, 5.0, 8.0):
            norm = {"how": "norm", "tau": tau, "strict": strict}
            assert torch.equal(gating.flags(states, norm, live), (tall > tau) & live)
            massive = {"how": "massive", "absolute": tau, "ratio": 3.0, "strict": strict}
            want = (wide > tau) & (wide >= 3.0 * medians[:, None]) & live
            assert torch.equal(gating.flags(states, massive, live), want)
        dims = {"how": "dims", "dims": [1, 3], "tau": 1.5, "rms": True, "strict": strict}
        assert torch.equal(gating.flags(states, dims, live), (size > 1.5) & live)
        dims |= {"rms": False, "tau": 3.0}
        assert torch.equal(
            gating.flags(states, dims, live), (h[..., [1, 3]].abs().amax(-1) > 3) & live
        )
    assert torch.equal(gating.flags(states, {"how": "all"}, live), live)
    assert not gating.flags(states, {"how": "none"}, live).any()
    rank = gating.hashed(h.abs().argmax(-1), live, 4)
    for count in (0, 2, 9):
        random = gating.flags(states, {"how": "random", "count": count, "seed": 4}, live)
        assert torch.equal(random, (rank < count) & live)
        assert random.sum(1).tolist() == [min(count, 3), min(count, 4)]


def test_rules_at_their_limits():
    """One channel of 4 among ones: the norm of (4, 3, 0, 0) is 5; the median is 1, the ratio 4."""
    states = torch.tensor([[[4.0, 3, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]])
    for strict in (True, False):
        norm = {"how": "norm", "tau": 5.0, "strict": strict}
        assert gating.flags(states, norm, bools("111")).tolist() == [[not strict, False, False]]
        massive = {"how": "massive", "absolute": 4.0, "ratio": 4.0, "strict": strict}
        assert gating.flags(states, massive, bools("111")).tolist() == [[not strict, False, False]]
    massive = {"how": "massive", "absolute": 3.0, "ratio": 4.0, "strict": True}
    assert gating.flags(states, massive, bools("111")).tolist() == [[True, False, False]]
    massive |= {"ratio": 4.001}
    assert not gating.flags(states, massive, bools("111")).any()
    massive |= {"absolute": 1.0, "ratio": 5.0}
    # Alone, the first token has the median 0, and no ratio to it is too small.
    assert gating.flags(states, massive, bools("100")).tolist() == [[True, False, False]]
    # 10 / 3 is more than 3.33, which half precision would round it to or below.
    half = torch.tensor([[[10.0, 3, 3, 3]]], dtype=torch.bfloat16)
    massive |= {"ratio": 3.33}
    assert gating.flags(half, massive, bools("1")).tolist() == [[True]]
    assert gating.reaches(torch.tensor([1.0, 2.0]), 2.0).tolist() == [False, True]


def test_tokens_of_the_prompt_that_are_made_of_v_sinks():
    states, state = torch.zeros(2, 3, 4), {"memory": {}}
    states[0, 0, 0] = states[1, 2, 0] = states[1, 1, 0] = 9.0
    live, rule = bools("111", "101"), {"how": "norm", "tau": 5.0, "strict": True}
    image = torch.tensor([[-1, 0, 0, 1], [1, 1, -1, -1]])
    sources = torch.tensor([[[0, 0], [1, 0], [1, 2], [0, -1]], [[1, 2], [1, 1], [2, 2], [-1, -1]]])
    want = [[False, True, False, False], [True, False, False, False]]
    given, effect = gating.note_v_sinks(states, state, "a", rule, live, image, sources)
    assert given is states
    assert effect is None
    assert state["memory"][("gate", "a")]["V"].tolist() == want
    # A sink of any block that feeds the projector: what one block finds is added to what others found.
    states = torch.zeros(2, 3, 4)
    states[0, 1, 0] = 9.0
    gating.note_v_sinks(states, state, "a", rule, live, image, sources)
    want[0][2] = True
    assert state["memory"][("gate", "a")]["V"].tolist() == want
    gating.note_v_sinks(states, state, "b", rule, live, image, sources)
    assert state["memory"][("gate", "b")]["V"].tolist() == [[False, True, True, False], [False] * 4]
    packed = torch.zeros(5, 4)
    packed[4, 0] = 9.0
    gating.note_v_sinks(packed, state, "c", rule, live, image, sources, LAYOUT)
    assert state["memory"][("gate", "c")]["V"].tolist() == [
        [False] * 4,
        [True, False, False, False],
    ]


def test_l_sinks_of_the_prompt():
    states, state = torch.zeros(2, 3, 4), {"memory": {}}
    states[:, 1, 0] = 9.0
    rule = {"how": "norm", "tau": 5.0, "strict": True}
    given = gating.note_l_sinks(states, state, "a", rule, bools("111", "101"))
    assert given == (states, None)
    assert gating.memory_of(state, "a")["L"].tolist() == [[False, True, False], [False] * 3]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", [*gating.ACTIVATIONS])
@pytest.mark.parametrize("bare", [False, True])
def test_coefficients_by_hand(activation, dtype, bare):
    """Weights of half precision are read as they are; the LayerNorm may have none."""
    generator = torch.Generator().manual_seed(3)
    shapes = ((6,), (6,), (8, 6), (8,), (3, 8), (3,))
    weights = [torch.randn(*shape, generator=generator).to(dtype) for shape in shapes]
    if bare:
        weights[0] = weights[1] = None
    read = states_of(dtype)
    names = ("norm_weight", "norm_bias", "in_weight", "in_bias", "out_weight", "out_bias")
    gate = {**dict(zip(names, weights, strict=True)), "activation": activation, "scale": 3.0}

    def by_hand(x):
        x = x.double()
        h = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        h = h if bare else h * weights[0].double() + weights[1].double()
        h = h @ weights[2].double().T + weights[3].double()
        act = {
            "gelu": lambda z: z * 0.5 * (1 + torch.erf(z / math.sqrt(2))),
            "relu": lambda z: z.clamp(min=0),
            "silu": lambda z: z * z.sigmoid(),
            "tanh": torch.tanh,
        }[activation]
        return 3 * (act(h) @ weights[4].double().T + weights[5].double()).softmax(-1)

    def noted(signal, step=0):
        state, at = {"memory": {}} | ({"step": step} if step else {}), torch.tensor([2, 1])
        tokens = bools("0110", "1000")
        assert gating.note_coefficients(read, state, "g", signal, at, tokens, **gate) == (
            read,
            None,
        )
        return gating.memory_of(state, "g")["coefficients"]

    close(noted("last"), by_hand(read[[0, 1], [2, 1]]), 1e-4)
    close(noted("last", 1), by_hand(read[:, -1]), 1e-4)
    mean = torch.stack([read[0, 1:3].double().mean(0), read[1, 0].double()])
    close(noted("mean"), by_hand(mean), 1e-4)


def test_factors_of_groups():
    """V wins over L, also without a group of its own; text has one."""
    visual = bools("11110", "11100")
    kept = {"V": bools("11001", "00000"), "L": bools("01101", "10010")}
    kept["coefficients"] = torch.tensor([[0.2, 0.5, 0.8], [1.2, 1.5, 1.8]])

    def given(*groups, **more):
        found = {**kept, "coefficients": kept["coefficients"][:, : len(groups)], **more}
        return (gating.factors_of(found, visual, groups) * 10).round().int().tolist()

    assert given("V", "L", "rest") == [[2, 2, 5, 8, 10], [15, 18, 18, 10, 10]]
    assert given("rest", "L") == [[2, 2, 5, 2, 10], [15, 12, 12, 10, 10]]
    assert given("V", "rest") == [[2, 2, 5, 5, 10], [15, 15, 15, 10, 10]]
    without = {name: x for name, x in kept.items() if name != "V"} | {
        "coefficients": kept["coefficients"][:, :2]
    }
    got = (gating.factors_of(without, visual, ("rest", "L")) * 10).round().int().tolist()
    assert got == [[2, 5, 5, 2, 10], [15, 12, 12, 10, 10]]


@pytest.mark.parametrize("measure", [True, False])
def test_a_gate_scales_visual_keys(measure):
    call, visual = make(), bools("011110", "001110")
    kept = {"V": bools("010000", "000000"), "coefficients": torch.tensor([[0.5, 1.0], [2.0, 0.7]])}
    state = {"memory": {("gate", "s"): kept}, "stage": "keys"}
    live = torch.ones(2, 6).bool()
    made, effect = gating.gate_keys(
        call,
        state,
        None,
        "s",
        visual,
        live,
        ("V", "rest"),
        **({} if measure else {"measure": False}),
    )
    factor = torch.tensor([[1, 0.5, 1, 1, 1, 1], [1, 1, 0.7, 0.7, 0.7, 1]]).double()
    want = output(call, softmax(logits(call) * factor[:, None, None]))
    assert torch.allclose(run(made).double(), want, atol=2e-6)
    assert effect["tokens"].tolist() == [1, 3]  # a factor of one is no edit
    assert torch.equal(effect["coefficients"], kept["coefficients"])
    assert ("before" in effect) == measure
