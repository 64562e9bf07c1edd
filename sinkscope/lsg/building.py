"""What a new gate is made with: its layer and its rules for sinks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from sinkscope.bundled.scenes import VALIDATION_SEEDS, draw_scene
from sinkscope.detectors.calibration import Limits
from sinkscope.detectors.choice import SinkRules
from sinkscope.detectors.kinds import check_kept, describe
from sinkscope.detectors.rules import NoSinks
from sinkscope.errors import InputError, InterventionError
from sinkscope.lsg.config import GateConfig, check_layer, sketch
from sinkscope.models.inputs import Sample
from sinkscope.models.loading import sizes_of
from sinkscope.models.lvlm import LVLM

CHOICES = ["groups", "signal", "decode", "init", "scale", "hidden", "activation", "affine", "seed"]
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
    wants_l = "L" in made["groups"]
    if l_detector is not None and not wants_l:
        what = f"Got l_detector={l_detector!r} for a gate without an L group; expected none."
        raise InterventionError(f"{what} Write groups=('V', 'L', 'rest').")
    low = l_detector if wants_l else NoSinks()
    rules = SinkRules.on_others(
        lvlm, lambda: samples or drawn_samples(lvlm), v_detector, low, progress=None
    )
    l_rule: Any = rules.l_rule
    if isinstance(l_rule, Limits):
        l_rule = l_rule.at(0 if isinstance(where, str) else where + 1)
    module: Any = lvlm.module
    check_kept(rules.v, anatomy, module.config)
    if made.get("init") == "neutral":
        if made["scale"] != 1.0:
            raise InterventionError(
                f"Got init='neutral' and scale={made['scale']}; expected one of them. Neutral "
                "coefficients need a scale of as many as there are groups."
            )
        made["scale"] = float(len(made["groups"]))
    if strange := sorted(set(made) - set(CHOICES)):
        raise InterventionError(
            f"Got {strange} for a gate; expected fields of GateConfig that are free, {sorted(CHOICES)}: "
            "the others are read from the model."
        )
    config = GateConfig(
        layer=where,
        d_model=anatomy.language.d_model,
        v_detector=describe(rules.v),
        l_detector=describe(l_rule) if wants_l else None,
        model=sizes_of(anatomy),
        weights=sketch(lvlm.module, anatomy.head),
        **made,
    )
    if config.edited not in anatomy.language.attending:
        anatomy.language.call(config.edited)
    return config


def drawn_samples(lvlm: LVLM) -> list[Sample]:
    """Six drawn scenes, as samples of any model with a processor."""
    if lvlm.processor is None:
        raise InputError(
            "Got a model without published constants and without a processor; expected a rule for "
            "V-sinks. Write v_detector=ss.detectors.Norm(100.0), or samples=[...]."
        )
    return [lvlm.prepare(draw_scene(s).image, "describe the image") for s in VALIDATION_SEEDS[:6]]


def device_for(lvlm: LVLM) -> torch.device:
    """Where a gate for that model belongs: beside its weights, or here if it has none."""
    return torch.device("cpu") if lvlm.device.type == "meta" else lvlm.device
