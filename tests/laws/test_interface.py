"""What all laws share: tables in, parameters out, intervals, bootstrap, warnings, and every table that must be
refused."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy.optimize import least_squares

from spt_fast import laws
from spt_fast.errors import DataError, RecipeError, SptError
from spt_fast.laws import fitting
from spt_fast.laws.columns import Columns
from spt_fast.laws.fitting import Curve, Fit, Noise, Parameter, _polish, promising, solve, spread_out
from spt_fast.laws.powers import in_tokens, rising
from tests.synthetic_runs import (
    CHINCHILLA,
    CONSTRAINED,
    DCPT_GRID,
    DOMAIN,
    OVERFITTING,
    SIZES,
    TABLES,
    Table,
    continued,
    drawn,
    finetuned,
    grid,
    overfitting_grid,
)

TABLE = drawn(CHINCHILLA, TABLES["Chinchilla"][2], np.random.default_rng(0))
OF_FINETUNING = finetuned(overfitting_grid(), np.random.default_rng(0))
OF_CONTINUING = continued(np.random.default_rng(0))
OF_REPEATING = drawn(CONSTRAINED, TABLES["data-constrained"][2], np.random.default_rng(0))
OF_OVERFITTING = drawn(OVERFITTING, overfitting_grid(), np.random.default_rng(0))


def changed(table: Table, **columns: Any) -> Table:
    return table | columns


# ---------------------------------------------------------------------------------------------------------- results


def test_same_table_same_law_to_the_last_bit() -> None:
    one, other = (laws.ChinchillaLaw().fit(TABLE) for _ in range(2))
    assert one.params_ == other.params_
    assert one.bootstrap(TABLE, n=5, seed=3) == other.bootstrap(TABLE, n=5, seed=3)
    assert one.bootstrap(TABLE, n=5, seed=4) != other.bootstrap(TABLE, n=5, seed=3)


def test_a_dataframe_and_a_dict_give_the_same_law() -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({name: list(values) for name, values in TABLE.items()} | {"note": "x"})
    assert laws.ChinchillaLaw().fit(frame).params_ == laws.ChinchillaLaw().fit(TABLE).params_
    named = frame.assign(run=[f"seed {run}" if run else 0 for run in TABLE["run"]])
    assert laws.ChinchillaLaw().fit(named).params_ == laws.ChinchillaLaw().fit(TABLE).params_
    with pytest.raises(DataError, match="'loss' 2 times; keep one"):
        laws.ChinchillaLaw().fit(pandas.concat([frame, frame[["loss"]]], axis=1))


def test_rows_that_are_there_twice_change_nothing() -> None:
    asked = {"params": 2 * SIZES.max(), "tokens": 1e11, "interval": 0.9}
    twice = {name: np.concatenate([values, values[::2]]) for name, values in TABLE.items()}
    once, repeated = (laws.ChinchillaLaw().fit(table) for table in (TABLE, twice))
    with pytest.warns(laws.ExtrapolationWarning):
        assert once.predict(**asked) == repeated.predict(**asked)
    assert once.bootstrap(TABLE, n=5) == repeated.bootstrap(twice, n=5)


def test_predictions_have_the_shape_of_their_arguments() -> None:
    law = laws.ChinchillaLaw().fit(TABLE)
    assert isinstance(law.predict(params=1e8, tokens=1e10), float)
    sizes = np.array([[1e8], [2e8]])
    budgets = np.array([5e9, 1e10, 2e10])
    mean, low, high = law.predict(params=sizes, tokens=budgets, interval=0.9)
    assert mean.shape == low.shape == high.shape == (2, 3)
    assert mean[1, 2] == law.predict(params=2e8, tokens=2e10)
    assert all(isinstance(x, float) for x in law.predict(params=1e8, tokens=1e10, interval=0.5))
    assert law.predict(params=[], tokens=[]).shape == (0,)
    assert [edge.shape for edge in law.predict(params=np.zeros((0, 3)), tokens=1e9, interval=0.9)] == [(0, 3)] * 3


def test_a_higher_level_gives_a_wider_interval_of_at_least_the_noise() -> None:
    law = laws.ChinchillaLaw().fit(TABLE)
    half, most = (law.predict(params=3e8, tokens=1e10, interval=level) for level in (0.5, 0.9))
    assert most[1] < half[1] < half[0] < half[2] < most[2]
    assert most[2] / most[0] - 1 > 1.6 * 0.008  # 1.64 standard deviations of the 1% noise, itself estimated


def test_score_by_hand() -> None:
    law = laws.ChinchillaLaw.from_params(E=1, A=1, alpha=1, B=1, beta=1)  # 3 at (1, 1), 2.5 at (2, 1)
    score = law.score({"params": [1, 2], "tokens": [1, 1], "loss": [3.3, 2.5]})
    assert score["mre"] == pytest.approx((0.3 / 3.3) / 2, rel=0.2)
    assert score["mre"] == pytest.approx(np.mean([abs(3.3 / 3 - 1), 0]))
    assert score["r2"] == pytest.approx(1 - 0.09 / (2 * 0.4**2))
    assert score["huber"] == pytest.approx(1e-3 * (np.log(1.1) - 0.5e-3) / 2)


def test_bootstrap_resamples_runs_not_points() -> None:
    """Errors shared by a whole run: resampling single points would average them out."""
    rng = np.random.default_rng(0)
    table = grid(seed=np.arange(6), params=SIZES, tokens=np.geomspace(1e9, 5e10, 8))
    true = CHINCHILLA.predict(params=table["params"], tokens=table["tokens"])
    table["loss"] = true * np.exp(0.02 * rng.standard_normal(table["run"].max() + 1)[table["run"]])
    law = laws.ChinchillaLaw().fit(table)
    by_run = law.bootstrap(table, n=40)
    by_point = law.bootstrap({name: table[name] for name in ("params", "tokens", "loss")}, n=40)
    assert list(by_run) == list(law.params_)
    for name in ("E", "A", "alpha"):  # B and beta are determined within a run
        assert by_run[name][0] < law.params_[name] < by_run[name][1]
        assert np.diff(by_run[name]) > 1.5 * np.diff(by_point[name])


@pytest.mark.filterwarnings("ignore::spt_fast.laws.LawWarning")
@pytest.mark.parametrize("before", [None, laws.OverfittingLaw])
@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"n": 2**31}, "n: 2147483648 is invalid: give a whole number, at least 1 and below 2\\^31"),
        ({"n": "x"}, "n: 'x' is invalid"),
        ({"seed": -1}, "seed: -1 is invalid: give a whole number, at least 0"),
        ({"seed": 0.5}, "seed: 0.5 is invalid"),
    ],
)
def test_invalid_draws_are_refused_before_anything_is_fitted(before: Any, given: dict[str, Any], said: str) -> None:
    law = laws.PostFinetuneLaw(before and before().fit(OF_OVERFITTING))
    with pytest.raises(RecipeError, match=said):
        law.resampled(OF_FINETUNING, **given)
    assert not hasattr(law, "params_")


@pytest.mark.filterwarnings("ignore::spt_fast.laws.LawWarning")
@pytest.mark.parametrize(
    ("law", "table"),
    [
        (laws.OverfittingLaw(), OF_OVERFITTING),
        (laws.PostFinetuneLaw(), OF_FINETUNING),
        (laws.CMRLaw(), OF_CONTINUING),
    ],
)
def test_laws_of_several_curves_bootstrap_too(law: laws.Law, table: Table) -> None:
    edges = law.bootstrap(table, n=10)
    assert edges.keys() == law.params_.keys()
    assert all(low <= high for low, high in edges.values())
    assert any(low < high for low, high in edges.values())


def test_intervals_account_for_correlated_errors_within_a_run() -> None:
    rng = np.random.default_rng(1)
    table = grid(seed=np.arange(6), params=SIZES, tokens=np.geomspace(1e9, 5e10, 8))
    true = CHINCHILLA.predict(params=table["params"], tokens=table["tokens"])
    shared = 0.02 * rng.standard_normal(table["run"].max() + 1)[table["run"]]
    table["loss"] = true * np.exp(shared + 0.002 * rng.standard_normal(len(true)))
    law = laws.ChinchillaLaw().fit(table)
    mean, low, high = law.predict(params=334e6, tokens=1e10, interval=0.9)
    assert (high - low) / mean > 2 * 1.64 * 0.02 * 0.8
    noise = law._fits["loss"].noise
    assert np.median(noise.run) ** 0.5 == pytest.approx(0.02, rel=0.3)
    assert np.median(noise.point) ** 0.5 == pytest.approx(0.002, rel=0.2)
    influence, known = np.full((1, 4), 0.25), Noise(np.ones(1), np.full(1, 4.0), told=True)
    by_hand = 0.25 + 4 * (0.25 + 0.25)
    for observed, new in ((False, 0), (True, 1 + 4)):
        spread = known.spread(influence, np.array([0, 0, 1, 1]), observed)
        assert spread == pytest.approx(np.array([[by_hand + new]]))


def test_the_noise_of_many_runs_is_estimated_as_with_the_full_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """400 runs of four points, compared with the matrix of all runs by all runs."""
    rng, run = np.random.default_rng(0), np.repeat(np.arange(400), 4)
    unknowns = np.concatenate([rng.standard_normal((400, 4))[run], rng.standard_normal((1600, 3))], axis=1)
    errors = 0.3 * rng.standard_normal(400)[run] + 0.2 * rng.standard_normal(1600)
    residual = errors - unknowns @ np.linalg.lstsq(unknowns, errors)[0]
    for most in (500, 300):
        monkeypatch.setattr(fitting, "MANY_RUNS", most)
        noise = Noise.of(residual, run, unknowns)
        assert np.median(noise.run) ** 0.5 == pytest.approx(0.3, rel=0.05)
        assert np.median(noise.point) ** 0.5 == pytest.approx(0.2, rel=0.05)


def test_gradients_are_exact() -> None:
    for truth, make, table in TABLES.values():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fits = make().fit(drawn(truth, table, np.random.default_rng(0)))._fits
        for fit in fits.values():
            gradient = fit.curve.gradient(fit.x)
            for i in range(len(fit.x)):
                step = np.zeros(len(fit.x))
                step[i] = 1e-6
                difference = (fit.curve.value(fit.x + step) - fit.curve.value(fit.x - step)) / 2e-6
                assert gradient[:, i] == pytest.approx(difference, rel=1e-4, abs=1e-8)


CURVES: list[tuple[type[laws.Law], Table]] = [
    (laws.ChinchillaLaw, TABLE),
    (laws.DCPTLaw, drawn(DOMAIN, DCPT_GRID, np.random.default_rng(0))),
    (laws.OverfittingLaw, OF_OVERFITTING),
    (laws.CMRLaw, OF_CONTINUING),
]


@pytest.mark.filterwarnings("ignore::spt_fast.laws.IdentificationWarning")
@pytest.mark.parametrize(("law", "table"), CURVES)
def test_scipy_finds_no_better_minimum_than_the_search(law: type[laws.Law], table: Table) -> None:
    for fit in law().fit(table)._fits.values():
        curve = replace(fit.curve, huber=None)
        x, (low, high) = solve(curve), curve.bounds
        inside = np.clip(x, low + 1e-9 * (high - low), high - 1e-9 * (high - low))
        better = least_squares(
            lambda x, of=curve: of.value(x) - of.goal, inside, bounds=curve.bounds, xtol=1e-12, ftol=1e-12
        )
        assert np.square(curve.value(x) - curve.goal).sum() < 1.0001 * 2 * better.cost


@pytest.mark.filterwarnings("ignore::spt_fast.laws.IdentificationWarning")
@pytest.mark.parametrize(("law", "table"), CURVES)
def test_batched_draws_equal_single_draws(law: type[laws.Law], table: Table) -> None:
    for fit in law().fit(table)._fits.values():
        weights = np.random.default_rng(0).exponential(size=(5, len(fit.residual)))
        together = solve(fit.curve, weights, [fit.x])
        assert together == pytest.approx(np.concatenate([solve(fit.curve, w[None], [fit.x]) for w in weights]))


def test_the_search_follows_a_curved_valley() -> None:
    """Rosenbrock's, ten times as narrow: without curved steps it is not half-way after 100."""
    valley = (Parameter("along", -5, 5, log=False), Parameter("across", -5, 5, log=False))

    def formula(unknowns: Sequence[np.ndarray], columns: Columns) -> np.ndarray:
        along, across = unknowns
        return np.where(columns["i"] == 0, 100 * (across - along**2), along - 1)

    curve = Curve(valley, formula, {"i": np.arange(2)}, np.zeros(2), np.arange(2))
    assert _polish(curve, np.array([[-1.2, 1.0]]), np.ones(1), most=60)[0] == pytest.approx(np.ones((1, 2)))


