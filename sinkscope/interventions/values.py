"""AblateValues, and where new values and states come from: donors in the row, other runs, tensors."""

from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from sinkscope.anatomy.context import Context
from sinkscope.checks import among
from sinkscope.errors import InterventionError, nearest
from sinkscope.interventions.base import AttentionEdit, at_layer, attention_edits, selected_by
from sinkscope.interventions.live import LiveRule
from sinkscope.kernels.edits import edit_values
from sinkscope.probes.residual import StateResult
from sinkscope.probes.writes import AttentionValueResult
from sinkscope.protocols import Edit
from sinkscope.sites import STATE_SITES
from sinkscope.tokens import Selection

REPLACEMENTS = ("zero", "mean", "resample")
VALUES = "values"
PATCH_SITES = (*STATE_SITES, VALUES)


@dataclass(frozen=True, eq=False)
class AblateValues(AttentionEdit, needs="packed_values"):
    """Replace the value vectors of tokens; what is attended stays, what is read from it changes.

    Report several replacements side by side: zeroing alone can mislead (2604.14433). A mean or a resampled
    token takes the model's own values, before any edit of the layer: of two edits of different tokens neither
    sees the other. A packed vision tower knows no ``"mean"`` and no ``"resample"``.

    Args:
        replacement: ``"zero"``; ``"mean"`` of the row's other live prompt tokens; ``"resample"``: each
            takes the value of a random other prompt token (of the image, for image tokens); a
            tensor that broadcasts to ``[batch kv_head pos d_head]``, the same in all layers, or to
            ``[batch layer kv_head pos d_head]``, one per layer given; or a run of a prompt of this
            shape that holds `AttentionValues`, or that result.
        layers: As for the rest see `MaskKeys`.
    """

    tokens: Selection
    replacement: Any = "zero"
    layers: Any = None
    seed: int = field(default=0, kw_only=True)

    def edits(self, context: Context) -> list[Edit]:
        """One edit per layer; InterventionError for a replacement that the tower does not allow."""
        given, tower = self.replacement, self.tower
        made = isinstance(given, Tensor | AttentionValueResult | Holder)
        if not made and not among(given, REPLACEMENTS):
            came = repr(given) if isinstance(given, str) else type(given).__name__
            raise InterventionError(
                f"Got replacement={came}; expected one of {REPLACEMENTS} or a tensor, or a run that "
                f"holds ss.probes.AttentionValues. {nearest(str(given), REPLACEMENTS)}"
            )
        if not made and context.layout(tower) is not None and given != "zero":
            raise InterventionError(
                f"Got replacement={given!r} in a packed vision tower; expected 'zero', a tensor or a run. "
                "It attends window by window, and other tokens' values may lie in another window."
            )
        live = isinstance(self.tokens, LiveRule)
        if live and not made and given == "resample":
            raise InterventionError(
                "Got replacement='resample' for a LiveRule; expected 'zero', 'mean', a tensor or a run: "
                "donors are drawn before the pass, among tokens that are not edited. Write a mask."
            )
        mask = selected_by(self, context, self.tokens, live=True)
        layers = context.layers(tower, self.layers)
        if isinstance(given, Tensor):
            return value_edits(self, context, broadcast(given, context, tower, layers), mask)
        if made:
            return value_edits(self, context, donated(given, context, tower, VALUES, layers), mask)
        each = [{"given": self._donors(context, at_layer(mask, at))} for at in layers]
        masks, of = {"keys": mask}, {"keys": self.tokens}
        return attention_edits(self, context, edit_values, VALUES, masks, each, of, how=given)

    def _donors(self, context: Context, mask: Tensor) -> Tensor | None:
        """Who the mean is over, or which token each takes its value from."""
        live = live_prompt(context, self.tower)
        if self.replacement == "mean":
            judged = isinstance(self.tokens, LiveRule)  # what it flags is left out in the pass
            return live if judged else others(live, mask, "AblateValues")
        visual = context.tokens.image >= 0 if self.tower == "language" else live
        kept = self.replacement == "zero"
        return None if kept else random_donors(mask, live, visual, self.seed)


