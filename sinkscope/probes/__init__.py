"""Probes: what to read, reduced inside the forward pass, as small typed results."""

from sinkscope.probes.attention import (
    AttentionMass,
    AttentionPatterns,
    MassResult,
    PatternResult,
    ReceivedAttention,
    ReceivedResult,
    ReceivedSummary,
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

__all__ = ["LayerProbe", "Probe", "Read", "Result", "SinkEvidence"]
__all__ += ["AttentionEntropy", "AttentionMass", "AttentionPatterns", "EntropyResult", "MassResult"]
__all__ += ["EvidenceResult", "PatternResult", "ReceivedAttention", "ReceivedResult"]
__all__ += ["ReceivedSummary"]
__all__ += ["ChannelResult", "ChannelValues", "CosineToFirst", "GroupMeans", "GroupMeansResult"]
__all__ += ["LensResult", "LogitLens", "MassiveActivations", "MassiveResult", "NormResult"]
__all__ += ["ResidualStates", "ScoreResult", "SinkDimensionScores", "StateResult", "TokenNorms"]
__all__ += ["AttentionValueResult", "AttentionValues", "ContributionNorms", "ContributionResult"]
__all__ += ["HeadWrites", "ValueNormResult", "ValueNorms", "WriteResult"]
