"""Learning-rate schedules against values computed by hand."""

from __future__ import annotations

import itertools
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import yaml

from spt_fast.config import Recipe, Schedule, recipe_from
from spt_fast.errors import RecipeError
from spt_fast.fields import Span
from spt_fast.train.lr import learning_rate


def rates(schedule: Schedule, steps: int) -> list[float]:
    return [learning_rate(schedule, 1.0, step, steps, 100) for step in range(steps)]


def test_warmup_reaches_the_peak_at_its_last_step() -> None:
    got = rates(Schedule(name="constant", warmup=Span.parse("4 steps", "")), 8)
    assert got == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]


def test_cosine_is_half_way_in_the_middle_and_final_at_the_horizon() -> None:
    schedule = Schedule(name="cosine", final=Fraction(1, 10))
    got = rates(schedule, 100)
    assert got[0] == 1.0
    assert got[50] == pytest.approx(0.55)
    assert learning_rate(schedule, 1.0, 100, 100, 100) == pytest.approx(0.1)
    assert learning_rate(schedule, 1.0, 500, 100, 100) == pytest.approx(0.1)
    assert all(a > b for a, b in itertools.pairwise(got))


def test_a_horizon_beyond_the_phase_cuts_the_shape_off() -> None:
    long = Schedule(name="cosine", final=Fraction(1, 10), horizon=100_000)  # 1000 steps of 100 tokens
    got = rates(long, 100)
    assert got[99] == pytest.approx(learning_rate(Schedule(name="cosine", final=Fraction(1, 10)), 1.0, 99, 1000, 100))
    assert got[99] > 0.97


def test_linear_and_wsd() -> None:
    linear = Schedule(name="linear", final=Fraction(0))
    assert rates(linear, 4) == [1.0, 0.75, 0.5, 0.25]
    wsd = Schedule(name="wsd", final=Fraction(0), decay=Span.parse("40%", ""))
    assert rates(wsd, 10) == pytest.approx([1, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25])


def recipe(*schedules: dict[str, Any], **phase: Any) -> Recipe:
    """Phases of ten steps of 1,000 tokens."""
    phases = [
        {"name": f"p{i}", "tokens": "10K", "mixture": {"a": 1}, "optimizer": {"lr": 1.0}, "schedule": schedule, **phase}
        | {"batch": {"sequences": 10}}
        for i, schedule in enumerate(schedules)
    ]
    model = {"layers": 1, "width": 8, "heads": 1, "context": 100}
    return recipe_from({"run": "x", "model": model, "sources": {"a": {"train": "a", "heldout": "h"}}, "phases": phases})


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (
            {"name": "constant", "warmup": "11 steps"},
            r"warmup: '11 steps' is invalid: its schedule runs for 10 steps;.* 1,000 tokens by",
        ),
        ({"name": "constant", "warmup": "10K"}, r"warmup: '10000' is invalid: its schedule runs for 10 steps;"),
        ({"name": "cosine", "warmup": "100%"}, r"warmup: '100%' is invalid: its schedule runs for 10 steps; write a"),
        ({"name": "constant", "warmup": "10.1K"}, r"warmup: '10100' is invalid: its schedule runs for 10 steps;"),
        ({"name": "cosine", "warmup": "5 steps", "horizon": "4K"}, r"it reaches to the horizon of 4 steps, where the"),
        ({"name": "linear", "warmup": "50%", "horizon": "5K"}, r"warmup: '50%' is invalid: it reaches to the horizon"),
        (
            {"name": "wsd", "warmup": "3 steps", "decay": "80%"},
            r"decay: '80%' is invalid: with the warm-up of 3",
        ),
        ({"name": "wsd", "decay": "11 steps"}, r"decay: '11 steps' is invalid: with the warm-up of 0 steps it is"),
        (
            {"name": "wsd", "decay": "20%", "warmup": "7K", "horizon": "8K"},
            r"longer than the horizon of 8 steps,",
        ),
        (
            {"name": "wsd", "decay": 0, "horizon": "8K"},
            r"decay: '0' is invalid: it has no steps before the horizon of 8",
        ),
    ],
)
def test_a_rate_that_would_jump_or_never_reach_its_peak_is_refused_at_reading(
    schedule: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=rf"^phases\[p0\]\.schedule\..*{message}"):
        recipe(schedule)


def test_a_run_of_an_earlier_version_keeps_a_schedule_that_is_refused_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    overlapping = {"name": "wsd", "warmup": "3 steps", "decay": "80%"}
    good = recipe({"name": "wsd", "warmup": "3 steps", "decay": "50%"}).plain()
    good["phases"][0]["schedule"]["decay"] = "80%"
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "recipe.yaml").write_text(yaml.safe_dump(good))
    assert recipe(overlapping).phases[0].schedule.decay == Span.parse("80%", "")
    with pytest.raises(RecipeError, match="decay: '90%' is invalid"):
        recipe(overlapping | {"decay": "90%"})


def test_a_warm_up_of_a_grid_is_checked_and_a_continued_one_may_be_longer_than_its_phase() -> None:
    with pytest.raises(RecipeError, match=r"^phases\[p0\]\.grid\.warmup: '12 steps' is invalid"):
        recipe({"name": "constant"}, grid={"warmup": ["2 steps", "12 steps"]})
    recipe({"name": "constant", "warmup": "12 steps"}, {"continue": True})
    with pytest.raises(RecipeError, match="its schedule runs for 20 steps"):
        recipe({"name": "constant", "warmup": "21 steps"}, {"continue": True}, {"name": "constant"})


@pytest.mark.parametrize(
    "schedule",
    [
        {"name": "cosine", "warmup": "90%"},
        {"name": "linear", "warmup": "2 steps", "horizon": "8K"},
        {"name": "wsd", "warmup": "80%"},
        {"name": "wsd", "decay": 0},
        {"name": "wsd", "warmup": "5 steps", "horizon": "20K", "decay": "75%"},
        {"name": "constant", "warmup": "9K"},
    ],
)
def test_an_accepted_schedule_reaches_its_peak_and_falls_no_faster_than_it_says(schedule: dict[str, Any]) -> None:
    read = recipe(schedule).phases[0].schedule
    got = [learning_rate(read, 1.0, step, 10, 1000) for step in range(10)]
    assert max(got) == 1.0
    assert max(a - b for a, b in itertools.pairwise(got)) <= {"cosine": 0.2, "linear": 0.16}.get(schedule["name"], 0.51)
