from __future__ import annotations

import ctypes
import errno
import gc
import mmap
import os
import random
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from spt_fast import native
from spt_fast.data.loader import ADVISED_STEPS, Batch, Loader
from spt_fast.data.mixture import Mixture
from spt_fast.data.order import SampleOrder
from spt_fast.data.ring import Ring
from spt_fast.data.shards import DatasetWriter, TokenDataset
from spt_fast.data.shuffle import derive_key
from spt_fast.errors import DataError, RecipeError

CONTEXT = 16
VOCAB = 5000
WEIGHTS = {"chem": "0.2", "web": "0.8"}


def write(prefix: Path, num_tokens: int, seed: int, vocab_size: int = VOCAB) -> TokenDataset:
    rng = np.random.default_rng(seed)
    ends = np.unique(np.append(rng.integers(1, num_tokens, num_tokens // 9), num_tokens))
    with DatasetWriter(prefix, vocab_size=vocab_size, eos_id=0, tokenizer_digest="t") as writer:
        writer.write(rng.integers(0, VOCAB, num_tokens), np.diff(ends, prepend=0), num_bytes=0)
    return TokenDataset.open(prefix)


@pytest.fixture
def datasets(tmp_path: Path) -> dict[str, TokenDataset]:
    return {"chem": write(tmp_path / "chem", 167, 1), "web": write(tmp_path / "web", 16 * 60, 2)}


def order_of(datasets: dict[str, TokenDataset], sequences: int = 8, weights: dict | None = None) -> SampleOrder:
    mixture = Mixture(weights or WEIGHTS)
    rings = {name: Ring(datasets[name].num_tokens, CONTEXT, 0, name) for name in mixture.sources}
    return SampleOrder(mixture, rings, sequences, dict.fromkeys(mixture.sources, 0), 0, 0)


def read(datasets: dict[str, TokenDataset], **options: object) -> list[tuple[int, list[Batch]]]:
    plan = order_of(datasets)
    with Loader(plan, datasets, CONTEXT, **{"micro": 8, "vocab_size": VOCAB, "last_step": 40} | options) as loader:
        return list(loader)


def windows_by_hand(datasets: dict[str, TokenDataset], plan: SampleOrder, step: int) -> np.ndarray:
    """[sequences, T + 1], token by token."""
    source, start = plan.windows(step)
    rows = []
    for s, first in zip(source, start.tolist(), strict=True):
        ids = datasets[plan.mixture.sources[s]].tokens
        rows.append([int(ids[(first + t) % len(ids)]) for t in range(CONTEXT + 1)])
    return np.array(rows)


def test_batches_hold_what_a_reading_by_hand_finds(datasets: dict[str, TokenDataset]) -> None:
    plan = order_of(datasets)
    steps = read(datasets)
    assert [step for step, _ in steps] == list(range(40))
    wrapped = 0
    for step, (batch,) in steps:
        expected = windows_by_hand(datasets, plan, step)
        assert (batch.tokens.numpy() == expected[:, :-1]).all()
        assert (batch.targets.numpy() == expected[:, 1:]).all()
        assert (batch.tokens.dtype, batch.targets.dtype) == (torch.int64, torch.int64)
        assert batch.tokens.is_contiguous()
        assert batch.targets.is_contiguous()
        assert batch.cu_seqlens is None
        source, start = plan.windows(step)
        wrapped += (start + CONTEXT >= np.array([167, 960])[source]).sum()
    assert wrapped > 5


def test_many_files_read_as_the_one_that_they_are_cut_from(tmp_path: Path, datasets: dict[str, TokenDataset]) -> None:
    """Files shorter than a window too, and windows across the end of the last one."""
    web = datasets["web"]
    assert web.document_ends is not None
    for cuts in ([30], [1, 2, 3, 9, 40, 41], [10, 80, 90]):
        folder = tmp_path / str(cuts)
        documents = np.split(np.arange(len(web.document_ends)), cuts)
        for i, each in enumerate(documents):
            edges = [0, *web.document_ends.tolist()]
            ids = web.tokens[edges[each[0]] : edges[each[-1] + 1]]
            with DatasetWriter(folder / f"{i:03}", vocab_size=VOCAB, eos_id=0, tokenizer_digest="t") as writer:
                writer.write(ids, np.diff(edges)[each], num_bytes=0)
        many = datasets | {"web": TokenDataset.open(folder)}
        for options in ({"documents": True}, {"micro": 2, "rank": 1, "world": 2}):
            expected = [batch for _, batches in read(datasets, **options) for batch in batches]
            found = [batch for _, batches in read(many, **options) for batch in batches]
            assert len(found) == len(expected)
            for one, other in zip(found, expected, strict=True):
                assert torch.equal(one.tokens, other.tokens)
                assert torch.equal(one.targets, other.targets)
                assert (one.cu_seqlens is None) or torch.equal(one.cu_seqlens, other.cu_seqlens)
    with pytest.raises(DataError, match=r"source 'web': .*00\d\.bin, token .* is not in the vocabulary of 9"):
        read({"chem": write(tmp_path / "low", 167, 1), "web": many["web"]}, vocab_size=9)
    os.truncate(folder / "003.bin", 8)
    with pytest.raises(DataError, match=r"source 'web': .*003\.bin has 8 bytes and its"):
        read(many)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"])
def test_ids_of_every_width_and_files_with_a_header(tmp_path: Path, dtype: str) -> None:
    limit = np.iinfo(dtype).max
    ids = np.random.default_rng(0).integers(0, min(limit, 200_000), 500, endpoint=True).astype(dtype)
    np.save(tmp_path / "ids.npy", ids)
    dataset = replace(
        TokenDataset.open(tmp_path / "ids.npy") if dtype != "uint64" else write(tmp_path / "any", 100, 0),
        path=tmp_path / "ids.npy",
        offset_bytes=os.path.getsize(tmp_path / "ids.npy") - ids.nbytes,
        tokens=ids,
    )
    plan = order_of({"a": dataset}, weights={"a": 1})
    with Loader(plan, {"a": dataset}, CONTEXT, micro=8, vocab_size=200_001, last_step=9) as loader:
        for step, (batch,) in loader:
            assert (batch.tokens.numpy() == windows_by_hand({"a": dataset}, plan, step)[:, :-1]).all()


def test_the_order_is_the_same_for_any_world_size_and_micro_batch(datasets: dict[str, TokenDataset]) -> None:
    whole = [batch.tokens for _, (batch,) in read(datasets)]
    for world in (1, 2, 4):
        for micro in (1, 2, 8 // world):
            ranks = [read(datasets, rank=rank, world=world, micro=micro) for rank in range(world)]
            for step in range(40):
                micro_batches = [rank[step][1] for rank in ranks]
                assert {len(batches) for batches in micro_batches} == {8 // (world * micro)}
                in_order = [batch.tokens for at_once in zip(*micro_batches, strict=True) for batch in at_once]
                assert torch.equal(torch.cat(in_order), whole[step])


def test_resuming_at_any_step_gives_the_undisturbed_order(datasets: dict[str, TokenDataset]) -> None:
    whole = read(datasets)
    for first in (0, 1, 7, 39, 40):
        resumed = read(datasets, first_step=first)
        assert [step for step, _ in resumed] == list(range(first, 40))
        for (_, (batch,)), (_, (expected,)) in zip(resumed, whole[first:], strict=True):
            assert torch.equal(batch.tokens, expected.tokens)
            assert torch.equal(batch.targets, expected.targets)


def test_documents_start_where_the_index_says(datasets: dict[str, TokenDataset]) -> None:
    plan = order_of(datasets)
    at_wrap = 0
    for step, batches in read(datasets, documents=True, micro=4):
        source, start = plan.windows(step)
        for m, batch in enumerate(batches):
            starts = []
            for row in range(4):
                data = datasets[plan.mixture.sources[source[4 * m + row]]]
                ends = set(data.document_ends.tolist())
                first = int(start[4 * m + row])
                for t in range(CONTEXT):
                    place = (first + t) % data.num_tokens
                    at_wrap += place == 0 and t > 0
                    if t == 0 or place == 0 or place in ends:
                        starts.append(row * CONTEXT + t)
            assert batch.cu_seqlens.dtype == torch.int32
            assert batch.cu_seqlens.tolist() == [*starts, 4 * CONTEXT]
    assert at_wrap > 5


def test_a_limited_dataset_is_a_ring_of_its_own(datasets: dict[str, TokenDataset]) -> None:
    limited = datasets | {"web": datasets["web"].limit(100)}
    plan = order_of(limited)
    for step, (batch,) in read(limited, documents=True):
        assert (batch.tokens.numpy() == windows_by_hand(limited, plan, step)[:, :-1]).all()
    assert limited["web"].num_tokens <= 100


def test_documents_need_document_ends(datasets: dict[str, TokenDataset]) -> None:
    datasets["web"] = replace(datasets["web"], document_ends=None)
    with pytest.raises(DataError, match=r"'web': .*web\.bin records no document ends"):
        read(datasets, documents=True)
    assert len(read(datasets, last_step=3)) == 3


def test_sequences_that_do_not_divide(datasets: dict[str, TokenDataset]) -> None:
    with pytest.raises(RecipeError, match=r"8 does not divide into 3 processes of micro-batches of 2.*multiple of 6"):
        read(datasets, world=3, micro=2)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("new_tokens", [100, 0, 961])
def test_a_file_that_changes_its_size_while_read_is_an_error_not_a_signal(
    datasets: dict[str, TokenDataset], new_tokens: int
) -> None:
    with Loader(order_of(datasets), datasets, CONTEXT, micro=8, vocab_size=VOCAB, last_step=1000) as loader:
        batches = iter(loader)
        next(batches)
        os.truncate(datasets["web"].path, 2 * new_tokens)
        changed = rf"'web': .*web\.bin changed from 1,920 to {2 * new_tokens:,} bytes"
        overtaken = r"'web': .*web\.bin, token \d+: the file ends before it"
        with pytest.raises(DataError, match=f"{changed}|{overtaken}"):
            list(batches)


def test_a_file_cut_short_between_check_and_read_is_an_error_too(datasets: dict[str, TokenDataset]) -> None:
    """The check of the size can be overtaken; the read itself can't."""
    with datasets["web"].path.open("rb") as file:
        os.truncate(datasets["web"].path, 2 * 100)
        table, batch = np.array([[file.fileno(), 0, 960, 2]]), torch.empty(2, 3, CONTEXT, dtype=torch.int64)
        failure = native.gather(table, np.zeros(3, np.int32), np.array([0, 90, 500]), VOCAB, batch)
    assert failure == (native.CUT_SHORT, 1, 100, 0)


def test_a_read_that_fails_is_an_error(datasets: dict[str, TokenDataset]) -> None:
    table, batch = np.array([[-1, 0, 960, 2]]), torch.empty(2, 1, CONTEXT, dtype=torch.int64)
    failure = native.gather(table, np.zeros(1, np.int32), np.array([3]), VOCAB, batch)
    assert failure == (native.READ_ERROR, 0, 3, 9)  # EBADF


def test_a_file_cut_short_before_the_loader_opens_it(datasets: dict[str, TokenDataset]) -> None:
    os.truncate(datasets["web"].path, 2 * 959)
    with pytest.raises(DataError, match=r"'web': .*web\.bin has 1,918 bytes and its 960 tokens need 1,920"):
        read(datasets)
    datasets["web"].path.unlink()
    with pytest.raises(DataError, match=r"'web': .*web\.bin cannot be opened: No such file"):
        read(datasets)


def test_a_dataset_prepared_anew_under_an_open_one_is_refused(
    tmp_path: Path, datasets: dict[str, TokenDataset]
) -> None:
    """The next phase of a run opens the files anew. A longer text that begins as the old one holds what was opened."""
    web = datasets["web"]
    ids, ends = np.array(web.tokens), np.array(web.document_ends)
    for before, after, is_refused in ((0, 5, False), (5, 0, True)):
        with DatasetWriter(tmp_path / "web", vocab_size=VOCAB, eos_id=0, tokenizer_digest="t") as writer:
            more = (np.zeros(count, np.int64) for count in (before, after))
            lengths = [*[1] * before, *np.diff(ends, prepend=0), *[1] * after]
            writer.write(np.concatenate([next(more), ids, next(more)]), np.array(lengths), num_bytes=0)
        if is_refused:
            with pytest.raises(
                DataError, match=r"'web': .*web\.bin was replaced by other text since .* opened it; put"
            ):
                read(datasets)
        else:
            assert (
                read(datasets)[0][1][0].tokens.numpy() == windows_by_hand(datasets, order_of(datasets), 0)[:, :-1]
            ).all()


def test_a_file_written_since_it_was_opened_is_compared_with_what_was_opened(
    datasets: dict[str, TokenDataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that wasn't is not: the phases of a run open many files again."""

    def fail(*_: int) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    os.utime(datasets["web"].path, ns=(0, 0))
    assert read(datasets)
    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(
        DataError, match=r"^source 'web': .*web\.bin cannot be read: Input/output error; check the disk$"
    ):
        read(datasets)
    os.utime(datasets["web"].path, ns=(0, datasets["web"].stamp[2]))
    assert read(datasets)


def test_what_does_not_fit_together_is_refused(datasets: dict[str, TokenDataset]) -> None:
    plan = order_of(datasets)
    given = {"micro": 8, "vocab_size": VOCAB, "last_step": 1}
    with pytest.raises(DataError, match="source 'chem' of the mixture has no dataset, or no ring"):
        Loader(plan, {"web": datasets["web"]}, CONTEXT, **given)
    with pytest.raises(DataError, match=f"source 'chem': its ring is of 167 tokens in windows of {CONTEXT}, and the"):
        Loader(plan, datasets, CONTEXT + 1, **given)
    for wrong in ({"micro": 0}, {"rank": 2, "world": 2, "micro": 4}, {"rank": -1}, {"world": 0}):
        with pytest.raises(RecipeError, match="is invalid: ranks count from 0, micro from 1"):
            Loader(plan, datasets, CONTEXT, **given | wrong)


def test_a_file_whose_mapped_pages_are_gone_is_refused(datasets: dict[str, TokenDataset]) -> None:
    """A read of them would end in SIGBUS, as on NFS where another host replaced the file."""
    path = datasets["web"].path
    other = path.with_suffix(".other")
    shutil.copy(path, other)
    os.truncate(path, 0)
    other.replace(path)
    with pytest.raises(DataError, match="was replaced by other text"):
        read(datasets)


@pytest.mark.timeout(30)
def test_an_id_beyond_the_vocabulary(datasets: dict[str, TokenDataset], tmp_path: Path) -> None:
    ids = datasets["web"].tokens.copy()
    ids[777] = VOCAB
    ids.tofile(tmp_path / "foreign.bin")
    datasets["web"] = TokenDataset.open(tmp_path / "foreign.bin", dtype="uint16")
    with pytest.raises(
        DataError, match=r"'web': .*foreign\.bin, token 777: id 5,000 is not in the vocabulary of 5,000"
    ):
        read(datasets)
    assert len(read(datasets, vocab_size=VOCAB + 1)) == 40
    negative = ids.astype(np.int16)
    negative[777] = -1
    negative.tofile(tmp_path / "foreign.bin")
    datasets["web"] = replace(TokenDataset.open(tmp_path / "foreign.bin", dtype="uint16"), tokens=negative)
    with pytest.raises(DataError, match="token 777: id -1 is not in the vocabulary"):
        read(datasets)


def test_an_id_beyond_the_vocabulary_that_is_a_target_only(tmp_path: Path) -> None:
    ids = np.arange(100, dtype=np.uint16)
    ids.tofile(tmp_path / "ids.bin")
    with (tmp_path / "ids.bin").open("rb") as file:
        table, batch = np.array([[file.fileno(), 0, 100, 2]]), torch.empty(2, 1, CONTEXT, dtype=torch.int64)
        for vocab_size, outcome in ((31, 0), (30, native.ID_TOO_LARGE)):
            failure = native.gather(table, np.zeros(1, np.int32), np.array([30 - CONTEXT]), vocab_size, batch)
            assert failure.outcome == outcome
    assert (failure.token, failure.detail) == (30, 30)


def test_ids_of_another_byte_order(datasets: dict[str, TokenDataset]) -> None:
    datasets["web"] = replace(datasets["web"], tokens=datasets["web"].tokens.astype(">u2"))
    with pytest.raises(DataError, match=r"web\.bin holds >u2; ids must be native integers"):
        read(datasets)


@pytest.mark.timeout(30)
def test_an_error_on_the_reading_thread_reaches_the_consumer(
    datasets: dict[str, TokenDataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    windows = SampleOrder.windows

    def fail_at_20(plan: SampleOrder, step: int) -> tuple[np.ndarray, np.ndarray]:
        if step == 20:
            raise OSError("the cable is out")
        return windows(plan, step)

    monkeypatch.setattr(SampleOrder, "windows", fail_at_20)
    with Loader(order_of(datasets), datasets, CONTEXT, micro=8, vocab_size=VOCAB, last_step=40) as loader:
        batches = iter(loader)
        for _ in range(20 - ADVISED_STEPS):
            next(batches)
        with pytest.raises(OSError, match="the cable is out"):
            next(batches)


@pytest.mark.timeout(30)
def test_closing_in_the_middle_stops_the_thread_and_closes_the_files(datasets: dict[str, TokenDataset]) -> None:
    gc.collect()  # files of tests before, that would be closed meanwhile
    threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        loader = Loader(order_of(datasets), datasets, CONTEXT, micro=8, vocab_size=VOCAB, last_step=10**9)
        next(iter(loader))
        assert threading.active_count() == threads + 1
        loader.close()
        loader.close()
    assert threading.active_count() == threads
    assert len(os.listdir("/proc/self/fd")) == files


def test_no_random_generator_is_drawn_on(datasets: dict[str, TokenDataset]) -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    read(datasets)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (np.random.get_state()[1].tolist(), random.getstate())  # noqa: NPY002


def test_compiled_calls_release_the_gil() -> None:
    index = np.arange(8_000_000)
    done = threading.Event()

    def work() -> None:
        try:
            native.permute(index, len(index), derive_key(0), False)
        finally:
            done.set()

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        worker = threading.Thread(target=work)
        worker.start()
        ticks = 0
        while not done.is_set():
            ticks += 1
            time.sleep(0.001)
        worker.join()
    finally:
        torch.set_num_threads(threads)
    assert ticks >= 10


def test_many_threads_gather_what_one_gathers(tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(0, VOCAB, 1 << 20).astype(np.uint16)
    starts = np.random.default_rng(1).integers(0, len(ids), 600)
    ids[[starts[0] + 5, starts[-1] + 5]] = VOCAB  # in the first row of the first thread, and the last of the last
    ids.tofile(tmp_path / "ids.bin")
    with (tmp_path / "ids.bin").open("rb") as file:
        table = np.array([[file.fileno(), 0, len(ids), 2]])
        batch = torch.empty(2, 600, 1024, dtype=torch.int64)
        assert native.gather(table, np.zeros(600, np.int32), starts, VOCAB + 1, batch).outcome == 0
        expected = ids[(starts[:, None] + np.arange(1025)) % len(ids)]
        assert (batch[0].numpy() == expected[:, :-1]).all()
        assert (batch[1].numpy() == expected[:, 1:]).all()
        failure = native.gather(table, np.zeros(600, np.int32), starts, VOCAB, batch)
    assert failure == (native.ID_TOO_LARGE, 0, starts[0] + 5, VOCAB)


def test_without_the_extension_the_message_says_how_to_build_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(native, "_LIBRARY", tmp_path / "_C.abi3.so")
    native.ops.cache_clear()
    try:
        with pytest.raises(ImportError, match=r"is not built; run `pip install --no-build-isolation --no-deps -e .`"):
            native.chairman_table([1, 1, 1, 1, 1])
    finally:
        native.ops.cache_clear()


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="this system doesn't say what is in memory")
def test_windows_are_asked_for_where_some_of_them_are_not_in_memory(tmp_path: Path) -> None:
    """That the first of many is there must not count for all."""
    path, tokens, rows = tmp_path / "web.bin", 4 << 20, 64
    np.zeros(tokens, dtype=np.uint16).tofile(path)
    pages = np.memmap(path, dtype=np.uint8, mode="r")
    starts = np.linspace(0, tokens - 300, rows).astype(np.int64)

    def in_memory() -> np.ndarray:
        """Of each window, whether its page is."""
        held = np.zeros(-(-len(pages) // mmap.PAGESIZE), dtype=np.uint8)
        address = ctypes.c_void_p(pages.ctypes.data)
        assert ctypes.CDLL(None).mincore(address, ctypes.c_size_t(len(pages)), ctypes.c_void_p(held.ctypes.data)) == 0
        return (held[2 * starts // mmap.PAGESIZE] & 1).astype(bool)

    with path.open("r+b") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        os.pread(file.fileno(), 600, 0)
        if in_memory().sum() > 1:
            pytest.skip("the system kept the file in memory")
        table = np.array([[file.fileno(), 0, tokens, 2]])
        native.advise(table, np.zeros(rows, np.int32), starts, 256)
        ends = time.monotonic() + 100
        while not in_memory().all():
            assert time.monotonic() < ends
            time.sleep(0.01)
