"""One of every probe, on both towers where it works on both."""

import dataclasses
import inspect

import sinkscope as ss
from sinkscope import probes

ONE_TOWER = [ss.LogitLens()]


def of_tower(tower, chosen, rows):
    return [
        ss.AttentionMass({"some": chosen}, tower=tower),
        ss.AttentionMass({"some": chosen}, queries=rows, precision="float32", tower=tower),
        ss.AttentionPatterns(rows, tower=tower),
        ss.probes.AttentionValues(tokens=chosen, tower=tower),
        ss.probes.ChannelValues([0, 3], tower=tower),
        ss.ContributionNorms({"some": chosen}, tower=tower),
        ss.probes.CosineToFirst(tower=tower),
        ss.probes.GroupMeans({"some": chosen, "rest": "all"}, tower=tower),
        ss.HeadWrites(tower=tower),
        ss.MassiveActivations(tower=tower),
        ss.ReceivedAttention(tower=tower),
        ss.ReceivedAttention(others=True, tower=tower),
        probes.ResidualStates(tokens=chosen, tower=tower),
        ss.SinkDimensionScores([1, 2], tower=tower),
        probes.SinkEvidence(tower=tower),
        ss.TokenNorms(tower=tower),
        ss.ValueNorms(tower=tower),
    ]


def every_probe():
    """A list that `test_nothing_is_missing` compares with what the package exports."""
    return [
        *ONE_TOWER,
        *of_tower("language", "image", "last"),
        *of_tower("vision", "patch", "patch"),
    ]


def exported():
    """The classes of `sinkscope.probes` that are probes."""
    named = [getattr(probes, name) for name in probes.__all__]
    classes = [one for one in named if inspect.isclass(one) and one is not probes.Probe]
    return {one for one in classes if hasattr(one, "reads") and hasattr(one, "finish")}


EIGENVALUES = {"stable_rank": 1e-5}
"""Fields whose last bits depend on where their inputs lie in memory: LAPACK's, across processes."""


def assert_same(one, other, what="", rounded=()):
    """All tensors of two results are bitwise the same; NaN counts as equal to NaN.

    Fields named in ``rounded`` (name -> relative tolerance) need not be.
    """
    for name, value in vars(one).items():
        again = getattr(other, name)
        if dataclasses.is_dataclass(value):  # a result made of results
            assert_same(value, again, (what, name), rounded)
        if not hasattr(value, "isnan"):
            continue
        assert value.shape == again.shape, (what, name)
        assert value.dtype == again.dtype, (what, name)
        same = (value == again) | (value != value) & (again != again)
        if name in rounded:
            same |= (value - again).abs() <= rounded[name] * value.abs()
        assert same.all(), (what, name)
