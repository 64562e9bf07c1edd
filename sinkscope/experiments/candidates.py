"""The tokens of a trace that come closest to sinks, and why no rule flags them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sinkscope.detectors import Detection, Gap, NoSinks
from sinkscope.detectors.gap import outcome_of
from sinkscope.probes import EvidenceResult
from sinkscope.results import in_rows
from sinkscope.sites import Tower
from sinkscope.tokens import VISION_KINDS
from sinkscope.viz.tables import readable


@dataclass(frozen=True)
class Candidate:
    """A token that spikes or attracts attention more than the others of its tower.

    ``medians`` is its largest ``|h|`` in medians of ``spike_layer``, where it stands out most, ``prominence``
    in upper quartiles. ``drawn`` is the most that some head, ``drawn_at`` as ``(layer, head)``, gives it
    beyond uniform attention, from other tokens: NaN and None where fewer than 8 see it. ``row`` and ``pos``
    are image and ViT token in the vision tower; ``reason`` says why it is not ``flagged``.
    """

    tower: Tower
    row: int
    pos: int
    token: str
    medians: float
    prominence: float
    spike_layer: int
    drawn: float
    drawn_at: tuple[int, int] | None
    flagged: bool
    reason: str


def named(of: Any, tower: Tower, row: int, pos: int) -> str:
    """A token's position with its word, or what ViT token it is; ``of`` has a ``sample``."""
    tokens, vision = of.sample.tokens, of.sample.tokens.vision
    if tower == "vision":
        kind = VISION_KINDS[int(vision.kind[row, pos])]
        if kind == "patch":
            return f"patch {int(vision.row[row, pos])},{int(vision.column[row, pos])}"
        return "CLS" if kind == "cls" else f"{kind} {pos}"
    if int(tokens.image[row, pos]) < 0:
        return f"{pos} {readable(tokens.words[row][pos] if tokens.words else None)}"
    cell = f"{int(tokens.row[row, pos])},{int(tokens.column[row, pos])}"
    at = "" if cell == "-1,-1" else f" at {cell}"
    return f"{pos} image {int(tokens.image[row, pos])}{at}"


def outcome(trace: Any, tower: Tower, rows: Sequence[int] | None = None) -> str:
    """What spikes and what draws in a tower where nothing is flagged, in one sentence; ``rows`` of a batch."""
    rule, seen, found, layers = judged(trace, tower)
    places = range(len(found.mask)) if rows is None else rows
    if len(places) < len(found.mask):
        seen, found = in_rows(seen, places), in_rows(found, places)
    if tower == "vision" and (trace.sample.tokens.unmapped or not layers):
        many = int(found.mask[:, layers].any(dim=1).sum())
        told = f"; the rule flags {many} ViT tokens, whose places in the LLM are unknown" * bool(
            many
        )
        return trace.notes[0].partition(": ")[0] + told
    if isinstance(rule, NoSinks):
        return rule.reason
    rule = rule if isinstance(rule, Gap) else Gap(draws=trace.draws)
    whose = " of image" if tower == "vision" else " of row"

    def called(_: int, at: int, pos: int) -> str:
        row, name = places[at], named(trace, tower, places[at], pos)
        if rows is not None and tower == "language":  # the padding of other rows does not count
            first = int(trace.sample.tokens.live[row].int().argmax())
            name = f"{pos - first}{name.removeprefix(str(pos))}"
        return name + f"{whose} {row}" * (len(places) > 1)

    return outcome_of(rule, [seen.at(layers)], tower, called)


def judged(trace: Any, tower: Tower) -> tuple[Any, EvidenceResult, Detection, list[int]]:
    """The rule of a tower, what was measured there, what is flagged, and the layers where it counts."""
    if tower == "vision":
        return trace.rules.v, trace.vision, trace.v_detection, [*trace.feeds]
    return trace.rules.l_rule, trace.language, trace.l_detection, [*trace.l_detection.layers]


def candidates_of(trace: Any, tower: Tower) -> Iterator[Candidate]:
    """Three tokens per row for their attention and three for their spike, the most attended first."""
    _, evidence, detection, layers = judged(trace, tower)
    if not layers:
        return
    tokens, head = trace.sample.tokens, evidence.by_key.head
    live = tokens.vision.live if tower == "vision" else tokens.live
    large = evidence.prominence()[:, layers].nan_to_num(-1.0)
    known = evidence.drawn()
    attention = known.nan_to_num(-2.0).amax(dim=1)
    for row, drawing in enumerate(attention):
        few, size = min(3, len(drawing)), large[row].amax(dim=0)
        most = [*drawing.topk(few).indices.tolist(), *size.topk(few).indices.tolist()]
        best = dict.fromkeys(pos for pos in most if bool(live[row, pos]))
        for pos in sorted(best, key=lambda pos, drawing=drawing: -float(drawing[pos])):
            times, given = large[row, :, pos], known[row, :, pos]
            layer, at, drawn = layers[int(times.argmax())], None, float("nan")
            if not bool(given.isnan().all()):
                most = int(given.nan_to_num(-2.0).argmax())
                at, drawn = (most, int(head[row, most, pos])), float(given[most])
            flagged = bool(detection.mask[row, layers, pos].any())
            reason = "flagged" if flagged else why_not(trace, tower, row, pos)
            where = tower, row, pos, named(trace, tower, row, pos)
            spike = float(evidence.medians()[row, layer, pos]), float(times.max()), layer
            yield Candidate(*where, *spike, drawn, at, flagged, reason)


def why_not(trace: Any, tower: Tower, row: int, pos: int) -> str:
    """Why the rule of a tower flags a token in no layer."""
    rule, evidence, detection, layers = judged(trace, tower)
    if isinstance(rule, NoSinks):
        return "there is no rule for this tower"
    if not isinstance(rule, Gap):
        scores, limits = detection.scores[row, :, pos], detection.threshold[row]
        layer = int((scores / limits).nan_to_num(-1.0).argmax())
        return f"score {scores[layer]:.3g} of {limits[layer]:.3g} (layer {layer})"
    if not bool(evidence.judged[row, pos]):
        return "no patch: a kind of its own, listed apart"
    at = (row, layers, pos)
    times, known = evidence.prominence()[at].nan_to_num(-1.0), evidence.drawn()[at]
    large = (times >= rule.gap) & (evidence.medians()[at] >= rule.medians)
    draws = bool(rule.draws_in(evidence)[at].any())
    if not bool(large.any()):
        said = f"no spike: {float(times.max()):.1f} of {rule.gap:g} upper quartiles"
        return said if draws else f"{said}; draws nothing"
    if not bool((large & (evidence.growth()[at] >= rule.growth)).any()):
        return "its spike came with the embeddings"
    if draws:
        return "spikes and draws attention, but never in the same layer"
    if bool(known.isnan().all()):
        return "spikes; fewer than 8 tokens see it"
    return f"spikes and draws nothing: {float(known.nan_to_num(-1.0).max()):.3f} beyond uniform"
