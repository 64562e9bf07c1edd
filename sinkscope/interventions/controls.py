"""RandomControl: the same edit on other tokens, because any edit of so many tokens does something."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from sinkscope.errors import InterventionError
from sinkscope.interventions.drawing import (
    attention_on,
    by_count,
    by_mass,
    check_trace,
    draw_by_kind,
    layers_of,
    other_positions,
    receiving,
    token_field,
    tokens_of,
)
from sinkscope.interventions.values import REPLACEMENTS, AblateValues
from sinkscope.probes.results import Unsaved

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from sinkscope.experiments.trace import SinkTrace
    from sinkscope.models.lvlm import LVLM
    from sinkscope.models.outputs import Run

MATCHES = ("count", "mass", "position")
NEXT_TOKEN_KL = "KL of the next token from the unedited run (nats)"


@dataclass(frozen=True, eq=False)
class ControlResult(Unsaved):
    """A real edit beside the same edit on other tokens.

    Attributes:
        real: Float ``[batch]``, the score of the edit.
        controls: Float ``[draw batch]``, the scores of the controls.
        base: Float ``[batch]``, the score without any edit.
        match: What the controls share with the edit.
        score: What the scores are, with their unit.
        real_mass: Float ``[batch]``: the attention that the edited tokens receive in the unedited run,
            in the edited layers and heads, summed over tokens and averaged over layers; see
            `RandomControl`.
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

    Per row, image tokens are drawn for image tokens and text tokens for text tokens.

    Args:
        intervention: Any intervention that edits ``tokens``, ``keys`` or a ``source``.
        match: ``"count"``: as many tokens in every row and layer. ``"mass"``: random tokens until
            they receive at least as much attention in the edited layers and heads (all layers, for
            an intervention that names none); a selection by layer is matched in each of its layers.
            What a token receives is the mean over the queries that can see it; for an intervention
            with ``queries``, the mean over these, measured in one more pass. ``"position"``: the sink
            positions of other images, which are as many as they are.
        n: How many draws; ``"position"`` has nothing to draw and gives one per donor.
        seed: Of the draws.
    """

    intervention: Any
    match: str = "count"
    n: int = 20
    seed: int = 0

    def draws(
        self,
        trace: SinkTrace,
        donor: SinkTrace | Sequence[SinkTrace] | None = None,
        *,
        lvlm: LVLM | None = None,
    ) -> tuple[Any, ...]:
        """The control interventions.

        Args:
            trace: The trace of the sample that is edited.
            donor: For ``match="position"``, the trace of another image, or several, one per draw.
                With one the p value of `ControlResult` cannot be below 0.5, with ``k`` not below
                ``1 / (1 + k)``.
            lvlm: The model, to measure what ``queries`` give; only ``match="mass"`` of an
                intervention that has some needs it.

        Returns:
            ``n`` interventions like the given one on other tokens, or one per donor.

        Raises:
            InterventionError: If the match, the number or the seed is none, or the intervention
                names no tokens; its child TooFewTokensError if too few ordinary tokens are left, or
                all of them together receive less attention.
            NoEffectError: If a donor leaves a row that is edited without a position.
        """
        self._check(trace)
        field = token_field(self.intervention)
        mask = tokens_of(self.intervention, trace)
        if self.match == "position":
            masks = [other_positions(mask, trace, one) for one in several(donor)]
        else:
            generator = torch.Generator().manual_seed(self.seed)
            if self.match == "count":
                draw = by_count(generator)
            else:
                received = receiving(self.intervention, trace, lvlm)
                draw = by_mass(received, layers_of(self.intervention, trace), generator)
            masks = [draw_by_kind(mask, trace, draw) for _ in range(self.n)]
        return tuple(self._like(field, mask, trace) for mask in masks)

    def run(
        self,
        lvlm: LVLM,
        trace: SinkTrace,
        score: Callable[[Run], Tensor] | None = None,
        *,
        donor: SinkTrace | Sequence[SinkTrace] | None = None,
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

        Raises:
            InterventionError: See `draws`; or the score is no tensor with one number per row.
        """
        drawn = self.draws(trace, donor, lvlm=lvlm)
        sample = trace.sample
        plain = lvlm.run(sample, logits="last")
        measure = KLFrom(plain) if score is None else score
        base = scored(measure, plain)
        edits = (self.intervention, *drawn)
        runs = [lvlm.run(sample, interventions=[it], logits="last") for it in edits]
        real, *controls = [scored(measure, run) for run in runs]
        name = NEXT_TOKEN_KL if score is None else getattr(score, "__name__", "score")
        given = receiving(self.intervention, trace, lvlm), layers_of(self.intervention, trace)
        taken = [attention_on(tokens_of(it, trace), *given) for it in edits]
        return ControlResult(
            real, torch.stack(controls), base, self.match, name, taken[0], torch.stack(taken[1:])
        )

    def _check(self, trace: SinkTrace) -> None:
        """Refuse what cannot be drawn from.

        Raises:
            InterventionError: If the match, the number, the seed or the trace is none.
        """
        if self.match not in MATCHES:
            raise InterventionError(f"Got match={self.match!r}; expected one of {MATCHES}.")
        if isinstance(self.n, bool) or not isinstance(self.n, int) or self.n < 1:
            raise InterventionError(f"Got n={self.n!r}; expected at least 1 draw.")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise InterventionError(f"Got seed={self.seed!r}; expected an int.")
        check_trace(trace)

    def _like(self, field: str, mask: Tensor, trace: SinkTrace) -> Any:
        """The intervention on other tokens; a target gives up what the new source takes."""
        changes: dict[str, Any] = {field: mask, "allow_noop": True}
        if hasattr(self.intervention, "target"):
            target = trace.sample.tokens.select(self.intervention.target, trace.n_layers)
            layers = max(target.ndim, mask.ndim) == 3
            left, right = (x[:, None] if layers and x.ndim == 2 else x for x in (target, mask))
            changes["target"] = left & ~right
        return replace(self.intervention, **changes)


def several(donor: Any) -> list[Any]:
    """The donors as a list.

    Raises:
        InterventionError: If there is none.
    """
    donors = list(donor) if isinstance(donor, (list, tuple)) else [donor]
    if not donors or donors == [None]:
        raise InterventionError(
            "Got match='position' without a donor; expected the trace of another image, or several. "
            "Write control.run(lvlm, trace, donor=other_trace)."
        )
    return donors


def scored(score: Callable[[Run], Tensor], run: Run) -> Float[Tensor, " batch"]:
    """The score of a run, one number per row.

    Raises:
        InterventionError: If it is something else.
    """
    out: Any = score(run)
    rows = run.logits.shape[0]
    if not isinstance(out, Tensor) or tuple(out.shape) != (rows,):
        came = f"of shape {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
        raise InterventionError(
            f"Got a score that returns {'a tensor ' if isinstance(out, Tensor) else ''}{came}; "
            f"expected a tensor [batch], here of shape ({rows},). Write lambda run: "
            "run.logits[:, -1, token]."
        )
    return out


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
    donor: SinkTrace | Sequence[SinkTrace] | None = None,
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
