"""NOP and broadcast heads, and edits of their sinks' values (Fesser et al. 2606.08105)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sinkscope import probes
from sinkscope.checks import check_choice, check_whole, typed
from sinkscope.errors import InterventionError
from sinkscope.experiments import nop_or_broadcast
from sinkscope.interventions import AblateValues, MaskKeys
from sinkscope.models import LVLM, Sample
from sinkscope.protocols import Intervention
from sinkscope.results import Result
from sinkscope.sites import Tower

EDITS = ("zero", "mean", "donor sink", "donor other", "redirect", "control")
SHOWN = ("sink", "mass", "routed", "event", "ratio_head", "ratio_out", "stable_rank")


@dataclass(frozen=True, eq=False)
class NopBroadcast(Result, columns={name: name for name in SHOWN}):
    """What the sink of every head takes and writes, per row of the batch or image.

    ``sink`` is the key ``s`` that takes most attention. Over the live queries that see it, ``mass`` is the
    mean of ``A_is`` and ``routed`` the share with ``A_is >= 0.5``; ``event``: ``routed >= 0.9``.
    ``ratio_head`` is ``||v_s||`` over the mean of the other live tokens, ``ratio_out`` the same of ``u = gamma *
    W_O v``; ``stable_rank`` is ``||U||_F^2 / sigma_1^2`` of the head's output ``U = A u``.
    """

    source: ClassVar[str] = (
        "Fesser et al., arXiv:2606.08105; KempnerInstitute/attention_sink a83cd59"
    )
    sink: Int[Tensor, "batch layer head"]
    mass: Float[Tensor, "batch layer head"]
    routed: Float[Tensor, "batch layer head"]
    event: Bool[Tensor, "batch layer head"]
    ratio_head: Float[Tensor, "batch layer head"]
    ratio_out: Float[Tensor, "batch layer head"]
    stable_rank: Float[Tensor, "batch layer head"]
    layers: tuple[int, ...]
    tower: Tower

    def to_dataframe(self) -> pd.DataFrame:
        """One line per row, layer and head, with its ``label``: NOP, broadcast, mixed, or no event."""
        table = super().to_dataframe()
        parts = zip(table.ratio_out, table.stable_rank, table.event, strict=True)
        return table.assign(label=[nop_or_broadcast(*part) for part in parts])


@typed
def nop_broadcast(
    lvlm: LVLM, sample: Sample, *, tower: Tower = "vision", layers: Any = None
) -> NopBroadcast:
    """Tell NOP heads from broadcast heads where there is a sink event (Fesser et al. 2606.08105).

    The paper measures vision transformers, in which every query sees every key. In the causal decoder the
    queries that see the sink count, the sink's own among them.
    """
    check_choice(("vision", "language"), tower=tower)
    return _measured(lvlm, sample, tower, layers)[0]


def _measured(
    lvlm: LVLM, sample: Sample, tower: Tower, layers: Any, *more: Any
) -> tuple[NopBroadcast, Any]:
    """The measures, and the run with ``more`` probes."""
    attention = probes.ReceivedAttention(layers, tower=tower, null=False, events=True)
    values, writes = probes.ValueNorms(layers, tower), probes.HeadWrites(layers, tower)
    run: Any = lvlm.run(sample, [attention, values, writes, *more], logits="last")
    got, at = run[attention], run[attention].sink[..., None]
    share = at.shape[2] // run[values].norms.shape[2]
    of_head = run[values].ratio().repeat_interleave(share, dim=2).gather(-1, at)[..., 0]
    of_write = run[writes].ratio().gather(-1, at)[..., 0]
    taken = (got.sink, got.sink_mass, got.routed, got.event())
    parts = (*taken, of_head, of_write, run[writes].stable_rank, got.layers, tower)
    return NopBroadcast(*parts), run


@typed
def value_edits(
    lvlm: LVLM,
    sample: Sample,
    held_out: Sequence[Sample],
    *,
    layer: int,
    head: int,
    tower: Tower = "vision",
    seed: int = 0,
) -> dict[str, Intervention]:
    """Make the paper's five edits of the value of a head's sink, and its control (Fesser et al. 2606.08105).

    Rows with a sink event in this head are edited. ``"zero"``; ``"mean"``: of the sinks' values in all rows of
    ``held_out`` with an event there; ``"donor sink"``: the first of these; ``"donor other"``: a random other
    value of the same donor; ``"redirect"``: the sink's column is zeroed and rows are renormalised;
    ``"control"``: a random other value of the row itself is set to zero. InterventionError without an event.
    """
    anatomy = lvlm.anatomy.tower(tower)
    check_whole(0, anatomy.n_layers - 1, layer=layer)
    check_whole(0, anatomy.heads - 1, head=head)
    random, where = torch.Generator().manual_seed(seed), f"head {head} of {tower} layer {layer}"
    own = head // (anatomy.heads // anatomy.kv_heads)
    sinks, controls = _places(lvlm, sample, tower, layer, head, random)[:2]
    given, others = [], []
    for one in held_out:
        places = _places(lvlm, one, tower, layer, head, random)
        values = places[2][:, 0, own]  # [row pos d_head]
        given += [*values[places[0]]]
        others += [*values[places[1]]]
    for name, found in (("sample", bool(sinks.any())), ("held_out", bool(given))):
        if not found:
            raise InterventionError(
                f"Got no sink event of {where} in any row of {name}; expected one, in which 90 % of the "
                "queries give the sink at least 0.5. Choose a head with events from "
                "published.nop_broadcast(lvlm, sample).to_dataframe()."
            )
    fixed: Any = {"layers": [layer], "heads": [head], "tower": tower}
    replaced = {"zero": "zero", "mean": torch.stack(given).mean(dim=0)}
    replaced |= {"donor sink": given[0], "donor other": others[0]}
    made: dict[str, Intervention] = {
        n: AblateValues(sinks, new, **fixed) for n, new in replaced.items()
    }
    made["redirect"] = MaskKeys(sinks, **fixed)
    return made | {"control": AblateValues(controls, "zero", **fixed)}


def _places(
    lvlm: LVLM, sample: Sample, tower: Tower, layer: int, head: int, random: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """The sinks of a head with events, and as many random other live tokens, bool ``[row pos]``; values."""
    probe = probes.AttentionValues([layer], tower=tower)
    found, run = _measured(lvlm, sample, tower, [layer], probe)
    live = (sample.tokens.vision if tower == "vision" else sample.tokens).live
    rows = found.event[:, 0, head].nonzero().flatten().tolist()
    sinks, others = torch.zeros_like(live), torch.zeros_like(live)
    for row in rows:
        sinks[row, found.sink[row, 0, head]] = True
        rest = (live[row] & ~sinks[row]).nonzero().flatten()
        others[row, rest[torch.randint(len(rest), (1,), generator=random)]] = True
    return sinks, others, run[probe].values


@dataclass(frozen=True, eq=False)
class ValueEffects(Result, columns={"change": "change"}):
    """By how much each edit moves the tower's final tokens, the sink left out, in rows with an event; else NaN.

    ``change`` is the root mean square of the difference over that of the unedited states.
    """

    source: ClassVar[str] = NopBroadcast.source
    change: Float[Tensor, "batch edit"]
    edits: tuple[str, ...]
    layer: int
    head: int
    tower: Tower


@typed
def value_effects(
    lvlm: LVLM,
    sample: Sample,
    held_out: Sequence[Sample],
    *,
    layer: int,
    head: int,
    tower: Tower = "vision",
    seed: int = 0,
) -> ValueEffects:
    """Measure what `value_edits` change, as relative RMS change of the last block's output (2606.08105).

    It is taken over patches in the vision tower, over all live tokens in the decoder.
    """
    edits = value_edits(lvlm, sample, held_out, layer=layer, head=head, tower=tower, seed=seed)
    last, tokens = lvlm.anatomy.tower(tower).n_layers - 1, sample.tokens
    states = probes.ResidualStates("all", [last], tower)
    zero: Any = edits["zero"]
    kept = tokens.vision.select("patch") if tower == "vision" else tokens.live
    kept = kept & ~zero.tokens

    def final(*which: Intervention) -> Tensor:
        found = lvlm.run(sample, [states], which, logits="last")[states].states[:, 0]
        return found.masked_fill(~kept[..., None], 0.0)

    plain, changes = final(), []
    for name in EDITS:
        moved = (final(edits[name]) - plain).flatten(1).norm(dim=1) / plain.flatten(1).norm(dim=1)
        changes.append(moved.masked_fill(~zero.tokens.any(dim=1), float("nan")))
    return ValueEffects(torch.stack(changes, dim=1), EDITS, layer, head, tower)
