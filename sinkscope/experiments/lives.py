"""What `trace_generation` returns: the attention of every step, and one record per sink of prompt and answer."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sinkscope.models.prepare import Sample
from sinkscope.probes.results import Unsaved

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

Words = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class SinkLife:
    """One sink while the model speaks.

    Attributes:
        kind: ``"V"``, ``"L"`` or ``"text"`` in the prompt, ``"generated"`` in the answer.
        batch: Row of the batch.
        pos: Position in prompt and answer, counted with the padding.
        word: The token's text.
        born_step: 0 in the prompt; in the answer the step whose pass computed the token's state.
        last_step: The last step at which it draws, None if it never does.
        seen_until: The last step at which a later query sees it in some layer, None if there is none.
        drawn_steps: At how many steps it draws.
        seen_steps: At how many steps a later query sees it.
        layers: LLM layers on whose input it meets the L rule.
        max_mass: The largest share that a head of a later query gives it, 0 to 1; NaN if none sees it.
        at: The step and the layer of that share, None if none sees it.
        null: What uniform attention gives it there.
    """

    kind: str
    batch: int
    pos: int
    word: str | None
    born_step: int
    last_step: int | None
    seen_until: int | None
    drawn_steps: int
    seen_steps: int
    layers: tuple[int, ...]
    max_mass: float
    at: tuple[int, int] | None
    null: float

    @property
    def fate(self) -> str:
        """``"alive"`` at the end, ``"dead"`` before, ``"draws nothing"`` or ``"not read"`` by any later query."""
        if self.seen_until is None:
            return "not read"
        if self.last_step is None:
            return "draws nothing"
        return "alive" if self.last_step == self.seen_until else "dead"

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON-ready values."""
        return {**asdict(self), "fate": self.fate}


@dataclass(frozen=True, eq=False)
class GenerationTrace(Unsaved):
    """Sinks while the model speaks.

    Step 0 is the pass over the prompt, whose query is the prompt's last token; the query of step s is the
    token that step s - 1 wrote. Keys are the tokens of prompt and answer up to the last that was read.

    Attributes:
        sample: The prompt.
        sequences: Int ``[batch pos]``: prompt and answer.
        text: The answers, or None without a tokenizer.
        words: The text of every token of prompt and answer, or None likewise.
        layers: The LLM layers.
        mass_max: Float ``[batch step layer key]`` in [0, 1]: the share that the head which gives the most gives
            to every key. NaN where the query does not see the key, at padding and after the answer's end.
        mass_mean: The same, mean over heads.
        null: Float ``[batch step layer]``: what uniform attention gives to each key that the query sees.
        flags: Bool ``[batch layer key]``: the L rule on what each layer reads, at the token's own step.
        lives: One `SinkLife` per sink.
        draws: How much more than ``null`` a head must give for a token to draw.
        detector: The L rule.
        chosen: How it came about.
    """

    sample: Sample
    sequences: Int[Tensor, "batch pos"]
    text: tuple[str, ...] | None
    words: Words | None
    layers: tuple[int, ...]
    mass_max: Float[Tensor, "batch step layer key"]
    mass_mean: Float[Tensor, "batch step layer key"]
    null: Float[Tensor, "batch step layer"]
    flags: Bool[Tensor, "batch layer key"]
    lives: tuple[SinkLife, ...]
    draws: float
    detector: str
    chosen: str

    @property
    def n_steps(self) -> int:
        """Forward passes, which is how many tokens were generated."""
        return self.mass_max.shape[1]

    def by_step(self) -> Float[Tensor, "batch step key"]:
        """The largest share that a head of any layer gives to every key, without what a token gives to itself."""
        return nan_max(by_others(self.mass_max, self.sample.tokens.ids.shape[1]), dim=2)

    def to_dataframe(self) -> pd.DataFrame:
        """One line per sink: every field of its record, and its fate."""
        import pandas as pd

        names = [*SinkLife.__dataclass_fields__, "fate"]
        return pd.DataFrame([life.to_dict() for life in self.lives], columns=names)

    def summary(self) -> str:
        """The sinks and their fates in a few lines, for a terminal."""
        from sinkscope.viz.generation import generation_text

        return generation_text(self)

    def plot(self, row: int = 0) -> Figure:
        """What the sinks draw at every step, with births and deaths, beside the most attended other tokens.

        Args:
            row: The row of the batch.

        Returns:
            A matplotlib figure.

        Raises:
            SelectionError: If there is no such row.
        """
        from sinkscope.viz.generation import plot_generation

        return plot_generation(self, row)

    def __repr__(self) -> str:
        fates = [life.fate for life in self.lives]
        said = ", ".join(f"{fates.count(fate)} {fate}" for fate in dict.fromkeys(fates)) or "none"
        return f"GenerationTrace({self.n_steps} steps; sinks: {said}; rule {self.chosen})"


