"""Token datasets on disk, opened: our own format, any other, and many files as one corpus.

`spt_fast.data.dataset_files` describes our format, and `spt_fast.data.writer` writes it.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import os
import re
import resource
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np

from spt_fast.data import formats
from spt_fast.data.dataset_files import BLOCK_BYTES, END_DTYPE, base_prefix, files_of, read_metadata, sha256_of
from spt_fast.data.inputs import HELD_OUT, few
from spt_fast.data.joined import JoinedTokens
from spt_fast.errors import DataError, SptWarning, counted, cut, invalid
from spt_fast.files import place

# isort: split
# These names were here before.
from spt_fast.data.dataset_files import FORMAT as FORMAT
from spt_fast.data.dataset_files import VERSION as VERSION
from spt_fast.data.dataset_files import datasets_in as datasets_in
from spt_fast.data.dataset_files import part_of as part_of
from spt_fast.data.writer import DatasetWriter as DatasetWriter
from spt_fast.data.writer import commit as commit

SAMPLED_BLOCKS = 4
"""Blocks that a quick check hashes."""

Prefix = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
"""Of a token dataset; a folder, pattern or list stands for one in many files."""

Stamp = tuple[int, int, int]
"""A file's device, inode and time of its last write in ns. While they stay the same, so do its bytes."""

_ENDINGS = (".bin", ".npy", ".ds")
_ABOUT = (".idx", ".json", ".index", ".metadata")
_PATTERN = re.compile(r"[*?[]")
_READ_BYTES = 1 << 20
_OPEN_PER_SHARD = 3  # the maps of its ids and document ends, and the loader's file
_ENDS_CHECKED = 1 << 16  # at open; the hash covers them all


