from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from spt_fast.data import inspection, overlap, shards
from spt_fast.data.inspection import inspect
from spt_fast.data.overlap import NGRAM, Overlap, overlap_share
from spt_fast.data.shards import DatasetWriter, TokenDataset
from spt_fast.errors import DataError

EOS = 0


def dataset_of(
    prefix: Path,
    documents: list[list[int]],
    tokenizer: str = "t",
    eos_id: int | None = EOS,
    vocab_size: int = 30_000,
    bos_id: int | None = None,
) -> TokenDataset:
    tokens = np.array([i for document in documents for i in document], np.int64)
    names = {"eos_id": eos_id, "bos_id": bos_id, "tokenizer_digest": tokenizer}
    with DatasetWriter(prefix, vocab_size=vocab_size, **names) as writer:  # type: ignore[arg-type]
        writer.write(tokens, np.array([len(document) for document in documents]), 4 * len(tokens))
    return TokenDataset.open(prefix)


def random_documents(seed: int, count: int, longest: int = 200, vocab_size: int = 30_000) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [[*rng.integers(1, vocab_size, rng.integers(1, longest)).tolist(), EOS] for _ in range(count)]


def ngrams(documents: list[list[int]]) -> list[tuple[int, ...]]:
    """All n-grams inside documents, less the eos that ends each."""
    bodies = [document[:-1] for document in documents]
    return [tuple(body[i : i + NGRAM]) for body in bodies for i in range(len(body) - NGRAM + 1)]


def brute_force(heldout: list[list[int]], train: list[list[int]]) -> dict[str, float]:
    wanted, there = ngrams(heldout), set(ngrams(train))
    documents = {tuple(document) for document in train}
    return {
        "documents": sum(tuple(document) in documents for document in heldout) / len(heldout),
        "ngrams": sum(ngram in there for ngram in wanted) / len(wanted),
        "searched": 1.0,
    }


def test_inspect_says_what_is_there_and_json_takes_it(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path / "d", [[5, 6, 0], [0], [7, 8, 9, 29_999, 0, 0, 0, 0]])
    report = inspect(tmp_path / "d")
    assert json.loads(json.dumps(report)) == {
        "path": str(tmp_path / "d.bin"),
        "format": "spt_fast",
        "dtype": "uint16",
        "tokens": 12,
        "documents": 3,
        "bytes": 48,
        "document_tokens": {"mean": 4.0, "median": 3.0, "longest": 8},
        "vocab_size": 30_000,
        "max_id": 29_999,
        "eos_id": 0,
        "tokenizer_digest": "t",
        "digest": dataset.digest,
    }


def test_inspect_of_a_foreign_format(tmp_path: Path) -> None:
    np.array([3, 40_000], "<u2").tofile(tmp_path / "d.bin")
    report = inspect(tmp_path / "d", dtype="uint16", verify=True, overlap=tmp_path / "d")
    assert (report["format"], report["documents"], report["document_tokens"]) == ("headerless", None, None)
    assert report["verified"] == {"hashes": 0, "max_id": 40_000}
    assert report["overlap"] == {"with": str(tmp_path / "d"), "documents": None, "ngrams": None, "searched": 1.0}
    json.dumps(report)


