"""Names and signs that a terminal, a picture or a board could read as something else: each shows them as they are."""

from __future__ import annotations

import ast
import errno
import io
import os
import re
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from rich.table import Table
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from spt_fast import cli
from spt_fast.errors import SptWarning, counted
from spt_fast.printing import print_facts, print_grid, print_message, print_note, print_table, set_up, terminal
from spt_fast.progress import Screen
from spt_fast.quantities import heading, read
from spt_fast.report.panels import panel
from spt_fast.study.behind import Behind
from spt_fast.study.compare import compare
from spt_fast.study.figures import draw_comparison
from spt_fast.study.sweep import Swept, print_swept
from tests import tiny
from tests.study.fake_runs import fake_run

ROOT = Path(__file__).parents[1]
ODD = ("chem[small]", "d[/v2]", ":smile:", "[red]x", "a/b", "$x_{", "<b>&amp;", "-", "50%")


def test_a_table_shows_names_as_they_are(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    long = "/".join(ODD * 3)
    print_facts(terminal(), long, dict.fromkeys(ODD, "d[/v2]") | {"v" * 50: 1})
    shown = capsys.readouterr().out
    assert shown.splitlines()[0] == long  # neither wrapped nor cut
    assert all(name in shown for name in ODD)
    assert shown.count("v") >= 50 + len(ODD)
    monkeypatch.setenv("COLUMNS", "0")
    print_facts(terminal(), "a", {"b": 1})
    assert "b" in capsys.readouterr().out


@pytest.mark.parametrize("width", [50, 80, 120])
def test_a_table_fits_the_terminal_and_its_numbers_are_for_people(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    columns = ["stage", "runs", "tokens", "flops", "hours", "cost", "evaluation_hours"]
    name = "finetune-of-the-first-corpus-with-replay-and-anchor"
    print_table(terminal(), "", columns, [[name, 1234, 110_123_456, 1.78e18, 0.2, 3.14159, None]])
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= width
    for figure in ("1,234", "110M", "1.78e18 FLOPs", "12 min", "$3.14", "n/a"):
        assert figure in shown, shown
    assert "evaluation" in shown
    if width == 80:
        cut = next(word for word in shown.split() if "…" in word)
        assert name.startswith(cut.partition("…")[0])
        assert name.endswith(cut.partition("…")[2])
    else:
        assert name in re.sub(r"[│\s]", "", shown)


@pytest.mark.parametrize(("width", "whole"), [(45, False), (60, True)])
def test_a_grid_that_does_not_fit_becomes_lists(
    width: int, whole: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    table = Table("arm", "forget-\nting", "domain\nafter", "general\nbefore", "general\nafter", title="losses…")
    table.add_row("SPT 20%", "0.353\n±0.010", "2.791\n±0.001", "6.1612", "6.5141")
    print_grid(terminal(), table)
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= width
    assert shown.count("…") == 1
    assert ("forget-" in shown) is whole
    assert ("│ forgetting     │ 0.353 ±0.010 │" in shown) is not whole
    for words in ("losses…", "SPT 20%", "2.791", "6.5141"):
        assert words in shown


def test_names_of_runs_and_ops_are_not_taken_for_fields(capsys: pytest.CaptureFixture[str]) -> None:
    failed = {"1x32_pretrain_s": "out of memory"}
    swept = Swept(Path("s"), 2, 1, failed, left_out=0, interrupted=False, table=pd.DataFrame())
    print_swept(swept, "s", terminal())
    shown = capsys.readouterr().out
    assert re.search(r"│ 1x32_pretrain_s +│ out of memory", shown)
    assert re.search(r"│ done +│ 1 ", shown)


def test_a_notebook_gets_plain_text(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)  # as a kernel says
    assert not terminal(stderr=True).is_terminal
    terminal(stderr=True).print("step 1")
    assert capsys.readouterr().err == "step 1\n"


def test_quantities_are_written_for_people() -> None:
    for name, value, said in (
        ("step_s", 0.0123, "12 ms"),
        ("seconds", 8.0, "8 s"),
        ("seconds", 100.0, "1.7 min"),
        ("hours", 59.92, "2.5 days"),
        ("hours", 4.096, "4.1 h"),
        ("flops_per_token", 6.6e8, "6.60e8 FLOPs"),
        ("peak_flops", 989.4e12, "989.4 TFLOP/s"),
        ("flops", 0, "0 FLOPs"),
        ("memory_bytes", 80e9, "80 GB"),
        ("bytes", 999, "999 bytes"),
        ("bytes", 1, "1 byte"),
        ("tokens", 99_999, "99,999"),
        ("tokens", 999_999, "1M"),
        ("tokens_per_s", 12_345.6, "12.3K tok/s"),
        ("mb_per_s", 12.345, "12.3 MB/s"),
        ("cost", 1234.5, "$1,234"),
        ("vocab_size", 128_256, "128,256"),
        ("loss", float("nan"), "nan"),
        ("hours", float("nan"), "nan"),
        ("untie", True, "yes"),
        ("domain_share", 0.125, "12.5%"),
    ):
        assert read(name, value) == said, (name, value)
    names = ("step_s", "evaluation_hours", "hours", "flops", "memory_bytes", "tokens_per_s", "mb_per_s", "R_gain")
    assert [*map(heading, names)] == [
        *("step", "evaluation", "time", "compute", "memory", "tokens per s", "speed", "R gain")
    ]


def test_one_of_a_kind_is_said_in_the_singular() -> None:
    assert [counted(1, "process"), counted(2000, "process"), counted(0, "token")] == [
        "1 process",
        "2,000 processes",
        "0 tokens",
    ]
    assert [counted(number, "token", "are") for number in (1, 2)] == ["1 token is", "2 tokens are"]
    assert Behind(documents=1, tokens=1, standard_error=None).size == "1 document, 1 token"


def test_every_line_goes_through_a_terminal_without_markup() -> None:
    sources = {path: path.read_text() for path in (ROOT / "spt_fast").rglob("*.py")}
    assert {path.name for path, text in sources.items() if re.search(r"\bConsole\(", text)} == {"printing.py"}
    assert {path.name for path, text in sources.items() if "rich.progress import" in text} == set()


def test_text_in_files_is_utf_8_whatever_the_terminal() -> None:
    calls = [
        (path.name, call.lineno)
        for path in (ROOT / "spt_fast").rglob("*.py")
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call) and getattr(call.func, "attr", "") in ("read_text", "write_text")
        if "encoding" not in [keyword.arg for keyword in call.keywords]
    ]
    assert calls == []


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_without_a_sign_gets_ascii(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding))
    set_up()
    print_facts(terminal(), "memory (→ this recipe)", {"δ": "\udcff", "loss": "3.141 ± 0.002 · 2−1"})
    sys.stdout.flush()
    assert b"memory (-> this recipe)" in written.getvalue()
    signs = "± {} ·" if encoding == "latin-1" else "+- {} -"
    assert f"3.141 {signs} 2-1".format("0.002").encode(encoding) in written.getvalue()
    assert b"\\u03b4" in written.getvalue()
    assert b"\\udcff" in written.getvalue()


def test_a_run_of_sources_with_odd_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained, evaluated, audited; on the board each under its own tag."""
    tiny.write_corpora(tmp_path)
    raw = tiny.raw_recipe(tmp_path, "run[/x] $y_{")
    names = [name for name in ODD if name != "-"]
    raw["sources"] = {name: raw["sources"]["general"] for name in names}
    phase = raw["phases"][0] | {"tokens": 8 * tiny.CONTEXT, "mixture": dict.fromkeys(names, f"1/{len(names)}")}
    raw["phases"] = [phase | {"eval": {"every": "100%", "tokens": 32}}]
    recipe = tiny.write_recipe(tmp_path, raw)
    run = Path(raw["run"])
    for words in (["plan", recipe], ["train", recipe], ["audit", run], ["eval", run, "--data", tmp_path / "general"]):
        monkeypatch.setattr(sys, "argv", ["spt-fast", *map(str, words)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        assert not exit_.value.code
    board = EventAccumulator(str(run / "tensorboard")).Reload()
    assert {f"heldout/{name}" for name in names} <= set(board.Tags()["scalars"])


def test_a_dollar_in_a_name_starts_no_formula(tmp_path: Path) -> None:
    runs = [fake_run(tmp_path / "a", [(7.0, 5.0), (6.0, 6.0)]), fake_run(tmp_path / "b", [(6.0, 5.0), (5.0, 6.0)])]
    draw_comparison(replace(compare(runs[:1]), domain="$x_{$", general="<b>"), tmp_path / "c.png")
    drawn = panel("$x_{$", "<b>", lambda axes: axes.set_ylabel("held-out $x_{$ <b>"))
    assert "held-out $x_{$ &lt;b&gt;" in drawn.svg


def test_pictures_need_no_backend() -> None:
    """matplotlib is imported in one place, which holds where the backend that a notebook names isn't installed."""
    importing = [path.name for path in (ROOT / "spt_fast").rglob("*.py") if "import matplotlib" in path.read_text()]
    importing += [path.name for path in (ROOT / "spt_fast").rglob("*.py") if "from matplotlib" in path.read_text()]
    assert set(importing) == {"drawing.py"}
    environment = os.environ | {"MPLBACKEND": "module://no_such_package.backend_inline", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", "import spt_fast.study.drawing"], env=environment, check=True)


def test_on_a_terminal_messages_wrap_at_words_and_elsewhere_they_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    message = f"spt-fast: {'a' * 30}/recipe.yaml: cannot be read; give the path of a recipe in YAML"
    monkeypatch.setenv("COLUMNS", "60")
    print_message(message)
    print_note(terminal(), message)
    assert capsys.readouterr() == (f"{message}\n", f"{message}\n")
    monkeypatch.setenv("FORCE_COLOR", "1")
    print_message(message)
    print_note(terminal(), message)
    printed, wrapped = capsys.readouterr()
    assert wrapped.split() == message.split()
    assert [len(line) <= 60 for line in wrapped.splitlines()] == [True, True]
    assert printed == wrapped


def test_errors_and_warnings_wrap_on_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    set_up()
    text = warnings.formatwarning(SptWarning("no place " * 20), SptWarning, "f.py", 3)
    assert max(map(len, text.splitlines())) <= 60
    monkeypatch.setattr(sys, "argv", ["spt-fast", "train", "nothere.yaml"])
    with pytest.raises(SystemExit):
        cli.main()
    assert max(map(len, capsys.readouterr().err.splitlines())) <= 60


def test_our_warnings_are_sentences_and_others_are_as_python_writes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warnings, "formatwarning", usual := warnings.formatwarning)
    set_up()
    assert warnings.formatwarning(SptWarning("no place for x"), SptWarning, "f.py", 3) == (
        "spt-fast: warning: no place for x\n"
    )
    theirs = ("old", DeprecationWarning, "f.py", 3)
    assert warnings.formatwarning(*theirs) == usual(*theirs)


@pytest.mark.parametrize("code", [errno.EPIPE, errno.EIO, errno.ENOSPC, None])
def test_what_cannot_be_printed_about_a_run_is_lost_without_an_error(
    code: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pipe that nothing reads, a terminal that was closed, a log on a full disk, a standard error that is missing."""

    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(code, "gone")

    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None if code is None else Gone())
    terminal(stderr=True).print("step 1")
    terminal(lasting=True).print("done")
    print_message("stopped")
    with Screen() as screen:
        screen.say("a note")
