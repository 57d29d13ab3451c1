"""The whole loss curve of a run from its learning-rate schedule: the gain of decaying the rate at any point of any
schedule.

    L(t) = L0 + A·S(t)^−α − LD(t),   S(t) = Σ η_τ over the steps up to t, warm-up included
    LD(t) = B·Σ_k (η_{k−1} − η_k)·G(η_k^−γ·S_k(t)),   S_k(t) = Σ η_τ from step k to t,   G(x) = 1 − (C·x + 1)^−β

The Multi-Power Law, arXiv 2503.12811: for one model and batch size, fitted to the curves of a few schedules (in the
paper a cosine, a constant rate and a drop), it predicts others, so that the loss at a budget needs no run that decays
at that budget. Steps between two rows use the mean of their rates; k counts from the largest rate. Huber loss on
log-losses. It is only a library call: `spt-fast fit` doesn't fit it, since a runs table holds a run's peak rate, not
its schedule.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from scipy.special import chdtri, ndtri

from spt_fast.laws.base import MISFIT_FREEDOM, FormulaLaw, OpenError
from spt_fast.laws.chinchilla import coefficient, exponent
from spt_fast.laws.columns import NATURAL, Array, Column, Columns, Rows
from spt_fast.laws.fitting import QUANTILES, Parameter
from spt_fast.laws.powers import power

FEWEST_CURVES = 3
BEYOND = 1.1
"""Intervals are given up to this many times the largest sum of rates that was run."""
MOST_ROWS, FEWEST_ROWS = 300, 20
"""Rows that are fitted to, of all curves and of each."""
MOST_DROPS = 200
"""Drops of a curve that are added up: what neighbours of a slow decay give differs little."""
LEAST_RATE = 1e-6
"""Least rate, as a share of the largest: a schedule may end at 0, which has no negative power."""


class MultiPowerLaw(FormulaLaw):
    """Columns: `step` (optimizer steps), `lr` (its rate), `loss`; `run` identifies the curves. Parameters: L0, A,
    alpha, B, C, beta, gamma.

    A prediction needs the rows of a whole schedule from its warm-up on, in order; where the step decreases, the next
    schedule begins. Its intervals are as wide as the law's error on each curve when it is fitted to the others.
    """

    inputs: ClassVar[dict[str, Column]] = {"step": NATURAL, "lr": NATURAL}
    parameters: ClassVar[tuple[Parameter, ...]] = (
        Parameter("L0", 1e-3, 20, linear=True),
        coefficient("A"),
        exponent("alpha"),
        coefficient("B"),
        Parameter("C", 1e-2, 1e4),
        exponent("beta"),
        exponent("gamma"),
    )
    units: ClassVar[dict[str, dict[str, str]]] = {}

    @staticmethod
    def formula(unknowns: Sequence[Array], columns: Columns) -> Array:
        L0, A, alpha, B, C, beta, gamma = unknowns
        C, beta, gamma = (unknown[..., None] for unknown in (C, beta, gamma))
        annealed = 1 - power(1 + C * power(columns["rates"], -gamma) * columns["since"], -beta)
        return L0 + A * power(columns["sum"], -alpha) - B * (columns["drops"] * annealed).sum(axis=-1)

    def _prepare(self, rows: Rows) -> Rows:
        """Curve after curve, each by its steps; those that begin later come first, so that steps decrease between
        two."""
        first = np.array([rows.columns["step"][rows.run == run].min() for run in range(rows.run.max() + 1)])
        order = np.lexsort((rows.columns["step"], rows.run, -first[rows.run]))
        return rows.where(order)

    def _counted(self, rows: Rows) -> Array:
        """About MOST_ROWS, evenly along each curve: neighbours say the same, and each takes all drops before it."""
        counted = np.zeros(len(rows), dtype=bool)
        for run in np.unique(rows.run):
            own = np.flatnonzero(rows.run == run)
            share = max(MOST_ROWS * len(own) // len(rows), FEWEST_ROWS)
            counted[own[np.linspace(0, len(own) - 1, min(share, len(own))).round().astype(int)]] = True
        return counted

    def _measured(self, rows: Rows) -> dict[str, float]:
        sums = self._features(rows.columns, {})["sum"]
        return {"sum": float(np.exp(np.log(sums).mean())), "lr": float(rows.columns["lr"].max())}

    def _features(self, columns: Columns, unit: dict[str, float]) -> Columns:
        """For each row the sum of rates up to it; for it and each drop of the rate before it [rows, drops]: the drop,
        the rate after it, and the sum since. Of more than MOST_DROPS, neighbours count as one."""
        step, lr = columns["step"], columns["lr"]
        sums, found = np.empty(len(step)), []
        for rows in np.split(np.arange(len(step)), np.flatnonzero(np.diff(step) <= 0) + 1):
            rate, steps = lr[rows], np.diff(step[rows], prepend=0.0)
            sums[rows] = np.cumsum(steps * (rate + np.concatenate([[0.0], rate[:-1]])) / 2)
            fell = -np.diff(rate, prepend=rate[0])
            at = np.flatnonzero((fell != 0) & (np.arange(len(rate)) > rate.argmax()))
            middle = (sums[rows][at] + sums[rows][at - 1]) / 2
            found.append(_merged(fell[at], rate[at], middle, sums[rows]))
        most = max(1, *(drops.shape[1] for drops, _, _ in found))
        drops, rates, since = (
            np.concatenate([np.pad(part, ((0, 0), (0, most - part.shape[1]))) for part in parts])
            for parts in zip(*found, strict=True)
        )
        largest = unit.get("lr", 1.0)
        return {
            "sum": np.maximum(sums, 1e-300) / unit.get("sum", 1.0),
            "drops": drops / largest,
            "rates": np.maximum(rates, LEAST_RATE * lr.max()) / largest,
            "since": since / unit.get("sum", 1.0),
        }

    def _in_units(self, params: dict[str, float], unit: dict[str, float]) -> dict[str, float]:
        return params | {
            "A": params["A"] * unit["sum"] ** params["alpha"],
            "B": params["B"] / unit["lr"],
            "C": params["C"] * unit["lr"] ** params["gamma"] / unit["sum"],
        }

    def _misfit(self, columns: Columns, of: str) -> Array:
        """The law's error on the curve that it predicts worst when it is fitted to the others."""
        runs, sums = np.unique(self._rows.run), self._features(columns, {})["sum"]
        most = self._features(self._rows.columns, {})["sum"].max()
        if sums.max() > BEYOND * most:
            raise OpenError(
                f"{type(self).__name__}: intervals end at the largest sum of rates that was run, {most:.3g}; the "
                f"schedule reaches {sums.max():.3g}; run one curve that long"
            )
        if len(runs) < FEWEST_CURVES:
            raise OpenError(
                f"{type(self).__name__}: an interval needs the curves of {FEWEST_CURVES} schedules or more, to predict "
                f"each from the others; the table has {len(runs)}"
            )
        names = tuple(self.inputs)
        if (names, of) not in self._misfits:
            excess = [0.0]
            for run in runs:
                kept, left = self._rows.where(self._rows.run != run), self._rows.where(self._rows.run == run)
                law = self._refitted(kept)
                error = np.square(np.log(left.columns[of] / law._mean(left.columns, of)))
                expected = np.median(law._variance(left.columns, of))
                excess.append(float(np.median(error)) / ndtri(0.75) ** 2 - float(expected))
            self._misfits[names, of] = max(excess)
        draws = MISFIT_FREEDOM / chdtri(MISFIT_FREEDOM, QUANTILES)
        return np.outer(draws, np.full(len(sums), self._misfits[names, of]))


