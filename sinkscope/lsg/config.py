"""Names under which other code bases and the hub know models of one architecture.

Sizes are those of the published configs. A checkpoint that was converted has the same sizes and, up
to rounding, the same weights, so a gate for the one is a gate for the other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from types import MappingProxyType
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import nn

from sinkscope.checks import is_number, is_whole, plain
from sinkscope.detectors.kinds import RandomTokens, VisionTokens
from sinkscope.detectors.rules import Massive, Norm, NoSinks, SinkDimensions
from sinkscope.errors import DetectorError, InterventionError, nearest
from sinkscope.kernels.gating import ACTIVATIONS

MODEL_ALIASES = MappingProxyType(
    {
        "llava_llama": "llava",  # config.model_type of the original LLaVA code
        "LlavaLlamaForCausalLM": "llava",  # its architecture
        "LlavaForConditionalGeneration": "llava",
        "Qwen2_5_VLForConditionalGeneration": "qwen2_5_vl",
        "Gemma3ForConditionalGeneration": "gemma3",
    }
)

"""Model types and class names, and what ``transformers`` calls the type."""

TOWER = MappingProxyType(  # CLIP ViT-L/14-336, read at its second-last block
    {
        "model_type": "llava",
        "vision_layers": 24,
        "vision_width": 1024,
        "feed_layers": [22],
        "tokens_merged": 1,
    }
)

LLAVA_7B = MappingProxyType(
    {
        **TOWER,
        "language_layers": 32,
        "language_width": 4096,
        "heads": 32,
        "kv_heads": 32,
        "head_dim": 128,
    }
)

LLAVA_13B = MappingProxyType(
    {
        **TOWER,
        "language_layers": 40,
        "language_width": 5120,
        "heads": 40,
        "kv_heads": 40,
        "head_dim": 128,
    }
)

BASES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "liuhaotian/llava-v1.5-7b": LLAVA_7B,
        "llava-hf/llava-1.5-7b-hf": LLAVA_7B,
        "liuhaotian/llava-v1.5-13b": LLAVA_13B,
        "llava-hf/llava-1.5-13b-hf": LLAVA_13B,
    }
)

"""Repositories and the fingerprint of what they hold."""


def canonical(made_for: Mapping[str, Any]) -> dict[str, Any]:
    """A fingerprint in the words of this library.

    Args:
        made_for: A fingerprint, perhaps with a foreign ``model_type``, or with ``base``, a
            repository, in place of what it does not say itself.

    Returns:
        The fingerprint. An unknown ``base`` stays in it, so that it shows as a difference.
    """
    out = dict(made_for)
    base = out.get("base")
    if isinstance(base, str) and base in BASES:
        out = {**BASES[base], **{name: value for name, value in out.items() if name != "base"}}
    kind = out.get("model_type")
    if isinstance(kind, str):
        out["model_type"] = MODEL_ALIASES.get(kind, kind)
    return out


SEEDS = (-(2**63), 2**64 - 1)

"""What torch takes."""


def require(good: bool, name: str, value: Any, expected: str) -> None:
    """Refuse a value.

    Raises:
        InterventionError: If it is not good.
    """
    if not good:
        shown = repr(value)
        shown = shown if len(shown) <= 200 else f"{shown[:197]}..."
        raise InterventionError(f"Got {name}={shown}; expected {expected}.")


def check_sizes(config: Any) -> None:
    """Refuse numbers, switches and tables of a `GateConfig` that are of another type.

    Raises:
        InterventionError: If any is, with its name.
    """
    layer = config.layer
    where = layer == "embed" or (is_whole(layer) and layer >= 0)
    require(where, "layer", layer, "'embed' or the index of a block, from 0")
    for name in ("d_model", "hidden"):
        value = getattr(config, name)
        require(is_whole(value) and value > 0, name, value, "a whole number of 1 or more")
    scale = config.scale
    require(is_number(scale) and scale > 0, "scale", scale, "a positive number, not infinite")
    seed = config.seed
    fits = is_whole(seed) and SEEDS[0] <= seed <= SEEDS[1]
    require(fits, "seed", seed, "a whole number of at most 64 bits")
    require(isinstance(config.affine, bool), "affine", config.affine, "True or False")
    weights = config.weights
    numbers = isinstance(weights, tuple) and all(is_number(one) for one in weights)
    require(numbers, "weights", weights, "a tuple of numbers, as sketch() gives them")
    named = isinstance(config.model, Mapping) and all(isinstance(n, str) for n in config.model)
    require(named, "model", config.model, "the fingerprint of a model, by name")


def check_fingerprint(model: Mapping[str, Any]) -> None:
    """Refuse a fingerprint that cannot be of a model.

    Raises:
        InterventionError: If a size is no whole number, or missing.
    """
    sizes = ("vision_layers", "vision_width", "tokens_merged", "language_layers", "language_width")
    for name in (*sizes, "heads", "kv_heads", "head_dim"):
        value = model.get(name)
        good = is_whole(value) and value > 0
        require(good, f"model[{name!r}]", value, "a whole number of 1 or more")
    kind, feeds = model.get("model_type"), model.get("feed_layers")
    require(isinstance(kind, str), "model['model_type']", kind, "the name of a type")
    good = isinstance(feeds, list) and bool(feeds) and all(is_whole(f) and f >= 0 for f in feeds)
    require(good, "model['feed_layers']", feeds, "a list of block indices")


def check_detector(name: str, detector: Any, width: Any) -> None:
    """Refuse a rule that cannot be one of this gate; its own numbers it checks itself.

    Args:
        name: ``"v_detector"`` or ``"l_detector"``, for messages.
        detector: One that can be in a gate.
        width: Of the states it judges, if that is known.

    Raises:
        InterventionError: If it is for another tower, or its channels are beyond the states.
    """
    if isinstance(detector, VisionTokens):
        require(name == "v_detector", name, detector, "a rule for states of the decoder")
        return
    if isinstance(detector, Norm):
        alone = not isinstance(detector.tau, str)
        require(alone, f"{name}.tau", detector.tau, "a positive number, which judges tokens alone")
    if isinstance(detector, SinkDimensions):
        dims, most = detector.dims, width if is_whole(width) else math.inf
        good = all(dim < most for dim in dims)
        require(good, f"{name}.dims", dims, f"channels from 0, below {most}")


GROUPS = (("V", "rest"), ("L", "rest"), ("V", "L", "rest"))

SIGNALS = ("last", "mean", "visual")

DECODE = ("frozen", "refresh", "off")

INITS = ("uniform", "neutral")

RULES = MappingProxyType(
    {
        cls.__name__: cls
        for cls in (SinkDimensions, Norm, Massive, RandomTokens, NoSinks, VisionTokens)
    }
)

"""Detectors that judge every token by itself, so that they can run inside a pass."""


@dataclass(frozen=True)
class GateConfig:
    """The choices a gate is made of. What the paper leaves open is an option here.

    Attributes:
        layer: The block whose output the gate reads, or ``"embed"`` for the decoder's input.
        d_model: Width of what it reads.
        groups: Which keys have a coefficient of their own, in this order: ``("V", "rest")`` as in
            the paper, ``("L", "rest")`` or ``("V", "L", "rest")``. V wins over L; rest is every
            other image token.
        signal: ``"last"`` prompt token (the paper), or the mean of all live prompt tokens
            (``"mean"``) or of the image tokens (``"visual"``).
        decode: At decode steps the coefficients of the prompt hold (``"frozen"``), are computed
            again from the newest token (``"refresh"``), or keys are left alone (``"off"``). The
            paper does not say.
        init: ``"uniform"`` coefficients (0.5, 0.5), as in the paper: an untrained gate then halves
            every visual logit; ``"neutral"`` makes them 1, and needs a scale of as many as there are
            groups (`LSG.for_model` sets it).
        scale: What the softmax is multiplied by: the bound of the sum of coefficients.
        hidden: Width of the hidden layer; 64 in the paper.
        activation: One of ``"gelu"``, ``"relu"``, ``"silu"``, ``"tanh"``; the paper does not say.
        affine: Whether the LayerNorm has weights; the paper's parameter count fits both.
        v_detector: The rule for V-sinks, by name and parameters.
        l_detector: The rule for L-sinks likewise, or None without an L group.
        model: What the gate was made for: see `sinkscope.models.identity.sizes_of`.
        weights: A few numbers of the model's weights, see `sketch`; empty if it had none.
        seed: Of the first layer's weights.
    """

    layer: int | str
    d_model: int
    groups: tuple[str, ...] = ("V", "rest")
    signal: str = "last"
    decode: str = "frozen"
    init: str = "uniform"
    scale: float = 1.0
    hidden: int = 64
    activation: str = "gelu"
    affine: bool = True
    v_detector: Mapping[str, Any] = field(default_factory=lambda: {"name": "NoSinks"})
    l_detector: Mapping[str, Any] | None = None
    model: Mapping[str, Any] = field(default_factory=dict)
    weights: tuple[float, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        choices: tuple[tuple[str, Any, Any], ...] = (
            ("groups", self.groups, GROUPS),
            ("signal", self.signal, SIGNALS),
            ("decode", self.decode, DECODE),
            ("init", self.init, INITS),
            ("activation", self.activation, ACTIVATIONS),
        )
        for name, value, known in choices:
            if value not in known:
                hint = nearest(value, [str(k) for k in known]) if isinstance(value, str) else ""
                raise InterventionError(
                    f"Got {name}={value!r}; expected one of {known}. {hint}".rstrip()
                )
        if self.decode == "refresh" and self.signal != "last":
            raise InterventionError(
                f"Got decode='refresh' with signal={self.signal!r}; expected signal='last'. The mean "
                "over prompt tokens does not change at decode steps: write decode='frozen'."
            )
        check_sizes(self)
        if self.init == "neutral" and self.scale != len(self.groups):
            raise InterventionError(
                f"Got init='neutral' and scale={self.scale:g}; expected scale={len(self.groups)}: as many "
                f"as there are groups {self.groups}, so that a new gate's coefficients are 1."
            )
        if ("L" in self.groups) != (self.l_detector is not None):
            raise InterventionError(
                f"Got groups={self.groups} and l_detector={self.l_detector!r}; expected a rule for "
                "L-sinks exactly where 'L' is a group."
            )
        self._check_rules()

    def _check_rules(self) -> None:
        """Refuse rules that are none, or beyond the states they judge."""
        rules = (
            ("v_detector", self.v_detector, self.model.get("vision_width")),
            ("l_detector", self.l_detector, self.d_model),
        )
        for name, rule, width in rules:
            if rule is None and name == "l_detector":
                continue
            if not isinstance(rule, Mapping) or not isinstance(rule.get("name"), str):
                raise InterventionError(
                    f"Got {name}={rule!r}; expected a rule by name and parameters, as "
                    "sinkscope.lsg.describe(detector) gives it."
                )
            try:
                detector = detector_of(rule)
            except DetectorError as error:
                raise InterventionError(f"Got {name}={dict(rule)}: {error}") from error
            check_detector(name, detector, width)

    @property
    def edited(self) -> int:
        """The block whose keys are scaled."""
        return 0 if isinstance(self.layer, str) else self.layer + 1

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self) | {"groups": list(self.groups), "weights": list(self.weights)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> GateConfig:
        """The config of `to_dict`.

        Raises:
            InterventionError: If a field is missing, unknown or impossible.
        """
        require(isinstance(data, Mapping), "gate", data, "its choices, by name")
        known = {f.name for f in fields(cls)}
        strange, missing = sorted(set(data) - known), sorted({"layer", "d_model"} - set(data))
        if strange or missing:
            raise InterventionError(
                f"Got a gate config with unknown fields {strange} and without {missing}; expected "
                f"fields among {sorted(known)}. It was written by another version or another tool."
            )
        given = dict(data)
        for name in ("groups", "weights"):
            if isinstance(given.get(name), list):
                given[name] = tuple(given[name])
        return cls(**given)


def describe(detector: Any) -> dict[str, Any]:
    """A detector as plain data.

    Raises:
        DetectorError: If it judges tokens by one another, or by attention.
    """
    name = type(detector).__name__
    fits = name in RULES and not (name == "Norm" and isinstance(detector.tau, str))
    if not fits:
        raise DetectorError(
            f"Got {detector!r} for a gate; expected a rule that judges every token by itself, "
            f"because it runs inside the pass: one of {sorted(RULES)} with numbers. Write "
            "ss.calibrate(lvlm, samples).v_detector, or ss.detectors.Norm(100.0); where the ViT's sink "
            "is CLS, which attention finds and no state shows, ss.detectors.VisionTokens('cls')."
        )
    out = {f.name: plain(getattr(detector, f.name)) for f in fields(detector)}
    out["dims"] = [int(d) for d in out["dims"]] if "dims" in out else None
    return {"name": name, **{key: value for key, value in out.items() if value is not None}}


def detector_of(data: Mapping[str, Any]) -> Any:
    """The detector of `describe`.

    Raises:
        DetectorError: If it is unknown.
    """
    given = dict(data)
    name = given.pop("name", None)
    if name not in RULES:
        raise DetectorError(f"Got the detector {name!r}; expected one of {sorted(RULES)}.")
    try:
        return RULES[name](**given)
    except TypeError as error:
        raise DetectorError(f"Got {given} for {name}: {error}.") from error


def rule_of(data: Mapping[str, Any]) -> dict[str, Any]:
    """The same as the plain rule of `sinkscope.kernels.gating`."""
    name = data["name"]
    detector = detector_of(data)
    if name == "SinkDimensions":
        return {
            "how": "dims",
            "dims": [int(d) for d in detector.dims],
            "tau": float(detector.tau),
            "rms": detector.normalize == "rms",
            "strict": detector.strict,
        }
    if name == "Norm":
        return {"how": "norm", "tau": float(detector.tau), "strict": detector.strict}
    if name == "Massive":
        return {
            "how": "massive",
            "absolute": float(detector.absolute),
            "ratio": float(detector.ratio),
            "strict": detector.strict,
        }
    if name == "RandomTokens":
        return {"how": "random", "count": detector.count, "seed": detector.seed}
    if name == "VisionTokens":
        return {"how": "all"}
    return {"how": "none"}


def sketch(module: nn.Module, head: str) -> tuple[float, ...]:
    """32 numbers of the LM head, which tell two checkpoints of one architecture apart.

    Empty where the weights are not here. They agree within rounding across dtypes.
    """
    part = module.get_submodule(head)
    with align_module_device(part):  # which fetches offloaded weights
        weight = getattr(part, "weight", None)
        if weight is None or weight.device.type == "meta" or not weight.is_floating_point():
            return ()
        rows = [i * 7 % min(64, weight.shape[0]) for i in range(8)]
        columns = [i * weight.shape[1] // 4 for i in range(4)]
        return tuple(weight.detach()[rows][:, columns].float().flatten().tolist())


def same_weights(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    """Whether two sketches are of one checkpoint, up to rounding; unknown counts as yes."""
    if not one or not other:
        return True
    a, b = torch.tensor(one), torch.tensor(other)
    return a.shape == b.shape and bool(torch.allclose(a, b, rtol=2e-2, atol=float(a.std()) * 1e-2))


def differences(made_for: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """One line per difference of two fingerprints, aliases resolved."""
    made_for, found = canonical(made_for), canonical(found)
    names = [*made_for, *(name for name in found if name not in made_for)]
    return [
        f"{name}: made for {made_for.get(name)!r}, found {found.get(name)!r}"
        for name in names
        if made_for.get(name) != found.get(name)
    ]
