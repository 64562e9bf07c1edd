"""Load a model and its processor by name, and tell by sizes and digests which model one is."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoProcessor, ProcessorMixin, Qwen2_5_VLProcessor
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from sinkscope.anatomy.towers import Anatomy
from sinkscope.anatomy.weights import fetched
from sinkscope.checks import among, check_flags
from sinkscope.errors import CheckpointError
from sinkscope.models.inputs import layout_of
from sinkscope.models.wrapping import check_remote, wrap_remote

IMAGE_TEXT = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
# What transformers, the hub client, safetensors and the JSON reader raise on files that are missing,
# cut off, of another model, or ask for a package that is not there.
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError)
UNREADABLE += (SafetensorError, StrictDataclassError)


def open_checkpoint(
    name: Any, options: dict[str, Any], remote: Any = False
) -> tuple[Any, Any, Any]:
    """Load a model and its processor; for remote runs the architecture, and nnsight's model of it."""
    if not isinstance(name, (str, Path)):
        got = f"Got a checkpoint of type {type(name).__name__}; expected a repository id or folder"
        raise CheckpointError(f"{got}. For a model you hold write ss.LVLM(model, processor).")
    folder = Path(name).expanduser()
    where = str(folder if folder.is_dir() else name)
    if check_remote(remote) in (False, "local"):
        return *load(where, options), None
    load_config(where, options)
    if options["quantization_config"] is not None:
        got = "Got a quantization_config for a model without weights here; expected none"
        raise CheckpointError(f"{got}: it is loaded elsewhere. Leave it out, or remote.")
    processor = read_processor(where, options)
    rest = {k: options[k] for k in ("revision", "attn_implementation") if options[k]}
    rest["trust_remote_code"] = options["trust_remote_code"]
    with _explained(repr(where)):
        wrapped: Any = wrap_remote(where, processor, **rest)
    with suppress(OSError):  # a repository need not have one
        wrapped._module.generation_config = transformers.GenerationConfig.from_pretrained(
            where, revision=options["revision"] or "main"
        )
    return wrapped._module, wrapped.processor, wrapped


def again(kind: Any, name: str | Path, **options: Any) -> Callable[[], Any]:
    """A function that loads the same once more, in whatever folder; it can be pickled."""
    folder = Path(name).expanduser()
    where = folder.resolve() if folder.is_dir() else name
    return partial(kind.from_pretrained, where, **options)


def load(name: str, options: dict[str, Any]) -> tuple[nn.Module, Any]:
    """A model with weights, in evaluation mode, and its processor."""
    config = load_config(name, options)
    kind = "AutoModelForImageTextToText" if sees(config) else "AutoModelForCausalLM"
    loader: Any = getattr(transformers, kind)
    rest = {k: v for k, v in options.items() if v is not None}
    rest |= {"config": config, "output_loading_info": True}
    processor = read_processor(name, options, images=sees(config))
    with _explained(repr(name)):
        model, info = loader.from_pretrained(name, **rest)
    if missing := sorted(key for key in info.get("missing_keys", ()) if "rotary" not in key):
        got = f"{name!r} lacks {len(missing)} weights, such as {missing[:3]}; expected all"
        write = "download it again, or write the config that belongs to these weights"
        raise CheckpointError(f"{got}. They would be random: {write}.")
    return model.eval(), processor


def load_config(name: str, options: dict[str, Any]) -> Any:
    """The config of a folder or repository; CheckpointError if there is none."""
    check_options(options)
    path = Path(name).expanduser()
    if path.is_dir() and not (path / "config.json").is_file():
        got = f"The folder {name!r} holds no config.json"
        raise CheckpointError(f"{got}; expected a checkpoint written by save_pretrained().")
    if not path.is_dir() and (path.is_absolute() or name.startswith((".", "~")) or path.is_file()):
        got = f"Got {name!r}, which is no folder; expected the folder that save_pretrained() wrote,"
        raise CheckpointError(f"{got} or a repository id such as 'llava-hf/llava-1.5-7b-hf'.")
    with _explained(repr(name)):
        return AutoConfig.from_pretrained(name, **_source(options))


def sees(config: Any) -> bool:
    """Whether a config is of a model that reads images."""
    own = getattr(config, "auto_map", None) or {}
    return config.model_type in IMAGE_TEXT or "AutoModelForImageTextToText" in own


