"""Figures of a comparison against values computed by hand, and inputs that must be refused."""

from __future__ import annotations

import io
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from rich.console import Console

from spt_fast.errors import CheckpointError, DataError, RecipeError
from spt_fast.printing import as_json
from spt_fast.study.compare import compare, compute_multiplier, general_when
from spt_fast.study.figures import write
from spt_fast.study.findings import findings, print_comparison
from spt_fast.study.runs_table import Row, in_columns, save_table
from tests.study.fake_runs import fake_run

NPT = [(7.0, 5.0), (6.0, 6.0), (5.0, 8.0)]
SPT = [(5.5, 5.1), (5.0, 5.9), (4.5, 6.5)]


def shifted(path: list[tuple[float, float]], by: float) -> list[tuple[float, float]]:
    return [(domain + by, general + by) for domain, general in path]


def compared(runs: list[Path]) -> dict[str, Any]:
    """What `compare --json` prints."""
    return as_json(compare(runs))


@pytest.fixture
def four_runs(tmp_path: Path) -> list[Path]:
    """NPT and SPT 5%, two seeds each; the second seed's losses are 0.1 (NPT) and 0.2 (SPT) higher."""
    return [
        fake_run(tmp_path / "npt-0", NPT),
        fake_run(tmp_path / "npt-1", shifted(NPT, 0.1), seed=1),
        fake_run(tmp_path / "spt-0", SPT, delta="1/20"),
        fake_run(tmp_path / "spt-1", shifted(SPT, 0.2), delta="1/20", seed=1),
    ]


def test_the_figures_of_a_run_are_those_of_its_kept_grid_arm(tmp_path: Path) -> None:
    run = fake_run(
        tmp_path / "spt", [SPT, shifted(SPT, 0.25)], delta="0.05", seed=3, kept=1, handed_on=1, lr=(1e-4, 3e-4)
    )
    row = compared([run])["runs"][0]
    assert row["name"] == "spt"
    assert (row["delta"], row["seed"], row["tokens"]) == (0.05, 3, 1_000_000)
    assert row["domain_epochs"] == 5.0  # of pretraining, not the finetune's 7
    assert (row["domain_before"], row["domain_after"]) == (5.5, 5.25)  # all grid arms have the same start
    assert (row["general_before"], row["general_after"]) == (5.1, 6.15)
    assert row["forgetting"] == pytest.approx(1.05)
    assert (row["arm"], row["lr"], row["warmup"]) == (1, 3e-4, "5 steps")
    assert row["paths"][0] == [[0, 5.5, 5.1], [1000, 5.0, 5.9], [2000, 4.5, 6.5]]


def test_the_text_behind_losses_and_the_half_that_choices_were_made_on_are_reported(four_runs: list[Path]) -> None:
    found = compare(four_runs)
    assert as_json(found)["runs"][0]["domain_behind"] == {"documents": 12, "tokens": 3456, "standard_error": 0.02}
    says = (
        "losses are measured on the report half of the held-out text (code 12 documents, 3,456 tokens, standard error "
        "0.020; general 12 documents, 3,456 tokens, standard error 0.030); learning rates and checkpoints were chosen "
        "on the select half"
    )
    assert says in findings(found)
    for folder in four_runs:  # as earlier versions wrote runs
        summary = json.loads((folder / "summary.json").read_text())
        del summary["phases"]["finetune"]["scored"], summary["phases"]["finetune"]["standard_errors"]
        (folder / "summary.json").write_text(json.dumps(summary))
    assert compare(four_runs).runs[0].domain_behind is None
    assert findings(compare(four_runs)) == [line for line in findings(found) if line != says]
    changed = json.loads((four_runs[0] / "summary.json").read_text()) | {"heldout_halves": "windows"}
    (four_runs[0] / "summary.json").write_text(json.dumps(changed))
    with pytest.raises(RecipeError, match="unit of the held-out halves is windows in one and documents in"):
        compare(four_runs)


