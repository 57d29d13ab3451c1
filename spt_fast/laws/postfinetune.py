"""The domain loss after finetuning, by pretraining tokens, for each domain share.

    Δ(T) = L_test(PT) − L_test(PT + FT) = a·T^b + c   for each δ
    L_test(PT + FT)(T, δ) = L_test(T, δ) − Δ(T)

"The Finetuner's Fallacy", arXiv 2603.16177. L_test(T, δ) before finetuning comes from a law of it if one is given, else
from a curve of this table for each δ: the same shape, A·T^b + C, and if the points support it (by the Bayesian
information criterion) + G·T^g for overfitting. With a law, Δ is counted from its L_test, so that an error of the law at
one δ does not come back after finetuning. Least squares. Decisions: the best δ at a budget, and the budget at which one
δ overtakes another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from spt_fast.errors import RecipeError
from spt_fast.laws.base import Law, require_points
from spt_fast.laws.columns import LOSS, POSITIVE, SHARE, Array, Column, Columns, Loss, Rows
from spt_fast.laws.fitting import DRAWS, Curve, Fit, Noise, Parameter, solve
from spt_fast.laws.mixture_repetition import MixtureRepetitionLaw
from spt_fast.laws.overfitting import OverfittingLaw, overtaking
from spt_fast.laws.powers import in_tokens, offset_power, power_parameters

GAIN = power_parameters(-2, 1)
POWER = power_parameters(-3, -1e-3)
OVERFITTED = (*POWER, Parameter("G", 1e-6, 10, linear=True), Parameter("g", 0.05, 1))


def _overfitted(unknowns: Sequence[Array], columns: Columns) -> Array:
    *power, G, g = unknowns
    return offset_power(power, columns) + G * np.exp(g * columns["x"])


class PostFinetuneLaw(Law):
    """Columns: `tokens` T, `fraction` δ, `heldout_loss` and `finetuned_loss` (domain, before and after finetuning).
    Predicts finetuned_loss for a δ of the table; with `heldout_loss` measured, from that.

    heldout  an OverfittingLaw, or a MixtureRepetitionLaw of one corpus, for L_test(T, δ)

    Parameters, for each δ: a[δ], b[δ], c[δ] (T in tokens).
    """

    inputs: ClassVar[dict[str, Column]] = {"tokens": POSITIVE, "fraction": SHARE}
    optional: ClassVar[dict[str, Column]] = {"heldout_loss": POSITIVE}
    outputs: ClassVar[dict[str, Loss]] = {"finetuned_loss": LOSS, "heldout_loss": LOSS}

    def __init__(self, heldout: OverfittingLaw | MixtureRepetitionLaw | None = None) -> None:
        self.heldout = heldout

    @property
    def fractions_(self) -> list[float]:
        """The fitted δ."""
        self._require("_rows", "fit it to a table")
        return np.unique(self._rows.columns["fraction"]).tolist()

    def gain(self, *, tokens: Any, fraction: float) -> Any:
        """Δ(T): by how much finetuning lowers the held-out domain loss."""
        fit = self._fits["gain", self._known(fraction)]
        self._warn_beyond(tokens=tokens)
        gain = fit.mean(self._scaled(np.atleast_1d(np.asarray(tokens, dtype=float))))
        return gain if np.ndim(tokens) else float(gain[0])

    def best_fraction(self, *, tokens: float) -> float:
        """The fitted δ with the lowest loss after `tokens` of pretraining and then finetuning."""
        deltas = self.fractions_
        self._given(tokens=tokens)
        self._warn_beyond(tokens=tokens)
        losses = self._mean(
            {"tokens": np.full(len(deltas), float(tokens)), "fraction": np.array(deltas)}, "finetuned_loss"
        )
        return deltas[int(np.argmin(losses))]

    def overtaking_tokens(
        self, *, fraction: float, other: float, within: tuple[float, float] | None = None
    ) -> float | None:
        """The budget from which `fraction` has the lower loss after finetuning, if `other` had it before; None if that
        does not happen within these budgets (by default from the smallest fitted one to ten times the largest)."""
        pair = self._known(fraction), self._known(other)
        T = self._rows.columns["tokens"]
        tokens = overtaking(
            lambda T, d: self._mean({"tokens": T, "fraction": np.full(len(T), d)}, "finetuned_loss"),
            *pair,
            within or (float(T.min()), 10 * float(T.max())),
        )
        if tokens:
            self._warn_beyond(tokens=tokens)
        return tokens

    # ---------------------------------------------------------------------------------------------------------- inside

    def _groups(self, rows: Rows) -> Array:
        return np.unique(rows.columns["fraction"], return_inverse=True)[1]

    def _require_enough(self, rows: Rows) -> None:
        for delta in np.unique(rows.columns["fraction"]):
            points = int((rows.columns["fraction"] == delta).sum())
            require_points(points, len(GAIN), "PostFinetuneLaw", f" at each fraction (here {delta:g})")

    def _scaled(self, tokens: Array) -> Columns:
        return {"x": np.log(tokens / self._unit)}

    def _fit(self, rows: Rows, weights: Array | None, warm: dict[Any, Fit] | None) -> dict[Any, Fit]:
        if warm is None:
            self._unit = float(np.exp(np.log(rows.columns["tokens"]).mean()))
        fits: dict[Any, Fit] = {}
        for delta in np.unique(rows.columns["fraction"]).tolist():
            mask = rows.columns["fraction"] == delta
            own = rows.where(mask)
            w = None if weights is None else weights[:, mask]
            x, before = self._scaled(own.columns["tokens"]), own.columns["heldout_loss"]
            gain = Curve(GAIN, offset_power, x, before - own.columns["finetuned_loss"], own.run)
            fits["gain", delta] = Fit(gain, solve(gain, w, [warm["gain", delta].x] if warm else None, self.seed))
            if self.heldout is not None:
                by_law = self.heldout._mean(own.columns, "heldout_loss")
                below = Curve(GAIN, offset_power, x, by_law - own.columns["finetuned_loss"], own.run)
                known = [warm["below law", delta].x] if warm else None
                fits["below law", delta] = Fit(below, solve(below, w, known, self.seed))
                continue
            power, overfitted = (
                Curve(POWER, offset_power, x, before, own.run),
                Curve(OVERFITTED, _overfitted, x, before, own.run),
            )
            if warm:
                start = warm["heldout", delta].x
                curve = power if len(start) == len(POWER) else overfitted
                fits["heldout", delta] = Fit(curve, solve(curve, w, [start]))
            else:
                choices = [power, overfitted] if len(own) > len(OVERFITTED) + 1 else [power]
                fits["heldout", delta] = min((Fit(c, solve(c, seed=self.seed)) for c in choices), key=_criterion)
        return fits

    def _named(self, fits: dict[Any, Fit]) -> dict[str, float]:
        params: dict[str, float] = {}
        for (of, delta), fit in fits.items():
            if of == "gain":
                c, s, b = fit.values.values()
                a, b, shift = in_tokens(s, b, self._unit)
                params |= {f"a[{delta:g}]": a, f"b[{delta:g}]": b, f"c[{delta:g}]": c + shift}
        return params

    def _unsure(self, key: Any, fit: Fit) -> list[str]:
        of, delta = key
        return [f"{name}[{delta:g}]" for name in fit.unidentified] if of == "gain" else []

    def _known(self, fraction: float) -> float:
        for delta in self.fractions_:
            if np.isclose(fraction, delta, rtol=1e-6, atol=1e-12):
                return delta
        known = ", ".join(f"{delta:g}" for delta in self.fractions_)
        raise RecipeError(f"no runs with fraction {fraction:g} were fitted; PostFinetuneLaw has {known}")

    def _by_delta(self, columns: Columns) -> list[tuple[float, Array, Columns]]:
        """(δ, mask, the curves' columns) for each δ among `columns`."""
        asked = np.array([self._known(d) for d in columns["fraction"]])
        return [(d, asked == d, self._scaled(columns["tokens"][asked == d])) for d in np.unique(asked).tolist()]

    def _mean(self, columns: Columns, of: str) -> Array:
        losses = np.empty(len(columns["fraction"]))
        for delta, mask, at in self._by_delta(columns):
            gain = self._fits["gain", delta]
            if "heldout_loss" in columns:
                before = columns["heldout_loss"][mask]
            elif self.heldout is not None:
                before = self.heldout._mean(
                    {"tokens": columns["tokens"][mask], "fraction": np.full(mask.sum(), delta)}, "heldout_loss"
                )
                gain = self._fits["below law", delta]
            else:
                before = self._fits["heldout", delta].mean(at)
            losses[mask] = before if of == "heldout_loss" else before - gain.mean(at)
        return losses

    def _variance(self, columns: Columns, of: str) -> Array:
        """The curve before finetuning depends on the errors of held-out losses, the gain on theirs minus those
        after."""
        variance = np.empty((DRAWS, len(columns["fraction"])))
        for delta, mask, at in self._by_delta(columns):
            gain = self._fits["gain", delta]
            given = {"tokens": columns["tokens"][mask], "fraction": np.full(mask.sum(), delta)}
            if "heldout_loss" in columns:
                own = gain.variance(at)
            elif self.heldout is not None:
                own = self.heldout._variance(given, "heldout_loss")
                own = own if of == "heldout_loss" else own + self._fits["below law", delta].variance(at)
            elif of == "heldout_loss":
                own = self._fits["heldout", delta].variance(at)
            else:
                own = self._variance_after(self._fits["heldout", delta], gain, at, delta)
            variance[:, mask] = own
        return variance

    def _variance_after(self, before: Fit, gain: Fit, at: Columns, delta: float) -> Array:
        own = self._rows.where(self._rows.columns["fraction"] == delta)
        by_before, left_open = before.influence(at)
        by_gain, gain_left_open = gain.influence(at)
        residual = own.columns["finetuned_loss"] - (before.mean(before.curve.columns) - gain.mean(gain.curve.columns))
        after = Noise.of(residual, own.run, gain.moved)
        spread = before.noise.spread(by_before - by_gain, own.run, observed=False)
        return spread + after.spread(by_gain, own.run, observed=True) + left_open + gain_left_open


def _criterion(fit: Fit) -> float:
    """The Bayesian information criterion."""
    points = len(fit.residual)
    return points * float(np.log(np.square(fit.residual).mean() + 1e-16)) + len(fit.x) * float(np.log(points))
