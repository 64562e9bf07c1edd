"""Which rules are used: published constants and their order; rules by kind or chance; rules as plain data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache, partial
from typing import Any, ClassVar

import pandas as pd
import torch
from jaxtyping import Bool
from torch import Tensor

from sinkscope.anatomy.context import Context
from sinkscope.anatomy.towers import Anatomy, TowerAnatomy
from sinkscope.checks import is_whole, plain
from sinkscope.detectors.calibration import Calibration, calibrate
from sinkscope.detectors.detection import Detector, check_detector, unseen
from sinkscope.detectors.gap import DRAWS, Gap
from sinkscope.detectors.rules import Massive, Norm, NoSinks, Rule, SinkDimensions
from sinkscope.errors import DetectorError
from sinkscope.kernels.gating import hashed
from sinkscope.models.inputs import Sample
from sinkscope.models.lvlm import LVLM
from sinkscope.probes import MassiveActivations, Probe, ScoreResult
from sinkscope.probes.attention import LEAST_SEEING
from sinkscope.protocols import Read
from sinkscope.results import Record, mask_padding, saving
from sinkscope.sites import Site, Tower
from sinkscope.tokens import TokenMap


@dataclass(frozen=True)
class Known:
    """What is published for one model: sink channels of the decoder, ``l_dims`` (0-based), with the threshold
    ``tau`` on the RMS score, and the rule for V-sinks on the states that feed the projector, or None.

    ``text_width`` is the hidden size of the decoder, ``vision_width`` that of the vision tower, None for any.
    ``default`` is whether the sources agree enough to use it unasked; else it is only shown.
    """

    name: str
    model_type: str
    text_width: int
    text_layers: int
    vision_width: int | None
    l_dims: tuple[int, ...]
    tau: float
    v_detector: Detector | None
    source: str
    default: bool

    @property
    def l_detector(self) -> SinkDimensions:
        """The rule for L-sinks."""
        return SinkDimensions(self.l_dims, self.tau)


_LLAVA = "L: Kang et al. 2503.03321 (code), Sun et al. 2402.17762 (code). V: "
_QWEN = "Channels in four independent third-party codes; 2718 is also large. No V rule published."
_TWO = "Two third-party codes that differ: {318, 1874, 1819} and {1874, 1819}."
_CHOI = "the threshold of Choi et al. 2604.03316 is unpublished."
_7B = f"{_LLAVA}ViT norm >= 100, Luo et al. 2510.08510; {_CHOI}"
_13B = _LLAVA + "as for the 7B model, which has the same tower."
_ONE = "One third-party code."
KNOWN = (
    Known("LLaVA-1.5-7B", "llava", 4096, 32, 1024, (1415, 2533), 20.0, Norm(100.0), _7B, True),
    Known("LLaVA-1.5-13B", "llava", 5120, 40, 1024, (2100, 4743), 20.0, Norm(100.0), _13B, True),
    Known("Qwen2.5-VL-7B", "qwen2_5_vl", 3584, 28, 1280, (458, 2570), 20.0, None, _QWEN, False),
    Known("Qwen2.5-VL-3B", "qwen2_5_vl", 2048, 36, 1280, (1874, 1819), 20.0, None, _TWO, False),
    Known("Qwen2.5-VL-32B", "qwen2_5_vl", 5120, 64, 1280, (4675, 3094), 20.0, None, _ONE, False),
)


def known_for(lvlm: LVLM) -> Known | None:
    """The row whose model type and sizes are this model's, or None. Copies of other names are found, and
    one with another decoder of these sizes, for which the row is wrong: look at the flagged fraction."""
    a = lvlm.anatomy
    mine = (a.model_type, a.language.d_model, a.language.n_layers)
    rows = (r for r in KNOWN if (r.model_type, r.text_width, r.text_layers) == mine)
    return next((r for r in rows if r.vision_width in (None, a.vision.d_model)), None)


def table() -> pd.DataFrame:
    """All published constants with their sources."""
    names = {"name": "model", "l_dims": "LLM sink channels", "tau": "tau (RMS)"}
    names |= {"v_detector": "V rule", "default": "used by default", "source": "source"}
    made: Any = pd.DataFrame([vars(row) for row in KNOWN])[[*names]]
    made.columns = [*names.values()]
    made["LLM sink channels"] = made["LLM sink channels"].map(list)
    made["V rule"] = [repr(row.v_detector) if row.v_detector else None for row in KNOWN]
    return made


def published(lvlm: LVLM) -> dict[str, tuple[Detector, str] | None]:
    """By tower, the published rule that is used unasked and where it is from, or None."""
    known = known_for(lvlm)
    if known is None or not known.default:
        return {"vision": None, "language": None}
    source = f"published constants of {known.name}"
    v = None if known.v_detector is None else (known.v_detector, source)
    return {"vision": v, "language": (known.l_detector, source)}


@dataclass(frozen=True)
class SinkRules(Record):
    """The rule of each kind of sink, and where it is from: given, published for this model, calibrated on
    samples or the gap rule, the generic definition, in this order.

    ``v`` is for V-sinks, on the states that feed the projector, and ``l_rule`` for L-sinks, on what each LLM
    layer reads; ``calibration`` is the one that was made or given, if any.
    """

    v: Detector
    l_rule: Detector
    v_source: str
    l_source: str
    calibration: Calibration | None = None

    @property
    def chosen(self) -> str:
        """Where both are from, in a few words."""
        same = self.v_source == self.l_source
        return self.v_source if same else f"V: {self.v_source}; L: {self.l_source}"

    @classmethod
    def on_sample(
        cls, lvlm: LVLM, sample: Sample, v: Any = None, l_rule: Any = None, draws: float = DRAWS
    ) -> SinkRules:
        """Rules for one sample, which judges itself where nothing is given (``v``, ``l_rule``) or published.
        ``draws`` is that of `Gap`; DetectorError if a rule is none."""
        short = int(sample.tokens.live.sum(dim=1).max()) <= LEAST_SEEING
        last: list[tuple[Detector, str]] = []
        for tower in (lvlm.anatomy.vision, lvlm.anatomy.language):
            last.append((Gap(draws=draws), "the gap rule on this sample"))
            if why := unseen(tower, [sample]):
                last[-1] = NoSinks(why), "nothing to judge"
            elif short or not tower.attending:
                last[-1] = Massive(), "the generic definition (massive: |h| > 100 and 1000 medians)"
        return cls._in_order(lvlm, (v, l_rule), last)

    @classmethod
    def on_others(
        cls,
        lvlm: LVLM,
        samples: Callable[[], Sequence[Sample]],
        v: Any = None,
        l_rule: Any = None,
        *,
        what: str = "",
        calibration: Calibration | None = None,
        remote: bool | str | None = None,
        progress: bool | None = False,
    ) -> SinkRules:
        """Rules for many samples: what is neither given nor published is calibrated on some.

        ``samples`` makes the samples if they are needed; ``what`` they are in words, empty for their number.
        ``calibration`` is one to take rules from. For the rest and CalibrationError see `calibrate`.
        """
        given = zip(published(lvlm).items(), (v, l_rule), strict=True)
        missing = [tower for (tower, known), rule in given if known is None and rule is None]
        if calibration is None and not missing:
            return cls._in_order(lvlm, (v, l_rule), (None, None))
        if calibration is None:
            how: dict[str, Any] = {"remote": remote, "progress": progress}
            calibration = calibrate(lvlm, samples(), towers=missing, **how)
        on = what or f"{calibration.n_samples} samples"
        last = [
            (tower.detector, f"calibrated on {on}" + ("" if tower.found else ", which show none"))
            for tower in (calibration.vision, calibration.language)
        ]
        return replace(cls._in_order(lvlm, (v, l_rule), last), calibration=calibration)

    @classmethod
    def _in_order(cls, lvlm: LVLM, given: Sequence[Any], last: Sequence[Any]) -> SinkRules:
        found = zip(given, published(lvlm).values(), last, strict=True)
        chosen = [known or end if rule is None else (rule, "given") for rule, known, end in found]
        v, l_rule = (check_detector(rule) for rule, _ in chosen)
        return cls(v, l_rule, chosen[0][1], chosen[1][1])


@dataclass(frozen=True)
class VisionTokens(Rule):
    """ViT tokens of one ``kind`` that the projector keeps: ``"cls"``, or ``"register"``.

    Where CLS is the sink of a vision tower, attention finds it (`Received`) and no rule on states. A gate,
    which cannot ask for attention inside its pass, can name the token. The score is 1 there and 0 elsewhere.
    Nothing is measured: first see with `Received` that this token draws attention in your model.
    """

    choices: ClassVar[Any] = {"kind": ("cls", "register")}
    kind: str = "cls"

    def probe(self, tower: Tower, layers: Any, anatomy: TowerAnatomy) -> Probe:
        """The kinds of the tokens; DetectorError in the language tower."""
        if tower != "vision":
            raise DetectorError(
                f"Got {self!r} for the {tower} tower, which has no such tokens; expected a rule for "
                "states there, such as ss.calibrate(lvlm, samples).l_detector. Write "
                "v_detector=ss.detectors.VisionTokens('cls')."
            )
        return _KindProbe(self.kind, layers)

    def _limit(self) -> float:
        return 0.5

    def null(self, result: Any, anatomy: TowerAnatomy) -> float:
        """0: without such a token nothing is flagged."""
        return 0.0

    def _plain(self) -> dict[str, Any]:
        return {"how": "all"}


@lru_cache(maxsize=4)  # once for all gates of a batch, for it waits for the device
def kept_tokens(tokens: TokenMap, kind: str) -> Bool[Tensor, "image pos"]:
    """ViT tokens of a kind, ``"cls"`` or ``"register"``; DetectorError if the projector drops them."""
    mine, used = tokens.vision.select(kind), tokens.sources >= 0
    if tokens.unmapped:  # what becomes of the token is unknown
        return mine
    fed = torch.zeros_like(mine)
    image = tokens.image_index[..., None].expand_as(tokens.sources)
    fed[image[used], tokens.sources[used]] = True
    if len(mine):
        _refuse_dropped(kind, bool(mine.any()), bool((mine & fed).any()))
    return mine


def check_kept(detector: Any, anatomy: Anatomy, config: Any) -> None:
    """Refuse a `VisionTokens` for a model whose projector passes on no such token."""
    if isinstance(detector, VisionTokens):
        prefix, kind = anatomy.prefix, detector.kind
        there = kind in (*prefix, *anatomy.suffix)
        _refuse_dropped(kind, there, kind in prefix[anatomy.drops :])


def _refuse_dropped(kind: str, there: bool, kept: bool) -> None:
    """Refuse a kind that the vision tower does not have, or whose tokens the projector drops."""
    if not kept:
        why = "whose projector drops it" if there else "whose vision tower has no such token"
        raise DetectorError(
            f"Got VisionTokens({kind!r}) for a model {why}, so that no LLM token is made of it; "
            "expected one that passes it on, as a LLaVA with vision_feature_select_strategy='full' does "
            "with CLS. Write a rule for patches, such as ss.detectors.Norm(100.0) or "
            "ss.calibrate(lvlm, samples).v_detector."
        )


@dataclass(frozen=True, eq=False)
class _KindProbe(Record):
    """The kinds of ViT tokens, as a probe that reads nothing."""

    kind: str
    wanted: Any
    tower: Tower = "vision"

    def reads(self, context: Context) -> list[Read]:
        """None; raises if the projector passes on no such token."""
        kept_tokens(context.tokens, self.kind)
        return []

    def finish(self, answers: Mapping[Site, Any], context: Context) -> ScoreResult:
        """The same scores, 0 or 1, at every layer."""
        layers = context.layers(self.tower, self.wanted)
        mine = kept_tokens(context.tokens, self.kind).float()
        scores = mine[:, None].expand(-1, len(layers), -1)
        return ScoreResult(mask_padding(scores, context.live(self.tower), 2), layers)


@dataclass(frozen=True)
class RandomTokens(Rule):
    """As many tokens per row as ``count``, chosen by a hash with a ``seed``: the control for a detector.

    The choice is the same whenever an image is seen again. It is a hash of every token's position and largest
    channel, so rounding in another dtype can change it. CLS may be chosen, which most projectors drop.
    """

    measured: ClassVar[Any] = partial(MassiveActivations, k=1)
    count: int
    seed: int = 0
    strict: bool = True

    def __post_init__(self) -> None:
        if not is_whole(self.count, 1) or not is_whole(self.seed):
            given = f"count={self.count!r}, seed={self.seed!r}"
            raise DetectorError(f"Got {given}; expected whole numbers, the count 1 or more.")
        super().__post_init__()

    def scores(self, result: Any) -> Tensor:
        """Minus the rank of the hash; NaN at padding."""
        live = ~result.values[..., 0].isnan()
        layers = zip(result.channels[..., 0].unbind(1), live.unbind(1), strict=True)
        ranks = torch.stack([hashed(peaks, alive, self.seed) for peaks, alive in layers], dim=1)
        return (-ranks.float()).masked_fill(~live, float("nan"))

    def _limit(self) -> float:
        return -float(self.count)

    def null(self, result: Any, anatomy: TowerAnatomy) -> float:
        """Minus the mean rank."""
        return -(result.values.shape[2] - 1) / 2

    def _plain(self) -> dict[str, Any]:
        return {"how": "random", "count": self.count, "seed": self.seed}


def _alone() -> dict[str, type[Rule]]:
    """Rules that judge every token by itself, so that they can run inside a pass."""
    ours = [cls for n, cls in saving.KNOWN.items() if "." not in n and issubclass(cls, Rule)]
    return {cls.__name__: cls for cls in ours if cls._plain is not Rule._plain}


def describe(detector: Any) -> dict[str, Any]:
    """A detector as plain data, for a gate; DetectorError if it judges no token by itself."""
    name = type(detector).__name__
    if _alone().get(name) is not type(detector) or detector._plain() is None:
        raise DetectorError(
            f"Got {detector!r} for a gate; expected a rule that judges every token by itself, because it "
            f"runs inside the pass: one of {sorted(_alone())} with numbers. Write "
            "ss.calibrate(lvlm, samples).v_detector, ss.detectors.Norm(100.0), or for a ViT whose sink is "
            "CLS ss.detectors.VisionTokens('cls')."
        )
    out = {"name": name} | {f.name: plain(getattr(detector, f.name)) for f in fields(detector)}
    return out | ({"dims": [int(dim) for dim in out["dims"]]} if "dims" in out else {})


def detector_of(data: Mapping[str, Any]) -> Any:
    """The detector of `describe`; DetectorError if it is unknown."""
    given, known = dict(data), _alone()
    name = given.pop("name", None)
    if name not in known:
        raise DetectorError(f"Got the detector {name!r}; expected one of {sorted(known)}.")
    try:
        return known[name](**given)
    except TypeError as error:
        raise DetectorError(f"Got {given} for {name}: {error}.") from error


def rule_of(data: Mapping[str, Any]) -> Any:
    """The rule of `sinkscope.kernels.gating` for the plain data of `describe`."""
    return detector_of(data)._plain()
