"""Damage to a run's summary.json and metrics.jsonl is named, field by field, by whatever reads the run."""

from __future__ import annotations

import copy
import json
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from spt_fast.errors import CheckpointError
from spt_fast.study.compare import Finetune
from spt_fast.study.curves import curves_of
from spt_fast.study.runs import FinishedRun
from spt_fast.study.runs_table import rows_of
from spt_fast.train import folder
from spt_fast.train.folder import summary_of

RUNS = Path(__file__).parents[1] / "fixtures" / "study" / "runs"
SPT, PRETRAINED = (f"1x32_pretrain-d0.25-u400-2.56K{rest}_s0" for rest in ("-at2.56K_finetune-d1-u400-512", ""))
READERS: dict[str, Callable[[Path], Any]] = {
    "table": lambda runs: rows_of(runs / SPT, "chem", "general"),
    "compare": lambda runs: Finetune.of(FinishedRun.read(runs / SPT)),
    "curves": lambda runs: curves_of([runs / SPT, runs / PRETRAINED]),
}


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the study's runs; their recipes hold paths relative to the working directory, and are read once."""
    monkeypatch.setattr(folder, "recorded_recipe", cache(folder.recorded_recipe))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(RUNS, "study/runs")
    return Path("study/runs")


def fields(summary: dict[str, Any], within: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, value in summary.items():
        yield (*within, name)
        if isinstance(value, dict):
            yield from fields(value, (*within, name))


def changed(file: Path, change: Callable[[dict[str, Any], str], None]) -> Iterator[str]:
    """The name of each field in turn, while it alone is changed in the file."""
    whole = file.read_text()
    for *parents, name in fields(json.loads(whole)):
        summary = json.loads(whole)
        inner = summary
        for parent in parents:
            inner = inner[parent]
        change(inner, name)
        file.write_text(json.dumps(summary))
        yield ".".join((*parents, name))
    file.write_text(whole)


def is_refused(read: Callable[[], Any], file: Path, field: str) -> bool:
    """Whether reading ends with an error that names the file, the field and the remedy."""
    try:
        read()
    except CheckpointError as error:
        start, end = f"{file}: is damaged", "; delete it and resume the training, which writes it again"
        return str(error).startswith(start) and f"(`{field}` is " in str(error) and str(error).endswith(end)
    return False


def needed(runs: Path, run: str) -> dict[str, set[str]]:
    """The fields of a run, by what reads it, without which reading is refused."""
    found: dict[str, set[str]] = {reader: set() for reader in READERS}
    file = runs / run / "summary.json"
    for field in changed(file, lambda inner, name: inner.pop(name)):
        for reader, read in READERS.items():
            if is_refused(lambda read=read: read(runs), file, field):  # type: ignore[misc]
                found[reader].add(field)
    return found


def test_a_missing_field_is_named_where_it_is_needed(runs: Path) -> None:
    of_all = {"status", "phases", "phases.finetune", "phases.finetune.arm"}
    of_run = {"parameters", "flops_per_token", "tokenizer", "seed", "data", "train_tokens", "train_tokens.chem"}
    assert needed(runs, SPT) == {
        "table": of_all | of_run | {"phases.finetune.tokens", "phases.finetune.handed_on"},
        "compare": of_all | {"phases.finetune.heldout"},
        "curves": set(),  # those of damaged runs are left out
    }


def test_a_missing_field_of_the_run_before_is_named(runs: Path) -> None:
    first, second = "phases.pretrain-1.28K", "phases.pretrain-2.56K"
    of_both = {"status", "phases", first, f"{first}.tokens", f"{second}.tokens"}
    assert needed(runs, PRETRAINED) == {
        "table": of_both | {f"{first}.arm", "flops_per_token", "train_tokens"},
        "compare": of_both | {f"{first}.arm", f"{first}.epochs", f"{second}.epochs"},
        "curves": set(),
    }


def test_a_field_of_another_type_is_named(runs: Path) -> None:
    file, unread = runs / SPT / "summary.json", {"device", "phases.finetune.grid"}
    for field in changed(file, lambda inner, name: inner.update({name: True})):
        assert is_refused(lambda: summary_of(runs / SPT), file, field) == (field not in unread), field


@pytest.mark.parametrize("arm", [-1, 0.5, "0", None])
def test_an_arm_is_a_whole_number(runs: Path, arm: object) -> None:
    file = runs / SPT / "summary.json"
    summary = json.loads(file.read_text())
    summary["phases"]["finetune"]["arm"] = arm
    file.write_text(json.dumps(summary))
    with pytest.raises(CheckpointError, match=re.escape(f"(`phases.finetune.arm` is {arm!r}, not a whole number)")):
        summary_of(runs / SPT)


@pytest.mark.parametrize("reader", ["table", "compare"])
def test_an_arm_that_the_grid_does_not_have_is_named(runs: Path, reader: str) -> None:
    file = runs / SPT / "summary.json"
    summary = json.loads(file.read_text())
    summary["phases"]["finetune"]["arm"] = 7
    file.write_text(json.dumps(summary))
    with pytest.raises(CheckpointError, match=re.escape("(`phases.finetune.arm` is 7, but there are ")):
        READERS[reader](runs)


def test_a_summary_is_copied_as_other_mappings_are(runs: Path) -> None:
    summary = summary_of(runs / SPT)
    assert summary is not None
    for copied in (type(summary)(summary.items()), copy.deepcopy(summary), pickle.loads(pickle.dumps(summary))):
        assert copied == summary == json.loads((runs / SPT / "summary.json").read_text())


OF_A_STEP = {"kind", "phase", "arm", "step", "tokens", "loss", "lr", "grad_norm", "tokens_per_s", "mfu"}
OF_AN_EVALUATION = {"kind", "phase", "arm", "step", "tokens", "heldout", "select", "train"}


def refused(runs: Path, kind: str, change: Callable[[dict[str, Any], str], None]) -> dict[str, set[str]]:
    """The fields of the last record of a kind, by what reads the run, that are named while they alone are changed; for
    curves those without which the run is left out."""
    file = runs / SPT / "metrics.jsonl"
    lines = file.read_text().splitlines()
    number, whole = [(i, record) for i, record in enumerate(map(json.loads, lines)) if record["kind"] == kind][-1]
    found: dict[str, set[str]] = {reader: set() for reader in READERS}
    for name in whole:
        record = dict(whole)
        change(record, name)
        file.write_text("\n".join([*lines[:number], json.dumps(record), *lines[number + 1 :]]))
        for reader in ("table", "compare"):
            says = what_is_said(lambda read=READERS[reader]: read(runs))  # type: ignore[misc]
            named = re.fullmatch(rf"(.+): is damaged.* \(line {number + 1}: `{name}` is .+\); train.* again", says)
            assert not says or (named and named[1] == str(file)), says
            found[reader] |= {name} if says else set()
        found["curves"] |= set() if any(curve.run == SPT for curve in READERS["curves"](runs)) else {name}
    file.write_text("\n".join(lines))
    return found


def what_is_said(read: Callable[[], Any]) -> str:
    try:
        read()
    except CheckpointError as error:
        return str(error)
    return ""


def test_a_record_without_a_field_is_named_where_it_is_needed(runs: Path) -> None:
    def leave_out(record: dict[str, Any], name: str) -> None:
        del record[name]

    assert refused(runs, "train", leave_out) == {
        "table": {"kind"},
        "compare": {"kind"},
        "curves": OF_A_STEP - {"step", "mfu"},
    }
    assert refused(runs, "eval", leave_out) == {
        "table": OF_AN_EVALUATION,
        "compare": OF_AN_EVALUATION - {"select", "train"},
        "curves": {"kind"},
    }


def test_a_field_of_another_type_in_a_record_is_named(runs: Path) -> None:
    for kind, fields_ in (("train", OF_A_STEP), ("eval", OF_AN_EVALUATION)):
        found = refused(runs, kind, lambda record, name: record.update({name: [1]}))
        assert found == dict.fromkeys(READERS, fields_)


@pytest.mark.parametrize("line", ["", "7", "[]", '{"kind": "eval"', "[" * 99_999], ids=lambda line: line[:20])
def test_a_line_that_is_no_record_is_named(runs: Path, line: str) -> None:
    file = runs / SPT / "metrics.jsonl"
    file.write_text(f"{file.read_text()}{line}\n")
    start = f"{file}: is damaged (line {len(file.read_text().splitlines())}: it is "
    for reader in ("table", "compare"):
        says = what_is_said(lambda read=READERS[reader]: read(runs))  # type: ignore[misc]
        assert says.startswith(start)
        assert says.endswith("); train the run again")
    assert {curve.run for curve in READERS["curves"](runs)} == {PRETRAINED}
