"""What can be measured and edited on a tower: a rule per kind, by what it needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch

from sinkscope.interventions.protocol import needs_a_mask
from sinkscope.models.anatomy import TowerAnatomy
from sinkscope.models.branches import Branch, NoBranch
from sinkscope.models.source import NoAttentionCall

Status = Literal["exact", "approximate", "unavailable"]
Judged = tuple[Status, str]
MASS_TOLERANCE = MappingProxyType({torch.bfloat16: "6e-3", torch.float16: "1e-3"})
"""How far group masses in half precision lie from those in fp32."""


@dataclass(frozen=True)
class Verdict:
    """Whether a probe or an intervention works on a tower of a model.

    Attributes:
        name: The probe or intervention.
        tower: ``"vision"`` or ``"language"``.
        status: ``"exact"``, ``"approximate"`` or ``"unavailable"``.
        why: The reason, or what to know; may be empty.
    """

    name: str
    tower: str
    status: Status
    why: str = ""


def of_states(tower: TowerAnatomy, dtype: torch.dtype) -> Judged:
    """Probes and edits of the residual stream, in fp32: at sites within a block where these exist."""
    missing = tower.n_layers - len(tower.adding)
    if not missing:
        return "exact", ""
    where = f" in {missing} of {tower.n_layers} blocks" if tower.adding else ""
    return "exact", f"without attn_out and mlp_out{where}: {no_sites(tower)}"


def of_the_head(tower: TowerAnatomy, dtype: torch.dtype) -> Judged:
    """Probes that need the LM head."""
    if tower.tower == "vision":
        return "unavailable", "the vision tower has no LM head"
    return "exact", ""


def of_attention(tower: TowerAnatomy, dtype: torch.dtype) -> Judged:
    """Probes that read the attention call: its tensors as the model made them."""
    if not tower.attending:
        return "unavailable", reason_of(tower)
    missing = tower.n_layers - len(tower.attending)
    if missing:
        return "exact", f"on {len(tower.attending)} of {tower.n_layers} blocks: {reason_of(tower)}"
    return "exact", ""


def of_the_call(tower: TowerAnatomy, dtype: torch.dtype) -> Judged:
    """Probes that ask the attention call again, in the model's dtype."""
    status, why = of_attention(tower, dtype)
    if status == "unavailable":
        return status, why
    if tower.learned_sink:
        why = join(why, "a learned sink takes a share: masses sum to less than 1")
    if dtype in MASS_TOLERANCE:
        rounding = f"rounded to {str(dtype).removeprefix('torch.')}, about {MASS_TOLERANCE[dtype]}"
        return "approximate", join(why, rounding)
    return "exact", why


def of_contributions(tower: TowerAnatomy, dtype: torch.dtype) -> Judged:
    """Probes that follow what heads write into the stream."""
    status, why = of_the_call(tower, dtype)
    missing = len(tower.attending) - len(tower.writing)
    if status == "unavailable" or not missing:
        return status, why
    reason = "no output projection was found"
    if len(tower.adding) < tower.n_layers:
        reason = no_sites(tower)
    if not tower.writing:
        return "unavailable", reason
    return status, join(why, f"not in {missing} of {tower.n_layers} blocks: {reason}")


def of_head_writes(tower: TowerAnatomy, dtype: torch.dtype) -> Judged:
    """As `of_contributions`, without what a norm makes of a query."""
    status, why = of_contributions(tower, dtype)
    ways = tower.attention_out
    if status != "unavailable" and any(isinstance(way, Branch) and way.norm for way in ways):
        why = join(why, "norms are without what the norm after attention divides a query by")
    return status, why


def of_masses(tower: TowerAnatomy, dtype: torch.dtype) -> Judged:
    """As `of_the_call`, with fp32 on request."""
    status, why = of_the_call(tower, dtype)
    if status == "approximate" and "flash" not in tower.kernel:
        why = join(why, "precision='float32' is exact")
    return status, why


def of_gradients(tower: TowerAnatomy, dtype: torch.dtype) -> Judged:
    """Probes that take the gradient of the attention call in fp32."""
    status, why = of_attention(tower, dtype)
    if status == "unavailable":
        return status, why
    if "flash" in tower.kernel:
        return "unavailable", f"{tower.kernel} has no fp32 gradient: load with 'sdpa' or 'eager'"
    if tower.heads // tower.kv_heads > tower.d_head:
        shared = f"{tower.heads // tower.kv_heads} heads share a key-value head of {tower.d_head}"
        return "unavailable", f"{shared} dimensions"
    if tower.learned_sink:
        why = join(why, "a learned sink takes a share: rows sum to less than 1")
    return "exact", why


JUDGES: MappingProxyType[str, Callable[[TowerAnatomy, torch.dtype], Judged]] = MappingProxyType(
    {
        "AttentionMass": of_masses,
        "AttentionPatterns": of_gradients,
        "ReceivedAttention": of_gradients,
        "SinkEvidence": of_gradients,
        "ContributionNorms": of_contributions,
        "HeadWrites": of_head_writes,
        "ValueNorms": of_attention,
        "AttentionValues": of_attention,
        "MassiveActivations": of_states,
        "TokenNorms": of_states,
        "SinkDimensionScores": of_states,
        "CosineToFirst": of_states,
        "ChannelValues": of_states,
        "GroupMeans": of_states,
        "ResidualStates": of_states,
        "LogitLens": of_the_head,
    }
)
"""Every public probe and what decides whether it works."""


