"""`spt-fast sweep`: trains a study's runs in the order of its tree, and writes the table of their results.

    STUDY/recipes/, runs/, logs/, table.parquet, table.csv

Finished runs are skipped and interrupted ones continue. So the same command restarts a sweep, and a study whose grid
has grown trains only the new runs.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from rich.console import Console

from spt_fast.config import Model, Recipe, Source
from spt_fast.data.shards import TokenDataset
from spt_fast.errors import DataError, RecipeError, SptWarning, invalid, nearest
from spt_fast.fields import apply_overrides, naming, parse_yaml, paths, read_yaml
from spt_fast.files import write_text
from spt_fast.printing import print_facts, print_named, print_table
from spt_fast.quantities import duration
from spt_fast.study.cluster import Cluster
from spt_fast.study.jobs import Job, Local, Outcome, Workers, is_done, train_all
from spt_fast.study.runs_table import Row, check_place, in_columns, rows_of, save_table
from spt_fast.study.study import Base, Study, study_from
from spt_fast.study.tree import PlannedRun, expand, naming_stage
from spt_fast.train.doubts import doubts, warn
from spt_fast.train.dry_run import dry_run
from spt_fast.train.folder import owned, summary_of
from spt_fast.train.plan import KINDS, Plan, make_plan, open_source
from spt_fast.train.precision import Precision, precision_of, write_precision
from spt_fast.train.price import Machine, Speed, phase_time, speed_of
from spt_fast.train.resume import changes
from spt_fast.train.trackers import check_installed
from spt_fast.train.weights import digest_of, read_config
from spt_fast.train.world import pick_device

READY = Path(__file__).with_name("ready")
"""The folder of ready studies, <name>.yaml, without data; with `init`, their section `from_base` replaces parts."""
WINDOW = 2048
"""Tokens of a window in studies that start from weights; their own context may be far longer."""


def load_study(name: str, overrides: Sequence[str] = (), *, given: Mapping[str, Any] | None = None) -> Study:
    """A study from its YAML file, or a ready one by name.

    overrides  "a.b=c" strings
    given      what completes a ready study: general, domain, tokenizer, out, and init, the weights to start from;
               with init the tokenizer is theirs

    Raises RecipeError, and CheckpointError for `init` without weights.
    """
    ready = name in ready_studies()
    if not ready and not Path(name).exists():
        raise RecipeError(f"{name}: neither a file nor a ready study; {nearest(name, ready_studies())}")
    raw = read_yaml(READY / f"{name}.yaml" if ready else name)
    if not isinstance(raw, dict):
        raise RecipeError(f"{name}: holds no study; write keys such as study, models, sources and stages")
    if "phases" in raw and "stages" not in raw:
        raise RecipeError(f"{name}: is a recipe, not a study; train it with `spt-fast train`")
    given = {key: value for key, value in (given or {}).items() if value}
    needless = list(given)
    if needless and not ready:
        raise RecipeError(
            f"{needless[0]}: is for ready studies ({', '.join(ready_studies())}); {name} has its own sources and "
            "folder; change them there",
            argument=True,
        )
    if ready:
        needed = ("general", "domain", "out") if "init" in given else ("general", "domain", "tokenizer", "out")
        if missing := [key for key in needed if key not in given]:
            raise RecipeError(
                f"{name}: a ready study needs your data; give {', '.join(f'`{key}=…`' for key in missing)}"
            )
        raw = _with_data(name, raw, given)
    with naming(name):
        apply_overrides(raw, overrides)
        loaded = study_from(raw)
        expand(loaded)  # finds invalid recipes
    return loaded


def _with_data(name: str, raw: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    from_base = raw.pop("from_base", None)
    if inits := [str(init) for init in given.get("init", ())]:
        if from_base is None:
            expected = f"{name} trains from scratch; leave it out, or use dcpt or forgetting"
            raise RecipeError(invalid("init", inits[0], expected), argument=True)
        raw |= from_base | {"models": [{"init": init} for init in inits]}
        with naming("init"):
            contexts = [read_config(Path(init)).context for init in inits]
        if max(contexts) > (window := min(WINDOW, *contexts)):
            for stage in raw["stages"]:
                stage["batch"]["context"] = window
    sources = {name: {"train": str(given[name]), "heldout": f"{given[name]}.heldout"} for name in ("general", "domain")}
    return {
        "study": str(given["out"]),
        "tokenizer": str(given["tokenizer"]) if "tokenizer" in given else None,
        "sources": sources,
        "general": "general",
        "domain": "domain",
        **raw,
    }


def ready_studies() -> list[str]:
    """Names of the ready studies."""
    return sorted(path.stem for path in READY.glob("*.yaml"))


def sweep(
    study: Study, console: Console, *, workers: Workers | None = None, jobs: int | None = None
) -> tuple[pd.DataFrame, Outcome]:
    """Train the unfinished runs of a study; returns its state, with the table of all finished runs.

    `workers` train the runs, by default this machine with `jobs` at a time. Raises RecipeError, DataError or
    CheckpointError.
    """
    runs = expand(study)
    check_installed(runs[0].recipe.log.to)
    workers = workers or Local(len(runs), jobs)
    with owned(study.folder, "study", inherited=True):  # until the last run has ended, even if the sweep was killed
        check_place(study.folder)
        _check_domain(study)
        _check_unchanged(runs)
        _warn(study, runs)
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


def _check_domain(study: Study) -> None:
    """Raises RecipeError for a corpus with fewer tokens than the study asks for, whose arms would be the same."""
    source = study.sources[study.domain]
    train = paths(source["train"], f"sources.{study.domain}.train")
    held = TokenDataset.open(train, source.get("dtype")).num_tokens
    for limit in study.limits:
        if limit is not None and limit > held:
            field = "simulate" if study.simulate else "domain_tokens"
            raise RecipeError(
                f"{field}: asks for {limit:,} tokens, but {source['train']} has {held:,}; write that or less, or "
                "`domain_tokens: all`"
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
                found = doubts(make_plan(_without_parent(left)))
                warn([doubt for doubt in found if doubt not in said])
                said.update(found)


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
            raise RecipeError(invalid("cluster_set", option, "write KEY=VALUE, such as timeout_min=600"), argument=True)
        options[key.strip()] = parse_yaml(value, f"cluster_set: {key.strip()}")
    return options


# ------------------------------------------------------------------------------------------------ what it would take


@dataclass(frozen=True)
class Cost:
    """The price of a stage's remaining runs. Hours are those of one process, None if its speed is unknown."""

    stage: str
    runs: int
    done: int
    tokens: int
    """Tokens to train, with all arms of the grids; finished runs do not count."""
    flops: float
    """FLOPs of training and evaluations."""
    hours: float | None


