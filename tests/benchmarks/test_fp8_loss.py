from __future__ import annotations

from typing import Any

import pytest

from benchmarks import fp8_loss
from benchmarks.fp8_loss import compare, table


def records(shift: float) -> list[dict[str, Any]]:
    """Four steps, evaluated before the first and after every second."""
    found: list[dict[str, Any]] = [{"kind": "eval", "step": 0, "heldout": {"prose": 9.0}}]
    for step in range(1, 5):
        found.append({"kind": "train", "step": step, "loss": 8.0 - step + shift})
        if step % 2 == 0:
            found.append({"kind": "eval", "step": step, "heldout": {"prose": 4.0 + shift}})
    return found


def test_each_tenth_is_compared_by_itself() -> None:
    rows = compare(records(0.0), records(0.5))
    assert [row["step"] for row in rows] == [2, 4]
    assert rows[0]["train"] == {"bf16": 6.5, "fp8": 7.0, "difference": 7.0 / 6.5 - 1}
    assert rows[1]["train"]["bf16"] == 4.5
    assert rows[1]["heldout"] == {"bf16": 4.0, "fp8": 4.5, "difference": 0.125}
    assert table(rows).splitlines()[-1] == "| 4 | 4.5000 | 5.0000 | +11.11% | 4.0000 | 4.5000 | +12.50% |"


def test_a_model_that_fp8_would_not_change_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["fp8_loss", "--out", "unused", "--preset", "350m"])
    with pytest.raises(SystemExit):
        fp8_loss.main()
    assert "invalid choice: '350m'" in capsys.readouterr().err
