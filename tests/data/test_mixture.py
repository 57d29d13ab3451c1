from __future__ import annotations

import ast
import itertools
import tracemalloc
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from spt_fast.data.mixture import MAX_SAMPLES, Mixture, chairman_order
from spt_fast.errors import RecipeError
from tests.processor_time import least_seconds

LARGEST_DENOMINATOR = 1000


def drawn_mixtures(seed: int, count: int) -> Iterator[Mixture]:
    """Integer weights that sum to at most 1000; every number of sources from 1 to 64 comes up equally often."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        num_sources = 1 + i % 64
        total = int(rng.integers(num_sources, LARGEST_DENOMINATOR + 1))
        spread = rng.dirichlet(np.full(num_sources, rng.choice([0.1, 1.0, 30.0])))
        weights = 1 + rng.multinomial(total - num_sources, spread)
        yield Mixture({f"s{j:02}": int(weight) for j, weight in enumerate(rng.permutation(weights))})


def bound(num_sources: int) -> Fraction:
    if num_sources <= 2:
        return Fraction(num_sources - 1, 2)
    return Fraction(1) if num_sources <= 4 else 1 - Fraction(1, 2 * num_sources - 2)


def check_stretch(mixture: Mixture, first: int, count: int) -> None:
    """Every prefix that ends in the stretch keeps the bound, each sample's k counts its source, and `counts` agrees."""
    source, k = mixture.locate_many(first, count)
    before = np.array([*mixture.counts(first).values()], dtype=object)
    is_source_NK = source[:, None] == np.arange(len(mixture.sources))
    drawn_NK = np.cumsum(is_source_NK, axis=0)
    assert (k == [before[s] + drawn_NK[i, s] - 1 for i, s in enumerate(source)]).all()
    after = mixture.counts(first + count)
    assert [after[name] for name in mixture.sources] == [b + d for b, d in zip(before, drawn_NK[-1], strict=True)]

    period = int(np.lcm.reduce([weight.denominator for weight in mixture.weights.values()]))
    numerators = [int(weight * period) for weight in mixture.weights.values()]
    off_at_first = np.array([b * period - first * p for b, p in zip(before, numerators, strict=True)], dtype=np.int64)
    off_NK = off_at_first + drawn_NK * period - np.outer(np.arange(1, count + 1), numerators)  # period x deviation
    largest = Fraction(int(np.abs(off_NK).max()), period)
    limit = bound(len(mixture.sources))
    assert largest < limit if len(mixture.sources) in (3, 4) else largest <= limit


def check_scalars(mixture: Mixture, first: int, count: int, samples: np.ndarray) -> None:
    """The Python functions give what C++ gave, and `index` inverts `locate`."""
    source, k = mixture.locate_many(first, count)
    for i in samples.tolist():
        located = mixture.locate(first + i)
        assert located == (mixture.sources[source[i]], k[i])
        assert mixture.index(*located) == first + i


