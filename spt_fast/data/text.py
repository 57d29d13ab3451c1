"""Text in files: .jsonl, .txt and .parquet, plain or compressed, folders of them, pipes and standard input.

Reading and parsing are separate, so that one process can read while many parse. `TextReader` cuts files of any size
into chunks of whole documents and holds at most one document and one block; `parse` makes strings of a chunk.

- .jsonl, .ndjson: one JSON object per line, whose `text_key` holds the text. Standard input (`-`) and other pipes are
  read as .jsonl.
- .parquet: one document per row of the column `text_key`. If compressed again (.parquet.gz), it is unpacked to a
  temporary file first.
- .txt: one file is one document, except that a file over 8 MiB is cut, at the last blank line before each 8 MiB (or
  else line end, or space), into several: a document has to fit into memory.
- Folders: see `spt_fast.data.inputs`.

A byte-order mark at the start of a file is dropped. Otherwise text is taken as it is. A small file may decode to much
more than memory holds: compressed, as a Parquet dictionary, as nested JSON. Each is decoded only as far as a document
needs, and refused if it needs more.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import re
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from spt_fast.data.inputs import STDIN, Inputs, find_files, is_pipe, known_names, split_name
from spt_fast.data.parquet_pages import rows_per_block
from spt_fast.errors import DataError, MissingKey, shown_key

# isort: split
# These names were here before.
from spt_fast.data.inputs import HELD_OUT as HELD_OUT
from spt_fast.data.inputs import Found as Found
from spt_fast.data.inputs import is_text as is_text

TXT_BYTES = 8 << 20  # a longer .txt is more than one document
LINE_BYTES = 128 << 20  # a longer line isn't JSON Lines

_BLOCK_BYTES = 1 << 20
XZ_MEMORY_BYTES = 256 << 20
STRUCTURE_BYTES = 1 << 30  # limit for the memory of a long line's JSON, besides its text

_LONG_LINE_BYTES = 16 << 20
_BOM = b"\xef\xbb\xbf"
_HEAD_BYTES = 10
_PACKED = {
    rb"\x1f\x8b\x08": "gzip, which zcat unpacks",
    rb"\x28\xb5\x2f\xfd": "zstd, which zstdcat unpacks",
    rb"\xfd7zXZ\0": "xz, which xzcat unpacks",
    rb"BZh[1-9]1AY&SY": "bzip2, which bzcat unpacks",
    rb"PK\x03\x04": "a zip archive, which unzip -p unpacks",
    rb"PAR1": "Parquet, which is read from a file named .parquet",
}
"""First bytes of files that aren't text, and what they are."""
_SKIP = "or skip and count such documents with `skip_bad=True`"


@dataclass(frozen=True)
class Chunk:
    """A sequence of whole documents of one file.

    data      UTF-8 (if the file is sound)
    lengths   bytes of each document, -1 for a null; None if each line of `data` is a JSON document
    first     number of the first line or row in its file, from 1
    """

    source: str
    unit: Literal["line", "row"]
    first: int
    data: bytes
    lengths: list[int] | None = None


