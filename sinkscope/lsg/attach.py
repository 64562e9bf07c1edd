"""What an attached gate knows of one forward pass, and which cache it belongs to.

A plain model may be called in any order: two prompts and then their decode steps, a text in between,
two losses and then one backward. So what was found in a prompt is kept by the cache that the prompt
filled, and is handed to the blocks of a pass with their arguments.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn
from weakref import WeakKeyDictionary, WeakMethod, WeakSet, ref

import torch
from torch import Tensor, nn

from sinkscope.anatomy.discovery import read_anatomy
from sinkscope.anatomy.towers import Anatomy
from sinkscope.errors import InputError, InterventionError, ModelError
from sinkscope.interventions.application import Edited
from sinkscope.kernels import gating as kernels
from sinkscope.kernels.attention import fit_keys
from sinkscope.kernels.walk import first_tensor
from sinkscope.models.inputs import make_sample
from sinkscope.models.keyhook import share_keys
from sinkscope.tokens import TokenMap

if TYPE_CHECKING:
    from sinkscope.lsg.gate import LSG

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


ATTACHED: WeakKeyDictionary[nn.Module, WeakSet[Attachment]] = WeakKeyDictionary()

CARRIED = "sinkscope_passes"

"""The argument of blocks that holds, by attachment, the pass that calls them."""


class Attachment:
    """A gate on a model, until `detach`.

    Attributes:
        gate: The gate.
        model: The ``transformers`` model.
    """

    def __init__(self, gate: LSG, model: nn.Module) -> None:
        self.gate, self.model = gate, model
        self.anatomy = read_anatomy(model)
        gate.check_model(self.anatomy)
        gate.check_weights(model, self.anatomy)
        self._edited = self.anatomy.language.blocks[gate.config.edited]
        self._seen: tuple[dict[str, Tensor], dict[int, Tensor]] | None = None  # by the vision tower
        self._used = ByIdentity()  # what was encoded before the pass that took it
        self._passes = ByIdentity()  # by cache
        self._now: Pass | None = None
        self._last: Pass | None = None
        self._stack = ExitStack()
        self._hook()

    @property
    def coefficients(self) -> Tensor | None:
        """The coefficients of the last forward pass, float ``[batch group]``; None before the first."""
        if self._last is None:
            return None
        found = self._kept(self._last).get("coefficients")
        return None if found is None else found.detach()

    def detach(self) -> None:
        """Take the gate off; the model is bitwise itself again. Twice is once."""
        self._stack.close()
        ATTACHED.get(self.gate, WeakSet()).discard(self)

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *error: object) -> None:
        self.detach()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """An attached model is not copied: its copy would be half gated, by the original's passes."""
        raise InterventionError(
            "Got a model to copy or pickle that a gate is attached to; expected a plain one. Write "
            "gate.detach() first, and attach the gate to the copy again."
        )

    def _hook(self) -> None:
        """Register all hooks."""
        config, part = self.gate.config, self.model.get_submodule
        language, vision = self.anatomy.language.blocks, self.anatomy.vision.blocks
        tower, decoder = ".".join(vision[0].split(".")[:2]), language[0].rsplit(".", 2)[0]
        handles = [
            self.model.register_forward_pre_hook(self._begin, with_kwargs=True),
            self.model.register_forward_hook(self._end, always_call=True),
            part(tower).register_forward_pre_hook(self._begin_vision, with_kwargs=True),
            part(decoder).register_forward_pre_hook(self._enter, with_kwargs=True),
        ]
        for layer in config.model["feed_layers"]:
            keep = partial(self._after_vision, layer)
            handles.append(part(vision[layer]).register_forward_hook(keep))
        edited = part(self._edited)
        if not isinstance(config.layer, str):
            read = part(language[config.layer])
            handles.append(read.register_forward_hook(self._after, with_kwargs=True))
        if isinstance(config.layer, str) or config.l_detector is not None:
            handles.append(edited.register_forward_pre_hook(self._before, with_kwargs=True))
        for handle in handles:
            self._stack.callback(handle.remove)
        scale = WeakMethod(self._scale)  # the function that asks for it outlives the model

        def edit(key: Tensor, given: Mapping[str, Any]) -> Tensor:
            method: Any = scale()
            return method(key, given)

        self._stack.callback(share_keys(self.model, self.anatomy, config.edited, edit))

    def _begin(self, module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
        """Before a pass: a prompt is mapped anew, a decode step is counted."""
        self._now = None
        given = arguments_of(module, args, kwargs)
        cache = given.get("past_key_values")
        length = length_of(cache)
        if length:
            now = continued(self._passes.get(cache), given, length)
        else:
            now = self._started(given)
        if cache is not None:
            self._passes.put(cache, now)
        self._now = now

    def _started(self, given: Mapping[str, Any]) -> Pass:
        """The pass of a prompt."""
        if given.get("input_ids") is None:
            raise InputError(
                "Got a prompt without input_ids for a gated model; expected them, to find the image "
                "tokens. Pass input_ids and pixel_values instead of inputs_embeds."
            )
        pixels, encoded = images_of(given)
        if encoded is None:
            self._seen = None
            if pixels is None:
                return Pass()  # a text prompt has nothing to scale
            return started(self.model, self.anatomy, given, {})
        if self._used.get(encoded):
            raise InputError(
                "Got images that were encoded for an earlier pass, without its cache; expected them "
                "once. generate(use_cache=False) does this, and a gate would read every new token "
                "as the end of the prompt. Write use_cache=True, or pass pixel_values."
            )
        if self._seen is None:
            raise InputError(
                "Got images that were encoded before the gate was attached; expected to see them "
                "pass the vision tower. Pass pixel_values."
            )
        kept = given.get("logits_to_keep")
        if isinstance(kept, int) and kept > 1:  # how generate() calls the model to judge guesses
            raise InputError(
                f"Got a prompt with {kept - 1} guessed tokens behind it, as assisted decoding passes "
                "it; expected the prompt alone, whose end a gate reads. Leave out "
                "prompt_lookup_num_tokens or assistant_model."
            )
        self._used.put(encoded, value=True)
        return started(self.model, self.anatomy, given, self._seen[0])

    def _end(self, module: nn.Module, args: tuple, output: Any) -> None:
        """After a pass, also one that failed: its cache is known."""
        now, self._now = self._now, None
        if now is None:
            return
        self._last = now
        for cache in caches_in(output):
            self._passes.put(cache, now)

    def _begin_vision(self, module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
        """Before the vision tower: keep what it is called with."""
        given = [*args, *(v for k, v in kwargs.items() if "grid" not in k)]
        called = {"pixel_values": next(value for value in given if isinstance(value, Tensor))}
        grid = next((v for k, v in kwargs.items() if "grid" in k), None)
        if grid is not None:
            called["image_grid_thw"] = grid
        self._seen = (called, {})

    def _after_vision(self, layer: int, module: nn.Module, args: tuple, output: Any) -> None:
        """After a vision block: keep what feeds the projector."""
        if self._seen is not None:
            self._seen[1][layer] = first_tensor(output).detach()

    def _enter(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Before the decoder: find V-sinks, and send the pass along with the arguments."""
        now = self._pass({})
        refuse_reentrant(self.model.get_submodule(self._edited))
        if now.tokens is not None and not now.state["step"]:
            _, fed = self._seen or ({}, {})
            if not fed:
                raise InputError(
                    "Got a prompt with images that did not pass the vision tower of a gated model; "
                    "expected them to. Pass pixel_values."
                )
            for layer in self.gate.config.model["feed_layers"]:
                self._look(now, "vision", "resid_post", layer, fed[layer])
        self._seen = None
        if not takes_any(module):
            return None
        carried = {**kwargs.get(CARRIED, {}), id(self): now}
        return args, {**kwargs, CARRIED: carried}

    def _pass(self, given: Mapping[str, Any]) -> Pass:
        """The pass that a block is part of, also when a checkpoint runs it again."""
        now = given.get(CARRIED, {}).get(id(self), self._now)
        if now is None:
            raise InputError(
                "Got a call of a part of a gated model, such as model.model(...); expected one of "
                "the whole model, where the gate sees images and labels. Write model(**inputs), or "
                "gate.detach() first. A wrapper that calls model.forward does this: call the model "
                "in it."
            )
        return now

    def _kept(self, now: Pass) -> dict[str, Any]:
        """What the gate has found in a pass."""
        return now.state["memory"].get(("gate", id(self.gate)), {})

    def _look(self, now: Pass, tower: str, name: str, layer: int, seen: Any) -> None:
        """Run the gate's looks at one site on what is there."""
        if now.tokens is None or now.last is None:
            return
        found = first_tensor(seen)
        for look in self.gate.looks(now.tokens, now.state["step"]):
            if (look.site.tower, look.site.name, look.site.layer) != (tower, name, layer):
                continue
            given = {
                key: value.to(found.device) if isinstance(value, Tensor) else value
                for key, value in look.parameters.items()
            }
            if "at" in given:
                last = now.last.to(found.device)
                places = torch.arange(given["tokens"].shape[1], device=last.device)
                # Behind the prompt there may be an answer: labels say so.
                given |= {"at": last, "tokens": given["tokens"] & (places <= last[:, None])}
            look.kernel(found, now.state, **given)

    def _after(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        """After the block before the edited one."""
        self._look(
            self._pass(kwargs), "language", "resid_post", self.gate.config.edited - 1, output
        )

    def _before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Before the edited block."""
        read = args[0] if args else kwargs["hidden_states"]
        self._look(self._pass(kwargs), "language", "resid_pre", self.gate.config.edited, read)

    def _scale(self, key: Tensor, given: Mapping[str, Any]) -> Tensor:
        """The keys ``[batch kv_head key d_head]`` of the edited block, scaled."""
        now = self._pass(given)
        step = now.state["step"]
        if now.visual is None or (step and self.gate.config.decode == "off"):
            return key
        visual = now.visual.to(key.device)
        factors = kernels.factors_of(self._kept(now), visual, list(self.gate.groups))
        grown = fit_keys((factors - 1)[..., None], key.shape[2], step)[..., 0] + 1
        return (key * grown[:, None, :, None]).to(key.dtype)


def attach(gate: LSG, model: Any) -> Attachment:
    """See `LSG.attach`."""
    if isinstance(model, Edited):
        raise ModelError(
            "Got an LVLM with interventions on to attach a gate to; expected the LVLM itself. Write "
            "gate.attach(lvlm), or lvlm.edited([gate, ...])."
        )
    adapted = callable(getattr(type(model), "get_base_model", None))  # by peft
    module = model.get_base_model() if adapted else getattr(model, "module", model)
    if not isinstance(module, nn.Module):
        raise ModelError(
            f"Got {type(model).__name__} to attach a gate to; expected a transformers model or an "
            "LVLM."
        )
    if any(one.model is module for one in ATTACHED.get(gate, [])):
        raise InterventionError(
            "Got a model that this gate is attached to already; expected it once. Write "
            "gate.detach() first."
        )
    one = Attachment(gate, module)
    ATTACHED.setdefault(gate, WeakSet()).add(one)
    return one


def detach(gate: LSG) -> None:
    """See `LSG.detach`."""
    mine = list(ATTACHED.get(gate, []))
    if not mine:
        raise InterventionError(
            "Got a gate that is attached to nothing; expected gate.attach(model) before."
        )
    for one in mine:
        one.detach()
