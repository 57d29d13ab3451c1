"""`spt-fast sweep`: trains a study's runs in the order of its tree, and writes the table of their results.

    STUDY/recipes/, runs/, logs/, table.parquet, table.csv

Finished runs are skipped and interrupted ones continue. So the same command restarts a sweep, and a study whose grid
has grown trains only the new runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from rich.console import Console

from spt_fast.config import Model, Recipe, Source
from spt_fast.data.shards import TokenDataset
from spt_fast.errors import DataError, RecipeError, counted, invalid
from spt_fast.fields import parse_yaml, paths
from spt_fast.files import write_text
from spt_fast.printing import print_facts, print_named
from spt_fast.study.cluster import Cluster
from spt_fast.study.jobs import Job, Local, Outcome, Workers, is_done, train_all
from spt_fast.study.runs_table import Row, check_place, in_columns, rows_of, save_table
from spt_fast.study.study import Base, Study
from spt_fast.study.tree import PlannedRun, expand, naming_stage
from spt_fast.train.doubts import doubts, warn
from spt_fast.train.folder import owned, summary_of
from spt_fast.train.plan import KINDS, make_plan, open_source
from spt_fast.train.precision import Precision, write_precision
from spt_fast.train.resume import changes
from spt_fast.train.trackers import check_installed
from spt_fast.train.weights import digest_of


def sweep(study: Study, console: Console, *, workers: Workers | None = None) -> tuple[pd.DataFrame, Outcome]:
    """Train the unfinished runs of a study; returns its state, with the table of all finished runs.

    `workers` train the runs, by default this machine. Raises RecipeError, DataError or CheckpointError.
    """
    runs = expand(study)
    check_installed(runs[0].recipe.log.to)
    workers = workers or Local(len(runs))
    with owned(study.folder, "study", inherited=True):  # until the last run has ended, even if the sweep was killed
        check_place(study.folder)
        check(study, runs)
        recipes = _write_recipes(study, runs)
        _keep_precision(runs)
        by_seed = sorted(runs, key=lambda run: study.seeds.index(run.recipe.seed))  # an early end leaves whole arms
        listed = [Job(recipes[run.name], recipes.get(run.made_by or run.after or "")) for run in by_seed]
        read: dict[str, list[Row]] = {}

        def write_table(_: Path) -> pd.DataFrame:
            """Write the table of finished and failed runs; finished ones are read only once."""
            for run in runs:
                if not (read.get(run.name) and read[run.name][0].status == "done"):
                    read[run.name] = rows_of(Path(run.recipe.run), study.domain, study.general)
            table = in_columns(row for rows in read.values() for row in rows)
            save_table(table, study.folder)
            return table

        outcome = train_all(listed, study.folder / "logs", console, workers, ended=write_table)
        return write_table(study.folder), outcome


def check(study: Study, runs: Sequence[PlannedRun]) -> None:
    """Raises RecipeError if the study's runs can't be trained or continued; warns of likely mistakes."""
    _check_domain(study)
    _check_unchanged(runs)
    _warn(study, runs)


def _check_domain(study: Study) -> None:
    """Raises RecipeError for a corpus with fewer tokens than the study asks for, whose arms would be the same."""
    source = study.sources[study.domain]
    train = paths(source["train"], f"sources.{study.domain}.train")
    held = TokenDataset.open(train, source.get("dtype")).num_tokens
    for limit in study.limits:
        if limit is not None and limit > held:
            field = "simulate" if study.simulate else "domain_tokens"
            raise RecipeError(
                f"{field}: asks for {counted(limit, 'token')}, but {source['train']} has {held:,}; write that or "
                "less, or `domain_tokens: all` (`--set domain_tokens=all`)"
            )


def _check_unchanged(runs: Sequence[PlannedRun]) -> None:
    """Raises RecipeError if the study was changed after one of its runs started, or its text or weights were replaced
    after one had finished."""
    digests: dict[tuple[Source, str], str] = {}
    for run in runs:
        folder = Path(run.recipe.run)
        changed = changes(folder, run.recipe) if (folder / "recipe.yaml").exists() else []
        if changed:
            listed = "\n  ".join(changed)
            raise RecipeError(
                f"study: {folder} was trained with another recipe; undo this, or give the study another folder:\n"
                f"  {listed}"
            )
        recorded, init = (summary_of(folder) or {}).get("data", {}), Path(run.recipe.init or "")
        if "init" in recorded and init.name and init.exists() and digest_of(init) != recorded["init"]:
            raise RecipeError(
                f"study: {init} holds other weights than {folder} was trained from; put the old ones back, or delete "
                f"{folder} to train it again"
            )
        for name, source in run.recipe.sources.items():
            for kind in KINDS:
                known = recorded.get(field := f"sources.{name}.{kind}")
                if known and (source, kind) not in digests:
                    with suppress(DataError):  # later runs report missing text
                        digests[source, kind] = open_source(source, kind).digest
                if known and digests.get((source, kind), known) != known:
                    raise RecipeError(
                        f"study: {field} holds other text than {folder} was trained on; put the old text back, or give "
                        "the study another folder"
                    )


def _warn(study: Study, runs: Sequence[PlannedRun]) -> None:
    """Warn of likely mistakes in each stage, by its first remaining run, such as evaluations that take longer than the
    training; later warnings of runs go to their logs. A warning about a source is given once for all stages."""
    said: set[str] = set()
    for position, stage in enumerate(study.stages):
        left = next((run for run in runs if run.stage == position and not is_done(run.recipe)), None)
        if left is not None:
            with naming_stage(stage):
                found = doubts(make_plan(without_parent(left)))
                warn([doubt for doubt in found if doubt not in said])
                said.update(found)


def without_parent(run: PlannedRun) -> Recipe:
    """The run's recipe without the weights of a parent that is not trained yet, but with their shape."""
    if run.after is None:
        return run.recipe
    init, model = (run.model.init, Model()) if isinstance(run.model, Base) else (None, run.model)
    return dataclasses.replace(run.recipe, init=init, init_only=None, model=model)


