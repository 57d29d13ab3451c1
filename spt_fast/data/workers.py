"""Worker processes that parse and encode: batches of chunks go in, arrays of ids come out, in the same order.

A worker is a fresh interpreter that imports only NumPy and tiktoken (or tokenizers), and communicates in frames over
its standard input and output: raw buffers behind a JSON header, nothing pickled. It needs no fork (safe beside torch's
threads), doesn't run the caller's main module again, ignores Ctrl-C, and ends when its input does, however its parent
died.

In the parent one thread per worker waits on those pipes, and one more reads ahead. The text in flight, read and not yet
returned as ids, is bounded by AHEAD_BYTES per worker (or is a single document). The reading thread limits many cores:
at 17 MB/s per worker, a .gz keeps about a dozen busy, a .zst twenty, plain text and Parquet more than 64.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import queue
import struct
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, BinaryIO

import numpy as np

from spt_fast.data.base_tokenizer import BaseTokenizer
from spt_fast.data.text import Chunk, parse
from spt_fast.data.tokenizer import rebuilt
from spt_fast.errors import DataError, MissingKey

AHEAD_BYTES = 16 << 20

_WHITE_SPACE = b" \t\n\r\v\f"
_HASH_PERSON = b"spt held-out"


@dataclass(frozen=True)
class Settings:
    """hashed: whether each document's text is hashed, for the held-out split."""

    text_key: str
    skip_bad: bool
    hashed: bool


@dataclass(frozen=True)
class TextBatch:
    """read_bytes: how much of the input files (as they are on disk) had been read when this batch was complete."""

    chunks: list[Chunk]
    read_bytes: int

    @property
    def num_bytes(self) -> int:
        return sum(len(chunk.data) for chunk in self.chunks)


@dataclass(frozen=True)
class Encoded:
    """Encoded documents.

    tokens            uint16 or uint32 [tokens], the ids that begin and end each document included
    document_lengths  int64 [documents], in tokens
    document_bytes    int64 [documents], UTF-8 bytes of the text
    hashes            uint64 [documents], of the text without its white space (ASCII); empty unless requested
    skipped           documents left out, by kind
    ends_inside       documents whose text contains the token that ends documents, if such tokens are read out of text
    """

    tokens: np.ndarray
    document_lengths: np.ndarray
    document_bytes: np.ndarray
    hashes: np.ndarray
    skipped: Counter[str] = field(default_factory=Counter)
    ends_inside: int = 0

    @property
    def num_bytes(self) -> int:
        return int(self.document_bytes.sum())

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        return self.tokens, self.document_lengths, self.document_bytes, self.hashes


