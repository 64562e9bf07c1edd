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

    Rows with a sink event in this head are edited. ``"zero"``; ``"mean"``: of the sinks' values in the rows of
    ``held_out`` that have an event there; ``"donor sink"``: the value of the donor's dominant key; ``"donor
    other"``: of a random other patch of the donor; ``"redirect"``: the sink's column is zeroed and rows are
    renormalised; ``"control"``: the value of a random other patch is zeroed. In the decoder it is any live
    token. Donors are the rows of ``held_out`` in turn; in their code it is the next image of the batch.
    InterventionError without an event in the sample, or in ``held_out``.
    """
    check_choice(("vision", "language"), tower=tower)
    anatomy = lvlm.anatomy.tower(tower)
    check_whole(0, anatomy.n_layers - 1, layer=layer)
    check_whole(0, anatomy.size("heads", [layer]) - 1, head=head)
    at = (tower, layer, head, torch.Generator().manual_seed(seed))
    events, sinks, others, _ = _places(lvlm, sample, *at)
    held = [_places(lvlm, one, *at) for one in held_out]
    for name, found in (("sample", [events]), ("held_out", [one[0] for one in held])):
        if not any(bool(one.any()) for one in found):
            raise InterventionError(
                f"Got no sink event of head {head} of {tower} layer {layer} in any row of {name}; expected "
                "one, in which 90 % of the queries give the sink at least 0.5. Choose a head with events "
                "from published.nop_broadcast(lvlm, sample).to_dataframe()."
            )
    given, plain = (torch.cat([x[3][x[i]] for x in held])[:, None, None] for i in (1, 2))
    mean = given[torch.cat([one[0] for one in held])].mean(dim=0)
    donor = torch.arange(len(events)) % len(given)
    new = {"zero": "zero", "mean": mean, "donor sink": given[donor], "donor other": plain[donor]}
    fixed: Any = {"layers": [layer], "heads": [head], "tower": tower}
    sinks, others = sinks & events[:, None], others & events[:, None]
    made: dict[str, Intervention] = {n: AblateValues(sinks, x, **fixed) for n, x in new.items()}
    made["redirect"] = MaskKeys(sinks, **fixed)
    return made | {"control": AblateValues(others, "zero", **fixed)}


def _places(
    lvlm: LVLM, sample: Sample, tower: Tower, layer: int, head: int, random: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of one head: rows with an event, every row's dominant key and a random other one as masks ``[row pos]``,
    and the values ``[row pos d_head]``."""
    probe, anatomy = probes.AttentionValues([layer], tower=tower), lvlm.anatomy.tower(tower)
    found, run = _measured(lvlm, sample, tower, [layer], probe)
    sink = found.sink[:, 0, head]
    pool = _judged(sample, tower).clone().scatter_(1, sink[:, None], False)
    chance = torch.rand(pool.shape, generator=random).masked_fill(~pool, -1.0)
    sinks, others = (torch.zeros_like(pool) for _ in range(2))
    sinks.scatter_(1, sink[:, None], True)
    others.scatter_(1, chance.argmax(dim=1, keepdim=True), True)
    own = head // (anatomy.size("heads", [layer]) // anatomy.size("kv_heads", [layer]))
    return found.event[:, 0, head], sinks, others, run[probe].values[:, 0, own]


def _judged(sample: Sample, tower: Tower) -> Tensor:
    """Patches of the vision tower, live tokens of the decoder, bool ``[row pos]``."""
    return sample.tokens.vision.select("patch") if tower == "vision" else sample.tokens.live


@dataclass(frozen=True, eq=False)
class ValueEffects(Result, columns={"change": "change", "shared": "shared"}):
    """What each edit does to the tower's final patches, the sink left out; NaN in rows without an event.

    ``change`` is the root mean square of the difference over that of the unedited states, ``shared`` the share
    of the difference's energy that lies in its mean over patches.
    """

    source: ClassVar[str] = NopBroadcast.source
    change: Float[Tensor, "batch edit"]
    shared: Float[Tensor, "batch edit"]
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
    """Measure what `value_edits` change in the last block's output, over patches (2606.08105).

    Their code reads the same states behind the tower's final norm. In the decoder all live tokens count.
    """
    edits = value_edits(lvlm, sample, held_out, layer=layer, head=head, tower=tower, seed=seed)
    states = probes.ResidualStates("all", [lvlm.anatomy.tower(tower).n_layers - 1], tower)
    sinks: Tensor = edits["zero"].tokens  # type: ignore[attr-defined]
    kept = (_judged(sample, tower) & ~sinks)[..., None]

    def final(*which: Intervention) -> Tensor:
        found = lvlm.run(sample, [states], which, logits="last")[states].states[:, 0]
        return found.masked_fill(~kept, 0.0)

    plain, none = final(), ~sinks.any(dim=1)
    changes, shares = [], []
    for name in EDITS:
        moved = final(edits[name]) - plain
        energy, mean = moved.square().sum(dim=(1, 2)), moved.sum(dim=1) / kept.sum(dim=1)
        changes.append(
            (energy / plain.square().sum(dim=(1, 2))).sqrt().masked_fill(none, float("nan"))
        )
        shares.append(mean.square().sum(dim=1) * kept.sum(dim=(1, 2)) / energy)
    shared = torch.stack(shares, dim=1).masked_fill(none[:, None], float("nan"))
    return ValueEffects(torch.stack(changes, dim=1), shared, EDITS, layer, head, tower)
