"""The ways in which users hold a model, and what can be done with it then: right, or refused.

Each way has a twin, a plain model of the same numbers. A cell is right if both give the same; the plain
model itself is compared with what transformers computes under eager attention. The table of the cells is
in docs/models.md.
"""

import contextlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import torch
from torch import nn

import sinkscope as ss
from sinkscope.errors import InputError, ModelError, SinkscopeError
from sinkscope.models.loading import weights_digest
from sinkscope.testing import random_image, tiny_llava
from tests.project.repository import ROOT
from tests.quantised import Linear8, by_torchao, dequantised, in_4_bit, packs, replaced
from tests.several_devices import A, B, known, spread

V_RULE, L_RULE = ss.detectors.Norm(27.6), ss.detectors.Norm(36.6)
GROUPS = {"image": "image", "text": "text"}


def plain():
    """A model with LayerScale behind its vision blocks, and its processor."""
    return tiny_llava("dinov2", vision_layers=2, layers=2)


def with_lora(model, **settings):
    """Random adapters on every linear map of the decoder's blocks."""
    names = "[qkvo]_proj|gate_proj|up_proj|down_proj"
    config = peft.LoraConfig(
        r=4, target_modules=rf".*language_model.*\.({names})", init_lora_weights=False, **settings
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return peft.get_peft_model(model, config)


def eight_bit(model):
    for path, part in list(model.model.language_model.named_modules()):
        if isinstance(part, nn.Linear):
            owner, _, name = path.rpartition(".")
            setattr(model.model.language_model.get_submodule(owner), name, Linear8(part))
    return model


def rounded(model):
    """What `eight_bit` computes, in ordinary linear maps."""
    for part in model.model.language_model.modules():
        if isinstance(part, nn.Linear):
            eight = Linear8(part)
            part.weight.data = eight.weight * eight.scale
    return model


def compiled_in_place(model):
    model.compile(backend="eager")
    model.model.language_model.layers[1].compile(backend="eager")
    return model


def compiled_forward(model):
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def part_compiled(model):
    model.model.language_model = torch.compile(model.model.language_model, backend="eager")
    return model


def with_static_cache(model):
    model.generation_config.cache_implementation = "static"
    return model


def in_two_dtypes(model):
    model.model.language_model.bfloat16()
    model.lm_head.bfloat16()
    return model


def training(model):
    """In training mode, with dropout of attention weights."""
    for layer in model.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.5
    return model.train()


def checkpointing(model):
    model.gradient_checkpointing_enable()
    return model.train()


@dataclass(frozen=True)
class Held:
    """One way to hold a model.

    Attributes:
        make: What a user holds, of the plain model and, for disk, a folder.
        twin: A plain model of the same numbers, of the plain model.
        around: What a user runs it in.
        tolerance: Of each cell, relative to its largest number.
        refused: Use -> what the refusal says; "load" is of them all.
        needs: The package that makes it; without it its cells are skipped.
    """

    make: Callable[..., Any] = lambda model: model
    twin: Callable[[Any], Any] = lambda model: model
    around: Callable[[], Any] = contextlib.nullcontext
    tolerance: float = 1e-4
    refused: dict[str, str] = field(default_factory=dict)
    needs: str = "torch"


def on_two_devices(model):
    return spread(model, [A, B], [A, B], A, B, B)


def over_two_devices(model, folder):
    return spread(model, [A, "cpu"], ["disk", B], B, "cpu", A, folder=folder)


def merged(model):
    return with_lora(model).merge_and_unload()


INNER = "expected the transformers model inside"
HELD = {
    "plain": Held(),
    "LoRA, unmerged (`get_base_model()`)": Held(
        lambda m: with_lora(m).eval().get_base_model(), merged
    ),
    "LoRA, merged": Held(merged, merged),
    "`PeftModel`": Held(
        with_lora, refused={"load": rf"Got a PeftModel; {INNER}.*model\.get_base_model\(\)"}
    ),
    "8-bit linear maps (a stand-in)": Held(eight_bit, rounded),
    "offloaded to the CPU": Held(lambda m: accelerate.cpu_offload(m, torch.device("cpu"))),
    "offloaded to disk": Held(
        lambda m, folder: accelerate.disk_offload(m, folder, torch.device("cpu"))
    ),
    "on two devices": Held(on_two_devices),
    "on two devices, the CPU and disk": Held(over_two_devices),
    "torchao int8": Held(by_torchao, lambda m: dequantised(by_torchao(m)), needs="torchao"),
    "bitsandbytes 4-bit, on a CPU": Held(
        lambda m: replaced(m, in_4_bit),
        lambda m: dequantised(replaced(m, in_4_bit)),
        tolerance=5e-2,
        refused={"train_lsg": r"4-bit weights at .* passes no gradient; expected"},
        needs="bitsandbytes",
    ),
    "bf16 decoder, fp32 tower": Held(in_two_dtypes, tolerance=3e-2),
    "`torch.compile(model)`": Held(
        lambda m: torch.compile(m, backend="eager"),
        refused={"load": rf"Got a OptimizedModule; {INNER}.*model\._orig_mod"},
    ),
    "`model.compile()`": Held(compiled_in_place),
    "`model.forward` compiled": Held(compiled_forward),
    "a part compiled (`torch.compile(part)`)": Held(
        part_compiled,
        refused={"load": r"model\.language_model is compiled .*part\.compile\(\).*part\._orig_mod"},
    ),
    "`nn.DataParallel`": Held(
        nn.DataParallel, refused={"load": rf"Got a DataParallel; {INNER}.*model\.module"}
    ),
    "static cache": Held(with_static_cache),
    "`torch.autocast`": Held(around=lambda: torch.autocast("cpu", torch.bfloat16), tolerance=5e-2),
    "`torch.inference_mode`": Held(
        around=torch.inference_mode,
        refused={"train_lsg": r"Got torch\.inference_mode\(\); expected to be outside of it"},
    ),
    "gradient checkpointing": Held(checkpointing),
    "training mode, with dropout": Held(training),
}


def mass(lvlm, sample):
    probe = ss.AttentionMass(GROUPS)
    return [lvlm.run(sample, [probe])[probe].mass]


def states(lvlm, sample):
    probes = [
        ss.TokenNorms(site="resid_pre"),
        ss.TokenNorms(site="mlp_out"),
        ss.TokenNorms(site="attn_out", tower="vision"),
    ]
    run = lvlm.run(sample, probes)
    return [run[probe].norms for probe in probes]


def contributions(lvlm, sample):
    probe = ss.ContributionNorms(GROUPS)
    return [lvlm.run(sample, [probe])[probe].norms]


def edits(lvlm, sample):
    made = [
        ss.MaskKeys("image", layers=[1]),
        ss.AblateValues("image", layers=[0]),
        ss.AblateActivations([3], "image", site="mlp_out", layers=[0]),
    ]
    return [lvlm.run(sample, interventions=made).logits]


def generate(lvlm, sample):
    probes = [ss.AttentionMass(GROUPS), ss.ReceivedAttention(), ss.ValueNorms(), ss.TokenNorms()]
    probes += [ss.AttentionPatterns(rows="last"), ss.LogitLens()]
    out = lvlm.generate(sample, probes, [ss.ScaleKeys("image", 0.5)], max_new_tokens=3)
    return [step[probes[0]].mass[:, :, :, -1] for step in out.steps]


def trace(lvlm, sample):
    found = ss.trace_sinks(lvlm, sample, V_RULE, L_RULE)
    assert found.v_sinks.any()
    return [found.v_sinks.float(), found.l_sinks(1).float(), found.text_sinks(1).float()]


def records(n):
    return [
        {"image": random_image(32, 32, seed), "question": "what", "answer": "red"}
        for seed in range(n)
    ]


def sweep(lvlm, sample):
    grid = [(0.5, 1.0)]
    made = ss.sweep(lvlm, records(2), [0], grid, score="logprob", v_detector=V_RULE)
    return [torch.tensor(made.table[["score", "base_score"]].to_numpy())]


def gate(lvlm, sample):
    made = ss.LSG.for_model(lvlm, 0, v_detector=V_RULE)
    with torch.no_grad():
        made.outer.bias.copy_(torch.tensor([1.0, -1.0]))
        made.attach(lvlm)
        # A compiled model is gated too; compiling it takes a minute here.
        with torch.compiler.set_stance("force_eager"):
            attached = lvlm.module.eval()(**sample.inputs).logits
        made.detach()
    return [lvlm.run(sample, interventions=[made]).logits, attached]


def train_lsg(lvlm, sample):
    options = {"batch": 4, "validation": 0.0, "lr": 0.01, "epochs": 1, "progress": False}
    made = ss.train_lsg(lvlm, records(4), [0], v_detector=V_RULE, **options)
    return [parameter.detach() for parameter in made.gate.parameters()]


USES = {use.__name__: use for use in (mass, states, contributions, edits, generate, trace, sweep)}
USES |= {"gate": gate, "train_lsg": train_lsg}


@cache
def twin(make):
    """The LVLM of a plain model, a sample, and the answers of every use."""
    model, processor = plain()
    lvlm = ss.LVLM(make(model), processor)
    sample = lvlm.prepare(images=random_image(), text="what is it")
    return sample, {name: use(lvlm, sample) for name, use in USES.items()}


@pytest.fixture(autouse=True)
def _known():
    with known():
        yield


@pytest.fixture(scope="module")
def hold(tmp_path_factory):
    """``hold(name)``: an LVLM of what a user holds, or the error that says why not; made once."""
    made = {}

    def get(name):
        if name not in made:
            model, processor = plain()
            folder = [tmp_path_factory.mktemp("weights")] if "disk" in name else []
            held = HELD[name].make(model, *folder)
            try:
                made[name] = ss.LVLM(held, processor)
            except ModelError as error:
                made[name] = error
        return made[name]

    return get


def used(held, lvlm, use, sample):
    """The answers of one use of what is held."""
    if isinstance(lvlm, ModelError):
        raise lvlm
    with held.around():
        return USES[use](lvlm, sample)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("name", HELD)
def test_a_cell_is_right_or_refused(hold, name, use):
    if importlib.util.find_spec(HELD[name].needs) is None:
        pytest.skip(f"needs {HELD[name].needs}, which is not installed")
    if "4-bit" in name and use == "train_lsg" and not packs():
        pytest.skip("this CPU has no kernel for 4-bit weights, so nothing is refused")
    held, lvlm = HELD[name], hold(name)
    said = held.refused.get("load") or held.refused.get(use)
    sample, answers = twin(held.twin)
    if said is not None:
        with pytest.raises(SinkscopeError, match=said):
            used(held, lvlm, use, sample)
        return
    found = used(held, lvlm, use, sample)
    assert len(found) == len(answers[use]) > 0
    for one, other in zip(found, answers[use], strict=True):
        assert torch.equal(one.isnan().cpu(), other.isnan())
        one, other = one.cpu().nan_to_num().double(), other.nan_to_num().double()
        assert (one - other).abs().max() <= held.tolerance * other.abs().max()


@pytest.mark.parametrize("name", ["plain", "bf16 decoder, fp32 tower", "`torch.autocast`"])
def test_it_is_what_transformers_computes(hold, name):
    """Masses and states against eager attention, held in the same way, in the same dtype."""
    lvlm = hold(name)
    sample, _ = twin(HELD["plain"].twin)
    model, _ = plain()
    model = HELD[name].make(model)
    model.set_attn_implementation("eager")
    probes = [ss.AttentionMass(GROUPS), ss.TokenNorms(site="resid_pre")]
    with torch.no_grad(), HELD[name].around():
        want = model(**sample.inputs, output_attentions=True, output_hidden_states=True)
        run = lvlm.run(sample, probes)
    groups = torch.stack([sample.tokens.select(group) for group in GROUPS.values()], -1).float()
    attention = torch.stack(want.attentions, 1).float()
    limit = 1e-5 if name == "plain" else 3e-2
    torch.testing.assert_close(
        run[probes[0]].mass, attention @ groups[:, None, None], atol=limit, rtol=0
    )
    norms = torch.stack(want.hidden_states[:-1], 1).float().norm(dim=-1)
    torch.testing.assert_close(run[probes[1]].norms, norms, rtol=limit, atol=0)


def test_the_digest_of_weights_sees_offloaded_ones(hold):
    """So that a sweep may be resumed wherever the weights are, and not with others."""
    digest = weights_digest(hold("plain").module)
    assert digest != weights_digest(hold("LoRA, merged").module)
    for name in ("offloaded to the CPU", "offloaded to disk"):
        assert weights_digest(hold(name).module) == digest


def test_what_is_offloaded_does_not_run_as_on_a_server(hold):
    sample, _ = twin(HELD["plain"].twin)
    with pytest.raises(InputError, match=r"weights are offloaded; .* Write remote=False"):
        hold("offloaded to the CPU").run(sample, remote="local")


def test_training_leaves_offloaded_weights_as_they_were(hold):
    lvlm = hold("offloaded to the CPU")
    before = {name: p.requires_grad for name, p in lvlm.module.named_parameters()}
    train_lsg(lvlm, None)
    assert {name: p.requires_grad for name, p in lvlm.module.named_parameters()} == before
    assert all(before.values())


@pytest.mark.parametrize("kind", ["static", "offloaded_static", "hybrid"])
def test_a_static_cache_that_is_asked_for_changes_nothing(hold, kind):
    sample, _ = twin(HELD["plain"].twin)
    lvlm, probe = hold("plain"), ss.ReceivedAttention()
    want = lvlm.generate(sample, [probe], max_new_tokens=3)
    found = lvlm.generate(sample, [probe], max_new_tokens=3, cache_implementation=kind)
    assert torch.equal(found.sequences, want.sequences)
    for one, other in zip(found.steps, want.steps, strict=True):
        assert torch.equal(one[probe].received, other[probe].received)


def test_an_adapter_of_prompts_is_refused():
    """Its base model would run without the adapter, and nothing would say so."""
    model, processor = plain()
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model.config.hidden_size = 64
    with pytest.raises(
        ModelError, match="an adapter that puts states of its own before the prompt"
    ):
        ss.LVLM(peft.get_peft_model(model, config), processor)


def table():
    """The cells as markdown, and what the refusals say."""
    lines = [["how it is held", *USES], ["---"] * (1 + len(USES))]
    for name, held in HELD.items():
        says = [held.refused.get("load") or held.refused.get(use) for use in USES]
        lines.append([name, *("right" if said is None else "refused" for said in says)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def test_the_documents_show_the_table():
    """If this fails: python -m tests.models.test_holding"""
    assert table() in (ROOT / "docs" / "models.md").read_text(encoding="utf-8")


if __name__ == "__main__":
    page = Path(ROOT / "docs" / "models.md")
    before, begin, rest = page.read_text(encoding="utf-8").partition("<!-- held -->\n")
    after = rest.partition("<!-- /held -->")[2]
    page.write_text(f"{before}{begin}{table()}\n<!-- /held -->{after}", encoding="utf-8")
