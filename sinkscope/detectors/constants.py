"""Published sink constants as a table with sources. Channels are 0-based.

Rows whose sources agree are used as defaults by `sinkscope.trace_sinks`; the others are listed so
that a user can see what others reported, and are never applied silently.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sinkscope.detectors.rules import Detector, Norm, SinkDimensions

if TYPE_CHECKING:
    import pandas as pd

    from sinkscope.models.lvlm import LVLM


@dataclass(frozen=True)
class Known:
    """What is published for one model.

    Attributes:
        name: The model.
        model_type: ``config.model_type``.
        text_width: Hidden size of the decoder.
        text_layers: Blocks of the decoder.
        vision_width: Width of the vision tower, or None if any.
        l_dims: Sink channels of the decoder.
        tau: Threshold on the RMS score.
        v_detector: Rule for V-sinks on the states that feed the projector, or None.
        source: Where it is from.
        default: Whether the sources agree enough to use it unasked.
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


KNOWN = (
    Known(
        "LLaVA-1.5-7B",
        "llava",
        4096,
        32,
        1024,
        (1415, 2533),
        20.0,
        Norm(100.0),
        "L: Kang et al. 2503.03321 (code), Sun et al. 2402.17762 (code). V: ViT norm >= 100, "
        "Luo et al. 2510.08510; the threshold of Choi et al. 2604.03316 is unpublished.",
        True,
    ),
    Known(
        "LLaVA-1.5-13B",
        "llava",
        5120,
        40,
        1024,
        (2100, 4743),
        20.0,
        Norm(100.0),
        "L: Kang et al. 2503.03321 (code), Sun et al. 2402.17762 (code). V: as for the 7B model, "
        "which has the same tower.",
        True,
    ),
    Known(
        "Qwen2.5-VL-7B",
        "qwen2_5_vl",
        3584,
        28,
        1280,
        (458, 2570),
        20.0,
        None,
        "Channels in four independent third-party codes; 2718 is also large. No V rule published.",
        False,
    ),
    Known(
        "Qwen2.5-VL-3B",
        "qwen2_5_vl",
        2048,
        36,
        1280,
        (1874, 1819),
        20.0,
        None,
        "Two third-party codes that differ: {318, 1874, 1819} and {1874, 1819}.",
        False,
    ),
    Known(
        "Qwen2.5-VL-32B",
        "qwen2_5_vl",
        5120,
        64,
        1280,
        (4675, 3094),
        20.0,
        None,
        "One third-party code.",
        False,
    ),
)


def known_for(lvlm: LVLM) -> Known | None:
    """The row whose model type and sizes are this model's, or None.

    Sizes decide, not names, so that fine-tuned and renamed copies are found too. A copy whose
    decoder was replaced keeps its sizes and would be found wrongly: look at the flagged fraction.
    """
    a = lvlm.anatomy
    for row in KNOWN:
        sizes = (row.model_type, row.text_width, row.text_layers)
        if sizes == (a.model_type, a.language.d_model, a.language.n_layers) and (
            row.vision_width in (None, a.vision.d_model)
        ):
            return row
    return None


def table() -> pd.DataFrame:
    """All published constants with their sources."""
    import pandas as pd

    rows: list[dict[str, Any]] = [
        {
            "model": row.name,
            "LLM sink channels": list(row.l_dims),
            "tau (RMS)": row.tau,
            "V rule": repr(row.v_detector) if row.v_detector else None,
            "used by default": row.default,
            "source": row.source,
        }
        for row in KNOWN
    ]
    return pd.DataFrame(rows)
