"""What a model does in plain passes under its own eager attention: no probe, edit or kernel of the package.

Modules are found by dotted paths. The model is left as it was, also after an error.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

EAGER, KERNEL = "eager_attention_forward", "_attn_implementation_internal"
CACHES = ("past_key_values", "past_key_value", "cache_params")
Inputs = Mapping[str, Any]
Paths = Sequence[str]
Wrap = Callable[..., Any]


class UncheckedError(Exception):
    """There is nothing to compare with, for the reason given."""


class OtherKeysError(UncheckedError):
    """A module attends to something else than the tokens of its tower."""


class _StoppedError(Exception):
    """Ends a pass where enough was seen."""


def put(stack: ExitStack, settings: dict[str, Any], name: str, value: Any) -> None:
    """Set an entry of a dict until the stack ends."""
    stack.callback(settings.update, {name: settings[name]} if name in settings else {})
    stack.callback(settings.pop, name, None)
    settings[name] = value


@contextmanager
def passes(model: nn.Module, wraps: Mapping[str, Wrap], kernel: str = "") -> Iterator[None]:
    """Run plain passes in evaluation mode, without a graph, and under a ``kernel`` of attention if one is given.
    ``wraps[path](forward, *args, **kwargs)`` takes the place of the ``forward`` of a module. UncheckedError if
    a pass fails."""
    configs: dict[int, Any] = {}
    waiting: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    while waiting:
        config = waiting.pop()
        if id(config) not in configs and KERNEL in getattr(config, "__dict__", ()):
            configs[id(config)] = config
            waiting += [getattr(config, name, None) for name in config.sub_configs]
    with ExitStack() as stack, torch.no_grad():
        for module in model.modules():
            put(stack, vars(module), "training", False)
        for config in configs.values() if kernel else ():
            put(stack, vars(config), KERNEL, kernel)
        for path, wrap in wraps.items():
            module = model.get_submodule(path)
            put(stack, vars(module), "forward", partial(wrap, module.forward))
        try:
            yield
        except UncheckedError:
            raise
        except Exception as error:
            got = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise UncheckedError(f"a plain pass fails ({got})") from error


def placed(inputs: Inputs, device: torch.device) -> dict[str, Any]:
    """Inputs on a device."""
    return {n: x.to(device) if isinstance(x, Tensor) else x for n, x in inputs.items()}


def plain_logits(model: Any, inputs: Inputs) -> Tensor:
    """Logits ``[batch pos vocab]`` of one pass, on the CPU; UncheckedError if there are none."""
    with passes(model, {}):
        output = model(**inputs)
    if not isinstance(found := getattr(output, "logits", None), Tensor):
        raise UncheckedError(f"a plain pass gives no logits, but a {type(output).__name__}")
    return found.cpu()


def first_tensor(value: Any) -> Tensor:
    """A tensor, or the first one of several."""
    return value if isinstance(value, Tensor) else next(x for x in value if isinstance(x, Tensor))


def states_in(args: Sequence[Any], kwargs: Inputs) -> Tensor:
    """The states that a block is called with."""
    named = kwargs.get("inputs_embeds", kwargs.get("hidden_states"))
    return named if isinstance(named, Tensor) else first_tensor((*args, *kwargs.values()))


@contextmanager
def eager(
    model: nn.Module, paths: Iterable[str], note: Wrap | None = None, change: Wrap | None = None
) -> Iterator[None]:
    """Run plain passes under the model's own eager attention, watched or changed at some modules.

    ``note(path, weights, mask)`` is called after an attention call of the module at a path, and
    ``change(path, query, key, value, mask)`` gives the keys, values and mask to use instead.
    """
    owners, homes = {}, {}
    for path in paths:
        for module in model.get_submodule(path).modules():
            home = getattr(inspect.unwrap(type(module).forward), "__globals__", {})
            owners[id(module)] = path
            homes |= {(id(home), name): home for name in home if name.endswith(EAGER)}

    def watched(plain: Wrap, module: Any, q: Any, k: Any, v: Any, *args: Any, **more: Any) -> Any:
        args = (more.pop("attention_mask"), *args) if "attention_mask" in more else args or (None,)
        mask, path = args[0], owners.get(id(module))
        if path and change:
            k, v, mask = change(path, q, k, v, mask)
        out = plain(module, q, k, v, mask, *args[1:], **more)
        if path and note and out[1] is not None:
            note(path, out[1][..., : k.shape[-2]], mask)
        return out

    with passes(model, {}, "eager"), ExitStack() as stack:
        for (_, name), home in homes.items():
            put(stack, home, name, partial(watched, home[name]))
        yield


def visible(mask: Tensor | None, width: int) -> Tensor:
    """Which keys a query sees under a mask of eager attention, bool ``[row|1 head|1 query|1 key]``."""
    if mask is None:
        return torch.ones(1, 1, 1, width, dtype=torch.bool)
    mask = mask[..., :width]
    return mask if mask.dtype == torch.bool else mask > max(torch.finfo(mask.dtype).min / 4, -1e8)


class Places:
    """Which of a tower's tokens, ``[row pos]``, the next attention call of a module has: whole rows or, of a
    single row, the next window."""

    def __init__(self, shape: Sequence[int]) -> None:
        self.rows, self.length = shape
        self.reached: dict[str, int] = {}

    def next(self, path: str, rows: int, width: int) -> tuple[slice, slice]:
        """The rows and the columns; OtherKeysError if they are not tokens of the tower."""
        at, whole = self.reached.get(path, 0), width == self.length
        stop, most = (at + rows, self.rows) if whole else (at + width, self.length)
        if stop > most or not (whole or rows == self.rows == 1):
            got = f"{path} attends in {rows} rows to {width} keys after {at} others"
            raise OtherKeysError(f"{got}; the tower has {self.rows} rows of {self.length} tokens")
        self.reached[path] = stop
        return (slice(at, stop), slice(None)) if whole else (slice(None), slice(at, stop))


class Reduced:
    """The mass on chosen keys, and what every key receives from live queries, of eager attention; ``keys`` and
    ``live`` are bool ``[row pos]`` in the order of the tower's sequence."""

    def __init__(self, keys: Tensor, live: Tensor) -> None:
        self.keys, self.live, self.places = keys, live, Places(keys.shape)
        self.parts: dict[str, Any] = {}

    def note(self, path: str, weights: Tensor, mask: Any) -> None:
        """Reduce the weights ``[row head query key]`` of one call."""
        try:
            at = self.places.next(path, weights.shape[0], weights.shape[-1])
        except OtherKeysError as error:
            self.parts[path] = error
            return
        keys, live = (x[at].to(weights.device)[:, None, None] for x in (self.keys, self.live))
        weights, live = weights.float(), live.transpose(-1, -2)
        mass, got = (weights * keys).sum(-1), (weights * live).sum(-2)
        many = (visible(mask, weights.shape[-1]).to(live.device) & live).sum(-2)
        self.parts.setdefault(path, []).append((mass.cpu(), (got / many.clamp(min=1)).cpu()))

    def whole(self, path: str, part: int) -> Tensor:
        """Mass (``part`` 0) or attention received, ``[row head pos]``; UncheckedError if none was seen."""
        if isinstance(found := self.parts.get(path), UncheckedError):
            raise found
        if not found:
            raise UncheckedError(f"no eager attention call was seen in {path}")
        dim = 0 if found[0][0].shape[-1] == self.places.length else -1
        return torch.cat([both[part] for both in found], dim)


