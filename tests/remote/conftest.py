"""The stand-in server of `server.py`, started once for this folder, and models that run on it."""

import json
import os
import subprocess
import sys
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import cloudpickle
import huggingface_hub
import nnsight
import pytest

import sinkscope as ss
from sinkscope.testing import TINY, write_checkpoint

SERVER = Path(__file__).with_name("server.py")
KEY = "a key of the loopback server"
REPOSITORIES = {
    "llava-clip-llama": "Someone/tiny-llava",
    "llava-dinov2-olmo2": "someone/tiny-dino",
    "qwen2.5-vl": "someone/Tiny-Qwen",
}
COMMIT = "0" * 40


@dataclass
class Loopback:
    """The server: its address, what it was sent, and how to tell it to go wrong."""

    url: str

    def ask(self, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        with urllib.request.urlopen(f"{self.url}/{path}", data=data, timeout=30) as reply:
            return json.load(reply)

    def tell(self, *faults):
        """Faults for calls to come, see ``Fault`` in `server.py`; forget all before, and count anew."""
        self.ask("tell", list(faults))

    def mend(self):
        """No more faults; the counts go on."""
        self.ask("tell", False)

    @property
    def seen(self):
        """``requests`` as they came, how many jobs ``ran``, calls ``asked`` by place, sizes of ``results``."""
        return self.ask("seen")


@pytest.fixture(scope="package")
def hub(tmp_path_factory):
    """A hub cache that holds the tiny models, and a hub that knows their canonical names."""
    cache = tmp_path_factory.mktemp("hub")
    for family, name in REPOSITORIES.items():
        place = cache / f"models--{name.replace('/', '--')}"
        (place / "refs").mkdir(parents=True)
        (place / "refs" / "main").write_text(COMMIT)
        write_checkpoint(*TINY[family](), place / "snapshots" / COMMIT)

    def model_info(api, name, **options):
        if name not in (*REPOSITORIES.values(), "someone/not-hosted"):
            raise huggingface_hub.errors.OfflineModeIsEnabled(f"no network to ask for {name}")
        return SimpleNamespace(id=name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        patch.setattr(huggingface_hub.HfApi, "model_info", model_info)
        yield cache


@pytest.fixture(scope="package")
def loopback(hub, tmp_path_factory):
    """The server, as ``remote=True`` finds it: its address and a key stand in nnsight's own config."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    env |= {"HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [sys.executable, str(SERVER)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=env,
        cwd=tmp_path_factory.mktemp("server"),
    )
    made = Loopback(f"http://127.0.0.1:{int(process.stdout.readline())}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nnsight.CONFIG.API, "HOST", made.url)
        patch.setattr(nnsight.CONFIG.API, "APIKEY", KEY)
        patch.setattr(nnsight.CONFIG.APP, "REMOTE_LOGGING", False)
        # nnsight ships code that is not installed by itself. Where sinkscope is installed, nothing
        # but its own registration makes it travel; the same holds for kernels of the tests.
        patch.setattr(nnsight.ndif, "pull_env", lambda: None)
        patch.setattr(cloudpickle.cloudpickle, "_PICKLE_BY_VALUE_MODULES", set())
        yield made
    process.stdin.close()
    process.wait(timeout=30)
    process.stdout.close()


@pytest.fixture(scope="package")
def remote(loopback):
    """``remote(family)``: the model by name, without weights; every run of it goes to the server."""
    made = {}

    def get(family, **options):
        key = (family, *sorted(options.items()))
        if key not in made:
            name = REPOSITORIES[family]
            made[key] = ss.LVLM.from_pretrained(name, **{"remote": True, **options})
        return made[key]

    return get