def test_a_search_starts_with_the_best_linear_coefficients() -> None:
    fit = laws.ChinchillaLaw().fit(TABLE)._fits["loss"]
    start = promising(replace(fit.curve, target=fit.mean(fit.curve.columns)), seed=0)[0]
    values = [float(value[0]) for value in fit.curve.unknowns(start)]
    _, _, alpha, _, beta = values
    scaled, by_hand = fit.curve.columns, fit.mean(fit.curve.columns)
    basis = np.stack([np.ones(len(by_hand)), scaled["params"] ** -alpha, scaled["tokens"] ** -beta], axis=1)
    coefficients = np.linalg.lstsq(basis / by_hand[:, None], np.ones(len(by_hand)))[0]
    assert values[0:1] + values[1:4:2] == pytest.approx(np.clip(coefficients, [1e-3, 1e-6, 1e-6], [20, 30, 30]))


def test_starting_points_are_evenly_spread_along_every_axis() -> None:
    points = spread_out(256, 9, seed=1)
    for axis in points.T:
        assert np.histogram(axis, bins=256, range=(0, 1))[0].tolist() == [1] * 256
    assert not np.array_equal(points, spread_out(256, 9, seed=2))


def test_huber_ignores_an_outlier_that_moves_least_squares() -> None:
    line = (Parameter("slope", -10, 10, log=False), Parameter("offset", -10, 10, log=False))
    x = np.linspace(0, 1, 21)
    target = 2 * x + 1
    target[20] += 5
    fits = {}
    for huber in (None, 1e-3):
        curve = Curve(line, lambda u, c: u[0] * c["x"] + u[1], {"x": x}, target, np.arange(21), huber=huber)
        fits[huber] = Fit(curve, solve(curve)).values
    assert fits[None]["slope"] == pytest.approx(np.polyfit(x, target, 1)[0])
    assert fits[1e-3] == pytest.approx({"slope": 2, "offset": 1}, abs=0.01)


