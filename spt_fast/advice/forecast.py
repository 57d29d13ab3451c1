"""Predicted losses after finetuning at a pretraining budget, for each share of domain data that was run.

The domain loss is PostFinetuneLaw's. The loss before finetuning that it needs comes from the OverfittingLaw, the
MixtureRepetitionLaw or a curve for each share: from the one with the smallest error when the largest budget is held
out, or, if that leaves the loss undetermined, from the next with about as small an error. The general loss comes from
the same law fitted to general losses, a power law in the budget before and after finetuning for each share (our choice:
no paper has a law for it). To estimate how certain the best share is, the laws are refitted to losses with further
errors as large as those of the runs (which one seed leaves to be assumed, see PostFinetuneLaw), and the draws in which
each share is best are counted.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from spt_fast.advice.result import AtBudget, HeldOut, Outcome, Standing
from spt_fast.errors import DataError, RecipeError, SptError
from spt_fast.laws import ExtrapolationWarning, MixtureRepetitionLaw, OpenError, OverfittingLaw, PostFinetuneLaw
from spt_fast.quantities import amount
from spt_fast.study.finetunes import Interval

Before = OverfittingLaw | MixtureRepetitionLaw
Fitted = tuple[PostFinetuneLaw, HeldOut | None]
"""A law, and its error at the largest budget from the others."""
BEFORE: tuple[type[Before], ...] = (OverfittingLaw, MixtureRepetitionLaw)
"""Laws of the loss before finetuning."""
LEVEL, DRAWS = 0.9, 100
WIDEST = 2.0
"""The largest factor between the ends of an interval; a loss with a wider one counts as undetermined."""
ABOUT = 1.5
"""The largest factor between errors of a law and the best one, if it replaces that: each is the mean over a few runs of
one budget."""
FEWEST_BUDGETS, FEWEST_POINTS = 3, 4
"""For each share: as many budgets as a power law with an offset has parameters, and one more finetune."""


@dataclass(frozen=True)
class Forecast:
    """Losses after `tokens` of pretraining and a finetune, by share; intervals at LEVEL."""

    tokens: float
    outcomes: dict[float, Outcome]
    draws: np.ndarray
    """[draws, shares]: domain losses by laws fitted to losses with further errors."""
    standing: Standing

    def best_in(self, allowed: np.ndarray) -> np.ndarray:
        """[shares]: the part of the draws in which a share has the lowest domain loss of the `allowed` ones."""
        best = np.where(allowed, self.draws, np.inf).argmin(axis=1)
        return np.bincount(best, minlength=len(self.outcomes)) / len(self.draws)


def forecast(rows: pd.DataFrame, curves: pd.DataFrame | None, tokens: float) -> Forecast:
    """The forecast after `tokens` of pretraining.

    rows    the plainest finetunes of one model size and corpus (study/finetunes.py), pretrained with a fixed share
    curves  the pretraining of the same, as OverfittingLaw takes it

    Raises DataError, which names what is missing, if the laws cannot be fitted or leave the loss undetermined.
    """
    rows = _enough(rows)
    deltas = sorted(rows["pretrain_delta"].unique())
    at: dict[str, Any] = {"tokens": np.full(len(deltas), tokens), "fraction": np.array(deltas)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        candidates, before_law = _candidates(rows, curves)
        law, error, domain = _first_determined(candidates, at)
        general: Sequence[Interval | None] = [None] * len(deltas)
        forgetting: Sequence[float | None] = [None] * len(deltas)
        if rows[["general_before", "general_heldout"]].notna().all(axis=None):
            of_general = PostFinetuneLaw().fit(_columns(rows, "general"))
            after = of_general.predict(interval=LEVEL, **at)
            if (after[2] <= WIDEST * after[1]).all():
                general = _intervals(after)
                forgetting = (after[0] - of_general.predict(of="heldout_loss", **at)).tolist()
        draws = np.stack([drawn.predict(**at) for drawn in law.resampled(_columns(rows, "domain"), DRAWS)])
        before = _best_before(before_law, tokens)
    said = {str(w.message): None for w in caught if not issubclass(w.category, ExtrapolationWarning)}
    name = f"{type(law.heldout).__name__} and PostFinetuneLaw" if law.heldout else "PostFinetuneLaw"
    spread, told = law.between_seeds_
    standing = Standing(name, error, _against(law, _last(rows)), before, list(said), None if told else spread)
    outcomes = dict(zip(deltas, map(Outcome, domain, general, forgetting), strict=True))
    return Forecast(tokens, outcomes, draws, standing)


def _first_determined(
    candidates: Sequence[Fitted], at: dict[str, Any]
) -> tuple[PostFinetuneLaw, HeldOut | None, list[Interval]]:
    """The first of the laws that determines the domain losses, its error, and these. Raises the first one's DataError
    or OpenError if none does."""
    problems: list[SptError] = []
    for law, error in candidates:
        try:
            return law, error, _determined(law, at)
        except (DataError, OpenError) as problem:
            problems.append(problem)
    raise problems[0]


def _determined(law: PostFinetuneLaw, at: dict[str, Any]) -> list[Interval]:
    """Its predictions. Raises DataError if an interval is wider than WIDEST, OpenError if there is none."""
    domain = _intervals(law.predict(interval=LEVEL, **at))
    widest = max(domain, key=lambda loss: loss.high / max(loss.low, 1e-9))
    if not widest.high <= WIDEST * widest.low:
        raise DataError(
            f"the laws do not determine the domain loss after {amount(at['tokens'][0])} tokens: an interval spans more "
            f"than a factor of {WIDEST:g}"
        )
    return domain


def _best_before(law: Before | None, tokens: float) -> float | None:
    """The best share before finetuning; None if the runs do not determine it."""
    try:
        return law.best_fraction(tokens=tokens) if law else None
    except RecipeError:
        return None


def _intervals(edges: tuple[np.ndarray, ...]) -> list[Interval]:
    return [Interval(*edge) for edge in zip(*(values.tolist() for values in edges), strict=True)]


def _enough(rows: pd.DataFrame) -> pd.DataFrame:
    """The finetunes of the shares that have enough of them for a curve. DataError if fewer than two shares do."""
    by_share = rows.groupby("pretrain_delta")["pretrain_tokens"]
    counts = pd.DataFrame({"budgets": by_share.nunique(), "points": by_share.size()})
    kept = counts[(counts["budgets"] >= FEWEST_BUDGETS) & (counts["points"] >= FEWEST_POINTS)].index
    if len(kept) < 2:
        has = ", ".join(f"{d:g}: {c.budgets} ({c.points})" for d, c in counts.iterrows())
        raise DataError(
            f"a law needs two shares or more with finetunes after at least {FEWEST_BUDGETS} budgets, {FEWEST_POINTS} "
            f"in all; the runs have, by share, budgets (finetunes): {has or 'none'}"
        )
    return rows[rows["pretrain_delta"].isin(kept)]


def _columns(rows: pd.DataFrame, corpus: str) -> pd.DataFrame:
    """Finetunes as PostFinetuneLaw takes them. Those of one pretraining run have the same `run`, since they share its
    error."""
    return pd.DataFrame(
        {
            "tokens": rows["pretrain_tokens"],
            "fraction": rows["pretrain_delta"],
            "heldout_loss": rows[f"{corpus}_before"],
            "finetuned_loss": rows[f"{corpus}_heldout"],
            "run": rows["pretrain_delta"].astype(str) + " " + rows["seed"].astype(str),
        }
    )


def _candidates(rows: pd.DataFrame, curves: pd.DataFrame | None) -> tuple[list[Fitted], Before | None]:
    """The law that predicts the largest budget best from the others, then those with about as small an error there; and
    the law of the loss before finetuning that has the smallest error."""
    plain: Fitted = _fitted(rows, None, None), _heldout_error(rows, None, None)
    others: list[Fitted] = []
    for kind in BEFORE if curves is not None else ():
        try:
            others.append((_fitted(rows, curves, kind), _heldout_error(rows, curves, kind)))
        except DataError:
            continue
    best = min(others, key=_error, default=None)
    ordered = sorted([plain, *others], key=_error) if plain[1] else [plain]
    about = [one for one in ordered[1:] if _error(one) <= ABOUT * _error(ordered[0])]
    return [ordered[0], *about], best[0].heldout if best else None


def _error(fitted: Fitted) -> float:
    return fitted[1].mre if fitted[1] else np.inf


def _fitted(rows: pd.DataFrame, curves: pd.DataFrame | None, kind: type[Before] | None) -> PostFinetuneLaw:
    before = None if curves is None or kind is None else kind().fit(_curves(curves, kind))
    return PostFinetuneLaw(heldout=before).fit(_columns(rows, "domain"))


def _curves(curves: pd.DataFrame, kind: type[Before]) -> pd.DataFrame:
    """The curves in the columns that the law takes."""
    if kind is OverfittingLaw:
        return curves
    unique = curves.loc[curves["fraction"] > 0, "domain_tokens"].iloc[0]
    return curves.assign(unique_tokens=unique, loss=curves["heldout_loss"])


def _heldout_error(rows: pd.DataFrame, curves: pd.DataFrame | None, kind: type[Before] | None) -> HeldOut | None:
    last = _last(rows)
    before = float(last["pretrain_tokens"].max())
    try:
        fewer = _enough(rows[rows["pretrain_tokens"] < before])
        law = _fitted(fewer, None if curves is None else curves[curves["tokens"] < before], kind)
    except DataError:
        return None
    last = last[last["pretrain_delta"].isin(law.fractions_)]
    return None if last.empty else HeldOut(**vars(_against(law, last)), by=int(fewer["pretrain_tokens"].max()))


def _last(rows: pd.DataFrame) -> pd.DataFrame:
    return rows[rows["pretrain_tokens"] == rows["pretrain_tokens"].max()]


def _against(law: PostFinetuneLaw, rows: pd.DataFrame) -> AtBudget:
    """A law's domain losses compared with those of finetunes after one budget."""
    tokens, seen = rows["pretrain_tokens"].max(), rows.groupby("pretrain_delta")["domain_heldout"].mean()
    predicted = law.predict(tokens=np.full(len(seen), tokens), fraction=seen.index.to_numpy())
    return AtBudget(
        tokens=int(tokens),
        mre=float(np.abs(predicted / seen.to_numpy() - 1).mean()),
        predicted=float(seen.index[predicted.argmin()]),
        seen=float(seen.idxmin()),
    )
