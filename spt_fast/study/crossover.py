"""Whether to pretrain (arXiv 2006.08671): the amount of domain text above which training from scratch is as good.

Arms differ in the weights that training on the domain starts from: a pretrained model, random weights ("scratch"), or
only the embeddings of a pretrained model, trained or frozen. Their corpora are nested subsets of the domain. Each seed
of an arm has one run, with its final weights; of several runs it is the one with the lowest `domain_select`, by the
same rule for every arm. (Usable rows, which fits and reports use, have one learning rate per arm already.)

    gap         100 (loss from scratch / loss from pretrained weights - 1), in percent, of the same seed
    fit         the gap over log10 of the domain's tokens: a line through the points of all seeds, by least squares
    crossover   the number of domain tokens above which the mean gap stays below the threshold: between two subsets by
                linear interpolation in log tokens; beyond the largest by the fit, as an extrapolation

Intervals come from a Bayesian bootstrap over seeds; a seed has one exponential weight for all its subsets. A few seeds
vary less than their population, so deviations of a draw are widened by sqrt((n+1)/(n-1)), for the variance, and by the
quantile of Student's t for n seeds divided by the normal one. A single seed has no interval.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.special import ndtri, stdtrit

from spt_fast.errors import DataError, invalid
from spt_fast.laws.columns import ALIKE, Array, require_columns
from spt_fast.quantities import amount
from spt_fast.study.usable import with_average

ARMS = ("pretrained", "scratch", "embeddings", "frozen embeddings")
NEEDED = (
    *("stage", "status", "start", "params", "seed", "lr", "anchor", "average", "delta", "domain_tokens"),
    *("pretrain_tokens", "pretrain_delta", "domain_heldout", "domain_select", "handed_on", *ALIKE),
)
PRETRAINING = ["pretrain_tokens", "pretrain_delta"]
THRESHOLD = 0.01
"""The gap, as a fraction of the pretrained loss, below which pretraining counts as unnecessary."""
DRAWS, LEVEL = 2000, 0.9
FARTHEST = 100.0
"""An extrapolation is reported up to this many times the largest subset."""
MOST_DIGITS = 300
"""An interval is open if its end is above ten to this power of tokens."""

Range = tuple[float, float | None]
"""[low, high]; 0 and None for an open end."""


@dataclass(frozen=True)
class Subset:
    """An arm's runs on one subset of the domain. Losses are in nats per token."""

    domain_tokens: int
    mean: float
    seeds: dict[str, float]
    """Losses by seed."""
    lr: dict[str, float]
    """Peak learning rates by seed."""


@dataclass(frozen=True)
class Gap:
    """The gap between the arms on one subset."""

    domain_tokens: int
    nats: float
    """The difference of the mean losses."""
    percent: float
    """The mean gap over seeds."""
    interval: Range | None
    """The interval of `percent`; None for a single seed."""
    seeds: dict[str, float]
    """Gaps in percent, by seed."""


@dataclass(frozen=True)
class Line:
    """The fitted gap in percent: `intercept` at one token, `slope` for each tenfold of the domain."""

    intercept: float
    slope: float
    slope_interval: Range | None


@dataclass(frozen=True)
class Crossing:
    """Where the gap falls below the threshold."""

    where: str
    """ "between" two subsets, "below" the smallest, "beyond" the largest, "never", or "unknown"."""
    says: str
    """One sentence."""
    fit: Line | None = None
    """None for a single subset."""
    crossover: float | None = None
    """Domain tokens; None unless "between"."""
    interval: Range | None = None
    """The interval of `crossover` or `extrapolated`; None for a single seed."""
    extrapolated: float | None = None
    """For "beyond": domain tokens by the fit; None if they are too many to extrapolate to."""
    times_beyond: float | None = None
    """The same as a multiple of the largest subset."""


@dataclass(frozen=True, kw_only=True)
class Crossover(Crossing):
    """The crossover of one model size and one pretraining."""

    params: int
    pretrain_tokens: float | None
    """None if the pretraining is unknown."""
    pretrain_delta: float | None
    """None if the pretraining is unknown."""
    arms: dict[str, list[Subset]]
    gap: list[Gap]


