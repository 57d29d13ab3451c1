from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.kernels import bench_fp8, bench_norm, bench_self_attention, harness
from benchmarks.kernels.harness import (
    Case,
    Clock,
    Contender,
    Function,
    Row,
    Run,
    check,
    measure,
    quartiles,
    rank,
    table,
    verdict,
)
from benchmarks.machine import machine
from spt_fast.kernels import fp8
from spt_fast.kernels.persistent import SEPARATE

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small ceilings and caches: the tests time nothing of use."""
    for sizes, value in (("COPY_BYTES", 1 << 20), ("FLUSH_BYTES", 1 << 10), ("MATMUL_SIZE", 32)):
        monkeypatch.setitem(getattr(harness, sizes), "cpu", value)


def row(contender: str, kind: str, median: float | None, *, low: float = 0.0, status: str = "timed") -> Row:
    seconds = None if median is None else (low, median, 2 * median)
    return Row("op", "shape", "forward", contender, kind, status, seconds=seconds)


def test_quartiles_count_both_ends() -> None:
    assert quartiles([5, 1, 4, 2, 3]) == (2, 3, 4)
    assert quartiles([7.0]) == (7.0, 7.0, 7.0)


def test_rates_in_units() -> None:
    assert harness.rate(6e9, 2.0, "GB/s") == 3.0
    assert harness.rate(6e12, 2.0, "TFLOP/s") == 3.0


def test_ranks_go_by_the_median_and_only_to_those_that_were_timed() -> None:
    rows = [
        row("eager", "torch", 3.0),
        row("ours", "ours", 2.0, low=1.9),
        row("compiled", "torch", 2.5, low=0.1),
        row("liger", "peer", None, status="absent"),
        row("flash", "peer", None, status="wrong"),
        row("products", "floor", 0.5),
        row("compiled otherwise", "torch", None, status="failed"),
    ]
    rank(rows)
    assert {r.contender: r.rank for r in rows} == {
        "eager": 3, "ours": 1, "compiled": 2, "liger": None, "flash": None, "products": None,
        "compiled otherwise": None,
    }  # fmt: skip
    said = verdict(rows, "forward")
    missing = "liger (absent), flash (wrong), compiled otherwise (failed)"
    assert said == f"forward: ours is 1.25x compiled; unranked against {missing}"
    assert table(rows).count("unranked |") == 3


def test_without_a_rival_there_is_no_comparison() -> None:
    rows = [row("ours", "ours", 2.0), row("liger", "peer", None, status="absent")]
    rank(rows)
    assert verdict(rows, "forward") == "forward: no comparison; unranked against liger (absent)"


def case(*contenders: Contender, **fields: Any) -> Case:
    x = torch.linspace(1, 2, 6).requires_grad_()
    eager = Contender("eager", lambda: torch.square, "torch")
    return Case("op", "shape", [x], [eager, *contenders], **{"work": {"both": 4e9}, **fields})


def measured(case: Case, rounds: int = 2) -> dict[str, Row]:
    rows = measure(case, Run(CPU, torch.float32, rounds=rounds), Clock(CPU), {"GB/s": 8.0, "TFLOP/s": 1.0})
    return {row.contender: row for row in rows}


def absent() -> Function:
    raise ImportError("no such library")


def test_wrong_absent_and_broken_contenders_are_listed_and_the_others_timed() -> None:
    rows = measured(
        case(
            Contender("wrong", lambda: lambda x: x * x + 0.01),
            Contender("wrong gradient", lambda: lambda x: (x * x).detach() + 0 * x),
            Contender("nan", lambda: lambda x: x * x / 0 * 0),
            Contender("absent", absent),
            Contender("broken", lambda: lambda x: 1 / 0),
            Contender("right", lambda: lambda x: x * x),
        )
    )
    assert {name: row.status for name, row in rows.items()} == {
        "eager": "timed", "wrong": "wrong", "wrong gradient": "wrong", "nan": "wrong", "absent": "absent",
        "broken": "failed", "right": "timed",
    }  # fmt: skip
    assert {name for name, row in rows.items() if row.rank} == {"eager", "right"}
    assert "no such library" in rows["absent"].note
    assert "ZeroDivisionError" in rows["broken"].note
    right = rows["right"]
    assert right.seconds is not None
    assert right.rate is not None
    assert right.rate == pytest.approx(4 / right.seconds[1])
    assert right.of_ceiling == pytest.approx(right.rate / 8)


def test_only_passes_in_which_all_do_the_same_are_ranked() -> None:
    work = {"forward": 1.0, "backward": 1.0, "both": 2.0}
    run = Run(CPU, torch.float32, rounds=1)
    rows = measure(case(work=work, alike=("both",)), run, Clock(CPU), {"GB/s": 8.0})
    assert {row.pass_: row.rank for row in rows} == {"forward": None, "backward": None, "both": 1}


def test_each_run_sees_the_inputs_as_they_were() -> None:
    seen = []

    def overwriting(x: Tensor) -> Tensor:
        seen.append(x.detach().clone())
        y = x.detach().clone() ** 2 + 2 * x.detach() * (x - x.detach())
        x.data.zero_()
        return y

    rows = measured(case(Contender("overwriting", lambda: overwriting)))
    assert rows["overwriting"].status == "timed"
    assert len(seen) > 3
    assert all(torch.equal(x, seen[0]) for x in seen)


def test_only_the_weight_that_is_kept_in_fp8_is_not_quantised_again(monkeypatch: pytest.MonkeyPatch) -> None:
    quantised, real = [], fp8._quantise_weight
    monkeypatch.setattr(fp8, "_quantise_weight", lambda *given: quantised.append(1) or real(*given))
    x, weight = torch.randn(16, 32), torch.randn(16, 32, requires_grad=True)
    for kept, times in ((False, 3), (True, 1)):
        ours = Contender("ours", partial(bench_fp8.ours, "reference", kept=kept), "ours")
        one = harness.Ready(ours, ours.load(), [x, weight], [], None, None)
        case = Case("fp8_linear", "shape", [x.clone(), weight.detach().clone()], [], {"forward": 1.0})
        for _ in range(3):
            harness._sample(case, one, [], "forward", Clock(CPU))
        assert len(quantised) == times
        quantised.clear()


def test_only_the_fused_contender_has_the_fused_projection(monkeypatch: pytest.MonkeyPatch) -> None:
    module, seen = bench_self_attention.SELF_ATTENTION, []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    case = bench_self_attention.case(Run(CPU, torch.float32), 1, 8, 2, 64)
    x, weight = case.inputs
    monkeypatch.setattr(module.Fused, "apply", lambda *given: seen.append(module._launched(x, weight, 64)))
    fused = next(contender for contender in case.contenders if contender.name == "triton, fused").load()
    assert module._launched(x, weight, 64) == SEPARATE
    fused(x, weight)
    assert seen == [module.candidates(64)[0]]
    assert module._launched(x, weight, 64) == SEPARATE


def test_rounds_end_with_the_time() -> None:
    slow = Contender("slow", lambda: lambda x: time.sleep(0.01) or x * x)
    run = Run(CPU, torch.float32, deadline=time.monotonic())
    rows = measure(case(slow), run, Clock(CPU), {"GB/s": 1.0})
    assert {row.rounds for row in rows} == {harness.MIN_ROUNDS}


def test_extra_memory_is_the_peak() -> None:
    def work() -> Tensor:
        a = torch.zeros(1 << 20)  # 4 MB
        b = a + 1
        del a
        return b + 1

    assert 8 << 20 <= harness.peak_extra_bytes(CPU, work) < 9 << 20


def test_a_check_finds_what_is_wrong_and_what_differs_from_call_to_call(tmp_path: Path) -> None:
    calls = iter(range(100))

    def differs(x: Tensor) -> Tensor:
        return x * x + 2e-7 * next(calls)  # more than a rounding

    def ours(name: str, function: Function) -> Contender:
        return Contender(name, lambda: function, "ours")

    rows = check(
        case(
            ours("right", lambda x: x * x),
            ours("wrong", lambda x: x * x * (1 + 1e-5)),
            ours("differs", differs),
            Contender("absent", absent, "ours"),
            Contender("another's", lambda: torch.square),
        )
    )
    assert {row.contender: row.status for row in rows} == {
        "eager": "right", "right": "right", "wrong": "wrong", "differs": "bits differ", "absent": "absent",
    }  # fmt: skip
    file = tmp_path / "rows.json"
    arguments = ["--check", "--dry", "--device=cpu", f"--json={file}"]
    harness.main(bench_norm.cases, "RMSNorm", arguments)
    assert {row["status"] for row in json.loads(file.read_text())["rows"]} == {"right"}
    with pytest.raises(SystemExit):
        harness.main(lambda _: [lambda: case(ours("ours, triton", lambda x: 2 * x))], "wrong", arguments)


def test_figures_name_the_build_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its package says 2.13.0 where torch says 2.13.0+cu130."""
    monkeypatch.setattr(torch, "__version__", "2.13.0+another")
    facts = machine("torch", "no-such-package")
    assert (facts["torch"], facts["no-such-package"]) == ("2.13.0+another", "absent")


