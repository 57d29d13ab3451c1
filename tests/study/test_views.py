"""The rows and columns that each law gets from a runs table, and what is left out or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from spt_fast.errors import DataError
from spt_fast.study import views
from spt_fast.study.runs_table import COLUMNS, load_table, save_table, table_of
from spt_fast.study.usable import NUMBERS, usable
from tests.study.fake_runs import fake_run
from tests.study.synthetic import DOMAIN_TOKENS, PARAMS, dcpt_table, spt_table

SMALL = 41_000_000
SPT = spt_table(deltas=(0.0, 0.01, 0.05), budgets=(20_000_000_000, 100_000_000_000), injected=(0.0, 0.02))
DCPT = dcpt_table()


def only(groups: list[views.Group]) -> tuple[dict[str, Any], pd.DataFrame]:
    assert len(groups) == 1
    return groups[0]


def renamed(table: pd.DataFrame, suffix: str, **columns: Any) -> pd.DataFrame:
    after = table["after"].where(~table["after"].isin(table["run"]), table["after"] + suffix)
    return table.assign(run=table["run"] + suffix, after=after, **columns)


def worse(table: pd.DataFrame, by: float) -> pd.DataFrame:
    """The same runs with another rate and all domain losses `by` higher."""
    losses = [f"domain_{name}" for name in ("train", "heldout", "select", "before")]
    return renamed(table, "-other", lr=3 * table["lr"], **{name: table[name] + by for name in losses})


# ------------------------------------------------------------------------------------------------------- pretraining


def test_overfitting_uses_the_curves_of_pretraining() -> None:
    group, frame = only(views.overfitting(usable(SPT)))
    assert group == {"params": PARAMS, "domain_tokens": DOMAIN_TOKENS}
    rows = SPT[(SPT["stage"] == 0) & (SPT["tokens"] >= 0.2 * SPT["tokens"].max())]
    assert len(frame) == len(rows) == 3 * 2 * 17  # the first fifth of twenty evaluations is not settled
    assert set(frame["run"]) == set(rows["run"])
    assert sorted(frame["heldout_loss"]) == sorted(rows["domain_heldout"])
    row = rows[(rows["delta"] == 0.05) & (rows["seed"] == 1) & (rows["tokens"] == 20e9)].iloc[0]
    mine = frame[(frame["run"] == row["run"]) & (frame["tokens"] == 20e9)].iloc[0]
    assert mine["fraction"] == 0.05
    assert (mine["train_loss"], mine["heldout_loss"]) == (row["domain_train"], row["domain_heldout"])
    assert (mine["tokenizer"], mine["heldout"]) == (row["tokenizer"], row["heldout"])
    assert frame["train_loss"].isna().equals(frame["fraction"] == 0)


def test_runs_without_domain_text_belong_to_every_corpus_of_their_size() -> None:
    table = spt_table(deltas=(0.0, 0.01), seeds=(0,), params=(SMALL, PARAMS), domain_tokens=(30_000_000, DOMAIN_TOKENS))
    shared = table[(table["delta"] > 0) | (table["domain_tokens"] == DOMAIN_TOKENS)]
    groups = views.overfitting(usable(shared))
    assert [tuple(group.values()) for group, _ in groups] == [
        (size, corpus) for size in (SMALL, PARAMS) for corpus in (30_000_000, DOMAIN_TOKENS)
    ]
    for group, frame in groups:
        assert set(frame["fraction"]) == {0.0, 0.01}
        assert frame["run"].nunique() == 2
        assert frame["run"].str.contains(f"-{group['params']}-").all()


def test_pretraining_on_domain_text_alone_is_for_the_data_constrained_law() -> None:
    table = spt_table(deltas=(0.01, 1.0), seeds=(0,), domain_tokens=(30_000_000, DOMAIN_TOKENS))
    group, frame = only(views.data_constrained(usable(table)))
    assert group == {}
    assert set(frame["unique_tokens"]) == {30e6, 300e6}
    assert len(frame) == ((table["stage"] == 0) & (table["delta"] == 1) & (table["tokens"] > 0)).sum()
    assert all(set(rows["fraction"]) == {0.01} for _, rows in views.overfitting(usable(table)))
    assert views.data_constrained(usable(SPT)) == []


def test_chinchilla_uses_shares_that_were_run_at_two_sizes() -> None:
    table = pd.concat([SPT, spt_table(deltas=(0.01,), seeds=(0,), params=(SMALL,))])
    group, frame = only(views.chinchilla(usable(table)))
    assert group == {"delta": 0.01}
    assert set(frame["params"]) == {SMALL, PARAMS}
    row = table[(table["stage"] == 0) & (table["delta"] == 0.01) & (table["tokens"] == 20e9)].iloc[0]
    assert row["general_heldout"] in set(frame["loss"][frame["tokens"] == 20e9])
    of_domain, frame = only(views.chinchilla(usable(table), of="domain"))
    assert of_domain == {"delta": 0.01, "domain_tokens": DOMAIN_TOKENS}
    assert row["domain_heldout"] in set(frame["loss"])


def test_laws_of_final_losses_leave_out_the_middle_of_runs_with_one_budget() -> None:
    """Whose rate may have fallen; a run with several budgets has it near its peak at all of them."""
    lengths = (20_000_000_000, 50_000_000_000)
    given: dict[str, Any] = {"deltas": (0.01, 1.0), "seeds": (0,), "params": (SMALL, PARAMS)}
    each = pd.concat([renamed(spt_table(budgets=(length,), **given), f"-{length}") for length in lengths])
    together = spt_table(budgets=lengths, **given)
    for view, share in ((views.chinchilla, 0.01), (views.data_constrained, 1.0)):
        _, frame = only(view(usable(each)))
        ends = each[(each["stage"] == 0) & (each["delta"] == share) & each["handed_on"]]
        assert sorted(frame["tokens"]) == sorted(ends["tokens"]) == sorted(2 * lengths)
        _, frame = only(view(usable(together)))
        curves = (together["stage"] == 0) & (together["delta"] == share) & (together["tokens"] > 0)
        assert len(frame) == curves.sum() == 2 * 20
    assert all(len(frame) == 2 * 17 for _, frame in views.overfitting(usable(each))), "its paper fits curves"


def falling(table: pd.DataFrame) -> pd.DataFrame:
    """With the rates of a cosine to a tenth at the end of each run."""
    done = table["tokens"] / table.groupby("run")["tokens"].transform("max")
    return table.assign(rate=0.55 + 0.45 * np.cos(np.pi * done))


def test_budgets_on_a_falling_rate_do_not_count_as_ends_of_runs() -> None:
    """As several phases of a recipe of one's own on one cosine; a constant rate makes a curve of ends, of one budget
    too."""
    lengths = (20_000_000_000, 50_000_000_000)
    given: dict[str, Any] = {"deltas": (0.01,), "seeds": (0,), "params": (SMALL, PARAMS)}
    for budgets in (lengths, lengths[:1]):
        table = spt_table(budgets=budgets, **given)
        _, frame = only(views.chinchilla(usable(falling(table))))
        assert list(frame["tokens"]) == [max(budgets)] * 2
        _, frame = only(views.chinchilla(usable(table.assign(rate=1.0))))
        assert len(frame) == 2 * 20
    best = (table["tokens"] == lengths[0] // 10) & (table["stage"] == 0)  # before the rate falls
    _, frame = only(views.chinchilla(usable(falling(table.assign(handed_on=best)))))
    assert list(frame["tokens"]) == [lengths[0] // 10] * 2


def test_laws_of_curves_leave_out_the_middle_of_a_decay_if_enough_runs_end() -> None:
    """At four lengths of every share; else all evaluations are used, as are those at a rate near its peak."""
    lengths = tuple(20_000_000_000 * n for n in (1, 2, 4, 8))
    shares = (0.0, 0.01, 0.05)
    spt = [renamed(spt_table(shares, (length,), seeds=(0,)), f"-{length}") for length in lengths]
    dcpt = [renamed(dcpt_table(tokens=length).assign(domain_tokens=9e9), f"-{length}") for length in lengths]
    for tables, views_of, arms, rows in (
        (spt, (views.overfitting, views.mixture_repetition), len(shares), 17),
        (dcpt, (lambda table: views.dcpt(table, "domain"), lambda table: views.dcpt(table, "general")), 9 * 2, 12),
    ):
        each = falling(pd.concat(tables, ignore_index=True))
        last = each.loc[each["delta"] > 0, ["run", "after"]].iloc[-1]
        fewer = each[~each["run"].isin(last)]
        for view in views_of:
            assert len(only(view(usable(each)))[1]) == arms * len(lengths)
            assert len(only(view(usable(each.assign(rate=1.0))))[1]) == arms * len(lengths) * rows
            assert len(only(view(usable(fewer)))[1]) == (arms * len(lengths) - 1) * rows


# -------------------------------------------------------------------------------------------------------- adaptation


def test_after_finetuning_tokens_and_fraction_are_those_of_pretraining() -> None:
    table = spt_table(deltas=(0.0, 0.05), injected=(0.0, 0.02), anchors=(0.0, 0.5))
    group, frame = only(views.post_finetuning(usable(table)))
    assert group == {"params": PARAMS, "domain_tokens": DOMAIN_TOKENS}
    assert len(frame) == 2 * 5 * 2  # deltas, budgets, seeds
    ends = table[(table["stage"] == 1) & table["handed_on"] & (table["injected"] == 0) & (table["anchor"] == 0)]
    both = frame.merge(ends, on="run", suffixes=("", "_before"))
    assert len(both) == len(frame)
    for ours, theirs in {
        "tokens": "pretrain_tokens",
        "fraction": "pretrain_delta",
        "heldout_loss": "domain_before",
        "finetuned_loss": "domain_heldout",
    }.items():
        assert both[ours].tolist() == both[theirs].tolist()


@pytest.mark.parametrize("start", ["embeddings", "frozen embeddings"])
def test_runs_from_embeddings_alone_are_not_finetunes(start: str) -> None:
    table = SPT.assign(start=SPT["start"].replace("pretrained", start))
    assert views.post_finetuning(usable(table)) == views.forgetting(usable(table)) == views.cmr(usable(table)) == []


def test_forgetting_uses_the_final_weights_of_finetunes_after_plain_pretraining() -> None:
    groups = views.forgetting(usable(SPT))
    assert [group for group, _ in groups] == [
        {"pretrain_delta": 0, "pretrain_tokens": 20_000_000_000},
        {"pretrain_delta": 0, "pretrain_tokens": 100_000_000_000},
    ]
    _, frame = groups[0]
    assert sorted(frame["injected"]) == [0, 0, 0.02, 0.02]
    assert set(frame["unique_tokens"]) == {DOMAIN_TOKENS}
    row = SPT[SPT["handed_on"] & (SPT["stage"] == 1) & (SPT["pretrain_delta"] == 0)].iloc[0]
    mine = frame[frame["run"] == row["run"]].iloc[0]
    assert (mine["loss_before"], mine["loss"]) == (row["general_before"], row["general_heldout"])

    _, of_domain = views.finetuning(usable(SPT))[0]
    assert of_domain["injected"].tolist() == [0, 0]
    assert row["domain_heldout"] in set(of_domain["loss"])


def test_forgetting_uses_the_smallest_share_if_all_pretraining_had_domain_text() -> None:
    groups = views.forgetting(usable(SPT[(SPT["delta"] != 0) & (SPT["pretrain_delta"] != 0)]))
    assert {group["pretrain_delta"] for group, _ in groups} == {0.01}


def test_finetunes_that_have_not_read_their_corpus_are_left_out() -> None:
    assert views.forgetting(usable(SPT.assign(epochs=0.5 * SPT["epochs"] / 4))) == []
    _, frame = only(views.forgetting(usable(DCPT)))
    assert len(frame) == 2  # for each size, the run on domain text alone, which reads its corpus once


@pytest.mark.parametrize(("of", "share"), [("domain", "delta"), ("general", "injected")])
def test_dcpt_uses_the_share_of_the_corpus_whose_loss_it_predicts(of: str, share: str) -> None:
    group, frame = only(views.dcpt(usable(DCPT), of=of))  # type: ignore[arg-type]
    assert group == {"domain_tokens": 20_000_000_000, "pretrain_delta": None, "pretrain_tokens": None}
    rows = DCPT[DCPT["tokens"] > 0]
    assert frame["own_ratio"].to_numpy() == pytest.approx(rows[share].to_numpy(), abs=1e-9)
    assert frame["loss"].tolist() == rows[f"{of}_heldout"].tolist()
    assert frame[["params", "tokens"]].to_numpy().tolist() == rows[["params", "tokens"]].to_numpy().tolist()


def test_evaluations_after_the_final_weights_are_left_out() -> None:
    _, frame = views.dcpt(usable(SPT), of="domain")[0]
    for run, curve in frame.groupby("run"):
        best = SPT[(SPT["run"] == run) & SPT["handed_on"]].iloc[0]
        assert curve["tokens"].max() == best["tokens"] < SPT["tokens"][SPT["run"] == run].max()


def test_cmr_uses_the_changes_from_each_runs_start() -> None:
    table = dcpt_table(seeds=(0, 1))
    second = table["seed"] == 1
    for name in ("domain_heldout", "domain_before"):
        table.loc[second, name] += 0.5
    groups = views.cmr(usable(table))
    assert [group["params"] for group, _ in groups] == [200_000_000, 1_000_000_000]
    frame = groups[0][1]
    start = frame[frame["tokens"] == 0]
    before = table[table["params"] == 200_000_000]["domain_before"]
    assert start["domain_loss"].tolist() == pytest.approx([before.mean()])
    for run, curve in frame[frame["tokens"] > 0].groupby("run"):
        own = table[(table["run"] == run) & (table["tokens"] > 0)]
        rise = curve["domain_loss"].to_numpy() - start["domain_loss"].item()
        assert rise == pytest.approx((own["domain_heldout"] - own["domain_before"]).to_numpy())
        assert curve["domain_ratio"].tolist() == own["delta"].round(9).tolist()


# ------------------------------------------------------------------------------------------------------- what is used


def used(table: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    found = usable(table)
    return found.rows, found.notes


def test_nothing_is_left_out_of_a_complete_study() -> None:
    for table in (SPT, DCPT):
        rows, notes = used(table)
        assert len(rows) == len(table)
        assert notes == []


def test_usable_rows_are_returned_unchanged() -> None:
    table = pd.concat([SPT, worse(SPT, 0.1)], ignore_index=True)
    rows, _ = used(table)
    again, notes = used(rows)
    assert again.equals(rows)
    assert notes == []


def test_failed_runs_and_losses_that_are_not_numbers_are_left_out_with_a_note() -> None:
    lost = SPT["run"].iloc[0]
    failed = SPT[:1].assign(run="the-one-that-failed", status="failed", **dict.fromkeys(NUMBERS, np.nan))
    table = pd.concat([SPT, failed], ignore_index=True)
    broken = (table["run"] == lost) & (table["tokens"] >= 90e9)
    table.loc[broken, ["domain_heldout"]] = [np.nan, np.inf][: broken.sum()] + [np.nan] * (broken.sum() - 2)
    _, notes = used(table)
    assert len(notes) == 2
    assert "failed: the-one-that-failed" in notes[0]
    assert f"domain_heldout is not a number: {broken.sum()} evaluations of {lost}" in notes[1]
    _, frame = only(views.overfitting(usable(table)))
    assert np.isfinite(frame["heldout_loss"]).all()
    assert len(frame) == 102 - broken.sum()


def test_runs_whose_mixture_changes_within_a_stage_are_left_out_with_their_descendants() -> None:
    """SCPT with 1% in the last tenth, 0.1% of all tokens, beside a run with 0.1% from the start."""
    steady = spt_table(deltas=(0.0, 0.001, 0.02), budgets=(90_000_000_000, 100_000_000_000))
    scpt = renamed(steady[(steady["delta"] == 0.001) | (steady["pretrain_delta"] == 0.001)], "-scpt")
    early = scpt["tokens"] < 95e9
    scpt = scpt[(scpt["pretrain_tokens"] != 90e9)]
    scpt.loc[early & (scpt["stage"] == 0), "delta"] = 0.0
    scpt[["domain_heldout", "domain_before"]] *= 0.97
    table = pd.concat([steady, scpt], ignore_index=True)
    rows, notes = used(table)
    assert rows.equals(usable(steady).rows)
    assert "share changes within a stage" in notes[0]
    assert "-scpt" in notes[0]
    assert "the pretraining that they started from is left out" in notes[1]


def test_the_learning_rate_is_chosen_for_each_arm_by_the_mean_over_seeds() -> None:
    """At 1% the other rate is better on average, but not for seed 1; at all other shares it is worse."""
    other = worse(SPT, 0.05)
    lucky = (other["delta"] == 0.01) | (other["pretrain_delta"] == 0.01)
    by = np.where(other["seed"] == 0, 0.3, -0.1)
    for name in ("domain_select", "domain_heldout", "domain_before"):
        other.loc[lucky, name] -= by[lucky]
    table = pd.concat([SPT, other], ignore_index=True)
    rows, notes = used(table)
    kept = rows[rows["stage"] == 0].groupby("delta")["run"].unique()
    assert all(run.endswith("-other") == (delta == 0.01) for delta, runs in kept.items() for run in runs)
    assert rows[rows["stage"] == 0].groupby("delta")["seed"].nunique().tolist() == [2, 2, 2]
    assert "better mean domain_select" in notes[0]
    finetunes = rows[(rows["stage"] == 1) & (rows["pretrain_delta"] == 0.01)]
    assert finetunes["run"].str.endswith("-other").all()
    assert finetunes["seed"].nunique() == 2


def test_rates_that_a_phases_grid_chose_are_not_settings() -> None:
    """A finetune's grid may keep another rate for each seed; all seeds are used."""
    seed = (SPT["stage"] == 1) & (SPT["seed"] == 1)
    table = SPT.assign(lr=SPT["lr"].where(~seed, 4e-5))
    assert len(usable(table).rows) == len(SPT)
    assert usable(table).notes == []


