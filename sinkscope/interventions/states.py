"""Interventions on states: set channels, patch, scale and move tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from sinkscope.anatomy.context import Context
from sinkscope.anatomy.weights import dtype_of
from sinkscope.checks import check_choice, is_number, plain
from sinkscope.errors import InterventionError
from sinkscope.interventions import base, values
from sinkscope.interventions.base import BaseEdit, at_layer, selected_by
from sinkscope.kernels import residual as kernels
from sinkscope.probes.residual import check_dims, check_site
from sinkscope.protocols import Edit, Model
from sinkscope.sites import Site
from sinkscope.tokens import Selection


@dataclass(frozen=True, eq=False)
class AblateActivations(BaseEdit, needs="states"):
    """Set channels of tokens: what massive activations do (Sun et al. 2402.17762).

    Args:
        dims: Channel indices.
        replacement: ``"zero"``; ``"mean"`` of the same channel over the row's other live tokens;
            ``"clamp"`` to at most ``value`` in magnitude; or a number.
        layers: As for the rest see `MaskKeys`.
        site: ``"resid_pre"``, ``"attn_out"``, ``"mlp_out"`` or ``"resid_post"``.
    """

    dims: Sequence[int]
    tokens: Selection
    replacement: str | float = "zero"
    layers: Any = None
    value: float | None = None
    site: str = "resid_post"

    def edits(self, context: Context) -> list[Edit]:
        """One edit per layer; prompt tokens exist in the first pass only."""
        how = self.replacement if isinstance(self.replacement, str) else "set"
        if how not in ("zero", "mean", "clamp") and not is_number(self.replacement):
            raise InterventionError(
                f"Got replacement={self.replacement!r}; expected 'zero', 'mean', 'clamp' or a finite "
                "number."
            )
        if how != "clamp" and self.value is not None:
            raise InterventionError(
                f"Got value={self.value!r} with replacement={self.replacement!r}; expected it with "
                f"'clamp' only. To set channels write replacement={self.value!r}."
            )
        if how == "clamp" and self.value is None:
            raise InterventionError(
                "Got replacement='clamp' without a value; expected the largest magnitude to keep. "
                "Write value=10.0."
            )
        if how == "clamp":
            base.check_factor("value", self.value, 0.0)
        base.check_prompt_only(self.steps, "AblateActivations")
        dims = check_dims(self.dims, context.tower(self.tower).d_model, self.tower)
        mask = selected_by(self, context, self.tokens)
        value = plain({"set": self.replacement, "clamp": self.value}.get(how))
        site, layers, out = check_site(self.site), context.layers(self.tower, self.layers), []
        for layer in () if context.step else layers:
            at = at_layer(mask, layer)
            if how == "mean":
                value = values.others(context.live(self.tower), at, "AblateActivations")
            given = {"mask": at, "dims": dims, "how": how, "value": value}
            given["layout"] = context.layout(self.tower)
            out.append(Edit(Site(self.tower, site, layer), kernels.edit_channels, given))
        return out

    def check_fits(self, lvlm: Model) -> None:
        """Refuse a number that the model's dtype does not know."""
        dtype = dtype_of(lvlm.module.get_submodule(lvlm.anatomy.tower(self.tower).blocks[0]))
        for name in ("replacement", "value"):
            number, most = getattr(self, name), torch.finfo(dtype).max
            if is_number(number) and abs(number) > most:
                raise InterventionError(
                    f"Got {name}={number!r} for a model in {str(dtype).removeprefix('torch.')}; "
                    f"expected at most {most:g} in magnitude, the largest number of that dtype."
                )


