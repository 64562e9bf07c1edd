"""Run the decoder once, and any number of times again from one of its blocks on.

::

    capture    embeds -> block 0 -> block 1 -> block 2 -> block 3 -> norm        no gradient
                            |          |          |          |
                          states[0]  states[1]  states[2]  states[3]             [row pos d_model]

    resume(2)  ........................ states[2] -> block 2 -> block 3 -> norm -> hidden
                                                     keys times factors

An edit of the keys of block b changes nothing before block b. `resume` calls the model's own decoder
again, with the arguments it had; blocks before b pass on the state that was captured, at no cost. So
masks, positions and windows are the model's own. Rows may be repeated, with other factors each, and
gradients reach the factors through the blocks from b on. `sinkscope.models.prefix` does the same for
prompts that begin alike.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sinkscope.anatomy.towers import Anatomy
from sinkscope.errors import InputError, LayerError, ModelError
from sinkscope.models.keyhook import KeyEdit, scaled_keys
from sinkscope.models.wrapping import lent, undisturbed

if TYPE_CHECKING:
    from sinkscope.models.lvlm import LVLM


@dataclass(frozen=True, eq=False)
class Captured:
    """One pass of the decoder, ready to be resumed.

    Attributes:
        module: The model.
        anatomy: Its anatomy.
        given: What the decoder was called with.
        states: Block -> what it reads, ``[row pos d_model]``. A Layer-wise Sink Gate at layer l
            reads ``states[l + 1]`` and edits block l + 1.
        end: After the final norm, ``[row pos d_model]``; None if the pass ended before.
    """

    module: nn.Module
    anatomy: Anatomy
    given: Mapping[str, Any]
    states: Mapping[int, Tensor]
    end: Tensor | None

    @property
    def hidden(self) -> Tensor:
        """After the final norm, ``[row pos d_model]``.

        Raises:
            ModelError: If the pass ended before.
        """
        if self.end is None:
            raise ModelError(
                "Got a pass that ended at a block; expected a whole one. Write capture(..., whole=True)."
            )
        return self.end

    def __len__(self) -> int:
        return int(self.given["inputs_embeds"].shape[0])

    def state(self, block: int) -> Tensor:
        """What a block read, ``[row pos d_model]``.

        Raises:
            LayerError: If it was not captured.
        """
        if block not in self.states:
            raise LayerError(
                f"Got block {block!r}; expected one of {sorted(self.states)}, which were captured. "
                f"Write capture(lvlm, inputs, [{block!r}])."
            )
        return self.states[block]


@torch.no_grad()
def capture(
    lvlm: LVLM,
    inputs: Mapping[str, Any],
    blocks: Any = None,
    *,
    features: Any = None,
    whole: bool = True,
) -> Captured:
    """One plain forward pass without gradient, with the states that blocks read.

    Args:
        lvlm: The model.
        inputs: What the model is called with (``sample.inputs``), padded or not.
        blocks: The blocks that will be edited, or None for all.
        features: Image features of an earlier `decoder_inputs` of the same images, or None.
        whole: Whether to run the decoder to its end, or only to the last of ``blocks``.

    Returns:
        The pass. The LM head has not run; see `logits_at`.

    Raises:
        LayerError: If there is no such block.
        ModelError: If the decoder is called in a way that cannot be repeated.
    """
    given, _ = decoder_inputs(lvlm, inputs, features)
    return capture_given(lvlm, given, blocks, whole=whole)


@torch.no_grad()
def capture_given(
    lvlm: LVLM, given: Given, blocks: Any = None, cache: Any = None, *, whole: bool = True
) -> Captured:
    """`capture` from the decoder's own arguments on.

    Args:
        lvlm: The model.
        given: The decoder's arguments, of `decoder_inputs`.
        blocks: See `capture`.
        cache: Keys and values of what comes before, or None.
        whole: See `capture`.
    """
    anatomy = lvlm.anatomy
    wanted = anatomy.language.layers(blocks)
    states: dict[int, Tensor] = {}
    with ExitStack() as stack:
        for block in wanted:
            part = lvlm.module.get_submodule(anatomy.language.blocks[block])
            keep = _keep(states, block, end=not whole and block == max(wanted))
            stack.callback(part.register_forward_pre_hook(keep, with_kwargs=True).remove)
        try:
            final = _decode(lvlm.module, given, cache)
        except _Ended:
            final = None
    return Captured(lvlm.module, anatomy, given, states, final)


class _Ended(Exception):  # noqa: N818  it ends a pass; nothing went wrong
    """Leaves the decoder where nothing more is wanted."""


def _keep(states: dict[int, Tensor], block: int, *, end: bool) -> Callable[..., None]:
    """A hook that keeps what a block reads, and ends the pass there if wanted."""

    def keep(part: nn.Module, args: tuple, named: dict[str, Any]) -> None:
        states[block] = args[0] if args else named["hidden_states"]
        if end:
            raise _Ended

    return keep


def _decode(module: Any, given: Mapping[str, Any], cache: Any = None) -> Tensor:
    """The decoder's last hidden state, ``[row pos d_model]``.

    Raises:
        ModelError: If the decoder gives something else.
    """
    cached = {} if cache is None else {"past_key_values": cache}
    with undisturbed(module):
        out = module.get_decoder()(**given, **cached, use_cache=cache is not None)
    hidden = getattr(out, "last_hidden_state", None)
    if not isinstance(hidden, Tensor):
        raise ModelError(
            f"The decoder gave a {type(out).__name__}; expected last_hidden_state. Please report this "
            "class."
        )
    return hidden


def resume(
    captured: Captured,
    block: int,
    factors: Tensor,
    *,
    rows: Sequence[int] | Tensor | None = None,
    cache: Any = None,
    later: Mapping[int, Callable[[Tensor], Tensor]] | None = None,
) -> Tensor:
    """The rest of a captured pass, with the keys of one block scaled.

    Args:
        captured: From `capture`.
        block: The block whose keys are scaled, among those captured. Everything before it is reused.
        factors: ``[row key]``: what each key of each row is multiplied with, after RoPE and k-norm;
            1 for text and padding. It may require a gradient.
        rows: Which captured row each row is, with repeats; None for all of them once.
        cache: Keys and values of what comes before, or None.
        later: Further blocks behind this one, with a function that gives their factors from what
            they read, ``[row pos d_model]``, after the edits before them; or None.

    Returns:
        Hidden states after the final norm, ``[row pos d_model]``. Whether a gradient is kept is up
        to the caller (``torch.no_grad()``).

    Raises:
        LayerError: If the block was not captured.
        InputError: If a row is unknown, or the factors do not fit the rows.
    """
    state = captured.state(block)
    index = torch.arange(len(captured)) if rows is None else torch.as_tensor(rows)
    if (
        index.ndim != 1
        or not len(index)
        or int(index.min()) < 0
        or int(index.max()) >= len(captured)
    ):
        raise InputError(
            f"Got rows={index.tolist()}; expected a list of indices from 0 to {len(captured) - 1}: "
            "which captured row each row is."
        )
    before = 0 if cache is None else cache.get_seq_length()
    expected = (len(index), before + state.shape[1])
    if tuple(factors.shape) != expected:
        raise InputError(
            f"Got factors of shape {tuple(factors.shape)}; expected [row key] = {list(expected)}, one "
            "factor per key and 1 where nothing is edited."
        )
    state = state.index_select(0, index.to(state.device))
    given = rows_of(captured.given, index)
    if block:  # what a decoder does to its embeddings before block 0 must not be done to a state
        given["inputs_embeds"] = state
    language, found = captured.anatomy.language, {block: factors}
    edits = {number: _scaling(found, number) for number in (block, *(later or {}))}
    with ExitStack() as stack:
        stack.enter_context(_from_block(captured, block, state))
        stack.enter_context(scaled_keys(captured.module, captured.anatomy, edits))
        for number, decide in (later or {}).items():
            part = captured.module.get_submodule(language.blocks[number])
            hook = part.register_forward_pre_hook(_ask(found, number, decide), with_kwargs=True)
            stack.callback(hook.remove)
        return _decode(captured.module, given, cache)


def _scaling(factors: Mapping[int, Tensor], block: int) -> KeyEdit:
    """Multiply the keys of a block with its factors ``[row key]``, rounded once."""

    def scale(key: Tensor) -> Tensor:
        return (key * factors[block].to(key.device)[:, None, :, None]).to(key.dtype)

    return scale


def _ask(
    found: dict[int, Tensor], block: int, decide: Callable[[Tensor], Tensor]
) -> Callable[..., None]:
    """A hook that decides a block's factors on what it reads."""

    def ask(part: nn.Module, args: tuple, named: dict[str, Any]) -> None:
        found[block] = decide(args[0] if args else named["hidden_states"])

    return ask


