"""Put a gate on a plain ``transformers`` model: hooks and one attention function, no nnsight.

The kernels are those of the traced gate, so both give the same numbers; what differs is who calls
them. What a pass finds is in its `Pass`, which travels with the arguments of the decoder's blocks::

    model(...)         a Pass is begun: a prompt's, or the next one of a known cache
      vision tower     what feeds the projector is kept
      decoder(...)     V-sinks are found; the Pass joins the arguments
        block          the signal is read
        next block     its attention function scales the keys

The model's hooks hold the attachment; nothing else does, so both go when the model goes.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn
from weakref import WeakKeyDictionary, WeakMethod, WeakSet

import torch
from torch import Tensor, nn

from sinkscope.errors import InputError, InterventionError, ModelError
from sinkscope.interventions.edited import Edited
from sinkscope.kernels import gating as kernels
from sinkscope.kernels.attention import fit_keys
from sinkscope.kernels.walk import first_tensor
from sinkscope.lsg import attached_state as states
from sinkscope.lsg.attached_state import ByIdentity, Pass
from sinkscope.models.keyhook import share_keys
from sinkscope.models.reading import read_anatomy

if TYPE_CHECKING:
    from sinkscope.lsg.gate import LSG

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
        given = states.arguments_of(module, args, kwargs)
        cache = given.get("past_key_values")
        length = states.length_of(cache)
        if length:
            now = states.continued(self._passes.get(cache), given, length)
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
        pixels, encoded = states.images_of(given)
        if encoded is None:
            self._seen = None
            if pixels is None:
                return Pass()  # a text prompt has nothing to scale
            return states.started(self.model, self.anatomy, given, {})
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
        return states.started(self.model, self.anatomy, given, self._seen[0])

    def _end(self, module: nn.Module, args: tuple, output: Any) -> None:
        """After a pass, also one that failed: its cache is known."""
        now, self._now = self._now, None
        if now is None:
            return
        self._last = now
        for cache in states.caches_in(output):
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
        states.refuse_reentrant(self.model.get_submodule(self._edited))
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
        if not states.takes_any(module):
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
