"""The command line as a user meets it: one message and the right exit code for whatever goes wrong."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_type_hints

import pytest
import typer
from typer.testing import CliRunner

import spt_fast as spt
from spt_fast import cli, fields, library
from spt_fast.cli import flags
from spt_fast.cli.flags import in_flags
from spt_fast.cli.program import checkpoint_app, tokenizer_app
from spt_fast.data import tokenizer
from spt_fast.errors import LONGEST, RecipeError, SptError
from spt_fast.library import Evaluation
from spt_fast.model.gpt import GPT, GPTConfig
from spt_fast.study import doge, figures, findings, fits
from spt_fast.train import metrics
from tests import tiny


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    tiny.write_corpora(tmp_path)
    raw = tiny.raw_recipe(tmp_path)
    raw["phases"] = raw["phases"][:1]
    return tiny.write_recipe(tmp_path, raw)


def said_on_failure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """Run the command, which must exit with 2 and say one line on stderr."""
    monkeypatch.setattr(sys, "argv", ["spt-fast", *map(str, words)])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    said = capsys.readouterr().err
    assert exit_.value.code == 2, said
    assert "Traceback" not in said
    return said


def full_disk(*args: Any, **kwargs: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Interrupting:
    """A field of a class that is interrupted while the class is created."""

    def __set_name__(self, owner: type, name: str) -> None:
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    "words", [("prepare", "a.jsonl", "--out", "d"), ("tokenizer", "train", "a.jsonl", "--out", "t")]
)
@pytest.mark.parametrize("in_a_class", [False, True])
def test_an_interrupted_command_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], in_a_class: bool
) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> None:
        if in_a_class:
            type("Imported", (), {"field": Interrupting()})
        raise KeyboardInterrupt

    monkeypatch.setattr(f"spt_fast.{words[0]}", interrupted)
    needed = ("--tokenizer", "t") if words[0] == "prepare" else ("--vocab-size", "300")
    monkeypatch.setattr(sys, "argv", ["spt-fast", *words, *needed])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert (exit_.value.code, capsys.readouterr().err) == (130, "spt-fast: interrupted\n")


def test_a_run_folder_that_is_a_file_or_below_one_is_refused(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (recipe.parent / "file").write_text("")
    said = said_on_failure(monkeypatch, capsys, "train", recipe, "--set", f"run={recipe.parent / 'file'}")
    assert "file is a file; choose another name" in said
    said = said_on_failure(monkeypatch, capsys, "train", recipe, "--set", f"run={recipe.parent / 'file' / 'run'}")
    assert f"{recipe.parent / 'file' / 'run'}: Not a directory" in said


def test_a_full_disk_while_metrics_are_written_is_reported(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(metrics, "json", SimpleNamespace(dumps=full_disk))
        said = said_on_failure(patch, capsys, "train", recipe)
    assert "metrics.jsonl: could not be written (No space left on device); make room" in said
    monkeypatch.setattr(sys, "argv", ["spt-fast", "train", str(recipe), "--resume"])
    cli.app(standalone_mode=False)
    assert (recipe.parent / "run" / "weights" / "pretrain").is_dir()


def test_a_full_disk_while_the_recipe_is_written_leaves_no_files(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("spt_fast.files.sync", full_disk)
        said = said_on_failure(patch, capsys, "train", recipe)
    assert f"{recipe.parent / 'run' / 'recipe.yaml'}: No space left on device" in said
    assert list(recipe.parent.glob("run/*")) == []


def test_a_full_disk_while_weights_are_exported_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = GPTConfig(layers=1, width=32, heads=2, kv_heads=1, ffn=64, context=16, vocab_size=64)
    GPT(config, seed=0).save_hf(tmp_path / "here")
    with monkeypatch.context() as patch:
        patch.setattr("spt_fast.model.hf.sync", full_disk)
        said = said_on_failure(patch, capsys, "import", tmp_path / "here", "--out", tmp_path / "there")
    assert "there: the weights could not be written" in said
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


@pytest.mark.parametrize(
    "words",
    [
        ("checkpoint", "list", "absent"),
        ("checkpoint", "verify", "absent"),
        ("train", "absent.yaml"),
        ("plan", "absent.yaml"),
        ("eval", "absent", "--data", "absent"),
        ("audit", "absent"),
        ("compare", "absent", "absent"),
        ("fit", "absent"),
        ("inspect", "absent"),
        ("generate", "absent"),
        ("export", "absent", "--out", "there"),
    ],
    ids=" ".join,
)
def test_missing_files_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    said = said_on_failure(monkeypatch, capsys, *words)
    assert said.startswith("spt-fast: ")
    assert "absent" in said
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_another_kind_is_named_with_its_remedy(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, study = recipe.parent / "file", recipe.parent / "study.yaml"
    file.write_text("")
    study.write_text("study: s\nstages: []\n")
    (recipe.parent / "run").mkdir()
    (recipe.parent / "run" / "summary.json").write_text('{"status": "stopped", "phases": {}}')
    pipe = recipe.parent / "weights" / "config.json"
    pipe.parent.mkdir()
    os.mkfifo(pipe)
    shape = GPTConfig(layers=1, width=16, heads=2, kv_heads=1, ffn=32, context=8, vocab_size=64)
    GPT(shape).save_hf(file.parent / "hf")
    for words, message in (
        (("sweep", recipe), f"{recipe}: is a recipe, not a study; train it with `spt-fast train`"),
        (("train", study), f"{study}: is a study, not a recipe; train its runs with `spt-fast sweep`"),
        (("compare", recipe.parent / "run"), "is 'stopped'; finish it with `spt-fast train --resume` or"),
        (("export", file.parent / "hf", "--out", file), f"--out: {file} is a file; name a folder"),
        (("demo", "--out", file), f"--out: {file} is a file; name a folder"),
        (("import", pipe.parent, "--out", "o"), "config.json: cannot be read as JSON ([Errno 22] Not a reg"),
        (("import", file.parent / "hf", "--out", file), f"--out: {file} is a file; name a folder"),
        (("plan", pipe), f"{pipe}: cannot be read (Not a regular file)"),
        (("import", file, "--out", "o"), f"{file}: is not a folder; give a Hugging Face model folder"),
        (("import", "./absent", "--out", "o"), "absent: does not exist; give a Hugging Face model folder"),
        (("compare", file.parent / "absent"), "absent: does not exist; give the folder of a finished run"),
        (("init", "--init", file, "--general", "g", "--domain", "d"), f"--init: {file}: is not a folder"),
        (("plan", recipe, "--set", "phases.0.mixture={a:1}"), "None is invalid: write a space after the colon"),
    ):
        assert message in said_on_failure(monkeypatch, capsys, *words)
    monkeypatch.setenv("WORLD_SIZE", "abc")
    said = said_on_failure(monkeypatch, capsys, "plan", recipe)
    assert said.startswith("spt-fast: WORLD_SIZE: 'abc' is invalid: a whole number")
    for write in (partial(figures.write, None), partial(fits.write, None)):
        with pytest.raises(SptError, match=r"out: .*file is a file; name a folder"):
            write(file)


def test_text_of_the_command_line_is_utf8_in_every_locale() -> None:
    assert flags.text("naïve") == flags.text("na\udcc3\udcafve") == "naïve"  # as Python reads it where that is ASCII
    with pytest.raises(typer.BadParameter, match="is not UTF-8"):
        flags.text("na\udcefve")


@pytest.mark.parametrize(("rank", "said"), [("0", "spt-fast: phase first: loss is nan\n"), ("1", "")])
def test_of_several_processes_the_first_says_why_a_run_failed(
    recipe: Path, rank: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failed = SimpleNamespace(status="failed", reason="phase first: loss is nan")
    monkeypatch.setattr("spt_fast.train", lambda *_, **__: failed)
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(sys, "argv", ["spt-fast", "train", str(recipe)])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert (exit_.value.code, capsys.readouterr().err) == (1, said)


@pytest.mark.parametrize("words", [("plan", "r.yaml", "--gpuss"), ("tokenizer", "--vocab"), ("tokenizer", "tran")])
def test_a_misuse_of_a_command_of_one_process_waits_for_no_other(
    words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spt_fast.train.world.join_world", lambda **_: pytest.fail("joins the others"))
    found = CliRunner().invoke(cli.app, words, env={"RANK": "0", "WORLD_SIZE": "2"})
    assert (found.exit_code, "No such " in found.output) == (2, True)


def test_internal_errors_are_not_reported_as_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spt_fast.train.tuning.chosen_backends", lambda: 1 / 0)
    monkeypatch.setattr(sys, "argv", ["spt-fast", "kernels"])
    with pytest.raises(ZeroDivisionError):
        cli.main()


@pytest.mark.parametrize(
    ("message", "argument", "said"),
    [
        ("gpu_memory: '80' is invalid: a size", True, "--gpu-memory: '80' is invalid: a size"),
        ("gpu: 'H1' is unknown", False, "gpu: 'H1' is unknown"),
        ("run: folder x exists; go on with `resume=True`", False, "run: folder x exists; go on with `resume=True`"),
        ("x: is empty; add `text_key=…` or `gpu=H100`", False, "x: is empty; add `text_key=…` or --gpu H100"),
        ("overrides: 'a' is invalid", True, "overrides: 'a' is invalid"),
    ],
)
def test_errors_speak_of_the_flags_of_the_command_that_runs(message: str, argument: bool, said: str) -> None:
    flags = {"gpu_memory": "--gpu-memory", "gpu": "--gpu"}
    assert in_flags(SptError(message, argument=argument), flags) == said


def test_flags_are_those_of_the_innermost_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise SptError("vocab_size: 7 is invalid: at least 257; or `skip_bad=True`", argument=True)

    monkeypatch.setattr(tokenizer, "train_tokenizer", refuse)
    words = ("tokenizer", "train", "x.txt", "--vocab-size", "7", "--out", tmp_path / "t")
    said = said_on_failure(monkeypatch, capsys, *words)
    assert said == "spt-fast: --vocab-size: 7 is invalid: at least 257; or --skip-bad\n"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--temperature", -1), "--temperature: -1.0 is invalid: write a number of at least 0"),
        (("--temperature", "nan"), "--temperature: nan is invalid"),
        (("--top-k", 0), "--top-k: 0 is invalid: write a whole number of at least 1"),
        (("--tokenizer", "nosuch"), "--tokenizer: 'nosuch' is invalid: give a file of ranks, the path of a Hugging"),
    ],
)
def test_invalid_flags_of_generate_are_refused(
    flags: tuple[object, ...],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    train_text = tmp_path / "a.txt"
    train_text.write_text("some words and more words " * 50)
    ranks = tmp_path / "t.tiktoken"
    encoding = tokenizer.train_tokenizer([str(train_text)], 260, ranks)
    shape = GPTConfig(layers=1, width=16, heads=1, kv_heads=1, ffn=16, context=8, vocab_size=encoding.vocab_size)
    GPT(shape).save_hf(tmp_path / "hf")
    words = ("generate", tmp_path / "hf", "--prompt", "some", "--tokenizer", ranks, *flags)
    assert said in said_on_failure(monkeypatch, capsys, *words)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("tokenizer", "train", "x.txt", "--out", "t", "--vocab-size", "4k"), "'4k' must be a valid integer"),
        (("plan", "recipe.yaml", "--price", "$2"), "'$2' must be a valid number"),
        (("plan", "recipe.yaml", "--gpus", "0"), "'0' must be greater than or equal to 1"),
    ],
)
def test_a_flag_that_is_no_number_is_shown_as_it_was_given(words: tuple[str, ...], says: str) -> None:
    result = CliRunner().invoke(cli.app, words, terminal_width=120)
    assert result.exit_code == 2
    assert f"Invalid value for '{words[-2]}': {says}" in " ".join(result.output.replace("│", "").split())


def test_every_path_of_the_command_line_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("NOTHING", "")
    with pytest.raises(RecipeError, match=r"run: '\$NOTHING' is invalid: it expands to nothing"):
        fields.path("$NOTHING", "run")
    expanded = set()
    for app in (cli.app, tokenizer_app, checkpoint_app):
        for command in app.registered_commands:
            for name, hint in get_type_hints(command.callback, include_extras=True).items():
                parser = getattr(next(iter(getattr(hint, "__metadata__", ())), None), "parser", None)
                assert parser or "Path" not in str(hint), f"{command.callback.__name__} {name}"  # type: ignore[union-attr]
                if parser not in (None, flags.text):
                    assert str(parser("~/x")) == "/home/me/x"
                    for empty in ("", "$NOTHING"):
                        with pytest.raises(typer.BadParameter, match="the path is empty; name a file or folder"):
                            parser(empty)
                    expanded.add(name)
    assert expanded >= {
        "recipe",
        "run",
        "runs",
        "weights",
        "inputs",
        "out_folder",
        "tokenizer",
        "study",
        "data",
        "prefix",
    }


@pytest.mark.parametrize(
    ("words", "weights", "data"),
    [
        ("runs/a --data x y --context 64", "runs/a", ["x", "y"]),
        ("runs/a --data x --data y z --json", "runs/a", ["x", "y", "z"]),
        ("--data x --data y runs/a", "runs/a", ["x", "y"]),
        ("runs/a --data --x --data y", "runs/a", ["--x", "y"]),
    ],
)
def test_eval_takes_several_datasets(
    monkeypatch: pytest.MonkeyPatch, words: str, weights: str, data: list[str]
) -> None:
    asked = []

    def evaluate(*given: Any, **settings: Any) -> Evaluation:
        asked.append(given)
        return Evaluation({}, {})

    monkeypatch.setattr(library, "evaluate", evaluate)
    typer.main.get_command(cli.app).main(["eval", *words.split()], standalone_mode=False)
    assert asked == [(Path(weights), [Path(prefix) for prefix in data])]
    with pytest.raises(flags.UsageError, match=r"--data.*requires an argument"):
        typer.main.get_command(cli.app).main(["eval", "runs/a", "--tasks", "x", "--data"], standalone_mode=False)


def test_long_messages_are_cut() -> None:
    assert len(str(RecipeError("run: " + "9 " * 10_000))) == LONGEST
    assert len(str(RecipeError("run: " + "a/" * 2_000 + " is no folder; name one"))) < 400
    assert str(RecipeError("run: " + "a/" * 2_000 + " is no folder; name one")).endswith("a/a/ is no folder; name one")
    assert str(RecipeError("run: short")) == "run: short"


def every_command() -> list[tuple[str, Any]]:
    """By its words."""
    group: Any = typer.main.get_command(cli.app)
    found = []
    for name, command in group.commands.items():
        inner = getattr(command, "commands", {})
        found += [(f"{name} {word}", one) for word, one in inner.items()] or [(name, command)]
    return found


def test_every_help_text_is_a_sentence_and_every_command_has_an_example() -> None:
    for words, command in every_command():
        texts = [(words, command.help), *((f"{words} {param.name}", param.help) for param in command.params)]
        for where, text in texts:
            assert re.fullmatch(r"[A-Z].*\.", text or "", re.DOTALL), (where, text)
            assert not re.match(r"(Of|And|Its?|For|At|By|Such|In|Which|Whose|What|Without) ", text), (where, text)
        verb = re.match(r"([A-Z][a-z]+) ", command.help or "")
        assert verb, words
        assert verb[1] not in ("The", "A", "An", "All", "Exactly"), words
        examples = re.findall(r"Example: spt-fast (.*)", command.epilog or "")
        assert examples, words
        for example in examples:
            given = shlex.split(example)[len(words.split()) :]
            assert example.startswith(words)
            command.make_context(words, given)


def test_help_shows_no_type_of_python(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    for words, _ in every_command():
        cli.app([*words.split(), "--help"], standalone_mode=False)
        shown = capsys.readouterr().out
        assert not re.search(r"<\w+|…\}|\[default: no-", shown), shown


def test_train_prints_its_summary_and_a_dry_run_its_trials_as_json(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", str(recipe), "--set", "phases.pretrain.tokens=512", "--json"]
    cli.app([*words, "--dry-run"], standalone_mode=False)
    (trial,) = json.loads(capsys.readouterr().out)
    assert trial["phase"] == "pretrain"
    assert trial["step_s"] > 0
    cli.app(words, standalone_mode=False)
    summary = json.loads(capsys.readouterr().out)
    assert summary == json.loads((Path(spt.load_recipe(recipe).run) / "summary.json").read_text())
    assert summary["status"] == "done"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_for_every_shell(
    shell: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("_SPT_FAST_COMPLETE", f"source_{shell}")
    with pytest.raises(SystemExit) as ending:
        cli.app([], prog_name="spt-fast")
    assert not ending.value.code
    assert "_SPT_FAST_COMPLETE=complete_" + shell in capsys.readouterr().out


def test_quiet_and_verbose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.write_corpora(tmp_path)
    raw = tiny.raw_recipe(tmp_path)
    raw["phases"] = [raw["phases"][0] | {"tokens": 256}]
    recipe = str(tiny.write_recipe(tmp_path, raw))
    cli.app(["--quiet", "train", recipe], standalone_mode=False)
    told = capsys.readouterr()
    assert "held-out" in told.out
    assert told.err
    assert all(line.startswith("warning: ") for line in told.err.splitlines()), told.err
    cli.app(["train", recipe, "--set", f"run={tmp_path / 'other'}", "--quiet"], standalone_mode=False)
    assert capsys.readouterr().err.splitlines() == told.err.splitlines()
    assert said_on_failure(monkeypatch, capsys, "train", recipe).startswith("spt-fast: run: folder")
    for words in (["--verbose", "train", recipe], ["train", recipe, "-v"]):
        monkeypatch.setattr(sys, "argv", ["spt-fast", *words])
        with pytest.raises(SystemExit):
            cli.main()
        said = capsys.readouterr().err
        assert "Traceback" in said
        assert "\nspt-fast: run: folder" in said


@pytest.mark.parametrize(
    ("words", "files"),
    [
        (("compare", "a", "b"), ["comparison.png", "comparison.json"]),
        (("fit", "a"), ["fits.json"]),
        (("reweight", "recipe.yaml"), ["weights.json"]),
    ],
)
def test_what_out_wrote_is_named(
    words: tuple[str, ...], files: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module, name in (
        *((spt, name) for name in ("compare", "fit", "load_recipe")),
        *((findings, name) for name in ("print_comparison", "print_fits")),
        *((doge, name) for name in ("reweight", "print_reweighting")),
    ):
        monkeypatch.setattr(module, name, lambda *given, **more: None)
    monkeypatch.setattr(sys, "argv", ["spt-fast", *words, "--out", "there"])
    cli.app(standalone_mode=False)
    assert re.findall(r"there/(\S+):", capsys.readouterr().out) == files
