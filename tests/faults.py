"""What a run survives: kills, signals, full disks, damaged checkpoints, losses that are no numbers, dead ranks.

    python -m tests.faults [PART …] [--chains N] [--kills N] [--each N] [--seed N] [--json FILE]

kills         chains of a run that is killed again and again at random moments, every second time while a checkpoint is
              being written (some `.step-*.tmp` is there), each time resumed, and at last left to finish
signals       SIGTERM during evaluations, during steps of several micro-batches, while a checkpoint is written
disk          a disk that fills up and is made larger, a folder that turns read-only and back
damage        the newest checkpoints torn, flipped, without a file
nan           a loss that is not a number: weights and moments of that step stay as they were
prepare, train, sweep, export
              each killed at its calls that concern a file, and called again: `prepare` over an older split, a run that
              keeps its best checkpoints and has a grid and no early stop, a study, an export over another model
twice, sweeps
              two processes that want one run's folder, or one study's, the first of which may be killed
worlds        the same run in one, two and three processes by turns, and at other ZeRO stages
rank_killed, rank_stopped, rank_nan
              one rank of two: killed, told to stop; of two or three, with a loss that is not a number

A run that survived is, against one that nothing disturbed: the same weights to the last bit, the same metrics but for
the clock, every step logged once, the same visits of every source by `audit`, and no temporary file left. Only where
the number of processes or the engine changed, sums round otherwise and losses are compared within a tolerance.

The run has over 200 steps on a tiny model: two sources that repeat, a phase boundary, a grid with early stopping. A
fresh interpreter takes seconds to import everything, so each life is forked from this process, which has imported all
of it and has computed nothing yet: no thread and no lock is inherited, and a life starts in a fraction of a second. The
child runs the command line's own `main`, so that exit codes are the real ones. Several processes are started by
torchrun itself where one of them is disturbed.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import mmap
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch comes in: a pool of threads would not survive the fork

import numpy as np
import torch
import yaml
from rich.console import Console
from safetensors.numpy import load_file

from spt_fast import cli
from spt_fast.config import load_recipe
from spt_fast.data.prepare import prepare
from spt_fast.data.shards import TokenDataset, files_of
from spt_fast.data.tokenizer import EOS, PATTERN, Tokenizer
from spt_fast.errors import CheckpointError, DataError, SptWarning
from spt_fast.model import hf
from spt_fast.model.gpt import GPT, GPTConfig
from spt_fast.printing import as_json
from spt_fast.study import jobs
from spt_fast.study.study import study_from
from spt_fast.study.sweep import sweep
from spt_fast.train import checkpoint, loop
from spt_fast.train.audit import audit_run
from spt_fast.train.local import LocalEngine
from spt_fast.train.release import export
from spt_fast.train.run import run
from tests import tiny
from tests.study.tiny_study import raw_study
from tests.train.many import DEEPSPEED, free_port

TRAINING, EVALUATING, STEPPING = 1, 2, 3
"""What a life says it is doing, in the first byte that it shares; the second is 1 while a checkpoint is written."""
DOING = {0: "starting", TRAINING: "between steps", EVALUATING: "evaluation", STEPPING: "step"}
CLOCK = ("tokens_per_s", "mfu")
STOP_SECONDS = 30.0
LIFE_SECONDS = 120.0
"""No life takes so long; one that does hangs."""
LOSS_TOLERANCE = 1e-3
"""Relative, fp32, of any loss between runs that sum in another order."""


# ------------------------------------------------------------------------------------------------ the run


def long_recipe(folder: Path, name: str) -> dict[str, Any]:
    """Over 200 steps: 10 epochs of one source and 3 of another, then a grid of two that stops early."""
    raw = tiny.raw_recipe(folder, name)
    pretrain, finetune = raw["phases"]
    pretrain |= {"tokens": 150 * 8 * tiny.CONTEXT, "batch": {"sequences": 8, "micro": 2}}
    pretrain |= {"eval": {"every": "10 steps", "tokens": 200}}
    finetune |= {"tokens": 60 * 4 * tiny.CONTEXT, "batch": {"sequences": 4, "micro": 2}}
    finetune |= {"eval": {"every": "4 steps", "tokens": 200}, "stop": {"on": "chem", "patience": 3}}
    return raw | {"checkpoint": {"every": "5 steps", "keep": 3}}


def write_recipe(raw: dict[str, Any]) -> Path:
    """Beside the run's folder."""
    path = Path(f"{raw['run']}.yaml")
    path.write_text(yaml.safe_dump(raw))
    return path


