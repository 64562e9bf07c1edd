"""Other tokens for a control: as many, taking as much attention, or another image's positions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sinkscope.errors import InterventionError, NoEffectError, TooFewTokensError
from sinkscope.interventions.values import REPLACEMENTS, AblateValues
from sinkscope.results import Result, kl_of_next

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from sinkscope.experiments.tracing import SinkTrace
    from sinkscope.models.lvlm import LVLM
    from sinkscope.models.runs import Run

FIELDS = ("tokens", "keys", "source")

"""Where an intervention says what it edits."""


def token_field(intervention: Any) -> str:
    """The field that holds the edited tokens.

    Raises:
        InterventionError: If there is none, or the tower is not the decoder.
    """
    if isinstance(intervention, nn.Module):
        raise InterventionError(
            f"Got a {type(intervention).__name__}, which finds its tokens itself; expected an "
            "intervention that names them. For random tokens under a gate write "
            "ss.LSG.for_model(lvlm, ..., v_detector=ss.detectors.RandomTokens(4))."
        )
    for field in FIELDS:
        if hasattr(intervention, field):
            if getattr(intervention, "tower", "language") != "language":
                raise InterventionError(
                    "Got an intervention of the vision tower; expected one of the decoder, whose "
                    "tokens a trace knows."
                )
            return field
    came = intervention if isinstance(intervention, type) else type(intervention)
    raise InterventionError(
        f"Got {came.__name__}; expected an intervention with one of the fields {FIELDS}."
    )


def tokens_of(intervention: Any, trace: SinkTrace) -> Tensor:
    """The tokens that an intervention edits, ``[batch pos]`` or ``[batch layer pos]``."""
    chosen = getattr(intervention, token_field(intervention))
    return trace.sample.tokens.select(chosen, trace.n_layers)


def layers_of(intervention: Any, trace: SinkTrace) -> list[int]:
    """The layers that an intervention edits; all if it names none.

    Raises:
        InterventionError: If one is no layer of the decoder.
    """
    given = getattr(intervention, "layers", None)
    if given is None:
        return list(range(trace.n_layers))
    several = isinstance(given, Iterable) and not isinstance(given, str)
    wanted: list[Any] = list(given) if several else [given]
    for layer in wanted:
        whole = isinstance(layer, Integral) and not isinstance(layer, bool)
        if not whole or not 0 <= int(layer) < trace.n_layers:
            raise InterventionError(
                f"Got layer {layer!r}; expected block indices from 0 to {trace.n_layers - 1}. "
                f"Layers are never negative: write {trace.n_layers - 1} for the last block."
            )
    return sorted({int(layer) for layer in wanted})


def receiving(
    intervention: Any, trace: SinkTrace, lvlm: LVLM | None = None
) -> Float[Tensor, "batch layer pos"]:
    """What every token receives in the layers and heads that an intervention edits.

    The mean over those heads, and over queries: for an intervention without ``queries`` those that
    can see the token (`SinkTrace.received`), else the chosen ones, of which those that cannot see it
    give 0. These are measured in one unedited pass. Only the edited layers are there, in order.

    Raises:
        InterventionError: If the intervention has queries and there is no model to ask.
    """
    layers, heads = layers_of(intervention, trace), getattr(intervention, "heads", None)
    queries = getattr(intervention, "queries", None)
    if queries is None:
        received = trace.received[:, layers].nan_to_num()
    elif lvlm is None:
        raise InterventionError(
            "Got an intervention with queries and no model; expected one, to measure what these "
            "queries give every token. Write control.draws(trace, lvlm=lvlm)."
        )
    else:
        from sinkscope.probes import AttentionPatterns

        probe = AttentionPatterns(queries, layers)
        result = lvlm.run(trace.sample, probes=[probe], logits="last")[probe]
        there = (result.rows >= 0)[:, None, None, :, None]
        given = torch.where(there, result.patterns.nan_to_num(), 0.0)
        received = given.sum(3) / there.sum(3).clamp(min=1)
    if heads is not None:
        chosen: list[Any] = list(heads) if isinstance(heads, Iterable) else [heads]
        received = received[:, :, chosen]
    return received.mean(dim=2)


def attention_on(
    tokens: Tensor, received: Float[Tensor, "batch layer pos"], layers: list[int]
) -> Float[Tensor, " batch"]:
    """Attention that tokens receive in the unedited run, in the edited layers and heads.

    The sum over tokens of what `receiving` says, averaged over layers. Without queries it is a mean
    over the queries that can see the token: these are fewer for later tokens, so the sum is no share
    and may exceed 1.

    Args:
        tokens: Bool ``[batch pos]`` or ``[batch layer pos]``; with layers, each counts its own.
        received: From `receiving`.
        layers: From `layers_of`.
    """
    mask = tokens[:, None] if tokens.ndim == 2 else tokens[:, layers]
    return (received * mask).sum(dim=2).mean(dim=1)


Draw = Callable[[Tensor, Tensor, str], Tensor]


def draw_by_kind(mask: Tensor, trace: SinkTrace, draw: Draw) -> Tensor:
    """Image tokens for the edited image tokens of every row, and text tokens for the text tokens.

    Drawn from tokens that are edited in no layer and sinks in no layer.

    Args:
        mask: Bool ``[batch pos]`` or ``[batch layer pos]``.
        trace: The trace.
        draw: ``draw(mask, pool, kind)`` of one kind.
    """
    flat = mask if mask.ndim == 2 else mask.any(dim=1)
    out = torch.zeros_like(mask)
    for kind, (all_of_kind, ordinary) in kinds(trace).items():
        if (flat & all_of_kind).any():
            these = all_of_kind if mask.ndim == 2 else all_of_kind[:, None]
            out |= draw(mask & these, ordinary & ~flat, kind)
    return out


def kinds(
    trace: SinkTrace,
) -> dict[str, tuple[Bool[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]]:
    """Image and text: all tokens of the kind, and those that are sinks at no layer."""
    tokens = trace.sample.tokens
    visual = tokens.image >= 0
    text = tokens.live & ~visual
    return {
        "image": (visual, trace.ordinary()),
        "text": (text, text & ~trace.text_sinks().any(dim=1)),
    }


def drawable(mask: Tensor, trace: SinkTrace) -> Bool[Tensor, " batch"]:
    """The rows with as many ordinary tokens of each kind as are edited, in every layer."""
    layers = mask if mask.ndim == 3 else mask[:, None]
    out = torch.ones(len(mask), dtype=torch.bool)
    for all_of_kind, ordinary in kinds(trace).values():
        pool = (ordinary & ~layers.any(dim=1)).sum(dim=1, keepdim=True)
        out &= ((layers & all_of_kind[:, None]).sum(dim=2) <= pool).all(dim=1)
    return out


def by_count(generator: torch.Generator) -> Draw:
    """As many random tokens as are edited, in every row and layer.

    The tokens of a layer with fewer are among those of a layer with more.
    """

    def draw(mask: Tensor, pool: Tensor, kind: str) -> Tensor:
        layers = mask if mask.ndim == 3 else mask[:, None]
        out = torch.zeros_like(layers)
        for b in range(layers.shape[0]):
            order = shuffled(pool[b], generator)
            for layer in range(layers.shape[1]):
                wanted = int(layers[b, layer].sum())
                if wanted > len(order):
                    raise TooFewTokensError(
                        f"Row {b} has {len(order)} ordinary {kind} tokens to draw from; expected at "
                        f"least {wanted}, as many as are edited. Edit fewer tokens or match by mass."
                    )
                out[b, layer, order[:wanted]] = True
        return out if mask.ndim == 3 else out[:, 0]

    return draw


def by_mass(
    received: Float[Tensor, "batch layer pos"], layers: list[int], generator: torch.Generator
) -> Draw:
    """Random tokens until they receive what the edited ones do, in every row.

    A selection by layer is matched in each edited layer, by the first tokens of one order per row; a
    layer in which nothing is selected gets none. Any other selection is matched by the mean over
    the edited layers.

    Args:
        received: From `receiving`.
        layers: From `layers_of`.
        generator: Of the draw.
    """

    def draw(mask: Tensor, pool: Tensor, kind: str) -> Tensor:
        out = torch.zeros_like(mask)
        for b in range(mask.shape[0]):
            order = shuffled(pool[b], generator)
            if mask.ndim == 2:
                out[b] = enough(mask[b], received[b].mean(0), order, f"Row {b}", kind)
                continue
            for at, layer in enumerate(layers):
                where = f"Row {b}, layer {layer},"
                out[b, layer] = enough(mask[b, layer], received[b, at], order, where, kind)
        return out

    return draw


def shuffled(pool: Bool[Tensor, " pos"], generator: torch.Generator) -> Tensor:
    """The positions of a pool in random order."""
    candidates = pool.nonzero().flatten()
    return candidates[torch.randperm(len(candidates), generator=generator)]


def enough(mask: Tensor, received: Tensor, order: Tensor, where: str, kind: str) -> Tensor:
    """The first tokens of an order that together receive what those of the mask do, ``[pos]``.

    Raises:
        TooFewTokensError: If all of them receive less.
    """
    out = torch.zeros_like(mask)
    if not mask.any():
        return out
    most, there = float(received[mask].sum()), float(received[order].sum())
    if there < most or not len(order):
        raise TooFewTokensError(
            f"{where} has {len(order)} ordinary {kind} tokens that receive {there:.3g} of attention "
            f"together; expected at least {most:.3g}, which the edited tokens receive. Write "
            "match='count', or edit fewer tokens."
        )
    so_far = received[order].cumsum(0) - received[order]
    chosen = so_far < most
    chosen[0] = True
    out[order[chosen]] = True
    return out


def other_positions(mask: Tensor, trace: SinkTrace, donor: SinkTrace) -> Tensor:
    """The sink positions of another image that are no sinks in this one.

    Of the kind that is edited in the row, image or text, and none in rows and layers where nothing
    is edited.

    Raises:
        InterventionError: If the donor is no trace, or its prompt has another shape.
        NoEffectError: If a row that is edited has no such position.
    """
    check_trace(donor, "a donor")
    if donor.v_sinks.shape != trace.v_sinks.shape:
        raise InterventionError(
            f"Got a donor with a prompt of shape {tuple(donor.v_sinks.shape)}; expected "
            f"{tuple(trace.v_sinks.shape)}. Use the same question on another image."
        )
    there = donor.v_sinks | donor.l_sinks().any(dim=1) | donor.text_sinks().any(dim=1)
    flat = mask if mask.ndim == 2 else mask.any(dim=1)
    out = torch.zeros_like(flat)
    for kind, (all_of_kind, ordinary) in kinds(trace).items():
        edited = (flat & all_of_kind).any(dim=1)
        free = there & ordinary & ~flat & edited[:, None]
        without = (edited & ~free.any(dim=1)).nonzero().flatten().tolist()
        if without:
            raise NoEffectError(
                f"The other image's {kind} sinks lie where this one has sinks too in the rows "
                f"{without}, or there are none; expected other positions. Choose another donor."
            )
        out |= free
    return out if mask.ndim == 2 else out[:, None] & mask.any(dim=2, keepdim=True)


def check_trace(trace: Any, what: str = "a sample to edit") -> None:
    """Refuse what is no trace.

    Raises:
        InterventionError: If so.
    """
    if not hasattr(trace, "v_sinks"):
        raise InterventionError(
            f"Got {type(trace).__name__} as {what}; expected a trace. Write "
            "ss.trace_sinks(lvlm, sample)."
        )


MATCHES = ("count", "mass", "position")

NEXT_TOKEN_KL = "KL of the next token from the unedited run (nats)"


@dataclass(frozen=True, eq=False)
class ControlResult(Result):
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
        return kl_of_next(self.base.logits, run.logits)
