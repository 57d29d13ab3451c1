from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spt_fast.data.shuffle import MAX_SIZE, Permutation, derive_key, epoch_key

KEY = derive_key(0, "ring", "web")


def whole(size: int, epoch: int) -> np.ndarray:
    return Permutation(size, epoch_key(KEY, epoch)).at_many(np.arange(size))


def surprise(observed: np.ndarray, expected: float | np.ndarray, freedom: int) -> float:
    """By how many standard deviations chi-squared exceeds its mean."""
    chi_squared = float(((observed - expected) ** 2 / expected).sum())
    return (chi_squared - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("sizes", [range(1, 400), [2**14, 2**14 + 1, 99_991], [2**20 - 1, 2**20 + 1]])
def test_every_value_once_and_the_inverse(sizes: range | list[int]) -> None:
    for size in sizes:
        permutation = Permutation(size, epoch_key(KEY, size))
        values = permutation.at_many(np.arange(size))
        assert (np.bincount(values, minlength=size) == 1).all()
        assert (permutation.positions_of(values) == np.arange(size)).all()


@settings(max_examples=150)
@given(size=st.integers(2, MAX_SIZE), seed=st.integers(), epoch=st.integers(0, 2**62), data=st.data())
def test_python_and_cpp_agree(size: int, seed: int, epoch: int, data: st.DataObject) -> None:
    permutation = Permutation(size, epoch_key(derive_key(seed, "x"), epoch))
    index = data.draw(st.integers(0, size - 1))
    value = permutation.at(index)
    assert 0 <= value < size
    assert permutation.position_of(value) == index
    assert permutation.at_many(np.array([index])).tolist() == [value]
    assert permutation.positions_of(np.array([value])).tolist() == [index]


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_a_few_things_come_in_every_order_equally_often(size: int) -> None:
    epochs = 12_000
    orders = {order: i for i, order in enumerate(itertools.permutations(range(size)))}
    seen = np.bincount([orders[tuple(whole(size, epoch))] for epoch in range(epochs)], minlength=len(orders))
    assert abs(surprise(seen, epochs / len(orders), len(orders) - 1)) < 4


@pytest.mark.parametrize("size", [16, 32, 100, 128, 256])
def test_over_many_epochs_each_place_and_each_difference_of_neighbours_is_uniform(size: int) -> None:
    epochs = 3000
    values_EN = np.stack([whole(size, epoch) for epoch in range(epochs)])
    places = np.stack([np.bincount(column, minlength=size) for column in values_EN.T])
    assert abs(surprise(places, epochs / size, (size - 1) ** 2)) < 4
    steps = np.bincount((np.diff(values_EN, axis=1) % size).ravel(), minlength=size)
    assert steps[0] == 0
    assert abs(surprise(steps[1:], epochs, size - 2)) < 4
    turns = (np.diff(values_EN, axis=1) > 0).astype(int)  # of three in a row, the middle one is an extreme 2 times in 3
    extremes = (turns[:, 1:] != turns[:, :-1]).mean()
    assert abs(extremes - 2 / 3) < 4 * math.sqrt(8 / 45 / (epochs * (size - 2)))


@pytest.mark.parametrize("size", [10_007, 2**20, 3 * 2**18 + 1])
def test_neighbours_are_uncorrelated_and_bits_are_even(size: int) -> None:
    for epoch in range(3):
        values = whole(size, epoch)
        for lag in (1, 2, 64):
            assert abs(np.corrcoef(values[:-lag], values[lag:])[0, 1]) * math.sqrt(size) < 4.5
        flips = values[1:] ^ values[:-1]
        low_bits = min(10, int(math.log2(size)) - 3)
        for bit in range(low_bits):
            assert abs((flips >> bit & 1).mean() - 0.5) * 2 * math.sqrt(size) < 4.5
        cells = np.bincount((np.arange(size) * 32 // size) * 32 + values * 32 // size, minlength=1024)
        part = np.bincount(np.arange(size) * 32 // size, minlength=32)
        expected = (part[:, None] * part / size).ravel()
        assert abs(surprise(cells, expected, 31 * 31)) < 4.5


def test_epochs_sources_and_seeds_are_independent() -> None:
    size = 50_000
    keys = [derive_key(seed, "ring", source) for seed in (0, 1) for source in ("web", "chem")]
    orders = [Permutation(size, epoch_key(key, e)).at_many(np.arange(size)) for key in keys for e in (0, 1, 2, 2**61)]
    for a, b in itertools.combinations(orders, 2):
        assert abs(np.corrcoef(a, b)[0, 1]) * math.sqrt(size) < 4.5
        assert (a == b).sum() <= 10  # Poisson with mean 1
    assert derive_key(0, "a", "b") != derive_key(0, "ab")
    assert derive_key(0, "a", 1) != derive_key(1, "a", 0)
    assert derive_key(0, "1") != derive_key(0, 1)


def test_keys_are_the_same_on_every_machine() -> None:
    assert derive_key(7, "batch", 1, 2)[0] == 4601535942901152768
    assert [Permutation(1000, KEY).at(i) for i in range(4)] == [358, 492, 266, 438]
    assert epoch_key(KEY, 3)[-1] == 2278972236560187116