def of_weights(tower: TowerAnatomy, dtype: torch.dtype) -> Judged:
    """Edits of keys, values and weights: the model's own call on other tensors."""
    status, why = of_attention(tower, dtype)
    if status == "unavailable":
        return status, why
    if dtype in MASS_TOLERANCE:
        rounding = f"what is edited is rounded to {str(dtype).removeprefix('torch.')}"
        return "approximate", join(why, rounding)
    return "exact", why


def of_bias(tower: TowerAnatomy, dtype: torch.dtype) -> Judged:
    """Edits that ride as a bias in extra head dimensions, or as an explicit mask."""
    status, why = of_weights(tower, dtype)
    reason = needs_a_mask(tower)
    if status == "unavailable" or not reason:
        return status, why
    if "flash" in tower.kernel:
        return "unavailable", f"{tower.kernel} takes no explicit mask, and {reason}"
    return status, join(why, f"by an explicit mask: {reason}")


def of_redistribution(tower: TowerAnatomy, dtype: torch.dtype) -> Judged:
    """Weights moved between keys: one call in which the others are masked."""
    status, why = of_bias(tower, dtype)
    if status != "unavailable" and tower.tower == "vision":
        why = join(why, "select and 'after image' on the decoder only")
    return status, why


def of_the_decoder(tower: TowerAnatomy, dtype: torch.dtype) -> Judged:
    """Edits of attention that are defined on the decoder only."""
    if tower.tower == "vision":
        return "unavailable", "defined on the decoder only"
    return of_weights(tower, dtype)


def of_gates(tower: TowerAnatomy, dtype: torch.dtype) -> Judged:
    """Gates: keys of the decoder scaled, by coefficients in fp32."""
    status, why = of_the_decoder(tower, dtype)
    if status == "unavailable":
        return status, why
    return status, join(why, "its rules judge every token by itself")


def of_eviction(tower: TowerAnatomy, dtype: torch.dtype) -> Judged:
    """The streaming baseline."""
    status, why = of_the_decoder(tower, dtype)
    if status == "unavailable":
        return status, why
    if "flash" in tower.kernel:
        return "unavailable", f"{tower.kernel} takes no mask that differs by query"
    return status, join(why, "by an explicit mask; positions keep their angle")


def of_embeddings(tower: TowerAnatomy, dtype: torch.dtype) -> Judged:
    """Edits of image tokens where they enter the decoder."""
    if tower.tower == "vision":
        return "unavailable", "image tokens are edited where they enter the decoder"
    return "exact", ""


def of_packed_values(tower: TowerAnatomy, dtype: torch.dtype) -> Judged:
    """Replacements of values: a packed tower has no row of its own per image."""
    status, why = of_weights(tower, dtype)
    if status != "unavailable" and tower.packed:
        why = join(why, "in a packed tower without 'mean' and 'resample'")
    return status, why


def of_patches(tower: TowerAnatomy, dtype: torch.dtype) -> Judged:
    """Patches: of states everywhere, of values where the attention call was found."""
    status, why = of_attention(tower, dtype)
    if status == "unavailable":
        why = f"unavailable: {why}"
    sites = of_states(tower, dtype)[1]
    return "exact", join(f"values {why}" if why else "", sites)


def of_registers(tower: TowerAnatomy, dtype: torch.dtype, feeds: tuple[int, ...] = (0,)) -> Judged:
    """Test-time registers.

    Args:
        tower: The tower.
        dtype: The model's dtype.
        feeds: The vision blocks that feed the projector.
    """
    if tower.tower == "language":
        return "unavailable", "a register is a token of the vision tower"
    if tower.packed:
        return "unavailable", "images share one sequence: registers have no place in it"
    if not all(tower.neurons):
        return "unavailable", "its MLPs have no last linear map, so no neurons"
    if len(feeds) > 1:
        return "unavailable", f"the projector reads several blocks, {feeds}"
    return "exact", ""


EDIT_JUDGES: MappingProxyType[str, Callable[[TowerAnatomy, torch.dtype], Judged]] = (
    MappingProxyType(
        {
            "MaskKeys": of_bias,
            "AttentionKnockout": of_bias,
            "ScaleKeys": of_weights,
            "ScaleAttention": of_bias,
            "Redistribute": of_redistribution,
            "EvictKeys": of_eviction,
            "AblateValues": of_packed_values,
            "AblateActivations": of_states,
            "PatchActivations": of_patches,
            "ScaleTokens": of_embeddings,
            "SinkToFront": of_embeddings,
            "TestTimeRegister": of_registers,
            "LSG": of_gates,
        }
    )
)
"""Every public intervention and what decides whether it works."""


def judge_edit(
    name: str, tower: TowerAnatomy, dtype: torch.dtype, feeds: tuple[int, ...]
) -> Judged:
    """The judgement on one intervention.

    Args:
        name: Its class.
        tower: The tower.
        dtype: The model's dtype.
        feeds: The vision blocks that feed the projector.
    """
    if name == "TestTimeRegister":
        return of_registers(tower, dtype, feeds)
    return EDIT_JUDGES[name](tower, dtype)


def reason_of(tower: TowerAnatomy) -> str:
    """Why a block's attention call was not found, in a few words."""
    found = next(call for call in tower.calls if isinstance(call, NoAttentionCall))
    return found.reason.partition(";")[0]


def no_sites(tower: TowerAnatomy) -> str:
    """Why what a block adds could not be read, in a few words."""
    found = next(way for way in tower.attention_out if isinstance(way, NoBranch))
    return found.reason.partition(";")[0]


def join(first: str, second: str) -> str:
    """Two remarks as one."""
    return "; ".join(remark for remark in (first, second) if remark)
