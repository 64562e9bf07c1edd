"""What is done with a part of a data set: one line per sink, one per record, and one per control."""

import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from sinkscope.data.ahead import samples_ahead
from sinkscope.data.shown import Shown
from sinkscope.detectors import Calibration, Detector, Massive, Norm, Received, known_for
from sinkscope.detectors.detection import SATURATION, decide, decided, saturation, visual_tokens
from sinkscope.errors import InputError, NonFiniteError, TooFewTokensError
from sinkscope.experiments.controls import RandomControl
from sinkscope.experiments.dataset_files import GROUPS, SCHEMAS
from sinkscope.experiments.measuring import SinkRecord
from sinkscope.experiments.sink_edits import content_seed
from sinkscope.experiments.tracing import SinkTrace, trace_sinks
from sinkscope.models.lvlm import LVLM
from sinkscope.probes import AttentionMass, ReceivedResult
from sinkscope.results import in_rows
from sinkscope.sites import Tower

TOWERS: tuple[Tower, ...] = ("vision", "language")
REFUSED = (InputError, NonFiniteError)
SKIP = "Write errors='skip' to leave such records out; what was traced before stays and is not traced again."


@dataclass(frozen=True)
class Plan:
    """What is the same for every part; it travels to workers."""

    v_detector: Detector | None
    l_detector: Detector | None
    calibration: Calibration | None
    merge: str
    draws: float
    batch: int
    errors: str
    masses: bool
    control: RandomControl | None
    remote: bool | str | None


def others_of(lvlm: LVLM, tower: Tower) -> dict[str, Detector]:
    """The rules that the one used is compared with in a tower."""
    found: dict[str, Detector] = {"norm": Norm("valley"), "massive": Massive()}
    found["attention"] = Received(times_null=5.0)
    known = known_for(lvlm)
    rule = None if known is None else known.v_detector if tower == "vision" else known.l_detector
    return found if rule is None else {**found, "published": rule}


def trace_part(lvlm: LVLM, chunk: Sequence[Shown], plan: Plan) -> dict[str, pa.Table]:
    """Trace a part of a data set into tables; an error names its record, if it is not skipped."""
    lines: dict[str, list[dict[str, Any]]] = {"images": [], "sinks": [], "control": []}
    good = [one for one in chunk if not one.problem]
    groups = [good[at : at + plan.batch] for at in range(0, len(good), plan.batch)]
    with closing(samples_ahead(lvlm, groups, refusals=REFUSED)) as prepared:
        for group, made in zip(groups, prepared, strict=True):
            _traced(lvlm, group, plan, lines, made)
    lines["images"] += [_skipped(one, one.problem) for one in chunk if one.problem]
    lines["images"].sort(key=lambda line: line["record"])
    return {name: pa.Table.from_pylist(some, schema=SCHEMAS[name]) for name, some in lines.items()}


def _skipped(one: Shown, problem: str) -> dict[str, Any]:
    parts = {"question": one.question, "fields": one.fields}
    return {"record": one.number, "image_id": one.image_id, **parts, "problem": problem}


def _traced(lvlm: LVLM, group: Sequence[Shown], plan: Plan, lines: Any, made: Any = None) -> None:
    """Trace a batch; where it fails, each of its records alone, so that an error is that of one."""
    try:
        if isinstance(made, Exception):
            raise made
        if made is None:
            asked = [one.image for one in group], [one.question for one in group]
            made = (lvlm.prepare(images=asked[0], text=asked[1]),)
        found = _lines_of(lvlm, group, made[0], plan)
    except REFUSED as error:
        if len(group) > 1:
            for one in group:
                _traced(lvlm, [one], plan, lines)
            return
        one = group[0]
        if plan.errors == "stop":
            raise type(error)(f"Record {one.number} ({one.image_id}): {error} {SKIP}") from error
        found = {"images": [_skipped(one, str(error))]}
    for name, some in found.items():
        lines[name] += some


