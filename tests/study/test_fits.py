"""The laws of a study, fitted to runs of known laws: what is recovered, the error on runs that were not fitted, and the
message if there are too few runs. And `spt-fast fit`."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from spt_fast import cli
from spt_fast.errors import RecipeError
from spt_fast.laws.fitting import solve
from spt_fast.study import fits, views
from spt_fast.study.fits import LAWS, Fitted, fit_laws, holdout_error
from spt_fast.study.runs_table import load_table, save_table
from spt_fast.study.usable import usable
from tests.study.synthetic import (
    CORPUS_EXPONENT,
    FORGETTING,
    PARAMS,
    SIZE_EXPONENT,
    after,
    dcpt_table,
    spt_table,
)
from tests.synthetic_runs import DOMAIN, OVERFITTING

SIZES = (41_000_000, PARAMS, 334_000_000)
SPT = spt_table()
DCPT = dcpt_table()
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def fitted(table: pd.DataFrame, law: str, draws: int = 10) -> Fitted:
    one = fit_laws(table, law, draws=draws)
    assert len(one) == 1
    return one[0]


def relative_error(predicted: Any, true: Any) -> np.ndarray:
    return np.abs(np.asarray(predicted) / np.asarray(true) - 1)


def test_fitting_does_not_import_torch_matplotlib_and_scipys_statistics() -> None:
    """Importing them takes longer than a fit."""
    modules = "spt_fast.cli, spt_fast.study.crossover, spt_fast.study.findings, spt_fast.study.runs_table"
    found = f"import sys, {modules}; assert not {{'torch', 'matplotlib', 'scipy.stats'}} & sys.modules.keys()"
    assert subprocess.run([sys.executable, "-c", found], check=False, capture_output=True).returncode == 0


# -------------------------------------------------------------------------------------------- the laws that were drawn


def test_the_overfitting_law_is_recovered() -> None:
    one = fitted(SPT, "overfitting")
    assert (one.runs, one.rows, one.problem) == (12, 12 * 18, None)
    given = {"tokens": np.array([40e9, 120e9, 200e9]), "fraction": np.array([0.002, 0.02, 0.05])}
    assert one.law is not None
    assert relative_error(one.law.predict(**given), OVERFITTING.predict(**given)).max() < 0.005
    assert one.score.r2 > 0.99
    assert one.score.mre == pytest.approx(0.003 * np.sqrt(2 / np.pi), rel=0.3)  # the noise
    assert set(one.parameters) == set(one.law.params_)
    for name in ("alpha1", "alpha2", "b_gap_s"):  # the kappas and A_train are not identified separately
        assert one.parameters[name].low < OVERFITTING.params_[name] < one.parameters[name].high


def test_the_post_finetuning_law_is_recovered() -> None:
    one = fitted(SPT, "post-finetuning")
    assert one.law is not None
    for delta in (0.0, 0.01, 0.05):
        predicted = one.law.predict(tokens=120e9, fraction=delta)
        assert relative_error(predicted, after(120e9, delta, PARAMS, 300_000_000)) < 0.005


def test_a_table_that_is_there_twice_gives_the_same_law() -> None:
    table = spt_table(deltas=(0.0, 0.02), budgets=(50 * 10**9, 100 * 10**9, 200 * 10**9))
    once, twice = (fit_laws(rows, "post-finetuning", draws=3) for rows in (table, pd.concat([table, table])))
    assert once[0].law is not None
    assert once[0].as_json() == twice[0].as_json()


def test_no_error_is_given_for_a_corpus_size_predicted_from_a_single_other() -> None:
    """The exponent of a variable that is constant in the fitted runs stays where the search began."""
    table = spt_table(
        deltas=(0.0,), budgets=(100_000_000_000,), params=SIZES, domain_tokens=(3_000_000, 30_000_000), noise=0.001
    )
    one = fitted(table, "forgetting")
    assert one.law is not None
    assert "largest params" in one.holdout
    assert "largest unique_tokens" not in one.holdout


@pytest.mark.filterwarnings("ignore::spt_fast.laws.LawWarning")
def test_the_dcpt_law_of_real_runs_reaches_the_minimum_of_a_flat_valley() -> None:
    """On the way of E to its bound the cost falls by only 1e-4 of itself; a search that stops early leaves E where it
    began."""
    [(_, table)] = views.dcpt(usable(load_table(RESULTS / "2026-11-21-cpu2-dcpt-chem.csv")), of="general")
    fit = LAWS["dcpt-general"].make().fit(table)._fits["loss"]
    assert fit.values["E"] == pytest.approx(1e-3)
    assert solve(fit.curve, starts=[fit.x]) == pytest.approx(fit.x, abs=1e-3)


def test_the_forgetting_and_finetuning_laws_are_recovered() -> None:
    table = spt_table(
        deltas=(0.0,),
        budgets=(100_000_000_000,),
        params=SIZES,
        domain_tokens=(3_000_000, 30_000_000, 300_000_000),
        injected=(0.0, 0.005, 0.05),
        noise=0.001,
    )
    forgetting, finetuning = (fitted(table, law) for law in ("forgetting", "finetuning"))
    assert forgetting.law is not None
    for name, near in {"alpha": 0.05, "beta": 0.05, "B": 0.3}.items():
        assert forgetting.law.params_[name] == pytest.approx(FORGETTING.params_[name], rel=near)
    assert set(forgetting.holdout) == {"largest params", "largest unique_tokens", "largest injected"}
    assert finetuning.law is not None
    predicted = finetuning.law.predict(params=200e6, unique_tokens=100e6)
    assert relative_error(predicted, after(100e9, 0.0, 200_000_000, 100_000_000)) < 0.003
    exponents = finetuning.law.params_["alpha"] / finetuning.law.params_["beta"]
    assert exponents == pytest.approx(SIZE_EXPONENT / CORPUS_EXPONENT, rel=0.1)


def test_the_dcpt_law_is_recovered_quickly() -> None:
    began = time.process_time()
    one = fitted(DCPT, "dcpt-domain", draws=50)
    assert time.process_time() - began < 5
    assert one.law is not None
    given = {"params": 1e9, "tokens": 15e9, "own_ratio": np.array([0.15, 0.4, 0.75])}
    assert relative_error(one.law.predict(**given), DOMAIN.predict(**given)).max() < 0.005
    assert one.holdout["each inner ratio"].mre < 0.005
    assert one.holdout["each inner ratio"].r2 > 0.99


def test_chinchilla_and_data_constrained_are_fitted_if_their_runs_exist() -> None:
    table = spt_table(deltas=(0.0, 1.0), seeds=(0,), params=SIZES, domain_tokens=(3_000_000_000, 30_000_000_000))
    chinchilla = fitted(table, "chinchilla")
    assert chinchilla.group == {"delta": 0}
    assert chinchilla.score.mre < 0.004
    assert chinchilla.holdout["last 40% of budget"].mre < 0.004
    assert fitted(table, "data-constrained").law is not None


def test_rows_are_thinned_evenly_in_every_run() -> None:
    table = dcpt_table(deltas=(0.0, 0.3, 0.6, 1.0), evaluations=60)
    frame = fitted(table, "dcpt-domain", draws=2).table
    per_run = frame.groupby("run")["tokens"].agg(["size", "max"])
    assert per_run["size"].tolist() == [150 // 8] * 8
    assert (per_run["max"] == table["tokens"].max()).all()
    spacing = frame[frame["run"] == frame["run"].iloc[0]]["tokens"].diff().dropna()
    assert spacing.max() <= 2 * spacing.min()


# --------------------------------------------------------------------------------------------------- how far to trust


def test_the_held_out_error_is_measured_on_rows_that_were_not_fitted() -> None:
    """Every loss at the largest fraction is 25% too high, which no other row shows."""
    ((_, frame),) = views.overfitting(usable(SPT))
    honest = holdout_error("overfitting", frame)
    assert honest["last 40% of budget"].mre < 0.004
    assert honest["largest fraction"].rows == 2 * 18
    largest = frame["fraction"] == 0.05
    frame.loc[largest, ["heldout_loss", "train_loss"]] *= 1.25
    wrong = holdout_error("overfitting", frame)
    assert wrong["largest fraction"].mre == pytest.approx(0.25, abs=0.03)
    late = frame["tokens"] > 120e9
    frame.loc[largest, ["heldout_loss", "train_loss"]] /= 1.25
    frame.loc[late, ["heldout_loss", "train_loss"]] *= 1.25
    wrong = holdout_error("overfitting", frame)
    assert wrong["last 40% of budget"].mre == pytest.approx(0.25, abs=0.01)
    assert wrong["last 40% of budget"].rows == late.sum()


def test_every_inner_ratio_is_predicted_from_the_others() -> None:
    ((_, frame),) = views.dcpt(usable(dcpt_table(deltas=(0.0, 0.2, 0.4, 0.6, 0.8, 1.0), evaluations=6)), of="domain")
    one_off = frame.assign(loss=frame["loss"].where(frame["own_ratio"] != 0.4, 1.2 * frame["loss"]))
    error = holdout_error("dcpt-domain", one_off)["each inner ratio"]
    assert error.rows == (frame["own_ratio"].between(0.1, 0.9)).sum() == 4 * 12
    assert error.mre > 0.2 / 4


def test_a_budget_of_a_single_curve_that_is_too_short_without_it_is_not_predicted() -> None:
    """The largest budget was run only at 2%; without it, 2% has two budgets, too few for a curve."""
    largest, few = SPT["pretrain_tokens"] == 200e9, SPT["pretrain_tokens"].isin([20e9, 50e9])
    at_2 = SPT["pretrain_delta"] == 0.02
    one = fitted(SPT[~(largest & ~at_2) & ~(few & at_2)], "post-finetuning")
    assert 0.02 in set(one.table["fraction"])
    assert one.holdout == {}


def test_the_start_of_cmr_curves_is_never_held_out() -> None:
    """The row at tokens = 0 has the ratio of the table's first run, here an inner one; CMR needs this row."""
    table = dcpt_table(deltas=(0.5, 0.0, 0.25, 0.75, 1.0), params=(200_000_000,))
    ((_, frame),) = views.cmr(usable(table))
    assert frame["domain_ratio"][frame["tokens"] == 0].tolist() == [0.5]
    assert fits.Fitted("cmr", {}, frame).runs == 5, "it is no run"
    error = holdout_error("cmr", frame)["every other ratio"]
    assert error.rows == 3 * 12
    assert error.mre < 0.01