def test_runs_that_stopped_early_belong_to_the_same_arm() -> None:
    finetunes = SPT[SPT["stage"] == 1]
    other = worse(finetunes, 0.05)
    other = other[other["tokens"] <= 6 * DOMAIN_TOKENS]
    rows, _ = used(pd.concat([SPT, other], ignore_index=True))
    assert not rows["run"].str.endswith("-other").any()


def test_a_saved_table_gives_the_same_views(tmp_path: Any) -> None:
    save_table(SPT, tmp_path)
    for name in ("table.csv", "table.parquet"):
        _, frame = only(views.post_finetuning(usable(load_table(tmp_path / name))))
        pd.testing.assert_frame_equal(frame, only(views.post_finetuning(usable(SPT)))[1], check_dtype=False)


def test_numbers_that_a_table_holds_as_text_are_read_and_other_text_is_refused(tmp_path: Path) -> None:
    SPT.assign(delta=SPT["delta"].astype(str), lr=SPT["lr"].astype(str)).to_parquet(tmp_path / "table.parquet")
    pd.testing.assert_frame_equal(load_table(tmp_path / "table.parquet")[["delta", "lr"]], SPT[["delta", "lr"]])
    SPT[["params", "tokens"]].to_csv(tmp_path / "table.csv", index=False)
    with pytest.raises(DataError, match=r"table\.csv: has no column 'run'; known: params, tokens; tables of runs are"):
        load_table(tmp_path / "table.csv")
    SPT.assign(flops="many").to_csv(tmp_path / "table.csv")
    with pytest.raises(
        DataError, match=r"table\.csv: flops: .*many.* is invalid: a column of the runs table must hold"
    ):
        load_table(tmp_path / "table.csv")


