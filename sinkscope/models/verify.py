"""Prove the anatomy on the model itself: one small forward pass at load."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from sinkscope.errors import ModelError
from sinkscope.kernels import residual
from sinkscope.models.adding import watched_sums
from sinkscope.models.branches import NoBranch
from sinkscope.models.context import Context
from sinkscope.probes.attention import AttentionMass
from sinkscope.probes.protocol import Read
from sinkscope.sites import Site

if TYPE_CHECKING:
    from sinkscope.models.lvlm import LVLM


@dataclass(frozen=True, eq=False)
class _States:
    """Whole states at a few sites, as the model lays them out; used here only."""

    sites: tuple[Site, ...]
    tower: str = "vision"

    def reads(self, context: Context) -> list[Read]:
        return [Read(site, residual.keep) for site in self.sites]

    def finish(self, answers: Mapping[Site, Any], context: Context) -> Any:
        return answers


def verify_anatomy(lvlm: LVLM) -> dict[tuple[str, int], NoBranch]:
    """Check that the sites are what they are called.

    * attention mass over all live tokens sums to one in every block whose attention call was found;
    * what the projector reads is made of the vision blocks said to feed it, CLS dropped as said;
    * what the projector writes is found at the image positions of the decoder's input;
    * a block adds attn_out and mlp_out to the stream, and nothing else.

    Returns:
        ``(tower, layer) -> reason`` of the blocks in which the last of them fails: they have no such
        sites, and the rest works.

    Raises:
        ModelError: If one of the others fails, with the numbers.
    """
    a = lvlm.anatomy
    sample = lvlm.prepare(images=_test_image(), text="a")
    feeds = tuple(Site("vision", "resid_post", layer) for layer in a.feeds)
    states = _States(
        (
            *feeds,
            Site("projector", "input"),
            Site("projector", "output"),
            Site("language", "resid_pre", 0),
        )
    )
    sums = [
        AttentionMass({"all": "all"}, layers=found, tower=tower, null=False)
        for tower in ("vision", "language")
        if (found := a.tower(tower).attending)
    ]
    with watched_sums(lvlm.module, a) as wrong:
        run = lvlm.run(sample, probes=[states, *sums], logits="last", remote=False)
    tolerance = 2e-2 if lvlm.module.dtype in (torch.bfloat16, torch.float16) else 1e-3
    for probe in sums:
        tower = probe.tower
        over = run[probe].mass - 1
        # A learned sink takes a share that belongs to no token.
        off = (over if a.tower(tower).learned_sink else over.abs()).nan_to_num().amax()
        if off > tolerance:
            raise ModelError(
                f"Attention over all {tower} tokens sums to 1 +- {off:.3g}; expected 1 within "
                f"{tolerance}. The attention call found is not the one that attends."
            )
    seen = run[states]
    _check_feed(lvlm, [seen[site] for site in feeds], seen[Site("projector", "input")])
    _check_projection(lvlm, sample, seen)
    return wrong


def _test_image() -> Image.Image:
    """A small image with structure, so that no two patches are alike."""
    noise = torch.randint(0, 256, (64, 64, 3), generator=torch.Generator().manual_seed(0))
    return Image.fromarray(noise.to(torch.uint8).numpy())


def _check_feed(lvlm: LVLM, feeds: list[Tensor], read: Tensor) -> None:
    """The projector's input is the feeding blocks' output, normed if so, without dropped tokens."""
    a = lvlm.anatomy
    made = torch.cat(feeds, dim=-1)
    if a.family.feed_norm:
        norm: Any = lvlm.module.get_submodule(a.family.feed_norm)
        with torch.no_grad():
            made = norm(made.to(norm.weight.device, norm.weight.dtype)).float().cpu()
    made = made[:, a.drops :] if made.ndim == 3 and not a.vision.packed else made
    made, read = made.reshape(-1, made.shape[-1]), read.reshape(-1, read.shape[-1])
    if made.shape != read.shape or not torch.equal(made, read):
        raise ModelError(
            f"The projector reads a tensor {tuple(read.shape)} that differs from the output of "
            f"vision blocks {a.feeds} without {a.drops} leading tokens {tuple(made.shape)}. "
            "The family's row is wrong for this model: please report it."
        )


def _check_projection(lvlm: LVLM, sample: Any, seen: Mapping[Site, Tensor]) -> None:
    """The projector's output reaches the image positions of the decoder's input."""
    visual = sample.tokens.image >= 0
    at_input = seen[Site("language", "resid_pre", 0)][visual]
    written = seen[Site("projector", "output")].reshape(-1, at_input.shape[-1])
    same = written.shape == at_input.shape
    order = None
    if same:
        order = torch.cdist(at_input, written).argmin(dim=1)
        same = torch.equal(written[order], at_input)
    if not same:
        raise ModelError(
            f"The projector writes {tuple(written.shape)}, but the decoder reads other states at "
            f"its {tuple(at_input.shape)} image positions; expected the same vectors."
        )
