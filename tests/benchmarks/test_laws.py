from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import laws as bench
from spt_fast.laws import OpenError


class Refusing:
    def fit(self, table: Any) -> Refusing:
        return self

    def predict(self, **given: Any) -> Any:
        raise OpenError("no interval")


def test_a_refused_interval_holds_the_requested_share() -> None:
    places = [({"tokens": np.array([1.0, 2.0])}, np.array([3.0, 2.5]))]
    found = bench.intervals_of_study(Refusing, lambda *_: {}, places, 0.003, 0.003, 3)  # type: ignore[arg-type]
    assert found == [(bench.LEVEL, math.inf)]


def test_the_draws_of_the_intervals_are_named_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(bench, "recoveries", lambda draw_from, draws: {})
    monkeypatch.setattr(bench, "intervals", lambda draws, folder: drawn.append(draws) or {})
    monkeypatch.setattr(bench, "fits_of_studies", dict)
    for arguments, draws in (([], bench.INTERVAL_DRAWS), (["--intervals"], 50)):
        file = tmp_path / "laws.json"
        monkeypatch.setattr(sys, "argv", ["laws", "--draws", "50", "--json", str(file), *arguments])
        bench.main()
        assert drawn.pop() == json.loads(file.read_text())["draws of intervals"] == draws
    monkeypatch.setattr(sys, "argv", ["laws", "--fits", "--intervals"])
    with pytest.raises(SystemExit):
        bench.main()
