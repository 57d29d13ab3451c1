"""Runs that an earlier version of spt_fast left unfinished (tests/fixtures/runs) reach that version's results."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from spt_fast.config import recipe_from
from spt_fast.train import checkpoint
from spt_fast.train.run import run
from tests import tiny

RUNS = Path(__file__).parents[1] / "fixtures" / "runs"
STEP = 4 * tiny.CONTEXT
"""Tokens of a step."""


def raw_recipe(name: str) -> dict[str, Any]:
    """Paths are relative to the folder of the corpora, and so are those in the fixture's recipe.yaml."""
    common: dict[str, Any] = {
        "batch": {"sequences": 4, "micro": 2},
        "optimizer": {"lr": 1e-2},
        "schedule": {"name": "constant"},
        "eval": {"every": "2 steps", "tokens": 200},
    }
    first = {"name": "first", "tokens": 4 * STEP, "mixture": {"general": "3/4", "chem": "1/4"}} | common
    second = {"name": "second", "tokens": 8 * STEP, "mixture": {"chem": 1}, "optimizer_state": "keep"} | common
    third = second | {"name": "third", "tokens": 2 * STEP}
    if name == "mid-arm":
        second |= {
            "anchor": 0.01,
            "stop": {"on": "chem", "patience": 3},
            "grid": {"lr": ["1e-2", "2e-2"], "warmup": ["2 steps"]},
        }
    return {
        "run": name,
        "precision": "fp32",
        "model": {"layers": 1, "width": 8, "heads": 1, "kv_heads": 1, "ffn": 8, "context": tiny.CONTEXT},
        "checkpoint": {"every": "4 steps", "keep": 1, "keep_best": name == "mid-arm"},
        "log": {"every": "1 steps"},
        "sources": {source: {"train": source, "heldout": f"{source}.heldout"} for source in ("general", "chem")},
        "phases": [first, second, third],
    }


REACHED = {
    "mid-arm": {
        "second": (3.8401697693449077, 3.492428343705457, 6.007879730929408, 19.863610748696374),
        "third": (3.8477286907157513, 3.405025677247481, 6.1643616102283, 19.207842518924735),
    },
    "boundary": {
        "second": (3.9062420045486603, 3.766317434985228, 5.507699149214148, 22.022253728529904),
        "third": (3.894642827486751, 3.6754918531938032, 5.660747086320609, 21.525995682590292),
    },
}
"""Results of the earlier version by run and phase: held-out losses (general, chem); norm and sum of all weights."""


@pytest.mark.parametrize(
    ("name", "snapshots"), [("mid-arm", {"current", "start", "best", "kept"}), ("boundary", {"current"})]
)
def test_a_run_of_the_previous_version_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, snapshots: set[str]
) -> None:
    tiny.write_corpora(tmp_path)
    monkeypatch.chdir(tmp_path)
    folder = Path(shutil.copytree(RUNS / name, name))
    found = checkpoint.newest(folder / "checkpoints")
    assert found is not None
    assert set(checkpoint.load(found.path)) == snapshots
    before = tiny.metrics(folder)
    summary = run(recipe_from(raw_recipe(name)), resume=True, progress=False)
    assert summary["status"] == "done"
    assert tiny.metrics(folder)[: len(before)] == before
    for phase, reached in REACHED[name].items():
        tensors = [tensor.double() for tensor in load_file(folder / "weights" / phase / "model.safetensors").values()]
        heldout = summary["phases"][phase]["heldout"]
        norm = sum(tensor.square().sum().item() for tensor in tensors) ** 0.5
        total = sum(tensor.sum().item() for tensor in tensors)
        assert (heldout["general"], heldout["chem"], norm, total) == pytest.approx(reached, rel=1e-4)


def test_a_recipe_without_a_newer_field_is_the_same_recipe() -> None:
    """Each key with a default, missing from a recipe.yaml that is older than the key."""
    given = raw_recipe("mid-arm")
    today = recipe_from(given)

    def left_out(resolved: Any, given: Any) -> Iterator[tuple[Any, Any]]:
        for key, value in resolved.items() if isinstance(resolved, dict) else enumerate(resolved):
            if isinstance(given, dict) and key not in given:
                yield resolved, key
            elif isinstance(value, (dict, list)):
                yield from left_out(value, given[key])

    count = len(list(left_out(today.plain(), given)))
    assert count > 30
    for i in range(count):
        older = today.plain()
        section, key = list(left_out(older, given))[i]
        del section[key]
        assert recipe_from(older).changes(today) == [], key
