"""Laws fitted to tables drawn from known ones with 1% noise on every loss, and judged on points that were not fitted.

Errors are of predictions against the truth without noise. Coverage over 100 draws is in benchmarks/laws.py.
"""

from __future__ import annotations

import time
import warnings
from typing import Any

import numpy as np
import pytest

from spt_fast import laws
from spt_fast.errors import RecipeError
from spt_fast.laws import annealing
from spt_fast.laws.fitting import Fit, solve
from tests.synthetic_runs import (
    CHINCHILLA,
    CROSS_DOMAIN,
    DCPT_GRID,
    DOMAIN,
    FINETUNE,
    FRACTIONS,
    OVERFITTING,
    RATIOS,
    TABLES,
    Table,
    continued,
    drawn,
    finetuned,
    gain,
    grid,
    increments,
    noisy,
    overfitting_grid,
)

pytestmark = pytest.mark.filterwarnings("ignore::spt_fast.laws.LawWarning")


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def relative_error(predicted: Any, true: Any) -> np.ndarray:
    return np.abs(np.asarray(predicted) / np.asarray(true) - 1)


def inputs(law: laws.Law, table: Table) -> Table:
    return {name: table[name] for name in law.inputs}


@pytest.mark.parametrize("name", TABLES)
def test_every_law_is_recovered_from_noisy_runs(name: str) -> None:
    truth, make, table = TABLES[name]
    began = time.process_time()
    law = make().fit(drawn(truth, table, generator()))
    assert time.process_time() - began < 5
    given = inputs(truth, table)
    assert relative_error(law.predict(**given), truth.predict(**given)).max() < 0.01
    assert law.score(drawn(truth, table, generator(1)))["mre"] < 0.01
    assert set(law.params_) == set(truth.params_)


@pytest.mark.parametrize("name", ["Chinchilla", "data-constrained", "finetuning", "forgetting", "D-CPT, domain"])
def test_parameters_are_recovered_exactly_without_noise(name: str) -> None:
    truth, make, table = TABLES[name]
    law = make().fit(drawn(truth, table, generator(), noise=0))
    assert law.params_ == pytest.approx(truth.params_, rel=0.02)


@pytest.mark.parametrize("truth", [DOMAIN, CROSS_DOMAIN])
def test_dcpt_at_twice_the_size_and_ratios_never_run(truth: laws.DCPTLaw) -> None:
    name = "D-CPT, domain" if truth is DOMAIN else "cross-domain D-CPT"
    _, make, table = TABLES[name]
    law = make().fit(drawn(truth, table, generator()))
    unseen: Table = {"params": [2 * table["params"].max()], "own_ratio": [0.15, 0.4, 0.6, 0.75, 0.85]}
    if truth is CROSS_DOMAIN:
        unseen["learnability"] = [0.5, 0.75, 1.2]
    further = inputs(truth, grid(**unseen, tokens=[2e9, 8e9, 20e9]))
    assert relative_error(law.predict(**further), truth.predict(**further)).max() < 0.01


def test_overfitting_fitted_up_to_5_percent_predicts_all_of_10_percent() -> None:
    """Densely logged curves: from 20 points each, no unbiased estimator comes within 3% (its Cramér-Rao bound)."""
    budgets = np.linspace(0.1, 1, 10) * 200e9
    runs = grid(fraction=FRACTIONS, tokens=np.linspace(0.02, 1, 2000) * 200e9)
    assert max(runs["fraction"]) == 0.05
    law = laws.OverfittingLaw().fit(drawn(OVERFITTING, runs, generator()))
    predicted = law.predict(tokens=budgets, fraction=0.1)
    assert relative_error(predicted, OVERFITTING.predict(tokens=budgets, fraction=0.1)).max() < 0.01


def test_overfitting_fitted_to_60_percent_of_the_budget_predicts_the_rest() -> None:
    runs = grid(fraction=FRACTIONS, tokens=np.linspace(0.05, 0.6, 60) * 200e9)
    rest = inputs(OVERFITTING, grid(fraction=FRACTIONS, tokens=np.linspace(0.6, 1, 9) * 200e9))
    law = laws.OverfittingLaw().fit(drawn(OVERFITTING, runs, generator()))
    for loss in ("heldout_loss", "train_loss"):
        assert relative_error(law.predict(of=loss, **rest), OVERFITTING.predict(of=loss, **rest)).max() < 0.01