def test_a_part_that_the_fit_needs_is_not_predicted() -> None:
    one = fitted(spt_table(deltas=(0.001, 0.005, 0.01, 0.05), seeds=(0,)), "overfitting")
    assert set(one.holdout) == {"last 40% of budget"}


# ----------------------------------------------------------------------------------------------------- what is missing


def test_each_law_that_is_not_fitted_names_what_is_missing() -> None:
    problems = {one.law_name: one for one in fit_laws(spt_table(deltas=(0.0, 0.01, 0.05), budgets=(10**10, 10**11)))}
    assert list(problems) == list(fits.LAWS)
    assert [law for law, one in problems.items() if one.law] == ["mixture-repetition"]
    for law, says in {
        "overfitting": "needs runs at 4 fractions or more to fit its train curve; the table has 0, 0.01, 0.05",
        "post-finetuning": "from three pretraining budgets or more; there are at most 4, at 2 token counts",
        "forgetting": "the runs have params 109M; unique_tokens 300M; injected 0",
        "dcpt-domain": "needs continued pretraining at four domain shares or more, 20% apart",
        "cmr": "the runs have domain_ratio 1",
        "chinchilla": "needs pretraining from scratch at two model sizes or more of one domain share",
        "data-constrained": "(delta 1), of two corpus sizes or more, each with several budgets; there",
    }.items():
        assert says in (problems[law].problem or "")


