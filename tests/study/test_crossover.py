"""The crossover on tables where it is known: the runs of an arm, the point where the gap closes, and the reason if it
does not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from spt_fast.errors import DataError
from spt_fast.report.panels import draw_gap, draw_losses
from spt_fast.study.crossover import Crossover, crossovers
from spt_fast.study.runs_table import COLUMNS

SUBSETS = (100_000, 300_000, 1_000_000, 3_000_000, 10_000_000)
INTERCEPT, SLOPE = 25.0, -3.5
"""The gap in percent: 7.5 at 100K tokens, 0.5 at 10M; 1% at 10^(24/3.5)."""
TRUTH = 10 ** (24 / 3.5)


def row(arm: str, tokens: int, loss: float, seed: int = 0, **more: Any) -> dict[str, Any]:
    scratch = arm == "scratch"
    values: dict[str, Any] = {
        "run": f"{arm}-{tokens}-{seed}",
        "stage": 0 if scratch else 1,
        "status": "done",
        "start": arm,
        "params": 1_000_000,
        "seed": seed,
        "lr": 1e-3,
        "anchor": 0.0,
        "tokens": 4.0 * tokens,
        "delta": 1.0,
        "domain_tokens": float(tokens),
        "pretrain_tokens": 0.0 if scratch else 6e7,
        "pretrain_delta": np.nan if scratch else 0.0,
        "domain_heldout": loss,
        "domain_select": loss,
        "handed_on": True,
        "tokenizer": "t",
        "heldout": "h",
    }
    return {**dict.fromkeys(COLUMNS, np.nan), **values, **more}


def rows_of(
    subsets: Sequence[int] = SUBSETS,
    seeds: int = 1,
    noise: float = 0.0,
    intercept: float = INTERCEPT,
    slope: float = SLOPE,
    drawn_by: int = 0,
) -> list[dict[str, Any]]:
    """The rows of both arms; noise: in percent of each loss, half of it common to a seed's runs of an arm."""
    rng = np.random.default_rng(drawn_by)
    rows = []
    for seed in range(seeds):
        shared = rng.normal(0, noise / 2, 2)
        for tokens in subsets:
            pretrained = 4.0 - 0.2 * np.log10(tokens / 1e5)
            gap = intercept + slope * np.log10(tokens)
            ours, theirs = (shared + rng.normal(0, noise, 2)) / 100
            rows.append(row("pretrained", tokens, pretrained * (1 + ours), seed))
            rows.append(row("scratch", tokens, pretrained * (1 + gap / 100) * (1 + theirs), seed))
    return rows


def compared(rows: list[dict[str, Any]], **settings: float) -> Crossover:
    (found,) = crossovers(pd.DataFrame(rows), **settings)
    return found


def test_a_known_crossover_is_found_exactly() -> None:
    found = compared(rows_of())
    assert found.where == "between"
    assert found.crossover == pytest.approx(TRUTH)
    assert found.fit.slope == pytest.approx(SLOPE)
    assert found.fit.intercept == pytest.approx(INTERCEPT)
    assert found.interval is None
    assert [gap.percent for gap in found.gap] == pytest.approx([INTERCEPT + SLOPE * np.log10(n) for n in SUBSETS])
    assert found.gap[0].nats == pytest.approx(4.0 * 0.075)
    assert (found.params, found.pretrain_tokens, found.pretrain_delta) == (1_000_000, 6e7, 0.0)
    says = "Above about 7.2M domain tokens (one seed: no interval) a model from scratch is within 1% of the loss from"
    assert found.says.startswith(says)
    other = compared(rows_of(), threshold=0.04)
    assert other.crossover == pytest.approx(10 ** (21 / 3.5))
    assert "within 4% of" in other.says


