"""LSG: a small gate that reads one state and scales visual keys one block later (2604.03316)."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sinkscope.anatomy.context import Context
from sinkscope.anatomy.towers import Anatomy
from sinkscope.bundled.scenes import VALIDATION_SEEDS, draw_scene
from sinkscope.checks import typed
from sinkscope.detectors.calibration import Limits
from sinkscope.detectors.choice import SinkRules, check_kept, describe
from sinkscope.detectors.rules import NoSinks
from sinkscope.errors import InputError, InterventionError, ModelError, NoEffectError
from sinkscope.interventions.application import Edited
from sinkscope.kernels import gating as kernels
from sinkscope.lsg import loading, saving
from sinkscope.lsg.attach import ATTACHED, Attachment
from sinkscope.lsg.config import GateConfig, check_layer, differences, sketch
from sinkscope.lsg.passes import signals_of
from sinkscope.models.inputs import Sample
from sinkscope.models.loading import sizes_of
from sinkscope.models.lvlm import LVLM
from sinkscope.protocols import Edit
from sinkscope.sites import Site, Tower

CHOICES = ["groups", "signal", "decode", "init", "scale", "hidden", "activation", "affine", "seed"]
"""Fields of `GateConfig` that are free; the others follow from the model and the arguments."""


class LSG(nn.Module):
    """Layer-wise Sink Gating (Choi et al. 2604.03316), as a module and as an intervention.

    ``rho = scale * softmax(W2 act(W1 LayerNorm(h)))``, in fp32, of the state ``h`` that block ``layer``
    writes at the last prompt token. In block ``layer + 1`` the key of every image token is multiplied
    by the coefficient of its group, after RoPE and any k-norm, for all heads and queries; the cache
    stays clean. Made by `for_model`; used in a list of interventions, or by `attach`.

    ``allow_noop`` allows a run in which nothing is scaled (no image, neutral coefficients). ``record`` says
    how the gate was trained, if that is known, and is saved with it. ``layer`` and ``groups`` are those of
    ``config``; ``steps`` is ``"prefill"`` if decode steps are left alone, else ``"all"``.
    """

    needs: ClassVar[str] = "gates"
    tower: Tower = "language"

    def __init__(self, config: GateConfig, *, allow_noop: bool = False) -> None:
        super().__init__()
        self.config, self.allow_noop = config, allow_noop
        self.layer, self.groups = config.layer, config.groups
        self.steps = "prefill" if config.decode == "off" else "all"
        self.record: Mapping[str, Any] | None = None
        generator = torch.Generator().manual_seed(config.seed)
        self.norm = nn.LayerNorm(config.d_model, elementwise_affine=config.affine)
        self.inner = nn.Linear(config.d_model, config.hidden)
        self.outer = nn.Linear(config.hidden, len(config.groups))
        with torch.no_grad():
            bound = config.d_model**-0.5
            for tensor in self.inner.parameters():
                tensor.uniform_(-bound, bound, generator=generator)
            for tensor in self.outer.parameters():
                tensor.zero_()

    @classmethod
    @typed
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
        """Make an untrained gate for a model.

        LayerError if there is no such block or none behind it, DetectorError if a rule cannot run inside a
        pass, InterventionError if a choice is impossible.

        Args:
            layer: The block whose output is read, or ``"embed"``; keys are scaled in the next one.
            v_detector: The rule for V-sinks; None for published constants of this model, else a
                calibration on ``samples``. ``l_detector`` likewise, if there is a group of L-sinks.
            samples: What to calibrate on; None draws six scenes. Never those you test on.
            choices: Further fields of `GateConfig`: groups, signal, decode, init, scale, hidden,
                activation, affine, seed.
        """
        anatomy, module = lvlm.anatomy, lvlm.module
        where = check_layer(layer, anatomy.language.n_layers)
        anatomy.tower("vision")  # whose sinks are a group
        made = {"scale": 1.0, **choices, "groups": tuple(choices.get("groups", ("V", "rest")))}
        if l_detector is not None and "L" not in made["groups"]:
            what = f"Got l_detector={l_detector!r} for a gate without an L group; expected none."
            raise InterventionError(f"{what} Write groups=('V', 'L', 'rest').")
        others, low = partial(drawn, lvlm, samples), l_detector
        low = low if "L" in made["groups"] else NoSinks()
        rules = SinkRules.on_others(lvlm, others, v_detector, low, progress=None)
        l_rule: Any = rules.l_rule
        if isinstance(l_rule, Limits):
            l_rule = l_rule.at(0 if isinstance(where, str) else where + 1)
        check_kept(rules.v, anatomy, module.config)
        if made.get("init") == "neutral":
            if made["scale"] != 1.0:
                what = f"Got init='neutral' and scale={made['scale']}; expected one of them."
                raise InterventionError(f"{what} Neutral takes the number of groups as scale.")
            made["scale"] = float(len(made["groups"]))
        if strange := sorted(set(made) - set(CHOICES)):
            what = f"Got {strange} for a gate; expected fields of GateConfig that are free"
            raise InterventionError(f"{what}, {sorted(CHOICES)}.")
        config = GateConfig(
            layer=where,
            d_model=anatomy.language.d_model,
            v_detector=describe(rules.v),
            l_detector=describe(l_rule) if "L" in made["groups"] else None,
            model=sizes_of(anatomy),
            weights=sketch(module, anatomy.head),
            **made,
        )
        if config.edited not in anatomy.language.attending:
            anatomy.language.call(config.edited)
        gate = cls(config, allow_noop=allow_noop)
        return gate if lvlm.device.type == "meta" else gate.to(lvlm.device)

    @property
    def weights(self) -> dict[str, Any]:
        """The tensors under the names of `sinkscope.kernels.gating.coefficients`."""
        parts = (("norm", self.norm), ("in", self.inner), ("out", self.outer))
        return {f"{k}_{kind}": getattr(x, kind) for k, x in parts for kind in ("weight", "bias")}

    def forward(self, states: Tensor) -> Tensor:
        """Compute coefficients ``[batch group]``, which sum to ``scale``, of states ``[batch d_model]``."""
        how = {"activation": self.config.activation, "scale": self.config.scale}
        return kernels.coefficients(states, **self.weights, **how)

    def edits(self, context: Context) -> list[Edit]:
        """Give the signals to read and one edit of keys; NoEffectError without image tokens."""
        self.check_model(context.anatomy)
        if context.step and self.config.decode == "off":
            return []
        visual = context.tokens.image >= 0
        if not (visual.any() or self.allow_noop):
            what = "Got a sample without image tokens for a gate; expected some keys to scale."
            raise NoEffectError(f"{what} Write allow_noop=True if nothing may happen.")
        given = {"slot": id(self), "visual": visual, "live": context.live("language")}
        site = Site("language", "attention", self.config.edited)
        scale = Edit(site, kernels.gate_keys, given | {"groups": list(self.groups)}, "keys")
        return [*signals_of(self, context.tokens, context.step), scale]

    def check_model(self, anatomy: Anatomy) -> None:
        """Refuse another model than the gate's, as an InterventionError with the differences."""
        if lines := differences(self.config.model, sizes_of(anatomy)):
            listed = "\n  ".join(lines)
            what = f"Got a gate made for another model; expected one of this model's.\n  {listed}"
            raise InterventionError(f"{what}\nTrain ss.LSG.for_model(lvlm, layer={self.layer!r}).")

    def check_weights(self, module: nn.Module, anatomy: Anatomy) -> None:
        """Refuse the LM head of another checkpoint with an InterventionError; unknown ones pass."""
        known, found = torch.tensor(self.config.weights), torch.tensor(sketch(module, anatomy.head))
        if not len(known) or not len(found):
            return
        limit = float(known.std()) * 1e-2
        if known.shape != found.shape or not torch.allclose(known, found, rtol=2e-2, atol=limit):
            raise InterventionError(
                "Got a gate made for other weights of this architecture (the LM heads differ); "
                "expected the checkpoint it was made for. If you mean it, write "
                "gate = gate.adopt(lvlm), and know that it reads a stream it was not trained on."
            )

    def check_fits(self, lvlm: LVLM) -> None:
        """`check_model`, and `check_weights` where weights are here."""
        self.check_model(lvlm.anatomy)
        self.check_weights(lvlm.module, lvlm.anatomy)

    def adopt(self, lvlm: LVLM) -> LSG:
        """Copy the gate for other weights; an InterventionError if the architecture differs."""
        self.check_model(lvlm.anatomy)
        config = replace(self.config, weights=sketch(lvlm.module, lvlm.anatomy.head))
        out = LSG(config, allow_noop=self.allow_noop).to(lvlm.device)
        out.load_state_dict(self.state_dict())
        return out

    def allowing_noop(self) -> LSG:
        """Give the same gate, with the same parameters, which may also scale nothing."""
        out = copy.copy(self)
        out.allow_noop = True
        return out

    def attach(self, model: Any) -> Attachment:
        """Gate a plain ``transformers`` model, a ``PeftModel`` around it, or an LVLM, without nnsight.

        Call ``detach()`` on what it returns, or write ``with gate.attach(model):``. While attached, a pass
        that cannot be gated rightly, such as one on a cache that was filled before, is an InputError.
        """
        adapted = callable(getattr(type(model), "get_base_model", None))  # by peft
        module = model.get_base_model() if adapted else getattr(model, "module", model)
        if isinstance(model, Edited) or not isinstance(module, nn.Module):
            what = f"Got {type(model).__name__} to attach a gate to; expected an unedited model."
            raise ModelError(f"{what} Write gate.attach(lvlm), or lvlm.edited([gate, ...]).")
        if any(one.model is module for one in ATTACHED.get(self, [])):
            what = "Got a model that this gate is attached to already; expected it once."
            raise InterventionError(f"{what} Write gate.detach() first.")
        return Attachment(self, module)

    def detach(self) -> None:
        """End every attachment of this gate, or raise an InterventionError if there is none."""
        mine = list(ATTACHED.get(self, ()))
        if not mine:
            what = "Got a gate that is attached to nothing; expected gate.attach(model) before."
            raise InterventionError(what)
        for one in mine:
            one.detach()

    @typed
    def save_pretrained(
        self, folder: str | Path, *, record: Mapping[str, Any] | None = None
    ) -> None:
        """Write ``model.safetensors`` (fp32), ``config.json`` and a card; all of it or nothing.

        ``record``, plain data, says how the gate was trained; None is its own. The folder is new, empty or
        that of another gate, which is replaced; any other is a CheckpointError.
        """
        saving.write_folder(folder, saving.files_of(saved(self, record)), loading.FORMAT)

    @staticmethod
    @typed
    def from_pretrained(
        path_or_repo: str | Path,
        *,
        revision: str | None = None,
        subfolder: str = "",
        lvlm: LVLM | None = None,
        allow_noop: bool = False,
    ) -> LSG:
        """Load a gate from a folder, or a hub repository and its branch, tag or commit; no code is run.

        The gate is checked against ``lvlm`` now and put on its device; without, it is checked at first use.
        InterventionError if it was made for another model, else CheckpointError.
        """
        source = loading.source_of(path_or_repo, revision, subfolder)
        return loaded(loading.read_gate(source), lvlm, allow_noop)

    @typed
    def push_to_hub(
        self,
        repo: str,
        *,
        record: Mapping[str, Any] | None = None,
        private: bool | None = None,
        revision: str | None = None,
        token: str | None = None,
    ) -> str:
        """Put the files of `save_pretrained` into a hub repository; returns the address of the commit.

        The repository holds a gate or nothing and is made, ``private`` or not, if need be. ``revision`` is
        an existing branch, ``token`` None that of ``hf auth login``. CheckpointError if it cannot be written.
        """
        return saving.push_gate(repo, saved(self, record), private, revision, token)

    @staticmethod
    @typed
    def save_stack(
        gates: Sequence[LSG], folder: str | Path, *, record: Mapping[str, Any] | None = None
    ) -> None:
        """Write gates, in this order, into a sub-folder each, and the list into ``config.json``.

        ``record`` says how they were made together; each keeps its own besides. See `save_pretrained`.
        """
        saving.save_stack(folder, [saved(gate) for gate in check_gates(gates)], record)

    @staticmethod
    @typed
    def load_stack(
        path_or_repo: str | Path,
        *,
        revision: str | None = None,
        subfolder: str = "",
        lvlm: LVLM | None = None,
        allow_noop: bool = False,
    ) -> list[LSG]:
        """Load what `save_stack` wrote; see `from_pretrained`."""
        found = loading.read_stack(loading.source_of(path_or_repo, revision, subfolder))
        return [loaded(one, lvlm, allow_noop) for one in found]

    def extra_repr(self) -> str:
        """Name the choices in ``repr``."""
        c = self.config
        return f"layer={c.layer!r}, groups={c.groups}, decode={c.decode!r}, scale={c.scale:g}"


