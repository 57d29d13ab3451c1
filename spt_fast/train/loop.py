"""The trainer: a run is a schedule of phases, each trained by the same loop.

    run ─ for every phase ─ for every arm of its grid ─ for every step: evaluate? save? train
                          └ keep the best arm, hand its weights on

Everything that a later process needs stands in `TrainState` and three snapshots ("start", "best", "kept"), so a run
that is interrupted anywhere and resumed gives the same weights and metrics to the last bit as one that is not.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from spt_fast.config import Phase
from spt_fast.fields import Span
from spt_fast.files import write_text
from spt_fast.kernels import auto_backends
from spt_fast.model.flops import MFU_CONVENTION, parameters, peak_flops, train_flops_per_token
from spt_fast.train import checkpoint
from spt_fast.train.checkpoint import Checkpoint, Retention
from spt_fast.train.device import pick_dtype
from spt_fast.train.engine import StepResult
from spt_fast.train.engines import make_engine
from spt_fast.train.evaluate import Interrupted, evaluation_texts, mean_loss
from spt_fast.train.lr import learning_rate
from spt_fast.train.metrics import NoLog, RunLog
from spt_fast.train.plan import PhasePlan, Plan
from spt_fast.train.signals import StopRequest
from spt_fast.train.snapshot import Snapshot, weights_of
from spt_fast.train.state import Losses, ScheduleOrigin, TrainState
from spt_fast.train.watch import LossWatch, Watch
from spt_fast.train.weights import assemble
from spt_fast.train.world import World

MAX_SKIPPED_IN_A_ROW = 20
"""So many steps in a row with a loss or gradient that is not finite end the run."""


class Trainer:
    """One process's part in the run. `train` reads top to bottom; the rest are its steps."""

    def __init__(
        self,
        plan: Plan,
        folder: Path,
        stop: StopRequest,
        watch: Watch,
        found: Checkpoint | None,
        world: World,
        *,
        progress: bool,
    ) -> None:
        self.plan, self.folder, self.stop, self.watch, self.world = plan, folder, stop, watch, world
        self.began, self.seconds_before = time.monotonic(), 0.0
        self.pending: tuple[dict[str, Any], StepResult] | None = None
        self.saved = ""
        self.state = TrainState(counts=dict.fromkeys(plan.recipe.sources, 0))
        model = plan.starting_model()
        self.snapshots: dict[str, Snapshot] = {"kept": weights_of(model, world)}
        device = world.device
        dtype = world.on_first(lambda: pick_dtype(plan.recipe.precision, device))
        self.backends = auto_backends()
        if found:
            self.state = TrainState.from_plain(found.state["train"])
            self.snapshots = checkpoint.load(found.path, world)
            self.seconds_before, self.saved = self.state.seconds, self.state.name
            dtype = getattr(torch, found.state["compute"]["dtype"])
            if not found.state["model"]["tied"]:
                model.untie()
        self.parameters = parameters(plan.model)
        self.fp8_share = model.fp8_share if model.fp8 else None
        self.engine = make_engine(model, plan.recipe.engine, world=world, dtype=dtype)
        self.flops_per_token = train_flops_per_token(plan.model)
        self.peak_flops = peak_flops(device)

        settings = plan.recipe.checkpoint
        keep_every = settings.keep_every.steps(1, 1) if settings.keep_every else None
        self.writer = checkpoint.Writer(folder / "checkpoints", world, Retention(settings.keep, keep_every))

        self.log: RunLog | NoLog = NoLog()
        if world.is_first:
            self.log = RunLog(
                folder,
                keep_bytes=self.state.metrics_bytes,
                purge_step=self.state.total_steps if found else None,
                progress=progress,
                convention=f"{MFU_CONVENTION}, bf16 dense {self.peak_flops / 1e12:.0f}" if self.peak_flops else None,
            )
        world.on_first(lambda: self.introduce(found))

    def introduce(self, found: Checkpoint | None) -> None:
        """Say what runs where, and what the user should know about it."""
        precision = "bf16, fp32 masters" if self.engine.dtype == torch.bfloat16 else "fp32"
        if self.fp8_share is not None:
            how = "in fp8" if self.engine.device.type == "cuda" else "as in fp8, which only costs time on a CPU"
            precision += f" ({self.fp8_share:.0%} of the blocks' products {how})"
        self.log.say(f"{self.folder}: {self.parameters:,} parameters in {precision} on {self.engine.describe()}")
        chosen = sorted(set(self.backends.values()))
        by_backend = {name: [op for op, backend in self.backends.items() if backend == name] for name in chosen}
        self.log.say("kernels: " + "; ".join(f"{name} for {', '.join(ops)}" for name, ops in by_backend.items()))
        if found is None:
            for warning in self.plan.leaks():
                self.log.say(f"warning: {warning}")
            return
        for path, reason in found.skipped.items():
            self.log.say(f"skipped a damaged checkpoint: {reason}")
            checkpoint.set_aside(path)
        self.log.say(f"resuming from {found.path.name}")
        before, now = found.state["compute"], self.compute()
        changed = [
            f"{op} {before['backends'].get(op)} → {backend}"
            for op, backend in self.backends.items()
            if before["backends"].get(op) != backend
        ]
        if before["engine"] != now["engine"]:
            changed.append(f"{before['engine']} → {now['engine']}")
        if changed:
            self.log.say(f"warning: other kernels or processes than so far, so not bit-identical: {', '.join(changed)}")

    # ------------------------------------------------------------------------------------------------ the run

    def train(self) -> None:
        """Every phase from where the state stands. Raises Interrupted only where `save` is exact."""
        state = self.state
        while state.phase < len(self.plan.phases):
            plan = self.plan.phases[state.phase]
            arms = plan.phase.arms()
            self.begin_phase(plan)
            while state.arm < len(arms):
                self.train_arm(plan, plan.phase.with_overrides(arms[state.arm]))
                self.finish_arm(plan, arms)
            self.finish_phase(plan)

    def begin_phase(self, plan: PhasePlan) -> None:
        """Make the snapshot that the phase starts from, unless a checkpoint inside the phase brought it."""
        phase = plan.phase
        if not phase.schedule.carry_on:
            self.state.origin = ScheduleOrigin(plan.index)
        if "current" in self.snapshots:
            self.snapshots.setdefault("start", self.snapshots["current"])
        else:
            start = self.snapshots.pop("kept")
            if phase.optimizer_state == "reset":
                start = start.without_state()
            if phase.untie and self.engine.config.tied:
                self.engine.untie()
                start = start.untied()
            self.snapshots["start"] = start
        self.texts = evaluation_texts(self.plan, phase.evaluation.tokens, documents=phase.documents)

    def train_arm(self, plan: PhasePlan, phase: Phase) -> None:
        """One arm, from its start or from where it was interrupted, to its last step or early stop."""
        state, recipe = self.state, self.plan.recipe
        save_every, evaluate_every, self.log_every = (
            max(1, span.steps(plan.tokens_per_step, plan.steps))
            for span in (recipe.checkpoint.every, phase.evaluation.every, recipe.log.every)
        )
        start, current = self.snapshots["start"], self.snapshots.pop("current", None)
        self.engine.begin(phase, start, current=current, micro_batches=plan.micro_batches(self.world.size))
        if not needs_start(phase):
            del self.snapshots["start"]
        arms = len(phase.arms())
        self.log.begin(phase.name + (f" {state.arm + 1}/{arms}" if arms > 1 else ""), state.step, plan.steps)
        self.clock, self.loss_watch = Clock(state.train_seconds), LossWatch()
        loader = self.plan.loader(
            plan.index,
            state.counts,
            device=self.engine.device,
            first_step=state.step,
            rank=self.world.rank,
            world=self.world.size,
        )
        try:
            batches = iter(loader)
            while True:
                at_end = state.step == plan.steps
                if not state.evaluated and (at_end or state.step % evaluate_every == 0):
                    self.read_back(plan)
                    self.evaluate(plan, phase)
                ends = at_end or (phase.stop is not None and state.stale >= phase.stop.patience)
                due = state.step % save_every == 0 and not ends
                if recipe.checkpoint.keep_best:
                    due = due or self.at_best()
                if due and state.total_steps and state.name != self.saved:
                    self.read_back(plan)
                    self.save()
                if ends:
                    break

                _, micro_batches = next(batches)
                lr = self.learning_rate(plan, phase)
                result = self.engine.step(micro_batches, lr, self.asked_to_stop)
                if result is None:
                    raise Interrupted
                self.read_back(plan)
                state.step += 1
                state.total_steps += 1
                state.evaluated = False
                self.pending = (self.position(plan) | {"lr": lr}, result)
                self.log.advance(state.step)
        finally:
            self.read_back(plan)
            loader.close()

    def finish_arm(self, plan: PhasePlan, arms: list[dict[str, Any]]) -> None:
        """Note what the arm reached; keep its weights where its `select` loss is the best of the arms so far."""
        state, phase = self.state, plan.phase
        assert state.best is not None
        handed_on: dict[str, Any] = state.best if phase.stop else {"step": state.step, "losses": self.losses}
        reached = {
            **{key: str(value) if isinstance(value, Span) else value for key, value in arms[state.arm].items()},
            "steps": state.step,
            "tokens": state.step * plan.tokens_per_step,
            "tokens_per_s": round(state.step * plan.tokens_per_step / max(self.clock.total_s, 1e-9), 1),
            "handed_on": handed_on["step"],
            "select": handed_on["losses"]["select"],
            "heldout": handed_on["losses"]["heldout"],
            "best_heldout": state.best["losses"]["heldout"],
        }
        if all(_deciding(reached, phase) < _deciding(arm, phase) for arm in state.arms):
            best = self.snapshots.pop("best", None)
            self.snapshots["kept"] = best if best is not None else self.engine.snapshot(state=self.hands_on_state(plan))
        self.snapshots.pop("best", None)
        state.arms.append(reached)
        state.next_arm()

    def finish_phase(self, plan: PhasePlan) -> None:
        """Write the phase's weights and figures, and carry the sources' counts on to the next phase."""
        state, phase = self.state, plan.phase
        kept = min(range(len(state.arms)), key=lambda i: _deciding(state.arms[i], phase))
        arm = state.arms[kept]
        windows = plan.mixture.counts(arm["steps"] * phase.batch.sequences)
        state.finished[phase.name] = {
            **{
                key: arm[key]
                for key in ("steps", "tokens", "handed_on", "heldout", "select", "best_heldout", "tokens_per_s")
            },
            "epochs": {source: float(self.plan.epochs(source, n)) for source, n in windows.items()},
            "windows": {source: [state.counts[source], state.counts[source] + n] for source, n in windows.items()},
            "arm": kept,
            "grid": state.arms,
        }
        self.write_weights(phase.name)
        for source, n in windows.items():
            state.counts[source] += n
        if state.origin.phase == plan.index:
            state.origin = ScheduleOrigin(plan.index, kept, arm["tokens"])
        else:
            state.origin.tokens += arm["tokens"]
        state.next_phase()
        self.snapshots = {"kept": self.snapshots["kept"]}

    def write_weights(self, name: str) -> None:
        """weights/<name>, of the snapshot that is handed on."""
        weights = self.world.collect(self.snapshots["kept"].weights)
        folder, tokenizer = self.folder / "weights" / name, self.plan.tokenizer
        self.world.on_first(lambda: assemble(self.engine.config, weights).save_hf(folder, tokenizer))

    # ------------------------------------------------------------------------------------------------ its steps

    def asked_to_stop(self) -> bool:
        """Whether any process was asked to. Between micro-batches and evaluation batches: each asking is progress."""
        self.watch.sign_of_life(phase=self.plan.phases[self.state.phase].phase.name, step=self.state.step)
        return self.world.any(self.stop())

    def learning_rate(self, plan: PhasePlan, phase: Phase) -> float:
        """The rate of the step to come; a carried-on schedule counts from where its own phase began."""
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

    def position(self, plan: PhasePlan) -> dict[str, Any]:
        step = self.state.step
        return {"phase": plan.phase.name, "arm": self.state.arm, "step": step, "tokens": step * plan.tokens_per_step}

    def read_back(self, plan: PhasePlan) -> None:
        """Read and log the results of the step before; the step just queued runs on meanwhile."""
        if self.pending is None:
            return
        record, result = self.pending
        self.pending = None
        state = self.state
        loss, grad_norm, skipped = result.read()
        state.skipped += skipped
        state.skipped_in_a_row = (state.skipped_in_a_row + 1) * skipped
        self.clock.steps += 1
        if state.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise RuntimeError(
                f"the loss or its gradient was not finite for {MAX_SKIPPED_IN_A_ROW} steps in a row (phase "
                f"{record['phase']}, step {record['step']}), which left the weights as they were: lower "
                "optimizer.lr or lengthen schedule.warmup"
            )
        usual = self.loss_watch.jump(loss) if math.isfinite(loss) else None
        if usual is not None:
            self.log.say(
                f"warning: the loss jumped to {loss:.3f} at step {record['step']} of {record['phase']}, from around "
                f"{usual:.3f}: look at the data there, or lower optimizer.lr if it happens again"
            )
        if record["step"] % self.log_every == 0 or record["step"] == plan.steps:
            tokens_per_s = self.clock.lap() * plan.tokens_per_step
            mfu = tokens_per_s * self.flops_per_token / self.peak_flops if self.peak_flops else None
            figures = {"loss": _finite(loss), "lr": record.pop("lr"), "grad_norm": _finite(grad_norm)}
            self.log.train({**record, **figures, "tokens_per_s": tokens_per_s, "mfu": mfu}, state.total_steps)

    def evaluate(self, plan: PhasePlan, phase: Phase) -> None:
        """Losses on every fixed text; a new best is remembered, with its weights where they may be handed on."""
        self.clock.pause()
        state = self.state
        rows = plan.micro(self.world.size)
        self.losses: Losses = {split: {} for split in self.texts}
        for split, texts in self.texts.items():
            for source, text in texts.items():
                self.losses[split][source] = mean_loss(
                    self.engine.loss, text, rows, interrupted=self.asked_to_stop, world=self.world
                )
        state.evaluated = True
        self.log.evaluation({**self.position(plan), **self.losses}, state.total_steps)
        if state.best is None or _deciding(self.losses, phase) < _deciding(state.best["losses"], phase):
            state.best, state.stale = {"step": state.step, "losses": self.losses}, 0
            if phase.stop:
                self.snapshots["best"] = self.engine.snapshot(state=self.hands_on_state(plan))
        else:
            state.stale += 1
        self.clock.go_on()

    def hands_on_state(self, plan: PhasePlan) -> bool:
        """Whether the next phase goes on with this one's optimizer state."""
        following = self.plan.phases[plan.index + 1 :]
        return bool(following) and following[0].phase.optimizer_state == "keep"

    def save(self) -> None:
        """A checkpoint of exactly this position."""
        self.clock.pause()
        state = self.state
        state.metrics_bytes = self.log.sync()
        state.seconds, state.train_seconds = self.seconds(), self.clock.total_s
        snapshots = {**self.snapshots, "current": self.engine.snapshot(state=True)}
        content = {
            "model": asdict(self.engine.config),
            "train": state.plain(),
            "data": self.plan.digests(),
            "compute": self.compute(),
        }
        best = self.plan.recipe.checkpoint.keep_best and self.at_best()
        failed = self.writer.save(state.name, content, snapshots, best=best)
        if failed:
            self.log.say(f"warning: {failed}; the one after it is whole")
        self.saved = state.name
        self.clock.go_on()

    def at_best(self) -> bool:
        """Whether the weights are those of the arm's best evaluation."""
        return self.state.best is not None and self.state.best["step"] == self.state.step

    def compute(self) -> dict[str, Any]:
        """How steps are computed: what a run that goes on from here keeps, or says that it changes."""
        dtype = str(self.engine.dtype).removeprefix("torch.")
        return {"dtype": dtype, "backends": self.backends, "engine": self.engine.describe()}

    def seconds(self) -> float:
        """Wall time of the run, earlier processes included."""
        return self.seconds_before + time.monotonic() - self.began

    def summarise(self, status: str, **more: Any) -> dict[str, Any]:
        """Write summary.json and return it."""
        summary = {
            "status": status,
            **more,
            "parameters": self.parameters,
            "flops_per_token": self.flops_per_token,
            "tokenizer": self.plan.tokenizer_digest,
            "train_tokens": {source: data.num_tokens for source, data in self.plan.train.items()},
            "precision": str(self.engine.dtype).removeprefix("torch."),
            "device": str(self.engine.device),
            "seed": self.plan.recipe.seed,
            "seconds": round(self.seconds(), 2),
            "skipped_steps": self.state.skipped,
            "data": self.plan.digests(),
            "phases": self.state.finished,
        }
        if self.world.is_first:
            write_text(self.folder / "summary.json", json.dumps(summary, indent=1))
        return summary


