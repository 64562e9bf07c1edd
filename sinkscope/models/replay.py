"""Run the decoder once, and any number of times again from one of its blocks on.

An edit of the keys of block b changes nothing before block b. `resume` calls the model's own decoder
again, with the arguments it had; blocks before b pass on the state that was captured, at no cost.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sinkscope.anatomy.towers import Anatomy
from sinkscope.errors import InputError, LayerError, ModelError
from sinkscope.kernels.residual import logits_of
from sinkscope.models.decoder import Ended, Given, KeyEdit, decoder_inputs, scaled_keys
from sinkscope.models.lvlm import LVLM
from sinkscope.models.wrapping import Inputs, lent, moved, on_device, undisturbed


@dataclass(frozen=True, eq=False)
class Captured:
    """One pass of the decoder of a model, ready to be resumed.

    ``given`` is what the decoder was called with. ``states`` are what blocks read, ``[row pos d_model]``: a
    gate at layer l reads ``states[l + 1]`` and edits block l + 1. ``end`` stands after the final norm, in
    the same shape; None if the pass ended before.
    """

    module: nn.Module
    anatomy: Anatomy
    given: Inputs
    states: Mapping[int, Tensor]
    end: Tensor | None

    @property
    def hidden(self) -> Tensor:
        """After the final norm, ``[row pos d_model]``; refused if the pass ended before."""
        if self.end is None:
            got = "Got a pass that ended at a block; expected a whole one."
            raise ModelError(f"{got} Write capture(..., whole=True).")
        return self.end

    def __len__(self) -> int:
        return int(self.given["inputs_embeds"].shape[0])

    def state(self, block: int) -> Tensor:
        """What a captured block read, ``[row pos d_model]``."""
        if block not in self.states:
            got = f"Got block {block!r}; expected one of {sorted(self.states)}, those captured."
            raise LayerError(f"{got} Write capture(lvlm, inputs, [{block!r}]).")
        return self.states[block]


@torch.no_grad()
def capture(
    lvlm: LVLM, inputs: Inputs, blocks: Any = None, *, cache: Any = None, whole: bool = True
) -> Captured:
    """Run one plain forward pass without gradient and LM head, and keep the states that blocks read.

    ``inputs`` are the model's, or what `decoder_inputs` gives; ``blocks`` those that will be edited, None
    for all; ``cache`` holds what comes before. Without ``whole`` the pass ends at the last of the blocks.
    """
    if "flex" in lvlm.anatomy.language.kernel:
        got = "Got flex attention, whose masks cannot be taken row by row; expected another kernel."
        raise ModelError(f"{got} Write lvlm.module.set_attn_implementation('sdpa').")
    given = dict(inputs) if "inputs_embeds" in inputs else decoder_inputs(lvlm, inputs)[0]
    wanted = lvlm.anatomy.language.layers(blocks)
    states: dict[int, Tensor] = {}
    final = None

    def keep(block: int, state: Tensor) -> None:
        states[block] = state
        if not whole and block == max(wanted):
            raise Ended

    with suppress(Ended), _reading(lvlm.module, lvlm.anatomy, wanted, keep):
        final = _decode(lvlm.module, given, cache)
    return Captured(lvlm.module, lvlm.anatomy, given, states, final)


def resume(
    captured: Captured,
    block: int,
    factors: Tensor,
    *,
    rows: Sequence[int] | Tensor | None = None,
    cache: Any = None,
    later: Mapping[int, KeyEdit] | None = None,
) -> Tensor:
    """Run the rest of a captured pass with the keys of one block scaled; under the caller's grad mode.

    Gives hidden states after the final norm, ``[row pos d_model]``. LayerError if the block was not
    captured, InputError if rows or factors do not fit.

    Args:
        block: The block whose keys are scaled; everything before it is reused.
        factors: ``[row key]``: what each key of each row is multiplied with, after RoPE and k-norm;
            1 for text and padding.
        rows: Which captured row each row is, with repeats; None for all of them once.
        cache: Keys and values of what comes before, or None.
        later: Further blocks behind this one, with a function that gives their factors from what
            they read, ``[row pos d_model]``, after the edits before them; or None.
    """
    state, n, deciding = captured.state(block), len(captured), later or {}
    index = torch.arange(n) if rows is None else torch.as_tensor(rows)  # on the host
    if index.ndim != 1 or not len(index) or int(index.min()) < 0 or int(index.max()) >= n:
        wanted = f"expected indices of captured rows, from 0 to {n - 1}"
        raise InputError(f"Got rows={index.tolist()}; {wanted}.")
    before = 0 if cache is None else cache.get_seq_length()
    expected = (len(index), before + state.shape[1])
    if tuple(factors.shape) != expected:
        got = f"Got factors of shape {tuple(factors.shape)}; expected [row key] = {list(expected)}"
        raise InputError(f"{got}, one factor per key and 1 where nothing is edited.")

    index = moved(index, state.device)

    def pick(name: str, value: Tensor) -> Tensor:
        axis = row_axis(name, value)
        shared = value.shape[axis] == 1 < n
        return value if shared else value.index_select(axis, index.to(value.device))

    state = state.index_select(0, index)
    given = map_tensors(pick, captured.given)
    if block:  # what a decoder does to its embeddings before block 0 must not be done to a state
        given["inputs_embeds"] = state
    found = {block: factors}

    def decide(number: int, read: Tensor) -> None:
        found[number] = deciding[number](read)

    module, anatomy = captured.module, captured.anatomy
    parts = map(module.get_submodule, anatomy.language.blocks[:block])
    with (
        lent([(part, {"forward": lambda *args, **named: state}) for part in parts]),
        scaled_keys(module, anatomy, {b: _scaling(found, b) for b in (block, *deciding)}),
        _reading(module, anatomy, deciding, decide),
    ):
        return _decode(module, given, cache)


@contextmanager
def _reading(
    module: nn.Module, anatomy: Anatomy, blocks: Iterable[int], told: Callable[[int, Tensor], None]
) -> Iterator[None]:
    """Tell the number of each block that begins, and what it reads."""

    def hook(block: int, part: nn.Module, args: tuple, named: Given) -> None:
        told(block, args[0] if args else named["hidden_states"])

    with ExitStack() as stack:
        for block in blocks:
            part = module.get_submodule(anatomy.language.blocks[block])
            made = part.register_forward_pre_hook(partial(hook, block), with_kwargs=True)
            stack.enter_context(made)
        yield


def _scaling(factors: Mapping[int, Tensor], block: int) -> KeyEdit:
    """Multiply the keys of a block with its factors ``[row key]``, rounded once."""
    return lambda key: (key * moved(factors[block], key.device)[:, None, :, None]).to(key.dtype)


def _decode(module: Any, given: Inputs, cache: Any = None) -> Tensor:
    cached = {} if cache is None else {"past_key_values": cache}
    with undisturbed(module):
        out = module.get_decoder()(**given, **cached, use_cache=cache is not None)
    hidden = getattr(out, "last_hidden_state", None)
    if not isinstance(hidden, Tensor):
        got = type(out).__name__
        raise ModelError(f"The decoder gave a {got}; expected last_hidden_state. Please report it.")
    return hidden


@torch.no_grad()
def check_replay(lvlm: LVLM, inputs: Inputs, blocks: Any = None) -> None:
    """Refuse a model whose captured pass, or a resumed one, is not its own forward pass.

    ModelError if logits of the last position differ. The resumed pass starts in the middle of the blocks
    (None for all), with the keys of images halved, as in the whole pass it is compared with.
    """
    wanted, module = lvlm.anatomy.language.layers(blocks), lvlm.module
    block, placed = wanted[len(wanted) // 2], on_device(inputs, lvlm.device)
    with undisturbed(module):
        own = module(**placed, use_cache=False).logits[:, -1].float()
    seen = capture(lvlm, inputs, [block])
    factors = torch.where(placed["input_ids"] == lvlm.anatomy.image_token_id, 0.5, 1.0)
    with scaled_keys(module, lvlm.anatomy, {block: _scaling({block: factors}, block)}):
        edited = _decode(module, seen.given)

    def last(hidden: Tensor) -> Tensor:
        return logits_at(seen, hidden[:, -1:])[:, 0].float()

    compared = {"": (last(seen.hidden), own)}
    compared[f" from block {block} on"] = (last(resume(seen, block, factors)), last(edited))
    for where, (ours, theirs) in compared.items():
        error = float((ours.to(theirs.device) - theirs).abs().max())  # a head may lie elsewhere
        limit = 1e-4 if seen.hidden.dtype == torch.float32 else 0.05
        limit *= max(1.0, float(theirs.abs().max()))
        if not error <= limit:
            got = f"The replayed logits{where} differ from the model's own by {error:.2g}; expected"
            write = "If a gate, or hooks of yours change it, take them off first."
            raise ModelError(f"{got} at most {limit:.2g}. {write}")


def logits_at(captured: Captured, hidden: Tensor, positions: Tensor | None = None) -> Tensor:
    """Logits of the next token, ``[row n vocab]`` in the model's dtype, of a pass's hidden states.

    ``hidden`` ``[row pos d_model]`` stands after the final norm; ``positions`` int ``[row n]``, None for all.
    """
    if positions is not None:
        index = moved(positions, hidden.device)[..., None].expand(-1, -1, hidden.shape[-1])
        hidden = hidden.gather(1, index)
    module: Any = captured.module
    lens = captured.anatomy.lens
    logits = module.get_submodule(captured.anatomy.head)(hidden)
    return logits_of(logits, lens.scale, lens.cap)


def map_tensors(change: Callable[..., Tensor], *givens: Inputs) -> Given:
    """``change(name, tensor of the first, of the second, ...)`` for all tensors, masks in a dict too."""

    def one(name: str, values: Sequence[Any]) -> Any:
        if isinstance(values[0], Mapping):
            return {key: one(name, [value[key] for value in values]) for key in values[0]}
        return change(name, *values) if isinstance(values[0], Tensor) else values[0]

    return {name: one(name, [given[name] for given in givens]) for name in givens[0]}


def row_axis(name: str, value: Tensor) -> int:
    """The axis of rows in an argument of the decoder."""
    return 1 if name == "position_ids" and value.ndim == 3 else 0
