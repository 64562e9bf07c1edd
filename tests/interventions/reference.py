"""Edited attention written out: explicit logits, explicit masks, an explicit softmax, plain products.

Nothing of sinkscope's kernels and nothing of nnsight is used. A twin of the model, which nnsight has
never seen, runs under its eager kernel, whose function is replaced by `Attention`: it computes ``q k`` in fp64, puts ``-inf`` where
`tests.reference.visible` says so, appends the learned sink's logit if there is one, and applies
changes to logits, weights or values where their gate holds. States are edited by module hooks.
"""

import sys
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from tests.reference import visible

STAGES = ("keys", "logits", "weights", "values")
INF = float("inf")


class At(NamedTuple):
    """What a change may look at."""

    layer: int
    seen: torch.Tensor  # [batch head|1 query key]: who sees whom
    live: torch.Tensor  # [batch query]
    sink: torch.Tensor | None  # learned sink logits, [head]
    keys: torch.Tensor | None = None  # [batch key]: this change's keys
    start: int = 0  # where a window begins in its packed sequence

    @property
    def column(self):
        """The keys, to be laid over logits and weights."""
        return self.keys[:, None, None]


class Note(NamedTuple):
    """What a change did in one call."""

    layer: int
    before: torch.Tensor  # weights [batch head query key]
    after: torch.Tensor
    gate: torch.Tensor  # [batch head query]
    empty: torch.Tensor
    keys: torch.Tensor  # [batch key]


@dataclass(eq=False)
class Change:
    """One edit of attention.

    ``apply(x, at)`` gives the edited logits (stages "keys" and "logits") or weights, both ``[batch
    head query key]``, or values ``[batch head key d_head]``. ``keys`` is ``[batch pos]`` or ``[batch
    layer pos]`` of the prompt. Positions from ``first`` up to ``stop`` are edited, among them those
    in ``rows``; ``where(weights, at)`` narrows it further.
    """

    stage: str
    keys: torch.Tensor
    apply: Any
    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    rows: torch.Tensor | None = None
    tower: str = "language"
    first: int = 0
    stop: int | None = None
    where: Any = None

    def columns(self, layer, n_keys):
        keys = self.keys if self.keys.ndim == 2 else self.keys[:, layer]
        return torch.nn.functional.pad(keys, (0, n_keys - keys.shape[1]))

    def gate(self, at, weights):
        """Where the edit holds, ``[batch head query]``."""
        heads, n_query = weights.shape[1:3]
        gate = torch.zeros(weights.shape[:3], dtype=torch.bool)
        if self.layers is not None and at.layer not in self.layers:
            return gate
        places = torch.arange(n_query)
        rows = at.live & (places >= self.first) & (places < (self.stop or n_query))
        if self.rows is not None:
            rows = rows & torch.nn.functional.pad(self.rows, (0, n_query - self.rows.shape[1]))
        gate[:, list(range(heads) if self.heads is None else self.heads)] = rows[:, None]
        gate &= (at.seen & at.column).any(-1)
        return gate if self.where is None else gate & self.where(weights, at)


def softmax(logits, sink):
    """Softmax over keys; a learned sink takes its share and gives nothing."""
    if sink is None:
        return logits.softmax(-1)
    extra = sink.double().reshape(1, -1, 1, 1).expand(*logits.shape[:3], 1)
    return torch.cat([logits, extra], dim=-1).softmax(-1)[..., :-1]