def test_at_fraction_0_the_heldout_loss_is_used_as_the_train_loss() -> None:
    table = drawn(OVERFITTING, overfitting_grid([0, *FRACTIONS]), generator())
    table["train_loss"] = np.where(table["fraction"] > 0, table["train_loss"], np.nan)
    law = laws.OverfittingLaw().fit(table)
    given = {"tokens": np.linspace(0.2, 1, 5) * 200e9, "fraction": 0.0}
    assert relative_error(law.predict(**given), OVERFITTING.predict(**given)).max() < 0.01
    assert law.predict(**given) == pytest.approx(law.predict(of="train_loss", **given))


def test_the_first_stage_shows_the_shapes() -> None:
    law = laws.OverfittingLaw().fit(drawn(OVERFITTING, overfitting_grid(), generator(), noise=0))
    p, shapes = OVERFITTING.params_, law.by_fraction_
    assert list(shapes["C_train"]) == list(shapes["A_gap"]) == FRACTIONS.tolist()
    floor = p["kappa0"] - p["kappa1"] * np.log(FRACTIONS + p["kappa2"]) - p["kappa3"] * FRACTIONS
    assert list(shapes["C_train"].values()) == pytest.approx(floor, abs=0.01)
    kernel = p["alpha1"] * FRACTIONS ** p["alpha2"] * np.exp(p["alpha3"] * FRACTIONS)
    assert list(shapes["A_gap"].values()) == pytest.approx(kernel, rel=0.01)


@pytest.mark.parametrize("with_overfitting_law", [False, True])
def test_the_law_after_finetuning_is_recovered(with_overfitting_law: bool) -> None:
    """The gain's power law is free for each fraction: two to three times as many points as for the pooled laws."""
    early = finetuned(grid(fraction=FRACTIONS, tokens=np.linspace(0.1, 0.6, 60) * 200e9), generator())
    heldout = None
    if with_overfitting_law:
        given = {"tokens": early["tokens"], "fraction": early["fraction"]}
        train = noisy(OVERFITTING.predict(of="train_loss", **given), generator(1), 0.01)
        heldout = laws.OverfittingLaw().fit(early | {"train_loss": train})
    law = laws.PostFinetuneLaw(heldout).fit(early)
    rest = grid(fraction=FRACTIONS, tokens=np.linspace(0.65, 1, 8) * 200e9)
    given = {"tokens": rest["tokens"], "fraction": rest["fraction"]}
    after = OVERFITTING.predict(**given) - gain(**given)
    assert relative_error(law.predict(**given), after).mean() < 0.01
    measured = OVERFITTING.predict(**given)
    assert relative_error(law.predict(heldout_loss=measured, **given), after).mean() < 0.01
    assert law.predict(of="heldout_loss", **given) == pytest.approx(measured, rel=0.02)


def test_an_error_of_the_law_before_finetuning_is_not_repeated_after_it() -> None:
    """Runs lie 5% above their law at one fraction, as text that was never trained on may; after finetuning all are on
    one curve."""
    heldout = laws.OverfittingLaw().fit(drawn(OVERFITTING, overfitting_grid(), generator()))
    runs = grid(fraction=FRACTIONS, tokens=np.linspace(0.1, 0.6, 12) * 200e9)
    given = {"tokens": runs["tokens"], "fraction": runs["fraction"]}
    before = OVERFITTING.predict(**given)
    table = runs | {
        "heldout_loss": np.where(runs["fraction"] == FRACTIONS[0], 1.05, 1) * before,
        "finetuned_loss": before - gain(**given),
    }
    law = laws.PostFinetuneLaw(heldout).fit(table)
    assert relative_error(law.predict(**given), table["finetuned_loss"]).max() < 0.01
    off = relative_error(law.predict(heldout_loss=table["heldout_loss"], **given), table["finetuned_loss"])
    assert off.max() < 0.01  # the gain from a measured loss is the measured one


