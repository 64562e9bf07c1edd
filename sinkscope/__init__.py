"""sinkscope: attention sinks in vision-language models, seen, traced and explained.

The usual way in::

    import sinkscope as ss

    lvlm = ss.load_bundled()                                  # or ss.LVLM.from_pretrained(name)
    sample = lvlm.prepare(images=image, text="How many shapes are there?")
    trace = ss.trace_sinks(lvlm, sample)
    print(trace.summary())
"""

from sinkscope import (
    bundled,
    detectors,
    errors,
    experiments,
    interventions,
    probes,
    testing,
    viz,
)
from sinkscope.bundled.load import load_bundled
from sinkscope.detectors import Calibration, Detection, agreement, calibrate, detect, detect_all
from sinkscope.errors import SinkscopeError
from sinkscope.experiments import (
    Comparison,
    SinkRecord,
    SinkTrace,
    compare,
    nop_or_broadcast,
    trace_sinks,
)
from sinkscope.interventions import (
    AblateActivations,
    AblateValues,
    AttentionKnockout,
    Effect,
    EvictKeys,
    ImageCentric,
    MaskKeys,
    NeuronActivity,
    PatchActivations,
    RandomControl,
    Redistribute,
    ScaleAttention,
    ScaleKeys,
    ScaleTokens,
    SinkToFront,
    TestTimeRegister,
    find_register_neurons,
)
from sinkscope.models import LVLM, Generation, Run, Sample
from sinkscope.probes import (
    AttentionMass,
    AttentionPatterns,
    ChannelValues,
    ContributionNorms,
    CosineToFirst,
    HeadWrites,
    LogitLens,
    MassiveActivations,
    ReceivedAttention,
    ResidualStates,
    SinkDimensionScores,
    TokenNorms,
    ValueNorms,
)
from sinkscope.sites import Site
from sinkscope.tokens import TokenMap, VisionMap

__version__ = "0.1.0"

__all__ = [
    "LVLM",
    "AblateActivations",
    "AblateValues",
    "AttentionKnockout",
    "AttentionMass",
    "AttentionPatterns",
    "Calibration",
    "ChannelValues",
    "Comparison",
    "ContributionNorms",
    "CosineToFirst",
    "Detection",
    "Effect",
    "EvictKeys",
    "Generation",
    "HeadWrites",
    "ImageCentric",
    "LogitLens",
    "MaskKeys",
    "MassiveActivations",
    "NeuronActivity",
    "PatchActivations",
    "RandomControl",
    "ReceivedAttention",
    "Redistribute",
    "ResidualStates",
    "Run",
    "Sample",
    "ScaleAttention",
    "ScaleKeys",
    "ScaleTokens",
    "SinkDimensionScores",
    "SinkRecord",
    "SinkToFront",
    "SinkTrace",
    "SinkscopeError",
    "Site",
    "TestTimeRegister",
    "TokenMap",
    "TokenNorms",
    "ValueNorms",
    "VisionMap",
    "__version__",
    "agreement",
    "bundled",
    "calibrate",
    "compare",
    "detect",
    "detect_all",
    "detectors",
    "errors",
    "experiments",
    "find_register_neurons",
    "interventions",
    "load_bundled",
    "nop_or_broadcast",
    "probes",
    "testing",
    "trace_sinks",
    "viz",
]