def forked(act: Callable[[], Any]) -> Any:
    """What `act` returns, as JSON takes it, computed in a child: this process must stay fit to be forked."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(writer, json.dumps(act()).encode())
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    os.close(writer)
    with open(reader, "rb") as file:
        said = file.read()
    assert os.waitpid(pid, 0)[1] == 0, "a helper process failed"
    return json.loads(said)


class Life:
    """One process of a run, from the fork to its end."""

    def __init__(
        self, recipe: Path, prepare: Callable[[], object] = lambda: None, *settings: str, said_in: str = ".said"
    ) -> None:
        """`prepare` runs in the child first, to break what is to be broken; settings: of the command line."""
        self._shared = mmap.mmap(-1, 2)
        self.said_in = recipe.with_suffix(said_in)
        self.pid = os.fork()
        if self.pid == 0:
            os._exit(self._live(recipe, prepare, settings))
        self.status: int | None = None

    def _live(self, recipe: Path, prepare: Callable[[], object], settings: tuple[str, ...]) -> int:
        try:  # whatever happens, the child must not go on as its parent
            descriptor = os.open(self.said_in, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            self._mark(loop.Trainer, "train", 0, TRAINING)
            self._mark(loop.Trainer, "evaluate", 0, EVALUATING)
            self._mark(LocalEngine, "step", 0, STEPPING)
            self._mark(checkpoint.Writer, "_write", 1, 1)
            prepare()
            sys.argv = ["spt-fast", "train", str(recipe), "--resume", *settings]
            cli.main()
            return 0
        except SystemExit as ending:
            return int(ending.code or 0)
        except BaseException:
            traceback.print_exc()
            return 1
        finally:
            sys.stdout.flush()
            sys.stderr.flush()

    def _mark(self, owner: Any, name: str, byte: int, value: int) -> None:
        real = getattr(owner, name)

        def marked(*args: Any, **kwargs: Any) -> Any:
            before = self._shared[byte]
            self._shared[byte] = value
            try:
                return real(*args, **kwargs)
            finally:
                self._shared[byte] = before

        setattr(owner, name, marked)

    @property
    def doing(self) -> int:
        return self._shared[0]

    @property
    def is_saving(self) -> bool:
        return self._shared[1] == 1

    @property
    def said(self) -> str:
        return " ".join(self.said_in.read_text().split())

    def alive(self) -> bool:
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
        return self.status is None

    def wait(self, until: Callable[[], bool] = lambda: False, seconds: float = LIFE_SECONDS) -> None:
        """Until this is true, the life has ended, or so much time has passed."""
        deadline = time.monotonic() + seconds
        while self.alive() and not until() and time.monotonic() < deadline:
            time.sleep(0.0002)

    def signal(self, number: int) -> bool:
        """Whether it was still alive."""
        if self.alive():
            os.kill(self.pid, number)
        return self.alive()

    def end(self, seconds: float = LIFE_SECONDS) -> int:
        """The exit code, negative for a signal; one that hangs is killed, and ends with that."""
        self.wait(seconds=seconds)
        if self.alive():
            os.kill(self.pid, signal.SIGKILL)
            self.wait()
        assert self.status is not None
        return self.status


# ------------------------------------------------------------------------------------------------ what must be equal


def without_clock(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_clock(item) for key, item in value.items() if key not in CLOCK}
    return [without_clock(item) for item in value] if isinstance(value, list) else value


def records(run: Path) -> list[dict[str, Any]]:
    return [without_clock(json.loads(line)) for line in (run / "metrics.jsonl").read_text().splitlines()]


def phases_of(run: Path) -> dict[str, Any]:
    return without_clock(json.loads((run / "summary.json").read_text())["phases"])


def leftovers(run: Path) -> list[str]:
    return [str(path.relative_to(run)) for path in run.rglob(".*.tmp")]


def differences(undisturbed: Path, run: Path) -> list[str]:
    """What is not as in the run that nothing disturbed; nothing where all is well."""
    found = []
    summary = json.loads((run / "summary.json").read_text())
    if summary["status"] != "done":
        return [f"status {summary['status']}"]
    if records(run) != records(undisturbed):
        found.append("metrics differ")
    steps = [(r["phase"], r["arm"], r["step"]) for r in records(run) if r["kind"] == "train"]
    if len(steps) != len(set(steps)):
        found.append("a step is logged twice")
    if phases_of(run) != phases_of(undisturbed):
        found.append("summaries differ")
    for phase in phases_of(undisturbed):
        ours, theirs = (load_file(folder / "weights" / phase / "model.safetensors") for folder in (run, undisturbed))
        bits = [{name: array.tobytes() for name, array in weights.items()} for weights in (ours, theirs)]
        found += [f"weights of {phase} differ"] if bits[0] != bits[1] else []
    if forked(lambda: as_json(audit_run(run))) != forked(lambda: as_json(audit_run(undisturbed))):
        found.append("audits differ")
    return found + [f"left behind: {path}" for path in leftovers(run)]


def total_steps(run: Path) -> int:
    return sum(record["kind"] == "train" for record in records(run))


ITINERARIES = {
    "2 → 1 → 2 processes": [(2, "stage=1"), (1, "name=local"), (2, "stage=1")],
    "ZeRO stage 2 → 1": [(2, "stage=2"), (2, "stage=1")],
    "local → deepspeed → local": [(1, "name=local"), (2, "stage=2"), (1, "name=local")],
    "3 → 1 → 3 processes": [(3, "stage=1"), (1, "name=local"), (3, "stage=2")],
}


class Campaign:
    """The undisturbed run, the disturbed ones, and what is counted of them."""

    def __init__(self, folder: Path, seed: int, say: Callable[[str], None]) -> None:
        self.folder, self.seed, self.say = folder, seed, say
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []
        self.figures: dict[str, float] = {}
        tiny.write_corpora(folder)
        self.undisturbed = folder / "undisturbed"
        began = time.monotonic()
        assert Life(write_recipe(long_recipe(folder, "undisturbed"))).end() == 0
        self.run_seconds = time.monotonic() - began
        assert total_steps(self.undisturbed) >= 200
        say(f"undisturbed: {total_steps(self.undisturbed)} steps in {self.run_seconds:.1f} s")

    def random(self, part: str, i: int) -> random.Random:
        return random.Random(f"{self.seed} {part} {i}")

    def check(self, what: str, problems: list[str], recipe: Path) -> None:
        """Count a survival, or note what was wrong, with the folder kept."""
        outcome = f"{what}: {'FAILED' if problems else 'survived'}"
        self.counts[outcome] += 1
        self.say(f"{outcome} {self.counts[outcome]}")
        if problems:
            self.failures.append(f"{what}, {recipe.stem}: {'; '.join(problems)}"[:1000])
            self.say(self.failures[-1])
        else:
            shutil.rmtree(recipe.with_suffix(""), ignore_errors=True)

    def finish(self, recipe: Path, undisturbed: Path | None = None) -> list[str]:
        """Leave the run to itself; what is wrong with it then."""
        life = Life(recipe)
        if (code := life.end()) != 0:
            return [f"exit {code}: {life.said}"]
        return differences(undisturbed or self.undisturbed, recipe.with_suffix(""))

    # -------------------------------------------------------------------------------------------- kills

    def kills(self, chains: int, kills: int) -> None:
        """At least `chains` chains and chains × kills kills in all: a chain may finish before its share is spent."""
        chain = 0
        while chain < chains or self.counts["kills"] < chains * kills:
            raw = long_recipe(self.folder, f"killed-{chain}")
            raw["checkpoint"] |= {"keep_best": chain % 2 == 1}  # which changes nothing else
            rng, recipe = self.random("kills", chain), write_recipe(raw)
            before = self.counts["kills"]
            for i in range(kills):
                if not self.kill_once(recipe, rng, aimed=i % 2 == 1, reach_s=2 * self.run_seconds / kills):
                    break
            self.check("chains of kills", self.finish(recipe), recipe)
            chain += 1
            self.say(
                f"chain {chain}: {self.counts['kills'] - before} kills; so far {self.counts['kills']}, of them "
                f"{self.counts['kills inside a checkpoint']} inside a checkpoint"
            )

    def kill_once(self, recipe: Path, rng: random.Random, *, aimed: bool, reach_s: float) -> bool:
        """Whether it was still alive to be killed."""
        life, checkpoints = Life(recipe), recipe.with_suffix("") / "checkpoints"
        if aimed:
            old = {path.name for path in checkpoints.glob(".step-*.tmp")}
            for _ in range(rng.randint(1, 3)):
                life.wait(lambda old=old: bool(new_temporaries(checkpoints, old)))
                old |= new_temporaries(checkpoints, old)
            time.sleep(rng.uniform(0, 0.006))
        else:
            if rng.random() < 0.8:
                life.wait(lambda: life.doing > 0)
            time.sleep(rng.uniform(0, reach_s))
        doing, saving = life.doing, life.is_saving
        life.signal(signal.SIGKILL)
        if life.end() != -signal.SIGKILL:
            return False
        self.counts["kills"] += 1
        self.counts[f"kills during: {DOING[doing]}"] += 1
        self.counts["kills inside a checkpoint"] += saving and any(checkpoints.glob(".step-*.tmp"))
        return True

    # -------------------------------------------------------------------------------------------- signals

    def signals(self, each: int) -> None:
        slowest_s, per_chain = 0.0, min(each, 10)
        for chain in range(-(-each // per_chain)):
            rng, recipe = self.random("signals", chain), write_recipe(long_recipe(self.folder, f"stopped-{chain}"))
            problems: list[str] = []
            for i in range(per_chain):
                life = Life(recipe)
                life.wait(lambda life=life: life.doing > 0)
                time.sleep(rng.uniform(0, 1.5 * self.run_seconds / per_chain))
                wanted = (EVALUATING, STEPPING, None)[i % 3]
                life.wait(lambda life=life, wanted=wanted: life.is_saving if wanted is None else life.doing == wanted)
                doing, sent = "checkpoint" if life.is_saving else DOING[life.doing], time.monotonic()
                if not life.signal(signal.SIGTERM):
                    break
                code = life.end(STOP_SECONDS)
                slowest_s = max(slowest_s, time.monotonic() - sent)
                if code == 0:  # the last step was done already
                    break
                self.counts[f"SIGTERM during: {doing}"] += 1
                run = recipe.with_suffix("")
                if code != 75:
                    problems.append(f"SIGTERM during {doing}: exit {code}: {life.said}")
                    continue
                if json.loads((run / "summary.json").read_text())["status"] != "stopped":
                    problems.append("the summary does not say stopped")
                found = checkpoint.newest(run / "checkpoints")
                if found is None or found.skipped or found.state["train"]["total_steps"] != total_steps(run):
                    problems.append(f"SIGTERM during {doing}: no good checkpoint of the place where it stopped")
            self.check("chains of SIGTERM", problems + self.finish(recipe), recipe)
        self.figures["slowest stop after SIGTERM, s"] = round(slowest_s, 2)

    # -------------------------------------------------------------------------------------------- disk

    def disk(self, each: int) -> None:
        for i in range(each):
            rng, recipe = self.random("disk", i), write_recipe(long_recipe(self.folder, f"full-{i}"))
            with small_disk(recipe.with_suffix(""), rng) as (fill, enlarge):
                life = Life(recipe, fill)
                code, problems = life.end(), []
                if code not in (0, 2) or (code == 2 and "make room" not in life.said):
                    problems.append(f"on a full disk: exit {code}: {life.said}")
                self.counts["disks that were full"] += code != 0
                enlarge()
                self.check("full disks", problems + self.finish(recipe), recipe)
        for i in range(each):
            rng, recipe = self.random("read-only", i), write_recipe(long_recipe(self.folder, f"read-only-{i}"))
            run = recipe.with_suffix("")
            if i:
                life = Life(recipe)
                life.wait(lambda life=life: life.doing > 0)
                time.sleep(rng.uniform(0, self.run_seconds / 2))
                life.signal(signal.SIGKILL)
                life.end()
            run.mkdir(exist_ok=True)
            before = tree_hash(run)
            with read_only(run):
                life = Life(recipe)
                code = life.end()
            problems = []
            if code != 2 or not any(
                advice in life.said for advice in ("make room", "free some", "fix the folder", "another")
            ):
                problems.append(f"in a read-only folder: exit {code}: {life.said}")
            if tree_hash(run) != before:
                problems.append("a read-only folder was changed")
            self.check("read-only folders", problems + self.finish(recipe), recipe)

    # -------------------------------------------------------------------------------------------- damage

    def damage(self, each: int) -> None:
        for i in range(each):
            rng, recipe = self.random("damage", i), write_recipe(long_recipe(self.folder, f"damaged-{i}"))
            run = recipe.with_suffix("")
            life, least = Life(recipe), rng.randint(3, 30)
            life.wait(lambda run=run, least=least: newest_step(run) >= 5 * least)
            life.signal(signal.SIGKILL)
            life.end()
            whole = [path for path in checkpoint.listed(run / "checkpoints") if is_whole(path)]
            damaged = whole[-rng.randint(1, len(whole) - 1) :]
            kinds = [damage_checkpoint(path, rng) for path in damaged]
            for kind in kinds:
                self.counts[f"checkpoints damaged: {kind}"] += 1
            life = Life(recipe)
            code, problems = life.end(), []
            if code != 0:
                problems.append(f"exit {code}: {life.said}")
            else:
                problems += differences(self.undisturbed, run)
            if f"resuming from {whole[-len(damaged) - 1].name}" not in life.said:
                problems.append(f"not resumed from {whole[-len(damaged) - 1].name}: {life.said}")
            problems += [f"{path.name} not named" for path in damaged if f"{path}: " not in life.said]
            self.check("damaged checkpoints", problems, recipe)

    # -------------------------------------------------------------------------------------------- nan

    def nan(self, each: int) -> None:
        for i in range(each):
            step = self.random("nan", i).randint(2, 10)
            recipe = write_recipe(short_recipe(self.folder, f"nan-{i}"))
            micro_batch = (step - 1) * 4 + self.random("nan micro", i).randint(0, 3)
            life = Life(recipe, lambda micro_batch=micro_batch: poison(micro_batch))
            code = life.end()
            problems = [f"exit {code}: {life.said}"] if code else nan_problems(recipe.with_suffix(""), step)
            self.check("losses that are not a number", problems, recipe)

    # -------------------------------------------------------------------------------------------- every call

    def prepare(self, each: int) -> None:
        """Killed at 4 × `each` of its calls, or at all: whatever opens then is whole, no document is on both sides, and
        the same command works."""
        for heldout in (Fraction(1, 20), None):
            folder = self.folder / f"prepare-{heldout is None}"
            folder.mkdir()
            forked(lambda folder=folder: split(folder, Fraction(3, 10)))
            calls = forked(lambda folder=folder, heldout=heldout: file_calls(folder, split, folder, heldout))
            for number in self.random("prepare", heldout is None).sample(range(calls), min(4 * each, calls)):
                shutil.rmtree(folder)
                folder.mkdir()
                forked(lambda folder=folder: split(folder, Fraction(3, 10)))
                pid = os.fork()
                if pid == 0:
                    die_at_call(folder, number)
                    split(folder, heldout)
                    os._exit(1)
                problems = [] if os.waitpid(pid, 0)[1] == signal.SIGKILL else [f"not killed at call {number}"]
                problems += forked(lambda folder=folder, heldout=heldout: split_problems(folder, heldout))
                self.check("prepare killed at a call", problems, folder / "kept")
            self.figures[f"calls of prepare, {'with' if heldout else 'without'} held-out text"] = calls

    def train(self, each: int) -> None:
        """Killed at 2 × `each` of its calls, every second time once more in the life after that."""
        reference = write_recipe(varied_recipe(self.folder, "varied"))
        calls = forked(lambda: file_calls(reference.with_suffix(""), train_in_silence, reference))
        self.figures["calls of train"] = calls
        for i in range(2 * each):
            rng, recipe = self.random("train", i), write_recipe(varied_recipe(self.folder, f"varied-{i}"))
            run, problems = recipe.with_suffix(""), []
            for _ in range(1 + i % 2):
                life = Life(recipe, partial(die_at_call, run, rng.randrange(calls)))
                if (code := life.end()) not in (0, -signal.SIGKILL):
                    problems.append(f"exit {code}: {life.said}")
                self.counts["kills at calls of train"] += code != 0
            self.check("train killed at a call", problems + self.finish(recipe, reference.with_suffix("")), recipe)

    def sweep(self, each: int) -> None:
        """Killed at `each` of its calls, while no run is under way."""
        folder = self.folder / "swept"
        tiny.write_corpora(folder)
        calls = forked(lambda: file_calls(folder, sweep_in_turn, folder))
        expected, self.figures["calls of sweep"] = (folder / "study" / "table.csv").read_text(), calls
        for i in range(each):
            rng, again = self.random("sweep", i), self.folder / f"swept-{i}"
            number = rng.randrange(calls)
            shutil.copytree(folder, again, ignore=lambda _, names: {"study"} & set(names))
            killed = in_child(lambda again=again, n=number: (die_at_call(again, n), sweep_in_turn(again)))
            problems = [] if killed in (0, -signal.SIGKILL) else [f"exit {killed}"]
            self.counts["kills at calls of sweep"] += killed != 0
            forked(lambda again=again: sweep_in_turn(again))
            if (again / "study" / "table.csv").read_text() != expected:
                problems.append("another table")
            left = [str(path) for path in again.rglob(".*") if path.name.endswith((".tmp", ".lock"))]
            self.check("sweep killed at a call", problems + left, again / "kept")

    def export(self, each: int) -> None:
        """Killed at 4 × `each` of its calls: what lies there is no model, the one before or the new one."""
        folder = self.folder / "exported"
        forked(lambda: [write_model(folder / name, seed) for seed, name in enumerate(("old", "new"))] and None)
        wanted = [load_file(folder / name / "model.safetensors") for name in ("old", "new")]
        shutil.copytree(folder / "old", folder / "counted")
        calls = forked(lambda: file_calls(folder / "counted", export_over, folder / "new", folder / "counted"))
        self.figures["calls of export"] = calls
        for i in range(4 * each):
            out = folder / f"out-{i}"
            shutil.copytree(folder / "old", out)
            number = self.random("export", i).randrange(calls)
            killed = in_child(lambda out=out, n=number: (die_at_call(out, n), export_over(folder / "new", out)))
            self.counts["kills at calls of export"] += killed == -signal.SIGKILL
            problems = [] if forked(lambda out=out: is_whole_model(out, wanted)) else ["a model of two"]
            forked(lambda out=out: export_over(folder / "new", out))
            if not forked(lambda out=out: is_whole_model(out, wanted[1:], required=True)):
                problems.append("not the new model after all")
            problems += [path.name for path in out.iterdir() if path.name.startswith(".")]
            self.check("export killed at a call", problems, out / "kept")

    # -------------------------------------------------------------------------------------------- two at once

    def twice(self, each: int) -> None:
        for i in range(each):
            rng, recipe = self.random("twice", i), write_recipe(long_recipe(self.folder, f"twice-{i}"))
            first = Life(recipe)
            first.wait(lambda first=first: first.doing > 0)
            time.sleep(rng.uniform(0, self.run_seconds / 2))
            second = Life(recipe, said_in=".second")
            problems, code = [], second.end()
            if code != 2 or f"in use by process {first.pid}" not in second.said:
                problems.append(f"the second: exit {code}: {second.said}")
            if i % 2:
                first.signal(signal.SIGKILL)
            first.end()
            self.check("two processes in one folder", problems + self.finish(recipe), recipe)

    def sweeps(self, each: int) -> None:
        """Two processes that sweep one study, each of whose runs is a process too; the first may be killed."""
        for i in range(each):
            folder = self.folder / f"sweeps-{i}"
            tiny.write_corpora(folder)
            study, table = folder / "study.yaml", folder / "study" / "table.csv"
            study.write_text(yaml.safe_dump(raw_study(folder, domain_tokens=400)))
            first = started_sweep(study)
            while len([*folder.glob("study/runs/*/summary.json")]) < 1 + i % 3 and first.poll() is None:
                time.sleep(0.05)
            second = started_sweep(study)
            said, code = second.communicate()[0], second.returncode
            problems = [] if code == 2 and f"in use by process {first.pid}" in said else [f"the second: {code}: {said}"]
            if i % 2:
                first.kill()
            first.communicate()
            code, ended = 2, time.monotonic()
            while code == 2 and time.monotonic() < ended + LIFE_SECONDS:  # until the runs of the killed one end
                last = started_sweep(study)
                said, code = last.communicate()[0], last.returncode
            problems += [f"the last: {code}: {said}"] if code else []
            shutil.copytree(
                folder, alone := self.folder / f"sweeps-{i}-alone", ignore=lambda _, names: {"study"} & {*names}
            )
            forked(lambda alone=alone: sweep_in_turn(alone))
            if table.read_text() != (alone / "study" / "table.csv").read_text():
                problems.append("another table")
            self.check("two sweeps of one study", problems, folder / "kept")

    # -------------------------------------------------------------------------------------------- distributed

    def worlds(self) -> None:
        """By turns in two processes and alone; each time it is stopped by SIGTERM to one rank only."""
        self.compare_losses("2 processes", self.reference(2), self.reference(1))
        for i, (name, legs) in enumerate(ITINERARIES.items()):
            made_by = thirds_recipe if legs[0][0] == 3 else plain_recipe
            alone, raw = self.reference(1, made_by), made_by(self.folder, f"itinerary-{i}")
            run, problems = Path(raw["run"]), []
            for leg, (processes, engine) in enumerate(legs):
                job = Job(write_recipe(raw), processes, engine)
                if leg + 1 < len(legs):
                    job.wait_for_step(run, 150 * (leg + 1) // len(legs))
                    problems += self.stop_one_rank(job, run, rank=leg % processes)
                elif (code := job.end()) != 0:
                    problems.append(f"exit {code}: {job.said}")
                engines = f"{processes} processes, ZeRO {engine.replace('=', ' ')}" if processes > 1 else "one process"
                problems += [] if engines in job.said else [f"not on {engines}: {job.said}"]
                self.say(f"{name}: {engines} to step {newest_step(run)}")
            self.check(name, problems or self.loss_problems(name, run, alone), Path(f"{run}.yaml"))

    def rank_killed(self) -> None:
        """The job must end by itself, in seconds, and name the rank."""
        job, recipe, run = self.job_at_step(40, "rank-killed")
        job.signal(1, signal.SIGKILL)
        killed = time.monotonic()
        code = job.end()
        self.figures["end of the job after a rank was killed, s"] = round(time.monotonic() - killed, 2)
        named = "rank : 1" in job.said and "SIGKILL" in job.said
        problems = [] if code and named else [f"exit {code}: {job.said}"]
        self.check("a rank killed, bit-equal after it", problems + self.finish_in_two(recipe, run), recipe)

    def rank_stopped(self) -> None:
        job, recipe, run = self.job_at_step(100, "rank-stopped")
        problems = self.stop_one_rank(job, run, rank=1)
        self.check("SIGTERM to one rank, bit-equal after it", problems + self.finish_in_two(recipe, run), recipe)

    def rank_nan(self) -> None:
        """Its second micro-batch of the fifth step; weights and moments of that step stay as they were everywhere."""
        for stage, processes in product((0, 1, 2, 3), (2, 3)):
            raw = short_recipe(self.folder, f"rank-nan-{stage}-{processes}")
            micro = 4 // processes
            raw["phases"][0] |= {
                "batch": {"sequences": 2 * processes * micro, "micro": micro},
                "tokens": 12 * 2 * processes * micro * tiny.CONTEXT,
            }
            recipe = write_recipe(raw)
            job = Job(recipe, processes, f"stage={stage}", poisoned="1:9")
            code = job.end()
            problems = [f"exit {code}: {job.said}"] if code else nan_problems(recipe.with_suffix(""), 5)
            self.check(f"NaN at one rank of {processes}, stage {stage}", problems, recipe)

    def job_at_step(self, step: int, name: str) -> tuple[Job, Path, Path]:
        self.reference(2)
        recipe = write_recipe(plain_recipe(self.folder, name))
        job, run = Job(recipe, 2, "stage=1"), recipe.with_suffix("")
        job.wait_for_step(run, step)
        return job, recipe, run

    def finish_in_two(self, recipe: Path, run: Path) -> list[str]:
        said = together(recipe, 2)
        return [said] if said else differences(self.reference(2), run)

    def reference(self, processes: int, made_by: Callable[[Path, str], dict[str, Any]] | None = None) -> Path:
        """The run that nothing disturbed, in so many processes."""
        made_by = made_by or plain_recipe
        recipe = self.folder / f"{made_by.__name__}-{processes}.yaml"
        if not recipe.exists():
            write_recipe(made_by(self.folder, recipe.stem))
            said = together(recipe, processes)
            assert not said, said
        return recipe.with_suffix("")

    def stop_one_rank(self, job: Job, run: Path, rank: int) -> list[str]:
        sent = time.monotonic()
        job.signal(rank, signal.SIGTERM)
        code, took_s = job.end(STOP_SECONDS), time.monotonic() - sent
        self.counts["SIGTERM to one rank only"] += 1
        key = "slowest stop after SIGTERM to one rank, s"
        self.figures[key] = max(self.figures.get(key, 0.0), round(took_s, 2))
        summary = json.loads((run / "summary.json").read_text()) if (run / "summary.json").exists() else {}
        if code == 0 or "75" not in job.said + str(code) or summary.get("status") != "stopped":
            return [f"SIGTERM to rank {rank}: exit {code}, {summary.get('status')}: {job.said}"]
        return []

    def loss_problems(self, name: str, run: Path, reference: Path) -> list[str]:
        off = self.compare_losses(name, run, reference)
        problems = [f"losses are off by {off:.1e}"] if off > LOSS_TOLERANCE else []
        if forked(lambda: as_json(audit_run(run))) != forked(lambda: as_json(audit_run(reference))):
            problems.append("audits differ")
        return problems + [f"left behind: {path}" for path in leftovers(run)]

    def compare_losses(self, name: str, run: Path, reference: Path) -> float:
        """The largest relative difference of any loss; infinite where not the same steps were logged."""
        mine, theirs = records(run), records(reference)
        if [(r["kind"], r["phase"], r["step"]) for r in mine] != [(r["kind"], r["phase"], r["step"]) for r in theirs]:
            return float("inf")
        off = max(abs(a / b - 1) for one, other in zip(mine, theirs, strict=True) for a, b in losses(one, other))
        self.figures[f"largest relative difference of a loss, {name}"] = float(f"{off:.1e}")
        return off


def losses(one: dict[str, Any], other: dict[str, Any]) -> Iterator[tuple[float, float]]:
    if one["kind"] == "train":
        yield one["loss"], other["loss"]
        return
    for split in ("heldout", "select", "train"):
        yield from ((one[split][source], other[split][source]) for source in one[split])


# ------------------------------------------------------------------------------------------------ what breaks


def new_temporaries(checkpoints: Path, old: set[str]) -> set[str]:
    return {name for name in listdir(checkpoints) if name.startswith(".step-")} - old


def listdir(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


def newest_step(run: Path) -> int:
    return max(
        (int(name.split("-")[1]) for name in listdir(run / "checkpoints") if name.startswith("step-")), default=0
    )


def is_whole(path: Path) -> bool:
    try:
        checkpoint.read(path)
    except CheckpointError:
        return False
    return True


def tree_hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        digest.update(str(path).encode() + (path.read_bytes() if path.is_file() else b""))
    return digest.hexdigest()


def damage_checkpoint(path: Path, rng: random.Random) -> str:
    """Damage one file of a checkpoint; says how."""
    file = rng.choice(sorted(path.iterdir()))
    content, kind = bytearray(file.read_bytes()), rng.choice(["torn", "flipped", "missing", "emptied", "longer"])
    if kind == "missing":
        file.unlink()
        return kind
    if kind == "flipped":
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    cut = {"torn": rng.randrange(len(content)), "emptied": 0}.get(kind, len(content))
    file.write_bytes(bytes(content[:cut]) + (b"\0" if kind == "longer" else b""))
    return kind


@contextmanager
def small_disk(run: Path, rng: random.Random) -> Iterator[tuple[Callable[[], object], Callable[[], object]]]:
    """What the child does first to have a disk that will be full, and what enlarges it again.

    A file system of its own in memory where this user may mount one, else a limit on the size of any file.
    """
    if os.geteuid() != 0:
        bytes_ = rng.randint(2_000, 400_000)
        yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_, bytes_)), lambda: None
        return
    run.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o"]
    subprocess.run([*mount, f"size={rng.randint(4, 4000)}k", "tmpfs", str(run)], check=True)
    try:
        yield lambda: None, lambda: subprocess.run([*mount, "remount,size=64m", "tmpfs", str(run)], check=True)
    finally:
        subprocess.run(["umount", str(run)], check=True)


@contextmanager
def read_only(run: Path) -> Iterator[None]:
    """The folder mounted without the right to write; without anyone's, where this user may not mount."""
    if os.geteuid() != 0:
        modes = {path: path.stat().st_mode for path in (run, *run.rglob("*"))}
        for path, mode in modes.items():
            path.chmod(mode & ~0o222)
        yield
        for path, mode in modes.items():
            path.chmod(mode)
        return
    subprocess.run(["mount", "--bind", str(run), str(run)], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(run)], check=True)
        yield
    finally:
        subprocess.run(["umount", str(run)], check=True)