def test_gain_is_paired_by_seed(four_runs: list[Path]) -> None:
    gain = compared(four_runs)["r_gain"]["0.05"]
    first, second = 100 * (5.0 - 4.5) / 5.0, 100 * (5.1 - 4.7) / 5.1
    assert gain["per_seed"] == {"0": pytest.approx(first), "1": pytest.approx(second)}
    assert (gain["low"], gain["high"]) == (pytest.approx(second), pytest.approx(first))
    assert gain["mean"] == pytest.approx((first + second) / 2)


def test_arms_hold_the_spread_over_seeds(four_runs: list[Path]) -> None:
    npt, spt = compared(four_runs)["arms"]
    assert (npt["delta"], npt["seeds"], spt["delta"], spt["seeds"]) == (0.0, [0, 1], 0.05, [0, 1])
    assert npt["domain_after"] == {
        "mean": pytest.approx(5.05),
        "min": 5.0,
        "max": 5.1,
        "std": pytest.approx(0.1 / math.sqrt(2)),
    }
    assert npt["r_gain"] is None
    assert spt["r_gain"] is not None


def test_arms_may_differ_in_their_finetune_alone(tmp_path: Path) -> None:
    replayed = {"phases.1.mixture": {"general": "1%", "code": "99%"}}
    result = compared(
        [
            fake_run(tmp_path / "npt", NPT),
            fake_run(tmp_path / "replay", shifted(NPT, -0.5), change=replayed),
            fake_run(tmp_path / "anchor", shifted(NPT, -0.25), change={"phases.1.anchor": 0.1}),
            fake_run(tmp_path / "average", shifted(NPT, -0.125), change={"phases.1.average": "10%"}),
            fake_run(tmp_path / "spt", SPT, delta="1/20"),
            fake_run(tmp_path / "spt-replay", shifted(SPT, 0.5), delta="1/20", change=replayed),
        ]
    )
    assert {key: gain["mean"] for key, gain in result["r_gain"].items()} == {
        "0 replay 0.01": pytest.approx(100 * 0.5 / 5.0),  # against NPT with the plainest finetune
        "0 anchor 0.1": pytest.approx(100 * 0.25 / 5.0),
        "0 average 0.1": pytest.approx(100 * 0.125 / 5.0),
        "0.05": pytest.approx(100 * 0.5 / 5.0),
        "0.05 replay 0.01": pytest.approx(100 * -0.5 / 4.5),  # against NPT with the same finetune
    }
    assert [row["replay"] for row in result["runs"]] == [0, 0.01, 0, 0, 0, 0.01]
    assert [(arm["delta"], arm["replay"], arm["anchor"], arm["average"]) for arm in result["arms"]] == [
        (0, 0, 0, 0),
        (0, 0, 0, 0.1),
        (0, 0, 0.1, 0),
        (0, 0.01, 0, 0),
        (0.05, 0, 0, 0),
        (0.05, 0.01, 0, 0),
    ]
    assert "SPT 5%, 1% replay against NPT, 1% replay" in result["verdict"]["forgetting"]["0.05 replay 0.01"]["says"]
    assert result["warnings"] == []


def test_without_npt_there_is_no_gain(four_runs: list[Path]) -> None:
    result = compared(four_runs[2:])
    assert result["r_gain"] is None
    assert result["compute_multiplier"] is None
    assert result["verdict"]["forgetting"] == {}


def test_a_gain_needs_a_seed_in_common(four_runs: list[Path]) -> None:
    result = compared([four_runs[0], four_runs[3]])
    assert result["r_gain"] == {"0.05": None}
    assert result["verdict"]["forgetting"]["0.05"]["exceeds"] is None
    assert "no seed in common" in result["verdict"]["forgetting"]["0.05"]["says"]