def crossovers(table: pd.DataFrame, threshold: float = THRESHOLD) -> list[Crossover]:
    """The crossover for every model size and every pretraining of a runs table.

    `threshold` is a fraction of the pretrained loss. Raises DataError for a table without scratch and pretrained arms
    of one model size, or with several tokenizers or held-out texts.
    """
    if not 0 < threshold < 1:
        raise DataError(invalid("threshold", threshold, "write a fraction of the loss, such as 0.01"))
    rows = _arms(table)
    scratch, pretrained = (rows[rows["start"] == arm] for arm in ("scratch", "pretrained"))
    found = []
    for (params, *_), members in pretrained.groupby(["params", *PRETRAINING], dropna=False):
        same = (rows[PRETRAINING].fillna(-1) == members[PRETRAINING].iloc[0].fillna(-1)).all(axis=1)
        begun = rows[(rows["params"] == params) & same]
        both = pd.concat([begun[begun["start"] != "scratch"], scratch[scratch["params"] == params]])
        common = members.merge(both[both["start"] == "scratch"], on=["domain_tokens", "seed"])
        if len(common):
            found.append(_compared(both, threshold))
    if not found:
        raise DataError(
            "no subset of the domain was trained on both from scratch and from pretrained weights with the same model "
            "size and seed; give a finetune stage `start: [pretrained, scratch]` and `delta: 1`"
        )
    return found


def asks_for_crossover(table: pd.DataFrame) -> bool:
    """Whether the table has runs from scratch and from pretrained weights on the domain alone."""
    on_domain = table[(table["status"] == "done") & np.isclose(table["delta"].astype(float), 1)]
    return {"scratch", "pretrained"} <= set(on_domain["start"])


def _arms(table: pd.DataFrame) -> pd.DataFrame:
    """A row per arm, subset and seed: the best run by `domain_select`."""
    table = with_average(table)
    require_columns(table, NEEDED, "the runs table")
    begins = np.where(table["start"] == "scratch", table["stage"] == 0, table["stage"] <= 1)
    used = (table["status"] == "done") & table["handed_on"].astype(bool) & begins & table["start"].isin(ARMS)
    used &= np.isclose(table["delta"], 1) & (table["anchor"] == 0) & (table["average"] == 0)
    rows = table[used].dropna(subset=["domain_heldout", "domain_select"])
    for name in ALIKE:
        if rows[name].nunique() > 1:
            found = ", ".join(sorted(rows[name].astype(str).unique()))
            raise DataError(f"the arms differ in {name} ({found}), so their losses are not comparable; give one study")
    rows = rows.assign(pretrain_delta=rows["pretrain_delta"].round(9)).sort_values("domain_select")
    return rows.drop_duplicates(["params", "start", *PRETRAINING, "domain_tokens", "seed"])


def _compared(rows: pd.DataFrame, threshold: float) -> Crossover:
    pretraining = rows[rows["start"] == "pretrained"].iloc[0]
    losses = {
        arm: own.pivot(index="domain_tokens", columns="seed", values="domain_heldout")
        for arm in ARMS
        if len(own := rows[rows["start"] == arm])
    }
    percent = 100 * (losses["scratch"] / losses["pretrained"] - 1)
    percent = percent.dropna(how="all").dropna(how="all", axis=1)
    seeds = percent.notna().to_numpy()
    means = {arm: (losses[arm].reindex_like(percent).where(seeds)).mean(axis=1) for arm in ("scratch", "pretrained")}
    nats = means["scratch"] - means["pretrained"]
    gaps = _Gaps(np.log10(percent.index.to_numpy(float)), percent.to_numpy(float))
    intervals = [_interval(drawn) if gaps.has_interval else None for drawn in gaps.drawn.T]
    return Crossover(
        params=int(pretraining["params"]),
        pretrain_tokens=_known(pretraining["pretrain_tokens"]),
        pretrain_delta=_known(pretraining["pretrain_delta"]),
        arms={arm: _subsets(rows[rows["start"] == arm]) for arm in losses},
        gap=[
            Gap(int(tokens), float(nats[tokens]), float(mean), interval, _seeds(by_seed))
            for (tokens, by_seed), mean, interval in zip(percent.iterrows(), gaps.mean, intervals, strict=True)
        ],
        **vars(_crossing(gaps, 100 * threshold)),
    )


def _subsets(rows: pd.DataFrame) -> list[Subset]:
    by_subset = rows.sort_values("seed").set_index("seed").groupby("domain_tokens")
    return [
        Subset(int(tokens), float(own["domain_heldout"].mean()), _seeds(own["domain_heldout"]), _seeds(own["lr"]))
        for tokens, own in by_subset
    ]


def _seeds(by_seed: pd.Series) -> dict[str, float]:
    return {str(seed): float(value) for seed, value in by_seed.dropna().items()}


