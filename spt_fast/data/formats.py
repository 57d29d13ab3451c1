"""Token files of other projects, read in place: what each header says, and whether the file matches it.

A format is recognised by its magic number, never by its name (OLMo calls headerless files `.npy`), in this order:

| format      | recognised by                                        | ids                  | documents           |
|-------------|------------------------------------------------------|----------------------|---------------------|
| Megatron-LM | `MMIDIDX` at the start of PREFIX.idx                 | a dtype code in .idx | in .idx             |
| llm.c       | int32 magic 20240520 (also modded-nanogpt), 20240801 | uint16, uint32       | none                |
| .npy        | `\\x93NUMPY`                                          | any integer, 1-D     | none                |
| headerless  | a dtype that the user declares                       | that dtype           | in datatrove .index |

Every count in a header is compared with the size of the file here, before anything is mapped: a map that reaches past
the end of its file kills the process (SIGBUS) when it is read.
"""

from __future__ import annotations

import hashlib
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError

import numpy as np

from spt_fast.data.inputs import is_text
from spt_fast.errors import DataError, counted, cut, invalid
from spt_fast.files import looked_in

ID_DTYPES = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")

MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
MEGATRON_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, length of the document index
MEGATRON_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}  # 6 and 7 are floats

LLMC_HEADER_BYTES = 256 * 4
LLMC_DTYPES = {(20240520, 1): "uint16", (20240801, 7): "uint32"}  # (magic, version)

NPY_MAGIC = b"\x93NUMPY"

_SAMPLES = 64
_SAMPLE_BYTES = 1 << 16
_CHUNK = 1 << 22


@dataclass(frozen=True)
class TokenFile:
    """The place of the ids: `num_tokens` ids of `dtype` in `path` from `offset_bytes` on.

    `document_ends` is int64 [documents], exclusive ends in tokens; None where the format records no documents.
    """

    format: str
    path: Path
    offset_bytes: int
    dtype: np.dtype
    num_tokens: int
    document_ends: np.ndarray | None
    digest: str


def find(prefix: Path, declared: np.dtype | None) -> TokenFile:
    """The foreign token file at `prefix` (a file, or PREFIX.bin, or PREFIX.npy).

    Raises DataError if there is none, if its size or the declared dtype contradicts its header, or if it has no header
    and no dtype was declared.
    """
    path = _locate(prefix)
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty: it holds no tokens")
    head, index = head_of(path), path.with_suffix(".idx")
    if path.suffix == ".bin" and head_of(index, len(MEGATRON_MAGIC)) == MEGATRON_MAGIC:
        found = _megatron(path, index)
    elif len(head) == 8 and (key := struct.unpack("<ii", head))[0] in {magic for magic, _ in LLMC_DTYPES}:
        found = _llmc(path, key)
    elif head.startswith(NPY_MAGIC):
        found = _npy(path)
    elif declared is not None:
        found = _headerless(path, declared)
    else:
        if is_text(path):
            raise DataError(f"{path}: is text, not a token dataset; make one of it with `spt-fast prepare`")
        raise DataError(
            f"{path}: has no header that names its format{_unfinished(path)}; if it is a plain sequence of token ids, "
            f"declare their dtype (dtype: uint16, or one of {', '.join(ID_DTYPES)})"
        )
    check_declared(path, found.dtype, declared)
    return found


def check_declared(path: Path, found: np.dtype, declared: np.dtype | None) -> None:
    """DataError if the dtype that a user declared differs from the one in the file's header."""
    if declared is not None and declared != found:
        raise DataError(f"{path}: dtype {declared} was declared, but its header says {found}; drop the dtype")


def id_dtype(given: object, what: str) -> np.dtype:
    """The little-endian dtype of that name, or that type of NumPy; DataError, naming `what`, for one that token ids
    can't have."""
    name = given.__name__ if isinstance(given, type) and issubclass(given, np.integer) else given
    if name not in ID_DTYPES:
        raise DataError(invalid(what, given, f"token ids have one of {', '.join(ID_DTYPES)}"))
    return np.dtype(str(name)).newbyteorder("<")


def map_ids(path: Path, dtype: np.dtype, offset_bytes: int, count: int) -> np.ndarray:
    """A read-only map, [count] of `dtype`, of a file that is known to be long enough."""
    if count == 0:
        empty = np.empty(0, dtype)
        empty.flags.writeable = False
        return empty
    return np.memmap(path, dtype, "r", offset_bytes, (count,))


@dataclass(frozen=True)
class Place:
    """Where a map, or a stretch of one, lies."""

    path: Path
    dtype: np.dtype
    offset_bytes: int
    count: int

    def map(self) -> np.ndarray:
        return map_ids(self.path, self.dtype, self.offset_bytes, self.count)


