"""DINOv2-S/14 out of an ONNX graph.

torch exported the graph. Biases, norms and scales kept their names. The matrix of a linear layer lost
its: it is transposed, called ``onnx::MatMul_123``, and known by the bias that is added after it. The
position embeddings were cut into those of CLS and those of the 37 x 37 patches.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sinkscope.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import Dinov2Model

PREFIX = "backbone."
WIDTH, GRID = 384, 37
RENAMED = (
    ("attention.attention.query", "attention.q_proj"),
    ("attention.attention.key", "attention.k_proj"),
    ("attention.attention.value", "attention.v_proj"),
    ("attention.output.dense", "attention.o_proj"),
)
"""Names in the graph, and what newer transformers call them."""
UNUSED = {"embeddings.mask_token"}
"""What pre-training needed only; the graph does not have it."""


def read_vision(content: bytes) -> Dinov2Model:
    """The tower, in evaluation mode.

    Args:
        content: The ONNX file.

    Raises:
        CheckpointError: If the graph is another one.
    """
    import onnx
    from transformers import Dinov2Config, Dinov2Model

    graph = onnx.load_model_from_string(content).graph
    config = Dinov2Config(
        hidden_size=WIDTH,
        num_hidden_layers=12,
        num_attention_heads=6,
        image_size=518,
        patch_size=14,
    )
    model = Dinov2Model(config).eval()
    known = model.state_dict()
    found = {_renamed(name, known): value for name, value in _weights(graph)}
    odd = (known.keys() ^ found.keys()) - UNUSED
    odd |= {name for name in known.keys() & found.keys() if known[name].shape != found[name].shape}
    if odd:
        raise CheckpointError(
            f"Got an ONNX graph that differs from DINOv2-S/14 at {sorted(odd)[:4]}; expected one "
            f"tensor of the same shape for each of its {len(known) - len(UNUSED)} weights."
        )
    model.load_state_dict(known | found)
    return model


def _renamed(name: str, known: dict[str, Tensor]) -> str:
    """The name of a weight in this version of transformers."""
    if name not in known:
        for old, new in RENAMED:
            name = name.replace(old, new)
    return name


def _weights(graph: Any) -> Iterator[tuple[str, Tensor]]:
    """Every weight of the backbone by its name in the model that was exported."""
    from onnx import numpy_helper

    values = {i.name: torch.tensor(numpy_helper.to_array(i)) for i in graph.initializer}
    for name, value in values.items():
        if name.startswith(PREFIX):
            yield name.removeprefix(PREFIX), value
    biases = {
        side: bias
        for node in graph.node
        if node.op_type == "Add"
        for bias in node.input
        if bias in values
        for side in node.input
    }
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in values and node.output[0] in biases:
            bias = biases[node.output[0]].removeprefix(PREFIX)
            yield f"{bias.removesuffix('bias')}weight", values[node.input[1]].T.contiguous()
    unnamed = {tuple(v.shape): v for name, v in values.items() if not name.startswith(PREFIX)}
    parts = [unnamed.get(shape) for shape in ((1, 1, WIDTH), (1, GRID**2, WIDTH))]
    positions = [part for part in parts if part is not None]
    if positions:
        yield "embeddings.position_embeddings", torch.cat(positions, dim=1)