def value_edits(it: Any, context: Context, values: Tensor, mask: Tensor) -> list[Edit]:
    """One edit per layer: values ``[batch layer kv_head pos d_head]`` at the tokens in ``mask``."""
    check_finite(values, mask, context.layers(it.tower, it.layers), 3)
    each = [{"given": context.pack(it.tower, x.nan_to_num(), dim=2)} for x in values.unbind(1)]
    masks, of = {"keys": mask}, {"keys": it.tokens}
    return attention_edits(it, context, edit_values, VALUES, masks, each, of, how="tensor")


def broadcast(given: Tensor, context: Context, tower: str, layers: tuple[int, ...]) -> Tensor:
    """Given values as ``[batch layer kv_head pos d_head]``; InterventionError if they do not fit."""
    if given.dtype == torch.bool:
        raise InterventionError(
            "Got a mask of True and False as replacement; expected values. Give the mask as tokens."
        )
    (rows, length), anatomy = live_prompt(context, tower).shape, context.tower(tower)
    kv_heads, d_head = (anatomy.size(name, layers) for name in ("kv_heads", "d_head"))
    of_all = (rows, kv_heads, length, d_head)
    wanted, given = (rows, len(layers), *of_all[1:]), given.detach().cpu()
    try:
        return (given.expand(of_all)[:, None] if given.ndim <= 4 else given).expand(wanted)
    except RuntimeError as error:
        raise InterventionError(
            f"Got values of shape {tuple(given.shape)}; expected something that broadcasts to "
            f"[batch kv_head pos d_head] = {of_all}, or to [batch layer kv_head pos d_head] = "
            f"{wanted}, one per layer given."
        ) from error


def live_prompt(context: Context, tower: str) -> Tensor:
    """Live positions of the prompt, at every step, bool ``[batch pos]``."""
    return context.tokens.vision.live if tower == "vision" else context.tokens.live


def others(live: Tensor, mask: Tensor, what: str) -> Tensor:
    """The live tokens that are not edited, of which every row needs some for a mean, ``[batch pos]``."""
    rest = live & ~mask
    if alone := (mask.any(dim=1) & ~rest.any(dim=1)).nonzero().flatten().tolist():
        raise InterventionError(
            f"Got a selection that holds every token of rows {alone} for the mean of {what}; "
            "expected some left to average over. Write replacement='zero'."
        )
    return rest


def random_donors(mask: Tensor, live: Tensor, visual: Tensor, seed: int) -> Tensor:
    """For every position in ``mask`` a random live other one of its row; itself elsewhere, ``[batch pos]``.
    Image tokens, those in ``visual``, draw from image tokens, and the others from the rest."""
    generator = torch.Generator().manual_seed(int(seed))
    out = torch.arange(mask.shape[1]).repeat(mask.shape[0], 1)
    for b, row in enumerate(mask):
        for kind in (visual[b] & live[b], ~visual[b] & live[b]):
            takers, pool = ((m & kind).nonzero().flatten() for m in (row, ~row))
            if not len(takers):
                continue
            if not len(pool):
                raise InterventionError(
                    f"Got a selection that holds every token of its kind in row {b}; expected some "
                    "left to resample from. Write replacement='zero' or a tensor."
                )
            out[b, takers] = pool[torch.randint(len(pool), (len(takers),), generator=generator)]
    return out


@runtime_checkable
class Holder(Protocol):
    """A `Run`, as far as a donor is concerned: results by probe, and the step, 0 for a prompt."""

    results: Any
    step: Any


def donated(given: Any, context: Context, tower: str, site: str, layers: tuple[int, ...]) -> Tensor:
    """What a run, a result of one or a tensor gives, ``[batch layer pos d_model]``; see `fitted`."""
    if isinstance(given, Tensor):
        return fitted(given, context, tower, site, layers)
    result = result_of(given, tower, site, layers)
    tensor = result.values if isinstance(result, AttentionValueResult) else result.states
    picked = tensor[:, [result.layers.index(layer) for layer in layers]]
    donor = fitted(picked, context, tower, site, layers)
    padded = (~live_prompt(context, tower).all(dim=1)).nonzero().flatten().tolist()
    if tower == "language" and len(picked) < len(donor) and padded:
        raise InterventionError(
            f"Got a donor of one row for the rows {padded}, which are padded; expected rows without "
            "padding, because its tokens stand at other positions there. Patch rows of one length "
            "together, or give a donor with a row for each."
        )
    return donor