class EncoderPool:
    """`workers` processes that encode. A context manager: leaving it ends them at once, even while they work.

    starting: how many are started at once, while the tokenizer is prepared; others start when they are needed.
    """

    def __init__(self, tokenizer: BaseTokenizer, settings: Settings, workers: int, *, starting: int = 0) -> None:
        self._tokenizer, self._settings, self._starting = tokenizer, settings, starting
        self._ahead_bytes = workers * AHEAD_BYTES
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="prepare")
        self._mine = threading.local()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._idle: list[subprocess.Popen[bytes]] = []
        self._under_way_bytes = 0
        self._closed = False
        self._changed = threading.Condition()

    def encode(self, batches: Iterable[TextBatch]) -> Iterator[tuple[TextBatch, Encoded]]:
        """Encodes batches, read ahead on another thread, and yields them in order.

        Raises, in place of the batch in question, what reading it raised, DataError for a bad document, and DataError
        when a worker dies.
        """
        ends = {"eos_id": self._tokenizer.eos_id, "bos_id": self._tokenizer.bos_id}
        self._setup = ({"settings": asdict(self._settings), "ends": ends}, [self._tokenizer.to_bytes()])
        order: queue.SimpleQueue[tuple[TextBatch, Future[Encoded]] | BaseException | None] = queue.SimpleQueue()
        # A daemon, since a read from standard input may never return.
        threading.Thread(target=self._feed, args=(batches, order), daemon=True).start()
        while (item := order.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            batch, future = item
            yield batch, future.result()
            with self._changed:
                self._under_way_bytes -= batch.num_bytes
                self._changed.notify()

    def _feed(self, batches: Iterable[TextBatch], order: queue.SimpleQueue[Any]) -> None:
        try:
            for batch in batches:
                with self._changed:
                    while not (self._closed or self._has_room(batch.num_bytes)):
                        self._changed.wait()
                    if self._closed:
                        return
                    self._under_way_bytes += batch.num_bytes
                order.put((batch, self._threads.submit(self._encode, batch)))
            order.put(None)
        except BaseException as error:
            order.put(error)

    def _has_room(self, num_bytes: int) -> bool:
        return self._under_way_bytes == 0 or self._under_way_bytes + num_bytes <= self._ahead_bytes

    def _encode(self, batch: TextBatch) -> Encoded:
        new = not hasattr(self._mine, "process")
        process = self._start() if new else self._mine.process
        try:
            if new:
                _send(process.stdin, *self._setup)
            return _exchange(process, batch)
        except (BrokenPipeError, EOFError):
            code = process.wait()
            how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
            first = batch.chunks[0]
            raise DataError(
                f"a worker process {how} while encoding {first.source} from {first.unit} {first.first} on; "
                "if memory is short, use fewer workers"
            ) from None

    def _start(self) -> subprocess.Popen[bytes]:
        """This thread's worker process."""
        with self._changed:
            if self._closed:
                raise EOFError
            self._mine.process = self._idle.pop() if self._idle else self._new()
        return self._mine.process

    def _new(self) -> subprocess.Popen[bytes]:
        self._processes.append(_start_worker())
        return self._processes[-1]

    def __enter__(self) -> EncoderPool:
        self._idle = [self._new() for _ in range(self._starting)]
        return self

    def __exit__(self, *error: object) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        for process in self._processes:
            process.kill()
        self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()  # type: ignore[union-attr]


def encode_chunks(chunks: Iterable[Chunk], tokenizer: BaseTokenizer, settings: Settings) -> Encoded:
    """The worker's main loop: parse, encode, and add the ids that begin and end a document."""
    tokens: list[np.ndarray] = []
    lengths: list[int] = []
    sizes: list[int] = []
    hashes: list[int] = []
    skipped: Counter[str] = Counter()
    ends_inside = 0
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    bos, eos = (np.array([] if id_ is None else [id_], dtype) for id_ in (tokenizer.bos_id, tokenizer.eos_id))
    for chunk in chunks:
        # All are parsed before any is encoded: alternating costs 2% of the time, in cache misses.
        for text, utf8 in list(parse(chunk, settings.text_key, skip_bad=settings.skip_bad, skipped=skipped)):
            ids = tokenizer.encode_array(text)
            if not len(ids):
                skipped["without tokens"] += 1
                continue
            ends_inside += tokenizer.eos_id in ids
            tokens.extend((bos, ids, eos))
            lengths.append(len(bos) + len(ids) + len(eos))
            sizes.append(len(utf8))
            if settings.hashed:
                hashes.append(hash_of(utf8))
    return Encoded(
        np.concatenate([*tokens, eos[:0]], dtype=dtype, casting="unsafe"),
        np.array(lengths, np.int64),
        np.array(sizes, np.int64),
        np.array(hashes, np.uint64),
        skipped,
        ends_inside,
    )


def hash_of(utf8: bytes) -> int:
    """A 64-bit hash of a document's text without its white space (ASCII)."""
    digest = hashlib.blake2b(utf8.translate(None, _WHITE_SPACE), digest_size=8, person=_HASH_PERSON).digest()
    return int.from_bytes(digest, "little")


def _start_worker() -> subprocess.Popen[bytes]:
    paths = [path or os.getcwd() for path in sys.path]
    threads = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")
    one_thread = {**dict.fromkeys(threads, "1"), "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.Popen(
        [sys.executable, "-P", "-m", __name__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,  # so that only the parent gets Ctrl-C
        env={**os.environ, **one_thread, "PYTHONPATH": os.pathsep.join(paths)},
    )


def _exchange(process: subprocess.Popen[bytes], batch: TextBatch) -> Encoded:
    heads = [{key: value for key, value in vars(chunk).items() if key != "data"} for chunk in batch.chunks]
    _send(process.stdin, {"chunks": heads}, [chunk.data for chunk in batch.chunks])
    frame = _receive(process.stdout)
    if frame is None:
        raise EOFError
    head, buffers = frame
    if "error" in head:
        raise (MissingKey if head["missing_key"] else DataError)(head["error"])
    arrays = [np.frombuffer(buffer, dtype) for buffer, dtype in zip(buffers, head["dtypes"], strict=True)]
    tokens, lengths, sizes, hashes = arrays
    return Encoded(tokens, lengths, sizes, hashes, Counter(head["skipped"]), head["ends_inside"])


def _serve(requests: BinaryIO, replies: BinaryIO) -> None:
    setup = _receive(requests)
    if setup is None:
        return
    settings, tokenizer = Settings(**setup[0]["settings"]), rebuilt(setup[1][0])
    tokenizer.eos_id, tokenizer.bos_id = setup[0]["ends"]["eos_id"], setup[0]["ends"]["bos_id"]
    while (frame := _receive(requests)) is not None:
        heads, buffers = frame[0]["chunks"], frame[1]
        chunks = [Chunk(data=data, **head) for head, data in zip(heads, buffers, strict=True)]
        try:
            encoded = encode_chunks(chunks, tokenizer, settings)
        except DataError as error:
            _send(replies, {"error": str(error), "missing_key": isinstance(error, MissingKey)}, [])
            continue
        head = {
            "dtypes": [array.dtype.name for array in encoded.arrays],
            "skipped": encoded.skipped,
            "ends_inside": encoded.ends_inside,
        }
        _send(replies, head, [array.data for array in encoded.arrays])


def _send(pipe: Any, head: dict[str, Any], buffers: list[Any]) -> None:
    head_bytes = json.dumps(head | {"sizes": [memoryview(buffer).nbytes for buffer in buffers]}).encode()
    pipe.write(struct.pack("<Q", len(head_bytes)) + head_bytes)
    for buffer in buffers:
        pipe.write(buffer)
    pipe.flush()


def _receive(pipe: Any) -> tuple[dict[str, Any], list[bytes]] | None:
    """The next frame; None at the end of the pipe. Raises EOFError inside a frame."""
    size = pipe.read(8)
    if not size:
        return None
    head = json.loads(_read_all(pipe, struct.unpack("<Q", size)[0]))
    return head, [_read_all(pipe, size) for size in head.pop("sizes")]


def _read_all(pipe: Any, size: int) -> bytes:
    data = pipe.read(size)
    if len(data) < size:
        raise EOFError
    return data


if __name__ == "__main__":
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # other prints go to standard error
    _serve(sys.stdin.buffer, replies)
