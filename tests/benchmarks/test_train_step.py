from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import host_time, train_step
from benchmarks.train_step import Step, Trial, contenders, ours, plain, shapes, table, write_tokens
from spt_fast.errors import SptWarning
from spt_fast.kernels import auto_backends
from spt_fast.kernels.backend import Candidate, install
from spt_fast.model import gpt
from spt_fast.model.gpt import GPTConfig
from spt_fast.train.local import STEPS_TO_WARM_UP
from spt_fast.train.precision import pick_precision

CPU = torch.device("cpu")


def build(config: GPTConfig, file: Path, batch: int, device: torch.device) -> Step:
    if batch > 2:
        raise torch.OutOfMemoryError
    return lambda: lambda: 1.0


def missing(config: GPTConfig, file: Path, batch: int, device: torch.device) -> Step:
    raise ImportError("no such library")


def trial(**fields: int) -> Trial:
    return Trial(shapes(CPU, [], dry=True)[0], CPU, **{"batch": 16, "rounds": 3, "steps": 2, "seconds": 60, **fields})


def test_the_batch_is_halved_until_it_fits_and_absent_sides_are_unranked() -> None:
    run = trial()
    run.run({"ours": build, "other": missing}, Path(), lambda _: None)
    assert (run.sides["ours"].batch, len(run.sides["ours"].rates)) == (2, 3)
    report = run.report()
    assert report["sides"]["other"] == {"problem": "absent: no such library"}
    assert "| other | | absent: no such library | | | | unranked |" in table(report)


def test_nothing_fits() -> None:
    def never(config: GPTConfig, file: Path, batch: int, device: torch.device) -> Step:
        raise torch.OutOfMemoryError

    run = trial()
    run.run({"ours": never}, Path(), lambda _: None)
    assert run.sides["ours"].problem == "out of memory at one sequence"


def test_sides_that_dont_fit_together_run_in_turn_and_ours_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trial, "_all_fit", lambda *_: False)
    run = trial()
    run.run({"ours": build, "other": build}, Path(), lambda _: None)
    assert (len(run.sides["ours"].rates), len(run.sides["other"].rates)) == (6, 3)
    assert "in turn, ours first and last" in table(run.report())


def test_ours_keeps_its_first_figure_if_it_does_not_fit_as_well_a_second_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trial, "_all_fit", lambda *_: False)
    most = iter([2, 2, 2, 2, 1, 1, 1, 1, 1])

    def build_less(config: GPTConfig, file: Path, batch: int, device: torch.device) -> Step:
        if batch > next(most):
            raise torch.OutOfMemoryError
        return lambda: lambda: 1.0

    run = trial()
    run.run({"ours": build_less, "other": build}, Path(), lambda _: None)
    ours = run.report()["sides"]["ours"]
    assert (ours["sequences"], ours["rounds"]) == (2, 3)
    assert ours["stopped"] == "in turn only once: 1 sequences the second time"


def test_only_rounds_of_all_sides_in_turns_count(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[Step] = []
    monkeypatch.setattr(train_step, "seconds_of", lambda step, *_: timed.append(step) or 1.0)
    run = trial(rounds=2)
    run.run({"ours": build, "other": build}, Path(), lambda _: None)
    ours, other = (side.step for side in run.sides.values())
    assert timed == [ours, other, ours, other, ours, other]
    assert [len(side.rates) for side in run.sides.values()] == [2, 2]
    timed.clear()
    run = trial(rounds=1)
    run.run({"ours": build, "other": build}, Path(), lambda _: None)
    assert len(timed) == 4
    assert [len(side.rates) for side in run.sides.values()] == [1, 1]


def test_a_graphs_memory_and_recording_belong_to_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU whose steps need 100 bytes more than the state's 10, until they are replayed without the allocator."""
    held, peak, steps = 0, 0, 0

    def recorded(*_: object) -> Step:
        nonlocal held

        def step() -> Callable[[], float]:
            nonlocal peak, steps
            steps += 1
            if steps <= STEPS_TO_WARM_UP + 1:
                peak = max(peak, held + 100)
            return lambda: 1.0

        held += 10
        return step

    def timed(step: Step, *_: object) -> float:
        assert steps > STEPS_TO_WARM_UP + 1
        return 1.0

    def reset(*_: object) -> None:
        nonlocal peak
        peak = held

    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: held)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: peak)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    monkeypatch.setattr(train_step, "seconds_of", timed)
    monkeypatch.setattr(Trial, "_all_fit", lambda *_: True)
    run = trial()
    run.device = torch.device("cuda")
    run.run({"ours": recorded}, Path(), lambda _: None)
    assert (run.sides["ours"].peak_bytes, len(run.sides["ours"].rates)) == (110, 3)


def test_no_round_times_a_compilation_even_after_another_sides_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled, timing = [], False
    real_compile, real_seconds = torch.compile, train_step.seconds_of

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., object]:
        compiled.append(timing)
        return graph.forward

    def timed(*given: Any) -> float:
        nonlocal timing
        timing = True
        try:
            return real_seconds(*given)
        finally:
            timing = False

    monkeypatch.setattr(torch, "compile", lambda model: real_compile(model, backend=backend))
    monkeypatch.setattr(train_step, "seconds_of", timed)
    run = trial(batch=2, rounds=2, steps=1)
    write_tokens(file := tmp_path / "tokens.bin", run.config.vocab_size)
    run.run({"ours": build, "compiled": partial(plain, compiled=True), "other": missing}, file, lambda _: None)
    assert len(run.sides["compiled"].rates) == 2
    assert compiled == [False, False], "once for the warm-up, once after the caches were emptied"


