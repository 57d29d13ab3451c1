"""The decoded size of a Parquet column, before pyarrow decodes it: pyarrow reads a whole page, whatever the memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from spt_fast.errors import DataError

PAGE_BYTES = 512 << 20
"""Limit on a decoded page: reading takes about twice that."""
DICTIONARY_BYTES = 256 << 20

_BYTE_ARRAY = 6  # a physical type
_DELTA_BYTE_ARRAY = 7  # an encoding
_BLOCK_BYTES = 1 << 20
_ROWS_BYTES = 64 << 20
_HEADER_BYTES = (1 << 14, 1 << 24)  # tried in this order: statistics may hold long texts


@dataclass(frozen=True)
class Column:
    """A column chunk. dictionary_at, data_at: file offsets of its pages; the first is None without a dictionary."""

    encodings: list[int]
    num_values: int
    unfolded_bytes: int
    packed_bytes: int
    data_at: int
    dictionary_at: int | None
    holds_bytes: bool


@dataclass(frozen=True)
class Page:
    """num_bytes: decoded. num_values: rows, nulls included; 0 for a dictionary."""

    num_bytes: int
    num_values: int


def rows_per_block(file: BinaryIO, text_key: str, path: Path, longest_bytes: int) -> int:
    """The number of rows that hold about a MiB of text, from the footer and the page headers; few if each row could be
    all of a large dictionary, which is stored once however often it is used.

    DataError for a page that needs too much memory, or documents that are longer than `longest_bytes` on average;
    ValueError or LookupError for damage.
    """
    try:
        return _rows_per_block(file, text_key, path, longest_bytes)
    except (TypeError, AttributeError) as error:
        raise ValueError(f"a field is of another type than Parquet's ({error})") from None


def _rows_per_block(file: BinaryIO, text_key: str, path: Path, longest_bytes: int) -> int:
    num_rows, columns = _footer(file, text_key)
    dictionaries = [
        next(_pages(file, column), Page(0, 0)).num_bytes for column in columns if column.dictionary_at is not None
    ]
    large = [column for column in columns if column.unfolded_bytes > DICTIONARY_BYTES]
    pages = [page for column in large for page in _pages(file, column)]
    for most, largest in (
        (DICTIONARY_BYTES, max(dictionaries, default=0)),
        (PAGE_BYTES, max([page.num_bytes for page in pages], default=0)),
    ):
        if largest > most:
            raise DataError(
                f"{path}: column {text_key!r} decodes to {largest >> 20:,} MiB in one page, over {most >> 20}; write "
                "it without a dictionary, in shorter documents or fewer rows per page (pyarrow's write_batch_size)"
            )
    texts = [column for column in columns if column.holds_bytes]
    if any(column.unfolded_bytes > longest_bytes * max(1, column.num_values) for column in texts):
        raise DataError(
            f"{path}: column {text_key!r} holds documents over {longest_bytes >> 20} MiB; write shorter ones"
        )
    # In DELTA_BYTE_ARRAY a text may repeat all of the previous one: each may be as long as the column is on disk.
    repeating = [column.unfolded_bytes for column in columns if _DELTA_BYTE_ARRAY in column.encodings]
    dense = [page.num_bytes // page.num_values for page in pages if page.num_values]
    longest = max([*dictionaries, *repeating, *dense], default=0)
    typical = _BLOCK_BYTES * num_rows // max(1, sum(column.unfolded_bytes for column in columns))
    return max(1, min(256, typical, _ROWS_BYTES // max(1, longest)))


def _footer(file: BinaryIO, name: str) -> tuple[int, list[Column]]:
    """Rows, and the chunks of a column. Parsed here, since pyarrow may crash the process on a damaged footer."""
    end = file.seek(0, os.SEEK_END) - 8
    file.seek(end)
    length = int.from_bytes(file.read(4), "little")
    file.seek(end - length)
    footer = _Thrift(file.read(length)).struct()
    found = [chunk[3] for group in footer[4] for chunk in group[1] if chunk[3][3] == [name.encode()]]
    return footer[3], [Column(c[2], c[5], c[6], c[7], c[9], c.get(11), holds_bytes=c[1] == _BYTE_ARRAY) for c in found]


def _pages(file: BinaryIO, column: Column) -> Iterator[Page]:
    """The pages of a column chunk; only their headers are read."""
    at = column.data_at if column.dictionary_at is None else column.dictionary_at
    end = at + column.packed_bytes
    while at < end:
        header, length = _header(file, at)
        data = header.get(5) or header.get(8) or {}
        yield Page(header[2], data.get(1, 0))
        if header[3] < 0:
            raise ValueError("a page of negative length")
        at += length + header[3]


def _header(file: BinaryIO, at: int) -> tuple[dict[int, Any], int]:
    """Integers and inner structs of the page header at `at`, by field, and its length."""
    for size in _HEADER_BYTES:
        file.seek(at)
        thrift = _Thrift(file.read(size))
        try:
            return thrift.struct(), thrift.at
        except IndexError:
            if size == _HEADER_BYTES[-1]:
                raise
    raise AssertionError


class _Thrift:
    """Thrift's compact protocol, as far as footers and page headers use it. IndexError if it ends too early."""

    def __init__(self, data: bytes) -> None:
        self._data, self.at = data, 0

    def struct(self) -> dict[int, Any]:
        found, field = {}, 0
        while kind := self._byte():
            field = field + (kind >> 4) if kind >> 4 else self._signed()
            value = self._value(kind & 15)
            if value is not None:
                found[field] = value
        return found

    def _value(self, kind: int) -> Any:
        if kind in (4, 5, 6):
            return self._signed()
        if kind == 12:
            return self.struct()
        if kind == 9:
            size = self._byte()
            inner = 3 if size & 15 in (1, 2) else size & 15
            return [self._value(inner) for _ in range(self._unsigned() if size >> 4 == 15 else size >> 4)]
        if kind in (3, 7, 8):
            length = {3: 1, 7: 8}[kind] if kind != 8 else self._unsigned()
            self.at += length
            return self._data[self.at - length : self.at]
        if kind not in (1, 2):
            raise ValueError(f"a field of type {kind}")
        return None

    def _byte(self) -> int:
        self.at += 1
        return self._data[self.at - 1]

    def _unsigned(self) -> int:
        number = 0
        for shift in range(0, 70, 7):
            byte = self._byte()
            number |= (byte & 0x7F) << shift
            if byte < 0x80:
                return number
        raise ValueError("a number without end")

    def _signed(self) -> int:
        number = self._unsigned()
        return number >> 1 if number % 2 == 0 else -(number >> 1) - 1
