"""From text to a token dataset: read, encode in parallel, write; one pass, bounded memory.

The dataset holds the documents of the input in order, whatever the number of workers. Each ends with the end-of-text
id, and begins with another token if one is named. The dataset and its held-out part are written completely or not at
all: until the last document is encoded, the files at PREFIX stay as they were.
"""

from __future__ import annotations

import os
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from copy import copy
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path

from spt_fast.data.base_tokenizer import BaseTokenizer
from spt_fast.data.dataset_files import base_prefix, part_of
from spt_fast.data.hf_tokenizer import HFTokenizer
from spt_fast.data.inputs import Inputs
from spt_fast.data.split import Split
from spt_fast.data.text import Chunk, TextReader, parse
from spt_fast.data.tokenizer import Tokenizer
from spt_fast.data.workers import Encoded, EncoderPool, Settings, TextBatch
from spt_fast.data.writer import DatasetWriter, commit
from spt_fast.errors import DataError, SptWarning, counted, invalid
from spt_fast.outputs import check_name
from spt_fast.progress import progress_of
from spt_fast.quantities import size_so_far

BATCH_BYTES = 1 << 20
ENOUGH_BYTES = 4_000_000
"""Below this much text, encoding takes less time than trying a faster engine."""
SAMPLE_CHARS = 250_000
SAMPLE_DOCUMENTS = 250
"""Text on which a faster engine is tried."""
FAR_OFF = 0.25
"""Warn if the held-out share differs from the requested one by more than rounding to documents explains."""


@dataclass(frozen=True)
class Counts:
    """The contents of a dataset, in bytes of UTF-8 text."""

    documents: int
    tokens: int
    bytes: int


@dataclass(frozen=True)
class Prepared(Counts):
    """The contents of OUT, and how it was made."""

    heldout: Counts | None
    """The contents of OUT.heldout."""
    skipped: dict[str, int]
    """Documents left out, by kind."""
    seconds: float
    mb_per_s: float
    """10^6 bytes of text per second, held-out text included."""
    workers: int


