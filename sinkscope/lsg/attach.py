"""Gate a plain model, whose prompts, decode steps and backward passes may interleave.

What a gate found in a prompt is kept with the cache that it filled, and passed to blocks as an argument.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any, NoReturn
from weakref import WeakKeyDictionary, WeakMethod, WeakSet, ref

import torch
from torch import Tensor, nn

from sinkscope.errors import InputError, InterventionError
from sinkscope.kernels import gating as kernels
from sinkscope.kernels.attention import fit_keys
from sinkscope.kernels.walk import first_tensor
from sinkscope.lsg import passes
from sinkscope.lsg.passes import Gate, Pass
from sinkscope.models.decoder import share_keys
from sinkscope.models.lvlm import LVLM
from sinkscope.models.patch_map import MEASURING
from sinkscope.sites import Site

CARRIED = "sinkscope_passes"
"""The argument of blocks that holds, by attachment, the pass that calls them."""
ATTACHED: WeakKeyDictionary[Gate, WeakSet[Attachment]] = WeakKeyDictionary()


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


def no_cache(found: Any) -> InputError:
    """The error of a cache that cannot be followed."""
    return InputError(
        f"Got a cache of type {type(found).__name__} for a gated model; expected one of transformers' "
        "caches. Write past_key_values=DynamicCache()."
    )


class Attachment(AbstractContextManager["Attachment"]):
    """A ``gate`` on a ``transformers`` ``model``, until `detach`."""

    def __init__(self, gate: Gate, model: nn.Module) -> None:
        self.gate, self.model = gate, model
        self._held = LVLM(model, verify=False)
        self.anatomy = self._held.anatomy
        gate.check_model(self.anatomy)
        gate.check_weights(model, self.anatomy)
        self._seen: tuple[dict[str, Tensor], dict[int, Tensor]] | None = None  # by the vision tower
        self._used = ByIdentity()  # what was encoded before the pass that took it
        self._passes = ByIdentity()  # by cache
        self._now: Pass | None = None
        self._last: Pass | None = None
        self._stack = ExitStack()
        config, part = gate.config, model.get_submodule
        language, vision = self.anatomy.language.blocks, self.anatomy.vision.blocks
        tower, decoder = ".".join(vision[0].split(".")[:2]), language[0].rsplit(".", 2)[0]
        handles = [
            model.register_forward_pre_hook(self._asked(self._begin), with_kwargs=True),
            model.register_forward_hook(self._asked(self._end), always_call=True),
            part(tower).register_forward_pre_hook(
                self._asked(self._begin_vision), with_kwargs=True
            ),
            part(decoder).register_forward_pre_hook(self._asked(self._enter), with_kwargs=True),
        ]
        for layer in config.model["feed_layers"]:
            hook = self._asked(partial(self._after_vision, layer))
            handles.append(part(vision[layer]).register_forward_hook(hook))
        if not isinstance(config.layer, str):
            read = part(language[config.layer])
            handles.append(read.register_forward_hook(self._asked(self._around), with_kwargs=True))
        if isinstance(config.layer, str) or config.l_detector is not None:
            edited = part(language[config.edited])
            handles.append(
                edited.register_forward_pre_hook(self._asked(self._around), with_kwargs=True)
            )
        for handle in handles:
            self._stack.callback(handle.remove)
        scale: Any = WeakMethod(self._scale)  # the function that asks for it outlives the model
        end = share_keys(model, self.anatomy, config.edited, lambda key, given: scale()(key, given))
        self._stack.callback(end)
        ATTACHED.setdefault(gate, WeakSet()).add(self)

    def _asked(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        """The hook, which does nothing in passes that only measure the model."""
        return partial(self._run, hook)

    def _run(self, hook: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return None if id(self.model) in MEASURING else hook(*args, **kwargs)

    @property
    def coefficients(self) -> Tensor | None:
        """The coefficients of the last forward pass, float ``[batch group]``; None before the first."""
        kept = {} if self._last is None else self._kept(self._last)
        return kept["coefficients"].detach() if "coefficients" in kept else None

    def detach(self) -> None:
        """Take the gate off; the model is bitwise as before. A second call does nothing."""
        self._stack.close()
        ATTACHED.get(self.gate, WeakSet()).discard(self)

    def __exit__(self, *error: object) -> None:
        self.detach()

    def __reduce_ex__(self, protocol: object) -> NoReturn:  # a copy would share the passes
        what = "Got a model to copy or pickle that a gate is attached to; expected a plain one."
        raise InterventionError(f"{what} Write gate.detach() first, then attach to the copy.")

    def _begin(self, module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
        """Before a pass: map a prompt, or count a decode step."""
        self._now = None
        given = passes.arguments_of(module, args, kwargs)
        cache = given.get("past_key_values")
        if cache is not None and not callable(getattr(cache, "get_seq_length", None)):
            raise no_cache(cache)
        length = 0 if cache is None else int(cache.get_seq_length())
        before = self._passes.get(cache)
        now = passes.continued(before, given, length) if length else self._started(given)
        if cache is not None:
            self._passes.put(cache, now)
        self._now = now

    def _started(self, given: Mapping[str, Any]) -> Pass:
        if given.get("input_ids") is None:
            what = "Got a prompt without input_ids for a gated model; expected them."
            raise InputError(f"{what} Pass input_ids and pixel_values, not inputs_embeds.")
        pixels, encoded = passes.images_of(given)
        if encoded is None:
            self._seen = None  # and a text prompt has nothing to scale
            return Pass() if pixels is None else passes.started(self._held, given, {})
        if self._used.get(encoded) or self._seen is None:
            raise InputError(
                "Got images that were encoded before the gate was attached, or for an earlier pass, as by "
                "generate(use_cache=False); expected to see them pass the vision tower, once. Write "
                "use_cache=True, or pass pixel_values."
            )
        kept = given.get("logits_to_keep")
        if isinstance(kept, int) and kept > 1:  # how generate() calls the model to judge guesses
            what = f"Got a prompt with {kept - 1} guessed tokens behind it; expected it alone."
            raise InputError(f"{what} Leave out prompt_lookup_num_tokens or assistant_model.")
        self._used.put(encoded, value=True)
        return passes.started(self._held, given, self._seen[0])

    def _end(self, module: nn.Module, args: tuple, output: Any) -> None:
        """After a pass, also one that failed: its cache is known."""
        now, self._now = self._now, None
        self._last = now or self._last
        parts = output if isinstance(output, tuple) else [getattr(output, "past_key_values", None)]
        for cache in parts if now else ():
            if callable(getattr(cache, "get_seq_length", None)):
                self._passes.put(cache, now)

    def _begin_vision(self, module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
        """Before the vision tower: keep what it is called with."""
        given = [*args, *(v for k, v in kwargs.items() if "grid" not in k)]
        called = {"pixel_values": next(value for value in given if isinstance(value, Tensor))}
        grid = next((v for k, v in kwargs.items() if "grid" in k), None)
        self._seen = (called if grid is None else {**called, "image_grid_thw": grid}, {})

    def _after_vision(self, layer: int, module: nn.Module, args: tuple, output: Any) -> None:
        """After a vision block: keep what feeds the projector."""
        if self._seen is not None:
            self._seen[1][layer] = passes.vision_states(output)

    def _enter(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Before the decoder: find V-sinks, and send the pass along with the arguments."""
        now = self._pass({})
        blocks, config = self.anatomy.language.blocks, self.gate.config
        edited: Any = self.model.get_submodule(blocks[config.edited])
        if getattr(edited, "gradient_checkpointing", False) and edited.training:
            keywords = getattr(edited._gradient_checkpointing_func, "keywords", {})
            if torch.is_grad_enabled() and keywords.get("use_reentrant") is not False:
                raise InputError(  # it runs the block without a graph first
                    "Got reentrant gradient checkpointing, which loses the gate's gradients; expected "
                    'the other kind. Write gradient_checkpointing_kwargs={"use_reentrant": False}.'
                )
        if now.tokens is not None and not now.state["step"]:
            fed = {} if self._seen is None else self._seen[1]
            if not fed:
                what = "Got images that did not pass the vision tower of a gated model"
                raise InputError(f"{what}; expected them to. Pass pixel_values.")
            for layer in config.model["feed_layers"]:
                self._read(now, Site("vision", "resid_post", layer), fed[layer])
        self._seen = None
        known = inspect.signature(type(module).forward).parameters.values()
        if not any(one.kind is one.VAR_KEYWORD for one in known):
            return None
        return args, {**kwargs, CARRIED: {**kwargs.get(CARRIED, {}), id(self): now}}

    def _pass(self, given: Mapping[str, Any]) -> Pass:
        """The pass that a block is part of, also where a checkpoint runs the block again."""
        now = given.get(CARRIED, {}).get(id(self), self._now)
        if now is None:
            raise InputError(
                "Got a call of a part of a gated model, such as model.model(...); expected the whole. Write "
                "model(**inputs), also in a wrapper that calls model.forward, or gate.detach() first."
            )
        return now

    def _kept(self, now: Pass) -> dict[str, Any]:
        return now.state["memory"].get(("gate", id(self.gate)), {})

    def _read(self, now: Pass, site: Site, seen: Any) -> None:
        """Run the gate's signals at one site on what is there."""
        if now.tokens is None or now.last is None:
            return
        found = first_tensor(seen)
        for signal in passes.signals_of(self.gate, now.tokens, now.state["step"]):
            if signal.site != site:
                continue
            given = passes.placed(signal.parameters, found)
            if "at" in given:  # behind the prompt there may be an answer: labels say so
                last = now.last.to(found.device)
                places = torch.arange(given["tokens"].shape[1], device=last.device)
                given |= {"at": last, "tokens": given["tokens"] & (places <= last[:, None])}
            signal.kernel(found, now.state, **given)

    def _around(self, module: Any, args: tuple, kwargs: dict[str, Any], output: Any = None) -> None:
        """After the block before the edited one, and before the edited one."""
        place, seen = ("resid_post", self.gate.config.edited - 1), output
        if output is None:
            place = ("resid_pre", self.gate.config.edited)
            seen = args[0] if args else kwargs["hidden_states"]
        self._read(self._pass(kwargs), Site("language", *place), seen)

    def _scale(self, key: Tensor, given: Mapping[str, Any]) -> Tensor:
        """The keys ``[batch kv_head key d_head]`` of the edited block, scaled."""
        if id(self.model) in MEASURING:
            return key
        now = self._pass(given)
        step = now.state["step"]
        if now.tokens is None or (step and self.gate.config.decode == "off"):
            return key
        visual = (now.tokens.image >= 0).to(key.device)
        factors = kernels.factors_of(self._kept(now), visual, list(self.gate.config.groups))
        grown = fit_keys((factors - 1)[..., None], key.shape[2], step)[..., 0] + 1
        return (key * grown[:, None, :, None]).to(key.dtype)
