"""TokenKurtosis: how much of a token's energy sits in few channels. An example probe."""

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from sinkscope.probes import LayerProbe, Result
from sinkscope.sites import Tower


def kurtosis(states, state):
    """E[h^4] / E[h^2]^2 over channels: 3 for an isotropic state, D for a single spike."""
    square = states.float().pow(2)
    return square.pow(2).mean(-1) / square.mean(-1).pow(2)


@dataclass(frozen=True, eq=False)
class KurtosisResult(Result):
    kurtosis: Float[Tensor, "batch layer pos"]  # NaN at padding
    layers: tuple[int, ...]
    positions: Int[Tensor, "batch pos"]  # -1 at padding


@dataclass(frozen=True, eq=False)
class TokenKurtosis(LayerProbe, kernel=kurtosis, result=KurtosisResult):
    layers: Any = None
    tower: Tower = "language"
    site: str = "resid_post"
