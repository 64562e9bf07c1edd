"""One forward pass of a gated model: what a gate reads in it, and how a cache goes on from it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Protocol
from weakref import ref

import torch
from torch import Tensor, nn

from sinkscope.anatomy.towers import Anatomy
from sinkscope.data.batches import IGNORED
from sinkscope.detectors.choice import VisionTokens, detector_of, kept_tokens, rule_of
from sinkscope.errors import InputError
from sinkscope.kernels import gating as kernels
from sinkscope.lsg.config import GateConfig
from sinkscope.models.inputs import make_sample
from sinkscope.protocols import Edit
from sinkscope.sites import Site
from sinkscope.tokens import TokenMap

NO_INPUTS = ("labels", "past_key_values", "cache_position", "position_ids", "logits_to_keep")


class Gate(Protocol):
    """What is used of an `LSG` below the module that defines it."""

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
    """The signals of a gate: edits that change nothing, note under ``id(gate)``; ``step`` 0 is the prompt."""
    config, slot, image = gate.config, id(gate), tokens.image >= 0
    if step and config.decode != "refresh":
        return []
    place = ("resid_pre", 0) if isinstance(config.layer, str) else ("resid_post", config.layer)
    reading = {"slot": slot, "signal": "last" if config.signal == "last" else "mean"}
    reading |= {"at": tokens.last, "tokens": tokens.live if config.signal == "mean" else image}
    reading |= {"activation": config.activation, "scale": config.scale, **gate.weights}
    out = [Edit(Site("language", *place), kernels.note_coefficients, reading)]
    if step:
        return out
    detector, vision = detector_of(config.v_detector), tokens.vision
    kept = isinstance(detector, VisionTokens)
    live = kept_tokens(tokens, detector.kind) if kept else vision.live
    finding = {"slot": slot, "rule": rule_of(config.v_detector), "live": live}
    finding |= {name: getattr(tokens, name) for name in ("image_index", "sources")}
    finding["layout"] = vision.layout
    for layer in config.model["feed_layers"]:
        out.append(Edit(Site("vision", "resid_post", layer), kernels.note_v_sinks, finding))
    if config.l_detector is not None:
        rule = rule_of(config.l_detector)
        # A sink is judged by itself; random ones are so many of those whose keys can be scaled.
        judged = image if rule["how"] == "random" else tokens.live
        given = {"slot": slot, "rule": rule, "live": judged}
        out.append(Edit(Site("language", "resid_pre", config.edited), kernels.note_l_sinks, given))
    return out


def placed(values: Mapping[str, Any], beside: Tensor) -> dict[str, Any]:
    """Values with all tensors on the device of ``beside``."""
    at = beside.device
    return {k: v.to(at) if isinstance(v, Tensor) else v for k, v in values.items()}


class Pass:
    """One forward pass; no dataclass, because wrappers of models copy dataclasses among arguments.

    ``tokens`` and ``last``, the last prompt position of every row, are None for a prompt without images,
    where nothing is scaled. ``state`` is the scratch space of the kernels, ``{"step", "memory"}``.
    """

    def __init__(self, tokens: TokenMap | None = None, last: Tensor | None = None) -> None:
        self.tokens, self.last = tokens, last
        self.state: dict[str, Any] = {"step": 0, "memory": {}}

    def at(self, step: int) -> Pass:
        """The pass of a later decode step."""
        out, memory = Pass(self.tokens, self.last), self.state["memory"]
        out.state = {"step": step, "memory": {slot: dict(kept) for slot, kept in memory.items()}}
        return out


class ByIdentity:
    """Weak dictionary keyed by object identity."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[Any, Any]] = {}

    def put(self, key: Any, value: Any) -> None:
        """Keep a value as long as the object lives."""
        kept, number = self._kept, id(key)
        try:
            seen = ref(key, lambda _: kept.pop(number, None))
        except TypeError as error:
            raise no_cache(key) from error
        kept[number] = (seen, value)

    def get(self, key: Any) -> Any:
        """What was kept for the object, or None."""
        seen, value = self._kept.get(id(key), (None, None))
        return value if seen is not None and seen() is key else None


