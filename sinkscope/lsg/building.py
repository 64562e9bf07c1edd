"""What a gate is made with: its layer, its rules for sinks, and lists of gates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sinkscope.detectors.calibration import Limits
from sinkscope.detectors.choice import SinkRules
from sinkscope.detectors.kinds import check_kept
from sinkscope.detectors.rules import NoSinks
from sinkscope.errors import InputError, InterventionError, LayerError
from sinkscope.lsg.config import GateConfig, describe, differences, sketch
from sinkscope.models.identity import sizes_of

if TYPE_CHECKING:
    from sinkscope.anatomy.towers import Anatomy
    from sinkscope.lsg.gate import LSG
    from sinkscope.models.inputs import Sample
    from sinkscope.models.lvlm import LVLM

CALIBRATION_IMAGES = 6
CHOICES = frozenset(
    {"groups", "signal", "decode", "init", "scale", "hidden", "activation", "affine", "seed"}
)
"""Fields of `GateConfig` that are free; the others follow from the model and the arguments."""


def config_for(
    lvlm: LVLM,
    layer: int | str,
    v_detector: Any,
    l_detector: Any,
    samples: Sequence[Sample] | None,
    choices: Mapping[str, Any],
) -> GateConfig:
    """The config of a new gate for a model; arguments and errors as in `LSG.for_model`."""
    anatomy = lvlm.anatomy
    where = check_layer(layer, anatomy.language.n_layers)
    groups = tuple(choices.get("groups", ("V", "rest")))
    block = 0 if isinstance(where, str) else where + 1
    v_rule, l_rule = choose_rules(lvlm, v_detector, l_detector, "L" in groups, block, samples)
    module: Any = lvlm.module
    check_kept(v_rule, anatomy, module.config)
    scale = choices.get("scale", 1.0)
    if choices.get("init") == "neutral":
        if scale != 1.0:
            raise InterventionError(
                f"Got init='neutral' and scale={scale}; expected one of them. Neutral "
                "coefficients need a scale of as many as there are groups."
            )
        scale = float(len(groups))
    made = {**choices, "groups": groups, "scale": scale}
    strange = sorted(set(made) - CHOICES)
    if strange:
        raise InterventionError(
            f"Got {strange} for a gate; expected fields of GateConfig that are free, {sorted(CHOICES)}: "
            "the others are read from the model."
        )
    config = GateConfig(
        layer=where,
        d_model=anatomy.language.d_model,
        v_detector=describe(v_rule),
        l_detector=None if l_rule is None else describe(l_rule),
        model=sizes_of(anatomy),
        weights=sketch(lvlm.module, anatomy.head),
        **made,
    )
    if config.edited not in anatomy.language.attending:
        anatomy.language.call(config.edited)
    return config


def refuse_other_model(config: GateConfig, anatomy: Anatomy) -> None:
    """See `LSG.check_model`."""
    lines = differences(config.model, sizes_of(anatomy))
    if lines:
        listed = "\n  ".join(lines)
        raise InterventionError(
            f"Got a gate made for another model; expected one of this model's.\n  {listed}\n"
            f"Write ss.LSG.for_model(lvlm, layer={config.layer!r}) and train it."
        )


def check_layer(layer: Any, n_layers: int) -> int | str:
    """The block a gate reads: ``"embed"`` or an index with a block behind it.

    Raises:
        LayerError: If there is none.
    """
    if layer == "embed":
        return "embed"
    whole = isinstance(layer, int) and not isinstance(layer, bool)
    if not whole or not 0 <= layer < n_layers - 1:
        raise LayerError(
            f"Got layer={layer!r} for a gate in a decoder of {n_layers} blocks; expected 'embed' or "
            f"0 to {n_layers - 2}: a gate at block l scales keys in block l + 1."
        )
    return layer


def choose_rules(
    lvlm: LVLM, v: Any, low: Any, wants_l: bool, block: int, samples: Sequence[Sample] | None
) -> tuple[Any, Any]:
    """The rules of a gate: given, published constants, else calibrated on samples.

    Limits per layer become the one number of ``block``, whose keys the gate scales.

    Raises:
        InputError: If a calibration is needed and there is no processor and no sample.
        InterventionError: If a rule for L-sinks came without such a group.
    """
    if low is not None and not wants_l:
        raise InterventionError(
            f"Got l_detector={low!r} for a gate without an L group; expected none. Write "
            "groups=('V', 'L', 'rest')."
        )
    found = SinkRules.on_others(
        lvlm,
        lambda: samples or drawn_samples(lvlm),
        v,
        low if wants_l else NoSinks(),
        progress=None,
    )
    if not wants_l:
        return found.v, None
    return found.v, found.low.at(block) if isinstance(found.low, Limits) else found.low


def drawn_samples(lvlm: LVLM) -> list[Sample]:
    """Six drawn scenes, as samples of any model with a processor."""
    from sinkscope.bundled.scenes import VALIDATION_SEEDS, draw_scene

    if lvlm.processor is None:
        raise InputError(
            "Got a model without published constants and without a processor; expected a rule for "
            "V-sinks. Write ss.LSG.for_model(lvlm, layer, v_detector=ss.detectors.Norm(100.0)) or "
            "samples=[...]."
        )
    seeds = VALIDATION_SEEDS[:CALIBRATION_IMAGES]
    return [lvlm.prepare(draw_scene(seed).image, "describe the image") for seed in seeds]


def device_for(lvlm: LVLM) -> torch.device:
    """Where a gate for that model belongs: beside its weights, or here if it has none."""
    return torch.device("cpu") if lvlm.device.type == "meta" else lvlm.device


def check_gates(gates: Any) -> list[LSG]:
    """Gates as a list.

    Raises:
        InterventionError: If something else came.
    """
    from sinkscope.lsg.gate import LSG

    out = [gates] if isinstance(gates, LSG) else list(gates)
    if not out or not all(isinstance(gate, LSG) for gate in out):
        raise InterventionError(f"Got {gates!r}; expected one LSG or a list of them.")
    return out


def by_name(gate: LSG, values: Tensor) -> Mapping[str, float]:
    """Coefficients ``[group]`` by the names of their groups."""
    return dict(zip(gate.groups, values.tolist(), strict=True))