def changed(how: str, keys: Tensor, factor: float = 0.0) -> Wrap:
    """A ``change`` for `eager` at ``keys``, bool ``[row pos]``: ``"mask"`` hides them from queries that see
    another key, ``"keys"`` and ``"values"`` multiply the vectors by a factor."""
    places = Places(keys.shape)

    def change(path: str, query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Any:
        width = key.shape[-2]
        chosen = keys[places.next(path, key.shape[0], width)].to(key.device)[:, None, :, None]
        if how == "keys":
            return torch.where(chosen, key * factor, key), value, mask
        if how == "values":
            return key, torch.where(chosen, value * factor, value), mask
        mask = query.new_zeros(1, 1, query.shape[-2], width) if mask is None else mask[..., :width]
        gone, seen = chosen.transpose(-1, -2), visible(mask, width)
        gone = gone & (seen & ~gone).any(-1, keepdim=True)
        low = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        return key, value, mask.masked_fill(gone, low)

    return change


def generated(model: Any, inputs: Inputs, options: Inputs, paths: Sequence[str] = ()) -> Any:
    """The sequences that a model generates, and with ``paths``, under eager attention, the weights of every
    module at the first decode step, ``[row head 1 key]``."""
    seen: dict[str, Tensor] = {}

    def note(path: str, weights: Tensor, mask: Any) -> None:
        if weights.shape[-2] == 1:
            seen.setdefault(path, weights.float().cpu())

    with eager(model, paths, note) if paths else passes(model, {}):
        sequences = model.generate(**inputs, **options).cpu()
    if lacking := [path for path in paths if path not in seen]:
        raise UncheckedError(f"no eager attention of a decode step was seen in {lacking}")
    return sequences, seen


def block_states(model: Any, inputs: Inputs, paths: Sequence[str]) -> dict[str, list[Tensor]]:
    """The states before and after blocks in a plain pass: path -> two tensors in fp32, on the CPU."""
    seen: dict[str, Any] = {path: ([], []) for path in paths}

    def keep(path: str, forward: Wrap, *args: Any, **kwargs: Any) -> Any:
        seen[path][0].append(states_in(args, kwargs).to("cpu", torch.float32, copy=True))
        out = forward(*args, **kwargs)
        seen[path][1].append(first_tensor(out).to("cpu", torch.float32, copy=True))
        return out

    with passes(model, {path: partial(keep, path) for path in paths}):
        model(**inputs)
    return {path: [torch.cat(x) for x in both] for path, both in seen.items() if both[0]}


def attention_adds(model: Any, inputs: Inputs, parts: Sequence[Sequence[str]]) -> dict[str, Any]:
    """What attention adds to the stream in blocks ``(block, mlp, projection)``, and the states before.

    Every block runs once more on what it was given, with the output of its MLP at zero and the bias of the
    output projection taken off; what it then changes is attention's. Path of the block -> two tensors.
    """
    found: dict[str, Any] = {}
    again: list[str] = []

    def silent(forward: Wrap, *args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        if not again or isinstance(out, Tensor):
            return out * 0 if again else out
        return type(out)(x * 0 if isinstance(x, Tensor) else x for x in out)

    def unbiased(bias: Any, forward: Wrap, *args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        return out - bias if again and isinstance(bias, Tensor) else out

    def twice(path: str, forward: Wrap, *args: Any, **kwargs: Any) -> Any:
        out, states = forward(*args, **kwargs), states_in(args, kwargs)
        again.append(path)
        fresh = {name: None if name in CACHES else x for name, x in kwargs.items()}
        added = first_tensor(forward(*args, **fresh)) - states
        again.clear()
        found[path] = [x.float().cpu() for x in (added, states)]
        return out

    wraps = {block: partial(twice, block) for block, _, _ in parts}
    wraps |= {mlp: silent for _, mlp, _ in parts}
    for _, _, path in parts:
        wraps[path] = partial(unbiased, getattr(model.get_submodule(path), "bias", None))
    with passes(model, wraps):
        model(**inputs)
    return found


class Feeding:
    """How what the decoder reads depends on what some vision blocks put out.

    Only what goes directly from a block of ``feeds`` to the projector counts: the ``blocks``, from the first
    that feeds on, take their input without a gradient. The decoder reads the embeddings it is called with, or
    else the input of its block ``first``; ``shape`` is their ``[batch pos]``.
    """

    def __init__(
        self, model: Any, inputs: Inputs, blocks: Paths, feeds: Paths, first: str, shape: Any
    ) -> None:
        self.model, self.inputs, self.blocks, self.feeds = model, inputs, blocks, feeds
        self.first = first
        self.states, self.leaves = self._pass(lambda x: x.detach().requires_grad_(True))
        self.ndim = next(iter(self.leaves.values()))[0].ndim
        if self.states.shape[:2] != shape:
            raise UncheckedError(f"the decoder's states are {[*self.states.shape]}")

    def _pass(self, other: Callable[[Tensor], Tensor]) -> tuple[Tensor, dict[str, list[Tensor]]]:
        """What the decoder reads, and by block what was put in place of its output."""
        seen: list[Tensor] = []
        given: dict[str, list[Tensor]] = {}

        def give(path: str, forward: Wrap, *args: Any, **kwargs: Any) -> Any:
            cut = [x.detach() if isinstance(x, Tensor) else x for x in (*args, *kwargs.values())]
            named = dict(zip(kwargs, cut[len(args) :], strict=True))
            out = forward(*cut[: len(args)], **named)
            if path not in self.feeds:
                return out
            new = other(states := first_tensor(out))
            given.setdefault(path, []).append(new)
            return new if states is out else type(out)(new if x is states else x for x in out)

        def stop(forward: Wrap, *args: Any, **kwargs: Any) -> Any:
            if forward == whole and not isinstance(kwargs.get("inputs_embeds"), Tensor):
                return forward(*args, **kwargs)
            seen.append(states_in(args, kwargs))
            raise _StoppedError

        decoder = getattr(self.model, "get_decoder", lambda: self.model)()
        paths = [path for path, module in self.model.named_modules() if module is decoder]
        whole: Any = decoder.forward
        wraps: dict[str, Wrap] = {path: partial(give, path) for path in self.blocks}
        with passes(self.model, wraps | dict.fromkeys([*paths, self.first], stop)):
            try:
                with torch.enable_grad():
                    self.model(**self.inputs)
            except _StoppedError:
                if given:
                    return seen[0], given
        raise UncheckedError(f"a plain pass does not run {self.first} after {[*self.feeds]}")

    def filled(self) -> Tensor:
        """Positions that depend on what the blocks put out, bool ``[batch pos]``: another output moves them."""
        noise = torch.Generator().manual_seed(0)

        def noisy(x: Tensor) -> Tensor:
            return (x + torch.randn(x.shape, generator=noise).to(x) * x.std()).detach()

        states, _ = self._pass(noisy)
        return (states != self.states).flatten(2).any(-1).cpu()

    def sources(self, row: int, pos: int) -> list[tuple[int, ...]]:
        """Addresses in the blocks' output on which a position depends, by gradient: ``(pos,)`` if that has one
        sequence without a batch axis, else ``(row, pos)``."""
        if not self.states.requires_grad or self.ndim not in (2, 3):
            raise UncheckedError("no gradient reaches the vision states, token by token")
        state, found = self.states[row, pos].flatten(), set()
        mixed = torch.randn(len(state), generator=torch.Generator().manual_seed(3)).to(state)
        some: Any = {"retain_graph": True, "materialize_grads": True}
        for leaves in self.leaves.values():
            grads = torch.autograd.grad((state * mixed).sum(), leaves, **some)
            size = torch.cat(grads).float().norm(dim=-1)
            found |= {tuple(at) for at in (size > 0).nonzero().tolist()}
        return sorted(found)
