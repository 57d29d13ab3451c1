from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spt_fast.data import visits
from spt_fast.data.ring import Ring
from spt_fast.data.visits import Visits, document_visits
from tests.processor_time import least_seconds


def counted(ring: Ring, count: int) -> np.ndarray:
    """Visits of each token, by reading every window."""
    read = (ring.starts(np.arange(count))[:, None] + np.arange(ring.context)) % ring.num_tokens
    return np.bincount(read.ravel(), minlength=ring.num_tokens)


def check(ring: Ring, count: int, start: int, end: int) -> None:
    visits = counted(ring, count)[start:end]
    expected = Visits(end - start, visits.sum(), visits.min(), visits.max())
    assert document_visits([(ring, count)], start, end) == expected


@settings(max_examples=400)
@given(
    context=st.integers(1, 40),
    windows=st.integers(1, 30),
    odd=st.integers(0, 39),
    epochs=st.floats(0, 12),
    place=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_against_reading_every_window(
    context: int, windows: int, odd: int, epochs: float, place: tuple[float, float]
) -> None:
    ring = Ring(max(context * windows + odd % context, context + 1), context, 5, "chem")
    first, last = sorted(int(p * (ring.num_tokens - 1)) for p in place)
    check(ring, int(epochs * ring.windows_per_epoch), first, last + 1)


@pytest.mark.parametrize("num_tokens", [960, 967])
def test_every_document_and_the_whole_source(num_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(visits, "_STRETCH_WINDOWS", 7)  # so that the whole source takes several stretches
    ring = Ring(num_tokens, 16, 5, "chem")
    for count in (0, 1, 59, 60, 61, 333):
        total = 0
        for start in range(0, num_tokens, 23):
            end = min(start + 23, num_tokens)
            check(ring, count, start, end)
            total += document_visits([(ring, count)], start, end).token_visits
        check(ring, count, 0, num_tokens)
        assert total == count * 16


def test_an_empty_document() -> None:
    assert document_visits([(Ring(100, 16, 0, "a"), 7)], 5, 5) == Visits(0, 0, 0, 0)


def test_a_document_of_an_immense_run_takes_no_time() -> None:
    ring, count = Ring(10**13 + 1, 2048, 0, "web"), 2**61 + 12345
    visits = document_visits([(ring, count)], 10**12, 10**12 + 100_000)
    seconds = least_seconds(lambda: document_visits([(ring, count)], 10**12, 10**12 + 100_000))
    assert seconds < 0.02
    about = count * 2048 / ring.num_tokens
    assert visits.max_visits - visits.min_visits <= 2
    assert abs(visits.min_visits - about) <= 2
    assert visits.min_visits <= visits.token_visits / visits.tokens <= visits.max_visits


def test_epochs_are_exact() -> None:
    assert Ring(1000, 16, 0, "a").epochs(125) == Fraction(2)
    assert Ring(1001, 16, 0, "a").epochs(1) == Fraction(16, 1001)