class Attention:
    """Stands in for ``eager_attention_forward`` of a modeling file."""

    def __init__(self, twin, lvlm, sample, length, changes):
        self.places = {
            id(twin.get_submodule(path)): (tower, layer)
            for tower in ("vision", "language")
            for layer, path in enumerate(lvlm.anatomy.tower(tower).attention)
        }
        grown = length - sample.tokens.ids.shape[1]
        self.live = torch.nn.functional.pad(sample.tokens.live, (0, grown), value=True)
        self.seen = visible(lvlm, sample, grown)
        self.vision, self.covered = sample.tokens.vision, {}
        self.changes = sorted(changes, key=lambda change: STAGES.index(change.stage))
        self.notes = {change: [] for change in changes}
        self.weights = {}

    def __call__(self, module, query, key, value, attention_mask=None, scaling=None, **kwargs):
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        share = query.shape[1] // key.shape[1]
        key, value = (x.double().repeat_interleave(share, dim=1) for x in (key, value))
        logits = torch.einsum("bhqd,bhkd->bhqk", query.double(), key) * scaling
        tower, layer = self.places[id(module)]
        sink = getattr(module, "sinks", None)
        if tower == "language":
            # What padding sees is nobody's business, but it must see something.
            own = torch.eye(logits.shape[2], dtype=torch.bool) & ~self.live[..., None]
            at = At(layer, (self.seen[:, layer] | own)[:, None], self.live, sink)
            changes = [(change, change) for change in self.changes if change.tower == tower]
        else:
            at, changes = self.in_vision(layer, logits, sink)
        weights, read = self.edited(at, changes, logits, value)
        self.weights.setdefault((tower, layer), []).append(weights)
        out = torch.einsum("bhqk,bhqkd->bqhd", weights, read)
        return out.to(query.dtype).contiguous(), None

    def in_vision(self, layer, logits, sink):
        """The situation in the vision tower: every token sees its image, or its window."""
        changes = [(c, c) for c in self.changes if c.tower == "vision"]
        live, size, start = self.vision.live, logits.shape[2], 0
        if self.vision.layout is not None:
            start = self.covered.get(layer, 0)
            self.covered[layer] = start + size
            live = self.packed(live)[:, start : start + size]
            changes = [(c, self.cut(c, start, start + size)) for c, _ in changes]
        seen = torch.ones(live.shape[0], 1, size, size, dtype=torch.bool)
        return At(layer, seen, live, sink, start=start), changes

    def packed(self, mask):
        """``[image pos]`` as one sequence, ``[1 packed]``."""
        at = self.vision.layout[self.vision.live]
        out = torch.zeros(1, len(at), dtype=mask.dtype)
        out[0, at] = mask[self.vision.live]
        return out

    def cut(self, change, start, stop):
        """A change, packed and cut to one window."""
        keys = self.packed(change.keys)[:, start:stop]
        rows = None if change.rows is None else self.packed(change.rows)[:, start:stop]
        return replace(change, keys=keys, rows=rows)

    def edited(self, at, changes, logits, value):
        """Weights after all changes, and the values that every row and head reads."""
        logits = logits.masked_fill(~at.seen, -INF)
        weights = softmax(logits, at.sink)
        read = value[:, :, None].expand(*weights.shape[:3], -1, -1)
        for original, change in changes:
            at = at._replace(keys=change.columns(at.layer, weights.shape[-1]))
            gate, before = change.gate(at, weights), weights
            empty = torch.zeros_like(gate)
            if change.stage in ("keys", "logits"):
                new = change.apply(logits, at).masked_fill(~at.seen, -INF)
                # A row with nothing left to see stays as it is; a learned sink is something.
                left = (new > -INF).any(-1) | (at.sink is not None)
                empty, gate = gate & ~left, gate & left
                logits = torch.where(gate[..., None], new, logits)
                weights = softmax(logits, at.sink)
            elif change.stage == "weights":
                weights = torch.where(gate[..., None], change.apply(weights, at), weights)
            else:
                new = change.apply(value, at)[:, :, None].expand_as(read)
                read = torch.where(gate[..., None, None] & at.column[..., None], new, read)
            self.notes[original].append(Note(at.layer, before, weights, gate, empty, at.keys))
        return weights, read


class Answer(NamedTuple):
    """What a reference run brought back; ``attn_out`` and ``weights`` by ``(tower, layer)``."""

    logits: torch.Tensor
    attn_out: dict
    weights: dict  # a list of windows each
    notes: dict  # change -> a `Note` per call


@contextmanager
def patched(twin, attention):
    """The model's modeling files with their eager attention function replaced."""
    files = {
        sys.modules[type(module).__module__]
        for module in twin.modules()
        if hasattr(sys.modules[type(module).__module__], "eager_attention_forward")
    }
    held = {file: file.eager_attention_forward for file in files}
    for file in files:
        file.eager_attention_forward = attention
    try:
        yield
    finally:
        for file, function in held.items():
            file.eager_attention_forward = function


