"""The tutorial runs as written, at a smaller size, and its recorded outputs are what the commands print today."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import yaml

from spt_fast.cli.program import out
from spt_fast.fields import parse_yaml
from spt_fast.study import sweep
from tests.pages import ROOT, blocks_of, run
from tests.study.tiny_study import HereAlone

pytestmark = pytest.mark.long

TUTORIAL = ROOT / "docs" / "tutorial.md"
MODEL = {"layers": 1, "width": 32, "heads": 2, "context": 32}
SMALLER = {"limit_bytes=7_000_000": "limit_bytes=300_000", "limit_bytes=400_000": "limit_bytes=100_000", "4096": "400"}
WORD = re.compile(r"(?<!\w)(?!min\b)[a-z]{3,}(?!\w)", re.IGNORECASE)
"""Of an output; whether a time is in seconds or minutes depends on the size."""


def smaller(text: str) -> str:
    for large, small in SMALLER.items():
        text = text.replace(large, small)
    return text


def smaller_yaml(text: str) -> str:
    """The recipe or study of the tutorial, in seconds."""
    raw: dict[str, Any] = parse_yaml(text, "the tutorial")
    key = "model" if "model" in raw else "models"
    raw[key] = MODEL
    for phase in raw.get("phases", []) + raw.get("stages", []):
        phase["eval"]["tokens"] = "2K"
        phase |= {"budgets": ["4K"]} if "budgets" in phase else {"tokens": "4K"}
        phase |= {"schedule": {"name": "constant"}}
    if "stages" in raw:
        raw["seeds"] = 1
    return yaml.safe_dump(raw)


def test_the_tutorial_runs_and_prints_what_it_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recording = runpy.run_path(str(ROOT / "docs" / "record.py"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(out, "width", recording["COLUMNS"])
    monkeypatch.setattr(sweep, "workers_of", lambda *_: HereAlone())
    no_longer: dict[str, list[str]] = {}
    for block in blocks_of(TUTORIAL):
        if block.language == "python":
            exec(smaller(block.text), {})
        elif block.language == "yaml":
            (tmp_path / block.text.split()[1]).write_text(smaller_yaml(block.text))
        for command, shown in recording["commands_of"](block.text) if block.language == "console" else ():
            assert run(smaller(command)) == 0, capsys.readouterr().err
            if command.split()[1] in ("generate", "advise"):  # they say other things of other runs
                continue
            known = set(WORD.findall(capsys.readouterr().out))
            if gone := [word for line in shown for word in WORD.findall(line) if word not in known]:
                no_longer[command] = gone
    assert not no_longer, "not printed any more; run `python docs/record.py docs/tutorial.md FOLDER`"
    assert (tmp_path / "hf" / "model.safetensors").exists()
    assert "<svg" in (tmp_path / "report.html").read_text()
