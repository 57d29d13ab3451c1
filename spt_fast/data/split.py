"""Held-out text, exact in bytes: the documents whose text has the lowest hashes, up to the share.

Hashes ignore white space, so that copies of a document, also those wrapped or indented differently, are on one side, in
every file and every run; a larger share holds out a superset. The amount of text is known only at the end. Until then
the encoded documents wait in a file without a name, which a kill does not leave behind.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager
from fractions import Fraction
from pathlib import Path

import numpy as np

from spt_fast.data.workers import Encoded

DOCUMENT = np.dtype([("hash", "<u8"), ("tokens", "<i8"), ("bytes", "<i8")])
BUCKETS_LOG2 = 16
DOCUMENTS_AT_A_TIME = 1 << 16
TOKENS_AT_A_TIME = 1 << 22


class Split(AbstractContextManager["Split"]):
    """Encoded documents that wait in a folder, with room for them, until all of the text is known."""

    def __init__(self, folder: Path, dtype: np.dtype) -> None:
        self._dtype = dtype
        self._tokens = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - `__exit__` closes it
        self._documents = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self._bucket_bytes = np.zeros(1 << BUCKETS_LOG2, np.int64)
        """Bytes of text by the leading bits of its hash."""
        self.num_documents = 0

    def __exit__(self, *error: object) -> None:
        self._tokens.close()
        self._documents.close()

    def add(self, encoded: Encoded) -> None:
        documents = np.empty(len(encoded.hashes), DOCUMENT)
        documents["hash"], documents["tokens"] = encoded.hashes, encoded.document_lengths
        documents["bytes"] = encoded.document_bytes
        np.add.at(self._bucket_bytes, _bucket(documents), _weight(documents))
        self.num_documents += len(documents)
        self._tokens.write(encoded.tokens.astype(self._dtype).data)
        self._documents.write(documents.data)

    def parts(self, share: Fraction) -> Iterator[tuple[Encoded, Encoded]]:
        """All of it in order, in pieces, each divided into text to train on and text to hold out: `share` of the bytes,
        within one document and its copies, and at least one document."""
        if self.num_documents == 0:
            return
        last = self._last_held_out(share)
        self._tokens.seek(0)
        for documents in self._read_documents():
            pieces = np.cumsum(documents["tokens"]) // TOKENS_AT_A_TIME
            for piece in np.split(documents, np.flatnonzero(np.diff(pieces)) + 1):
                tokens = np.frombuffer(self._tokens.read(piece["tokens"].sum() * self._dtype.itemsize), self._dtype)
                held_out = piece["hash"] <= last
                yield _part(piece, tokens, ~held_out), _part(piece, tokens, held_out)

    def _last_held_out(self, share: Fraction) -> np.uint64:
        """The largest hash that is held out: the bytes up to it are the nearest to the share."""
        target = share * int(self._bucket_bytes.sum())
        up_to = np.cumsum(self._bucket_bytes)
        bucket = int(np.searchsorted(up_to, max(1, math.ceil(target))))
        inside = [documents[_bucket(documents) == bucket] for documents in self._read_documents()]
        hashes, first = np.unique(np.concatenate([d["hash"] for d in inside]), return_inverse=True)
        sizes = np.bincount(first, np.concatenate([_weight(d) for d in inside]), len(hashes))
        before = int(up_to[bucket] - self._bucket_bytes[bucket])
        errors = np.abs(before + np.concatenate([[0], np.cumsum(sizes)]) - float(target))
        if before == 0:
            errors[0] = np.inf  # nothing would be held out
        if before + sizes.sum() == up_to[-1] and (before or len(hashes) > 1):
            errors[-1] = np.inf  # everything would be
        nearest = int(np.argmin(errors))
        return hashes[nearest - 1] if nearest else hashes[0] - np.uint64(1)

    def _read_documents(self) -> Iterator[np.ndarray]:
        self._documents.seek(0)
        while data := self._documents.read(DOCUMENTS_AT_A_TIME * DOCUMENT.itemsize):
            yield np.frombuffer(data, DOCUMENT)


def _bucket(documents: np.ndarray) -> np.ndarray:
    return (documents["hash"] >> np.uint64(64 - BUCKETS_LOG2)).astype(np.int64)


def _weight(documents: np.ndarray) -> np.ndarray:
    """Bytes of the text; an empty document counts as one."""
    return np.maximum(documents["bytes"], 1)


def _part(documents: np.ndarray, tokens: np.ndarray, chosen: np.ndarray) -> Encoded:
    kept = documents[chosen]
    return Encoded(tokens[np.repeat(chosen, documents["tokens"])], kept["tokens"], kept["bytes"], kept["hash"])
