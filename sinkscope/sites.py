"""A `Site` is one place in the forward pass; sites sort in the order the model reaches them.

::

    vision 0 ... vision L_v-1      projector        language 0 ... language L-1
    resid_pre -> attention -> attn_out -> mlp_hidden -> mlp_out -> resid_post   (in every block)
                                   input -> output                              (the projector)

``resid_pre(l)`` is what block ``l`` reads and ``resid_post(l)`` what it writes. They are equal,
``resid_post(l) == resid_pre(l + 1)``, unless the model adds something between two blocks: DeepStack adds
vision states there. The report names such blocks, and what enters. ``resid_pre(0)`` of the language tower are
the embeddings, behind what the model does to them before its first block.
``attn_out(l)`` and ``mlp_out(l)`` are what is added, behind a LayerScale, a norm or a factor where a
block has one: ``resid_pre + attn_out + mlp_out == resid_post``. A site that a pass does not show to be so is
refused by name.
``mlp_hidden(l)`` are the MLP's neurons after the nonlinearity: what its last projection reads.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from sinkscope.checks import check_choice
from sinkscope.errors import ProbeError, nearest

Tower = Literal["vision", "projector", "language"]
BLOCK_SITES = ("resid_pre", "attention", "attn_out", "mlp_hidden", "mlp_out", "resid_post")
STATE_SITES = ("resid_pre", "attn_out", "mlp_out", "resid_post")
"""Sites that hold states of the residual stream's width."""
PROJECTOR_SITES = ("input", "output")
TOWERS = ("vision", "projector", "language")


@dataclass(frozen=True)
class Site:
    """One place in the forward pass; a ProbeError if its tower or name does not exist.

    ``name`` is one of `BLOCK_SITES`, or of `PROJECTOR_SITES` for the projector; ``layer`` is the 0-based
    block index, 0 for the projector.
    """

    tower: Tower
    name: str
    layer: int = 0

    def __post_init__(self) -> None:
        if self.tower not in TOWERS:
            check_choice(TOWERS, error=ProbeError, tower=self.tower)
        known = PROJECTOR_SITES if self.tower == "projector" else BLOCK_SITES
        if self.name not in known:
            raise ProbeError(
                f"Got site {self.name!r} in the {self.tower} tower; expected one of {known}. "
                f"{nearest(self.name, known)}"
            )

    @property
    def order(self) -> tuple[int, int, int]:
        """Sort key: the order in which one forward pass reaches the site."""
        names = PROJECTOR_SITES if self.tower == "projector" else BLOCK_SITES
        return TOWERS.index(self.tower), self.layer, names.index(self.name)

    def __lt__(self, other: Site) -> bool:
        return self.order < other.order

    def __str__(self) -> str:
        return f"{self.tower}.{self.name}({self.layer})"


def in_order(sites: Iterable[Site]) -> list[Site]:
    """Sites in the order of the forward pass; sorting by ``<`` asks for the order twice per comparison."""
    return sorted(sites, key=lambda site: site.order)
