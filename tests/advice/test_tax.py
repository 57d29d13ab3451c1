"""The finetuner's tax: FLOPs by hand, and model sizes of a known loss."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest

from spt_fast.advice.arms import finetunes
from spt_fast.advice.result import BreakEven, Larger
from spt_fast.advice.tax import factor_of, published_factor, tax
from spt_fast.study.finetunes import Interval, plainest
from spt_fast.study.usable import usable
from tests.study.synthetic import FLOOR, PARAMS, SIZE_EXPONENT, after, spt_table

TWICE = Larger(Interval(2.0, 1.0, 4.0), "runs", "")


def test_accounts_hold_the_flops_of_pretraining_finetuning_and_serving() -> None:
    given = tax(params=1e9, budget=20 * 10**9, finetune_tokens=1e8, served=10**12, larger=TWICE)
    small, large, free = given.accounts
    assert (small.pretraining, small.finetuning, small.serving) == (1.2e20, 6e17, 2e21)
    assert (large.params, large.pretraining, large.finetuning, large.serving) == (2e9, 2.4e20, 1.2e18, 4e21)
    assert free == replace(large, what=free.what, pretraining=0)
    assert free.total == large.total - 2.4e20
    assert small.total == pytest.approx(1.2e20 + 6e17 + 2e21)


def test_break_even_is_where_both_have_cost_the_same() -> None:
    given = {"params": 1e9, "budget": 20 * 10**9, "finetune_tokens": 1e8, "larger": TWICE}
    served = tax(**given, served=1).break_even
    assert served["both paid"] == BreakEven(mean=0.0, low=None, high=0.0)
    assert served["larger one for free"].low is None
    assert 0 < served["larger one for free"].high < served["larger one for free"].mean
    small, _, free = tax(**given, served=round(served["larger one for free"].mean)).accounts
    assert small.total == pytest.approx(free.total, rel=1e-9)


def test_the_published_gaps_give_the_factors_in_size() -> None:
    factor = published_factor().factor
    assert (factor.low, factor.mean, factor.high) == pytest.approx((1.287, 2.435, 4.311), abs=1e-3)


@pytest.fixture(scope="module")
def sizes() -> pd.DataFrame:
    table = spt_table(
        deltas=(0.0, 0.02, 0.05),
        budgets=(100_000_000_000, 200_000_000_000),
        params=tuple(round(PARAMS * 1.4**i) for i in range(9)),
        noise=1e-5,
    )
    return plainest(finetunes(usable(table)))


def test_the_factor_is_the_size_at_which_finetuning_only_reaches_the_loss_of_spt(sizes: pd.DataFrame) -> None:
    found = factor_of(sizes, PARAMS)
    assert found is not None
    spt, finetuned = (after(200e9, delta, PARAMS, 300_000_000) for delta in (0.02, 0.0))
    size = ((spt - FLOOR) / (finetuned - FLOOR)) ** (-1 / SIZE_EXPONENT)
    assert found.factor.mean == pytest.approx(size, rel=0.02)
    assert found.factor.low <= found.factor.mean <= found.factor.high
    assert found.basis == "runs"
    assert "after 200B tokens 109M parameters by SPT at 2%" in found.says


def test_if_no_size_reaches_the_loss_the_factor_is_a_lower_bound(sizes: pd.DataFrame) -> None:
    found = factor_of(sizes[sizes["params"] < 1.5 * PARAMS], PARAMS)
    assert found is not None
    assert found.factor.mean == pytest.approx(1.4, rel=1e-6)
    assert "more than 153M" in found.says


def test_without_a_larger_finetuned_model_there_is_no_factor(sizes: pd.DataFrame) -> None:
    assert factor_of(sizes[sizes["params"] == PARAMS], PARAMS) is None
    assert factor_of(sizes[sizes["regime"] == "SPT"], PARAMS) is None