def arguments_of(module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, however they were passed."""
    signature = inspect.signature(type(module).forward)
    given = dict(signature.bind_partial(module, *args, **kwargs).arguments)
    given.pop(next(iter(signature.parameters)))
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            given |= given.pop(name, {})
        if parameter.kind is parameter.VAR_POSITIONAL and given.pop(name, ()):
            raise InputError(
                f"Got arguments without names for {type(module).__name__}, which does not name them; "
                "expected names. Write model(input_ids=..., pixel_values=...)."
            )
    return given


def images_of(given: Mapping[str, Any]) -> tuple[Any, Any]:
    """The pixels of a call, and what the vision tower made of them before the call; no videos."""
    encoded = given.get("mm_encoder_outputs") or {}
    if given.get("pixel_values_videos") is not None or encoded.get("video") is not None:
        raise InputError(
            "Got a video for a gated model; expected images, in which a gate finds its groups. Pass "
            "frames as images, or write gate.detach() first."
        )
    return given.get("pixel_values"), encoded.get("image")


def no_cache(found: Any) -> InputError:
    """The error of a cache that cannot be followed."""
    return InputError(
        f"Got a cache of type {type(found).__name__} for a gated model; expected one of transformers' "
        "caches. Write past_key_values=DynamicCache()."
    )


def length_of(cache: Any) -> int:
    """How many tokens a cache holds; 0 for None."""
    if cache is not None and not callable(getattr(cache, "get_seq_length", None)):
        raise no_cache(cache)
    return 0 if cache is None else int(cache.get_seq_length())


def started(
    module: nn.Module, anatomy: Anatomy, given: Mapping[str, Any], images: Mapping[str, Tensor]
) -> Pass:
    """The pass of a prompt with images; ``images`` are those that ``generate()`` encodes before it."""
    inputs = {k: v for k, v in given.items() if isinstance(v, Tensor) and k not in NO_INPUTS}
    try:
        tokens = make_sample(module, None, anatomy, None, None, inputs | dict(images)).tokens
    except InputError as error:
        if not images:
            raise
        why = "generate() cuts a prompt for prefill_chunk_size: leave it out."
        if len(ids := given["input_ids"]) > len(ids.unique(dim=0)):
            why = (
                "generate() repeats rows for beams and several sequences: a gate works with greedy "
                "decoding and sampling of one sequence."
            )
        raise InputError(f"{error} {why}") from error
    labels = given.get("labels")
    if labels is None:
        return Pass(tokens, tokens.last)
    wanted = (labels != IGNORED).cpu() & tokens.live  # the prompt ends before the first label
    first = wanted.int().argmax(dim=1)
    if bool((wanted.any(dim=1) & (first == tokens.first)).any()):
        raise InputError(
            "Got labels that begin with the first token of a row; expected the prompt to be ignored. "
            f"Write labels[:, :prompt_length] = {IGNORED}."
        )
    return Pass(tokens, torch.where(wanted.any(dim=1), first - 1, tokens.last))


def continued(before: Pass | None, given: Mapping[str, Any], length: int) -> Pass:
    """The pass that goes on from ``before``, which filled a cache of ``length`` tokens."""
    if before is None:
        raise InputError(
            f"Got a cache of {length} tokens that this gate has not seen; expected that of a prompt which "
            "ran while it was attached, not a copy of it. Write gate.attach(model) before the prompt."
        )
    turn = "Pass the whole conversation with its images and without past_key_values"
    if any(value is not None for value in images_of(given)):
        raise InputError(
            f"Got images behind {length} tokens that are in the cache already; expected them in one "
            f"prompt with all that comes before them. {turn}, and no prefill_chunk_size."
        )
    if before.tokens is None:
        return before.at(before.state["step"] + 1)
    new = given.get("input_ids")
    new = given.get("inputs_embeds") if new is None else new
    rows, many = (0, 0) if new is None else new.shape[:2]
    prompts, prompt = before.tokens.image.shape
    if rows != prompts or many != 1:
        what = f"Got {rows} rows of {many} new tokens to go on from {prompts} gated prompts"
        leave = "leave out beams, several sequences, prefill_chunk_size and assisted decoding"
        raise InputError(f"{what}; expected one token each. {turn}; in generate() {leave}.")
    if length < prompt:
        raise InputError(
            f"Got a cache of {length} tokens whose prompt had {prompt}; expected all of it. Run the "
            "shorter prompt instead."
        )
    return before.at(length - prompt + 1)
