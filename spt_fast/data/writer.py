"""Writes token datasets: whole or not at all, and the parts of one text together."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from spt_fast.data.dataset_files import (
    BLOCK_BYTES,
    END_DTYPE,
    FORMAT,
    VERSION,
    base_prefix,
    files_of,
    is_ours,
    sha256_of,
)
from spt_fast.errors import DataError, invalid
from spt_fast.files import sync
from spt_fast.locks import locked
from spt_fast.outputs import run_around


class DatasetWriter:
    """Writes a dataset under temporary names beside PREFIX and moves it into place, whole, at `commit`.

    As a context manager it commits on success and aborts on any exception. Meanwhile no other process can write there
    (InUse). A dataset already at PREFIX stays as it is until `commit`; other programs' files there are never replaced
    (DataError). After a crash only temporary files may remain, or files without a .json, which don't open; the next
    writer removes them. Ids are uint16 if `vocab_size` <= 65,536, else uint32. A failing disk is a DataError too, and
    leaves nothing behind.

    part   which part of its text the dataset is: "whole", "train" or "heldout"
    dtype  of the ids on disk
    """

    def __init__(
        self,
        prefix: str | os.PathLike[str],
        *,
        vocab_size: int,
        eos_id: int | None,
        tokenizer_digest: str | None,
        bos_id: int | None = None,
        part: str = "whole",
    ) -> None:
        self.prefix = base_prefix(Path(prefix))
        if self.prefix.name in ("", ".."):
            expected = "name the files, not only their folder, such as data/general"
            raise DataError(invalid("out", str(prefix), expected), argument=True)
        self.dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
        self._vocab_size, self._eos_id, self._tokenizer_digest = vocab_size, eos_id, tokenizer_digest
        self._bos = {} if bos_id is None else {"bos_id": bos_id}
        self._part = part
        self.num_tokens = self.num_documents = self.num_bytes = 0
        self._max_id: int | None = None
        self._idx_hash = hashlib.sha256()
        self._block_hash, self._block_filled = hashlib.sha256(), 0
        self._blocks: list[str] = []
        if run := run_around(self.prefix):
            raise DataError(f"out: {self.prefix} is inside the run {run}; choose another place", argument=True)
        self._partial = _partial(self.prefix)
        self._files: list[BinaryIO] = []
        self._is_replacing = False
        self._lock = contextlib.ExitStack()
        with self.clean_failure():
            self.prefix.parent.mkdir(parents=True, exist_ok=True)
            lock = self.prefix.parent / f".{self.prefix.name}.lock"
            self._lock.enter_context(locked(lock, f"out: {self.prefix}", argument=True))
        try:
            _refuse_foreign(self.prefix)
            with self.clean_failure():
                _remove_leftovers(self.prefix)
                for path in self._partial[:2]:
                    self._files.append(path.open("xb"))
        except BaseException:
            self._lock.close()
            raise

    def write(self, tokens: np.ndarray, document_lengths: np.ndarray, num_bytes: int) -> None:
        """Append whole documents.

        tokens: integers [sum of document_lengths]; document_lengths: integers [documents], in tokens; num_bytes: UTF-8
        bytes of their text. Raises DataError (and aborts) for an id outside the vocabulary or a failing disk.
        """
        ends = self.num_tokens + np.cumsum(document_lengths, dtype=END_DTYPE)
        assert len(tokens) == (int(ends[-1]) - self.num_tokens if len(ends) else 0), "lengths don't sum to the tokens"
        if len(tokens):
            smallest, largest = int(tokens.min()), int(tokens.max())
            if smallest < 0 or largest >= self._vocab_size:
                self.abort()
                raise DataError(
                    f"{self.prefix}: token id {smallest if smallest < 0 else largest} is outside the vocabulary of "
                    f"{self._vocab_size:,}; use the tokenizer that the vocabulary size belongs to"
                )
            self._max_id = max(largest, self._max_id or 0)
        data, end_bytes = tokens.astype(self.dtype).tobytes(), ends.tobytes()
        self._idx_hash.update(end_bytes)
        self._hash_blocks(data)
        with self.clean_failure():
            self._files[0].write(data)
            self._files[1].write(end_bytes)
        self.num_tokens += len(tokens)
        self.num_documents += len(ends)
        self.num_bytes += num_bytes

    def commit(self) -> dict[str, Any]:
        """Make the dataset durable and visible; returns its metadata, the content of PREFIX.json."""
        return commit(self)[0]

    def _seal(self) -> dict[str, Any]:
        """Make everything durable under temporary names."""
        if self._block_filled:
            self._close_block()
        metadata: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "part": self._part,
            "dtype": self.dtype.name,
            "vocab_size": self._vocab_size,
            "tokenizer_digest": self._tokenizer_digest,
            "eos_id": self._eos_id,
            **self._bos,
            "num_tokens": self.num_tokens,
            "num_documents": self.num_documents,
            "num_bytes": self.num_bytes,
            "max_id": self._max_id,
            "block_bytes": BLOCK_BYTES,
            "blocks_sha256": self._blocks,
            "idx_sha256": self._idx_hash.hexdigest(),
        }
        metadata["sha256"] = sha256_of(metadata)
        with self.clean_failure():
            self._files.append(self._partial[2].open("xb"))
            self._files[2].write(json.dumps(metadata, indent=1).encode())
            for file in self._files:
                file.flush()
                os.fsync(file.fileno())
                file.close()
        return metadata

    def abort(self) -> None:
        """Remove everything written so far, unless it was committed."""
        for file in self._files:
            with contextlib.suppress(OSError):  # a full disk fails the flush in close() once more
                file.close()
        torn = files_of(self.prefix) if self._is_replacing else ()
        for path in (*torn, *self._partial):
            with contextlib.suppress(OSError):  # such as a folder that turned out to be a file
                path.unlink()
        self._lock.close()

    def __enter__(self) -> DatasetWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is None:
            self.commit()
        else:
            self.abort()

    @contextlib.contextmanager
    def clean_failure(self) -> Iterator[None]:
        """Turn a failing disk inside into a DataError, and remove what was written."""
        try:
            yield
        except OSError as error:
            self.abort()
            raise DataError(
                f"{self.prefix}.bin could not be written ({error.strerror}) and was removed; make room, or choose "
                "another place, and run it again"
            ) from error

    def _hash_blocks(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            part = view[: BLOCK_BYTES - self._block_filled]
            self._block_hash.update(part)
            self._block_filled += len(part)
            if self._block_filled == BLOCK_BYTES:
                self._close_block()
            view = view[len(part) :]

    def _close_block(self) -> None:
        self._blocks.append(self._block_hash.hexdigest())
        self._block_hash, self._block_filled = hashlib.sha256(), 0


def commit(*writers: DatasetWriter, obsolete: Path | None = None) -> list[dict[str, Any]]:
    """Make the parts of one text visible together, and remove the dataset at `obsolete`; returns their metadata.

    At no time, not even after a kill, can one of them be opened beside an older version of another.
    """
    try:
        metadata = [writer._seal() for writer in writers]
        with writers[0].clean_failure():
            for writer in writers:
                writer._is_replacing = True
                files_of(writer.prefix)[2].unlink(missing_ok=True)
            for path in files_of(obsolete) if obsolete else ():  # the .json last, which marks the rest as ours
                path.unlink(missing_ok=True)
            for writer in reversed(writers):
                for partial, path in zip(writer._partial, files_of(writer.prefix), strict=True):
                    partial.rename(path)
            sync(writers[0].prefix.parent)
    except BaseException:
        for writer in writers:
            writer.abort()
        raise
    for writer in writers:
        writer._is_replacing = False
        writer._lock.close()
    return metadata


def _partial(prefix: Path) -> list[Path]:
    """The names of the three files while they are written, unique to this program."""
    return [path.with_name(f".{path.name}.spt-fast.tmp") for path in files_of(prefix)]


def _refuse_foreign(prefix: Path) -> None:
    """DataError if writing to `prefix` would replace a file that isn't part of a dataset of ours."""
    there = [str(path) for path in files_of(prefix) if os.path.lexists(path)]
    if there and not is_ours(files_of(prefix)[2]) and not _is_torn(prefix):
        raise DataError(
            f"{', '.join(there)} would be overwritten, and is not a whole dataset of this program; "
            "move it away or choose another prefix"
        )


def _is_torn(prefix: Path) -> bool:
    """Whether a commit was killed there: the .json is moved last, after it was complete under its temporary name."""
    return not os.path.lexists(files_of(prefix)[2]) and is_ours(_partial(prefix)[2])


def _remove_leftovers(prefix: Path) -> None:
    """Remove the files of a killed writer. The temporary .json, which marks a torn commit, goes last."""
    torn = files_of(prefix)[:2] if _is_torn(prefix) else ()
    for path in (*torn, *_partial(prefix)):
        path.unlink(missing_ok=True)