# ------------------------------------------------------------------------------------------------- what is refused


def test_the_synthetic_table_has_the_columns_of_a_real_one() -> None:
    assert list(SPT) == list(DCPT) == list(COLUMNS)


@pytest.mark.parametrize(
    ("column", "value", "says"),
    [
        ("delta", 5.0, "delta: 5.0 is invalid: a fraction between 0 and 1, not a percentage; 5% is 0.05"),
        ("pretrain_delta", 2.0, "pretrain_delta: 2.0 is invalid: a fraction between 0 and 1, not a percentage"),
        ("domain_heldout", 0.0, "domain_heldout: 0.0 is invalid: a loss must be above 0 nats; leave out pretrain-"),
        ("general_heldout", 0.0, "general_heldout: 0.0 is invalid: a loss must be above 0 nats; leave out pretrain-"),
        ("lr", "high", "lr: .*high.* is invalid: a column of the runs table must hold numbers"),
        ("run", None, "run is missing in 1 of 534 rows of the runs table .the first is row 533.; fill it in, or"),
        ("stage", np.nan, "stage is missing in 1 of 534 rows"),
        ("domain_tokens", np.inf, "domain_tokens is missing in 1 of 534 rows"),
        ("handed_on", "no", "handed_on: 'no' is invalid: a row of the runs table has True or False there"),
    ],
)
def test_invalid_columns_are_refused(column: str, value: Any, says: str) -> None:
    table = SPT.assign(**{column: SPT[column].astype(object)})
    table.loc[table.index[-1], column] = value
    with pytest.raises(DataError, match=says):
        views.overfitting(usable(table))