def prepare(
    inputs: Inputs,
    out: str | os.PathLike[str],
    tokenizer: BaseTokenizer | str | os.PathLike[str],
    *,
    eos: str | None = None,
    bos: str | None = None,
    text_key: str = "text",
    heldout: Fraction | None = None,
    skip_bad: bool = False,
    workers: int | None = None,
    progress: bool = True,
) -> Prepared:
    """Encode the documents of `inputs` (see spt_fast.data.text) into the dataset OUT.bin, OUT.idx and OUT.json.

    tokenizer   as `Tokenizer.load` returns or takes it
    eos, bos    tokens that end and begin each document; by default the tokenizer's own to end it, and none to begin it
    heldout     share of the text, in bytes, that goes to OUT.heldout instead: the documents whose text has the lowest
                hash, white space aside. The share is exact within one document and its copies. The folder of OUT then
                needs room for all tokens twice.
    skip_bad    leave out broken documents and empty files, and count them, instead of raising
    workers     processes; by default one for each core that this process may use
    progress    show a bar on standard error

    Raises DataError for inputs, tokenizers and options that can't be used, a bad document (with file and line), a
    split that leaves a side empty, a full disk, and a worker that dies. Then, and when interrupted, no files are left.
    """
    start_s = time.perf_counter()
    check_name(out, "out")
    workers = len(os.sched_getaffinity(0)) if workers is None else workers
    if workers < 1:
        raise DataError(invalid("workers", workers, "at least 1; leave it out for one per core"), argument=True)
    if heldout is not None and not 0 < heldout < 1:
        raise DataError(
            invalid("heldout", str(heldout), "write a share above 0 and below 1, such as 0.5%"), argument=True
        )
    loaded = _with_ends(tokenizer, eos, bos)
    reader = TextReader(inputs, text_key, skip_bad=skip_bad)
    settings = Settings(text_key, skip_bad, hashed=heldout is not None)
    skipped: Counter[str] = Counter()
    ends_inside = 0
    with ExitStack() as stack:
        _refuse_heldout(base_prefix(Path(out)))
        parts = ["whole"] if heldout is None else ["train", "heldout"]
        writers = [_writer(stack, out, loaded, part) for part in parts]
        obsolete = _older_split(writers[0].prefix) if heldout is None else None
        title, total = f"prepare {Path(out).name}", reader.total_bytes
        read_bytes = text_bytes = 0

        def says(read: int, elapsed_s: float) -> str:
            of_all = f"{size_so_far(read, total)} · " if total else ""
            return f"{of_all}{text_bytes / elapsed_s / 1e6:.1f} MB/s of text"

        advance = stack.enter_context(progress_of(title, total, says=says, show=progress))
        batches = workers if reader.total_bytes is None else -(-reader.total_bytes // BATCH_BYTES)
        pool = stack.enter_context(EncoderPool(loaded, settings, workers, starting=min(workers, batches)))
        whole = None if heldout is None else stack.enter_context(Split(writers[0].prefix.parent, writers[0].dtype))
        for batch, encoded in pool.encode(_proven(loaded, _batches(reader), text_key)):
            with writers[0].clean_failure():
                _write(writers[0], encoded) if whole is None else whole.add(encoded)
            skipped += encoded.skipped
            ends_inside += encoded.ends_inside
            text_bytes += encoded.num_bytes
            advance(batch.read_bytes - read_bytes)
            read_bytes = batch.read_bytes
        if whole is not None and heldout is not None:
            with writers[0].clean_failure():
                for sides in whole.parts(heldout):
                    for writer, side in zip(writers, sides, strict=True):
                        _write(writer, side)
        skipped += reader.skipped
        _refuse_empty(writers, heldout, skipped)
        commit(*writers, obsolete=obsolete)
    if heldout is not None:
        _say_share(writers[1].num_bytes, sum(writer.num_bytes for writer in writers), heldout)
    if ends_inside:
        warnings.warn(
            f"{out}: {counted(ends_inside, 'document', 'hold')} the token that ends documents in their text; a model "
            "sees an end there, while the dataset records the real ends",
            SptWarning,
            stacklevel=2,
        )
    seconds = time.perf_counter() - start_s
    train, *held_out = ((writer.num_documents, writer.num_tokens, writer.num_bytes) for writer in writers)
    return Prepared(
        *train,
        heldout=Counts(*held_out[0]) if held_out else None,
        skipped=dict(skipped),
        seconds=seconds,
        mb_per_s=sum(writer.num_bytes for writer in writers) / seconds / 1e6,
        workers=workers,
    )


def _with_ends(tokenizer: BaseTokenizer | str | os.PathLike[str], eos: str | None, bos: str | None) -> BaseTokenizer:
    """The tokenizer with the tokens that end and begin documents. DataError if none ends them; a warning if none begins
    them, although transformers begins texts with one."""
    if isinstance(tokenizer, BaseTokenizer):
        loaded = copy(tokenizer)
        loaded.set_ends(eos, bos)
    else:
        loaded = Tokenizer.load(tokenizer, eos=eos, bos=bos)
    if loaded.eos_id is None:
        raise DataError(
            "tokenizer: names no token that ends a text; name the token that ends each document with `eos=…`",
            argument=True,
        )
    usual = loaded.usual_bos_id if isinstance(loaded, HFTokenizer) and loaded.bos_id is None else None
    if isinstance(loaded, HFTokenizer) and usual is not None:
        warnings.warn(
            f"tokenizer: transformers begins every text with {loaded.name_of(usual)!r}, and these documents begin "
            "without it; give it as `bos` if the model was pretrained with it, which is likely",
            SptWarning,
            stacklevel=3,
        )
    if isinstance(loaded, HFTokenizer) and loaded.rows:
        for acts, id_ in (("ends", loaded.eos_id), ("begins", loaded.bos_id)):
            if id_ is not None and id_ >= loaded.rows:
                warnings.warn(
                    f"tokenizer: {loaded.name_of(id_)!r}, which {acts} every document, is id {id_:,}, but the model in "
                    f"its folder has rows for {loaded.rows:,} ids and cannot be trained on this text; name another "
                    f"token as `{'eos' if acts == 'ends' else 'bos'}`",
                    SptWarning,
                    stacklevel=3,
                )
    return loaded


def _writer(stack: ExitStack, out: str | os.PathLike[str], tokenizer: BaseTokenizer, part: str) -> DatasetWriter:
    """One side of the split while it is written; `stack` removes it unless it is committed."""
    writer = DatasetWriter(
        heldout_prefix(out) if part == "heldout" else out,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        bos_id=tokenizer.bos_id,
        tokenizer_digest=tokenizer.digest,
        part=part,
    )
    stack.callback(writer.abort)
    return writer


def _write(writer: DatasetWriter, encoded: Encoded) -> None:
    writer.write(encoded.tokens, encoded.document_lengths, encoded.num_bytes)


def heldout_prefix(out: str | os.PathLike[str]) -> Path:
    return Path(f"{base_prefix(Path(out))}.heldout")


def _refuse_heldout(prefix: Path) -> None:
    """DataError if `prefix` is the held-out part of another dataset."""
    if part_of(prefix) == "heldout":
        whole = prefix.with_suffix("")
        raise DataError(
            f"out: {prefix} is the held-out part of {whole}; choose another prefix, or prepare {whole} again",
            argument=True,
        )


def _older_split(prefix: Path) -> Path | None:
    """Remove the held-out part of the previous dataset at `prefix`: its documents are among the new ones."""
    beside = heldout_prefix(prefix)
    part = part_of(beside)
    if part == "unknown":
        raise DataError(
            f"out: {beside} may be the held-out part of an older {prefix}, and its text would be trained on now; "
            "delete it or move it away",
            argument=True,
        )
    if part == "heldout":
        warnings.warn(f"{beside}: removed; it was the held-out part of an older {prefix}", SptWarning, stacklevel=3)
        return beside
    return None


def _batches(reader: TextReader) -> Iterator[TextBatch]:
    """Join small chunks: a message to a worker costs the time of encoding some kilobytes."""
    chunks: list[Chunk] = []
    num_bytes = 0
    error = None
    try:
        for chunk in reader:
            chunks.append(chunk)
            num_bytes += len(chunk.data)
            if num_bytes >= BATCH_BYTES:
                yield TextBatch(chunks, reader.read_bytes)
                chunks, num_bytes = [], 0
    except DataError as caught:
        error = caught  # raised later, after any error in the documents before it
    if chunks:
        yield TextBatch(chunks, reader.read_bytes)
    if error is not None:
        raise error


def _say_share(held_bytes: int, all_bytes: int, share: Fraction) -> None:
    """Warn if documents are too few, or one of them too large, for the share."""
    if abs(Fraction(held_bytes, all_bytes) / share - 1) > FAR_OFF:
        warnings.warn(
            f"heldout: {held_bytes / all_bytes:.2%} of the text is held out instead of {float(share):.2%}: a document "
            "and its copies stay on one side; give more or shorter documents",
            SptWarning,
            stacklevel=3,
        )


def _proven(tokenizer: BaseTokenizer, batches: Iterator[TextBatch], text_key: str) -> Iterator[TextBatch]:
    """The batches. If there is a faster engine and enough text, it is tried on the first ones."""
    if not isinstance(tokenizer, HFTokenizer):
        return batches
    first: list[TextBatch] = []
    error = None
    try:
        while sum(batch.num_bytes for batch in first) < ENOUGH_BYTES:
            first.append(next(batches))
        chunks = [chunk for batch in first for chunk in batch.chunks]
        texts = [text for chunk in chunks for text, _ in parse(chunk, text_key, skip_bad=True)]
        sample = texts[:: len(texts) // SAMPLE_DOCUMENTS + 1]
        tokenizer.prove([text[: SAMPLE_CHARS // len(sample)] for text in sample])
    except StopIteration:
        pass
    except DataError as caught:
        error = caught  # raised later
    return chain(first, batches if error is None else _raising(error))


def _raising(error: DataError) -> Iterator[TextBatch]:
    raise error
    yield


def _refuse_empty(writers: list[DatasetWriter], share: Fraction | None, skipped: Counter[str]) -> None:
    documents = sum(writer.num_documents for writer in writers)
    if documents == 0:
        left_out = ", ".join(f"{count:,} {kind}" for kind, count in skipped.items())
        raise DataError(f"{writers[0].prefix}: no documents remain (left out: {left_out or 'none'}); check the input")
    for writer in writers:
        if writer.num_documents == 0:
            raise DataError(
                f"{writer.prefix}: would be empty: {counted(documents, 'document')} of one text cannot be split with "
                f"{share} held out; give more documents: a .jsonl file has one per line; a .txt file is one, so cut a "
                "long text into files (split --line-bytes=20K --additional-suffix=.txt) and give their folder"
            )
