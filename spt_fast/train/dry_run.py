"""A few steps of every phase in memory, to find the errors of the first minute before a run starts.

A step's peak memory is that of its second micro-batch, with the gradients of the first; with the phase's own untied
head, anchor and optimizer state, and full windows. Grid arms differ in numbers, not in shapes. The first step includes
the start-up and shows whether memory suffices; the second is timed. Then follows a batch of an evaluation.
"""

from __future__ import annotations

import resource
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console

from spt_fast.config import Recipe
from spt_fast.errors import RecipeError, SptWarning
from spt_fast.model.memory import CHECKPOINTING
from spt_fast.printing import print_fields, print_note
from spt_fast.progress import Line, Screen
from spt_fast.quantities import duration
from spt_fast.train.doubts import doubts, warn
from spt_fast.train.engine import EngineInterface
from spt_fast.train.engines import join, make_engine
from spt_fast.train.evaluate import FORWARD_SHARE, evaluated_tokens
from spt_fast.train.folder import is_run
from spt_fast.train.plan import PhasePlan, Plan, make_plan
from spt_fast.train.price import TIME_FACTOR, Machine, Way, phase_memory, ways_of
from spt_fast.train.run import summary_if_over
from spt_fast.train.snapshot import Snapshot
from spt_fast.train.trackers import check_installed
from spt_fast.train.tuning import choose
from spt_fast.train.world import World

MICRO_BATCHES = 2


@dataclass(frozen=True)
class Trial:
    """The result of trying a phase."""

    phase: str
    loss: float
    """Loss of the starting weights on the first micro-batches."""
    step_s: float
    """Of all micro-batches, at the pace of two with one update."""
    peak_bytes: int
    """On a GPU the allocator's peak, without what a step recorded as a CUDA graph keeps, which the estimate has with
    `cuda_graphs: true`; on a CPU the growth of the process, all phases so far and the copies of weights
    that a GPU's host would hold included."""
    estimated_bytes: int
    precision: str
    """The precision, and why."""
    hours: float
    """Time of all its steps and evaluations at this speed."""


def dry_run(recipe: Recipe, *, resume: bool | None = None, verify: bool = False) -> list[Trial]:
    """Try every phase. Nothing is written.

    resume  as for `run`, but without it an earlier run there is only warned of; None leaves it out of the checks
    verify  compare all blocks of the datasets with their hashes, not only some

    Raises what `run` would raise before its first step, and RecipeError if memory doesn't suffice, with the settings
    that would reduce it.
    """
    world = join(recipe.engine)
    if resume is not None:
        world.on_first(lambda: _look_at_folder(recipe, resume))
    world.on_first(lambda: check_installed(recipe.log.to))
    device = world.device
    plan = world.everywhere(lambda: make_plan(recipe, world=world.size))
    world.everywhere(lambda: plan.check_alike(world))
    world.everywhere(lambda: [] if world.local_rank else plan.check_files(None, verify=verify))
    world.on_first(lambda: warn(doubts(plan)))
    choices = world.on_first(lambda: choose(plan, device, world.size))
    choices.install()
    precision = choices.precision
    machine = Machine.of(recipe, gpus=world.size, precision=precision)
    grown_before = _peak_bytes(device)
    start = Snapshot(plan.starting_weights(world))
    engine = make_engine(plan.model_without_weights(), recipe.engine, world=world, dtype=precision.dtype)
    results = []
    for planned in plan.phases:
        phase = planned.phase
        evaluated = evaluated_tokens(plan, planned.index)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        if phase.untie and engine.config.tied:
            engine.untie()
            start = start.untied()
        try:
            with Screen(show=world.is_first) as screen:
                loss, seconds = _steps(plan, planned, engine, start, world, screen)
        except torch.OutOfMemoryError as error:
            raise RecipeError(_out_of_memory(plan, planned, machine, error)) from None
        steps = planned.steps * len(phase.arms())
        forward = FORWARD_SHARE / TIME_FACTOR[recipe.engine.checkpointing]  # an evaluation recomputes nothing
        evaluated_steps = forward * evaluated / planned.tokens_per_step
        results.append(
            Trial(
                phase=phase.name,
                loss=loss,
                step_s=seconds,
                peak_bytes=_peak_bytes(device) - (0 if device.type == "cuda" else grown_before),
                estimated_bytes=phase_memory(plan, planned.index, machine).total,
                precision=str(precision),
                hours=(steps + evaluated_steps) * seconds / 3600,
            )
        )
    return results


