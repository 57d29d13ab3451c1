from __future__ import annotations

import subprocess
import sys

import pytest

# A process that frees and allocates 64 MB over and over: page faults a round, before and after.
PROGRAM = """
import resource
import torch
from spt_fast.kernels import keep_freed_memory

def faults_per_round():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(16 << 20)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 20

faults_per_round()
before = faults_per_round()
assert keep_freed_memory()
faults_per_round()
print(before, faults_per_round())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
def test_freed_memory_is_kept() -> None:
    """In a process of its own, since the setting cannot be taken back."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    before, after = map(float, done.stdout.split())
    assert before > 10
    assert after < before / 10