def _lines_of(lvlm: LVLM, group: Sequence[Shown], sample: Any, plan: Plan) -> dict[str, Any]:
    """The lines of all tables about a batch."""
    begun, rules = time.perf_counter(), (plan.v_detector, plan.l_detector)
    how: dict[str, Any] = {"merge": plan.merge, "draws": plan.draws, "remote": plan.remote}
    trace = trace_sinks(lvlm, sample, *rules, calibration=plan.calibration, **how)
    more = _second_pass(lvlm, trace, plan.remote) if plan.masses else [{}] * len(group)
    seconds = (time.perf_counter() - begun) / len(group)
    found: dict[str, Any] = {"images": [], "sinks": [], "control": []}
    for row, one in enumerate(group):
        own = [record for record in trace.records if record.batch == row]
        key = {"record": one.number, "image_id": one.image_id}
        line = _skipped(one, "") | {"problem": None, **_image_line(trace, row, own), **more[row]}
        found["images"].append(line | {"seconds": seconds})
        found["sinks"] += [key | _sink_line(trace, record) for record in own]
        if plan.control is not None:
            found["control"].append(key | _control_line(lvlm, trace, plan.control))
    return found


def _image_line(trace: SinkTrace, row: int, records: Sequence[SinkRecord]) -> dict[str, Any]:
    """What is told of a record: sizes, counts, warnings, and why nothing was found."""
    tokens, kinds = trace.sample.tokens, [record.kind for record in records]
    images = (tokens.vision.batch_row == row).nonzero().flatten().tolist()
    pictures = (trace.sample.images or ((),) * len(trace.sample))[row]
    line: dict[str, Any] = {"widths": [one.width for one in pictures], "chosen": trace.chosen}
    line |= {"heights": [one.height for one in pictures], "tokens": int(tokens.live[row].sum())}
    line["image_tokens"] = int((tokens.image[row] >= 0).sum())
    line |= {f"n_{kind.lower()}": kinds.count(kind) for kind in ("V", "L", "text", "attention")}
    masks = {"l": trace.l_sinks(), "text": trace.text_sinks(), "overlap": trace.overlap()}
    line |= {f"{name}_by_layer": mask[row].sum(dim=1).tolist() for name, mask in masks.items()}
    line["n_overlap"] = sum(record.overlap for record in records)
    v, low = in_rows(trace.v_detection, images), in_rows(trace.l_detection, [row])
    line["v_by_block"] = (v.mask & v.visual[:, None]).sum(dim=(0, 2)).tolist()
    ours = {*trace.v_detection.warnings, *trace.l_detection.warnings}
    saturated = bool((v.fraction[:, list(trace.feeds)] > SATURATION).any())
    said = [*(saturation(v) if saturated else ()), *saturation(low)]
    line["warnings"] = [*said, *(text for text in trace.warnings if text not in ours)]
    told = trace.outcomes_of(row)
    return line | {f"outcome_{tower}": told.get(tower) for tower in ("vision", "language")}


def _sink_line(trace: SinkTrace, record: SinkRecord) -> dict[str, Any]:
    """A record as a line: ``pos`` without padding, pairs by name, and the place in the picture."""
    tokens, line = trace.sample.tokens, asdict(record)
    row, pos = line.pop("batch"), record.pos
    line["pos"] = pos - int(tokens.live[row].int().argmax())
    for name in ("vit_channels", "llm_channels", "peak_channels"):
        line[name] = [{"channel": at, "value": value} for at, value in line[name]]
    lives = line["llm_lives"]
    line["llm_lives"] = [{"block": a, "last": b, "writer": how} for a, b, how in lives]
    line["head_layer"], line["head"] = line["head"] or (None, None)
    line |= dict.fromkeys(("x0", "y0", "x1", "y1"), float("nan"))
    if record.box is not None:
        image = tokens.image[row] == record.image
        size = tokens.box[row, image].nan_to_num()[:, 2:].amax(dim=0).tolist()
        if tokens.box_unit == "original" and trace.sample.images is not None:
            size = trace.sample.images[row][record.image].size
        parts = (edge / whole for edge, whole in zip(record.box, (*size, *size), strict=True))
        line |= zip(("x0", "y0", "x1", "y1"), parts, strict=True)
    return line