def _keep_precision(runs: Sequence[PlannedRun]) -> None:
    """Record the precision of runs that an earlier version started, so that later runs use it too."""
    summaries = (summary_of(Path(run.recipe.run)) for run in runs)
    dtype = next((summary["precision"] for summary in summaries if summary and "precision" in summary), None)
    file = runs[0].recipe.precision_file
    if dtype and file:
        write_precision(Path(file), Precision(getattr(torch, dtype), "as in the earlier runs"))


def _write_recipes(study: Study, runs: Sequence[PlannedRun]) -> dict[str, Path]:
    folder = study.folder / "recipes"
    folder.mkdir(exist_ok=True)
    paths = {}
    for run in runs:
        paths[run.name] = folder / f"{run.name}.yaml"
        write_text(paths[run.name], run.recipe.as_yaml())
    return paths


def workers_of(study: Study, jobs: int | None, cluster: str | None, options: Sequence[str]) -> Workers:
    """The workers of a study, `jobs` at a time: this machine, or the cluster that submitit knows by that name."""
    if options and cluster is None:
        raise RecipeError(
            invalid("cluster_options", options[0], "it is for a cluster; add `cluster=slurm`"), argument=True
        )
    runs = len(expand(study))
    if cluster is None:
        return Local(runs, jobs)
    return Cluster(cluster, study.folder / "jobs", jobs=jobs or runs, options=cluster_options(options))


def cluster_options(given: Sequence[str]) -> dict[str, Any]:
    """ "key=value" strings as keyword arguments; the values are YAML."""
    options: dict[str, Any] = {}
    for option in given:
        key, separator, value = option.partition("=")
        if not separator:
            raise RecipeError(
                invalid("cluster_options", option, "write KEY=VALUE, such as timeout_min=600"), argument=True
            )
        try:
            options[key.strip()] = parse_yaml(value, f"cluster_options: {key.strip()}")
        except RecipeError as error:
            error.argument = True
            raise
    return options


@dataclass(frozen=True)
class Swept:
    """The state of a study."""

    folder: Path
    runs: int
    done: int
    failed: dict[str, str]
    """The end of the output of each failed run."""
    left_out: int
    """Runs that start from failed ones."""
    interrupted: bool
    """Whether a signal stopped the sweep; the running trainings are saved."""
    table: pd.DataFrame
    """The results of the runs, a row for each evaluation."""

    @classmethod
    def of(cls, study: Study, table: pd.DataFrame, outcome: Outcome) -> Swept:
        return cls(
            folder=study.folder,
            runs=len(expand(study)),
            done=table.loc[table["status"] == "done", "run"].nunique(),
            failed={path.stem: said for path, said in outcome.failed.items()},
            left_out=len(outcome.skipped),
            interrupted=outcome.interrupted,
            table=table,
        )

    def as_json(self) -> dict[str, Any]:
        return {
            "runs": self.runs,
            "done": self.done,
            "failed": self.failed,
            "left out, as they start from failed ones": self.left_out,
            "table": str(self.folder / "table.parquet"),
        }


def print_swept(swept: Swept, study: str, console: Console) -> None:
    """The number of finished runs, and the last output of each failed one."""
    print_facts(console, study, {name: figure for name, figure in swept.as_json().items() if name != "failed"})
    if swept.failed:
        print_named(console, "failed", swept.failed)
