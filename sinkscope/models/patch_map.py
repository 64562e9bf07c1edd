"""Measure what feeds the decoder: which vision blocks, and which ViT tokens every image token is made of.

The gradient of an image token with respect to the states that feed the projector is zero at all ViT tokens
but its sources. Image tokens are told apart by the binary digits of their number, so that a map of N tokens
takes about 2 log2 N gradients through the projector. Blocks do not run for it: states pass through them.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sinkscope.anatomy.towers import Anatomy
from sinkscope.anatomy.weights import device_of
from sinkscope.errors import NonFiniteError
from sinkscope.kernels.walk import first_tensor
from sinkscope.models.gradients import (
    destinations,
    has_graph,
    note_boxes,
    reached,
    sources_of,
    states_in,
    weights_of,
    with_versions,
)
from sinkscope.models.wrapping import ONE_AT_A_TIME, lent, undisturbed

AGAIN = "the vision tower runs several times in a pass"
CONTENT = "which ViT tokens make an image token changes with the image"
CROSS = "image states are not placed among the prompt's tokens"
KEPT = 256  # maps of other shapes that are remembered, the newest ones
MEASURING: set[int] = set()
"""The modules, by id, of which a pass runs to measure something: hooks of gates let it go."""


class Again(Exception):  # noqa: N818  it is no error, but something to say
    """A vision block runs a second time."""


class _Reached(Exception):  # noqa: N818  it is no error: the pass has come as far as is needed
    """Ends a pass."""


@dataclass(frozen=True)
class Wiring:
    """How the towers are connected.

    ``feeds`` are the vision blocks that make image tokens; ``enters`` are pairs of a decoder layer above 0 and
    a vision block whose states are added there (DeepStack); ``projector`` is the path of what lies between,
    or "".
    """

    feeds: tuple[int, ...]
    enters: tuple[tuple[int, int], ...] = ()
    projector: str = ""


@dataclass(frozen=True, eq=False)
class PatchMap:
    """What was measured of inputs of one shape.

    Attributes:
        shape: Of the states that feed the projector, ``(row, pos)``, ``(row, y, x)`` or ``(packed,)``.
        fills: Whether the tower's output fills an image token, bool ``[image token]`` over the batch.
        sources: ViT tokens that an image token is made of, int ``[image token, source]``: indices into the
            flattened states, -1 padded.
        pixels: What a ViT token reads, int ``[ViT token, 5]``: index of a picture or patch, and ``y0 x0 y1
            x1`` in it; -1 where it reads no pixel.
        why: Why there are no sources, or "".
    """

    shape: tuple[int, ...]
    fills: Tensor
    sources: Tensor
    pixels: Tensor
    why: str = ""


@dataclass(eq=False)
class PatchMaps:
    """Measures the wiring and the patch maps of a model, and keeps the maps by the shape of the inputs.
    ``tuples`` are the towers whose blocks return a tuple; ``stand_in`` makes what stands for a model without
    weights; ``shifting`` is whether maps change with the image."""

    module: Any
    stand_in: Any = None
    tuples: dict[str, bool] = field(default_factory=dict)
    known: dict[Any, PatchMap] = field(default_factory=dict)
    shifting: bool = False

    def runs(self, anatomy: Anatomy) -> Any:
        """The model whose passes are measured: the module, or what stands for one without weights."""
        if device_of(self.module.get_input_embeddings()).type != "meta":
            return self.module
        if not isinstance(self.stand_in, nn.Module):
            self.stand_in = self.stand_in(self.module, anatomy)
        return self.stand_in

    def wire(self, anatomy: Anatomy, inputs: Mapping[str, Any]) -> Wiring:
        """Run the model once on inputs with a picture, and see what feeds what."""
        leaves: dict[int, Tensor] = {}
        entries: dict[int, list[Tensor]] = {}

        def tap(layer: int, real: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            with torch.no_grad():
                out = real(*args, **kwargs)
            self.tuples["vision"] = isinstance(out, tuple)
            leaves[layer] = first_tensor(out).detach().requires_grad_()
            return (leaves[layer], *out[1:]) if isinstance(out, tuple) else leaves[layer]

        def enter(layer: int, real: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            entries[layer] = [x for x in (*args, *kwargs.values()) if has_graph(x)]
            if layer == anatomy.language.n_layers - 1:
                raise _Reached
            with torch.no_grad():
                return real(*args, **kwargs)

        between: list[str] = []
        hooks = list(_watched(self.runs(anatomy), anatomy, between))
        try:
            self._pass(anatomy, inputs, tap, enter)
        finally:
            for hook in hooks:
                hook.remove()
        if not all(bool(torch.isfinite(x).all()) for x in entries.get(0, ())):
            got = "The projector writes NaN or infinite states for a test image; expected finite ones."
            raise NonFiniteError(
                f"{got} Load the model in bfloat16 or float32 and check the weights."
            )
        reads = {layer: _read(found, leaves) for layer, found in entries.items()}
        enters = tuple((layer, feed) for layer in sorted(reads) if layer for feed in reads[layer])
        feeds = reads.get(0, ()) or tuple(sorted({feed for _, feed in enters}))
        return Wiring(feeds, enters, between[-1] if between else "")

    def settle(self, anatomy: Anatomy, inputs: Mapping[str, Any], visual: Tensor) -> Anatomy:
        """The anatomy with what was declared of the towers' connection replaced by what was measured."""
        with gradients():
            wiring = self.wire(anatomy, inputs)
        same = sorted(set(anatomy.feeds)) == list(wiring.feeds)
        feeds = anatomy.feeds if same or not wiring.feeds else wiring.feeds
        projector = anatomy.projector or wiring.projector
        known = replace(
            anatomy, feeds=feeds, enters=wiring.enters, projector=projector, measured=True
        )
        found = self.of(known, inputs, visual)
        with gradients():  # of states of another image
            other = self.measure(known, inputs, visual, seed=1)
        self.shifting = not torch.equal(found.sources, other.sources)
        if self.shifting:
            found = self.known[_signature(inputs, visual)] = self._said(found)
        row = found.pixels[
            : len(found.pixels) // (found.shape[0] if len(found.shape) > 1 else 1), 0
        ]
        first = int((row >= 0).int().argmax()) if (row >= 0).any() else 0
        fed = torch.isin(torch.arange(len(row)), found.sources)
        drops = int(fed.int().argmax()) if fed.any() else first
        inner = (f"{anatomy.decoder}.", *(f"{path}." for path in anatomy.vision.blocks))
        names = [n for n, _ in self.module.named_parameters() if not n.startswith(inner)]
        has_cls = any("cls" in name or "class" in name for name in names)
        prefix = (["cls"] * has_cls + ["register"] * first)[:first]
        merge = round(found.sources.shape[1] ** 0.5)
        ends = first == 0 and len(row) > 0 and int(row[-1]) < 0  # what reads no pixels comes last
        more = {"suffix": ("cls",) if has_cls and ends else (), "drops": drops, "merge": merge}
        return replace(known, prefix=tuple(prefix), **more)

    def of(self, anatomy: Anatomy, inputs: Mapping[str, Any], visual: Tensor) -> PatchMap:
        """The map of inputs whose image tokens are ``visual``, bool ``[batch pos]``."""
        key = _signature(inputs, visual)
        if key not in self.known:
            if len(self.known) >= KEPT:
                self.known.pop(next(iter(self.known)))
            with gradients():
                self.known[key] = self._said(self.measure(anatomy, inputs, visual))
        return self.known[key]

    def _said(self, found: PatchMap) -> PatchMap:
        """A map, or why there is none where another image of the same shape has another one."""
        nothing = torch.full_like(found.sources[:, :1], -1)
        return replace(found, sources=nothing, why=CONTENT) if self.shifting else found

    def measure(
        self, anatomy: Anatomy, inputs: Mapping[str, Any], visual: Tensor, seed: int = 0
    ) -> PatchMap:
        """The same, measured anew, with other states in the tower's place for another ``seed``."""
        generator = torch.Generator().manual_seed(seed)
        count, nothing = int(visual.sum()), torch.full((int(visual.sum()), 1), -1)
        try:
            (states, leaves), (others, _) = (self._enter(anatomy, inputs, generator) for _ in "12")
        except Again:
            fills, pixels = torch.ones(count, dtype=torch.bool), torch.full((0, 5), -1)
            return PatchMap((0, 0), fills, nothing, pixels, AGAIN)
        pixels, shape = self._pixels(anatomy, inputs), tuple(leaves[0].shape[:-1])
        visual = visual.to(states.device).clone()  # it may be of inference mode
        if states.shape[:-1] != visual.shape:
            got = (
                f"the decoder reads states {tuple(states.shape[:-1])} for ids {tuple(visual.shape)}"
            )
            return PatchMap(shape, torch.zeros(count, dtype=torch.bool), nothing, pixels, got)
        fills = (states != others).any(dim=-1)[visual]
        if not fills.any():
            return PatchMap(shape, fills.cpu(), nothing, pixels, CROSS)
        sources = torch.full((count, 1), -1)
        found, why = sources_of(states[visual][fills], leaves)
        sources = sources.expand(-1, found.shape[1]).clone()
        sources[fills.cpu()] = found
        return PatchMap(shape, fills.cpu(), sources, pixels, why)

    def _enter(
        self, anatomy: Anatomy, inputs: Mapping[str, Any], generator: torch.Generator
    ) -> tuple[Tensor, list[Tensor]]:
        """The decoder's first states, and those of the feeding blocks: random numbers with a graph."""
        leaves: dict[int, Tensor] = {}
        found: list[Tensor] = []

        def tap(layer: int, real: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            states = states_in(args, kwargs)
            if layer in leaves:
                raise Again
            made = torch.randn(states.shape, generator=generator).to(states)
            leaves[layer] = made.requires_grad_()
            return self._alike("vision", leaves[layer])

        def enter(layer: int, real: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            found.append(states_in(args, kwargs))
            raise _Reached

        self._pass(anatomy, inputs, tap, enter)
        return found[0], [leaves[layer] for layer in anatomy.feed_layers]

    def _pixels(self, anatomy: Anatomy, inputs: Mapping[str, Any]) -> Tensor:
        """What every ViT token of the last feeding block reads; see `PatchMap`."""
        found: list[Tensor] = []

        def tap(layer: int, real: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if layer == anatomy.feed_layers[-1]:
                found.append(states_in(args, kwargs))
                raise _Reached
            return self._alike("vision", states_in(args, kwargs))

        leaves, given = [], dict(inputs)
        for name, x in inputs.items():
            if torch.is_tensor(x) and x.is_floating_point():  # channels last, to be summed over
                planes = x.ndim > 3
                leaf = (x.movedim(-3, -1) if planes else x).detach().clone().requires_grad_()
                given[name] = leaf.movedim(-1, -3) if planes else leaf
                leaves.append(leaf)
        self._pass(anatomy, given, tap, None)
        states = found[0].reshape(-1, found[0].shape[-1])
        pixels = torch.full((len(states), 5), -1)
        if states.requires_grad:
            for leaf, at in zip(leaves, destinations(states, leaves), strict=True):
                note_boxes(at.cpu() if leaf.ndim > 3 else at.cpu().reshape(-1, 1, 1), pixels)
        return pixels

    def _alike(self, tower: str, states: Tensor) -> Any:
        """States as a block of the tower returns them."""
        return (states,) if self.tuples.get(tower) else states

    def _pass(
        self,
        anatomy: Anatomy,
        inputs: Mapping[str, Any],
        vision: Callable[..., Any],
        language: Callable[..., Any] | None,
    ) -> None:
        """Run the model with its blocks taken over until one of them ends the pass."""
        loans, runs = [], self.runs(anatomy)
        for tower, take in ((anatomy.vision, vision), (anatomy.language, language)):
            for layer, path in enumerate(tower.blocks):
                block = runs.get_submodule(path)
                if take is None:
                    break
                loans.append((block, {"forward": partial(take, layer, block.forward)}))
        with (
            ONE_AT_A_TIME,
            _measuring(self.module),
            undisturbed(runs),
            lent(loans),
            suppress(_Reached),
        ):
            runs(**{name: with_versions(x) for name, x in inputs.items()})


@contextmanager
def gradients() -> Iterator[None]:
    """Keep graphs until the block ends, whatever the caller has switched off."""
    with torch.inference_mode(mode=False), torch.enable_grad():
        yield


@contextmanager
def _measuring(module: nn.Module) -> Iterator[None]:
    """Say that the passes of a module are for measuring until the block ends."""
    MEASURING.add(id(module))
    try:
        yield
    finally:
        MEASURING.discard(id(module))


def _read(entries: Iterable[Tensor], leaves: Mapping[int, Tensor]) -> tuple[int, ...]:
    """The vision blocks whose states some tensors depend on."""
    found: set[int] = set()
    for value in entries:
        flat = value.reshape(-1, value.shape[-1])
        hits = reached(flat, weights_of(flat), list(leaves.values()))
        found |= {layer for layer, hit in zip(leaves, hits, strict=True) if hit.any()}
    return tuple(sorted(found))


def _watched(module: nn.Module, anatomy: Anatomy, found: list[str]) -> Iterable[Any]:
    """Hooks on outermost modules between blocks and decoder: their paths, as they are reached."""
    blocks = (*anatomy.vision.blocks, *anatomy.language.blocks)
    inner = tuple(f"{path}." for path in (*blocks, anatomy.decoder))

    def note(path: str, part: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        if any(map(has_graph, (*args, *kwargs.values()))) and has_graph(first_tensor(out)):
            found[:] = [p for p in found if not p.startswith(f"{path}.")] + [path]

    for path, part in module.named_modules():
        holds = not path or any(at.startswith(f"{path}.") for at in (*blocks, anatomy.decoder))
        if (
            not holds
            and path not in blocks
            and not path.startswith(inner)
            and path != anatomy.decoder
        ):
            yield part.register_forward_hook(partial(note, path), with_kwargs=True)


def _signature(inputs: Mapping[str, Any], visual: Tensor) -> tuple[Any, ...]:
    """What a map depends on: shapes, small whole numbers such as grids, and image tokens by row."""
    parts: list[Any] = [tuple(visual.sum(dim=1).tolist())]
    per_token = tuple(visual.shape)
    for name in sorted(inputs):
        x = inputs[name]
        if torch.is_tensor(x) and tuple(x.shape[-2:]) != per_token:
            whole = not x.is_floating_point() and x.numel() <= 1 << 20
            parts.append(
                (name, tuple(x.shape), str(x.dtype), x.cpu().numpy().tobytes() if whole else b"")
            )
    return tuple(parts)
