from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from spt_fast.data.mixture import Mixture
from spt_fast.data.order import SampleOrder, check_every_source_is_drawn
from spt_fast.data.ring import Ring
from spt_fast.errors import RecipeError
from tests.processor_time import least_seconds

CONTEXT = 16


def order(
    weights: dict, sequences: int, start_counts: dict[str, int] | None = None, seed: int = 0, phase: int = 0
) -> SampleOrder:
    mixture = Mixture(weights)
    rings = {name: Ring(1000 + 111 * i, CONTEXT, seed, name) for i, name in enumerate(mixture.sources)}
    return SampleOrder(mixture, rings, sequences, start_counts or dict.fromkeys(weights, 0), seed, phase)


def named(plan: SampleOrder, step: int) -> list[tuple[str, int]]:
    source, start = plan.windows(step)
    assert (source.dtype, start.dtype, len(source)) == (np.int32, np.int64, plan.sequences)
    return [(plan.mixture.sources[s], t) for s, t in zip(source, start.tolist(), strict=True)]


@pytest.mark.parametrize(
    "weights", [{"a": 1}, {"a": "0.9", "b": "0.1"}, dict(zip("abcdefg", range(1, 8), strict=True))]
)
def test_a_batch_holds_the_samples_of_its_step(weights: dict) -> None:
    starts = {name: 100 * i for i, name in enumerate(weights)}
    plan = order(weights, 12, starts)
    consumed = Counter(starts)
    for step in range(50):
        assert plan.counts(step) == {name: consumed[name] for name in weights}
        expected = []
        for n in range(step * 12, (step + 1) * 12):
            name, k = plan.mixture.locate(n)
            expected.append((name, plan.rings[name].start(starts[name] + k)))
            consumed[name] += 1
        assert sorted(named(plan, step)) == sorted(expected)


def test_any_step_is_the_same_whatever_was_asked_before() -> None:
    plan = order({"a": "0.9", "b": "0.1"}, 8)
    forwards = [named(plan, step) for step in range(20)]
    backwards = [named(order({"a": "0.9", "b": "0.1"}, 8), step) for step in reversed(range(20))]
    assert forwards == backwards[::-1]


def test_a_new_phase_goes_on_where_the_last_one_stopped() -> None:
    """Windows of phase 0 (stopped early) and phase 1 together are each source's windows 0, 1, 2, ... each once."""
    first = order({"a": "0.9", "b": "0.1"}, 8)
    stopped_at = 13
    second = order({"a": 1, "b": 3}, 8, first.counts(stopped_at), phase=1)
    read = [w for step in range(stopped_at) for w in named(first, step)]
    read += [w for step in range(10) for w in named(second, step)]
    totals = second.counts(10)
    assert sum(totals.values()) == (stopped_at + 10) * 8
    assert Counter(read) == Counter((name, first.rings[name].start(k)) for name in "ab" for k in range(totals[name]))


def test_a_source_that_a_phase_leaves_out_keeps_its_count() -> None:
    first = order({"a": "0.9", "b": "0.1"}, 8)
    between = order({"b": 1}, 8, first.counts(5), phase=1)
    assert between.counts(3) == {"a": 36, "b": 4 + 3 * 8}
    last = order({"a": 1, "b": 1}, 8, between.counts(3), phase=2)
    assert last.counts(1) == {"a": 36 + 4, "b": 28 + 4}


def test_the_order_in_a_batch_depends_on_seed_phase_and_step() -> None:
    def orders(plan: SampleOrder, step: int) -> tuple[int, ...]:
        ranks = {window: i for i, window in enumerate(sorted(set(named(plan, step))))}
        return tuple(ranks[window] for window in named(plan, step))

    weights = {"a": 1}
    seen = [
        orders(order(weights, 32, {"a": 62 - 62 * phase}, seed, phase), step)
        for seed in (0, 1)
        for phase in (0, 1)
        for step in range(5)
    ]
    assert len(set(seen)) == len(seen)


def test_the_mixtures_period_does_not_alias_with_the_stride_of_ranks() -> None:
    """Period 200, 8 ranks: unpermuted, one rank would get every rare sample of a batch of 400."""
    plan, world, steps = order({"web": "0.995", "rare": "0.005"}, 400), 8, 1500
    for rank_of in (np.arange(400) % world, np.arange(400) // (400 // world)):
        drawn = np.zeros(world)
        for step in range(steps):
            source, _ = plan.windows(step)
            drawn += np.bincount(rank_of[source == plan.mixture.sources.index("rare")], minlength=world)
        expected = 2 * steps / world
        assert drawn.sum() == 2 * steps
        assert ((drawn - expected) ** 2 / expected).sum() < 24.3  # chi-squared with 7 degrees of freedom: p < 0.001


def test_a_far_step_costs_what_the_first_costs() -> None:
    rings = {"web": Ring(10**12, 2048, 0, "web"), "chem": Ring(10**6, 2048, 0, "chem")}
    plan = SampleOrder(Mixture({"web": "0.98", "chem": "0.02"}), rings, 512, {"web": 2**60, "chem": 2**60}, 0, 1)
    for step in (0, 10**9, 2**52):
        assert least_seconds(lambda step=step: plan.windows(step)) < 0.01
        source, start = plan.windows(step)
        assert (start >= 0).all()
        assert (start[source == 0] < 10**6).all()
        assert sum(plan.counts(step).values()) == 2**61 + 512 * step


def test_a_source_that_would_get_no_sample() -> None:
    mixture = Mixture({"web": "99.9%", "chem": "0.1%"})
    check_every_source_is_drawn(mixture, 500)
    with pytest.raises(RecipeError, match=r"'chem' has a share of 1/1000 .* none of the phase's 499 .* at least 500"):
        check_every_source_is_drawn(mixture, 499)
    check_every_source_is_drawn(Mixture({"web": 1, "chem": 0}), 1)
