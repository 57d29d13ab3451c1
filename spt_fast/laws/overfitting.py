"""Domain losses while the domain corpus is repeated in pretraining: learning, memorising, and the best share.

    L_train(T, δ) = A_train · T^b_train(δ) + C_train(δ)            domain text in training
    L_gap(T, δ)   = A_gap(δ) · T^b_gap(δ)
    L_test        = L_train + L_gap                                 held-out domain text
    b_x(δ)     = δ·b_x,s + (1 − δ)·b_x,g
    A_gap(δ)   = α1·δ^α2·exp(α3·δ)
    C_train(δ) = κ0 − κ1·log(δ + κ2) − κ3·δ

"The Finetuner's Fallacy", arXiv 2603.16177: T pretraining tokens, δ the domain's share of them; one law per domain
corpus, corpus size and model size. b_train,s < b_train,g < 0; b_gap,g < 0 < b_gap,s and b_gap(δ) < 1 up to δ = 10%.
Least squares in two stages: first with A_gap and C_train free for each δ (`by_fraction_` keeps them, to show their
shape), then all equations jointly, train and gap separately. That κ1 and κ3 are not negative (C_train falls with δ) is
our reading; it keeps their collinear terms bounded beyond the largest δ that was run. At δ = 0 no domain text is
trained on: there is no gap, and the held-out loss is the train loss.

Decisions: the best δ at a budget, and the budget at which one δ overtakes another, both before finetuning
(PostFinetuneLaw has them after).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np

from spt_fast.errors import DataError
from spt_fast.laws.base import Law, decision, require_points
from spt_fast.laws.columns import LOSS, POSITIVE, SHARE, Array, Column, Columns, Loss, Rows, number, span
from spt_fast.laws.dcpt import first_fall, lowest
from spt_fast.laws.fitting import Curve, Fit, Noise, Parameter, promising, solve

LARGEST_FRACTION = 0.1
"""b_gap(δ) < 1 must hold up to this δ."""

TRAIN = (
    Parameter("A_train", 1e-6, 30, linear=True),
    Parameter("b_train_g", 1e-3, 3),
    Parameter("b_train_s", 1e-3, 30),
    Parameter("kappa0", -20, 20, log=False, linear=True),
    Parameter("kappa1", 1e-6, 5, linear=True),
    Parameter("kappa2", 1e-6, 1),
    Parameter("kappa3", 0, 100, log=False, linear=True),
)
"""Search variables: the power at the middle of the data, −b_g, b_g − b_s, C_train at the middle, and κ1 to κ3."""
GAP = (
    Parameter("alpha1", 1e-6, 30, linear=True),
    Parameter("b_gap_g", 1e-3, 3),
    Parameter("b_gap_s", 1e-3, 1 / LARGEST_FRACTION),
    Parameter("alpha2", 0.01, 5),
    Parameter("alpha3", -400, 400, log=False),
)
"""Search variables: the gap at the middle of the data, −b_g, b_s, α2 and α3."""
FEWEST_FRACTIONS = {"train": 4, "gap": 3}
"""The numbers of parameters of C_train(δ) and A_gap(δ); δ = 0 has no gap."""


def _middle(columns: Columns) -> dict[str, float]:
    """The middle of the data, at which the coefficients of the search are losses."""
    log_T, delta = np.log(columns["tokens"]), columns["fraction"]
    positive = delta[delta > 0]
    return {
        "log_T": float(log_T.mean()),
        "delta": float(delta.mean()),
        "product": float((delta * log_T).mean()),
        "log_delta": float(np.log(positive).mean()),
    }


def _centred(columns: Columns, middle: dict[str, float]) -> Columns:
    log_T, delta = np.log(columns["tokens"]), columns["fraction"]
    return {
        "log_T": log_T - middle["log_T"],
        "product": delta * log_T - middle["product"],
        "delta": delta,
        "shifted": delta - middle["delta"],
        "log_delta": np.log(np.where(delta > 0, delta, 1)) - middle["log_delta"],
    }


def _train_power(a: Array, g: Array, steeper: Array, columns: Columns) -> Array:
    """b_train(δ) = −g − steeper·δ"""
    return a * np.exp(-g * columns["log_T"] - steeper * columns["product"])


def _gap_power(a: Array, g: Array, s: Array, columns: Columns) -> Array:
    """b_gap(δ) = −g + (s + g)·δ"""
    return a * np.exp(-g * columns["log_T"] + (s + g) * columns["product"])


class OverfittingLaw(Law):
    """Columns: `tokens` T, `fraction` δ, `train_loss`, `heldout_loss`; train_loss may be NaN where fraction is 0.
    Predicts heldout_loss, or train_loss with `of="train_loss"`.

    Parameters: A_train, b_train_g, b_train_s, kappa0 to kappa3; alpha1 to alpha3, b_gap_g, b_gap_s (T in tokens).
    """

    inputs: ClassVar[dict[str, Column]] = {"tokens": POSITIVE, "fraction": SHARE}
    outputs: ClassVar[dict[str, Loss]] = {"heldout_loss": LOSS, "train_loss": Loss(nan=True)}
    names = tuple(parameter.name for parameter in (*TRAIN, *GAP))

    by_fraction_: dict[str, dict[float, float]]
    """"C_train" and "A_gap": {δ: value}, from the first stage."""

    def _prepare(self, rows: Rows) -> Rows:
        columns, trained = rows.columns, rows.columns["fraction"] > 0
        missing = trained & np.isnan(columns["train_loss"])
        if missing.any():
            raise DataError(
                f"train_loss is NaN in {missing.sum()} rows with fraction above 0 (the first is row "
                f"{np.flatnonzero(missing)[0]}); only fraction 0 may lack a train loss"
            )
        return Rows(
            columns | {"train_loss": np.where(trained, columns["train_loss"], columns["heldout_loss"])}, rows.run
        )

    def _require_enough(self, rows: Rows) -> None:
        fractions = np.unique(rows.columns["fraction"])
        for curve, parameters, found in (("train", TRAIN, fractions), ("gap", GAP, fractions[fractions > 0])):
            if len(found) < FEWEST_FRACTIONS[curve]:
                raise DataError(
                    f"OverfittingLaw needs runs at {FEWEST_FRACTIONS[curve]} fractions or more to fit its {curve} curve"
                    f"{' (0 has no gap)' if curve == 'gap' else ''}; the table has {', '.join(f'{f:g}' for f in found)}"
                )
            points = int(np.isin(rows.columns["fraction"], found).sum())
            require_points(points, len(parameters), "OverfittingLaw's " + curve + " curve")

    def _fit(self, rows: Rows, weights: Array | None, warm: dict[Any, Fit] | None) -> dict[Any, Fit]:
        if warm is None:
            self._at = _middle(rows.columns)
            self.by_fraction_ = {}
        columns, mask = rows.columns, rows.columns["fraction"] > 0
        gap = (columns["heldout_loss"] - columns["train_loss"])[mask]
        train = Curve(TRAIN, self._train, _centred(columns, self._at), columns["train_loss"], rows.run)
        overfit = Curve(GAP, self._gap, _centred(rows.where(mask).columns, self._at), gap, rows.run[mask])
        starts = {"train": [warm["train"].x], "gap": [warm["gap"].x]} if warm else self._starts(train, overfit)
        of_gap = None if weights is None else weights[:, mask]
        return {
            "train": Fit(train, solve(train, weights, starts["train"])),
            "gap": Fit(overfit, solve(overfit, of_gap, starts["gap"])),
        }

    @staticmethod
    def _train(unknowns: Sequence[Array], columns: Columns) -> Array:
        a, g, steeper, c, k1, k2, k3 = unknowns
        mean = columns["delta"] - columns["shifted"]
        floor = c - k1 * np.log((columns["delta"] + k2) / (mean + k2)) - k3 * columns["shifted"]
        return _train_power(a, g, steeper, columns) + floor

    @staticmethod
    def _gap(unknowns: Sequence[Array], columns: Columns) -> Array:
        a, g, s, a2, a3 = unknowns
        return _gap_power(a * np.exp(a2 * columns["log_delta"] + a3 * columns["shifted"]), g, s, columns)

    def _starts(self, train: Curve, gap: Curve) -> dict[str, list[Array]]:
        """Stage one: C_train and A_gap free for each δ; their shape gives the starts of stage two. Samples of the whole
        space are added, since curves whose C_train does not fall with δ give bad starts."""
        delta, index = np.unique(train.columns["delta"], return_inverse=True)
        free = tuple(Parameter(f"C({d:g})", -20, 20, log=False, linear=True) for d in delta)
        curve = Curve(
            (*TRAIN[:3], *free),
            lambda u, c: _train_power(u[0], u[1], u[2], c) + _pick(u[3:], c["index"]),
            train.columns | {"index": index},
            train.target,
            train.run,
        )
        a, g, steeper, *C = Fit(curve, solve(curve, seed=self.seed)).values.values()
        self.by_fraction_["C_train"] = dict(zip(delta.tolist(), C, strict=True))
        mean, starts = self._at["delta"], []
        for k2 in np.geomspace(1e-5, 0.5, 12):
            basis = np.stack([np.ones_like(delta), -np.log((delta + k2) / (mean + k2)), mean - delta], axis=1)
            c, k1, k3 = np.linalg.lstsq(basis, np.array(C), rcond=None)[0]
            starts.append(train.point([a, g, steeper, c, k1, k2, k3]))
        starts.sort(key=lambda x: np.square(train.value(x) - train.goal).sum())

        delta, index = np.unique(gap.columns["delta"], return_inverse=True)
        free = tuple(Parameter(f"A({d:g})", 1e-6, 30, linear=True) for d in delta)
        curve = Curve(
            (*GAP[1:3], *free),
            lambda u, c: _gap_power(_pick(u[2:], c["index"]), u[0], u[1], c),
            gap.columns | {"index": index},
            gap.target,
            gap.run,
        )
        g, s, *A = Fit(curve, solve(curve, seed=self.seed)).values.values()
        unit = float(np.exp(g * self._at["log_T"] - (s + g) * self._at["product"]))
        self.by_fraction_["A_gap"] = dict(zip(delta.tolist(), (unit * size for size in A), strict=True))
        basis = np.stack([np.ones_like(delta), np.log(delta) - self._at["log_delta"], delta - mean], axis=1)
        log_a, a2, a3 = np.linalg.lstsq(basis, np.log(A), rcond=None)[0]
        return {
            "train": [*starts[:3], *promising(train, self.seed)],
            "gap": [gap.point([np.exp(log_a), g, s, a2, a3]), *promising(gap, self.seed)],
        }

    def _named(self, fits: dict[Any, Fit]) -> dict[str, float]:
        m = self._at
        a, g, steeper, c, k1, k2, k3 = fits["train"].values.values()
        size, o, s, a2, a3 = fits["gap"].values.values()
        return {
            "A_train": a * np.exp(g * m["log_T"] + steeper * m["product"]),
            "b_train_g": -g,
            "b_train_s": -g - steeper,
            "kappa0": c + k1 * np.log(m["delta"] + k2) + k3 * m["delta"],
            "kappa1": k1,
            "kappa2": k2,
            "kappa3": k3,
            "alpha1": size * np.exp(o * m["log_T"] - (s + o) * m["product"] - a2 * m["log_delta"] - a3 * m["delta"]),
            "alpha2": a2,
            "alpha3": a3,
            "b_gap_g": -o,
            "b_gap_s": s,
        }

    def _mean(self, columns: Columns, of: str) -> Array:
        p, T, delta = self.params_, columns["tokens"], columns["fraction"]
        floor = p["kappa0"] - p["kappa1"] * np.log(delta + p["kappa2"]) - p["kappa3"] * delta
        train = p["A_train"] * T ** (delta * p["b_train_s"] + (1 - delta) * p["b_train_g"]) + floor
        if of == "train_loss":
            return train
        size = p["alpha1"] * delta ** p["alpha2"] * np.exp(p["alpha3"] * delta)
        return train + size * T ** (delta * p["b_gap_s"] + (1 - delta) * p["b_gap_g"])

    def _variance(self, columns: Columns, of: str) -> Array:
        if of == "train_loss":
            return self._fits["train"].variance(_centred(columns, self._at))
        return self._heldout_variance(columns, None, observed=True)

    def _variance_of_sums(self, columns: Columns, sums: Array) -> Array:
        """[draws, sums]: variance of weighted sums [sums, predictions] of the law's held-out losses."""
        return self._heldout_variance(columns, sums, observed=False)

    def _heldout_variance(self, columns: Columns, sums: Array | None, observed: bool) -> Array:
        """The train fit depends on the errors of train losses, the gap fit on held-out minus train."""
        train, gap, rows = self._fits["train"], self._fits["gap"], self._rows
        at = _centred(columns, self._at)
        by_train, left_open = train.influence(at, sums)
        repeated = columns["fraction"] > 0
        by_gap, gap_left_open = gap.influence(at, None if sums is None else sums * repeated)
        if sums is None:
            by_gap, gap_left_open = by_gap * repeated[:, None], gap_left_open * repeated
        trained = rows.columns["fraction"] > 0
        by_heldout = np.where(trained, 0.0, by_train)
        by_heldout[:, trained] = by_gap
        by_train = np.where(trained, by_train - by_heldout, 0.0)
        spread = train.noise.spread(by_train, rows.run, observed=False)
        return spread + self._heldout_noise().spread(by_heldout, rows.run, observed) + left_open + gap_left_open

    def _heldout_noise(self) -> Noise:
        residual = self._rows.columns["heldout_loss"] - self._mean(self._rows.columns, "heldout_loss")
        return Noise.of(residual, self._rows.run, self._fits["train"].moved)

    # ------------------------------------------------------------------------------------------------------- decisions

    @decision
    def best_fraction(self, *, tokens: float, within: tuple[float, float] | None = None) -> float:
        """The δ with the lowest held-out loss after `tokens` of pretraining, between the smallest and the largest
        fitted δ, or those of `within`."""
        (tokens,) = self._number(tokens=tokens)
        delta = lowest_share(
            lambda d: self._mean({"tokens": np.array(tokens), "fraction": d}, "heldout_loss"),
            self._range("fraction", (0.0, LARGEST_FRACTION)) if within is None else within,
        )
        self._warn_beyond(tokens=tokens, fraction=delta)
        return delta

    def overtaking_tokens(
        self, *, fraction: float, other: float, within: tuple[float, float] | None = None
    ) -> float | None:
        """The budget from which `fraction` has the lower held-out loss, if `other` had it before; None if that does not
        happen within these budgets (by default from the smallest fitted one to ten times the largest)."""
        (fraction,), other = self._number(fraction=fraction), number("other", other, SHARE)
        low, high = self._range("tokens", (1e6, 1e13))
        within = (low, 10 * high) if within is None else within
        tokens = overtaking(
            lambda T, d: self._mean({"tokens": T, "fraction": np.array(d)}, "heldout_loss"), fraction, other, within
        )
        if tokens:
            self._warn_beyond(tokens=tokens, fraction=[fraction, other])
        return tokens


def _pick(free: Sequence[Array], index: Array) -> Array:
    """Each point's own unknown, for unknowns that are free for each δ: [..., points]."""
    return np.concatenate(np.broadcast_arrays(*free), axis=-1)[..., index]


def lowest_share(loss: Callable[[Array], Array], within: tuple[float, float]) -> float:
    """The share with the lowest loss. Raises RecipeError."""
    return lowest(loss, np.linspace(*span("within", within, SHARE), 2001))


def overtaking(
    loss: Callable[[Array, float], Array], fraction: float, other: float, within: tuple[float, float]
) -> float | None:
    """The first tokens at which the loss of `fraction` reaches that of `other` from above. Raises RecipeError."""
    low, high = span("within", within)

    def ahead(log_T: Array) -> Array:
        T = np.exp(log_T)
        return loss(T, fraction) - loss(T, other)

    log_T = first_fall(ahead, np.linspace(np.log(low), np.log(high), 1001))
    return None if log_T is None else float(np.exp(log_T))
