"""One of every probe, on both towers where it works on both, with the columns of its table."""

import dataclasses
import inspect

import sinkscope as ss
from sinkscope import probes


def of_tower(tower, chosen, rows):
    """Probe -> what stands behind batch and layer in its table."""
    some = {"some": chosen}
    return {
        probes.AttentionEntropy(some, tower=tower): "head query entropy null",
        probes.AttentionEntropy(None, queries=rows, tower=tower): "head query entropy null",
        ss.AttentionMass(some, tower=tower): "head query group mass null",
        ss.AttentionMass(
            some, queries=rows, precision="float32", tower=tower
        ): "head query group mass null",
        ss.AttentionPatterns(rows, tower=tower): "head row key attention",
        probes.AttentionValues(tokens=chosen, tower=tower): "kv_head pos dim value",
        probes.ChannelValues([0, 3], tower=tower): "site pos channel value",
        ss.ContributionNorms(some, tower=tower): "query group norm",
        probes.CosineToFirst(tower=tower): "pos score",
        probes.GroupMeans({**some, "rest": "all"}, tower=tower): "group channel value count",
        ss.HeadWrites(tower=tower): "head key norm",
        ss.MassiveActivations(tower=tower): "pos rank value channel",
        ss.ReceivedAttention(tower=tower): "head key received null",
        ss.ReceivedAttention(others=True, tower=tower): "head key received null",
        ss.ReceivedAttention(events=True, tower=tower): "head key received null",
        probes.ResidualStates(tokens=chosen, tower=tower): "pos channel value",
        ss.SinkDimensionScores([1, 2], tower=tower): "pos score",
        probes.SinkEvidence(tower=tower): "pos medians prominence",
        ss.TokenNorms(tower=tower): "pos norm",
        ss.ValueNorms(tower=tower): "kv_head pos norm",
    }


def tables():
    """Every probe and the columns of its table; `test_contract` compares with what is exported."""
    return {
        ss.LogitLens(): "row rank token logprob",
        **of_tower("language", "image", "last"),
        **of_tower("vision", "patch", "patch"),
    }


def every_probe():
    return list(tables())


def exported():
    """The classes of `sinkscope.probes` that are probes."""
    named = [getattr(probes, name) for name in probes.__all__]
    bases = (probes.Probe, probes.LayerProbe)
    classes = [one for one in named if inspect.isclass(one) and one not in bases]
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
