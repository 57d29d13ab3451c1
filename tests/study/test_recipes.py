"""The recipes of benchmarks/studies can be priced, on tiny stand-ins for their corpora."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from spt_fast.study.costs import price
from spt_fast.study.load import load_study
from spt_fast.study.study import Base
from tests.tiny import write_dataset

RECIPES = {path.stem: path for path in (Path(__file__).parents[2] / "benchmarks" / "studies").glob("*.yaml")}
RUNS = {
    "spt_scale_model": [6, 24],
    "scpt_scale_model": [4, 8],
    "decay_scale_model": [6, 6],
    "forgetting_scale_model": [1, 24],
    "third_scale_model": [3, 3, 3],
    "spt_h100": [6, 24],
}
"""Runs of one seed, by stage."""


def test_every_recipe_of_the_benchmarks_can_be_priced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    studies = {
        name: load_study(str(path), ["seeds=1", "tokenizer=null"])
        for name, path in RECIPES.items()
        if "init:" not in path.read_text()  # which needs weights
    }
    write_dataset(tmp_path / "domain", 0, 1_000_000)
    write_dataset(tmp_path / "other", 1, 20_000)
    (tmp_path / "data").mkdir()
    for source in {source for study in studies.values() for source in study.sources}:
        for made, name in (("other" if source == "general" else "domain", source), ("other", f"{source}.heldout")):
            for file in tmp_path.glob(f"{made}.*"):
                (tmp_path / "data" / f"{name}{file.suffix}").symlink_to(file)
    assert RUNS.keys() < studies.keys()
    for name, study in studies.items():
        assert not any(isinstance(model, Base) for model in study.models or ())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # stand-ins have little held-out text
            found = price(study, jobs=1, gpu="H100", mfu=0.1).stages
        assert [cost.runs for cost in found] == RUNS.get(name, [cost.runs for cost in found])
        assert all(cost.tokens and cost.flops and cost.hours for cost in found)
