"""The three files of a dataset, and what its PREFIX.json says of the other two.

PREFIX.bin: little-endian token ids, nothing else. PREFIX.idx: the exclusive end of each document, in tokens, u64.
PREFIX.json: what the other two hold (dtype, vocabulary, counts, largest id) with a sha256 of each 64 MiB block of .bin,
of .idx, and of itself. The .json is written last: without it the dataset doesn't open.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from spt_fast.data import formats
from spt_fast.errors import DataError

FORMAT = "spt_fast tokens"
VERSION = 1
BLOCK_BYTES = 64 << 20
END_DTYPE = np.dtype("<i8")  # u64 on disk: below 2^63 the same bytes, and int64 mixes with Python's and NumPy's ints


def base_prefix(path: Path) -> Path:
    """The PREFIX of PREFIX, PREFIX.bin, PREFIX.idx or PREFIX.json."""
    return path.with_suffix("") if path.suffix in (".bin", ".idx", ".json") else path


def files_of(prefix: Path) -> tuple[Path, Path, Path]:
    """The three files of a dataset: ids, document ends, metadata."""
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx"), Path(f"{prefix}.json")


def part_of(prefix: Path) -> str | None:
    """Which part of its text a dataset of ours is: "whole", "train", "heldout"; "unknown" from an earlier version; None
    if there is no dataset."""
    metadata = read_metadata(files_of(prefix)[2])
    return None if metadata is None else str(metadata.get("part", "unknown"))


def datasets_in(folder: Path) -> dict[str, str | None]:
    """The datasets of ours in a folder, with their tokenizers' digests."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        with suppress(DataError):
            if metadata := read_metadata(path):
                found[path.stem] = metadata["tokenizer_digest"]
    return found


def read_metadata(path: Path) -> dict[str, Any] | None:
    """The metadata in `path`; None if there is no such file, or it belongs to another program. DataError if damaged."""
    if not is_ours(path):
        return None
    try:
        metadata = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: is damaged: it isn't JSON ({error}); copy or prepare the dataset again") from error
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise DataError(f"{path}: is damaged or was edited: it isn't a dataset's metadata; prepare it again")
    if metadata.get("version") != VERSION:
        raise DataError(f"{path} has format version {metadata.get('version')!r}; this program reads {VERSION}")
    stored = metadata.pop("sha256", None)
    if stored != sha256_of(metadata):
        raise DataError(f"{path}: is damaged or was edited: its content doesn't match its own sha256; prepare it again")
    for field, is_right in _FIELDS.items():
        if field not in metadata or not is_right(metadata[field]):
            found = repr(metadata.get(field, "missing"))
            raise DataError(f"{path} was edited: its {field} is {found:.60}; prepare the dataset again")
    return metadata


def is_ours(json_path: Path) -> bool:
    """Whether the beginning of the file says that it describes a dataset of ours."""
    return FORMAT.encode() in formats.head_of(json_path, 256)


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_optional_count(value: object) -> bool:
    return value is None or _is_count(value)


_FIELDS: dict[str, Callable[[Any], bool]] = {
    "dtype": lambda value: value in formats.ID_DTYPES,
    "vocab_size": _is_count,
    "tokenizer_digest": lambda value: value is None or isinstance(value, str),
    "eos_id": _is_optional_count,
    "num_tokens": _is_count,
    "num_documents": _is_count,
    "num_bytes": _is_count,
    "max_id": _is_optional_count,
    "block_bytes": lambda value: _is_count(value) and value > 0,
    "blocks_sha256": lambda value: isinstance(value, list) and all(isinstance(block, str) for block in value),
    "idx_sha256": lambda value: isinstance(value, str),
}
"""The fields that `DatasetWriter.commit` writes besides format and version, and a check of each."""


def sha256_of(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