@pytest.mark.parametrize("column", ["tokenizer", "heldout"])
@pytest.mark.parametrize("stage", [0, 1])
def test_runs_with_different_tokenizers_or_texts_are_refused_by_name(column: str, stage: int) -> None:
    other = renamed(SPT[SPT["stage"] == stage], "-elsewhere", **{column: "feedbeef"})
    first = SPT["run"][SPT["stage"] == (stage if column == "heldout" else 0)].iloc[0]
    with pytest.raises(DataError) as refused:
        views.forgetting(usable(pd.concat([SPT, other], ignore_index=True)))
    for part in (f"{first} and {other['run'].iloc[0]} differ in {column}", "feedbeef", "one study at a time"):
        assert part in str(refused.value)


def test_stages_may_have_different_held_out_texts() -> None:
    table = SPT.assign(heldout=np.where(SPT["stage"] == 0, "small", "large"))
    assert len(views.overfitting(usable(table))) == len(views.post_finetuning(usable(table))) == 1


def test_anything_but_a_runs_table_is_refused() -> None:
    with pytest.raises(DataError, match="no column 'domain_select'; did you mean 'domains_select'"):
        views.cmr(usable(SPT.rename(columns={"domain_select": "domains_select"})))
    with pytest.raises(DataError, match=r"the runs table has no column 'run'; known: loss, params$"):
        views.cmr(usable(SPT[["params"]].assign(loss=1.0)))
    with pytest.raises(DataError, match=r"table: .* is invalid: give a pandas DataFrame, as read_table makes it"):
        views.cmr(usable({"run": []}))  # type: ignore[arg-type]
    with pytest.raises(DataError, match="none of them is finished"):
        views.cmr(usable(SPT[:0]))


