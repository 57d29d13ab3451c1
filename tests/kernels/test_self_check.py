"""A backend that is wrong here is found at the start, and passed over."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from spt_fast.kernels import backend, rms_norm, trials
from spt_fast.kernels.backend import OPS, Candidate, pass_over
from spt_fast.kernels.self_check import Fault, asked, check, self_check
from spt_fast.train.precision import Precision
from spt_fast.train.tuning import Choices

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def afterwards(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(backend, "_passed_over", set())
    yield
    backend.install({})


def checked(dtype: torch.dtype) -> list[Fault]:
    """In this process."""
    found: list[Fault] = []
    check(asked(CPU, dtype), lambda **message: found.append(Fault(*message["fault"])) if "fault" in message else None)
    return found


@pytest.mark.skipif(not backend.CPU_LIBRARY, reason="the C++ extension is not built")
def test_every_op_is_tried_and_right_here() -> None:
    assert {*trials.TRIALS} == {*OPS} - {"linear", "swiglu"}  # which have no kernel of their own, or none takes
    backend.install({"rms_norm": Candidate("reference")})
    for dtype in (torch.bfloat16, torch.float32):
        assert checked(dtype) == []
    assert not backend._installed


@pytest.mark.skipif(not backend.CPU_LIBRARY, reason="the C++ extension is not built")
@pytest.mark.parametrize(
    ("harm", "problem"),
    [
        (lambda y, count: y * (1 + 2e-2), "has an error of"),
        (lambda y, count: y + (count % 3) * 1e-7, "gives other bits"),
        (lambda y, count: y * float("nan"), "has an error of nan"),
        (lambda y, count: y.view(-1), "raises"),
    ],
)
def test_what_is_wrong_is_passed_over(
    monkeypatch: pytest.MonkeyPatch, harm: Callable[[Tensor, int], Tensor], problem: str
) -> None:
    counts = itertools.count()

    def planted(x: Tensor, weight: Tensor, backend: str) -> Tensor:
        y = rms_norm(x, weight, backend=backend)
        return harm(y, next(counts)) if backend == "cpu" else y

    make = lambda s, random: (planted, (random(8, s.width), random(s.width)), 2)  # noqa: E731
    monkeypatch.setattr(trials, "TRIALS", {})
    monkeypatch.setitem(trials.TRIALS, "rms_norm", make)
    monkeypatch.setattr("spt_fast.kernels.self_check.TRIALS", trials.TRIALS)
    (fault,) = checked(torch.float32)
    assert (fault.op, fault.backend) == ("rms_norm", "cpu")
    assert fault.problem.startswith(problem)
    x = torch.zeros(2, 4)
    assert OPS["rms_norm"].pick("auto", x) == "cpu"
    choices = Choices(Precision(torch.float32, "asked for"), faults=[fault])
    assert choices.install()["rms_norm"] == OPS["rms_norm"].pick("auto", x) == "reference"
    assert f"warning: rms_norm: cpu is not used: it {problem}" in next(choices.lines())


def test_a_fault_leaves_other_ops_alone() -> None:
    pass_over("rms_norm", "cpu")
    assert str(Fault("rms_norm", "cpu", "raises")) == "rms_norm: cpu is not used: it raises"
    for op in ("add_rms_norm", "rope"):
        assert OPS[op].pick("auto", torch.zeros(2)) == ("cpu" if backend.CPU_LIBRARY else "reference")


@pytest.mark.skipif(not backend.CPU_LIBRARY, reason="the C++ extension is not built")
def test_what_ends_its_process_is_passed_over_and_the_rest_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    task = "tests.kernels.planted:check_of_three"
    segfaults, wrong = self_check(CPU, torch.float32, task=task)
    assert segfaults == Fault("rms_norm", "cpu", "ended its process (SIGSEGV)")
    assert (wrong.op, wrong.backend, wrong.problem[:15]) == ("rope", "cpu", "has an error of")

    def here(request: dict, tell: Callable[..., None]) -> None:
        tell(at=["swiglu", "cpu"])
        tell(fault=["swiglu", "cpu", "errs"])

    monkeypatch.setattr("spt_fast.kernels.child.sys.executable", "/bin/false")
    monkeypatch.setattr("spt_fast.kernels.self_check.check", here)
    assert self_check(CPU, torch.float32) == [Fault("swiglu", "cpu", "errs")], "without a child"


@pytest.mark.skipif(not backend.CPU_LIBRARY, reason="the C++ extension is not built")
def test_a_reference_is_made_once_for_all_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def right(op: str, trial: object) -> Callable[[Candidate], None]:
        made.append(op)
        return lambda candidate: None

    monkeypatch.setattr("spt_fast.kernels.self_check.checker", right)
    monkeypatch.setitem(OPS["rope"].auto, "cpu", {"cpu": "", "triton": "", "reference": ""})
    monkeypatch.setitem(OPS["qkv_attention"].auto, "cpu", {"sdpa": "", "reference": ""})  # "cpu" needs AVX-512
    assert checked(torch.float32) == []
    assert made.count("rope") == 1
    assert made.count("qkv_attention") == 2
