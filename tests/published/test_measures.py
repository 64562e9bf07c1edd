"""The field's measures on tiny models, against formulas of `scripts.compare_measures` in plain torch."""

import pytest
import torch

import sinkscope as ss
from scripts import compare_measures as plain
from sinkscope import published
from sinkscope.experiments import nop_or_broadcast
from sinkscope.results import load
from sinkscope.testing import random_image, tiny_llava

TEXT = "a small red circle lies to the left of the large blue square "
LAYER, HEAD = 1, 2


def event_head(model, at=LAYER, head=HEAD):
    """Give every query of a head in the vision tower the same large vector, so that all see one key."""
    attention = plain.tower_of(model, "vision")[2][at]
    width = attention.q_proj.out_features // 4
    rows = slice(head * width, (head + 1) * width)
    with torch.no_grad():
        attention.q_proj.weight[rows] = 0
        attention.q_proj.bias[rows] = 14 * torch.linspace(-1, 1, width)


@pytest.fixture(scope="module")
def lvlm():
    """DINOv2 with LayerScale, one of its heads with sink events, before a LLaMA with grouped queries."""
    model, processor = tiny_llava("dinov2", "llama")
    event_head(model)
    return ss.LVLM(model, processor)


@pytest.fixture(scope="module")
def sample(lvlm):
    return lvlm.prepare(images=random_image(64, 64, 3), text="what is it")


def close(one, other, rough=1e-5):
    return bool((one - other).abs().max() <= rough * other.abs().max().clamp(min=1e-6))


@pytest.mark.parametrize("length", [64, 10])
def test_the_sink_rate_is_that_of_a_prompt_that_ends_there(lvlm, length):
    short, long = (
        lvlm.prepare(images=random_image(), text=f"{TEXT * n}<image>", rendered=True)
        for n in (6, 9)
    )
    ids = short.inputs["input_ids"]
    want = plain.alpha(
        plain.eager(lvlm.module, {"input_ids": ids[:, :length]}, "language")[0], length
    )
    eps = float(want[..., 0].median()) + 1e-4
    got = published.sink_rate(lvlm, short, eps=eps, length=length)
    assert close(got.alpha[0], want)
    assert torch.equal(got.rate(), (want > eps).float().mean((0, 1)))
    assert 0 < got.first < 1
    assert got.first == got.to_dataframe().rate[0]
    # Under uniform attention key k gets the mean of 1/k ... 1/T.
    uniform = torch.tensor([(1 / torch.arange(k + 1.0, length + 1)).mean() for k in range(length)])
    assert close(got.null[0, 0], uniform)
    both = lvlm.prepare(
        images=[random_image()] * 2, text=[f"{TEXT * n}<image>" for n in (6, 9)], rendered=True
    )
    assert not both.tokens.live[0, 0]  # padded on the left
    rows = published.sink_rate(lvlm, both, length=length).alpha
    assert close(rows[1:], published.sink_rate(lvlm, long, length=length).alpha)
    assert close(rows[:1], got.alpha)


def test_a_short_prompt_has_no_sink_rate(lvlm, sample):
    with pytest.raises(
        ss.SinkscopeError, match=r"Got a prompt of \d+ tokens; expected at least 64"
    ):
        published.sink_rate(lvlm, sample)


@pytest.mark.parametrize("tower", ["language", "vision"])
@pytest.mark.parametrize("limits", [(100.0, 1000.0), (3.0, 4.0), (0.5, 1.5)])
def test_massive_activations_are_single_numbers(lvlm, sample, tower, limits):
    states = plain.eager(lvlm.module, sample.inputs, tower)[1]
    want = plain.massive(states, *limits)
    found = published.massive_activations(
        lvlm, sample, tower=tower, absolute=limits[0], ratio=limits[1]
    )
    table = found.to_dataframe()
    got = {(x.layer, x.pos, x.channel): x.value for x in table.itertuples()}
    assert got == pytest.approx(want, rel=1e-4)
    assert bool(want) == (limits != (100.0, 1000.0))
    medians = [float(states[x.layer].abs().median()) for x in table.itertuples()]
    assert table.ratio.tolist() == pytest.approx(
        [abs(x) / m for x, m in zip(table.value, medians, strict=True)], rel=1e-4
    )


@pytest.mark.parametrize("layer", [None, 1])
def test_outlier_tokens_are_patches_with_a_large_norm(lvlm, sample, layer):
    states = plain.eager(lvlm.module, sample.inputs, "vision")[1]
    norms = states[-1 if layer is None else layer].norm(dim=-1)
    tau = float(norms.sort().values[-4])
    got = published.outlier_tokens(lvlm, sample, tau=tau, layer=layer)
    assert close(got.norms[0], norms)
    want = (got.norms[0] > tau) & (torch.arange(len(norms)) > 0)  # position 0 is CLS
    assert torch.equal(got.outliers[0], want)
    assert got.fraction == pytest.approx(float(want.sum()) / (len(norms) - 1))
    assert not published.outlier_tokens(lvlm, sample).outliers.any()  # 150 is DINOv2-L's
    with pytest.raises(ss.SinkscopeError, match="expected an int from 0 to 2"):
        published.outlier_tokens(lvlm, sample, layer=3)


