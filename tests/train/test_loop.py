"""The trainer end to end on tiny data: what it writes and passes on, and that an interruption changes nothing."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from spt_fast.config import recipe_from
from spt_fast.data.heldout import heldout_stretches
from spt_fast.data.shards import TokenDataset
from spt_fast.errors import CheckpointError, DataError, RecipeError
from spt_fast.evaluation.score import scored
from spt_fast.kernels import auto_backends
from spt_fast.model import gpt, hf
from spt_fast.model.gpt import GPT
from spt_fast.printing import terminal
from spt_fast.train import checkpoint, plan, precision, tuning
from spt_fast.train.audit import audit_document, audit_run
from spt_fast.train.evaluate import evaluation_texts, measure
from spt_fast.train.local import LocalEngine
from spt_fast.train.metrics import Clock, RunLog
from spt_fast.train.plan import make_plan
from spt_fast.train.precision import Precision
from spt_fast.train.run import print_summary, run
from spt_fast.train.signals import StopRequest
from spt_fast.train.weights import load_model
from tests import tiny
from tests.train.test_watch import until


@pytest.fixture(scope="module")
def undisturbed(data: Path) -> Path:
    summary = run(tiny.recipe(data, "undisturbed"), progress=False)
    assert summary["status"] == "done"
    return data / "undisturbed"


def weights(run_folder: Path, phase: str) -> dict[str, torch.Tensor]:
    return load_file(run_folder / "weights" / phase / "model.safetensors")


def without_clock(summary: dict[str, Any]) -> dict[str, Any]:
    phases = json.loads(json.dumps(summary["phases"]))
    for phase in phases.values():
        phase.pop("tokens_per_s")
        for arm in phase["grid"]:
            arm.pop("tokens_per_s")
    return phases


def assert_same_run(one: Path, other: Path) -> None:
    assert tiny.metrics(one) == tiny.metrics(other)
    for phase in ("pretrain", "finetune"):
        ours, theirs = weights(one, phase), weights(other, phase)
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert torch.equal(ours[name], theirs[name]), f"{phase} {name}"
    summaries = [without_clock(json.loads((folder / "summary.json").read_text())) for folder in (one, other)]
    assert summaries[0] == summaries[1]


class StopAfter(StopRequest):
    """A stop request that arrives after a number of checks."""

    looks = 0

    def __call__(self) -> bool:
        self.looks -= 1
        if self.looks < 0:
            self.received.append("SIGTERM")
        return super().__call__()


# ------------------------------------------------------------------------------------------------ what a run is


def test_training_lowers_the_loss_and_writes_the_contract(undisturbed: Path) -> None:
    summary = json.loads((undisturbed / "summary.json").read_text())
    pretrain, finetune = summary["phases"]["pretrain"], summary["phases"]["finetune"]
    records = tiny.metrics(undisturbed)
    first = next(r for r in records if r["kind"] == "eval")
    assert first["step"] == 0
    assert set(first["heldout"]) == set(first["select"]) == set(first["train"]) == {"general", "chem"}
    assert first["heldout"]["general"] == pytest.approx(np.log(64), rel=0.05)
    assert pretrain["heldout"]["general"] < first["heldout"]["general"] - 0.2
    assert pretrain["steps"] == 30
    assert pretrain["tokens"] == 30 * 8 * 16
    assert pretrain["epochs"]["chem"] == pytest.approx(60 * 16 / audit_tokens(undisturbed), rel=1e-12)
    steps = [r["step"] for r in records if r["kind"] == "train" and r["phase"] == "pretrain"]
    assert steps == list(range(1, 31))
    assert [r["step"] for r in records if r["kind"] == "eval" and r["phase"] == "pretrain"] == [0, 10, 20, 30]
    arms = {r["arm"] for r in records if r["phase"] == "finetune"}
    assert arms == {0, 1}
    assert finetune["arm"] == min((0, 1), key=lambda i: finetune["grid"][i]["select"]["chem"])
    assert finetune["heldout"] == finetune["grid"][finetune["arm"]]["heldout"]
    for split in ("heldout", "select", "train"):
        assert all(0 < first["standard_errors"][split][source] < 1 for source in ("general", "chem"))
        assert 0 < finetune["standard_errors"][split]["chem"] < 1
        assert finetune["scored"][split]["chem"]["documents"] > 1
    assert finetune["scored"]["heldout"]["chem"]["tokens"] == 199  # eval.tokens of 400, the first one scored by nothing
    assert summary["heldout_halves"] == "documents", "none is long here"
    assert len(list((undisturbed / "checkpoints").glob("step-*"))) == 2
    assert (undisturbed / "tensorboard").is_dir()


def audit_tokens(run_folder: Path) -> int:
    """Tokens of the limited chem corpus: 60 of 240 pretraining windows are chem's."""
    facts = audit_run(run_folder)["chem"]
    return round(facts.tokens / facts.epochs)


