"""Advice on synthetic runs of laws with a known best share, on too few runs, and without runs.

data/runs.csv is `spt_table` at 0, 0.5, 2 and 5%, budgets of 20 to 100B and replay of 0 and 1%. By the laws that it was
generated from, 5% is best at all of its budgets, and 2% at 200B.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

import spt_fast as spt
from spt_fast import cli, laws
from spt_fast.advice import advise as advising
from spt_fast.advice import forecast
from spt_fast.advice.next_step import exact_count, next_step, rates_of
from spt_fast.advice.question import nearest_preset
from spt_fast.advice.replay import costless, effects
from spt_fast.advice.result import Decision, HeldOut
from spt_fast.advice.words import effects_table, findings
from spt_fast.config import check_lengths, recipe_from
from spt_fast.errors import DataError, RecipeError
from spt_fast.fields import parse_yaml
from spt_fast.model.presets import PRESETS
from spt_fast.printing import as_json
from spt_fast.study import views
from spt_fast.study.runs_table import read_table
from spt_fast.study.usable import usable
from tests.study.synthetic import DOMAIN_TOKENS, FORGETTING, PARAMS, after, spt_table
from tests.tiny import write_dataset

STORED = Path(__file__).parent / "data" / "runs.csv"
B = 10**9


def advise(**asked: Any) -> dict[str, Any]:
    """The advice as `--json` prints it."""
    return as_json(advising.advise(**asked))


@pytest.fixture(scope="module", autouse=True)
def _few_draws() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forecast, "DRAWS", 20)
        yield


@pytest.fixture(scope="module")
def stored() -> pd.DataFrame:
    return read_table([STORED])


@pytest.fixture(scope="module")
def beyond(stored: pd.DataFrame) -> dict[str, Any]:
    return advise(domain_tokens=DOMAIN_TOKENS, budget=200 * B, model=PARAMS, table=stored)


def test_the_law_before_finetuning_is_the_one_with_the_smallest_error_at_the_largest_budget(
    stored: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = {None: 0.05, laws.OverfittingLaw: 0.04, laws.MixtureRepetitionLaw: 0.01}
    held_out = partial(HeldOut, tokens=B, predicted=0.01, seen=0.01, by=B)
    monkeypatch.setattr(forecast, "_heldout_error", lambda rows, curves, kind: held_out(mre=errors[kind]))
    asked = {"domain_tokens": DOMAIN_TOKENS, "budget": 100 * B, "model": PARAMS, "table": stored}
    says = advise(**asked)["support"]
    assert says["laws"] == "MixtureRepetitionLaw and PostFinetuneLaw"
    assert says["heldout"]["mre"] == 0.01
    errors[None] = 0.001
    assert advise(**asked)["support"]["laws"] == "PostFinetuneLaw"


def test_a_law_that_leaves_the_loss_open_is_replaced_by_one_with_about_as_small_an_error(
    stored: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error of a law is the mean over a few runs, by chance smaller than that of one that determines the loss."""
    errors = {None: 0.09, laws.OverfittingLaw: 0.04, laws.MixtureRepetitionLaw: 0.05}
    held_out, determined = partial(HeldOut, tokens=B, predicted=0.01, seen=0.01, by=B), forecast._determined

    def of_overfitting(law: laws.PostFinetuneLaw, at: dict[str, Any]) -> Any:
        if isinstance(law.heldout, laws.OverfittingLaw):
            raise DataError("spans more than a factor of 2")
        return determined(law, at)

    monkeypatch.setattr(forecast, "_heldout_error", lambda rows, curves, kind: held_out(mre=errors[kind]))
    monkeypatch.setattr(forecast, "_determined", of_overfitting)
    asked = {"domain_tokens": DOMAIN_TOKENS, "budget": 100 * B, "model": PARAMS, "table": stored}
    assert advise(**asked)["support"]["laws"] == "MixtureRepetitionLaw and PostFinetuneLaw"
    errors[laws.MixtureRepetitionLaw] = 0.08
    given = advise(**asked)
    assert given["decision"]["basis"] == "seen"
    assert "spans more than a factor of 2" in given["missing"]


def test_factors_and_intervals_are_readable() -> None:
    small = advising.advise(domain_tokens=100_000, budget=6_000_000, model="1m")
    said = " ".join(findings(small))
    assert "SPT at 10%;" in said
    assert "6,670× in pretraining tokens" in said
    once = advising.advise_pretraining(domain_tokens=100_000, budget=1_000_000)
    assert "which reads the domain once, then" in once.decision.says
    assert "the corpus is read once; more repetition" in " ".join(findings(once))
    tiny = advising.advise(domain_tokens=1, budget=1)
    assert "40,000,000,000× in pretraining tokens, 3,000,000× in domain tokens" in " ".join(findings(tiny))


def test_a_published_answer_is_not_called_a_pair_that_was_run(one_budget: pd.DataFrame) -> None:
    asked = {"domain_tokens": DOMAIN_TOKENS, "table": one_budget, "max_general_rise": 0.001}
    near, far = (advising.advise_pretraining(budget=budget * B, **asked) for budget in (200, 20_000))
    assert (near.decision.basis, far.decision.basis) == ("seen", "published")
    assert "the answer is the pair that comes nearest" in near.missing[-1]
    assert "the answer is the published share, whose rise is unknown" in far.missing[-1]