@torch.no_grad()
def reference_run(case, changes=(), hooks=(), inputs=None):
    """One full forward pass of the plain Hugging Face model, with changes of attention and hooks.

    Args:
        case: The case: its sample, and the twin of its model.
        changes: `Change` objects.
        hooks: ``(module path, "input" or "output", function(states) -> states)``.
        inputs: Grown inputs, or None for the sample's.
    """
    inputs = dict(case.sample.inputs) if inputs is None else inputs
    twin, length = case.twin, inputs["input_ids"].shape[1]
    attention = Attention(twin, case.lvlm, case.sample, length, changes)
    outputs = {}
    with ExitStack() as stack:
        stack.enter_context(patched(twin, attention))
        for path, side, function in hooks:
            handle = hook_on(twin.get_submodule(path), side, function)
            stack.callback(handle.remove)
        for tower in ("vision", "language"):
            for layer, branches in enumerate(case.lvlm.anatomy.tower(tower).branches):
                keep = keeper(outputs, (tower, layer))
                handle = twin.get_submodule(branches[0].path).register_forward_hook(keep)
                stack.callback(handle.remove)
        logits = twin(**inputs).logits
    return Answer(logits, outputs, attention.weights, attention.notes)


def keeper(outputs, key):
    """A hook that notes a module's output."""

    def keep(module, args, out):
        outputs[key] = (out[0] if isinstance(out, tuple) else out).float()

    return keep


def hook_on(module, side, function):
    """A hook that replaces a module's first input, or its output."""

    def before(module, args, kwargs):
        if args:
            return (function(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": function(kwargs["hidden_states"])}

    def after(module, args, out):
        return (function(out[0]), *out[1:]) if isinstance(out, tuple) else function(out)

    if side == "input":
        return module.register_forward_pre_hook(before, with_kwargs=True)
    # Before the hook by which transformers collects hidden states for the projector.
    return module.register_forward_hook(after, prepend=True)


def grown_inputs(sample, sequences, steps, inputs=None):
    """The inputs of a full pass over the prompt and the first ``steps`` generated tokens.

    ``inputs`` are the prompt's, or None for the sample's.
    """
    grown = dict(sample.inputs if inputs is None else inputs)
    grown["input_ids"] = sequences[:, : sample.tokens.ids.shape[1] + steps]
    mask = sample.inputs["attention_mask"]
    grown["attention_mask"] = torch.nn.functional.pad(mask, (0, steps), value=1)
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in grown:
            grown[name] = torch.nn.functional.pad(grown[name], (0, steps))
    return grown


def every(case, steps=16):
    """All live keys of the prompt, and of an answer; what a pass does not have is cut off again."""
    return torch.nn.functional.pad(case.live, (0, steps), value=True)


# ---------------------------------------------------------------- the published formulas, one each


def masks(keys, **where):
    """Logit ``-inf`` on the keys."""
    return Change("logits", keys, lambda x, at: x.masked_fill(at.column, -INF), **where)


def scales_keys(keys, factor, **where):
    """``softmax(q (s k))``."""
    return Change("keys", keys, lambda x, at: torch.where(at.column, factor * x, x), **where)


def scales_weights(keys, factor, **where):
    """``a_j s_j / sum_i a_i s_i``: written as products of the softmax's numerators."""
    if factor == 0:
        return masks(keys, **where)

    def apply(x, at):
        return torch.where(at.column, x + torch.log(torch.tensor(factor)), x)

    return Change("logits", keys, apply, **where)


def scales_raw_weights(keys, factor, **where):
    """``a_j s_j``, not renormalised."""
    return Change("weights", keys, lambda w, at: torch.where(at.column, factor * w, w), **where)


def redistributes(source, target, recycle, **where):
    """``(1 - r) a`` on the source, ``a (1 + r sum_source a / sum_target a)`` on the target."""

    def apply(w, at):
        aim = target if target.ndim == 2 else target[:, at.layer]
        aim = torch.nn.functional.pad(aim, (0, w.shape[-1] - aim.shape[-1]))[:, None, None]
        budget = recycle * (w * at.column).sum(-1, keepdim=True)
        share = w * aim / (w * aim).sum(-1, keepdim=True)
        share = share.nan_to_num()
        return torch.where(at.column, (1 - recycle) * w, w) + budget * share

    def some_target(w, at):
        aim = target if target.ndim == 2 else target[:, at.layer]
        aim = torch.nn.functional.pad(aim, (0, w.shape[-1] - aim.shape[-1]))[:, None, None]
        narrower = where.get("narrower")
        given = (w * aim).sum(-1) > 0
        return given if narrower is None else given & narrower(w, at)

    rest = {name: value for name, value in where.items() if name != "narrower"}
    return Change("weights", source, apply, where=some_target, **rest)


def replaces_values(keys, values, **where):
    """``values(v) -> v'`` at the keys; ``v`` is ``[batch head key d_head]``."""
    return Change("values", keys, lambda v, at: values(v, at), **where)
