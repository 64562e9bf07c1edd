"""Devices that are not there, as many as asked for: ``lazy:0``, ``lazy:1``, ... .

A tensor on one of them holds its numbers in the host's memory, and torch dispatches every operation on it to
`ran`. That refuses what a GPU refuses: tensors of two devices, or of one and the host, in one operation. Numbers
without a dimension and indices of the host may stand beside those of a device. Graphs, views and factories
are torch's own. The type ``lazy`` has no kernels of its own in torch and needs no driver.
"""

import warnings
from contextlib import contextmanager
from unittest import mock

import torch
from accelerate import dispatch_model
from torch.utils._pytree import tree_leaves, tree_map

from sinkscope.anatomy.discovery import read_anatomy

A, B = torch.device("lazy", 0), torch.device("lazy", 1)
COPIES = ("aten::_to_copy", "aten::copy_", "aten::_copy_from")
INDICES = ("aten::index", "aten::_unsafe_index", "aten::index_put", "aten::index_put_")
INDICES += ("aten::_index_put_impl_",)


class There(torch.Tensor):
    """A tensor on a pretended device; ``raw`` has its numbers."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, data, requires_grad=False):
        return torch.nn.Parameter(data, requires_grad)

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        return ran(op, args, kwargs or {})

    def tolist(self):
        return self.raw.tolist()

    def untyped_storage(self):
        return self.raw.untyped_storage()

    def data_ptr(self):
        return self.raw.data_ptr()


def laid(raw, device):
    """A host's tensor, said to be on a device."""
    like = {"strides": raw.stride(), "storage_offset": raw.storage_offset(), "dtype": raw.dtype}
    made = torch.Tensor._make_wrapper_subclass(There, raw.shape, **like, device=device)
    made.raw = raw
    return made


def check_places(name, given):
    """RuntimeError where a GPU has one."""
    places = {x.device for x in given if x.ndim or isinstance(x, There)}
    if name in INDICES:
        places -= {torch.device("cpu")} if isinstance(given[0], There) else set()
    if name not in COPIES and len(places) > 1:
        found = sorted(map(str, places))
        raise RuntimeError(f"Expected all tensors to be on one device, found {found} in {name}")


def ran(op, args, kwargs):
    """An operation in the host's memory, with its results where a GPU would have them."""
    given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    check_places(op._schema.name, given)
    asked = kwargs.get("device")
    at = asked or next((x.device for x in given if isinstance(x, There)), None)
    if asked is not None:
        kwargs = {**kwargs, "device": asked if asked.type == "meta" else torch.device("cpu")}
    if "pin_memory" in kwargs:
        kwargs = {**kwargs, "pin_memory": False}
    own = {id(getattr(x, "raw", x)): x for x in given}

    def low(x):
        return x.raw if isinstance(x, There) else x

    def high(x):
        if id(x) in own:
            assert own[id(x)].shape == x.shape, f"{op} changes a shape in place"
            return own[id(x)]
        if not isinstance(x, torch.Tensor):
            return x
        return laid(x, at) if at is not None and at.type == "lazy" else x

    return tree_map(high, op(*tree_map(low, args), **tree_map(low, kwargs)))


def factory(real):
    """A function of torch that makes a tensor, for a pretended device."""

    def make(*given, device=None, layout=None, pin_memory=None, **named):
        return laid(real(*given, **named), device)

    return make


def _copy_from(source, target, non_blocking=False):
    getattr(target, "raw", target).copy_(getattr(source, "raw", source))
    return target


MADE = {"empty.memory_format": torch.empty, "empty_strided": torch.empty_strided}
MADE |= {f"arange{of}": torch.arange for of in ("", ".start", ".start_step")}
MADE |= {"eye": torch.eye, "eye.m": torch.eye}
LIBRARY = torch.library.Library("aten", "IMPL")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch has some of its own, for a backend that is not there
    for name, real in MADE.items():
        LIBRARY.impl(name, factory(real), "Lazy", allow_override=True)
    LIBRARY.impl("_copy_from", _copy_from, "Lazy", allow_override=True)
    LIBRARY.impl("_local_scalar_dense", lambda x: x.raw.item(), "Lazy", allow_override=True)


@contextmanager
def known():
    """Let torch answer what it knows of real devices only: whether autocast is on."""
    real = torch.is_autocast_enabled

    def enabled(*kind):
        return kind != ("lazy",) and real(*kind)

    with mock.patch.object(torch, "is_autocast_enabled", enabled):
        yield


def spread(module, language, vision, rest, head, projector, main=A, folder=None):
    """Dispatch a model with accelerate, as ``device_map`` does: blocks of a tower in turn over some devices.

    A place is a device, ``"cpu"`` or ``"disk"``; what is offloaded computes on ``main``. One place that is
    given for all holds the whole model.
    """
    found = read_anatomy(module)
    turns = ((found.language, language), (found.vision, vision))
    where = {at: one[i % len(one)] for tower, one in turns for i, at in enumerate(tower.blocks)}
    where |= {found.head: head, found.projector: projector}
    places = {path: str(place) for path, place in where.items() if path}
    for path, part in module.named_modules():
        own = part._parameters or part._buffers
        if own and not any(f"{path}.".startswith(f"{at}.") for at in places):
            places[path] = str(rest)
    if {*places.values()} == {str(rest)} and str(rest) not in ("cpu", "disk"):
        return module.to(rest)
    how = {"main_device": main, "offload_dir": folder, "force_hooks": True}
    return dispatch_model(module, places, skip_keys=module._skip_keys_device_placement, **how)