@pytest.fixture(scope="module")
def one_budget() -> pd.DataFrame:
    """Too few budgets for a law. 2% is best, then 5%; 1% replay reduces forgetting."""
    return spt_table(deltas=(0.0, 0.02, 0.05), budgets=(200 * B,), injected=(0.0, 0.01, 0.05), noise=1e-4)


RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
SWEEP = spt_table(deltas=(0.0, 0.01, 0.02, 0.05), budgets=(20 * B, 50 * B, 100 * B, 200 * B), seeds=(0,))
QUESTIONS: dict[str, tuple[pd.DataFrame | None, dict[str, Any], list[str]]] = {
    "no runs": (None, {"budget": 20 * B}, ["run shares of 0, 5%, 10%, 20%"]),
    "one run": (
        SWEEP[SWEEP["run"] == SWEEP["run"].iloc[0]],
        {"budget": 20 * B},
        ["there is nothing to compare", "run shares of 0, 5%, 10%, 20%"],
    ),
    "a demo's two arms": (
        spt_table(deltas=(0.0, 0.02), budgets=(2 * B,)),
        {"budget": 200 * B, "model": "1b"},
        [
            "add budgets: a law needs 3 or more at each share; 0% has 1, 2% has 1",
            "the runs have 109M parameters, your model 1.03B: shares are carried over unchanged",
        ],
    ),
    "a sweep of 16": (SWEEP, {"budget": 100 * B}, ["by laws fitted to the runs", "one seed"]),
    "its first three budgets": (
        SWEEP[SWEEP[["tokens", "pretrain_tokens"]].max(axis=1) <= 100 * B],
        {"budget": 100 * B},
        [
            "add a second seed",
            "one seed gives no interval",
            "learning rates and checkpoints were chosen on the select half",
        ],
    ),
    "a corpus a hundredth as large": (
        SWEEP,
        {"budget": 100 * B, "domain_tokens": 3_000_000, "model": "3b", "inference_tokens": 10**12},
        ["the runs are used at 10T tokens of pretraining, which read their corpus as often as 100B read yours"],
    ),
    "stored, music": (
        read_table([RESULTS / "2026-11-21-cpu2-spt-music.csv"]),
        {"budget": 6_000_000, "domain_tokens": 11_000_000},
        ["the laws do not determine the domain loss after 53.7K tokens", "run budgets nearer to 53.7K"],
    ),
    "stored, SMILES": (
        read_table([RESULTS / "2026-11-21-cpu2-spt-smiles.csv"]),
        {"budget": 6_000_000, "domain_tokens": 100_000},
        ["add budgets: a law needs 3 or more at each share; 0% has 2, 10% has 2"],
    ),
}


@pytest.mark.parametrize("name", QUESTIONS)
def test_sentences_agree_with_the_runs_and_show_no_raw_floats(name: str) -> None:
    table, question, expected = QUESTIONS[name]
    advice = advising.advise(**{"domain_tokens": DOMAIN_TOKENS, "table": table} | question)
    said = [advice.decision.says, *findings(advice)]
    for sentence in said:
        assert not re.search(r"\de[+-]?\d|\((\S+) to \1\)|loss -|\bnan\b|\binf\b|nothing of yours", sentence), sentence
    if table is not None and advice.support.next and "add budgets" in advice.support.next:
        assert table.groupby("pretrain_delta")["pretrain_tokens"].nunique().min() < 3
    for words in expected:
        assert any(words in sentence for sentence in said), words


def asked(table: pd.DataFrame | None, budget: int = 200 * B, **more: Any) -> dict[str, Any]:
    return advise(domain_tokens=DOMAIN_TOKENS, budget=budget, model=PARAMS, table=table, **more)


# ------------------------------------------------------------------------------------------------ by laws


def test_beyond_the_runs_the_best_share_is_that_of_the_true_laws(beyond: dict[str, Any]) -> None:
    truth = {row["delta"]: after(200 * B, row["delta"], PARAMS, DOMAIN_TOKENS) for row in beyond["shares"]}
    assert min(truth, key=truth.__getitem__) == 0.02
    assert beyond["seen"]["arms"][0]["delta"] == 0.05
    decision = beyond["decision"]
    assert (decision["regime"], decision["delta"], decision["basis"]) == ("SPT", 0.02, "laws")
    assert decision["epochs"] == pytest.approx(13.33, abs=0.01)
    for row in beyond["shares"]:
        assert row["domain"]["mean"] == pytest.approx(truth[row["delta"]], rel=0.01)
    chosen = next(row for row in beyond["shares"] if row["delta"] == 0.02)
    assert chosen["domain"]["low"] < truth[0.02] < chosen["domain"]["high"]
    assert chosen["best_in"] > 0.8
    assert sum(row["best_in"] for row in beyond["shares"]) == pytest.approx(1)


