"""Runs as jobs of a cluster, through submitit: SLURM, or `local` to try it on one machine.

Each run is a job, with one GPU if the cluster has any. A job that reaches its time limit or is preempted saves a
checkpoint first, if the cluster's signal (SIGUSR2, by submitit) leaves enough time. A job that ran out of time counts
as failed, and the next sweep continues it; a preempted job is queued again.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spt_fast.errors import RecipeError, invalid
from spt_fast.study.jobs import Process, command


class Cluster:
    """A queue of jobs. name: submitit's, such as slurm, local or debug. jobs: the most that are in the queue at a time.
    options: those of submitit's AutoExecutor, such as timeout_min=600. Raises RecipeError for a wrong name or option,
    or without submitit."""

    def __init__(self, name: str, folder: Path, *, jobs: int, options: Mapping[str, Any]) -> None:
        try:
            import submitit
        except ImportError:
            raise RecipeError("cluster: needs submitit; install spt-fast[cluster]", argument=True) from None
        try:
            self._executor = submitit.AutoExecutor(folder=folder, cluster=name)
            self._executor.update_parameters(**{"name": "spt-fast", "gpus_per_node": 1, **options})
        except (ValueError, NameError, RuntimeError, FileNotFoundError) as error:
            raise RecipeError(
                invalid("cluster", name, f"{error}; its options are {dict(options)}"), argument=True
            ) from None
        self._most = jobs
        self._started: list[_ClusterProcess] = []

    @property
    def free(self) -> int:
        self._started = [process for process in self._started if process.poll() is None]
        return self._most - len(self._started)

    def start(self, recipe: Path, log: Path) -> Process:
        process = _ClusterProcess(self._executor.submit(_train, command(recipe), log.resolve()))
        self._started.append(process)
        return process


def _train(command: list[str], log: Path) -> int:
    """Runs in the job: trains, and returns the exit code. If a signal ends the job, the run gets SIGTERM and saves."""
    with log.open("wb") as said, subprocess.Popen(command, stdout=said, stderr=said) as process:
        try:
            return process.wait()
        finally:
            process.terminate()


class _ClusterProcess:
    def __init__(self, job: Any) -> None:
        self._job = job

    def poll(self) -> int | None:
        if not self._job.done():
            return None
        return 1 if self._job.exception() is not None else self._job.result()

    def terminate(self) -> None:
        self._job.cancel()

    def wait(self) -> None:
        """Returns at once: the job ends by itself."""
