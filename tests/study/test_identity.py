"""Runs are compared by the content of their texts and tokenizers, independently of paths."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from spt_fast.errors import DataError, RecipeError, SptWarning
from spt_fast.study.compare import compare
from spt_fast.study.costs import price
from spt_fast.study.load import load_study
from spt_fast.study.runs_table import CONTENT, read_table, save_table
from spt_fast.study.usable import usable
from spt_fast.train.folder import recipe_of
from tests import tiny
from tests.study.fake_runs import fake_run
from tests.study.synthetic import spt_table

FIXTURE = Path(__file__).parents[1] / "fixtures" / "study"
NPT, SPT = [(7.0, 5.0), (5.0, 8.0)], [(5.5, 5.1), (4.5, 6.5)]
NAMES = ("general", "code")
DATA = {f"sources.{name}.{kind}": f"{name} {kind}" for name in NAMES for kind in ("train", "heldout")}


def recorded(run: Path, tokenizer: str = "t", **data: str) -> Path:
    """A run whose summary has digests."""
    path = run / "summary.json"
    more = {"tokenizer": tokenizer, "data": DATA | {key.replace("__", "."): digest for key, digest in data.items()}}
    path.write_text(json.dumps(json.loads(path.read_text()) | more))
    return run


ELSEWHERE: dict[str, Any] = {
    "sources": {name: {"train": f"/store/{name}", "heldout": f"/store/{name}.heldout"} for name in NAMES},
    "tokenizer": "/store/bpe.tiktoken",
}


def test_equal_content_is_comparable_at_any_path_and_different_content_never(tmp_path: Path) -> None:
    npt = recorded(fake_run(tmp_path / "npt", NPT))

    def spt(name: str, change: dict[str, Any] | None = None, **known: str) -> list[Path]:
        return [npt, recorded(fake_run(tmp_path / name, SPT, delta="1/20", change=change), **known)]

    assert compare(spt("moved", ELSEWHERE)).warnings == []
    with pytest.raises(RecipeError, match=r"sources\.code\.heldout is data/code\.heldout \(code heldout\) in one"):
        compare(spt("heldout", sources__code__heldout="other"))
    with pytest.raises(RecipeError, match=r"sources\.general\.heldout"):
        compare(spt("general", sources__general__heldout="other"))
    with pytest.raises(RecipeError, match=r"tokenizer is bpe\.tiktoken \(t\) in one and bpe\.tiktoken \(u\)"):
        compare(spt("tokenizer", tokenizer="u"))
    with pytest.raises(RecipeError, match=r"tokenizer is bpe\.tiktoken \(t\) in one and not named \(u\)"):
        compare(spt("unnamed", {"tokenizer": None}, tokenizer="u"))
    for source in ("code", "general"):
        warnings = compare(spt(f"train-{source}", **{f"sources__{source}__train": "other"})).warnings
        assert any(f"the sources.{source} differs" in warning for warning in warnings)
    old = fake_run(tmp_path / "old", SPT, delta="1/20")
    assert compare([npt, old]).warnings == [], "known by its paths"
    with pytest.raises(RecipeError, match=r"tokenizer is bpe\.tiktoken \(t\) in one and /store/bpe"):
        compare([npt, fake_run(tmp_path / "old-moved", SPT, delta="1/20", change=ELSEWHERE)])


def test_a_study_has_its_own_sources(tmp_path: Path) -> None:
    table = spt_table(seeds=(0,))
    save_table(table, tmp_path)
    for name in ("table.csv", "table.parquet"):
        assert len(read_table([tmp_path / name], domain_source="chem", general_source="web")) == len(table)
        with pytest.raises(
            DataError, match=r"domain_source: 'foo' is invalid: .*is a study with the source 'chem'; leave"
        ):
            read_table([tmp_path / name], domain_source="foo")
        with pytest.raises(DataError, match="general_source: 'foo' is invalid"):
            read_table([tmp_path], general_source="foo")
    save_table(table.drop(columns=list(CONTENT)), tmp_path)
    for name in ("table.csv", "table.parquet"):
        with pytest.warns(SptWarning, match=r"domain_source: .*table.* is of an earlier version, so its study's own"):
            assert len(read_table([tmp_path / name], domain_source="foo")) == len(table)
    assert usable(table).notes == usable(table.drop(columns=list(CONTENT))).notes == []
    for column in ("domain_text", "general_text"):
        table[column] = table[column].where(table["run"] != table["run"].iloc[0], "other")
        assert f"different {column.replace('_', ' training ')}" in usable(table).notes[-1]


def test_a_source_that_no_run_has_is_named(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", NPT)
    for field in ("domain_source", "general_source"):
        with pytest.raises(DataError, match=f"{field}: 'cod' is invalid: name a source; did you mean 'code'"):
            read_table([run], **{field: "cod"})


def test_held_out_halves_that_are_split_differently_are_different_text(tmp_path: Path) -> None:
    study = shutil.copytree(FIXTURE, tmp_path / "study")
    runs = sorted(study.glob("runs/*pretrain-d0-2.56K_s?"))
    usable(read_table(runs, domain_source="chem"))
    summary = json.loads((runs[0] / "summary.json").read_text())
    (runs[0] / "summary.json").write_text(json.dumps(summary | {"heldout_halves": "windows"}))
    with pytest.raises(DataError, match="differ in heldout"):
        usable(read_table(runs, domain_source="chem"))


def test_a_study_whose_text_was_replaced_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(FIXTURE, tmp_path / "study")
    monkeypatch.chdir(tmp_path)
    tiny.write_corpora(Path())
    study = load_study("study/study.yaml")
    assert [cost.done for cost in price(study, jobs=1, gpu="H100", mfu=0.5).stages] == [4, 8]
    tiny.write_dataset(Path("chem.heldout"), 7, 700)
    with pytest.raises(RecipeError, match=r"study: sources\.chem\.heldout holds other text than .* was trained on"):
        price(study, jobs=1)
    tiny.write_corpora(Path())
    child = next(Path("study/runs").glob("*finetune*"))
    summary = json.loads((child / "summary.json").read_text())
    summary["data"]["init"] = "other"
    (child / "summary.json").write_text(json.dumps(summary))
    weights = Path(recipe_of(child).init or "")
    weights.mkdir(parents=True)
    (weights / "model.safetensors").write_text("retrained")
    with pytest.raises(RecipeError, match=r"study: .*weights.* holds other weights than .*finetune.* was trained from"):
        price(study, jobs=1)
