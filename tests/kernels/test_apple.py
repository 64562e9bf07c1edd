"""What Apple's MPS does not have is not asked of it: fp64, and operations that torch has not written for it.

No machine here has an MPS. The operations are those that the CPU is asked for, looked up in torch's own list, and
a stand-in runs what is sinkscope's. Rounding, and dtypes that single operations do not take, are not seen so.
"""

import os
from collections import defaultdict
from contextlib import suppress

import pytest
import torch
import torchgen
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchgen.gen import parse_native_yaml
from torchgen.model import DispatchKey

import sinkscope as ss
from sinkscope.errors import SinkscopeError
from sinkscope.models.loading import weights_digest
from sinkscope.testing import TINY, random_image
from tests.apple import Apple, to_mps
from tests.models.test_report import one_of_every_edit
from tests.probes.everything import assert_same, every_probe

# The CPU's own SDPA, beside which MPS has another; and eigenvalues, which `head_writes` moves.
ELSEWHERE = {"_scaled_dot_product_flash_attention_for_cpu", "_linalg_eigh"}
ELSEWHERE |= {"_scaled_dot_product_flash_attention_for_cpu_backward"}


@pytest.fixture(scope="module")
def written():
    """Names of the operations that run on MPS."""
    folder = os.path.join(os.path.dirname(torchgen.__file__), "packaged/ATen/native")
    listed = parse_native_yaml(f"{folder}/native_functions.yaml", f"{folder}/tags.yaml")
    own = listed.backend_indices[DispatchKey.MPS]
    named = {str(one.func.name): one for one in listed.native_functions}

    def runs(one):
        kinds = "implicit_autograd", "explicit_autograd", "explicit_autograd_non_functional"
        general = any(getattr(one, f"has_composite_{kind}_kernel") for kind in kinds)
        via = one.structured_delegate
        return general or own.has_kernel(one) or (via and own.has_kernel(named[str(via)]))

    return {name for name, one in named.items() if runs(one)}


class Asked(TorchDispatchMode):
    """Notes what is asked of a device: operations, and results in fp64."""

    def __init__(self):
        super().__init__()
        self.asked = defaultdict(set)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        name = operation._schema.name.removeprefix("aten::")
        name += f".{operation._overloadname}" * (operation._overloadname != "default")
        for x in tree_leaves((args, kwargs, out)):
            if isinstance(x, torch.Tensor):
                self.asked[x.device.type].add("fp64" if x.dtype == torch.float64 else name)
        return out


OTHERWISE = dict.fromkeys(
    ("received", "null", "others", "others_null", "sink_mass", "routed"), 1e-3
)
"""Fields that the CPU has from log-sum-exps, which no operation gives on MPS."""


@pytest.mark.parametrize("family", ["qwen2.5-vl"])
def test_passes_ask_for_nothing_that_mps_lacks(written, family):
    with Asked() as seen:
        lvlm = ss.LVLM(*TINY[family](), verify=True)
        weights_digest(lvlm.module)
        texts = ["what is it", "how many red shapes are there ?"]
        sample = lvlm.prepare(images=[random_image(96, 120), random_image(seed=1)], text=texts)
    with Asked() as passes:
        lvlm.run(sample, every_probe())
        for tower in ("vision", "language"):
            for edit in one_of_every_edit(lvlm, sample, tower):
                with suppress(SinkscopeError):
                    lvlm.run(sample, interventions=[edit])
        gate = ss.LSG.for_model(lvlm, layer=1, v_detector=ss.detectors.Norm(0.1))
        lvlm.generate(sample, [ss.ReceivedAttention()], [gate], max_new_tokens=2, do_sample=False)
    assert (seen.asked["cpu"] | passes.asked["cpu"]) - written - ELSEWHERE == {"fp64"}
    assert "fp64" not in passes.asked["cpu"]


def test_every_probe_and_edit_runs_on_a_stand_in_and_gives_the_same():
    """It refuses fp64, operations that MPS lacks, and tensors of two devices."""
    lvlm = ss.LVLM(*TINY["llava-clip-llama"]())
    there, processor = TINY["llava-clip-llama"]()
    texts = ["what is it", "how many red shapes are there ?"]
    images = [random_image(96, 120), random_image(seed=1)]
    sample = lvlm.prepare(images=images, text=texts)
    edits = one_of_every_edit(lvlm, sample, "language")
    probes, gate = every_probe(), {"layer": 1, "v_detector": ss.detectors.Norm(0.1)}
    with Apple():
        apple = ss.LVLM(to_mps(there), processor, verify=True)
        assert (apple.device.type, apple.verified) == ("mps", True)
        same = apple.prepare(images=images, text=texts)
        assert weights_digest(apple.module) == weights_digest(lvlm.module)
        got, want = apple.run(same, probes), lvlm.run(sample, probes)
        for probe in probes:
            assert_same(got[probe], want[probe], rounded=OTHERWISE)
        for edit in [*edits, ss.LSG.for_model(lvlm, **gate)]:
            try:
                logits = lvlm.run(sample, interventions=[edit]).logits
            except SinkscopeError:
                continue
            edit = ss.LSG.for_model(apple, **gate) if isinstance(edit, ss.LSG) else edit
            assert torch.equal(apple.run(same, interventions=[edit]).logits, logits)
        with pytest.raises(TypeError, match="float64"):
            apple.module.lm_head.weight.double()
