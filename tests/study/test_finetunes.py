"""One table with several anchors and replays: advice, comparison and report use the same arms."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from spt_fast.advice.advise import advise
from spt_fast.report.decision import by_sizes, compared, decide
from spt_fast.study.compare import Figure, compare_finetunes
from spt_fast.study.finetunes import Treatment, after_pretraining, compared_with, plainest
from spt_fast.study.usable import usable
from tests.study.synthetic import DOMAIN_TOKENS, PARAMS, spt_table

BUDGET = 200_000_000_000


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    """Finetunes with replay and no anchor, where 2% is the best share, and with an anchor and no replay, where 5% is.
    So the best share depends on whether the least anchor or the least replay comes first."""
    whole = spt_table(deltas=(0.0, 0.02, 0.05), budgets=(BUDGET,), injected=(0.0, 0.01), anchors=(0.0, 0.1), noise=1e-4)
    rows = whole[(whole["stage"] == 0) | ((whole["injected"] > 1e-9) != (whole["anchor"] > 0))]
    better = (rows["anchor"] > 0) & (rows["pretrain_delta"] == 0.05)
    losses = ["domain_heldout", "domain_select"]
    return rows.assign(**{name: rows[name] * np.where(better, 0.98, 1) for name in losses})


def test_advice_comparison_and_page_name_the_same_arm(table: pd.DataFrame) -> None:
    used = usable(table)
    ((sizes, finetunes),) = by_sizes(after_pretraining(used.rows)).items()
    runs = compared(finetunes, used.rows)
    arms = {arm.treatment: arm for arm in compare_finetunes(runs).arms}
    assert len(arms) == 6

    decided = decide(sizes, runs)
    assert decided is not None
    assert decided.best == Treatment(0.05, 0.0, 0.1)
    assert set(decided.plainest) == {arm for arm in arms if arm[1:] == (0.0, 0.1, 0.0)}

    seen = advise(domain_tokens=DOMAIN_TOKENS, budget=BUDGET, model=PARAMS, table=table).seen
    assert seen is not None
    assert (seen.arms[0].delta, seen.arms[0].injected) == decided.best[:2]
    for arm in seen.arms:
        same = arms[arm.delta, arm.injected, 0.1, 0.0]
        for ours, theirs in {"domain": "domain_after", "general": "general_after", "forgetting": "forgetting"}.items():
            assert getattr(arm, ours).mean == pytest.approx(getattr(same, theirs).mean)


def test_an_arm_is_compared_with_npt_of_the_same_finetune_or_else_the_plainest() -> None:
    npt = [Treatment(0.0, 0.01, 0.0), Treatment(0.0, 0.0, 0.1), Treatment(0.0, 0.0, 0.5)]
    assert compared_with(Treatment(0.02, 0.01, 0.0), npt) == npt[0]
    assert compared_with(Treatment(0.02, 0.05, 0.0), npt) == compared_with(npt[0], npt) == npt[1]
    assert compared_with(npt[1], npt) is None


def test_the_plainest_finetunes_have_the_least_replay_and_then_the_least_anchor(table: pd.DataFrame) -> None:
    found = plainest(after_pretraining(usable(table).rows))
    assert set(zip(found["injected"], found["anchor"], strict=True)) == {(0.0, 0.1)}
    assert sorted(found["pretrain_delta"].unique()) == [0.0, 0.02, 0.05]


def test_an_interval_over_seeds_is_mean_and_range_or_none() -> None:
    assert Figure.of([1.0, 3.0]) == Figure(2.0, 1.0, 3.0, math.sqrt(2))
    assert Figure.of([1.0]) == Figure(1.0, 1.0, 1.0, None)
    assert Figure.of([]) is Figure.of([1.0, None]) is Figure.of([1.0, math.nan]) is None