@dataclass(frozen=True)
class StudyPrice:
    """The price of the remaining runs of a study."""

    stages: list[Cost]
    jobs: int
    """Runs at a time."""
    per_gpu_hour: float | None

    @property
    def total(self) -> Cost:
        runs, done, tokens, flops = (
            sum(getattr(cost, name) for cost in self.stages) for name in ("runs", "done", "tokens", "flops")
        )
        return Cost("total", runs, done, tokens, flops, _sum([cost.hours for cost in self.stages]))

    @property
    def cost(self) -> float | None:
        hours = self.total.hours
        return None if hours is None or self.per_gpu_hour is None else hours * self.per_gpu_hour

    def as_json(self) -> dict[str, Any]:
        total = {name: figure for name, figure in vars(self.total).items() if name != "stage"}
        return {"stages": self.stages, "total": total, "jobs": self.jobs, "cost": self.cost}


def _sum(hours: Sequence[float | None]) -> float | None:
    known = [value for value in hours if value is not None]
    return sum(known, 0.0) if len(known) == len(hours) else None


def price(
    study: Study, *, jobs: int | None, gpu: str | None, mfu: float | None, per_gpu_hour: float | None
) -> StudyPrice:
    """The price of a study's remaining runs, on this machine or on the given GPU; see `costs`."""
    at_a_time = Local(len(expand(study)), jobs).jobs if gpu is None else jobs or 1
    return StudyPrice(costs(study, jobs=at_a_time, gpu=gpu, mfu=mfu), at_a_time, per_gpu_hour)