def test_bench_norm_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.json"
    harness.main(bench_norm.cases, "RMSNorm", ["--dry", "--device=cpu", "--rounds=2", "--no-compile", f"--json={file}"])
    report = json.loads(file.read_text())
    assert report["machine"]["torch"] == torch.__version__
    assert (report["device"], report["dtype"], report["threads"]) == ("cpu", "float32", 1)
    assert set(report["ceilings"]) == {"GB/s", "TFLOP/s"}
    timed = [row for row in report["rows"] if row["status"] == "timed"]
    assert {row["op"] for row in timed} == {"rms_norm", "add_rms_norm"}
    assert {"eager", "ours, reference"} <= {row["contender"] for row in timed}
    assert {row["pass"] for row in timed} == {"forward", "backward", "both"}
    assert all(row["rank"] for row in timed)
    printed = capsys.readouterr().out
    assert "**rms_norm, 8 x 64**" in printed
    assert "compiled | absent: ImportError: not asked for" in printed


def test_a_gpu_is_kept_busy_for_as_long_as_the_host_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            pass

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end: Event) -> float:
            return 4.0  # milliseconds

    slept: list[int] = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", slept.append)
    clock = Clock(CPU)
    clock.device = torch.device("cuda")
    for taken in (0.01, 0.05, 0.0):
        assert clock.seconds(lambda s=taken: time.sleep(s))[0] == 0.004
    longest = harness.LONGEST_HEAD_START_S * harness.CYCLES_PER_S
    assert slept[0] == harness.HEAD_START_CYCLES < 0.01 * harness.CYCLES_PER_S <= slept[1] <= slept[2] == longest
