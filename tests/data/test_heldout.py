from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spt_fast.data.heldout import (
    Half,
    begins,
    documents_at,
    has_long_documents,
    heldout_stretches,
    split_heldout,
    tokens_in,
    training_stretches,
)
from spt_fast.data.heldout import documents_in as documents_in_stretches
from spt_fast.data.shards import DatasetWriter, TokenDataset
from spt_fast.errors import DataError

HALVES = ("select", "report")


def heldout_tokens(dataset: TokenDataset, half: Half, limit: int | None = None) -> np.ndarray:
    return tokens_in(dataset, heldout_stretches(dataset, half, limit))


def training_windows(dataset: TokenDataset, context: int, limit: int | None = None) -> np.ndarray:
    return tokens_in(dataset, training_stretches(dataset, context, limit) + np.array([0, 1])).reshape(-1, context + 1)


def dataset_of(prefix: Path, documents: list[np.ndarray], vocab_size: int = 1000) -> TokenDataset:
    with DatasetWriter(prefix, vocab_size=vocab_size, eos_id=0, tokenizer_digest="t") as writer:
        writer.write(np.concatenate(documents), np.array([len(document) for document in documents]), 0)
    return TokenDataset.open(prefix)


def random_documents(seed: int, count: int, longest: int = 100) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(1, 1000, rng.integers(1, longest)) for _ in range(count)]


def documents_in(dataset: TokenDataset, stretches: np.ndarray) -> list[tuple[int, ...]]:
    return [tuple(dataset.tokens[start:end].tolist()) for start, end in stretches]


def test_the_halves_are_disjoint_cover_everything_and_are_about_equal(tmp_path: Path) -> None:
    documents = random_documents(1, 2000)
    dataset = dataset_of(tmp_path / "d", documents)
    select, report = split_heldout(dataset)
    stretches = np.concatenate([select, report])
    ordered = stretches[np.argsort(stretches[:, 0])]
    assert ordered[0, 0] == 0
    assert ordered[-1, 1] == dataset.num_tokens
    assert (ordered[1:, 0] == ordered[:-1, 1]).all()
    assert len(stretches) == 2000
    assert 880 < len(select) < 1120  # 1000 expected, standard deviation 22


def test_duplicates_stay_together_and_order_and_dtype_do_not_matter(tmp_path: Path) -> None:
    documents = random_documents(2, 300)
    documents += documents[::-1]
    dataset = dataset_of(tmp_path / "d", documents)
    select, report = (set(documents_in(dataset, half)) for half in split_heldout(dataset))
    assert not select & report
    shuffled = [documents[i] for i in np.random.default_rng(3).permutation(len(documents))]
    wide = dataset_of(tmp_path / "wide", shuffled, vocab_size=100_000)
    assert wide.tokens.dtype == np.uint32
    assert [set(documents_in(wide, half)) for half in split_heldout(wide)] == [select, report]


def test_the_split_never_changes(tmp_path: Path) -> None:
    """Figures of different versions compare only if they are of the same text."""
    dataset = dataset_of(tmp_path / "d", [np.full(10, i) for i in range(1, 17)])
    _, report = split_heldout(dataset)
    assert [document[0] for document in documents_in(dataset, report)] == [3, 4, 5, 6, 7, 9, 11, 13, 14]


def test_a_handful_of_long_documents_is_dealt_out_by_windows(tmp_path: Path) -> None:
    """Each is of its own ids: the halves are alike when they have as many of each."""
    lengths = [5000, 12_000, 1100, 700, 300, 9000]
    documents = [np.full(length, i) for i, length in enumerate(lengths, start=1)]
    dataset = dataset_of(tmp_path / "d", [*documents, documents[1]])
    halves = [np.bincount(tokens_in(dataset, half), minlength=7) for half in split_heldout(dataset)]
    assert (halves[0] + halves[1] == np.bincount(np.concatenate([*documents, documents[1]]))).all()
    for i in (1, 2, 3, 6):
        assert abs(halves[0][i] - halves[1][i]) <= 2 * 1024
    select, report = (set(map(bytes, (dataset.tokens[a:b] for a, b in half))) for half in split_heldout(dataset))
    assert {len(window) for window in select | report} <= set(range(2 * 1025))
    order = dataset_of(tmp_path / "order", [documents[1], *documents[::-1]])
    assert (np.bincount(tokens_in(order, split_heldout(order)[0]), minlength=7) == halves[0]).all()
    assert has_long_documents(dataset)
    assert not has_long_documents(dataset_of(tmp_path / "short", [np.ones(1024, int), np.arange(1, 9)]))
    whole = split_heldout(dataset, windows=False)
    assert sorted(np.concatenate(whole)[:, 1].tolist()) == np.cumsum([*lengths, 12_000]).tolist()
    np.arange(5000, dtype="<u2").tofile(tmp_path / "bare.bin")
    bare = TokenDataset.open(tmp_path / "bare", dtype="uint16")
    assert split_heldout(bare)[0].tolist() == [[0, 1000], [2000, 3000], [4000, 5000]]