def _look_at_folder(recipe: Recipe, resume: bool) -> None:
    folder = Path(recipe.run)
    if resume or not is_run(folder):
        summary_if_over(folder, recipe, resume)  # raises what `run` would
    else:
        warnings.warn(
            f"run: folder {folder} exists, so training will be refused; continue it with --resume, choose another name "
            "or delete it",
            SptWarning,
            stacklevel=3,
        )


def print_trials(trials: Sequence[Trial], console: Console) -> None:
    columns = ["phase", "loss", "step_s", "peak_bytes", "estimated_bytes", "hours"]
    print_fields(console, "dry run", columns, trials)
    print_note(console, f"precision: {trials[0].precision}")
    console.print(f"all phases at this speed: {duration(3600 * sum(trial.hours for trial in trials))}")


def _steps(
    plan: Plan, planned: PhasePlan, engine: EngineInterface, start: Snapshot, world: World, screen: Screen
) -> tuple[float, float]:
    """(loss, seconds of a whole step)."""
    phase = planned.phase
    whole = planned.micro_batches(world.size)
    engine.begin(phase, start, micro_batches=min(whole, MICRO_BATCHES))
    read = dict.fromkeys(plan.recipe.sources, 0)
    with plan.loader(planned.index, read, world, last_step=1) as loader:
        _, micro_batches = next(iter(loader))
    some = micro_batches[:MICRO_BATCHES]
    losses = []
    for step in ("first step", "second step, which is timed"):
        screen.update(Line([f"dry run {phase.name}", step]))
        began = time.monotonic()
        result = engine.step(some, phase.optimizer.lr, lambda: False)
        assert result is not None
        losses.append(result.read().loss)
        seconds = (time.monotonic() - began) * len(micro_batches) / len(some)
    with torch.no_grad():
        engine.loss(some[0].tokens, some[0].targets, some[0].cu_seqlens).mean().item()
    return losses[0], seconds


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _out_of_memory(plan: Plan, planned: PhasePlan, machine: Machine, error: Exception) -> str:
    """Settings to change, in order: those that cost no time first."""
    engine = plan.recipe.engine
    own = Way.of(engine, machine.gpus)
    needed = phase_memory(plan, planned.index, machine).total
    share, micro = planned.phase.batch.sequences // machine.gpus, planned.micro(machine.gpus)
    knobs: list[tuple[str, Way, int]] = []
    smaller = max((m for m in range(1, micro) if share % m == 0), default=None)
    if smaller:
        knobs.append((f"phases.{planned.phase.name}.batch.micro={smaller}", own, smaller))
    for checkpointing in CHECKPOINTING[CHECKPOINTING.index(engine.checkpointing) + 1 :]:
        knobs.append((f"engine.checkpointing={checkpointing}", replace(own, checkpointing=checkpointing), micro))
    for way in ways_of(plan.recipe):
        if way != own and way.stage >= own.stage and way.checkpointing == own.checkpointing:
            deepspeed = f"engine.name=deepspeed engine.stage={way.stage}"
            deepspeed += f" engine.offload={way.offload}" if way.offload != "none" else ""
            knobs.append((deepspeed, way, micro))
    lines = []
    for knob, way, windows in knobs:
        saved = needed - phase_memory(plan, planned.index, machine, way, micro=windows).total
        if saved > 0:
            lines.append(f"  {knob} saves about {saved / 1e9:.3g} GB")
    has = "" if machine.memory_bytes is None else f" of {machine.memory_bytes / 1e9:.3g} GB"
    remedy = "\n".join(lines) if lines else "  a smaller model, a shorter batch.context, or a GPU with more memory"
    return (
        f"phases[{planned.phase.name}]: a step does not fit into memory (about {needed / 1e9:.3g} GB{has} by the "
        f"estimate; {str(error).splitlines()[0]}). Set in this order:\n{remedy}"
    )
