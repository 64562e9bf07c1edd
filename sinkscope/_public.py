"""Every public name, imported from where it lives."""

from sinkscope import (
    bundled,
    detectors,
    errors,
    example,
    experiments,
    interventions,
    lsg,
    models,
    probes,
    testing,
    viz,
)
from sinkscope.bundled import load_bundled
from sinkscope.detectors import calibrate, detect
from sinkscope.errors import SinkscopeError
from sinkscope.example.load import load_example
from sinkscope.experiments import (
    RandomControl,
    baselines,
    compare,
    gate_coefficients,
    linear_probes,
    lsg_grid,
    sweep,
    trace_generation,
    trace_sinks,
)
from sinkscope.interventions import (
    AblateActivations,
    AblateValues,
    AttentionKnockout,
    MaskKeys,
    PatchActivations,
    Redistribute,
    ScaleAttention,
    ScaleKeys,
    TestTimeRegister,
)
from sinkscope.lsg import LSG, train_lsg
from sinkscope.models import LVLM
from sinkscope.probes import (
    AttentionMass,
    AttentionPatterns,
    ContributionNorms,
    HeadWrites,
    LogitLens,
    MassiveActivations,
    ReceivedAttention,
    SinkDimensionScores,
    TokenNorms,
    ValueNorms,
)
from sinkscope.results import load_run
from sinkscope.sites import Site

ROOMS = ("probes", "interventions", "detectors", "experiments", "lsg", "models", "viz", "testing")
"""Where a name may be that is not at the top level."""

__all__ = [
    "LSG",
    "LVLM",
    "AblateActivations",
    "AblateValues",
    "AttentionKnockout",
    "AttentionMass",
    "AttentionPatterns",
    "ContributionNorms",
    "HeadWrites",
    "LogitLens",
    "MaskKeys",
    "MassiveActivations",
    "PatchActivations",
    "RandomControl",
    "ReceivedAttention",
    "Redistribute",
    "ScaleAttention",
    "ScaleKeys",
    "SinkDimensionScores",
    "SinkscopeError",
    "Site",
    "TestTimeRegister",
    "TokenNorms",
    "ValueNorms",
    "baselines",
    "bundled",
    "calibrate",
    "compare",
    "detect",
    "detectors",
    "errors",
    "example",
    "experiments",
    "gate_coefficients",
    "interventions",
    "linear_probes",
    "load_bundled",
    "load_example",
    "load_run",
    "lsg",
    "lsg_grid",
    "models",
    "probes",
    "sweep",
    "testing",
    "trace_generation",
    "trace_sinks",
    "train_lsg",
    "viz",
]
