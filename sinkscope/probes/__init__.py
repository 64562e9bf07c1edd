"""Probes: what to read, reduced inside the forward pass, as small typed results."""

from sinkscope.probes.attention import (
    AttentionMass,
    AttentionPatterns,
    MassResult,
    PatternResult,
    ReceivedAttention,
    ReceivedResult,
)
from sinkscope.probes.entropy import AttentionEntropy, EntropyResult
from sinkscope.probes.evidence import EvidenceResult, SinkEvidence
from sinkscope.probes.per_layer import LayerProbe
from sinkscope.probes.residual import (
    ChannelResult,
    ChannelValues,
    CosineToFirst,
    GroupMeans,
    GroupMeansResult,
    LensResult,
    LogitLens,
    MassiveActivations,
    MassiveResult,
    NormResult,
    ResidualStates,
    ScoreResult,
    SinkDimensionScores,
    StateResult,
    TokenNorms,
)
from sinkscope.probes.writes import (
    AttentionValueResult,
    AttentionValues,
    ContributionNorms,
    ContributionResult,
    HeadWrites,
    ValueNormResult,
    ValueNorms,
    WriteResult,
)
from sinkscope.protocols import Probe, Read
from sinkscope.results import Result

__all__ = [
    "AttentionEntropy",
    "AttentionMass",
    "AttentionPatterns",
    "AttentionValueResult",
    "AttentionValues",
    "ChannelResult",
    "ChannelValues",
    "ContributionNorms",
    "ContributionResult",
    "CosineToFirst",
    "EntropyResult",
    "EvidenceResult",
    "GroupMeans",
    "GroupMeansResult",
    "HeadWrites",
    "LayerProbe",
    "LensResult",
    "LogitLens",
    "MassResult",
    "MassiveActivations",
    "MassiveResult",
    "NormResult",
    "PatternResult",
    "Probe",
    "Read",
    "ReceivedAttention",
    "ReceivedResult",
    "ResidualStates",
    "Result",
    "ScoreResult",
    "SinkDimensionScores",
    "SinkEvidence",
    "StateResult",
    "TokenNorms",
    "ValueNormResult",
    "ValueNorms",
    "WriteResult",
]
