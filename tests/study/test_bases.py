"""Studies that start from weights: several bases, the ready studies with `init`, and the runs table."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from spt_fast.cli import app
from spt_fast.errors import CheckpointError, RecipeError
from spt_fast.model.flops import parameters
from spt_fast.model.gpt import GPT, GPTConfig
from spt_fast.study.compare import compare
from spt_fast.study.costs import price
from spt_fast.study.load import load_study
from spt_fast.study.runs_table import table_of
from spt_fast.study.study import study_from
from spt_fast.study.sweep import sweep
from spt_fast.study.tree import expand
from spt_fast.study.usable import usable
from spt_fast.train.run import run
from tests.study.tiny_study import HereAlone, raw_study
from tests.tiny import CONTEXT, VOCAB

SHAPE = {"layers": 1, "heads": 2, "kv_heads": 1, "ffn": 32, "context": 8 * CONTEXT, "vocab_size": VOCAB}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two bases of one family, and the tiny corpora."""
    folder = tmp_path_factory.mktemp("bases")
    for name, width in (("small_one", 16), ("large", 32)):
        GPT(GPTConfig(**SHAPE, width=width), seed=width).save_hf(folder / name)
    raw_study(folder)
    return folder


def raw(folder: Path, **changes: Any) -> dict[str, Any]:
    """A study that finetunes both, in windows far shorter than their context."""
    raw = raw_study(folder)
    stage = raw["stages"][1] | {"replay": [0, "1/4"], "grid": None, "batch": {"sequences": 4, "context": CONTEXT}}
    models = [{"init": str(folder / name)} for name in ("small_one", "large")]
    return raw | {"models": models, "stages": [stage], **changes}


def ready(folder: Path, name: str, *more: str) -> list[str]:
    prefixes = ["--general", str(folder / "general"), "--domain", str(folder / "chem"), "--out", str(folder / name)]
    return ["sweep", name, *prefixes, *more]


def test_several_bases_are_trained_and_named_in_the_table(folder: Path) -> None:
    study = study_from(raw(folder))
    runs = expand(study)
    assert [run.name.split("_")[0] for run in runs] == ["small-one"] * 2 + ["large"] * 2
    for planned in runs:
        run(planned.recipe, progress=False)
    table = table_of([Path(planned.recipe.run) for planned in runs], "chem", "general")
    for width, name in ((16, "small_one"), (32, "large")):
        own = table[table["base"] == str(folder / name)]
        assert set(own["params"]) == {parameters(GPTConfig(**SHAPE, width=width))}
        assert set(own["stage"]) == {1}
        assert own["run"].nunique() == 2
        assert (set(own["sequences"]), set(own["window"])) == ({4}, {CONTEXT})
        weights = folder / "study" / "runs" / own["run"].iloc[0] / "weights" / "finetune"
        assert json.loads((weights / "config.json").read_text())["max_position_embeddings"] == 8 * CONTEXT
    small = [Path(planned.recipe.run) for planned in runs[:2]]
    compared = compare(small)
    assert (compared.tokens, compared.domain, compared.general) == (0, "chem", "general")
    assert [(arm.treatment.delta, arm.treatment.replay) for arm in compared.arms] == [(0.0, 0.0), (0.0, 0.25)]
    for figures in compared.runs:
        before = json.loads((Path(figures.folder) / "metrics.jsonl").read_text().splitlines()[0])["heldout"]
        assert (figures.domain_before, figures.general_before) == (before["chem"], before["general"])
    with pytest.raises(RecipeError, match=r"cannot be compared: base is .*small_one .* in one and .*large"):
        compare([small[0], Path(runs[2].recipe.run)])
    tokenized = [Path(shutil.copytree(small[0], folder / f"tokenizer {digit}")) for digit in "ef"]
    for digit, copy in zip("ef", tokenized, strict=True):
        summary = json.loads((copy / "summary.json").read_text())
        (copy / "summary.json").write_text(json.dumps(summary | {"tokenizer": 64 * digit}))
    with pytest.raises(RecipeError, match=r"tokenizer is the base's \(e{12}\) in one and the base's \(f{12}\) in the"):
        compare(tokenized)
    mixed = table.assign(params=1.0)  # as if they had the same size
    assert any("different base" in note for note in usable(mixed).notes)
    assert not any("different base" in note for note in usable(table).notes)