def whole(run: Path) -> Path:
    """With what a table needs of a summary."""
    summary = json.loads((run / "summary.json").read_text())
    summary |= {"train_tokens": {"code": 10_000, "general": 10**6}, "tokenizer": "t", "data": {}, "flops_per_token": 6}
    summary["phases"] = {name: done | {"handed_on": 1} for name, done in summary["phases"].items()}
    (run / "summary.json").write_text(json.dumps(summary))
    return run


def test_the_table_has_the_rate_of_the_schedule_that_a_stage_began_with(tmp_path: Path) -> None:
    """As a share of its peak; unknown where the length of a window is."""
    phases = {
        "phases.0.batch": {"sequences": 20, "context": 50},
        "phases.0.schedule": {"name": "cosine", "horizon": 16_000},
    }
    losses = [(3.0, 4.0), (2.9, 3.9), (2.8, 3.8)]
    carried_on: dict[str, Any] = phases | {"phases.1.schedule": {"continue": True}}
    for name, change, steps in (("tuned", phases, [0, 1]), ("carried-on", carried_on, [0, 1, 9, 10])):
        table = table_of([whole(fake_run(tmp_path / name, losses, tokens=8000, change=change))], "code", "general")
        of_stage = table[table["stage"] == 0]["rate"]
        assert of_stage.tolist() == pytest.approx([0.55 + 0.45 * np.cos(np.pi * step / 16) for step in steps])
    unknown = table_of([whole(fake_run(tmp_path / "unknown", losses))], "code", "general")
    assert len(unknown) == 5
    assert unknown["rate"].isna().all()
