"""TokenKurtosis: how much of a token's energy sits in few channels. An example probe."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

import sinkscope as ss
from sinkscope.probes import Read
from sinkscope.results import mask_padding, stack_layers, tidy


def kurtosis(states, state):
    """E[h^4] / E[h^2]^2 over channels: 3 for an isotropic state, D for a single spike."""
    square = states.float().pow(2)
    return square.pow(2).mean(-1) / square.mean(-1).pow(2)


@dataclass(frozen=True, eq=False)
class KurtosisResult:
    values: Tensor  # [batch layer pos], NaN at padding
    layers: tuple[int, ...]
    positions: Tensor  # [batch pos], -1 at padding

    def to_dataframe(self):
        names = {"layer": self.layers, "pos": self.positions}
        return tidy({"kurtosis": self.values}, ("batch", "layer", "pos"), names)


@dataclass(frozen=True, eq=False)
class TokenKurtosis:
    layers: Any = None
    tower: str = "language"

    def reads(self, context):
        layers = context.layers(self.tower, self.layers)
        return [Read(ss.Site(self.tower, "resid_post", layer), kurtosis) for layer in layers]

    def finish(self, answers, context):
        values = mask_padding(stack_layers(answers), context.live(self.tower), 2)
        layers = context.layers(self.tower, self.layers)
        return KurtosisResult(values, layers, context.positions(self.tower))
