from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import loader
from spt_fast import native


def test_no_window_is_gathered_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: Counter[tuple[int, int, int]] = Counter()
    gather = native.gather

    def counted(table: np.ndarray, source: np.ndarray, starts: np.ndarray, vocab: int, batch: Any) -> Any:
        read.update((int(table[0, 3]), batch.shape[2], int(start)) for start in starts)
        return gather(table, source, starts, vocab, batch)

    monkeypatch.setattr(native, "gather", counted)
    monkeypatch.setattr(loader, "CORPUS_TOKENS", 1_500_000)
    monkeypatch.setattr(loader, "BATCH_TOKENS", 8192)
    rates = loader.gathering(tmp_path)
    assert len(rates) == 16
    assert min(rates.values()) > 0
    assert set(read.values()) == {1}
    tokens = sum(context for _, context, _ in read)
    assert tokens == 8 * 8192 * loader.REPEATS * (loader.GATHERED + loader.LOADED)
