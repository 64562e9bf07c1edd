"""A model on several devices, offloaded or quantised gives the bits of the same model on one device.

The devices are pretended (`tests.several_devices`); accelerate's own hooks move what they move on GPUs. Quantised
weights are those of bitsandbytes and torchao, where these are installed.
"""

import importlib.util
import inspect

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn

import sinkscope as ss
from sinkscope import interventions as edits
from sinkscope.anatomy.weights import fetched
from sinkscope.errors import ModelError
from sinkscope.experiments.gating import lora
from sinkscope.kernels.walk import locate
from sinkscope.models.kept import digest_of_structure
from sinkscope.models.loading import weights_digest
from sinkscope.testing import TINY, check_model, random_image, tiny_llava
from tests.gpu.common import GROUPS, tensors
from tests.probes.everything import every_probe
from tests.quantised import Rounds8, by_torchao, in_4_bit, in_8_bit, packs, replaced
from tests.several_devices import A, B, known, spread

V_RULE, L_RULE = ss.detectors.Norm(27.6), ss.detectors.Norm(36.6)
ONE = ([A], [A], A, A, A)
LAYOUTS = {  # blocks of the decoder and of the tower, embeddings and norms, head, projector
    "split": ([A, B, A], [A, B], A, B, B),
    "offloaded to CPU and disk, and split": ([A, "cpu", B], ["disk", "cpu"], A, "disk", "cpu"),
}


@pytest.fixture(autouse=True)
def _known():
    with known():
        yield


def test_the_pretended_devices_refuse_what_gpus_refuse():
    here, a, b = torch.ones(3), torch.ones(3, device=A), torch.ones(3, device=B)
    for one, other in ((a, b), (a, here)):
        with pytest.raises(RuntimeError, match="to be on one device"):
            one + other
    assert (a + b.sum().cpu()).device == A  # a number of the host
    w = torch.ones(3, device=A, requires_grad=True)
    ((w * 2).to(B) * b * 3).sum().backward()
    assert w.grad.device == A
    assert w.grad.tolist() == [6, 6, 6]


