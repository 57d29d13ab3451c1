from __future__ import annotations

import json
import math
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from spt_fast import cli
from spt_fast.data import divergence as module
from spt_fast.data.divergence import NGRAMS, divergence
from spt_fast.data.shards import DatasetWriter
from spt_fast.errors import DataError


def dataset_of(prefix: Path, ids: np.ndarray, tokenizer: str = "t", vocab_size: int = 70_000) -> Path:
    with DatasetWriter(prefix, vocab_size=vocab_size, eos_id=None, tokenizer_digest=tokenizer) as writer:
        writer.write(ids, np.array([len(ids)]), 4 * len(ids))
    return prefix


def draws(seed: int, shares: list[float], tokens: int) -> np.ndarray:
    return np.random.default_rng(seed).choice(len(shares), tokens, p=shares)


def entropy(shares: list[float]) -> float:
    return -sum(share * math.log2(share) for share in shares if share)


def jensen_shannon(p: list[float], q: list[float]) -> float:
    middle = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    return entropy(middle) - (entropy(p) + entropy(q)) / 2


def independent(shares: list[float], n: int) -> list[float]:
    """The distribution of n independent ids in a row."""
    return np.array([math.prod(row) for row in np.stack(np.meshgrid(*[shares] * n), -1).reshape(-1, n)]).tolist()


@pytest.mark.parametrize(
    ("p", "q"),
    [([0.25, 0.25, 0.5, 0.0], [0.0, 0.5, 0.25, 0.25]), ([0.9, 0.1], [0.1, 0.9]), ([0.5, 0.5], [0.45, 0.55])],
)
def test_known_distributions_have_the_divergence_of_the_formula(tmp_path: Path, p: list[float], q: list[float]) -> None:
    a = dataset_of(tmp_path / "a", draws(0, p, 400_000))
    b = dataset_of(tmp_path / "b", draws(1, q, 800_000))
    report = divergence(a, b)
    assert report["tokens"] == 400_000 // module._STRETCH * module._STRETCH
    for name, n in NGRAMS.items():
        assert report[name] == pytest.approx(jensen_shannon(independent(p, n), independent(q, n)), abs=0.002)
        assert 0 <= report[f"{name}_floor"] < 2e-4


def test_a_corpus_is_at_no_distance_from_itself(tmp_path: Path) -> None:
    a = dataset_of(tmp_path / "a", np.random.default_rng(2).integers(0, 3000, 100_000))
    assert [divergence(a, a)[name] for name in NGRAMS] == [0, 0, 0]


def test_corpora_without_a_common_ngram_are_one_bit_apart(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    a = dataset_of(tmp_path / "a", rng.integers(0, 100, 50_000))
    b = dataset_of(tmp_path / "b", rng.integers(100, 200, 100_000))
    assert [divergence(a, b)[name] for name in NGRAMS] == [1, 1, 1]


def test_the_floor_is_the_divergence_of_equal_texts_at_that_size(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    a = dataset_of(tmp_path / "a", rng.integers(0, 1000, 60_000))
    b = dataset_of(tmp_path / "b", rng.integers(0, 1000, 200_000))
    small, large = divergence(a, b, max_tokens=20_000), divergence(a, b, max_tokens=50_000)
    for report in (small, large):
        for name in NGRAMS:
            assert report[name] == pytest.approx(report[f"{name}_floor"], rel=0.25)  # 4 standard errors of unigrams
        assert 0 < report["unigrams_floor"] < 0.03
        assert 0.9 < report["bigrams_floor"] < report["trigrams_floor"] <= 1
    assert all(small[f"{name}_floor"] > large[f"{name}_floor"] for name in ("unigrams", "bigrams"))


def test_every_ngram_inside_the_stretches_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_STRETCH", 50)
    rng = np.random.default_rng(5)
    ids = {"a": rng.integers(0, 9, 230), "b": rng.integers(4, 69_999, 999) % 12}
    a, b = (dataset_of(tmp_path / name, these) for name, these in ids.items())
    report = divergence(a, b)
    assert report["tokens"] == 200
    for name, n in NGRAMS.items():

        def shares(text: np.ndarray, starts: list[int], n: int = n) -> Counter[tuple[int, ...]]:
            return Counter(tuple(text[s + i : s + i + n].tolist()) for s in starts for i in range(50 - n + 1))

        ours = shares(ids["a"], [i * 230 // 4 for i in range(4)])
        halves = [shares(ids["b"], [i * 999 // 8 for i in range(half, 8, 2)]) for half in (0, 1)]
        keys = sorted(ours.keys() | halves[0].keys() | halves[1].keys())
        p, q, r = ([counts[key] / counts.total() for key in keys] for counts in (ours, *halves))
        assert report[name] == pytest.approx(jensen_shannon(p, q), abs=1e-12)
        assert report[f"{name}_floor"] == pytest.approx(jensen_shannon(q, r), abs=1e-12)


def test_the_two_samples_of_the_general_corpus_share_no_token(tmp_path: Path) -> None:
    b = dataset_of(tmp_path / "b", np.arange(70_000))
    assert divergence(b, b)["unigrams_floor"] == 1


def test_large_ids_are_kept_apart() -> None:
    ids = np.array([[1, 2, 1, 3, 2_600_000, 2_600_000]])
    keys, counts = module._counts(ids, 3, 2_600_001)
    assert len(keys) == 4
    assert counts.tolist() == [1, 1, 1, 1]


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    a = dataset_of(tmp_path / "a", np.arange(3))
    other = dataset_of(tmp_path / "other", np.arange(60), "another")
    short = dataset_of(tmp_path / "short", np.arange(5))
    with pytest.raises(DataError, match="different tokenizers"):
        divergence(a, other)
    with pytest.raises(DataError, match=r"a\.bin has 3 tokens and .*short\.bin 5: too few"):
        divergence(a, short)


def test_inspect_prints_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    a = dataset_of(tmp_path / "a", draws(6, [0.5, 0.5], 4000))
    b = dataset_of(tmp_path / "b", draws(7, [0.5, 0.5], 9000))
    monkeypatch.setattr(sys, "argv", ["spt-fast", "inspect", str(a), "--divergence", str(b), "--json"])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 0
    assert json.loads(capsys.readouterr().out)["divergence"] == divergence(a, b)