def drawn(lvlm: LVLM, samples: Sequence[Sample] | None) -> Sequence[Sample]:
    """The samples, or six drawn scenes for a model with a processor."""
    if samples or lvlm.processor is not None:
        scenes = (draw_scene(seed).image for seed in VALIDATION_SEEDS[:6])
        return samples or [lvlm.prepare(image, "describe the image") for image in scenes]
    what = "Got a model without published constants and without a processor"
    raise InputError(f"{what}; expected v_detector=ss.detectors.Norm(100.0), or samples=[...].")


def check_gates(gates: Any) -> list[LSG]:
    """One gate or several as a list; an InterventionError if something else came."""
    out = [gates] if isinstance(gates, LSG) else list(gates)
    if not out or not all(isinstance(gate, LSG) for gate in out):
        raise InterventionError(f"Got {gates!r}; expected one LSG or a list of them.")
    return out


def saved(gate: LSG, record: Mapping[str, Any] | None = None) -> loading.SavedGate:
    """A gate as plain data, with its own record if no other is given."""
    kept = gate.record if record is None else record
    return loading.SavedGate(gate.config, gate.state_dict(), kept)


def loaded(found: loading.SavedGate, lvlm: LVLM | None, allow_noop: bool) -> LSG:
    """The gate of saved data, on the device of the model; one that it was not made for is refused."""
    gate = LSG(found.config, allow_noop=allow_noop)
    gate.load_state_dict(found.tensors)
    gate.record = found.record
    if lvlm is None:
        return gate
    gate.check_fits(lvlm)
    if not (known := gate.config.weights) or not sketch(lvlm.module, lvlm.anatomy.head):
        why = "the model has none here" if known else "the gate knows none"
        text = f"The gate's sizes fit {lvlm.name!r}. Its weights were not compared: {why}."
        warnings.warn(text, UserWarning, stacklevel=3)
    return gate if lvlm.device.type == "meta" else gate.to(lvlm.device)
