"""RandomControl: the same edit on other tokens, as many, as much attended, or of another image."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor, nn

from sinkscope.checks import check_choice, check_whole, is_whole, typed
from sinkscope.errors import InterventionError, NoEffectError
from sinkscope.experiments.sink_edits import by_layer, check_trace, other_positions, random_like
from sinkscope.experiments.tracing import SinkTrace
from sinkscope.interventions import LiveRule
from sinkscope.interventions.values import REPLACEMENTS, AblateValues
from sinkscope.models import LVLM, Run
from sinkscope.probes import AttentionPatterns
from sinkscope.results import Result, kl_of_next
from sinkscope.viz.effects import plot_control

FIELDS = ("tokens", "keys", "source")  # where an intervention says what it edits
Donor = SinkTrace | Sequence[SinkTrace] | None
Score = Callable[[Run], Tensor] | None


def edited(it: Any, trace: SinkTrace) -> tuple[str, Tensor]:
    """The field with the edited tokens of the decoder, and these, ``[batch pos]`` or by layer."""
    if isinstance(it, nn.Module):
        raise InterventionError(
            f"Got a {type(it).__name__}, which finds its tokens itself; expected an intervention that "
            "names them. For random tokens under a gate write ss.LSG.for_model(lvlm, ..., "
            "v_detector=ss.detectors.RandomTokens(4))."
        )
    field = next((field for field in FIELDS if hasattr(it, field)), None)
    if isinstance(getattr(it, field or "", None), LiveRule):
        raise InterventionError(
            f"Got a {type(it).__name__} with a LiveRule, which finds its tokens inside the pass; expected "
            "tokens that are known before, to draw as many others. Write rule='frozen', or a mask."
        )
    if field is None or getattr(it, "tower", "language") != "language":
        came = (it if isinstance(it, type) else type(it)).__name__
        wanted = f"an intervention of the decoder with one of the fields {FIELDS}"
        raise InterventionError(f"Got {came}; expected {wanted}.")
    return field, trace.sample.tokens.select(getattr(it, field), trace.n_layers)


def attention_under(it: Any, trace: SinkTrace, lvlm: LVLM | None) -> tuple[Tensor, list[int]]:
    """What every token receives in the edited layers, ``[batch layer pos]``, and these layers, ascending.

    It is the mean over the edited heads and the queries that can see the token, or over the intervention's
    own ``queries``, in one unedited pass; those that cannot see it give 0.
    """
    given, last = getattr(it, "layers", None), trace.n_layers - 1
    given = range(trace.n_layers) if given is None else given
    one = isinstance(given, str) or not isinstance(given, Iterable)
    wanted: list[Any] = [given] if one else [*given]
    for layer in wanted:
        if not is_whole(layer, 0, last):
            hint = f"Layers are never negative: write {last} for the last block."
            raise InterventionError(f"Got layer {layer!r}; expected 0 to {last}. {hint}")
    layers = sorted({int(layer) for layer in wanted})
    queries, heads = getattr(it, "queries", None), getattr(it, "heads", None)
    if queries is None:
        mean: Any = trace.language.by_key.mean
        received = mean[:, :, None] if heads is None else trace.received
        received = received[:, layers].nan_to_num()
    elif lvlm is None:
        raise InterventionError(
            "Got an intervention with queries and no model; expected one, to measure what these "
            "queries give every token. Write control.draws(trace, lvlm=lvlm)."
        )
    else:
        probe = AttentionPatterns(queries, layers)
        result = lvlm.run(trace.sample, probes=[probe], logits="last")[probe]
        there = (result.rows >= 0)[:, None, None, :, None]
        patterns = torch.where(there, result.patterns.nan_to_num(), 0.0)
        received = patterns.sum(3) / there.sum(3).clamp(min=1)
    if heads is not None:
        received = received[:, :, list(heads) if isinstance(heads, Iterable) else [heads]]
    return received.mean(dim=2), layers


@dataclass(frozen=True, eq=False)
class ControlResult(Result):
    """The ``score`` of an edit (``real``), of the same edit on other tokens, and without any (``base``).

    ``match`` is what the controls share with the edit. ``real_mass`` is the attention that the edited tokens
    receive in the unedited run, in the edited layers and heads, averaged over layers, and ``mass`` that of
    each control's tokens: a sum over tokens of means over the queries that see each, which may exceed 1.
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
        """Two-sided Monte Carlo p, ``(1 + #) / (1 + draws)``: # controls are as far from their mean."""
        centre = self.controls.mean(dim=0)
        far = (self.controls - centre).abs() >= (self.real - centre).abs()
        return (1 + far.sum(dim=0)) / (1 + self.controls.shape[0])

    def to_dataframe(self) -> pd.DataFrame:
        """One line per batch row: means over the controls, their 95 % interval, p, and masses if measured."""
        low, high = self.interval()
        columns = {"base": self.base, "real": self.real, "control": self.controls.mean(dim=0)}
        columns |= {"low": low, "high": high, "p": self.p_value()}
        if self.real_mass is not None and self.mass is not None:
            columns |= {"real_mass": self.real_mass, "control_mass": self.mass.mean(dim=0)}
        return pd.DataFrame({name: column.tolist() for name, column in columns.items()})

    def plot(self, row: int = 0) -> Figure:
        """The edit as a line over the histogram of its controls, for one row of the batch."""
        return plot_control(self, row)


