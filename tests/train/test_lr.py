"""Learning-rate schedules against values worked out by hand."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest

from spt_fast.config import Schedule
from spt_fast.fields import Span
from spt_fast.train.lr import learning_rate


def rates(schedule: Schedule, steps: int) -> list[float]:
    return [learning_rate(schedule, 1.0, step, steps, 100) for step in range(steps)]


def test_warmup_reaches_the_peak_at_its_last_step() -> None:
    got = rates(Schedule(name="constant", warmup=Span.parse("4 steps", "")), 8)
    assert got == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]


def test_cosine_is_half_way_in_the_middle_and_final_at_the_horizon() -> None:
    schedule = Schedule(name="cosine", final=Fraction(1, 10))
    got = rates(schedule, 100)
    assert got[0] == 1.0
    assert got[50] == pytest.approx(0.55)
    assert learning_rate(schedule, 1.0, 100, 100, 100) == pytest.approx(0.1)
    assert learning_rate(schedule, 1.0, 500, 100, 100) == pytest.approx(0.1)
    assert all(a > b for a, b in itertools.pairwise(got))


def test_a_horizon_beyond_the_phase_cuts_the_shape_off() -> None:
    long = Schedule(name="cosine", final=Fraction(1, 10), horizon=100_000)  # 1000 steps of 100 tokens
    got = rates(long, 100)
    assert got[99] == pytest.approx(learning_rate(Schedule(name="cosine", final=Fraction(1, 10)), 1.0, 99, 1000, 100))
    assert got[99] > 0.97


def test_linear_and_wsd() -> None:
    linear = Schedule(name="linear", final=Fraction(0))
    assert rates(linear, 4) == [1.0, 0.75, 0.5, 0.25]
    wsd = Schedule(name="wsd", final=Fraction(0), decay=Span.parse("40%", ""))
    assert rates(wsd, 10) == pytest.approx([1, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25])
