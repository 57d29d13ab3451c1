"""A new op is its file, its test and its benchmark: what belongs to each op is there."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

import pytest

from spt_fast import kernels
from spt_fast.kernels.backend import OPS

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("op", sorted(OPS))
def test_an_op_has_a_name_a_test_and_a_benchmark(op: str) -> None:
    function = getattr(kernels, op, None)
    assert inspect.isfunction(function), f"kernels/__init__.py: import {op}, for type checkers"
    file = inspect.unwrap(function).__module__.removeprefix("spt_fast.kernels.")
    assert (ROOT / "benchmarks" / "kernels" / f"bench_{file}.py").is_file()
    test = importlib.import_module(f"tests.kernels.test_{file}")
    assert hasattr(test, "test_every_launch_is_compiled_ahead_of_time")
    assert op in {sample.op for sample in test.TestContract.samples}
