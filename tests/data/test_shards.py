from __future__ import annotations

import copy
import errno
import hashlib
import itertools
import json
import os
import pickle
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spt_fast.data.shards import DatasetWriter, TokenDataset, commit
from spt_fast.errors import DataError
from spt_fast.locks import InUse


def write(prefix: Path, documents: list[list[int]], vocab_size: int = 1000, num_bytes: int = 0) -> dict:
    tokens = np.array([i for document in documents for i in document], np.int64)
    with DatasetWriter(prefix, vocab_size=vocab_size, eos_id=0, tokenizer_digest="t") as writer:
        writer.write(tokens, np.array([len(document) for document in documents]), num_bytes)
    return json.loads(Path(f"{prefix}.json").read_text())


def flip(path: Path, byte: int) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= 0x10
    path.write_bytes(data)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


DOCUMENTS = [[5, 6, 0], [0], [7, 8, 9, 10, 0], [999, 0]]


def test_the_three_files_byte_for_byte(tmp_path: Path) -> None:
    write(tmp_path / "d", DOCUMENTS, num_bytes=17)
    ids = [5, 6, 0, 0, 7, 8, 9, 10, 0, 999, 0]
    bin_bytes = b"".join(i.to_bytes(2, "little") for i in ids)
    idx_bytes = b"".join(i.to_bytes(8, "little") for i in [3, 4, 9, 11])
    assert names(tmp_path) == ["d.bin", "d.idx", "d.json"]
    assert (tmp_path / "d.bin").read_bytes() == bin_bytes
    assert (tmp_path / "d.idx").read_bytes() == idx_bytes
    metadata = json.loads((tmp_path / "d.json").read_text())
    metadata.pop("sha256")
    assert metadata == {
        "format": "spt_fast tokens",
        "version": 1,
        "part": "whole",
        "dtype": "uint16",
        "vocab_size": 1000,
        "tokenizer_digest": "t",
        "eos_id": 0,
        "num_tokens": 11,
        "num_documents": 4,
        "num_bytes": 17,
        "max_id": 999,
        "block_bytes": 64 * 2**20,
        "blocks_sha256": [hashlib.sha256(bin_bytes).hexdigest()],
        "idx_sha256": hashlib.sha256(idx_bytes).hexdigest(),
    }


def test_open_gives_what_was_written(tmp_path: Path) -> None:
    write(tmp_path / "d", DOCUMENTS, num_bytes=17)
    dataset = TokenDataset.open(tmp_path / "d")
    assert dataset.tokens.tolist() == [5, 6, 0, 0, 7, 8, 9, 10, 0, 999, 0]
    assert isinstance(dataset.tokens, np.memmap)
    assert not dataset.tokens.flags.writeable
    assert dataset.document_ends is not None
    assert dataset.document_ends.tolist() == [3, 4, 9, 11]
    assert (dataset.num_tokens, dataset.num_documents, dataset.num_bytes) == (11, 4, 17)
    assert (dataset.vocab_size, dataset.max_id, dataset.eos_id, dataset.tokenizer_digest) == (1000, 999, 0, "t")
    assert (dataset.path, dataset.offset_bytes, dataset.format) == (tmp_path / "d.bin", 0, "spt_fast")
    dataset.verify()


@pytest.mark.parametrize("extension", ["", ".bin", ".idx", ".json"])
def test_the_prefix_may_carry_an_extension_and_dots(tmp_path: Path, extension: str) -> None:
    write(tmp_path / "chem.heldout", DOCUMENTS)
    write(tmp_path / "chem", DOCUMENTS[:1])
    assert TokenDataset.open(f"{tmp_path}/chem.heldout{extension}").num_documents == 4
    assert TokenDataset.open(f"{tmp_path}/chem{extension}").num_documents == 1


