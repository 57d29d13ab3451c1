"""Every Triton kernel compiles for each GPU architecture, spills no register and fits its shared memory."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.kernels.aot import FILES, Resources, variants_of

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]


def run_without_interpreter(*arguments: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    cache = {"TRITON_CACHE_DIR": os.path.join(environment["XDG_CACHE_HOME"], "triton")}
    command = [sys.executable, *arguments]
    finished = subprocess.run(command, capture_output=True, text=True, env=environment | cache, cwd=ROOT)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


def test_default_kernels_compile_for_every_gpu() -> None:
    """On Hopper no product waits for another, except in dkv at head 128. In a process of its own, since this one may
    have set Triton to interpret. What the same compiler has made of the same source before is read from a cache."""
    said = run_without_interpreter("-m", "tests.kernels.aot", "--default")
    waiting = [line for line in said.splitlines() if "serialized" in line]
    assert all("_dkv_kernel" in line and " D=128 " in line for line in waiting), waiting
    compiled = Counter(re.findall(r"^sm_\d+ (\w+)\..* registers", said, re.MULTILINE))
    expected = {file: sum(len(variant.archs) for variant in variants_of(file) if variant.default) for file in FILES}
    assert compiled == {file: count for file, count in expected.items() if count}


def test_a_spill_and_too_much_shared_memory_are_problems() -> None:
    assert Resources(255, 0, 100_000).problem(90) is None
    assert "spills: 8 bytes" in str(Resources(255, 8, 0).problem(90))
    assert "shared memory" in str(Resources(32, 0, 200_000).problem(80))
    assert Resources(32, 0, 200_000).problem(90) is None


def test_kernels_that_compute_on_a_products_sums_let_no_product_wait_for_another() -> None:
    """One launch of each on Hopper, in a process of its own as above."""
    code = (
        "from tests.kernels.aot import compile_for, variants_of\n"
        "for file in ('feed_forward', 'self_attention'):\n"
        "    found = {v.kernel.__name__: v for v in reversed(variants_of(file)) if 'GROUP' in v.constants}\n"
        "    for variant in found.values():\n"
        "        print(compile_for(variant, 90).serialized)\n"
    )
    assert run_without_interpreter("-c", code).split() == ["None"] * 3
