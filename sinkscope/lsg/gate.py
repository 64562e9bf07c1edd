"""LSG: a small gate that reads one state and scales visual keys one block later (2604.03316)."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sinkscope.detectors.calibrate import calibrate
from sinkscope.detectors.constants import known_for
from sinkscope.detectors.rules import NoSinks
from sinkscope.errors import InputError, InterventionError, LayerError, NoEffectError
from sinkscope.interventions.protocol import Edit
from sinkscope.kernels import gating as kernels
from sinkscope.lsg.config import (
    GateConfig,
    describe,
    differences,
    fingerprint,
    rule_of,
    same_weights,
    sketch,
)
from sinkscope.sites import Site, Tower

if TYPE_CHECKING:
    from sinkscope.lsg.attach import Attachment
    from sinkscope.models.anatomy import Anatomy
    from sinkscope.models.context import Context
    from sinkscope.models.lvlm import LVLM
    from sinkscope.models.prepare import Sample

CALIBRATION_IMAGES = 6


class LSG(nn.Module):
    """Layer-wise Sink Gating (Choi et al. 2604.03316): a module and an intervention in one.

    ``rho = scale * softmax(W2 act(W1 LayerNorm(h)))`` of the state ``h`` that block ``layer`` writes
    at the last prompt token; in block ``layer + 1`` the key of every image token is multiplied by
    the coefficient of its group, after RoPE and any k-norm, for all heads and queries. The cache
    stays clean. The gate computes in fp32 whatever the model's dtype.

    Usually made by `for_model`. Use it in a list of interventions, alone or with others (a stack is a
    list of gates), or `attach` it to a plain ``transformers`` model.

    Args:
        config: The choices, see `GateConfig`.
        allow_noop: Whether a run in which nothing is scaled (no image, neutral coefficients) is fine.
    """

    tower: Tower = "language"

    def __init__(self, config: GateConfig, *, allow_noop: bool = False) -> None:
        super().__init__()
        self.config = config
        self.allow_noop = allow_noop
        generator = torch.Generator().manual_seed(config.seed)
        width, hidden, many = config.d_model, config.hidden, len(config.groups)
        self.norm = nn.LayerNorm(width, elementwise_affine=config.affine)
        self.inner = nn.Linear(width, hidden)
        self.outer = nn.Linear(hidden, many)
        with torch.no_grad():
            bound = width**-0.5
            for tensor in (self.inner.weight, self.inner.bias):
                tensor.uniform_(-bound, bound, generator=generator)
            self.outer.weight.zero_()
            self.outer.bias.zero_()

    @classmethod
    def for_model(
        cls,
        lvlm: LVLM,
        layer: int | str,
        *,
        v_detector: Any = None,
        l_detector: Any = None,
        samples: Sequence[Sample] | None = None,
        allow_noop: bool = False,
        **choices: Any,
    ) -> LSG:
        """An untrained gate for a model.

        Args:
            lvlm: The model.
            layer: The block whose output is read, or ``"embed"``; keys are scaled in the next one.
            v_detector: The rule for V-sinks; None for published constants of this model, else a
                calibration on ``samples``.
            l_detector: The rule for L-sinks, if there is such a group; None likewise.
            samples: What to calibrate on; None draws six scenes. Never those you test on.
            allow_noop: See the class.
            choices: Further fields of `GateConfig`: groups, signal, decode, init, scale, hidden,
                activation, affine, seed.

        Returns:
            The gate. With ``init="uniform"`` it is no identity: every coefficient is one over the
            number of groups.

        Raises:
            LayerError: If there is no such block, or none behind it.
            DetectorError: If a rule cannot run inside a pass.
            InterventionError: If a choice is impossible.
        """
        anatomy = lvlm.anatomy
        where = check_layer(layer, anatomy.language.n_layers)
        groups = tuple(choices.get("groups", ("V", "rest")))
        v_rule, l_rule = choose_rules(lvlm, v_detector, l_detector, "L" in groups, samples)
        scale = choices.get("scale", 1.0)
        if choices.get("init") == "neutral":
            if scale != 1.0:
                raise InterventionError(
                    f"Got init='neutral' and scale={scale}; expected one of them. Neutral "
                    "coefficients need a scale of as many as there are groups."
                )
            scale = float(len(groups))
        made = {**choices, "groups": groups, "scale": scale}
        strange = sorted(set(made) - set(GateConfig.__dataclass_fields__))
        if strange:
            raise InterventionError(
                f"Got {strange} for a gate; expected fields of GateConfig, "
                f"{sorted(GateConfig.__dataclass_fields__)}."
            )
        config = GateConfig(
            layer=where,
            d_model=anatomy.language.d_model,
            v_detector=describe(v_rule),
            l_detector=None if l_rule is None else describe(l_rule),
            model=fingerprint(anatomy),
            weights=sketch(lvlm.module, anatomy.head),
            **made,
        )
        if config.edited not in anatomy.language.attending:
            anatomy.language.call(config.edited)
        return cls(config, allow_noop=allow_noop).to(lvlm.device if not _meta(lvlm) else "cpu")

    @property
    def steps(self) -> str:
        """``"prefill"`` if decode steps are left alone, else ``"all"``."""
        return "prefill" if self.config.decode == "off" else "all"

    @property
    def layer(self) -> int | str:
        """The block it reads."""
        return self.config.layer

    @property
    def groups(self) -> tuple[str, ...]:
        """The names of its coefficients."""
        return self.config.groups

    @property
    def weights(self) -> dict[str, Any]:
        """Its tensors under the names of `sinkscope.kernels.gating.coefficients`."""
        return {
            "norm_weight": self.norm.weight,
            "norm_bias": self.norm.bias,
            "in_weight": self.inner.weight,
            "in_bias": self.inner.bias,
            "out_weight": self.outer.weight,
            "out_bias": self.outer.bias,
        }

    def forward(self, states: Tensor) -> Tensor:
        """The coefficients for states.

        Args:
            states: Float ``[batch d_model]``: what the gate reads.

        Returns:
            Float ``[batch group]`` in fp32; they sum to ``scale``.
        """
        return kernels.coefficients(
            states, **self.weights, activation=self.config.activation, scale=self.config.scale
        )

    def edits(self, context: Context) -> list[Edit]:
        """Two or three looks and one edit of keys.

        Raises:
            InterventionError: If it was made for another model.
            NoEffectError: If the sample has no image token.
        """
        self.check_model(context.anatomy)
        if context.step and self.config.decode == "off":
            return []
        looks = self.looks(context.tokens, context.step)
        visual = context.tokens.image >= 0
        if not visual.any() and not self.allow_noop:
            raise NoEffectError(
                "Got a sample without image tokens for a gate; expected some keys to scale. Write "
                "allow_noop=True if nothing may happen."
            )
        parameters = {
            "slot": id(self),
            "visual": visual,
            "live": context.live("language"),
            "groups": list(self.groups),
        }
        site = Site("language", "attention", self.config.edited)
        return [*looks, Edit(site, kernels.gate_keys, parameters, "keys")]

    def looks(self, tokens: Any, step: int = 0) -> list[Edit]:
        """What it looks at in one pass, as edits that change nothing.

        Args:
            tokens: The sample's TokenMap.
            step: 0 for the prompt; later the signal only, if it is refreshed.
        """
        config, out = self.config, []
        if step and config.decode != "refresh":
            return []
        vision, live = tokens.vision, tokens.live
        if not step:
            shared = {"slot": id(self), "image_index": tokens.image_index}
            shared |= {"sources": tokens.sources, "live": vision.live, "layout": vision.layout}
            rule = rule_of(config.v_detector)
            out += [
                Edit(
                    Site("vision", "resid_post", layer),
                    kernels.note_v_sinks,
                    {**shared, "rule": rule},
                )
                for layer in config.model["feed_layers"]
            ]
        reading = {
            "slot": id(self),
            "signal": "last" if config.signal == "last" else "mean",
            "at": tokens.last,
            "tokens": live if config.signal == "mean" else tokens.image >= 0,
            "activation": config.activation,
            "scale": config.scale,
            **self.weights,
        }
        place = ("resid_pre", 0) if isinstance(config.layer, str) else ("resid_post", config.layer)
        out.append(Edit(Site("language", *place), kernels.note_coefficients, reading))
        if not step and config.l_detector is not None:
            parameters = {"slot": id(self), "rule": rule_of(config.l_detector), "live": live}
            site = Site("language", "resid_pre", config.edited)
            out.append(Edit(site, kernels.note_l_sinks, parameters))
        return out

    def check_model(self, anatomy: Anatomy) -> None:
        """Refuse a model that the gate was not made for.

        Raises:
            InterventionError: If so, with the differences.
        """
        lines = differences(self.config.model, fingerprint(anatomy))
        if lines:
            listed = "\n  ".join(lines)
            raise InterventionError(
                f"Got a gate made for another model; expected one of this model's.\n  {listed}\n"
                f"Write ss.LSG.for_model(lvlm, layer={self.layer!r}) and train it."
            )

    def check_fits(self, lvlm: LVLM) -> None:
        """As `check_model`, and compare a few weights where they are here.

        Raises:
            InterventionError: If the model is another one.
        """
        self.check_model(lvlm.anatomy)
        self.check_weights(lvlm.module, lvlm.anatomy)

    def check_weights(self, module: nn.Module, anatomy: Anatomy) -> None:
        """Refuse another checkpoint of the same architecture.

        Raises:
            InterventionError: If the LM head's weights are others.
        """
        if not same_weights(self.config.weights, sketch(module, anatomy.head)):
            raise InterventionError(
                "Got a gate made for other weights of this architecture (the LM heads differ); "
                "expected the checkpoint it was made for. If you mean it, write "
                "gate = gate.adopt(lvlm), and know that it reads a stream it was not trained on."
            )

    def adopt(self, lvlm: LVLM) -> LSG:
        """The same gate for other weights of the same architecture; parameters are copied.

        Raises:
            InterventionError: If the architecture differs.
        """
        self.check_model(lvlm.anatomy)
        config = replace(self.config, weights=sketch(lvlm.module, lvlm.anatomy.head))
        out = LSG(config, allow_noop=self.allow_noop).to(lvlm.device)
        out.load_state_dict(self.state_dict())
        return out

    def tolerant(self) -> LSG:
        """The same gate, sharing its parameters, for which touching nothing is fine."""
        out = copy.copy(self)
        out.allow_noop = True
        return out

    def attach(self, model: Any) -> Attachment:
        """Gate a plain ``transformers`` model, without nnsight.

        ::

            with gate.attach(hf_model):
                hf_model.generate(**inputs)

        Args:
            model: The ``transformers`` model, or an LVLM.

        Returns:
            What to ``detach()``, also a context manager.

        Raises:
            InterventionError: If the gate was made for another model or is attached to it already.
        """
        from sinkscope.lsg.attach import attach

        return attach(self, model)

    def detach(self) -> None:
        """End every attachment of this gate; the model is then bitwise itself.

        Raises:
            InterventionError: If it is attached to nothing.
        """
        from sinkscope.lsg.attach import detach

        detach(self)

    def extra_repr(self) -> str:
        """What stands in ``repr``."""
        c = self.config
        return f"layer={c.layer!r}, groups={c.groups}, decode={c.decode!r}, scale={c.scale:g}"


def check_layer(layer: Any, n_layers: int) -> int | str:
    """The block a gate reads: ``"embed"`` or an index with a block behind it.

    Raises:
        LayerError: If there is none.
    """
    if layer == "embed":
        return "embed"
    whole = isinstance(layer, int) and not isinstance(layer, bool)
    if not whole or not 0 <= layer < n_layers - 1:
        raise LayerError(
            f"Got layer={layer!r} for a gate in a decoder of {n_layers} blocks; expected 'embed' or "
            f"0 to {n_layers - 2}: a gate at block l scales keys in block l + 1."
        )
    return layer


def choose_rules(
    lvlm: LVLM, v: Any, low: Any, wants_l: bool, samples: Sequence[Sample] | None
) -> tuple[Any, Any]:
    """The rules of a gate: given, published constants, else a calibration.

    Raises:
        InputError: If a calibration is needed and there is no processor and no sample.
        InterventionError: If a rule for L-sinks came without such a group.
    """
    if low is not None and not wants_l:
        raise InterventionError(
            f"Got l_detector={low!r} for a gate without an L group; expected none. Write "
            "groups=('V', 'L', 'rest')."
        )
    known = known_for(lvlm)
    if known is not None and known.default:
        v, low = v or known.v_detector, low or (known.l_detector if wants_l else None)
    if v is None or (wants_l and low is None):
        found = calibrate(lvlm, samples or drawn_samples(lvlm))
        v, low = v or found.v_detector, low or (found.l_detector if wants_l else None)
    return v or NoSinks(), low


def drawn_samples(lvlm: LVLM) -> list[Sample]:
    """Six drawn scenes, as samples of any model with a processor."""
    from sinkscope.bundled.scenes import VALIDATION_SEEDS, draw_scene

    if lvlm.processor is None:
        raise InputError(
            "Got a model without published constants and without a processor; expected a rule for "
            "V-sinks. Write ss.LSG.for_model(lvlm, layer, v_detector=ss.detectors.Norm(100.0)) or "
            "samples=[...]."
        )
    seeds = VALIDATION_SEEDS[:CALIBRATION_IMAGES]
    return [lvlm.prepare(draw_scene(seed).image, "describe the image") for seed in seeds]


def _meta(lvlm: LVLM) -> bool:
    """Whether the model has no weights here."""
    return lvlm.device.type == "meta"


def check_gates(gates: Any) -> list[LSG]:
    """Gates as a list.

    Raises:
        InterventionError: If something else came.
    """
    out = [gates] if isinstance(gates, LSG) else list(gates)
    if not out or not all(isinstance(gate, LSG) for gate in out):
        raise InterventionError(f"Got {gates!r}; expected one LSG or a list of them.")
    return out


def by_name(gate: LSG, values: Tensor) -> Mapping[str, float]:
    """Coefficients ``[group]`` by the names of their groups."""
    return dict(zip(gate.groups, values.tolist(), strict=True))