def records(n=4, **more):
    asked = ("what", "where is it")
    return [
        {"image": random_image(32, 32, i // 2), "image_id": i // 2, "question": asked[i % 2]}
        | {"answer": "red", **more}
        for i in range(n)
    ]


def gate_of(lvlm, layer, **choices):
    made = ss.LSG.for_model(lvlm, layer, v_detector=V_RULE, **choices)
    with torch.no_grad():
        for weight in made.parameters():
            noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
            weight.add_(0.1 * noise.to(weight.device))
    return made


def probes(lvlm, sample, engine="hooks"):
    asked = every_probe()
    run = lvlm.run(sample, asked, engine=engine)
    yield from [run.logits, *[run[probe] for probe in asked]]


def by_nnsight(lvlm, sample):
    yield from probes(lvlm, sample, "nnsight")


def generation(lvlm, sample):
    asked = [probe for probe in every_probe() if probe.tower == "language"]
    out = lvlm.generate(sample, asked, max_new_tokens=3, min_new_tokens=3)
    yield out.sequences
    for step in out.steps:
        yield from [step.logits, *[step[probe] for probe in asked]]


def every_edit(lvlm, sample):
    other = {**sample.inputs, "pixel_values": sample.inputs["pixel_values"].flip(-1)}
    kept = [ss.probes.AttentionValues, ss.probes.ResidualStates]
    kept = [probe(tower=tower) for probe in kept for tower in ("language", "vision")]
    donor, vision = lvlm.run(lvlm.prepare(inputs=other), kept), {"tower": "vision"}
    image = sample.tokens.image >= 0
    late = image & (image.cumsum(1) > 2)
    return [
        ss.MaskKeys("image"),
        ss.MaskKeys("cls", **vision),
        ss.ScaleKeys(edits.LiveRule(L_RULE), 0.2),
        ss.ScaleAttention("image", 0.3),
        ss.ScaleAttention("image", 0.3, renormalize=False),
        ss.AttentionKnockout("last", "image"),
        edits.AttentionTemperature(0.7),
        ss.Redistribute("first", "image", 0.5),
        ss.Redistribute("image", "first", 0.5, select=edits.ImageCentric("image", 0.0, 1.0)),
        ss.AblateValues("image", "mean"),
        ss.AblateValues("first", "resample"),
        ss.AblateValues("image", donor),
        ss.PatchActivations(donor, "values", "image"),
        ss.PatchActivations(donor, "resid_post", "image"),
        ss.PatchActivations(donor, "resid_post", "patch", **vision),
        ss.AblateActivations([3, 5], "image", site="mlp_out"),
        ss.AblateActivations([3], "patch", site="resid_post", replacement="mean", **vision),
        edits.ScaleTokens("image", 0.5),
        edits.SinkToFront(late),
        edits.EvictKeys(1, 4),
        ss.TestTimeRegister({0: [3]}),
    ]


def edited(lvlm, sample):
    for edit in every_edit(lvlm, sample):
        run = lvlm.run(sample, interventions=[edit])
        yield from [run.logits, run.effects[edit]]


def gates(lvlm, sample):
    low = {"groups": ("V", "L", "rest"), "l_detector": L_RULE}
    made = [gate_of(lvlm, "embed"), gate_of(lvlm, 0, **low), gate_of(lvlm, 1, decode="refresh")]
    run = lvlm.run(sample, interventions=made, grad=True)
    run.logits.float().logsumexp(-1).sum().backward()
    yield from [
        run.logits.detach(),
        *[weight.grad for gate in made for weight in gate.parameters()],
    ]
    inputs = {k: x.to(lvlm.device) if torch.is_tensor(x) else x for k, x in sample.inputs.items()}
    how = {"max_new_tokens": 3, "min_new_tokens": 3}
    for gate in made:
        run = lvlm.run(sample, interventions=[gate])
        yield from [run.logits, run.effects[gate]]
        yield lvlm.generate(sample, interventions=[gate], **how).sequences
        with torch.no_grad(), gate.attach(lvlm):
            yield from [lvlm.module(**inputs).logits, lvlm.module.generate(**inputs, **how)]
    yield ss.gate_coefficients(lvlm, made, records(), progress=False).table


def traces(lvlm, sample):
    yield ss.trace_sinks(lvlm, sample, V_RULE, L_RULE).to_dataframe()
    yield ss.trace_generation(lvlm, sample, L_RULE, max_new_tokens=3).to_dataframe()
    yield ss.calibrate(lvlm, [lvlm.prepare(random_image(32, 32, i), "what") for i in range(4)])
    tokens = [sample.tokens.vision.select("cls")]
    yield torch.tensor(edits.find_register_neurons(lvlm, [sample], tokens)[0])


def sweeps(lvlm, sample):
    for score, layers, pair in (
        ("logprob", [0, 1], (0.5, 1.0)),
        ("exact", ["embed"], (0.5, 1, 0.4)),
    ):
        low = {"l_detector": L_RULE} if len(pair) == 3 else {}
        how = {"score": score, "v_detector": V_RULE, "progress": False, **low}
        yield ss.sweep(lvlm, records(), layers, [pair], **how).table
    low = {"v_detector": V_RULE, "progress": False}
    yield ss.sweep(lvlm, records(choices=["red", "blue"]), [0], [(0.5, 1.0)], **low).table


def training(lvlm, sample):
    how = {"batch": 4, "validation": 0.25, "epochs": 1, "progress": False, "v_detector": V_RULE}
    made = ss.train_lsg(lvlm, records(8), ["embed", 0, 1], **how)
    yield from [weight for gate in made.gates.values() for weight in gate.parameters()]
    yield made.history.drop(columns="layer")


def comparing(lvlm, sample):
    def masked(trace):
        return [ss.ScaleKeys("image", 0.1)] if trace.v_sinks.any() else []

    conditions = {"base": [], "gate": [gate_of(lvlm, 1)], "trace": masked}
    rules = {"v_detector": V_RULE, "l_detector": L_RULE, "progress": False}
    yield ss.compare(lvlm, records(), conditions, **rules).table
    images = [{"image": random_image(32, 32, i), "attributes": {"x": i % 2}} for i in range(24)]
    yield ss.linear_probes(lvlm, images, permutations=2, groups={"image": "image"}, **rules).table
    trace = ss.trace_sinks(lvlm, sample, V_RULE, L_RULE)
    yield ss.RandomControl(ss.ScaleKeys("first", 0.5), "count", 2).run(lvlm, trace)


def open_trace(lvlm, sample):
    with lvlm.trace(sample):
        seen = lvlm.site("vision", 1, "resid_post").save()
        x = lvlm.site("language", 2, "resid_pre").save()
        lvlm.set_site("language", 2, "resid_pre", x.cpu() * 0.5)
        y = lvlm.site("language", 2, "attn_out").save()
    yield from [seen, x, y]


USES = (probes, by_nnsight, generation, edited, gates, traces, sweeps, training, comparing)
USES += (open_trace,)


def numbers(found):
    """All numbers of some results, on the host."""
    for one in found:
        if hasattr(one, "select_dtypes"):
            yield torch.tensor(one.select_dtypes("number").to_numpy(dtype=float))
        else:
            yield from (x.detach().cpu().double() for x in tensors(one))


def same(found, want):
    found, want = list(numbers(found)), list(numbers(want))
    assert len(found) == len(want) > 0
    for one, other in zip(found, want, strict=True):
        assert torch.equal(one.nan_to_num(nan=-7.5), other.nan_to_num(nan=-7.5))


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    """``held(layout, family)``: an LVLM on the places of a layout, and a sample; ``"one"`` device by default."""
    made = {}

    def get(layout="one", family=None):
        if (layout, family) not in made:
            module, processor = TINY[family]() if family else tiny_llava("dinov2", vision_layers=2)
            folder = tmp_path_factory.mktemp("weights")
            where = LAYOUTS.get(layout, ONE)
            lvlm = ss.LVLM(spread(module, *where, folder=folder), processor)
            pictures = [random_image(), random_image(48, 40, 3)]
            asked = ["what is it", "how many red shapes are there"]
            made[layout, family] = lvlm, lvlm.prepare(pictures, asked)
        return made[layout, family]

    return get


@pytest.fixture(scope="module")
def wanted(held):
    """``wanted(use, family)``: the answers of a use of a model on one device."""
    made = {}

    def get(use, family=None):
        if (use, family) not in made:
            made[use, family] = list(use(*held(family=family)))
        return made[use, family]

    return get


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
def test_where_the_weights_are_changes_no_bit(held, wanted, use, layout):
    lvlm, sample = held(layout)
    places = {x.device for x in lvlm.module.parameters()}
    assert {A, B} <= places
    assert (torch.device("meta") in places) == (layout != "split")
    same(use(lvlm, sample), wanted(use))


@pytest.mark.parametrize("use", [probes, gates], ids=lambda use: use.__name__)
def test_so_for_a_packed_tower(held, wanted, use):
    same(use(*held("split", "qwen2.5-vl")), wanted(use, "qwen2.5-vl"))


def test_every_intervention_is_among_them(held):
    """The matrix has every edit that is public."""
    kinds = {type(edit) for edit in every_edit(*held())}
    given = [getattr(edits, name) for name in edits.__all__]
    assert {it for it in given if inspect.isclass(it) and getattr(it, "needs", "")} <= kinds


def test_one_device_gives_what_the_host_gives(held):
    lvlm, sample = held()
    plain = ss.LVLM(*tiny_llava("dinov2", vision_layers=2))
    for probe in (ss.AttentionMass(GROUPS), ss.TokenNorms(), ss.ContributionNorms(GROUPS)):
        pairs = zip(
            tensors(lvlm.run(sample, [probe])), tensors(plain.run(sample, [probe])), strict=True
        )
        for one, other in pairs:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, equal_nan=True)


class Scaled(nn.Module):
    """A factor, as LayerScale keeps one."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor([2.0, 3.0]))

    def forward(self, x):
        return x * self.factor


def test_weights_are_found_behind_a_hook_of_the_users_own():
    """accelerate chains hooks: a user's own, or its two of a part that is offloaded by its name."""
    root = nn.Sequential(Scaled())
    digest = weights_digest(root)
    cpu_offload(root, torch.device("cpu"))
    add_hook_to_module(root[0], ModelHook(), append=True)
    assert root[0].factor.device.type == "meta"
    assert locate(root, "0.factor").tolist() == [2, 3]
    assert weights_digest(root) == digest
    with fetched(root[0]):
        assert root[0].factor.tolist() == [2, 3]
    assert root[0].factor.device.type == "meta"


QUANTISED = {
    "a stand-in that rounds": ("torch", lambda module: replaced(module, Rounds8)),
    "bitsandbytes, 8 bit": ("bitsandbytes", lambda module: replaced(module, in_8_bit)),
    "bitsandbytes, 4 bit": ("bitsandbytes", lambda module: replaced(module, in_4_bit)),
    "torchao, int8": ("torchao", by_torchao),
}
quantised = pytest.mark.parametrize("kind", QUANTISED)


@pytest.fixture(scope="module")
def packed():
    """``packed(kind)``: an LVLM of quantised weights, a sample, and a digest from before the first pass."""
    made = {}

    def get(kind):
        package, make = QUANTISED[kind]
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}, which is not installed")
        if kind not in made:
            module, processor = tiny_llava("dinov2", vision_layers=2)
            module = make(module)
            digest, lvlm = weights_digest(module), ss.LVLM(module, processor)
            made[kind] = lvlm, lvlm.prepare(random_image(), "what is it"), digest
        return made[kind]

    return get


