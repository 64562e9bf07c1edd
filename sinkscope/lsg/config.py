"""The choices of a gate as one checked record, with the names and sizes of its model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from typing import Any

from torch import nn

from sinkscope.anatomy.weights import fetched
from sinkscope.checks import check_choice, is_number, is_whole, plain
from sinkscope.detectors.choice import VisionTokens, detector_of
from sinkscope.detectors.rules import Norm, SinkDimensions
from sinkscope.errors import DetectorError, InterventionError, LayerError
from sinkscope.kernels.gating import ACTIVATIONS
from sinkscope.kernels.writes import quantised

WHOLE = "a whole number of 1 or more"
GROUPS = (("V", "rest"), ("L", "rest"), ("V", "L", "rest"))
MODEL_ALIASES = {
    "llava_llama": "llava",  # config.model_type of the original LLaVA code
    "LlavaLlamaForCausalLM": "llava",  # its architecture
    "LlavaForConditionalGeneration": "llava",
    "Qwen2_5_VLForConditionalGeneration": "qwen2_5_vl",
    "Gemma3ForConditionalGeneration": "gemma3",
}
"""Model types and class names, and what ``transformers`` calls the type."""


def _llava(layers: int, width: int) -> dict[str, Any]:
    """The sizes of a LLaVA-1.5: CLIP ViT-L/14-336, read at its second-last block."""
    vision = {"vision_layers": 24, "vision_width": 1024, "feed_layers": [22], "tokens_merged": 1}
    language = {"language_layers": layers, "language_width": width}
    heads = {"heads": width // 128, "kv_heads": width // 128, "head_dim": 128}
    return {"model_type": "llava", **vision, **language, **heads}


BASES: Mapping[str, Mapping[str, Any]] = {
    name.format(size): _llava(layers, width)
    for size, layers, width in (("7b", 32, 4096), ("13b", 40, 5120))
    for name in ("liuhaotian/llava-v1.5-{}", "llava-hf/llava-1.5-{}-hf")
}
"""Repositories and the sizes of their model. A converted checkpoint has the same sizes and, up to
rounding, the same weights: a gate for the one is a gate for the other."""


def require(good: bool, name: str, value: Any, expected: str) -> None:
    """Refuse a value that is not good."""
    if not good:
        shown = repr(value) if len(repr(value)) <= 200 else f"{repr(value)[:197]}..."
        raise InterventionError(f"Got {name}={shown}; expected {expected}.")


def check_layer(layer: Any, n_layers: int) -> int | str:
    """The block a gate reads: ``"embed"`` or an index with a block behind it; else a LayerError."""
    layer = plain(layer)
    if layer != "embed" and not (isinstance(layer, int) and is_whole(layer, 0, n_layers - 2)):
        raise LayerError(
            f"Got layer={layer!r} for a gate in a decoder of {n_layers} blocks; expected 'embed' or "
            f"0 to {n_layers - 2}: a gate at block l scales keys in block l + 1."
        )
    return layer


@dataclass(frozen=True)
class GateConfig:
    """The choices a gate is made of; what the paper leaves open is an option.

    Attributes:
        layer: The block whose output the gate reads; ``"embed"`` for the decoder's input.
        groups: The groups of image tokens with a coefficient each: ``("V", "rest")`` as in the paper,
            ``("L", "rest")`` or ``("V", "L", "rest")``. V wins over L; rest is every other one.
        signal: ``"last"`` prompt token (the paper), or the mean of all live prompt tokens
            (``"mean"``) or of the image tokens (``"visual"``).
        decode: At decode steps the prompt's coefficients hold (``"frozen"``), are computed again from
            the newest token (``"refresh"``), or keys are left alone (``"off"``). The paper is silent.
        init: ``"uniform"`` coefficients (0.5, 0.5), as in the paper, halve every visual logit untrained;
            ``"neutral"`` ones are 1, with the number of groups as scale, which `LSG.for_model` sets.
        v_detector: The rule for V-sinks, by name and parameters; ``l_detector`` likewise, or None.
    """

    layer: int | str
    d_model: int
    groups: tuple[str, ...] = ("V", "rest")
    signal: str = "last"
    decode: str = "frozen"
    init: str = "uniform"
    scale: float = 1.0  # what the softmax is multiplied by: the sum of the coefficients
    hidden: int = 64  # width of the hidden layer, as in the paper
    activation: str = "gelu"  # or "relu", "silu" or "tanh"; the paper does not say
    affine: bool = True  # whether the LayerNorm has weights; the paper's parameter count fits both
    v_detector: Mapping[str, Any] = field(default_factory=lambda: {"name": "NoSinks"})
    l_detector: Mapping[str, Any] | None = None
    model: Mapping[str, Any] = field(default_factory=dict)  # type and sizes, see `sizes_of`
    weights: tuple[float, ...] = ()  # a few numbers of the model's LM head; empty if it had none
    seed: int = 0  # of the first layer's weights

    def __post_init__(self) -> None:
        check = partial(check_choice, error=InterventionError)
        check(GROUPS, groups=self.groups)
        check(("last", "mean", "visual"), signal=self.signal)
        check(("frozen", "refresh", "off"), decode=self.decode)
        check(("uniform", "neutral"), init=self.init)
        check(ACTIVATIONS, activation=self.activation)
        if self.decode == "refresh" and self.signal != "last":
            what = f"Got decode='refresh' with signal={self.signal!r}; expected signal='last'."
            raise InterventionError(f"{what} A mean never changes: write decode='frozen'.")
        weights, model = self.weights, self.model
        named = isinstance(model, Mapping) and all(isinstance(name, str) for name in model)
        numbers = isinstance(weights, tuple) and all(is_number(one) for one in weights)
        where = self.layer == "embed" or is_whole(self.layer, 0)
        seeded = is_whole(self.seed, -(2**63), 2**64 - 1)  # what torch takes
        for name, good, expected in (
            ("layer", where, "'embed' or the index of a block, from 0"),
            ("d_model", is_whole(self.d_model, 1), WHOLE),
            ("hidden", is_whole(self.hidden, 1), WHOLE),
            ("scale", is_number(self.scale, above=0), "a positive number, not infinite"),
            ("seed", seeded, "a whole number of at most 64 bits"),
            ("affine", isinstance(self.affine, bool), "True or False"),
            ("weights", numbers, "a tuple of numbers, as sketch() gives them"),
            ("model", named, "the fingerprint of a model, by name"),
        ):
            require(good, name, getattr(self, name), expected)
        if self.init == "neutral" and self.scale != (many := len(self.groups)):
            what = f"Got init='neutral' and scale={self.scale:g}; expected scale={many}"
            raise InterventionError(f"{what}, so that coefficients of {self.groups} are 1.")
        if ("L" in self.groups) != (self.l_detector is not None):
            what = f"Got groups={self.groups} and l_detector={self.l_detector!r}"
            raise InterventionError(f"{what}; expected a rule exactly where 'L' is a group.")
        self._check_rule("v_detector", self.model.get("vision_width"))
        if self.l_detector is not None:
            self._check_rule("l_detector", self.d_model)

    def _check_rule(self, name: str, width: Any) -> None:
        """Refuse a rule that is none, is for another tower, or reads channels from ``width`` on."""
        rule = getattr(self, name)
        named = isinstance(rule, Mapping) and isinstance(rule.get("name"), str)
        require(named, name, rule, "a rule as sinkscope.lsg.describe(detector) gives it")
        try:
            detector = detector_of(rule)
        except DetectorError as error:
            raise InterventionError(f"Got {name}={dict(rule)}: {error}") from error
        if isinstance(detector, VisionTokens):
            require(name == "v_detector", name, detector, "a rule for states of the decoder")
        elif isinstance(detector, Norm):
            alone = not isinstance(detector.tau, str)
            wanted = "a positive number, which judges tokens alone"
            require(alone, f"{name}.tau", detector.tau, wanted)
        elif isinstance(detector, SinkDimensions) and is_whole(width):
            inside = all(dim < width for dim in detector.dims)
            require(inside, f"{name}.dims", detector.dims, f"channels from 0, below {width}")

    @property
    def edited(self) -> int:
        """The block whose keys are scaled."""
        return 0 if isinstance(self.layer, str) else self.layer + 1

    def to_dict(self) -> dict[str, Any]:
        """Give the choices as plain data, for JSON."""
        return asdict(self) | {"groups": list(self.groups), "weights": list(self.weights)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> GateConfig:
        """Read what `to_dict` gave; InterventionError if a field is missing, unknown or impossible."""
        require(isinstance(data, Mapping), "gate", data, "its choices, by name")
        known = {f.name for f in fields(cls)}
        strange, missing = sorted(set(data) - known), sorted({"layer", "d_model"} - set(data))
        if strange or missing:
            what = f"Got a gate config with unknown fields {strange} and without {missing}"
            raise InterventionError(f"{what}; expected some of {sorted(known)}.")
        lists = {k: tuple(data[k]) for k in ("groups", "weights") if isinstance(data.get(k), list)}
        return cls(**{**data, **lists})


def sketch(module: nn.Module, head: str) -> tuple[float, ...]:
    """32 numbers of the LM head, to tell checkpoints apart in any dtype; none where it has no weights."""
    part = module.get_submodule(head)
    with fetched(part):
        weight = getattr(part, "weight", None)
        if weight is None or weight.device.type == "meta" or quantised(weight):
            return ()
        rows = [i * 7 % min(64, weight.shape[0]) for i in range(8)]
        columns = [i * weight.shape[1] // 4 for i in range(4)]
        return tuple(weight.detach()[rows][:, columns].float().flatten().tolist())


def canonical(made_for: Mapping[str, Any]) -> dict[str, Any]:
    """A fingerprint in transformers' words, ``base`` replaced by its sizes; an unknown one stays."""
    out, base = dict(made_for), made_for.get("base")
    if isinstance(base, str) and base in BASES:
        del out["base"]
        out = {**BASES[base], **out}
    if isinstance(kind := out.get("model_type"), str):
        out["model_type"] = MODEL_ALIASES.get(kind, kind)
    return out


def differences(made_for: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """One line per difference of two fingerprints, aliases resolved."""
    made_for, found = canonical(made_for), canonical(found)
    return [
        f"{name}: made for {made_for.get(name)!r}, found {found.get(name)!r}"
        for name in {**made_for, **found}
        if made_for.get(name) != found.get(name)
    ]
