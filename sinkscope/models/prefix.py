"""Run the common beginning of prompts (system prompt, image) once: the stem, which serves every tail.

A causal stem does not see its tails (question and answer, one row each, padded on the right). If an
edit depends on the stem alone, so do the stem's keys and values, and they are reused exactly.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from sinkscope.models.decoder import Given
from sinkscope.models.lvlm import LVLM
from sinkscope.models.replay import Captured, capture, map_tensors, resume, row_axis
from sinkscope.models.wrapping import Inputs, moved

Pair = tuple[Tensor, Tensor]


class _Past(DynamicLayer):
    """Keys and values of one block that stand before those of a pass; what is new is not stored."""

    def __init__(self, length: int = 0, before: Pair | None = None) -> None:
        super().__init__()
        self.length, self.before = length, before
        self.new: Pair | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Pair:
        if self.before is None:
            self.new = (key_states, value_states)
            return self.new
        key, value = self.before
        return torch.cat([key, key_states], dim=-2), torch.cat([value, value_states], dim=-2)

    def get_seq_length(self) -> int:
        """How many positions stand before; the same in every block, also in those passed by."""
        return self.length


@dataclass(frozen=True, eq=False)
class KeyValues:
    """Keys and values of a stem, by block ``[row kv_head pos d_head]`` or None, and its length."""

    length: int
    by_block: tuple[Pair | None, ...]

    def cache(self, rows: Tensor) -> Cache:
        """A cache that begins with them; ``rows``, int ``[row]``, says which row each row continues."""
        devices = {pair[0].device for pair in self.by_block if pair}
        at = {device: moved(rows, device) for device in devices}  # once, not for every block

        def chosen(states: Tensor) -> Tensor:
            return states.index_select(0, at[states.device])

        pairs = (pair and (chosen(pair[0]), chosen(pair[1])) for pair in self.by_block)
        return Cache(layers=[_Past(self.length, pair) for pair in pairs])


@dataclass(frozen=True, eq=False)
class Branches:
    """A stem (one row) with its keys and values, and its tails (one row each)."""

    stem: Captured
    past: KeyValues
    tails: Captured


def why_not_shared(givens: Sequence[Inputs], length: int) -> str | None:
    """Why decoder arguments of single rows cannot share their first ``length`` positions, or None."""
    if length < 1 or any(given["inputs_embeds"].shape[1] <= length for given in givens):
        return "nothing stands before or after the end of the last image"
    masks = (v for g in givens for (name, _), v in _leaves(g).items() if name == "attention_mask")
    for mask in masks:
        if not isinstance(mask, Tensor) or mask.ndim not in (2, 4):
            return "the model leaves its mask to the attention kernel"
        seen = mask[:, :, :length, length:] if mask.ndim == 4 else mask[:, :0]
        if bool((seen if mask.dtype == torch.bool else seen == 0).any()):
            return "the beginning sees what follows it"
        if mask.ndim == 2 and not bool(mask.all()):
            return "the prompt is padded"
    first, *others = [_leaves(_stem(given, length)) for given in givens]
    for other in others:
        if first.keys() != other.keys() or not all(_same(first[k], other[k]) for k in first):
            return "the prompts differ before the end of the last image"
    return None


def _leaves(given: Inputs) -> dict[tuple[str, Any], Any]:
    """The arguments, those in a dict one by one; a missing mask too."""
    return {
        (name, key): part
        for name, value in {"attention_mask": None, **given}.items()
        for key, part in (value if isinstance(value, Mapping) else {"": value}).items()
    }


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    return type(a) is type(b) and a == b


def _stem(given: Inputs, length: int) -> Given:

    def cut(name: str, value: Tensor) -> Tensor:
        if name == "inputs_embeds":
            return value[:, :length]
        whole = name == "attention_mask" and value.ndim == 4
        return value[:, :, :length, :length] if whole else value[..., :length]

    return map_tensors(cut, given)


def _tail(given: Inputs, length: int, longest: int) -> Given:
    """The arguments of the positions after the stem, padded on the right to ``longest``."""
    missing = longest - (given["inputs_embeds"].shape[1] - length)

    def cut(name: str, value: Tensor) -> Tensor:
        if name == "inputs_embeds":
            return F.pad(value[:, length:], (0, 0, 0, missing))
        if name == "position_ids":
            value = value[..., length:]
            return torch.cat([value, value[..., -1:].expand(*value.shape[:-1], missing)], dim=-1)
        if value.ndim == 2:  # all positions are live, and what is padding comes last
            return F.pad(value, (0, missing), value=1)
        value = value[:, :, length:]
        hidden = False if value.dtype == torch.bool else torch.finfo(value.dtype).min
        value = F.pad(value, (0, missing), value=hidden)
        return torch.cat([value, value[:, :, -1:].expand(-1, -1, missing, -1)], dim=2)

    return map_tensors(cut, given)


@torch.no_grad()
def capture_branches(
    lvlm: LVLM, givens: Sequence[Inputs], length: int, blocks: Any = None
) -> Branches:
    """Run the stem once and all tails once, without edits; ``blocks`` will be edited, None for all."""
    layers = [_Past() for _ in range(lvlm.anatomy.language.n_layers)]
    stem = capture(lvlm, _stem(givens[0], length), blocks, cache=Cache(layers=[*layers]))
    past = KeyValues(length, tuple(layer.new for layer in layers))
    longest = max(given["inputs_embeds"].shape[1] for given in givens) - length

    def stack(name: str, *values: Tensor) -> Tensor:
        return torch.cat(values, dim=row_axis(name, values[0]))

    tails = map_tensors(stack, *(_tail(given, length, longest) for given in givens))
    rows = torch.zeros(len(givens), dtype=torch.long)
    return Branches(stem, past, capture(lvlm, tails, blocks, cache=past.cache(rows)))


def resume_stem(branches: Branches, block: int, factors: Tensor) -> KeyValues:
    """The stem's keys and values under edits of one captured block, and of those behind it.

    ``factors`` ``[row key]``: one row per edit, one factor per position of the stem.
    """
    layers = [_Past() for _ in branches.past.by_block]
    rows = torch.zeros(len(factors), dtype=torch.long)
    resume(branches.stem, block, factors, rows=rows, cache=Cache(layers=[*layers]))
    return KeyValues(branches.past.length, tuple(layer.new for layer in layers))


def resume_tails(
    branches: Branches, block: int, factors: Tensor, past: KeyValues, edits: Tensor, tails: Tensor
) -> Tensor:
    """The tails under edits of one block: hidden states after the final norm, ``[row pos d_model]``.

    ``factors`` ``[edit key]`` were given to `resume_stem`, which gave ``past``; ``edits`` and ``tails``,
    int ``[row]``, say which edit and which tail each row has.
    """
    longest = branches.tails.hidden.shape[1]
    scale = F.pad(factors.index_select(0, edits.to(factors.device)), (0, longest), value=1.0)
    return resume(branches.tails, block, scale, rows=tails, cache=past.cache(edits))