@pytest.mark.parametrize("seeds", [2, 4])
def test_intervals_have_their_nominal_coverage(seeds: int) -> None:
    """90% ± 8 points of 80 studies (the standard error is 3.4): for the slope, a crossover between subsets, and an
    extrapolated one."""
    held = np.zeros((80, 3))
    for study in range(len(held)):
        for i, (subsets, threshold) in enumerate(((SUBSETS, 0.04), (SUBSETS[:4], 0.005))):
            found = compared(rows_of(subsets, seeds=seeds, noise=0.5, drawn_by=study), threshold=threshold)
            low, high = found.interval or (0.0, None)
            held[study, i] = low <= 10 ** ((INTERCEPT - 100 * threshold) / -SLOPE) <= (high or np.inf)
        low, high = found.fit.slope_interval
        held[study, 2] = low <= SLOPE <= high
    assert held.mean(0) == pytest.approx(0.9, abs=0.08)


def test_a_crossover_beyond_the_largest_subset_is_marked_as_an_extrapolation() -> None:
    found = compared(rows_of(SUBSETS[:3], seeds=3, noise=0.1))
    assert found.where == "beyond"
    assert found.crossover is None
    assert found.extrapolated == pytest.approx(TRUTH, rel=0.3)
    assert found.times_beyond == pytest.approx(found.extrapolated / 1e6)
    assert found.interval[0] < found.extrapolated < found.interval[1]
    assert "With 1M domain tokens, the largest subset, a model from scratch is not within 1%" in found.says
    assert "an extrapolation to 7." in found.says


def test_the_reason_for_no_crossover_is_given() -> None:
    below = compared(rows_of(intercept=5.0, slope=-1.0), threshold=0.01)
    assert (below.where, below.crossover) == ("below", None)
    assert "With only 100K domain tokens, the smallest subset" in below.says
    never = compared(rows_of(slope=0.5))
    assert (never.where, never.crossover, never.extrapolated) == ("never", None, None)
    assert never.says.endswith("the gap does not shrink with more tokens.")
    far = compared(rows_of(slope=-0.5))
    assert (far.where, far.extrapolated) == ("beyond", None)
    assert far.says.endswith("more than 100 times as many, which is too far to extrapolate.")
    one = compared(rows_of(SUBSETS[:1]))
    assert (one.where, one.fit) == ("unknown", None)
    assert "A single subset of 100K domain tokens" in one.says


def test_a_gap_that_rises_again_has_not_closed() -> None:
    rows = [row("pretrained", tokens, 4.0) for tokens in SUBSETS]
    gaps = (5.0, 0.5, 3.0, 0.0, 0.0)
    rows += [row("scratch", tokens, 4.0 * (1 + gap / 100)) for tokens, gap in zip(SUBSETS, gaps, strict=True)]
    assert compared(rows).crossover == pytest.approx(1e6 * 3 ** (2 / 3))


def test_an_arm_uses_only_its_best_run_by_the_select_half() -> None:
    rows = rows_of(seeds=2)
    expected = compared(rows)
    first = next(r for r in rows if r["start"] == "scratch")
    lucky = {"run": "other-rate", "lr": 1e-2, "domain_heldout": 0.1}
    strangers: list[dict[str, Any]] = [
        lucky | {"domain_select": 9.0},
        {"status": "failed", "domain_heldout": np.nan, "domain_select": np.nan},
        {"handed_on": False, "domain_select": 0.1, **lucky},
        {"anchor": 0.1, "domain_select": 0.1, **lucky},
        {"delta": 0.99, "domain_select": 0.1, **lucky},
        {"stage": 2, "domain_select": 0.1, **lucky},
        {"params": 2_000_000, "domain_select": 0.1, **lucky},
        {"seed": 7, "domain_select": 0.1, **lucky},
    ]
    later = next(r for r in rows if r["start"] == "pretrained") | lucky | {"stage": 2, "domain_select": 0.1}
    found = compared([later, *(first | stranger for stranger in strangers), *rows])
    assert replace(found, arms={}) == replace(expected, arms={})
    better = {**first, **lucky, "domain_heldout": 4.1, "domain_select": 1.0}
    found = compared([better, *rows])
    assert found.gap[0].seeds["0"] == pytest.approx(2.5)
    assert found.arms["scratch"][0].lr == {"0": 1e-2, "1": 1e-3}


