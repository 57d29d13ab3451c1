"""Runs as jobs of a cluster, with submitit's `local` cluster, which needs no SLURM."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any, cast

import pytest
import typer
from rich.console import Console

from spt_fast.cli import app
from spt_fast.cli.flags import flags_of, in_flags
from spt_fast.errors import RecipeError
from spt_fast.study import cluster as clusters
from spt_fast.study.cluster import Cluster
from spt_fast.study.jobs import Job, train_all
from spt_fast.study.study import Study
from spt_fast.study.sweep import cluster_options, workers_of
from tests.study.fake_runs import fake_run

PATH = [(6.0, 5.0), (5.0, 6.0)]


@pytest.fixture
def jobs(tmp_path: Path) -> list[Job]:
    """Three recipes; the second starts from the first."""
    recipes = [fake_run(tmp_path / f"run{i}", PATH) / "recipe.yaml" for i in range(3)]
    named = []
    for i, recipe in enumerate(recipes):
        (recipe.parent / "summary.json").unlink()
        named.append(recipe.rename(tmp_path / f"recipe{i}.yaml"))
        (recipe.parent / "recipe.yaml").write_text(named[-1].read_text())
    return [Job(named[0]), Job(named[1], after=named[0]), Job(named[2])]


def trains(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    monkeypatch.setattr(clusters, "command", lambda recipe: [sys.executable, "-c", code, str(recipe)])


def test_every_run_is_a_job_that_waits_for_the_run_it_starts_from(
    jobs: list[Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trains(
        monkeypatch,
        "import pathlib, sys, time\n"
        "recipe = pathlib.Path(sys.argv[1])\n"
        "assert '1' not in recipe.stem or (recipe.parent / 'ran0').exists()\n"
        "print('training', recipe.stem)\n"
        "(recipe.parent / recipe.stem.replace('recipe', 'ran')).touch()\n",
    )
    workers = Cluster("local", tmp_path / "jobs", jobs=2, options={"timeout_min": 5})
    ended: list[Path] = []
    outcome = train_all(jobs, tmp_path / "logs", Console(file=io.StringIO()), workers, ended=ended.append)
    assert (outcome.failed, outcome.skipped, outcome.interrupted) == ({}, [], False)
    assert {path.name for path in tmp_path.glob("ran*")} == {"ran0", "ran1", "ran2"}
    assert ended.index(jobs[0].recipe) < ended.index(jobs[1].recipe)
    assert (tmp_path / "logs" / "recipe1.log").read_text() == "training recipe1\n"


def test_a_failed_job_is_reported_and_the_others_continue(
    jobs: list[Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trains(monkeypatch, "import sys\nif 'recipe0' in sys.argv[1]: sys.exit('out of memory')")
    workers = Cluster("local", tmp_path / "jobs", jobs=3, options={"timeout_min": 5})
    outcome = train_all(jobs, tmp_path / "logs", Console(file=io.StringIO()), workers)
    assert outcome.failed == {jobs[0].recipe: "out of memory"}
    assert outcome.skipped == [jobs[1].recipe]


def test_jobs_are_cancelled_when_the_sweep_ends(
    jobs: list[Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other job would take an hour."""
    trains(monkeypatch, "import sys, time\nif 'recipe0' in sys.argv[1]: sys.exit(2)\ntime.sleep(3600)")
    workers = Cluster("local", tmp_path / "jobs", jobs=3, options={"timeout_min": 5})
    with pytest.raises(RecipeError, match=r"recipe0\.yaml: failed with exit code 2"):
        train_all(jobs, tmp_path / "logs", Console(file=io.StringIO()), workers)


def test_a_run_saves_when_its_job_is_terminated(tmp_path: Path) -> None:
    """submitit turns the cluster's signal into an exception in the job."""
    code = (
        "import pathlib, signal, sys, time\n"
        "def save(*_):\n    time.sleep(0.5)\n    pathlib.Path(sys.argv[1], 'saved').touch()\n    sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "pathlib.Path(sys.argv[1], 'ready').touch()\n"
        "time.sleep(600)\n"
    )

    def notify() -> None:
        while not (tmp_path / "ready").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGUSR2)

    def out_of_time(*_: object) -> None:
        raise TimeoutError

    previous = signal.signal(signal.SIGUSR2, out_of_time)
    try:
        thread = threading.Thread(target=notify)
        thread.start()
        with pytest.raises(TimeoutError):
            clusters._train([sys.executable, "-c", code, str(tmp_path)], tmp_path / "log")
        thread.join()
    finally:
        signal.signal(signal.SIGUSR2, previous)
    assert (tmp_path / "saved").exists()


def test_unknown_clusters_and_options_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cluster: 'lsf' is invalid"):
        Cluster("lsf", tmp_path, jobs=1, options={})
    with pytest.raises(RecipeError, match="cluster_options: 'timeout' is invalid: write KEY=VALUE"):
        cluster_options(["timeout"])
    commands: Any = typer.main.get_command(app)
    with pytest.raises(RecipeError, match="cluster_options: nodes: is not valid YAML") as refused:
        cluster_options(["nodes=]"])
    assert in_flags(refused.value, flags_of(commands.commands["sweep"])).startswith("--cluster-set: nodes: is not")
    assert cluster_options(["timeout_min=600", "slurm_partition=gpu"]) == {"timeout_min": 600, "slurm_partition": "gpu"}
    with pytest.raises(
        RecipeError, match="cluster_options: 'timeout_min=600' is invalid: it is for a cluster; add `cluster"
    ):
        workers_of(cast(Study, None), None, None, ["timeout_min=600"])