@pytest.mark.parametrize("seeds", [1, 2])
def test_an_error_before_finetuning_that_no_curve_fits_is_not_repeated_after_it(seeds: int) -> None:
    """It varies with the budget if a model never saw the domain; after finetuning all are on one curve."""
    budgets = np.array([25e9, 50e9, 100e9, 200e9])
    runs = grid(fraction=[0.0, 0.02], seed=range(seeds), tokens=budgets)
    after = 2.6 + 0.3 * (budgets / 50e9) ** -0.5
    wanders = np.interp(runs["tokens"], budgets, [6.16, 6.05, 6.15, 6.40])
    before = np.where(runs["fraction"] == 0, wanders, np.tile(after, 2 * seeds) + 0.5)
    table = runs | {"heldout_loss": before, "finetuned_loss": np.tile(after, 2 * seeds)}
    table["finetuned_loss"][: 4 * seeds] *= 1.05
    table["run"] = np.repeat(np.arange(2 * seeds), 4)
    law = laws.PostFinetuneLaw().fit(table)
    plain, specialized = (law.predict(tokens=budgets, fraction=delta) for delta in (0.0, 0.02))
    assert 1 - specialized / plain == pytest.approx([1 - 1 / 1.05] * 4, abs=0.001)


def spread_of_draws(law: laws.PostFinetuneLaw, table: Table, of: str) -> float:
    """Standard deviation of the losses at 100B tokens, over fits to resampled runs."""
    drawn = [draw.predict(tokens=100e9, fraction=0.02, of=of) for draw in law.resampled(table, n=30)]
    return float(np.std(drawn))


def after_runs_of(seeds: int, budgets: int, rng: np.random.Generator) -> tuple[laws.PostFinetuneLaw, Table]:
    """The law of runs that differ by 0.4%, and their points by 0.3%."""
    runs = grid(seed=range(seeds), fraction=FRACTIONS, tokens=np.geomspace(25e9, 200e9, budgets))
    shared = np.exp(0.004 * rng.standard_normal(runs["run"].max() + 1)[runs["run"]])
    table = finetuned(runs, rng, noise=0.003)
    table |= {of: table[of] * shared for of in laws.PostFinetuneLaw.outputs}
    return laws.PostFinetuneLaw().fit(table), table


def test_intervals_beyond_the_runs_hold_overfitting_that_the_runs_hardly_show() -> None:
    """At 5% the loss rises by 2% more than its curve up to ten times the budgets, at 0.1% it does not."""
    inside, widths = [], []
    at: Table = {"tokens": 2000e9, "fraction": np.array([0.001, 0.05])}
    before = OVERFITTING.predict(**at)
    for seed in range(5):
        law, _ = after_runs_of(3, 4, generator(seed))
        for of, truth in ("heldout_loss", before), ("finetuned_loss", before - gain(**at)):
            _, low, high = law.predict(interval=0.9, of=of, **at)
            inside.append((low <= truth) & (truth <= high))
            widths.append((high - low) / truth)
    assert (np.mean(inside, axis=0) >= 0.75).all()
    assert (np.median(widths, axis=0) < 0.25).all()


@pytest.mark.parametrize("seeds", [1, 3])
def test_draws_spread_as_much_as_the_law_errs(seeds: int) -> None:
    """One seed does not show how much runs differ, and weights of three would spread by 0.7 of what the law errs."""
    at = {"tokens": 200e9, "fraction": FRACTIONS}
    truth, held, assumed = OVERFITTING.predict(**at) - gain(**at), [], []
    for seed in range(8):
        law, table = after_runs_of(seeds, 4, generator(seed))
        low, high = np.percentile([draw.predict(**at) for draw in law.resampled(table, n=60)], [5, 95], axis=0)
        held.append((low <= truth) & (truth <= high))
        deviation, told = law.between_seeds_
        assert told is (seeds > 1)
        assumed.append(deviation)
    assert 0.75 <= np.mean(held) <= 1
    assert np.median(assumed) == pytest.approx(0.005, rel=0.4)


@pytest.mark.parametrize("kind", [None, laws.OverfittingLaw, laws.MixtureRepetitionLaw])
def test_draws_count_the_gain_from_their_own_loss_before_finetuning(kind: Any) -> None:
    """Losses before are noisy, those after are not, so that draws of the latter hardly differ."""
    runs = grid(seed=range(3), fraction=FRACTIONS, tokens=np.linspace(0.1, 1, 8) * 200e9)
    given = {"tokens": runs["tokens"], "fraction": runs["fraction"]}
    table = finetuned(runs, generator(), noise=0) | {
        "heldout_loss": noisy(OVERFITTING.predict(**given), generator(), 0.03)
    }
    curves = table | {"unique_tokens": np.full(len(runs["run"]), 3e8), "loss": table["heldout_loss"]}
    curves["train_loss"] = noisy(OVERFITTING.predict(of="train_loss", **given), generator(1), 0.03)
    law = laws.PostFinetuneLaw(kind and kind().fit(curves)).fit(table)
    assert spread_of_draws(law, table, "finetuned_loss") < 0.25 * spread_of_draws(law, table, "heldout_loss")


