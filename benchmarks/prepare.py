"""The speed of `prepare` from text to tokens, against cores × the better of tiktoken and Hugging Face's tokenizers on
one core with the same text.

    python -m benchmarks.prepare [INPUT…] [--tokenizer T] [--workers N] [--repeats N] [--json FILE]

Each repetition times the libraries on every document of the input, tiktoken by `encode_ordinary` with the ranks of a
Hugging Face tokenizer if they convert, then `prepare`, which also reads, parses, hashes and writes; the median ratio
counts. The requirement is 75%. "CPU ratio" is the same in processor time: the limit of the ratio on a machine without
other load. Without INPUT the text is the source of Python's standard library, repeated up to 64 MB; without T a
vocabulary of 4,096 is trained on the text.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import statistics
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

os.environ["RAYON_NUM_THREADS"] = "1"  # one core for Hugging Face's tokenizers in this process

import tiktoken
import tokenizers

from benchmarks.machine import machine
from spt_fast.data.base_tokenizer import BaseTokenizer
from spt_fast.data.fast_bpe import FastBPE, fast_bpe
from spt_fast.data.hf_tokenizer import HF_FILE, HFTokenizer
from spt_fast.data.prepare import prepare
from spt_fast.data.text import iter_documents
from spt_fast.data.tokenizer import Tokenizer, train_tokenizer

STANDARD_LIBRARY_BYTES = 64_000_000


def standard_library(folder: Path) -> Path:
    """A .jsonl of the standard library's sources."""
    sources = [path.read_text(errors="ignore") for path in sorted(Path(sysconfig.get_path("stdlib")).glob("**/*.py"))]
    sources = [source for source in sources if source]
    target, written = folder / "stdlib.jsonl", 0
    with target.open("w") as file:
        while written < STANDARD_LIBRARY_BYTES:
            for source in sources:
                written += file.write(json.dumps({"text": source}) + "\n")
    return target


def libraries(tokenizer: BaseTokenizer) -> list[Callable[[str], object]]:
    """A function that encodes a text, for each library that can."""
    found: list[Callable[[str], object]] = []
    ranks: Tokenizer | FastBPE | None = tokenizer if isinstance(tokenizer, Tokenizer) else None
    if isinstance(tokenizer, HFTokenizer):
        data = tokenizer.files[HF_FILE]
        theirs = tokenizers.Tokenizer.from_buffer(data)
        found.append(lambda text: theirs.encode_batch_fast([text], add_special_tokens=False)[0].ids)
        ranks = fast_bpe(json.loads(data), theirs.model)
    if ranks is not None:
        encoding = tiktoken.Encoding("own", pat_str=ranks.pattern, mergeable_ranks=ranks.ranks, special_tokens={})
        found.append(encoding.encode_ordinary)
    return found


def library_seconds(inputs: list[str], tokenizer: BaseTokenizer) -> tuple[float, float]:
    """Wall and processor time for encoding only, on one core, with the better library."""
    seconds = []
    for encode in libraries(tokenizer):
        wall_s = cpu_s = 0.0
        for text in iter_documents(inputs):
            wall_began, cpu_began = time.perf_counter(), time.process_time()
            encode(text)
            wall_s += time.perf_counter() - wall_began
            cpu_s += time.process_time() - cpu_began
        seconds.append((wall_s, cpu_s))
    return min(seconds, key=lambda measured: measured[1])


class PeakMemory:
    """Watches the resident memory of this process and its children (Linux); `peak_mb` is the largest sum seen."""

    def __init__(self) -> None:
        self.peak_mb = 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        while not self._done.wait(0.05):
            children = [
                pid for listed in Path("/proc/self/task").glob("*/children") for pid in listed.read_text().split()
            ]
            with contextlib.suppress(OSError):  # a child may end meanwhile
                pages = [int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in ["self", *children]]
                self.peak_mb = max(self.peak_mb, sum(pages) * resource.getpagesize() / 1e6)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()


def processor_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def measure(
    inputs: list[str], tokenizer: BaseTokenizer, workers: int | None, repeats: int, folder: Path
) -> dict[str, Any]:
    runs = []
    for _ in range(repeats):
        own_s, own_cpu_s = library_seconds(inputs, tokenizer)
        cpu_began = processor_seconds()
        with PeakMemory() as memory:
            summary = prepare(
                inputs, folder / "tokens", tokenizer, heldout=Fraction(1, 200), workers=workers, progress=False
            )
        text_mb = (summary.bytes + summary.heldout.bytes) / 1e6
        runs.append(
            {
                "library_mb_per_s": text_mb / own_s,
                "prepare_mb_per_s": text_mb / summary.seconds,
                "ratio": own_s / (summary.seconds * summary.workers),
                "cpu_ratio": own_cpu_s / (processor_seconds() - cpu_began),
                "peak_mb": memory.peak_mb,
            }
        )
    medians = {key: statistics.median(run[key] for run in runs) for key in ("ratio", "cpu_ratio", "peak_mb")}
    return {"workers": summary.workers, "text_mb": text_mb, **medians, "runs": runs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="*", metavar="INPUT")
    parser.add_argument("--tokenizer", help="as prepare takes it")
    parser.add_argument("--workers", type=int)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the results here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        inputs = arguments.inputs or [str(standard_library(folder))]
        if arguments.tokenizer:
            tokenizer: BaseTokenizer = Tokenizer.load(arguments.tokenizer)
        else:
            tokenizer = train_tokenizer(inputs, 4096, folder / "t.tiktoken", sample_bytes=20_000_000)
        results = measure(inputs, tokenizer, arguments.workers, arguments.repeats, folder)
    about = machine("tiktoken", "tokenizers", "pyarrow")
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    print(f"{results['text_mb']:.0f} MB of text, {results['workers']} workers, {results['peak_mb']:.0f} MB of memory")
    print(f"{'library, one core':>20}{'prepare':>14}{'ratio':>9}{'CPU ratio':>11}")
    for run in results["runs"]:
        print(
            f"{run['library_mb_per_s']:>15.1f} MB/s{run['prepare_mb_per_s']:>9.1f} MB/s"
            f"{run['ratio']:>9.0%}{run['cpu_ratio']:>11.0%}"
        )
    print(f"{'median':>34}{results['ratio']:>9.0%}{results['cpu_ratio']:>11.0%}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": about, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
