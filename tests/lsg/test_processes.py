"""Two processes of accelerate take the steps of one with a batch twice as large."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import sinkscope as ss
from sinkscope.testing import tiny_llava
from tests.lsg.test_train import records, train

SCRIPT = """
import sys
from accelerate import Accelerator
from tests.lsg.test_processes import run
run(Accelerator(cpu=True), sys.argv[1], sys.argv[2])
"""


def run(accelerator, final, out, batch=2):
    """Train two gates and keep the weights of every process."""
    torch.set_num_threads(1)
    lvlm = ss.LVLM(*tiny_llava(), verify=False)
    options = {"layers": [0, 1], "epochs": 3, "evaluate_every": 2, "lr": 0.005, "out": out}
    result = train(lvlm, records(14), accelerator=accelerator, batch=batch, **options)
    place = 0 if accelerator is None else accelerator.process_index
    held = result.history["loss"].tolist()
    tensors = {f"{k}.{n}": v for k, g in result.gates.items() for n, v in g.state_dict().items()}
    save_file({**tensors, "losses": torch.tensor(held)}, f"{final}.{place}")


@pytest.mark.slow
def test_two_processes_equal_one_with_twice_the_batch(tmp_path):
    root = Path(__file__).parents[2]
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launch, str(script), str(tmp_path / "two"), str(tmp_path / "out")],
        env=os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        cwd=root,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    run(None, tmp_path / "one", tmp_path / "alone", batch=4)
    one, first, second = (load_file(tmp_path / name) for name in ("one.0", "two.0", "two.1"))
    for name, expected in one.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], expected, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(first["losses"], one["losses"], atol=1e-4, rtol=1e-4)
    assert len(list((tmp_path / "out").glob("checkpoint-*"))) == 1
