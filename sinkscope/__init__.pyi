"""Every public name, and where it lives: type checkers read this file, and so does `sinkscope` when a name is asked for."""

from . import (
    bundled,
    detectors,
    errors,
    example,
    experiments,
    interventions,
    lsg,
    models,
    probes,
    published,
    scale,
    testing,
    viz,
)
from .anatomy.families import register_family
from .bundled import load_bundled
from .detectors import calibrate, detect
from .errors import SinkscopeError
from .example.load import load_example
from .experiments import (
    RandomControl,
    baselines,
    compare,
    gate_coefficients,
    linear_probes,
    lsg_grid,
    sweep,
    trace_dataset,
    trace_generation,
    trace_sinks,
)
from .interventions import (
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
from .lsg import LSG, train_lsg
from .models import LVLM
from .probes import (
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
from .results import load_run
from .sites import Site

__version__: str

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
    "published",
    "register_family",
    "scale",
    "sweep",
    "testing",
    "trace_dataset",
    "trace_generation",
    "trace_sinks",
    "train_lsg",
    "viz",
]
