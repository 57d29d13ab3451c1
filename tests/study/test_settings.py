"""Optimizer fields as axes of a study: runs, columns of the table, and the best setting of each arm wherever runs are
read. And a later, unrelated finetune."""

from __future__ import annotations

import copy
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from rich.console import Console

from spt_fast.advice.advise import advise
from spt_fast.config import Phase
from spt_fast.errors import DataError, RecipeError
from spt_fast.fields import build
from spt_fast.files import write_text
from spt_fast.optimizers import OPTIMIZERS
from spt_fast.report.decision import by_sizes, compared
from spt_fast.report.sections import settings
from spt_fast.study import jobs
from spt_fast.study.compare import compare, compare_finetunes
from spt_fast.study.findings import findings, print_comparison
from spt_fast.study.finetunes import after_pretraining
from spt_fast.study.fits import fit_laws
from spt_fast.study.runs_table import load_table, read_table, save_table
from spt_fast.study.settings import NUMBERS, SETTINGS, beaten, setting_of
from spt_fast.study.study import study_from
from spt_fast.study.sweep import sweep
from spt_fast.study.tree import PlannedRun, expand
from spt_fast.study.usable import usable
from tests.study.fake_runs import fake_run
from tests.study.synthetic import DOMAIN_TOKENS, PARAMS, spt_table
from tests.study.test_compare import NPT, SPT, shifted
from tests.study.tiny_study import STEP, HereAlone, raw_study
from tests.tiny import write_dataset

BUDGETS = (50_000_000_000, 100_000_000_000, 200_000_000_000)


def with_optimizer(raw: dict[str, Any], stage: int = 0, **fields: Any) -> dict[str, Any]:
    raw = copy.deepcopy(raw)
    raw["stages"][stage]["optimizer"] = {"lr": 3e-3, **fields}
    return raw


def of_stage(raw: dict[str, Any], stage: int = 0) -> list[PlannedRun]:
    return [run for run in expand(study_from(raw)) if run.stage == stage]


# ------------------------------------------------------------------------------------------------ the axes of a study


def test_every_optimizer_field_may_be_a_list(tmp_path: Path) -> None:
    raw = raw_study(tmp_path)
    raw["stages"][0]["delta"] = "1/4"
    lists: dict[str, Any] = {
        "weight_decay": [0.1, 1, 3],
        "betas": [[0.9, 0.95], [0.9, 0.99]],
        "clip": [None, 1],
        "eps": [1e-8, 1e-6],
        "lr": [1e-3, 2e-3],
        "name": ["adamw", "muon"],
    }
    for field, values in lists.items():
        runs = of_stage(with_optimizer(raw, **{field: values}))
        given = [getattr(run.recipe.phases[0].optimizer, field) for run in runs]
        assert given == [tuple(value) if isinstance(value, list) else value for value in values]
        assert len({run.name for run in runs}) == len(values)
        assert all(run.recipe.phases[0].optimizer == run.recipe.phases[1].optimizer for run in runs)  # of one schedule
    assert [run.name.split("-", 4)[-1] for run in of_stage(with_optimizer(raw, **lists))][1::40] == [
        "lr0.001-adamw-weightdecay0.1-clipnone-betas0.9-0.95-eps1e-06_s0",
        "lr0.001-muon-weightdecay3-clipnone-betas0.9-0.95-eps1e-06_s0",
        "lr0.002-muon-weightdecay1-clipnone-betas0.9-0.95-eps1e-06_s0",
    ]
    muon = with_optimizer(raw, momentum=[0.9, 0.95], name=["adamw", "muon"])  # a field that only one of them has
    assert [run.name.split("_")[1].split("-", 4)[-1] for run in of_stage(muon)] == [
        "adamw",
        "muon-momentum0.9",
        "muon-momentum0.95",
    ]
    reordered = {field: lists[field] for field in reversed(lists)}
    assert of_stage(with_optimizer(raw, **lists)) == of_stage(with_optimizer(raw, **reordered))
    finetunes = with_optimizer(raw, 1, weight_decay=[0, 1])
    finetunes["stages"][1]["grid"] = {"lr": [1e-3, 2e-2], "betas": [[0.9, 0.95], [0.9, 0.99]]}
    assert {len(run.recipe.phases[0].arms()) for run in of_stage(finetunes, 1)} == {4}
    assert len(of_stage(finetunes, 1)) == 2 * 2