@pytest.mark.parametrize("with_overfitting_law", [False, True])
def test_intervals_after_finetuning_have_the_stated_coverage(with_overfitting_law: bool) -> None:
    """Coverage of new runs at up to 1.5 times the budgets, before and after, from studies with one to three seeds."""
    inside: dict[str, list[np.ndarray]] = {"finetuned_loss": [], "heldout_loss": []}
    for seed in range(9):
        rng, seeds = generator(seed), 1 + seed % 3
        runs = grid(seed=range(seeds), fraction=FRACTIONS, tokens=np.linspace(0.1, 1, 10) * 200e9)
        shared = np.exp(0.004 * rng.standard_normal(runs["run"].max() + 1)[runs["run"]])
        drawn_table = finetuned(runs, rng, noise=0.003)
        table = drawn_table | {of: drawn_table[of] * shared for of in inside}
        heldout = None
        if with_overfitting_law:
            given = {"tokens": runs["tokens"], "fraction": runs["fraction"]}
            train = noisy(OVERFITTING.predict(of="train_loss", **given), rng, 0.003) * shared
            heldout = laws.OverfittingLaw().fit(table | {"train_loss": train})
        law = laws.PostFinetuneLaw(heldout).fit(table)
        at = {
            name: values.ravel()
            for name, values in zip(("tokens", "fraction"), np.meshgrid([60e9, 120e9, 300e9], FRACTIONS), strict=True)
        }
        before = OVERFITTING.predict(**at)
        for of, truth in ("finetuned_loss", before - gain(**at)), ("heldout_loss", before):
            _, low, high = law.predict(interval=0.9, of=of, **at)
            new = noisy(truth, rng, 0.005)
            inside[of].append((low <= new) & (new <= high))
    assert 0.8 <= np.mean(inside["finetuned_loss"]) <= 0.97
    assert 0.8 <= np.mean(inside["heldout_loss"]) <= 0.97


def test_the_loss_before_finetuning_has_the_interval_of_its_law() -> None:
    """The mixture-repetition law's is of the logarithm, the law after finetuning's of nats."""
    truth, make, table = TABLES["mixture and repetition"]
    runs = grid(fraction=[0.005, 0.05], tokens=np.geomspace(5e9, 2e11, 8))
    loss = truth.predict(**{name: runs[name] for name in ("fraction", "tokens")}, unique_tokens=3e8)
    one_corpus = {name: values[table["unique_tokens"] == 3e8] for name, values in table.items()}
    before = make().fit(drawn(truth, one_corpus, generator(), noise=0.003))
    law = laws.PostFinetuneLaw(before).fit(runs | {"heldout_loss": loss, "finetuned_loss": loss - 0.5})
    at = {"tokens": 5e10, "fraction": 0.05}
    own = before.predict(**at, unique_tokens=3e8, interval=0.9)
    assert law.predict(**at, of="heldout_loss", interval=0.9) == pytest.approx(own, rel=1e-3)
    known = laws.PostFinetuneLaw(OVERFITTING).fit(runs | {"heldout_loss": loss, "finetuned_loss": loss - 0.5})
    with pytest.raises(RecipeError, match="an interval needs its runs: fit it to a table"):
        known.predict(interval=0.9, **at)
    with pytest.raises(RecipeError, match="this OverfittingLaw has not been fitted"):
        laws.PostFinetuneLaw(laws.OverfittingLaw())


def test_cmr() -> None:
    law = laws.CMRLaw().fit(continued(generator()))
    ratios, budgets = np.meshgrid([0.15, 0.2, 0.35, 0.5], np.geomspace(1e9, 20e9, 6))
    for of, start, increment in zip(
        ("general_loss", "domain_loss"), (2.6, 2.2), increments(budgets, ratios), strict=True
    ):
        predicted = law.predict(tokens=budgets, domain_ratio=ratios, of=of)
        assert predicted.shape == ratios.shape
        assert relative_error(predicted, start + increment).mean() < 0.01


