"""Prove that blocks add what their branches say, by hooks on a pass that runs anyway."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sinkscope.kernels.walk import factors_at, first_tensor, times
from sinkscope.models.anatomy import Anatomy
from sinkscope.models.branches import Branch, NoBranch, no_branch

LIMIT = 4.0
"""Rounding errors of the states' dtype by which two additions may be off; they make at most 2."""
TOKENS = 32
"""How many tokens of a pass are looked at, which is more than enough."""


@contextmanager
def watched_sums(module: nn.Module, anatomy: Anatomy) -> Iterator[dict[tuple[str, int], NoBranch]]:
    """Compare ``resid_pre + attn_out + mlp_out`` with ``resid_post`` in every pass inside.

    Args:
        module: The model.
        anatomy: Its anatomy.

    Yields:
        ``(tower, layer) -> reason`` of the blocks in which they differ; filled when a block has run.
    """
    wrong: dict[tuple[str, int], NoBranch] = {}
    handles: list[Any] = []
    try:
        for tower in (anatomy.vision, anatomy.language):
            for layer in tower.adding:
                block = _Block(module, tower.blocks[layer], wrong, (tower.tower, layer))
                handles += block.watch(
                    tower.branch("attn_out", layer), tower.branch("mlp_out", layer)
                )
        yield wrong
    finally:
        for handle in handles:
            handle.remove()


class _Block:
    """The sum of one block while a pass goes through it."""

    def __init__(
        self,
        module: nn.Module,
        path: str,
        wrong: dict[tuple[str, int], NoBranch],
        place: tuple[str, int],
    ) -> None:
        self.module, self.path, self.wrong, self.place = module, path, wrong, place
        self.parts: list[Tensor] = []

    def watch(self, *branches: Branch) -> list[Any]:
        """Hooks on the block and on what its branches add."""
        block = self.module.get_submodule(self.path)
        return [
            block.register_forward_pre_hook(self.begin, with_kwargs=True),
            *(
                self.module.get_submodule(branch.path).register_forward_hook(self.adder(branch))
                for branch in branches
            ),
            block.register_forward_hook(self.end),
        ]

    def begin(self, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Note what the block reads."""
        self.parts = [args[0] if args else next(iter(kwargs.values()))]

    def adder(self, branch: Branch) -> Any:
        """A hook that notes what a branch adds."""

        def note(module: nn.Module, args: Any, out: Any) -> None:
            states = first_tensor(out)
            self.parts.append(times(states, factors_at(self.module, branch.factors, states.device)))

        return note

    def end(self, block: nn.Module, args: Any, out: Any) -> None:
        """Compare with what the block writes."""
        off = rounding_errors(self.parts, first_tensor(out)) if len(self.parts) == 3 else None
        self.parts = []
        if off is None:
            why = "attention or MLP did not run once in a pass"
        elif off <= LIMIT:
            return
        else:
            why = f"in a pass they differ by {off:.3g} rounding errors"
        self.wrong[self.place] = no_branch(self.path, block, why)


def rounding_errors(parts: list[Tensor], whole: Tensor) -> float:
    """The largest difference between a sum and the whole, in roundings of the sizes that were added."""
    eps = max(torch.finfo(states.dtype).eps for states in (*parts, whole))
    exact = torch.promote_types(whole.dtype, torch.float32)
    width = whole.shape[-1]
    pre, attention, mlp, post = (
        states.detach().reshape(-1, width)[:TOKENS].to(whole.device, exact)
        for states in (*parts, whole)
    )
    size = (pre.abs() + attention.abs() + mlp.abs()) * eps
    off = (pre + attention + mlp - post).abs() / size.clamp(min=torch.finfo(torch.float32).tiny)
    return float(off.max())
