"""Where a training step of ours spends its time on a GPU, kernel by kernel, with the prediction of benchmarks.roofline.

    python -m benchmarks.profile_step [--preset 124m] [--batch B] [--seconds 30] [--tune SECONDS] [--dry] [--json FILE]

First some steps are timed, by the host's clock, which give the MFU, then two more run under torch.profiler. A kernel's
time is the device's, so the difference of a step and its kernels is time in which the GPU waited.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.kernels.harness import quartiles
from benchmarks.machine import machine
from benchmarks.roofline import MEMORY_TBS, RATES, Ceilings, Shape, Step, ours
from benchmarks.train_step import CONTEXTS, MICRO_TOKENS, Side, Trial, seconds_of, shapes, write_tokens
from benchmarks.train_step import ours as build
from spt_fast.files import write_text
from spt_fast.kernels import keep_freed_memory
from spt_fast.model.flops import mfu_label, peak_flops, train_flops_per_token
from spt_fast.model.gpt import GPTConfig

TIMED, PROFILED = 3, 2
"""Steps at a time."""
KERNELS = 40
ROUNDS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", choices=CONTEXTS, default="124m")
    parser.add_argument("--batch", type=int, help="sequences in a step; the first one to try")
    parser.add_argument("--seconds", type=float, default=30.0, help="for the timed steps")
    parser.add_argument("--tune", type=float, default=0.0, help="seconds for the tuner to choose the kernels")
    parser.add_argument("--dry", action="store_true", help="on a CPU, tiny: runs every line, measures nothing")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    device = torch.device("cpu" if options.dry else "cuda")
    if options.dry:
        torch.set_num_threads(1)
        keep_freed_memory()
    torch.manual_seed(0)
    (config,) = shapes(device, [options.preset], dry=options.dry)
    batch = options.batch or (2 if options.dry else MICRO_TOKENS // config.context)
    trial = Trial(config, device, batch, rounds=ROUNDS, steps=TIMED, seconds=options.seconds)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tokens.bin"
        write_tokens(file, config.vocab_size)
        side = trial.built("ours", partial(build, tune_seconds=options.tune, say=trial.notes.append), file)
        if side.step is None:
            raise SystemExit(side.problem)
        report = {"machine": machine("torch", "triton"), **timed(side, trial, options.preset)}
        for found in (report, report | kernels(side, trial)):
            if options.json:
                write_text(options.json, json.dumps(found, indent=1) + "\n")
    print(table(found))


def timed(side: Side, trial: Trial, preset: str) -> dict[str, Any]:
    """Tokens a second and MFU, and those that are predicted."""
    config, device = trial.config, trial.device
    deadline, seconds = time.monotonic() + trial.seconds, []
    assert side.step is not None
    while not seconds or (len(seconds) < trial.rounds and time.monotonic() < deadline):
        seconds.append(seconds_of(side.step, TIMED, device) / TIMED)
    low, median, high = quartiles(seconds)
    tokens = side.batch * config.context
    peak = peak_flops(device)
    return {
        "preset": preset,
        "shape": f"{config.layers} x {config.width}, T {config.context}, V {config.vocab_size:,}",
        "sequences": side.batch,
        "step_ms": {"low": 1e3 * low, "median": 1e3 * median, "high": 1e3 * high},
        "tokens_per_s": tokens / median,
        "mfu": tokens / median * train_flops_per_token(config) / peak if peak else None,
        "mfu_label": mfu_label(device),
        "peak_gb": side.peak_bytes / 1e9 if side.peak_bytes else None,
        "notes": list(dict.fromkeys(trial.notes)),
        "predicted": predicted(config, tokens, preset),
    }


def predicted(config: GPTConfig, tokens: int, preset: str) -> dict[str, Any]:
    """On an H200, whatever the GPU is, with separate kernels."""
    ceilings = Ceilings(RATES[preset], 1e12 * MEMORY_TBS["H200"])
    step = Step.of("ours", ours(fused=False), Shape(config, tokens), ceilings)
    return {
        "gpu": "H200",
        "device_ms": 1e3 * step.seconds,
        "mfu": step.mfu,
        "launches": sum(row.launches for row in step.rows),
    }


def kernels(side: Side, trial: Trial) -> dict[str, Any]:
    """The kernels of a step, the longest first; on a CPU its ops."""
    gpu = trial.device.type == "cuda"
    assert side.step is not None
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]) as profiler:
        seconds_of(side.step, PROFILED, trial.device)
    on_device = torch.autograd.DeviceType.CUDA if gpu else torch.autograd.DeviceType.CPU
    rows = [
        (event.key, event.count, event.self_device_time_total if gpu else event.self_cpu_time_total)
        for event in profiler.key_averages()
        if event.device_type == on_device
    ]
    rows.sort(key=lambda row: -row[2])
    total = sum(us for _, _, us in rows)
    return {
        "device_ms": total / 1e3 / PROFILED,
        "launches": sum(count for _, count, _ in rows) / PROFILED,
        "kernels": [
            {"kernel": name[:120], "calls": count / PROFILED, "ms": us / 1e3 / PROFILED, "share": us / max(total, 1e-9)}
            for name, count, us in rows[:KERNELS]
        ],
    }


def table(report: dict[str, Any]) -> str:
    mfu = "n/a" if report["mfu"] is None else f"{report['mfu']:.1%}"
    predicted = report["predicted"]
    step_ms = f"{report['step_ms']['median']:.1f} ms a step"
    lines = [
        f"{report['preset']}, {report['shape']}, {report['sequences']} sequences",
        f"{report['tokens_per_s']:,.0f} tokens/s, {step_ms}",
        f"mfu[{report['mfu_label']}] {mfu} (predicted for an {predicted['gpu']} {predicted['mfu']:.1%})",
        f"the device {report['device_ms']:.1f} ms (predicted {predicted['device_ms']:.1f})",
        f"{report['launches']:.0f} launches (predicted {predicted['launches']})",
        *(f"ours: {note}" for note in report["notes"]),
        "",
        "| kernel | calls | ms | share |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {row['kernel'][:80]} | {row['calls']:g} | {row['ms']:.3f} | {row['share']:.1%} |"
        for row in report["kernels"]
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