@quantised
def test_quantised_weights_give_what_their_plain_pass_gives(packed, kind):
    """Masses, states, contributions, edits, decode steps and traces, against plain passes of the same weights."""
    lvlm, sample, _ = packed(kind)
    checked = check_model(lvlm, sample)
    assert {check.status for check in checked.checks} <= {"exact", "approximate"}
    said = {v.name: v.status for v in lvlm.report().probes if v.tower == "language"}
    assert said["ContributionNorms"] == said["HeadWrites"] == "approximate"
    assert said["AttentionMass"] == said["TokenNorms"] == "exact"
    ready = ss.ContributionNorms({"all": "all"}), ss.AttentionMass({"all": "all"})
    run = lvlm.run(sample, ready)
    torch.testing.assert_close(run[ready[1]].mass, torch.ones_like(run[ready[1]].mass))
    for use in (traces, sweeps, comparing):
        assert list(numbers(use(lvlm, sample)))


@quantised
def test_the_digest_of_quantised_weights_stays_through_passes(packed, kind):
    lvlm, sample, before = packed(kind)
    lvlm.run(sample)
    module, _ = tiny_llava("dinov2", vision_layers=2)
    assert weights_digest(lvlm.module) == before != weights_digest(module)
    assert digest_of_structure(lvlm.module) != digest_of_structure(module)
    other, _ = tiny_llava("dinov2", vision_layers=2, seed=1)
    assert weights_digest(QUANTISED[kind][1](other)) != before


