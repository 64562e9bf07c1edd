"""One scale of colours for shares of attention, from 0 to 1, wherever tokens are coloured."""

from __future__ import annotations

from matplotlib import colormaps
from matplotlib.colors import PowerNorm, to_hex

COLOURS = "Purples"
"""Light to dark, and no colour of a kind of sink."""
TICKS = (0.0, 0.01, 0.05, 0.2, 0.5, 1.0)
DARK = 0.55
"""Places on the scale from which on letters are white."""


def share_scale() -> PowerNorm:
    """A square-root scale: 0.01 lies at a tenth of it, 0.25 at a half."""
    return PowerNorm(0.5, 0.0, 1.0)


def colour_of(share: float) -> str:
    """The colour of a share as ``#rrggbb``."""
    return to_hex(colormaps[COLOURS](_place(share)))


def ink_on(share: float) -> str:
    """The colour of letters that can be read on it."""
    return "#ffffff" if _place(share) > DARK else "#1c2127"


def _place(share: float) -> float:
    return float(share_scale()(min(max(share, 0.0), 1.0)))
