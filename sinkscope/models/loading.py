"""Load a model and its processor by name, with errors that say what is wrong with a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig

from sinkscope.anatomy.families import family_of
from sinkscope.checks import check_flags
from sinkscope.errors import CheckpointError, ModelError
from sinkscope.models import processors
from sinkscope.models.wrapping import check_remote, wrap_remote

# What transformers, the hub client, safetensors and the JSON reader raise on files that are missing,
# cut off, of another model, or ask for a package that is not there.
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError)
UNREADABLE += (SafetensorError, StrictDataclassError)


def open_checkpoint(
    name: Any, options: dict[str, Any], remote: Any = False
) -> tuple[Any, Any, Any]:
    """Load a model and its processor; for remote runs the architecture, and nnsight's model of it."""
    if not isinstance(name, (str, Path)):
        raise CheckpointError(
            f"Got a checkpoint of type {type(name).__name__}; expected a repository id or a folder. "
            "For a model you already hold write ss.LVLM(model, processor)."
        )
    folder = Path(name).expanduser()
    where = str(folder if folder.is_dir() else name)
    if check_remote(remote) in (False, "local"):
        return *load(where, options), None
    wrapped = load_remote(where, options)
    return wrapped._module, wrapped.processor, wrapped


def load(name: str, options: dict[str, Any]) -> tuple[nn.Module, Any]:
    """A model with weights, in evaluation mode, and its processor."""
    loader: Any = AutoModelForImageTextToText
    rest = {k: v for k, v in options.items() if v is not None}
    rest |= {"config": load_config(name, options), "output_loading_info": True}
    processor = load_processor(name, options)
    with _explained(name):
        model, info = loader.from_pretrained(name, **rest)
    if missing := sorted(key for key in info.get("missing_keys", ()) if "rotary" not in key):
        raise CheckpointError(
            f"{name!r} lacks {len(missing)} weights, such as {missing[:3]}; expected all. They would be "
            "random: download it again, or write the config that belongs to these weights."
        )
    return model.eval(), processor


def load_remote(name: str, options: dict[str, Any]) -> Any:
    """The architecture without weights, for remote runs."""
    load_config(name, options)
    if options["quantization_config"] is not None:
        raise CheckpointError(
            "Got a quantization_config for a model without weights here; expected none: what runs "
            "elsewhere is loaded there. Leave it out, or leave out remote."
        )
    processor = load_processor(name, options)
    rest = {k: options[k] for k in ("revision", "attn_implementation") if options[k]}
    trust = options["trust_remote_code"]
    with _explained(name):
        wrapped: Any = wrap_remote(name, processor, trust_remote_code=trust, **rest)
    with suppress(OSError):  # a repository need not have one
        given = options["revision"] or "main"
        wrapped._module.generation_config = GenerationConfig.from_pretrained(name, revision=given)
    return wrapped


def load_config(name: str, options: dict[str, Any]) -> Any:
    """The config, checked to be of a vision-language model that sinkscope knows."""
    check_options(options)
    path = Path(name).expanduser()
    if path.is_dir() and not (path / "config.json").is_file():
        got = f"The folder {name!r} holds no config.json"
        raise CheckpointError(f"{got}; expected a checkpoint written by save_pretrained().")
    if not path.is_dir() and (path.is_absolute() or name.startswith((".", "~")) or path.is_file()):
        raise CheckpointError(
            f"Got {name!r}, which is no folder; expected the folder that save_pretrained() wrote, or "
            "a repository id such as 'llava-hf/llava-1.5-7b-hf'."
        )
    with _explained(name):
        config = AutoConfig.from_pretrained(name, **_source(options))
    if getattr(config, "vision_config", None) is None:
        raise ModelError(
            f"Got {name!r}, a {config.model_type!r} model without a vision tower; expected a "
            "vision-language model such as 'llava-hf/llava-1.5-7b-hf'."
        )
    family_of(config.model_type)
    return config


def _source(options: Mapping[str, Any]) -> dict[str, Any]:
    """Which revision, and whether its code may run."""
    trust = options.get("trust_remote_code", False)
    return {"revision": options.get("revision"), "trust_remote_code": trust}


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse options of another type, as a recipe or a command line may give them."""
    check_flags(trust_remote_code=options.get("trust_remote_code", False))
    for key, known in (("revision", str), ("attn_implementation", (str, dict))):
        value = options.get(key)
        if value is not None and not isinstance(value, known):
            write = f"Write {key}: '...' in quotes in a recipe."
            raise CheckpointError(f"Got {key}={value!r}; expected text. {write}")
    dtype = options.get("dtype")
    named = dtype in (None, "auto") or isinstance(dtype, torch.dtype)
    if not named and not isinstance(getattr(torch, str(dtype), None), torch.dtype):
        raise CheckpointError(
            f"Got dtype={dtype!r}; expected 'auto', a torch dtype, or its name such as 'bfloat16'."
        )


def load_processor(name: str, options: dict[str, Any]) -> Any:
    """The processor, with a tokenizer and an image processor."""
    files = "expected processor_config.json or preprocessor_config.json, and tokenizer files"
    what = f"The processor of {name!r}"
    try:
        processor: Any = processors.load_processor(name, **_source(options))
    except UNREADABLE as error:
        got = f"{what} could not be read ({_first_line(error)})"
        raise CheckpointError(f"{got}; {files}, beside the weights.") from error
    if lacks := [part for part in ("tokenizer", "image_processor") if not hasattr(processor, part)]:
        got = f"{what} is a {type(processor).__name__} without {lacks}"
        raise CheckpointError(f"{got}; {files}, beside the weights.")
    return processor


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """One error for every way a checkpoint can fail to load, with what helps in each."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except UNREADABLE as error:
        hint = "expected a hub repository you may read, or a folder written by save_pretrained()."
        if "trust_remote_code" in str(error):
            hint = (
                "it holds its own code; expected a model of transformers itself. If you have read "
            )
            hint += "and trust that code, write trust_remote_code=True."
        elif isinstance(error, SafetensorError):
            hint = "expected whole weight files: this one is damaged or cut off. Download it again."
        elif isinstance(error, ImportError):
            hint = "expected that package: install it, or choose another attn_implementation or "
            hint += "quantization_config."
        got = f"{name!r} could not be loaded ({_first_line(error)})"
        raise CheckpointError(f"{got}; {hint}") from error


def _first_line(error: Exception) -> str:
    """The type of an error and its first line, which is all a message has room for."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