def test_a_missing_run_does_not_affect_the_others() -> None:
    rows = rows_of(seeds=3)
    rows = [r for r in rows if not (r["start"] == "scratch" and r["seed"] == 2 and r["domain_tokens"] == 1e6)]
    found = compared(rows)
    assert [len(gap.seeds) for gap in found.gap] == [3, 3, 2, 3, 3]
    assert found.crossover == pytest.approx(TRUTH)
    assert found.gap[2].nats == pytest.approx(0.01 * found.gap[2].percent * found.arms["pretrained"][2].mean)


def test_every_size_and_pretraining_is_compared_with_scratch_runs_of_its_size() -> None:
    rows = rows_of()
    rows += [r | {"pretrain_delta": 0.02} for r in rows if r["start"] == "pretrained"]
    foreign = {"pretrain_tokens": np.nan, "pretrain_delta": np.nan}
    rows += [r | foreign for r in rows if r["start"] == "pretrained" and r["pretrain_delta"] == 0.0]
    rows += [row("embeddings", tokens, 4.2, pretrain_delta=0.02) for tokens in SUBSETS]
    found = crossovers(pd.DataFrame(rows))
    pretrainings = [(c.pretrain_tokens, c.pretrain_delta) for c in found]
    assert pretrainings == [(6e7, 0.0), (6e7, 0.02), (None, None)]
    assert [c.crossover for c in found] == pytest.approx([TRUTH] * 3)
    assert [set(c.arms) for c in found] == [
        {"pretrained", "scratch"},
        {"pretrained", "scratch", "embeddings"},
        {"pretrained", "scratch"},
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start": "pretrained"}, "no subset of the domain was trained on both.*start: \\[pretrained, scratch\\]"),
        ({"seed": 5}, "no subset of the domain was trained on both"),
        ({"heldout": "other"}, r"the arms differ in heldout \(h, other\)"),
    ],
)
def test_tables_without_a_comparison_are_refused(changes: dict[str, Any], message: str) -> None:
    rows = [r | changes if r["start"] == "scratch" else r for r in rows_of()]
    with pytest.raises(DataError, match=message):
        crossovers(pd.DataFrame(rows))


def test_a_missing_column_and_a_threshold_in_percent_are_named() -> None:
    table = pd.DataFrame(rows_of())
    with pytest.raises(DataError, match="no column 'domain_select'; did you mean 'domain_heldout'"):
        crossovers(table.drop(columns="domain_select"))
    with pytest.raises(DataError, match=r"threshold: 1 is invalid: write a fraction"):
        crossovers(table, threshold=1)


@pytest.mark.parametrize(
    "rows",
    [
        [
            *rows_of(seeds=3, noise=0.3),
            *(row(arm, n, 4.1) for n in SUBSETS for arm in ("embeddings", "frozen embeddings")),
        ],
        rows_of(SUBSETS[:3], seeds=3, noise=0.3),
        rows_of(slope=0.5),
        rows_of(intercept=5.0, slope=-1.0, seeds=2, noise=0.1),
        rows_of(SUBSETS[:1]),
    ],
    ids=["between", "beyond", "never", "below", "unknown"],
)
def test_every_result_is_json_and_can_be_drawn(
    rows: list[dict[str, Any]], request: pytest.FixtureRequest, tmp_path: Any
) -> None:
    comparison = compared(rows)
    assert json.dumps(asdict(comparison), allow_nan=False)
    assert comparison.where == request.node.callspec.id
    figure = Figure()
    losses, gap = figure.subplots(1, 2)
    draw_losses(losses, comparison.arms)
    draw_gap(gap, comparison)
    figure.savefig(tmp_path / "crossover.png")
    assert {text.get_text() for text in losses.get_legend().get_texts()} == set(comparison.arms)
    drawn = gap.get_lines()
    assert any(
        np.allclose(line.get_ydata(), [g.percent for g in comparison.gap])
        for line in drawn
        if len(line.get_xdata()) == len(comparison.gap)
    )
