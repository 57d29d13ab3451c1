"""The tuner: planted candidates are judged rightly, and what was found is kept for as long as it holds."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from spt_fast import kernels
from spt_fast.errors import SptWarning
from spt_fast.kernels import child, judging, launch, measured, tuner
from spt_fast.kernels.backend import OPS, Candidate, install
from spt_fast.kernels.judging import Question
from spt_fast.kernels.launch import Config
from spt_fast.kernels.trials import TRIALS, Shape, questions, trial, trial_of
from spt_fast.kernels.tuner import chosen, describe, known, tune
from tests.kernels import planted

SHAPE = Shape(
    sequences=2,
    context=24,
    width=32,
    heads=4,
    kv_heads=2,
    head_dim=16,
    ffn=48,
    vocab_size=101,
    window=None,
    documents=True,
    parameters=1000,
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def question(tmp_path: Path, *candidates: str, op: str = "double", **changes: Any) -> Question:
    shape = {"rows": 300, "candidates": candidates}
    fields = {"dtype": "float32", "device": "cpu", "deterministic": False} | changes
    return Question(op, "tests.kernels.planted:trial", shape, shape | {"rows": 4}, **fields)


def test_every_candidate_is_judged_and_none_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "STUCK_S", 1.5)
    names = ["exits", "wrong", "raises", "hangs", "unstable", "infinite", "segfaults", "slow", "quick", "sdpa"]
    record = tune([question(tmp_path, *names)], seconds=150)["double"]
    tried = record["tried"]
    assert tried["exits"] == "ended its process (exit code 3)"
    assert tried["segfaults"] == "ended its process (SIGSEGV)"
    assert tried["raises"] == "raises RuntimeError: no such instruction"
    assert tried["wrong"].startswith("has an error of 0.")
    assert tried["hangs"] == "took longer than 2 s"
    assert tried["unstable"] == "gives other bits the second time"
    assert isinstance(tried["sdpa"], float), "it may, unless a run asks for equal bits"
    assert tried["infinite"] == "gives numbers that are not finite"
    assert tried["slow"] > tried["auto"] > tried["quick"] > 8
    best = Candidate.read(record["chosen"])
    assert best == Candidate("quick", (*planted.tuned("one", 2000).launches, *planted.tuned("two", 1000).launches))
    assert str(best) == "quick, one with SLEEP_US 2,000, BYTES 9, two with SLEEP_US 1,000, BYTES 9"
    assert Candidate.read(record["default"]) == Candidate("auto")
    assert describe(record).startswith("forward + backward ")
    assert " times as fast as by default, measured 20" in describe(record)
    assert chosen({"double": record}) == {"double": best}


def test_the_default_stays_unless_it_is_beaten_clearly_or_broken(tmp_path: Path) -> None:
    def answer(*seconds: float | str) -> dict[str, Any]:
        class Child:
            def start(self) -> None:
                pass

            def ask(self, request: dict[str, Any], ends: float) -> Any:
                yield {"candidates": [Candidate(f"c{i}").plain() for i in range(len(seconds))]}
                for i, each in enumerate(seconds):
                    yield {"problems": [[i, each]]} if isinstance(each, str) else {"seconds": [[i, [each, 0.0]]]}

        said: list[str] = []
        found = tuner._decide(question(tmp_path), Child(), 9.0, said.append)  # type: ignore[arg-type]
        return {"chosen": found["chosen"]["backend"], "said": said}

    assert answer(1.0, 0.98, 1.2) == {"chosen": "c0", "said": []}
    with pytest.raises(tuner.Undecided, match="there was time for the default alone"):
        answer(1.0, judging.NOT_REACHED)
    assert answer(1.0, 0.96, judging.NOT_REACHED)["chosen"] == "c1"
    assert answer(1.0, 0.96, 0.95) == {"chosen": "c2", "said": []}
    assert answer("errs", 5.0, 2.0) == {"chosen": "c2", "said": ["double: c0 errs; c2 is used"]}
    with pytest.raises(tuner.Undecided, match="c0 errs; c1 raises"):
        answer("errs", "raises")


def test_a_gpu_is_timed_while_it_is_kept_busy_for_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the time of a short op is that of its launches."""
    order: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            order.append("record")

        def synchronize(self) -> None:
            order.append("synchronize")

        def elapsed_time(self, end: Event) -> float:
            return 2.5  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: order.append("sleep"))
    taken = measured.medians([lambda: order.append("work")], rounds=1, seconds=0, clock=measured.gpu_seconds)
    assert taken == [0.0025]
    assert order == ["sleep", "record", "work", "record", "synchronize"]