def by_others(mass: Tensor, prompt: int) -> Tensor:
    """Attention ``[batch step layer key]`` with NaN where the key is the query's own.

    Args:
        mass: The attention.
        prompt: Length of the prompt.
    """
    steps, keys = torch.arange(mass.shape[1]), torch.arange(mass.shape[3])
    own = keys == prompt - 1 + steps[:, None]
    return mass.masked_fill(own[:, None], float("nan"))


def nan_max(values: Tensor, dim: int) -> Tensor:
    """The largest value that is not NaN; NaN where there is none. Values are at least -1."""
    out = values.nan_to_num(-2.0).amax(dim=dim)
    return out.masked_fill(out < -1, float("nan"))


def collect_lives(
    sample: Sample,
    words: Words | None,
    flags: Tensor,
    v_sinks: Tensor,
    mass_max: Tensor,
    null: Tensor,
    draws: float,
) -> tuple[SinkLife, ...]:
    """One record per token that meets the L rule in some layer or is a V-sink, in batch and position order.

    Args:
        sample: The prompt.
        words: The text of every token, or None.
        flags: Bool ``[batch layer key]``.
        v_sinks: Bool ``[batch pos]`` of the prompt.
        mass_max: Float ``[batch step layer key]``.
        null: Float ``[batch step layer]``.
        draws: How much more than the null a head must give.
    """
    prompt = sample.tokens.ids.shape[1]
    shares = by_others(mass_max, prompt)
    over = nan_max(shares - null[..., None], dim=2)  # [batch step key]
    found = flags.any(dim=1)
    found[:, :prompt] |= v_sinks
    return tuple(
        SinkLife(
            kind=_kind(sample, v_sinks, batch, pos),
            batch=batch,
            pos=pos,
            word=words[batch][pos] if words else None,
            born_step=max(0, pos - prompt + 1),
            layers=tuple(flags[batch, :, pos].nonzero().flatten().tolist()),
            **_life(over[batch, :, pos], draws),
            **_most(shares[batch, :, :, pos], null[batch]),
        )
        for batch, pos in found.nonzero().tolist()
    )


def _kind(sample: Sample, v_sinks: Tensor, batch: int, pos: int) -> str:
    if pos >= v_sinks.shape[1]:
        return "generated"
    if bool(v_sinks[batch, pos]):
        return "V"
    return "L" if int(sample.tokens.image[batch, pos]) >= 0 else "text"


def _life(over: Tensor, draws: float) -> dict[str, Any]:
    """When a token draws and is seen, from what it gets over its null at every step, NaN where unseen."""
    drawn = (over >= draws).nonzero().flatten().tolist()
    seen = (~over.isnan()).nonzero().flatten().tolist()
    return {
        "last_step": drawn[-1] if drawn else None,
        "seen_until": seen[-1] if seen else None,
        "drawn_steps": len(drawn),
        "seen_steps": len(seen),
    }


def _most(shares: Tensor, null: Tensor) -> dict[str, Any]:
    """The largest share ``[step layer]``, where it is, and the null there."""
    if bool(shares.isnan().all()):
        return {"max_mass": float("nan"), "at": None, "null": float("nan")}
    step, layer = divmod(int(shares.nan_to_num(-1.0).argmax()), shares.shape[1])
    return {
        "max_mass": float(shares[step, layer]),
        "at": (step, layer),
        "null": float(null[step, layer]),
    }
