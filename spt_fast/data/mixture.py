"""The order in which sources take turns: exact rational shares, kept as closely as any order can keep them.

counts(n) is how many of the first n samples each source gave; the target of a source of weight w is n·w. How far the
two may differ at any n (the *deviation*) depends on K, the number of sources with a weight above 0:

    K = 1      0
    K = 2      1/2              rounded Bresenham: counts(n) = floor(n·w + 1/2), in closed form both ways
    K = 3, 4   below 1          a balanced tree of such splits (1/2 at the root, passed down times a share below 1)
    K >= 5     1 - 1/(2K - 2)   a table over one period Q <= 2^20: Tijdeman, "The chairman assignment problem", 1980;
                                the bound is the best possible for all weights

Ties go to the source whose name sorts first. All arithmetic is on integers. Up to four sources, the common denominator
Q of the weights may be as large as 2^62: then 2·n·w·Q for n <= 2^62 fits the 128 bits of the C++ version
(csrc/mixture.cpp).
"""

from __future__ import annotations

import heapq
import math
import operator
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from numbers import Integral, Rational

import numpy as np

from spt_fast import native
from spt_fast.errors import RecipeError, cut, invalid, nearest, shown

MAX_SAMPLES = 1 << 62
MAX_DENOMINATOR = 1 << 62
MAX_PERIOD = 1 << 20
MAX_SOURCES = (1 << 15) - 1
_SPLIT_SOURCES = 4
_NEARBY_PERIOD = 10**6
_HUGE_EXPONENT = re.compile(r"e[+-]?[0-9_]{4}", re.IGNORECASE)


