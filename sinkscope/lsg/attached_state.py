"""What an attached gate knows of one forward pass, and which cache it belongs to.

A plain model may be called in any order: two prompts and then their decode steps, a text in between,
two losses and then one backward. So what was found in a prompt is kept by the cache that the prompt
filled, and is handed to the blocks of a pass with their arguments.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from sinkscope.errors import InputError
from sinkscope.models.anatomy import Anatomy
from sinkscope.models.prepare import make_sample
from sinkscope.tokens import TokenMap

IGNORED = -100
NO_INPUTS = ("labels", "past_key_values", "cache_position", "position_ids", "logits_to_keep")


class Pass:
    """One forward pass.

    No dataclass, because wrappers of models copy those that they find among arguments.

    Attributes:
        tokens: The prompt's TokenMap; None for a prompt without images, where nothing is scaled.
        last: The last prompt position of every row, ``[batch]``; None likewise.
        visual: The image tokens, ``[batch pos]`` bool; None likewise.
        state: The scratch space of the kernels: ``{"step", "memory"}``.
    """

    def __init__(
        self,
        tokens: TokenMap | None = None,
        last: Tensor | None = None,
        visual: Tensor | None = None,
        step: int = 0,
        memory: Mapping[Any, Mapping[str, Any]] | None = None,
    ) -> None:
        self.tokens, self.last, self.visual = tokens, last, visual
        found = {slot: dict(kept) for slot, kept in (memory or {}).items()}
        self.state: dict[str, Any] = {"step": step, "memory": found}

    def at(self, step: int) -> Pass:
        """The pass of a later decode step."""
        return Pass(self.tokens, self.last, self.visual, step, self.state["memory"])


class ByIdentity:
    """Values by objects, which are told apart by what they are and not kept alive."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[Any, Any]] = {}

    def put(self, key: Any, value: Any) -> None:
        """Keep a value for an object.

        Raises:
            InputError: If it is of a kind that cannot be told apart, such as a tuple.
        """
        kept, number = self._kept, id(key)
        try:
            seen = ref(key, lambda _: kept.pop(number, None))
        except TypeError as error:
            raise InputError(
                f"Got a cache of type {type(key).__name__} for a gated model; expected one of "
                "transformers' caches. Write past_key_values=DynamicCache()."
            ) from error
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
                f"Got arguments without names for {type(module).__name__}, which does not say what "
                "they are; expected names. Write model(input_ids=..., pixel_values=...)."
            )
    return given


def takes_any(module: nn.Module) -> bool:
    """Whether a module hands on arguments that it does not know."""
    parameters = inspect.signature(type(module).forward).parameters.values()
    return any(one.kind is one.VAR_KEYWORD for one in parameters)


def refuse_reentrant(block: Any) -> None:
    """Refuse checkpoints that run a block without a graph first.

    Raises:
        InputError: If the block is about to be run in such a one.
    """
    on = getattr(block, "gradient_checkpointing", False) and block.training
    if not on or not torch.is_grad_enabled():
        return
    keywords = getattr(block._gradient_checkpointing_func, "keywords", {})
    if keywords.get("use_reentrant") is not False:
        raise InputError(
            "Got reentrant gradient checkpointing on a gated model; expected the other kind, which "
            "keeps the gate's gradients. Where you enable it, write "
            'gradient_checkpointing_kwargs={"use_reentrant": False}.'
        )


def images_of(given: Mapping[str, Any]) -> tuple[Any, Any]:
    """The pixels of a call, and what the vision tower made of them before the call.

    Raises:
        InputError: If there are videos.
    """
    encoded = given.get("mm_encoder_outputs") or {}
    if given.get("pixel_values_videos") is not None or encoded.get("video") is not None:
        raise InputError(
            "Got a video for a gated model; expected images. A gate finds its groups in still "
            "images: pass frames as images, or write gate.detach() first."
        )
    return given.get("pixel_values"), encoded.get("image")


def caches_in(output: Any) -> Iterator[Any]:
    """The caches in what a model returned."""
    parts = output if isinstance(output, tuple) else (getattr(output, "past_key_values", None),)
    return (part for part in parts if callable(getattr(part, "get_seq_length", None)))


