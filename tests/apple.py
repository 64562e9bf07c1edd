"""A stand-in for Apple's MPS on any machine: tensors that say they are there, with numbers of the CPU.

It refuses what MPS refuses: fp64, and tensors of two devices in one call. It knows nothing of MPS's own rounding.
"""

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

MPS = torch.device("mps")
MIXED = (
    "to",
    "copy_",
    "__getitem__",
    "__setitem__",
    "index_put_",
    "type_as",
)  # may see both devices
LACKS = ("linalg_eigh", "linalg_eigvalsh")


class OnMps(torch.Tensor):
    """A tensor of MPS."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return call(func, args, kwargs or {})


def call(func, args, kwargs):
    """Call a function of torch as if MPS were there; TypeError or RuntimeError where it would fail."""
    name = getattr(func, "__name__", "")
    with torch._C.DisableTorchFunctionSubclass():
        if func == torch.Tensor.device.__get__:
            return MPS if isinstance(args[0], OnMps) else func(*args)
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        there = [isinstance(x, OnMps) for x in tensors]
        if name in LACKS and any(there):
            raise NotImplementedError(f"The operator 'aten::_{name}' is not implemented for MPS")
        apart = any(x.ndim and not on for x, on in zip(tensors, there, strict=True))
        if any(there) and apart and name not in MIXED:
            raise RuntimeError(f"{name}: expected all tensors on one device, got mps:0 and cpu")
        asked = [x for x in (*args, kwargs.get("device")) if is_device(x)]
        place = torch.device(asked[0]).type if asked else "mps" if any(there) else "cpu"
        if name == "to" and len(there) > 1:
            place = "mps" if there[1] else "cpu"
        place = "cpu" if name == "cpu" else place
        args, kwargs = tree_map_only(torch.device, lambda x: torch.device("cpu"), (args, kwargs))
        kwargs = kwargs | ({"device": "cpu"} if asked and "device" in kwargs else {})
        out = func(*args, **kwargs)

    def placed(x):
        if place != "mps":
            return x.as_subclass(torch.Tensor) if isinstance(x, OnMps) else x
        if x.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64: MPS has no float64")
        return x if isinstance(x, OnMps) else x.as_subclass(OnMps)

    return tree_map_only(torch.Tensor, placed, out)


def is_device(x):
    """Whether an argument names a device."""
    return isinstance(x, torch.device) or (isinstance(x, str) and x in ("mps", "cpu"))


class Apple(TorchFunctionMode):
    """Functions that name MPS as their device find it."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return call(func, args, kwargs or {})


def to_mps(module):
    """A module whose parameters and buffers are on MPS, in place."""
    for part in module.modules():
        for kept in (part._parameters, part._buffers):
            kept.update(
                {n: x.detach().as_subclass(OnMps) for n, x in kept.items() if x is not None}
            )
    return module
