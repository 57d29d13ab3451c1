"""The same run everywhere: any number of processes and any ZeRO stage read the same tokens in the same order, reach the
same weights, stop together, and continue from each other's checkpoints."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from spt_fast.model import hf
from spt_fast.model.gpt import GPTConfig, drawn
from tests import tiny
from tests.train.many import PEAK_FLOPS, Ranks, free_port
from tests.train.test_watch import until

pytestmark = [pytest.mark.long, pytest.mark.skipif(not find_spec("deepspeed"), reason="DeepSpeed is not installed")]

PATIENCE_S = 600
"""Time limit for processes that end by themselves, on a loaded machine."""
STEPS = 50
SAME = 1e-5
"""Relative tolerance of losses in fp32: sums over processes round in another order."""


def raw_recipe(data: Path, run: str, **engine: Any) -> dict[str, Any]:
    """50 steps over several epochs of `chem`; then a finetune that is anchored, untied, stopped early, with a grid, and
    averaged with its start."""
    raw = tiny.raw_recipe(data, run)
    pretrain, finetune = raw["phases"]
    pretrain |= {"tokens": STEPS * 8 * tiny.CONTEXT, "batch": {"sequences": 8, "micro": 2}}
    pretrain["eval"] = {"every": "25 steps", "tokens": 400}
    finetune |= {
        "batch": {"sequences": 8, "micro": 1},
        "grid": {"lr": ["1e-3", "2e-3"]},
        "tokens": 6 * 8 * tiny.CONTEXT,
        "average": "20%",
    }
    return raw | {"precision": "fp32", "engine": engine, "checkpoint": {"every": "20 steps", "keep": 9}}


def short_recipe(data: Path, run: str, **engine: Any) -> dict[str, Any]:
    raw = raw_recipe(data, run, **engine)
    raw["phases"] = raw["phases"][:1]
    raw["phases"][0]["tokens"] = 20 * 8 * tiny.CONTEXT
    return raw


@pytest.fixture(scope="module")
def short(data: Path) -> Path:
    together(1, [{"recipe": short_recipe(data, "short")}], data)
    return data / "short"


def together(processes: int, plans: list[dict[str, Any]], folder: Path) -> None:
    ended, said = Ranks(processes, plans, folder / f"said-{time.monotonic_ns()}").end(PATIENCE_S)
    assert ended, said


def start(command: list[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", *command]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def losses(run: Path) -> list[tuple[tuple[Any, ...], list[float]]]:
    """The position of each record, and every loss and gradient norm in it."""
    found = []
    for record in tiny.metrics(run):
        where = tuple(record[key] for key in ("kind", "phase", "arm", "step"))
        values = [record["loss"], record["grad_norm"]] if record["kind"] == "train" else []
        for split in ("heldout", "select", "train"):
            values += [loss for _, loss in sorted(record.get(split, {}).items())]
        found.append((where, values))
    return found


def steps_of(run: Path) -> list[dict[str, Any]]:
    records = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    return [record for record in records if record["kind"] == "train"]


def worst_difference(run: Path, reference: Path) -> float:
    """The largest relative difference of a loss or norm; the records themselves must be the same."""
    ours, theirs = losses(run), losses(reference)
    assert [where for where, _ in ours] == [where for where, _ in theirs]
    pairs = [(a, b) for (_, x), (_, y) in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True)]
    return max(abs(a - b) / abs(b) for a, b in pairs)


def global_batches(run: Path, processes: int) -> list[np.ndarray]:
    """Tokens of every step, [sequences, T], joined from those that each process read."""
    files = [np.load(f"{run}.tokens-{rank}.npz") for rank in range(processes)]
    steps = zip(*([file[name] for name in file.files] for file in files), strict=True)
    # [processes, micro-batches, micro, T] → micro-batches of process 0, 1, … take turns
    return [np.stack(parts).swapaxes(0, 1).reshape(-1, tiny.CONTEXT) for parts in steps]


@pytest.fixture(scope="module")
def alone(data: Path) -> Path:
    together(1, [{"recipe": raw_recipe(data, "alone")}], data)
    return data / "alone"


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_every_stage_trains_the_same_model_on_the_same_tokens(data: Path, alone: Path, processes: int) -> None:
    runs = {f"z{stage}-{processes}": {"name": "deepspeed", "stage": stage} for stage in range(4)}
    runs |= (
        {f"offload-{processes}": {"name": "deepspeed", "stage": 2, "offload": "optimizer"}} if processes == 2 else {}
    )
    plans = [{"recipe": raw_recipe(data, name, **engine)} for name, engine in runs.items()]
    plans[1]["recipe"]["phases"][0]["batch"]["micro"] = 1
    together(processes, plans, data)
    expected = global_batches(alone, 1)
    for name in runs:
        assert worst_difference(data / name, alone) < SAME, name
        read = global_batches(data / name, processes)
        assert len(read) == len(expected) >= STEPS
        each = json.loads((data / name / "summary.json").read_text())["flops_per_token"]
        for record in steps_of(data / name):
            assert record["mfu"] == pytest.approx(record["tokens_per_s"] * each / (processes * PEAK_FLOPS)), name
        assert all(np.array_equal(ours, theirs) for ours, theirs in zip(read, expected, strict=True)), name


def test_an_imported_base_is_partitioned_as_it_is_loaded(data: Path) -> None:
    """Shards in bf16, which no process reads whole, in both kinds of engine that partition; some tensors do not divide
    evenly among two processes."""
    shape = GPTConfig(
        layers=3, width=31, heads=4, head_dim=8, kv_heads=2, ffn=96, context=tiny.CONTEXT, vocab_size=70, tied=False
    )
    folder = data / "base"
    hf.save(shape, drawn(shape, 4), folder, dtype=torch.bfloat16)
    tensors = load_file(folder / hf.WEIGHTS)
    (folder / hf.WEIGHTS).unlink()
    listed = {name: f"{i % 3}.safetensors" for i, name in enumerate(tensors)}
    for file in set(listed.values()):
        save_file({name: tensor for name, tensor in tensors.items() if listed[name] == file}, folder / file)
    (folder / hf.INDEX).write_text(json.dumps({"weight_map": listed}))

    def recipe(run: str, **engine: Any) -> dict[str, Any]:
        raw = raw_recipe(data, f"base-{run}", **engine) | {"init": str(folder), "model": {}}
        pretrain, finetune = raw["phases"]
        return raw | {"phases": [{**pretrain, "anchor": finetune["anchor"], "tokens": 6 * 8 * tiny.CONTEXT}]}

    together(1, [{"recipe": recipe("alone")}], data)
    together(2, [{"recipe": recipe("z1", stage=1)}, {"recipe": recipe("z3", stage=3)}], data)
    for run in ("base-z1", "base-z3"):
        assert worst_difference(data / run, data / "base-alone") < SAME, run


def test_a_run_continues_with_other_processes_and_stages(data: Path, alone: Path) -> None:
    """Stopped by SIGTERM to the last process several times, and continued each time by another engine."""
    lives: list[tuple[int, dict[str, Any], int | None]] = [
        (1, {"name": "local"}, 13),
        (2, {"stage": 1}, 20),
        (2, {"stage": 3}, 21),
        (1, {"name": "local"}, None),
    ]
    read: list[np.ndarray] = []
    for processes, engine, stop_at in lives:
        plan = {"recipe": raw_recipe(data, "moved", **engine), "resume": True, "stop_at": stop_at}
        together(processes, [plan], data)
        summary = json.loads((data / "moved" / "summary.json").read_text())
        assert summary["status"] == ("stopped" if stop_at is not None else "done")
        read += global_batches(data / "moved", processes)
    assert worst_difference(data / "moved", alone) < SAME
    expected = global_batches(alone, 1)
    assert len(read) == len(expected), "no step lost or repeated"
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(read, expected, strict=True))


def test_an_optimizer_with_other_kinds_of_state_is_partitioned(data: Path) -> None:
    def recipe(run: str, **engine: Any) -> dict[str, Any]:
        raw = short_recipe(data, run, **engine)
        raw["phases"][0]["optimizer"] = {"name": "momentum", "lr": 1e-2}
        return raw

    muon = recipe("muon-moved", stage=1)
    muon["phases"][0]["optimizer"]["name"] = "muon"
    repeated = muon | {"run": str(data / "muon"), "engine": {**muon["engine"], "stage": 0}}
    together(1, [{"recipe": recipe("momentum")}, {"recipe": repeated}], data)
    moved = recipe("momentum-moved", stage=1)
    plans = [{"recipe": recipe("momentum-3", stage=3)}, {"recipe": moved, "stop_at": 7}, {"recipe": muon, "stop_at": 7}]
    together(2, plans, data)
    back = [{"recipe": raw | {"engine": {"name": "local"}}, "resume": True} for raw in (moved, muon)]
    together(1, back, data)
    for run, reference in (("momentum-3", "momentum"), ("momentum-moved", "momentum"), ("muon-moved", "muon")):
        assert worst_difference(data / run, data / reference) < SAME, run


def test_a_frozen_embedding_stays_in_every_stage_and_engine(data: Path) -> None:
    """Frozen between two phases that train it, with its moments kept; the last run changes the engine while it is
    frozen."""

    def frozen(run: str, **engine: Any) -> dict[str, Any]:
        raw = raw_recipe(data, f"frozen-{run}", **engine)
        pretrain, finetune = (phase | {"tokens": 3 * 8 * tiny.CONTEXT} for phase in raw["phases"])
        finetune |= {"freeze": "embeddings", "optimizer_state": "keep", "grid": None, "stop": None}
        free = pretrain | {"name": "free", "optimizer_state": "keep"}
        raw["precision"] = "bf16" if "bf16" in run else "fp32"
        return raw | {"phases": [pretrain, finetune, free], "checkpoint": {"every": "9 steps", "keep": 9}}

    recipes = [frozen("z0", stage=0), frozen("bf16-z1", stage=1), frozen("z3", stage=3, offload="all")]
    moved = frozen("moved", stage=2)
    together(2, [*({"recipe": raw} for raw in recipes), {"recipe": moved, "stop_at": 5}], data)
    moved["engine"] = {"name": "local"}
    together(1, [{"recipe": frozen("alone")}, {"recipe": moved, "resume": True}], data)
    for raw in [*recipes, moved]:
        run = Path(raw["run"])
        if raw["precision"] == "fp32":
            assert worst_difference(run, data / "frozen-alone") < SAME, run
        embeddings = [
            load_file(run / "weights" / phase["name"] / "model.safetensors")["model.embed_tokens.weight"]
            for phase in raw["phases"]
        ]
        assert torch.equal(embeddings[1], embeddings[0]), run
        assert not torch.equal(embeddings[2], embeddings[1]), run


def test_a_loss_in_one_process_that_is_not_finite_leaves_the_weights_unchanged(data: Path) -> None:
    """Each ZeRO stage has its own code for this. An infinite loss may have finite gradients."""
    plans = []
    for stage in range(4):
        raw = raw_recipe(data, f"poisoned-{stage}", stage=stage, offload="all" if stage == 3 else "none")
        raw["precision"] = "bf16" if stage in (1, 3) else "fp32"
        raw["phases"] = raw["phases"][:1]
        raw["phases"][0]["tokens"] = 6 * 8 * tiny.CONTEXT
        plans.append({"recipe": raw, "poison_at": 2, "infinite_at": 3})
    together(2, plans, data)
    for stage in range(4):
        run = data / f"poisoned-{stage}"
        assert json.loads((run / "summary.json").read_text())["skipped_steps"] == 2
        records = [record for record in tiny.metrics(run) if record["kind"] == "train"]
        assert [record["loss"] is None for record in records] == [False] * 2 + [True] * 2 + [False] * 2
        assert all(np.isfinite(record["grad_norm"]) for record in records if record["loss"] is not None)


def test_the_summary_says_why_another_process_failed(data: Path) -> None:
    """The first process only sees that the connection is closed."""
    said = data / "broken.said"
    ranks = Ranks(2, [{"recipe": short_recipe(data, "broken", stage=1), "fail_at": 7}], said)
    ranks.wait(PATIENCE_S)
    ended, _ = ranks.end(0)
    assert not ended
    summary = json.loads((data / "broken" / "summary.json").read_text())
    assert (summary["status"], summary["reason"]) == ("failed", "process 1: chem.bin: cannot be read")


@pytest.mark.parametrize("misspelt_in", [(0, 1), (1,)])
def test_a_recipe_that_cannot_be_read_is_said_once(data: Path, misspelt_in: tuple[int, ...]) -> None:
    """By the first process that has it, which on another host may be a later one. The others end too."""
    place = data / f"misspelt-{len(misspelt_in)}"
    place.mkdir()
    for rank in range(2):
        raw = short_recipe(data, "misspelt") | ({"sed": 1} if rank in misspelt_in else {})
        (place / f"{rank}.yaml").write_text(yaml.safe_dump(raw))
    ranks = Ranks(2, [{"command": ["train", f"{place}/$RANK.yaml"]}], data / f"{place}.said")
    ranks.wait(PATIENCE_S)
    ended, said = ranks.end(0)
    assert not ended
    assert re.findall(r"spt-fast.*: sed", said) == [
        f"spt-fast, process {misspelt_in[0]}: {place}/{misspelt_in[0]}.yaml: sed"
    ]


def test_a_misuse_of_the_command_line_is_said_once(data: Path) -> None:
    """Also one that is noticed before it is known that the command trains."""
    misuses = {"No such option": ["train", "recipe.yaml", "--nosuch"], "No such command": ["trian", "recipe.yaml"]}
    started = {what: Ranks(2, [{"command": words}], data / f"{what}.said") for what, words in misuses.items()}
    for what, ranks in started.items():
        ranks.wait(PATIENCE_S)
        ended, said = ranks.end(0)
        assert not ended
        assert said.count(what) == 1, said


def test_a_process_that_dies_ends_the_job(data: Path) -> None:
    """Long before the half hour that a collective waits."""
    path = data / "dead.json"
    path.write_text(json.dumps([{"recipe": raw_recipe(data, "dead", stage=1), "die_at": 7}]))
    process = start(["--standalone", "--nproc_per_node=2", "-m", "tests.train.many", str(path)])
    _, said = process.communicate(timeout=PATIENCE_S)
    assert process.returncode != 0
    assert "rank" in said
    assert "SIGKILL" in said or "-9" in said


def signalled(data: Path, raw: dict[str, Any], number: signal.Signals) -> tuple[int, str]:
    """Two processes under --max-restarts=1, the first of which gets a signal once there is a checkpoint."""
    run = Path(raw["run"])
    recipe_path = run.with_suffix(".yaml")
    recipe_path.write_text(yaml.safe_dump(raw | {"checkpoint": {"every": "3 steps", "keep": 9}}))
    launcher = ["--standalone", "--nproc_per_node=2", "--max-restarts=1"]
    process = start([*launcher, "-m", "spt_fast.train", str(recipe_path), "--resume"])
    until(lambda: process.poll() is not None or bool(list((run / "checkpoints").glob("step-*"))))
    assert process.poll() is None
    os.kill(json.loads((run / "heartbeat.json").read_text())["pid"], number)
    _, said = process.communicate(timeout=PATIENCE_S)
    return process.returncode, said


def test_a_stop_is_not_undone_by_a_restart(data: Path) -> None:
    raw = short_recipe(data, "told")
    raw["phases"][0]["tokens"] = "10M"
    code, said = signalled(data, raw, signal.SIGUSR1)
    assert code != 0
    summary = json.loads((data / "told" / "summary.json").read_text())
    assert (summary["status"], summary["reason"]) == ("stopped", "SIGUSR1")
    assert "resuming" not in said


def test_torchrun_restarts_a_job_that_died(data: Path, short: Path) -> None:
    code, said = signalled(data, short_recipe(data, "restarted"), signal.SIGKILL)
    assert code == 0, said
    assert "resuming from step-" in said
    assert worst_difference(data / "restarted", short) < SAME


def test_two_hosts_are_one_job(data: Path, short: Path) -> None:
    """Two launchers that find each other over TCP, as on two hosts."""
    plan = data / "hosts.json"
    plan.write_text(json.dumps([{"recipe": short_recipe(data, "hosts", stage=2)}]))
    meeting = ["--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{free_port()}", "--rdzv_id=hosts"]
    launcher = ["--nnodes=2", "--nproc_per_node=1", "--local_addr=127.0.0.1", *meeting]
    hosts = [start([*launcher, f"--node_rank={host}", "-m", "tests.train.many", str(plan)]) for host in range(2)]
    for launcher in hosts:
        _, said = launcher.communicate(timeout=PATIENCE_S)
        assert launcher.returncode == 0, said
    assert worst_difference(data / "hosts", short) < SAME


@pytest.mark.parametrize("what", ["recipe", "text", "damaged"])
def test_a_host_with_another_recipe_or_text_is_refused(data: Path, what: str) -> None:
    raw, theirs = short_recipe(data, f"apart-{what}"), short_recipe(data, f"apart-{what}")
    copy = tiny.write_dataset(data / what / "general", 5 if what == "text" else 0, 6000)
    theirs["sources"]["general"]["train"] = str(copy)
    if what == "recipe":
        theirs["phases"][0]["optimizer"]["lr"] = 1e-3
    if what == "damaged":
        file = copy.with_suffix(".bin")
        file.write_bytes(bytes(file.stat().st_size))
    plan = {"recipe": raw, "recipe_of_last": theirs}
    ended, said = Ranks(2, [plan], data / f"{what}.said", apart=True).end(PATIENCE_S)
    assert not ended
    expected = {
        "recipe": r"phases\.0\.optimizer\.lr: is 0\.001 on .*, but 0\.003 in the first process",
        "text": r"sources\.general\.train: on .* it is not what the first process has",
        "damaged": r"sources\.general\.train: .*general\.bin: is damaged",
    }
    assert re.search(expected[what], said), said


def test_local_is_one_process(data: Path) -> None:
    ranks = Ranks(2, [{"recipe": raw_recipe(data, "local-twice", name="local")}], data / "local-twice.said")
    ended, said = ranks.end(PATIENCE_S)
    assert not ended
    assert "engine.name: local is one process, and 2 were started; write deepspeed" in said
