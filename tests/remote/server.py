"""A stand-in for NDIF on loopback: torch, transformers and nnsight, and nothing of this project.

Run as a process of its own, it prints its port. It speaks nnsight's own wire format: POST /request,
the websocket /subscribe, GET /response/ID, and GET /result/ID for a result. What a request imports is
held to what NDIF allows (`ndif.py`), at unpickling and while it runs. For the tests there are
POST /tell, faults for calls to come (see `Fault`; false ends them), GET /seen, and POST /import.
"""

import base64
import builtins
import email
import hashlib
import importlib.abc
import io
import json
import os
import queue
import struct
import sys
import threading
import time
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ABSENT = ("sinkscope", "tests", "examples", "jaxtyping", "beartype")


class NotInstalled(importlib.abc.MetaPathFinder):
    """Refuse to import what the server does not have."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r} on the server")


sys.meta_path.insert(0, NotInstalled())

import torch  # noqa: E402
import transformers  # noqa: E402
import zstandard  # noqa: E402
from ndif import ABSENT_BUILTINS, ALLOWED, ALLOWED_IN_PAYLOAD  # noqa: E402
from nnsight import TransformersModel  # noqa: E402
from nnsight.intervention import serialization  # noqa: E402
from nnsight.schema.request import RequestModel  # noqa: E402
from nnsight.schema.response import ResponseModel  # noqa: E402
from nnsight.tracing.backend import Backend  # noqa: E402

torch.set_num_threads(1)
KEY = "a key of the loopback server"
NOT_HOSTED = (
    "Model is not dedicated and hotswapping is not supported for this API key. See "
    "https://nnsight.net/status/ for a list of scheduled models."
)


def check(name, allowed):
    if name.partition(".")[0] not in allowed:
        raise ImportError(f"{name} is not allowed on the server")


def import_checked(name):
    """What cloudpickle's ``subimport`` does, for modules that are allowed."""
    check(name, ALLOWED)
    __import__(name)
    return sys.modules[name]


class Unpickler(serialization.CustomCloudUnpickler):
    """Load nothing but what NDIF allows in a payload."""

    def find_class(self, module, name):
        check(module, ALLOWED_IN_PAYLOAD)
        if name == "_make_function":
            raise ImportError(
                "a function came as bytecode, which needs the client's Python version"
            )
        if name == "subimport":
            return import_checked
        return super().find_class(module, name)


def restricted_builtins():
    """The builtins of shipped functions: without what NDIF removes, with imports held to its list."""

    def guarded_import(name, *args, **kwargs):
        check(name, ALLOWED)
        return __import__(name, *args, **kwargs)

    kept = {name: value for name, value in vars(builtins).items() if name not in ABSENT_BUILTINS}
    return kept | {"__import__": guarded_import}


def deploy(model_key):
    """The model that a request names, with its weights."""
    try:
        return TransformersModel.from_model_key(model_key, dispatch=True)
    except ImportError:
        # Qwen2.5-VL's own processor needs torchvision. A forward pass needs none, but the payload
        # names the server's processor, tokenizer and image processor, so something must be there.
        name = repository(model_key)
        module = transformers.AutoModelForImageTextToText.from_pretrained(name)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        images = transformers.AutoImageProcessor.from_pretrained(name)
        parts = {"processor": tokenizer, "tokenizer": tokenizer, "image_processor": images}
        return TransformersModel(module, task="image-text-to-text", **parts)


def repository(model_key):
    return json.loads(model_key.partition(":")[2])["repo_id"]


def hosted(model_key):
    """Whether the hub cache that the tests have made holds the model."""
    folder = f"models--{repository(model_key).replace('/', '--')}"
    return (Path(os.environ["HF_HUB_CACHE"]) / folder).is_dir()