def test_support_gives_the_extrapolation_and_the_error_at_the_held_out_budget(beyond: dict[str, Any]) -> None:
    support = beyond["support"]
    assert support["outside"] == {"budget": 2.0, "params": 1.0, "domain_tokens": 1.0, "epochs": 1.0}
    assert support["verdict"].startswith("extrapolates by 2× in pretraining tokens")
    assert support["heldout"]["mre"] < 0.005
    assert (support["heldout"]["by"], support["heldout"]["tokens"]) == (80 * B, 100 * B)
    assert support["heldout"]["predicted"] == support["heldout"]["seen"] == 0.05
    assert support["next"].endswith("to 200B tokens")


def test_within_the_runs_the_answer_is_supported_and_the_largest_share_is_named(stored: pd.DataFrame) -> None:
    given = asked(stored, 60 * B)
    assert given["decision"]["delta"] == 0.05
    assert given["support"]["verdict"].startswith("supported by the runs")
    assert given["support"]["outside"]["budget"] == 1
    assert "5% is the largest share that was run" in given["support"]["verdict"]
    assert given["support"]["next"].startswith("also run a share of 10%")
    truth = after(60 * B, 0.05, PARAMS, DOMAIN_TOKENS)
    # 1% replay raises the expected loss by up to 0.001 nats
    assert given["expected"]["domain"]["mean"] == pytest.approx(truth, rel=0.005)
    assert given["expected"]["of"]["tokens"] == 60 * B
    assert given["seen"]["tokens"] == 60 * B


def test_expected_losses_are_of_the_decided_replay(beyond: dict[str, Any]) -> None:
    assert [effect["injected"] for effect in beyond["replay"]["effects"]] == [0.0, 0.01]
    none, some = beyond["replay"]["effects"]
    assert some["general"] < 0.95
    assert some["pairs"] == 40
    assert beyond["decision"]["replay"] in (0.0, 0.01)
    row = next(row for row in beyond["shares"] if row["delta"] == 0.02)
    effect = none if beyond["decision"]["replay"] == 0 else some
    assert beyond["expected"]["general"]["mean"] == pytest.approx(row["general"]["mean"] * effect["general"])
    assert beyond["expected"]["of"]["injected"] == beyond["decision"]["replay"]