@dataclass(frozen=True, eq=False)
class TokenDataset:
    """Token ids of one corpus, mapped from disk and never loaded whole.

    tokens          [num_tokens], read-only memmap; uint16 or uint32 in our format, any integer dtype in others; for
                    many files JoinedTokens, which index the same way
    document_ends   int64 [num_documents], non-decreasing exclusive ends in tokens; None if the format has none
    num_bytes       UTF-8 bytes of the text, if recorded
    max_id          largest id, if recorded (after `limit`, an upper bound)
    digest          identifies the content: in our format a hash of the block hashes; otherwise of sizes and samples
    path            the file that holds the ids, which start at `offset_bytes`; for many files the folder or pattern
    modified_ns     when its files had last been written as they were opened, in nanoseconds since 1970
    stamp           the `stamp_of` the file that holds the ids as it was opened
    shards          the datasets that it consists of, in order; empty if it is one file
    """

    format: str
    path: Path
    offset_bytes: int
    tokens: np.ndarray
    document_ends: np.ndarray | None
    digest: str
    modified_ns: int
    stamp: Stamp
    num_bytes: int | None = None
    vocab_size: int | None = None
    max_id: int | None = None
    eos_id: int | None = None
    bos_id: int | None = None
    tokenizer_digest: str | None = None
    metadata: dict[str, Any] | None = None  # the .json of our format
    shards: tuple[TokenDataset, ...] = ()

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_documents(self) -> int | None:
        return None if self.document_ends is None else len(self.document_ends)

    @property
    def has_hashes(self) -> bool:
        """Whether `verify` has hashes for all its files."""
        return all(shard.has_hashes for shard in self.shards) if self.shards else self.metadata is not None

    @classmethod
    def open(cls, prefix: Prefix, dtype: str | np.dtype | type[np.integer] | None = None) -> TokenDataset:
        """Open PREFIX in any supported format: ours, else Megatron, llm.c, .npy, else headerless ids of `dtype`.

        A folder, a pattern (`shards/train_*.bin`) or a list is one corpus in many files: those of the folder or pattern
        sorted by name, or those of the list in its order.

        `prefix` may have an extension. `dtype` (uint16, uint32, ...) is needed for headerless files and must agree with
        a header if there is one. Raises DataError for a file that is missing, damaged, or not of the size in its
        header. `verify` checks hashes, so that opening takes the same time at any size.
        """
        given = [prefix] if isinstance(prefix, (str, os.PathLike)) else prefix
        if not isinstance(given, Sequence) or isinstance(given, bytes) or not given or "" in given:
            raise DataError(invalid("prefix", prefix, "name a token dataset, or several; . is the working directory"))
        if isinstance(prefix, (str, os.PathLike)):
            prefix = place(prefix, "prefix", DataError)
        declared = None if dtype is None else formats.id_dtype(dtype, f"{prefix}: the declared dtype")
        try:
            if not isinstance(prefix, (str, os.PathLike)) or is_many(Path(prefix)):
                return _join(prefix, dtype)
            base = base_prefix(Path(prefix))
            metadata = read_metadata(files_of(base)[2])
            if metadata is None:
                found = formats.find(Path(prefix), declared)
                stamp = stamp_of(found.path.stat())
                tokens = formats.map_ids(found.path, found.dtype, found.offset_bytes, found.num_tokens)
                held = found.format, found.path, found.offset_bytes
                return cls(*held, tokens, found.document_ends, found.digest, _modified_ns(found.path), stamp)
            return cls._open_own(base, metadata, declared)
        except OSError as error:
            where, remedy = cut(str(error.filename or prefix), 200), "fix that, or name another"
            if error.errno == errno.EMFILE:
                remedy = "raise the limit of open files (ulimit -n), or write fewer and larger ones"
            raise DataError(f"{where}: can't be read ({error.strerror}); {remedy}") from error

    @classmethod
    def _open_own(cls, base: Path, metadata: dict[str, Any], declared: np.dtype | None) -> TokenDataset:
        bin_path, idx_path, json_path = files_of(base)
        for path in (bin_path, idx_path):
            if not path.is_file():
                raise DataError(f"{path} is missing, though {json_path} is there; copy or prepare the dataset again")
        id_dtype = formats.id_dtype(metadata["dtype"], f"{json_path}: dtype")
        formats.check_declared(bin_path, id_dtype, declared)
        num_tokens, num_documents = metadata["num_tokens"], metadata["num_documents"]
        formats.check_size(bin_path, num_tokens * id_dtype.itemsize, f"the {num_tokens:,} tokens in {json_path}")
        formats.check_size(
            idx_path, num_documents * END_DTYPE.itemsize, f"the {num_documents:,} documents in {json_path}"
        )
        stamp = stamp_of(bin_path.stat())
        ends = formats.map_ids(idx_path, END_DTYPE, 0, num_documents)
        checked = ends[:_ENDS_CHECKED]
        if num_documents and (checked[0] < 0 or np.any(checked[1:] < checked[:-1]) or ends[-1] != num_tokens):
            raise DataError(
                f"{idx_path}: is damaged: its document ends don't rise to the {num_tokens:,} tokens of {bin_path}; "
                "copy or prepare the dataset again"
            )
        return cls(
            format="spt_fast",
            path=bin_path,
            offset_bytes=0,
            tokens=formats.map_ids(bin_path, id_dtype, 0, num_tokens),
            document_ends=ends,
            digest=sha256_of([metadata["dtype"], metadata["blocks_sha256"], metadata["idx_sha256"]]),
            modified_ns=_modified_ns(bin_path),
            stamp=stamp,
            num_bytes=metadata["num_bytes"],
            vocab_size=metadata["vocab_size"],
            max_id=metadata["max_id"],
            eos_id=metadata["eos_id"],
            bos_id=metadata.get("bos_id"),
            tokenizer_digest=metadata["tokenizer_digest"],
            metadata=metadata,
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """For a copy or another process, which maps the files again: a pickle holds no ids of one corpus."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        if self.shards:
            values["tokens"] = None
        places = {name: formats.place_of(values[name]) for name in ("tokens", "document_ends")}
        return _opened_again, (values | {name: place for name, place in places.items() if place is not None},)

    def limit(self, tokens: int) -> TokenDataset:
        """The first whole documents that fit in `tokens` tokens (at least one that isn't empty), on the same map.

        If the format records no documents: the first `tokens` tokens. Its `digest` depends on this dataset's and on the
        cut; `num_bytes` is None, since bytes are recorded only for the whole. DataError if `tokens` < 1.
        """
        if not isinstance(tokens, Integral):
            raise DataError(invalid("tokens", tokens, "write a whole number of at least 1"), argument=True)
        if tokens < 1:
            raise DataError(f"{self.path}: a limit of {counted(tokens, 'token')} leaves nothing; give at least 1")
        if tokens >= self.num_tokens:
            return self
        ends = self.document_ends
        if ends is not None:
            first_filled = int(np.searchsorted(ends, np.int64(0), side="right")) + 1
            ends = ends[: max(first_filled, int(np.searchsorted(ends, np.int64(tokens), side="right")))]
            tokens = int(ends[-1])
            if tokens == self.num_tokens:
                return self
        digest = sha256_of([self.digest, "first", tokens])
        cut = replace(self, document_ends=ends, num_bytes=None, digest=digest)
        if not self.shards:
            return replace(cut, tokens=self.tokens[:tokens])
        starts = np.cumsum([0, *(shard.num_tokens for shard in self.shards)])
        kept = tuple(
            replace(shard, tokens=shard.tokens[: tokens - start])
            for shard, start in zip(self.shards, starts.tolist(), strict=False)
            if start < tokens
        )
        return replace(cut, tokens=_joined(kept), shards=kept)

    def verify(self, most_blocks: int | None = None) -> bool:
        """Hash the files again (for a limited dataset, the whole files), without a map; of more than `most_blocks`
        blocks only that many, the first and last included. Returns whether every byte is known to be unchanged.

        Raises DataError, which names the damaged block of .bin, or the .idx. Foreign formats record no hashes: their
        sizes were compared with their headers at open, and nothing more can be checked here.
        """
        if self.shards:
            small = sum(shard.tokens.nbytes for shard in self.shards) <= (most_blocks or 0) * BLOCK_BYTES
            if most_blocks is None or small:
                return all([shard.verify(most_blocks) for shard in self.shards])
            places = np.linspace(0, len(self.shards) - 1, most_blocks).astype(np.int64)
            for place in np.unique(places).tolist():
                self.shards[place].verify(1)
            return False
        if self.metadata is None:
            return formats.is_sampled_whole(self.path)
        bin_path, idx_path, json_path = files_of(base_prefix(self.path))
        block_bytes, expected = self.metadata["block_bytes"], self.metadata["blocks_sha256"]
        size = self.metadata["num_tokens"] * self.tokens.dtype.itemsize
        formats.check_size(bin_path, size, str(json_path))
        if len(expected) != -(-size // block_bytes):
            raise DataError(f"{json_path} was edited: it has {len(expected)} block hashes; prepare the dataset again")
        most = len(expected) if most_blocks is None else min(most_blocks, len(expected))
        blocks = np.unique(np.linspace(0, len(expected) - 1, most).astype(np.int64)).tolist()
        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
            digests = pool.map(lambda i: _sha256_of_stretch(bin_path, i * block_bytes, block_bytes), blocks)
            damaged = [i for i, digest in zip(blocks, digests, strict=True) if digest != expected[i]]
        if damaged:
            first = damaged[0] * block_bytes
            named = ", ".join(map(str, damaged[:8])) + (", ..." if len(damaged) > 8 else "")
            raise DataError(
                f"{bin_path}: is damaged: block {named} of {len(expected)} doesn't have the sha256 in {json_path} "
                f"(the first is bytes {first:,} to {min(first + block_bytes, size):,}); copy or prepare it again"
            )
        idx_bytes = idx_path.stat().st_size
        if most_blocks is not None and idx_bytes > most_blocks * block_bytes:
            return False
        if _sha256_of_stretch(idx_path, 0, idx_bytes) != self.metadata["idx_sha256"]:
            raise DataError(
                f"{idx_path}: is damaged: its sha256 differs from the one in {json_path}; copy or prepare it again"
            )
        return most == len(expected)


def _opened_again(values: dict[str, Any]) -> TokenDataset:
    """What `TokenDataset.__reduce__` took apart. DataError if a file is gone or was written since."""
    place = values["tokens"]
    if isinstance(place, formats.Place):
        try:
            written_ns = stamp_of(place.path.stat())[2]
        except OSError as error:
            raise DataError(f"{place.path}: can't be read ({error.strerror}); fix that, or name another") from error
        if written_ns != values["stamp"][2]:
            raise DataError(f"{place.path}: was written since this dataset was opened; open it again")
    if values["shards"]:
        values["tokens"] = _joined(values["shards"])
    mapped = {name: value.map() for name, value in values.items() if isinstance(value, formats.Place)}
    return TokenDataset(**values | mapped)


def is_many(prefix: Path) -> bool:
    """Whether a path is a folder or pattern, and so stands for many token files, rather than a file of that name."""
    if any(Path(f"{prefix}{ending}").is_file() for ending in ("", *_ENDINGS)):
        return False
    return prefix.is_dir() or bool(_PATTERN.search(str(prefix)))


def _join(given: Prefix, dtype: str | np.dtype | type[np.integer] | None) -> TokenDataset:
    """The datasets of a folder, a pattern or a list, joined."""
    several = [given] if isinstance(given, (str, os.PathLike)) else given
    items = [place(item, "prefix", DataError) for item in several]
    what = Path(", ".join(map(str, items)))
    prefixes = [prefix for item in items for prefix in (_matching(item) if is_many(item) else [item])]
    if not prefixes:
        raise DataError(f"{what}: holds no token files ({', '.join(_ENDINGS)})")
    _allow_open_files(_OPEN_PER_SHARD * len(prefixes))
    shards = tuple(TokenDataset.open(prefix, dtype) for prefix in prefixes)
    if len({(status.st_dev, status.st_ino) for status in (shard.path.stat() for shard in shards)}) < len(shards):
        raise DataError(f"{what}: names a file twice, maybe by a link; name every shard once")
    first = shards[0]
    _refuse_mixed(what, prefixes, shards)
    starts = np.cumsum([0, *(shard.num_tokens for shard in shards)]).tolist()
    of_shards = zip((shard.document_ends for shard in shards), starts, strict=False)
    ends = [own + start for own, start in of_shards if own is not None]
    return replace(
        first,
        path=what,
        tokens=_joined(shards),
        document_ends=np.concatenate(ends) if len(ends) == len(shards) else None,
        digest=sha256_of([shard.digest for shard in shards]) if len(shards) > 1 else first.digest,
        modified_ns=max(shard.modified_ns for shard in shards),
        num_bytes=_of_all(sum, [shard.num_bytes for shard in shards]),
        max_id=_of_all(max, [shard.max_id for shard in shards if shard.num_tokens]),
        metadata=None,
        shards=shards,
    )


def _allow_open_files(more: int) -> None:
    """Raise the soft limit of open files, often 1024, as far as the hard one allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return
    wanted = soft + more if hard == resource.RLIM_INFINITY else min(soft + more, hard)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def stamp_of(status: os.stat_result) -> Stamp:
    return status.st_dev, status.st_ino, status.st_mtime_ns


def _modified_ns(path: Path) -> int:
    """When a file of ids and its document ends were last written."""
    files = [path, path.with_suffix(".idx"), Path(f"{path}.index")]
    return max(file.stat().st_mtime_ns for file in files if file.exists())


def _matching(given: Path) -> list[Path]:
    """Token files of a folder or pattern, sorted by name. Warns of other files there."""
    names = [Path(given, name) for name in os.listdir(given)] if given.is_dir() else map(Path, _found(given))
    found = sorted(names)
    files = [path for path in found if path.suffix in _ENDINGS and path.is_file() and not path.name.startswith(".")]
    by_stem = {path.with_suffix(""): path for path in files}
    if len(by_stem) < len(files):
        twice = next(path for path in files if by_stem[path.with_suffix("")] != path)
        raise DataError(
            f"{given}: holds both {twice.name} and {by_stem[twice.with_suffix('')].name}, maybe the same ids twice; "
            "name the files to read with a pattern"
        )
    others = [path.name for path in found if path not in files and not _belongs(path, by_stem)]
    if others and files:
        warnings.warn(f"{given}: ignored {len(others)} × not a token file ({few(others)})", SptWarning, stacklevel=4)
    return [base_prefix(path) if path.suffix == ".bin" else path for path in files]


def _found(pattern: Path) -> list[str]:
    deep = "**" in pattern.parts
    return [name for name in glob.glob(str(pattern), recursive=True) if not (deep and os.path.isdir(name))]


def _belongs(path: Path, stems: Mapping[Path, Path]) -> bool:
    """Whether a file belongs to a token file beside it (index, documents, metadata) or is a writer's temporary file."""
    about = {path.with_suffix(""), path.with_suffix("").with_suffix("")} if path.suffix in _ABOUT else set()
    return not about.isdisjoint(stems) or re.fullmatch(r"\..*\.(lock|tmp)", path.name) is not None


def _refuse_mixed(what: Path, prefixes: list[Path], shards: tuple[TokenDataset, ...]) -> None:
    """DataError for files that don't make one corpus: different ids, or training text mixed with held-out text."""
    kinds = {HELD_OUT.search(prefix.name) is not None for prefix in prefixes}
    if len(kinds) > 1:
        apart = next(prefix.name for prefix in prefixes if HELD_OUT.search(prefix.name))
        raise DataError(
            f"{what}: holds {apart}, which looks held out, beside other text; name the files to read with a pattern"
        )
    for shard, prefix in zip(shards, prefixes, strict=True):
        for field in ("dtype", "tokenizer_digest", "vocab_size", "eos_id", "bos_id"):
            ours, theirs = (getattr(x.tokens if field == "dtype" else x, field) for x in (shards[0], shard))
            if ours != theirs:
                raise DataError(
                    f"{what}: {prefix} has {field} {theirs}, {prefixes[0]} {ours}; prepare both in the same way"
                )


def _joined(shards: Sequence[TokenDataset]) -> Any:
    return JoinedTokens([shard.tokens for shard in shards])


def _of_all(combine: Callable[[list[int]], int], values: list[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return combine(known) if known and len(known) == len(values) else None


def check_same_tokenizer(a: TokenDataset, b: TokenDataset) -> None:
    """DataError if both record a tokenizer and they differ: their ids mean different text."""
    if None not in (digests := (a.tokenizer_digest, b.tokenizer_digest)) and digests[0] != digests[1]:
        first, second = (str(digest)[:12] for digest in digests)
        raise DataError(
            f"{a.path} and {b.path} come from different tokenizers (digests {first}… and {second}…): their ids cannot "
            "be compared; prepare both with the same tokenizer"
        )


def _sha256_of_stretch(path: Path, start: int, num_bytes: int) -> str:
    """sha256 of `num_bytes` of the file from `start` on, or of fewer at its end."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(start)
        while num_bytes > 0 and (data := file.read(min(num_bytes, _READ_BYTES))):
            digest.update(data)
            num_bytes -= len(data)
    return digest.hexdigest()