class Clock:
    """Wall time of training alone, evaluations and checkpoints left out."""

    def __init__(self, before_s: float) -> None:
        self._before_s = before_s
        self._since = self._lap_began = time.monotonic()
        self._paused_s = self._lap_paused_s = 0.0
        self.steps = 0

    def pause(self) -> None:
        self._pause_began = time.monotonic()

    def go_on(self) -> None:
        self._paused_s += time.monotonic() - self._pause_began

    @property
    def total_s(self) -> float:
        return self._before_s + time.monotonic() - self._since - self._paused_s

    def lap(self) -> float:
        """Steps per second since the lap before."""
        now = time.monotonic()
        lap_s = now - self._lap_began - (self._paused_s - self._lap_paused_s)
        rate = self.steps / max(lap_s, 1e-9)
        self._lap_began, self._lap_paused_s, self.steps = now, self._paused_s, 0
        return rate


def needs_start(phase: Phase) -> bool:
    """Whether the weights at the phase's start are needed again after its first step."""
    return phase.anchor > 0 or phase.grid is not None


def _deciding(losses: Mapping[str, Any], phase: Phase) -> float:
    """The `select` loss that early stopping and the grid go by; infinite where it is NaN or not measured."""
    loss = losses["select"].get(phase.chosen_by, math.inf)
    return math.inf if math.isnan(loss) else loss


def _finite(number: float) -> float | None:
    """A number for JSON, which has no NaN."""
    return number if math.isfinite(number) else None
