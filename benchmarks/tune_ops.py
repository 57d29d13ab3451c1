"""The tuner's choices for the ops of a step at a preset's shapes: python -m benchmarks.tune_ops [--help]"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from benchmarks.machine import machine
from benchmarks.train_step import CONTEXTS, MICRO_TOKENS, shapes
from spt_fast.files import write_text
from spt_fast.kernels.backend import Candidate
from spt_fast.kernels.tuner import describe, tune
from spt_fast.train.precision import pick_dtype
from spt_fast.train.tuning import asked_of
from spt_fast.train.world import pick_device


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", choices=CONTEXTS, default="124m")
    parser.add_argument("--ops", nargs="+", help="only these")
    parser.add_argument("--documents", action="store_true", help="windows hold several documents")
    parser.add_argument("--seconds", type=float, default=60.0, help="for all of them")
    parser.add_argument("--dry", action="store_true", help="on a CPU, tiny")
    parser.add_argument("--json", type=Path, help="also write the results here, after every op")
    options = parser.parse_args()
    device, about = torch.device("cpu") if options.dry else pick_device(), machine("torch", "triton")
    (config,) = shapes(device, [options.preset], dry=options.dry)
    asked = asked_of(
        config,
        pick_dtype("auto", device),
        device,
        sequences=2 if options.dry else MICRO_TOKENS // config.context,
        context=config.context,
        documents=options.documents,
        deterministic=False,
    )
    unknown = set(options.ops or ()) - {question.op for question in asked}
    if unknown:
        known = ", ".join(question.op for question in asked)
        parser.error(f"--ops: {', '.join(sorted(unknown))} is invalid: expected some of {known}")
    ends, records, notes = time.monotonic() + options.seconds, {}, []
    chosen = [question for question in asked if question.op in (options.ops or [question.op])]
    for number, question in enumerate(chosen):
        seconds = (ends - time.monotonic()) / (len(chosen) - number)
        records |= tune([question], seconds=seconds, say=notes.append)
        if question.op in records:
            record = records[question.op]
            notes.append(f"{question.op}: {Candidate.read(record['chosen'])}: {describe(record)}")
        print("\n".join(map(str, notes[-1:])), flush=True)
        if options.json:
            report = {"machine": about, "records": records, "notes": notes}
            write_text(options.json, json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
