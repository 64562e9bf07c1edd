"""Prove the anatomy on the model itself: a part of a forward pass with a picture, and one of words."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sinkscope.anatomy.block_sum import NoBranch, no_branch
from sinkscope.anatomy.discovery import dtype_of
from sinkscope.anatomy.towers import Anatomy, TowerAnatomy
from sinkscope.errors import ModelError
from sinkscope.kernels.walk import factors_at, first_tensor, times
from sinkscope.models.inputs import Sample
from sinkscope.models.wrapping import ONE_AT_A_TIME
from sinkscope.probes.attention import AttentionMass
from sinkscope.sites import Tower

LIMIT = 4.0
"""Rounding errors of the states' dtype by which two additions may be off; they make at most 2."""


def verify_anatomy(lvlm: Any, sample: Sample) -> dict[tuple[str, int], NoBranch]:
    """Check that the sites of an `LVLM` are what they are called; ModelError if not, with the numbers.

    * attention mass over all live tokens sums to one in every block whose attention call was found;
    * two passes compute the same, if a pass draws random numbers, and nothing is NaN.

    Returns ``(tower, layer) -> reason`` of the blocks that do not add just attn_out and mlp_out.
    """
    towers: list[Any] = ["vision", "language"] if lvlm.anatomy.vision.blocks else ["language"]
    with _few_threads(lvlm.module), watched_sums(lvlm.module, lvlm.anatomy) as wrong:
        with _not_by_chance(lvlm, sample):
            probes = {tower: _sums(lvlm, tower) for tower in towers}
            every = [probe for few in probes.values() for probe in few]
            run = lvlm.run(sample, probes=every, logits="last", remote=False)
    for tower, few in probes.items():
        for probe in few:
            _check_sum(lvlm, tower, run[probe].mass)
    return wrong


@contextmanager
def _not_by_chance(lvlm: Any, sample: Sample) -> Iterator[None]:
    """Where passes inside draw random numbers, refuse a model of which two passes differ."""

    def state() -> Tensor:
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        return torch.cat([torch.get_rng_state(), *cuda])

    before = state()
    try:
        yield
    finally:
        if not torch.equal(before, state()):
            first, second = (lvlm.run(sample, logits="last", remote=False).logits for _ in "12")
            off = float((first - second).abs().max())
            if not off <= 1e-2 * float(first.abs().max()):
                got = f"Two passes differ by {off:.3g}: they draw random numbers in evaluation mode"
                write = "Give training=self.training to dropout, or verify=False."
                raise ModelError(f"{got}; expected equal ones. {write}")


@contextmanager
def _few_threads(module: nn.Module) -> Iterator[None]:
    """One thread for the short passes of a small model, where several wait for one another."""
    with ONE_AT_A_TIME:  # the number of threads belongs to the process
        before = torch.get_num_threads()
        if sum(p.numel() for p in module.parameters()) <= 1_000_000_000:
            torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def _sums(lvlm: Any, tower: Tower, most: int | None = None) -> list[AttentionMass]:
    """The mass on all tokens, in the first blocks whose attention call was found, or in all of them."""
    found = lvlm.anatomy.tower(tower).attending[:most]
    return [AttentionMass({"all": "all"}, found, tower=tower, null=False)] if found else []


def _check_sum(lvlm: Any, tower: Tower, mass: Tensor) -> None:
    """The mass on all tokens is one, or less with a learned sink."""
    anatomy = lvlm.anatomy.tower(tower)
    half = dtype_of(lvlm.module.get_submodule(anatomy.blocks[0])) != torch.float32
    tolerance = 2e-2 if half else 1e-3
    off = (mass - 1 if anatomy.learned_sink else (mass - 1).abs()).nan_to_num().amax()
    if off > tolerance:
        got = f"Attention over all {tower} tokens sums to 1 +- {off:.3g}; expected 1 within {tolerance}"
        raise ModelError(f"{got}. The attention call found is not the one that attends.")


@contextmanager
def watched_sums(module: nn.Module, anatomy: Anatomy) -> Iterator[dict[tuple[str, int], NoBranch]]:
    """Compare ``resid_pre + attn_out + mlp_out`` with ``resid_post`` in every pass inside.

    Yields ``(tower, layer) -> reason`` of the blocks in which they differ, filled as they run.
    """
    wrong: dict[tuple[str, int], NoBranch] = {}
    with ExitStack() as stack:
        for tower in (anatomy.vision, anatomy.language):
            for layer in tower.adding:
                for handle in _watch(module, tower, layer, wrong):
                    stack.enter_context(handle)
        yield wrong


def _watch(
    module: nn.Module, tower: TowerAnatomy, layer: int, wrong: dict[tuple[str, int], NoBranch]
) -> Iterator[Any]:
    """Hooks on a block and on what its branches add, which note where the sum is wrong."""
    parts: list[Tensor] = []
    path, get = tower.blocks[layer], module.get_submodule

    def begin(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        parts[:] = [args[0] if args else next(iter(kwargs.values()))]

    def add(factors: tuple[str, ...], part: nn.Module, args: Any, out: Any) -> None:
        states = first_tensor(out)
        parts.append(times(states, factors_at(module, factors, states.device)))

    def end(block: nn.Module, args: Any, out: Any) -> None:
        why = "attention or MLP did not run once in a pass"
        if len(parts) == 3:
            off = rounding_errors(parts, first_tensor(out))
            why = "" if off <= LIMIT else f"in a pass they differ by {off:.3g} rounding errors"
        parts.clear()
        if why:
            wrong[tower.tower, layer] = no_branch(path, block, why)

    yield get(path).register_forward_pre_hook(begin, with_kwargs=True)
    for branch in (tower.branch("attn_out", layer), tower.branch("mlp_out", layer)):
        yield get(branch.path).register_forward_hook(partial(add, branch.factors))
    yield get(path).register_forward_hook(end)


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