def test_verify_counts_the_hashes_and_finds_the_largest_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spt_fast.data.writer.BLOCK_BYTES", 64)
    monkeypatch.setattr(inspection, "_STRETCH", 50)  # the scan crosses stretches
    documents = random_documents(1, 9)
    documents[4][0] = 29_998
    tokens = sum(map(len, documents))
    dataset_of(tmp_path / "d", documents)
    largest = max(max(document) for document in documents)
    assert inspect(tmp_path / "d", verify=True)["verified"] == {"hashes": -(-2 * tokens // 64), "max_id": largest}
    dataset_of(tmp_path / "many" / "a", documents)
    dataset_of(tmp_path / "many" / "b", documents[:1])
    blocks = -(-2 * tokens // 64) + -(-2 * len(documents[0]) // 64)
    assert inspect(tmp_path / "many", verify=True)["verified"] == {"hashes": blocks, "max_id": largest}
    dataset_of(tmp_path / "empty", [])
    assert inspect(tmp_path / "empty", verify=True)["verified"] == {"hashes": 0, "max_id": None}


def test_verify_finds_a_damaged_block(tmp_path: Path) -> None:
    dataset_of(tmp_path / "d", random_documents(1, 9))
    data = bytearray((tmp_path / "d.bin").read_bytes())
    data[30] ^= 1
    (tmp_path / "d.bin").write_bytes(data)
    inspect(tmp_path / "d")
    with pytest.raises(DataError, match=r"d\.bin: is damaged: block 0 of 1"):
        inspect(tmp_path / "d", verify=True)


def test_verify_finds_negative_ids_and_falling_document_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.array([3, -4, 5], "<i4").tofile(tmp_path / "d.bin")
    with pytest.raises(DataError, match="token id -4 is outside"):
        inspect(tmp_path / "d", dtype="int32", verify=True)
    monkeypatch.setattr(inspection, "_STRETCH", 2)
    good = dataset_of(tmp_path / "good", [[1, 2], [3], [4, 5], [6]])
    assert good.document_ends is not None
    for place in range(1, 4):
        ends = good.document_ends.copy()
        ends[place] = 0
        bad = shards.replace(good, document_ends=ends)
        with pytest.raises(DataError, match="document ends fall"):
            inspection.verify_all(bad)


def test_overlap_is_exact_where_all_ngrams_are_looked_for(tmp_path: Path) -> None:
    """Planted whole documents, parts of documents, near copies, and copies across a chunk's and a stretch's edge."""
    heldout = random_documents(2, 60)
    train = random_documents(3, 200)
    train[7:7] = heldout[:9]  # whole documents
    train[50] = [*train[50][:-1], *heldout[20][10:70], *train[51]]  # a part inside another document
    train[80] = [*heldout[30][:-2], 1, EOS]  # all but the last id
    train[90] = [1, *heldout[31][1:]]  # all but the first
    train.append(heldout[59])
    expected = brute_force(heldout, train)
    assert 0.1 < expected["documents"] < 0.2
    assert expected["documents"] < expected["ngrams"] < 0.5
    a, b = dataset_of(tmp_path / "a", heldout), dataset_of(tmp_path / "b", train)
    assert vars(overlap_share(a, b)) == pytest.approx(expected)
    for stretch, chunk in ((1000, 300), (997, 997), (64, 33), (1 << 20, 50)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(overlap, "_STRETCH", stretch)
            patch.setattr(overlap, "_CHUNK", chunk)
            assert vars(overlap_share(a, b)) == pytest.approx(expected)
    assert inspect(tmp_path / "a", overlap=tmp_path / "b")["overlap"] == {
        "with": str(tmp_path / "b"),
        **vars(overlap_share(a, b)),
    }


def test_ngrams_that_repeat_count_as_often_as_they_occur(tmp_path: Path) -> None:
    repeated, other = random_documents(17, 2)
    heldout, train = [repeated] * 5 + [other], [repeated]
    shares = overlap_share(dataset_of(tmp_path / "a", heldout), dataset_of(tmp_path / "b", train))
    assert vars(shares) == pytest.approx(brute_force(heldout, train))


def test_overlap_of_a_dataset_with_itself_and_with_a_stranger(tmp_path: Path) -> None:
    a = dataset_of(tmp_path / "a", random_documents(4, 300))
    b = dataset_of(tmp_path / "b", random_documents(5, 300))
    assert overlap_share(a, a) == Overlap(1.0, 1.0, 1.0)
    assert overlap_share(a, b).ngrams == 0.0


def test_a_tiny_vocabulary_gives_no_false_hits(tmp_path: Path) -> None:
    """Bytes of two values: the rolling hash of 8 ids says nothing, so the whole n-grams decide."""
    heldout, train = random_documents(6, 40, vocab_size=3), random_documents(7, 400, vocab_size=3)
    train[5:5] = heldout[:4]
    expected = brute_force(heldout, train)
    shares = overlap_share(dataset_of(tmp_path / "a", heldout), dataset_of(tmp_path / "b", train))
    assert vars(shares) == pytest.approx(expected)
    assert 0.1 <= expected["documents"] < 0.2


def test_equal_lengths_and_ends_do_not_make_documents_equal(tmp_path: Path) -> None:
    document = random_documents(8, 1, longest=20_000)[0]
    near = list(document)
    near[3] += 1
    a, b = dataset_of(tmp_path / "a", [document]), dataset_of(tmp_path / "b", [near])
    assert overlap_share(a, b).documents == 0.0


def test_the_tokens_around_documents_do_not_matter(tmp_path: Path) -> None:
    bodies = [document[:-1] for document in random_documents(9, 50)]
    plain = dataset_of(tmp_path / "plain", bodies, eos_id=None)
    behind = dataset_of(tmp_path / "behind", [[*body, EOS] for body in bodies] + [[EOS], []])
    before = dataset_of(tmp_path / "before", [[EOS, *body] for body in bodies] + [[EOS, EOS]])
    others = [[29_998, *body, 29_999] for body in bodies]
    both = dataset_of(tmp_path / "both", others, eos_id=29_999, bos_id=29_998)
    for heldout in (plain, behind, before, both):
        for train in (plain, behind, before, both):
            if heldout is not plain or train is not plain:
                assert overlap_share(heldout, train) == Overlap(1.0, 1.0, 1.0)


def test_dtypes_may_differ(tmp_path: Path) -> None:
    documents = random_documents(10, 50)
    narrow, wide = dataset_of(tmp_path / "n", documents), dataset_of(tmp_path / "w", documents, vocab_size=100_000)
    assert (narrow.tokens.dtype, wide.tokens.dtype) == (np.uint16, np.uint32)
    for a, b in ((narrow, wide), (wide, narrow)):
        assert overlap_share(a, b) == Overlap(1.0, 1.0, 1.0)


def test_without_documents_only_ngrams_are_compared(tmp_path: Path) -> None:
    documents = random_documents(11, 50)
    a = dataset_of(tmp_path / "a", documents)
    np.array([i for document in documents for i in document], "<u2").tofile(tmp_path / "raw.bin")
    raw = TokenDataset.open(tmp_path / "raw", dtype="uint16")
    assert overlap_share(a, raw) == Overlap(None, 1.0, 1.0)
    assert overlap_share(raw, a) == Overlap(None, 1.0, 1.0)


def test_too_short_for_an_ngram(tmp_path: Path) -> None:
    long = list(range(1, NGRAM + 1))
    a = dataset_of(tmp_path / "a", [long])
    short = dataset_of(tmp_path / "short", [long[:-1]] * 3)
    empty = dataset_of(tmp_path / "empty", [])
    assert overlap_share(a, a).ngrams == 1.0
    assert overlap_share(short, a) == Overlap(0.0, None, 1.0)
    assert overlap_share(a, short).ngrams == 0.0
    assert overlap_share(a, empty) == Overlap(0.0, 0.0, 0.0)
    assert overlap_share(empty, a) == Overlap(None, None, 1.0)


def test_sampled_ngrams_estimate_the_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heldout, train = random_documents(12, 400), random_documents(13, 400)
    train += [heldout[i] for i in range(0, 400, 3)]
    a, b = dataset_of(tmp_path / "a", heldout), dataset_of(tmp_path / "b", train)
    exact = overlap_share(a, b).ngrams
    monkeypatch.setattr(overlap, "MAX_NGRAMS", 3000)
    sampled = overlap_share(a, b).ngrams
    assert exact is not None
    assert sampled is not None
    assert sampled != exact
    assert sampled == pytest.approx(exact, abs=4 * (exact * (1 - exact) / 3000) ** 0.5)


def test_ngrams_are_sampled_evenly_over_all_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "MAX_NGRAMS", 1000)
    dataset = dataset_of(tmp_path / "d", random_documents(14, 100))
    starts = overlap._ngram_starts(dataset, EOS)
    possible = [
        i
        for end, length in zip(dataset.document_ends, np.diff(dataset.document_ends, prepend=0), strict=True)  # type: ignore[arg-type]
        for i in range(end - length, end - NGRAM)
    ]
    ranks = np.searchsorted(possible, starts)
    assert (np.array(possible)[ranks] == starts).all()
    assert len(starts) == 1000
    assert np.ptp(np.diff(ranks)) <= 1


def test_a_bounded_search_looks_at_stretches_spread_over_the_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overlap, "_STRETCH", 1000)
    heldout = random_documents(15, 300)
    a, b = dataset_of(tmp_path / "a", heldout), dataset_of(tmp_path / "b", random_documents(16, 300) + heldout)
    shares = overlap_share(a, b, max_train_tokens=b.num_tokens // 4)
    assert shares.searched == pytest.approx(0.25, abs=0.03)
    for share in (shares.documents, shares.ngrams):
        assert share is not None
        assert share == pytest.approx(0.25, abs=0.08)


def test_datasets_of_different_tokenizers_are_not_compared(tmp_path: Path) -> None:
    a, b = dataset_of(tmp_path / "a", [[1, 2]], "first"), dataset_of(tmp_path / "b", [[1, 2]], "second")
    with pytest.raises(DataError, match=r"different tokenizers \(digests first… and second…\)"):
        overlap_share(a, b)
    with pytest.raises(DataError, match="different tokenizers"):
        inspect(tmp_path / "a", overlap=tmp_path / "b")
