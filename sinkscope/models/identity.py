"""Which model this is: what it is made of, its layout and sizes, and digests that are cheap to take."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import torch
from accelerate.utils import align_module_device
from PIL import Image
from torch import Tensor, nn

from sinkscope.anatomy.attention_call import NoAttentionCall
from sinkscope.anatomy.block_sum import NoBranch
from sinkscope.anatomy.towers import Anatomy, TowerAnatomy

SAMPLES = 32  # values read of every tensor, evenly spaced


def layout_of(anatomy: Anatomy) -> tuple[Any, ...]:
    """What a sample must agree with: family, ids and sizes, whatever kernel and weights."""
    towers = ((tower.n_layers, tower.d_model) for tower in (anatomy.vision, anatomy.language))
    ids = (anatomy.image_token_id, anatomy.vocab, anatomy.drops, anatomy.merge)
    return (anatomy.model_type, *ids, *towers)


def sizes_of(anatomy: Anatomy) -> dict[str, Any]:
    """What a gate must agree with, by name: type and sizes of both towers, whatever checkpoint."""
    vision, language = anatomy.vision, anatomy.language
    return {
        "model_type": anatomy.model_type,
        "vision_layers": vision.n_layers,
        "vision_width": vision.d_model,
        "feed_layers": list(anatomy.feed_layers),
        "tokens_merged": anatomy.merge,
        "language_layers": language.n_layers,
        "language_width": language.d_model,
        "heads": language.heads,
        "kv_heads": language.kv_heads,
        "head_dim": language.d_head,
    }


def identity_of(lvlm: Any) -> dict[str, Any]:
    """What must agree for two runs to be runs of one model, as plain values; takes an `LVLM`."""
    anatomy = lvlm.anatomy
    return {
        "class": type(lvlm.module).__name__,
        "layout": [list(x) if isinstance(x, tuple) else x for x in layout_of(anatomy)],
        "kernels": [anatomy.vision.kernel, anatomy.language.kernel],
        "weights": weights_digest(lvlm.module),
        "preparation": preparation_digest(lvlm),
    }


@torch.no_grad()
def weights_digest(module: nn.Module) -> str:
    """Take a digest of names, shapes, dtypes and a few values of all parameters and buffers.

    32 hexadecimal digits, by which checkpoints differ; no proof against a change of single weights.
    """
    digest = hashlib.blake2b(digest_size=16)
    tensors = [*module.named_parameters(), *module.named_buffers()]
    for name, tensor in sorted(tensors, key=lambda pair: pair[0]):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        owner, _, leaf = name.rpartition(".")
        part = module.get_submodule(owner)
        with align_module_device(part):  # which fetches offloaded weights
            flat = getattr(part, leaf).detach().reshape(-1)
        if count := flat.numel():
            at = torch.linspace(0, count - 1, min(SAMPLES, count), dtype=torch.float64)
            values = flat[at.round().long().to(flat.device)].double().cpu()
            digest.update(values.numpy().tobytes())
    return digest.hexdigest()


def preparation_digest(lvlm: Any) -> str | None:
    """Take a digest of how images and questions become model inputs; None without a processor.

    It takes the image processor's settings, and the token ids and shapes of a fixed question about a
    fixed image; no pixels, whose last bits may differ between machines.
    """
    if (processor := lvlm.processor) is None:
        return None
    images = getattr(processor, "image_processor", None)
    asked = "What is it, and how many are there: 0, 1 or 23?"
    sample = lvlm.prepare(images=Image.new("RGB", (112, 90), (200, 120, 40)), text=asked)
    tensors = {name: value for name, value in sample.inputs.items() if isinstance(value, Tensor)}
    parts = {
        "classes": [type(x).__name__ for x in (processor, images, lvlm.tokenizer)],
        "images": None if images is None else images.to_dict(),
        "ids": sample.tokens.ids.tolist(),
        "shapes": {name: [list(x.shape), str(x.dtype)] for name, x in tensors.items()},
    }
    text = json.dumps(parts, sort_keys=True, default=lambda value: type(value).__name__)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def missing(things: Iterable[Any]) -> str:
    """Why a block's attention call or branches were not found, in a few words; "" if all were."""
    reasons = (it.reason for it in things if isinstance(it, (NoAttentionCall, NoBranch)))
    return next(reasons, "").partition(";")[0]


def facts_of(lvlm: Any) -> list[tuple[str, str]]:
    """What the model is made of."""
    a, module = lvlm.anatomy, lvlm.module
    count = sum(p.numel() for p in module.parameters())
    sizes = ((" B", 10**9), (" M", 10**6), (" k", 10**3), ("", 1))
    unit, size = next((pair for pair in sizes if count >= pair[1]), ("", 1))
    dtype = str(module.dtype).removeprefix("torch.")
    feeds = ", ".join(map(str, a.feeds)) + ", CLS dropped" * bool(a.drops)
    merged = f"{a.merge} x {a.merge} patches" if a.merge > 1 else "one patch"
    patch = getattr(getattr(module.config, "vision_config", None), "patch_size", "?")
    prefix = " and ".join(kind.upper() for kind in a.family.prefix(module.config))
    first = f"{prefix} first" if prefix else "no CLS"
    return [
        ("model", f"{type(module).__name__}, family {a.family.name}, model_type {a.model_type}"),
        ("parameters", f"{count / size:.3g}{unit}, {dtype} on {lvlm.device}"),
        ("vision", f"{_size_of(a.vision)}, patches of {patch} pixels, {first}"),
        ("vision attention", _attention_of(a.vision)),
        ("projector", f"{a.projector}, reads vision block {feeds}"),
        ("merge", f"{merged} to one language token"),
        ("language", f"{_size_of(a.language)}, {a.vocab} token ids"),
        ("language attention", _attention_of(a.language)),
        ("image token", f"id {a.image_token_id}"),
        ("head", f"{a.head}, after {a.final_norm}"),
    ]


def _size_of(tower: TowerAnatomy) -> str:
    """Blocks, width and heads."""
    shared = "" if tower.heads == tower.kv_heads else f" on {tower.kv_heads} key-value heads"
    blocks = f"{tower.n_layers} blocks of width {tower.d_model}"
    return f"{blocks}, {tower.heads} heads of {tower.d_head}{shared}"


def _attention_of(tower: TowerAnatomy) -> str:
    """Kernel, packing and windows."""
    if not tower.attending:
        return f"{tower.kernel}; {missing(tower.calls)}"
    words = {
        "all images packed into one sequence": tower.packed,
        "one call per window": any(getattr(c, "fires", "") == "per window" for c in tower.calls),
        "with a learned sink": tower.learned_sink,
    }
    return ", ".join([tower.kernel, *(word for word, holds in words.items() if holds)])