def test_delta_is_the_exact_share_over_all_pretraining_phases(tmp_path: Path) -> None:
    """SCPT: 90% of the tokens without the domain, then 10% with a domain share of 1/3."""
    folder = tmp_path / "scpt"
    phases = [
        {"name": "pretrain", "tokens": "900K", "mixture": {"general": 1}, "optimizer": {"lr": 1e-3}},
        {"name": "more", "tokens": "100K", "mixture": {"general": 2, "code": 1}, "optimizer": {"lr": 1e-3}},
        {"name": "finetune", "tokens": "2K", "mixture": {"code": 1}, "optimizer": {"lr": 1e-4}},
    ]
    fake_run(folder, NPT, change={"phases": phases})
    summary = json.loads((folder / "summary.json").read_text())
    summary["phases"]["pretrain"]["tokens"] = 900_000
    summary["phases"]["more"] = {"tokens": 100_000, "epochs": {"code": 2.5, "general": 1.0}}
    (folder / "summary.json").write_text(json.dumps(summary))
    result = compared([folder])
    row = result["runs"][0]
    assert result["warnings"] == [
        f"the domain's share of pretraining is 0%, then 33.33% in {folder}; their delta is the mean, by which they are "
        "named as SPT"
    ]
    assert row["delta"] == float(1 / 30)
    assert row["tokens"] == 1_000_000
    assert row["domain_epochs"] == 2.5


def test_domain_is_the_finetunes_largest_source_and_general_the_pretrainings(tmp_path: Path) -> None:
    sources = {name: {"train": name, "heldout": f"{name}.h"} for name in ("general", "code", "a-third")}
    run = fake_run(
        tmp_path / "replay",
        NPT,
        change={
            "sources": sources,
            "phases.0.mixture": {"general": "70%", "a-third": "30%"},
            "phases.1.mixture": {"code": "60%", "general": "40%"},
        },
    )
    result = compared([run])
    assert (result["domain"], result["general"]) == ("code", "general")


# ------------------------------------------------------------------------------------------------ equal domain loss


def test_general_at_equal_domain_is_interpolated_along_the_path(tmp_path: Path) -> None:
    npt = fake_run(tmp_path / "npt", [(7.0, 5.0), (6.0, 6.0), (5.0, 8.0), (5.2, 9.0)])
    spt = fake_run(tmp_path / "spt", [(5.6, 5.1), (4.8, 5.9), (4.6, 6.5)], delta="0.05")
    equal = compared([npt, spt])["general_at_equal_domain"]
    assert equal["domain_loss"] == 5.0  # NPT's best, although it ended worse: the lowest loss that both reach
    assert equal["general"]["0"]["mean"] == 8.0
    assert equal["general"]["0.05"]["mean"] == pytest.approx(5.1 + 0.8 * (5.6 - 5.0) / 0.8)


def test_a_path_that_starts_below_the_common_loss_counts_from_its_start() -> None:
    assert general_when([(0, 4.0, 5.0), (1, 3.0, 6.0)], 4.5) == 5.0


def test_a_path_is_read_at_its_first_crossing() -> None:
    assert general_when([(0, 6.0, 1.0), (1, 4.0, 3.0), (2, 6.0, 9.0), (3, 4.0, 11.0)], 5.0) == 2.0


# ------------------------------------------------------------------------------------------------ compute multiplier


def test_multiplier_is_interpolated_in_log_tokens() -> None:
    npt = {1_000: 6.0, 4_000: 5.0}
    assert compute_multiplier(npt, 1_000, 5.5) == pytest.approx(2.0)
    assert compute_multiplier(npt, 1_000, 5.0) == pytest.approx(4.0)
    assert compute_multiplier(npt, 4_000, 5.5) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("npt", "loss"), [({1_000: 6.0, 4_000: 5.0}, 4.99), ({1_000: 6.0, 4_000: 5.0}, 6.01), ({1_000: 6.0}, 6.0)]
)
def test_multiplier_is_none_unless_bracketed(npt: dict[int, float], loss: float) -> None:
    assert compute_multiplier(npt, 1_000, loss) is None


