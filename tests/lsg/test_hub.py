"""Gates from and to a hub: a small server here plays the hub, and nothing outside is asked."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd
from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError

import sinkscope as ss
from sinkscope.errors import CheckpointError
from sinkscope.lsg import loading, saving

TOKEN = "hf_" + "notARealTokenAtAll"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def gate(tiny):
    return ss.LSG.for_model(
        tiny("llava-clip-llama"), 1, v_detector=ss.detectors.Norm(1.0), hidden=16
    )


class Hub(http.server.BaseHTTPRequestHandler):
    """``/<user>/<name>/resolve/<revision>/<path>`` out of a folder, and nothing else."""

    root = Path()
    asked: list[str] = []  # noqa: RUF012  the handler's class is its state

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        parts = self.path.strip("/").split("/")
        known = parts[:2] == ["user", "gate"] and parts[2:3] == ["resolve"]
        path = self.root.joinpath(*parts[4:]) if known else self.root / "none"
        self.asked.append(f"{self.command} {'/'.join(parts[3:])}")
        found = path.is_file()
        content = path.read_bytes() if found else b""
        self.send_response(200 if found else 404)
        if not found:
            self.send_header("X-Error-Code", "EntryNotFound" if known else "RepoNotFound")
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *args):
        pass


LOAD = """
import json, sys
import sinkscope as ss

def load(kind, name, options):
    try:
        made = getattr(ss.LSG, kind)(name, **options)
    except ss.SinkscopeError as error:
        return f"{type(error).__name__}: {error}"
    gates = made if isinstance(made, list) else [made]
    return [[float(p.detach().sum()) for p in gate.parameters()] for gate in gates]

print("ANSWER", json.dumps([load(*one) for one in json.loads(sys.argv[1])]))
"""


def load_all(root, cache, requests):
    """What a process of its own makes of a repository's folders, and what it asked the hub for."""
    handler = type("Handler", (Hub,), {"root": root, "asked": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(cache),
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "OMP_NUM_THREADS": "1",
    }
    env.pop("HF_HUB_OFFLINE", None)
    done = subprocess.run(
        [sys.executable, "-c", LOAD, json.dumps(requests)],
        env=env,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    server.shutdown()
    server.server_close()
    assert done.returncode == 0, done.stderr[-3000:]
    assert TOKEN not in done.stdout + done.stderr
    return json.loads(done.stdout.partition("ANSWER ")[2]), handler.asked


@pytest.mark.slow
def test_repositories_are_read_and_held_to_one_commit(gate, tmp_path):
    root = tmp_path / "repo"
    gate.save_pretrained(root / "l1")
    ss.LSG.save_stack([gate, gate], root / "many")
    (root / "model").mkdir()
    (root / "model" / "config.json").write_text('{"model_type": "llava"}')
    (root / "model" / "model.safetensors").write_bytes(b"large")
    requests = [
        ("from_pretrained", "user/gate", {"subfolder": "l1", "revision": "main"}),
        ("load_stack", "user/gate", {"subfolder": "many"}),
        ("from_pretrained", "user/gate", {"subfolder": "model"}),
        ("from_pretrained", "user/other", {}),
    ]
    (one, stack, model, other), asked = load_all(root, tmp_path / "cache", requests)
    sums = [float(parameter.detach().sum()) for parameter in gate.parameters()]
    assert one == [sums]
    assert stack == [sums] * 2
    assert model.startswith("CheckpointError: Got 'user/gate/model', a checkpoint of a whole model")
    assert "CheckpointError: Got 'user/other', which is no folder here, and the hub could" in other
    assert "HEAD main/l1/config.json" in asked
    tensors = [path for path in asked if "model.safetensors" in path]
    assert tensors
    assert all(COMMIT in path for path in tensors)
    assert not [path for path in tensors if "/model/" in path]  # no weights of a whole model


def test_without_network_both_readings_are_named(monkeypatch):
    def unreachable(*args, **kwargs):
        raise LocalEntryNotFoundError(f"no connection with {TOKEN}")

    monkeypatch.setattr(loading, "hf_hub_download", unreachable)
    with pytest.raises(CheckpointError, match="no folder here, and the hub could not") as caught:
        ss.LSG.from_pretrained("user/gate")
    assert TOKEN not in str(caught.value)
    assert "***" in str(caught.value)


class Api:
    """What `push_to_hub` calls, kept in memory."""

    there: list[str] = []  # noqa: RUF012
    error: Exception | None = None
    seen: dict = {}  # noqa: RUF012

    def __init__(self, token=None):
        self.seen.update(token=token)

    def create_repo(self, repo, private, exist_ok):
        if self.error is not None:
            raise self.error
        self.seen.update(repo=repo, private=private)

    def list_repo_files(self, repo, revision):
        return self.there

    def create_commit(self, repo, operations, commit_message, revision):
        added = [one for one in operations if isinstance(one, CommitOperationAdd)]
        self.seen.update({one.path_in_repo: one.path_or_fileobj for one in added})
        self.seen.update(gone={one.path_in_repo for one in operations if one not in added})
        self.seen.update(message=commit_message)
        return type("Commit", (), {"commit_url": f"https://hub/{repo}/commit/1"})


@pytest.fixture
def api(monkeypatch):
    made = type("Made", (Api,), {"there": [".gitattributes", "README.md"], "seen": {}})
    monkeypatch.setattr(saving, "HfApi", made)
    return made


def test_pushed_files_are_those_of_a_folder(gate, api, tmp_path, capsys):
    address = gate.push_to_hub("user/gate", record={"seed": 3}, private=True, token=TOKEN)
    assert address == "https://hub/user/gate/commit/1"
    assert (api.seen["repo"], api.seen["private"], api.seen["token"]) == ("user/gate", True, TOKEN)
    gate.save_pretrained(tmp_path / "gate", record={"seed": 3})
    for path in (tmp_path / "gate").iterdir():
        assert api.seen[path.name] == path.read_bytes()
    assert "Gate at 1" in api.seen["message"]
    assert TOKEN not in "".join(capsys.readouterr())
    assert not [
        value for value in api.seen.values() if isinstance(value, bytes) and b"hf_" in value
    ]


def test_a_repository_of_something_else_is_left_alone(gate, api):
    api.there = ["config.json", "model-00001-of-00003.safetensors"]
    with pytest.raises(
        CheckpointError, match=r"which holds \['model-00001-of-00003.safetensors'\]"
    ):
        gate.push_to_hub("user/model")
    assert "message" not in api.seen


@pytest.mark.parametrize("error", [OSError, ValueError, HTTPError])
def test_a_failed_push_is_said_without_the_token(gate, api, error):
    text = f"401 for Bearer {TOKEN} and my-own-secret"
    api.error = error(text)
    with pytest.raises(CheckpointError, match=r"expected a network, a login with write") as caught:
        gate.push_to_hub("user/gate", token="my-own-secret")
    assert TOKEN not in str(caught.value)
    assert "my-own-secret" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_a_record_that_the_new_gate_has_not_leaves_the_repository(gate, api):
    api.there = ["config.json", "training.json"]
    gate.push_to_hub("user/gate")
    assert api.seen["gone"] == {"training.json"}
    gate.push_to_hub("user/gate", record={"seed": 3})
    assert api.seen["gone"] == set()