def _merged(drops: Array, rates: Array, at: Array, sums: Array) -> tuple[Array, Array, Array]:
    """(drops, rates after them, sums since) [rows, drops] at rows with these sums, of drops in order `at` these sums:
    MOST_DROPS at most, of neighbours that together are about as large. Of each only the part before a row counts, with
    the mean rate and place of that part, weighted by size."""
    size = np.abs(drops)
    share = (np.cumsum(size) - size / 2) / max(size.sum(), 1e-300)
    alone = len(drops) <= MOST_DROPS
    part = np.arange(len(drops)) if alone else np.unique((MOST_DROPS * share).astype(int), return_inverse=True)[1]
    first = np.searchsorted(part, np.arange(part.max(initial=-1) + 1))
    last = np.append(first[1:], len(drops))
    until = np.clip(np.searchsorted(at, sums)[:, None], first, last)

    def total(of: Array) -> Array:
        up_to = np.concatenate([[0.0], np.cumsum(of)])
        return up_to[until] - up_to[first]

    weight = np.maximum(total(size), 1e-300)
    since = sums[:, None] - total(size * at) / weight
    passed = until > first
    rate = np.where(passed, total(size * rates) / weight, rates[first] if len(first) else 0.0)
    return np.where(passed, total(drops), 0.0), rate, np.where(passed, since.clip(0), 0.0)