def runs_at(folder: Path, *budgets: tuple[str, int, float], seed: int = 0) -> list[Path]:
    """A run for each (share of the domain, millions of pretraining tokens, domain loss after finetuning)."""
    runs = []
    for delta, millions, domain_after in budgets:
        path = NPT if delta == "0" else SPT
        path = shifted(path, domain_after - path[-1][0])
        run = folder / f"{delta}-{millions}M-{seed}"
        runs.append(fake_run(run, path, tokens=1_000_000 * millions, seed=seed, delta=delta))
    return runs


def test_the_multiplier_is_that_of_the_largest_budget_that_npt_brackets_with_one_per_seed(tmp_path: Path) -> None:
    """NPT reaches 6 with 1M tokens and 5 with 4M. SPT with 4M is below that."""
    runs = []
    for seed, spt_at_1M in enumerate((6.0, 5.75, 4.75)):
        runs += runs_at(tmp_path, ("0", 1, 6.0), ("0", 4, 5.0), ("0.05", 1, spt_at_1M), ("0.05", 4, 4.0), seed=seed)
    comparison = compare(runs)
    result = as_json(comparison)
    assert result["compute_multiplier"] == {"0.05": pytest.approx(2.0)}  # of 5.5, the mean
    assert result["compute_multiplier_per_seed"] == {
        "0.05": {"0": pytest.approx(1.0), "1": pytest.approx(2**0.5), "2": None}
    }
    assert (
        "NPT needs 2.00 times the pretraining tokens of SPT 5% for its domain loss after finetuning (by seed 1.00 to "
        "1.41, and NPT's budgets do not bracket the loss of 1 of 3)"
    ) in findings(comparison)


def test_an_npt_that_never_reaches_the_loss_of_spt_bounds_the_multiplier(tmp_path: Path) -> None:
    """NPT is at 6 with 1M tokens and at 5 with 4M, SPT at 4.9 with 1M already."""
    comparison = compare(runs_at(tmp_path, ("0", 1, 6.0), ("0", 4, 5.0), ("0.05", 1, 4.9), ("0.05", 4, 4.5)))
    assert as_json(comparison)["compute_multiplier"] == {"0.05": None}
    assert (
        "NPT needs more than 4 times the pretraining tokens of SPT 5%: with 4M its domain loss after finetuning is "
        "above that of SPT 5% with 1M"
    ) in findings(comparison)


def test_a_gain_is_that_of_the_common_budget_but_the_multiplier_uses_all_budgets_of_npt(tmp_path: Path) -> None:
    """NPT is at 6 with 1M tokens, the mean of two seeds, and at 5 with 4M; SPT is at 5.5 with 1M."""
    runs = runs_at(tmp_path, ("0", 1, 5.9), ("0", 4, 5.0), ("0.05", 1, 5.5))
    result = compared([*runs, *runs_at(tmp_path, ("0", 1, 6.1), seed=1)])
    assert result["tokens"] == 1_000_000
    assert result["compute_multiplier"] == {"0.05": pytest.approx(2.0)}  # 5.5 halfway between 6.0 and 5.0
    assert list(result["r_gain"]["0.05"]["per_seed"]) == ["0"]
    assert [(arm["delta"], arm["tokens"]) for arm in result["arms"]] == [
        (0, 1_000_000),
        (0.05, 1_000_000),
        (0, 4_000_000),
    ]


def test_a_study_is_compared_without_its_failed_runs_which_are_named(tmp_path: Path) -> None:
    runs = [fake_run(tmp_path / "runs" / name, NPT, delta=delta) for name, delta in (("npt", "0"), ("spt", "0.05"))]
    of_all: dict[str, Any] = {
        "phase": "finetune",
        "stage": 1,
        "after": "",
        "params": 1,
        "seed": 0,
        "domain_tokens": 1,
        "tokenizer": "bpe",
    }
    done = [Row(run=run.name, status="done", handed_on=True, **of_all) for run in runs]
    failed = Row(run="diverged", status="failed", handed_on=False, **of_all)
    save_table(in_columns([*done, failed]), tmp_path)
    found = compare([tmp_path])
    assert [run.name for run in found.runs] == ["npt", "spt"]
    assert found.warnings[0] == "left out, because they failed: diverged"
    assert findings(found) == findings(compare(runs))
    save_table(in_columns([failed]), tmp_path)
    with pytest.raises(DataError, match="the study has no finished run; train one first"):
        compare([tmp_path])


