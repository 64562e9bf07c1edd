"""LSG: a small gate that reads one state and scales visual keys one block later (2604.03316)."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from sinkscope.detectors.kinds import VisionTokens, kept_tokens
from sinkscope.errors import InterventionError, NoEffectError
from sinkscope.kernels import gating as kernels
from sinkscope.lsg import files
from sinkscope.lsg.building import config_for, device_for, refuse_other_model
from sinkscope.lsg.config import GateConfig, detector_of, rule_of, same_weights, sketch
from sinkscope.protocols import Edit
from sinkscope.sites import Site, Tower

if TYPE_CHECKING:
    from sinkscope.anatomy.context import Context
    from sinkscope.anatomy.towers import Anatomy
    from sinkscope.lsg.attach import Attachment
    from sinkscope.lsg.config import GateConfig
    from sinkscope.models.inputs import Sample
    from sinkscope.models.lvlm import LVLM


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

    Attributes:
        record: How it was trained, if that is known; saved with it.
    """

    needs: ClassVar[str] = "gates"

    tower: Tower = "language"

    def __init__(self, config: GateConfig, *, allow_noop: bool = False) -> None:
        super().__init__()
        self.config = config
        self.allow_noop = allow_noop
        self.record: Mapping[str, Any] | None = None
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
        config = config_for(lvlm, layer, v_detector, l_detector, samples, choices)
        return cls(config, allow_noop=allow_noop).to(device_for(lvlm))

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
        return looks_of(self.config, id(self), self.weights, tokens, step)

    def check_model(self, anatomy: Anatomy) -> None:
        """Refuse a model that the gate was not made for.

        Raises:
            InterventionError: If so, with the differences.
        """
        refuse_other_model(self.config, anatomy)

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

    def allowing_noop(self) -> LSG:
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
            model: The ``transformers`` model, a ``PeftModel`` around it, or an LVLM.

        Returns:
            What to ``detach()``, also a context manager.

        Raises:
            InterventionError: If the gate was made for another model or is attached to it already.
            InputError: While attached, for a pass that cannot be gated rightly, such as one on a cache
                that was filled before.
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

    def save_pretrained(
        self, folder: str | Path, *, record: Mapping[str, Any] | None = None
    ) -> None:
        """Write ``model.safetensors`` (fp32), ``config.json`` and a card; all of it or nothing.

        Args:
            folder: A new folder, an empty one, or one of another gate, which is replaced.
            record: How it was trained, such as ``result.record``: plain data, for the card and
                ``training.json``. None for the gate's own ``record``.

        Raises:
            CheckpointError: If the folder holds something else, or cannot be written.
            InputError: If the record is no plain data.
        """
        files.save_gate(self, folder, record)

    @staticmethod
    def from_pretrained(
        path_or_repo: str | Path,
        *,
        revision: str | None = None,
        subfolder: str = "",
        lvlm: LVLM | None = None,
        allow_noop: bool = False,
    ) -> LSG:
        """Load a gate. No code of the files is run.

        Args:
            path_or_repo: A folder, or a hub repository.
            revision: Branch, tag or commit of a repository.
            subfolder: A folder within.
            lvlm: The model to check it against now, on whose device it goes. Without one it is
                checked at its first use.
            allow_noop: See the class.

        Raises:
            CheckpointError: If files are missing, damaged or of something else.
            InterventionError: If it was made for another model, with the differences.
        """
        return files.load_gate(path_or_repo, revision, subfolder, lvlm, allow_noop)

    def push_to_hub(
        self,
        repo: str,
        *,
        record: Mapping[str, Any] | None = None,
        private: bool | None = None,
        revision: str | None = None,
        token: str | None = None,
    ) -> str:
        """Put the files of `save_pretrained` into a hub repository, which is made if need be.

        Args:
            repo: Such as ``"user/gate"``; it holds a gate or nothing.
            record: As in `save_pretrained`.
            private: Whether a new repository is private.
            revision: An existing branch; None for the main one.
            token: None for that of ``hf auth login``.

        Returns:
            The address of the commit.

        Raises:
            CheckpointError: Without network, login or permission.
        """
        return files.push_gate(self, repo, record, private, revision, token)

    @staticmethod
    def save_stack(
        gates: Sequence[LSG], folder: str | Path, *, record: Mapping[str, Any] | None = None
    ) -> None:
        """Write several gates into one folder: a sub-folder each, and the list in ``config.json``.

        Args:
            gates: The gates, in the order in which they apply.
            folder: As in `save_pretrained`.
            record: How they were made together; each keeps its own ``record`` besides.
        """
        files.save_stack(gates, folder, record)

    @staticmethod
    def load_stack(
        path_or_repo: str | Path,
        *,
        revision: str | None = None,
        subfolder: str = "",
        lvlm: LVLM | None = None,
        allow_noop: bool = False,
    ) -> list[LSG]:
        """Load what `save_stack` wrote; arguments and errors as in `from_pretrained`."""
        return files.load_stack(path_or_repo, revision, subfolder, lvlm, allow_noop)

    def extra_repr(self) -> str:
        """What stands in ``repr``."""
        c = self.config
        return f"layer={c.layer!r}, groups={c.groups}, decode={c.decode!r}, scale={c.scale:g}"


def looks_of(
    config: GateConfig, slot: int, weights: Mapping[str, Any], tokens: Any, step: int
) -> list[Edit]:
    """The looks of a gate.

    Args:
        config: The gate's choices.
        slot: Where in the run's memory it notes what it sees.
        weights: Its tensors, by the names of `sinkscope.kernels.gating.coefficients`.
        tokens: The sample's TokenMap.
        step: 0 for the prompt; later the signal only, if it is refreshed.
    """
    out = []
    if step and config.decode != "refresh":
        return []
    vision, live = tokens.vision, tokens.live
    if not step:
        shared = {"slot": slot, "image_index": tokens.image_index}
        shared |= {"sources": tokens.sources, "live": vision.live, "layout": vision.layout}
        detector, rule = detector_of(config.v_detector), rule_of(config.v_detector)
        if isinstance(detector, VisionTokens):
            shared["live"] = kept_tokens(tokens, detector.kind)
        out += [
            Edit(
                Site("vision", "resid_post", layer),
                kernels.note_v_sinks,
                {**shared, "rule": rule},
            )
            for layer in config.model["feed_layers"]
        ]
    reading = {
        "slot": slot,
        "signal": "last" if config.signal == "last" else "mean",
        "at": tokens.last,
        "tokens": live if config.signal == "mean" else tokens.image >= 0,
        "activation": config.activation,
        "scale": config.scale,
        **weights,
    }
    place = ("resid_pre", 0) if isinstance(config.layer, str) else ("resid_post", config.layer)
    out.append(Edit(Site("language", *place), kernels.note_coefficients, reading))
    if not step and config.l_detector is not None:
        rule = rule_of(config.l_detector)
        # A sink is judged by itself; random ones are so many of those whose keys can be scaled.
        judged = tokens.image >= 0 if rule["how"] == "random" else live
        parameters = {"slot": slot, "rule": rule, "live": judged}
        site = Site("language", "resid_pre", config.edited)
        out.append(Edit(site, kernels.note_l_sinks, parameters))
    return out
