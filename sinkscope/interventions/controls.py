"""RandomControl: the same edit on other tokens, because any edit of so many tokens does something."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from sinkscope.errors import InterventionError
from sinkscope.interventions.drawing import (
    attention_on,
    draw_by_count,
    draw_by_mass,
    ordinary_like,
    other_positions,
    receiving,
    token_field,
    tokens_of,
)
from sinkscope.interventions.values import REPLACEMENTS, AblateValues

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from sinkscope.experiments.trace import SinkTrace
    from sinkscope.models.lvlm import LVLM
    from sinkscope.models.outputs import Run

MATCHES = ("count", "mass", "position")
NEXT_TOKEN_KL = "KL of the next token from the unedited run (nats)"


@dataclass(frozen=True, eq=False)
class ControlResult:
    """A real edit beside the same edit on other tokens.

    Attributes:
        real: Float ``[batch]``, the score of the edit.
        controls: Float ``[draw batch]``, the scores of the controls.
        base: Float ``[batch]``, the score without any edit.
        match: What the controls share with the edit.
        score: What the scores are, with their unit.
        real_mass: Float ``[batch]``: the attention that the edited tokens receive in the unedited run,
            summed over them; see `attention_on`.
        mass: Float ``[draw batch]``: the same of each control's tokens.
    """

    real: Float[Tensor, " batch"]
    controls: Float[Tensor, "draw batch"]
    base: Float[Tensor, " batch"]
    match: str
    score: str = "score"
    real_mass: Float[Tensor, " batch"] | None = None
    mass: Float[Tensor, "draw batch"] | None = None

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """The central interval of the controls, per batch row."""
        tail = (1 - level) / 2
        low, high = torch.quantile(self.controls, torch.tensor([tail, 1 - tail]), dim=0)
        return low, high

    def p_value(self) -> Float[Tensor, " batch"]:
        """Two-sided Monte Carlo p: how often a control is as far from the controls' mean.

        ``(1 + #) / (1 + draws)``, so it is never 0.
        """
        centre = self.controls.mean(dim=0)
        far = (self.controls - centre).abs() >= (self.real - centre).abs()
        return (1 + far.sum(dim=0)) / (1 + self.controls.shape[0])

    def to_dataframe(self) -> pd.DataFrame:
        """One line per batch row: base, real, mean and 95 % interval of the controls, p.

        With masses also ``real_mass`` and ``control_mass``, the mean over the controls: how well they
        are matched.
        """
        import pandas as pd

        low, high = self.interval()
        columns = {
            "base": self.base,
            "real": self.real,
            "control": self.controls.mean(dim=0),
            "low": low,
            "high": high,
            "p": self.p_value(),
        }
        if self.real_mass is not None and self.mass is not None:
            columns |= {"real_mass": self.real_mass, "control_mass": self.mass.mean(dim=0)}
        return pd.DataFrame({name: column.tolist() for name, column in columns.items()})

    def plot(self, row: int = 0) -> Figure:
        """The edit as a line over the histogram of its controls.

        Args:
            row: The row of the batch.

        Returns:
            A matplotlib figure.
        """
        from sinkscope.viz.effects import plot_control

        return plot_control(self, row)


@dataclass(frozen=True, eq=False)
class RandomControl:
    """The same edit on other tokens, drawn from tokens that are sinks at no layer.

    Args:
        intervention: Any intervention that edits ``tokens``, ``keys`` or a ``source``.
        match: ``"count"``: as many tokens in every row (and layer); ``"mass"``: random tokens until
            they receive at least as much attention in the edited layers and heads (`attention_on`);
            ``"position"``: the sink positions of another image.
        n: How many draws (one for ``"position"``, which has nothing to draw).
        seed: Of the draws.
    """

    intervention: Any
    match: str = "count"
    n: int = 20
    seed: int = 0

    def draws(self, trace: SinkTrace, donor: SinkTrace | None = None) -> tuple[Any, ...]:
        """The control interventions.

        Args:
            trace: The trace of the sample that is edited.
            donor: The trace of another image, for ``match="position"``.

        Returns:
            ``n`` interventions like the given one on other tokens.

        Raises:
            InterventionError: If the match is unknown, the intervention has no token field, too few
                ordinary tokens are left, or all of them together receive less attention.
        """
        if self.match not in MATCHES:
            raise InterventionError(f"Got match={self.match!r}; expected one of {MATCHES}.")
        if isinstance(self.n, bool) or not isinstance(self.n, int) or self.n < 1:
            raise InterventionError(f"Got n={self.n!r}; expected at least 1 draw.")
        field = token_field(self.intervention)
        mask = tokens_of(self.intervention, trace)
        if self.match == "position":
            return (self._like(field, other_positions(mask, trace, donor), trace),)
        generator = torch.Generator().manual_seed(self.seed)
        pool = ordinary_like(mask, trace)
        if self.match == "count":
            masks = [draw_by_count(mask, pool, generator) for _ in range(self.n)]
        else:
            given = attention_on(self.intervention, trace), receiving(self.intervention, trace)
            masks = [draw_by_mass(*given, pool, generator) for _ in range(self.n)]
        return tuple(self._like(field, mask, trace) for mask in masks)

    def run(
        self,
        lvlm: LVLM,
        trace: SinkTrace,
        score: Callable[[Run], Tensor] | None = None,
        *,
        donor: SinkTrace | None = None,
    ) -> ControlResult:
        """Run the edit and its controls on the trace's sample.

        Args:
            lvlm: The model.
            trace: The trace of the sample to edit.
            score: ``score(run) -> [batch]``; None for the KL divergence of the next token from the
                unedited run, in nats.
            donor: See `draws`.

        Returns:
            The scores.
        """
        measure = KLFrom(lvlm.run(trace.sample, logits="last")) if score is None else score
        sample = trace.sample
        base = measure(lvlm.run(sample, logits="last"))
        real = measure(lvlm.run(sample, interventions=[self.intervention], logits="last"))
        drawn = self.draws(trace, donor)
        controls = [measure(lvlm.run(sample, interventions=[it], logits="last")) for it in drawn]
        name = NEXT_TOKEN_KL if score is None else getattr(score, "__name__", "score")
        taken = [attention_on(it, trace) for it in (self.intervention, *drawn)]
        return ControlResult(
            real, torch.stack(controls), base, self.match, name, taken[0], torch.stack(taken[1:])
        )

    def _like(self, field: str, mask: Tensor, trace: SinkTrace) -> Any:
        """The intervention on other tokens; a target gives up what the new source takes."""
        changes: dict[str, Any] = {field: mask, "allow_noop": True}
        if hasattr(self.intervention, "target"):
            target = trace.sample.tokens.select(self.intervention.target, trace.n_layers)
            layers = max(target.ndim, mask.ndim) == 3
            left, right = (x[:, None] if layers and x.ndim == 2 else x for x in (target, mask))
            changes["target"] = left & ~right
        return replace(self.intervention, **changes)


def replacement_table(
    lvlm: LVLM,
    trace: SinkTrace,
    tokens: Tensor,
    layers: Any = None,
    *,
    match: str = "count",
    n: int = 20,
    seed: int = 0,
    score: Callable[[Run], Tensor] | None = None,
    donor: SinkTrace | None = None,
) -> pd.DataFrame:
    """Zero, mean and resampled values of the same tokens side by side, each beside random tokens.

    A sink whose values are next to nothing survives zeroing and not the others, so no single
    replacement tells whether it matters (2604.14433).

    Args:
        lvlm: The model.
        trace: The trace of the sample to edit.
        tokens: Bool ``[batch pos]`` or ``[batch layer pos]``.
        layers: Block indices, or None for all.
        match: See `RandomControl`, as are those that say no more.
        n: See there.
        seed: Of the draws and of resampling.
        score: See `RandomControl.run`.
        donor: See `RandomControl.draws`.

    Returns:
        Three lines per batch row: replacement, batch, and the columns of
        `ControlResult.to_dataframe`.
    """
    import pandas as pd

    tables = []
    for how in REPLACEMENTS:
        edit = AblateValues(tokens, how, layers, seed=seed)
        result = RandomControl(edit, match, n, seed).run(lvlm, trace, score, donor=donor)
        table = result.to_dataframe()
        table.insert(0, "batch", range(len(table)))
        table.insert(0, "replacement", how)
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


@dataclass(frozen=True)
class KLFrom:
    """``KL(base || run)`` of the next token, in nats."""

    base: Any

    def __call__(self, run: Run) -> Tensor:
        """The divergence of every row."""
        p = self.base.logits[:, -1].float().log_softmax(-1)
        q = run.logits[:, -1].float().log_softmax(-1)
        return (p.exp() * (p - q)).sum(-1)
