"""The runs that answer a question best: those nearest in model size and in how often their domain corpus is read.

Runs with another corpus size are compared at the budget at which their corpus is read as often as the user's:
budget · (their domain tokens / the user's), by simulated epoching (arXiv 2606.07597).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd

from spt_fast.advice.arms import arms, finetunes
from spt_fast.advice.forecast import Forecast, forecast
from spt_fast.advice.prior import outside
from spt_fast.advice.result import Arm, Choice, Outcome
from spt_fast.errors import DataError
from spt_fast.laws import OpenError
from spt_fast.study import views
from spt_fast.study.finetunes import SIZES, plainest
from spt_fast.study.usable import UsableRows


@dataclass(frozen=True)
class Evidence:
    rows: pd.DataFrame
    """Finetunes of one model size and domain corpus, all with the anchor and average of the plainest ones."""
    all_sizes: pd.DataFrame
    """Finetunes of all model sizes on the same corpus."""
    budget: float
    """Pretraining tokens after which these runs have read their corpus as often as the question's budget reads the
    user's."""
    arms: list[Arm]
    """The arms with the least replay, at the budget nearest to `budget` that was run; the lowest domain loss first."""
    forecast: Forecast | None

    @property
    def params(self) -> int:
        return int(self.rows["params"].iloc[0])

    @property
    def domain_tokens(self) -> int:
        return int(self.rows["domain_tokens"].iloc[0])

    def steady(self) -> list[Arm]:
        """The arms of FT and SPT."""
        return [arm for arm in self.arms if arm.regime != "SCPT"]

    def late(self) -> list[Arm]:
        """The arms of SCPT."""
        return [arm for arm in self.arms if arm.regime == "SCPT"]

    def arm_of(self, chosen: Choice) -> Arm:
        """The measured arm of a choice."""
        what = (chosen.regime, chosen.delta, chosen.domain_from)
        return next(arm for arm in self.arms if (arm.regime, arm.delta, arm.domain_from) == what)

    def seen(self) -> dict[float, Outcome]:
        """Measured losses of FT and SPT, by share."""
        return {
            arm.delta: Outcome(arm.domain, arm.general, arm.forgetting.mean if arm.forgetting else None)
            for arm in self.steady()
        }

    def outcomes(self) -> dict[float, Outcome]:
        """Losses with the least replay, by share: those of the laws, or measured ones without laws."""
        return self.forecast.outcomes if self.forecast else self.seen()

    def general(self) -> dict[float, tuple[float, float]]:
        """{delta: (general loss before, after) a finetune with the least replay}: by the laws, or measured without
        them; empty if it was not measured."""
        by_law, seen = (
            {
                delta: (one.general.mean - one.forgetting, one.general.mean)
                for delta, one in outcomes.items()
                if one.general and one.forgetting is not None
            }
            for outcomes in (self.outcomes(), self.seen())
        )
        return by_law or seen

    def general_of(self, chosen: Choice) -> tuple[float, float] | None:
        """The same for a choice; None if it was not measured."""
        if chosen.regime != "SCPT" or chosen.basis == "published":
            return self.general().get(chosen.delta)
        arm = self.arm_of(chosen)
        return (arm.general.mean - arm.forgetting.mean, arm.general.mean) if arm.general and arm.forgetting else None


def gather(
    table: UsableRows | None, *, domain_tokens: int, budget: int, params: int | None
) -> tuple[Evidence | None, list[str]]:
    """The evidence, or None; and a sentence for each thing that is missing or was left out.

    domain_tokens, budget, params: of the question; params is None for any size.
    """
    if table is None:
        return None, ["no runs were given"]
    everything = finetunes(table)
    notes = [note.replace("left out", "left out by the laws", 1) for note in table.notes]
    groups = [
        own[own["anchor"].isin(plainest(own)["anchor"]) & own["average"].isin(plainest(own)["average"])]
        for _, own in everything.groupby(SIZES)
        if plainest(own)["pretrain_delta"].nunique() > 1
    ]
    if not groups:
        return None, [
            *notes,
            "the runs have no finetunes on domain text after pretraining with two shares of it or more (0 counts as "
            "one), so there is nothing to compare",
        ]
    rows = min(groups, key=lambda group: _distance(group, domain_tokens, budget, params))
    corpus = rows["domain_tokens"].iloc[0]
    at = budget * float(corpus) / domain_tokens
    least = plainest(rows)
    shares = least.groupby("pretrain_tokens")["pretrain_delta"].nunique()
    comparable = shares.index[shares >= min(2, shares.max())]
    there = min(comparable, key=lambda tokens: abs(math.log(tokens / at)))
    predicted = None
    try:
        predicted = forecast(least[least["regime"] != "SCPT"], _curves(table, rows), at)
    except (DataError, OpenError) as error:
        notes.append(str(error))
    same_corpus = everything[everything["domain_tokens"] == corpus]
    return Evidence(rows, same_corpus, at, arms(least[least["pretrain_tokens"] == there]), predicted), notes


def _distance(group: pd.DataFrame, domain_tokens: int, budget: int, params: int | None) -> float:
    """The sum of |log| of the factors by which a group differs from the question."""
    corpus, tokens = float(group["domain_tokens"].iloc[0]), group["pretrain_tokens"]
    factors = [corpus / domain_tokens, outside(budget * corpus / domain_tokens, tokens.min(), tokens.max())]
    if params is not None:
        factors.append(group["params"].iloc[0] / params)
    return float(np.abs(np.log(factors)).sum())


def _curves(table: UsableRows, rows: pd.DataFrame) -> pd.DataFrame | None:
    """The pretraining curves of the same model size and corpus; None if the table has none."""
    for group, curves in views.overfitting(table):
        if all(group[name] == rows[name].iloc[0] for name in SIZES):
            return curves
    return None
