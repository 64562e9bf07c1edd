"""Every probe keeps the promises of `check_probe`, the example of the contributing page too."""

import pytest

import sinkscope as ss
from examples.kurtosis_probe import TokenKurtosis
from sinkscope.probes import SinkEvidence
from sinkscope.testing import TINY, check_probe

PROBES = [
    ss.AttentionMass({"image": "image"}),
    ss.AttentionPatterns("last"),
    ss.probes.AttentionValues(),
    ss.probes.ChannelValues([0, 3]),
    ss.ContributionNorms({"image": "image"}),
    ss.probes.CosineToFirst(),
    ss.probes.GroupMeans({"image": "image"}),
    ss.HeadWrites(),
    ss.LogitLens(),
    ss.MassiveActivations(),
    ss.ReceivedAttention(),
    ss.ReceivedAttention(others=True),
    ss.probes.ResidualStates("image"),
    ss.SinkDimensionScores([1, 2]),
    SinkEvidence(),
    ss.TokenNorms(),
    ss.ValueNorms(),
    TokenKurtosis(),
]


@pytest.mark.parametrize("family", tuple(TINY))
@pytest.mark.parametrize("probe", PROBES, ids=lambda probe: type(probe).__name__)
def test_probe_keeps_its_contract(tiny, batch, family, probe):
    lvlm = tiny(family)
    check_probe(probe, lvlm, batch(lvlm))
