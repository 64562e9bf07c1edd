"""Rounds of benchmarks: ratios within a round, intervals, and what happens to a line that fails or has no time."""

import time

import pytest

from benchmarks.timing import Line, interval, table, time_rounds, verdict

LATER = 1e9


class Clock:
    """Says what each run should have taken, in turn, instead of measuring."""

    def __init__(self, **seconds):
        self.seconds = {name: list(values) for name, values in seconds.items()}

    def measure(self, run):
        found = self.seconds[run()].pop(0)
        if isinstance(found, Exception):
            raise found
        return found, 7


def timed(clock, rounds, until=None, warm=False, strict=False):
    aims = {"good": 1.5, "bad": 1.5}
    lines = [Line(name, lambda name=name: name, aims.get(name)) for name in clock.seconds]
    until = time.monotonic() + LATER if until is None else until
    rows = time_rounds(lines, rounds, clock.measure, until, warm=warm, strict=strict)
    return {row["label"]: row for row in rows}


@pytest.mark.parametrize(
    ("n", "low", "high"), [(1, 0, 0), (5, 0, 4), (6, 0, 5), (9, 1, 7), (31, 9, 21)]
)
def test_intervals_of_a_median_by_hand(n, low, high):
    """The number below the median is Binomial(n, 1/2): of 9, at most 1 in 10 / 512 of cases."""
    assert interval([float(x) for x in reversed(range(n))]) == (low, high)


def test_ratios_are_formed_within_a_round_and_the_first_pass_does_not_count():
    rows = timed(Clock(plain=[99, 1, 2, 4], good=[50, 1, 3, 4], bad=[50, 2, 2, 12]), 3, warm=True)
    assert rows["good"]["ratios"] == [1.0, 1.5, 1.0]
    assert rows["bad"]["ratio"] == 2.0
    assert (rows["good"]["met"], rows["bad"]["met"], rows["plain"]["met"]) == (True, False, None)
    assert (rows["good"]["rounds"], rows["good"]["peak"]) == (3, 7)
    assert verdict(list(rows.values())) == "1 of 2 aims met; missed: bad (2.00)."


def test_a_line_that_fails_says_why_and_the_others_go_on():
    given = {"plain": [1, 1, 1], "good": [1, 1, 1], "bad": [1, ValueError("no | room")]}
    rows = timed(Clock(**given), 3)
    assert rows["bad"]["failed"] == "ValueError: no | room"
    assert rows["good"]["rounds"] == 3
    assert "| bad | 1 |  | ValueError: no / room |  | 1.5 |  |" in table(
        list(rows.values()), memory=True
    )
    assert "missed: bad (ValueError" in verdict(list(rows.values()))
    with pytest.raises(ValueError, match="room"):
        timed(Clock(**given), 3, strict=True)


def test_without_a_plain_pass_nothing_is_compared():
    rows = timed(Clock(plain=[1, MemoryError("full")], good=[1, 1]), 2)
    assert {row["failed"] for row in rows.values()} == {"MemoryError: full", "no plain pass"}


def test_a_round_that_the_time_ends_is_dropped():
    rows = timed(Clock(plain=[1], good=[1]), 1, until=time.monotonic() - 1)
    assert {row["failed"] for row in rows.values()} == {"no time"}
    clock = Clock(plain=[1] * 99, good=[1] * 99)
    real = clock.measure

    def slow(run):
        time.sleep(0.05)
        return real(run)

    clock.measure = slow
    rows = timed(clock, 99, until=time.monotonic() + 0.42)
    assert rows["plain"]["rounds"] == rows["good"]["rounds"] < 5