def _second_pass(lvlm: LVLM, trace: SinkTrace, remote: Any) -> list[dict[str, Any]]:
    """Per row: the attention mass on every group, its null, and what other rules flag too."""
    sample, layers = trace.sample, list(lvlm.anatomy.language.attending)
    asked: list[Any] = [AttentionMass(trace.groups, layers)] if layers else []
    others = {tower: others_of(lvlm, tower) for tower in TOWERS}
    read: dict[Tower, list[int]] = {
        "vision": [*trace.feeds],
        "language": [*trace.l_detection.layers],
    }
    evidence = {"vision": trace.vision, "language": trace.language}
    known: dict[str, Any] = {  # what was measured before
        tower: (Massive, Received) if isinstance(seen.received, ReceivedResult) else (Massive,)
        for tower, seen in evidence.items()
    }
    probes = {
        (tower, name): rule.probe(tower, read[tower], lvlm.anatomy.tower(tower))
        for tower in TOWERS
        for name, rule in others[tower].items()
        if read[tower] and not isinstance(rule, known[tower])
    }
    run = lvlm.run(sample, [*asked, *probes.values()], logits="last", remote=remote)

    def flagged(tower: Tower, name: str, rule: Detector) -> Tensor:
        if (tower, name) in probes:
            return decided(rule, run, probes[tower, name], lvlm, sample).mask
        seen: Any = evidence[tower]
        told, masks = isinstance(rule, Massive), visual_tokens(sample, tower)
        result = seen.massive if told else seen.received
        return decide(rule, result, *masks, tower, lvlm.anatomy.tower(tower)).mask[:, read[tower]]

    lines: list[dict[str, Any]] = [{} for _ in range(len(sample))]
    for tower in TOWERS:
        masks = []
        if read[tower]:
            used = trace.v_detection if tower == "vision" else trace.l_detection
            masks = [used.mask[:, read[tower]]]
            masks += [flagged(tower, name, rule) for name, rule in others[tower].items()]
        visual, many = visual_tokens(sample, tower)[0][:, None], 1 + len(others[tower])
        for row, line in enumerate(lines):
            images = (sample.tokens.vision.batch_row == row).nonzero().flatten()
            rows = images if tower == "vision" else [row]
            line[f"agree_{tower}"] = _agreeing([(x & visual)[rows].flatten() for x in masks], many)
    for row, line in enumerate(lines if asked else ()):
        line |= _mass_of(run[asked[0]], row, trace.n_layers)
    return lines


def _agreeing(masks: Sequence[Tensor], many: int) -> list[int]:
    """How many tokens two rules flag both, for every pair of rules; 0 where nothing was looked at."""
    if len(masks) < many:
        return [0] * many**2
    table = torch.stack(list(masks)).double()
    return (table @ table.T).long().flatten().tolist()


def _mass_of(result: Any, row: int, n_layers: int) -> dict[str, list[float]]:
    """The mean over heads and queries of a row, by layer; NaN in layers that do not attend."""
    line = {}
    for what, values in (("mass", result.mass[row].nanmean(dim=1)), ("null", result.null[row])):
        whole = torch.full((n_layers, len(GROUPS)), float("nan"))
        whole[list(result.layers)] = values.nanmean(dim=1).cpu()
        line |= {
            f"{what}_{GROUPS[name]}": whole[:, at].tolist() for at, name in enumerate(result.groups)
        }
    return line


def _control_line(lvlm: LVLM, trace: SinkTrace, control: RandomControl) -> dict[str, Any]:
    """What an edit and its controls do to one record; other draws for other images."""
    blank = [0.0] * control.n
    line: dict[str, Any] = {"state": "without", "tokens": 0, "base": 0.0, "real": 0.0}
    line |= {"controls": blank, "real_mass": 0.0, "masses": blank}
    it = control.made(trace)
    if it is None:
        return line
    own = replace(control, intervention=it, seed=content_seed(trace.sample, control.seed))
    try:
        found: Any = own.run(lvlm, trace)
    except TooFewTokensError:
        return line | {"state": "uncontrolled"}
    line |= {"state": "edited", "base": float(found.base[0]), "real": float(found.real[0])}
    line |= {"controls": found.controls[:, 0].tolist(), "real_mass": float(found.real_mass[0])}
    return line | {"masses": found.mass[:, 0].tolist()}
