"""What a user has written somewhere replaces an earlier result of its kind, and nothing of the user's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import spt_fast as spt
from spt_fast import cli
from spt_fast.data.tokenizer import train_tokenizer
from spt_fast.errors import CheckpointError, SptError
from spt_fast.files import is_temporary, write_text
from spt_fast.library import compare, fit
from spt_fast.locks import InUse
from spt_fast.model.gpt import GPT, GPTConfig
from spt_fast.outputs import check_folder, check_output, is_figure, is_json_with, is_tokenizer
from spt_fast.report.page import report
from spt_fast.study import figures, fits, runs_table
from spt_fast.study.demo import demo
from spt_fast.train.folder import owned
from spt_fast.train.release import export

SHAPE = GPTConfig(layers=1, width=16, heads=2, kv_heads=1, ffn=32, context=8, vocab_size=64)
IS_OTHER = r"is another kind of file and would be replaced; choose another name, or delete it"


def test_a_place_is_free_or_holds_a_result_of_the_kind(tmp_path: Path) -> None:
    def ours(file: Path) -> bool:
        return file.read_text() == "ours"

    place = tmp_path / "place"
    check_output(place, "out", ours)
    for text in ("", "ours"):
        place.write_text(text)
        check_output(place, "out", ours)
    place.write_text("mine")
    with pytest.raises(SptError, match=rf"^out: \S+ {IS_OTHER}") as refusal:
        check_output(place, "out", ours)
    assert refusal.value.argument
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to(place)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "recipe.yaml").touch()
    for name, problem in (
        ("run/x", "is inside the run"),
        ("fifo", "is not a regular file"),
        (".", "is not a regular file"),
        ("link", "is a link"),
    ):
        with pytest.raises(SptError, match=problem):
            check_output(tmp_path / name, "out", ours)


@pytest.mark.parametrize("name", ["a\0b", "a\ud800b", "x" * 300], ids=["NUL", "surrogate", "long"])
def test_a_place_that_no_file_can_have_is_refused_by_the_argument(tmp_path: Path, name: str) -> None:
    texts, place = tmp_path / "in.jsonl", tmp_path / name
    texts.write_text('{"text": "some text"}\n' * 9)
    ranks = spt.Tokenizer({bytes([i]): i for i in range(256)}, ".", {"<|endoftext|>": 256})
    for write in (
        lambda: check_output(place, "out", is_figure),
        lambda: check_folder(place, "out"),
        lambda: spt.prepare(texts, place, ranks),
        lambda: spt.tokenizer(texts, 257, place),
        lambda: spt.init(texts, texts, place),
        lambda: export(tmp_path / "model", place),
    ):
        with pytest.raises(
            SptError, match=r"^out: .* is invalid: no file can have that name; choose another$"
        ) as error:
            write()
        assert error.value.argument


def test_every_writer_leaves_foreign_files_alone(tmp_path: Path) -> None:
    texts = tmp_path / "in.jsonl"
    texts.write_text("\n".join(json.dumps({"text": f"some text {i} of many words"}) for i in range(50)))
    foreign: Any = None
    names = ("notes.md", "comparison.json", "comparison.png", "fits.json", "table.csv", "table.parquet")
    for name in names:
        (tmp_path / name).write_text('{"mine": 1}')
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    writers = [
        lambda: train_tokenizer(texts, 270, texts),
        lambda: train_tokenizer(texts, 270, tmp_path / "notes.md"),
        lambda: report([], tmp_path / "notes.md"),
        lambda: figures.write(foreign, tmp_path),
        lambda: fits.write(foreign, tmp_path),
        lambda: runs_table.check_place(tmp_path),
        # before any work: there is no such run
        lambda: compare("absent", out=tmp_path),
        lambda: fit("absent", out=tmp_path),
        lambda: demo(tmp_path),
    ]
    for write in writers:
        with pytest.raises(SptError, match=rf"^(out|study): \S+ {IS_OTHER}"):
            write()
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_result_is_replaced_by_the_next(tmp_path: Path) -> None:
    texts = tmp_path / "in.jsonl"
    texts.write_text(json.dumps({"text": "some text of many words " * 20}))
    tokenizer = tmp_path / "bpe.tiktoken"
    for size in (270, 268):
        assert train_tokenizer(texts, size, tokenizer).vocab_size == size
    assert is_tokenizer(tokenizer)
    for foreign in ("text 0\n", "IQ== 5\nIg== 6\n", ""):
        texts.write_text(foreign)
        assert not is_tokenizer(texts) or foreign == "text 0\n"
    runs_table.save_table(pd.DataFrame({name: [] for name in runs_table.COLUMNS}), tmp_path)
    runs_table.check_place(tmp_path)
    (tmp_path / "fits.json").write_text('{"laws": [], "notes": [], "crossover": []}')
    assert is_json_with("laws", "notes")(tmp_path / "fits.json")
    figures.Figure().savefig(tmp_path / "comparison.png")
    assert is_figure(tmp_path / "comparison.png")


def test_a_file_is_written_under_a_name_of_its_own_and_never_through_a_link(tmp_path: Path) -> None:
    precious, place, dead = tmp_path / "precious", tmp_path / "place [1]", subprocess.Popen(["true"])
    dead.wait()
    precious.write_text("mine")
    (tmp_path / f".{place.name}.{os.getpid()}.tmp").symlink_to(precious)
    (tmp_path / f".{place.name}.{dead.pid}.tmp").write_text("half")
    another = tmp_path / f".{place.name}.{os.getppid()}.tmp"
    another.write_text("another process writes there, too")
    write_text(place, "whole")
    assert (place.read_text(), precious.read_text()) == ("whole", "mine")
    assert {path.name for path in tmp_path.iterdir()} == {"precious", place.name, another.name}


# ------------------------------------------------------------------------------------------------ models


def test_a_model_is_exported_over_another_only_where_that_is_said(tmp_path: Path) -> None:
    one, other, out = tmp_path / "one", tmp_path / "other", tmp_path / "out"
    GPT(SHAPE, seed=1).save_hf(one)
    GPT(SHAPE, seed=2).save_hf(other)
    export(one, out)
    export(one, out)  # nothing differs
    before = {path: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(
        CheckpointError, match=r"^out: \S+ holds model\.safetensors of another model; .* `overwrite=True`"
    ):
        export(other, out)
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    (out / "tokenizer.json").write_text("of the model before")
    (out / "model-00001-of-00002.safetensors").write_text("of the model before")
    assert "## Training\n\nNot recorded." in (out / "README.md").read_text()
    (out / "README.md").write_text("mine")
    (other / "README.md").write_text("of the other")
    with pytest.raises(CheckpointError, match="of another model"):
        export(other, out)
    export(other, tmp_path / "third")
    (tmp_path / "third" / "README.md").write_text("mine")
    export(other, tmp_path / "third")
    assert [folder.read_text() for folder in (out / "README.md", tmp_path / "third" / "README.md")] == ["mine"] * 2
    export(other, out, overwrite=True)
    assert (out / "README.md").read_text().startswith("---\nlibrary_name: transformers\n")
    assert {path.name for path in out.iterdir()} == {"model.safetensors", "config.json", "README.md"}
    assert (out / "model.safetensors").stat().st_mode == (other / "config.json").stat().st_mode

    web = tmp_path / "web"
    web.mkdir()
    (web / "config.json").write_text('{"port": 80}')
    with pytest.raises(CheckpointError, match=r"holds config\.json of another model"):
        export(one, web)
    assert [path.name for path in web.iterdir()] == ["config.json"]


def test_an_export_needs_no_room_beside_its_folder_and_is_alone_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a mount point, into which nothing can be renamed from beside it."""
    GPT(SHAPE, seed=1).save_hf(tmp_path / "one")
    out = tmp_path / "out"
    rename = Path.replace

    def within(self: Path, target: Path) -> Path:
        assert self.is_relative_to(out)
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", within)
        export(tmp_path / "one", out)
    assert not any(is_temporary(path) for path in (*out.iterdir(), *tmp_path.iterdir()))
    with owned(out, "out"), pytest.raises(InUse, match=r"^out: "):
        export(tmp_path / "one", out)


def test_a_model_imported_over_itself_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    GPT(SHAPE, seed=1).save_hf(tmp_path / "one")
    before = {path: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    config = tmp_path / "one" / "config.json"
    config.write_text(config.read_text().replace("\n", ""))  # another program's form
    before[config] = config.read_bytes()
    monkeypatch.setattr(sys, "argv", ["spt-fast", "import", str(tmp_path / "one"), "--out", str(tmp_path / "one")])
    with pytest.raises(SystemExit) as ending:
        cli.main()
    assert ending.value.code == 2
    assert "holds config.json of another model; choose another folder, or add --overwrite" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (tmp_path / "one").iterdir()} == before