# ------------------------------------------------------------------------------------------------ verdict


def test_differences_of_one_seed_have_a_line_per_figure_and_one_caution(tmp_path: Path) -> None:
    comparison = compare(runs_at(tmp_path, ("0", 1, 6.0), ("0.01", 1, 5.8), ("0.05", 1, 6.5)))
    said = findings(comparison)
    assert said[0] == "domain loss after finetuning, against NPT: SPT 1% 0.200 lower; SPT 5% 0.500 higher"
    assert said.count("one seed cannot show which of these differences are more than chance") == 1
    assert not any(line.startswith("domain loss after finetuning, SPT") for line in said)


def test_a_difference_larger_than_the_spread_of_seeds_exceeds_it(four_runs: list[Path]) -> None:
    verdict = compared(four_runs)["verdict"]["domain_after"]["0.05"]
    assert verdict["difference"] == pytest.approx(-0.45)
    assert verdict["spread"] == pytest.approx(0.2)  # SPT's range, the larger one
    assert verdict["exceeds"] is True
    assert verdict["seeds"] == 2
    assert "0.450 lower, more than the spread between 2 seeds" in verdict["says"]


def test_a_difference_smaller_than_the_spread_of_seeds_may_be_chance(tmp_path: Path) -> None:
    runs = [fake_run(tmp_path / f"npt{s}", shifted(NPT, 0.3 * s), seed=s) for s in (0, 1)]
    runs += [fake_run(tmp_path / f"spt{s}", shifted(NPT, 0.3 * s - 0.2), seed=s, delta="0.1") for s in (0, 1)]
    verdict = compared(runs)["verdict"]["domain_after"]["0.1"]
    assert verdict["difference"] == pytest.approx(-0.2)
    assert verdict["exceeds"] is False
    assert "may be chance" in verdict["says"]


def test_a_difference_must_have_the_same_sign_at_every_seed(tmp_path: Path) -> None:
    """A large mean difference that one seed contradicts does not exceed the spread, even if it is larger."""
    by_seed = [(0.0, 1.9), (0.0, 1.9), (0.0, 1.9), (1.0, 0.9)]
    runs = []
    for seed, (npt, spt) in enumerate(by_seed):
        runs += [fake_run(tmp_path / f"npt{seed}", shifted(NPT, npt), seed=seed)]
        runs += [fake_run(tmp_path / f"spt{seed}", shifted(NPT, spt), seed=seed, delta="0.1")]
    verdict = compared(runs)["verdict"]["domain_after"]["0.1"]
    assert verdict["difference"] > verdict["spread"]
    assert verdict["exceeds"] is False


def test_one_seed_gives_no_verdict(four_runs: list[Path]) -> None:
    verdict = compared([four_runs[0], four_runs[2]])["verdict"]
    for figure in ("domain_after", "forgetting", "general_after", "general_at_equal_domain"):
        assert verdict[figure]["0.05"]["exceeds"] is None
        assert "one seed" in verdict[figure]["0.05"]["says"]


# ------------------------------------------------------------------------------------------------ bad input


def refused(error: type[Exception], runs: list[Path], *words: str) -> None:
    with pytest.raises(error) as caught:
        compare(runs)
    for word in words:
        assert word in str(caught.value)


def test_an_empty_list_of_runs_is_refused() -> None:
    refused(RecipeError, [], "runs: none given")


@pytest.mark.parametrize("name", ["recipe.yaml", "summary.json", "metrics.jsonl"])
def test_a_folder_without_a_file_of_a_run_is_refused(tmp_path: Path, name: str) -> None:
    run = fake_run(tmp_path / "run", NPT)
    (run / name).unlink()
    refused(CheckpointError, [run], name, str(run))