def test_a_smaller_corpus_is_answered_at_the_budget_of_equal_epochs(
    stored: pd.DataFrame, beyond: dict[str, Any]
) -> None:
    given = advise(domain_tokens=DOMAIN_TOKENS // 10, budget=20 * B, model=10 * PARAMS, table=stored)
    assert given["decision"]["delta"] == beyond["decision"]["delta"]
    assert given["decision"]["epochs"] == pytest.approx(beyond["decision"]["epochs"])
    assert given["shares"][0]["domain"] == beyond["shares"][0]["domain"]
    assert given["expected"]["of"] | {"injected": 0} == {
        "params": PARAMS,
        "domain_tokens": DOMAIN_TOKENS,
        "tokens": 200 * B,
        "injected": 0,
    }
    assert given["support"]["outside"] == {"budget": 2.0, "params": 10.0, "domain_tokens": 10.0, "epochs": 1.0}
    assert "10× in parameters, 10× in domain tokens" in given["support"]["verdict"]


def test_advice_is_valid_json_and_prints(beyond: dict[str, Any], monkeypatch: Any, capsys: Any) -> None:
    json.dumps(beyond, allow_nan=False)
    words = ["advise", "--domain-tokens", "300M", "--budget", "200B", "--model", str(PARAMS), "--runs", str(STORED)]
    monkeypatch.setattr(sys, "argv", ["spt-fast", *words, "--inference-tokens", "1T", "--max-general-rise", "20%"])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert said.startswith("SPT: pretrain with 2% domain data in all of 200B tokens, which reads the domain 13.3 times")
    for words in (
        "by laws fitted to the runs",
        "extrapolates by 2×",
        "finetuner's tax",
        "1T tokens served",
        "tokens: 200",
        "before finetuning the best share is 5%, the largest that was run: a larger one may be better",
    ):
        assert words in said


# ------------------------------------------------------------------------------------------------ without laws


def test_with_too_few_budgets_for_a_law_the_best_measured_arm_is_advised(one_budget: pd.DataFrame) -> None:
    given = asked(one_budget)
    assert (given["decision"]["delta"], given["decision"]["basis"]) == (0.02, "seen")
    assert given["shares"] is None
    assert "a law needs two shares or more with finetunes after at least 3 budgets" in given["missing"][-1]
    assert "no law of finetuned losses could be fitted" in given["support"]["verdict"]
    assert given["support"]["next"].startswith("add budgets")
    assert given["expected"]["domain"]["low"] <= given["expected"]["domain"]["mean"]
    assert given["regimes"]["FT"]["domain"]["mean"] > given["regimes"]["SPT"]["domain"]["mean"]


def test_a_budget_with_one_share_only_is_not_compared(one_budget: pd.DataFrame) -> None:
    alone = one_budget["pretrain_delta"] == 0.05
    longer = one_budget[alone].assign(pretrain_tokens=400.0 * B, run="longer " + one_budget["run"][alone])
    assert asked(pd.concat([one_budget, longer], ignore_index=True), 400 * B)["seen"]["tokens"] == 200 * B


def test_with_one_seed_chance_is_called_unknown(stored: pd.DataFrame) -> None:
    given = asked(stored[stored["seed"] == 0], 100 * B)
    spread = given["support"]["assumed_spread"]
    assert 0.001 < spread < 0.02
    assert (
        "with one seed it is unknown how much of the differences is chance: a standard deviation of "
        f"{100 * spread:.2g}% between seeds is assumed" in given["support"]["verdict"]
    )
    several = asked(stored, 100 * B)["support"]
    assert several["assumed_spread"] is None
    assert "is assumed" not in several["verdict"]
    assert "add seeds" in given["support"]["next"]


def test_a_budget_far_from_the_measured_one_gets_the_published_answer(one_budget: pd.DataFrame) -> None:
    given = asked(one_budget, 1000 * B)
    assert given["decision"]["basis"] == "published"
    assert given["expected"] is None
    assert "differ by 5× in pretraining tokens" in given["support"]["verdict"]
    limited = asked(one_budget, 1000 * B, max_general_rise=0.2)
    assert limited["decision"]["basis"] == "published"
    assert "max_general_rise is not used" in limited["missing"][-1]


def test_runs_with_one_share_get_the_published_answer() -> None:
    given = asked(spt_table(deltas=(0.02,), budgets=(200 * B,)))
    assert given["decision"]["basis"] == "published"
    assert "two shares of it or more" in given["missing"][-1]


def test_without_runs_the_answer_is_the_published_one() -> None:
    given = advise(domain_tokens=30_000_000, budget=20 * B, model="1b", inference_tokens=10**12)
    assert given["decision"]["basis"] == "published"
    assert given["decision"]["delta"] == given["prior"]["delta"] == 0.026
    assert given["missing"] == ["no runs were given"]
    limited = advise(domain_tokens=30_000_000, budget=20 * B, model="1b", max_general_rise=0.03)
    assert "max_general_rise is not used" in limited["missing"][-1]
    assert "not a measurement on your data" in given["support"]["verdict"]
    assert given["tax"]["larger"]["basis"] == "published"
    assert given["asked"]["params"] > 1e9
    json.dumps(given, allow_nan=False)


def test_the_answer_comes_from_the_runs_nearest_in_size_and_corpus() -> None:
    table = spt_table(
        deltas=(0.0, 0.02),
        budgets=(20 * B,),
        params=(PARAMS, 8 * PARAMS),
        domain_tokens=(DOMAIN_TOKENS // 10, DOMAIN_TOKENS),
    )
    for params in (PARAMS, 8 * PARAMS):
        given = advise(domain_tokens=DOMAIN_TOKENS // 9, budget=20 * B, model=params, table=table)
        of = given["expected"]["of"]
        assert (of["params"], of["domain_tokens"]) == (params, DOMAIN_TOKENS // 10)


# ------------------------------------------------------------------------------------------------ regimes and limits


def with_scpt(
    table: pd.DataFrame, factor: float, share: float = 0.01, start: float = 0.9, general: float = 1.0
) -> pd.DataFrame:
    """The table with SCPT runs: this share of domain text after this part of 200B tokens, and finetunes with `factor`
    times the domain loss and `general` times the general loss at 2%."""
    pretrained = table[(table["stage"] == 0) & (table["delta"] == 0)]
    rising = share * (pretrained["tokens"] - start * 200 * B).clip(lower=0)
    name, delta = f"late-{share:g}-{start:g}-", round(share * (1 - start), 9)
    late = pretrained.assign(
        run=name + pretrained["seed"].astype(str),
        delta=(rising / pretrained["tokens"]).fillna(0.0),
        domain_heldout=pretrained["domain_heldout"] * 0.99,
    )
    finetuned = table[(table["stage"] == 1) & (table["pretrain_delta"] == 0.02)]
    finetuned = finetuned[finetuned["pretrain_tokens"] == 200 * B]
    finetuned = finetuned.assign(
        run=name + finetuned["run"],
        after=name + finetuned["seed"].astype(str),
        pretrain_delta=delta,
        pretrain_epochs=delta * 200 * B / DOMAIN_TOKENS,
        domain_heldout=finetuned["domain_heldout"] * factor,
        general_heldout=finetuned["general_heldout"] * general,
        domain_before=late[late["tokens"] == 200 * B].set_index("seed")["domain_heldout"][finetuned["seed"]].to_numpy(),
    )
    return pd.concat([table, late.assign(injected=1 - late["delta"]), finetuned], ignore_index=True)


@pytest.mark.parametrize(("factor", "regime"), [(0.98, "SCPT"), (1.02, "SPT")])
def test_scpt_is_advised_if_its_runs_beat_spt(one_budget: pd.DataFrame, factor: float, regime: str) -> None:
    given = asked(with_scpt(one_budget, factor))
    assert given["regimes"]["SCPT"]["delta"] == 0.001
    assert given["decision"]["regime"] == regime
    assert given["decision"]["delta"] == (0.001 if regime == "SCPT" else 0.02)


@pytest.mark.parametrize(("share", "start"), [(0.01, 0.9), (0.05, 0.5), (0.4, 0.5), (0.02, 0.05)])
def test_scpt_is_advised_with_the_part_that_was_run(one_budget: pd.DataFrame, share: float, start: float) -> None:
    given = asked(with_scpt(one_budget, 0.97, share, start))
    decision = given["decision"]
    assert (decision["regime"], decision["domain_from"]) == ("SCPT", start)
    assert f"with {100 * share:g}% domain data in the last {100 * (1 - start):g}% of 200B" in decision["says"]
    early, late, _ = recipe_from(yaml.safe_load(given["recipe"])).phases
    assert (early.tokens, late.tokens) == (pytest.approx(200 * B * start), pytest.approx(200 * B * (1 - start)))
    assert "domain" not in early.mixture
    assert float(late.mixture["domain"]) == pytest.approx(share)


def test_scpt_of_one_share_and_several_parts_is_several_arms(one_budget: pd.DataFrame) -> None:
    given = asked(with_scpt(with_scpt(one_budget, 0.97, 0.002, 0.5), 0.96, 0.01, 0.9))
    late = [arm for arm in given["seen"]["arms"] if arm["regime"] == "SCPT"]
    assert [(arm["delta"], arm["domain_from"], arm["seeds"]) for arm in late] == [(0.001, 0.9, 2), (0.001, 0.5, 2)]
    assert given["decision"]["domain_from"] == 0.9
    assert given["expected"]["domain"] == late[0]["domain"]


def test_scpt_beyond_a_limit_on_the_general_loss_is_not_advised(one_budget: pd.DataFrame) -> None:
    table = with_scpt(one_budget, 0.97, general=1.3)
    within, beyond = (asked(table, max_general_rise=rise) for rise in (0.5, 0.2))
    assert [given["decision"]["regime"] for given in (within, beyond)] == ["SCPT", "SPT"]
    scpt = asked(with_scpt(one_budget, 0.97), max_general_rise=0.045)
    before = min(arm["general"]["mean"] - arm["forgetting"]["mean"] for arm in scpt["seen"]["arms"])
    assert scpt["decision"]["regime"] == "SCPT"
    assert scpt["decision"]["replay"] > 0
    assert scpt["expected"]["general"]["mean"] <= 1.045 * before


def test_the_gain_of_scpt_is_over_finetuning_alone_at_the_same_budget() -> None:
    table = spt_table(deltas=(0.0, 0.02), budgets=(50 * B, 100 * B, 200 * B), noise=1e-4)
    advice = advising.advise_pretraining(
        domain_tokens=DOMAIN_TOKENS, budget=390 * B, model=PARAMS, table=with_scpt(table, 0.97)
    )
    assert not any("without domain text in pretraining" in said for said in findings(advice)), "that is at 390B"
    given = as_json(advice)
    late, finetuned = (given["regimes"][regime]["domain"]["mean"] for regime in ("SCPT", "FT"))
    assert given["shares"]
    assert (given["decision"]["regime"], given["expected"]["of"]["tokens"]) == ("SCPT", 200 * B)
    assert given["expected"]["r_gain"] == pytest.approx(100 * (1 - late / finetuned))


def test_without_a_share_within_the_limit_the_nearest_one_with_a_forecast_is_advised() -> None:
    table = spt_table(deltas=(0.0, 0.02, 0.05), budgets=(50 * B, 100 * B, 200 * B), noise=1e-4)
    once = (table["pretrain_delta"] == 0) & (table["pretrain_tokens"] < 200 * B) & (table["stage"] == 1)
    table = table[~once].copy()
    table.loc[table["pretrain_tokens"] == 50 * B, "general_before"] = np.nan
    table.loc[table["pretrain_delta"] == 0, "general_heldout"] *= 0.8
    given = asked(table, max_general_rise=1e-4)
    assert (given["decision"]["basis"], given["decision"]["delta"]) == ("laws", 0.05)


def test_finetuning_only_is_advised_if_domain_data_in_pretraining_hurts(one_budget: pd.DataFrame) -> None:
    worse = one_budget["domain_heldout"] * np.where(one_budget["pretrain_delta"] > 0, 1.2, 1)
    given = asked(one_budget.assign(domain_heldout=worse))
    assert (given["decision"]["regime"], given["decision"]["delta"]) == ("FT", 0.0)
    assert given["decision"]["says"].startswith("FT only")
    assert given["regimes"]["says"][0].index("FT only") < given["regimes"]["says"][0].index("SPT")


def test_a_limit_on_the_general_loss_is_met_by_replay_first_and_then_by_the_share(one_budget: pd.DataFrame) -> None:
    free, loose, tight, none = (asked(one_budget, max_general_rise=rise) for rise in (0.2, 0.07, 0.045, 0.001))
    assert [a["decision"]["replay"] for a in (free, loose, tight)] == [0.0, 0.01, 0.05]
    assert [a["decision"]["delta"] for a in (free, loose, tight)] == [0.02, 0.02, 0.02]
    before = min(arm["general"]["mean"] - arm["forgetting"]["mean"] for arm in tight["seen"]["arms"])
    assert tight["expected"]["general"]["mean"] <= 1.045 * before
    assert loose["expected"]["general"]["mean"] <= 1.07 * before
    assert "no pair of share and replay that was run keeps the general loss within 0.001" in none["missing"][-1]
    assert (none["decision"]["delta"], none["decision"]["replay"]) == (0.05, 0.05)


def test_a_limit_on_the_general_loss_changes_the_share_if_no_replay_was_run(one_budget: pd.DataFrame) -> None:
    plain = one_budget[one_budget["stage"].eq(0) | one_budget["injected"].eq(0)]
    assert asked(plain, max_general_rise=0.2)["decision"]["delta"] == 0.02
    assert asked(plain, max_general_rise=0.12)["decision"]["delta"] == 0.05


def test_the_forgetting_law_gives_the_replay_if_none_that_was_run_keeps_the_limit() -> None:
    table = spt_table(
        deltas=(0.0, 0.001),
        budgets=(200 * B,),
        params=(PARAMS, 3 * PARAMS, 9 * PARAMS),
        domain_tokens=(DOMAIN_TOKENS // 10, DOMAIN_TOKENS),
        injected=(0.0, 0.001, 0.01),
        noise=1e-4,
    )
    given = asked(table, max_general_rise=0.05)
    assert given["replay"]["basis"] == "law"
    before = given["seen"]["arms"][0]["general"]["mean"] - given["seen"]["arms"][0]["forgetting"]["mean"]
    truth = FORGETTING.injection(params=PARAMS, unique_tokens=DOMAIN_TOKENS, max_rise=0.05 * before)
    assert given["decision"]["replay"] == pytest.approx(truth, rel=0.1)
    recipe_from(yaml.safe_load(given["recipe"]))


# ------------------------------------------------------------------------------------------------ recipes and input


@pytest.mark.parametrize(
    ("domain_tokens", "budget", "mixtures"),
    [
        (30_000_000, 20 * B, [{"general": 0.974, "domain": 0.026}, {"domain": 1}]),
        (
            3_000_000,
            200 * B,
            [{"general": 1}, {"general": 0.9975, "domain": 0.0025}, {"general": 0.01, "domain": 0.99}],
        ),
    ],
)
def test_the_recipe_is_valid_and_carries_out_the_decision(
    domain_tokens: int, budget: int, mixtures: list[dict[str, float]]
) -> None:
    given = advise(domain_tokens=domain_tokens, budget=budget, model="1b")
    recipe = recipe_from(yaml.safe_load(given["recipe"]))
    assert [{name: float(share) for name, share in phase.mixture.items()} for phase in recipe.phases] == mixtures
    assert sum(phase.tokens for phase in recipe.phases[:-1]) == budget
    assert recipe.phases[-1].tokens == pytest.approx(5 * domain_tokens, rel=0.02)
    assert recipe.phases[-1].stop


def test_learning_rates_are_those_of_the_runs_if_the_model_is_about_as_large() -> None:
    table = pd.read_csv(STORED).fillna({"after": ""})
    table.loc[(table["stage"] == 1) & (table["seed"] == 1), "lr"] = 3e-4
    for size, of, pretrain, finetune in (
        (2 * PARAMS, "the runs'", 1e-3, (1e-4, 3e-4)),
        (4 * PARAMS, "the paper's", 4e-4, (1e-5, 4e-5, 1e-4)),
    ):
        given = advise(domain_tokens=DOMAIN_TOKENS, budget=200 * B, model=size, table=table)
        recipe = recipe_from(yaml.safe_load(given["recipe"]))
        assert given["learning_rates"].startswith(of)
        assert recipe.phases[0].optimizer.lr == pretrain
        assert (recipe.phases[-1].grid or {})["lr"] == finetune


@pytest.mark.parametrize(
    ("size", "window", "batches", "comment"),
    [
        (
            PARAMS,
            2048,
            [(64, 1024), (16, 1024)],
            "the runs' 32 windows of 2,048 tokens a step are 64 windows of 1,024",
        ),
        (3 * PARAMS, 2048, [(32, 2048), (8, 2048)], ""),
        (3 * PARAMS, 500, [(8, 2048), (2, 2048)], "the runs' 32 windows of 500 tokens a step are 8 windows of 2,048"),
        (
            4 * PARAMS,
            2048,
            [(32, 2048), (16, 2048)],
            "the batch of 32 windows of 2,048 tokens a step and the rates of the",
        ),
    ],
)
def test_the_recipe_has_the_batch_that_its_rates_were_tuned_with_and_plans(
    size: int,
    window: int,
    batches: list[tuple[int, int]],
    comment: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In windows of the model's context, with the runs' tokens a step; their 32 windows in pretraining and 8 in the
    finetune are not for a model of another size, which gets the published rates."""
    table = read_table([STORED]).assign(window=float(window))
    table["sequences"] = np.where(table["stage"] == 0, 32.0, 8.0)
    rates = rates_of(usable(table), PARAMS, size, 0.02)
    decision = Decision("SPT", 0.02, "laws", epochs=1, replay=0, says="")
    text = next_step(decision, preset=nearest_preset(size), budget=B, finetune_tokens=10**7, rates=rates)
    Path(tmp_path / "recipe.yaml").write_text(text)
    comments = [line.removeprefix("# ") for line in text.splitlines() if line.startswith("#")]
    assert " ".join(comments).startswith(comment)
    assert bool(comments) == bool(comment)
    for name in ("general", "domain", "general.heldout", "domain.heldout"):
        write_dataset(tmp_path / "data" / name, len(name), 10_000, vocab=PRESETS["124m"]["vocab_size"])
    monkeypatch.chdir(tmp_path)
    recipe = spt.load_recipe("recipe.yaml", ["tokenizer=null"])
    assert [(phase.batch.sequences, phase.batch.context) for phase in recipe.phases] == batches
    steps = [figures.tokens // figures.steps for figures in spt.plan(recipe).phases]
    assert steps == [sequences * window for sequences, window in batches]


def test_a_recipe_says_that_the_batch_of_its_rates_is_unknown() -> None:
    old = read_table([STORED])
    decision = Decision("SPT", 0.02, "laws", epochs=1, replay=0, says="")
    for table, says in (
        (old, "# the batch of the runs, which these rates"),
        (None, "# the batch is a default"),
    ):
        rates = rates_of(None if table is None else usable(table), PARAMS, PARAMS, 0.02)
        text = next_step(decision, preset="124m", budget=B, finetune_tokens=10**7, rates=rates)
        assert text.startswith(says)
        assert "  batch: {sequences: 32, context: 1024}\n" in text


@pytest.mark.parametrize(
    ("stage", "batches", "says"),
    [
        (0, [32, 8], ("the runs' pretraining, which", "of pretraining is a default: tune its learning rates")),
        (1, [16, 32], ("the runs' finetunes, which", "of the finetune is a default: tune its learning rates")),
    ],
)
def test_a_recipe_names_the_phase_whose_batch_is_a_default(
    stage: int, batches: list[int], says: tuple[str, str]
) -> None:
    """If the other phase has that of the runs."""
    table = read_table([STORED])
    table = table.assign(sequences=np.where(table["stage"] == 0, 16.0, 8.0), window=1024.0)
    table.loc[table["stage"] == stage, ["sequences", "window"]] = np.nan
    rates = rates_of(usable(table), PARAMS, PARAMS, 0.02)
    decision = Decision("SPT", 0.02, "laws", epochs=1, replay=0, says="")
    text = next_step(decision, preset="124m", budget=B, finetune_tokens=10**7, rates=rates)
    assert all(f"the batch {of_one}" in text.replace("\n# ", " ") for of_one in (f"of {says[0]}", says[1]))
    phases = recipe_from(yaml.safe_load(text)).phases
    assert [phase.batch.sequences for phase in phases] == batches


@pytest.mark.parametrize(("tokens", "sequences"), [(15_000, 1), (10**6, 16), (10**8, 32)])
def test_a_default_batch_leaves_a_finetune_200_steps(tokens: int, sequences: int) -> None:
    decision = Decision("SPT", 0.02, "published", epochs=1, replay=0.01, says="")
    text = next_step(decision, preset="1m", budget=B, finetune_tokens=tokens)
    phases = recipe_from(parse_yaml(text, "recipe")).phases
    assert [phase.batch.sequences for phase in phases] == [32, sequences]


@pytest.mark.parametrize("delta", [1 / 49, 0.020833333333333332, 1 / 3, 0.05])
def test_shares_of_a_recipe_sum_to_one(delta: float) -> None:
    decision = Decision("SPT", delta, "laws", epochs=1, replay=1 / 97, says="")
    text = next_step(decision, preset="1m", budget=10**9, finetune_tokens=1e6)
    first, last = recipe_from(yaml.safe_load(text)).phases
    assert sum(first.mixture.values()) == sum(last.mixture.values()) == 1
    assert float(first.mixture["domain"]) == pytest.approx(delta, rel=1e-3)
    assert float(last.mixture["general"]) == pytest.approx(1 / 97, rel=1e-3)


@pytest.mark.parametrize(("tokens", "warmup"), [(12_467, "5%"), (8_192_000, "50 steps")])
def test_a_recipe_warms_its_finetune_up_for_a_part_of_its_steps(tokens: int, warmup: str) -> None:
    """Where it is short: train refuses 50 steps of warm-up in a phase of two."""
    decision = Decision("SPT", 0.1, "laws", epochs=1, replay=0, says="")
    recipe = recipe_from(yaml.safe_load(next_step(decision, preset="1m", budget=80_000, finetune_tokens=tokens)))
    assert str(recipe.phases[-1].schedule.warmup) == warmup
    check_lengths(recipe, PRESETS["1m"]["context"])


def test_a_recipe_counts_in_units_and_has_the_size_of_the_runs(one_budget: pd.DataFrame) -> None:
    assert [exact_count(n) for n in (999, 28_000, 39_972, 1_250_000, 20 * B)] == [999, "28K", 39_972, "1.25M", "20B"]
    one_share = one_budget[one_budget["run"].str.contains("-5%-")].assign(params=9e5)
    given = advise(domain_tokens=DOMAIN_TOKENS, budget=200 * B, table=one_share)
    assert given["decision"]["basis"] == "published"
    assert recipe_from(yaml.safe_load(given["recipe"])).model.preset == "1m"


def test_the_distance_of_the_domain_is_measured_on_given_datasets(tmp_path: Path, one_budget: pd.DataFrame) -> None:
    general, domain = (write_dataset(tmp_path / name, seed, 3000) for seed, name in enumerate(("general", "domain")))
    given = asked(one_budget, general=general, domain=domain)
    assert given["distance"]["divergence"]["unigrams"] >= 0
    assert given["distance"]["domain_after_plain_finetuning"] == given["regimes"]["FT"]["domain"]["mean"]
    assert str(general) in given["recipe"]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"model": "1bb"}, "model: '1bb' is invalid: give a preset (did you mean '1b'?)"),
        ({"model": None, "inference_tokens": 10}, "model: missing"),
        ({"general": "a"}, "general: a distance needs two datasets; add `domain=PREFIX`"),
        ({"domain": "a"}, "domain: a distance needs two datasets; add `general=PREFIX`"),
        (
            {"max_general_rise": 3.0},
            "max_general_rise: 3.0 is invalid: write a share between 0 and 1; did you mean 3.0%?",
        ),
        ({"domain_tokens": 0}, "domain_tokens: 0 is invalid: write a positive whole number"),
    ],
)
def test_invalid_arguments_are_named_with_a_remedy(more: dict[str, Any], says: str) -> None:
    with pytest.raises(RecipeError) as caught:
        advise(**{"domain_tokens": 10**7, "budget": B} | more)
    assert says in str(caught.value)


def test_one_pair_of_finetunes_gives_no_error_of_the_effect() -> None:
    runs = pd.DataFrame({"injected": [0.0, 0.0, 0.01, 0.01], "seed": [0, 1, 0, 1]})
    runs = runs.assign(regime="FT", domain_from=0.0, pretrain_delta=0.0, pretrain_tokens=B, general_heldout=3.0)
    runs["domain_heldout"] = [2.0, 4.0, 2.1, 4.4]
    _, both = effects(runs)
    assert (both.domain, both.domain_error) == (pytest.approx(1.075), pytest.approx(0.025))
    none, one = effects(runs[runs["seed"] == 0])
    assert (none.domain_error, one.domain, one.domain_error) == (None, pytest.approx(1.05), None)
    assert costless([none, replace(one, general=0.9)]) is none
    nan = float("nan")
    measured = runs.assign(general_heldout=[nan, nan, 3.0, 3.0])
    assert costless(effects(measured)).injected == 0.01, "the smallest share whose general loss was measured"
    advice: Any = SimpleNamespace(replay=SimpleNamespace(effects=[none, one]))
    table = effects_table(advice)
    assert table is not None
    assert [*table.columns[2].cells] == ["1.0000", "1.0500"]


def test_a_limit_needs_general_losses(one_budget: pd.DataFrame) -> None:
    for missing, says in (
        (["general_heldout", "general_before"], "; set"),
        (["general_before"], " before the finetune"),
    ):
        with pytest.raises(DataError, match=f"have no general losses{says}"):
            asked(one_budget.assign(**dict.fromkeys(missing, np.nan)), max_general_rise=0.1)


@pytest.mark.filterwarnings("ignore::spt_fast.laws.IdentificationWarning")
@pytest.mark.parametrize(("study", "within"), [("2026-11-29-cpu2-spt-abc", 0.6), ("2026-11-21-cpu2-spt-music", 1.5)])
def test_the_gain_that_laws_predict_for_a_stored_study_is_the_measured_one(study: str, within: float) -> None:
    """At the largest budget they differ by at most `within` percentage points."""
    table = read_table([Path(__file__).parents[2] / "benchmarks" / "results" / f"{study}.csv"])
    ((_, rows),) = views.post_finetuning(usable(table))
    law = laws.PostFinetuneLaw().fit(rows)
    deltas, most = np.array(law.fractions_), rows["tokens"].max()
    measured = rows[rows["tokens"] == most].groupby("fraction")["finetuned_loss"].mean().to_numpy()
    expected = law.predict(tokens=most, fraction=deltas)
    assert 100 * (1 - expected / expected[0]) == pytest.approx(100 * (1 - measured / measured[0]), abs=within)
    asked = {name: rows[name].to_numpy() for name in ("tokens", "fraction")}
    _, low, high = law.predict(**asked, interval=0.9)
    assert ((low <= rows["finetuned_loss"]) & (rows["finetuned_loss"] <= high)).mean() >= 0.8
