"""The trainer: a run is a schedule of phases, each trained by the same loop.

    run ─ for every phase ─ for every arm of its grid ─ for every step: evaluate? save? train
                          └ keep the best arm, pass its weights on

All state that a later process needs is in `TrainState` and three snapshots ("start", "best", "kept"), so a run that is
interrupted anywhere and resumed gives the same weights and metrics, bit for bit, as one that is not.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from spt_fast.config import Phase, Recipe
from spt_fast.model import hf
from spt_fast.model.flops import mfu_label, peak_flops
from spt_fast.printing import plain, terminal
from spt_fast.train import averages, checkpoint, health
from spt_fast.train.checkpoint import Retention
from spt_fast.train.engine import StepResult
from spt_fast.train.engines import make_engine
from spt_fast.train.evaluate import EvalSet, Interrupted, evaluation_texts, measure_all, phase_flops
from spt_fast.train.folder import write_summary
from spt_fast.train.health import MAX_SKIPPED_IN_A_ROW, deciding, standing
from spt_fast.train.introduction import Resumed, introduction
from spt_fast.train.lr import learning_rate
from spt_fast.train.metrics import Clock, NoLog, RunLog
from spt_fast.train.plan import PhasePlan, Plan
from spt_fast.train.samples import samples
from spt_fast.train.signals import StopRequest
from spt_fast.train.snapshot import Snapshot
from spt_fast.train.state import ArmResult, Compute, Evaluation, PhaseResult, SavedState, ScheduleOrigin, TrainState
from spt_fast.train.summary import facts
from spt_fast.train.trackers import followed
from spt_fast.train.tuning import choose
from spt_fast.train.watch import LossWatch, Watch
from spt_fast.train.world import World, dtype_name


class Arm:
    """State that lives while a process trains one arm of a phase."""

    def __init__(
        self, plan: PhasePlan, index: int, recipe: Recipe, texts: dict[str, dict[str, EvalSet]], train_seconds: float
    ) -> None:
        self.plan, self.texts = plan, texts
        self.values = plan.phase.arms()[index]
        self.phase = plan.phase.with_overrides(self.values)
        self.save_every, self.evaluate_every, self.log_every = (
            span.steps(plan.tokens_per_step, plan.steps)
            for span in (recipe.checkpoint.every, self.phase.evaluation.every, recipe.log.every)
        )
        self.clock, self.loss_watch = Clock(train_seconds), LossWatch()
        self.pending: tuple[dict[str, Any], StepResult] | None = None
        """The newest step's record, and its figures once they have arrived."""
        self.steps_in_lap = 0


