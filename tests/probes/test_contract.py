"""Every probe keeps the promises of `check_probe`, the example of the contributing page too."""

import pytest

from examples.kurtosis_probe import TokenKurtosis
from sinkscope.testing import TINY, check_probe
from tests.probes.everything import every_probe, exported

PROBES = [*(probe for probe in every_probe() if probe.tower == "language"), TokenKurtosis()]


@pytest.mark.parametrize("family", tuple(TINY))
@pytest.mark.parametrize("probe", PROBES, ids=lambda probe: type(probe).__name__)
def test_probe_keeps_its_contract(tiny, batch, family, probe):
    lvlm = tiny(family)
    check_probe(probe, lvlm, batch(lvlm))


def test_nothing_is_missing():
    assert {type(probe) for probe in every_probe()} == exported()