class TextReader:
    """Iterates over the chunks of `inputs`, in order, and reports its progress.

    total_bytes   of all files, as they are on disk; None if standard input or a pipe is among them
    read_bytes    of these, so far
    skipped       by kind, ignored files; with `skip_bad`, also those without a document ("empty file"), and lines that
                  are too long

    Raises DataError for inputs that don't exist, can't be read, are damaged or cut off, or hold no document.
    """

    def __init__(self, inputs: Inputs, text_key: str = "text", *, skip_bad: bool = False) -> None:
        found = find_files(inputs)
        self.files = found.files
        self.total_bytes = None if any(map(is_pipe, self.files)) else sum(path.stat().st_size for path in self.files)
        self.read_bytes = 0
        self.skipped = Counter({why: len(paths) for why, paths in found.passed_over.items()})
        self._text_key, self._skip_bad = text_key, skip_bad

    def __iter__(self) -> Iterator[Chunk]:
        for path in self.files:
            empty = True
            for chunk in self._chunks(path):
                empty = False
                yield chunk
            if empty and not self._skip_bad:
                raise DataError(f"{_name(path)} holds no document; remove it, or skip it with `skip_bad=True`")
            self.skipped["empty file"] += empty

    def _chunks(self, path: Path) -> Iterator[Chunk]:
        if is_pipe(path):
            with nullcontext(_standard_input()) if path == STDIN else _open(path, "") as pipe:
                yield from self._jsonl_chunks(self._blocks(pipe, path), _name(path))
            return
        before = self.read_bytes
        stem, compression = split_name(path)
        with _open(path, compression) as file:
            stream = _decompressed(file, compression)
            if stem.endswith(".parquet"):
                yield from self._parquet_chunks(_unpacked(stream, path) if compression else file, path)
            elif stem.endswith((".jsonl", ".ndjson")):
                yield from self._jsonl_chunks(self._blocks(stream, path, file), str(path))
            else:
                yield from _txt_chunks(self._blocks(stream, path, file), str(path))
        self.read_bytes = before + path.stat().st_size

    def _blocks(self, stream: Any, path: Path, file: Any = None) -> Iterator[bytes]:
        before, start = self.read_bytes, True
        while block := _read(stream, path):
            while start and len(block) < _HEAD_BYTES and (more := _read(stream, path)):  # a slow pipe
                block += more
            self.read_bytes = before + file.tell() if file is not None else self.read_bytes + len(block)
            if start:
                _refuse_packed(block, path)
                block = block.removeprefix(_BOM)
            yield block
            start = False

    def _jsonl_chunks(self, blocks: Iterator[bytes], source: str) -> Iterator[Chunk]:
        first, rest, rest_bytes, is_too_long = 1, [b""], 0, False
        for block in blocks:
            cut = block.rfind(b"\n") + 1
            if cut:
                start = block.find(b"\n") + 1 if is_too_long else 0
                data = b"".join([*rest, memoryview(block)[start:cut]])
                first += is_too_long
                if data and not data.isspace():
                    yield Chunk(source, "line", first, data)
                first += data.count(b"\n")
                rest, rest_bytes, is_too_long = [], 0, False
            if is_too_long:
                continue
            rest.append(block[cut:])
            rest_bytes += len(block) - cut
            if rest_bytes > LINE_BYTES:
                too_long = f"line over {LINE_BYTES >> 20} MiB"
                if not self._skip_bad:
                    raise DataError(f"{source}:{first}: {too_long}; write one JSON object per line, {_SKIP}")
                self.skipped[too_long] += 1
                rest, is_too_long = [], True
        data = b"".join(rest)
        if data and not data.isspace():
            yield Chunk(source, "line", first, data)

    def _parquet_chunks(self, file: BinaryIO, path: Path) -> Iterator[Chunk]:
        pa = _pyarrow(path)
        import pyarrow.parquet

        if os.fstat(file.fileno()).st_size == 0:
            return
        before, size, first = self.read_bytes, path.stat().st_size, 1
        try:
            table = pyarrow.parquet.ParquetFile(file, pre_buffer=False, buffer_size=_BLOCK_BYTES)
            if self._text_key not in table.schema_arrow.names:
                raise MissingKey(f"{path}: {_missing_key('it', self._text_key, table.schema_arrow.names)}")
            if table.schema_arrow.names.count(self._text_key) > 1:
                raise DataError(
                    f"{path}: has two columns {self._text_key!r}; write it with the one that holds the text"
                )
            kind = table.schema_arrow.field(self._text_key).type
            if pa.types.is_nested(kind):  # before it is decoded
                raise DataError(f"{path}: column {self._text_key!r} {_not_strings(kind)}")
            rows = table.metadata.num_rows
            batch_rows = rows_per_block(file, self._text_key, path, LINE_BYTES)
            for batch in table.iter_batches(batch_rows, columns=[self._text_key]):
                column = _as_bytes(pa, batch.column(0), f"{path}: column {self._text_key!r}")
                for start, lengths in self._documents_apart(column, first, path):
                    data = b"".join(filter(None, column.slice(start, len(lengths)).to_pylist()))
                    yield Chunk(str(path), "row", first + start, data, lengths)
                first += len(column)
                self.read_bytes = before + size * (first - 1) // rows
        except DataError:
            raise
        except (
            pa.ArrowException,
            OSError,
            ValueError,
            LookupError,
            RecursionError,
        ) as error:  # a damaged name or header
            raise DataError(f"{path} can't be read as Parquet ({error}); write or fetch it again") from error

    def _documents_apart(self, column: Any, first: int, path: Path) -> Iterator[tuple[int, list[int]]]:
        """Ranges of rows that hold about a block of text: the first row of each, and the lengths, -1 for nulls."""
        import pyarrow.compute

        start, run, run_bytes = 0, list[int](), 0
        for row, length in enumerate(pyarrow.compute.binary_length(column).fill_null(-1).to_pylist()):
            if run and (run_bytes + length > _BLOCK_BYTES or length > LINE_BYTES):
                yield start, run
                start, run, run_bytes = row, [], 0
            if length > LINE_BYTES:
                too_long = f"row over {LINE_BYTES >> 20} MiB"
                if not self._skip_bad:
                    raise DataError(f"{path}, row {first + row}: {too_long}; write shorter documents, {_SKIP}")
                self.skipped[too_long] += 1
                start = row + 1
            else:
                run.append(length)
                run_bytes += length
        if run:
            yield start, run


