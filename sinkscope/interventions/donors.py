"""Donors: states or values of another run, found in it and checked before they are put in place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Tensor

from sinkscope.errors import InterventionError, nearest
from sinkscope.interventions.base import at_layer
from sinkscope.probes.residual import StateResult
from sinkscope.probes.writes import AttentionValueResult
from sinkscope.sites import STATE_SITES

if TYPE_CHECKING:
    from sinkscope.anatomy.context import Context

VALUES = "values"
PATCH_SITES = (*STATE_SITES, VALUES)


@runtime_checkable
class Holder(Protocol):
    """A `Run`, as far as a donor is concerned."""

    @property
    def results(self) -> Mapping[Any, Any]:
        """Results by probe."""
        ...

    @property
    def step(self) -> int:
        """0 for a prompt."""
        ...


def check_patch_site(site: Any) -> str:
    """Where something can be patched.

    Raises:
        InterventionError: If it is no such site.
    """
    if not isinstance(site, str):
        raise InterventionError(
            f"Got a site of type {type(site).__name__}; expected one of {PATCH_SITES}. Write "
            "ss.PatchActivations(from_run, site, tokens, layers)."
        )
    if site not in PATCH_SITES:
        raise InterventionError(
            f"Got site={site!r}; expected one of {PATCH_SITES}. {nearest(site, PATCH_SITES)}"
        )
    return site


def live_prompt(context: Context, tower: str) -> Tensor:
    """Live positions of the prompt, at every step, bool ``[batch pos]``."""
    return context.tokens.vision.live if tower == "vision" else context.tokens.live


def donated(given: Any, context: Context, tower: str, site: str, layers: tuple[int, ...]) -> Tensor:
    """What a donor gives, one entry per row of the batch and layer.

    Args:
        given: A run, a result of one, or a tensor; one row may stand for all.
        context: The sample that is edited.
        tower: The tower.
        site: One of `PATCH_SITES`.
        layers: The edited layers; a run or a result may hold more.

    Returns:
        Float ``[batch layer pos d_model]``; of values ``[batch layer kv_head pos d_head]``.

    Raises:
        InterventionError: If there is none that fits, or several, or its shape is another.
    """
    if isinstance(given, Tensor):
        return fitted(given, context, tower, site, layers)
    result = result_of(given, tower, site, layers)
    check_place(result, tower, site, layers)
    tensor = result.values if isinstance(result, AttentionValueResult) else result.states
    picked = tensor[:, [result.layers.index(layer) for layer in layers]]
    tensor = fitted(picked, context, tower, site, layers)
    padded = ~live_prompt(context, tower).all(dim=1)
    if tower == "language" and picked.shape[0] < len(padded) and padded.any():
        raise InterventionError(
            f"Got a donor of one row for the rows {padded.nonzero().flatten().tolist()}, which are "
            "padded; expected rows without padding, because its tokens stand at other positions "
            "there. Patch rows of one length together, or give a donor with a row for each."
        )
    return tensor


def result_of(given: Any, tower: str, site: str, layers: tuple[int, ...]) -> Any:
    """The result that a donor is or holds.

    Raises:
        InterventionError: If it holds none that fits, or several.
    """
    if isinstance(given, StateResult | AttentionValueResult):
        return given
    probe = probe_for(tower, site, layers)
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
    kind = AttentionValueResult if site == VALUES else StateResult
    held = [result for result in given.results.values() if isinstance(result, kind)]
    fitting = [
        one for one in held if place_of(one) == (tower, site) and set(layers) <= set(one.layers)
    ]
    if len(fitting) > 1:
        raise InterventionError(
            f"Got a run with {len(fitting)} results that fit {probe}; expected one. Write "
            "from_run=run[probe] with the probe you mean."
        )
    if not fitting:
        has = [f"{place_of(one)} of layers {one.layers}" for one in held]
        raise InterventionError(
            f"Got a run that holds {', '.join(has) or 'no such result'}; expected "
            f"{(tower, site)} of layers {layers}. Write lvlm.run(other, probes=[{probe}])."
        )
    return fitting[0]


def check_place(result: Any, tower: str, site: str, layers: tuple[int, ...]) -> None:
    """Refuse a result of another tower, site or layers.

    Raises:
        InterventionError: If it is one.
    """
    mine = place_of(result)
    for name, found, wanted in (("tower", mine[0], tower), ("site", mine[1], site)):
        if found != wanted:
            raise InterventionError(
                f"Got a donor of {name} {found!r} to patch at {name} {wanted!r}; expected the same. "
                f"Write {name}={found!r}, or read another with {probe_for(tower, site, layers)}."
            )
    missing = [layer for layer in layers if layer not in result.layers]
    if missing:
        raise InterventionError(
            f"Got a donor of layers {result.layers} to patch at layers {layers}; expected it to hold "
            f"them all. Write layers={list(result.layers)}, or read another with "
            f"{probe_for(tower, site, layers)}."
        )


def place_of(result: Any) -> tuple[str, str]:
    """The tower and site of a donor's result."""
    return result.tower, VALUES if isinstance(result, AttentionValueResult) else result.site


def probe_for(tower: str, site: str, layers: tuple[int, ...]) -> str:
    """The probe that reads a donor, as the user writes it."""
    options = f"layers={list(layers)}"
    if tower != "language":
        options += f", tower={tower!r}"
    if site == VALUES:
        return f"ss.probes.AttentionValues({options})"
    return f"ss.probes.ResidualStates({options}, site={site!r})"


def fitted(
    tensor: Tensor, context: Context, tower: str, site: str, layers: tuple[int, ...]
) -> Tensor:
    """A donor's tensor for every row of the batch, on the CPU.

    Raises:
        InterventionError: If it has another shape.
    """
    live, anatomy = live_prompt(context, tower), context.tower(tower)
    rows, many, length = live.shape[0], len(layers), live.shape[1]
    if site == VALUES:
        axes = "[batch layer kv_head pos d_head]"
        wanted = (rows, many, anatomy.kv_heads, length, anatomy.d_head)
    else:
        axes, wanted = "[batch layer pos d_model]", (rows, many, length, anatomy.d_model)
    shape = tuple(tensor.shape)
    if shape[1:] != wanted[1:] or shape[:1] not in ((1,), (rows,)):
        raise InterventionError(
            f"Got a donor of shape {shape}; expected {axes} = {wanted}, or one row for all: that "
            "of a run with a prompt of the same shape. Ask the same question about an image of the "
            f"same size, and read {probe_for(tower, site, layers)}."
        )
    return tensor.detach().cpu().expand(wanted)


def check_finite(tensor: Tensor, mask: Tensor, layers: tuple[int, ...], dim: int) -> None:
    """Refuse a donor that has no number where it is needed.

    Args:
        tensor: ``[batch layer ...]`` with positions at ``dim``.
        mask: Bool ``[batch layer|1 pos]``: the tokens to overwrite.
        layers: The layers of the tensor.
        dim: The position axis.

    Raises:
        InterventionError: If it has NaN or infinity there.
    """
    for i, layer in enumerate(layers):
        chosen = tensor[:, i].movedim(dim - 1, 1)[at_layer(mask, layer)]
        if not chosen.isfinite().all():
            raise InterventionError(
                f"Got NaN or infinite numbers at tokens to overwrite (layer {layer}); expected "
                "finite ones, because others would spread to every live token of the row. A donor "
                "has NaN at its padding and at tokens that its probe did not keep."
            )