def test_uint16_holds_ids_to_65535_and_uint32_those_beyond(tmp_path: Path) -> None:
    write(tmp_path / "small", [[65_535]], vocab_size=65_536)
    write(tmp_path / "large", [[65_536, 4_000_000_000]], vocab_size=2**32)
    small, large = TokenDataset.open(tmp_path / "small"), TokenDataset.open(tmp_path / "large")
    assert (small.tokens.dtype, small.tokens.tolist()) == (np.uint16, [65_535])
    assert (large.tokens.dtype, large.tokens.tolist()) == (np.uint32, [65_536, 4_000_000_000])
    assert large.max_id == 4_000_000_000


@pytest.mark.parametrize("bad", [1000, 70_000, -1])
def test_an_id_outside_the_vocabulary_is_refused_and_nothing_is_left(tmp_path: Path, bad: int) -> None:
    with pytest.raises(DataError, match=f"{bad} is outside the vocabulary of 1,000"):
        write(tmp_path / "d", [[1, bad]])
    assert names(tmp_path) == []


@settings(max_examples=40)
@given(
    documents=st.lists(st.lists(st.integers(0, 70_000), max_size=30), max_size=20),
    cuts=st.lists(st.integers(0, 20), max_size=4),
    block=st.integers(1, 20),
)
def test_any_documents_in_any_batches_over_any_blocks(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], cuts: list[int], block: int
) -> None:
    folder = tmp_path_factory.mktemp("d")
    bounds = [0, *sorted(min(cut, len(documents)) for cut in cuts), len(documents)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("spt_fast.data.writer.BLOCK_BYTES", 4 * block)
        with DatasetWriter(folder / "d", vocab_size=70_001, eos_id=None, tokenizer_digest=None) as writer:
            for first, last in itertools.pairwise(bounds):
                batch = documents[first:last]
                flat = np.array([i for document in batch for i in document], np.uint32)
                writer.write(flat, np.array([len(document) for document in batch], np.int32), 3)
        write(folder / "again", documents, vocab_size=70_001)
    dataset = TokenDataset.open(folder / "d")
    assert dataset.tokens.tolist() == [i for document in documents for i in document]
    assert dataset.document_ends is not None
    assert dataset.document_ends.tolist() == np.cumsum([len(document) for document in documents], dtype=int).tolist()
    assert dataset.num_bytes == 3 * (len(bounds) - 1)
    assert dataset.max_id == max((i for document in documents for i in document), default=None)
    assert dataset.digest == TokenDataset.open(folder / "again").digest  # of the content, not of how it was written
    dataset.verify()


def test_every_blocks_bit_flip_is_found_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spt_fast.data.writer.BLOCK_BYTES", 16)
    write(tmp_path / "d", [list(range(20)), list(range(15))])  # 70 bytes: four blocks of 16 and one of 6
    whole = (tmp_path / "d.bin").read_bytes()
    for byte in range(len(whole)):
        flip(tmp_path / "d.bin", byte)
        dataset = TokenDataset.open(tmp_path / "d")
        with pytest.raises(DataError, match=rf"d\.bin: is damaged: block {byte // 16} of 5 "):
            dataset.verify()
        (tmp_path / "d.bin").write_bytes(whole)
    TokenDataset.open(tmp_path / "d").verify()


def test_a_flipped_bit_in_the_document_ends_is_found(tmp_path: Path) -> None:
    write(tmp_path / "d", DOCUMENTS)
    flip(tmp_path / "d.idx", 3 * 8)  # the last end: held against the token count at open
    with pytest.raises(DataError, match=r"d\.idx: is damaged"):
        TokenDataset.open(tmp_path / "d")
    flip(tmp_path / "d.idx", 3 * 8)
    flip(tmp_path / "d.idx", 1)  # the first becomes 4099
    with pytest.raises(DataError, match=r"d\.idx: is damaged"):
        TokenDataset.open(tmp_path / "d")
    flip(tmp_path / "d.idx", 1)
    ends = np.fromfile(tmp_path / "d.idx", "<u8")
    ends[0] = 2  # plausible, so only the hash can tell
    ends.tofile(tmp_path / "d.idx")
    with pytest.raises(DataError, match=r"d\.idx: is damaged: its sha256"):
        TokenDataset.open(tmp_path / "d").verify()


@pytest.mark.parametrize(("name", "bytes_found", "bytes_expected"), [("d.bin", 21, 22), ("d.idx", 31, 32)])
def test_truncated_files_are_found_at_open(tmp_path: Path, name: str, bytes_found: int, bytes_expected: int) -> None:
    write(tmp_path / "d", DOCUMENTS)
    os.truncate(tmp_path / name, bytes_found)
    with pytest.raises(DataError, match=rf"{name}: is truncated: {bytes_found} bytes found, {bytes_expected} expected"):
        TokenDataset.open(tmp_path / "d")


@pytest.mark.parametrize("name", ["d.bin", "d.idx"])
@pytest.mark.parametrize("extra", [1, 2, 8])
def test_grown_files_are_found_at_open(tmp_path: Path, name: str, extra: int) -> None:
    write(tmp_path / "d", DOCUMENTS)
    with (tmp_path / name).open("ab") as file:
        file.write(bytes(extra))
    with pytest.raises(DataError, match=rf"{name}: is longer than it should be"):
        TokenDataset.open(tmp_path / "d")


@pytest.mark.parametrize("name", ["d.bin", "d.idx"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    write(tmp_path / "d", DOCUMENTS)
    (tmp_path / name).unlink()
    with pytest.raises(DataError, match=rf"{name} is missing"):
        TokenDataset.open(tmp_path / "d")


def test_without_its_json_nothing_opens_and_the_message_says_so(tmp_path: Path) -> None:
    write(tmp_path / "d", DOCUMENTS)
    (tmp_path / "d.json").unlink()
    with pytest.raises(DataError, match=r"d\.json is missing or damaged"):
        TokenDataset.open(tmp_path / "d")


def test_every_edit_of_the_json_is_found(tmp_path: Path) -> None:
    metadata = write(tmp_path / "d", DOCUMENTS)
    for key in metadata:
        edited = {**metadata, key: "x" if isinstance(metadata[key], str) else 7}
        (tmp_path / "d.json").write_text(json.dumps(edited))
        with pytest.raises(DataError, match=r"d\.json"):
            TokenDataset.open(tmp_path / "d")
    (tmp_path / "d.json").write_text(json.dumps(metadata))  # other white space alone is no damage
    TokenDataset.open(tmp_path / "d")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("num_tokens", "7"), ("num_documents", None), ("block_bytes", 0), ("block_bytes", -1), ("dtype", ["uint16"])),
        *(("max_id", -1), ("blocks_sha256", "ab"), ("num_bytes", True), ("vocab_size", 2.5), ("idx_sha256", None)),
    ],
)
def test_a_field_that_no_writer_writes_is_refused_even_if_the_hash_fits(
    tmp_path: Path, field: str, value: object
) -> None:
    metadata = write(tmp_path / "d", DOCUMENTS)
    del metadata["sha256"]
    for edited in (metadata | {field: value}, {key: item for key, item in metadata.items() if key != field}):
        fitting = hashlib.sha256(json.dumps(edited, sort_keys=True).encode()).hexdigest()
        (tmp_path / "d.json").write_text(json.dumps(edited | {"sha256": fitting}))
        with pytest.raises(DataError, match=rf"d\.json was edited: its {field} is"):
            TokenDataset.open(tmp_path / "d")


