"""RandomControl: the same edit on other tokens, because any edit of so many tokens does something."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from sinkscope.errors import InterventionError, NoEffectError
from sinkscope.interventions.values import REPLACEMENTS, AblateValues

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from sinkscope.experiments.trace import SinkTrace
    from sinkscope.models.lvlm import LVLM
    from sinkscope.models.outputs import Run

MATCHES = ("count", "mass", "position")
FIELDS = ("tokens", "keys", "source")
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
    """

    real: Float[Tensor, " batch"]
    controls: Float[Tensor, "draw batch"]
    base: Float[Tensor, " batch"]
    match: str
    score: str = "score"

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
        """One line per batch row: base, real, mean and 95 % interval of the controls, p."""
        import pandas as pd

        low, high = self.interval()
        return pd.DataFrame(
            {
                "base": self.base.tolist(),
                "real": self.real.tolist(),
                "control": self.controls.mean(dim=0).tolist(),
                "low": low.tolist(),
                "high": high.tolist(),
                "p": self.p_value().tolist(),
            }
        )

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
            they receive as much attention in the edited layers; ``"position"``: the sink positions
            of another image.
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
            InterventionError: If the match is unknown, the intervention has no token field, or too
                few ordinary tokens are left.
        """
        if self.match not in MATCHES:
            raise InterventionError(f"Got match={self.match!r}; expected one of {MATCHES}.")
        if isinstance(self.n, bool) or not isinstance(self.n, int) or self.n < 1:
            raise InterventionError(f"Got n={self.n!r}; expected at least 1 draw.")
        field = token_field(self.intervention)
        mask = trace.sample.tokens.select(getattr(self.intervention, field), trace.n_layers)
        if self.match == "position":
            return (self._like(field, other_positions(mask, trace, donor)),)
        generator = torch.Generator().manual_seed(self.seed)
        pool = ordinary_like(mask, trace)
        draw = draw_by_count if self.match == "count" else self._draw_by_mass
        return tuple(self._like(field, draw(mask, pool, generator, trace)) for _ in range(self.n))

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
        controls = [
            measure(lvlm.run(sample, interventions=[it], logits="last"))
            for it in self.draws(trace, donor)
        ]
        name = NEXT_TOKEN_KL if score is None else getattr(score, "__name__", "score")
        return ControlResult(real, torch.stack(controls), base, self.match, name)

    def _like(self, field: str, mask: Tensor) -> Any:
        """The intervention on other tokens; a target gives up what the new source takes."""
        changes: dict[str, Any] = {field: mask, "allow_noop": True}
        target = getattr(self.intervention, "target", None)
        if isinstance(target, Tensor):
            both = target & ~mask if target.ndim == mask.ndim else target[:, None] & ~mask
            changes["target"] = both
        return replace(self.intervention, **changes)

    def _draw_by_mass(
        self, mask: Tensor, pool: Tensor, generator: torch.Generator, trace: SinkTrace
    ) -> Tensor:
        """Random tokens until they receive what the edited ones do, on average over the layers."""
        layers = self.intervention.layers
        chosen = slice(None) if layers is None else list(layers)
        received = trace.received[:, chosen].nan_to_num().mean(dim=(1, 2))
        flat = mask if mask.ndim == 2 else mask.any(dim=1)
        out = torch.zeros_like(flat)
        for b in range(flat.shape[0]):
            wanted, taken = float(received[b][flat[b]].sum()), 0.0
            candidates = pool[b].nonzero().flatten()
            for i in torch.randperm(len(candidates), generator=generator).tolist():
                if taken >= wanted:
                    break
                out[b, candidates[i]] = True
                taken += float(received[b, candidates[i]])
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


def token_field(intervention: Any) -> str:
    """The field that holds the edited tokens.

    Raises:
        InterventionError: If there is none, or the tower is not the decoder.
    """
    for field in FIELDS:
        if hasattr(intervention, field):
            if getattr(intervention, "tower", "language") != "language":
                raise InterventionError(
                    "Got an intervention of the vision tower; expected one of the decoder, whose "
                    "tokens a trace knows."
                )
            return field
    raise InterventionError(
        f"Got {type(intervention).__name__}; expected an intervention with one of the fields "
        f"{FIELDS}."
    )


def ordinary_like(mask: Tensor, trace: SinkTrace) -> Tensor:
    """Tokens to draw from: of the edited tokens' kind (image or text), sinks at no layer, unedited."""
    tokens = trace.sample.tokens
    flat = mask if mask.ndim == 2 else mask.any(dim=1)
    visual = tokens.image >= 0
    text = tokens.live & ~visual & ~trace.text_sinks().any(dim=1)
    kind_visual = bool((flat & visual).any()) or not bool(flat.any())
    kind_text = bool((flat & ~visual).any())
    pool = torch.zeros_like(flat)
    if kind_visual:
        pool |= trace.ordinary()
    if kind_text:
        pool |= text
    return pool & ~flat


def draw_by_count(
    mask: Tensor, pool: Tensor, generator: torch.Generator, trace: SinkTrace
) -> Tensor:
    """As many random tokens as are edited, in every row and layer.

    Raises:
        InterventionError: If too few tokens are left.
    """
    layers = mask if mask.ndim == 3 else mask[:, None]
    out = torch.zeros_like(layers)
    for b in range(layers.shape[0]):
        candidates = pool[b].nonzero().flatten()
        order = candidates[torch.randperm(len(candidates), generator=generator)]
        for layer in range(layers.shape[1]):
            wanted = int(layers[b, layer].sum())
            if wanted > len(order):
                raise InterventionError(
                    f"Row {b} has {len(order)} ordinary tokens to draw from; expected at least "
                    f"{wanted}, as many as are edited. Edit fewer tokens or match by mass."
                )
            out[b, layer, order[:wanted]] = True
    return out if mask.ndim == 3 else out[:, 0]


def other_positions(mask: Tensor, trace: SinkTrace, donor: SinkTrace | None) -> Tensor:
    """The sink positions of another image that are no sinks in this one.

    Raises:
        InterventionError: If there is no donor, or its prompt has another shape.
        NoEffectError: If no position is left.
    """
    if donor is None:
        raise InterventionError(
            "Got match='position' without a donor; expected the trace of another image. Write "
            "control.run(lvlm, trace, donor=other_trace)."
        )
    if donor.v_sinks.shape != trace.v_sinks.shape:
        raise InterventionError(
            f"Got a donor with a prompt of shape {tuple(donor.v_sinks.shape)}; expected "
            f"{tuple(trace.v_sinks.shape)}. Use the same question on another image."
        )
    there = donor.v_sinks | donor.l_sinks().any(dim=1)
    out = there & trace.ordinary()
    if not out.any():
        raise NoEffectError(
            "The other image's sinks lie where this one has sinks too; expected other positions. "
            "Choose another donor."
        )
    return out