def test_the_sides_train(tmp_path: Path) -> None:
    file = tmp_path / "tokens.bin"
    run = trial(batch=2, rounds=2, steps=1)
    write_tokens(file, run.config.vocab_size)
    saved: list[int] = []
    save: Callable[[Trial], None] = lambda trial: saved.append(len(trial.sides))  # noqa: E731
    run.run(contenders(on_gpu=False, compiled=False), file, save)
    for name in ("ours", "ours in fp32", "plain, eager"):
        side = run.sides[name]
        assert side.step is not None, side.problem
        assert len(side.rates) == 2
        losses = [side.step()() for _ in range(30)]
        assert losses[-1] < losses[0]
    assert saved == [1, 2, 3, 3, 3]


def test_only_the_tuned_side_has_the_kernels_that_were_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, usual = trial().config, auto_backends()["embedding"]
    if usual == "reference":
        pytest.skip("the extension is not built")
    write_tokens(file := tmp_path / "tokens.bin", config.vocab_size)
    chosen: dict[str, dict[str, Any]] = {"embedding": {"chosen": Candidate("reference").plain()}}
    chosen["embedding"] |= {"seconds": {"chosen": [0.1, 0.2], "default": [0.2, 0.4]}, "date": "2026-11-30"}

    def tune(questions: object, *, seconds: float, say: Callable[[str], object]) -> dict[str, Any]:
        say("rope: keeps its default, since there was no time left")
        return chosen

    monkeypatch.setattr(train_step, "tune", tune)
    said: list[str] = []
    tuned, default = (ours(config, file, 2, CPU, tune_seconds=seconds, say=said.append) for seconds in (1.0, 0.0))
    assert said[0] == said[3] == str(pick_precision("auto", CPU, config))
    assert said[1].startswith("rope: keeps its default")
    assert said[2].startswith("embedding: reference: forward + backward 100 + 200 ms, 2.00 times as fast as by default")
    try:
        used = [(step()(), auto_backends()["embedding"])[1] for step in (tuned, default, tuned)]
        assert used == ["reference", usual, "reference"]
    finally:
        install({})


def test_a_step_that_its_name_does_not_describe_is_not_timed(tmp_path: Path) -> None:
    run = trial(batch=2, rounds=1, steps=1)
    write_tokens(file := tmp_path / "tokens.bin", run.config.vocab_size)
    with pytest.warns(SptWarning, match="could not be recorded"):
        run.run({"in fp8": partial(ours, fp8=True), "graphs": partial(ours, graphs=True)}, file, lambda _: None)
    assert "none of the blocks' matmuls is wide enough for fp8" in run.sides["in fp8"].problem
    assert "a step could not be recorded as a CUDA graph" in run.sides["graphs"].problem


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--dry", "--no-compile", "--sides", "plain, compiled"], "plain, compiled is invalid: expected some of ours,"),
        (["--dry", "--sides", "ours by default"], "ours by default is invalid"),
        (["--graphs"], "--graphs needs a GPU"),
    ],
)
def test_options_that_would_have_no_effect_are_refused(
    arguments: list[str], problem: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["train_step", *arguments])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpt, "FP8_WIDTH", gpt.FP8_WIDTH)  # --dry changes it
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    with pytest.raises(SystemExit):
        train_step.main()
    assert problem in capsys.readouterr().err


def test_a_side_that_stopped_says_so_beside_its_figure() -> None:
    run = trial()
    run.run({"ours": build}, Path(), lambda _: None)
    run.sides["ours"].problem = "out of memory after 3 rounds"
    run.sides["ours"].rates = [5.0, 5.0, 5.0]
    assert run.report()["sides"]["ours"]["stopped"] == "out of memory after 3 rounds"
    assert "| ours | 2 | 5 [5, 5] of 3, out of memory after 3 rounds |" in table(run.report())


def test_on_a_cpu_ours_is_judged_by_the_fastest_dtype_of_the_compiled(tmp_path: Path) -> None:
    sides = contenders(on_gpu=False, compiled=True)
    assert [name for name in sides if "compiled" in name] == [
        "plain, compiled",
        "plain, compiled in bf16",
        "plain, compiled in fp32",
    ]
    run = trial(batch=2, rounds=1, steps=1)
    write_tokens(file := tmp_path / "tokens.bin", run.config.vocab_size)
    for dtype in (torch.bfloat16, torch.float32):
        loss = plain(run.config, file, 2, CPU, compiled=False, dtype=dtype)()()
        assert loss == pytest.approx(math.log(run.config.vocab_size), rel=0.05)
    run.run(dict.fromkeys(sides, build), Path(), lambda _: None)
    for rate, name in enumerate(run.sides, 1):
        run.sides[name].rates = [float(rate)]
    assert f"plain, compiled in fp32: ours is {1 / len(sides):.2f}x." in table(run.report())


def test_the_parts_of_the_hosts_time_are_parts_of_its_step() -> None:
    """Counted, not timed: on a busy machine a part can take longer than a step."""

    class Count(TorchDispatchMode):
        ops = 0

        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.ops += 1
            return op(*args, **kwargs or {})

    ops = {}
    for part, run in host_time.parts(1).items():
        run()
        with Count() as count:
            run()
        ops[part] = count.ops
    assert ops["forward"] < ops["forward and backward"]
    assert min(ops.values()) > 0
    assert ops["forward and backward"] + ops["gradient norm"] + ops["update"] <= ops["step"]


def test_the_hosts_time_is_the_least_and_the_median(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = [5.0, 1.0, 2.0]
    times = iter([at for second in taken for at in (0.0, second)])
    monkeypatch.setattr(host_time.time, "process_time", lambda: next(times))
    assert host_time.seconds(lambda: None, len(taken)) == (1.0, 2.0)