def test_block_hashes_that_do_not_cover_the_ids_are_no_proof(tmp_path: Path) -> None:
    metadata = write(tmp_path / "d", DOCUMENTS)
    del metadata["sha256"]
    for blocks in ([], [*metadata["blocks_sha256"], "0" * 64]):
        edited = metadata | {"blocks_sha256": blocks}
        fitting = hashlib.sha256(json.dumps(edited, sort_keys=True).encode()).hexdigest()
        (tmp_path / "d.json").write_text(json.dumps(edited | {"sha256": fitting}))
        with pytest.raises(DataError, match=rf"d\.json was edited: it has {len(blocks)} block hashes"):
            TokenDataset.open(tmp_path / "d").verify()


def test_json_that_is_nested_too_deeply_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "d", DOCUMENTS)
    text = (tmp_path / "d.json").read_text()
    (tmp_path / "d.json").write_text(text.rstrip("}") + ', "x": ' + "[" * 100_000)
    with pytest.raises(DataError, match=r"d\.json: is damaged: it isn't JSON"):
        TokenDataset.open(tmp_path / "d")


def test_every_bit_flip_and_truncation_of_the_json_is_found(tmp_path: Path) -> None:
    write(tmp_path / "d", DOCUMENTS)
    path = tmp_path / "d.json"
    whole = path.read_bytes()
    for byte in range(len(whole)):
        flip(path, byte)
        with pytest.raises(DataError):
            TokenDataset.open(tmp_path / "d")
        path.write_bytes(whole[:byte])
        with pytest.raises(DataError):
            TokenDataset.open(tmp_path / "d")
        path.write_bytes(whole)