def print_price(price: StudyPrice, study: str, console: Console) -> None:
    """Print a row for each stage and for all of them, then the time and cost."""
    columns = [field.name for field in dataclasses.fields(Cost)]
    rows = [[getattr(cost, column) for column in columns] for cost in (*price.stages, price.total)]
    print_table(console, f"{study}: remaining runs", columns, rows)
    wall = None if price.total.hours is None else duration(3600 * price.total.hours / price.jobs)
    print_facts(console, "", {"runs at a time": price.jobs, "wall time": wall, "cost": price.cost})


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


def costs(study: Study, *, jobs: int, gpu: str | None = None, mfu: float | None = None) -> list[Cost]:
    """The remaining work by stage, at the speed of this machine (that of finished runs, else of a step that is timed
    now), or of the given GPU and share of its peak.

    Opens every dataset and checks every recipe, so that errors are found before the training. Raises what `make_plan`
    raises.
    """
    runs = expand(study)
    _check_domain(study)
    _check_unchanged(runs)
    _warn(study, runs)
    plans = {}
    for run in runs:
        with naming_stage(study.stages[run.stage]):
            plans[run.name] = make_plan(_without_parent(run))
    done = {run.name for run in runs if is_done(run.recipe)}
    speeds: dict[object, Speed] = {}
    found = []
    for position, stage in enumerate(study.stages):
        tokens, flops, hours = 0, 0.0, list[float | None]()
        of_stage = [run for run in runs if run.stage == position]
        left = [run for run in of_stage if run.name not in done]
        for run in left:
            if run.made_by and run.made_by not in done:
                continue
            if run.model not in speeds:
                finished = [other for other in runs if other.model == run.model and other.name in done]
                with naming_stage(stage):
                    speeds[run.model] = _speed(plans[run.name], finished, jobs=jobs, gpu=gpu, mfu=mfu)
            plan = plans[run.name]
            for index in range(len(plan.phases)):
                time = phase_time(plan, index, speeds[run.model])
                tokens += time.tokens
                flops += time.tokens * plan.flops_per_token(index) + time.evaluation_flops
                hours += [time.hours, time.evaluation_hours or 0.0]
        found.append(Cost(stage.axes.name, len(of_stage), len(of_stage) - len(left), tokens, flops, _sum(hours)))
    return found


def _without_parent(run: PlannedRun) -> Recipe:
    """The run's recipe without the weights of a parent that is not trained yet, but with their shape."""
    if run.after is None:
        return run.recipe
    init, model = (run.model.init, Model()) if isinstance(run.model, Base) else (None, run.model)
    return dataclasses.replace(run.recipe, init=init, init_only=None, model=model)


def _speed(plan: Plan, finished: Sequence[PlannedRun], *, jobs: int, gpu: str | None, mfu: float | None) -> Speed:
    precision = None if gpu else precision_of(plan.recipe, pick_device(), plan.model)
    machine = Machine.of(plan.recipe, gpu=gpu, precision=precision)
    if gpu is not None or mfu is not None:
        return speed_of(plan, machine, mfu=mfu)
    if finished:
        return speed_of(plan, machine, run=Path(finished[0].recipe.run))
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // jobs))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SptWarning)  # printed already
            step_s = dry_run(plan.recipe)[0].step_s
    finally:
        torch.set_num_threads(threads)
    flops = plan.flops_per_token(0) * plan.phases[0].tokens_per_step
    return Speed(flops / step_s, None, "a step timed now")