FILE_EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate")
"""Of Python's audit, raised right before the call."""


def on_file_calls(folder: Path, act: Callable[[], None]) -> None:
    """`act` right before every call of this process that concerns a file inside `folder`, or writes one to the disk."""

    def audited(event: str, arguments: tuple[Any, ...]) -> None:
        if event in FILE_EVENTS and any(str(folder) in os.fsdecode(a) for a in arguments if isinstance(a, str | bytes)):
            act()

    sync = os.fsync

    def fsync(descriptor: int) -> None:
        act()
        sync(descriptor)

    os.fsync = fsync
    sys.addaudithook(audited)


def file_calls(folder: Path, act: Callable[..., object], *arguments: Any) -> int:
    """How many such calls `act` makes."""
    calls: list[None] = []
    on_file_calls(folder, lambda: calls.append(None))
    act(*arguments)
    return len(calls)


def die_at_call(folder: Path, number: int) -> None:
    """Be killed right before the call of that number, counted from 0."""
    calls, process = iter(range(number + 1)), os.getpid()

    def count() -> None:
        if os.getpid() == process and next(calls) == number:
            os.kill(process, signal.SIGKILL)

    on_file_calls(folder, count)


def in_child(act: Callable[[], object]) -> int:
    """The exit code of a child that does this, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        try:
            act()
            os._exit(0)
        finally:
            traceback.print_exc()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def train_in_silence(recipe: Path) -> None:
    run(load_recipe(recipe), resume=True, progress=False)


class InTurn:
    """Workers that train a recipe to its end in a child of this process before they go on."""

    free = 1

    def start(self, recipe: Path, log: Path) -> Any:
        code = in_child(lambda: train_in_silence(recipe))
        return SimpleNamespace(poll=lambda: code, terminate=lambda: None, wait=lambda: None)


def sweep_in_turn(folder: Path) -> None:
    study = study_from(raw_study(folder, domain_tokens=400))
    jobs.POLL_EVERY_S = 0.0
    table, _ = sweep(study, Console(quiet=True), workers=InTurn())
    assert set(table["status"]) == {"done"}


def started_sweep(study: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "spt_fast", "sweep", str(study), "--jobs", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=Path(__file__).parents[1],
    )


def write_model(folder: Path, seed: int) -> None:
    GPT(GPTConfig(layers=1, width=16, heads=2, kv_heads=1, ffn=32, context=8, vocab_size=64), seed=seed).save_hf(folder)


def export_over(model: Path, out: Path) -> None:
    export(model, out, overwrite=True)


def is_whole_model(folder: Path, wanted: list[dict[str, Any]], *, required: bool = False) -> bool:
    """Whether what loads there is one of these; where nothing does, whether that may be."""
    try:
        found = {name: tensor.numpy() for name, tensor in hf.load(folder)[1].items()}["embedding"]
    except CheckpointError:
        return not required
    return any((found == weights["model.embed_tokens.weight"]).all() for weights in wanted)


def split(folder: Path, heldout: Fraction | None) -> None:
    """`prepare` a text of 200 different documents, with so much of it held out."""
    text = folder / "text.jsonl"
    if not text.exists():
        text.write_text("".join(json.dumps({"text": f"document {i} of many"}) + "\n" for i in range(200)))
    tokenizer = Tokenizer({bytes([i]): i for i in range(256)}, PATTERN, {EOS: 256})
    prepare([text], folder / "d", tokenizer, heldout=heldout, workers=1, progress=False)


def split_problems(folder: Path, heldout: Fraction | None) -> list[str]:
    """What is wrong after a kill, and after the same command was given again."""
    found = both_sides(folder)
    warnings.simplefilter("ignore", SptWarning)
    split(folder, heldout)
    names = {"text.jsonl", *(f"{part}.{end}" for part in ("d", "d.heldout") for end in ("bin", "idx", "json"))}
    expected = names if heldout else {name for name in names if "heldout" not in name}
    left = set(os.listdir(folder))
    return found + both_sides(folder) + ([f"files: {sorted(left ^ expected)}"] if left != expected else [])


def both_sides(folder: Path) -> list[str]:
    """Whether a part that opens is damaged, or a document lies in both."""
    documents: list[set[bytes]] = []
    for prefix in (folder / "d", folder / "d.heldout"):
        try:
            data = TokenDataset.open(prefix)
            data.verify()
        except DataError as error:
            if "damaged" in str(error) and files_of(prefix)[2].exists():
                return [str(error)]
            continue
        assert data.document_ends is not None
        documents.append({bytes(d.astype("u1")) for d in np.split(data.tokens, data.document_ends[:-1])})
    return ["a document is on both sides"] if len(documents) == 2 and documents[0] & documents[1] else []


def poison(micro_batch: int) -> None:
    """Make the loss of that training forward pass of this process not a number."""
    real, calls = GPT.forward, iter(range(10**9))

    def forward(self: GPT, *args: Any, **kwargs: Any) -> Any:
        loss = real(self, *args, **kwargs)
        return loss * float("nan") if torch.is_grad_enabled() and next(calls) == micro_batch else loss

    GPT.forward = forward  # type: ignore[method-assign]


def short_recipe(folder: Path, name: str) -> dict[str, Any]:
    """Twelve steps of four micro-batches, every one of them kept."""
    raw = plain_recipe(folder, name)
    raw["phases"] = [raw["phases"][0] | {"tokens": 12 * 8 * tiny.CONTEXT}]
    return raw | {"checkpoint": {"every": "1 steps", "keep": 20}}


def plain_recipe(folder: Path, name: str) -> dict[str, Any]:
    """The long run in fp32 without a grid and early stops, which rounding could decide otherwise."""
    raw = long_recipe(folder, name)
    raw["phases"][1] |= {"grid": None, "stop": None}
    return raw | {"precision": "fp32"}


def thirds_recipe(folder: Path, name: str) -> dict[str, Any]:
    """The plain one in batches for three processes, whose turns at the evaluations don't come out even."""
    raw = plain_recipe(folder, name)
    for phase in raw["phases"]:
        phase["batch"] = {"sequences": 6, "micro": 1}
    return raw