@dataclass(frozen=True, eq=False)
class RandomControl:
    """The same edit on other tokens, image for image and text for text, that are sinks at no layer.

    Args:
        intervention: Any intervention that edits ``tokens``, ``keys`` or a ``source``; or a function of a
            trace that gives one, or none, such as an `EditSinks`.
        match: ``"count"``: as many tokens in every row and layer. ``"mass"``: random tokens until they
            receive at least as much attention in the edited layers and heads (a selection by layer: in each
            layer), as a mean over the queries that see them, or over the intervention's ``queries``.
            ``"position"``: the sink positions of other images, which are as many as they are.
        n: How many draws, by ``seed``; ``"position"`` gives one per donor instead.
    """

    intervention: Any
    match: str = "count"
    n: int = 20
    seed: int = 0

    @typed
    def draws(
        self, trace: SinkTrace, donor: Donor = None, *, lvlm: LVLM | None = None
    ) -> tuple[Any, ...]:
        """The control interventions: ``n`` on other tokens, or one per donor.

        ``donor`` is for ``match="position"``: the trace of another image, or several; with ``k`` the p value
        of `ControlResult` cannot be below ``1 / (1 + k)``. ``lvlm`` is for ``match="mass"``, to measure what
        ``queries`` give. InterventionError if the intervention names no tokens; its child TooFewTokensError
        if too few ordinary tokens are left, or they receive less together; NoEffectError if a donor leaves
        a row that is edited without a position.
        """
        check_choice(("count", "mass", "position"), error=InterventionError, match=self.match)
        check_whole(1, 10**5, error=InterventionError, n=self.n)
        if not is_whole(self.seed):
            raise InterventionError(f"Got seed={self.seed!r}; expected an int.")
        check_trace(trace, "a sample to edit")
        if (own := self._own(trace)) is not self:
            return own.draws(trace, donor, lvlm=lvlm)
        it, (_, mask) = self.intervention, edited(self.intervention, trace)
        if self.match == "position":
            donors: list[Any] = [*donor] if isinstance(donor, (list, tuple)) else [donor]
            if not donors or donors == [None]:
                raise InterventionError(
                    "Got match='position' without a donor; expected the trace of another image, or "
                    "several. Write control.run(lvlm, trace, donor=other_trace)."
                )
            return tuple(self._on(other_positions(mask, trace, one), trace) for one in donors)
        generator = torch.Generator().manual_seed(int(self.seed))
        given = attention_under(it, trace, lvlm) if self.match == "mass" else (None, [])
        masks = (random_like(mask, trace, generator, *given) for _ in range(self.n))
        return tuple(self._on(tokens, trace) for tokens in masks)

    @typed
    def run(
        self, lvlm: LVLM, trace: SinkTrace, score: Score = None, *, donor: Donor = None
    ) -> ControlResult:
        """Run the edit and its controls on the trace's sample; raises as `draws` does.

        ``score(run)`` gives one number per row; None is the KL divergence of the next token from the
        unedited run, in nats. ``donor`` is as for `draws`.
        """
        check_trace(trace, "a sample to edit")
        if (own := self._own(trace)) is not self:
            return own.run(lvlm, trace, score, donor=donor)
        edits = (self.intervention, *self.draws(trace, donor, lvlm=lvlm))
        plain, name = lvlm.run(trace.sample, logits="last"), getattr(score, "__name__", "score")
        name = "KL of the next token from the unedited run (nats)" if score is None else name
        base, scores, masses = scored(score, plain, plain), [], []
        received, layers = attention_under(self.intervention, trace, lvlm)
        for it in edits:
            run = lvlm.run(trace.sample, interventions=[it], logits="last")
            scores.append(scored(score, run, plain))
            mask = by_layer(edited(it, trace)[1]).expand(-1, trace.n_layers, -1)[:, layers]
            masses.append((received * mask).sum(dim=2).mean(dim=1))
        controls, mass = torch.stack(scores[1:]), torch.stack(masses[1:])
        return ControlResult(scores[0], controls, base, self.match, name, masses[0], mass)

    def made(self, trace: SinkTrace) -> Any:
        """The intervention for a trace, or None where the function that gives it finds nothing to edit."""
        it = self.intervention
        if isinstance(it, (type, nn.Module)) or not callable(it):
            return it
        found: Any = it(trace)
        found = [*found] if isinstance(found, (list, tuple)) else [found]
        if len(found) > 1:
            raise InterventionError(
                f"Got {len(found)} interventions for one trace; expected one, or none: the control of several "
                "has no tokens of its own. Write a RandomControl for each."
            )
        return found[0] if found else None

    def _own(self, trace: SinkTrace) -> RandomControl:
        """The control of the intervention for a trace; itself if that was given."""
        it = self.made(trace)
        if it is None:
            raise NoEffectError(
                f"Got {self.intervention!r}, which finds nothing to edit in this trace; expected some "
                "token. Choose another image, or ss.trace_dataset(..., control=...), which counts such."
            )
        return self if it is self.intervention else replace(self, intervention=it)

    def _on(self, tokens: Tensor, trace: SinkTrace) -> Any:
        """The intervention on other tokens; a target gives up what the new source takes."""
        changes: Any = {edited(self.intervention, trace)[0]: tokens, "allow_noop": True}
        if hasattr(self.intervention, "target"):
            target = trace.sample.tokens.select(self.intervention.target, trace.n_layers)
            if max(target.ndim, tokens.ndim) == 3:
                target, tokens = by_layer(target), by_layer(tokens)
            changes["target"] = target & ~tokens
        return replace(self.intervention, **changes)