def _from_block(captured: Captured, block: int, state: Tensor) -> AbstractContextManager[None]:
    """Make the blocks before one pass on the state that it reads."""
    parts = map(captured.module.get_submodule, captured.anatomy.language.blocks[:block])
    return lent([(part, {"forward": lambda *args, **named: state}) for part in parts])


@torch.no_grad()
def prove(lvlm: LVLM, inputs: Mapping[str, Any]) -> None:
    """Refuse a model whose captured pass is not its own forward pass.

    Args:
        lvlm: The model.
        inputs: What it is called with, one row or several.

    Raises:
        ModelError: If the logits of the last position differ.
    """
    seen = capture(lvlm, inputs, [0])
    last = torch.full((seen.hidden.shape[0], 1), seen.hidden.shape[1] - 1)
    ours = logits_at(seen, seen.hidden, last)[:, 0].float()
    placed = {k: v.to(lvlm.device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
    module: Any = lvlm.module
    with undisturbed(module):
        own = module(**placed, use_cache=False).logits[:, -1].float()
    error = float((ours - own).abs().max())
    limit = (1e-4 if seen.hidden.dtype == torch.float32 else 0.05) * max(
        1.0, float(own.abs().max())
    )
    if not error <= limit:
        raise ModelError(
            f"The decoder's replayed logits differ from the model's own by {error:.2g}; expected at "
            f"most {limit:.2g}. If a gate is attached to the model, or hooks of yours change it, take "
            "them off first; else it does something to its logits that sinkscope does not know: please "
            "report this class."
        )


def logits_at(captured: Captured, hidden: Tensor, positions: Tensor | None = None) -> Tensor:
    """Logits of the next token, at some positions only.

    Args:
        captured: The pass that was captured or resumed.
        hidden: After the final norm, ``[row pos d_model]``.
        positions: Int ``[row n]``: positions of each row, or None for all.

    Returns:
        ``[row n vocab]`` in the model's dtype.
    """
    if positions is not None:
        index = positions.to(hidden.device)[..., None].expand(-1, -1, hidden.shape[-1])
        hidden = hidden.gather(1, index)
    logits = captured.module.get_submodule(captured.anatomy.head)(hidden)
    cap = soft_cap(captured.module)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def soft_cap(module: Any) -> float | None:
    """The soft-cap that the model's own ``forward`` puts on its logits, None for none.

    Some configs name one that their vision-language class does not apply.
    """
    cap = getattr(module.config.get_text_config(), "final_logit_softcapping", None)
    if cap is None:
        return None
    applied = "final_logit_softcapping" in inspect.getsource(inspect.unwrap(type(module).forward))
    return float(cap) if applied else None


Given = dict[str, Any]

PLAIN = (type(None), bool, int, float, str)

DROPPED = ("past_key_values", "use_cache", "cache_position", "return_dict")

EXTENDED = {"attention_mask": 1, "token_type_ids": 0, "mm_token_type_ids": 0}

"""Inputs with one entry per position, and what a text token after the prompt has there."""


class _Reached(Exception):  # noqa: N818  it ends a pass; nothing went wrong
    """Leaves a model's forward pass where its decoder begins."""

    def __init__(self, given: Given) -> None:
        self.given = given


def decoder_inputs(
    lvlm: LVLM, inputs: Mapping[str, Any], features: Any = None
) -> tuple[Given, Any]:
    """The decoder's keyword arguments for a batch, after vision tower and projector.

    Args:
        lvlm: The model.
        inputs: What the model is called with (``sample.inputs``).
        features: What `decoder_inputs` gave for other text and the same images in the same order:
            then the vision tower does not run. None runs it.

    Returns:
        The arguments, ``inputs_embeds`` among them, and the image features; these are None if the
        model has no ``get_image_features``.

    Raises:
        ModelError: If the decoder is called with something that cannot be cut into rows.
    """
    module: Any = lvlm.module
    device = lvlm.device
    placed = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}

    def stop(decoder: Any, args: tuple, given: Given) -> None:
        if args:
            raise ModelError(
                f"{type(decoder).__name__} was called with {len(args)} positional arguments; "
                "expected keywords only. Please report this class."
            )
        raise _Reached(given)

    seen: list[Any] = []
    hook = module.get_decoder().register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with undisturbed(module), _image_features(module.base_model, features, seen):
            module.base_model(**placed, use_cache=False)
    except _Reached as reached:
        return checked(reached.given), seen[-1] if seen else features
    finally:
        hook.remove()
    raise ModelError(
        f"{type(module).__name__} did not call its decoder; expected one call per pass. Please report "
        "this class."
    )


def _image_features(base: Any, known: Any, seen: list[Any]) -> AbstractContextManager[None]:
    """Answer the model's own call for image features with known ones, or keep what it computes."""
    compute = getattr(base, "get_image_features", None)
    if compute is None:
        return nullcontext()

    def answer(*args: Any, **options: Any) -> Any:
        seen.append(compute(*args, **options) if known is None else known)
        return seen[-1]

    return lent([(base, {"get_image_features": answer})])


def checked(given: Mapping[str, Any]) -> Given:
    """The arguments without those of the cache.

    Raises:
        ModelError: If there is one whose rows are unknown.
    """
    out = {k: v for k, v in given.items() if k not in DROPPED and v is not None}
    known = ("inputs_embeds", "attention_mask", "position_ids")
    strange = [k for k, v in out.items() if k not in known and not isinstance(v, PLAIN)]
    if strange or not isinstance(out.get("inputs_embeds"), Tensor):
        raise ModelError(
            f"The decoder is called with {sorted(out)}; expected inputs_embeds, attention_mask, "
            f"position_ids and plain options; cannot cut {strange} into rows. Please report this class."
        )
    return out


def rows_of(given: Mapping[str, Any], rows: Tensor) -> Given:
    """The arguments for a choice of rows, with repeats.

    Args:
        given: The decoder's arguments.
        rows: Int ``[row]``: which row of the batch each new row is.
    """
    n = given["inputs_embeds"].shape[0]
    return {name: _pick(name, value, rows, n) for name, value in given.items()}


def _pick(name: str, value: Any, rows: Tensor, n: int) -> Any:
    """One argument for a choice of rows; what all rows share stays."""
    if isinstance(value, Mapping):
        return {key: _pick(name, part, rows, n) for key, part in value.items()}
    if not isinstance(value, Tensor):
        return value
    axis = 1 if name == "position_ids" and value.ndim == 3 else 0
    if value.shape[axis] == 1 < n:
        return value
    return value.index_select(axis, rows.to(value.device))


def extend(inputs: Mapping[str, Any], continuation: Sequence[int]) -> Given:
    """Inputs of one row with text tokens after the prompt, for teacher forcing.

    Args:
        inputs: Processor output of one row without padding at its end.
        continuation: Token ids; none leaves the inputs as they are.

    Raises:
        InputError: If there are several rows, or an input whose entry for a text token is unknown.
    """
    ids = inputs["input_ids"]
    if ids.shape[0] != 1:
        raise InputError(
            f"Got {ids.shape[0]} rows; expected one. Prepare the questions one by one."
        )
    out, n = dict(inputs), len(continuation)
    for name, value in inputs.items():
        if not isinstance(value, Tensor) or value.shape != ids.shape:
            continue
        if name == "input_ids":
            new = torch.tensor([list(continuation)], dtype=value.dtype).reshape(1, n)
        elif name in EXTENDED:
            new = torch.full((1, n), EXTENDED[name], dtype=value.dtype)
        else:
            raise InputError(
                f"Got the input {name!r} with one entry per position; expected input_ids and "
                f"{sorted(EXTENDED)}: what an answer's tokens have there is not known."
            )
        out[name] = torch.cat([value, new.to(value.device)], dim=1)
    return out
