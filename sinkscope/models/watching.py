"""Watch one plain pass with hooks: what its blocks read and write, and how attention is called in it."""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sinkscope.anatomy.attention_call import AttentionCall, registry_of
from sinkscope.anatomy.towers import Anatomy, TowerAnatomy
from sinkscope.kernels.attention import arguments
from sinkscope.kernels.walk import factors_at, first_tensor, times
from sinkscope.models.wrapping import ONE_AT_A_TIME, lent

SPIED = "_sinkscope_spied"
LIMIT = 4.0
"""Rounding errors of the states' dtype by which two additions may be off; they make at most 2."""


@dataclass(eq=False)
class Seen:
    """What hooks saw of one block in a pass: when it began, the shapes of its states, and more."""

    began: list[int] = field(default_factory=list)
    states: list[tuple[int, ...]] = field(default_factory=list)
    parts: dict[str, Tensor] = field(default_factory=dict)
    off: str = "attention or MLP did not run once in a pass"
    attended: int = 0
    calls: list[tuple[torch.Size, torch.Size, torch.Size]] = field(default_factory=list)
    wrote: list[Tensor] = field(default_factory=list)
    reads: bool | None = None
    follows: bool = True


class Watch:
    """Hooks for one plain pass, and what they say of every block; ``packed`` is whether images share a row."""

    def __init__(self, module: Any, anatomy: Anatomy, *, packed: bool) -> None:
        self.module, self.anatomy, self.packed = module, anatomy, packed
        towers = (anatomy.vision, anatomy.language)
        self.seen = {(t.tower, i): Seen() for t in towers for i in range(t.n_layers)}
        self.last: dict[str, tuple[int, Tensor]] = {}
        self.inside: list[Seen] = []
        self.norm, self.clock = "", 0

    @contextmanager
    def on(self) -> Iterator[None]:
        """Watch the passes of this thread until the block ends."""
        get, registries, own = self.module.get_submodule, {}, threading.get_ident()
        with ONE_AT_A_TIME, ExitStack() as stack:
            for tower in (self.anatomy.vision, self.anatomy.language):
                for layer, path in enumerate(tower.blocks):
                    for handle in self._block(tower, layer, get(path)):
                        stack.enter_context(handle)
                    if isinstance(tower.calls[layer], AttentionCall):
                        attention = get(tower.attention[layer])
                        found = registry_of(attention)
                        registries[id(found)] = found
                        for handle in self._attention(self.seen[tower.tower, layer], attention):
                            stack.enter_context(handle)
                        if tower.projection[layer]:
                            note = partial(_projects, self.seen[tower.tower, layer])
                            last = get(tower.projection[layer])
                            stack.enter_context(
                                last.register_forward_pre_hook(note, prepend=True, with_kwargs=True)
                            )
            inner = tuple(f"{block}." for block in self.anatomy.language.blocks)
            for path, part in self.module.named_modules():
                if "norm" in type(part).__name__.lower() and not path.startswith(inner):
                    stack.enter_context(part.register_forward_pre_hook(partial(self._normed, path)))
            spies = []
            for one in registries.values():
                spies.append((one, {"get_interface": partial(self._spy, own, one.get_interface)}))
                for name in list(one):  # forwards of earlier versions look functions up by name
                    stack.callback(_put_back, one, name, vars(one)["_local_mapping"].get(name))
                    one[name] = self._spied(own, one[name])
            with lent(spies):
                yield

    def _block(self, tower: TowerAnatomy, layer: int, block: nn.Module) -> Iterator[Any]:
        """Hooks on a block and on what its branches add."""
        seen = self.seen[tower.tower, layer]

        def begin(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            states: Any = first_tensor(args[0] if args else next(iter(kwargs.values()), None))
            self.clock += 1
            seen.began.append(self.clock)
            seen.parts, seen.states = {"pre": states}, [shape_of(states)]
            before, made = self.last.get(tower.tower, (-1, states))
            if before == layer - 1 >= 0:
                same = shape_of(made) == seen.states[0] and torch.equal(made.to(states), states)
                self.seen[tower.tower, before].follows = same

        def add(site: str, factors: tuple[str, ...], part: nn.Module, args: Any, out: Any) -> None:
            states = first_tensor(out)
            site = f"{site} again" if site in seen.parts else site
            seen.parts[site] = times(states, factors_at(self.module, factors, states.device))

        def end(block: nn.Module, args: Any, out: Any) -> None:
            out = first_tensor(out)
            seen.states.append(shape_of(out))
            self.last[tower.tower] = layer, out
            if len(seen.parts) == 3:
                seen.off = _sums(seen.parts, out, packed=self.packed and tower.tower == "vision")
            seen.parts = {}

        yield block.register_forward_pre_hook(begin, with_kwargs=True)
        if layer in tower.adding:
            for site in ("attn_out", "mlp_out"):
                branch = tower.branch(site, layer)
                part = self.module.get_submodule(branch.path)
                yield part.register_forward_hook(partial(add, site, branch.factors))
        yield block.register_forward_hook(end)

    def _attention(self, seen: Seen, attention: nn.Module) -> Iterator[Any]:
        """Hooks around an attention module, inside of which calls are its own."""

        def begin(*_: Any) -> None:
            seen.attended += 1
            self.inside.append(seen)

        def end(*_: Any) -> None:
            self.inside.pop()

        yield attention.register_forward_pre_hook(begin)
        yield attention.register_forward_hook(end)

    def _spy(self, own: int, real: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The attention function that was asked for, which notes what it is called with."""
        function = real(*args, **kwargs)
        return function if hasattr(function, SPIED) else self._spied(own, function)

    def _spied(self, own: int, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function that notes what it is called with in a module that is watched, in this thread."""

        def called(*args: Any, **kwargs: Any) -> Any:
            out = function(*args, **kwargs)
            if not self.inside or threading.get_ident() != own:
                return out
            seen = self.inside[-1]
            named, _ = arguments((function, args, kwargs))
            seen.calls.append(tuple(named[name].shape for name in ("query", "key", "value")))
            seen.wrote.append(out[0])
            return out

        setattr(called, SPIED, True)
        return called

    def _normed(self, path: str, norm: nn.Module, args: tuple) -> None:
        """Note the norm that reads what the last block of the decoder wrote."""
        layer, made = self.last.get("language", (-1, torch.empty(0)))
        if layer == self.anatomy.language.n_layers - 1 and args and not self.norm:
            same = shape_of(args[0]) == shape_of(made) and torch.equal(args[0].to(made), made)
            self.norm = path if same else ""


def _put_back(registry: Any, name: str, own: Any) -> None:
    """Give a registry of attention functions its own entry back, or none."""
    registry._local_mapping.pop(name, None)
    if own is not None:
        registry[name] = own


def shape_of(states: Any) -> tuple[int, ...]:
    """The shape of a tensor, () of anything else."""
    return tuple(states.shape) if torch.is_tensor(states) else ()


def _projects(seen: Seen, projection: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Note whether an output projection reads what the heads put out."""
    read = first_tensor(args[0] if args else next(iter(kwargs.values()), None))
    if not seen.wrote or not torch.is_tensor(read):
        return
    made = torch.cat(seen.wrote, dim=1).reshape(-1)
    same = read.numel() == made.numel()
    read, eps = read.reshape(-1), torch.finfo(made.dtype).eps
    same = same and bool((read - made).abs().max() <= 4 * eps * made.abs().max())
    seen.reads = same and seen.reads is not False
    seen.wrote = []


def _sums(parts: dict[str, Tensor], out: Tensor, *, packed: bool) -> str:
    """Why what a block reads and two parts of it do not add up to its output, or ""."""
    flat = [part.reshape(-1, part.shape[-1]) if packed else part for part in (*parts.values(), out)]
    if any(part.shape != flat[-1].shape for part in flat):
        return f"their shapes are { {site: list(part.shape) for site, part in parts.items()} }"
    if list(parts)[1] != "attn_out":
        return "its MLP ran before its attention"
    off = rounding_errors(flat[:-1], flat[-1])
    return "" if off <= LIMIT else f"in a pass they differ by {off:.3g} rounding errors"


def rounding_errors(parts: list[Tensor], whole: Tensor) -> float:
    """The largest difference between a sum and the whole, in roundings of the sizes that were added."""
    every, width = (*parts, whole), whole.shape[-1]
    eps = max(torch.finfo(states.dtype).eps for states in every)
    exact = torch.promote_types(whole.dtype, torch.float32)
    few = (states.detach().reshape(-1, width)[:32] for states in every)  # some tokens will do
    pre, attention, mlp, post = (states.to(whole.device, exact) for states in few)
    size = (pre.abs() + attention.abs() + mlp.abs()) * eps
    off = (pre + attention + mlp - post).abs() / size.clamp(min=torch.finfo(torch.float32).tiny)
    return float(off.max())