def test_a_newer_version_is_refused_by_number(tmp_path: Path) -> None:
    metadata = write(tmp_path / "d", DOCUMENTS)
    (tmp_path / "d.json").write_text(json.dumps({**metadata, "version": 2}))
    with pytest.raises(DataError, match="version 2; this program reads 1"):
        TokenDataset.open(tmp_path / "d")


def test_a_declared_dtype_must_agree(tmp_path: Path) -> None:
    write(tmp_path / "d", DOCUMENTS)
    assert TokenDataset.open(tmp_path / "d", dtype="uint16").num_tokens == 11
    with pytest.raises(DataError, match="uint32 was declared, but its header says uint16"):
        TokenDataset.open(tmp_path / "d", dtype="uint32")
    with pytest.raises(DataError, match="'float32' is invalid: token ids have one of"):
        TokenDataset.open(tmp_path / "d", dtype="float32")


def test_an_empty_dataset_opens(tmp_path: Path) -> None:
    write(tmp_path / "d", [])
    dataset = TokenDataset.open(tmp_path / "d")
    assert (dataset.num_tokens, dataset.num_documents, dataset.max_id) == (0, 0, None)
    assert not dataset.tokens.flags.writeable
    dataset.verify()


def test_opening_costs_the_same_at_any_size(tmp_path: Path) -> None:
    """A sparse file of 2 TB, with 1e9 documents: mapped, not read."""
    tokens, documents = 10**12, 10**9
    metadata = {
        **write(tmp_path / "d", DOCUMENTS),
        "num_tokens": tokens,
        "num_documents": documents,
        "blocks_sha256": ["0"] * 10,
    }
    metadata.pop("sha256")
    metadata["sha256"] = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode()).hexdigest()
    (tmp_path / "d.json").write_text(json.dumps(metadata))
    try:
        os.truncate(tmp_path / "d.bin", 2 * tokens)
        os.truncate(tmp_path / "d.idx", 0)
        os.truncate(tmp_path / "d.idx", 8 * documents)
    except OSError as error:
        pytest.skip(f"no sparse files of this size here: {error}")
    with (tmp_path / "d.idx").open("r+b") as file:
        file.seek(8 * (documents - 1))
        file.write(tokens.to_bytes(8, "little"))
    dataset = TokenDataset.open(tmp_path / "d")
    assert (dataset.num_tokens, dataset.num_documents, int(dataset.tokens[-1])) == (tokens, documents, 0)
    assert dataset.limit(10**9).num_documents == documents  # all but the last are empty: the first with tokens is kept