@pytest.mark.parametrize("seed", range(4))
def test_2048_drawn_mixtures_at_every_prefix_of_a_period_and_near_2_to_the_62(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for mixture in drawn_mixtures(seed, 512):
        check_stretch(mixture, 0, LARGEST_DENOMINATOR + 1)
        check_scalars(mixture, 0, LARGEST_DENOMINATOR, rng.integers(0, LARGEST_DENOMINATOR, 12))
        far = MAX_SAMPLES - int(rng.integers(200, 1 << 40))
        check_stretch(mixture, far, 200)
        check_scalars(mixture, far, 200, rng.integers(0, 200, 6))


SHARES = st.lists(st.integers(0, 10**18), min_size=1, max_size=3, unique=True)


@settings(max_examples=200)
@given(cuts=SHARES, first=st.integers(0, MAX_SAMPLES - 300))
@example(cuts=[1], first=MAX_SAMPLES - 300)
@example(cuts=[10**18 - 1], first=5 * 10**17 - 150)
def test_shares_of_18_digits_stay_exact(cuts: list[int], first: int) -> None:
    edges = [0, *sorted(cuts), 10**18]
    shares = {f"s{i}": Fraction(b - a, 10**18) for i, (a, b) in enumerate(itertools.pairwise(edges))}
    mixture = Mixture(shares)
    source, k = mixture.locate_many(first, 300)
    for i in range(300):
        assert (mixture.sources[source[i]], k[i]) == mixture.locate(first + i)
    limit = bound(sum(share > 0 for share in shares.values()))
    for n in (first, first + 150):
        assert all(abs(drawn - n * shares[name]) <= limit for name, drawn in mixture.counts(n).items())
        assert mixture.index(*mixture.locate(n)) == n


def test_the_largest_denominators() -> None:
    share = Fraction(1, 2**62)
    mixture = Mixture({"rare": share, "rest": 1 - share})
    assert mixture.index("rare", 0) == 2**61 - 1
    source, k = mixture.locate_many(2**61 - 2, 3)
    assert [mixture.sources[s] for s in source] == ["rest", "rare", "rest"]
    assert k.tolist() == [2**61 - 2, 0, 2**61 - 1]
    with pytest.raises(RecipeError, match=r"4,611,686,018,427,387,905.*4,611,686,018,427,387,904"):
        Mixture({"rare": Fraction(1, 2**62 + 1), "rest": 1 - Fraction(1, 2**62 + 1)})


def test_two_sources_of_equal_weight_take_turns_the_first_name_first() -> None:
    mixture = Mixture({"b": 7, "a": 7})
    assert [mixture.locate(n) for n in range(4)] == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    five = Mixture(dict.fromkeys("edcba", 1))
    assert [five.locate(n)[0] for n in range(10)] == [*"abcde", *"abcde"]


def test_the_contract() -> None:
    mixture = Mixture({"web": "0.98", "chem": "0.02"})
    assert mixture.sources == ("chem", "web")
    assert mixture.weights == {"chem": Fraction(1, 50), "web": Fraction(49, 50)}
    assert mixture.counts(10**18) == {"chem": 2 * 10**16, "web": 98 * 10**16}
    assert mixture.locate(24) == ("chem", 0)
    assert mixture.index("chem", 0) == 24
    source, k = mixture.locate_many(24, 2)
    assert (source.dtype, k.dtype, source.tolist(), k.tolist()) == (np.int32, np.int64, [0, 1], [0, 24])


def test_one_source_is_all_there_is() -> None:
    mixture = Mixture({"web": "100%"})
    assert mixture.locate(2**62) == ("web", 2**62)
    assert mixture.index("web", 5) == 5
    assert mixture.locate_many(2**61, 3)[1].tolist() == [2**61, 2**61 + 1, 2**61 + 2]


@pytest.mark.parametrize(
    ("weights", "exact"),
    [
        ({"a": 1, "b": 3}, ["1/4", "3/4"]),
        ({"a": np.int64(2), "b": 1}, ["2/3", "1/3"]),
        ({"a": 0.1, "b": 0.2, "c": 0.7}, ["1/10", "1/5", "7/10"]),
        ({"a": np.float64(0.25), "b": "75%"}, ["1/4", "3/4"]),
        ({"a": 1e-05, "b": "99.999 %"}, ["1/100000", "99999/100000"]),
        ({"a": "1/49", "b": Fraction(48, 49)}, ["1/49", "48/49"]),
        ({"a": "0%", "b": 1.0}, ["0", "1"]),
    ],
)
def test_how_weights_are_read(weights: dict, exact: list[str]) -> None:
    assert Mixture(weights).weights == dict(zip("abc", map(Fraction, exact), strict=False))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({}, "empty"),
        ({"a": "0.98", "b": "0.03"}, r"a, b sum to 101/100 \(about 1.01\), not 1: 1/100 is too much"),
        ({"a": 0.1, "b": 0.2}, r"sum to 3/10 .* 7/10 is missing"),
        ({"a": 98, "b": "0.02"}, r"'a' is a whole number \(98\).*'b' is a share \('0.02'\)"),
        ({"a": 1, "b": 0.5}, "whole number"),
        ({"a": -1, "b": 2}, "mixture.a: -1 is invalid"),
        ({"a": "-10%", "b": "110%"}, "'-10%' is invalid"),
        ({"a": 0, "b": 0}, r"every weight is 0 \(a, b\)"),
        ({"a": "0", "b": 0.0}, "every weight is 0"),
        ({"a": float("nan"), "b": 1.0}, "mixture.a: nan is invalid"),
        ({"a": float("inf")}, "mixture.a: inf is invalid"),
        ({"a": True}, "mixture.a: True is invalid"),
        ({"a": "lots"}, "mixture.a: 'lots' is invalid"),
        ({"a": "1e999", "b": 0.5}, "'1e999' is invalid.*a share between 0 and 1"),
        ({"a": "1e-1_000_000_000"}, "'1e-1_000_000_000' is invalid"),
        ({"a": "1/0"}, "mixture.a: '1/0' is invalid"),
        ({"a": "1e-999999999"}, "is invalid"),
        ({"a": None}, "mixture.a: None is invalid"),
        ({1: 1}, "mixture: 1 is invalid"),
        (["a"], r"mixture: \['a'\] is invalid: give weights by source"),
        (np.array([0.5, 0.5]), r"mixture: array\(\[0.5, 0.5\]\) is invalid: give weights by source"),
    ],
)
def test_invalid_weights(weights: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Mixture(weights)


@pytest.mark.parametrize("num_sources", [2, 4, 7])
def test_a_source_of_weight_0_never_occurs(num_sources: int) -> None:
    names = [f"s{i}" for i in range(num_sources)]
    weights = {name: i + 1 for i, name in enumerate(names)}
    mixture, without = Mixture(weights | {"s0b": 0}), Mixture(weights)
    assert mixture.sources == ("s0", "s0b", *names[1:])
    assert mixture.counts(10) == without.counts(10) | {"s0b": 0}
    source, k = mixture.locate_many(3, 500)
    expected_source, expected_k = without.locate_many(3, 500)
    assert [mixture.sources[s] for s in source] == [without.sources[s] for s in expected_source]
    assert (k == expected_k).all()
    with pytest.raises(ValueError, match="'s0b' has weight 0"):
        mixture.index("s0b", 0)


def test_invalid_positions_are_refused() -> None:
    mixture = Mixture({"web": 3, "chem": 1})
    for wrong in (-1, 1.0, "1", None, [1]):
        for call in (mixture.locate, mixture.counts):
            with pytest.raises(RecipeError, match=r"^n: .* is invalid: give a whole number"):
                call(wrong)  # type: ignore[arg-type]
        with pytest.raises(RecipeError, match=r"^k: .* is invalid"):
            mixture.index("web", wrong)  # type: ignore[arg-type]
        with pytest.raises(RecipeError, match=r"^count: .* is invalid"):
            mixture.locate_many(0, wrong)  # type: ignore[arg-type]
    for unknown in (5, None, ["web"]):
        with pytest.raises(RecipeError, match=r"^source: .* is invalid: name one of the mixture"):
            mixture.index(unknown, 0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="did you mean 'chem'"):
        mixture.index("chme", 0)
    with pytest.raises(ValueError, match="beyond 2\\^62"):
        mixture.locate_many(2**62 - 5, 6)
    assert len(mixture.locate_many(2**62 - 5, 5)[0]) == 5


def test_a_period_too_long_is_refused_with_a_nearby_mixture() -> None:
    shares = {"a": "0.1234567", "b": "0.2", "c": "0.3", "d": "0.3765432", "e": "0.0000001", "f": "0"}
    with pytest.raises(RecipeError, match="Q = 10,000,000") as refused:
        Mixture(shares)
    message = str(refused.value)
    nearby = Mixture(ast.literal_eval(message[message.index("{") :]))
    for name, share in shares.items():
        assert abs(nearby.weights[name] - Fraction(share)) < Fraction(3, 10**6)
        assert (nearby.weights[name] == 0) == (Fraction(share) == 0)


def test_the_python_chairman_agrees_with_the_compiled_one() -> None:
    checked = 0
    for mixture in drawn_mixtures(5, 320):
        if len(mixture.sources) < 5:
            continue
        period = int(np.lcm.reduce([weight.denominator for weight in mixture.weights.values()]))
        order = chairman_order([int(weight * period) for weight in mixture.weights.values()])
        assert mixture.locate_many(0, period)[0].tolist() == order
        checked += 1
    assert checked == 300


def test_the_chairman_order_keeps_its_bound_where_it_is_tight() -> None:
    """One heavy source among light ones, and sources of nearly equal weight: Tijdeman's hard cases."""
    for num_sources in (5, 6, 9, 17, 33):
        for weights in ([997, *[1] * (num_sources - 1)], [200 + i for i in range(num_sources)]):
            mixture = Mixture({f"s{i:02}": weight for i, weight in enumerate(weights)})
            check_stretch(mixture, 0, sum(weights) + 1)


def test_a_long_period_is_built_in_milliseconds() -> None:
    weights = {f"s{i:02}": 700 + 7 * i for i in range(63)} | {"s63": 65536 - sum(700 + 7 * i for i in range(63))}
    assert least_seconds(lambda: Mixture(weights)) < 0.03  # 3 to 7 ms on an idle core
    check_stretch(Mixture(weights), 10 * 65536 - 2000, 4000)


def test_two_sources_of_1e12_samples_need_no_time_and_no_memory() -> None:
    def start() -> None:
        Mixture({"web": "0.98", "chem": "0.02"}).locate_many(10**12, 1000)

    assert least_seconds(start) < 0.01
    tracemalloc.start()
    start()
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 1 << 20


def test_the_batch_locates_millions_a_second() -> None:
    mixtures = [Mixture({"web": "0.98", "chem": "0.02"}), Mixture({f"s{i}": i + 1 for i in range(9)})]
    for mixture in mixtures:
        seconds = least_seconds(lambda m=mixture: m.locate_many(10**12, 2_000_000))
        assert 2e6 / seconds > 5e6  # about 100 M/s on an idle core