# --------------------------------------------------------------------------------------------------------- warnings


def test_extrapolation_warns_and_names_the_column() -> None:
    law = laws.ChinchillaLaw().fit(TABLE)
    says = r"tokens = 1e\+12 is outside of .* \(1e\+09 to 5e\+10\)"
    with pytest.warns(laws.ExtrapolationWarning, match=says) as warned:
        law.predict(params=1e8, tokens=1e12)
    assert [warning.filename for warning in warned] == [__file__]
    with pytest.warns(laws.ExtrapolationWarning):
        law.best_allocation(flops=1e26)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        law.predict(params=[41e6, 1.27e9], tokens=[1e9, 5e10])


def test_undetermined_parameters_are_warned_of() -> None:
    one_size = {name: np.asarray(values)[np.asarray(TABLE["params"]) == SIZES[2]] for name, values in TABLE.items()}
    with pytest.warns(laws.IdentificationWarning, match="do not identify .*alpha"):
        laws.ChinchillaLaw().fit(one_size)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        laws.ChinchillaLaw().fit(TABLE)


@pytest.mark.filterwarnings("ignore::spt_fast.laws.IdentificationWarning")
def test_a_dcpt_law_that_rises_with_its_ratio_is_warned_of() -> None:
    rising = laws.DCPTLaw.from_params(**DOMAIN.params_ | {"B": 3000, "C": 0.001})
    with pytest.warns(laws.LawWarning, match=r"rises with own_ratio in \d+ of 280 rows"):
        laws.DCPTLaw().fit(drawn(rising, DCPT_GRID, np.random.default_rng(0)))
    runs = grid(params=[2e8, 5e8, 1e9, 1.8e9], own_ratio=[0, 0.1, 0.3, 0.6, 1], tokens=np.linspace(1e9, 20e9, 10))
    with warnings.catch_warnings():
        warnings.simplefilter("error", laws.LawWarning)
        warnings.simplefilter("ignore", laws.IdentificationWarning)
        laws.DCPTLaw().fit(drawn(DOMAIN, runs, np.random.default_rng(0), noise=0.001))