def varied_recipe(folder: Path, name: str) -> dict[str, Any]:
    """Three short phases: one that only goes on to the next, a grid without early stop, and one that stops early; with
    the best checkpoints kept."""
    raw = tiny.raw_recipe(folder, name)
    first, second = raw["phases"]
    first |= {"tokens": 4 * 8 * tiny.CONTEXT, "eval": {"every": "2 steps", "tokens": 200}}
    second |= {"tokens": 3 * 4 * tiny.CONTEXT, "eval": {"every": "1 steps", "tokens": 200}}
    last = second | {"name": "last", "grid": None, "untie": False, "optimizer_state": "keep", "tokens": "300"}
    raw["phases"] = [first, second | {"stop": None, "optimizer_state": "keep"}, last]
    return raw | {"checkpoint": {"every": "2 steps", "keep": 2, "keep_best": True}}


def nan_problems(run: Path, step: int) -> list[str]:
    """What is wrong with a run of `short_recipe` whose step `step` had a loss that was not a number."""
    problems = []
    summary = json.loads((run / "summary.json").read_text())
    if summary["status"] != "done" or summary["skipped_steps"] != 1:
        problems.append(f"{summary['status']}, {summary['skipped_steps']} steps skipped instead of 1")
    missing = [r["step"] for r in records(run) if r["kind"] == "train" and r["loss"] is None]
    if missing != [step]:
        problems.append(f"losses that are not a number at {missing} instead of {step}")
    before, after, following = (tensors_of(run, step + i) for i in (-1, 0, 1))
    if before != after:
        problems.append("the skipped step changed weights or moments")
    if before == following:
        problems.append("nothing was learned after the skipped step")
    return problems