def scored(score: Score, run: Run, plain: Run) -> Tensor:
    """The score of a run, one number per row; None is the next token's ``KL(plain || run)``, nats."""
    if score is None:
        return kl_of_next(plain.logits, run.logits)
    out, rows = score(run), run.logits.shape[0]
    if isinstance(out, Tensor) and tuple(out.shape) == (rows,):
        return out
    shape = f"a tensor of shape {tuple(out.shape)}" if isinstance(out, Tensor) else ""
    raise InterventionError(
        f"Got a score that returns {shape or type(out).__name__}; expected a tensor [batch], here of "
        f"shape ({rows},). Write lambda run: run.logits[:, -1, token]."
    )


@typed
def replacement_table(
    lvlm: LVLM,
    trace: SinkTrace,
    tokens: Tensor,
    layers: Any = None,
    *,
    match: str = "count",
    n: int = 20,
    seed: int = 0,
    score: Score = None,
    donor: Donor = None,
) -> pd.DataFrame:
    """Zero, mean and resampled values of the same tokens side by side, each beside random tokens.

    A sink whose values are next to nothing survives zeroing and not the others, so no single
    replacement tells whether it matters (2604.14433). ``tokens`` is bool ``[batch pos]`` or ``[batch
    layer pos]``, ``layers`` are block indices or None for all; for the rest see `RandomControl` and its
    `run`. Three lines per batch row: replacement, batch, and the columns of `ControlResult`.
    """
    tables = {}
    for how in REPLACEMENTS:
        control = RandomControl(AblateValues(tokens, how, layers, seed=seed), match, n, seed)
        tables[how] = control.run(lvlm, trace, score, donor=donor).to_dataframe()
    return pd.concat(tables, names=["replacement", "batch"]).reset_index()
