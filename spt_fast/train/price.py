"""The price of a run: memory of a process, seconds of a step, hours, money. Nothing is run; all is arithmetic.

Time is FLOPs by the convention of `spt_fast.model.flops` divided by the rate of the whole machine: MFU times peak
times GPUs. The MFU is given, measured by a run, or assumed. Blocks that are checkpointed whole are computed twice
forward, so a step takes 4/3 of the time. The time of offloading and of ZeRO's messages depends on links that are not
known: steps with offload have no time here, and messages count only as far as the MFU includes them.
"""

from __future__ import annotations

import dataclasses
import re
import statistics
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from spt_fast.config import Engine, Recipe
from spt_fast.errors import CheckpointError, RecipeError, invalid
from spt_fast.model.flops import (
    matmul_parameters,
    parameters,
    peak_flops,
    peak_flops_by_name,
    train_flops_per_token,
)
from spt_fast.model.memory import CHECKPOINTING, DISTRIBUTIONS, Memory, Step
from spt_fast.model.parameters import hidden_matrices
from spt_fast.printing import print_facts, print_fields, print_table
from spt_fast.quantities import duration, percent, size
from spt_fast.train.doubts import doubts, warn
from spt_fast.train.engines import uses_deepspeed
from spt_fast.train.evaluate import FORWARD_SHARE, evaluated_tokens
from spt_fast.train.folder import recipe_of
from spt_fast.train.plan import PhaseFigures, Plan
from spt_fast.train.precision import Precision, pick_precision
from spt_fast.train.recorded import records_of
from spt_fast.train.world import pick_device

ASSUMED_MFU, ASSUMED = 0.4, "assumed"
ASSUMPTION = (
    f"an MFU of {ASSUMED_MFU:.0%} is assumed: give yours with --mfu; 49% at 124m, 54% at 350m and 61% at 1b were "
    "measured on one H200 in bf16"
)
TIME_FACTOR = {"none": 1.0, "selective": 1.0, "full": 4 / 3}
"""Factor of a step's time, by checkpointing; the cheap operations that "selective" recomputes are left out."""
SPARE = 0.05
"""The share of a GPU's memory that must stay free, for everything outside of the estimate."""
LEFT_OUT = (
    "start-up",
    "checkpoints",
    "early stopping, which ends a phase sooner",
    "the exchange between GPUs and with host memory, unless the MFU was measured with it",
)
LEAST_UPDATE = 0.01
"""Share of a step's FLOPs from which an optimizer's own are mentioned."""


@dataclass(frozen=True)
class Machine:
    """The machine that a run is planned for: `gpus` processes, each on one device."""

    gpus: int
    device: str  # "cuda" | "cpu"
    name: str | None
    precision: Precision
    peak_flops: float | None
    memory_bytes: int | None

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        *,
        gpus: int = 1,
        gpu: str | None = None,
        memory: int | None = None,
        precision: Precision | None = None,
    ) -> Machine:
        """This machine, or with `gpu` one with GPUs of that name; `memory` overrides a GPU's own, in bytes.
        `precision`: the plan's on this machine, if it is known."""
        if gpu is not None:
            peak = peak_flops_by_name(gpu)
            if peak is None:
                expected = "its peak is not known; give a name such as H100, H200, A100 or B200"
                raise RecipeError(invalid("gpu", gpu, expected), argument=True)
            there = Precision(torch.bfloat16, "every GPU whose peak is known multiplies it faster")
            if recipe.precision != "auto":
                there = pick_precision(recipe.precision, torch.device("cuda"))
            return cls(gpus, "cuda", gpu, there, peak, memory)
        here = pick_device()
        precision = precision or pick_precision(recipe.precision, here)
        if here.type == "cpu":
            return cls(gpus, "cpu", None, precision, None, memory)
        own = torch.cuda.get_device_properties(here).total_memory
        return cls(gpus, "cuda", torch.cuda.get_device_name(here), precision, peak_flops(here), memory or own)

    def holds(self, needed_bytes: int) -> bool | None:
        """Whether a step of this memory fits; None if the GPU's memory isn't known."""
        return None if self.memory_bytes is None else needed_bytes <= (1 - SPARE) * self.memory_bytes


@dataclass(frozen=True)
class Speed:
    """FLOP/s of all processes together, by the convention and without checkpointing; None if unknown."""

    flops_per_s: float | None
    mfu: float | None
    source: str


@dataclass(frozen=True)
class PhaseTime:
    """One phase: all arms of its grid, all evaluations. Times are None if the speed isn't known."""

    phase: str
    steps: int
    """Steps of each arm."""
    arms: int
    tokens: int
    step_s: float | None
    hours: float | None
    """Time without evaluations."""
    evaluation_tokens: int
    evaluation_flops: int
    evaluation_hours: float | None