def place_of(ids: np.ndarray) -> Place | None:
    """The place of what `map_ids` gave, or of a stretch of it; None for numbers in memory."""
    whole = getattr(ids, "_mmap", None)
    if not isinstance(ids, np.memmap) or whole is None:
        return None
    first = ids.offset - ids.offset % mmap.ALLOCATIONGRANULARITY  # the file's byte with which the map begins
    first += ids.ctypes.data - np.frombuffer(whole, np.uint8).ctypes.data
    return Place(Path(str(ids.filename)), ids.dtype, first, len(ids))


def check_size(path: Path, expected: int, says: str) -> None:
    """DataError unless `path` is `expected` bytes long; `says` names the source of that size."""
    found = path.stat().st_size
    if found != expected:
        state = "truncated" if found < expected else "longer than it should be"
        raise DataError(
            f"{path}: is {state}: {counted(found, 'byte')} found, {expected:,} expected from {says}; copy or make it "
            "again"
        )


def sampled_digest(*paths: Path) -> str:
    """Digest of files that record no hashes: sha256 over their sizes, their first and last 64 KiB, and 62 stretches
    of 64 KiB spread evenly between (files up to 4 MiB: all of it). A change elsewhere goes unnoticed."""
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        digest.update(struct.pack("<Q", size))
        starts = np.unique(np.linspace(0, max(0, size - _SAMPLE_BYTES), _SAMPLES).astype(np.int64))
        if size <= _SAMPLES * _SAMPLE_BYTES:
            starts = np.arange(0, size, _SAMPLE_BYTES)
        with path.open("rb") as file:
            for start in starts:
                file.seek(start)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def is_sampled_whole(path: Path) -> bool:
    """Whether `sampled_digest` reads all of the file."""
    return path.stat().st_size <= _SAMPLES * _SAMPLE_BYTES


def _locate(prefix: Path) -> Path:
    """The file that `prefix` names: itself, PREFIX.bin or PREFIX.npy; for PREFIX.idx and PREFIX.json, PREFIX.bin."""
    if prefix.suffix in (".idx", ".json"):
        prefix = prefix.with_suffix("")
    candidates = [prefix, Path(f"{prefix}.bin"), Path(f"{prefix}.npy")]
    for path in candidates:
        if path.is_file():
            return path
    raise DataError(
        f"no token dataset at {prefix}: none of {', '.join(map(str, candidates))} exists{looked_in(prefix)}; give the "
        "prefix that `spt-fast prepare --out` wrote"
    )


def head_of(path: Path, size: int = 8) -> bytes:
    """The first bytes of a file; empty if there is no such file."""
    if not path.is_file():
        return b""
    with path.open("rb") as file:
        return file.read(size)


def _unfinished(path: Path) -> str:
    """A hint if the files look like a dataset of ours without its .json."""
    if path.suffix == ".bin" and path.with_suffix(".idx").is_file():
        return f" ({path.with_suffix('.json')} is missing or damaged: partly copied, or prepare was interrupted?)"
    return ""


