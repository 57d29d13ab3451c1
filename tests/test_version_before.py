"""What an earlier version wrote is read as that version read it: the table and the runs of a study."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from spt_fast import cli
from tests.tiny import write_corpora

FIXTURE = Path(__file__).parent / "fixtures" / "study"


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the study below the working directory; its recipes hold paths relative to that."""
    shutil.copytree(FIXTURE, tmp_path / "study")
    monkeypatch.chdir(tmp_path)
    return Path("study")


def printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object) -> Any:
    """The JSON that a command prints."""
    monkeypatch.setattr(sys, "argv", ["spt-fast", *map(str, words), "--json"])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    said = capsys.readouterr()
    assert exit_.value.code == 0, said.err
    return json.loads(said.out)


def without_what_is_new(now: Any, before: Any) -> Any:
    """`now` with the keys that `before` has."""
    if isinstance(now, dict) and isinstance(before, dict):
        return {key: without_what_is_new(now[key], before[key]) for key in before if key in now}
    if isinstance(now, list) and isinstance(before, list) and len(now) == len(before):
        return [without_what_is_new(*pair) for pair in zip(now, before, strict=True)]
    return now


def test_its_runs_compare_as_they_did(
    study: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    finetunes = sorted(study.glob("runs/*finetune*"))
    before = json.loads((study / "comparison.json").read_text())
    now = printed(monkeypatch, capsys, "compare", *finetunes)
    (warning,) = now.pop("warnings")
    assert "tokenizer" in warning
    assert before.pop("warnings") == []
    assert without_what_is_new(now, before) == before


@pytest.mark.parametrize("table", ["table.parquet", "table.csv"])
def test_its_table_is_read_as_it_was(
    table: str, study: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("--domain-tokens", "400", "--budget", "2560")
    now = printed(monkeypatch, capsys, "advise", *asked, "--runs", study / table)
    before = json.loads((study / "advice.json").read_text())
    assert now.keys() == before.keys()
    for part in ("asked", "decision", "expected", "seen", "shares", "replay", "learning_rates"):
        assert figures(without_what_is_new(now[part], before[part])) == figures(before[part]), part


def figures(part: Any) -> Any:
    """Without the sentence in it, whose words may change."""
    return {key: value for key, value in part.items() if key != "says"} if isinstance(part, dict) else part


def test_its_run_folders_give_its_table(
    study: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (study / "table.parquet").rename(study / "table-before.parquet")
    laws = {}
    for runs in ([study / "table-before.parquet"], sorted(study.glob("runs/*"))):
        laws[len(runs)] = printed(monkeypatch, capsys, "fit", *runs, "--domain-source", "chem")
    one, many = laws.values()
    assert one == many
    assert [(law["law"], law["runs"], law["rows"]) for law in one["laws"]][:3] == [
        ("overfitting", 4, 16),
        ("mixture-repetition", 4, 16),
        ("post-finetuning", 8, 8),
    ]


def test_its_study_is_done(study: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    write_corpora(Path())
    total = printed(monkeypatch, capsys, "sweep", study / "study.yaml", "--dry-run")["total"]
    assert (total["runs"], total["done"], total["tokens"]) == (12, 12, 0)
