"""Put together what the files of somebody else's gate say, noting every match and assumption."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sinkscope.detectors.rules import SinkDimensions
from sinkscope.errors import CheckpointError, InterventionError
from sinkscope.lsg.aliases import BASES
from sinkscope.lsg.choosing import check_layer, config_for, device_for
from sinkscope.lsg.config import GROUPS, GateConfig, differences, fingerprint
from sinkscope.lsg.matching import Match
from sinkscope.lsg.settings import DIMS, TAU, Settings
from sinkscope.lsg.storage import as_fp32

if TYPE_CHECKING:
    from sinkscope.lsg.gate import LSG
    from sinkscope.models.lvlm import LVLM

SETTINGS = "sink_cfg.json"
RULE = (DIMS, TAU)
DEFAULTS = MappingProxyType(
    {"activation": "gelu", "scale": 1.0, "signal": "last", "decode": "frozen"}
)


@dataclass
class Reading:
    """One import under way: what was matched and assumed so far.

    Attributes:
        lvlm: The model.
        settings: What the file says.
        base: From what the file counts.
        assumed: Sentences.
        matched: Pairs.
        order: For each of our groups, which of the file's coefficients it is.
    """

    lvlm: LVLM
    settings: Settings
    base: int
    assumed: list[str]
    matched: list[tuple[str, str]]
    order: list[int] = field(default_factory=list)

    def check_base(self) -> None:
        """Refuse files that name a model we know to be another.

        Raises:
            InterventionError: If so, with the differences.
        """
        for key, name in self.settings.bases().items():
            known = BASES.get(name)
            self.settings.used[key] = "the model" if known else "a model unknown to us, not checked"
            lines = differences(known, fingerprint(self.lvlm.anatomy)) if known else []
            if lines:
                listed = "\n  ".join(lines)
                raise InterventionError(
                    f"Got gates for {name!r}; expected gates for {self.lvlm.name!r}.\n  {listed}"
                )
        self.assumed.append(f"the gates were trained on the weights of {self.lvlm.name!r}")

    def layers(
        self, matches: Sequence[Match], given: int | str | Sequence[int | str] | None
    ) -> list[int | str]:
        """The block that each gate reads, in our count.

        An order that is given holds; names tell the layers only where nothing else does.

        Raises:
            CheckpointError: If it is not said, said in two ways, or said of two gates.
            LayerError: If it is beyond the model.
        """
        numbers = [match.number for match in matches]
        if given is not None:
            out = [given] if isinstance(given, (int, str)) else list(given)
            self._check_order(numbers, out)
            named = self._named(matches)
            if named and named != out:
                self.assumed.append(f"layers {out} as asked, though names say {numbers}")
            elif len(matches) > 1 and not named:
                self._in_order(numbers, out)
        else:
            said = self.settings.layers()
            out = self._by_name(matches) if said is None else self._by_file(matches, said)
            self.assumed.append(f"layers {out}, counted from 0, are the blocks that are read")
        if len(set(out)) < len(out):
            raise CheckpointError(
                f"Got the layers {out} for the gates with the numbers {numbers}; expected another one "
                "for each. Write layer=[...] with the true ones, or tensors={...} for one gate alone."
            )
        return [check_layer(one, self.lvlm.anatomy.language.n_layers) for one in out]

    def _by_name(self, matches: Sequence[Match]) -> list[int | str]:
        """The layers that stand in names, where nobody says any."""
        numbers = [match.number for match in matches]
        shifted = self._shifted(matches)
        if not shifted or (not self._named(matches) and self._are_places(numbers)):
            raise CheckpointError(
                f"Got gates with the numbers {numbers} and no layer in {SETTINGS}; expected to "
                f"know which block each reads. Write layer={list(range(len(matches)))} with the "
                "true ones."
            )
        self.assumed.append(f"numbers in names, {numbers}, are layers counted from {self.base}")
        return shifted

    def _by_file(self, matches: Sequence[Match], said: Sequence[int]) -> list[int | str]:
        """The layers that the settings say, one for each gate in their order.

        Raises:
            CheckpointError: If the names say others, or the same in another order.
        """
        numbers = [match.number for match in matches]
        out: list[int | str] = [one - self.base for one in said]
        self._check_order(numbers, out)
        shifted, named = self._shifted(matches), self._named(matches)
        same = set(shifted) == set(out) and not self._are_places(numbers)
        if shifted != out and (named or same):
            raise CheckpointError(
                f"Got {len(matches)} gates with the numbers {numbers} and the layers {out} in "
                f"{SETTINGS} (counted from 0): by their names the gates are of the layers {shifted}, by "
                f"the order of the settings of {out}; expected the same. Write layer={shifted} or "
                f"layer={out}, or another index_base than {self.base}."
            )
        if len(matches) > 1 and not named:
            self._in_order(numbers, out)
        return out

    def _check_order(self, numbers: Sequence[int | None], layers: Sequence[int | str]) -> None:
        """Refuse layers that are not one for each gate, or gates that have no order."""
        if len(layers) != len(numbers):
            raise CheckpointError(
                f"Got {len(numbers)} gates with the numbers {numbers} and the layers {layers} (counted "
                "from 0); expected one layer for each gate. Write layer=[...]."
            )
        if len(set(numbers)) < len(numbers):
            raise CheckpointError(
                f"Got {len(numbers)} gates with the numbers {numbers} and the layers {layers}; expected "
                "numbers that tell which gate comes first. Import them one by one with tensors={...}."
            )

    def _shifted(self, matches: Sequence[Match]) -> list[int | str]:
        """The numbers in names as layers in our count; none if a gate has no number."""
        numbers = [match.number for match in matches if match.number is not None]
        return [one - self.base for one in numbers] if len(numbers) == len(matches) else []

    def _named(self, matches: Sequence[Match]) -> list[int | str]:
        """The layers of gates that are all named by one, such as ``layers.3.gate``; else none."""
        return self._shifted(matches) if all(match.by_layer for match in matches) else []

    def _are_places(self, numbers: Sequence[int | None]) -> bool:
        """Whether numbers only count the gates: 0, 1, 2 ..."""
        return list(numbers) == list(range(len(numbers)))

    def _in_order(self, numbers: Sequence[int | None], layers: Sequence[int | str]) -> None:
        """Note which gate is of which layer."""
        self.assumed.append(f"gates in the order {numbers} are of the layers {list(layers)}")

    def config(
        self,
        many: int,
        groups: Sequence[str] | None,
        given: Mapping[str, Any],
        v_detector: Any,
        l_detector: Any,
        normalize: str,
    ) -> GateConfig:
        """The choices that all gates of the file share.

        Args:
            many: How many coefficients there are.
            groups: What they stand for, if that was given.
            given: activation, scale, signal and decode; None for what the file says or the default.
            v_detector: As given.
            l_detector: As given.
            normalize: For the file's rule.

        Raises:
            CheckpointError: If the number of groups is not that of the coefficients.
        """
        made = {name: value for name, value in given.items() if value is not None}
        named = tuple(groups) if groups is not None else self._groups(many)
        if len(named) != many:
            raise CheckpointError(
                f"Got groups={named} and {many} coefficients; expected a name for each."
            )
        if "activation" not in made and (said := self.settings.activation()) is not None:
            made["activation"] = said
        if "signal" not in made and (said := self.settings.signal()) is not None:
            made["signal"] = said
        self.settings.check_temperature()
        if "scale" not in made and (prior := self.settings.scale()) is not None:
            made["scale"] = prior
            self.assumed.append(f"the file's prior or scale, {prior:g}, multiplies the softmax")
        for name, default in DEFAULTS.items():
            if name not in made:
                made[name] = self._assume(name, default)
        if v_detector is None and "V" in named:
            v_detector = self._rule(normalize)
        ours = next((one for one in GROUPS if set(one) == set(named)), named)
        self.order = [named.index(one) for one in ours]
        return config_for(self.lvlm, 0, v_detector, l_detector, None, {**made, "groups": ours})

    def gate(
        self, match: Match, config: GateConfig, tensors: Mapping[str, Tensor], path: Path
    ) -> LSG:
        """One gate with the tensors of the file."""
        from sinkscope.lsg.gate import LSG

        first = match.names["inner.weight"]
        hidden = tensors[first].shape["inner.weight" in match.transposed]
        if tensors[first].shape[0] == tensors[first].shape[1]:
            self.assumed.append(f"the rows of the square matrix {first} are its outputs")
        affine = any(role.startswith("norm") for role in match.names)
        gate = LSG(replace(config, hidden=int(hidden), affine=affine))
        if not affine:
            self.assumed.append("no tensor of a LayerNorm: there is one without weights")
        state = {}
        for role, value in gate.state_dict().items():
            if role not in match.names:
                state[role] = torch.full_like(value, float(role == "norm.weight"))
                self.assumed.append(f"{role} is not in the file: {state[role].flatten()[0]:g}")
                continue
            name = match.names[role]
            read = as_fp32(name, tensors[name], path)
            read = read.T.contiguous() if role in match.transposed else read
            state[role] = read[self.order] if role.startswith("outer") else read
            note = " (transposed)" if role in match.transposed else ""
            shape = "x".join(str(size) for size in tensors[name].shape)
            kind = str(tensors[name].dtype).removeprefix("torch.")
            self.matched.append((name, f"layer {config.layer}: {role}{note}, {shape} {kind}"))
        gate.load_state_dict(state)
        return gate.to(device_for(self.lvlm))

    def _groups(self, many: int) -> tuple[str, ...]:
        """The groups that the file names, or those of the paper."""
        said = self.settings.groups()
        if isinstance(said, tuple):
            return said
        if said not in (None, many):
            raise CheckpointError(
                f"Got {said} groups in {SETTINGS} and {many} coefficients; expected as many. Write "
                "groups=(...)."
            )
        return self._assume("groups", ("V", "rest") if many == 2 else ("V", "L", "rest"))

    def _rule(self, normalize: str) -> Any:
        """The file's rule for V-sinks; None for the default one."""
        dims, tau = self.settings.dims(self.lvlm.anatomy.vision.d_model), self.settings.tau()
        if dims is None or tau is None:
            for key in [key for key, use in self.settings.used.items() if use in RULE]:
                del self.settings.used[key]  # one without the other is no rule
            self.assumed.append(
                "no channels and threshold of V-sinks in the file: the rule is that of LSG.for_model"
            )
            return None
        self.assumed.append(
            f"the file's rule for V-sinks is read with normalize={normalize!r} and >="
        )
        return SinkDimensions(tuple(dims), tau, normalize=normalize, strict=False)

    def _assume(self, name: str, value: Any) -> Any:
        """A default, noted."""
        self.assumed.append(f"{name} is {value!r}")
        return value
