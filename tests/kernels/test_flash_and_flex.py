"""Every probe and edit under flash and flex kernels is that of SDPA, or is refused at once.

In fp32, which the stand-ins can be made to take, so that what is equal is equal to 1e-4; that the real
kernels know half precision only is seen in half precision.
"""

import pytest
import torch

import sinkscope as ss
from sinkscope.errors import SinkscopeError
from sinkscope.testing import TINY, random_image, tiny_llava
from tests.flash_kernels import install
from tests.models.test_report import one_of_every_edit
from tests.probes.everything import every_probe

WINDOWED = {  # every other block of these sees the last 12 positions only
    "gemma2": lambda **how: tiny_llava("clip", "gemma2", attn_implementation="eager", **how),
    "gpt_oss": lambda **how: tiny_llava("siglip", "gpt_oss", attn_implementation="eager", **how),
}
BUILDERS = {**TINY, **WINDOWED}
UNDER = [  # of flash only version 3 knows learned sinks; under both, Gemma 3 reads images from left to right
    *(("flash_attention_2", name) for name in ("llava-clip-llama", "qwen2.5-vl")),
    *(("flash_attention_3", name) for name in ("gemma2", "gpt_oss")),
    ("flex_attention", "gemma3"),
]


@pytest.fixture
def kernels(monkeypatch):
    """Flash kernels under their names, and flex attention as it is written: no compiler is needed."""
    install(monkeypatch, takes=(torch.float32,))
    with torch.compiler.set_stance("force_eager"):
        yield


def prepared(lvlm):
    """Two rows of unequal length, one with two images of unequal shape."""
    images = [random_image(96, 120, 0), [random_image(70, 64, 1), random_image(120, 60, 2)]]
    return lvlm.prepare(images=images, text=["what is it", "how many red shapes are there ?"])


def same(got, want, what, tolerance=2e-4):
    """Equal to a share of the largest value, NaN at the same places."""
    assert torch.equal(got.isnan(), want.isnan()), what
    largest = want.abs().nan_to_num().max().clamp(min=1e-3)
    assert float((got - want).abs().nan_to_num().max() / largest) < tolerance, what


def answers(lvlm, sample, kernel):
    """What every probe gives, and the logits under every edit; None where it is refused."""
    lvlm.module.set_attn_implementation(kernel)
    partly = torch.zeros_like(sample.tokens.vision.live)
    partly[:, 2:7] = True
    probes = [*every_probe(), ss.AttentionMass({"some": partly}, tower="vision")]
    report, out = lvlm.report(), {"logits": [lvlm.run(sample).logits[sample.tokens.live]]}
    for number, probe in enumerate(probes):
        name = f"{type(probe).__name__} {probe.tower} {number}"
        fp32 = getattr(probe, "precision", "") == "float32" and "flash" in kernel
        told = fp32 or report.verdict(type(probe).__name__, probe.tower).status == "unavailable"
        out[name] = found(lambda one=probe: values_of(lvlm.run(sample, [one])[one]), told, name)
    for tower in ("vision", "language"):
        for edit in one_of_every_edit(lvlm, sample, tower):
            name = f"{type(edit).__name__} {tower}"
            told = report.verdict(type(edit).__name__, tower).status == "unavailable"
            run = lambda one=edit: [lvlm.run(sample, (), [one]).logits[sample.tokens.live]]  # noqa: E731
            out[name] = found(run, told, name)
    return out


def found(make, refused, name):
    """What is asked, or None where it is refused as the report says."""
    if refused:
        with pytest.raises(SinkscopeError, match="expected"):
            make()
        return None
    return make()


def values_of(result):
    """Its floating-point tensors, without largest channels, whose order is a matter of the last bit."""
    tensors = {
        n: x for n, x in vars(result).items() if torch.is_tensor(x) and x.is_floating_point()
    }
    return [x.abs() if n == "values" else x for n, x in tensors.items()]


@pytest.mark.parametrize(("kernel", "name"), UNDER)
def test_what_works_is_equal_and_the_rest_is_refused(kernels, kernel, name):
    module, processor = BUILDERS[name]()
    lvlm = ss.LVLM(module.requires_grad_(False), processor)
    sample = prepared(lvlm)
    want = answers(lvlm, sample, module.config._attn_implementation)
    got = answers(lvlm, sample, kernel)
    refused = {what.split()[0] for what in got if got[what] is None and want[what] is not None}
    for what in (what for what in got if got[what] is not None and want[what] is not None):
        for one, other in zip(got[what], want[what], strict=True):
            same(one, other, what)
    wanted = {"ReceivedAttention", "AttentionPatterns", "AttentionEntropy", "SinkEvidence"}
    if "flash" in kernel:  # masses in fp32 only, and explicit masks
        wanted |= {"AttentionMass", "EvictKeys"}
        wanted |= (
            {"MaskKeys", "AttentionKnockout", "ScaleAttention", "Redistribute"}
            if name == "gemma2"
            else set()
        )
    else:
        wanted |= {"TestTimeRegister"}
    assert refused == wanted
    assert {what for what in got if got[what] is None} >= {
        what for what in want if want[what] is None
    }


@pytest.mark.parametrize(
    ("kernel", "name"),
    [
        ("flash_attention_3", "gpt_oss"),
        ("flash_attention_2", "gemma2"),
        ("flash_attention_2", "qwen2.5-vl"),
        ("flex_attention", "llava-clip-llama"),
    ],
)
def test_decode_steps_and_gates_are_equal(kernels, kernel, name):
    module, processor = BUILDERS[name]()
    lvlm = ss.LVLM(module.requires_grad_(False), processor)
    sample, base = prepared(lvlm), module.config._attn_implementation
    mass, edit = ss.AttentionMass({"image": "image", "first": "first"}), ss.ScaleKeys("image", 0.5)
    gate = ss.LSG.for_model(lvlm, layer=1, v_detector=ss.detectors.Norm(0.1))
    with torch.no_grad():
        for number, weight in enumerate(gate.parameters()):
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(number)))
    steps = {}
    for one in (base, kernel):
        module.set_attn_implementation(one)
        how = {"max_new_tokens": 4, "do_sample": False}
        out = lvlm.generate(sample, [mass], [edit], **how)
        gated = lvlm.generate(sample, [mass], [gate], **how)
        gate.attach(module)
        plain = module.generate(**sample.inputs, **how)
        gate.detach()
        assert torch.equal(plain, gated.sequences)
        steps[one] = out.steps, gated.steps, out.sequences, gated.sequences
    for got, want in zip(steps[kernel][:2], steps[base][:2], strict=True):
        for number, (step, other) in enumerate(zip(got, want, strict=True)):
            same(step[mass].mass, other[mass].mass, number)
            same(step[mass].null, other[mass].null, number)
    assert all(map(torch.equal, steps[kernel][2:], steps[base][2:]))


def test_sweeps_are_equal(kernels):
    module, processor = BUILDERS["llava-clip-llama"]()
    lvlm, tables = ss.LVLM(module, processor), []
    asked = ["what is it", "how many red shapes are there ?"]
    data = [dict(image=random_image(), image_id="a", question=q, answer="red") for q in asked]
    for kernel in ("sdpa", "flash_attention_2"):
        module.set_attn_implementation(kernel)
        swept = ss.sweep(lvlm, data, layers=[1], v_detector=ss.detectors.Norm(0.1), progress=False)
        tables.append(swept.to_dataframe().select_dtypes("number"))
    assert float((tables[0] - tables[1]).abs().max().max()) < 1e-4
    assert tables[0].logprob.nunique() > 2