def _source(options: Mapping[str, Any]) -> dict[str, Any]:
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
    named = among(dtype, (None, "auto")) or isinstance(dtype, torch.dtype)
    if not named and not isinstance(getattr(torch, str(dtype), None), torch.dtype):
        known = "'auto', a torch dtype, or its name such as 'bfloat16'"
        raise CheckpointError(f"Got dtype={dtype!r}; expected {known}.")


def read_processor(name: str, options: dict[str, Any], *, images: bool = True) -> Any:
    """The processor, with a tokenizer and, if the model reads ``images``, an image processor."""
    if not images:
        with _explained(f"The tokenizer of {name!r}"):
            return transformers.AutoTokenizer.from_pretrained(name, **_source(options))
    files = "processor_config.json or preprocessor_config.json, and tokenizer files"
    with _explained(f"The processor of {name!r}", f"expected {files}, beside the weights."):
        made, parts = load_processor(name, **_source(options)), ("tokenizer", "image_processor")
        if lacks := [part for part in parts if not hasattr(made, part)]:
            raise ValueError(f"it is a {type(made).__name__} without {lacks}")
    return made


@contextmanager
def _explained(what: str, hint: str = "") -> Iterator[None]:
    """One error for every way a checkpoint can fail to load, with what helps in each."""
    folder = "expected a hub repository you may read, or a folder written by save_pretrained()."
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except UNREADABLE as error:
        if "trust_remote_code" in str(error):
            hint = "it holds its own code; expected a model of transformers itself. If you trust "
            hint += "that code and have read it, write trust_remote_code=True."
        elif isinstance(error, SafetensorError):
            hint = "expected whole weight files: this one is damaged or cut off. Download it again."
        elif isinstance(error, ImportError):
            hint = "expected that package: install it, or choose another attn_implementation or "
            hint += "quantization_config."
        first = str(error).strip().partition("\n")[0][:200]
        got = f"{what} could not be loaded ({type(error).__name__}: {first})"
        raise CheckpointError(f"{got}; {hint or folder}") from error


class ImageQwen2_5_VLProcessor(Qwen2_5_VLProcessor):  # noqa: N801  as transformers writes it
    """``Qwen2_5_VLProcessor`` without its video slot, for machines without torchvision.

    The tokenizer has an ``image_token`` and a ``video_token``. What is saved loads with
    ``AutoProcessor`` where torchvision is installed, and elsewhere with `load_processor`.
    """

    def __init__(
        self, image_processor: Any, tokenizer: Any, chat_template: str | None = None
    ) -> None:
        for name in ("image_token", "video_token", "image_token_id", "video_token_id"):
            setattr(self, name, getattr(tokenizer, name))
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    def validate_inputs(  # type: ignore[override]
        self, images: Any = None, text: Any = None, videos: Any = None, **kwargs: Any
    ) -> None:
        """Raise ``ValueError`` for videos, then check as the parent does."""
        if videos is not None:
            got = "this processor takes images and text, but videos came; pass images=..., or"
            raise ValueError(f"{got} build transformers' Qwen2_5_VLProcessor with torchvision")
        super().validate_inputs(images=images, text=text, videos=None, **kwargs)

    def to_dict(self) -> dict[str, object]:
        """Settings as the parent class would save them, its default video settings included."""
        video: dict[str, Any] = {"video_processor_type": "Qwen2VLVideoProcessor"}
        for name in ("patch_size", "merge_size", "temporal_patch_size"):
            video[name] = getattr(self.image_processor, name)
        own = {"processor_class": Qwen2_5_VLProcessor.__name__, "video_processor": video}
        return super().to_dict() | own


def load_processor(
    name: str | os.PathLike[str], *, revision: str | None = None, trust_remote_code: bool = False
) -> ProcessorMixin:
    """What ``AutoProcessor`` gives, or without torchvision the family's processor without videos.

    ImportError if a package is missing and the family has no processor without it.
    """
    where, trust = str(name), trust_remote_code is True
    try:
        return AutoProcessor.from_pretrained(where, revision=revision, trust_remote_code=trust)
    except ImportError:
        config = AutoConfig.from_pretrained(where, revision=revision, trust_remote_code=False)
        if config.model_type != "qwen2_5_vl":
            raise
    return ImageQwen2_5_VLProcessor.from_pretrained(where, revision=revision or "main")