def result_of(given: Any, tower: str, site: str, layers: tuple[int, ...]) -> Any:
    """The one result of a tower, a site and layers that a donor is or holds; else InterventionError."""
    probe = probe_for(tower, site, layers)
    if isinstance(given, StateResult | AttentionValueResult):
        (of, at), fits = place_of(given), set(layers) <= set(given.layers)
        came, wanted = (of, at, given.layers), (tower, site, given.layers if fits else layers)
        for name, one, other in zip(("tower", "site", "layers"), came, wanted, strict=True):
            if one != other:
                raise InterventionError(
                    f"Got a donor of {name} {one!r} to patch at {name} {other!r}; expected the same, or "
                    f"more layers. Write {name}={one!r}, or read another with {probe}."
                )
        return given
    if not isinstance(given, Holder):
        steps = hasattr(given, "sequences") and hasattr(given, "steps")
        advice = "from_run=out.steps[0]" if steps else f"from_run=lvlm.run(other, probes=[{probe}])"
        raise InterventionError(
            f"Got {type(given).__name__} to patch from; expected a run, its result of {probe}, or "
            f"a tensor. Write {advice}."
        )
    if given.step:
        raise InterventionError(
            f"Got the run of decode step {given.step} to patch from; expected that of the prompt. "
            "Write from_run=out.steps[0]."
        )
    kind, place = AttentionValueResult if site == VALUES else StateResult, (tower, site)
    held = [result for result in given.results.values() if isinstance(result, kind)]
    fitting = [one for one in held if place_of(one) == place and {*layers} <= {*one.layers}]
    if len(fitting) > 1:
        raise InterventionError(
            f"Got a run with {len(fitting)} results that fit {probe}; expected one. Write "
            "from_run=run[probe] with the probe you mean."
        )
    if not fitting:
        has = [f"{place_of(one)} of layers {one.layers}" for one in held]
        raise InterventionError(
            f"Got a run that holds {', '.join(has) or 'no such result'}; expected {place} of layers "
            f"{layers}. Write lvlm.run(other, probes=[{probe}])."
        )
    return fitting[0]


def place_of(result: Any) -> tuple[str, str]:
    """The tower and site of a donor's result."""
    return result.tower, VALUES if isinstance(result, AttentionValueResult) else result.site


def probe_for(tower: str, site: str, layers: tuple[int, ...]) -> str:
    """The probe that reads a donor, as the user writes it."""
    options = f"layers={list(layers)}" + ("" if tower == "language" else f", tower={tower!r}")
    states = f"ss.probes.ResidualStates({options}, site={site!r})"
    return f"ss.probes.AttentionValues({options})" if site == VALUES else states


def fitted(
    tensor: Tensor, context: Context, tower: str, site: str, layers: tuple[int, ...]
) -> Tensor:
    """A donor's tensor, whose one row may stand for all, on the CPU; InterventionError if none fits."""
    (rows, length), anatomy = live_prompt(context, tower).shape, context.tower(tower)
    axes, last = "pos d_model", (length, anatomy.d_model)
    if site == VALUES:
        kv_heads, d_head = (anatomy.size(name, layers) for name in ("kv_heads", "d_head"))
        axes, last = "kv_head pos d_head", (kv_heads, length, d_head)
    wanted, shape = (rows, len(layers), *last), tuple(tensor.shape)
    if shape[1:] != wanted[1:] or shape[:1] not in ((1,), (rows,)):
        raise InterventionError(
            f"Got a donor of shape {shape}; expected [batch layer {axes}] = {wanted}, or one row for "
            "all: that of a run with a prompt of the same shape. Ask the same question about an image "
            f"of the same size, and read {probe_for(tower, site, layers)}."
        )
    return tensor.detach().cpu().expand(wanted)


def check_finite(tensor: Tensor, mask: Tensor, layers: tuple[int, ...], dim: int) -> None:
    """Refuse a donor ``[batch layer ...]``, positions at ``dim``, with no number at tokens to overwrite."""
    for i, layer in enumerate(layers):
        chosen = tensor[:, i].movedim(dim - 1, 1)[at_layer(mask, layer)]
        if not chosen.isfinite().all():
            raise InterventionError(
                f"Got NaN or infinite numbers at tokens to overwrite (layer {layer}); expected "
                "finite ones, because others would spread to every live token of the row. A donor "
                "has NaN at its padding and at tokens that its probe did not keep."
            )
