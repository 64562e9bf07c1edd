"""Which outputs read which inputs, by gradients: zero means that a value is not read."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

MANY = 4096  # outputs that are told apart one by one, where an input reaches several
BLOCKED = "no gradient passes from image tokens to ViT tokens"
MIXED = "every image token is made of all ViT tokens"


def destinations(outputs: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Which output, of ``[output d]``, every row of the inputs ``[... d]`` reaches: -1 none, -2 several."""
    count, weights = len(outputs), weights_of(outputs)
    number = torch.arange(count, device=outputs.device)
    found = [torch.zeros(x.shape[:-1], dtype=torch.long, device=x.device) for x in inputs]
    several = [torch.zeros_like(one, dtype=torch.bool) for one in found]
    live = [~one for one in several]
    for bit in range(max(1, (count - 1).bit_length())):
        on = (number >> bit) & 1
        hits = (reached(outputs, weights * (on == side)[:, None], inputs) for side in (0, 1))
        for i, (zero, one) in enumerate(zip(*hits, strict=True)):
            several[i] |= zero & one
            live[i] &= zero | one
            found[i] += one.long() << bit
    return [
        at.masked_fill(~some, -1).masked_fill(many, -2)
        for at, some, many in zip(found, live, several, strict=True)
    ]


def weights_of(outputs: Tensor) -> Tensor:
    """Random numbers by channel, so that no gradient cancels."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(outputs.shape[-1], generator=generator).to(outputs).expand_as(outputs)


def reached(outputs: Tensor, weights: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The rows of every input that have a gradient, bool."""
    grads = torch.autograd.grad(
        outputs, list(inputs), weights, retain_graph=True, allow_unused=True
    )
    nothing = (torch.zeros(x.shape[:-1], dtype=torch.bool, device=x.device) for x in inputs)
    pairs = zip(grads, nothing, strict=True)
    return [none if grad is None else (grad != 0).any(dim=-1) for grad, none in pairs]


def sources_of(states: Tensor, leaves: Sequence[Tensor]) -> tuple[Tensor, str]:
    """The ViT tokens of every image token, int ``[image token, source]``; and why there are none."""
    count = len(states)
    if not states.requires_grad:
        return torch.full((count, 1), -1), BLOCKED
    at = torch.stack([one.flatten() for one in destinations(states, leaves)]).cpu()
    if (at == -1).all():
        return torch.full((count, 1), -1), BLOCKED
    if (at == -2).any():
        if count > MANY:
            return torch.full((count, 1), -1), f"ViT tokens feed several of {count} image tokens"
        weights = weights_of(states)
        lines = []
        for one in range(count):
            hits = reached(states[one : one + 1], weights[one : one + 1], leaves)
            lines.append(torch.stack([hit.flatten() for hit in hits]).any(dim=0).cpu())
        reads = torch.stack(lines)
        groups, sizes = reads.unique(dim=0, return_counts=True)
        apart = int(groups.sum(dim=0).max()) == 1  # one for each image, resampled as a whole
        if apart and bool((sizes > 1).all()) and bool((groups.sum(dim=1) > 1).all()):
            return torch.full((count, 1), -1), MIXED
    else:
        reads = torch.zeros(count, at.shape[1], dtype=torch.bool)
        token = torch.arange(at.shape[1]).expand_as(at)
        reads[at[at >= 0], token[at >= 0]] = True
    few = [line.nonzero().flatten() for line in reads]
    return nn.utils.rnn.pad_sequence(few, batch_first=True, padding_value=-1), ""


def note_boxes(token: Tensor, pixels: Tensor) -> None:
    """Note the smallest box of every ViT token, from the token of every pixel ``[... y x]``."""
    token = token.reshape(-1, *token.shape[-2:])
    picture, y, x = (token >= 0).nonzero(as_tuple=True)
    at = token[picture, y, x]
    for column, value, how in ((0, picture, "amin"), (1, y, "amin"), (2, x, "amin")):
        pixels[:, column] = _reduced(pixels[:, column], at, value, how)
    for column, value in ((3, y + 1), (4, x + 1)):
        pixels[:, column] = _reduced(pixels[:, column], at, value, "amax")


def _reduced(start: Tensor, at: Tensor, value: Tensor, how: str) -> Tensor:
    """The least or largest value of every token, and what stood there for the others."""
    out = start.scatter_reduce(0, at, value, how, include_self=False)
    seen = torch.zeros_like(start, dtype=torch.bool).index_fill(0, at, value=True)
    return torch.where(seen, out, start)


def with_versions(value: Any) -> Any:
    """A tensor that a graph may keep: those made in inference mode are copied."""
    return value.clone() if torch.is_tensor(value) and value.is_inference() else value


def states_in(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """The states that a block was given."""
    return next(x for x in (*args, *kwargs.values()) if torch.is_tensor(x))


def has_graph(value: Any) -> bool:
    """Whether a value is a tensor with a graph."""
    return torch.is_tensor(value) and value.requires_grad
