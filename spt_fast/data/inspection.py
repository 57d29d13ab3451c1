"""What a dataset holds, and whether it is intact."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from spt_fast.data.divergence import divergence as divergence_from
from spt_fast.data.overlap import overlap_share
from spt_fast.data.shards import TokenDataset
from spt_fast.errors import DataError

# isort: split
# These names were here before.
from spt_fast.data.overlap import MAX_NGRAMS as MAX_NGRAMS
from spt_fast.data.overlap import NGRAM as NGRAM
from spt_fast.data.overlap import Overlap as Overlap

_STRETCH = 1 << 20  # ids that are checked at a time


def inspect(
    prefix: str | os.PathLike[str],
    dtype: str | None = None,
    verify: bool = False,
    overlap: str | os.PathLike[str] | None = None,
    divergence: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """A JSON-able account of the dataset at `prefix`.

    verify: check every hash, that the document ends rise, and that no id reaches the vocabulary size; DataError if not.
    overlap: another dataset, searched for the documents and n-grams of this one (`overlap_share`).
    divergence: a general corpus to compare this one's n-grams with (spt_fast.data.divergence).
    dtype: of all datasets, for headerless files.
    """
    dataset = TokenDataset.open(prefix, dtype)
    report: dict[str, Any] = {
        "path": str(dataset.path),
        "format": dataset.format,
        "dtype": dataset.tokens.dtype.name,
        "tokens": dataset.num_tokens,
        "documents": dataset.num_documents,
        "bytes": dataset.num_bytes,
        "document_tokens": _length_summary(dataset.document_ends),
        "vocab_size": dataset.vocab_size,
        "max_id": dataset.max_id,
        "eos_id": dataset.eos_id,
        **({} if dataset.bos_id is None else {"bos_id": dataset.bos_id}),
        "tokenizer_digest": dataset.tokenizer_digest,
        "digest": dataset.digest,
    }
    if verify:
        report["verified"] = verify_all(dataset)
    if overlap is not None:
        other = TokenDataset.open(overlap, dtype)
        report["overlap"] = {"with": str(overlap), **vars(overlap_share(dataset, other, max_train_tokens=None))}
    if divergence is not None:
        report["divergence"] = divergence_from(prefix, divergence, dtype=dtype)
    return report


def verify_all(dataset: TokenDataset) -> dict[str, Any]:
    """Check every hash, document end and id. Returns {"hashes": blocks hashed, 0 if the format records none,
    "max_id": largest id found}; raises DataError, which names the damage."""
    dataset.verify()
    ends = dataset.document_ends
    if ends is not None:
        for i in range(0, len(ends), _STRETCH):
            if np.any(np.diff(ends[i : i + _STRETCH + 1]) < 0):
                raise DataError(f"{dataset.path}: its document ends fall after document {i:,}; make the dataset again")
    smallest, largest = 0, -1
    for i in range(0, dataset.num_tokens, _STRETCH):
        chunk = np.asarray(dataset.tokens[i : i + _STRETCH])
        smallest, largest = min(smallest, int(chunk.min())), max(largest, int(chunk.max()))
    if smallest < 0 or largest >= (dataset.vocab_size or np.inf):
        raise DataError(
            f"{dataset.path}: token id {smallest if smallest < 0 else largest} is outside its vocabulary"
            f"{f' of {dataset.vocab_size:,}' if dataset.vocab_size else ''}; make the dataset again"
        )
    metadata = [part.metadata for part in dataset.shards or (dataset,)]
    blocks = sum(len(known["blocks_sha256"]) for known in metadata if known)
    return {"hashes": blocks, "max_id": largest if dataset.num_tokens else None}


def _length_summary(ends: np.ndarray | None) -> dict[str, float] | None:
    if ends is None or len(ends) == 0:
        return None
    lengths = np.diff(ends, prepend=0)
    return {"mean": float(lengths.mean()), "median": float(np.median(lengths)), "longest": int(lengths.max())}
