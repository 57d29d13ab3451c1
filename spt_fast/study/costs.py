"""`spt-fast sweep --dry-run`: the price of a study's remaining runs."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from spt_fast.errors import SptWarning
from spt_fast.printing import print_facts, print_fields
from spt_fast.quantities import duration
from spt_fast.study.jobs import Local, is_done
from spt_fast.study.study import Study
from spt_fast.study.sweep import check, without_parent
from spt_fast.study.tree import PlannedRun, expand, naming_stage
from spt_fast.train.dry_run import dry_run
from spt_fast.train.plan import Plan, make_plan
from spt_fast.train.precision import precision_of
from spt_fast.train.price import TIME_FACTOR, Machine, Speed, phase_time, said_speed, speed_of
from spt_fast.train.world import pick_device


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
    longest_hours: float | None
    """Time of the longest chain of runs, each of which starts from the one before."""
    speed_from: str | None
    """Where the speeds come from, None if no run remains."""

    @property
    def wall_hours(self) -> float | None:
        """The time until the last run ends, if the others leave no job idle."""
        hours = self.total.hours
        return None if hours is None or self.longest_hours is None else max(hours / self.jobs, self.longest_hours)

    @property
    def total(self) -> Cost:
        return _total("total", self.stages)

    @property
    def cost(self) -> float | None:
        hours = self.total.hours
        return None if hours is None or self.per_gpu_hour is None else hours * self.per_gpu_hour

    def as_json(self) -> dict[str, Any]:
        total = {name: figure for name, figure in vars(self.total).items() if name != "stage"}
        times = {"wall_hours": self.wall_hours, "speed_from": self.speed_from}
        return {"stages": self.stages, "total": total, "jobs": self.jobs, **times, "cost": self.cost}


def _total(name: str, costs: Sequence[Cost]) -> Cost:
    runs, done, tokens, flops = (sum(getattr(cost, of) for cost in costs) for of in ("runs", "done", "tokens", "flops"))
    return Cost(name, runs, done, tokens, flops, _sum([cost.hours for cost in costs]))


def _sum(hours: Sequence[float | None]) -> float | None:
    known = [value for value in hours if value is not None]
    return sum(known, 0.0) if len(known) == len(hours) else None


def price(
    study: Study,
    *,
    jobs: int | None = None,
    gpu: str | None = None,
    mfu: float | None = None,
    per_gpu_hour: float | None = None,
) -> StudyPrice:
    """The price of a study's remaining runs, at the speed of this machine (that of finished runs, else of a step that
    is timed now), or of the given GPU and share of its peak.

    Opens every dataset and checks every recipe, so that errors are found before the training. Raises what `make_plan`
    raises.
    """
    runs = expand(study)
    jobs = Local(len(runs), jobs).jobs if gpu is None else min(jobs or 1, len(runs))
    check(study, runs)
    plans = {}
    for run in runs:
        with naming_stage(study.stages[run.stage]):
            plans[run.name] = make_plan(without_parent(run))
    done = {run.name for run in runs if is_done(run.recipe)}
    speeds: dict[object, Speed] = {}
    chains: dict[str, float | None] = {}
    costs: list[list[Cost]] = [[] for _ in study.stages]
    for run in runs:
        stage, cost = study.stages[run.stage], Cost(run.name, 1, run.name in done, 0, 0.0, 0.0)
        if run.name not in done and run.made_by and run.made_by not in done:
            chains[run.name] = chains.get(run.made_by, 0.0)
        elif run.name not in done:
            if run.model not in speeds:
                finished = [other for other in runs if other.model == run.model and other.name in done]
                with naming_stage(stage):
                    speeds[run.model] = _speed(plans[run.name], finished, jobs=jobs, gpu=gpu, mfu=mfu)
            cost = _cost(run.name, plans[run.name], speeds[run.model])
            chains[run.name] = _sum([cost.hours, chains.get(run.after or "", 0.0)])
        costs[run.stage].append(cost)
    stages = [_total(stage.axes.name, of_stage) for stage, of_stage in zip(study.stages, costs, strict=True)]
    known = [hours for hours in chains.values() if hours is not None]
    longest_hours = max(known, default=0.0) if len(known) == len(chains) else None
    sources = dict.fromkeys(speed.source for speed in speeds.values())
    return StudyPrice(stages, jobs, per_gpu_hour, longest_hours, "; ".join(sources) or None)


def _cost(name: str, plan: Plan, speed: Speed) -> Cost:
    """The cost of a run that is still to be trained."""
    times = [phase_time(plan, index, speed) for index in range(len(plan.phases))]
    flops = [time.tokens * plan.flops_per_token(i) + time.evaluation_flops for i, time in enumerate(times)]
    hours = [part for time in times for part in (time.hours, time.evaluation_hours or 0.0)]
    return Cost(name, 1, 0, sum(time.tokens for time in times), sum(flops, 0.0), _sum(hours))


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
            step_s = dry_run(dataclasses.replace(plan.recipe, phases=plan.recipe.phases[:1]))[0].step_s
    finally:
        torch.set_num_threads(threads)
    flops = plan.flops_per_token(0) * plan.phases[0].tokens_per_step
    return Speed(TIME_FACTOR[plan.recipe.engine.checkpointing] * flops / step_s, None, "a step timed now")


def print_price(price: StudyPrice, study: str, console: Console) -> None:
    """Print a row for each stage and for all of them, then the time and cost."""
    columns = [field.name for field in dataclasses.fields(Cost)]
    print_fields(console, f"{study}: remaining runs", columns, (*price.stages, price.total))
    wall = None if price.wall_hours is None else duration(3600 * price.wall_hours)
    source = None if price.speed_from is None else said_speed(price.speed_from)
    facts = {"runs at a time": price.jobs, "wall time": wall, "cost": price.cost, "speed from": source}
    print_facts(console, "", facts)
