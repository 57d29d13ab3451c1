from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import tune_ops


def test_the_choices_are_kept_with_their_machine_and_unknown_ops_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def tune(questions: Any, *, seconds: float, say: Any) -> dict[str, Any]:
        say(f"{questions[0].op}: keeps its default, since there was no time left")
        return {}

    monkeypatch.setattr(tune_ops, "tune", tune)
    file = tmp_path / "tuned.json"
    monkeypatch.setattr("sys.argv", ["tune_ops", "--dry", "--ops", "rope", "--json", str(file)])
    tune_ops.main()
    found = json.loads(file.read_text())
    assert "commit" in found["machine"]
    assert found["notes"] == ["rope: keeps its default, since there was no time left"]
    monkeypatch.setattr("sys.argv", ["tune_ops", "--dry", "--ops", "attention"])
    with pytest.raises(SystemExit):
        tune_ops.main()
    assert "attention is invalid: expected some of add_rms_norm" in capsys.readouterr().err