def test_a_field_that_becomes_a_list_keeps_the_names_of_existing_runs(tmp_path: Path) -> None:
    raw = raw_study(tmp_path)
    raw["stages"][0]["delta"] = "1/4"
    for run in expand(study_from(with_optimizer(raw, weight_decay=0.1))):
        Path(run.recipe.run).mkdir(parents=True)
        write_text(Path(run.recipe.run) / "recipe.yaml", yaml.safe_dump(run.recipe.plain()))
    before = {run.name for run in expand(study_from(with_optimizer(raw, weight_decay=0.1)))}
    for values in ([0.1, 1], [3, 1, 0.1]):
        after = {run.name: run for run in expand(study_from(with_optimizer(raw, weight_decay=values)))}
        assert before < after.keys()
        assert len(after) == len(values) * len(before)
        decays = {name: run.recipe.phases[0].optimizer.weight_decay for name, run in after.items() if run.stage == 0}
        assert {name for name, decay in decays.items() if decay == 0.1} == before & decays.keys()
    more = {run.name for run in expand(study_from(with_optimizer(raw, weight_decay=[1, 0.1], eps=[1e-8, 1e-6])))}
    assert before < more


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"weight_decay": [0.1, -1]},
            r"^stages\[pretrain\]\.optimizer\.weight_decay\[1\]: -1 is invalid: write a numb",
        ),
        ({"weight_decay": [1, 1]}, r"^stages\[pretrain\]\.optimizer\.weight_decay\[1\]: 1 is there twice"),
        ({"weight_decay": []}, r"^stages\[pretrain\]\.optimizer\.weight_decay: is an empty list"),
        ({"betas": [[0.9, 2]]}, r"^stages\[pretrain\]\.optimizer\.betas\[1\]: 2 is invalid"),
        ({"betas": [0.9]}, r"^stages\[pretrain\]\.optimizer\.betas: \[0.9\] is invalid: write two numbers"),
        ({"name": ["adamw", "moun"]}, r"^stages\[pretrain\]\.optimizer\.name\[1\]: 'moun' is invalid"),
        ({"momentum": [0.9]}, r"^stages\[pretrain\]\.optimizer\.momentum: unknown key"),
    ],
)
def test_invalid_optimizer_fields_are_refused(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        expand(study_from(with_optimizer(raw_study(tmp_path), **fields)))


def test_a_field_that_is_an_axis_is_refused_in_the_grid(tmp_path: Path) -> None:
    raw = with_optimizer(raw_study(tmp_path), 1, weight_decay=[0.1, 1])
    raw["stages"][1]["grid"] = {"weight_decay": [0.1, 1]}
    with pytest.raises(RecipeError, match=r"^stages\[finetune\]\.grid\.weight_decay: weight_decay is an axis too"):
        expand(study_from(raw))
    raw = with_optimizer(raw_study(tmp_path), lr=[1e-3, 2e-3])
    raw["stages"][0]["lr"] = [1e-3]
    with pytest.raises(RecipeError, match=r"^stages\[pretrain\]\.lr: optimizer\.lr is a list too"):
        expand(study_from(raw))


# ------------------------------------------------------------------------------------------------ the best setting


def test_the_table_has_a_column_for_every_field_of_every_optimizer() -> None:
    for name, kind in OPTIMIZERS.items():
        phase = build(Phase, {"name": "a", "tokens": 1, "mixture": {"b": 1}, "optimizer": {"name": name, "lr": 1}}, "")
        setting = setting_of(phase, 0)
        assert setting.keys() == {*SETTINGS, "grid"}
        assert setting["optimizer"] == name
        assert math.isnan(setting["momentum"]) == ("momentum" not in kind.__dataclass_fields__)


def test_a_setting_is_judged_over_seeds_without_the_fields_that_grids_chose() -> None:
    runs = pd.DataFrame(
        {
            "seed": [0, 1, 0, 1],
            "lr": [1e-3, 3e-3, 3e-3, 1e-3],
            "weight_decay": [0.1, 0.1, 1.0, 1.0],
            "domain_select": [3.0, 3.2, 2.9, 3.4],
            "arm": 0,
            "grid": "lr warmup",
        }
    )
    assert list(beaten(runs, ["arm"])) == [False, False, True, True]
    assert list(beaten(runs.assign(grid=""), ["arm"])) == [True, True, False, True]  # each is a separate setting
    assert not beaten(runs.assign(weight_decay=0.1), ["arm"]).any()
    assert not beaten(runs.drop(columns=["weight_decay", "grid"])[:2], ["arm"]).any()  # as tables of earlier versions


def test_settings_are_compared_over_the_seeds_that_all_of_them_have() -> None:
    """As while a study is being trained: 1e-3 is better at seed 0, and only it has the harder seed 1."""
    runs = pd.DataFrame({"seed": [0, 1, 0], "lr": [1e-3, 1e-3, 3e-3], "domain_select": [3.0, 3.4, 3.1], "arm": 0})
    assert list(beaten(runs, ["arm"])) == [False, False, True]
    other = runs.assign(arm=1, seed=[0, 1, 2], lr=[1e-3, 3e-3, 1e-3])  # no seed with several settings
    assert list(beaten(pd.concat([runs, other], ignore_index=True), ["arm"])) == [
        False,
        False,
        True,
        False,
        False,
        False,
    ]


@pytest.fixture(scope="module")
def tried() -> pd.DataFrame:
    """Pretraining with three weight decays: 1 is best after the finetune, 0.1 before it."""
    base = spt_table(deltas=(0.0, 0.01, 0.05), budgets=BUDGETS, noise=1e-4)
    tables = []
    for decay, before, after in ((0.1, 1.0, 1.0), (1.0, 1.01, 0.97), (3.0, 1.05, 1.05)):
        own = base.assign(weight_decay=decay)
        own[["run", "after"]] = own[["run", "after"]].map(lambda name, decay=decay: name and f"{name}-wd{decay:g}")
        for corpus in ("domain_heldout", "domain_select", "domain_train"):
            own[corpus] *= np.where(own["stage"] == 0, before, after)
        tables.append(own)
    return pd.concat(tables, ignore_index=True)


def test_laws_and_advice_use_the_best_setting_of_each_arm(tried: pd.DataFrame) -> None:
    used = usable(tried)
    assert set(used.rows["weight_decay"]) == {1.0}
    (listed,) = settings(used).tables  # on the page
    assert len(listed.rows) == 3 * 3 * len(BUDGETS)
    assert {row.cells[1] for row in listed.rows if row.best} == {"pretraining weight_decay 1 · weight_decay 1"}
    assert len(used.rows) == len(tried) / 3
    assert any("the best of each arm is kept: weight_decay 1 (delta 0, 0.01, 0.05)" in note for note in used.notes)
    alone = tried[tried["weight_decay"] == 1]
    fitted, expected = (fit_laws(table, "post-finetuning", draws=2)[0] for table in (tried, alone))
    assert (fitted.runs, fitted.rows) == (expected.runs, expected.rows)
    assert fitted.parameters == expected.parameters
    question: dict[str, Any] = {"domain_tokens": DOMAIN_TOKENS, "budget": BUDGETS[-1], "model": PARAMS}
    ours, theirs = (advise(**question, table=table).seen for table in (tried, alone))
    assert ours == theirs
    recipe = yaml.safe_load(advise(**question, table=tried).recipe)
    assert recipe["phases"][0]["optimizer"]["weight_decay"] == 1.0
    assert recipe["phases"][-1]["optimizer"]["weight_decay"] == 1.0


def test_pretraining_without_a_finetune_of_every_run_is_judged_by_its_own_loss(tried: pd.DataFrame) -> None:
    rows = tried[(tried["stage"] == 0) | (tried["weight_decay"] == 1)]
    assert set(usable(rows).rows["weight_decay"]) == {0.1}


@pytest.mark.parametrize("value", [["a", "list"], {"a": "dict"}, np.ones(2)])
def test_values_that_are_no_scalars_are_allowed_in_other_columns_and_refused_in_ours(
    tried: pd.DataFrame, value: Any
) -> None:
    more = tried.assign(notes=[value] * len(tried))
    assert len(usable(pd.concat([more, more])).rows) == len(usable(tried).rows)
    for name in ("run", "tokenizer", "optimizer"):
        with pytest.raises(
            DataError, match=f"^{name}: .* is invalid: a column of the runs table holds text or numbers"
        ):
            usable(tried.assign(**{name: [value] * len(tried)}))


def test_tables_of_earlier_versions_are_read_as_before(tried: pd.DataFrame, tmp_path: Path) -> None:
    alone = tried[tried["weight_decay"] == 1]
    save_table(alone.drop(columns=[*SETTINGS[1:], "grid", "other"]), tmp_path)
    for name in ("table.csv", "table.parquet"):
        old = load_table(tmp_path / name)
        assert old[list(NUMBERS[1:])].isna().all(axis=None)
        assert len(usable(old).rows) == len(alone)
    both = read_table([tmp_path / "table.csv", _saved(alone, tmp_path / "new")])
    assert len(both) == len(alone)


def _saved(table: pd.DataFrame, folder: Path) -> Path:
    folder.mkdir()
    save_table(table, folder)
    return folder


def test_compare_uses_the_best_setting_of_each_arm_and_lists_the_others(tmp_path: Path) -> None:
    """The select half, which decides, prefers weight decay 1; the report half does not."""
    runs = []
    for delta, path in (("0", NPT), ("1/20", SPT)):
        for decay, shift in ((0.1, 0.0), (1, 0.3)):
            for seed in (0, 1):
                change = {"phases.0.optimizer": {"lr": 1e-3, "weight_decay": decay}}
                folder = tmp_path / f"{delta.replace('/', '-')}-{decay}-{seed}"
                runs.append(fake_run(folder, shifted(path, shift), delta=delta, seed=seed, change=change))
                summary = json.loads((folder / "summary.json").read_text())
                summary["phases"]["finetune"]["select"] = {"code": 4.0 - shift, "general": 5.0}
                write_text(folder / "summary.json", json.dumps(summary))
    found = compare(runs)
    assert [len(arm.seeds) for arm in found.arms] == [2, 2]
    assert found.arms[0].domain_after is not None
    assert found.arms[0].domain_after.mean == pytest.approx(5.3)
    assert [(one.setting, one.seeds, one.kept) for one in found.settings] == [
        ("pretraining weight_decay 1", 2, True),
        ("pretraining weight_decay 0.1", 2, False),
    ] * 2
    assert found.warnings == []
    said = io.StringIO()
    print_comparison(found, Console(file=said, width=120))
    assert "pretraining weight_decay 0.1" in said.getvalue()
    with pytest.raises(RecipeError, match="the same delta"):  # no loss to choose by
        compare([*runs, fake_run(tmp_path / "again", NPT, change={"phases.0.optimizer": {"lr": 1e-3}})])


# ------------------------------------------------------------------------------------------------ trained


def test_a_study_with_settings_and_a_later_finetune_is_trained_extended_and_reported(tmp_path: Path) -> None:
    """Trained, extended by one value, compared and reported."""
    raw = raw_study(tmp_path)
    write_dataset(tmp_path / "prose", 3, 900)
    raw["sources"]["prose"] = {"train": str(tmp_path / "prose")}
    raw["stages"][0] |= {"delta": [0, "1/4"], "budgets": [10 * STEP], "optimizer": {"lr": 3e-3, "weight_decay": 0.1}}
    raw["stages"][1]["grid"] = {"lr": [1e-3], "weight_decay": [0, 0.5]}
    later = {"name": "later", "source": "prose", "delta": 1, "tokens": 4 * STEP, "optimizer": {"lr": 1e-3}}
    raw["stages"].append({**later, "batch": {"sequences": 8}, "eval": {"every": "50%", "tokens": 400}})

    table, outcome = sweep(study_from(raw), Console(file=io.StringIO()), workers=(workers := HereAlone()))
    assert not outcome.failed
    assert len(workers.trained) == 2 + 2 + 2
    assert set(table.loc[table["stage"] == 0, "weight_decay"]) == {0.1}
    tunes = table[table["stage"] == 1]
    assert set(tunes["grid"]) == {"lr weight_decay"}
    assert set(tunes["weight_decay"]) <= {0, 0.5}
    assert dict(zip(table["stage"], table["other"], strict=True)) == {0: "", 1: "", 2: "prose"}

    raw["stages"][0]["optimizer"]["weight_decay"] = [0.1, 1]
    table, _ = sweep(study_from(raw), Console(file=io.StringIO()), workers=(workers := HereAlone()))
    assert len(workers.trained) == 2 + 2 + 2
    assert all("weightdecay1" in name for name in workers.trained)
    pd.testing.assert_frame_equal(
        read_table([tmp_path / "study" / "table.csv"])[["run", *SETTINGS, "grid", "other"]],
        table[["run", *SETTINGS, "grid", "other"]],
        check_dtype=False,
    )

    last = table[(table["stage"] == 2) & table["handed_on"]]
    found = compare([tmp_path / "study" / "runs" / name for name in last["run"]])
    assert (found.domain, found.general, found.runs[0].later) == ("chem", "general", "prose")
    assert len(found.arms) == 2
    assert len(found.settings) == 4
    assert any(line.startswith("the later finetune on prose changes the domain loss: NPT ") for line in findings(found))
    used = usable(table)
    ((_, finetunes),) = by_sizes(after_pretraining(used.rows)).items()
    paged = compare_finetunes(compared(finetunes, used.rows))
    for ours, theirs in zip(paged.arms, found.arms, strict=True):
        assert ours.domain_later is not None
        assert theirs.domain_later is not None
        assert ours.domain_later.mean == theirs.domain_later.mean
        assert ours.domain_after == theirs.domain_after
    assert paged.verdict["domain_later"].keys() == found.verdict["domain_later"].keys()


def test_all_stages_of_a_seed_are_trained_before_the_next_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Nowhere(HereAlone):
        """Workers of one run at a time that train nothing."""

        def start(self, recipe: Path, log: Path) -> Any:
            self.trained.append(recipe.stem)
            self.free = 0
            return self

        def poll(self) -> int:
            self.free = 1
            return 0

    monkeypatch.setattr(jobs, "POLL_EVERY_S", 0.0)
    sweep(study_from(raw_study(tmp_path, seeds=[7, 0])), Console(file=io.StringIO()), workers=(workers := Nowhere()))
    assert [name.rpartition("_s")[2] for name in workers.trained] == ["7"] * 6 + ["0"] * 6


def test_the_source_of_a_later_finetune_is_neither_unknown_nor_in_the_mixture(tmp_path: Path) -> None:
    raw = raw_study(tmp_path)
    for source, message in (("nowhere", "name a source"), ("chem", "is in the stage's mixture already")):
        raw["stages"][1]["source"] = source
        with pytest.raises(RecipeError, match=rf"^stages\[finetune\]\.source: .*{message}"):
            study_from(raw)
