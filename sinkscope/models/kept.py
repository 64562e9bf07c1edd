"""What is known of a model: measured on a first sample, proven, and kept in a file for every structure."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from PIL import Image
from torch import nn

from sinkscope.anatomy.discovery import read_anatomy
from sinkscope.anatomy.families import HINTS
from sinkscope.anatomy.towers import MEASURED, BlockProof, HeadProof
from sinkscope.errors import CheckpointError
from sinkscope.files import cache_folder, read_json, seal, unseal, version_of, write_whole
from sinkscope.models.inputs import Sample, reads_words_only
from sinkscope.models.patch_map import PatchMaps
from sinkscope.models.proofs import verify_anatomy
from sinkscope.models.stand_ins import made_inputs, stand_in
from sinkscope.models.wrapping import Parts

OFF = "SINKSCOPE_KEEP_ANATOMY"
"""The environment variable that is ``"0"`` where nothing is to be kept."""
VERSIONS = ("torch", "transformers", "nnsight")
REMEMBERED: WeakKeyDictionary[nn.Module, tuple[str, dict[str, Any]]] = WeakKeyDictionary()
"""What was measured of a module in this process, with the digest of what it was then; no module is held."""
ROOMS = ("anatomy", "kernels", "models")


def begin(lvlm: Any) -> None:
    """Measure and prove the anatomy of an `LVLM`, unless that was done for its structure, or refused."""
    lvlm._asked, here = False, lvlm.device.type != "meta"
    lvlm._unproven = lvlm._verify is not False and here
    if lvlm._verify is None and here and recall(lvlm):
        lvlm._asked, lvlm._unproven, lvlm.verified = True, False, True
    elif lvlm._verify is not False and (sample := first_sample(lvlm)) is not None:
        prove(lvlm, sample)


def follow(lvlm: Any) -> None:
    """Read the anatomy anew if a part of the model was swapped since, as by LoRA or int8."""
    here = lvlm._places.here
    if here.parts.same:
        return
    before, here.parts = here.parts.names, Parts(lvlm.module)
    if here.parts.names != before:
        lvlm._anatomy = read_anatomy(lvlm.module)
        lvlm._maps, lvlm._proofs = PatchMaps(lvlm.module, stand_in), ({}, None)
        begin(lvlm)


def prove(lvlm: Any, sample: Sample) -> None:
    """Prove the anatomy, if that was asked for and no sample before this one could do it."""
    if lvlm._unproven:
        lvlm._unproven = False
        lvlm._proofs = verify_anatomy(lvlm, sample)
        lvlm._anatomy = lvlm._anatomy.proven(*lvlm._proofs)
        lvlm.verified = True
        if lvlm._anatomy.measured and lvlm._verify is None:
            keep(lvlm)


def first_sample(lvlm: Any) -> Sample | None:
    """A picture of noise and a word, with which the anatomy is measured; None if none can be made."""
    if lvlm._asked:
        return None
    lvlm._asked = True
    digest = digest_of_structure(lvlm.module)
    before, known = REMEMBERED.get(lvlm.module, ("", {}))
    if lvlm._verify is False and before == digest:  # by another LVLM, or a gate that was attached
        lvlm._anatomy = lvlm._anatomy.measuring(known["measured"])
        lvlm._maps = replace(lvlm._maps, **known["maps"])
        return None
    sample = _made_sample(lvlm)
    if lvlm._anatomy.measured:
        maps = {name: getattr(lvlm._maps, name) for name in ("tuples", "known", "shifting")}
        REMEMBERED[lvlm.module] = digest, {"measured": _measured(lvlm), "maps": maps}
    return sample


def _made_sample(lvlm: Any) -> Sample | None:
    if lvlm.processor is not None and reads_words_only(lvlm.module):
        return lvlm.prepare(text="a few words of no meaning")
    if lvlm.processor is not None and lvlm._anatomy.vision.blocks:
        noise = torch.randint(0, 256, (64, 64, 3), generator=torch.Generator().manual_seed(0))
        image = Image.fromarray(noise.to(torch.uint8).numpy())  # no two of its patches are alike
        return lvlm.prepare(images=image, text="a")
    made = made_inputs(lvlm)
    return None if made is None else lvlm.prepare(inputs=made)


def recall(lvlm: Any) -> bool:
    """Take what was kept of a model of this structure into an `LVLM`; whether there was anything."""
    path = _file(lvlm)
    if os.environ.get(OFF) == "0" or not path.is_file():
        return False
    try:
        found = unseal(read_json(path, ""), path, "")
        towers = {name: tuple(_proof(one) for one in few) for name, few in found["proofs"].items()}
        proofs = towers, HeadProof(**found["head"])
        anatomy = lvlm._anatomy.measuring(found["measured"]).proven(*proofs)
        tuples = {name: bool(value) for name, value in found["tuples"].items()}
    except (CheckpointError, KeyError, TypeError, ValueError, AttributeError):
        return False  # damaged, or of another version: it is measured again, and written anew
    lvlm._anatomy, lvlm._proofs = anatomy, proofs
    lvlm._maps.tuples.update(tuples)
    lvlm._maps.shifting = bool(found["shifting"])
    return True


def keep(lvlm: Any) -> None:
    """Write what was measured of an `LVLM`, where there is a folder to write to."""
    if os.environ.get(OFF) == "0":
        return
    towers, head = lvlm._proofs
    proofs = {name: [asdict(one) for one in few] for name, few in towers.items()}
    path = _file(lvlm)
    with suppress(OSError, CheckpointError):  # a read-only home: it is measured at the next load
        path.parent.mkdir(parents=True, exist_ok=True)
        data = {"measured": _measured(lvlm), "proofs": proofs, "head": asdict(head)}
        data |= {"tuples": lvlm._maps.tuples, "shifting": lvlm._maps.shifting}
        write_whole(path, json.dumps(seal(data)))


def _measured(lvlm: Any) -> dict[str, Any]:
    """What was measured of an anatomy, as plain data."""
    found = {name: getattr(lvlm._anatomy, name) for name in MEASURED}
    return found | {"packed": lvlm._anatomy.vision.packed}


def _proof(data: dict[str, Any]) -> BlockProof:
    sizes = data.pop("sizes")
    return BlockProof(**data, sizes=None if sizes is None else tuple(sizes))


def _file(lvlm: Any) -> Path:
    """Where a structure is kept: its digest is the name."""
    return cache_folder() / "anatomy" / f"{digest_of_structure(lvlm.module)}.json"


def digest_of_structure(module: nn.Module) -> str:
    """32 hexadecimal digits that differ where another anatomy may be measured."""
    text = "\n".join([*_versions(), *_structure(module), repr(sorted(HINTS.items()))])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@cache
def _versions() -> tuple[str, ...]:
    """Versions of the packages, and the source of what measures."""
    here = Path(__file__).parents[1]
    files = (file for room in ROOMS for file in sorted((here / room).glob("*.py")))
    own = hashlib.blake2b(b"".join(file.read_bytes() for file in files), digest_size=16)
    return (*(f"{name} {version_of(name)}" for name in VERSIONS), own.hexdigest())


def _structure(module: nn.Module) -> Iterator[str]:
    """The config, and of every part its class, hooks, kernel, and the shapes and types of its weights."""
    yield json.dumps(getattr(module, "config").to_dict(), sort_keys=True, default=str)  # noqa: B009
    for path, part in module.named_modules():
        hooks = [
            getattr(hook, "__qualname__", type(hook).__qualname__)
            for hook in (*part._forward_hooks.values(), *part._forward_pre_hooks.values())
            if not str(getattr(hook, "__module__", "")).startswith(
                "transformers."
            )  # made by a pass
        ]
        weights = [
            (name, type(x).__name__, tuple(x.shape), str(x.dtype), x.device.type)
            for few in (part._parameters, part._buffers)
            for name, x in few.items()
            if x is not None
        ]
        kernel = getattr(getattr(part, "config", None), "_attn_implementation", None)
        kind = f"{type(part).__module__}.{type(part).__qualname__}"
        yield repr((path, kind, "forward" in vars(part), hooks, kernel, weights))