def answer(envelope, blob, models):
    """Run one request and return the bytes of its saved values."""
    if envelope.model_key not in models:
        models[envelope.model_key] = deploy(envelope.model_key)
    model = models[envelope.model_key]
    model._remoteable_set_env(envelope.env)
    persistent = model._remoteable_persistent_objects()
    tracer = RequestModel.deserialize(
        blob, persistent, compress=envelope.compress, unpickler=Unpickler
    )
    frame = tracer.info.frame
    given = set(frame.f_locals)
    tracer.backend = Backend()
    tracer.__exit__(None, None, None)
    file = io.BytesIO()
    torch.save({k: v for k, v in frame.f_locals.items() if k not in given}, file)
    made = file.getvalue()
    return zstandard.ZstdCompressor().compress(made) if envelope.compress else made


class Fault(dict):
    """What goes wrong at one place, ``at``: "request", "response", "result", "job" or "socket".

    One of: ``status`` and ``detail`` (an HTTP refusal; with ``kept_open`` the end is not announced), ``silent`` (seconds without an answer),
    ``garbage``, ``cut`` (close in the middle), ``drop`` (close without a word), ``lost`` (a request is
    accepted, then dropped), ``wants`` (a version of nnsight); of a job ``slow`` (seconds) or ``error``.
    ``times`` it happens, 1 if left out.
    """


class Desk:
    """Jobs, their statuses and results, and what the tests have told the server to do wrong."""

    def __init__(self):
        self.lock = threading.Lock()
        self.queue = queue.Queue()
        self.told, self.requests, self.results, self.statuses, self.sockets = [], [], {}, {}, {}
        self.ran, self.asked = 0, {}

    def fault(self, at):
        """The next fault that was told for this place; every call counts."""
        with self.lock:
            self.asked[at] = self.asked.get(at, 0) + 1
            for one in self.told:
                if one["at"] == at:
                    one["times"] = one.get("times", 1) - 1
                    if not one["times"]:
                        self.told.remove(one)
                    return one
        return Fault()

    def post(self, job, status, session="", **more):
        """Note a status; a job with a websocket hears it there, and no one can ask for it later."""
        response = ResponseModel(id=job, status=status, **more)
        if session:
            if (socket := self.sockets.get(session)) is not None:
                socket.put(response)
        else:
            self.statuses[job] = response
        return response

    def work(self, host):
        """Answer requests one after another, for ever."""
        models = {}
        while True:
            job, envelope, blob = self.queue.get()
            session = envelope.session_id
            if not hosted(envelope.model_key):
                self.post(job, "ERROR", session, description=NOT_HOSTED)
                continue
            self.post(job, "QUEUED", session, description="Moved to position 1 in Queue.")
            fault = self.fault("job")
            if "slow" in fault:
                time.sleep(fault["slow"])
            self.post(job, "DISPATCHED", session)
            self.post(job, "RUNNING", session, description="Your job has started running.")
            self.ran += 1
            try:
                if "error" in fault:
                    raise RuntimeError(fault["error"])
                self.results[job] = answer(envelope, blob, models)
            except Exception as error:  # noqa: BLE001  whatever it is, the client must hear of it
                said = f"{traceback.format_exc()}\n{error}"
                self.post(job, "ERROR", session, description=said)
            else:
                self.post(job, "COMPLETED", session, data=f"{host}/result/{job}")