def _known(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


class _Gaps:
    """Gaps in percent, [subsets, seeds] with NaN for missing ones, and a bootstrap of them over seeds.

    mean [subsets], line (intercept, slope) or None for a single subset; drawn [DRAWS, subsets], lines [DRAWS, 2].
    """

    def __init__(self, log_tokens: Array, percent: Array) -> None:
        self.log_tokens, self.percent = log_tokens, percent
        seeds = percent.shape[1]
        n = int((~np.isnan(percent)).sum(1).min())
        self.has_interval = n > 1
        self.mean, line = self._of(np.ones(seeds))
        self.line = line if len(log_tokens) > 1 else None
        means, lines = self._of(np.random.default_rng(0).exponential(size=(DRAWS if self.has_interval else 0, seeds)))
        tail = (1 + LEVEL) / 2
        wider = np.sqrt((n + 1) / (n - 1)) * stdtrit(n - 1, tail) / ndtri(tail) if self.has_interval else 1.0
        self.drawn = self.mean + wider * (means - self.mean)
        self.lines = line + wider * (lines - line)

    def _of(self, weights: Array) -> tuple[Array, Array]:
        """(means [..., subsets], lines [..., 2]) by the weights [..., seeds]."""
        weight = weights[..., None, :] * ~np.isnan(self.percent)
        total = weight.sum(-1)
        mean = (weight * np.nan_to_num(self.percent)).sum(-1) / total
        center, level = (np.average(values, weights=total, axis=-1) for values in (self.log_tokens + 0 * mean, mean))
        x = self.log_tokens - center[..., None]
        slope = (total * x * mean).sum(-1) / np.maximum((total * x * x).sum(-1), 1e-300)
        return mean, np.stack([level - slope * center, slope], -1)

    def crossing(self, threshold: float, mean: Array, line: Array) -> float:
        """log10 of the tokens above which the gap stays below the threshold; -inf if it does in all subsets, inf if it
        never does."""
        above = np.flatnonzero(mean > threshold)
        if not len(above):
            return -np.inf
        last = above[-1]
        if last < len(mean) - 1:
            share = (mean[last] - threshold) / (mean[last] - mean[last + 1])
            return float(self.log_tokens[last] + share * (self.log_tokens[last + 1] - self.log_tokens[last]))
        intercept, slope = line
        return max(float(self.log_tokens[-1]), (threshold - intercept) / slope) if slope < 0 else np.inf


def _interval(draws: Array) -> tuple[float, float]:
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], method="inverted_cdf")
    return float(low), float(high)


def _crossing(gaps: _Gaps, threshold: float) -> Crossing:
    """The crossing of the gaps with `threshold`, in percent."""
    smallest, largest = (amount(float(10**edge)) for edge in gaps.log_tokens[[0, -1]])
    under = f"within {threshold:g}% of the loss from pretrained weights"
    if gaps.line is None:
        says = f"A single subset of {smallest} domain tokens does not show where the gap closes; train on more subsets."
        return Crossing("unknown", says)

    intercept, slope = map(float, gaps.line)
    fit = Line(intercept, slope, _interval(gaps.lines[:, 1]) if gaps.has_interval else None)
    at = gaps.crossing(threshold, gaps.mean, gaps.line)
    interval = None
    if gaps.has_interval:
        drawn = [gaps.crossing(threshold, *draw) for draw in zip(gaps.drawn, gaps.lines, strict=True)]
        low, high = _interval(np.array(drawn))
        interval = float(10**low), float(10**high) if high < MOST_DIGITS else None
    if at == -np.inf:
        says = f"With only {smallest} domain tokens, the smallest subset, a model from scratch is already {under}."
        return Crossing("below", says, fit)
    if at <= gaps.log_tokens[-1] and gaps.mean[-1] <= threshold:
        says = f"Above about {amount(10**at)} domain tokens{_range(interval)} a model from scratch is {under}."
        return Crossing("between", says, fit, crossover=float(10**at), interval=interval)
    says = f"With {largest} domain tokens, the largest subset, a model from scratch is not {under}: "
    if at == np.inf:
        return Crossing("never", f"{says}the gap does not shrink with more tokens.", fit)
    beyond = float(10 ** (at - gaps.log_tokens[-1]))
    if beyond > FARTHEST:
        says += f"at this slope it would need more than {FARTHEST:g} times as many, which is too far to extrapolate."
        return Crossing("beyond", says, fit)
    says += (
        f"at this slope it would be above about {amount(10**at)} tokens{_range(interval)}, an extrapolation "
        f"to {beyond:.2g} times as many."
    )
    return Crossing("beyond", says, fit, interval=interval, extrapolated=float(10**at), times_beyond=beyond)


def _range(interval: Range | None) -> str:
    if interval is None:
        return " (one seed: no interval)"
    low, high = interval
    least = "less" if not low else amount(low)
    return f" ({LEVEL:.0%}: {least} to {'any number' if high is None else amount(high)})"