def parse(
    chunk: Chunk, text_key: str = "text", *, skip_bad: bool = False, skipped: Counter[str] | None = None
) -> Iterator[tuple[str, bytes]]:
    """The documents of a chunk, each as a string and as UTF-8.

    Raises DataError, with file and line, for a line that is broken, lacks the key, holds no string there, or isn't
    UTF-8; with `skip_bad` such documents are left out. `skipped` counts them by kind, and also empty strings, which are
    never documents.
    """
    skipped = Counter() if skipped is None else skipped
    for number, record in _records(chunk):
        try:
            text, utf8 = _json_text(record, text_key) if chunk.lengths is None else _plain_text(record, text_key)
        except _BadDocument as bad:
            if not skip_bad:
                place = f":{number + bad.line}" if chunk.unit == "line" else f", row {number}"
                raise bad.error(f"{chunk.source}{place}: {bad}") from None
            skipped[bad.kind] += 1
            continue
        if text:
            yield text, utf8
        else:
            skipped["empty"] += 1


def iter_documents(inputs: Inputs, text_key: str = "text", *, skip_bad: bool = False) -> Iterator[str]:
    """The text of every document of `inputs`, in order. Raises DataError as `TextReader` and `parse` do."""
    for chunk in TextReader(inputs, text_key, skip_bad=skip_bad):
        for text, _ in parse(chunk, text_key, skip_bad=skip_bad):
            yield text


class _BadDocument(Exception):
    def __init__(self, kind: str, message: str, line: int = 0, error: type[DataError] = DataError) -> None:
        super().__init__(message)
        self.kind, self.line, self.error = kind, line, error


def _records(chunk: Chunk) -> Iterator[tuple[int, bytes | None]]:
    """Number and bytes of each document; None instead of bytes for a null."""
    if chunk.lengths is None:
        for number, line in enumerate(chunk.data.split(b"\n"), chunk.first):
            if line and not line.isspace():
                yield number, line
        return
    start = 0
    for number, length in enumerate(chunk.lengths, chunk.first):
        yield number, None if length < 0 else chunk.data[start : start + length]
        start += max(length, 0)