@dataclass(frozen=True, eq=False)
class PatchActivations(BaseEdit, needs="patches"):
    """Put states or values of another run in place: the causal test of what tokens carry.

    The donor's prompt must have the shape of this one's, such as the same question about another image of the
    same size. With ``site="values"`` the attended tokens stay and what is read from them is the donor's; the
    cache keeps the model's own values, so ``steps="prefill"`` edits the prompt's pass only. States stay in
    the cache, so for them ``"all"`` and ``"prefill"`` are the same.

    Args:
        from_run: A run of the other prompt (or ``out.steps[0]`` of a generation) whose probes
            include one `ResidualStates` (for values, `AttentionValues`) of this tower, site and these
            layers; or that probe's result; or a float tensor ``[batch layer pos d_model]`` (for
            values ``[batch layer kv_head pos d_head]``) of exactly the layers given here. A donor of
            one row serves all rows, if none is padded.
        site: ``"resid_pre"``, ``"attn_out"``, ``"mlp_out"``, ``"resid_post"`` or ``"values"``.
        layers: As for the rest see `MaskKeys`.
    """

    heads = queries = None  # values are patched for all of them

    from_run: Any
    site: str
    tokens: Selection
    layers: Any = None
    steps: str = field(default="all", kw_only=True)

    def edits(self, context: Context) -> list[Edit]:
        """One edit per layer."""
        site, sites = self.site, values.PATCH_SITES
        if not isinstance(site, str):
            raise InterventionError(
                f"Got a site of type {type(site).__name__}; expected one of {sites}. Write "
                "ss.PatchActivations(from_run, site, tokens, layers)."
            )
        check_choice(sites, error=InterventionError, site=site)
        if site != values.VALUES:
            base.check_prompt_only(self.steps, "PatchActivations of states")
        layers = context.layers(self.tower, self.layers)
        mask = selected_by(self, context, self.tokens)
        donor = values.donated(self.from_run, context, self.tower, site, layers)
        if site == values.VALUES:
            return values.value_edits(self, context, donor, mask)
        values.check_finite(donor, mask, layers, 2)
        edits, layout = [], context.layout(self.tower)
        for layer, one in () if context.step else zip(layers, donor.unbind(1), strict=True):
            given = {"mask": at_layer(mask, layer), "donor": one.nan_to_num(), "layout": layout}
            edits.append(Edit(Site(self.tower, site, layer), kernels.edit_states, given))
        return edits


@dataclass(frozen=True, eq=False)
class ScaleTokens(BaseEdit, needs="embeddings"):
    """Multiply image tokens as they enter the LLM (the ReW weights of DIYSink, 2510.08510).

    RMSNorm removes most of a token's scale inside the first block, so what changes is how much the token
    weighs against what the blocks add to it. ``tokens`` are usually ``trace.v_sinks`` or image tokens.
    """

    tokens: Selection
    factor: float

    def edits(self, context: Context) -> list[Edit]:
        """One edit of the embeddings."""
        base.check_tower(self, "language")
        factor = base.check_factor("factor", self.factor)
        base.check_neutral(self, factor)
        base.check_prompt_only(self.steps, "ScaleTokens")
        mask = selected_by(self, context, self.tokens)
        given = {"mask": at_layer(mask, 0) & (factor != 1.0), "factor": factor}
        edit = Edit(Site("language", "resid_pre", 0), kernels.scale_states, given)
        return [] if context.step else [edit]


@dataclass(frozen=True, eq=False)
class SinkToFront(BaseEdit, needs="embeddings"):
    """Move image tokens to the start of their image block (sink-to-the-front, DIYSink 2510.08510).

    The embeddings are reordered, the moved tokens in their old order. The LLM's positions stay: a moved token
    takes the position, and so the RoPE angle, of its new place. There is no live rule here: tokens move
    before the first block, so which ones must be known before the pass.
    """

    tokens: Selection

    def edits(self, context: Context) -> list[Edit]:
        """One edit of the embeddings."""
        base.check_tower(self, "language")
        base.check_prompt_only(self.steps, "SinkToFront")
        mask, image = at_layer(selected_by(self, context, self.tokens), 0), context.tokens.image
        if (mask & (image < 0)).any():
            raise InterventionError(
                "Got text tokens to move to the front; expected image tokens only. Write "
                "tokens & (sample.tokens.image >= 0)."
            )
        if context.step:
            return []
        order = torch.arange(mask.shape[1]).repeat(mask.shape[0], 1)
        for b, row in enumerate(mask):
            for index in range(int(image[b].max()) + 1):
                block = (image[b] == index).nonzero().flatten()
                order[b, block] = torch.cat([block[row[block]], block[~row[block]]])
        return [Edit(Site("language", "resid_pre", 0), kernels.permute_states, {"order": order})]