def test_summary_losses_are_those_of_the_weights_passed_on(undisturbed: Path, data: Path) -> None:
    """Score the written weights on the report half by an independent path."""
    from spt_fast.data.heldout import tokens_in
    from spt_fast.data.shards import TokenDataset

    summary = json.loads((undisturbed / "summary.json").read_text())
    for phase in ("pretrain", "finetune"):
        model = GPT.from_hf(undisturbed / "weights" / phase)
        for source in ("general", "chem"):
            heldout = TokenDataset.open(data / f"{source}.heldout")
            ids = torch.from_numpy(tokens_in(heldout, heldout_stretches(heldout, "report", 200)).astype(np.int64))
            losses = []
            for start in range(0, len(ids) - 1, tiny.CONTEXT):
                window = ids[start : start + tiny.CONTEXT + 1]
                logits = model(window[None, :-1])[0]
                losses.append(torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum"))
            expected = summary["phases"][phase]["heldout"][source]
            assert (sum(losses) / (len(ids) - 1)).item() == pytest.approx(
                expected, rel=5e-3
            )  # training computes in bf16 where that is fast


def test_early_stopping_passes_on_the_best_weights_and_counts_what_was_read(undisturbed: Path) -> None:
    finetune = json.loads((undisturbed / "summary.json").read_text())["phases"]["finetune"]
    hot = finetune["grid"][1]
    evaluations = [
        r for r in tiny.metrics(undisturbed) if r["kind"] == "eval" and r["phase"] == "finetune" and r["arm"] == 1
    ]
    selects = [r["select"]["chem"] for r in evaluations]
    best = int(np.argmin(selects))
    assert hot["handed_on"] == evaluations[best]["step"]
    assert hot["select"]["chem"] == selects[best]
    assert hot["steps"] == evaluations[-1]["step"]
    if hot["steps"] < 16:
        assert len(selects) - 1 - best == 2
    start, end = finetune["windows"]["chem"]
    assert start == 60
    assert end - start == finetune["steps"] * 4


def test_tokens_per_second_are_those_of_steps_alone(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paused, now, called = Clock.paused, [False], []

    @contextmanager
    def watched(clock: Clock) -> Iterator[None]:
        with paused(clock):
            now[0] = True
            yield
            now[0] = False

    monkeypatch.setattr(Clock, "paused", watched)
    for name in ("begin", "step", "loss", "snapshot"):
        own = getattr(LocalEngine, name)

        def noted(self: LocalEngine, *given: Any, _own: Any = own, _name: str = name, **named: Any) -> Any:
            called.append((_name, now[0]))
            return _own(self, *given, **named)

        monkeypatch.setattr(LocalEngine, name, noted)
    raw = tiny.raw_recipe(data, "paused")
    phases = [raw["phases"][0] | {"tokens": 3 * 8 * tiny.CONTEXT}, raw["phases"][1] | {"tokens": 3 * 4 * tiny.CONTEXT}]
    run(recipe_from(raw | {"checkpoint": {"every": "2 steps"}, "phases": phases}), progress=False)
    # the last snapshot of a phase comes after its last step, and after its result if that is not averaged
    assert {*called} - {("snapshot", False)} == {("begin", True), ("step", False), ("loss", True), ("snapshot", True)}


def test_an_anchor_keeps_the_weights_nearer_to_their_start(data: Path) -> None:
    distances = {}
    for anchor in (0.0, 300.0):
        raw = tiny.raw_recipe(data, f"anchor-{anchor}")
        raw["phases"][1] |= {"anchor": anchor, "untie": False, "grid": None, "stop": None}
        folder = Path(run(recipe_from(raw), progress=False) and raw["run"])
        before, after = weights(folder, "pretrain"), weights(folder, "finetune")
        distances[anchor] = sum((before[name] - after[name]).square().sum().item() for name in before)
    assert 0 < distances[300.0] < 0.5 * distances[0.0]


def test_scpt_continues_optimizer_and_schedule_as_one_run(data: Path) -> None:
    """Two phases of one mixture with kept state and continued schedule equal one long phase, bit for bit."""
    raw = tiny.raw_recipe(data, "whole")
    whole = raw["phases"][0] | {"mixture": {"general": 1}, "eval": {"every": "1000 steps", "tokens": 200}}
    raw["phases"] = [whole]
    run(recipe_from(raw), progress=False)
    halves = tiny.raw_recipe(data, "halves")
    first = whole | {"tokens": 15 * 8 * 16, "schedule": {"name": "cosine", "warmup": "3 steps", "horizon": 30 * 8 * 16}}
    second = first | {"name": "second", "schedule": {"continue": True}, "optimizer_state": "keep"}
    halves["phases"] = [first, second]
    run(recipe_from(halves), progress=False)
    ours, theirs = weights(data / "whole", "pretrain"), weights(data / "halves", "second")
    # the order inside a global batch is keyed by phase and step, so sums differ in their last bits only
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=2e-3)
    rates = [[r["lr"] for r in tiny.metrics(data / name) if r["kind"] == "train"] for name in ("whole", "halves")]
    assert rates[0] == rates[1]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_micro_batches_only_change_rounding(data: Path, precision: str) -> None:
    losses = []
    for micro in (8, 2):
        raw = tiny.raw_recipe(data, f"micro-{precision}-{micro}")
        raw["precision"] = precision
        raw["phases"] = [raw["phases"][0] | {"batch": {"sequences": 8, "micro": micro}, "tokens": 5 * 8 * 16}]
        run(recipe_from(raw), progress=False)
        losses.append([r["loss"] for r in tiny.metrics(Path(raw["run"])) if r["kind"] == "train"])
    np.testing.assert_allclose(losses[0], losses[1], rtol={"fp32": 1e-5, "bf16": 1e-2}[precision])


def test_documents_mode_trains(data: Path) -> None:
    raw = tiny.raw_recipe(data, "documents")
    raw["phases"] = [raw["phases"][0] | {"documents": True}]
    summary = run(recipe_from(raw), progress=False)
    reached = summary["phases"]["pretrain"]["heldout"]["general"]
    assert reached < 4.0

    ends = [i + 1 for i, token in enumerate(np.fromfile(data / "general.heldout.bin", np.uint16)) if token == tiny.EOS]
    half = heldout_stretches(TokenDataset.open(data / "general.heldout"), "report", 200)
    ids = np.fromfile(data / "general.heldout.bin", np.uint16).astype(np.int64)
    model = GPT.from_hf(data / "documents" / "weights" / "pretrain")
    text, begin = np.concatenate([ids[a:b] for a, b in half]), {0}
    for start, end in half:
        assert end in ends or end == half[-1, 1]
        begin.add(sum(b - a for a, b in half if b <= start))
    nats = 0.0
    for i in range(1, len(text)):
        window = (i - 1) // tiny.CONTEXT * tiny.CONTEXT
        first = max([window, *(b for b in begin if b < i)])
        logits = model(torch.from_numpy(text[None, first:i]))[0, -1]
        nats += torch.nn.functional.cross_entropy(logits, torch.tensor(text[i])).item()
    assert nats / (len(text) - 1) == pytest.approx(reached, rel=5e-3)  # token by token, each sees only its document


def test_a_step_that_is_not_finite_is_skipped(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = GPT.forward
    calls = iter(range(10**9))

    def poisoned(self: GPT, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = real(self, *args, **kwargs)
        return loss * float("nan") if self.training and torch.is_grad_enabled() and next(calls) == 3 else loss

    monkeypatch.setattr(GPT, "forward", poisoned)
    raw = tiny.raw_recipe(data, "nan")
    raw["phases"] = raw["phases"][:1]
    summary = run(recipe_from(raw), progress=False)
    assert summary["skipped_steps"] == 1
    losses = {r["step"]: r["loss"] for r in tiny.metrics(data / "nan") if r["kind"] == "train"}
    assert losses[2] is None
    assert np.isfinite(losses[30])
    assert all(torch.isfinite(w).all() for w in weights(data / "nan", "pretrain").values())


def test_a_run_that_stays_not_finite_fails_and_says_so(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = GPT.forward
    monkeypatch.setattr(
        GPT, "forward", lambda self, *a, **k: real(self, *a, **k) * (float("nan") if torch.is_grad_enabled() else 1)
    )
    raw = tiny.raw_recipe(data, "always-nan")
    with pytest.raises(RuntimeError, match=r"not finite for 20 steps in a row.*lower optimizer\.lr"):
        run(recipe_from(raw), progress=False)
    assert json.loads((data / "always-nan" / "summary.json").read_text())["status"] == "failed"


# ------------------------------------------------------------------------------------------------ resuming


@pytest.mark.parametrize("looks", [31, 43, 64])
def test_a_run_interrupted_repeatedly_equals_an_uninterrupted_one(
    data: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch, looks: int
) -> None:
    """Weights and metrics bit for bit, across epochs, phases, evaluations, early stops and grid arms."""
    monkeypatch.setattr("spt_fast.train.run.StopRequest", StopAfter)
    name, interruptions = f"interrupted-{looks}", 0
    StopAfter.looks = looks
    while run(tiny.recipe(data, name), resume=True, progress=False)["status"] == "stopped":
        interruptions += 1
        StopAfter.looks = looks
        assert interruptions < 100
    assert interruptions >= 2
    assert_same_run(undisturbed, data / name)


KILLED = """
import os, signal, sys
from spt_fast.config import load_recipe
from spt_fast.train.checkpoint import Writer
from spt_fast.train.run import run

complete = Writer._complete

def complete_and_die(writer, name, *rest):
    complete(writer, name, *rest)
    if name == sys.argv[2]:
        os.kill(os.getpid(), signal.SIGKILL)

Writer._complete = complete_and_die
run(load_recipe(sys.argv[1]), resume=True)
"""
"""Trains a recipe in a process that is killed as soon as a checkpoint is written, at any later step."""


def test_a_killed_process_resumes_to_the_same_run(data: Path, undisturbed: Path) -> None:
    """SIGKILL at two moments, the newest checkpoint damaged once; a file of metrics that ran ahead is cut back."""
    recipe_path = tiny.write_recipe(data, tiny.raw_recipe(data, "killed"))
    checkpoints = data / "killed" / "checkpoints"
    command = [sys.executable, "-m", "spt_fast.train", str(recipe_path), "--resume"]
    for last in ("step-0000000014-p00-a000", "step-0000000030-p01-a000"):
        killed = subprocess.run([sys.executable, "-c", KILLED, str(recipe_path), last], capture_output=True, text=True)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
    newest = sorted(checkpoints.glob("step-*"))[-1]
    damaged = newest / "current-00000.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-5] ^= 1
    damaged.write_bytes(content)
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert newest.name in finished.stderr
    assert "does not match its hash" in finished.stderr
    assert_same_run(undisturbed, data / "killed")


def test_sigterm_saves_and_exits_with_75(data: Path) -> None:
    raw = tiny.raw_recipe(data, "terminated")
    raw["phases"][0]["tokens"] = "100M"
    recipe_path = tiny.write_recipe(data, raw)
    process = subprocess.Popen(
        [sys.executable, "-m", "spt_fast", "train", str(recipe_path)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not list((data / "terminated" / "checkpoints").glob("step-*")):
        time.sleep(0.01)
        assert process.poll() is None
    os.kill(process.pid, signal.SIGTERM)
    _, said = process.communicate(timeout=600)
    assert process.returncode == 75, said
    assert "--resume" in said
    summary = json.loads((data / "terminated" / "summary.json").read_text())
    assert (summary["status"], summary["reason"]) == ("stopped", "SIGTERM")


def test_resuming_does_nothing_to_a_finished_run_and_starts_a_missing_one(data: Path, undisturbed: Path) -> None:
    before = (undisturbed / "metrics.jsonl").read_bytes()
    assert run(tiny.recipe(data, "undisturbed"), resume=True, progress=False)["status"] == "done"
    assert (undisturbed / "metrics.jsonl").read_bytes() == before


def test_an_existing_run_folder_and_a_changed_recipe_are_refused(data: Path, undisturbed: Path) -> None:
    with pytest.raises(RecipeError, match=r"run: folder .*undisturbed exists; add `resume=True`"):
        run(tiny.recipe(data, "undisturbed"), progress=False)
    changed = tiny.raw_recipe(data, "undisturbed")
    changed["phases"][0]["optimizer"]["lr"] = 1e-3
    with pytest.raises(RecipeError, match=r"phases\.0\.optimizer\.lr: 0\.003 → 0\.001"):
        run(recipe_from(changed), resume=True, progress=False)
    (data / "other").mkdir()
    (data / "other" / "thesis.tex").write_text("precious")
    with pytest.raises(RecipeError, match="holds other files"):
        run(tiny.recipe(data, "other"), resume=True, progress=False)


def stopped_run(data: Path, name: str, monkeypatch: pytest.MonkeyPatch, looks: int = 20) -> tuple[dict[str, Any], Path]:
    """The recipe and folder of a run that was stopped after a few steps."""
    raw = tiny.raw_recipe(data, name)
    with monkeypatch.context() as patch:
        patch.setattr("spt_fast.train.run.StopRequest", StopAfter)
        StopAfter.looks = looks
        assert run(recipe_from(raw), progress=False)["status"] == "stopped"
    return raw, data / name


def test_resume_on_changed_data_is_refused(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.write_corpora(tmp_path)
    for field, name in (("heldout", "chem.heldout"), ("train", "chem")):
        raw, folder = stopped_run(tmp_path, f"data-{field}", monkeypatch)
        tiny.write_dataset(tmp_path / name, 7, 1100)
        with pytest.raises(DataError, match=rf"sources\.chem\.{field}: holds other text than when .*step-"):
            run(recipe_from(raw), resume=True, progress=False)
        with pytest.raises(DataError, match=rf"sources\.chem\.{field}: holds other text"):
            audit_run(folder)
        tiny.write_corpora(tmp_path)
        assert run(recipe_from(raw), resume=True, progress=False)["status"] == "done"
        tiny.write_dataset(tmp_path / name, 7, 1100)
        with pytest.raises(DataError, match=rf"sources\.chem\.{field}: holds other text than when .*data-{field} was"):
            audit_run(folder)
        tiny.write_corpora(tmp_path)


def test_a_run_continues_in_its_dtype_and_reports_changed_kernels(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raw, folder = stopped_run(data, "dtype", monkeypatch)
    began = json.loads((folder / "summary.json").read_text())["precision"]
    other = {"bfloat16": torch.float32, "float32": torch.bfloat16}[began]
    monkeypatch.setattr(precision, "pick_precision", lambda *_: Precision(other, "of another day"))
    monkeypatch.setattr(tuning, "auto_backends", lambda: {"rms_norm": "abacus"})
    assert run(recipe_from(raw), resume=True)["precision"] == began
    change = f"rms_norm {auto_backends()['rms_norm']} → abacus"
    said = " ".join(capsys.readouterr().err.split())
    assert f"warning: other kernels or processes than before, so not bit-identical: {change}" in said


def test_a_run_in_fp8_is_resumed_in_fp8_to_the_same_run(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpt, "FP8_WIDTH", 32)
    fp8 = {"engine": {"fp8": True}}
    run(tiny.recipe(data, "fp8-whole", **fp8))
    assert "100% of the blocks' matmuls with emulated fp8, which is slower on a CPU" in " ".join(
        capsys.readouterr().err.split()
    )
    with monkeypatch.context() as patch:
        patch.setattr("spt_fast.train.run.StopRequest", StopAfter)
        StopAfter.looks = 43
        assert run(tiny.recipe(data, "fp8", **fp8), progress=False)["status"] == "stopped"
    with pytest.raises(RecipeError, match=r"engine\.fp8: True → False"):
        run(tiny.recipe(data, "fp8"), resume=True, progress=False)
    run(tiny.recipe(data, "fp8", engine={"fp8": True, "checkpointing": "full"}), resume=True, progress=False)
    assert_same_run(data / "fp8-whole", data / "fp8")


def test_fp8_changes_a_run_only_where_layers_are_wide(data: Path, undisturbed: Path) -> None:
    run(tiny.recipe(data, "fp8-narrow", engine={"fp8": True}), progress=False)
    assert_same_run(undisturbed, data / "fp8-narrow")


def test_fp8_is_refused_on_a_gpu_without_it(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "pick_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(RecipeError, match=r"engine\.fp8: fp8 needs .* 8\.9, this one has 8\.0; set it to false, or"):
        run(tiny.recipe(data, "fp8-old", engine={"fp8": True}), progress=False)
    assert not (data / "fp8-old").exists()


def test_parameters_are_counted_on_the_starting_model_after_any_interruption(
    data: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The finetune unties the head, so a process that resumes inside it holds more of them."""
    raw, folder = stopped_run(data, "parameters", monkeypatch, looks=220)
    assert "p01" in sorted(path.name for path in (folder / "checkpoints").iterdir())[-1]
    summaries = [
        run(recipe_from(raw), resume=True, progress=False),
        json.loads((undisturbed / "summary.json").read_text()),
    ]
    start = sum(p.numel() for p in make_plan(recipe_from(raw)).starting_model().parameters())
    assert [summary["parameters"] for summary in summaries] == [start, start]


def test_damaged_checkpoints_are_renamed_and_not_counted(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw, folder = stopped_run(data, "aside", monkeypatch, looks=45)
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert len(names) == 2
    (folder / "checkpoints" / names[1] / "state.json").unlink()
    raw["checkpoint"] = {"every": "1 steps", "keep": 1}
    with monkeypatch.context() as patch:
        patch.setattr("spt_fast.train.run.StopRequest", StopAfter)
        StopAfter.looks = 3
        assert run(recipe_from(raw), resume=True, progress=False)["status"] == "stopped"
    left = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert left[0] == f"damaged-{names[1]}"
    assert len(left) == 2
    assert names[0] < left[1] < names[1], "the one just written is kept, though a damaged one was further on"
    assert run(recipe_from(raw), resume=True, progress=False)["status"] == "done"


def test_a_run_stopped_again_before_its_next_step_keeps_its_checkpoint(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writing it again would remove the only whole one for a moment, in which the process may be killed."""
    raw, folder = stopped_run(data, "stopped-twice", monkeypatch, looks=45)
    raw["checkpoint"] = {"every": "7 steps", "keep": 1}
    newest = sorted((folder / "checkpoints").iterdir())[-1]
    before = (newest / "manifest.json").stat()
    monkeypatch.setattr("spt_fast.train.run.StopRequest", StopAfter)
    StopAfter.looks = 0
    assert run(recipe_from(raw), resume=True, progress=False)["status"] == "stopped"
    after = (newest / "manifest.json").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_what_a_crash_left_half_written_does_not_block_the_run(data: Path) -> None:
    raw = tiny.raw_recipe(data, "crashed")
    raw["phases"] = [raw["phases"][0] | {"tokens": 8 * 16}]
    (data / "crashed").mkdir()
    (data / "crashed" / ".recipe.yaml.tmp").write_text("run: hal")
    assert run(recipe_from(raw), resume=True, progress=False)["status"] == "done"


def test_a_run_that_keeps_the_best_continues_after_the_checkpoint_at_an_arms_last_step(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That checkpoint is of the best evaluation; the process dies before it writes the phase's weights."""
    raws = [tiny.raw_recipe(data, name) for name in ("best-whole", "best-died")]
    for raw in raws:
        raw["checkpoint"] = {"every": "500 steps", "keep": 3, "keep_best": True}
        raw["phases"] = [raw["phases"][0], raw["phases"][1] | {"stop": None, "tokens": 4 * 4 * 16}]
    run(recipe_from(raws[0]), progress=False)
    at_last_step = data / "best-died" / "checkpoints" / "step-0000000030-p00-a000"

    def died(*_: object, **__: object) -> None:
        until(at_last_step.exists)
        raise OSError("died")

    with monkeypatch.context() as patch:
        patch.setattr(hf, "save", died)
        with pytest.raises(OSError, match="died"):
            run(recipe_from(raws[1]), progress=False)
    assert run(recipe_from(raws[1]), resume=True, progress=False)["status"] == "done"
    assert_same_run(data / "best-whole", data / "best-died")


def test_a_run_continues_from_every_boundary_between_phases_and_arms(data: Path, tmp_path: Path) -> None:
    """The best weights, kept moments and the start of an anchor must be restored there."""
    raw = tiny.raw_recipe(data, "every-boundary")
    raw["checkpoint"] = {"every": "1 steps", "keep": 999, "keep_best": True}
    first, second = raw["phases"]
    raw["phases"] = [
        first | {"tokens": 3 * 8 * 16, "eval": {"every": "1 steps", "tokens": 200}},
        second | {"tokens": 3 * 4 * 16, "optimizer_state": "keep", "stop": None, "untie": True},
        second | {"name": "last", "tokens": 2 * 4 * 16, "optimizer_state": "keep", "untie": False, "grid": None},
    ]
    run(recipe_from(raw), progress=False)
    whole = data / "every-boundary"
    names = [path.name for path in checkpoint.listed(whole / "checkpoints")]
    boundaries = [name for name in names if int(name[5:15]) in (0, 3, 6, 9)]
    assert {name[-8:] for name in boundaries} >= {"p00-a000", "p01-a000", "p01-a001", "p02-a000"}
    for name in boundaries:
        folder = tmp_path / name
        shutil.copytree(whole, folder)
        (folder / "summary.json").unlink()
        for later in names[names.index(name) + 1 :]:
            shutil.rmtree(folder / "checkpoints" / later)
        assert run(recipe_from(raw | {"run": str(folder)}), resume=True, progress=False)["status"] == "done", name
        assert tiny.metrics(folder) == tiny.metrics(whole)
        for phase in ("pretrain", "finetune", "last"):
            ours, theirs = weights(folder, phase), weights(whole, phase)
            assert all(torch.equal(ours[key], theirs[key]) for key in theirs), f"{name} {phase}"


def test_checkpoints_to_keep_are_written_whatever_the_others_come_at(data: Path) -> None:
    raw = tiny.raw_recipe(data, "kept-every")
    raw["checkpoint"] = {"every": "3 steps", "keep": 1, "keep_every": "4 steps"}
    first = raw["phases"][0] | {"eval": {"every": "9 steps", "tokens": 200}}
    raw["phases"] = [first | {"tokens": 5 * 8 * 16}, first | {"name": "second", "tokens": 6 * 8 * 16}]
    run(recipe_from(raw), progress=False)
    names = [path.name for path in checkpoint.listed(data / "kept-every" / "checkpoints")]
    assert names == ["step-0000000004-p00-a000", "step-0000000008-p01-a000"]


def test_a_full_disk_is_reported_with_the_name_of_the_file(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin = RunLog.__init__

    def on_a_full_disk(self: RunLog, *arguments: Any, **settings: Any) -> None:
        begin(self, *arguments, **settings)
        self._file.close()
        self._file = Path("/dev/full").open("w")  # noqa: SIM115

    monkeypatch.setattr(RunLog, "__init__", on_a_full_disk)
    with pytest.raises(
        CheckpointError, match=r"^/dev/full: could not be written \(No space left on device\); make room"
    ):
        run(tiny.recipe(data, "full-disk"), progress=False)


def test_the_summary_of_a_run_without_held_out_text_is_printed(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = {"steps": 20, "tokens": 5120, "epochs": {"general": 0.25}, "heldout": {}, "handed_on": 20}
    raw = tiny.raw_recipe(data, "unscored")
    raw["phases"][0] |= {"grid": {"lr": [1e-3]}}
    print_summary(recipe_from(raw), {"phases": {"pretrain": done | {"arm": 0}}, "skipped_steps": 0}, terminal())
    said = capsys.readouterr().out
    assert re.search(r"pretrain .* 20 .* 5,120 .* general .* 0\.25 .* n/a", said)
    assert "grid" not in said, "of one value nothing was chosen"
    raw["phases"][0] |= {"grid": {"lr": [1e-3, 1e-2]}}
    damaged = (
        rf"^{data / 'unscored' / 'summary.json'}: is damaged \(`phases.pretrain.arm` is 7, but there are 2\); delete"
    )
    with pytest.raises(CheckpointError, match=damaged):
        print_summary(recipe_from(raw), {"phases": {"pretrain": done | {"arm": 7}}, "skipped_steps": 0}, terminal())


@pytest.mark.parametrize("lost", ["a line", "half a line", "everything"])
def test_metrics_shorter_than_at_the_checkpoint_are_reported_and_stay_valid_lines(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], lost: str
) -> None:
    raw, folder = stopped_run(data, f"shorter-{lost}", monkeypatch, looks=45)
    metrics, text = folder / "metrics.jsonl", (folder / "metrics.jsonl").read_text()
    lines = text.splitlines(keepends=True)
    metrics.write_text({"a line": "".join(lines[:-1]), "half a line": text[:-9], "everything": ""}[lost])
    kept = 0 if lost == "everything" else len("".join(lines[:-1]))
    raw["phases"] = raw["phases"][:1]
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe_from(raw).plain()))
    run(recipe_from(raw), resume=True)
    said = " ".join(capsys.readouterr().err.split())
    assert f"metrics.jsonl: has {kept:,} of the {len(text):,} bytes" in said
    steps = [record["step"] for record in tiny.metrics(folder) if record["kind"] == "train"]
    assert steps[-1] == 30
    assert len(steps) == len(set(steps))


def test_the_throughput_of_a_logged_step_is_over_the_time_since_the_last_one(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also the last step, whose lap is shorter. A step takes at least a tenth of a second, more on a loaded machine."""
    seconds, step = 0.1, LocalEngine.step

    def slow(self: LocalEngine, *arguments: Any) -> Any:
        time.sleep(seconds)
        return step(self, *arguments)

    monkeypatch.setattr(LocalEngine, "step", slow)
    raw = tiny.raw_recipe(data, "laps")
    raw["log"] = {"every": "2 steps"}
    raw["phases"] = [raw["phases"][0] | {"tokens": 5 * 8 * 16, "eval": {"every": "3 steps", "tokens": 200}}]
    run(recipe_from(raw), progress=False)
    records = [json.loads(line) for line in (data / "laps" / "metrics.jsonl").read_text().splitlines()]
    rates = {record["step"]: record["tokens_per_s"] for record in records if record["kind"] == "train"}
    assert list(rates) == [2, 4, 5]
    assert all(rate <= 8 * 16 / seconds for rate in rates.values()), rates


@pytest.mark.parametrize("content", ["", '{"status": "do', "[]", '{"status": "done"}'])
def test_a_damaged_summary_is_named(data: Path, undisturbed: Path, tmp_path: Path, content: str) -> None:
    folder = shutil.copytree(undisturbed, tmp_path / "copy")
    (folder / "summary.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"summary\.json: is damaged .*; delete it"):
        audit_run(folder)
    with pytest.raises(CheckpointError, match=r"summary\.json: is damaged"):
        run(recipe_from(tiny.raw_recipe(data) | {"run": str(folder)}), resume=True, progress=False)


def test_a_damaged_recipe_of_a_run_is_named(undisturbed: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(undisturbed, tmp_path / "copy")
    for content in ("", "run: [a"):
        (folder / "recipe.yaml").write_text(content)
        for read in (audit_run, load_model):
            with pytest.raises(CheckpointError, match=r"recipe\.yaml: is damaged"):
                read(folder)


def test_damage_of_all_checkpoints_is_reported(data: Path) -> None:
    raw = tiny.raw_recipe(data, "ruined")
    raw["phases"] = raw["phases"][:1]
    run(recipe_from(raw), progress=False)
    (data / "ruined" / "summary.json").unlink()
    for manifest in (data / "ruined" / "checkpoints").glob("*/manifest.json"):
        manifest.write_text(manifest.read_text().replace("current", "currant"))
    with pytest.raises(CheckpointError, match=r"no checkpoint is whole.*does not match its own hash"):
        run(recipe_from(raw), resume=True, progress=False)


def test_a_full_disk_keeps_older_checkpoints(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = checkpoint.save_file, iter(range(10**9))

    def full(*args: Any, **kwargs: Any) -> None:
        if next(calls) >= 2:
            raise OSError(28, "No space left on device")
        real(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "save_file", full)
    raw = tiny.raw_recipe(data, "full")
    raw["phases"] = raw["phases"][:1]
    with pytest.raises(CheckpointError, match=r"No space left.*make room.*`resume=True`"):
        run(recipe_from(raw), progress=False)
    folder = data / "full" / "checkpoints"
    assert len(list(folder.iterdir())) == 2
    monkeypatch.setattr(checkpoint, "save_file", real)
    assert run(recipe_from(raw), resume=True, progress=False)["status"] == "done"


# ------------------------------------------------------------------------------------------------ bad input


def recipe_with(data: Path, run_name: str, path: str, value: Any) -> Any:
    raw: Any = tiny.raw_recipe(data, run_name)
    node = raw
    *head, last = [int(p) if p.isdigit() else p for p in path.split(".")]
    for key in head:
        node = node[key]
    node[last] = value
    return recipe_from(raw)


@pytest.mark.parametrize(
    ("path", "value", "error", "message"),
    [
        (
            "phases.0.mixture",
            {"general": "9999/10000", "chem": "1/10000"},
            RecipeError,
            r"phases\[pretrain\]\.mixture: source 'chem'.*would get none",
        ),
        ("model.vocab_size", 40, DataError, r"token id 63, outside the vocabulary of 40; .*or raise model.vocab_size"),
        ("model.context", 5000, DataError, r"chem.*shorter than one window"),
        ("sources.chem.train", "absent/prefix", DataError, r"^sources\.chem\.train: no token dataset at absent/prefix"),
        ("init", "absent/folder", CheckpointError, r"^init: absent/folder: is not a folder"),
        ("model.heads", 5, RecipeError, r"model\.heads"),
    ],
)
def test_a_recipe_that_cannot_be_trained_is_refused_before_anything_is_written(
    data: Path, path: str, value: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        run(recipe_with(data, "refused", path, value), progress=False)
    assert not (data / "refused").exists()


def write_headerless(prefix: Path, ids: np.ndarray, dtype: str) -> str:
    ids.astype(dtype).tofile(f"{prefix}.bin")
    return str(prefix)


@pytest.mark.parametrize(("field", "bad"), [("train", -1), ("heldout", -1), ("train", 64), ("heldout", 70)])
def test_an_id_outside_the_model_is_refused_in_text_that_records_no_largest_id(
    data: Path, tmp_path: Path, field: str, bad: int
) -> None:
    raw = tiny.raw_recipe(data, f"foreign-{field}-{bad}")
    ids = np.arange(2000) % 60
    ids[::5] = bad
    raw["sources"]["general"] |= {field: write_headerless(tmp_path / "ids", ids, "int32"), "dtype": "int32"}
    other = {"train": "heldout", "heldout": "train"}[field]
    raw["sources"]["general"][other] = write_headerless(tmp_path / "other", np.arange(2000) % 60, "int32")
    raw["model"]["vocab_size"] = 64
    with pytest.raises(DataError, match=rf"sources\.general\.{field}: .*ids\.bin holds token id {bad}, outside the"):
        run(recipe_from(raw), progress=False)


def test_documents_mode_refuses_text_without_documents_before_anything_is_written(data: Path, tmp_path: Path) -> None:
    raw = tiny.raw_recipe(data, "no-documents")
    raw["sources"]["chem"]["heldout"] = write_headerless(tmp_path / "ids", np.arange(700) % 60, "uint16")
    raw["sources"]["chem"]["dtype"] = "uint16"
    raw["phases"][1]["documents"] = True
    with pytest.raises(
        DataError, match=r"sources\.chem\.heldout: .*ids\.bin records no documents, which phases\[finetune\]"
    ):
        run(recipe_from(raw), progress=False)
    assert not (data / "no-documents").exists()


def test_a_dataset_of_another_tokenizer_is_refused(data: Path, tmp_path: Path) -> None:
    tiny.write_dataset(tmp_path / "one", 1, 2000, tokenizer_digest="a" * 64)
    tiny.write_dataset(tmp_path / "two", 2, 2000, tokenizer_digest="b" * 64)
    raw = tiny.raw_recipe(data, "mixed-tokenizers")
    raw["sources"]["general"]["train"] = str(tmp_path / "one")
    raw["sources"]["chem"]["train"] = str(tmp_path / "two")
    with pytest.raises(DataError, match="another tokenizer"):
        run(recipe_from(raw), progress=False)


def test_heldout_text_in_the_training_set_is_warned_of(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = tiny.raw_recipe(data, "leak")
    raw["sources"]["chem"]["heldout"] = raw["sources"]["chem"]["train"]
    raw["phases"] = [raw["phases"][0] | {"tokens": 8 * 16}]
    run(recipe_from(raw))
    said = capsys.readouterr().err
    assert "warning" in said
    assert "held-out documents of 'chem'" in " ".join(said.split())


# ------------------------------------------------------------------------------------------------ after a run


def test_audit_adds_up(undisturbed: Path) -> None:
    facts = audit_run(undisturbed)
    summary = json.loads((undisturbed / "summary.json").read_text())["phases"]
    assert facts["general"].windows == 180
    assert facts["chem"].windows == 60 + summary["finetune"]["steps"] * 4
    assert facts["chem"].max_visits - facts["chem"].min_visits <= 2
    first = audit_document(undisturbed, "chem", 0)
    assert first.min_visits <= first.token_visits / first.tokens <= first.max_visits
    documents = 0
    visits = 0
    with pytest.raises(DataError, match=r"chem has documents 0 to [0-9]+ within its limit_tokens"):
        audit_document(undisturbed, "chem", 10_000)
    with pytest.raises(DataError, match=r"document: True is invalid: chem has documents"):
        audit_document(undisturbed, "chem", True)
    while True:
        try:
            visits += audit_document(undisturbed, "chem", documents).token_visits
        except DataError:
            break
        documents += 1
    assert visits == facts["chem"].tokens


def test_scoring_takes_every_token_but_the_first_once(
    undisturbed: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = scored(undisturbed, data / "chem.heldout")
    ids = np.fromfile(data / "chem.heldout.bin", np.uint16)
    assert result.tokens == len(ids) - 1
    assert result.bytes == 3 * len(ids)
    assert result.perplexity == pytest.approx(np.exp(result.loss))
    assert result.bits_per_byte == pytest.approx(result.loss * result.tokens / np.log(2) / result.bytes)
    assert scored(undisturbed / "weights" / "finetune", data / "chem.heldout") == result
    monkeypatch.setattr("spt_fast.evaluation.score.TOKENS_AT_A_TIME", 1)
    one_by_one = scored(undisturbed, data / "chem.heldout")
    assert one_by_one.standard_error == pytest.approx(result.standard_error, rel=1e-3)
    for bad in (-1, 64):
        np.array([1, bad, 2], "<i4").tofile(data / "bad.bin")
        with pytest.raises(DataError, match=rf"bad\.bin: holds token id {bad}, the model's vocabulary is 64"):
            scored(undisturbed, data / "bad.bin", dtype="int32")


def test_init_from_a_checkpoint_and_from_weights(undisturbed: Path, data: Path) -> None:
    for i, source in enumerate(
        (undisturbed / "weights" / "pretrain", sorted((undisturbed / "checkpoints").glob("step-*"))[-1])
    ):
        raw = tiny.raw_recipe(data, f"continued-{i}")
        raw |= {"init": str(source), "model": {}}
        raw["phases"] = [raw["phases"][0] | {"tokens": 8 * 16}]
        run(recipe_from(raw), progress=False)
        first = tiny.metrics(data / f"continued-{i}")[0]
        plan = make_plan(recipe_from(raw))
        texts = evaluation_texts(plan, plan.phases[0].phase)["heldout"]
        model = load_model(source).eval()
        for name, text in texts.items():
            expected = measure(partial(model, reduction="none"), text, 8).loss
            assert first["heldout"][name] == pytest.approx(expected, rel=5e-3)