# -------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("law", "table", "says"),
    [
        (laws.ChinchillaLaw, {n: v[:5] for n, v in TABLE.items()}, "5 parameters and needs at least 6 runs"),
        (laws.ChinchillaLaw, changed(TABLE, loss=np.where(TABLE["params"] < 5e7, np.nan, 3.0)), "loss is nan in 8 of"),
        (laws.ChinchillaLaw, changed(TABLE, loss=-TABLE["loss"]), "loss: -.* is invalid: a loss must be above 0"),
        (laws.ChinchillaLaw, changed(TABLE, tokenizer=["a", "b"] * 20), "different values of 'tokenizer': a, b"),
        (laws.ChinchillaLaw, changed(TABLE, heldout=["x"] * 39 + ["y"]), "different values of 'heldout': x, y"),
        (laws.ChinchillaLaw, {("token" if n == "tokens" else n): v for n, v in TABLE.items()}, "did you mean 'token'"),
        (laws.ChinchillaLaw, changed(TABLE, tokens=TABLE["tokens"][:3]), "differ in length"),
        (laws.ChinchillaLaw, changed(TABLE, tokens=["many"] * 40), "must hold numbers"),
        (laws.ChinchillaLaw, changed(TABLE, tokens=0 * TABLE["tokens"]), "tokens must be finite and above 0"),
        (laws.ChinchillaLaw, [1, 2], "DataFrame or a dict"),
        (laws.ChinchillaLaw, changed(TABLE, run=[None] * 8 + ["a"] * 32), "run is missing in 8 of 40 rows"),
        (laws.ChinchillaLaw, changed(TABLE, run=[*range(39), np.nan]), r"run is missing in 1 of 40 .* is row 39\)"),
        (laws.DataConstrainedLaw, changed(OF_REPEATING, params=OF_REPEATING["params"] / 1e6), "1270.0 .* not in mill"),
        (laws.DataConstrainedLaw, changed(OF_REPEATING, tokens=OF_REPEATING["tokens"] / 1e9), "50.0 .* give tokens as"),
        (laws.OverfittingLaw, changed(OF_OVERFITTING, fraction=100 * OF_OVERFITTING["fraction"]), "not a percentage"),
        (laws.OverfittingLaw, {n: v[:60] for n, v in OF_OVERFITTING.items()}, "at 4 fractions or more"),
        (laws.OverfittingLaw, changed(OF_OVERFITTING, train_loss=[np.nan] * 100), "only fraction 0"),
        (laws.PostFinetuneLaw, {n: v[:42] for n, v in OF_FINETUNING.items()}, "here 0.01"),
        (laws.CMRLaw, {n: v[1:25] for n, v in OF_CONTINUING.items()}, "with tokens = 0"),
        (laws.CMRLaw, {n: v[:5] for n, v in OF_CONTINUING.items()}, "at least 6 runs or points"),
        (laws.CMRLaw, {n: v[:1] for n, v in OF_CONTINUING.items()}, "tokens above 0; the table has only starts"),
        (laws.PostFinetuneLaw, {n: v[:0] for n, v in OF_FINETUNING.items()}, "no rows to fit"),
        (laws.MultiPowerLaw, {"step": [], "lr": [], "loss": []}, "no rows to fit"),
    ],
)  # fmt: skip
def test_a_table_that_cannot_be_fitted_is_refused(law: type[laws.Law], table: Any, says: str) -> None:
    with pytest.raises(DataError, match=says) as refused:
        law().fit(table)
    assert isinstance(refused.value, SptError)
    assert isinstance(refused.value, ValueError)


