"""TestTimeRegister: an extra ViT token that takes over what register neurons do to patches."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pandas as pd
import torch
from torch import Tensor

from sinkscope.anatomy.context import Context
from sinkscope.checks import check_choice, check_whole, typed
from sinkscope.errors import InterventionError, ModelError
from sinkscope.interventions import base
from sinkscope.kernels import residual as kernels
from sinkscope.protocols import Edit, Model, Read
from sinkscope.results import Result
from sinkscope.sites import Site, Tower
from sinkscope.tokens import Selection


@dataclass(frozen=True, eq=False)
class NeuronResult(Result):
    """Mean activity of neurons over chosen tokens: float ``[image neuron]`` by layer."""

    activity: Mapping[int, Tensor]
    layers: tuple[int, ...]

    def to_dataframe(self) -> pd.DataFrame:
        """Columns image, layer, neuron, activity."""
        lines = [
            pd.DataFrame({"image": i, "layer": layer, "neuron": range(len(row)), "activity": row})
            for layer in self.layers
            for i, row in enumerate(self.activity[layer].tolist())
        ]
        return pd.concat(lines, ignore_index=True)


@dataclass(frozen=True, eq=False)
class NeuronActivity:
    """Mean ``|activation|`` of every MLP neuron of the ViT over chosen tokens (2506.08010).

    ``tokens`` are ViT tokens; usually the outliers, ``v_detection.at(layer)``.
    """

    tokens: Selection
    layers: Any = None
    tower: Tower = "vision"

    def reads(self, context: Context) -> list[Read]:
        """One read per layer."""
        mask = unpacked(context).flat("vision", self.tokens)
        return [
            Read(Site("vision", "mlp_hidden", layer), kernels.peak_neurons, {"mask": mask})
            for layer in context.layers("vision", self.layers)
        ]

    def finish(self, answers: Mapping[Site, Any], context: Context) -> NeuronResult:
        """By layer."""
        activity = {site.layer: answers[site] for site in sorted(answers)}
        return NeuronResult(activity, tuple(activity))


def unpacked(context: Context) -> Context:
    """The context, unless its vision tower is packed: ModelError."""
    if context.layout("vision") is not None:
        raise ModelError(
            "Got a packed vision tower (images share one sequence); expected one with a row per "
            "image, such as CLIP's or SigLIP's. Registers are not defined inside its windows."
        )
    return context


@typed
def find_register_neurons(
    lvlm: Model,
    samples: Sequence[Any],
    tokens: Sequence[Tensor],
    *,
    top_k: int = 10,
    max_layer: int | None = None,
) -> dict[int, list[int]]:
    """Find the neurons that are most active on outlier tokens: candidates for register neurons.

    A few ``samples`` with outliers do; ``tokens`` are the outliers of each, bool ``[image pos]`` over
    ViT tokens. Score: mean over images and outlier positions of ``|activation|`` (2506.08010, section 3).
    ``top_k`` is how many neurons in all (the paper uses 10 for CLIP-B and 45 for DINOv2-L), ``max_layer`` the
    last block to look at (outliers are made before they show), or None for all. Returns layer -> neuron
    indices.
    """
    check_whole(1, error=InterventionError, top_k=top_k)
    last = lvlm.anatomy.tower("vision").n_layers - 1
    if max_layer is not None:
        check_whole(0, last, error=InterventionError, max_layer=max_layer)
    if len(samples) != len(tokens):
        raise InterventionError(
            f"Got {len(samples)} samples and {len(tokens)} masks; expected one mask of ViT tokens each."
        )
    if not all(isinstance(mask, Tensor) for mask in tokens):
        raise InterventionError(
            f"Got tokens={repr(tokens)[:60]}; expected a list of masks, bool [image pos]."
        )
    if not any(bool(mask.any()) for mask in tokens):
        raise InterventionError(
            "Got no outlier token in any sample; expected some. Detect them first, for instance "
            "with ss.detect(lvlm, sample, ss.detectors.Norm('valley'), tower='vision')."
        )
    layers = list(range(1 + (last if max_layer is None else max_layer)))
    total: dict[int, Tensor] = dict.fromkeys(layers, torch.zeros(1))
    for sample, mask in zip(samples, tokens, strict=True):
        probe = NeuronActivity(mask, layers)
        found = lvlm.run(sample, probes=[probe], logits="last")[probe].activity
        total = {at: total[at] + found[at][mask.any(dim=1)].sum(0) for at in layers}
    ranked = sorted((x, at, i) for at in layers for i, x in enumerate(total[at].tolist()))
    out: dict[int, list[int]] = {}
    for _, layer, neuron in ranked[::-1][:top_k]:
        out.setdefault(layer, []).append(neuron)
    return out


@dataclass(frozen=True, eq=False)
class TestTimeRegister(base.BaseEdit, needs="registers"):
    """Add a register to a trained ViT: outliers move from patches to an extra token (2506.08010).

    A zero token is appended before the first block; in the given blocks the register neurons fire there
    instead of on the patches; behind the last block that feeds the projector the token is dropped, so the LLM
    never sees it. Other probes of the vision tower would see one position more per register and are refused
    in the same pass; probes of the decoder work.

    Paper and released code (nickjiang2378/test-time-registers) differ in ``cls`` and ``peak``: the defaults
    are the paper's, ``TestTimeRegister(neurons, cls="keep", peak="layer")`` is the code's. In CLIP the code
    puts the zero token before the norm in front of the blocks; here it comes behind that.

    Args:
        neurons: Layer -> register neurons, from `find_register_neurons`.
        scale: Factor on the largest activation.
        fill: What the neurons do on the other tokens: ``"zero"``, ``"mean"`` (over these tokens) or
            ``"keep"``, what they did.
        cls: Whether CLS is one of these tokens. ``"zero"``: yes, as the paper writes it; CLS gets what a
            patch gets by ``fill``. ``"keep"``: no, as in the code; its neurons stay, and a mean is over the
            others. Without CLS in the tower both are the same.
        peak: Which activation is the largest. ``"neuron"``: each neuron's own, over all tokens but the
            registers, CLS included. ``"layer"``: one for all given neurons of a block, over all tokens and
            registers, as in the code.
    """

    __test__ = False
    changes_positions_of: ClassVar[str | None] = "vision"

    neurons: Mapping[int, Sequence[int]]
    count: int = 1
    scale: float = 1.0
    fill: str = "zero"
    cls: str = field(default="zero", kw_only=True)
    peak: str = field(default="neuron", kw_only=True)
    tower: Tower = field(default="vision", kw_only=True)

    def edits(self, context: Context) -> list[Edit]:
        """Append, shift in every given layer, drop."""
        base.check_tower(self, "vision")
        base.check_prompt_only(self.steps, "TestTimeRegister")
        scale = base.check_factor("scale", self.scale)
        check_choice(("zero", "mean", "keep"), error=InterventionError, fill=self.fill)
        check_choice(("zero", "keep"), error=InterventionError, cls=self.cls)
        check_choice(("neuron", "layer"), error=InterventionError, peak=self.peak)
        most = context.live("vision").shape[1]  # more would be no registers any longer
        check_whole(1, most, error=InterventionError, count=self.count)
        if not isinstance(self.neurons, Mapping) or not any(self.neurons.values()):
            raise InterventionError(
                f"Got neurons={self.neurons!r}; expected a dict of layers and neuron indices, from "
                "find_register_neurons(...)."
            )
        layers = unpacked(context).layers("vision", list(self.neurons))
        *before, last = context.anatomy.reaching
        if before:
            raise ModelError(
                f"The projector reads blocks {(*before, last)}; expected one. Registers would reach it "
                "through the earlier ones."
            )
        if "flex" in context.tower("vision").kernel:
            raise InterventionError(
                "Got TestTimeRegister under flex attention, whose masks are made for the tokens of the image; "
                "expected another kernel. Write lvlm.module.set_attn_implementation('sdpa')."
            )
        count = context.tower("vision").d_mlp
        if not count:
            raise ModelError(
                "The vision tower's MLPs end in no linear map; expected one, whose inputs are the "
                "neurons. Registers need neurons."
            )
        if layers[-1] > last:
            raise InterventionError(
                f"Got register neurons in block {layers[-1]}; expected blocks up to {last}, the one "
                "that feeds the projector."
            )
        if context.step:
            return []
        keep = {"live": context.live("vision"), "count": self.count}
        out = [Edit(Site("vision", "resid_pre", 0), kernels.append_tokens, keep)]
        shift: dict[str, Any] = {**keep, "scale": scale, "fill": self.fill}
        shift["shared"] = self.peak == "layer"
        if self.cls == "keep":
            shift["live"] = keep["live"] & ~context.select("vision", "cls")
        for at in layers:
            name, hint = f"neuron of vision block {at}", "Write what find_register_neurons gives."
            neurons = base.check_indices(self.neurons[at], count, name, hint)
            given = {**shift, "neurons": neurons}
            out.append(Edit(Site("vision", "mlp_hidden", at), kernels.shift_neurons, given))
        drop = {**keep, "count": -self.count}
        return [*out, Edit(Site("vision", "resid_post", last), kernels.append_tokens, drop)]