@pytest.mark.parametrize("name", ["summary.json", "metrics.jsonl"])
def test_a_damaged_file_is_refused(tmp_path: Path, name: str) -> None:
    run = fake_run(tmp_path / "run", NPT)
    whole = (run / name).read_text()
    (run / name).write_text(whole[:-10])
    refused(CheckpointError, [run], name, "JSON")


@pytest.mark.parametrize("status", ["stopped", "failed"])
def test_an_unfinished_run_is_refused(tmp_path: Path, status: str) -> None:
    run = fake_run(tmp_path / "run", NPT)
    summary = json.loads((run / "summary.json").read_text()) | {"status": status}
    (run / "summary.json").write_text(json.dumps(summary))
    refused(CheckpointError, [run], str(run), status, "resume=True")


def test_a_run_without_a_finetune_is_refused(tmp_path: Path) -> None:
    phase = {"name": "pretrain", "tokens": 10, "mixture": {"general": 1}, "optimizer": {"lr": 1e-3}}
    refused(
        CheckpointError,
        [fake_run(tmp_path / "run", NPT, change={"phases": [phase]})],
        "pretrain",
        "only phase",
        "finetune",
    )


def test_finetunes_of_one_base_are_compared_with_the_plainest(tmp_path: Path) -> None:
    def of_base(path: list[tuple[float, float]], base: str, mixture: dict[str, str], **more: Any) -> Path:
        phase = {"name": "finetune", "tokens": "3K", "mixture": mixture, "optimizer": {"lr": 1e-4}}
        change = {"init": "hf", "model": {}, "tokenizer": None, "phases": [phase], **more}
        run = fake_run(tmp_path / f"{base}-{len(mixture)}", path, change=change)
        summary = json.loads((run / "summary.json").read_text()) | {"data": {"init": base}, "tokenizer": "t"}
        (run / "summary.json").write_text(json.dumps(summary))
        return run

    plain, replayed = of_base(NPT, "b", {"code": "1"}), of_base(SPT, "b", {"code": "95%", "general": "5%"})
    found = compare([replayed, plain])
    (verdict,) = found.verdict["forgetting"].values()
    assert (found.general, found.tokens, verdict.base.finetune) == ("general", 0, (0, 0, 0))
    assert verdict.difference == pytest.approx(SPT[-1][1] - SPT[0][1] - (NPT[-1][1] - NPT[0][1]))
    console = Console(width=80, record=True, file=io.StringIO())
    print_comparison(found, console)
    said = console.export_text()
    assert re.search(r"finetune +base ", said), "the number of pretraining tokens is unknown"
    assert said.startswith("finetunes of hf ")
    assert "forgetting, against finetune: finetune, 5% replay " in " ".join(said.split())
    assert "NPT" not in said
    assert [run["base"] for run in as_json(found)["runs"]] == ["hf", "hf"]
    write(found, tmp_path / "figures")
    refused(RecipeError, [plain, of_base(SPT, "c", {"code": "1"})], str(plain), "base is hf (b)")
    part = of_base(SPT, "d", {"code": "1"}, init_only="embeddings")
    refused(CheckpointError, [part], "only phase")


def test_a_run_with_one_source_is_refused(tmp_path: Path) -> None:
    change = {"sources": {"code": {"train": "c", "heldout": "c.h"}}, "phases.0.mixture": {"code": 1}}
    refused(RecipeError, [fake_run(tmp_path / "run", NPT, change=change)], "'code'", "only source")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"phases.1.mixture": {"general": 1}}, "domain"),
        ({"sources.code.heldout": "other"}, "sources.code.heldout"),
        ({"sources.general.heldout": "other"}, "sources.general.heldout"),
        ({"tokenizer": "gpt2"}, "tokenizer"),
        ({"model": {"preset": "10m"}}, "model"),
        ({"phases.1.eval": {"tokens": "7K"}}, "eval.tokens"),
    ],
)
def test_runs_that_are_not_comparable_are_refused(tmp_path: Path, change: dict[str, object], word: str) -> None:
    one = fake_run(tmp_path / "one", NPT)
    other = fake_run(tmp_path / "other", SPT, delta="0.05", change=change)
    refused(RecipeError, [one, other], str(one), str(other), word)