@pytest.mark.filterwarnings("ignore::spt_fast.laws.LawWarning")
def test_a_law_with_all_parameters_at_bounds_predicts() -> None:
    law = laws.ChinchillaLaw().fit(changed(TABLE, loss=1e-9 * TABLE["loss"]))
    assert law.unidentified_ == list(law.names)
    _, low, high = law.predict(params=1e8, tokens=1e10, interval=0.9)
    assert 0 < low < high


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"params": 1e8}, "tokens not given"),
        ({"params": 1e8, "token": 1e10}, "did you mean 'tokens'"),
        ({"params": 1e8, "tokens": -1}, "above 0"),
        ({"params": 1e8, "tokens": float("nan")}, "finite"),
        ({"params": [1e8, 2e8], "tokens": [1e9] * 3}, "one shape"),
        ({"params": 1e8, "tokens": 1e10, "interval": 90}, "such as 0.9"),
        ({"params": 1e8, "tokens": 1e10, "interval": "90%"}, "such as 0.9"),
        ({"params": 1e8, "tokens": 1e10, "of": "los"}, "did you mean 'loss'"),
        ({"params": 1e8, "tokens": 1e10, "of": 5}, "^of: ChinchillaLaw does not predict 5"),
        ({"params": 1e8, "tokens": 1e10, "of": ["loss"]}, "^of: ChinchillaLaw does not predict"),
    ],
)
def test_a_prediction_that_cannot_be_made_is_refused(asked: dict[str, Any], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        laws.ChinchillaLaw().fit(TABLE).predict(**asked)


def test_decisions_check_their_arguments() -> None:
    with pytest.raises(RecipeError, match="not a percentage"):
        OVERFITTING.overtaking_tokens(fraction=5, other=0.1)
    with pytest.raises(RecipeError, match="tokens must be"):
        OVERFITTING.best_fraction(tokens=-1)
    with pytest.raises(RecipeError, match="flops"):
        CHINCHILLA.best_allocation(flops=0)


def test_calls_before_a_fit_or_without_runs_are_refused() -> None:
    with pytest.raises(RecipeError, match="fit it to a table"):
        laws.ChinchillaLaw().predict(params=1e8, tokens=1e10)
    with pytest.raises(RecipeError, match="interval needs runs"):
        CHINCHILLA.predict(params=1e8, tokens=1e10, interval=0.9)
    with pytest.raises(RecipeError, match="did you mean 'alpha'"):
        laws.ChinchillaLaw.from_params(E=1, A=1, alfa=1, B=1, beta=1)
    with pytest.raises(RecipeError, match="needs the parameters beta too"):
        laws.ChinchillaLaw.from_params(E=1, A=1, alpha=1, B=1)
    with pytest.raises(RecipeError, match="for each setting of the runs"):
        laws.CMRLaw.from_params()


@pytest.mark.parametrize("wrong", ["x", 5, [1], np.ones(2), laws.OverfittingLaw, CHINCHILLA])
def test_a_law_of_another_kind_is_refused_by_the_name_of_its_argument(wrong: Any) -> None:
    with pytest.raises(RecipeError, match=r"^heldout: .* is invalid: give OverfittingLaw or MixtureRepetitionLaw"):
        laws.PostFinetuneLaw(wrong)
    for of in ("domain", "general"):
        given: dict[str, Any] = {"domain": DOMAIN, "general": DOMAIN, of: wrong}
        with pytest.raises(RecipeError, match=f"^{of}: .* is invalid: give DCPTLaw"):
            laws.best_ratio(**given, params=1e9, tokens=1e10, max_general_rise=0.03)


def test_laws_import_no_other_room() -> None:
    """Neither torch nor pandas, nor any other room."""
    code = (
        "import sys, spt_fast as spt; spt.laws.best_ratio; "
        "others = {m for m in sys.modules if m.startswith('spt_fast.')} - {'spt_fast.errors', 'spt_fast.laws'}; "
        "assert all(m.startswith('spt_fast.laws.') for m in others), others; "
        "assert not {'torch', 'pandas'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("exponent", [-0.3, 0.4, 1e-7, 0.0])
def test_powers_are_in_tokens_even_near_a_logarithm(exponent: float) -> None:
    a, b, shift = in_tokens(0.7, exponent, 1e9)
    tokens = np.array([1e8, 1e9, 1e10])
    centred = 0.7 * rising(np.array(exponent), np.log(tokens / 1e9))
    assert a * tokens**b + shift == pytest.approx(centred, abs=1e-5)
