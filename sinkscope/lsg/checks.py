"""Strict types for what a gate is made of: it may come from a file that anybody wrote."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from sinkscope.checks import is_number, is_whole
from sinkscope.detectors.kinds import VisionTokens
from sinkscope.detectors.rules import Norm, SinkDimensions
from sinkscope.errors import InterventionError

SEEDS = (-(2**63), 2**64 - 1)
"""What torch takes."""


def require(good: bool, name: str, value: Any, expected: str) -> None:
    """Refuse a value.

    Raises:
        InterventionError: If it is not good.
    """
    if not good:
        shown = repr(value)
        shown = shown if len(shown) <= 200 else f"{shown[:197]}..."
        raise InterventionError(f"Got {name}={shown}; expected {expected}.")


def check_sizes(config: Any) -> None:
    """Refuse numbers, switches and tables of a `GateConfig` that are of another type.

    Raises:
        InterventionError: If any is, with its name.
    """
    layer = config.layer
    where = layer == "embed" or (is_whole(layer) and layer >= 0)
    require(where, "layer", layer, "'embed' or the index of a block, from 0")
    for name in ("d_model", "hidden"):
        value = getattr(config, name)
        require(is_whole(value) and value > 0, name, value, "a whole number of 1 or more")
    scale = config.scale
    require(is_number(scale) and scale > 0, "scale", scale, "a positive number, not infinite")
    seed = config.seed
    fits = is_whole(seed) and SEEDS[0] <= seed <= SEEDS[1]
    require(fits, "seed", seed, "a whole number of at most 64 bits")
    require(isinstance(config.affine, bool), "affine", config.affine, "True or False")
    weights = config.weights
    numbers = isinstance(weights, tuple) and all(is_number(one) for one in weights)
    require(numbers, "weights", weights, "a tuple of numbers, as sketch() gives them")
    named = isinstance(config.model, Mapping) and all(isinstance(n, str) for n in config.model)
    require(named, "model", config.model, "the fingerprint of a model, by name")


def check_fingerprint(model: Mapping[str, Any]) -> None:
    """Refuse a fingerprint that cannot be of a model.

    Raises:
        InterventionError: If a size is no whole number, or missing.
    """
    sizes = ("vision_layers", "vision_width", "tokens_merged", "language_layers", "language_width")
    for name in (*sizes, "heads", "kv_heads", "head_dim"):
        value = model.get(name)
        good = is_whole(value) and value > 0
        require(good, f"model[{name!r}]", value, "a whole number of 1 or more")
    kind, feeds = model.get("model_type"), model.get("feed_layers")
    require(isinstance(kind, str), "model['model_type']", kind, "the name of a type")
    good = isinstance(feeds, list) and bool(feeds) and all(is_whole(f) and f >= 0 for f in feeds)
    require(good, "model['feed_layers']", feeds, "a list of block indices")


def check_detector(name: str, detector: Any, width: Any) -> None:
    """Refuse a rule that cannot be one of this gate; its own numbers it checks itself.

    Args:
        name: ``"v_detector"`` or ``"l_detector"``, for messages.
        detector: One that can be in a gate.
        width: Of the states it judges, if that is known.

    Raises:
        InterventionError: If it is for another tower, or its channels are beyond the states.
    """
    if isinstance(detector, VisionTokens):
        require(name == "v_detector", name, detector, "a rule for states of the decoder")
        return
    if isinstance(detector, Norm):
        alone = not isinstance(detector.tau, str)
        require(alone, f"{name}.tau", detector.tau, "a positive number, which judges tokens alone")
    if isinstance(detector, SinkDimensions):
        dims, most = detector.dims, width if is_whole(width) else math.inf
        good = all(dim < most for dim in dims)
        require(good, f"{name}.dims", dims, f"channels from 0, below {most}")
