"""How a user holds a model: wrapped, compiled, offloaded, in which dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sinkscope.errors import ModelError


def check_unwrapped(model: Any) -> None:
    """Refuse what holds a model, and say where the model itself is.

    Raises:
        ModelError: If it is wrapped, or one of its parts is.
    """
    name, kind = type(model).__name__, type(model)
    if callable(getattr(kind, "get_base_model", None)):  # by peft
        if getattr(model.active_peft_config, "is_prompt_learning", False):
            raise ModelError(
                f"Got a {name} with an adapter that puts states of its own before the prompt; expected "
                "one that only changes weights, such as LoRA: sinkscope would not see those states."
            )
        raise ModelError(
            f"Got a {name}; expected the transformers model inside, whose adapters stay on. Write "
            "ss.LVLM(model.get_base_model(), processor)."
        )
    for inner in ("_orig_mod", "module", "model"):  # of torch.compile, DataParallel, pipelines
        found = getattr(model, inner, None)
        wraps = isinstance(found, nn.Module) and not hasattr(kind, "get_decoder")
        if wraps and (hasattr(found, "get_decoder") or hasattr(type(found), "get_base_model")):
            raise ModelError(
                f"Got a {name}; expected the transformers model inside, with the same weights. Write "
                f"ss.LVLM(model.{inner}, processor)."
            )
    for path, part in model.named_modules() if isinstance(model, nn.Module) else ():
        if "_orig_mod" in part._modules:
            raise ModelError(
                f"Got a model in which {path} is compiled ({type(part).__name__}); expected the part "
                "itself, whose blocks have a place. Write part.compile(), which compiles it in "
                "place, or put part._orig_mod back."
            )


def device_of(part: nn.Module) -> torch.device:
    """Where a part computes; offloaded weights lie elsewhere between two passes."""
    hook = getattr(part, "_hf_hook", None)
    for one in getattr(hook, "hooks", [hook]):
        device = getattr(one, "execution_device", None)
        if device is not None:
            return torch.device(device)
    return next(part.parameters()).device


def dtype_of(part: nn.Module) -> torch.dtype:
    """The dtype in which a part computes: that of its first weights that are no integers."""
    return next(p.dtype for p in part.parameters() if p.is_floating_point())
