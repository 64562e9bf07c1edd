"""A stand-in for NDIF: torch, transformers and nnsight, and nothing of this project.

Run as a process of its own. Every line of standard input names a request file; the answer is the
name of a file with the saved values, or ``error`` and the reason. What a request imports is held to
what NDIF allows (`ndif.py`), at unpickling and while it runs. ``import x`` tries just that.
"""

import builtins
import importlib.abc
import json
import sys
import traceback

ABSENT = ("sinkscope", "tests", "examples", "jaxtyping", "beartype")


class NotInstalled(importlib.abc.MetaPathFinder):
    """Refuse to import what the server does not have."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r} on the server")


sys.meta_path.insert(0, NotInstalled())

import torch  # noqa: E402
import transformers  # noqa: E402
from ndif import ABSENT_BUILTINS, ALLOWED, ALLOWED_IN_PAYLOAD  # noqa: E402
from nnsight import TransformersModel  # noqa: E402
from nnsight.intervention import serialization  # noqa: E402
from nnsight.schema.request import RequestModel  # noqa: E402
from nnsight.tracing.backend import Backend  # noqa: E402

torch.set_num_threads(1)


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
        name = json.loads(model_key.partition(":")[2])["repo_id"]
        module = transformers.AutoModelForImageTextToText.from_pretrained(name)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        images = transformers.AutoImageProcessor.from_pretrained(name)
        parts = {"processor": tokenizer, "tokenizer": tokenizer, "image_processor": images}
        return TransformersModel(module, task="image-text-to-text", **parts)


def answer(path, models):
    """Run one request and return its saved values."""
    request = torch.load(path)
    envelope = RequestModel.model_validate_json(request["metadata"])
    if envelope.model_key not in models:
        models[envelope.model_key] = deploy(envelope.model_key)
    model = models[envelope.model_key]
    model._remoteable_set_env(envelope.env)
    persistent = model._remoteable_persistent_objects()
    tracer = RequestModel.deserialize(
        request["blob"], persistent, compress=envelope.compress, unpickler=Unpickler
    )
    frame = tracer.info.frame
    given = set(frame.f_locals)
    tracer.backend = Backend()
    tracer.__exit__(None, None, None)
    return {name: value for name, value in frame.f_locals.items() if name not in given}


def reply(text):
    sys.stdout.write(text.replace("\n", " ") + "\n")
    sys.stdout.flush()


def main():
    # Functions that are rebuilt from their source get the builtins that this module sees.
    vars(serialization)["__builtins__"] = restricted_builtins()
    models = {}
    reply("ready")
    for line in map(str.strip, sys.stdin):
        try:
            if line.startswith("import "):
                __import__(line.removeprefix("import "))
            else:
                torch.save(answer(line, models), line + ".out")
        except Exception as error:  # noqa: BLE001  whatever it is, the client must hear of it
            traceback.print_exc()
            reply(f"error {type(error).__name__}: {error}")
        else:
            reply(line + ".out")


if __name__ == "__main__":
    main()
