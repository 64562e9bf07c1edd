"""The logit lens: what the LM head reads from intermediate states."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jaxtyping import Float, Int
from torch import Tensor

from sinkscope.errors import ProbeError
from sinkscope.kernels import residual as kernels
from sinkscope.models.context import Context, indices_of
from sinkscope.probes.protocol import Read
from sinkscope.probes.residual import check_count, check_site
from sinkscope.probes.results import Unsaved, mask_padding, stack_layers, tidy
from sinkscope.sites import Site, Tower
from sinkscope.tokens import Selection

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class LensResult(Unsaved):
    """What the LM head reads from intermediate states.

    Attributes:
        tokens: Int ``[batch layer row k]`` token ids, most likely first; -1 padded.
        logprobs: Float ``[batch layer row k]``, in nats.
        entropy: Float ``[batch layer row]``, in nats.
        positions: Int ``[batch row]``, -1 padded.
        layers: The block indices, in order.
    """

    tokens: Int[Tensor, "batch layer row k"]
    logprobs: Float[Tensor, "batch layer row k"]
    entropy: Float[Tensor, "batch layer row"]
    positions: Int[Tensor, "batch row"]
    layers: tuple[int, ...]

    def to_dataframe(self) -> pd.DataFrame:
        """Columns batch, layer, row (the position), rank, token, logprob."""
        axes = ("batch", "layer", "row", "rank")
        names = {"layer": self.layers, "row": self.positions}
        return tidy({"token": self.tokens, "logprob": self.logprobs}, axes, names)


@dataclass(frozen=True, eq=False)
class LogitLens:
    """The model's final norm and LM head applied to intermediate states of the decoder.

    nostalgebraist (2020). For visual tokens the lens shows what a sink would say.

    Args:
        positions: A selection of positions.
        layers: Block indices, or None for all.
        k: How many tokens to keep.
        site: See `MassiveActivations`.
    """

    positions: Selection = "last"
    layers: Any = None
    k: int = 5
    site: str = "resid_post"
    tower: Tower = "language"

    def reads(self, context: Context) -> list[Read]:
        """One read per layer."""
        if self.tower != "language":
            raise ProbeError(
                f"Got LogitLens(tower={self.tower!r}); expected 'language'. The vision tower has no "
                "LM head: follow its tokens through the projector with ss.trace_sinks."
            )
        rows = indices_of(context.flat("language", self.positions))
        parameters = {
            "norm": ("@module", context.anatomy.final_norm),
            "head": ("@module", context.anatomy.head),
            "positions": None if context.step else rows,
            "k": check_count(self.k, context.anatomy.vocab, "tokens"),
        }
        site = check_site(self.site)
        return [
            Read(Site("language", site, layer), kernels.lens, parameters)
            for layer in context.layers("language", self.layers)
        ]

    def finish(self, answers: Mapping[Site, Any], context: Context) -> LensResult:
        """Stack the layers."""
        rows = context.positions("language", self.positions)
        there = rows >= 0
        return LensResult(
            mask_padding(stack_layers(answers, "tokens"), there, 2),
            mask_padding(stack_layers(answers, "logprobs"), there, 2),
            mask_padding(stack_layers(answers, "entropy"), there, 2),
            rows,
            context.layers("language", self.layers),
        )
