"""What a training run is given, checked before any work."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from sinkscope.checks import check_whole
from sinkscope.errors import InputError, InterventionError, ModelError
from sinkscope.lsg.choosing import check_gates, check_layer
from sinkscope.lsg.gate import LSG

if TYPE_CHECKING:
    from sinkscope.models.lvlm import LVLM


def check_place(lvlm: LVLM, accelerator: Any) -> None:
    """Refuse a model that cannot be trained with here.

    Raises:
        ModelError: If its weights are not here, or on another device than the process works on.
    """
    if torch.is_inference_mode_enabled():
        raise ModelError(
            "Got torch.inference_mode(), in which nothing can be trained; expected to be outside of it. "
            "Leave that block; the model itself gets no gradient anyway."
        )
    if lvlm.device.type == "meta":
        raise ModelError(
            "Got a model without weights here; expected one to compute gradients with. Write "
            "ss.LVLM.from_pretrained(name) without remote=True."
        )
    if accelerator is None or accelerator.num_processes == 1:
        return
    here, there = lvlm.device, accelerator.device
    if here.type != there.type or (here.type != "cpu" and (here.index or 0) != (there.index or 0)):
        raise ModelError(
            f"Got a model on {here} in process {accelerator.process_index} of "
            f"{accelerator.num_processes}, whose device is {there}; expected it there. "
            "Write ss.LVLM.from_pretrained(name, device_map={'': accelerator.device})."
        )


def wanted_layers(lvlm: LVLM, layers: Any, gates: Any) -> list[int | str]:
    """The layers as a list; None is all of them.

    Raises:
        InputError: If they are one layer and no list.
    """
    if layers is None:
        return [] if gates else ["embed", *range(lvlm.anatomy.language.n_layers - 1)]
    if isinstance(layers, (int, str)):
        raise InputError(f"Got layers={layers!r}; expected a list. Write layers=[{layers!r}].")
    return [layer if isinstance(layer, str) else int(layer) for layer in layers]


def check_beside(gates: Any, *others: Any) -> None:
    """Refuse choices for gates that have made theirs.

    Raises:
        InputError: If there are any.
    """
    names = ("choices", "v_detector", "l_detector", "samples")
    given = [name for name, value in zip(names, others, strict=True) if value is not None]
    if gates and given:
        raise InputError(
            f"Got gates together with {given}; expected either: a gate brings its own groups and rules. "
            "Write layers=[...] for new gates."
        )


def check_wanted(lvlm: LVLM, layers: Any, gates: Any) -> None:
    """Check which gates to train.

    Raises:
        InputError: If there are none, both or one layer twice.
        LayerError: If there is no such layer.
        InterventionError: If a gate is none, or of another model.
    """
    if isinstance(gates, LSG):
        raise InputError("Got one gate; expected a list. Write gates=[gate].")
    if bool(layers) == bool(gates):
        raise InputError(
            f"Got layers={list(layers)} and {len(gates)} gates; expected either. Write layers=[10] "
            "for a new gate, or gates=[gate] to train on."
        )
    for layer in layers:
        check_layer(layer, lvlm.anatomy.language.n_layers)
    found = list(layers) or [gate.layer for gate in check_gates(gates)]
    if len(set(found)) != len(found):
        raise InputError(f"Got the layers {found}; expected every layer once.")
    for gate in gates:
        if not isinstance(gate, LSG):
            raise InterventionError(f"Got {gate!r} among the gates; expected LSG.")
        gate.check_fits(lvlm)


def check_numbers(patience: int, validation: float, checkpoint_every: Any) -> None:
    """Check what belongs together.

    Raises:
        InputError: If early stopping is wanted without validation, or checkpoints never.
    """
    if patience and not validation:
        raise InputError(
            f"Got patience={patience} and validation={validation}; expected some validation data to "
            "stop early by. Write validation=0.1, or patience=0."
        )
    check_whole(1, checkpoint_every=checkpoint_every)