@pytest.mark.parametrize(
    ("limit", "tokens", "documents"), [(1, 3, 1), (3, 3, 1), (4, 4, 2), (8, 4, 2), (9, 9, 3), (10, 9, 3), (11, 11, 4)]
)
def test_limit_takes_the_first_whole_documents(tmp_path: Path, limit: int, tokens: int, documents: int) -> None:
    write(tmp_path / "d", DOCUMENTS, num_bytes=17)
    dataset = TokenDataset.open(tmp_path / "d")
    limited = dataset.limit(limit)
    assert limited.tokens.tolist() == dataset.tokens[:tokens].tolist()
    assert limited.document_ends is not None
    assert limited.document_ends.tolist() == [3, 4, 9, 11][:documents]
    assert np.shares_memory(limited.tokens, dataset.tokens)
    assert not limited.tokens.flags.writeable
    assert limited.num_bytes == (17 if tokens == 11 else None)
    limited.verify()


def test_limit_keeps_at_least_one_document_that_has_tokens(tmp_path: Path) -> None:
    write(tmp_path / "d", [[], [1, 2, 3], [4]])
    limited = TokenDataset.open(tmp_path / "d").limit(1)
    assert limited.tokens.tolist() == [1, 2, 3]
    assert limited.num_documents == 2


@pytest.mark.parametrize("limit", [0, -5, 1.5, "1K"])
def test_a_limit_below_one_token_or_of_none_is_refused(tmp_path: Path, limit: Any) -> None:
    write(tmp_path / "d", DOCUMENTS)
    with pytest.raises(DataError, match="at least 1"):
        TokenDataset.open(tmp_path / "d").limit(limit)


@pytest.mark.parametrize("limit", [10**6, 9000])
@pytest.mark.parametrize("files", [1, 2])
def test_a_pickle_and_a_copy_map_the_files_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: int, limit: int
) -> None:
    for i in range(files):
        write(tmp_path / f"d{i}", [[i] * 4000] * 3)
    monkeypatch.chdir(tmp_path)
    data = TokenDataset.open([f"d{i}" for i in range(files)] if files > 1 else "d0").limit(limit)
    pickled = pickle.dumps(data)
    assert len(pickled) < 4000
    for again in (pickle.loads(pickled), copy.deepcopy(data), copy.copy(data)):
        assert np.array_equal(again.tokens[:], data.tokens[:])
        assert np.array_equal(again.document_ends, data.document_ends)
        assert all(isinstance(part.tokens, np.memmap) for part in again.shards or [again])
        assert (again.digest, again.stamp, again.num_bytes) == (data.digest, data.stamp, data.num_bytes)
    monkeypatch.chdir("/")
    assert np.array_equal(pickle.loads(pickled).tokens[:], data.tokens[:])
    os.utime(tmp_path / "d0.bin", ns=(1, 1))
    with pytest.raises(DataError, match=r"d0\.bin: was written since this dataset was opened; open it again"):
        pickle.loads(pickled)
    (tmp_path / "d0.bin").unlink()
    with pytest.raises(DataError, match=r"d0\.bin: can't be read \(No such file or directory\)"):
        pickle.loads(pickled)


def test_digests_tell_content_and_cut_apart(tmp_path: Path) -> None:
    write(tmp_path / "a", [[1, 2], [3, 4]])
    write(tmp_path / "b", [[1, 2, 3], [4]])  # the same ids in other documents
    write(tmp_path / "c", [[1, 2], [3, 5]])
    a, b, c = (TokenDataset.open(tmp_path / name) for name in "abc")
    digests = [a.digest, b.digest, c.digest, a.limit(2).digest, b.limit(3).digest, c.limit(2).digest]
    assert len(set(digests)) == 6
    assert a.limit(2).digest == a.limit(3).digest  # the same cut
    assert a.limit(4).digest == a.digest


def test_an_exception_while_writing_leaves_the_old_dataset_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path / "d", DOCUMENTS)

    def interrupted() -> None:
        with DatasetWriter(tmp_path / "d", vocab_size=10, eos_id=None, tokenizer_digest=None) as writer:
            writer.write(np.arange(5), np.array([5]), 5)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert names(tmp_path) == ["d.bin", "d.idx", "d.json"]
    dataset = TokenDataset.open(tmp_path / "d")
    dataset.verify()
    assert dataset.num_tokens == 11


