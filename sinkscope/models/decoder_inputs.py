"""What enters the decoder: the keyword arguments with which a model calls it, by row.

The vision tower, the projector and whatever the model does to place images and positions run in the
model's own code; they are stopped where the decoder begins. Image features can be handed in, so that
the vision tower runs once for any number of questions about an image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sinkscope.errors import InputError, ModelError
from sinkscope.models.lending import lent, undisturbed

if TYPE_CHECKING:
    from sinkscope.models.lvlm import LVLM

Given = dict[str, Any]
PLAIN = (type(None), bool, int, float, str)
DROPPED = ("past_key_values", "use_cache", "cache_position", "return_dict")
EXTENDED = {"attention_mask": 1, "token_type_ids": 0, "mm_token_type_ids": 0}
"""Inputs with one entry per position, and what a text token after the prompt has there."""


class _Reached(Exception):  # noqa: N818  it ends a pass; nothing went wrong
    """Leaves a model's forward pass where its decoder begins."""

    def __init__(self, given: Given) -> None:
        self.given = given


def decoder_inputs(
    lvlm: LVLM, inputs: Mapping[str, Any], features: Any = None
) -> tuple[Given, Any]:
    """The decoder's keyword arguments for a batch, after vision tower and projector.

    Args:
        lvlm: The model.
        inputs: What the model is called with (``sample.inputs``).
        features: What `decoder_inputs` gave for other text and the same images in the same order:
            then the vision tower does not run. None runs it.

    Returns:
        The arguments, ``inputs_embeds`` among them, and the image features; these are None if the
        model has no ``get_image_features``.

    Raises:
        ModelError: If the decoder is called with something that cannot be cut into rows.
    """
    module: Any = lvlm.module
    device = lvlm.device
    placed = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}

    def stop(decoder: Any, args: tuple, given: Given) -> None:
        if args:
            raise ModelError(
                f"{type(decoder).__name__} was called with {len(args)} positional arguments; "
                "expected keywords only. Please report this class."
            )
        raise _Reached(given)

    seen: list[Any] = []
    hook = module.get_decoder().register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with undisturbed(module), _image_features(module.base_model, features, seen):
            module.base_model(**placed, use_cache=False)
    except _Reached as reached:
        return checked(reached.given), seen[-1] if seen else features
    finally:
        hook.remove()
    raise ModelError(
        f"{type(module).__name__} did not call its decoder; expected one call per pass. Please report "
        "this class."
    )


def _image_features(base: Any, known: Any, seen: list[Any]) -> AbstractContextManager[None]:
    """Answer the model's own call for image features with known ones, or keep what it computes."""
    compute = getattr(base, "get_image_features", None)
    if compute is None:
        return nullcontext()

    def answer(*args: Any, **options: Any) -> Any:
        seen.append(compute(*args, **options) if known is None else known)
        return seen[-1]

    return lent([(base, {"get_image_features": answer})])


def checked(given: Mapping[str, Any]) -> Given:
    """The arguments without those of the cache.

    Raises:
        ModelError: If there is one whose rows are unknown.
    """
    out = {k: v for k, v in given.items() if k not in DROPPED and v is not None}
    known = ("inputs_embeds", "attention_mask", "position_ids")
    strange = [k for k, v in out.items() if k not in known and not isinstance(v, PLAIN)]
    if strange or not isinstance(out.get("inputs_embeds"), Tensor):
        raise ModelError(
            f"The decoder is called with {sorted(out)}; expected inputs_embeds, attention_mask, "
            f"position_ids and plain options; cannot cut {strange} into rows. Please report this class."
        )
    return out


def rows_of(given: Mapping[str, Any], rows: Tensor) -> Given:
    """The arguments for a choice of rows, with repeats.

    Args:
        given: The decoder's arguments.
        rows: Int ``[row]``: which row of the batch each new row is.
    """
    n = given["inputs_embeds"].shape[0]
    return {name: _pick(name, value, rows, n) for name, value in given.items()}


def _pick(name: str, value: Any, rows: Tensor, n: int) -> Any:
    """One argument for a choice of rows; what all rows share stays."""
    if isinstance(value, Mapping):
        return {key: _pick(name, part, rows, n) for key, part in value.items()}
    if not isinstance(value, Tensor):
        return value
    axis = 1 if name == "position_ids" and value.ndim == 3 else 0
    if value.shape[axis] == 1 < n:
        return value
    return value.index_select(axis, rows.to(value.device))


def extend(inputs: Mapping[str, Any], continuation: Sequence[int]) -> Given:
    """Inputs of one row with text tokens after the prompt, for teacher forcing.

    Args:
        inputs: Processor output of one row without padding at its end.
        continuation: Token ids; none leaves the inputs as they are.

    Raises:
        InputError: If there are several rows, or an input whose entry for a text token is unknown.
    """
    ids = inputs["input_ids"]
    if ids.shape[0] != 1:
        raise InputError(
            f"Got {ids.shape[0]} rows; expected one. Prepare the questions one by one."
        )
    out, n = dict(inputs), len(continuation)
    for name, value in inputs.items():
        if not isinstance(value, Tensor) or value.shape != ids.shape:
            continue
        if name == "input_ids":
            new = torch.tensor([list(continuation)], dtype=value.dtype).reshape(1, n)
        elif name in EXTENDED:
            new = torch.full((1, n), EXTENDED[name], dtype=value.dtype)
        else:
            raise InputError(
                f"Got the input {name!r} with one entry per position; expected input_ids and "
                f"{sorted(EXTENDED)}: what an answer's tokens have there is not known."
            )
        out[name] = torch.cat([value, new.to(value.device)], dim=1)
    return out
