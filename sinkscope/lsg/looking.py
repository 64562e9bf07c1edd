"""What a gate looks at in one pass, as edits that change nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sinkscope.detectors.kinds import VisionTokens, kept_tokens
from sinkscope.interventions.protocol import Edit
from sinkscope.kernels import gating as kernels
from sinkscope.lsg.config import detector_of, rule_of
from sinkscope.sites import Site

if TYPE_CHECKING:
    from sinkscope.lsg.config import GateConfig


def looks_of(
    config: GateConfig, slot: int, weights: Mapping[str, Any], tokens: Any, step: int
) -> list[Edit]:
    """The looks of a gate.

    Args:
        config: The gate's choices.
        slot: Where in the run's memory it notes what it sees.
        weights: Its tensors, by the names of `sinkscope.kernels.gating.coefficients`.
        tokens: The sample's TokenMap.
        step: 0 for the prompt; later the signal only, if it is refreshed.
    """
    out = []
    if step and config.decode != "refresh":
        return []
    vision, live = tokens.vision, tokens.live
    if not step:
        shared = {"slot": slot, "image_index": tokens.image_index}
        shared |= {"sources": tokens.sources, "live": vision.live, "layout": vision.layout}
        detector, rule = detector_of(config.v_detector), rule_of(config.v_detector)
        if isinstance(detector, VisionTokens):
            shared["live"] = kept_tokens(tokens, detector.kind)
        out += [
            Edit(
                Site("vision", "resid_post", layer),
                kernels.note_v_sinks,
                {**shared, "rule": rule},
            )
            for layer in config.model["feed_layers"]
        ]
    reading = {
        "slot": slot,
        "signal": "last" if config.signal == "last" else "mean",
        "at": tokens.last,
        "tokens": live if config.signal == "mean" else tokens.image >= 0,
        "activation": config.activation,
        "scale": config.scale,
        **weights,
    }
    place = ("resid_pre", 0) if isinstance(config.layer, str) else ("resid_post", config.layer)
    out.append(Edit(Site("language", *place), kernels.note_coefficients, reading))
    if not step and config.l_detector is not None:
        rule = rule_of(config.l_detector)
        # A sink is judged by itself; random ones are so many of those whose keys can be scaled.
        judged = tokens.image >= 0 if rule["how"] == "random" else live
        parameters = {"slot": slot, "rule": rule, "live": judged}
        site = Site("language", "resid_pre", config.edited)
        out.append(Edit(site, kernels.note_l_sinks, parameters))
    return out
