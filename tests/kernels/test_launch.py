"""A kernel is launched on the GPU that holds its tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from spt_fast.kernels import launch  # noqa: E402


class OnGPU(torch.Tensor):
    device = SimpleNamespace(index=1)  # type: ignore[assignment]


def test_the_tensors_gpu_is_the_current_one_for_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    current, launched = [0], []

    @contextlib.contextmanager
    def device(index: int) -> Iterator[None]:
        current.append(index)
        yield
        current.pop()

    def run(self: object, *arguments: Any, **options: Any) -> None:
        launched.append((current[-1], options))

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(triton.JITFunction, "run", run)
    kernel = launch.Kernel(test_the_tensors_gpu_is_the_current_one_for_a_launch)
    assert isinstance(kernel, triton.JITFunction)
    there = torch.zeros(1).as_subclass(OnGPU)
    kernel[(2,)](None, there, 3, num_warps=4)
    current.append(1)
    kernel[(2,)](there, 3, num_warps=4)
    assert launched == [(1, {"num_warps": 4, "grid": (2,), "warmup": False, **launch.OPTIONS})] * 2
    assert current == [0, 1]