def tensors_of(run: Path, step: int) -> dict[str, bytes]:
    """By name, the bytes of every tensor of the weights, the moments and their count."""
    parts = (run / "checkpoints" / f"step-{step:010d}-p00-a000").glob("current-*.safetensors")
    return {name: array.tobytes() for part in parts for name, array in load_file(part).items()}


# ------------------------------------------------------------------------------------------------ several processes


def together(recipe: Path, processes: int) -> str:
    """The run to its end in processes that nothing disturbs, forked with the variables that torchrun would set; what
    they said where one failed."""
    if processes > 1:
        for module in DEEPSPEED:
            importlib.import_module(module)
    job = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1"}
    job["MASTER_PORT"] = free_port()
    lives = []
    for rank in range(processes):
        variables = {name: str(value) for name, value in (job | {"RANK": rank, "LOCAL_RANK": rank}).items()}
        settings = ["--set", f"engine.name={'deepspeed' if processes > 1 else 'local'}", "--set", "engine.stage=1"]
        lives.append(Life(recipe, partial(os.environ.update, variables), *settings, said_in=f".said-{rank}"))
    codes = [life.end() for life in lives]
    return f"exit {codes}: {' '.join(life.said for life in lives)}" if any(codes) else ""


class Job:
    """A run of one process, or of several started by torchrun; `poisoned` is RANK:MICRO_BATCH."""

    def __init__(self, recipe: Path, processes: int, engine: str, poisoned: str = "") -> None:
        settings = ["--set", f"engine.{engine}", "--set", f"engine.name={'deepspeed' if processes > 1 else 'local'}"]
        train = ["-m", "tests.faults", "rank", poisoned, "train", str(recipe), "--resume", *settings]
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        self._said_in = recipe.with_suffix(".said")
        with self._said_in.open("wb") as said:
            self._process = subprocess.Popen(
                [sys.executable, *(launcher if processes > 1 else []), *train],
                stdout=said,
                stderr=said,
                cwd=Path(__file__).parents[1],
                start_new_session=True,
            )
        self._alone = processes == 1

    @property
    def said(self) -> str:
        return " ".join(self._said_in.read_text(errors="replace").split())

    def wait_for_step(self, run: Path, step: int) -> None:
        deadline = time.monotonic() + LIFE_SECONDS
        while newest_step(run) < step and self._process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)

    def signal(self, rank: int, number: int) -> None:
        os.kill(self._process.pid if self._alone else self._rank_pid(rank), number)

    def _rank_pid(self, rank: int) -> int:
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        environments = {int(pid): Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in children}
        return next(pid for pid, environment in environments.items() if f"RANK={rank}".encode() in environment)

    def end(self, seconds: float = LIFE_SECONDS) -> int:
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            return self._process.wait()


