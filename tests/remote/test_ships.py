"""What a remote run sends works where sinkscope is not installed, and gives the same numbers bitwise.

`server.py` runs in another process, which refuses to import this package. Between the two lie the
code paths of a real remote run, on both sides, and a socket: only the hub's answer is replaced.
"""

import ast
import builtins
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import sinkscope as ss
from sinkscope.errors import CheckpointError, RemoteError
from sinkscope.probes import Read
from sinkscope.testing import TINY, random_image, write_checkpoint
from tests.probes.everything import EIGENVALUES, assert_same, every_probe, exported
from tests.remote.conftest import REPOSITORIES
from tests.remote.ndif import ABSENT_BUILTINS, ALLOWED

KERNELS = sorted((Path(ss.__file__).parent / "kernels").glob("*.py"))


def test_nothing_is_missing():
    assert {type(probe) for probe in every_probe()} == exported()


@pytest.mark.parametrize("name", ["sinkscope", "sinkscope.kernels.walk", "jaxtyping", "beartype"])
def test_the_server_has_nothing_of_ours(loopback, name):
    assert not loopback.ask("import", "json")
    assert "on the server" in loopback.ask("import", name)["error"]


@pytest.mark.parametrize("family", REPOSITORIES)
def test_there_are_no_weights_here(remote, family):
    assert {p.device.type for p in remote(family).module.parameters()} == {"meta"}
    assert not remote(family).verified
    report = remote(family).report()
    assert report.verification == "no: declared, the weights are elsewhere"
    assert any("runs go to the server" in note for note in report.notes)
    assert report.verdict("AttentionMass").status == "exact"


@pytest.mark.parametrize("family", REPOSITORIES)
def test_every_probe_gives_the_same_numbers_bitwise(tiny, batch, remote, family):
    here, there = tiny(family), remote(family)
    probes = every_probe()
    local = here.run(batch(here), probes=probes, logits="last")
    away = there.run(batch(there), probes=probes)
    assert torch.equal(local.logits, away.logits)
    for probe in probes:
        assert_same(local[probe], away[probe], probe, EIGENVALUES)


@pytest.mark.parametrize("family", REPOSITORIES)
def test_every_step_of_generate_gives_the_same_numbers_bitwise(tiny, batch, remote, family):
    here, there = tiny(family), remote(family)
    probes = every_probe()
    local = here.generate(batch(here), probes=probes, max_new_tokens=3)
    away = there.generate(batch(there), probes=probes, max_new_tokens=3)
    assert torch.equal(local.sequences, away.sequences)
    assert local.text == away.text
    assert len(local.steps) == len(away.steps) == 3
    for one, other in zip(local.steps, away.steps, strict=True):
        assert torch.equal(one.logits, other.logits)
        for probe in one.results:
            assert_same(one[probe], other[probe], (one.step, probe), EIGENVALUES)


EDITS = [
    ss.MaskKeys("image", [1]),
    ss.ScaleKeys("image", 0.5, [1]),
    ss.ScaleAttention("image", 0.5, [1]),
    ss.AttentionKnockout("last", "image", [1]),
    ss.AblateValues("image", "zero", [1]),
    ss.AblateActivations([1, 2], "image", "zero", [1]),
    ss.ScaleKeys(ss.interventions.LiveRule(ss.detectors.SinkDimensions((3, 17), 1.3)), 0.5),
]


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: type(edit).__name__)
def test_interventions_travel_too(tiny, batch, remote, edit):
    here, there = tiny("llava-clip-llama"), remote("llava-clip-llama")
    probe = ss.AttentionMass({"image": "image"})
    local = here.run(batch(here), [probe], [edit], logits="last")
    away = there.run(batch(there), [probe], [edit])
    assert torch.equal(local.logits, away.logits)
    assert_same(local[probe], away[probe])


@pytest.mark.parametrize("tower", ["language", "vision"])
@pytest.mark.parametrize("site", ["resid_post", "values"])
@pytest.mark.parametrize("family", REPOSITORIES)
def test_donors_travel_too(tiny, batch, remote, family, site, tower):
    """A patch whose donor was read on the server, and edits the server's model."""
    here, there = tiny(family), remote(family)
    probe = (
        ss.probes.AttentionValues([1], tower=tower)
        if site == "values"
        else ss.probes.ResidualStates(layers=[1], tower=tower)
    )
    tokens = "image" if tower == "language" else "patch"
    logits = []
    for lvlm in (here, there):
        sample = batch(lvlm)
        pixels = sample.inputs["pixel_values"].flip(-1)
        other = lvlm.prepare(inputs={**sample.inputs, "pixel_values": pixels})
        donor = lvlm.run(other, [probe])
        edit = ss.PatchActivations(donor, site, tokens, [1], tower=tower)
        logits.append(lvlm.run(sample, [], [edit], logits="last").logits)
    assert torch.equal(*logits)