def length_of(cache: Any) -> int:
    """How many tokens a cache holds; 0 for None."""
    if cache is None:
        return 0
    if not callable(getattr(cache, "get_seq_length", None)):
        raise InputError(
            f"Got past_key_values of type {type(cache).__name__} for a gated model; expected one of "
            "transformers' caches. Write past_key_values=DynamicCache()."
        )
    return int(cache.get_seq_length())


def started(
    module: nn.Module, anatomy: Anatomy, given: Mapping[str, Any], images: Mapping[str, Tensor]
) -> Pass:
    """The pass of a prompt with images.

    Args:
        module: The model.
        anatomy: Its anatomy.
        given: The arguments of the call.
        images: What the vision tower was called with before the call, as ``generate()`` does it.

    Raises:
        InputError: If the prompt and its images do not fit one another.
    """
    inputs = {k: v for k, v in given.items() if isinstance(v, Tensor) and k not in NO_INPUTS}
    try:
        tokens = make_sample(module, None, anatomy, None, None, inputs | dict(images)).tokens
    except InputError as error:
        if not images:
            raise
        ids = given["input_ids"]
        repeated = ids.shape[0] > ids.unique(dim=0).shape[0]
        why = (
            "generate() repeats rows for beams and several sequences: a gate works with greedy "
            "decoding and sampling of one sequence."
            if repeated
            else "generate() cuts a prompt for prefill_chunk_size: a gate works with a prompt in one "
            "piece, so leave it out."
        )
        raise InputError(f"{error} {why}") from error
    last = last_prompt(tokens, given.get("labels"))
    return Pass(tokens, last, (tokens.image >= 0).to(given["input_ids"].device))


def continued(before: Pass | None, given: Mapping[str, Any], length: int) -> Pass:
    """The pass that goes on from a cache.

    Args:
        before: The last pass that filled the cache, as far as it was seen.
        given: The arguments of the call.
        length: How many tokens the cache holds.

    Raises:
        InputError: If it was not seen, or if this is no decode step.
    """
    if before is None:
        raise InputError(
            f"Got a cache of {length} tokens that this gate has not seen; expected the cache of a "
            "prompt that ran while the gate was attached, and not a copy of it. Write "
            "gate.attach(model) before the prompt."
        )
    if any(value is not None for value in images_of(given)):
        raise InputError(
            f"Got images behind {length} tokens that are in the cache already; expected them in one "
            "prompt with all that comes before them. Pass the whole conversation without "
            "past_key_values, and no prefill_chunk_size."
        )
    if before.visual is None:
        return before.at(before.state["step"] + 1)
    new = given.get("input_ids")
    new = given.get("inputs_embeds") if new is None else new
    rows, many = (0, 0) if new is None else new.shape[:2]
    prompt = before.visual
    if rows != prompt.shape[0]:
        raise InputError(
            f"Got {rows} rows to go on from a gated prompt of {prompt.shape[0]}; expected as many. "
            "Beams and several sequences repeat rows: use greedy decoding or sampling of one "
            "sequence."
        )
    if many != 1:
        raise InputError(
            f"Got {many} new tokens behind a gated prompt; expected one decode step. A gate reads the "
            "end of a whole prompt: for a further turn pass the whole conversation with its images "
            "and without past_key_values; in generate() leave out prefill_chunk_size and assisted "
            "decoding."
        )
    step = length - prompt.shape[1] + 1
    if step < 1:
        raise InputError(
            f"Got a cache of {length} tokens whose prompt had {prompt.shape[1]}; expected all of it. "
            "Do not cut a cache below its prompt: run the shorter prompt instead."
        )
    return before.at(step)


def last_prompt(tokens: TokenMap, labels: Tensor | None) -> Tensor:
    """The last prompt position of every row: the one before the first label, else the last live one.

    Raises:
        InputError: If a row is all labels.
    """
    if labels is None:
        return tokens.last
    wanted = (labels != IGNORED).cpu() & tokens.live
    first = wanted.int().argmax(dim=1)
    if bool((wanted.any(dim=1) & (first == tokens.first)).any()):
        raise InputError(
            "Got labels that begin with the first token of a row; expected the prompt to be ignored. "
            f"Write labels[:, :prompt_length] = {IGNORED}."
        )
    return torch.where(wanted.any(dim=1), first - 1, tokens.last)
