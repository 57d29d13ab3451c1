"""The output for other programs is stable: the keys of every `--json` and of the files beside it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from spt_fast import cli
from spt_fast.study.runs_table import save_table
from tests.study.fake_runs import fake_run
from tests.study.synthetic import spt_table
from tests.study.test_compare import NPT, SPT, shifted
from tests.study.test_crossover import rows_of
from tests.study.test_doge import raw_recipe, write_sources
from tests.study.tiny_study import raw_study
from tests.test_version_before import FIXTURE

KEYS: dict[str, dict[str, str]] = json.loads(Path(__file__).with_name("json_keys.json").read_text())
"""By command, the paths in its output with the kinds of their values."""
KINDS = {bool: "bool", int: "int", float: "float", str: "str", type(None): "null"}


def keys_of(data: Any, at: str = "") -> dict[str, str]:
    found: dict[str, set[str]] = {}

    def walk(data: Any, at: str) -> None:
        if isinstance(data, (dict, list)):
            items = data.items() if isinstance(data, dict) else (("[]", item) for item in data)
            found.setdefault(at, set()).add(type(data).__name__)
            for key, value in items:
                walk(value, f"{at}/{key}")
        else:
            found.setdefault(at, set()).add(KINDS[type(data)])

    walk(data, at)
    return {path: "|".join(sorted(kinds)) for path, kinds in sorted(found.items())}


def printed(folder: Path, name: str, capsys: pytest.CaptureFixture[str]) -> Any:
    sys.argv = ["spt-fast", *WORDS[name](folder), "--json"]
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    said = capsys.readouterr()
    assert exit_.value.code == 0, said.err
    return json.loads(said.out)


def _compare(folder: Path) -> list[str]:
    replayed = {"phases.1.mixture": {"general": "1%", "code": "99%"}}
    runs = [
        fake_run(folder / "npt-0", NPT),
        fake_run(folder / "npt-1", shifted(NPT, 0.1), seed=1),
        fake_run(folder / "spt-0", SPT, delta="1/20"),
        fake_run(folder / "spt-1", shifted(SPT, 0.2), delta="1/20", seed=1),
        fake_run(folder / "spt-replay", shifted(SPT, 0.5), delta="1/20", change=replayed),
        fake_run(folder / "npt-4M", shifted(NPT, -0.7), tokens=4_000_000),
    ]
    return ["compare", *map(str, runs), "--out", str(folder)]


def _fit(folder: Path) -> list[str]:
    table = spt_table(seeds=(0,))
    failed = table[:1].assign(run="failed", status="failed")
    save_table(pd.concat([table, failed], ignore_index=True), folder)
    return ["fit", str(folder), "--law", "overfitting", "--out", str(folder)]


def _crossover(folder: Path) -> list[str]:
    table = pd.DataFrame(rows_of(seeds=2, noise=0.05)).assign(epochs=4.0, injected=0.0, phase="finetune", after="")
    save_table(table, folder)
    return ["fit", str(folder), "--law", "overfitting"]


def _sweep(folder: Path) -> list[str]:
    (folder / "study.yaml").write_text(yaml.safe_dump(raw_study(folder)))
    return ["sweep", str(folder / "study.yaml"), "--dry-run", "--price", "2.5", "--jobs", "2"]


def _report(folder: Path) -> list[str]:
    return ["report", str(FIXTURE), "--out", str(folder / "report.html")]


def _reweight(folder: Path) -> list[str]:
    write_sources(folder)
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(raw_recipe(folder, ["alike", "like", "other"], 3)))
    return ["reweight", str(recipe), "--target", "other"]


ASKED = ["advise", "--inference-tokens", "1T"]
ROOT = Path(__file__).parents[2]


def _by_laws(folder: Path) -> list[str]:
    table = ROOT / "tests" / "advice" / "data" / "runs.csv"
    words = ["--domain-tokens", "300M", "--budget", "200B", "--model", "100m", "--max-general-rise", "5%"]
    return [*ASKED, *words, "--runs", str(table)]


def _as_seen(folder: Path) -> list[str]:
    table = ROOT / "benchmarks" / "results" / "2026-11-21-cpu2-spt-smiles.csv"
    return ["advise", "--domain-tokens", "1M", "--budget", "20M", "--runs", str(table)]


def _by_papers(folder: Path) -> list[str]:
    return [*ASKED, "--domain-tokens", "30M", "--budget", "20B", "--model", "1b"]


WORDS = {
    "compare": _compare,
    "fit": _fit,
    "fit of the crossover": _crossover,
    "sweep": _sweep,
    "report": _report,
    "reweight": _reweight,
    "advise by laws": _by_laws,
    "advise as seen": _as_seen,
    "advise by papers": _by_papers,
}


@pytest.mark.parametrize("name", WORDS)
def test_the_json_keys_of_a_command_are_unchanged(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)
    result = printed(tmp_path, name, capsys)
    assert keys_of(result) == KEYS[name]
    for file in ("comparison.json", "fits.json"):
        if (tmp_path / file).exists():
            assert json.loads((tmp_path / file).read_text()) == result