DESK = Desk()


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *said):
        """Say nothing: the tests read no log."""

    def reply(self, body, status=200, kind="application/json", kept=None, kept_open=False):
        """Send an answer, or the first ``kept`` bytes of it, and then close."""
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        if not kept_open:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body[:kept])
        self.close_connection = True  # with ``kept_open`` the client does not know

    def failed(self, fault, body=b""):
        """Whether a fault was carried out."""
        if "status" in fault:
            detail, open_ = {"detail": fault.get("detail", "")}, fault.get("kept_open", False)
            self.reply(detail, fault["status"], kept_open=open_)
        elif "silent" in fault:
            time.sleep(fault["silent"])
            self.close_connection = True
        elif fault.get("garbage"):
            self.reply(b"<html>no answer of nnsight's</html>", kind="text/html")
        elif fault.get("cut"):
            self.reply(body or b"{}" * 100, kept=max(len(body) // 2, 1))
        elif fault.get("drop"):
            self.close_connection = True
        else:
            return False
        return True

    def do_POST(self):
        given = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/tell":
            told = json.loads(given)
            DESK.told = [Fault(one) for one in told or ()]
            if told is not False:
                DESK.asked, DESK.ran, DESK.requests = {}, 0, []
            return self.reply({})
        if self.path == "/import":
            try:
                __import__(json.loads(given))
            except ImportError as error:
                return self.reply({"error": str(error)})
            return self.reply({})
        fault = DESK.fault("request")
        if self.failed(fault):
            return None
        if self.headers.get("ndif-api-key") != KEY:
            said = "Missing or invalid API key. Please visit https://login.ndif.us/ to create one."
            return self.reply({"detail": said}, 401)
        own, wanted = self.headers.get("nnsight-version"), fault.get("wants")
        if wanted not in (None, own):
            said = f"Client nnsight version {own} is incompatible with the server nnsight version. "
            said += f"The minimum supported version is {wanted}."
            return self.reply({"detail": said}, 400)
        envelope, blob = self.form(given)
        job = f"job-{len(DESK.statuses) + len(DESK.requests)}-{time.time_ns()}"
        seen = {"headers": dict(self.headers), "sent": len(given), "blob": len(blob), "job": job}
        DESK.requests.append(json.loads(envelope.model_dump_json()) | seen)
        session = envelope.session_id
        said = "Your job has been received and is waiting to be queued."
        got = DESK.post(job, "RECEIVED", session, description=said)
        DESK.queue.put((job, envelope, blob))
        if fault.get("lost"):
            self.close_connection = True
            return None
        return self.reply(got.model_dump_json().encode())

    def form(self, given):
        """The envelope and the payload of a multipart form."""
        kind = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
        parts = {
            part.get_param("name", header="content-disposition"): part.get_payload(decode=True)
            for part in email.message_from_bytes(kind + given).get_payload()
        }
        return RequestModel.model_validate_json(parts["data"]), parts["blob"]

    def do_GET(self):
        _, what, *rest = self.path.split("/")
        if what == "seen":
            sizes = {job: len(made) for job, made in DESK.results.items()}
            seen = {"requests": DESK.requests, "ran": DESK.ran, "asked": DESK.asked}
            return self.reply(seen | {"results": sizes})
        if what == "subscribe":
            return self.subscribe()
        fault = DESK.fault(what)
        if what == "response" and rest[0] in DESK.statuses:
            body, kind = DESK.statuses[rest[0]].model_dump_json().encode(), "application/json"
        elif what == "result" and rest[0] in DESK.results:
            body, kind = DESK.results[rest[0]], "application/octet-stream"
        else:
            return self.reply({"detail": "Not Found"}, 404)
        return None if self.failed(fault, body) else self.reply(body, kind=kind)

    def subscribe(self):
        """Speak as a websocket: the session's id, then every status of its job."""
        digest = self.headers["Sec-WebSocket-Key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        accept = base64.b64encode(hashlib.sha1(digest.encode()).digest()).decode()
        self.send_response(101)
        self.send_header("Upgrade", "websocket")
        self.send_header("Connection", "Upgrade")
        self.send_header("Sec-WebSocket-Accept", accept)
        self.end_headers()
        self.close_connection = True
        fault = DESK.fault("socket")
        session, own = f"session-{time.time_ns()}", queue.Queue()
        DESK.sockets[session] = own
        self.frame(json.dumps({"session_id": session}))
        while not fault.get("drop"):
            response = own.get()
            self.frame(response.model_dump_json())
            if response.status in ("COMPLETED", "ERROR"):
                break

    def frame(self, text):
        """Send one text frame, whole and unmasked."""
        data, size = text.encode(), len(text.encode())
        head = (
            struct.pack("!BB", 0x81, size) if size < 126 else struct.pack("!BBH", 0x81, 126, size)
        )
        self.wfile.write(head + data)
        self.wfile.flush()


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        """A client that goes away is no event."""


def main():
    # Functions that are rebuilt from their source get the builtins that this module sees.
    vars(serialization)["__builtins__"] = restricted_builtins()
    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    # The tests hold the other end of standard input: when they are gone, so is the server.
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    print(server.server_port, flush=True)
    DESK.work(f"http://127.0.0.1:{server.server_port}")


if __name__ == "__main__":
    main()