@dataclass(frozen=True)
class Way:
    """How a step is held in memory: the fields of a recipe's `engine` that trade memory for time."""

    stage: int = 0
    """The ZeRO stage; 0 in the local engine."""
    offload: str = "none"
    checkpointing: str = "none"

    @classmethod
    def of(cls, engine: Engine, processes: int) -> Way:
        """The way that an engine trains in. The local one neither shards nor offloads, whatever the recipe says."""
        if uses_deepspeed(engine, processes):
            return cls(engine.stage, engine.offload, engine.checkpointing)
        return cls(checkpointing=engine.checkpointing)

    @property
    def time_factor(self) -> float:
        """A step's time, relative to one without checkpointing; the time of offloading is not known."""
        return TIME_FACTOR[self.checkpointing]


@dataclass(frozen=True, kw_only=True)
class PricedWay(Way):
    """What a plan takes if it is trained in this way."""

    recipe: bool
    """Whether it is the recipe's own."""
    bytes: Memory
    """In the phase that needs most."""
    fits: bool | None
    step_s: float | None
    hours: float | None
    cost: float | None


@dataclass(frozen=True)
class Price:
    """The price of a plan as the recipe trains it, and of the other ways."""

    parameters: int
    """At the start; `untie` adds as many as the embedding has."""
    matmul_parameters: int
    flops_per_token: int
    """In the first phase; it depends on the window length."""
    tokens: int
    flops: int
    evaluation_flops: int
    memory_bytes: int
    precision: str
    """The precision of the steps, and why."""
    gpus: int
    gpu: str | None
    gpu_memory_bytes: int | None
    peak_flops: float | None
    mfu: float | None
    speed_from: str
    hours: float | None
    hours_at_40_percent_mfu: float | None
    cost: float | None
    left_out: Sequence[str]
    warnings: list[str]
    times: list[PhaseTime]
    ways: list[PricedWay]


def speed_of(plan: Plan, machine: Machine, *, mfu: float | None = None, run: Path | None = None) -> Speed:
    """By the given `mfu`; else measured by `run` or in the recipe's own run folder; else assumed.

    CheckpointError for a `run` without measurements; RecipeError if its rate doesn't apply to this recipe, or for an
    `mfu` of 0.
    """
    if mfu is not None and not mfu > 0:
        raise RecipeError(invalid("mfu", mfu, "write a share above 0, such as 40%"), argument=True)
    if mfu is None:
        measured = _measured(plan, machine, run or Path(plan.recipe.run), required=run is not None)
        if measured is not None:
            return measured
    share, source = (ASSUMED_MFU, ASSUMED) if mfu is None else (mfu, "stated")
    if machine.peak_flops is None:
        return Speed(
            None, None, "unknown: no peak is known for this device; `spt-fast train RECIPE --dry-run` times a step"
        )
    return Speed(share * machine.peak_flops * machine.gpus, share, source)


def _measured(plan: Plan, machine: Machine, run: Path, *, required: bool) -> Speed | None:
    path = run / "metrics.jsonl"
    rates = []
    if path.exists():
        with nullcontext() if required else suppress(CheckpointError):
            rates = [(r.get("phase", ""), r["tokens_per_s"], r["mfu"]) for r in records_of(run, "train")]
    if not rates:
        if required:
            raise CheckpointError(f"{run}: no training step is logged in metrics.jsonl; give a run that has trained")
        return None
    rates = rates[1:] or rates  # the first includes the start-up
    recipe = recipe_of(run)
    factor, source = TIME_FACTOR[recipe.engine.checkpointing], f"measured in {path}"
    shares = [mfu for _, _, mfu in rates if mfu is not None]
    if shares and machine.peak_flops is not None:
        mfu = factor * statistics.median(shares)
        source += f", where it is {percent(mfu / factor)} with what checkpointing recomputes" if factor > 1 else ""
        return Speed(mfu * machine.peak_flops * machine.gpus, mfu, source)
    if not shares and machine.peak_flops is None and recipe.model == plan.recipe.model:
        own = plan.model.context
        a_token = {phase.name: train_flops_per_token(plan.model, phase.window(own)) for phase in recipe.phases}
        first = a_token[recipe.phases[0].name]
        flops_per_s = statistics.median(tokens_per_s * a_token.get(phase, first) for phase, tokens_per_s, _ in rates)
        return Speed(factor * flops_per_s, None, f"{source}, with as many processes as it had")
    if required:
        raise RecipeError(
            f"{run}: was measured on another kind of machine, so its speed does not apply here; give the share of "
            "the peak, such as `mfu=40%`, and name the GPU, such as `gpu=H100`"
        )
    return None


