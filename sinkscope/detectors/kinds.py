"""Tokens chosen by kind or by chance, and detectors as the plain data that a gate holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Bool
from torch import Tensor

from sinkscope.anatomy.context import Context
from sinkscope.anatomy.towers import Anatomy, TowerAnatomy
from sinkscope.checks import is_whole, plain
from sinkscope.detectors.rules import Rule
from sinkscope.errors import DetectorError
from sinkscope.kernels.gating import hashed
from sinkscope.probes import MassiveActivations, Probe, ScoreResult
from sinkscope.protocols import Read
from sinkscope.results import Record, mask_padding
from sinkscope.results.saving import KNOWN
from sinkscope.sites import Site, Tower
from sinkscope.tokens import TokenMap


@dataclass(frozen=True)
class VisionTokens(Rule):
    """ViT tokens of one ``kind`` that the projector keeps: ``"cls"``, or ``"register"``.

    Where CLS is the sink of a vision tower, attention finds it (`Received`) and no rule on states does. A gate
    cannot ask for attention inside its pass, but it can name the token. The score is 1 at such a token and 0
    elsewhere. Nothing is measured: first see with `Received` that this token draws attention in your model.
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


def kept_tokens(tokens: TokenMap, kind: str) -> Bool[Tensor, "image pos"]:
    """ViT tokens of a kind, ``"cls"`` or ``"register"``; DetectorError if the projector drops them."""
    mine, used = tokens.vision.select(kind), tokens.sources >= 0
    fed = torch.zeros_like(mine)
    image = tokens.image_index[..., None].expand_as(tokens.sources)
    fed[image[used], tokens.sources[used]] = True
    if len(mine):
        _refuse_dropped(kind, bool(mine.any()), bool((mine & fed).any()))
    return mine


def check_kept(detector: Any, anatomy: Anatomy, config: Any) -> None:
    """Refuse a `VisionTokens` for a model whose projector passes on no such token."""
    if isinstance(detector, VisionTokens):
        prefix, kind = anatomy.family.prefix(config), detector.kind
        _refuse_dropped(kind, kind in prefix, kind in prefix[anatomy.drops :])


def _refuse_dropped(kind: str, there: bool, kept: bool) -> None:
    """Refuse a kind that the vision tower does not have, or whose tokens the projector drops."""
    why = "whose projector drops it" if there else "whose vision tower has no such token"
    if not kept:
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

    The choice differs from image to image and is the same whenever an image is seen again. It is a
    hash of every token's position and largest channel, so rounding in another dtype can change it. In
    a ViT the CLS token may be among the chosen; most projectors drop it, and no LLM token is made of it.
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
    ours = (cls for name, cls in KNOWN.items() if "." not in name and issubclass(cls, Rule))
    return {cls.__name__: cls for cls in ours if cls._plain is not Rule._plain}


def describe(detector: Any) -> dict[str, Any]:
    """A detector as plain data, for a gate; DetectorError if it judges no token by itself."""
    name = type(detector).__name__
    if _alone().get(name) is not type(detector) or detector._plain() is None:
        raise DetectorError(
            f"Got {detector!r} for a gate; expected a rule that judges every token by itself, "
            f"because it runs inside the pass: one of {sorted(_alone())} with numbers. Write "
            "ss.calibrate(lvlm, samples).v_detector, or ss.detectors.Norm(100.0); where the ViT's sink "
            "is CLS, which attention finds and no state shows, ss.detectors.VisionTokens('cls')."
        )
    out = {f.name: plain(getattr(detector, f.name)) for f in fields(detector)}
    if "dims" in out:
        out["dims"] = [int(dim) for dim in out["dims"]]
    return {"name": name, **out}


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
