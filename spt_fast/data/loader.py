"""Batches of a sample order for one rank, read from the token files ahead of time on a background thread.

Shapes: R = rows of this rank in a step, B = `micro` rows, T = context, S = sources.

Position p of the global batch goes to row i of micro-batch m of rank r by p = (m·world + r)·micro + i. Another
world size or micro-batch distributes the same global batch differently; the order of the data stays the same.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from spt_fast import native
from spt_fast.data.order import SampleOrder
from spt_fast.data.shards import TokenDataset, stamp_of
from spt_fast.errors import DataError, RecipeError, counted

PREFETCHED_STEPS = 2
ADVISED_STEPS = 8
COMPARED_IDS = 1024

_Windows = tuple[np.ndarray, np.ndarray]  # source int32 [R], first token int64 [R]


@dataclass(frozen=True)
class Batch:
    """A micro-batch, on the loader's device.

    tokens, targets   int64 [B, T], contiguous; targets are the tokens shifted by one
    cu_seqlens        int32 [n + 1]: where documents start in the flattened tokens, then B·T; 0 = first < ... < last.
                      Each row starts a new document, and so does the text after the corpus's end in a window that wraps
                      around. None unless requested
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    cu_seqlens: torch.Tensor | None


class Loader:
    """Steps [first_step, last_step) of `order`: iterating gives (step, [Batch, ...]), the rank's micro-batches.

    datasets: by source of the mixture; context: T. `documents` requests cu_seqlens. Batches for a CUDA `device` are
    read into pinned memory and copied without blocking. Ids are checked against `vocab_size`. No random numbers are
    drawn.

    Raises RecipeError if the order's sequences don't divide by micro x world, or `rank` is not below `world`. Raises
    DataError, here or from the iteration: a source without its dataset or ring, `documents` without recorded document
    ends, ids that aren't native integers, a file that was replaced since the dataset was opened, changed its size or
    cannot be read, an id of `vocab_size` or more. Close it, or use it as a context manager.
    """

    def __init__(
        self,
        order: SampleOrder,
        datasets: Mapping[str, TokenDataset],
        context: int,
        *,
        micro: int,
        vocab_size: int,
        last_step: int,
        first_step: int = 0,
        rank: int = 0,
        world: int = 1,
        documents: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        if min(micro, world) < 1 or not 0 <= rank < world:
            raise RecipeError(
                f"rank: {rank} of {world} with micro {micro} is invalid: ranks count from 0, micro from 1"
            )
        if order.sequences % (micro * world):
            raise RecipeError(
                f"batch.sequences: {order.sequences} does not divide into {counted(world, 'process')} of "
                f"micro-batches of {micro}; choose a multiple of {micro * world}"
            )
        for name in order.mixture.sources:
            if name not in datasets or name not in order.rings:
                raise DataError(f"source {name!r} of the mixture has no dataset, or no ring; give one of each")
            ring, num_tokens = order.rings[name], datasets[name].num_tokens
            if (ring.num_tokens, ring.context) != (num_tokens, context):
                raise DataError(
                    f"source {name!r}: its ring is of {ring.num_tokens:,} tokens in windows of {ring.context:,}, and "
                    f"the dataset has {num_tokens:,} for a context of {context:,}; make the ring of these"
                )
        self._order, self._context, self._vocab_size = order, context, vocab_size
        self._first_step, self._last_step = first_step, last_step
        self._micro, self._device = micro, torch.device(device)
        self._positions = np.arange(order.sequences).reshape(-1, world, micro)[:, rank].reshape(-1)
        self._documents = documents
        self._sources: list[_Source] = []
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader")
        try:
            for name in order.mixture.sources:
                self._sources.append(_Source(name, datasets[name], documents))
        except DataError:
            self.close()
            raise
        self._files = [file for source in self._sources for file in source.files]
        self._table_F4 = np.array([file.row for file in self._files], dtype=np.int64)
        self._first_S = np.cumsum([0, *(len(source.files) for source in self._sources)])[:-1].astype(np.int32)

    def __iter__(self) -> Iterator[tuple[int, list[Batch]]]:
        windows = self._windows_advised_ahead()
        pending: deque[tuple[torch.Tensor, Future[list[torch.Tensor | None]]]] = deque()
        for step in range(self._first_step, self._last_step + PREFETCHED_STEPS):
            if step < self._last_step:
                batch_2RT = self._empty_batch()
                pending.append((batch_2RT, self._pool.submit(self._read, windows, batch_2RT)))
            if step >= self._first_step + PREFETCHED_STEPS:
                batch_2RT, reading = pending.popleft()
                yield step - PREFETCHED_STEPS, self._micro_batches(batch_2RT, reading.result())

    def close(self) -> None:
        """Stop reading ahead and close the files."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        for source in self._sources:
            source.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _windows_advised_ahead(self) -> Iterator[_Windows]:
        """This rank's windows of each step, a few steps after their pages were requested."""
        advised: deque[_Windows] = deque()
        for step in range(self._first_step, self._last_step):
            source_G, start_G = self._order.windows(step)
            advised.append((source_G[self._positions], start_G[self._positions]))
            native.advise(self._table_F4, *self._in_files(*advised[-1])[:2], self._context)
            if len(advised) > ADVISED_STEPS:
                yield advised.popleft()
        yield from advised

    def _empty_batch(self) -> torch.Tensor:
        """[2, R, T], allocated on the consumer's thread: pinning elsewhere would allocate memory on the first GPU."""
        shape = (2, len(self._positions), self._context)
        return torch.empty(shape, dtype=torch.int64, device="cpu", pin_memory=self._device.type == "cuda")

    def _read(self, windows: Iterator[_Windows], batch_2RT: torch.Tensor) -> list[torch.Tensor | None]:
        """Fill the batch of the next step; returns the cu_seqlens of each of its micro-batches."""
        source_R, start_R = next(windows)
        for file in self._files:
            file.check_size()
        file_R, first_R, whole_R = self._in_files(source_R, start_R)
        rows = np.flatnonzero(whole_R)
        into = batch_2RT if len(rows) == len(whole_R) else batch_2RT.new_empty(2, len(rows), self._context)
        failure = native.gather(self._table_F4, file_R[rows], first_R[rows], self._vocab_size, into)
        if failure.outcome:
            raise self._files[file_R[rows[failure.row]]].error(failure, self._vocab_size)
        if into is not batch_2RT:
            batch_2RT[:, torch.from_numpy(rows)] = into
        for row in np.flatnonzero(~whole_R).tolist():
            ids = self._sources[source_R[row]].window(int(start_R[row]), self._context, self._vocab_size)
            batch_2RT[:, row] = torch.from_numpy(np.stack([ids[:-1], ids[1:]]))
        micro_batches = zip(source_R.reshape(-1, self._micro), start_R.reshape(-1, self._micro), strict=True)
        return [self._document_starts(*window_B) if self._documents else None for window_B in micro_batches]

    def _in_files(self, source_R: np.ndarray, start_R: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """For each window its first file (int32), its first token there, and whether it can be gathered from that file
        alone."""
        file_R, first_R, whole_R = self._first_S[source_R], start_R, np.ones(len(source_R), bool)
        for number, source in enumerate(self._sources):
            if len(source.files) > 1:
                rows = np.flatnonzero(source_R == number)
                shard = np.searchsorted(source.edges, start_R[rows], "right") - 1
                first_R = first_R.copy()
                first_R[rows] -= source.edges[shard]
                file_R[rows] += shard.astype(np.int32)
                whole_R[rows] = start_R[rows] + self._context < source.edges[shard + 1]
        return file_R, first_R, whole_R

    def _document_starts(self, source_B: np.ndarray, start_B: np.ndarray) -> torch.Tensor:
        """cu_seqlens int32 of a micro-batch."""
        starts = [
            row * self._context + self._sources[source].document_starts(start, self._context)
            for row, (source, start) in enumerate(zip(source_B.tolist(), start_B.tolist(), strict=True))
        ]
        starts.append(np.array([len(source_B) * self._context]))
        return torch.from_numpy(np.concatenate(starts).astype(np.int32))

    def _micro_batches(self, batch_2RT: torch.Tensor, cu_seqlens: list[torch.Tensor | None]) -> list[Batch]:
        if self._device.type == "cuda":
            cu_seqlens = [cuts if cuts is None else cuts.pin_memory() for cuts in cu_seqlens]
        cu_seqlens = [cuts if cuts is None else cuts.to(self._device, non_blocking=True) for cuts in cu_seqlens]
        tokens_RT, targets_RT = batch_2RT.to(self._device, non_blocking=True)
        return list(map(Batch, tokens_RT.split(self._micro), targets_RT.split(self._micro), cu_seqlens))


class _Source:
    """The open files of one source, concatenated to a ring of tokens.

    edges: int64 [files + 1], where each file begins in the source, then its end
    """

    def __init__(self, name: str, dataset: TokenDataset, documents: bool) -> None:
        if documents and dataset.document_ends is None:
            raise DataError(
                f"source {name!r}: {dataset.path} records no document ends, which `documents: true` needs; set it to "
                "false, or prepare the text with `spt-fast prepare`"
            )
        self._ends = np.asarray(dataset.document_ends if documents else [], dtype=np.int64)
        self.files: list[_TokenFile] = []
        shards = [shard for shard in dataset.shards or (dataset,) if shard.num_tokens or not dataset.shards]
        try:
            for shard in shards:
                self.files.append(_TokenFile(name, shard))
        except DataError:
            self.close()
            raise
        self.edges = np.cumsum([0, *(shard.num_tokens for shard in shards)])

    def close(self) -> None:
        for file in self.files:
            file.close()

    def window(self, start: int, context: int, vocab_size: int) -> np.ndarray:
        """`context` + 1 ids, int64, from `start` on, across file boundaries and the end of the ring."""
        found, missing = [], context + 1
        while missing:
            shard = int(np.searchsorted(self.edges, start, "right")) - 1
            taken = min(missing, int(self.edges[shard + 1]) - start)
            found.append(self.files[shard].read(start - int(self.edges[shard]), taken, vocab_size))
            start, missing = (start + taken) % int(self.edges[-1]), missing - taken
        return np.concatenate(found)

    def document_starts(self, start: int, context: int) -> np.ndarray:
        """Where documents begin in a window: int64, from 0, strictly increasing, below `context`."""
        num_tokens = int(self.edges[-1])
        starts = [np.array([0]), self._ends_between(start, min(start + context, num_tokens)) - start]
        beyond = start + context - num_tokens
        if beyond > 0:
            starts += [np.array([context - beyond]), self._ends_between(0, beyond) + context - beyond]
        return np.unique(np.concatenate(starts))

    def _ends_between(self, low: int, high: int) -> np.ndarray:
        """The document ends in (low, high)."""
        return self._ends[np.searchsorted(self._ends, low, "right") : np.searchsorted(self._ends, high, "left")]


class _TokenFile:
    """An open file of one source's ids."""

    def __init__(self, name: str, dataset: TokenDataset) -> None:
        dtype = dataset.tokens.dtype
        if dtype.kind not in "iu" or not dtype.isnative:
            raise DataError(f"source {name!r}: {dataset.path} holds {dtype.str}; ids must be native integers")
        self._name, self._path = name, dataset.path
        try:
            self._file = dataset.path.open("rb", buffering=0)
        except OSError as error:
            raise DataError(f"source {name!r}: {dataset.path} cannot be opened: {error.strerror}") from None
        status = os.fstat(self._file.fileno())
        self._size_bytes = status.st_size
        needed_bytes = dataset.offset_bytes + dataset.num_tokens * dtype.itemsize
        if self._size_bytes < needed_bytes:
            self._file.close()
            raise DataError(
                f"source {name!r}: {dataset.path} has {self._size_bytes:,} bytes and its {dataset.num_tokens:,} tokens "
                f"need {needed_bytes:,}; it is truncated: copy or prepare it again"
            )
        if stamp_of(status) != dataset.stamp and not self._holds_ids_of(dataset):
            self._file.close()
            raise DataError(
                f"source {name!r}: {dataset.path} was replaced by other text since this run opened it; put the file "
                "back as it was and resume, or start a run of another name"
            )
        signed = -1 if dtype.kind == "i" else 1
        self.row = (self._file.fileno(), dataset.offset_bytes, dataset.num_tokens, signed * dtype.itemsize)

    def close(self) -> None:
        self._file.close()

    def _holds_ids_of(self, dataset: TokenDataset) -> bool:
        """Whether the file begins and ends as the dataset, whose map still shows a file that was replaced."""
        last = max(0, dataset.num_tokens - COMPARED_IDS)
        for first in (0, last):
            if (ids := _copied(dataset.tokens[first : first + COMPARED_IDS])) is None:
                return False
            try:
                found = os.pread(self._file.fileno(), len(ids), dataset.offset_bytes + first * dataset.tokens.itemsize)
            except OSError as error:
                self._file.close()
                reason = f"cannot be read: {error.strerror}; check the disk"
                raise DataError(f"source {self._name!r}: {self._path} {reason}") from None
            if found != ids:
                return False
        return True

    def read(self, first: int, count: int, vocab_size: int) -> np.ndarray:
        """`count` ids, int64, from the file's token `first` on."""
        batch_21T = torch.empty(2, 1, max(1, count - 1), dtype=torch.int64)
        table, source, start = np.array([self.row]), np.zeros(1, np.int32), np.array([first])
        failure = native.gather(table, source, start, vocab_size, batch_21T)
        if failure.outcome:
            raise self.error(failure, vocab_size)
        inputs, targets = batch_21T[:, 0].numpy()
        return np.append(inputs, targets[-1])[:count]

    def check_size(self) -> None:
        size_bytes = os.fstat(self._file.fileno()).st_size
        if size_bytes != self._size_bytes:
            raise DataError(
                f"source {self._name!r}: {self._path} changed from {self._size_bytes:,} to {size_bytes:,} bytes while "
                "it was being read; put the file back as it was and resume"
            )

    def error(self, failure: native.GatherFailure, vocab_size: int) -> DataError:
        """The error for a failed gather from this file."""
        where = f"source {self._name!r}: {self._path}, token {failure.token:,}"
        match failure.outcome:
            case native.CUT_SHORT:
                return DataError(f"{where}: the file ends before it and is truncated: copy or prepare it again")
            case native.READ_ERROR:
                return DataError(f"{where}: cannot be read: {os.strerror(failure.detail)}; check the disk")
            case native.ID_TOO_LARGE:
                return DataError(
                    f"{where}: id {failure.detail:,} is not in the vocabulary of {vocab_size:,}; prepare the text with "
                    "this run's tokenizer, or raise model.vocab_size"
                )
        raise AssertionError(failure)


def _copied(mapped: np.ndarray) -> bytes | None:
    """The bytes of a map, None if they are gone. The system copies them: where the mapped file was cut, or replaced by
    another host of a network file system, a read by this process would end in SIGBUS."""
    with open(os.memfd_create("ids"), "w+b", buffering=0) as copy:
        try:
            copy.write(mapped.data)
        except OSError:
            return None
        copy.seek(0)
        copied = copy.read()
    return copied if len(copied) == mapped.nbytes else None