def test_increments_may_be_given_instead_of_losses() -> None:
    table = continued(generator(), noise=0)
    as_losses = laws.CMRLaw().fit(table)
    later = table["tokens"] > 0
    columns = {name: values[later] for name, values in table.items()}
    columns |= {"general_loss": columns["general_loss"] - 2.6, "domain_loss": columns["domain_loss"] - 2.2}
    as_increments = laws.CMRLaw().fit(columns)
    assert as_increments.critical_ratio(tokens=1e10) == pytest.approx(as_losses.critical_ratio(tokens=1e10), abs=1e-3)


def test_losses_without_noise_and_without_differences_are_fitted() -> None:
    tokens, ratios = (x.ravel() for x in np.meshgrid([0, *np.geomspace(1e6, 1e9, 10)], [0.1, 0.2, 0.4, 0.6]))
    general, domain = 2.5 + 2.1 * ratios * (tokens / 1e9) ** 0.3, 3 - 0.5 * ratios**0.3 * (tokens / 1e9) ** 0.2
    law = laws.CMRLaw().fit({"tokens": tokens, "domain_ratio": ratios, "general_loss": general, "domain_loss": domain})
    with pytest.raises(RecipeError, match=r"the turning point of multiplier 100 comes later"):
        law.critical_ratio(tokens=1e7, tolerance=0.1)
    middle, low, high = law.predict(tokens=1e9, domain_ratio=0.4, interval=0.9)
    assert (middle, low, high) == pytest.approx([2.5 + 2.1 * 0.4] * 3, abs=1e-3)
    _, make, table = TABLES["overfitting"]
    alike = {name: np.full(len(table["tokens"]), 2.0) for name in ("train_loss", "heldout_loss")}
    given = {name: 3 * table[name][:1] for name in ("tokens", "fraction")}
    _, low, high = make().fit({**table, **alike}).predict(**given, interval=0.9)
    assert (*low, *high) == pytest.approx([2, 2], abs=1e-4)


@pytest.mark.parametrize("name", ["Chinchilla", "D-CPT, domain", "overfitting"])
def test_intervals_have_the_stated_coverage(name: str) -> None:
    """Ten draws; 90% intervals of noisy points at the runs' inputs."""
    truth, make, table = TABLES[name]
    if name == "D-CPT, domain":
        table = {column: values[::3] for column, values in DCPT_GRID.items()}
    given, inside = inputs(truth, table), []
    for seed in range(10):
        rng = generator(seed)
        mean, low, high = make().fit(drawn(truth, table, rng)).predict(interval=0.9, **given)
        new = noisy(truth.predict(**given), rng, 0.01)
        inside.append((low <= new) & (new <= high))
        assert ((low < mean) & (mean < high)).all()
    assert 0.8 <= np.mean(inside) <= 0.97


@pytest.mark.parametrize(("sizes", "seeds", "by_run"), [(2, 1, 0.003), (3, 1, 0.003), (4, 2, 0.006)])
def test_intervals_cover_a_new_run_when_runs_differ(sizes: int, seeds: int, by_run: float) -> None:
    """The points of a run share its errors; as few runs as unknowns that distinguish them absorb these."""
    runs = grid(seed=range(seeds), params=np.geomspace(1e7, 1e8, sizes), tokens=np.geomspace(1e8, 1e10, 10))
    places = {"params": np.array([3e7, 1e9]), "tokens": np.array([1e9, 1e10])}
    truth, inside = CHINCHILLA.predict(**places), []
    for seed in range(12):
        rng = generator(seed)
        errors = by_run * rng.standard_normal(runs["run"].max() + 1)[runs["run"]]
        table = drawn(CHINCHILLA, runs, rng, noise=0.003)
        law = laws.ChinchillaLaw().fit(table | {"loss": table["loss"] * np.exp(errors)})
        _, low, high = law.predict(interval=0.9, **places)
        new = noisy(truth, rng, np.hypot(by_run, 0.003))
        inside.append((low <= new) & (new <= high))
    assert (np.mean(inside, axis=0) >= 0.75).all()


def test_two_sizes_do_not_determine_the_loss_of_a_third() -> None:
    """Every alpha fits two sizes equally well; with a large one the term of A vanishes at 1e10."""
    runs = grid(params=[2e8, 1e9], own_ratio=[0, *RATIOS, 1], tokens=np.linspace(1e9, 20e9, 10))
    far = {"params": 1e10, "tokens": 2e10, "own_ratio": 0.15}
    for seed in (0, 1, 2):
        rng = generator(seed)
        table = drawn(DOMAIN, runs, rng, noise=0.003)
        table["loss"] = table["loss"] * np.exp(0.003 * rng.standard_normal(18)[runs["run"]])
        law = laws.DCPTLaw().fit(table)
        _, low, high = law.predict(interval=0.9, **far)
        assert low < DOMAIN.predict(**far) < high
        assert "alpha" in law.unidentified_ or "A" in law.unidentified_


