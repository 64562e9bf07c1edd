"""The measures behind the model card, against numbers made by hand."""

import runpy
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "scripts" / "evaluate_bundled.py"


@pytest.fixture(scope="module")
def script() -> dict[str, object]:
    return runpy.run_path(str(SCRIPT))


def test_wilson_of_nine_in_ten(script: dict[str, object]) -> None:
    """Newcombe (1998) gives 0.5958 to 0.9821 for nine of ten."""
    interval = script["wilson"](9, 10)
    assert interval.share == 0.9
    assert (interval.low, interval.high) == pytest.approx((0.5958, 0.9821), abs=2e-4)


def test_received_attention_of_a_causal_pattern(script: dict[str, object]) -> None:
    """Three tokens: key 0 receives (1 + 0.5 + 0.2) / 3, and (1 + 1/2 + 1/3) / 3 under uniform."""
    attention = torch.tensor([[[[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.2, 0.2, 0.6]]]])
    received, null, _ = script["received_and_null"](attention, causal=True)
    assert received[0, 0].tolist() == pytest.approx([1.7 / 3, 0.35, 0.6])
    assert null.tolist() == pytest.approx([11 / 18, 5 / 12, 1 / 3])


def test_received_attention_of_a_full_pattern(script: dict[str, object]) -> None:
    attention = torch.tensor([[[[0.9, 0.1], [0.7, 0.3]]]])
    received, null, _ = script["received_and_null"](attention, causal=False)
    assert received[0, 0].tolist() == pytest.approx([0.8, 0.2])
    assert null.tolist() == pytest.approx([0.5, 0.5])


def test_uniform_attention_is_its_own_null(script: dict[str, object]) -> None:
    """Over 20 tokens, keys that fewer than eight queries see are left out: 13 remain."""
    uniform = torch.ones(20, 20).tril() / torch.arange(1, 21)[:, None]
    received, null, eligible = script["received_and_null"](uniform[None, None], causal=True)
    assert torch.allclose(received[0, 0], null)
    assert eligible == 13
