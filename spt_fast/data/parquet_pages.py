"""How much a Parquet column unfolds to, before pyarrow unfolds it: it takes a page whole, whatever the memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from spt_fast.errors import DataError

PAGE_BYTES = 512 << 20
"""Of a page, unfolded: reading takes about twice that."""
DICTIONARY_BYTES = 256 << 20

_BLOCK_BYTES = 1 << 20
_ROWS_BYTES = 64 << 20
_HEADER_BYTES = (1 << 14, 1 << 24)  # tried in this order: statistics may hold long texts


@dataclass(frozen=True)
class Page:
    """num_bytes: unfolded. num_values: rows, nulls included; 0 of a dictionary."""

    num_bytes: int
    num_values: int


def rows_per_block(table: Any, text_key: str, file: BinaryIO, path: Path, longest_bytes: int) -> int:
    """Rows that hold about a MiB of text by what the footer and the pages say of the column, and few where each of them
    could be all of a large dictionary: that is stored once however often it is used.

    DataError for a page that takes too much memory, or documents that are longer than `longest_bytes` on average.
    """
    columns = [
        group.column(index)
        for group in map(table.metadata.row_group, range(table.metadata.num_row_groups))
        for index in range(group.num_columns)
        if group.column(index).path_in_schema == text_key
    ]
    dictionaries = [next(_pages(file, column)).num_bytes for column in columns if column.has_dictionary_page]
    large = [column for column in columns if column.total_uncompressed_size > DICTIONARY_BYTES]
    pages = [page for column in large for page in _pages(file, column)]
    for most, largest in (
        (DICTIONARY_BYTES, max(dictionaries, default=0)),
        (PAGE_BYTES, max([page.num_bytes for page in pages], default=0)),
    ):
        if largest > most:
            raise DataError(
                f"{path}: column {text_key!r} unfolds to {largest >> 20:,} MiB in one page, over {most >> 20}; write "
                "it without a dictionary, in shorter documents or fewer rows a page (pyarrow's write_batch_size)"
            )
    texts = [column for column in columns if column.physical_type == "BYTE_ARRAY"]
    if any(column.total_uncompressed_size > longest_bytes * max(1, column.num_values) for column in texts):
        raise DataError(
            f"{path}: column {text_key!r} holds documents over {longest_bytes >> 20} MiB; write shorter ones"
        )
    # By DELTA_BYTE_ARRAY a text may repeat all of the one before it: each may be as long as the column is on disk.
    repeating = [column.total_uncompressed_size for column in columns if "DELTA_BYTE_ARRAY" in column.encodings]
    dense = [page.num_bytes // page.num_values for page in pages if page.num_values]
    longest = max([*dictionaries, *repeating, *dense], default=0)
    typical = _BLOCK_BYTES * table.metadata.num_rows // max(1, sum(c.total_uncompressed_size for c in columns))
    return max(1, min(256, typical, _ROWS_BYTES // max(1, longest)))


def _pages(file: BinaryIO, column: Any) -> Iterator[Page]:
    """The pages of a column chunk, of which only the headers are read."""
    at = column.dictionary_page_offset if column.has_dictionary_page else column.data_page_offset
    end = at + column.total_compressed_size
    while at < end:
        header, length = _header(file, at)
        data = header.get(5) or header.get(8) or {}
        yield Page(header[2], data.get(1, 0))
        if header[3] < 0:
            raise ValueError("a page of negative length")
        at += length + header[3]


def _header(file: BinaryIO, at: int) -> tuple[dict[int, Any], int]:
    """Whole numbers and inner structs of the page header at `at`, by field, and its length."""
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
    """Thrift's compact form, as far as page headers use it. IndexError where it ends too early."""

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
            for _ in range(self._unsigned() if size >> 4 == 15 else size >> 4):
                self._value(3 if size & 15 in (1, 2) else size & 15)
        elif kind in (3, 7, 8):
            length = {3: 1, 7: 8}.get(kind) or self._unsigned()
            self.at += length
        elif kind not in (1, 2):
            raise ValueError(f"a page header with a field of type {kind}")
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
