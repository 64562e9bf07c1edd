"""Scenes and questions as training batches.

Many questions share one image. In an isolated row each turn sees the image and itself only, and its
positions restart behind the image: every turn is exactly a single-turn prompt, computed once with the
others. In a conversation row each turn also sees the turns before it.

    row        <s> USER: <image>..  question 1  answer 1   question 2  answer 2
    positions   0   1     2 ... 65   66 ...                 66 ...            (isolated)
    turn        0   0     0 ... 0    1 ...                  2 ...
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bundled_model.recipe import IMAGE_TOKENS, PATCH_SIZE, vocabulary
from sinkscope.bundled.scenes import COLOURS, GRID, IMAGE_SIZE, SHAPES, Question, Scene, ask

VOCABULARY = vocabulary()


class Batch(NamedTuple):
    """One training batch; `pos` counts tokens, right-padded."""

    pixels: Tensor
    """`[batch channel height width]`, in -1..1 as the processor makes them."""
    input_ids: Tensor
    """`[batch pos]`."""
    positions: Tensor
    """`[batch pos]`, the argument of the rotary embedding."""
    visible: Tensor
    """`[batch 1 query key]`, boolean."""
    is_answer: Tensor
    """`[batch pos]`: the token is part of an answer or its `</s>`."""
    is_text: Tensor
    """`[batch pos]`: the token is text behind the image, answers included, padding excluded."""


def pixels_of(scenes: Sequence[Scene]) -> Tensor:
    """Images as `[batch channel height width]` in -1..1."""
    stacked = torch.from_numpy(np.stack([np.asarray(scene.image) for scene in scenes]))
    return stacked.movedim(-1, 1).float() / 127.5 - 1.0


def patch_truth(scene: Scene) -> dict[str, np.ndarray]:
    """What there is to say about each patch, each entry `[patch]` in reading order.

    `covered` is 1 where a shape covers the patch's centre, else 0. The others are about the place of
    the grid that the centre lies in: its `row` and `column`, 0-based, and the `colour` and `shape` of
    what stands there, 0 for nothing, else 1 + the index in `COLOURS` or `SHAPES`.
    """
    centres = np.arange(0, IMAGE_SIZE, PATCH_SIZE) + PATCH_SIZE / 2
    places = (centres * GRID / IMAGE_SIZE).astype(np.int64)
    row, column = np.meshgrid(places, places, indexing="ij")
    covered, colour, shape = np.zeros((3, *row.shape), dtype=np.int64)
    for obj in scene.objects:
        left, top, right, bottom = obj.box
        rows = (centres >= top) & (centres < bottom)
        columns = (centres >= left) & (centres < right)
        covered[np.ix_(rows, columns)] = 1
        here = (row == obj.row) & (column == obj.column)
        shape[here] = 1 + SHAPES.index(obj.shape)
        colour[here] = 1 + list(COLOURS).index(obj.colour)
    truth = {"covered": covered, "colour": colour, "shape": shape, "row": row, "column": column}
    return {name: values.reshape(-1) for name, values in truth.items()}


@cache
def turn_ids(text: str, answer: str) -> tuple[tuple[int, ...], int]:
    """Token ids of one turn without `USER:` and image, and how many of them are the question's."""
    words = text.replace("?", " ?").split()
    ids = [VOCABULARY[word] for word in [*words, "ASSISTANT:", answer, "</s>"]]
    return tuple(ids), len(words) + 1


def pack(scenes: Sequence[Scene], seed: int, turns: int, isolated: bool) -> Batch:
    """A batch with `turns` questions about every scene, isolated or as one conversation."""
    rows = [_pack_row(ask(scene, seed, turns), isolated) for scene in scenes]
    width = max(row.shape[1] for row in rows)
    table = np.zeros((len(rows), 5, width), dtype=np.int64)
    table[:, 0] = VOCABULARY["<pad>"]
    table[:, 2] = -1  # padding sees only itself and other padding, and nobody sees it
    for index, row in enumerate(rows):
        table[index, :, : row.shape[1]] = row
    ids, positions, turn, is_answer, is_text = torch.from_numpy(table).unbind(1)
    causal = torch.ones(width, width, dtype=torch.bool).tril()
    same_turn = turn[:, :, None] == turn[:, None, :]
    shared = (turn[:, None, :] == 0) & (turn[:, :, None] >= 0)
    visible = causal & (same_turn | shared)
    return Batch(
        pixels_of(scenes), ids, positions, visible[:, None], is_answer.bool(), is_text.bool()
    )


def _pack_row(questions: Sequence[Question], isolated: bool) -> np.ndarray:
    """One row as `[field pos]` with fields id, position, turn, is_answer, is_text."""
    prefix = [VOCABULARY["<s>"], VOCABULARY["USER:"], *[VOCABULARY["<image>"]] * IMAGE_TOKENS]
    columns = [(token, place, 0, 0, 0) for place, token in enumerate(prefix)]
    for turn, question in enumerate(questions):
        ids, asked = turn_ids(question.text, question.answer)
        if not isolated and turn > 0:
            columns.append((VOCABULARY["USER:"], len(columns), 0, 0, 0))
        start = len(prefix) if isolated else len(columns)
        label = turn + 1 if isolated else 0
        for place, token in enumerate(ids):
            columns.append((token, start + place, label, int(place >= asked), 1))
    return np.array(columns, dtype=np.int64).T