def test_records_hold_for_what_they_were_measured_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decided: list[str] = []

    def decide(asked: Question, *_: Any) -> dict[str, Any]:
        decided.append(asked.op)
        time.sleep(0.1)
        plain = Candidate(f"c{len(decided)}").plain()
        return {"date": "2026", "chosen": plain, "default": plain, "seconds": {"chosen": [1.0], "default": [1.0]}}

    monkeypatch.setattr(tuner, "_decide", decide)
    asked = question(tmp_path)
    assert known([asked]) == {}
    first = tune([asked], seconds=30)
    assert known([asked]) == tune([asked], seconds=30) == first
    assert len(decided) == 1
    assert known([question(tmp_path, deterministic=True)]) == {}
    assert known([question(tmp_path, dtype="bfloat16")]) == {}
    assert known([question(tmp_path, "slow")]) == {}
    monkeypatch.setattr(tuner, "kernels_digest", lambda: "other kernels")
    assert known([asked]) == {}

    found: list[Any] = []
    both = [threading.Thread(target=lambda: found.append(tune([asked], seconds=30))) for _ in range(2)]
    [each.start() for each in both]
    [each.join() for each in both]
    assert found[0] == found[1]
    assert len(decided) == 2, "the second waits for what the first finds"
    (file,) = [each for each in (tmp_path / "cache" / "spt_fast").glob("*.json") if "other kernels" in each.read_text()]
    whole = json.loads(file.read_text())
    for damaged in ("{", "[]", "[" * 10**5, *damages(whole)):
        file.write_text(damaged)
        with pytest.warns(SptWarning, match="is damaged .* it is ignored"):
            assert known([asked]) == {}
    with pytest.warns(SptWarning, match="is damaged"):
        assert tune([asked], seconds=30)["double"]["chosen"]["backend"] == "c3"
    assert tune([asked], seconds=30)["double"] == known([asked])["double"]
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")
    cannot = r"^/proc/none/spt_fast: measurements cannot be kept there \(.*\), so .*; set XDG_CACHE_HOME to a"
    with pytest.warns(SptWarning, match=cannot):
        assert tune([asked], seconds=30)["double"]["chosen"]["backend"] == "c4"
    assert known([asked]) == {}


def damages(whole: dict[str, Any]) -> Iterator[str]:
    """A record without each of its parts, or with something else in its place."""
    for part in whole["found"]:
        for other in ({}, {part: None}, {part: 3}):
            left = {key: value for key, value in whole["found"].items() if key != part}
            if part != "date" or not other:
                yield json.dumps(whole | {"found": left | other})
    yield json.dumps(whole | {"found": None})
    for part, other in (
        ("chosen", {"backend": None, "launches": []}),
        ("seconds", {"chosen": [], "default": [1.0]}),
        ("seconds", {"chosen": [10**400, 0.1], "default": [1.0]}),
    ):
        yield json.dumps(whole | {"found": whole["found"] | {part: other}})


def test_an_op_that_time_does_not_suffice_for_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    assert tune([question(tmp_path)], seconds=0, say=said.append) == {}
    assert tune([question(tmp_path, "hangs")], seconds=60, say=said.append, stop=lambda: True) == {}
    monkeypatch.setattr(child.sys, "executable", "/bin/false")
    assert tune([question(tmp_path)], seconds=9, say=said.append) == {}
    reasons = ("there was no time left", "the run was asked to stop", "what tries it cannot be started")
    assert said == [f"double: keeps its default, since {reason}" for reason in reasons]


def test_what_is_installed_is_what_auto_means() -> None:
    before = kernels.auto_backends()
    config = Config((("M", 64),), 4, 2)
    install({"rms_norm": Candidate("reference", (("norm_forward", (64, 2), config),))})
    assert kernels.auto_backends() == before | {"rms_norm": "reference"}
    assert launch.launched("norm_forward", (64, 2), Config((), 1)) == config
    install({"rms_norm": Candidate("abacus"), "swiglu": Candidate("auto")})
    assert kernels.auto_backends() == before
    assert launch.launched("norm_forward", (64, 2), Config((), 1)) == Config((), 1)
    install({})


@pytest.mark.parametrize("op", sorted(TRIALS))
def test_every_op_of_the_trials_is_tried_as_its_candidates_say(op: str) -> None:
    """In this process, without a clock: the same checks as in the child."""
    (asked,) = questions([op], SHAPE, torch.bfloat16, torch.device("cpu"), deterministic=True)
    made = trial(op, asked.shape, torch.bfloat16, torch.device("cpu"))
    assert op in OPS
    assert made.candidates[0] == Candidate("auto")
    assert "reference" in {OPS[op].pick("auto", made.inputs[0]), *(one.backend for one in made.candidates)}
    check = judging.checker(op, trial(op, asked.small, torch.bfloat16, torch.device("cpu")))
    try:
        for candidate in made.candidates:
            assert check(candidate) is None
            assert judging.unstable(op, made, candidate, True) is None
            assert Candidate.read(candidate.plain()) == candidate
    finally:
        install({})


@pytest.mark.skipif(not launch.INTERPRETED, reason="Triton's kernels are run by its interpreter here")
@pytest.mark.parametrize("op", ["adamw_step", "add_rms_norm", "swiglu_packed", "swiglu_mlp", "fp8_linear"])
def test_launches_that_are_tried_compute_the_same(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by default; here, where a GPU is only said to be there."""
    shape = replace(SHAPE, sequences=4, width=64, ffn=288, parameters=3000 + 8)
    made = trial_of(op, shape, torch.float32, torch.device("cpu"))
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    tried = OPS[op].launches(*made.inputs)
    monkeypatch.undo()
    default = judging._results(op, made, Candidate("triton"), made.inputs)
    try:
        assert len(tried) > 2
        for candidate in tried:
            (((_, _, config),), asked) = candidate.launches, []
            monkeypatch.setattr(launch, "_chosen", Seen(asked))
            found = judging._results(op, made, candidate, made.inputs)
            torch.testing.assert_close(found, default, msg=str(candidate))
            assert config in asked, candidate
    finally:
        install({})


class Seen(dict):
    """What was chosen, and which of it launches have taken."""

    def __init__(self, asked: list[Config]) -> None:
        super().__init__()
        self.asked = asked

    def get(self, key: Any, default: Any = None) -> Any:
        self.asked.append(super().get(key, default))
        return self.asked[-1]