def phase_memory(
    plan: Plan,
    index: int,
    machine: Machine,
    way: Way | None = None,
    *,
    micro: int | None = None,
) -> Memory:
    """The memory of a step of phase `index`, by the recipe's engine and micro-batch unless others are given."""
    phase = plan.phases[index].phase
    way = way or Way.of(plan.recipe.engine, machine.gpus)
    micro = micro or plan.phases[index].micro(machine.gpus)
    untied = any(earlier.phase.untie for earlier in plan.phases[: index + 1])
    own = {shape: -(-count // machine.gpus) for shape, count in hidden_matrices(plan.model).items()}
    step = Step(
        dataclasses.replace(plan.model, tied=False) if untied else plan.model,
        micro,
        dtype=machine.precision.dtype,
        context=plan.phases[index].context,
        checkpointing=way.checkpointing,
        micro_batches=phase.batch.sequences // machine.gpus // micro,
        documents=phase.documents,
        states=len(phase.optimizer.kinds_of(hidden=False)),
        hidden_states=len(phase.optimizer.kinds_of(hidden=True)),
        update=phase.optimizer.update_bytes(own, machine.precision.dtype.itemsize),
        anchor=phase.anchor > 0,
        freeze=phase.freeze,
        device=machine.device,
        stage=way.stage,
        world=machine.gpus,
        offload=way.offload,
        fp8=plan.recipe.engine.fp8,
        recorded=plan.recipe.engine.cuda_graphs is True and machine.device == "cuda",
    )
    return step.memory()


def ways_of(recipe: Recipe) -> list[Way]:
    """Every way that the recipe can train in. An optimizer of whole matrices excludes offloading and stages 2 and 3."""
    whole = any(phase.optimizer.whole_matrices for phase in recipe.phases)
    return [
        Way(stage, offload, checkpointing)
        for stage, offload in DISTRIBUTIONS
        if not whole or (stage < 2 and offload == "none")
        for checkpointing in CHECKPOINTING
    ]


def price(plan: Plan, machine: Machine, speed: Speed, *, per_gpu_hour: float | None = None) -> Price:
    """The price of the plan on `machine`, and of every other way to train it there.

    Every arm of a grid and every evaluation is counted; `left_out` lists what isn't. Unknown values are None.
    """
    flops_per_token = [plan.flops_per_token(index) for index in range(len(plan.phases))]
    own = Way.of(plan.recipe.engine, machine.gpus)
    times = [phase_time(plan, index, speed) for index in range(len(plan.phases))]
    ways = []
    for way in ways_of(plan.recipe):
        needed = [phase_memory(plan, index, machine, way) for index in range(len(plan.phases))]
        worst = max(needed, key=lambda memory: memory.total)
        hours = step_s = None
        if way.offload == "none":
            step_s, hours = _step_and_hours(times, way.time_factor / own.time_factor)
        ways.append(
            PricedWay(
                **vars(way),
                recipe=way == own,
                bytes=worst,
                fits=machine.holds(worst.total),
                step_s=step_s,
                hours=hours,
                cost=None if hours is None or per_gpu_hour is None else hours * machine.gpus * per_gpu_hour,
            )
        )
    chosen = next(way for way in ways if way.recipe)
    tokens = sum(time.tokens for time in times)
    flops = sum(each * time.tokens for each, time in zip(flops_per_token, times, strict=True))
    peak = machine.peak_flops
    return Price(
        parameters=parameters(plan.model),
        matmul_parameters=matmul_parameters(plan.model),
        flops_per_token=flops_per_token[0],
        tokens=tokens,
        flops=flops,
        evaluation_flops=sum(time.evaluation_flops for time in times),
        memory_bytes=chosen.bytes.total,
        precision=str(machine.precision),
        gpus=machine.gpus,
        gpu=machine.name,
        gpu_memory_bytes=machine.memory_bytes,
        peak_flops=peak,
        mfu=speed.mfu,
        speed_from=speed.source,
        hours=chosen.hours,
        hours_at_40_percent_mfu=flops / (0.4 * peak * machine.gpus) / 3600 if peak else None,
        cost=chosen.cost,
        left_out=(*LEFT_OUT, *_updates(plan)),
        warnings=doubts(plan),
        times=times,
        ways=ways,
    )


def _updates(plan: Plan) -> Iterator[str]:
    """What optimizers that multiply matrices add to a step."""
    for index, planned in enumerate(plan.phases):
        flops = planned.phase.optimizer.update_flops(hidden_matrices(plan.model))
        share = flops / (plan.flops_per_token(index) * planned.tokens_per_step)
        if share >= LEAST_UPDATE:
            whose = f"{planned.phase.optimizer.name}'s products of matrices in {planned.phase.name}"
            yield f"{whose}, {share:.0%} more FLOPs, unless the MFU was measured with them"


def _step_and_hours(times: list[PhaseTime], factor: float) -> tuple[float | None, float | None]:
    """Seconds of the longest step and total hours, if a step takes `factor` times as long."""
    steps = [time.step_s for time in times if time.step_s is not None]
    if not steps:
        return None, None
    hours = sum(factor * (time.hours or 0.0) + (time.evaluation_hours or 0.0) for time in times)
    return factor * max(steps), hours


def phase_time(plan: Plan, index: int, speed: Speed) -> PhaseTime:
    """With every arm of the phase's grid, every evaluation, the recipe's checkpointing."""
    planned = plan.phases[index]
    flops_per_token = plan.flops_per_token(index)
    phase, arms = planned.phase, len(planned.phase.arms())
    evaluated = evaluated_tokens(plan, index)
    evaluation_flops = round(FORWARD_SHARE * flops_per_token * evaluated)
    step_s = hours = evaluation_hours = None
    if speed.flops_per_s is not None:
        step_s = flops_per_token * planned.tokens_per_step / speed.flops_per_s
        step_s *= TIME_FACTOR[plan.recipe.engine.checkpointing]
        hours = step_s * planned.steps * arms / 3600
        evaluation_hours = evaluation_flops / speed.flops_per_s / 3600
    return PhaseTime(
        phase=phase.name,
        steps=planned.steps,
        arms=arms,
        tokens=planned.tokens * arms,
        step_s=step_s,
        hours=hours,
        evaluation_tokens=evaluated,
        evaluation_flops=evaluation_flops,
        evaluation_hours=evaluation_hours,
    )


def print_plan(recipe: Path, phases: Sequence[PhaseFigures], price: Price, console: Console) -> None:
    """Print what the phases read, and the time, memory and money that they need."""
    columns = ["share", "tokens", "epochs_asked", "epochs"]
    rows = [
        [phase.name, phase.context, phase.steps, source, *(getattr(figures, column) for column in columns)]
        for phase in phases
        for source, figures in phase.sources.items()
    ]
    headings = [column.replace("_", " ") for column in columns]
    print_table(console, str(recipe), ["phase", "window", "steps", "source", *headings], rows)
    print_fields(console, "time", ["phase", "arms", "tokens", "step_s", "hours", "evaluation_hours"], price.times)

    by_distribution: dict[tuple[int, str], list[PricedWay]] = {}
    for way in price.ways:
        by_distribution.setdefault((way.stage, way.offload), []).append(way)
    whose = f"each of {price.gpus} × {price.gpu}" if price.gpu else "a process on the CPU"
    print_table(
        console,
        f"memory of {whose} (→ this recipe, ✗ doesn't fit)",
        ["ZeRO", "offload", *(f"checkpointing {name}" for name in CHECKPOINTING), "host"],
        [
            [*distribution, *map(_memory, ways), size(max(way.bytes.host for way in ways))]
            for distribution, ways in by_distribution.items()
        ],
    )
    if price.hours is not None:
        undivided = price.ways[: len(CHECKPOINTING)]
        print_fields(console, "hours by checkpointing", ["checkpointing", "step_s", "hours", "cost"], undivided)
    parts = next(way.bytes for way in price.ways if way.recipe)
    names = ("parameters", "matmul_parameters", "flops_per_token", "tokens", "flops", "evaluation_flops", "precision")
    facts = {name: getattr(price, name) for name in (*names, "gpus", "gpu", "gpu_memory_bytes", "peak_flops", "mfu")}
    facts |= {"speed from": said_speed(price.speed_from), "hours": price.hours, "cost": price.cost}
    if price.hours_at_40_percent_mfu is not None:
        facts["training alone at 40% MFU"] = duration(3600 * price.hours_at_40_percent_mfu)
    facts["memory"] = {part: size(size_bytes) for part, size_bytes in vars(parts).items()}
    facts["left out of the hours"] = "; ".join(price.left_out)
    print_facts(console, "the model and its cost", facts)
    warn(price.warnings)


def said_speed(source: str) -> str:
    """Where a speed comes from, as tables say it."""
    return ASSUMPTION if source == ASSUMED else source


def _memory(way: PricedWay) -> str:
    marks = ("→ " if way.recipe else "") + ("✗ " if way.fits is False else "")
    return marks + size(way.bytes.total)


def parse_bytes(value: object, where: str) -> int:
    """ "80GB" (10^9), "80GiB" (2^30)."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*(G|Gi|M|Mi)B", str(value).strip())
    if not match or not float(match[1]):
        raise RecipeError(invalid(where, value, "write a size such as 80GB or 141GiB"))
    return round(float(match[1]) * {"G": 10**9, "Gi": 2**30, "M": 10**6, "Mi": 2**20}[match[2]])