def test_all_logits_on_request(tiny, remote):
    here, there = tiny("llava-clip-llama"), remote("llava-clip-llama")
    sample = here.prepare(images=random_image(), text="what")
    assert torch.equal(here.run(sample).logits, there.run(sample, logits="all").logits)


def test_the_kernel_travels_with_the_request(tiny, remote, loopback, batch):
    """A server shared with others may have been left on another kernel: ours is asked for each time."""
    there = remote("llava-clip-llama", attn_implementation="eager")
    here = tiny("llava-clip-llama", "eager")
    probe = ss.AttentionMass({"image": "image"})
    want, got = here.run(batch(here), [probe]), there.run(batch(there), [probe])
    assert loopback.seen["requests"][-1]["env"]["attn_implementation"] == "eager"
    assert_same(want[probe], got[probe])


def test_requests_are_small_and_name_the_model(remote, loopback, batch):
    """No weights travel: a request is the code, the plan and the inputs."""
    there = remote("llava-clip-llama")
    sample = batch(there)
    there.run(sample, probes=every_probe())
    request = loopback.seen["requests"][-1]
    inputs = sum(value.numel() * value.element_size() for value in sample.inputs.values())
    assert request["blob"] < inputs + 120_000
    assert REPOSITORIES["llava-clip-llama"] in request["model_key"]


def kernel_that_imports(states, state):
    import json

    return states.norm(dim=-1) + len(json.dumps(0))


def kernel_that_opens(states, state):
    return states.norm(dim=-1) + len(open("/dev/null").read())


@dataclass(frozen=True, eq=False)
class Norms:
    """A probe with a kernel that the server must refuse."""

    kernel: Any
    tower: str = "language"

    def reads(self, context):
        return [Read(ss.Site("language", "resid_pre", 0), self.kernel)]

    def finish(self, answers, context):
        return answers


@pytest.mark.parametrize(
    ("kernel", "says"),
    [
        (kernel_that_imports, "json is not allowed"),
        (kernel_that_opens, "name 'open' is not defined"),
    ],
)
def test_the_server_refuses_what_ndif_refuses(tiny, remote, kernel, says):
    """The stand-in is as strict as it claims; here both kernels work."""
    here, there = tiny("llava-clip-llama"), remote("llava-clip-llama")
    sample = here.prepare(images=random_image(), text="what")
    here.run(sample, [Norms(kernel)])
    with pytest.raises(RemoteError, match=says):
        there.run(sample, [Norms(kernel)])


def test_a_model_the_hub_does_not_know_is_refused_before_anything_is_sent(tiny, hub, tmp_path):
    folder = write_checkpoint(*TINY["llava-clip-llama"](), tmp_path)
    lvlm = ss.LVLM.from_pretrained(folder)
    sample = lvlm.prepare(images=random_image(), text="what")
    with pytest.raises(CheckpointError, match=r"canonical name of .*write remote='local'"):
        lvlm.run(sample, remote=True)
    with pytest.raises(CheckpointError, match="canonical name of 'LlavaForConditionalGeneration'"):
        tiny("llava-clip-llama").generate(sample, remote=True, max_new_tokens=1)


def test_a_model_without_weights_does_not_run_here(remote):
    lvlm = remote("llava-clip-llama")
    sample = lvlm.prepare(images=random_image(), text="what")
    for where in (False, "local"):
        with pytest.raises(ss.errors.InputError, match="without weights; expected remote=True"):
            lvlm.run(sample, remote=where)


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.name)
def test_kernels_use_only_what_the_server_has(path):
    """Imports and builtins, read from the source, also of branches that no test takes."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert not names & set(dir(builtins)) & ABSENT_BUILTINS
    imported = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            imported.append(node.module)
    for name in imported:
        ours = name.startswith("sinkscope.kernels") or name == "__future__"
        assert ours or name.partition(".")[0] in ALLOWED, name
