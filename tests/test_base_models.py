"""docs/base_models.md runs as written, on a tiny random base and small text, and its tables are those of today."""

from __future__ import annotations

import json
import random
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import yaml

from spt_fast.cli.program import out
from spt_fast.fields import parse_yaml
from spt_fast.model.gpt import GPT, GPTConfig
from spt_fast.study import sweep
from tests import hf_tokenizers
from tests.pages import ROOT, blocks_of, commands_of, run
from tests.study.tiny_study import HereAlone

pytestmark = pytest.mark.filterwarnings("ignore::spt_fast.errors.SptWarning")

PAGE = ROOT / "docs" / "base_models.md"
BLOCKS = list(blocks_of(PAGE))
SHAPE = GPTConfig(layers=1, width=16, heads=2, kv_heads=1, ffn=32, context=256, vocab_size=448, qk_norm=True)
STAGE = {
    "name": "finetune",
    "replay": [0, "1%"],
    "average": [0, "10%"],
    "tokens": "8K",
    "batch": {"sequences": 4, "context": 64},
    "optimizer": {"lr": 3e-5},
    "eval": {"every": "50%", "tokens": "1K"},
}
"""In place of what `forgetting` has."""
WORD = re.compile(r"(?<!\w)(?!min\b)[a-z_]{3,}(?!\w)", re.IGNORECASE)
"""Of a table; whether a time is in seconds or minutes depends on the size."""


def smaller(command: str) -> str:
    """A sweep of seconds, and a recipe for some."""
    if " sweep " in command:
        return f"{command} --set seeds=1 --set 'stages.finetune={json.dumps(STAGE)}'"
    return re.sub(r"--hours \S+", "--hours 0.001", command)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the page begins with: the base, two texts and the questions."""
    monkeypatch.chdir(tmp_path)
    GPT(SHAPE).save_hf(hf_tokenizers.write(tmp_path / "base"))
    rng = random.Random(0)
    for name, words in (("general", ["the", "quick", "brown", "fox", "and", "lazy"]), ("tunes", [*"ABCdefg|:2/"])):
        texts = (" ".join(rng.choices(words, k=rng.randrange(20, 100))) + f" {i}" for i in range(400))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    question = {"question": "A B c", "choices": ["d e f", "| 2 |"], "answer": 0}
    (tmp_path / "tunes.questions.jsonl").write_text(json.dumps(question))
    return tmp_path


def test_the_page_runs_and_prints_the_tables_that_it_shows(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recording = runpy.run_path(str(ROOT / "docs" / "record.py"))
    monkeypatch.setattr(out, "width", recording["COLUMNS"])
    monkeypatch.setattr(sweep, "workers_of", lambda *_: HereAlone())
    no_longer = dict[str, list[str]]()
    for block in BLOCKS:
        if block.language == "yaml":
            raw: dict[str, Any] = parse_yaml(block.text, str(block))
            raw["phases"][0] |= {"tokens": "32K", "eval": {"every": "50%", "tokens": "2K"}}
            (place / "recipe.yaml").write_text(yaml.safe_dump(raw))
        shown = dict(recording["commands_of"](block.text))
        for command in commands_of(block):
            assert run(smaller(command)) == 0, command + capsys.readouterr().err
            known = set(WORD.findall(capsys.readouterr().out))
            rows = [line for line in shown.get(command, []) if line.startswith(("│", "┃"))]
            if gone := [word for row in rows for word in WORD.findall(row) if word not in known]:
                no_longer[command] = gone
    assert not no_longer, "its tables have changed; record the page again"
    assert (place / "hf" / "model.safetensors").exists()
    assert "<svg" in (place / "forgetting.html").read_text()
