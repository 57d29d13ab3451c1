"""The published answer: it agrees with the papers' points, and every figure has its source."""

from __future__ import annotations

import json

import numpy as np
import pytest

from spt_fast.advice.prior import SAYS, outside, prior, progress_lost, worth
from spt_fast.errors import RecipeError


@pytest.mark.parametrize(
    ("budget", "low", "high"),
    [(10e9, 0.1, 0.1), (30e9, 0.1, 0.1), (200e9, 0.02, 0.05), (260e9, 0.0195, 0.0205), (280e9, 0.015, 0.02)],
)
def test_the_rule_gives_the_published_best_shares_of_300m_tokens(budget: float, low: float, high: float) -> None:
    given = prior(domain_tokens=300_000_000, budget=int(budget))
    assert given["regime"] == "SPT"
    assert low <= given["delta"] <= high
    assert given["delta_range"][0] <= given["delta"] <= given["delta_range"][1]
    assert given["replay"] == 0


def test_the_share_depends_on_epochs_and_not_on_tokens() -> None:
    small, large = (prior(domain_tokens=n * 30_000_000, budget=n * 20_000_000_000) for n in (1, 10))
    assert small["delta"] == large["delta"] == pytest.approx(0.026)
    assert small["epochs"] == pytest.approx(17.33, abs=0.01)
    assert small["delta_range"] == [0.015, 0.05]


@pytest.mark.parametrize(
    ("domain_tokens", "budget", "regime"),
    [
        (300e6, 280e9, "SPT"),
        (30e6, 60e9, "SPT or SCPT"),
        (30e6, 200e9, "SCPT"),
        (3e6, 200e9, "SCPT"),
        (3e6, 2e9, "SPT"),
    ],
)
def test_small_corpora_at_large_budgets_are_mixed_in_late(domain_tokens: float, budget: float, regime: str) -> None:
    given = prior(domain_tokens=int(domain_tokens), budget=int(budget))
    assert given["regime"] == regime
    if regime == "SCPT":
        assert given["delta"] == pytest.approx(0.001 if domain_tokens == 30e6 else 0.00025)
        assert given["epochs"] < 18
        assert given["delta_range"] is None
    assert given["replay"] == (0 if regime == "SPT" else 0.01)
    assert ("SCPT" in given["why"]) == (regime == "SPT or SCPT")


def test_small_models_repeat_more_and_no_corpus_is_read_more_than_34_times() -> None:
    """From 757M on the optimum before finetuning is below the best epochs of SPT: it only widens the range."""
    by_size = {N: prior(domain_tokens=3 * 10**8, budget=2 * 10**11, params=int(N)) for N in (10e6, 30e6, 60e6, 1e9)}
    epochs = [given["epochs"] for given in by_size.values()]
    assert epochs == pytest.approx([24, 24, 17.3, 17.3], abs=0.1)
    assert by_size[1e9]["delta_range"] == [pytest.approx(5 * 0.0015), 0.05]
    for domain_tokens in (10**6, 3 * 10**6, 3 * 10**7, 3 * 10**8, 10**10):
        for budget in (10**9, 10**10, 10**11, 10**12):
            for params in (None, 10**7, 10**9):
                given = prior(domain_tokens=domain_tokens, budget=budget, params=params)
                assert 0 < given["epochs"] <= 34
                assert given["delta"] <= 0.1


def test_the_answer_is_called_a_prior_and_gives_the_factors_outside_the_papers() -> None:
    given = prior(domain_tokens=3_000_000, budget=4_000_000_000, params=100_000_000)
    assert given["says"] == SAYS
    assert "not a measurement on your data" in SAYS
    assert given["outside"] == {"budget": 10.0, "domain_tokens": 1.0, "params": 3.0}
    assert {fact["standing"] for fact in given["facts"]} == {"paper", "secondary", "derived"}
    assert all(fact["source"] for fact in given["facts"])
    json.dumps(given, allow_nan=False)


def test_progress_lost_is_interpolated_between_the_published_sizes() -> None:
    assert progress_lost(334e6) == pytest.approx(0.5)
    assert 0.2 < progress_lost(1e9) < 0.3
    assert progress_lost(70e9) == pytest.approx(0.2)
    assert prior(domain_tokens=10**7, budget=10**10)["expected"]["progress_lost"] is None


def test_repeated_tokens_are_worth_what_the_published_fit_gives() -> None:
    once, often = worth(1e6, 1e6), worth(17e6, 1e6)
    assert once == {"read": 1e6, "fresh": pytest.approx(1e6), "next_epoch": 1.0}
    assert often["fresh"] == pytest.approx(1e6 * (1 + 15.387756 * (1 - 2.718281828 ** (-16 / 15.387756))))
    assert often["next_epoch"] == pytest.approx(2.718281828 ** (-16 / 15.387756))


def test_outside_is_the_factor_from_a_range_and_1_within_it() -> None:
    assert [outside(x, 2.0, 4.0) for x in (1.0, 2.0, 3.0, 4.0, 12.0)] == [2.0, 1.0, 1.0, 1.0, 3.0]


def test_counts_are_read_as_in_recipes_and_refused_by_name() -> None:
    read = prior(domain_tokens="30M", budget="20B", params="1B")
    assert read == prior(domain_tokens=30_000_000, budget=np.int64(20 * 10**9), params=10**9)  # type: ignore[arg-type]
    for field in ("domain_tokens", "budget", "params"):
        given = {"domain_tokens": 3 * 10**7, "budget": 2 * 10**10, "params": 10**9}
        for wrong in (0, -1, float("nan"), float("inf"), "x", True):
            with pytest.raises(RecipeError, match=f"^{field}: .* is invalid: "):
                prior(**given | {field: wrong})