def be_a_rank(arguments: list[str]) -> None:
    """One process of a job: the command line, after its loss was poisoned where this rank is the one."""
    poisoned, *command = arguments
    rank, _, micro_batch = poisoned.partition(":")
    if rank and rank == os.environ.get("RANK", "0"):
        poison(int(micro_batch))
    sys.argv = ["spt-fast", *command]
    cli.main()


# ------------------------------------------------------------------------------------------------ the command

TIMES = ("signals", "disk", "damage", "nan", "prepare", "train", "sweep", "export", "twice", "sweeps")
"""Parts that are done so many times."""
PARTS = ("kills", *TIMES, "worlds", "rank_killed", "rank_stopped", "rank_nan")


def survive(folder: Path, parts: list[str], *, chains: int, kills: int, each: int, seed: int) -> dict[str, Any]:
    """Run the campaign in `folder`; what was counted and measured, and what failed."""
    began = time.monotonic()
    campaign = Campaign(folder, seed, lambda line: print(f"[{time.monotonic() - began:6.1f} s] {line}", flush=True))
    for part in parts:
        arguments = {"kills": (chains, kills)} | dict.fromkeys(TIMES, (each,))
        getattr(campaign, part)(*arguments.get(part, ()))
        campaign.say(f"{part}: done; {len(campaign.failures)} failures so far")
    return {
        "seed": seed,
        "steps": total_steps(campaign.undisturbed),
        "counts": dict(sorted(campaign.counts.items())),
        "figures": campaign.figures,
        "failures": campaign.failures,
        "seconds": round(time.monotonic() - began),
    }


def main(machine: dict[str, Any] | None = None) -> None:
    """machine: what stands beside the results in JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS) + "; all of them without any")
    parser.add_argument("--chains", type=int, default=2)
    parser.add_argument("--kills", type=int, default=5, help="in each chain")
    parser.add_argument("--each", type=int, default=3, help="SIGTERMs, full disks, damaged runs, …")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the results here")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.parts) - set(PARTS))
    if unknown:
        parser.error(f"no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    results = survive(
        folder,
        [part for part in PARTS if part in (arguments.parts or PARTS)],
        chains=arguments.chains,
        kills=arguments.kills,
        each=arguments.each,
        seed=arguments.seed,
    )
    for name, value in (results["counts"] | results["figures"]).items():
        print(f"{name:<60}{value:>10}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")
    print(f"seed {results['seed']}: {len(results['failures'])} failures in {results['seconds']} s", end="")
    print(f"; their folders stay in {folder}" if results["failures"] else "")
    if not results["failures"]:
        shutil.rmtree(folder)
    sys.exit(bool(results["failures"]))


if __name__ == "__main__":
    be_a_rank(sys.argv[2:]) if sys.argv[1:2] == ["rank"] else main()