def test_a_commit_is_on_the_disk_before_and_after_it_is_visible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[bool, list[str]]] = []
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: synced.append((stat.S_ISDIR(os.fstat(descriptor).st_mode), names(tmp_path)))
    )
    write(tmp_path / "d", DOCUMENTS)
    partial = [".d.bin.spt-fast.tmp", ".d.idx.spt-fast.tmp", ".d.json.spt-fast.tmp", ".d.lock"]
    assert synced == [(False, partial)] * 3 + [(True, [".d.lock", "d.bin", "d.idx", "d.json"])]


def test_a_commit_replaces_the_old_dataset(tmp_path: Path) -> None:
    write(tmp_path / "d", DOCUMENTS)
    write(tmp_path / "d", [[1, 2]])
    dataset = TokenDataset.open(tmp_path / "d")
    dataset.verify()
    assert dataset.tokens.tolist() == [1, 2]
    assert names(tmp_path) == ["d.bin", "d.idx", "d.json"]


@pytest.mark.parametrize("over_an_old_one", [False, True])
def test_a_kill_at_any_step_of_the_commit_never_leaves_a_wrong_dataset(tmp_path: Path, over_an_old_one: bool) -> None:
    """os._exit at the k-th call that changes the folder: what opens afterwards is the old or the new one, whole."""
    script = """
import os, sys
from pathlib import Path
import numpy as np
from spt_fast.data.shards import DatasetWriter
prefix, steps = sys.argv[1], int(sys.argv[2])
def dying(function):
    def call(*args, **kwargs):
        global steps
        if steps == 0:
            os._exit(9)
        steps -= 1
        return function(*args, **kwargs)
    return call
Path.rename, Path.unlink, os.fsync = dying(Path.rename), dying(Path.unlink), dying(os.fsync)
with DatasetWriter(prefix, vocab_size=1000, eos_id=0, tokenizer_digest="t") as writer:
    writer.write(np.arange(11), np.array([11]), 1)
"""
    outcomes = set()
    for steps in range(14):
        prefix = tmp_path / str(steps) / "d"
        if over_an_old_one:
            write(prefix, DOCUMENTS)  # 11 tokens too: sizes alone can't tell the new .bin from the old
        done = subprocess.run([sys.executable, "-c", script, str(prefix), str(steps)], check=False).returncode == 0
        try:
            dataset = TokenDataset.open(prefix)
        except DataError:
            outcomes.add("refused")
            assert not done
            continue
        dataset.verify()
        outcomes.add("new" if dataset.tokens.tolist() == list(range(11)) else "old")
        assert dataset.num_documents == (1 if dataset.tokens.tolist() == list(range(11)) else 4)
    assert outcomes == ({"old", "refused", "new"} if over_an_old_one else {"refused", "new"})


@pytest.mark.parametrize("over_an_old_one", [False, True])
def test_a_full_disk_is_one_message_and_leaves_nothing(tmp_path: Path, over_an_old_one: bool) -> None:
    """A process whose files may not pass 64 KiB meets the same OSError path as a full disk does."""
    if over_an_old_one:
        write(tmp_path / "d", DOCUMENTS)
    script = """
import resource, sys
import numpy as np
from spt_fast.data.shards import DatasetWriter
from spt_fast.errors import DataError
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
try:
    with DatasetWriter(sys.argv[1], vocab_size=1000, eos_id=0, tokenizer_digest="t") as writer:
        for _ in range(100):
            writer.write(np.zeros(1000, int), np.array([1000]), 1)
except DataError as error:
    sys.exit(str(error))
"""
    result = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "d")], capture_output=True, text=True, check=False
    )
    assert f"{tmp_path / 'd'}.bin could not be written (File too large)" in result.stderr
    assert "Traceback" not in result.stderr
    assert names(tmp_path) == (["d.bin", "d.idx", "d.json"] if over_an_old_one else [])
    if over_an_old_one:
        TokenDataset.open(tmp_path / "d").verify()