DIMS = [3, 17]


@pytest.mark.parametrize(("version", "rho"), [("paper", 0.3), ("code", 0.9)])
def test_var_is_the_edit_of_its_paper_or_its_code(lvlm, sample, version, rho):
    image, tau = sample.tokens.image[0] >= 0, 1.4
    got = published.var(lvlm, sample, DIMS, version=version, tau=tau, rho=rho)
    phi = plain.phi(plain.eager(lvlm.module, sample.inputs, "language")[2], DIMS)
    assert close(got.phi[0], phi)
    sinks = phi > tau
    sinks[:2] = False
    assert torch.equal(got.sinks[0], sinks)
    assert (sinks & image).any()
    layers = (0, 1, 2)  # of three layers, so that earlier edits move later sinks
    want = plain.var_logits(
        lvlm.module, sample.inputs, image, DIMS, tau, 0.6, rho, version, least=0
    )
    ours = lvlm.run(sample, (), [got.edit(layers)]).logits
    assert close(ours, want)
    before = lvlm.run(sample).logits
    assert (want - before).abs().max() > 1e-3


def test_var_has_no_channels_of_an_unknown_model(lvlm, sample):
    with pytest.raises(ss.SinkscopeError, match="without published sink channels"):
        published.var(lvlm, sample)
    with pytest.raises(ss.SinkscopeError, match=r"tau=20.0 .* expected less than sqrt\(64\)"):
        published.var(lvlm, sample, DIMS)
    paper, code = (
        published.var(lvlm, sample, DIMS, tau=1.4, version=version) for version in ("paper", "code")
    )
    assert (paper.rho, code.rho, paper.p, code.p) == (0.8, 0.5, 0.6, 0.6)


@pytest.mark.parametrize("tower", ["vision", "language"])
def test_nop_and_broadcast_are_of_heads_with_events(lvlm, sample, tower):
    want = plain.heads_of(lvlm.module, sample.inputs, tower)
    got = published.nop_broadcast(lvlm, sample, tower=tower)
    table = {(x.layer, x.head): x for x in got.to_dataframe().itertuples()}
    assert table.keys() == want.keys()
    for at, head in want.items():
        for name, value in head.items():
            assert getattr(table[at], name) == pytest.approx(value, rel=1e-3), (at, name)
        assert table[at].label == plain.label(head)
    events = [at for at in want if table[at].event]
    assert events == ([(LAYER, HEAD)] if tower == "vision" else [])
    bare = plain.heads_of(lvlm.module, sample.inputs, tower, scaled=False)
    moved = max(abs(bare[at]["ratio_out"] / want[at]["ratio_out"] - 1) for at in want)
    assert (moved > 0.05) == (tower == "vision")  # LayerScale is part of u


@pytest.mark.parametrize(
    ("ratio", "rank", "word"), [(0.2, 9.0, "NOP"), (0.5, 1.5, "broadcast"), (0.5, 1.6, "mixed")]
)
def test_without_an_event_there_is_no_word(ratio, rank, word):
    assert nop_or_broadcast(ratio, rank, True) == word
    assert nop_or_broadcast(ratio, rank, False) == "no event"


def test_value_edits_are_those_of_the_paper(lvlm):
    images = [random_image(64, 64, seed) for seed in (0, 2, 3, 5)]
    sample, *held = (
        lvlm.prepare(images=some, text=["what is it"] * len(some))
        for some in (images[:2], images[2:3], images[3:])
    )
    got = published.value_effects(lvlm, sample, held, layer=LAYER, head=HEAD)
    edits = published.value_edits(lvlm, sample, held, layer=LAYER, head=HEAD)
    assert tuple(edits) == got.edits
    width = lvlm.anatomy.vision.d_head
    donors = []  # of every held-out image the sink's value, and one that another seed would change
    for one in held:
        weights, _, _, values = plain.eager(lvlm.module, one.inputs, "vision")
        donors.append(values[LAYER, HEAD, int(weights[LAYER, HEAD].mean(0).argmax())])
    assert torch.allclose(edits["donor sink"].replacement[:, 0, 0], torch.stack(donors), rtol=1e-4)
    assert edits["donor other"].replacement.shape == (2, 1, 1, width)
    for row in range(2):
        pixels = {"pixel_values": sample.inputs["pixel_values"][row : row + 1]}
        weights, states, _, _ = plain.eager(lvlm.module, pixels, "vision")
        sink = int(weights[LAYER, HEAD].mean(0).argmax())
        control = edits["control"].tokens[row].nonzero().flatten().tolist()
        assert edits["zero"].tokens[row].nonzero().flatten().tolist() == [sink]
        assert len(control) == 1
        assert control[0] not in (0, sink)
        given = {"mean": torch.stack(donors).mean(0), "donor sink": donors[row]}
        given["donor other"] = edits["donor other"].replacement[row, 0, 0]
        kept = (torch.arange(weights.shape[-1]) > 0) & (torch.arange(weights.shape[-1]) != sink)
        for i, name in enumerate(got.edits):
            with torch.no_grad():
                moved = plain.value_states(
                    lvlm.module, pixels, LAYER, HEAD, name, sink, control[0], given
                )
            change = (moved - states[-1])[kept]
            size = change.pow(2).sum() / states[-1][kept].pow(2).sum()
            assert float(got.change[row, i]) == pytest.approx(
                float(size.sqrt()), rel=1e-2, abs=2e-6
            ), name
            if size.sqrt() < 1e-4:  # rounding is shared by nobody
                continue
            shared = change.mean(0).pow(2).sum() * kept.sum() / change.pow(2).sum()
            assert float(got.shared[row, i]) == pytest.approx(float(shared), rel=1e-2), name


