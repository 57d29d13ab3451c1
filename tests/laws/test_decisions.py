"""Every decision by a law, against brute force over a grid or arithmetic by hand."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from decimal import Decimal
from functools import partial
from typing import Any

import numpy as np
import pytest

import spt_fast as spt
from spt_fast import laws
from spt_fast.errors import RecipeError
from tests.synthetic_runs import (
    CHINCHILLA,
    CONSTRAINED,
    CROSS_DOMAIN,
    DOMAIN,
    FINETUNE,
    FORGETTING,
    FRACTIONS,
    GENERAL,
    OVERFITTING,
    REPEATED,
    SPARSE,
    TABLES,
    continued,
    drawn,
    finetuned,
    gain,
    grid,
    increments,
    overfitting_grid,
)

pytestmark = pytest.mark.filterwarnings("ignore::spt_fast.laws.LawWarning")

SHARES = np.linspace(0, 1, 100_001)


@pytest.mark.parametrize("tokens", [150e9, 200e9, 250e9, 400e9])
def test_best_fraction_before_finetuning(tokens: float) -> None:
    shares = np.linspace(0, 0.1, 100_001)
    brute = shares[np.argmin(OVERFITTING.predict(tokens=tokens, fraction=shares))]
    assert OVERFITTING.best_fraction(tokens=tokens) == pytest.approx(brute, abs=2e-5)


def test_the_best_fraction_falls_with_the_budget_and_stays_within_its_bounds() -> None:
    best = [OVERFITTING.best_fraction(tokens=tokens) for tokens in (20e9, 200e9, 300e9, 1e12)]
    assert best == sorted(best, reverse=True)
    assert best[0] == 0.1 > best[1]
    assert OVERFITTING.best_fraction(tokens=20e9, within=(0.01, 0.03)) == pytest.approx(0.03)
    fitted = laws.OverfittingLaw().fit(drawn(OVERFITTING, overfitting_grid(), np.random.default_rng(0)))
    assert fitted.best_fraction(tokens=20e9) == pytest.approx(0.05)  # the largest that was run


def test_the_budget_at_which_one_fraction_overtakes_another() -> None:
    tokens = OVERFITTING.overtaking_tokens(fraction=0.05, other=0.1)
    assert tokens is not None
    assert OVERFITTING.predict(tokens=tokens, fraction=0.05) == pytest.approx(
        OVERFITTING.predict(tokens=tokens, fraction=0.1), rel=1e-9
    )
    budgets = np.geomspace(1e9, 1e12, 100_001)
    ahead = OVERFITTING.predict(tokens=budgets, fraction=0.05) < OVERFITTING.predict(tokens=budgets, fraction=0.1)
    assert tokens == pytest.approx(budgets[np.argmax(ahead)], rel=1e-3)
    assert OVERFITTING.overtaking_tokens(fraction=0.1, other=0.05, within=(1e9, 1e12)) is None


def test_best_fraction_after_finetuning() -> None:
    table = finetuned(overfitting_grid(most=600e9), np.random.default_rng(0), noise=0)
    law = laws.PostFinetuneLaw().fit(table)

    def after(tokens: float, delta: float) -> float:
        at = np.array([tokens]), np.array([delta])
        return float((OVERFITTING.predict(tokens=at[0], fraction=at[1]) - gain(*at))[0])

    for tokens in (50e9, 100e9, 200e9, 500e9):
        assert law.best_fraction(tokens=tokens) == min(FRACTIONS, key=lambda delta: after(tokens, delta))
        assert law.gain(tokens=tokens, fraction=0.02) == pytest.approx(gain(np.array(tokens), np.array(0.02)), rel=1e-3)
    assert len({law.best_fraction(tokens=tokens) for tokens in (100e9, 500e9)}) == 2
    budgets = np.geomspace(60e9, 600e9, 20_001)
    ahead = [after(tokens, 0.02) < after(tokens, 0.05) for tokens in budgets]
    assert law.overtaking_tokens(fraction=0.02, other=0.05) == pytest.approx(budgets[np.argmax(ahead)], rel=0.02)


def test_an_unseen_fraction_is_refused() -> None:
    law = laws.PostFinetuneLaw().fit(finetuned(overfitting_grid(), np.random.default_rng(0)))
    with pytest.raises(ValueError, match=r"fraction 0\.03 were fitted.*has 0\.001, 0\.005, 0\.01, 0\.02, 0\.05"):
        law.predict(tokens=1e11, fraction=0.03)
    with pytest.raises(ValueError, match="fraction"):
        law.gain(tokens=1e11, fraction=0.03)


def test_the_injection_that_stops_forgetting() -> None:
    """By hand: A·D^β/((1 + B·p)·N)^α = rise."""
    p = FORGETTING.params_
    share = FORGETTING.injection(params=41e6, unique_tokens=3e6, max_rise=0.3)
    held = (1 + p["B"] * share) * 41e6
    assert p["A"] * 3e6 ** p["beta"] / held ** p["alpha"] == pytest.approx(0.3)
    brute = np.linspace(0, 1, 200_001)
    rise = FORGETTING.predict(params=41e6, unique_tokens=3e6, injected=brute, loss_before=3.0) - 3.0
    assert share == pytest.approx(brute[np.argmax(rise <= 0.3)], abs=1e-5)
    assert FORGETTING.injection(params=41e6, unique_tokens=3e6, max_rise=10) == 0
    with pytest.raises(RecipeError, match="no injected share"):
        FORGETTING.injection(params=41e6, unique_tokens=3e6, max_rise=1e-3)


def test_an_offset_uses_part_of_the_allowed_rise() -> None:
    law = laws.OffsetForgettingLaw.from_params(**FORGETTING.params_, E=0.02)
    less = FORGETTING.injection(params=41e6, unique_tokens=3e6, max_rise=0.3)
    assert law.injection(params=41e6, unique_tokens=3e6, max_rise=0.32) == pytest.approx(less)
    assert law.predict(params=41e6, unique_tokens=3e6, injected=less, loss_before=3.0) == pytest.approx(3.32)


def test_unique_tokens_for_a_loss() -> None:
    tokens = FINETUNE.unique_tokens_for(loss=1.8, params=334e6)
    assert FINETUNE.predict(params=334e6, unique_tokens=tokens) == pytest.approx(1.8)
    with pytest.raises(RecipeError, match=r"floor is E = 0\.9"):
        FINETUNE.unique_tokens_for(loss=0.9, params=334e6)


@pytest.mark.parametrize("rise", [0.005, 0.01, 0.03])
def test_the_most_domain_data_that_a_limit_on_general_loss_allows(rise: float) -> None:
    at = {"params": 1.8e9, "tokens": 10e9}
    start = GENERAL.predict(own_ratio=1.0, **at)
    allowed = GENERAL.predict(own_ratio=1 - SHARES, **at) <= (1 + rise) * start
    domain = np.where(allowed, DOMAIN.predict(own_ratio=SHARES, **at), np.inf)
    ratio = spt.laws.best_ratio(domain=DOMAIN, general=GENERAL, max_general_rise=rise, **at)
    assert ratio == pytest.approx(SHARES[np.argmin(domain)], abs=2e-5)
    assert 0 < ratio < 1
    measured = spt.laws.best_ratio(
        domain=DOMAIN, general=GENERAL, max_general_rise=0, general_before=(1 + rise) * start, **at
    )
    assert measured == pytest.approx(ratio)


def test_a_loose_limit_gives_the_best_domain_loss_and_a_strict_one_is_refused() -> None:
    at = {"params": 1.8e9, "tokens": 10e9, "domain": DOMAIN, "general": GENERAL}
    assert laws.best_ratio(max_general_rise=1, **at) == 1
    with pytest.raises(RecipeError, match=r"smallest rise is 0\.2"):
        laws.best_ratio(max_general_rise=0.03, general_before=2.0, **at)
    with pytest.raises(RecipeError, match="fraction"):
        laws.best_ratio(max_general_rise=3, **at)
    of_the_new_domain = laws.best_ratio(max_general_rise=0.03, **at | {"domain": CROSS_DOMAIN}, learnability=0.7)
    assert of_the_new_domain == pytest.approx(laws.best_ratio(max_general_rise=0.03, **at))


@pytest.mark.parametrize("domain_tokens", [1e8, 1e9, 5e9])
def test_the_share_for_a_number_of_domain_tokens(domain_tokens: float) -> None:
    shares = SHARES[1:]
    losses = DOMAIN.predict(params=1.8e9, tokens=domain_tokens / shares, own_ratio=shares)
    best = DOMAIN.best_ratio(params=1.8e9, domain_tokens=domain_tokens)
    assert best == pytest.approx(shares[np.argmin(losses)], abs=2e-5)
    same = CROSS_DOMAIN.best_ratio(params=1.8e9, domain_tokens=domain_tokens, learnability=0.7)
    assert same == pytest.approx(best, abs=1e-6)


def test_the_share_is_inside_its_bounds_and_grows_with_the_domain_tokens() -> None:
    shares = [DOMAIN.best_ratio(params=1.8e9, domain_tokens=tokens) for tokens in (3e8, 1e9, 5e9)]
    assert 0 < shares[0] < shares[1] < shares[2] < 1


def test_size_and_tokens_for_given_flops() -> None:
    flops = 1e21
    sizes = np.geomspace(1e7, 1e11, 400_001)
    tokens = flops / 6 / sizes
    cases = [
        (CHINCHILLA.best_allocation(flops=flops), CHINCHILLA.predict(params=sizes, tokens=tokens)),
        (SPARSE.best_allocation(flops=flops), SPARSE.predict(average_params=sizes, tokens=tokens)),
        (
            DOMAIN.best_allocation(flops=flops, own_ratio=0.3),
            DOMAIN.predict(params=sizes, tokens=tokens, own_ratio=0.3),
        ),
    ]
    for (best_size, best_tokens), losses in cases:
        assert best_size == pytest.approx(sizes[np.argmin(losses)], rel=1e-3)
        assert 6 * best_size * best_tokens == pytest.approx(flops)
    best = CONSTRAINED.best_allocation(flops=flops, unique_tokens=2e9)
    losses = CONSTRAINED.predict(params=sizes, tokens=tokens, unique_tokens=2e9)
    assert best[0] == pytest.approx(sizes[np.argmin(losses)], rel=1e-3)
    assert best[1] > 4 * 2e9  # repeats


def test_the_value_of_a_repeated_corpus() -> None:
    """By hand with R*_D = 15.387756: 4 epochs are worth 1 + 15.387756·(1 − e^(−3/15.387756)) of the corpus."""
    assert CONSTRAINED.effective_tokens(tokens=4e8, unique_tokens=1e8) == pytest.approx(
        1e8 * (1 + 15.387756 * (1 - math.exp(-3 / 15.387756)))
    )
    assert CONSTRAINED.effective_tokens(tokens=[1e8, 5e7], unique_tokens=1e8) == pytest.approx([1e8, 5e7])
    assert CONSTRAINED.effective_tokens(tokens=1e12, unique_tokens=1e8) == pytest.approx(16.387756e8)
    epochs = CONSTRAINED.epochs_until(marginal_worth=0.5)
    more, here = (CONSTRAINED.effective_tokens(tokens=1e8 * e, unique_tokens=1e8) for e in (epochs + 1e-4, epochs))
    assert (more - here) / (1e8 * 1e-4) == pytest.approx(0.5, rel=1e-3)


def test_the_published_law_by_hand() -> None:
    """N = 1e9, D = 1e10 of 1e9 unique: U_N = 5.1e7, R_N = 18.6078, R_D = 9."""
    params = 5.1e7 * (1 + 5.309743 * (1 - math.exp(-(1e9 / 5.1e7 - 1) / 5.309743)))
    tokens = 1e9 * (1 + 15.387756 * (1 - math.exp(-9 / 15.387756)))
    by_hand = 521 / params**0.35 + 1488 / tokens**0.35 + 1.87
    assert CONSTRAINED.predict(params=1e9, tokens=1e10, unique_tokens=1e9) == pytest.approx(by_hand)
    fresh = CONSTRAINED.predict(params=4e7, tokens=1e9, unique_tokens=1e9)
    assert fresh == pytest.approx(521 / 4e7**0.35 + 1488 / 1e9**0.35 + 1.87)


@pytest.mark.filterwarnings("ignore::spt_fast.laws.LawWarning")
def test_a_decision_by_an_undetermined_parameter_is_refused() -> None:
    """Runs without repetition do not determine R*; decisions on fresh tokens are still made."""
    fresh = grid(params=[1e8, 3e8, 1e9], unique_tokens=[1e9, 3e9, 1e10, 3e10])
    table = drawn(CONSTRAINED, fresh | {"tokens": fresh["unique_tokens"]}, np.random.default_rng(0))
    law = laws.DataConstrainedLaw().fit(table)
    assert "R_star_D" in law.unidentified_
    for decide in (
        lambda: law.epochs_until(marginal_worth=0.1),
        lambda: law.effective_tokens(tokens=1e11, unique_tokens=1e9),
    ):
        with pytest.raises(ValueError, match=r"these runs do not determine .*: another value of R_star_D"):
            decide()
    assert law.effective_tokens(tokens=2e9, unique_tokens=4e9) == pytest.approx(2e9)
    repeated = laws.DataConstrainedLaw().fit(
        drawn(CONSTRAINED, TABLES["data-constrained"][2], np.random.default_rng(0))
    )
    assert repeated.epochs_until(marginal_worth=0.1) == pytest.approx(1 + 15.39 * math.log(10), rel=0.3)


@pytest.mark.parametrize("tokens", [5e9, 10e9, 20e9])
def test_the_critical_ratio(tokens: float) -> None:
    law = laws.CMRLaw().fit(continued(np.random.default_rng(0), noise=1e-5))
    ratios = np.linspace(0.1, 0.7, 60_001)
    general, domain = increments(np.full(len(ratios), tokens), ratios)
    brute = ratios[(general <= 0.05) & (domain < 0)].max()
    assert law.critical_ratio(tokens=tokens) == pytest.approx(brute, abs=0.003)
    assert law.critical_ratio(tokens=tokens, tolerance=0.1) > brute


def test_critical_ratios_across_budgets_and_where_the_general_loss_turns() -> None:
    law = laws.CMRLaw().fit(continued(np.random.default_rng(0), noise=1e-5))
    p = law.critical_ratio_curve(tokens=[4e9, 8e9, 12e9, 16e9, 20e9])
    assert p["alpha4"] * 1e10 ** p["s4"] + p["beta3"] == pytest.approx(law.critical_ratio(tokens=1e10), abs=0.003)
    # d/dx (0.125·R·x^0.25 ... ): 0.5·R·0.25·x^0.25 = 0.06·0.5·x^0.5 as λ grows, so x = (0.125·R/0.03)^4
    turn = law.turning_tokens(domain_ratio=0.3, multiplier=7000)
    assert turn == pytest.approx((0.125 * 0.3 / 0.03) ** 4 * 1e9, rel=0.05)
    assert law.critical_ratio(tokens=turn * 0.9, tolerance=1, multiplier=7000) < 0.3
    assert law.critical_ratio(tokens=turn * 1.1, tolerance=1, multiplier=7000) > 0.3


def test_no_ratio_is_feasible_or_every_ratio_is() -> None:
    law = laws.CMRLaw().fit(continued(np.random.default_rng(0), noise=1e-5))
    with pytest.raises(RecipeError, match=r"interval: 90 is invalid: .* such as 0\.9"):
        law.critical_ratio(tokens=1e10, interval=90)
    with pytest.raises(RecipeError, match=r"no domain ratio from 0\.1 to 0\.7 is feasible"):
        law.critical_ratio(tokens=1e10, tolerance=-1)
    with pytest.warns(laws.ExtrapolationWarning, match=r"critical ratio, 1, is beyond the ratios .* \(0\.1 to 0\.7\)"):
        assert law.critical_ratio(tokens=1e10, tolerance=1, multiplier=1e-9) == 1


def test_ratios_are_interpolated_by_a_power_law_and_held_out_runs_are_scored() -> None:
    law = laws.CMRLaw().fit(continued(np.random.default_rng(0), noise=1e-5))
    for ratio in (0.15, 0.6, 0.8):
        general, domain = increments(np.array([1e10]), np.array([ratio]))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", laws.ExtrapolationWarning)
            for of, loss in (("general_loss", 2.6 + general[0]), ("domain_loss", 2.2 + domain[0])):
                mean, low, high = law.predict(tokens=1e10, domain_ratio=ratio, of=of, interval=0.9)
                assert mean == pytest.approx(loss, abs=2e-3)
                assert low < mean < high
    left_out = continued(np.random.default_rng(1), noise=1e-5, ratios=[0.25, 0.6])
    later = {name: values[left_out["tokens"] > 0] for name, values in left_out.items()}
    assert law.score(later)["r2"] > 0.99


def test_average_parameters_of_a_pruning_schedule() -> None:
    assert laws.average_params([1e9, 5e8], [1, 3]) == 6.25e8
    assert laws.average_params([4, 2]) == 3
    with pytest.raises(RecipeError, match="one length"):
        laws.average_params([1e9, 5e8], [1])


def test_a_cross_domain_law_reports_its_error_on_an_unseen_domain() -> None:
    table = drawn(CROSS_DOMAIN, TABLES["cross-domain D-CPT"][2], np.random.default_rng(0))
    table = {name: values[::3] for name, values in table.items()}
    errors = laws.CrossDomainDCPTLaw().leave_one_domain_out(table)
    assert [domain for (domain,) in errors] == [0.4, 0.6, 0.9, 1.4]
    assert max(errors.values()) < 0.05
    law = laws.CrossDomainDCPTLaw().fit(table)
    refused = r"learnability: 4\.0 is invalid: the fitted domains span 0\.4 to 1\.4; run one"
    with pytest.raises(RecipeError, match=refused):
        law.predict(params=5e8, tokens=1e10, own_ratio=0.5, learnability=4.0)
    with pytest.raises(RecipeError, match=refused):
        law.best_ratio(params=5e8, domain_tokens=1e9, learnability=4.0)
    at = {"domain": law, "general": GENERAL, "params": 5e8, "tokens": 1e10, "max_general_rise": 0.1}
    with pytest.raises(RecipeError, match=refused):
        laws.best_ratio(**at, learnability=4.0)
    two = table["learnability"] < 0.7
    with pytest.raises(ValueError, match="fit 3 domains or more; the table has 2"):
        laws.CrossDomainDCPTLaw().fit({name: values[two] for name, values in table.items()})


def test_the_weights_of_probe_features_are_fitted() -> None:
    truth = laws.ProbedDCPTLaw.from_params(**CROSS_DOMAIN.params_ | {"w2": 2.0})
    domains = {2.0: 0.3, 2.5: 0.1, 3.0: 0.25, 4.0: 0.05, 3.5: 0.2}
    runs = grid(initial_loss=list(domains), params=[2e8, 1e9], own_ratio=[0.1, 0.5, 1.0], tokens=[1e9, 4e9, 2e10])
    table = runs | {"decline": np.array([domains[k1] for k1 in runs["initial_loss"]])}
    law = laws.ProbedDCPTLaw().fit(drawn(truth, table, np.random.default_rng(0), noise=1e-4))
    assert law.params_["w2"] == pytest.approx(2.0, rel=0.02)
    at = {"params": 1e9, "tokens": 1e10, "own_ratio": 0.5, "initial_loss": 2.8, "decline": 0.15}
    assert law.predict(**at) == pytest.approx(truth.predict(**at), rel=0.005)
    assert max(law.leave_one_domain_out(drawn(truth, table, np.random.default_rng(0), noise=1e-4)).values()) < 0.05


def test_learnability_of_a_probe_run() -> None:
    assert laws.learnability([4.0, 3.5, 3.0], w1=2, w2=3) == pytest.approx(2 / 4 + 3 * 0.5)
    with pytest.raises(RecipeError, match="at least two"):
        laws.learnability([4.0])


NUMBERS: list[tuple[Callable[..., Any], dict[str, Any]]] = [
    (CHINCHILLA.best_allocation, {"flops": 1e20}),
    (DOMAIN.best_allocation, {"flops": 1e20, "own_ratio": 0.3}),
    (DOMAIN.best_ratio, {"params": 1e9, "domain_tokens": 1e9}),
    (CROSS_DOMAIN.best_ratio, {"params": 1e9, "domain_tokens": 1e9, "learnability": 0.7}),
    (
        partial(laws.best_ratio, domain=DOMAIN, general=GENERAL),
        {"params": 1.8e9, "tokens": 1e10, "max_general_rise": 0.03, "general_before": 2.6},
    ),
    (CONSTRAINED.best_allocation, {"flops": 1e20, "unique_tokens": 1e9}),
    (CONSTRAINED.effective_tokens, {"tokens": 1e10, "unique_tokens": 1e9}),
    (CONSTRAINED.epochs_until, {"marginal_worth": 0.5}),
    (FINETUNE.unique_tokens_for, {"loss": 1.8, "params": 3e8}),
    (FORGETTING.injection, {"params": 4e7, "unique_tokens": 3e6, "max_rise": 0.3}),
    (OVERFITTING.best_fraction, {"tokens": 1e11, "within": (0, 0.1)}),
    (OVERFITTING.overtaking_tokens, {"fraction": 0.05, "other": 0.1, "within": (1e9, 1e12)}),
    (REPEATED.best_fraction, {"tokens": 1e11, "unique_tokens": 3e8, "within": (0, 0.5)}),
    (CHINCHILLA.predict, {"params": 1e9, "tokens": 1e10}),
    (laws.average_params, {"params": [1e9, 5e8], "steps": [1, 3]}),
    (laws.learnability, {"losses": [3.0, 2.9], "w1": 1, "w2": 1}),
    (laws.ChinchillaLaw.from_params, CHINCHILLA.params_),
]
WRONG = ("1e20", "20B", "x", float("nan"), float("inf"), True, 1j, {}, 10**400, (float("nan"), 1.0), ["a"])
AS_NUMBERS: list[Callable[[Any], Any]] = [np.float64, Decimal, np.array]


@pytest.mark.parametrize(("decide", "given"), NUMBERS)
def test_values_that_are_not_numbers_are_refused_by_name(decide: Callable[..., Any], given: dict[str, Any]) -> None:
    decide(**given)
    for field, value in given.items():
        for wrong in WRONG:
            with pytest.raises(RecipeError, match=f"^{field}: .* is invalid: "):
                decide(**given | {field: wrong})
        if np.ndim(value) == 0 and not isinstance(decide(**given), laws.Law):
            for kind in AS_NUMBERS:
                assert decide(**given | {field: kind(value)}) == pytest.approx(decide(**given))


@pytest.mark.parametrize("below", [0, -1])
def test_numbers_out_of_range_are_refused_by_name(below: int) -> None:
    may_be_0 = {"own_ratio", "fraction", "other", "max_general_rise", "w1", "w2"}
    for decide, given in NUMBERS[:-1]:
        for field in given.keys() - {"within", "losses"} - (may_be_0 if below == 0 else {"w1", "w2"}):
            with pytest.raises(RecipeError, match=f"^{field}: .* is invalid: "):
                decide(**given | {field: below})
    with pytest.raises(RecipeError, match=r"within: \(0\.1, 0\) is invalid: give two numbers in order"):
        OVERFITTING.best_fraction(tokens=1e11, within=(0.1, 0))


def test_laws_of_curves_and_draws_also_refuse_values_that_are_not_numbers() -> None:
    after = laws.PostFinetuneLaw().fit(finetuned(overfitting_grid(), np.random.default_rng(0)))
    critical = laws.CMRLaw().fit(continued(np.random.default_rng(0), noise=1e-5))
    table = drawn(CHINCHILLA, TABLES["Chinchilla"][2], np.random.default_rng(0))
    cases: list[tuple[Callable[..., Any], dict[str, Any]]] = [
        (after.best_fraction, {"tokens": 1e11}),
        (after.gain, {"tokens": 1e11, "fraction": 0.01}),
        (after.overtaking_tokens, {"fraction": 0.02, "other": 0.05, "within": (1e9, 1e12)}),
        (critical.critical_ratio, {"tokens": 1e10, "tolerance": 0.05, "multiplier": 100.0}),
        (critical.critical_ratio_curve, {"tokens": [4e9, 8e9, 12e9, 16e9], "tolerance": 0.05}),
        (critical.turning_tokens, {"domain_ratio": 0.3, "multiplier": 7000}),
        (partial(laws.ChinchillaLaw().fit(table).bootstrap, table), {"n": 3, "level": 0.9, "seed": 0}),
    ]
    for decide, given in cases:
        decide(**given)
        for field in given:
            for wrong in ("5", float("nan"), True, None if field != "within" else ()):
                with pytest.raises(RecipeError, match=f"^{field}: .* is invalid: "):
                    decide(**given | {field: wrong})
