"""Stand-ins: inputs for a model without a processor, and weights for what lies between pixels and decoder."""

import copy
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sinkscope.anatomy.towers import Anatomy
from sinkscope.errors import SinkscopeError
from sinkscope.models.input_checks import types_of
from sinkscope.models.inputs import REFUSALS, token_map
from sinkscope.models.wrapping import Inputs, undisturbed

WORDS = 6


def through(block: nn.Module) -> nn.Module:
    """A module of the block's class without weights, which returns the states that it is given, without
    their graph; in a tuple if the block returns one."""
    made = nn.Module.__new__(type(block))
    nn.Module.__init__(made)
    plain = {n: x for n, x in vars(block).items() if isinstance(x, (bool, int, float, str))}
    returned = str(inspect.signature(type(block).forward).return_annotation)
    in_tuple = "tuple" in returned.lower() and "None" not in returned

    def forward(*args: Any, **kwargs: Any) -> Any:
        states = next(x for x in (*args, *kwargs.values()) if torch.is_tensor(x)).detach()
        return (states,) if in_tuple else states

    vars(made).update(plain, forward=forward)
    return made


class Words(nn.Embedding):
    """Stands for the embeddings of a large vocabulary: all are zero, and take no memory."""

    def __init__(self, embedding: Any) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = embedding.weight.shape
        self.padding_idx = None
        self.weight = nn.Parameter(torch.zeros(1, self.embedding_dim), requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        """Zeros ``[... d]`` for ids ``[...]``."""
        return torch.zeros(*input.shape, self.embedding_dim)


@torch.no_grad()
def stand_in(module: Any, anatomy: Anatomy) -> Any:
    """A copy of a model without weights, on the CPU: blocks pass states on, the rest has random weights.

    What feeds what, and which ViT tokens make an image token, is a matter of the code and the config, so
    that it can be measured on the copy.
    """
    get, embedding = module.get_submodule, module.get_input_embeddings()
    blocks = [get(path) for path in (*anatomy.vision.blocks, *anatomy.language.blocks)]
    memo: dict[int, Any] = {id(block): through(block) for block in blocks}
    memo |= {id(get(anatomy.head)): nn.Identity(), id(embedding): Words(embedding)}
    skip = {id(part) for part in memo.values()}  # whose weights are not there
    made = copy.deepcopy(module, memo).to_empty(device="cpu").float()
    for part in made.modules():
        vars(part)["_is_hf_initialized"] = id(part) in skip
        if isinstance(part, Words):
            part.weight.zero_()
    made.initialize_weights()  # which also fills buffers that no checkpoint has
    generator = torch.Generator().manual_seed(0)
    for weight in made.parameters():
        if weight.is_floating_point() and weight.shape[0] > 1:
            weight.copy_(0.05 * torch.randn(weight.shape, generator=generator))
    return made.eval()


def made_inputs(lvlm: Any) -> dict[str, Tensor] | None:
    """Inputs of an `LVLM` that its model takes, or None where no way that is known here works."""
    module, anatomy = lvlm._maps.runs(lvlm.anatomy), lvlm.anatomy
    if not anatomy.vision.blocks:
        return _around(module, anatomy, 0)
    for pixels in _pictures(module.config, _takes(module)):
        try:
            count = _count(module, lvlm._places.placed(pixels))
            inputs = _around(module, anatomy, count) | pixels
            token_map(lvlm, inputs)
        except (*REFUSALS, SinkscopeError):
            continue
        if lvlm.anatomy.measured:
            return inputs
    return None


def _takes(module: Any) -> set[str]:
    """The names of what a forward takes, of the model or of the part that reads images."""
    parts = (module, module.base_model)
    features = [getattr(part, "get_image_features", None) for part in parts]
    forwards = [type(part).forward for part in parts]
    return {
        n for f in (*forwards, *filter(None, features)) for n in inspect.signature(f).parameters
    }


def _pictures(config: Any, takes: set[str]) -> Iterator[dict[str, Tensor]]:
    """Pixels in the ways that models take them, likely ones first."""
    vision = getattr(config, "vision_config", None) or config

    def number(*names: str, default: int) -> int:
        found = (getattr(one, name, None) for one in (vision, config) for name in names)
        value = next((n for n in found if n is not None), default)
        return int(value[0] if isinstance(value, (list, tuple)) else value)

    patch, channels = number("patch_size", default=14), number("num_channels", default=3)
    merge = number("spatial_merge_size", "merge_size", "merge_kernel_size", default=2)
    side, size = number("image_size", default=patch * merge * 4), channels * patch**2
    if "image_grid_thw" in takes:
        rows, columns = 2 * merge, 3 * merge
        for frames in (number("temporal_patch_size", default=1), 1, 2):
            grid = {"image_grid_thw": torch.tensor([[1, rows, columns]])}
            yield {"pixel_values": _noise(rows * columns, frames * size), **grid}
            yield {"pixel_values": _noise(rows * columns, channels, patch, patch), **grid}
    if "spatial_shapes" in takes:
        shapes = {"spatial_shapes": torch.tensor([[4, 6]])}
        seen = {"pixel_attention_mask": torch.ones(1, 24, dtype=torch.long)}
        yield {"pixel_values": _noise(1, 24, size), **shapes, **seen}
    if "image_position_ids" in takes or "pixel_position_ids" in takes:
        pool = number("pooling_kernel_size", default=2)
        y, x = torch.meshgrid(torch.arange(2 * pool), torch.arange(3 * pool), indexing="ij")
        places = {"image_position_ids": torch.stack([x.flatten(), y.flatten()], dim=-1)[None]}
        yield {"pixel_values": _noise(1, 6 * pool * pool, size).sigmoid(), **places}
    if "target_sizes" in takes:
        yield {
            "pixel_values": _noise(1, 3, patch, patch * 32),
            "target_sizes": torch.tensor([[4, 8]]),
        }
    if "image_sizes" in takes:
        if points := getattr(config, "image_grid_pinpoints", None):
            height, width = (int(n) for n in points[0])
            tiles = 1 + -(-height // side) * -(-width // side)
            sizes = {"image_sizes": torch.tensor([[height, width]])}
            yield {"pixel_values": _noise(1, tiles, 3, side, side), **sizes}
        height, width = 2 * merge * patch, 3 * merge * patch
        sizes = {"image_sizes": torch.tensor([[height, width]])}
        yield {"pixel_values": _noise(1, channels, height, width), **sizes}
    yield {"pixel_values": _noise(1, channels, side, side)}
    yield {"pixel_values": _noise(1, 1, channels, side, side)}


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _count(module: Any, pixels: Inputs) -> int:
    """How many image tokens the model makes of pixels, by its own ``get_image_features``."""
    owner = module if hasattr(module, "get_image_features") else module.base_model
    takes = inspect.signature(owner.get_image_features).parameters
    with torch.no_grad(), undisturbed(module):
        given = {n: x for n, x in pixels.items() if n in takes or "kwargs" in takes}
        out = owner.get_image_features(**given)
    out: Any = getattr(out, "pooler_output", out)
    parts = out if isinstance(out, (list, tuple)) else [out]
    return sum(part.reshape(-1, part.shape[-1]).shape[0] for part in parts)


def _around(module: Any, anatomy: Anatomy, count: int) -> dict[str, Tensor]:
    """Ids of words around image tokens, and what is made of them."""
    taken = {n for name, n in vars(module.config).items() if name.endswith(("_id", "_index"))}
    known = (n for n in range(5, anatomy.vocab) if n not in taken)
    words = [next(known) for _ in range(WORDS)]
    ids = torch.tensor([[*words[:2], *[anatomy.image_token_id] * count, *words[2:]]])
    types, inputs = types_of(module), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    marks = {types: (ids == anatomy.image_token_id).long()} if types else {}
    return inputs | marks
