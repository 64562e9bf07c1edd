"""LSG: a small gate that reads one state and scales visual keys one block later (2604.03316)."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sinkscope.anatomy.context import Context
from sinkscope.anatomy.towers import Anatomy
from sinkscope.errors import InterventionError, NoEffectError
from sinkscope.kernels import gating as kernels
from sinkscope.lsg import loading, saving
from sinkscope.lsg.attach import ATTACHED, Attachment, attach
from sinkscope.lsg.building import config_for, device_for
from sinkscope.lsg.config import GateConfig, differences, same_weights, sketch
from sinkscope.lsg.passes import signals_of
from sinkscope.models.inputs import Sample
from sinkscope.models.loading import sizes_of
from sinkscope.models.lvlm import LVLM
from sinkscope.protocols import Edit
from sinkscope.sites import Site, Tower


class LSG(nn.Module):
    """Layer-wise Sink Gating (Choi et al. 2604.03316), as a module and as an intervention.

    ``rho = scale * softmax(W2 act(W1 LayerNorm(h)))``, in fp32, of the state ``h`` that block ``layer``
    writes at the last prompt token. In block ``layer + 1`` the key of every image token is multiplied
    by the coefficient of its group, after RoPE and any k-norm, for all heads and queries; the cache
    stays clean. Made by `for_model`; used in a list of interventions, or by `attach`.

    Args:
        config: The choices.
        allow_noop: Whether a run in which nothing is scaled (no image, neutral coefficients) is fine.

    Attributes:
        record: How it was trained, if that is known; saved with it.
    """

    needs: ClassVar[str] = "gates"
    tower: Tower = "language"

    def __init__(self, config: GateConfig, *, allow_noop: bool = False) -> None:
        super().__init__()
        self.config, self.allow_noop = config, allow_noop
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

        Args:
            lvlm: The model.
            layer: The block whose output is read, or ``"embed"``; keys are scaled in the next one.
            v_detector: The rule for V-sinks; None for published constants of this model, else a
                calibration on ``samples``.
            l_detector: The rule for L-sinks, if there is such a group; None likewise.
            samples: What to calibrate on; None draws six scenes. Never those you test on.
            choices: Further fields of `GateConfig`: groups, signal, decode, init, scale, hidden,
                activation, affine, seed.

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
        parts = (("norm", self.norm), ("in", self.inner), ("out", self.outer))
        return {f"{k}_{kind}": getattr(x, kind) for k, x in parts for kind in ("weight", "bias")}

    def forward(self, states: Tensor) -> Tensor:
        """Coefficients fp32 ``[batch group]`` for states ``[batch d_model]``; they sum to ``scale``."""
        how = {"activation": self.config.activation, "scale": self.config.scale}
        return kernels.coefficients(states, **self.weights, **how)

    def edits(self, context: Context) -> list[Edit]:
        """The signals that the gate reads, and one edit of keys; a NoEffectError without image tokens."""
        self.check_model(context.anatomy)
        if context.step and self.config.decode == "off":
            return []
        visual = context.tokens.image >= 0
        if not (visual.any() or self.allow_noop):
            raise NoEffectError(
                "Got a sample without image tokens for a gate; expected some keys to scale. Write "
                "allow_noop=True if nothing may happen."
            )
        given = {"slot": id(self), "visual": visual, "live": context.live("language")}
        site = Site("language", "attention", self.config.edited)
        scale = Edit(site, kernels.gate_keys, given | {"groups": list(self.groups)}, "keys")
        return [*signals_of(self, context.tokens, context.step), scale]

    def check_model(self, anatomy: Anatomy) -> None:
        """Raise an InterventionError, with the differences, if the gate was made for another model."""
        if lines := differences(self.config.model, sizes_of(anatomy)):
            listed = "\n  ".join(lines)
            raise InterventionError(
                f"Got a gate made for another model; expected one of this model's.\n  {listed}\n"
                f"Write ss.LSG.for_model(lvlm, layer={self.layer!r}) and train it."
            )

    def check_weights(self, module: nn.Module, anatomy: Anatomy) -> None:
        """Raise an InterventionError if the LM head is that of another checkpoint."""
        if not same_weights(self.config.weights, sketch(module, anatomy.head)):
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
        """The same gate, sharing its parameters, for which touching nothing is fine."""
        out = copy.copy(self)
        out.allow_noop = True
        return out

    def attach(self, model: Any) -> Attachment:
        """Gate a plain ``transformers`` model, a ``PeftModel`` around it, or an LVLM, without nnsight.

        Call ``detach()`` on what it returns, or write ``with gate.attach(model):``. While attached, a pass
        that cannot be gated rightly, such as one on a cache that was filled before, is an InputError.
        """
        return attach(self, model)

    def detach(self) -> None:
        """End every attachment of this gate, or raise an InterventionError if there is none."""
        mine = list(ATTACHED.get(self, ()))
        if not mine:
            what = "Got a gate that is attached to nothing; expected gate.attach(model) before."
            raise InterventionError(what)
        for one in mine:
            one.detach()

    def save_pretrained(
        self, folder: str | Path, *, record: Mapping[str, Any] | None = None
    ) -> None:
        """Write ``model.safetensors`` (fp32), ``config.json`` and a card; all of it or nothing.

        ``record``, plain data, says how it was trained; None is the gate's own. The folder is new, empty or
        that of another gate, which is replaced; else, and if it cannot be written, it is a CheckpointError.
        """
        saving.write_folder(folder, saving.files_of(saved(self, record)), loading.FORMAT)

    @staticmethod
    def from_pretrained(
        path_or_repo: str | Path,
        *,
        revision: str | None = None,
        subfolder: str = "",
        lvlm: LVLM | None = None,
        allow_noop: bool = False,
    ) -> LSG:
        """Load a gate from a folder, or a hub repository and its branch, tag or commit; no code is run.

        It is checked against ``lvlm`` now and goes on its device; without, it is checked at first use.
        An InterventionError if it was made for another model, else a CheckpointError.
        """
        source = loading.source_of(path_or_repo, revision, subfolder)
        return loaded(loading.read_gate(source), lvlm, allow_noop)

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
        an existing branch. Without network, permission and ``token`` (None for that of ``hf auth login``)
        it is a CheckpointError.
        """
        return saving.push_gate(repo, saved(self, record), private, revision, token)

    @staticmethod
    def save_stack(
        gates: Sequence[LSG], folder: str | Path, *, record: Mapping[str, Any] | None = None
    ) -> None:
        """Write gates, in this order, into a sub-folder each, and the list into ``config.json``.

        ``record`` says how they were made together; each keeps its own besides. See `save_pretrained`.
        """
        saving.save_stack(folder, [saved(gate) for gate in check_gates(gates)], record)

    @staticmethod
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
        """What stands in ``repr``."""
        c = self.config
        return f"layer={c.layer!r}, groups={c.groups}, decode={c.decode!r}, scale={c.scale:g}"


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
    return gate.to(device_for(lvlm))
