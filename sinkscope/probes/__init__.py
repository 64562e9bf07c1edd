"""Probes: what to read, reduced inside the forward pass, as small typed results."""

from sinkscope.probes.attention import (
    AttentionMass,
    AttentionPatterns,
    MassResult,
    PatternResult,
    ReceivedAttention,
    ReceivedResult,
)
from sinkscope.probes.channels import ChannelResult, ChannelValues
from sinkscope.probes.evidence import EvidenceResult, SinkEvidence
from sinkscope.probes.lens import LensResult, LogitLens
from sinkscope.probes.means import GroupMeans, GroupMeansResult
from sinkscope.probes.protocol import Probe, Read, Result
from sinkscope.probes.residual import (
    CosineToFirst,
    MassiveActivations,
    MassiveResult,
    NormResult,
    ResidualStates,
    ScoreResult,
    SinkDimensionScores,
    StateResult,
    TokenNorms,
)
from sinkscope.probes.values import (
    AttentionValueResult,
    AttentionValues,
    ContributionNorms,
    ContributionResult,
    ValueNormResult,
    ValueNorms,
)
from sinkscope.probes.writes import HeadWrites, WriteResult

__all__ = [
    "AttentionMass",
    "AttentionPatterns",
    "AttentionValueResult",
    "AttentionValues",
    "ChannelResult",
    "ChannelValues",
    "ContributionNorms",
    "ContributionResult",
    "CosineToFirst",
    "EvidenceResult",
    "GroupMeans",
    "GroupMeansResult",
    "HeadWrites",
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
