"""The picture under its patch grid, and values of image tokens laid out as the picture is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from matplotlib.collections import LineCollection
from torch import Tensor

from sinkscope.viz.style import QUIET, SMALL, check_image

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from sinkscope.experiments.trace import SinkTrace


def draw_picture(ax: Axes, trace: SinkTrace, row: int, image: int, *, grey: bool = False) -> float:
    """The image, if there is one, under the grid of the vision tower's patches.

    Returns:
        About how many points wide a token is drawn, to choose a marker that fits.
    """
    index = check_image(trace, row, image)
    vision = trace.sample.tokens.vision
    boxes = vision.box[index][~vision.box[index].isnan().any(dim=-1)]
    low, high = boxes[:, :2].amin(dim=0), boxes[:, 2:].amax(dim=0)
    images = trace.sample.images
    if images is None:
        ax.set_xlim(float(low[0]), float(high[0]))
        ax.set_ylim(float(high[1]), float(low[1]))
        ax.set_facecolor("#f2f2f2")
        ax.set_aspect("equal")
    else:
        picture = images[row][image]
        extent = (0, picture.width, picture.height, 0)
        ax.imshow(picture.convert("L" if grey else "RGB"), extent=extent, cmap="gray", zorder=0)
    _draw_grid(ax, boxes, low.tolist(), high.tolist())
    ax.set_xticks([])
    ax.set_yticks([])
    ax.set_anchor("NW")
    if images is None:
        ax.set_ylabel("no picture: input pixels", fontsize=SMALL, color=QUIET)
    columns = int(trace.sample.tokens.column[row].amax()) + 1
    return min(26.0, max(6.0, 230.0 / columns))


def token_grid(
    trace: SinkTrace, row: int, image: int, values: Tensor
) -> tuple[Tensor, tuple[float, float, float, float]]:
    """Values ``[pos]`` of a row's image tokens as ``[row column]``, and where they lie in pixels.

    A CLS token that the projector keeps has no place among them.
    """
    tokens = trace.sample.tokens
    own = (tokens.image[row] == image) & (tokens.row[row] >= 0)
    rows, columns = tokens.row[row, own], tokens.column[row, own]
    grid = torch.full((int(rows.max()) + 1, int(columns.max()) + 1), float("nan"))
    grid[rows, columns] = values[own].float()
    box = tokens.box[row, own]
    x0, y0 = box[:, :2].amin(dim=0).tolist()
    x1, y1 = box[:, 2:].amax(dim=0).tolist()
    return grid, (x0, x1, y1, y0)


def _draw_grid(ax: Axes, boxes: Tensor, low: list[float], high: list[float]) -> None:
    """The edges of all patches."""
    xs = torch.cat([boxes[:, 0], boxes[:, 2]]).unique().tolist()
    ys = torch.cat([boxes[:, 1], boxes[:, 3]]).unique().tolist()
    lines = [[(x, low[1]), (x, high[1])] for x in xs] + [[(low[0], y), (high[0], y)] for y in ys]
    width = 0.9 if len(xs) < 20 else 0.4
    for colour, thick in (("black", width), ("white", width / 2)):
        ax.add_collection(
            LineCollection(lines, colors=colour, linewidths=thick, alpha=0.55, zorder=1),
            autolim=False,
        )