def test_a_repeated_arm_and_seed_is_refused(tmp_path: Path) -> None:
    one, again = fake_run(tmp_path / "one", NPT), fake_run(tmp_path / "again", SPT)
    refused(RecipeError, [one, again], str(one), str(again), "seed (0)")


def test_a_run_without_held_out_general_losses_is_refused(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", NPT)
    metrics = (run / "metrics.jsonl").read_text().replace('"general": 5.0', '"other": 5.0')
    (run / "metrics.jsonl").write_text(metrics)
    refused(CheckpointError, [run], "'general'", "heldout")


def test_a_loss_that_is_not_a_number_is_refused(tmp_path: Path) -> None:
    refused(CheckpointError, [fake_run(tmp_path / "run", [*NPT, (float("nan"), 5.0)])], "'code'", "not a number")


def test_a_loss_of_zero_is_refused(tmp_path: Path) -> None:
    refused(CheckpointError, [fake_run(tmp_path / "run", [*NPT, (0.0, 5.0)])], "'code' is 0, but", "above 0 nats")


def test_differences_that_may_explain_losses_are_warned_of(tmp_path: Path) -> None:
    npt = fake_run(tmp_path / "npt", [NPT, NPT], lr=(1e-4, 2e-4))
    spt = fake_run(tmp_path / "spt", [SPT, SPT], lr=(1e-4, 4e-4), delta="0.05")
    warnings = compare([npt, spt]).warnings
    assert any("grid" in warning and str(npt) in warning and str(spt) in warning for warning in warnings)
    assert compare([npt]).warnings == []
    summary = json.loads((spt / "summary.json").read_text())
    (spt / "summary.json").write_text(json.dumps({k: v for k, v in summary.items() if k != "tokenizer"}))
    recipe = yaml.safe_load((spt / "recipe.yaml").read_text())
    (spt / "recipe.yaml").write_text(yaml.safe_dump({k: v for k, v in recipe.items() if k != "tokenizer"}))
    unknown = f"the tokenizer of {spt} is not recorded, so the losses may be of different tokens"
    assert unknown in compare([spt]).warnings


def test_runs_that_differ_only_in_treatment_and_seed_bring_no_warning(four_runs: list[Path]) -> None:
    assert compare(four_runs).warnings == []


# ------------------------------------------------------------------------------------------------ output


def test_the_comparison_is_written_as_json_and_png(four_runs: list[Path], tmp_path: Path) -> None:
    result = compare(four_runs)
    write(result, tmp_path / "out")
    text = (tmp_path / "out" / "comparison.json").read_text()
    assert json.loads(text) == json.loads(json.dumps(as_json(result)))
    with Image.open(tmp_path / "out" / "comparison.png") as picture:
        assert picture.width == 1600
        colours = {colour for _, colour in picture.convert("RGB").getcolors(maxcolors=1 << 24) or []}
    assert {(0x4D, 0x4D, 0x4D), (0x00, 0x72, 0xB2)} <= colours  # NPT's grey and SPT's blue


@pytest.mark.parametrize("chosen", [slice(0, 1), slice(2, 4), slice(0, 3)])
def test_every_selection_of_runs_can_be_printed_and_drawn(four_runs: list[Path], tmp_path: Path, chosen: slice) -> None:
    result = compare(four_runs[chosen])
    console = Console(record=True, width=80)
    print_comparison(result, console)
    assert "domain: code" in console.export_text()
    write(result, tmp_path)


def test_the_printed_table_names_the_arms_and_gives_the_verdict(four_runs: list[Path]) -> None:
    console = Console(record=True, width=80)
    print_comparison(compare(four_runs), console)
    text = " ".join(console.export_text().split())
    for words in ("NPT", "SPT 5%", "5.050", "±0.050", "more than the spread between 2 seeds"):
        assert words in text