@quantised
def test_gradients_pass_or_are_refused(packed, kind):
    """Some kernels have none, and gates that were trained through them stayed as they were."""
    lvlm, sample, _ = packed(kind)
    with pytest.raises(ModelError, match=r"in 8 bit|without quantisation"):
        lora(lvlm, records(), 1, rank=2, epochs=1)
    how = {"batch": 4, "validation": 0.0, "epochs": 1, "progress": False, "v_detector": V_RULE}
    gate = gate_of(lvlm, 1)
    if "4 bit" in kind and packs():
        with pytest.raises(ModelError, match=r"4-bit weights at .* passes no gradient; expected"):
            ss.train_lsg(lvlm, records(), [1], **how)
        with pytest.raises(ModelError, match=r"4-bit weights at .* passes no gradient; expected"):
            lvlm.run(sample, interventions=[gate], grad=True)
        return
    lvlm.run(sample, interventions=[gate], grad=True).logits.logsumexp(-1).sum().backward()
    assert all(weight.grad.isfinite().all() for weight in gate.parameters())
    assert any((weight.grad != 0).any() for weight in gate.parameters())
    before = ss.LSG.for_model(lvlm, 1, v_detector=V_RULE).state_dict()
    after = ss.train_lsg(lvlm, records(), [1], **how).gate.state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)


class Cut(torch.autograd.Function):
    """A kernel without a gradient."""

    @staticmethod
    def forward(ctx, x, weight):
        return x @ weight.T

    @staticmethod
    def backward(ctx, grad):
        return None, None


class Packed(nn.Linear):
    """As bitsandbytes keeps 4-bit weights for such a CPU: its kernel passes no gradient."""

    def __init__(self, linear, named, apply):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias, self.apply_to = linear.weight, linear.bias, apply
        if named:
            self.support_avx512bf16_for_cpu = self.weight.quant_state = True

    def forward(self, x):
        return self.apply_to(x, self.weight)


@pytest.mark.parametrize(
    ("named", "kernel", "said"),
    [
        (True, Cut.apply, r"4-bit weights at .* passes no gradient"),
        (False, Cut.apply, "No gradient of the loss reaches 1:"),
        (False, torch.no_grad()(nn.functional.linear), "No gradient of the loss reaches 1:"),
    ],
)
def test_a_gate_that_no_gradient_reaches_is_not_trained(named, kernel, said):
    module, processor = tiny_llava("dinov2", vision_layers=2)
    replaced(module, lambda part: Packed(part, named, kernel))
    how = {"batch": 4, "validation": 0.0, "epochs": 1, "progress": False, "v_detector": V_RULE}
    with pytest.raises(ModelError, match=said):
        ss.train_lsg(ss.LVLM(module, processor), records(), [1], **how)