def test_runs_of_a_study_that_differ_in_their_average_are_trained_once(folder: Path) -> None:
    stage = raw(folder)["stages"][0] | {"replay": [0], "average": [0, "10%", "25%"], "tokens": 4 * 4 * CONTEXT}
    more = stage | {"name": "more", "average": [0]}
    models = {"models": None, "init": str(folder / "small_one"), "study": str(folder / "averages")}
    study = study_from(raw(folder, **models, stages=[stage, more]))
    runs = expand(study)
    assert [planned.made_by is None for planned in runs] == [True, False, False, True, True, True]
    workers = HereAlone()
    table, outcome = sweep(study, Console(file=io.StringIO()), workers=workers)
    assert (outcome.failed, outcome.skipped, outcome.interrupted) == ({}, [], False)
    assert workers.trained == [planned.name for planned in runs if planned.made_by is None]
    ends = table[table["handed_on"] & (table["stage"] == 1)]
    assert sorted(ends["average"]) == [0.0, 0.1, 0.25]
    assert ends["domain_heldout"].nunique() == 3
    assert table.loc[table["stage"] == 2, "after"].nunique() == 3
    assert {cost.tokens for cost in price(study, jobs=1, mfu=0.4).stages} == {0}
    grown = study_from(raw(folder, **models, stages=[stage | {"average": [0, "10%", "25%", "50%"]}]))
    sweep(grown, Console(file=io.StringIO()), workers=workers)
    assert workers.trained[4:] == [run.name for run in expand(grown)[-1:]], "the weights that it would share are gone"


@pytest.mark.parametrize("name", ["dcpt", "forgetting"])
def test_the_ready_studies_can_start_from_weights(folder: Path, name: str) -> None:
    given = {"general": folder / "general", "domain": folder / "chem", "out": folder / name, "tokenizer": None}
    bases = [folder / "small_one", folder / "large"]
    study = load_study(name, given=given | {"init": bases})
    assert [stage.axes.name for stage in study.stages] == ["continue" if name == "dcpt" else "finetune"]
    assert {run.recipe.init for run in expand(study)} == {str(base) for base in bases}
    assert {run.recipe.phases[0].batch.context for run in expand(study)} == {None}  # their own context is short


def test_the_command_prices_a_study_of_a_base(folder: Path) -> None:
    tiny = [f"stages.0.batch.context={CONTEXT}", "domain_tokens=all", "stages.0.delta=[0, 1]", "stages.0.tokens=8K"]
    flags = ["--init", str(folder / "large"), "--dry-run", "--json", "--mfu", "40%"]
    result = CliRunner().invoke(app, ready(folder, "dcpt", *flags, *(flag for key in tiny for flag in ("--set", key))))
    assert result.exit_code == 0, result.output
    total = json.loads(result.stdout)["total"]
    assert (total["runs"], total["tokens"]) == (2, 2 * 8000 // 256 * 256)


def test_the_window_is_limited_if_the_base_has_a_longer_context(folder: Path) -> None:
    config = folder / "large" / "config.json"
    short = config.read_text()
    config.write_text(short.replace(f'"max_position_embeddings": {8 * CONTEXT}', '"max_position_embeddings": 131072'))
    given = {"general": folder / "general", "domain": folder / "chem", "out": folder / "cut"}
    runs = expand(load_study("dcpt", given=given | {"init": [folder / "large"]}))
    assert {run.recipe.phases[0].batch.context for run in runs} == {2048}
    config.write_text(short)


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"models": [{"init": "absent"}]}, CheckpointError, r"^init: absent: is not a folder"),
        (
            {"models": [{"init": "a"}, {"preset": "1m"}]},
            RecipeError,
            r"^models: some are trained from scratch",
        ),
        (
            {"models": [{"init": "a", "context": 64}]},
            RecipeError,
            r"^models.context: 64 is inv.*`batch: \{context: 64",
        ),
        ({"models": [{"init": "a", "width": 64}]}, RecipeError, r"^models.width: 64 is invalid.*leave it out$"),
        ({"models": [{"init": "a"}], "init": "a"}, RecipeError, r"^models: both are given"),
    ],
)
def test_weights_that_a_study_cannot_start_from_are_refused(
    folder: Path, changes: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        expand(study_from(raw(folder, **changes)))


def test_a_start_from_scratch_needs_shapes(folder: Path) -> None:
    with pytest.raises(RecipeError, match=r"start: scratch needs a shape"):
        study_from(
            raw(folder, stages=[*raw(folder)["stages"], {**raw(folder)["stages"][0], "name": "x", "start": "scratch"}])
        )


@pytest.mark.parametrize("name", ["spt", "scratch-vs-pretrained"])
def test_studies_of_pretraining_refuse_weights(folder: Path, name: str) -> None:
    result = CliRunner().invoke(
        app, ready(folder, name, "--init", str(folder / "large"), "--tokenizer", "t", "--dry-run")
    )
    assert re.search(r"--init: '.*large' is invalid: .*trains from scratch; leave it out", str(result.exception))
