"""What a long command shows while it works, at every width, on a terminal and in a pipe."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from spt_fast import progress
from spt_fast.config import load_recipe
from spt_fast.data.tokenizer import train_tokenizer
from spt_fast.printing import print_message
from spt_fast.progress import Line, Screen, Steps, be_quiet, progress_of, time_left
from spt_fast.train.metrics import RunLog
from spt_fast.train.run import run
from spt_fast.train.trackers import Followed
from tests import tiny

PARTS = ("finetune 1/3", "step 1200/4800", "loss 3.214", "chem 2.981", "ETA 12 min", "12.3K tok/s", "41.2% mfu[x]")
CLOCK = r"\d\d:\d\d:\d\d "


@pytest.mark.parametrize(("width", "shown"), [(20, 1), (30, 2), (40, 3), (60, 5), (80, 6), (120, 7)])
def test_a_line_keeps_the_most_important_parts(width: int, shown: int) -> None:
    line = Line(PARTS, 0.25)
    text = line.fit(width)
    assert len(text) <= width
    title, *figures = re.split(" · |  ", text)
    assert figures == [*PARTS[1:shown]]
    assert title == PARTS[0] or "…" in title
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(line.render(width))
    (row,) = console.export_text().splitlines()
    assert row.startswith(text)
    assert ("━" in row) == (width == 120)


def test_a_long_title_is_cut_in_the_middle_before_a_figure_is_dropped() -> None:
    text = Line(["a-phase-of-a-rather-long-name 12/16", *PARTS[1:6]]).fit(80)
    assert text.startswith("a-phase…e 12/16  step")
    assert text.endswith("ETA 12 min  12.3K tok/s")
    assert Line(["語" * 30, "x"]).fit(20).endswith("  x")


def fake_clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_the_time_left_is_that_of_the_whole_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = fake_clock(monkeypatch)
    steps = Steps()
    steps.begin("pretrain", 0, 101, work=202.0, after=100.0)
    now[0] = 300.0  # an evaluation, then a step that compiles: no pace
    steps.advance(1)
    steps.show(1, ["loss 3.100"])
    now[0] = 360.0
    steps.advance(51)
    steps.show(51, ["loss 3.000"])
    now[0] = 420.0
    steps.advance(101)
    steps.begin("finetune", 5, 10, work=100.0)  # half of it was done before
    steps.show(5, [])
    steps.close()
    unknown, first, second = capsys.readouterr().err.splitlines()
    assert unknown.endswith("step 1/101 · loss 3.100")
    assert re.fullmatch(CLOCK + r"pretrain · step 51/101 · loss 3\.000 · ETA 2 min", first)
    assert second.endswith("finetune · step 5/10 · ETA 30 s")
    assert time_left(5.0, 0.0, 1.0) == ""
    assert time_left(5.0, 1.0, 1e-12) == ""


def test_without_a_terminal_lines_are_plain_and_rare(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = fake_clock(monkeypatch)
    with progress_of("prepare chem", 1000, says=lambda done, elapsed_s: f"{done / elapsed_s:.0f}/s") as advance:
        for _ in range(10):
            now[0] += 9.0
            advance(100)
    *shown, last = capsys.readouterr().err.splitlines()
    assert len(shown) == 2
    assert last.endswith("prepare chem · done in 90 s · 11/s")
    assert all(re.fullmatch(CLOCK + r"prepare chem · \d0% · ETA .* · 11/s", line) for line in shown), shown


def test_on_a_terminal_names_are_unchanged_and_no_line_remains(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Console, "is_terminal", property(lambda _: True))
    monkeypatch.setenv("COLUMNS", "80")
    with Screen() as screen:
        screen.update(Line(["d[/v2]", "held out: chem[small] 1.000"], 0.5))
        assert screen._live is not None
        screen._live.refresh()
        screen.say("warning: a[/b]")
        shown = capsys.readouterr().err
        print_message("spt-fast: a message")
        above = capsys.readouterr().err
    assert re.fullmatch(r"\r\x1b\[2K.*spt-fast: a message\n.*held out: chem\[small\].*", above, re.DOTALL), (
        "not in the line"
    )
    shown += above + capsys.readouterr().err
    assert all(words in shown for words in ("d[/v2] · held out: chem[small] 1.000", "━━", "warning: a[/b]"))
    assert shown.endswith("\x1b[2K")  # the line is wiped


def test_quiet_keeps_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    be_quiet(True)
    try:
        with Screen() as screen:
            screen.say("resuming\nwarning: other kernels")
            screen.update(Line(["x"]), plain=True)
        with Screen(show=False) as silent:
            silent.say("warning: of another process")
    finally:
        be_quiet(False)
    assert capsys.readouterr().err == "warning: other kernels\n"


def test_a_run_in_a_pipe_says_a_line_for_each_logged_step_and_evaluation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.write_corpora(tmp_path)
    raw = tiny.raw_recipe(tmp_path) | {"log": {"every": "5 steps"}}
    run(load_recipe(tiny.write_recipe(tmp_path, raw)))
    shown = [line for line in capsys.readouterr().err.splitlines() if re.match(CLOCK, line)]
    steps = [line for line in shown if "tok/s" in line]
    assert [re.search(r"pretrain · step (\d+)/30 ", line)[1] for line in steps[:3]] == ["5", "10", "15"]  # type: ignore[index]
    assert re.search(r"loss \d\.\d{3} · chem \d\.\d{3} · ETA \S+ m?s · [0-9.]+K? tok/s$", steps[1]), steps[1]
    assert any(re.search(r"finetune [12]/2 · step 5/16 ", line) for line in steps)
    assert not any("mfu" in line for line in shown)
    evaluations = [line for line in shown if " ± " in line]
    assert re.search(r"pretrain · step 0 · chem \d\.\d{3} ± \S+ · general \d\.\d{3} ± \S+$", evaluations[0])
    assert max(map(len, evaluations)) <= 80
    assert [re.search(r"step (\d+)", line)[1] for line in evaluations[:4]] == ["0", "10", "20", "30"]  # type: ignore[index]


def test_mfu_is_shown_where_it_is_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.write_corpora(tmp_path)
    recipe = load_recipe(tiny.write_recipe(tmp_path, tiny.raw_recipe(tmp_path)))
    log = RunLog(Followed(tmp_path, recipe, {}, None), [], keep_bytes=0, progress=True, mfu_label="bf16")
    record = {"phase": "p", "step": 1, "loss": float("inf"), "lr": 0.1, "grad_norm": 1.0, "tokens_per_s": 1e6}
    log.begin("p", 0, 2)
    log.train(record | {"mfu": 0.4123, "skipped": 2, "tokens": 8, "arm": 0}, 1)
    log.close()
    assert "loss not finite · skipped steps: 2 · 1M tok/s · 41.2% mfu[bf16]" in capsys.readouterr().err


def test_training_a_tokenizer_shows_its_progress(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "PLAIN_LINE_EVERY_S", 0.0)
    (tmp_path / "a.txt").write_text("some words and more words " * 50)
    train_tokenizer([str(tmp_path / "a.txt")], 260, tmp_path / "t.tiktoken")
    shown = capsys.readouterr().err.splitlines()
    assert re.fullmatch(CLOCK + r"tokenizer t\.tiktoken · 1\.3K characters read", shown[0])
    assert shown[-1].endswith("1.3K characters read · learning the merges")