class Mixture:
    """An endless interleaving of sources in exact shares.

    weights: {source: weight}. All ints are relative weights; strings ("0.98", "98%", "1/49"), Fractions and floats
    (read by their repr, as exact decimals) are shares that must sum to exactly 1. A source of weight 0 never occurs.
    Raises RecipeError (a ValueError) for anything else: the two kinds mixed, a negative or non-finite weight, no weight
    above 0, no source at all, or shares with too large a denominator (see the top of this module).
    """

    sources: tuple[str, ...]
    """Sorted by name."""
    weights: dict[str, Fraction]
    """In the order of `sources`; they sum to 1."""

    def __init__(self, weights: Mapping[str, int | str | Fraction | float]) -> None:
        self.weights = exact_weights(weights)
        self.sources = tuple(self.weights)
        period = math.lcm(*(weight.denominator for weight in self.weights.values()))
        numerators = [int(weight * period) for weight in self.weights.values()]
        num_drawn = sum(weight > 0 for weight in numerators)
        largest = MAX_DENOMINATOR if num_drawn <= _SPLIT_SOURCES else MAX_PERIOD
        if period > largest:
            raise RecipeError(
                f"mixture: these shares of {num_drawn} sources repeat only after Q = {period:,} samples, and at most "
                f"{largest:,} can be represented exactly; a nearby mixture that repeats after {_NEARBY_PERIOD:,}: "
                f"{_nearby(self.weights)}"
            )
        self._order = _Splits(numerators) if num_drawn <= _SPLIT_SOURCES else _Table(numerators)

    def __repr__(self) -> str:
        return f"Mixture({ {source: str(weight) for source, weight in self.weights.items()} })"

    def locate(self, n: int) -> tuple[str, int]:
        """(source, k): sample n of the mixture is the k-th sample of `source`."""
        source, k = self._order.locate(_natural(n, "n"))
        return self.sources[source], k

    def counts(self, n: int) -> dict[str, int]:
        """{source: its samples among the first n}."""
        return dict(zip(self.sources, self._order.counts(_natural(n, "n")), strict=True))

    def index(self, source: str, k: int) -> int:
        """n such that locate(n) == (source, k). Raises ValueError for a source that never occurs."""
        if source not in self.sources:
            known = nearest(str(source), self.sources)
            raise RecipeError(invalid("source", source, f"name one of the mixture; {known}"))
        if self.weights[source] == 0:
            raise ValueError(f"source {source!r} has weight 0 and never occurs")
        return self._order.index(self.sources.index(source), _natural(k, "k"))

    def locate_many(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """`locate` of samples first .. first + count, in C++: (index into `sources` int32 [count], k int64 [count]).

        Raises ValueError beyond sample 2^62, up to which the C++ is exact.
        """
        first, count = _natural(first, "first"), _natural(count, "count")
        if first + count > MAX_SAMPLES:
            raise ValueError(f"samples {first:,} to {first + count:,} reach beyond 2^62")
        return self._order.locate_many(first, count)


@dataclass(frozen=True)
class _Split:
    """Rounded Bresenham: two streams share one in proportion weight : total - weight.

    A stream is the number of another split, or ~source.
    """

    weight: int
    total: int
    first: int
    second: int

    def count(self, n: int) -> int:
        """How many of the first n samples go to `first`: n·weight/total, rounded, halves up."""
        return (2 * n * self.weight + self.total) // (2 * self.total)

    def index_in_first(self, k: int) -> int:
        """The smallest n with count(n + 1) > k."""
        return -(-self.total * (2 * k + 1) // (2 * self.weight)) - 1

    def index_in_second(self, k: int) -> int:
        """The smallest n with n + 1 - count(n + 1) > k."""
        return self.total * (2 * k + 1) // (2 * (self.total - self.weight))


class _Splits:
    """One to four sources, by their places in Mixture.sources: a balanced binary tree of splits, the root first."""

    def __init__(self, weights: list[int]) -> None:
        self._weights = weights
        self._splits: list[_Split] = []
        self._root = self._grow([source for source, weight in enumerate(weights) if weight])
        self._rows = np.array([[s.weight, s.total, s.first, s.second] for s in self._splits], dtype=np.int64)
        self._paths = dict(self._walk(self._root))

    def _grow(self, sources: list[int]) -> int:
        if len(sources) == 1:
            return ~sources[0]
        node, half = len(self._splits), len(sources) // 2
        weight, total = (sum(self._weights[source] for source in part) for part in (sources[:half], sources))
        self._splits.append(_Split(weight, total, 0, 0))
        first, second = self._grow(sources[:half]), self._grow(sources[half:])
        self._splits[node] = _Split(weight, total, first, second)
        return node

    def _walk(self, node: int) -> list[tuple[int, list[tuple[_Split, bool]]]]:
        """For each source below `node`, the splits on the way to it and whether it is in their first half."""
        if node < 0:
            return [(~node, [])]
        split = self._splits[node]
        return [
            (source, [(split, child == split.first), *path])
            for child in (split.first, split.second)
            for source, path in self._walk(child)
        ]

    def locate(self, n: int) -> tuple[int, int]:
        node = self._root
        while node >= 0:
            split = self._splits[node]
            before = split.count(n)
            node, n = (split.first, before) if split.count(n + 1) > before else (split.second, n - before)
        return ~node, n

    def counts(self, n: int) -> list[int]:
        return [self._count(source, n) for source in range(len(self._weights))]

    def _count(self, source: int, n: int) -> int:
        if self._weights[source] == 0:
            return 0
        for split, is_first in self._paths[source]:
            n = split.count(n) if is_first else n - split.count(n)
        return n

    def index(self, source: int, k: int) -> int:
        for split, is_first in reversed(self._paths[source]):
            k = split.index_in_first(k) if is_first else split.index_in_second(k)
        return k

    def locate_many(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        if not self._splits:
            return np.full(count, ~self._root, dtype=np.int32), np.arange(first, first + count, dtype=np.int64)
        return native.locate_splits(self._rows, len(self._weights), first, count)


class _Table:
    """Five sources and more, likewise by their places: one period of `chairman_order`, about 10 bytes per slot."""

    def __init__(self, weights: list[int]) -> None:
        self._weights, self._period = weights, sum(weights)
        self._source, self._rank, slots = native.chairman_table(weights)
        self._slots = np.split(slots, list(accumulate(weights))[:-1])

    def locate(self, n: int) -> tuple[int, int]:
        periods, slot = divmod(n, self._period)
        source = int(self._source[slot])
        return source, periods * self._weights[source] + int(self._rank[slot])

    def counts(self, n: int) -> list[int]:
        periods, slot = divmod(n, self._period)
        return [
            periods * weight + int(np.searchsorted(slots, slot))
            for weight, slots in zip(self._weights, self._slots, strict=True)
        ]

    def index(self, source: int, k: int) -> int:
        periods, rank = divmod(k, self._weights[source])
        return periods * self._period + int(self._slots[source][rank])

    def locate_many(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        return native.locate_table(self._source, self._rank, self._weights, first, count)


def chairman_order(weights: list[int]) -> list[int]:
    """The readable version of `native.chairman_table`: the source of each slot of one period Q = sum(weights).

    K states of weights λ_i = weights[i] / Q elect a chairman each year. With ε = 1/(2K - 2), |counts - n·λ_i| <= 1 - ε
    requires that state i's k-th turn (from 0) is no earlier than slot ceil((k + ε)/λ_i) - 1 and no later than slot
    floor((k + 1 - ε)/λ_i). Among the states whose turn may come, the one with the nearest deadline gets it (ties: the
    first). This order keeps every deadline whenever some order does, and by Tijdeman's theorem one does. States of
    weight 0 don't count.
    """
    period, unit = sum(weights), 2 * sum(weight > 0 for weight in weights) - 2
    released: list[list[int]] = [[] for _ in range(period)]
    rank = [0] * len(weights)

    def release(source: int, next_slot: int) -> None:
        if rank[source] < weights[source]:
            earliest = -(-(rank[source] * unit + 1) * period // (unit * weights[source])) - 1
            released[max(next_slot, earliest)].append(source)

    for source in range(len(weights)):
        release(source, 0)
    order: list[int] = []
    due: list[tuple[int, int]] = []
    for slot in range(period):
        for source in released[slot]:
            heapq.heappush(due, (((rank[source] + 1) * unit - 1) * period // (unit * weights[source]), source))
        deadline, source = heapq.heappop(due)
        assert deadline >= slot
        order.append(source)
        rank[source] += 1
        release(source, slot + 1)
    return order


def exact_weights(weights: Mapping[str, int | str | Fraction | float]) -> dict[str, Fraction]:
    """The weights as exact shares that sum to 1, sorted by source."""
    if weights is not None and not isinstance(weights, Mapping):
        raise RecipeError(invalid("mixture", weights, "give weights by source, such as {'general': 98, 'chem': 2}"))
    if not weights:
        raise RecipeError("mixture: is empty; name at least one source")
    if len(weights) > MAX_SOURCES:
        raise RecipeError(f"mixture: has {len(weights):,} sources; give at most {MAX_SOURCES:,}")
    for source in weights:
        if not isinstance(source, str):
            raise RecipeError(invalid("mixture", source, "a source is named by a string; put quotes around it"))
    exact = {source: _exact_weight(source, weights[source]) for source in sorted(weights)}
    relative = [source for source in exact if isinstance(weights[source], Integral)]
    total = sum(exact.values())
    if relative and len(relative) < len(exact):
        share = next(source for source in exact if source not in relative)
        raise RecipeError(
            f"mixture: {shown(relative[0])} is a whole number ({shown(weights[relative[0]])}), a relative weight, but "
            f"{shown(share)} is a share ({shown(weights[share])}); write all as whole numbers, or all as "
            "shares that sum to 1"
        )
    if total == 0:
        raise RecipeError(f"mixture: every weight is 0 ({cut(', '.join(exact))}); give at least one source more")
    if not relative and total != 1:
        off = f"{1 - total} is missing" if total < 1 else f"{total - 1} is too much"
        raise RecipeError(
            f"mixture: the shares of {cut(', '.join(exact))} sum to {total} (about {float(total):.6g}), not 1: {off}; "
            "change them, or write whole numbers for relative weights"
        )
    return {source: weight / total for source, weight in exact.items()}


def _exact_weight(source: str, weight: object) -> Fraction:
    value: Fraction | None = None
    if isinstance(weight, Rational) and not isinstance(weight, bool):
        value = Fraction(int(weight.numerator), int(weight.denominator))
    elif isinstance(weight, float) and math.isfinite(weight):
        value = Fraction(repr(float(weight)))
    elif isinstance(weight, str):
        with suppress(ValueError, ZeroDivisionError):
            value = exact_share(weight.strip())
    if value is None or value < 0 or (value > 1 and not isinstance(weight, Rational)):
        expected = "give a share between 0 and 1, such as '2%', 0.02 or '1/50', or a whole number of at least 0"
        if weight is None and ":" in source:
            expected = "write a space after the colon"
        raise RecipeError(invalid(f"mixture.{source}", weight, expected))
    return value


def exact_share(text: str) -> Fraction:
    """The value of "2%", "0.02" or "1/50". ValueError or ZeroDivisionError for anything else, and for an exponent whose
    exact value would need too much memory."""
    if _HUGE_EXPONENT.search(text) or "_" in text or not text.isascii():
        raise ValueError(text)
    return Fraction(text[:-1].strip()) / 100 if text.endswith("%") else Fraction(text)


def _nearby(weights: Mapping[str, Fraction]) -> dict[str, str]:
    """`weights` in millionths that sum to 1: one for each drawn source, the rest distributed by largest remainders."""
    drawn = [source for source, weight in weights.items() if weight]
    spare = _NEARBY_PERIOD - len(drawn)
    millionths = {source: int(weight > 0) + int(weight * spare) for source, weight in weights.items()}
    by_remainder = sorted(drawn, key=lambda source: weights[source] * spare % 1, reverse=True)
    for source in by_remainder[: _NEARBY_PERIOD - sum(millionths.values())]:
        millionths[source] += 1
    return {source: f"{parts // _NEARBY_PERIOD}.{parts % _NEARBY_PERIOD:06d}" for source, parts in millionths.items()}


def _natural(value: int, name: str) -> int:
    with suppress(TypeError):
        if (number := operator.index(value)) >= 0:
            return number
    raise RecipeError(invalid(name, value, "give a whole number; samples are counted from 0"))
