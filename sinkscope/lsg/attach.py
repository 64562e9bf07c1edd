"""Put a gate on a plain ``transformers`` model: hooks and one attention function, no nnsight.

The kernels are those of the traced gate, so both give the same numbers; what differs is who calls
them. A forward pass with a prompt starts afresh; later ones are decode steps of the same batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from sinkscope.errors import InputError, InterventionError, ModelError
from sinkscope.kernels import gating as kernels
from sinkscope.kernels.attention import fit_keys
from sinkscope.kernels.walk import first_tensor
from sinkscope.models.keyhook import scaled_keys
from sinkscope.models.prepare import make_sample
from sinkscope.models.reading import read_anatomy
from sinkscope.tokens import TokenMap

if TYPE_CHECKING:
    from sinkscope.lsg.gate import LSG
    from sinkscope.models.anatomy import Anatomy

ATTACHED: WeakKeyDictionary[nn.Module, list[Attachment]] = WeakKeyDictionary()
IGNORED = -100


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
        self._called: dict[str, Tensor] = {}  # what the vision tower was last called with
        self._fed: dict[int, Tensor] = {}  # what feeds the projector, by block
        self._tokens: TokenMap | None = None
        self._visual: Tensor | None = None
        self._state: dict[str, Any] = {"step": 0, "memory": {}}
        self._stack = ExitStack()
        self._hook()

    @property
    def coefficients(self) -> Tensor | None:
        """The coefficients of the last forward pass, float ``[batch group]``; None before the first."""
        kept = self._state["memory"].get(("gate", id(self.gate)), {})
        found = kept.get("coefficients")
        return None if found is None else found.detach()

    def detach(self) -> None:
        """Take the gate off; the model is bitwise itself again. Twice is once."""
        self._stack.close()
        others = [a for a in ATTACHED.get(self.gate, []) if a is not self]
        if others:
            ATTACHED[self.gate] = others
        else:
            ATTACHED.pop(self.gate, None)

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *error: object) -> None:
        self.detach()

    def _hook(self) -> None:
        """Register all hooks."""
        config, keep = self.gate.config, self._stack.callback
        language = self.anatomy.language.blocks
        keep(self.model.register_forward_pre_hook(self._begin, with_kwargs=True).remove)
        tower = ".".join(self.anatomy.vision.blocks[0].split(".")[:2])
        keep(
            self.model.get_submodule(tower)
            .register_forward_pre_hook(self._begin_vision, with_kwargs=True)
            .remove
        )
        for layer in config.model["feed_layers"]:
            block = self.model.get_submodule(self.anatomy.vision.blocks[layer])
            keep(block.register_forward_hook(self._after_vision(layer)).remove)
        if isinstance(config.layer, str):
            block = self.model.get_submodule(language[0])
            keep(block.register_forward_pre_hook(self._before("signal"), with_kwargs=True).remove)
        else:
            block = self.model.get_submodule(language[config.layer])
            keep(block.register_forward_hook(self._after(config.layer)).remove)
        if config.l_detector is not None:
            block = self.model.get_submodule(language[config.edited])
            keep(block.register_forward_pre_hook(self._before("L"), with_kwargs=True).remove)
        keep(edit_keys_of(self.model, self.anatomy, config.edited, self._scale))

    def _begin(self, module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
        """Before a pass: a prompt is mapped anew, a decode step is counted."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        cache = kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length() > 0:
            self._decode(ids, kwargs)
            return
        if ids is None:
            raise InputError(
                "Got a prompt without input_ids for a gated model; expected them, to find the image "
                "tokens. Pass input_ids and pixel_values instead of inputs_embeds."
            )
        self._state = {"step": 0, "memory": {}}
        self._tokens = self._visual = None
        encoded = (kwargs.get("mm_encoder_outputs") or {}).get("image")
        if kwargs.get("pixel_values") is None and encoded is None:
            return  # a text prompt has nothing to scale
        inputs = {k: v for k, v in kwargs.items() if isinstance(v, Tensor) and k not in NO_INPUTS}
        if encoded is not None:  # generate() calls the vision tower before the first pass
            if not self._fed:
                raise InputError(
                    "Got images that were encoded before the gate was attached; expected to see them "
                    "pass the vision tower. Pass pixel_values."
                )
            inputs |= self._called
        inputs["input_ids"] = ids
        try:
            self._tokens = make_sample(self.model, None, self.anatomy, None, None, inputs).tokens
        except InputError as error:
            if encoded is None:
                raise
            raise InputError(
                f"{error} If generate() was asked for beams or several sequences, which repeat rows: "
                "a gate works with greedy decoding and sampling of one sequence."
            ) from error
        self._last = last_prompt(self._tokens, kwargs.get("labels"))
        self._visual = (self._tokens.image >= 0).to(ids.device)

    def _begin_vision(self, module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
        """Before the vision tower: keep what it is called with."""
        given = [*args, *(v for k, v in kwargs.items() if "grid" not in k)]
        pixels = next(value for value in given if isinstance(value, Tensor))
        grid = next((v for k, v in kwargs.items() if "grid" in k), None)
        self._called = {"pixel_values": pixels}
        if grid is not None:
            self._called["image_grid_thw"] = grid

    def _after_vision(self, layer: int) -> Any:
        """A hook that keeps what feeds the projector."""

        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            self._fed[layer] = first_tensor(output).detach()

        return hook

    def _decode(self, ids: Tensor | None, kwargs: Mapping[str, Any]) -> None:
        """Before a decode step."""
        if self._visual is None:
            return
        new = ids if ids is not None else kwargs.get("inputs_embeds")
        shape = None if new is None else tuple(new.shape[:2])
        if shape != (self._visual.shape[0], 1):
            raise InputError(
                f"Got a decode step of shape {shape} for a gated model; expected "
                f"({self._visual.shape[0]}, 1): one token per row of the prompt's batch. Beams and "
                "assisted decoding reorder rows: use greedy decoding or sampling."
            )
        self._state["step"] += 1

    def _wanted(self, tower: str, name: str, layer: int) -> list[Any]:
        """The gate's looks at a site in this pass."""
        if self._tokens is None:
            return []
        looks = self.gate.looks(self._tokens, self._state["step"])
        return [
            look
            for look in looks
            if (look.site.tower, look.site.name, look.site.layer) == (tower, name, layer)
        ]

    def _look(self, looks: list[Any], states: Any) -> None:
        """Run looks on states."""
        for look in looks:
            given = {
                name: value.to(first_tensor(states).device) if isinstance(value, Tensor) else value
                for name, value in look.parameters.items()
            }
            if "at" in given:
                last = self._last.to(given["at"].device)
                places = torch.arange(given["tokens"].shape[1], device=last.device)
                # Behind the prompt there may be an answer: labels say so.
                given |= {"at": last, "tokens": given["tokens"] & (places <= last[:, None])}
            look.kernel(first_tensor(states), self._state, **given)

    def _after(self, layer: int) -> Any:
        """A hook on what the block before the edited one writes."""

        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            self._look(self._wanted("language", "resid_post", layer), output)

        return hook

    def _before(self, what: str) -> Any:
        """A hook on what the edited block reads."""
        kernel = {"signal": kernels.note_coefficients, "L": kernels.note_l_sinks}[what]

        def hook(module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
            states = args[0] if args else kwargs["hidden_states"]
            looks = self._wanted("language", "resid_pre", self.gate.config.edited)
            self._look([look for look in looks if look.kernel is kernel], states)

        return hook

    def _scale(self, key: Tensor) -> Tensor:
        """The keys ``[batch kv_head key d_head]`` of the edited block, scaled."""
        if self._visual is None or (self._state["step"] and self.gate.config.decode == "off"):
            return key
        kept = self._state["memory"][("gate", id(self.gate))]
        for layer, states in self._fed.items():
            self._look(self._wanted("vision", "resid_post", layer), states)
        self._fed = {}
        visual = self._visual.to(key.device)
        factors = kernels.factors_of(kept, visual, list(self.gate.groups))
        grown = fit_keys((factors - 1)[..., None], key.shape[2], self._state["step"])[..., 0] + 1
        return (key * grown[:, None, :, None]).to(key.dtype)


EDITS: WeakKeyDictionary[nn.Module, tuple[list[Any], ExitStack]] = WeakKeyDictionary()
"""By attention module: what edits its keys now, in the order of attachment."""


def edit_keys_of(model: nn.Module, anatomy: Anatomy, layer: int, edit: Any) -> Any:
    """Edit the keys of one block beside whatever edits them already.

    Returns:
        A function that ends this edit, in any order with the others.
    """
    attention = model.get_submodule(anatomy.language.attention[layer])
    if attention not in EDITS:
        edits: list[Any] = []

        def all_edits(key: Tensor) -> Tensor:
            for one in edits:
                key = one(key)
            return key

        stack = ExitStack()
        stack.enter_context(scaled_keys(model, anatomy, {layer: all_edits}))
        EDITS[attention] = (edits, stack)
    mine, stack = EDITS[attention]
    mine.append(edit)

    def end() -> None:
        mine.remove(edit)
        if not mine:
            stack.close()
            EDITS.pop(attention, None)

    return end


NO_INPUTS = ("labels", "past_key_values", "cache_position", "position_ids", "logits_to_keep")


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


def attach(gate: LSG, model: Any) -> Attachment:
    """See `LSG.attach`."""
    module = getattr(model, "module", model)
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
    ATTACHED.setdefault(gate, []).append(one)
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