def test_groups_with_the_same_problem_are_merged() -> None:
    one = fitted(SPT, "forgetting")
    assert one.group == {"pretrain_delta": 0}
    assert one.runs == 5 * 2


def test_a_curve_that_is_too_short_is_left_out_with_a_warning() -> None:
    short = (SPT["pretrain_delta"] == 0.02) & (SPT["pretrain_tokens"] > 50e9)
    one = fitted(SPT[~short], "post-finetuning")
    assert one.law is not None
    assert set(one.table["fraction"]) == {0.0, 0.001, 0.005, 0.01, 0.05}
    assert any(warning.startswith("left out fraction 0.02") for warning in one.warnings)


def test_finetunes_with_little_replay_do_not_count_as_continued_pretraining() -> None:
    table = spt_table(deltas=(0.0,), seeds=(0,), injected=(0.0, 0.005, 0.01, 0.05))
    for law in ("dcpt-domain", "dcpt-general", "cmr"):
        assert "20% apart" in (fitted(table, law).problem or "")


def test_fraction_0_is_left_out_of_the_overfitting_law_if_it_distorts_the_fit() -> None:
    """Without domain text in pretraining, the domain loss may not fall at all."""
    plain = (SPT["stage"] == 0) & (SPT["delta"] == 0)
    assert 0.0 in set(fitted(SPT, "overfitting").table["fraction"])
    rising = SPT.assign(domain_heldout=SPT["domain_heldout"].where(~plain, 5 - SPT["domain_heldout"]))
    one = fitted(rising, "overfitting")
    assert one.table["fraction"].min() == 0.001
    assert one.score.mre < 0.004
    assert any(warning.startswith("left out fraction 0: with it the law is ") for warning in one.warnings)
    three = (rising["delta"] == 0.02) | (rising["delta"] == 0.05)
    assert 0.0 in set(fitted(rising[~three], "overfitting").table["fraction"])  # three others are too few