def test_a_head_without_events_has_nothing_to_edit(lvlm, sample):
    with pytest.raises(ss.SinkscopeError, match="no sink event of head 0 of vision layer 0"):
        published.value_edits(lvlm, sample, [sample], layer=0, head=0)
    with pytest.raises(ss.SinkscopeError, match="in any row of held_out"):
        published.value_edits(lvlm, sample, [], layer=LAYER, head=HEAD)


@pytest.mark.parametrize("version", ["paper", "code"])
def test_registers_are_those_of_the_paper_or_the_code(lvlm, sample, version):
    norms = plain.eager(lvlm.module, sample.inputs, "vision")[1][-1].norm(dim=-1)
    tau = float(norms.sort().values[-4:-2].mean())
    given = {"norm": tau, "max_layer": 1, "top_k": 6, "version": version}
    found = published.test_time_registers(lvlm, [sample], **given)
    outliers = (norms > tau) & (torch.arange(len(norms)) > 0)
    scores = plain.neuron_scores(lvlm.module, sample.inputs, outliers, 1)
    top = {divmod(at, scores.shape[1]) for at in scores.flatten().topk(6).indices.tolist()}
    assert {tuple(x) for x in found.to_dataframe().to_numpy().tolist()} == top
    assert found.outliers == int(outliers.sum())
    last = lvlm.anatomy.feed_layers[-1]
    want = plain.register_logits(lvlm.module, sample.inputs, found.neurons, last, version)
    assert close(lvlm.run(sample, (), [found.edit()]).logits, want)


def test_the_two_registers_differ(lvlm, sample):
    neurons, last = {0: (1, 5), 1: (3,)}, lvlm.anatomy.feed_layers[-1]
    paper, code = (
        plain.register_logits(lvlm.module, sample.inputs, neurons, last, version)
        for version in ("paper", "code")
    )
    assert (paper - code).abs().max() > 1e-3


def test_results_are_saved_and_name_their_source(lvlm, sample, tmp_path):
    made = [
        published.sink_rate(lvlm, sample, length=5),
        published.massive_activations(lvlm, sample, absolute=3, ratio=4),
        published.outlier_tokens(lvlm, sample, tau=3),
        published.nop_broadcast(lvlm, sample),
        published.value_effects(lvlm, sample, [sample], layer=LAYER, head=HEAD),
        published.test_time_registers(lvlm, [sample], norm=3, max_layer=1, top_k=3),
    ]
    for i, one in enumerate(made):
        again = load(one.save(tmp_path / f"{i}.safetensors"))
        assert again.to_dataframe().equals(one.to_dataframe())
        assert "arXiv:2" in one.source
    assert "arXiv:2503.03321" in published.var(lvlm, sample, DIMS, tau=1.4).source


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda m, s: published.sink_rate(m, s, eps=0), "Got eps=0; expected"),
        (lambda m, s: published.sink_rate(m, s, length=1.5), "Got length"),
        (lambda m, s: published.massive_activations(m.module, s), "expected LVLM"),
        (
            lambda m, s: published.massive_activations(m, s, tower="text"),
            "Got tower=.text.; expected one of",
        ),
        (lambda m, s: published.massive_activations(m, s, ratio=float("nan")), "Got ratio=nan"),
        (lambda m, s: published.outlier_tokens(m, s, tau="valley"), "Got tau"),
        (lambda m, s: published.var(m, s, DIMS, tau=1.4, version="both"), "Got version"),
        (lambda m, s: published.var(m, s, [64], tau=1.4), "Got dimension 64"),
        (lambda m, s: published.nop_broadcast(m, s, layers=[7]), "7"),
        (
            lambda m, s: published.value_edits(m, s, [s], layer=1, head=4),
            "expected an int from 0 to 3",
        ),
        (
            lambda m, s: published.value_edits(m, s, s, layer=1, head=2),
            "Got held_out of type Sample",
        ),
        (
            lambda m, s: published.test_time_registers(m, [s], norm=3, max_layer=3, top_k=1),
            "Got max_layer=3",
        ),
        (
            lambda m, s: published.test_time_registers(m, [s], norm=900, max_layer=1, top_k=1),
            "Got no outlier token",
        ),
    ],
)
def test_wrong_arguments_are_refused_in_words(lvlm, sample, call, said):
    with pytest.raises(ss.SinkscopeError, match=said):
        call(lvlm, sample)
