"""Plans: what a pass reads and edits, site by site in forward order, as plain data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sinkscope.anatomy.context import Context
from sinkscope.anatomy.towers import Anatomy
from sinkscope.interventions.application import check_reach
from sinkscope.kernels.edited_call import STAGES
from sinkscope.protocols import Edit, Intervention, Probe, Read
from sinkscope.sites import Site

Plan = list[dict[str, Any]]


def plan_of(
    probes: Sequence[Probe], interventions: Sequence[Intervention], context: Context, model: Any
) -> Plan:
    """The plan of probes and interventions, which must be made for this model (an `LVLM`)."""
    reads = [(slot, read) for slot, probe in enumerate(probes) for read in probe.reads(context)]
    edits = []
    for slot, it in enumerate(interventions):
        check_fits = getattr(it, "check_fits", None)
        if check_fits is not None:
            check_fits(model)
        mine = it.edits(context)
        check_reach(it, mine, context.anatomy.feed_layers)
        edits += [(slot, edit) for edit in mine]
    return make_plan(context.anatomy, reads, edits)


def make_plan(
    anatomy: Anatomy,
    reads: Sequence[tuple[int, Read]],
    edits: Sequence[tuple[int, Edit]] = (),
) -> Plan:
    """Group all reads and edits by site and sort the sites in forward order.

    Args:
        anatomy: The model's anatomy.
        reads: ``(slot, read)``: the slot is the probe's number.
        edits: ``(slot, edit)``: the slot is the intervention's number. At one site they apply in the
            order of their stages, and in the order given inside a stage.

    Returns:
        The plan of `sinkscope.kernels.walk`.
    """
    by_site: dict[Site, tuple[list, list, list]] = {}
    staged = sorted(edits, key=lambda one: STAGES.index(one[1].stage))
    for kind, questions in enumerate((reads, staged)):
        for slot, one in questions:
            lists = by_site.setdefault(one.site, ([], [], []))
            lists[kind].append((slot, one.kernel, dict(one.parameters)))
            if isinstance(one, Edit):
                lists[2].append(one.stage)
    return [step_at(anatomy, site, *by_site[site]) for site in sorted(by_site)]


def step_at(
    anatomy: Anatomy, site: Site, reads: Sequence = (), edits: Sequence = (), stages: Sequence = ()
) -> dict[str, Any]:
    """One step of the plan: where a site lies in this model, and what is asked there."""
    step = {**vars(site), "reads": reads, "edits": edits, "stages": stages}
    if site.tower == "projector":
        return step | {"path": anatomy.projector, "how": site.name}
    tower, layer = anatomy.tower(site.tower), site.layer
    if site.name == "attention":
        call = tower.call(layer)
        return step | vars(call) | {"path": tower.attention[layer], "how": "attention"}
    if site.name in ("attn_out", "mlp_out"):
        branch = tower.branch(site.name, layer)
        return step | {"path": branch.path, "how": "output", "factors": branch.factors}
    path, how = {
        "resid_pre": (tower.blocks[layer], "input"),
        "mlp_hidden": (tower.neurons[layer], "input"),
        "resid_post": (tower.blocks[layer], "output"),
    }[site.name]
    return step | {"path": path, "how": how}
