"""What a new gate is made with: its layer and its rules for sinks."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from sinkscope.checks import is_whole
from sinkscope.detectors.calibration import Limits
from sinkscope.detectors.choice import SinkRules
from sinkscope.detectors.kinds import check_kept, describe
from sinkscope.detectors.rules import NoSinks
from sinkscope.errors import InputError, InterventionError, LayerError
from sinkscope.lsg.config import GateConfig, differences, sketch
from sinkscope.models.identity import sizes_of

if TYPE_CHECKING:
    from sinkscope.anatomy.towers import Anatomy
    from sinkscope.models.inputs import Sample
    from sinkscope.models.lvlm import LVLM

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
    made = {"scale": 1.0, **choices, "groups": tuple(choices.get("groups", ("V", "rest")))}
    block = 0 if isinstance(where, str) else where + 1
    wants_l = "L" in made["groups"]
    v_rule, l_rule = choose_rules(lvlm, v_detector, l_detector, wants_l, block, samples)
    module: Any = lvlm.module
    check_kept(v_rule, anatomy, module.config)
    if made.get("init") == "neutral":
        if made["scale"] != 1.0:
            raise InterventionError(
                f"Got init='neutral' and scale={made['scale']}; expected one of them. Neutral "
                "coefficients need a scale of as many as there are groups."
            )
        made["scale"] = float(len(made["groups"]))
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
    """Refuse a model that the gate was not made for; see `LSG.check_model`."""
    lines = differences(config.model, sizes_of(anatomy))
    if lines:
        listed = "\n  ".join(lines)
        raise InterventionError(
            f"Got a gate made for another model; expected one of this model's.\n  {listed}\n"
            f"Write ss.LSG.for_model(lvlm, layer={config.layer!r}) and train it."
        )


def warn_unchecked(config: GateConfig, lvlm: LVLM) -> None:
    """Say that a gate's weights were not compared with the model's, where one side has none."""
    if not config.weights or not sketch(lvlm.module, lvlm.anatomy.head):
        why = "the model has none here" if config.weights else "the gate knows none"
        text = f"The gate's sizes fit {lvlm.name!r}. Its weights were not compared: {why}."
        warnings.warn(text, UserWarning, stacklevel=4)


def check_layer(layer: Any, n_layers: int) -> int | str:
    """The block a gate reads: ``"embed"`` or an index with a block behind it; else a LayerError."""
    if layer == "embed":
        return "embed"
    if not (isinstance(layer, int) and is_whole(layer, 0, n_layers - 2)):
        raise LayerError(
            f"Got layer={layer!r} for a gate in a decoder of {n_layers} blocks; expected 'embed' or "
            f"0 to {n_layers - 2}: a gate at block l scales keys in block l + 1."
        )
    return layer


def choose_rules(
    lvlm: LVLM, v: Any, low: Any, wants_l: bool, block: int, samples: Sequence[Sample] | None
) -> tuple[Any, Any]:
    """The rules of a gate: given, else published, else calibrated; limits per layer are that of a block."""
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
    return found.v, found.l_rule.at(block) if isinstance(found.l_rule, Limits) else found.l_rule


def drawn_samples(lvlm: LVLM) -> list[Sample]:
    """Six drawn scenes, as samples of any model with a processor."""
    from sinkscope.bundled.scenes import VALIDATION_SEEDS, draw_scene

    if lvlm.processor is None:
        raise InputError(
            "Got a model without published constants and without a processor; expected a rule for "
            "V-sinks. Write v_detector=ss.detectors.Norm(100.0), or samples=[...]."
        )
    return [lvlm.prepare(draw_scene(s).image, "describe the image") for s in VALIDATION_SEEDS[:6]]


def device_for(lvlm: LVLM) -> torch.device:
    """Where a gate for that model belongs: beside its weights, or here if it has none."""
    return torch.device("cpu") if lvlm.device.type == "meta" else lvlm.device