def sizes_of(anatomy: Anatomy) -> dict[str, Any]:
    """What a gate must agree with, by name: type and sizes of both towers, whatever checkpoint."""
    vision, language = anatomy.vision, anatomy.language
    sizes: dict[str, Any] = {"model_type": anatomy.model_type}
    sizes |= {"vision_layers": vision.n_layers, "vision_width": vision.d_model}
    sizes |= {"feed_layers": list(anatomy.reaching), "tokens_merged": anatomy.merge}
    sizes |= {"language_layers": language.n_layers, "language_width": language.d_model}
    heads = {"heads": language.heads, "kv_heads": language.kv_heads, "head_dim": language.d_head}
    return sizes | heads


def identity_of(lvlm: Any) -> dict[str, Any]:
    """What must agree for two runs to be runs of one model, as plain values; takes an `LVLM`.

    The digest of how inputs are prepared takes the image processor's settings, and token ids and shapes
    of a fixed question about a fixed image; no pixels, whose last bits may differ between machines. A model
    that is not here (``remote=True``) is known by its name.
    """
    anatomy, processor, prepared = lvlm.anatomy, lvlm.processor, None
    if processor is not None:
        images = getattr(processor, "image_processor", None)
        asked = "What is it, and how many are there: 0, 1 or 23?"
        sample = lvlm.prepare(images=Image.new("RGB", (112, 90), (200, 120, 40)), text=asked)
        tensors = {name: x for name, x in sample.inputs.items() if isinstance(x, Tensor)}
        settings = None if images is None else images.to_dict()
        parts = {
            "classes": [type(x).__name__ for x in (processor, images, lvlm.tokenizer)],
            # a remote run puts a name of nnsight's beside the settings
            "images": settings and {k: v for k, v in settings.items() if k[0] != "_"},
            "ids": sample.tokens.ids.tolist(),
            "shapes": {name: [list(x.shape), str(x.dtype)] for name, x in tensors.items()},
        }
        text = json.dumps(parts, sort_keys=True, default=lambda value: type(value).__name__)
        prepared = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    return {
        "class": type(lvlm.module).__name__,
        "layout": [list(x) if isinstance(x, tuple) else x for x in layout_of(anatomy)],
        "kernels": [anatomy.vision.kernel, anatomy.language.kernel],
        "weights": told_weights(lvlm) if is_away(lvlm) else weights_digest(lvlm.module),
        "preparation": prepared,
    }


def is_away(lvlm: Any) -> bool:
    """Whether the weights of an `LVLM` are on a server only."""
    return lvlm.device.type == "meta"


def told_weights(lvlm: Any) -> str:
    """The repository whose weights a server holds, and the commit that its config was read at."""
    return f"{lvlm.name}@{getattr(lvlm.module.config, '_commit_hash', None) or 'unknown commit'}"


@torch.no_grad()
def weights_digest(module: nn.Module) -> str:
    """Take a digest of names, shapes, dtypes and a few values of all parameters and buffers.

    32 hexadecimal digits, by which checkpoints differ; no proof against a change of single weights.
    """
    digest = hashlib.blake2b(digest_size=16)
    tensors = [*module.named_parameters(), *module.named_buffers()]
    for name, tensor in sorted(tensors, key=lambda pair: pair[0]):
        four_bit = getattr(tensor, "quant_state", None)  # these are packed anew at the first pass
        shape = tuple(tensor.shape if four_bit is None else four_bit.shape)
        digest.update(f"{name} {shape} {tensor.dtype}".encode())
        owner, _, leaf = name.rpartition(".")
        part = module.get_submodule(owner)
        with fetched(part):
            whole = [] if four_bit is not None else _made_of(getattr(part, leaf).detach())
        for flat in (one.reshape(-1) for one in whole):
            if count := flat.numel():  # up to 32 values, evenly spaced
                at = torch.linspace(0, count - 1, min(32, count), dtype=torch.float64)
                values = flat[at.round().long().to(flat.device)].cpu().double()  # MPS has no fp64
                digest.update(values.numpy().tobytes())
    return digest.hexdigest()


def _made_of(value: Any) -> list[Tensor]:
    """The plain tensors that a tensor is made of: itself, or those of a quantised one."""
    if not hasattr(value, "__tensor_flatten__"):
        return [value]
    return [one for name in value.__tensor_flatten__()[0] for one in _made_of(getattr(value, name))]