class Trainer:
    """One process's part in the run. `train` reads top to bottom; the other methods are its steps."""

    def __init__(
        self,
        plan: Plan,
        folder: Path,
        stop: StopRequest,
        watch: Watch,
        resumed: Resumed | None,
        world: World,
        *,
        progress: bool,
    ) -> None:
        self.plan, self.folder, self.stop, self.watch, self.world = plan, folder, stop, watch, world
        self.began, self.seconds_before = time.monotonic(), 0.0
        self.saved = ""
        self.state = TrainState(dict.fromkeys(plan.recipe.sources, 0))
        model = plan.model_without_weights()
        self.snapshots = {} if resumed else {"kept": Snapshot(plan.starting_weights(world))}
        device, before = world.device, resumed.state.compute if resumed else None
        say = terminal(stderr=True, quiet=not progress).print
        self.choices = world.on_first(lambda: choose(plan, device, world.size, before, say=say, stop=stop))
        self.backends = self.choices.install()
        if resumed:
            self.state = resumed.state.train
            self.state.counts = dict.fromkeys(plan.recipe.sources, 0) | self.state.counts
            self.snapshots = checkpoint.load(resumed.checkpoint.path, world)
            self.seconds_before, self.saved = self.state.seconds, self.state.name
            if not resumed.state.model.tied:
                model.untie()
        self.engine = make_engine(model, plan.recipe.engine, world=world, dtype=self.choices.precision.dtype)
        peak = peak_flops(device)
        self.peak_flops = peak and peak * world.size  # of all processes, as the tokens of a step

        settings = plan.recipe.checkpoint
        keep_every = settings.keep_every.steps(1, 1) if settings.keep_every else None
        self.retention = Retention(settings.keep, keep_every)
        self.writer = checkpoint.Writer(folder / "checkpoints", world, self.retention)

        run = followed(folder, plan, self.engine, self.state.total_steps if resumed else None)
        kept, label, work = self.state.metrics_bytes, mfu_label(device), phase_flops(plan)
        first = partial(RunLog, run, work, keep_bytes=kept, progress=progress, mfu_label=label)
        log: Callable[[], RunLog | NoLog] = first if world.is_first else NoLog
        self.log = world.everywhere(log)
        lines = introduction(folder, self.engine, model, plan, self.choices, self.backends, resumed)
        world.on_first(lambda: self.log.say("\n".join(lines)))

    # ------------------------------------------------------------------------------------------------ the run

    def train(self) -> None:
        """Train every phase from the current state. Raises Interrupted, after a checkpoint."""
        state = self.state
        while state.phase < len(self.plan.phases):
            plan = self.plan.phases[state.phase]
            self.begin_phase(plan)
            texts = evaluation_texts(self.plan, plan.phase, windows=state.windows)
            while state.arm < len(plan.phase.arms()):
                arm = Arm(plan, state.arm, self.plan.recipe, texts, state.train_seconds)
                self.train_arm(arm)
                self.finish_arm(arm)
            self.finish_phase(plan)

    def begin_phase(self, plan: PhasePlan) -> None:
        """Make the snapshot at the phase's start, unless a checkpoint inside the phase contained it."""
        phase = plan.phase
        if not phase.schedule.carry_on:
            self.state.origin = ScheduleOrigin(plan.index)
        if "current" in self.snapshots:
            self.snapshots.setdefault("start", self.snapshots["current"])
            return
        start = self.snapshots.pop("kept")
        if phase.optimizer_state == "reset":
            start = start.without_state()
        if phase.untie and self.engine.config.tied:
            self.engine.untie()
            start = start.untied()
        self.snapshots["start"] = start

    def train_arm(self, arm: Arm) -> None:
        """Train one arm, from its start or from where it was interrupted, to its last step or early stop."""
        state, plan, world = self.state, arm.plan, self.world
        with arm.clock.paused():
            count, current = plan.micro_batches(world.size), self.snapshots.pop("current", None)
            self.engine.begin(arm.phase, self.snapshots["start"], current=current, micro_batches=count)
        if not arm.phase.needs_start:
            del self.snapshots["start"]  # not needed after the first step: frees its memory
        self.snapshots = {kind: snapshot.in_memory() for kind, snapshot in self.snapshots.items()}  # files may go
        self.log.begin_arm(plan, state.arm, state.step)
        with self.plan.loader(plan.index, state.counts, world, first_step=state.step) as loader:
            batches = iter(loader)
            try:
                while not self.ends_here(arm):
                    _, micro_batches = next(batches)
                    lr = self.learning_rate(plan, arm.phase)
                    result = self.engine.step(micro_batches, lr, self.asked_to_stop)
                    if result is None:
                        raise Interrupted
                    self.read_back(arm)
                    state.step += 1
                    state.total_steps += 1
                    arm.pending = (self.position(arm, state.step) | {"lr": lr}, result)
                    self.log.advance(state.step)
            except Interrupted:
                self.save(arm)
                raise
            finally:
                self.read_back(arm)

    def ends_here(self, arm: Arm) -> bool:
        """Evaluate and save when due; returns whether the arm is at its last step or stops early."""
        state, settings = self.state, self.plan.recipe.checkpoint
        at_end = state.step == arm.plan.steps or self.given_up()
        if not state.evaluated and (at_end or state.step % arm.evaluate_every == 0):
            self.evaluate(arm)
        ends = at_end or (arm.phase.stop is not None and state.stale >= arm.phase.stop.patience)
        due = state.step % arm.save_every == 0 or self.retention.keeps(state.total_steps)
        due = (due and not ends) or (settings.keep_best and state.at_best)
        if due and state.total_steps:
            self.save(arm)
        return ends

    def finish_arm(self, arm: Arm) -> None:
        """Record the arm's result; keep its weights if its `select` loss is the best of the arms so far."""
        state, plan = self.state, arm.plan
        assert state.best is not None
        assert state.newest is not None
        handed_on = state.best if arm.phase.stop else state.newest
        trained = self.trained(arm) if arm.phase.also_average else Snapshot()
        if arm.phase.average:
            handed_on = self.average(arm, handed_on)
        losses = handed_on.losses["train"]
        reached = ArmResult(
            values=plain(arm.values),
            steps=state.step,
            tokens=state.step * plan.tokens_per_step,
            tokens_per_s=round(state.step * plan.tokens_per_step / max(arm.clock.total_s, 1e-9), 1),
            skipped=state.skipped_in_arm,
            handed_on=handed_on.step,
            select=handed_on.losses["select"],
            heldout=handed_on.losses["heldout"],
            training=dict.fromkeys(losses, math.nan) if self.given_up() else losses,
            best_heldout=state.best.losses["heldout"],
            standard_errors=handed_on.errors,
            scored={split: {of: text.size() for of, text in texts.items()} for split, texts in arm.texts.items()},
        )
        if state.best.step == 0 < state.newest.step and math.isfinite(deciding(reached.select, arm.phase)):
            self.log.say(health.never_better(reached.select, arm.phase))
        best = self.snapshots.pop("best", None)
        if all(standing(reached, plan.phase) < standing(other, plan.phase) for other in state.arms):
            self.snapshots["kept"] = best or self.engine.snapshot(state=self.hands_on_state(plan))
        for other in averages.others(self.folder, self.world, plan.phase):
            mixed, found = self.averaged(arm, trained, float(other.share), reached.handed_on)
            if other.is_best(reached, found, state.arms):
                self.snapshots[other.kept] = mixed
        state.arms.append(reached)
        state.next_arm()

    def average(self, arm: Arm, trained: Evaluation) -> Evaluation:
        """Average the trained weights with the arm's start; returns their losses. An interruption saves first."""
        self.snapshots["best"], found = self.averaged(arm, self.trained(arm), float(arm.phase.average), trained.step)
        return found

    def trained(self, arm: Arm) -> Snapshot:
        """The arm's trained weights, saved in a checkpoint, since the engine will load other weights."""
        self.save(arm)
        return self.snapshots.get("best") or self.engine.snapshot(state=self.hands_on_state(arm.plan))

    def averaged(self, arm: Arm, trained: Snapshot, share: float, step: int) -> tuple[Snapshot, Evaluation]:
        """The average with a share of the arm's start, and its losses."""
        with arm.clock.paused():
            mixed = trained.averaged(self.snapshots["start"], share, self.world)
            self.engine.begin(arm.phase, mixed)
            return mixed, self.measure(arm, step, average=share)

    def finish_phase(self, plan: PhasePlan) -> None:
        """Write the phase's weights and figures, and pass the sources' counts to the next phase.

        Raises Diverged, with the figures recorded and no weights written, if the weights are unusable.
        """
        state, phase = self.state, plan.phase
        kept = min(range(len(state.arms)), key=lambda i: standing(state.arms[i], phase))
        arm = state.arms[kept]
        windows = plan.windows(arm.steps)
        state.finished[phase.name] = PhaseResult(
            epochs={source: float(plan.rings[source].epochs(n)) for source, n in windows.items()},
            windows={source: [state.counts[source], state.counts[source] + n] for source, n in windows.items()},
            arm=kept,
            grid=state.arms,
        )
        health.check(arm, phase)
        self.write_weights(self.folder / "weights" / phase.name, self.snapshots["kept"])
        for other in averages.others(self.folder, self.world, phase):
            if result := other.result(state.finished[phase.name]):
                self.write_weights(other.begin(), self.snapshots[other.kept])
                other.finish(self.facts({phase.name: result}))
        if state.origin.phase == plan.index:
            state.origin = ScheduleOrigin(plan.index, kept, arm.tokens)
        else:
            state.origin.tokens += arm.tokens
        state.next_phase()
        if state.phase < len(self.plan.phases):
            state.counts = self.plan.read_before(state.phase, state.finished)
        self.snapshots = {"kept": self.snapshots["kept"]}

    def write_weights(self, folder: Path, handed_on: Snapshot) -> None:
        weights, config, tokenizer = handed_on.weights, self.engine.config, self.plan.tokenizer
        like = self.folder if (self.folder / hf.BASE_CONFIG).exists() else None
        known = self.plan.origin(self.state.phase, dtype_name(self.engine.dtype)).as_metadata()
        self.world.collect(
            weights, lambda each: hf.save(config, each, folder, tokenizer, torch.float32, known, like=like)
        )

    # ------------------------------------------------------------------------------------------------ its steps

    def asked_to_stop(self) -> bool:
        """Whether any process was asked to stop. Called between micro-batches and evaluation batches, as progress."""
        self.watch.sign_of_life(phase=self.plan.phases[self.state.phase].phase.name, step=self.state.step)
        return self.world.any(self.stop())

    def given_up(self) -> bool:
        """Whether the arm has diverged; other arms of its grid continue."""
        return self.state.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW

    def learning_rate(self, plan: PhasePlan, phase: Phase) -> float:
        """The rate of the next step; a continued schedule counts from the start of its own phase."""
        origin = self.state.origin
        owner = self.plan.phases[origin.phase]
        if origin.phase == plan.index:
            schedule, tokens = phase.schedule, self.state.step * plan.tokens_per_step
        else:
            schedule = owner.phase.with_overrides(owner.phase.arms()[origin.arm]).schedule
            tokens = origin.tokens + self.state.step * plan.tokens_per_step
        return learning_rate(
            schedule, phase.optimizer.lr, tokens // owner.tokens_per_step, owner.steps, owner.tokens_per_step
        )

    def position(self, arm: Arm, step: int) -> dict[str, Any]:
        return {"phase": arm.phase.name, "arm": self.state.arm, "step": step, "tokens": step * arm.plan.tokens_per_step}

    def read_back(self, arm: Arm) -> None:
        """Read and log the results of the previous step; the step just queued runs meanwhile."""
        if arm.pending is None:
            return
        record, result = arm.pending
        arm.pending = None
        state, step, where = self.state, result.read(), f"step {record['step']} of {record['phase']}"
        if step.skipped and not state.skipped_in_arm:
            self.log.say(f"warning: {where} was skipped because the loss or its gradient was not finite")
        state.skipped += step.skipped
        state.skipped_in_arm += step.skipped
        state.skipped_in_a_row = (state.skipped_in_a_row + 1) * step.skipped
        arm.steps_in_lap += 1
        if self.given_up() and len(self.plan.phases[state.phase].phase.arms()) == 1:
            raise RuntimeError(
                f"{where}: the loss or its gradient was not finite for {MAX_SKIPPED_IN_A_ROW} steps in a row, which "
                f"left the weights as they were; {health.REMEDY}"
            )
        usual = arm.loss_watch.jump(step.loss) if math.isfinite(step.loss) else None
        if usual is not None:
            self.log.say(
                f"warning: the loss jumped to {step.loss:.3f} at {where}, from around {usual:.3f}: look at the data "
                "there, or lower optimizer.lr if it happens again"
            )
        if record["step"] % arm.log_every == 0 or record["step"] == arm.plan.steps:
            tokens_per_s = arm.steps_in_lap * arm.plan.tokens_per_step / arm.clock.lap(step.done_s)
            arm.steps_in_lap = 0
            flops_per_s = tokens_per_s * self.plan.flops_per_token(arm.plan.index)
            mfu = flops_per_s / self.peak_flops if self.peak_flops else None
            figures = {"loss": step.loss, "lr": record.pop("lr"), "grad_norm": step.grad_norm}
            figures |= {"tokens_per_s": tokens_per_s, "mfu": mfu, "skipped": state.skipped_in_arm}
            self.log.train({**record, **figures}, state.total_steps)

    def evaluate(self, arm: Arm) -> None:
        """Losses on every fixed text; a new best is recorded, with its weights if they may be passed on."""
        self.read_back(arm)
        state = self.state
        with arm.clock.paused():
            state.newest = self.measure(arm, state.step)
            health.check_start(self.plan.recipe.init, state)
            chosen = deciding(state.newest.losses["select"], arm.phase)
            if state.best is not None and chosen >= deciding(state.best.losses["select"], arm.phase):
                state.stale += 1
                return
            state.best, state.stale = state.newest, 0
            if arm.phase.stop:
                self.snapshots["best"] = self.engine.snapshot(state=self.hands_on_state(arm.plan))

    def measure(self, arm: Arm, step: int, **more: float) -> Evaluation:
        """Evaluate the engine's weights, after `step` steps, and log the losses with `more`."""
        rows = arm.plan.micro(self.world.size)
        losses, errors = measure_all(self.engine.loss, arm.texts, rows, self.asked_to_stop, self.world)
        record = {**self.position(arm, step), **more, **losses, "standard_errors": errors}
        record |= samples(self.engine.logits, arm.texts["select"], arm.phase, self.plan.tokenizer, self.folder)
        self.log.evaluation(record, self.state.total_steps)
        return Evaluation(step, losses, errors)

    def hands_on_state(self, plan: PhasePlan) -> bool:
        """Whether the next phase continues with this one's optimizer state."""
        following = self.plan.phases[plan.index + 1 :]
        return bool(following) and following[0].phase.optimizer_state == "keep"

    def save(self, arm: Arm) -> None:
        """A checkpoint of this position, unless there is one: replacing it would leave none for a moment."""
        self.read_back(arm)
        state = self.state
        if state.name == self.saved:
            return
        with arm.clock.paused():
            state.metrics_bytes = self.log.sync()
            state.seconds, state.train_seconds = self.seconds(), arm.clock.total_s
            dtype, data, texts = dtype_name(self.engine.dtype), self.plan.digests(), self.plan.known_texts()
            compute = Compute(dtype, self.backends, self.engine.describe(), self.choices.measured())
            content = SavedState(self.engine.config, state, data, compute, texts, os.getcwd()).plain()
            snapshots = {**self.snapshots, "current": self.engine.snapshot(state=True)}
            best = self.plan.recipe.checkpoint.keep_best and state.at_best
            failed = self.writer.save(state.name, content, snapshots, best=best)
            if failed:
                self.log.say(f"warning: {failed}; the next one is whole")
            self.saved = state.name

    def seconds(self) -> float:
        """Wall time of the run, earlier processes included."""
        return self.seconds_before + time.monotonic() - self.began

    def summarise(self, status: str, **more: Any) -> dict[str, Any]:
        """Write summary.json and return it."""
        summary = {"status": status, **more, **self.facts(self.state.finished)}
        if self.world.is_first:
            write_summary(self.folder, summary)
        return summary

    def facts(self, finished: dict[str, PhaseResult]) -> dict[str, Any]:
        return facts(self.plan, self.engine, self.choices, self.state, finished, self.seconds())