def test_documents_of_stretches_are_counted_and_found(tmp_path: Path) -> None:
    lengths = np.array([4, 7, 1, 20, 3])
    dataset = dataset_of(tmp_path / "d", [np.full(length, i) for i, length in enumerate(lengths, start=1)])
    stretches = np.array([[2, 5], [6, 12], [13, 20], [21, 22]])
    ids = tokens_in(dataset, stretches)
    assert documents_in_stretches(dataset, stretches) == len(set(ids.tolist())) == 4
    found = documents_at(dataset, stretches, np.arange(len(ids)))
    assert found is not None
    assert (found + 1).tolist() == ids.tolist()
    lengths = np.array([9, 0, 0, 8, 0, 7, 9, 0, 3, 6])  # foreign formats have empty ones
    dataset = dataset_of(tmp_path / "e", [np.full(length, i) for i, length in enumerate(lengths)])
    halves = [heldout_stretches(dataset, half) for half in HALVES]
    counts = [documents_in_stretches(dataset, stretches) for stretches in halves]
    assert counts == [len(np.unique(tokens_in(dataset, stretches))) for stretches in halves]
    assert sum(counts) == 6


@pytest.mark.parametrize(
    "lengths", [[100], [950, 10, 10, 10, 20], [0, 0, 100]], ids=["one document", "one outweighs all", "empty ones"]
)
def test_too_few_or_unequal_documents_are_cut_in_the_middle(tmp_path: Path, lengths: list[int]) -> None:
    dataset = dataset_of(tmp_path / "d", [np.arange(1, length + 1) % 1000 for length in lengths])
    middle = sum(lengths) // 2
    select, report = split_heldout(dataset)
    assert select.tolist() == [[0, middle]]
    assert report.tolist() == [[middle, sum(lengths)]]


def test_a_format_without_documents_is_cut_in_the_middle(tmp_path: Path) -> None:
    np.arange(101, dtype="<u2").tofile(tmp_path / "d.bin")
    dataset = TokenDataset.open(tmp_path / "d", dtype="uint16")
    assert [half.tolist() for half in split_heldout(dataset)] == [[[0, 50]], [[50, 101]]]
    assert heldout_tokens(dataset, "report", 10).tolist() == list(range(50, 60))


def test_a_half_is_its_documents_in_order_cut_at_the_limit(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path / "d", random_documents(4, 200))
    for half, stretches in zip(HALVES, split_heldout(dataset), strict=True):
        whole = [i for document in documents_in(dataset, stretches) for i in document]
        assert (np.diff(stretches[:, 0]) > 0).all()
        assert heldout_tokens(dataset, half).tolist() == whole  # type: ignore[arg-type]
        for limit in (2, 17, 1000, len(whole), len(whole) + 1):
            assert heldout_tokens(dataset, half, limit).tolist() == whole[:limit]  # type: ignore[arg-type]


@pytest.mark.parametrize("limit", [0, 1])
def test_a_half_too_short_to_score_is_refused(tmp_path: Path, limit: int) -> None:
    dataset = dataset_of(tmp_path / "d", random_documents(5, 200))
    tokens = "1 token" if limit == 1 else f"{limit} tokens"
    with pytest.raises(DataError, match=f"select half of this held-out text has {tokens}, too few"):
        heldout_tokens(dataset, "select", limit)
    tiny = dataset_of(tmp_path / "tiny", [np.array([1, 2])])
    with pytest.raises(DataError, match="report half"):
        heldout_tokens(tiny, "report")


def test_an_empty_dataset_is_refused(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path / "d", [np.empty(0, int)])
    with pytest.raises(DataError, match="hold out more text"):
        heldout_tokens(dataset, "select")
    with pytest.raises(DataError, match="0 tokens; a window of context 8 needs 9"):
        training_windows(dataset, 8)


def test_what_begins_a_document_is_marked_in_any_stretches(tmp_path: Path) -> None:
    """Documents here are 0 1 2 …, so what begins one is a 0; a stretch that begins inside one counts as well."""
    lengths = np.random.default_rng(6).integers(0, 9, 80)
    dataset = dataset_of(tmp_path / "d", [np.arange(length) for length in lengths])
    starts = np.array([0, 7, 8, 100, dataset.num_tokens - 20])
    stretches = np.stack([starts, starts + np.array([7, 1, 60, 30, 20])], axis=1)
    marks = begins(dataset, stretches)
    ids = np.concatenate([dataset.tokens[start:end] for start, end in stretches])
    expected = ids == 0
    expected[np.cumsum([0, 7, 1, 60, 30])] = True
    assert (marks == expected).all()
    assert 10 < marks.sum() < len(marks)


@given(length=st.integers(2, 900), context=st.integers(1, 60), limit=st.none() | st.integers(0, 1000))
def test_training_windows_are_spread_over_the_whole_text_and_share_no_target(
    tmp_path_factory: pytest.TempPathFactory, length: int, context: int, limit: int | None
) -> None:
    dataset = dataset_of(tmp_path_factory.mktemp("d") / "d", [np.arange(length)])
    if length < context + 1:
        with pytest.raises(DataError, match=f"needs {context + 1}: give more text or a shorter context"):
            training_windows(dataset, context, limit)
        return
    windows = training_windows(dataset, context, limit)
    most = (length - 1) // context
    assert len(windows) == (most if limit is None else min(most, max(1, limit // context)))
    assert windows.shape[1] == context + 1
    assert (np.diff(windows, axis=1) == 1).all()  # ids are positions here
    starts = windows[:, 0].astype(int)
    assert starts[0] == 0
    gaps = np.diff(starts)
    if len(gaps):
        assert windows[-1, -1] == length - 1
        assert gaps.min() >= context
        assert gaps.max() - gaps.min() <= 1
    assert (training_windows(dataset, context, limit) == windows).all()