def test_undetermined_parameters_are_warnings_of_the_fit_and_not_python_warnings() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one = fit_laws(spt_table(deltas=(0.0,), injected=(0.0, 0.001, 0.01, 0.05)), "forgetting", draws=2)[0]
    assert one.law is not None
    says = "these runs do not determine beta; judge the law by its predictions, or add runs that differ in what these"
    assert [warning.startswith(says) for warning in one.warnings] == [True]


def test_two_sizes_do_not_determine_the_exponent_of_size_and_the_fit_asks_for_a_third() -> None:
    two, three = (
        fitted(spt_table(deltas=(0.0,), seeds=(0,), params=SIZES[:sizes]), "chinchilla", draws=2) for sizes in (2, 3)
    )
    assert two.law is not None
    assert {"E", "A", "alpha"} <= set(two.law.unidentified_)
    assert any(warning.endswith("run a third value of params, which an exponent needs") for warning in two.warnings)
    assert not any("a third value" in warning for warning in three.warnings)


def test_other_warnings_of_a_law_are_warnings_of_its_fit() -> None:
    one = fitted(DCPT, "dcpt-general")
    assert any("the fitted loss rises with own_ratio in" in warning for warning in one.warnings)


def test_an_unknown_law_is_refused() -> None:
    with pytest.raises(
        RecipeError, match="law: 'overfiting' is invalid: write the name of a law; did you mean 'overfitting'"
    ):
        fit_laws(SPT, "overfiting")


# ------------------------------------------------------------------------------------------------------ spt-fast fit


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    save_table(spt_table(seeds=(0,)), folder)
    return folder