def _json_text(line: bytes | None, text_key: str) -> tuple[str, bytes]:
    assert line is not None
    if len(line) > _LONG_LINE_BYTES and _structure_bytes(line) > STRUCTURE_BYTES:
        raise _BadDocument(
            "broken JSON", f"more than {STRUCTURE_BYTES >> 30} GiB of JSON in one line; split it, {_SKIP}"
        )
    try:
        record = json.loads(_decode(line))
    except json.JSONDecodeError as error:
        raise _BadDocument("broken JSON", f"broken JSON ({error.msg}, column {error.colno}); fix it, {_SKIP}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, a list thousands deep
        raise _BadDocument("broken JSON", f"broken JSON ({error}); fix the line, {_SKIP}") from None
    if not isinstance(record, dict):
        raise _BadDocument("broken JSON", f"{type(record).__name__} instead of a JSON object; fix the line, {_SKIP}")
    if text_key not in record:
        message = f"{_missing_key('the line', text_key, list(record))}, {_SKIP}"
        raise _BadDocument("missing key", message, error=MissingKey)
    text = record[text_key]
    if not isinstance(text, str):
        raise _BadDocument("not a string", _not_a_string(text_key, type(text).__name__))
    try:
        return text, text.encode()
    except UnicodeEncodeError as error:
        raise _BadDocument("not UTF-8", f"half a surrogate pair at character {error.start}; fix it, {_SKIP}") from None


def _structure_bytes(line: bytes) -> int:
    """An estimate of the memory of a line's JSON, besides its text: up to 72 bytes for each string, and for each empty
    list, which is three bytes of the line."""
    outside, strings = re.subn(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', b"", line, flags=re.DOTALL)
    return 72 * strings + 24 * len(outside)


def _plain_text(utf8: bytes | None, text_key: str) -> tuple[str, bytes]:
    if utf8 is None:
        raise _BadDocument("not a string", _not_a_string(text_key, "null"))
    return _decode(utf8), utf8


def _decode(utf8: bytes) -> str:
    try:
        return utf8.decode()
    except UnicodeDecodeError as error:
        message = f"not UTF-8 (byte 0x{utf8[error.start]:02x}); convert it (iconv -f … -t utf-8), {_SKIP}"
        raise _BadDocument("not UTF-8", message, line=utf8.count(b"\n", 0, error.start)) from None


def _missing_key(what: str, text_key: str, keys: list[str]) -> str:
    has = ", ".join(repr(shown_key(key)) for key in keys[:12]) if keys else "none"
    return f"no text under {text_key!r} ({what} has {has}); name the one that holds the text with `text_key=…`"


def _not_a_string(text_key: str, given: str) -> str:
    return f"{text_key!r} is {given}, not a string; name another key with `text_key=…`, {_SKIP}"


def _txt_chunks(blocks: Iterator[bytes], source: str) -> Iterator[Chunk]:
    first, rest = 1, bytearray()
    for block in blocks:
        rest += block
        while len(rest) > TXT_BYTES:
            data = bytes(rest[: _document_end(rest)])
            yield Chunk(source, "line", first, data, [len(data)])
            first += data.count(b"\n")
            del rest[: len(data)]
    if rest and not rest.isspace():
        yield Chunk(source, "line", first, bytes(rest), [len(rest)])


def _document_end(text: bytearray) -> int:
    for separators in ((b"\n\n", b"\r\n\r\n"), (b"\n",), (b" ",)):
        found = {text.rfind(separator, TXT_BYTES // 2, TXT_BYTES): len(separator) for separator in separators}
        if (last := max(found)) >= 0:
            return last + found[last]
    starts = (end for end in range(TXT_BYTES, TXT_BYTES - 4, -1) if text[end] & 0xC0 != 0x80)  # not inside a character
    return next(starts, TXT_BYTES)


def _not_strings(kind: Any) -> str:
    return f"holds {kind}, not strings; name another with `text_key=…`"


def _as_bytes(pa: Any, column: Any, name: str) -> Any:
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    try:
        return column.cast(pa.large_binary())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raise DataError(f"{name} {_not_strings(column.type)}") from None


def _open(path: Path, compression: str) -> Any:
    try:
        return _pyarrow(path).OSFile(str(path)) if compression == ".zst" else open(path, "rb", buffering=0)
    except OSError as error:
        raise DataError(f"{path} can't be read ({error.strerror or error})") from error


def _standard_input() -> BinaryIO:
    if sys.stdin is None:
        raise DataError("standard input is closed; give files or folders, or pipe JSON Lines in")
    try:
        return open(sys.stdin.fileno(), "rb", buffering=0, closefd=False)
    except OSError:  # not a real file, as in tests
        return sys.stdin.buffer


def _decompressed(file: Any, compression: str) -> Any:
    if compression == ".gz":
        return gzip.GzipFile(fileobj=file)
    if compression == ".bz2":
        return _Streams(file, bz2.BZ2Decompressor)
    if compression == ".xz":
        return _Streams(file, lambda: lzma.LZMADecompressor(memlimit=XZ_MEMORY_BYTES))
    if compression == ".zst":
        import pyarrow

        return pyarrow.CompressedInputStream(file, "zstd")
    return file


def _read(stream: Any, path: Path) -> bytes:
    try:
        return stream.read(_BLOCK_BYTES)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        if "memory" in str(error).lower():
            raise DataError(
                f"{_name(path)}: was compressed with a window too large to unpack here ({error}); compress it again "
                "with a smaller one (zstd without --long, xz -9 or less)"
            ) from error
        raise DataError(f"{_name(path)}: is damaged or cut off ({error}); fetch or compress it again") from error


class _Streams:
    """The concatenated streams of an .xz or .bz2 file, unpacked with bounded memory; anything else after them is an
    error, not the end."""

    def __init__(self, file: Any, new: Callable[[], Any]) -> None:
        self._file, self._new, self._stream = file, new, new()

    def read(self, size: int) -> bytes:
        while True:
            packed = b""
            if self._stream.eof:
                packed = self._stream.unused_data.lstrip(b"\0") or self._file.read(size)  # zeros may pad a stream
                if not packed.strip(b"\0"):
                    return b""
                self._stream = self._new()
            elif self._stream.needs_input and not (packed := self._file.read(size)):
                raise EOFError("the file ends in the middle of a stream")
            if unpacked := self._stream.decompress(packed, size):
                return unpacked


def _unpacked(stream: Any, path: Path) -> BinaryIO:
    file = tempfile.TemporaryFile()  # noqa: SIM115 (it is deleted when its last user is gone)
    try:
        while block := _read(stream, path):
            file.write(block)
        file.flush()
    except OSError as error:
        where = tempfile.gettempdir()
        raise DataError(f"{path} can't be unpacked to {where} ({error.strerror}); make room, or set TMPDIR") from error
    return file


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow
    except ImportError:
        raise DataError(f"{path} needs pyarrow to be read: pip install pyarrow") from None
    return pyarrow


def _refuse_packed(head: bytes, path: Path) -> None:
    """DataError if a file that should be text is packed, or only says where the text is."""
    if head.startswith(b"version https://git-lfs"):
        raise DataError(f"{_name(path)}: holds no text but is a pointer of Git LFS: run `git lfs pull`")
    for begins, what in _PACKED.items():
        if re.match(begins, head, re.DOTALL):
            raise DataError(
                f"{_name(path)}: holds no text but {what}; unpack it first, or rename the file to match "
                f"({known_names()})"
            )


def _name(path: Path) -> str:
    return "standard input" if path == STDIN else str(path)
