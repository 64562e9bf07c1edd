"""Which rules decide what a sink is: one order for traces, sweeps, gates, probes and comparisons.

1. **given**: the detector that the caller names;
2. **published**: constants that independent sources agree on for this very checkpoint;
3. **gap**: the gap rule, on the sample itself or calibrated on samples;
4. **generic**: massive activations as Sun et al. define them (``|h| > 100`` and 1000 medians), where
   attention cannot be measured: a prompt so short that no token is seen by eight others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sinkscope.detectors.calibrate import Calibration, calibrate
from sinkscope.detectors.constants import known_for
from sinkscope.detectors.gap import DRAWS, Gap
from sinkscope.detectors.rules import Detector, Massive
from sinkscope.detectors.run import check_detector
from sinkscope.probes.attention import LEAST_SEEING

if TYPE_CHECKING:
    from sinkscope.models.lvlm import LVLM
    from sinkscope.models.prepare import Sample

GENERIC = "the generic definition (massive: |h| > 100 and 1000 medians)"


@dataclass(frozen=True)
class SinkRules:
    """The rule of each kind of sink, and where it is from.

    Attributes:
        v: The rule for V-sinks, on the states that feed the projector.
        low: The rule for L-sinks, on what each LLM layer reads.
        v_source: Where the V rule is from, in words.
        l_source: Where the L rule is from.
        calibration: The calibration, if one was made or given.
    """

    v: Detector
    low: Detector
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
        cls, lvlm: LVLM, sample: Sample, v: Any = None, low: Any = None, draws: float = DRAWS
    ) -> SinkRules:
        """Rules for one sample, which judges itself where nothing is given or published.

        Args:
            lvlm: The model.
            sample: The sample.
            v: The rule for V-sinks, or None.
            low: The rule for L-sinks, or None.
            draws: Of `Gap`.

        Raises:
            DetectorError: If a rule is none.
        """
        short = int(sample.tokens.live.sum(dim=1).max()) <= LEAST_SEEING
        last = (Massive(), GENERIC) if short else (Gap(draws=draws), "the gap rule on this sample")
        return cls._in_order(lvlm, v, low, last, last)

    @classmethod
    def on_others(
        cls,
        lvlm: LVLM,
        samples: Callable[[], Sequence[Sample]],
        v: Any = None,
        low: Any = None,
        *,
        what: str = "",
        calibration: Calibration | None = None,
        remote: bool | str | None = None,
        progress: bool | None = False,
    ) -> SinkRules:
        """Rules for many samples: what is neither given nor published is calibrated on some.

        Args:
            lvlm: The model.
            samples: Makes the samples to calibrate on; called if that is needed.
            v: The rule for V-sinks, or None.
            low: The rule for L-sinks, or None.
            what: What the samples are, for the text; empty for their number.
            calibration: A calibration to take rules from, instead of making one.
            remote: See `LVLM.run`.
            progress: See `calibrate`.

        Raises:
            DetectorError: If a rule is none.
            CalibrationError: If a calibration is needed and there is no sample.
        """
        missing = _missing(lvlm, v, low)
        if calibration is None and missing:
            calibration = calibrate(
                lvlm, samples(), towers=missing, remote=remote, progress=progress
            )
        if calibration is None:
            return cls._in_order(lvlm, v, low, None, None)
        on = what or f"{calibration.n_samples} samples"
        towers = (calibration.vision, calibration.language)
        parts = [
            (tower.detector, f"calibrated on {on}" + ("" if tower.found else ", which show none"))
            for tower in towers
        ]
        made = cls._in_order(lvlm, v, low, *parts)
        return cls(made.v, made.low, made.v_source, made.l_source, calibration)

    @classmethod
    def _in_order(cls, lvlm: LVLM, v: Any, low: Any, last_v: Any, last_l: Any) -> SinkRules:
        known = known_for(lvlm)
        published: list[Any] = [None, None]
        if known is not None and known.default:
            source = f"published constants of {known.name}"
            published = [
                None if rule is None else (rule, source)
                for rule in (known.v_detector, known.l_detector)
            ]
        rules = []
        for given, constants, last in zip((v, low), published, (last_v, last_l), strict=True):
            rules.append((given, "given") if given is not None else constants or last)
        (chosen_v, v_source), (chosen_l, l_source) = rules
        return cls(check_detector(chosen_v), check_detector(chosen_l), v_source, l_source)


def _missing(lvlm: LVLM, v: Any, low: Any) -> list[str]:
    """Towers whose rule is neither given nor published."""
    known = known_for(lvlm)
    if known is None or not known.default:
        published: tuple[Any, Any] = (None, None)
    else:
        published = (known.v_detector, known.l_detector)
    rules = {"vision": (v, published[0]), "language": (low, published[1])}
    return [tower for tower, both in rules.items() if both == (None, None)]
