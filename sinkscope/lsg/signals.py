"""What a gate reads in one pass: V-sinks, the state of the prompt's last token, L-sinks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from sinkscope.anatomy.towers import Anatomy
from sinkscope.detectors.kinds import VisionTokens, detector_of, kept_tokens, rule_of
from sinkscope.kernels import gating as kernels
from sinkscope.lsg.config import GateConfig
from sinkscope.protocols import Edit
from sinkscope.sites import Site
from sinkscope.tokens import TokenMap


class Gate(Protocol):
    """What others need of a gate; `sinkscope.lsg.gate.LSG` has it."""

    config: GateConfig

    @property
    def weights(self) -> dict[str, Any]:
        """See `LSG.weights`."""
        ...

    def check_model(self, anatomy: Anatomy) -> None:
        """See `LSG.check_model`."""

    def check_weights(self, module: nn.Module, anatomy: Anatomy) -> None:
        """See `LSG.check_weights`."""


def signals_of(gate: Gate, tokens: TokenMap, step: int = 0) -> list[Edit]:
    """The signals of a gate, as edits that change nothing and note what they find under ``id(gate)``.

    Args:
        gate: The gate.
        tokens: What every position of the prompt is.
        step: 0 for the prompt; later the state of the newest token only, if it is refreshed.
    """
    config, slot, image = gate.config, id(gate), tokens.image >= 0
    if step and config.decode != "refresh":
        return []
    place = ("resid_pre", 0) if isinstance(config.layer, str) else ("resid_post", config.layer)
    reading = {
        "slot": slot,
        "signal": "last" if config.signal == "last" else "mean",
        "at": tokens.last,
        "tokens": tokens.live if config.signal == "mean" else image,
        "activation": config.activation,
        "scale": config.scale,
        **gate.weights,
    }
    out = [Edit(Site("language", *place), kernels.note_coefficients, reading)]
    if step:
        return out
    detector, vision = detector_of(config.v_detector), tokens.vision
    kept = isinstance(detector, VisionTokens)
    finding = {
        "slot": slot,
        "rule": rule_of(config.v_detector),
        "live": kept_tokens(tokens, detector.kind) if kept else vision.live,
        "image_index": tokens.image_index,
        "sources": tokens.sources,
        "layout": vision.layout,
    }
    for layer in config.model["feed_layers"]:
        out.append(Edit(Site("vision", "resid_post", layer), kernels.note_v_sinks, finding))
    if config.l_detector is not None:
        rule = rule_of(config.l_detector)
        # A sink is judged by itself; random ones are so many of those whose keys can be scaled.
        judged = image if rule["how"] == "random" else tokens.live
        site = Site("language", "resid_pre", config.edited)
        given = {"slot": slot, "rule": rule, "live": judged}
        out.append(Edit(site, kernels.note_l_sinks, given))
    return out


def placed(values: Mapping[str, Any], beside: Tensor) -> dict[str, Any]:
    """Values with all tensors on the device of ``beside``."""
    at = beside.device
    return {k: v.to(at) if isinstance(v, Tensor) else v for k, v in values.items()}