def _megatron(path: Path, index: Path) -> TokenFile:
    """Megatron-LM's indexed dataset: lengths (int32) and byte pointers (int64) of the sequences, and for each document
    the sequence (int64) it starts at, with the number of sequences after the last; an int8 mode a sequence may follow.
    """
    size = index.stat().st_size
    if size < MEGATRON_HEADER.size:
        raise DataError(
            f"{index}: is truncated: {counted(size, 'byte')} found, its header alone has {MEGATRON_HEADER.size}; "
            "copy it again"
        )
    with index.open("rb") as file:
        _, version, code, sequences, boundaries = MEGATRON_HEADER.unpack(file.read(MEGATRON_HEADER.size))
    if version != 1:
        raise DataError(f"{index}: Megatron index version {version}; only version 1 can be read")
    if code not in MEGATRON_DTYPES:
        raise DataError(f"{index}: dtype code {code} is no integer type in Megatron-LM; token ids are integers")
    dtype = np.dtype(MEGATRON_DTYPES[code]).newbyteorder("<")

    expected = MEGATRON_HEADER.size + 12 * sequences + 8 * boundaries
    if size not in (expected, expected + sequences):
        raise DataError(
            f"{index}: is damaged: {counted(size, 'byte')} found, {expected:,} (or {expected + sequences:,} with "
            "modes) "
            f"expected from its {sequences:,} sequences and {boundaries:,} document boundaries; copy or make it again"
        )
    lengths = map_ids(index, np.dtype("<i4"), MEGATRON_HEADER.size, sequences)
    pointers = map_ids(index, np.dtype("<i8"), MEGATRON_HEADER.size + 4 * sequences, sequences)
    starts = map_ids(index, np.dtype("<i8"), MEGATRON_HEADER.size + 12 * sequences, boundaries)

    num_tokens = _contiguous_tokens(index, lengths, pointers, dtype.itemsize)
    check_size(path, num_tokens * dtype.itemsize, f"the sequence lengths in {index}")
    if boundaries == 0 or starts[0] != 0 or starts[-1] != sequences or np.any(starts[1:] < starts[:-1]):
        raise DataError(
            f"{index}: is damaged: its document boundaries don't run from 0 to its {sequences:,} sequences; "
            "copy or make it again"
        )
    sequence_starts = np.append(pointers // dtype.itemsize, num_tokens)
    return TokenFile("megatron", path, 0, dtype, num_tokens, sequence_starts[starts[1:]], sampled_digest(path, index))


def _contiguous_tokens(index: Path, lengths: np.ndarray, pointers: np.ndarray, itemsize: int) -> int:
    """The sum of the lengths; DataError unless every sequence starts where the previous one ends."""
    total = 0
    for i in range(0, len(lengths), _CHUNK):
        chunk = lengths[i : i + _CHUNK].astype(np.int64)
        ends = total + np.cumsum(chunk)
        if chunk.min() < 0 or np.any(pointers[i : i + _CHUNK] != (ends - chunk) * itemsize):
            raise DataError(
                f"{index}: its sequences are not contiguous in the .bin file, so it can't be read in place; "
                "write it again (Megatron-LM's own tools write it in order)"
            )
        total = int(ends[-1])
    return total


def _llmc(path: Path, key: tuple[int, int]) -> TokenFile:
    """llm.c and modded-nanogpt: 256 int32 (magic, version, token count, unused), then the ids."""
    if key not in LLMC_DTYPES:
        known = ", ".join(f"{magic} version {version}" for magic, version in LLMC_DTYPES)
        raise DataError(f"{path}: llm.c magic {key[0]} with version {key[1]}; known are {known}")
    size = path.stat().st_size
    if size < LLMC_HEADER_BYTES:
        raise DataError(
            f"{path}: is truncated: {counted(size, 'byte')} found, its header alone has {LLMC_HEADER_BYTES}; copy it "
            "again"
        )
    with path.open("rb") as file:
        num_tokens = struct.unpack("<iii", file.read(12))[2]
    dtype = np.dtype(LLMC_DTYPES[key]).newbyteorder("<")
    check_size(path, LLMC_HEADER_BYTES + num_tokens * dtype.itemsize, f"the {num_tokens:,} tokens in its header")
    return TokenFile("llm.c", path, LLMC_HEADER_BYTES, dtype, num_tokens, None, sampled_digest(path))


def _npy(path: Path) -> TokenFile:
    """NumPy's own format (numpy.lib.format), one dimension of integers."""
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    with path.open("rb") as file:
        try:
            shape, _, dtype = read_header[np.lib.format.read_magic(file)](file)
        except (ValueError, KeyError, TypeError, SyntaxError, TokenError, MemoryError, RecursionError) as error:
            problem = cut(str(error), 200)
            raise DataError(f"{path}: its .npy header is damaged or of an unknown version ({problem})") from error
        offset = file.tell()
    if len(shape) != 1 or dtype.kind not in "iu":
        raise DataError(f"{path} holds {dtype} of shape {shape}; token ids are integers in one dimension")
    if dtype.byteorder == ">":
        raise DataError(f"{path} is big-endian ({dtype}); save it again after .astype('<{dtype.str[1:]}')")
    check_size(path, offset + shape[0] * dtype.itemsize, f"the {shape[0]:,} ids in its header")
    return TokenFile("npy", path, offset, dtype, shape[0], None, sampled_digest(path))


def _headerless(path: Path, dtype: np.dtype) -> TokenFile:
    """nanoGPT, OLMo and datatrove: ids only. datatrove's FILE.index holds u64 document ends, in tokens."""
    size = path.stat().st_size
    if size % dtype.itemsize:
        raise DataError(
            f"{path} has {counted(size, 'byte')}, not a multiple of the {dtype.itemsize} bytes of the declared dtype "
            f"{dtype}; it is truncated, or of another dtype"
        )
    num_tokens = size // dtype.itemsize
    index = Path(f"{path}.index")
    if not index.is_file():
        return TokenFile("headerless", path, 0, dtype, num_tokens, None, sampled_digest(path))
    ends = map_ids(index, np.dtype("<i8"), 0, index.stat().st_size // 8)
    rising = len(ends) > 0 and ends[0] >= 0 and not np.any(ends[1:] < ends[:-1])
    if index.stat().st_size % 8 or not rising or ends[-1] != num_tokens:
        raise DataError(
            f"{index} doesn't hold the document ends (u64) of the {num_tokens:,} tokens in {path} as {dtype}; "
            "copy or make it again, declare another dtype, or move it away to read the ids without documents"
        )
    return TokenFile("headerless", path, 0, dtype, num_tokens, ends, sampled_digest(path, index))