def said(capsys: pytest.CaptureFixture[str], *words: object, fails: bool = False) -> str:
    sys.argv = ["spt-fast", "fit", *map(str, words)]
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    printed = capsys.readouterr()
    assert exit_.value.code == (2 if fails else 0), printed.err
    return printed.err if fails else printed.out


def test_fit_prints_laws_and_what_is_missing(
    study: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli.studies, "out", Console(highlight=False, width=80))
    lines = said(capsys, study)
    assert max(map(len, lines.splitlines())) <= 80
    text = " ".join(lines.split())
    for part in (
        "109M parameters, 300M domain",
        "largest fraction",
        "last 40% of budget",
        "- overfitting, 109M parameters, 300M domain tokens, with 90% intervals: A_train ",
        "- not fitted: cmr, 109M parameters, 300M domain tokens, after NPT: needs continued pretraining",
    ):
        assert part in text
    assert "a[0.01]" not in text
    assert re.search(r"mixture-repetition.*: E \S+ \(not determined\), A", text)
    assert "a[0.01]" in said(capsys, study, "--law", "post-finetuning")


def test_fit_as_json_is_what_out_writes(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = json.loads(said(capsys, study / "table.csv", "--law", "overfitting", "--json", "--out", tmp_path / "fits"))
    assert json.loads((tmp_path / "fits" / "fits.json").read_text()) == result
    (law,) = result["laws"]
    assert law["group"] == {"params": PARAMS, "domain_tokens": 300_000_000}
    assert (law["law"], law["runs"], law["rows"], law["problem"]) == ("overfitting", 6, 108, None)
    parameter = law["parameters"]["b_gap_s"]
    assert parameter["low"] < parameter["value"] < parameter["high"]
    assert set(law["score"]) == {"r2", "huber", "mre"}
    assert set(law["holdout"]["largest fraction"]) == {"r2", "mre", "rows"}
    assert result["notes"] == []
    assert result["behind"]["domain"] == {"documents": 40, "tokens": 6000, "standard_error": 0.01}


def test_fit_prints_the_text_behind_its_losses(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "domain 40 documents, 6,000 tokens, standard error" in " ".join(said(capsys, study, "--law", "cmr").split())
    columns = [f"{corpus}_{name}" for corpus in ("domain", "general") for name in ("documents", "scored", "error")]
    save_table(load_table(study / "table.csv").assign(**dict.fromkeys(columns, np.nan)), tmp_path)
    assert "is not recorded for these losses" in " ".join(said(capsys, tmp_path, "--law", "cmr").split())


def test_fit_prints_what_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = spt_table(seeds=(0,))
    gone = table[:1].assign(run="the-one-that-failed", status="failed")
    save_table(pd.concat([table, gone], ignore_index=True), tmp_path)
    note = "left out, because they failed: the-one-that-failed"
    assert json.loads(said(capsys, tmp_path, "--law", "cmr", "--json"))["notes"] == [note]
    assert f"- {note}\n" in said(capsys, tmp_path, "--law", "cmr")


def test_fit_names_the_sources_of_runs_that_belong_to_no_study(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def read_table(paths: Any, *, domain_source: str | None, general_source: str | None) -> pd.DataFrame:
        assert (list(map(str, paths)), domain_source, general_source) == (["a", "b"], "chem", "web")
        return SPT

    monkeypatch.setattr("spt_fast.study.runs_table.read_table", read_table)
    said(capsys, "a", "b", "--domain-source", "chem", "--general-source", "web", "--law", "cmr")


def test_fit_refuses_in_one_message(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = said(capsys, study, "--law", "chinchila", fails=True)
    assert message == "spt-fast: --law: 'chinchila' is invalid: write the name of a law; did you mean 'chinchilla'?\n"
    other = tmp_path / "other"
    other.mkdir()
    save_table(spt_table(seeds=(0,)).assign(tokenizer="feedbeef", seed=7), other)
    message = said(capsys, study, other, fails=True)
    assert "differ in tokenizer (4f5ca1b2 and feedbeef)" in message
    assert message.count("\n") == 1
