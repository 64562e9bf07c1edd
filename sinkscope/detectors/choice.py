"""Published sink constants with their sources (channels are 0-based), and which rules are used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from sinkscope.detectors.calibration import Calibration, calibrate
from sinkscope.detectors.detection import Detector, check_detector
from sinkscope.detectors.gap import DRAWS, Gap
from sinkscope.detectors.rules import Massive, Norm, SinkDimensions
from sinkscope.models.inputs import Sample
from sinkscope.models.lvlm import LVLM
from sinkscope.probes.attention import LEAST_SEEING
from sinkscope.results import Record


@dataclass(frozen=True)
class Known:
    """What is published for one model.

    Attributes:
        text_width: Hidden size of the decoder, which has ``text_layers`` blocks.
        vision_width: Width of the vision tower, or None if any.
        l_dims: Sink channels of the decoder, with the threshold ``tau`` on the RMS score.
        v_detector: Rule for V-sinks on the states that feed the projector, or None.
        default: Whether the sources agree enough to use it unasked; else it is only shown.
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
    """The row whose model type and sizes are this model's, or None.

    Sizes decide, not names, so that fine-tuned and renamed copies are found too. A copy whose
    decoder was replaced keeps its sizes and would be found wrongly: look at the flagged fraction.
    """
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


GENERIC = "the generic definition (massive: |h| > 100 and 1000 medians)"


@dataclass(frozen=True)
class SinkRules(Record):
    """The rule of each kind of sink, and where it is from: the one place that knows the order.

    Given, published for this model, calibrated on samples or the gap rule, the generic definition. ``v``
    is for V-sinks, on the states that feed the projector, ``l_rule`` for L-sinks, on what each LLM layer
    reads; ``calibration`` is the one that was made or given, if any.
    """

    v: Detector
    l_rule: Detector
    v_source: str
    l_source: str
    calibration: Calibration | None = None

    @property
    def chosen(self) -> str:
        """Where both are from, in a few words."""
        if self.v_source == self.l_source:
            return self.v_source
        return f"V: {self.v_source}; L: {self.l_source}"

    @classmethod
    def on_sample(
        cls, lvlm: LVLM, sample: Sample, v: Any = None, l_rule: Any = None, draws: float = DRAWS
    ) -> SinkRules:
        """Rules for one sample, which judges itself where nothing is given (``v``, ``l_rule``) or published.

        ``draws`` is that of `Gap`; DetectorError if a rule is none.
        """
        short = int(sample.tokens.live.sum(dim=1).max()) <= LEAST_SEEING
        last = (Massive(), GENERIC) if short else (Gap(draws=draws), "the gap rule on this sample")
        return cls._in_order(lvlm, (v, l_rule), (last, last))

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

        ``samples`` makes the samples, called if that is needed; ``what`` they are in words, empty for their
        number. ``calibration`` is one to take rules from, instead of making one. For ``remote``,
        ``progress`` and CalibrationError see `calibrate`.
        """
        given = zip(published(lvlm).items(), (v, l_rule), strict=True)
        missing = [tower for (tower, known), rule in given if known is None and rule is None]
        if calibration is None and missing:
            how: dict[str, Any] = {"remote": remote, "progress": progress}
            calibration = calibrate(lvlm, samples(), towers=missing, **how)
        if calibration is None:
            return cls._in_order(lvlm, (v, l_rule), (None, None))
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
