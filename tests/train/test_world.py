"""The rank of a process among those that a launcher started."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch

from spt_fast.errors import RecipeError
from spt_fast.train import world
from spt_fast.train.world import before_joining, join_world


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"WORLD_SIZE": "8"}, "launch: RANK, MASTER_ADDR, MASTER_PORT missing beside WORLD_SIZE; start with torchrun"),
        ({"RANK": "3"}, "launch: WORLD_SIZE, MASTER_ADDR, MASTER_PORT missing beside RANK"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "launch: MASTER_ADDR, MASTER_PORT missing beside RANK and WORLD_SIZE"),
        (
            {"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"},
            r"RANK: 2 is invalid: below .*\(2\)",
        ),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE: 'two' is invalid: a whole number"),
        ({"LOCAL_RANK": "1"}, "launch: RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT missing beside LOCAL_RANK"),
        ({"MASTER_ADDR": "x", "MASTER_PORT": "http"}, "MASTER_PORT: 'http' is invalid: a whole number"),
        ({"SLURM_STEP_NUM_TASKS": "2(x3)"}, r"SLURM_STEP_NUM_TASKS: '2\(x3\)' is invalid: a whole number"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK: '-1' is invalid: a whole number"),
    ],
)
def test_incomplete_variables_of_a_launcher_are_refused(
    variables: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RecipeError, match=said):
        join_world(process_group=False)


def test_a_world_of_one_needs_no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "")
    assert (join_world(process_group=False).rank, join_world(process_group=False).size) == (0, 1)


def test_a_process_alone_says_an_error_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RecipeError("sed: unknown")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("looks for a GPU"))
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(RecipeError, match=r"^sed: unknown$"):
        before_joining(fail)


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"SLURM_STEP_NUM_TASKS": "2"},
        {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"},
        {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"},
    ],
    ids=["alone", "by srun", "first", "second"],
)
def test_a_process_that_cannot_join_others_says_its_own_error_soon(
    variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise RecipeError("sed: unknown")

    monkeypatch.setattr(world, "PATIENCE", timedelta(seconds=0.2))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RecipeError, match=r"^sed: unknown$"):
        before_joining(fail)
