"""A device that is not there: tensors that say they are on it, and note what would wait for it.

They lie in the host's memory. What a real device refuses (tensors of both sides in one operation) is
refused, and what makes the host wait is noted with the place in the package that asked for it: `Waits.read`
for values that come over, `Waits.sent` for blocking copies to the device.
"""

import sys
import threading
from collections import Counter
from contextlib import contextmanager, nullcontext
from unittest import mock

import torch
from torch import Tensor

DEVICE = torch.device("cuda", 0)
READS = {"item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "__array__"}
READS |= {"nonzero", "unique", "masked_select", "equal", "allclose", "__contains__", "bincount"}
MADE = ("arange", "zeros", "ones", "full", "empty", "tensor", "as_tensor", "linspace", "eye")
NOW = []


class Waits:
    """What would have waited, by place in the package."""

    def __init__(self):
        self.read, self.sent, self.thread = Counter(), Counter(), threading.get_ident()

    def note(self, which, name):
        frame = sys._getframe()
        while frame and "/sinkscope/" not in frame.f_code.co_filename.replace("\\", "/"):
            frame = frame.f_back
        if frame is None:
            place = "elsewhere"
        else:
            place = frame.f_code.co_filename.rpartition("/sinkscope/")[2] + f":{frame.f_lineno}"
        getattr(self, which)[f"{place} {name}"] += 1


def there(value):
    return isinstance(value, OnDevice)


def leaves(values):
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from leaves(value)
        elif isinstance(value, dict):
            yield from leaves(value.values())
        elif isinstance(value, Tensor):
            yield value


def wrapped(value, given):
    if isinstance(value, Tensor):
        same = [x for x in given if x is value]
        return same[0] if same else value.as_subclass(OnDevice)
    if isinstance(value, (list, tuple)):
        made = [wrapped(one, given) for one in value]
        return type(value)(made)
    return value


def is_mask(index):
    parts = index if isinstance(index, tuple) else (index,)
    return any(there(one) and one.dtype in (torch.bool, torch.uint8) for one in parts)


class OnDevice(Tensor):
    """A tensor that says it is on the device."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name, given = getattr(func, "__name__", ""), list(leaves([*args, kwargs]))
        with torch._C.DisableTorchFunctionSubclass():
            if func == Tensor.device.__get__:
                return DEVICE
            if func == Tensor.is_cuda.__get__:
                return True
            if name == "_has_compatible_shallow_copy_type":
                return False
            if name == "__deepcopy__":
                new = (
                    args[0]
                    .detach()
                    .clone()
                    .as_subclass(OnDevice)
                    .requires_grad_(args[0].requires_grad)
                )
                new._is_param = getattr(args[0], "_is_param", False)
                return new
            if name == "__get__":
                return wrapped(func(*args, **kwargs), given)
            if name in ("to", "cpu", "cuda"):
                return moved(args[0], name, args[1:], kwargs)
            reads = name in READS or (name == "where" and len(args) == 1)
            if reads or (name in ("__getitem__", "__setitem__", "index_put_") and is_mask(args[1])):
                NOW[-1].note("read", name)
            here = [x for x in given if not there(x) and x.ndim]
            if name in ("__getitem__", "__setitem__"):
                for _ in here:
                    NOW[-1].note("sent", name)  # an index of the host, or values
            elif here and name not in (
                "copy_",
                "as_subclass",
                "__set__",
                "index_copy_",
                "result_type",
            ):
                kinds = [tuple(x.shape) for x in here]
                raise RuntimeError(f"{name}: got host tensors {kinds} beside those of the device")
            kwargs.pop("pin_memory", None)
            if kwargs.get("device") is not None and name.endswith("_like"):
                home = torch.device(kwargs.pop("device")).type == "cpu"
                made = func(*args, **kwargs).as_subclass(Tensor)
                return made if home else made.as_subclass(OnDevice)
            if isinstance(kwargs.get("device"), torch.device):
                kwargs["device"] = torch.device("cpu")
            return wrapped(func(*args, **kwargs), given)


def _clips(frame):
    """Whether that is in PyTorch's clipping, which asks tensors behind our back where they are."""
    while frame and not frame.f_code.co_filename.endswith("clip_grad.py"):
        frame = frame.f_back
    return frame is not None


REAL = Tensor.to


def moved(value, name, args, kwargs):
    """`Tensor.to` between host and device."""
    args, target = list(args), None
    if name == "to":
        for i, one in enumerate(args):
            if isinstance(one, Tensor):
                target = DEVICE if there(one) else torch.device("cpu")
                args[i] = one.as_subclass(Tensor)
            elif isinstance(one, (torch.device, str)):
                target, args[i] = torch.device(one), torch.device("cpu")
        if kwargs.get("device") is not None:
            target, kwargs["device"] = torch.device(kwargs["device"]), torch.device("cpu")
    else:
        target, args = (torch.device("cpu") if name == "cpu" else DEVICE), []
    target = target or (DEVICE if there(value) else torch.device("cpu"))
    with torch._C.DisableTorchFunctionSubclass():
        out = REAL(value, *args, **kwargs) if name == "to" else value
        if target.type == "cpu":
            if there(value) and _clips(sys._getframe()):
                return value
            if there(value):
                NOW[-1].note("read", "to")
            return out.as_subclass(Tensor)
        if not there(value) and not kwargs.get("non_blocking"):
            NOW[-1].note("sent", "to")
        return out if there(out) else out.as_subclass(OnDevice)


def _to(value, *args, **kwargs):
    return moved(value, "to", args, kwargs)


def _maker(real):
    def make(*args, device=None, **kwargs):
        if device is not None and torch.device(device).type == DEVICE.type:
            return real(*args, **kwargs).as_subclass(OnDevice)
        return real(*args, **kwargs) if device is None else real(*args, device=device, **kwargs)

    return make


def put(module):
    """Move a model there, in place."""
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None:
                new = value.detach().as_subclass(OnDevice).requires_grad_(value.requires_grad)
                new._is_param = True
                part._parameters[name] = new
        for name, value in part._buffers.items():
            if value is not None:
                part._buffers[name] = value.as_subclass(OnDevice)
    return module


class Stream:
    """What copies back without blocking wait for."""

    def synchronize(self):
        NOW[-1].note("read", "synchronize")


@contextmanager
def pretended():
    """The device, until the block ends; gives what would wait."""
    NOW.append(Waits())
    patches = [mock.patch.object(torch, n, _maker(getattr(torch, n))) for n in MADE]
    patches += [
        mock.patch.object(Tensor, "to", _to),
        mock.patch.object(torch.cuda, "device", nullcontext),
    ]
    patches += [mock.patch.object(Tensor, "pin_memory", lambda x: x)]
    patches += [mock.patch.object(torch.cuda, "current_stream", return_value=Stream())]
    for one in patches:
        one.start()
    try:
        yield NOW[-1]
    finally:
        for one in reversed(patches):
            one.stop()
        NOW.pop()