def test_a_few_hundred_rows_of_long_annealed_curves_determine_the_law() -> None:
    truth = laws.MultiPowerLaw.from_params(L0=3.1, A=0.5, alpha=0.5, B=500, C=2, beta=0.5, gamma=0.6)
    step = np.arange(1, 601) * 40.0
    cosine = 1.65e-4 + 1.35e-4 * np.cos(np.pi * step / step[-1])
    rates = [np.full(600, 3e-4), cosine, np.where(step < 8000, 3e-4, 9e-5)]
    losses = [truth.predict(step=step, lr=lr) for lr in rates]
    table = {"step": np.tile(step, 3), "run": np.repeat([0, 1, 2], 600)}
    law = laws.MultiPowerLaw().fit(table | {"lr": np.concatenate(rates), "loss": np.concatenate(losses)})
    assert 250 < len(law._fits["loss"].residual) <= 300
    assert law.predict(step=step, lr=cosine) == pytest.approx(losses[1], rel=1e-5)


def test_neighbouring_drops_of_a_slow_decay_count_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cosine of 800 evaluations, and one that drops to a third on its way; each row knows only what was before it."""
    truth = laws.MultiPowerLaw.from_params(L0=3.1, A=0.5, alpha=0.5, B=500, C=2, beta=0.5, gamma=0.6)
    step = np.arange(1, 801) * 40.0
    cosine = 1.65e-4 + 1.35e-4 * np.cos(np.pi * step / step[-1])
    for lr in (cosine, np.where(step < 9000, cosine, cosine / 3)):
        merged, half = truth.predict(step=step, lr=lr), truth.predict(step=step[:400], lr=lr[:400])
        with monkeypatch.context() as patch:
            patch.setattr(annealing, "MOST_DROPS", 1000)
            each = truth.predict(step=step, lr=lr)
        gain = each[0] - each.min()
        assert merged == pytest.approx(each, abs=1e-3 * gain)
        assert not np.array_equal(merged, each)
        assert half == pytest.approx(each[:400], abs=1e-3 * gain)
        features = truth._features({"step": step, "lr": lr}, {})
        assert features["drops"].shape[1] <= annealing.MOST_DROPS
        assert features["drops"].sum(axis=1) == pytest.approx(lr[0] - lr)


def test_repeats_that_raise_the_loss_are_warned_of() -> None:
    truth, make, table = TABLES["data-constrained"]
    table = drawn(truth, table, generator(), noise=0.003)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make().fit(table)
    repeated = (table["unique_tokens"] == 1e8) & (table["tokens"] == 5e10)
    with pytest.warns(laws.LawWarning, match="5 of 60 rows have losses more than 5% above .* leave out"):
        make().fit(table | {"loss": np.where(repeated, 1.5, 1) * table["loss"]})


def test_five_outliers_do_not_widen_every_interval() -> None:
    table = drawn(
        CHINCHILLA,
        grid(seed=range(6), params=np.geomspace(4e7, 1e9, 6), tokens=np.geomspace(1e9, 5e10, 7)),
        generator(),
    )
    points = {name: values for name, values in table.items() if name != "run"}
    off = points | {"loss": points["loss"] * np.where(np.arange(252) % 50 == 7, 1.5, 1)}
    widths = [
        np.ptp(laws.ChinchillaLaw().fit(t).predict(params=2e8, tokens=1e10, interval=0.9)[1:]) for t in (points, off)
    ]
    assert widths[1] < 1.15 * widths[0]


def test_wrong_losses_apart_from_all_other_runs_are_ignored() -> None:
    """Many parameters on few tokens, as four of the 245 points that were read off Chinchilla's figure."""
    runs = grid(params=np.geomspace(4e7, 1e9, 8), tokens=np.geomspace(1e9, 5e10, 17))
    corner = {"params": np.array([2e9, 2.3e9, 3e9, 7e9]), "tokens": np.array([7e8, 6e8, 5e8, 2.5e8])}
    table = {name: np.concatenate([runs[name], corner[name]]) for name in corner}
    table = drawn(CHINCHILLA, table, generator(), noise=0.003)
    clean = laws.ChinchillaLaw().fit(table)
    wrong = table | {"loss": table["loss"] * np.exp(np.append(np.zeros(136), [0.1, 0.12, 0.28, 0.3]))}
    with pytest.warns(laws.LawWarning, match=r"4 of 140 rows were left out .*; the worst is .* = 2\.5e\+08"):
        law = laws.ChinchillaLaw().fit(wrong)
    assert law.params_["beta"] == pytest.approx(0.35, abs=0.01)
    assert law.params_["E"] == pytest.approx(clean.params_["E"], abs=0.05)
    with warnings.catch_warnings():
        warnings.simplefilter("error", laws.LawWarning)
        laws.ChinchillaLaw().fit(wrong | {"run": np.arange(140) // 4})
    assert law.bootstrap(wrong, n=20)["beta"] == pytest.approx((0.35, 0.35), abs=0.03)


def test_a_law_that_cannot_fit_its_runs_has_wide_intervals() -> None:
    """Losses that rise with size and tokens: every parameter but E ends at its bound and absorbs no error."""
    _, make, table = TABLES["Chinchilla"]
    rising = table | {"loss": 6 - CHINCHILLA.predict(params=table["params"], tokens=table["tokens"]) / 2}
    law = make().fit(rising)
    _, low, high = law.predict(params=table["params"], tokens=table["tokens"], interval=0.9)
    assert ((low <= rising["loss"]) & (rising["loss"] <= high)).mean() > 0.8


def test_an_interval_beyond_several_columns_is_at_least_as_wide_as_beyond_each() -> None:
    truth, make, table = TABLES["Chinchilla"]
    law = make().fit(drawn(truth, table, generator()))
    measured = {("params",): 4e-4, ("tokens",): 8e-4, ("params", "tokens"): 1e-5}
    law._measured_misfit = lambda names, of: measured[names]  # type: ignore[method-assign]
    assert law._misfit_of(("params", "tokens"), "loss") == pytest.approx(3e-4)
    measured["params", "tokens"] = 1e-3
    assert law._misfit_of(("params", "tokens"), "loss") == 1e-3


def test_an_interval_beyond_the_runs_covers_the_error_of_the_law_there() -> None:
    """The losses' exponent is half as large from 4e9 tokens on, which a law fitted to all up to 2e10 sees in part."""
    runs = grid(params=np.geomspace(4e7, 1e9, 5), tokens=np.geomspace(1e8, 2e10, 12))
    bent = drawn(CHINCHILLA, runs, generator(), noise=0.002)
    bent["loss"] = bent["loss"] * np.maximum(runs["tokens"] / 4e9, 1) ** 0.05
    law = laws.ChinchillaLaw().fit(bent)
    truth = CHINCHILLA.predict(params=4e8, tokens=2e11) * (2e11 / 4e9) ** 0.05
    for edge, far in (2e10, False), (2e11, True):
        mean, low, high = law.predict(params=4e8, tokens=edge, interval=0.9)
        assert ((high - low) / mean > 0.1) is far
    assert low < truth < high


def test_runs_of_one_seed_are_warned_of() -> None:
    for seeds in (1, 2):
        runs = grid(seed=range(seeds), params=np.geomspace(1e7, 1e8, 3), tokens=np.geomspace(1e8, 1e10, 10))
        law = laws.ChinchillaLaw().fit(drawn(CHINCHILLA, runs, generator(), noise=0.003))
        asked = (law, {"params": 3e7, "tokens": 1e9}), (after_runs_of(seeds, 4, generator())[0], {"fraction": 0.02})
        for one, at in asked:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                one.predict(**{"tokens": 1e11} | at, interval=0.9)
            assert any("two seeds or more" in str(warning.message) for warning in caught) is (seeds == 1)


def test_one_run_has_no_interval_and_a_law_without_held_out_runs_has_none_beyond_its_runs() -> None:
    one = drawn(CHINCHILLA, grid(params=[1e8], tokens=np.geomspace(1e8, 1e10, 10)), generator())
    law = laws.ChinchillaLaw().fit(one)
    assert law.predict(params=1e8, tokens=1e9) == pytest.approx(CHINCHILLA.predict(params=1e8, tokens=1e9), rel=0.02)
    with pytest.raises(laws.OpenError, match=r"two runs or more; all 10 points are from one run .* run a second seed"):
        law.predict(params=1e8, tokens=1e9, interval=0.9)
    few = drawn(CHINCHILLA, grid(params=[1e7, 1e8, 1e9], tokens=[1e9, 1e10]), generator())
    law = laws.ChinchillaLaw().fit({name: values for name, values in few.items() if name != "run"})
    law.predict(params=1e8, tokens=1e10, interval=0.9)
    with pytest.raises(laws.OpenError, match=r"beyond the params .* need all of these 6; add runs"):
        law.predict(params=1e10, tokens=1e10, interval=0.9)
    two = drawn(FINETUNE, grid(params=[1e8, 3e8], unique_tokens=np.geomspace(1e5, 1e8, 10)), generator(), noise=0.003)
    law = laws.FinetuneLaw().fit(two)
    law.predict(params=2e8, unique_tokens=1e7, interval=0.9)
    with pytest.raises(laws.OpenError, match=r"beyond the range of params .* two values do not show; run a third"):
        law.predict(params=1e9, unique_tokens=1e7, interval=0.9)


def test_intervals_of_the_overfitting_law_match_the_spread_of_its_predictions() -> None:
    """Two fits share the train losses' errors; 24 draws give the spread of their sum to about 15%."""
    at = {"tokens": np.array([60e9, 200e9]), "fraction": np.array([0.02, 0.05])}
    points = {name: values for name, values in overfitting_grid().items() if name != "run"}
    predicted, said = [], []
    for seed in range(24):
        law = laws.OverfittingLaw().fit(drawn(OVERFITTING, points, generator(seed)))
        predicted.append(law.predict(**at))
        noise = law._heldout_noise()
        said.append(np.median(law._variance(at, "heldout_loss") - (noise.point + noise.run)[:, None], axis=0))
    assert np.mean(said, axis=0) ** 0.5 == pytest.approx(np.std(predicted, axis=0), rel=0.4)


# Domain losses of 1.1M parameters on scores of music, means of two seeds, every 500K tokens from 1.5M to 6M.
MUSIC_SHARES = (0, 0.005, 0.01, 0.02, 0.05, 0.1)
MUSIC_TRAIN = [
    [7.96, 8.38, 8.56, 8.55, 8.68, 8.66, 8.65, 8.58, 8.47, 8.61],
    [7.23, 7.21, 6.92, 6.66, 6.44, 6.20, 5.99, 5.83, 5.69, 5.68],
    [6.74, 6.38, 6.05, 5.73, 5.62, 5.45, 5.40, 5.27, 5.22, 5.11],
    [6.02, 5.69, 5.46, 5.34, 5.15, 5.06, 4.91, 4.73, 4.65, 4.57],
    [5.39, 5.04, 4.83, 4.65, 4.42, 4.27, 4.09, 3.96, 3.82, 3.71],
    [4.88, 4.53, 4.25, 4.00, 3.77, 3.56, 3.40, 3.25, 3.11, 2.96],
]
MUSIC_HELDOUT = [
    [7.67, 8.05, 8.25, 8.30, 8.31, 8.29, 8.32, 8.30, 8.17, 8.35],
    [7.24, 7.31, 7.18, 6.87, 6.82, 6.67, 6.66, 6.62, 6.42, 6.54],
    [6.81, 6.71, 6.61, 6.45, 6.34, 6.20, 6.16, 6.17, 6.09, 5.98],
    [6.41, 6.30, 6.21, 6.10, 6.02, 6.05, 5.94, 5.82, 5.76, 5.81],
    [6.05, 5.95, 5.94, 5.83, 5.65, 5.53, 5.55, 5.60, 5.43, 5.40],
    [5.90, 5.66, 5.58, 5.41, 5.37, 5.35, 5.29, 5.18, 5.17, 5.13],
]


def test_no_other_search_fits_real_curves_better_than_the_overfitting_law() -> None:
    """Without domain text the domain loss rises, which the two stages do not model."""
    table = {
        "tokens": np.tile(np.linspace(1.5e6, 6e6, 10), 6),
        "fraction": np.repeat(MUSIC_SHARES, 10),
        "train_loss": np.ravel(MUSIC_TRAIN),
        "heldout_loss": np.ravel(MUSIC_HELDOUT),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", laws.IdentificationWarning)
        law = laws.OverfittingLaw().fit(table)
    for fit in law._fits.values():
        for seed in (1, 2):
            other = Fit(fit.curve, solve(fit.curve, seed=seed))
            assert np.square(fit.residual).sum() < 1.001 * np.square(other.residual).sum()