def test_a_disk_that_is_full_only_at_commit_is_the_same_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = DatasetWriter(tmp_path / "d", vocab_size=10, eos_id=None, tokenizer_digest=None)
    writer.write(np.arange(5), np.array([5]), 5)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match="No space left on device"):
        writer.commit()
    assert names(tmp_path) == []


def test_a_file_system_that_syncs_no_folders_keeps_the_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As some network file systems and mounts of Windows drives."""
    fsync, reason = os.fsync, errno.EINVAL

    def of_files(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(reason, os.strerror(reason))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", of_files)
    write(tmp_path / "d", DOCUMENTS)
    TokenDataset.open(tmp_path / "d").verify()
    reason = errno.EIO
    with pytest.raises(DataError, match="could not be written"):
        write(tmp_path / "e", DOCUMENTS)
    assert names(tmp_path) == ["d.bin", "d.idx", "d.json"]


def test_a_folder_that_cannot_be_made_is_the_same_message(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="could not be written"):
        write(tmp_path / "file" / "d", DOCUMENTS)


@pytest.mark.parametrize("name", ["d.json", "d.bin", "d.idx"])
def test_a_file_of_another_program_is_never_overwritten(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"text": "the only copy of a corpus"}\n')
    with pytest.raises(DataError, match=f"{name} would be overwritten"):
        write(tmp_path / "d", DOCUMENTS)
    assert names(tmp_path) == [name]


@pytest.mark.parametrize("folder", [".", "..", "", "a/.."])
def test_a_prefix_must_name_files(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"out: .* is invalid: name the files, not only their folder"):
        write(Path(folder), DOCUMENTS)
    assert names(tmp_path) == []


def test_one_writer_at_a_time_and_no_link_is_written_through(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    (tmp_path / ".d.bin.spt-fast.tmp").symlink_to(tmp_path / "precious")
    with DatasetWriter(tmp_path / "d", vocab_size=10, eos_id=None, tokenizer_digest=None) as first:
        first.write(np.arange(5), np.array([5]), 5)
        with pytest.raises(InUse, match=rf"out: .*/d: in use by process {os.getpid()} on .* since .*; wait until"):
            write(tmp_path / "d", DOCUMENTS)
    assert TokenDataset.open(tmp_path / "d").verify()
    assert TokenDataset.open(tmp_path / "d").num_tokens == 5
    assert (tmp_path / "precious").read_text() == "mine"


def test_parts_of_a_text_are_replaced_together_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fails at any of the six renames leaves neither part, and the next writer has its way."""

    def pair() -> list[DatasetWriter]:
        made = [DatasetWriter(tmp_path / n, vocab_size=10, eos_id=None, tokenizer_digest=None) for n in ("d", "d.h")]
        for writer in made:
            writer.write(np.arange(5), np.array([5]), 5)
        return made

    commit(*pair())
    rename = Path.rename
    for failing in range(6):
        calls = iter(range(7))

        def broken(path: Path, to: Path, calls: Iterator[int] = calls, failing: int = failing) -> Path:
            if next(calls) == failing:
                raise OSError(5, "Input/output error")
            return rename(path, to)

        monkeypatch.setattr(Path, "rename", broken)
        with pytest.raises(DataError, match="Input/output error"):
            commit(*pair())
        assert names(tmp_path) == []
        monkeypatch.setattr(Path, "rename", rename)
        commit(*pair())
        assert len(names(tmp_path)) == 6


def test_leftovers_of_a_killed_writer_are_overwritten(tmp_path: Path) -> None:
    for name in (".d.bin.spt-fast.tmp", ".d.idx.spt-fast.tmp", ".d.json.spt-fast.tmp", "d.bin.partial", "d.bin.tmp"):
        (tmp_path / name).write_bytes(bytes(1000))
    write(tmp_path / "d", DOCUMENTS)
    assert names(tmp_path) == ["d.bin", "d.bin.partial", "d.bin.tmp", "d.idx", "d.json"]  # a user's own stay
    TokenDataset.open(tmp_path / "d").verify()
