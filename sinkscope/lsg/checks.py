"""Strict types for what a gate is made of: it may come from a file that anybody wrote."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any, TypeGuard

from sinkscope.detectors.kinds import VisionTokens
from sinkscope.detectors.random import RandomTokens
from sinkscope.detectors.rules import Massive, Norm, NoSinks, SinkDimensions
from sinkscope.errors import InterventionError

SEEDS = (-(2**63), 2**64 - 1)
"""What torch takes."""


def is_whole(value: Any) -> TypeGuard[int]:
    """Whether that is a whole number."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_finite(value: Any) -> TypeGuard[float]:
    """Whether that is a number, and neither NaN nor infinite."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and abs(value) <= sys.float_info.max  # whole numbers may be beyond any float


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
    require(is_finite(scale) and scale > 0, "scale", scale, "a positive number, not infinite")
    seed = config.seed
    fits = is_whole(seed) and SEEDS[0] <= seed <= SEEDS[1]
    require(fits, "seed", seed, "a whole number of at most 64 bits")
    require(isinstance(config.affine, bool), "affine", config.affine, "True or False")
    weights = config.weights
    numbers = isinstance(weights, tuple) and all(is_finite(one) for one in weights)
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
    """Refuse a rule whose numbers cannot be.

    Args:
        name: ``"v_detector"`` or ``"l_detector"``, for messages.
        detector: One that can be in a gate.
        width: Of the states it judges, if that is known.

    Raises:
        InterventionError: If a field is of another type, not finite, or beyond the states.
    """

    def field(part: str) -> tuple[str, Any]:
        return f"{name}.{part}", getattr(detector, part)

    if isinstance(detector, VisionTokens):
        require(name == "v_detector", name, detector, "a rule for states of the decoder")
        return
    require(isinstance(detector.strict, bool), *field("strict"), "True or False")
    if isinstance(detector, SinkDimensions):
        dims, most = detector.dims, width if is_whole(width) else math.inf
        listed = isinstance(dims, (list, tuple)) and len(dims) > 0
        good = listed and all(is_whole(d) and 0 <= d < most for d in dims)
        require(good, *field("dims"), f"channels from 0, below {most}" if width else "channels")
        require(detector.normalize in ("rms", "none"), *field("normalize"), "'rms' or 'none'")
    if isinstance(detector, (SinkDimensions, Norm)):
        good = is_finite(detector.tau) and float(detector.tau) > 0
        require(good, *field("tau"), "a positive number, not infinite")
    if isinstance(detector, Norm):
        require(is_finite(detector.gap), *field("gap"), "a number")
    if isinstance(detector, Massive):
        for part in ("absolute", "ratio"):
            value = getattr(detector, part)
            require(is_finite(value) and value >= 0, *field(part), "a number of 0 or more")
    if isinstance(detector, RandomTokens):
        require(is_whole(detector.seed), *field("seed"), "a whole number")
    if isinstance(detector, NoSinks):
        require(isinstance(detector.reason, str), *field("reason"), "text")
