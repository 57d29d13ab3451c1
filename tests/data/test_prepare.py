from __future__ import annotations

import gzip
import io
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from spt_fast.data import prepare as module
from spt_fast.data import split, workers
from spt_fast.data.dataset_files import sha256_of
from spt_fast.data.prepare import prepare
from spt_fast.data.shards import TokenDataset
from spt_fast.data.text import Chunk, iter_documents
from spt_fast.data.tokenizer import EOS, PATTERN, Tokenizer, train_tokenizer
from spt_fast.data.workers import AHEAD_BYTES, EncoderPool, Settings, TextBatch
from spt_fast.errors import DataError, MissingKey, SptWarning


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Bytes and a few pairs."""
    tokens = [bytes([byte]) for byte in range(256)] + [b"th", b"the", b" the", b"in", b"an", b"er", "日".encode()[:2]]
    return Tokenizer({token: rank for rank, token in enumerate(tokens)}, PATTERN, {EOS: len(tokens)})


def large_tokenizer() -> Tokenizer:
    """Bytes and all pairs of bytes, (0, b) with the ids 65,536 + b."""
    tokens = [bytes([a]) for a in range(256)] + [bytes([a, b]) for a in range(255, -1, -1) for b in range(256)]
    return Tokenizer({token: rank for rank, token in enumerate(tokens)}, PATTERN, {EOS: len(tokens)})


def documents(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    words = ["the", "other", "in", "antler", "日本", "naïve", "\n\n", "😀", "12.5", EOS, '"']
    return [f"{i} " + " ".join(rng.choices(words, k=rng.randrange(1, 40))) for i in range(count)]


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def read(prefix: Path | str) -> list[list[int]]:
    """Ids of each document."""
    dataset = TokenDataset.open(prefix)
    dataset.verify()
    assert dataset.document_ends is not None
    return [part.tolist() for part in np.split(np.asarray(dataset.tokens), dataset.document_ends[:-1])]


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    return [[*tokenizer.encode(text), tokenizer.eos_id] for text in texts]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_dataset_is_the_documents_in_order(tmp_path: Path, tokenizer: Tokenizer) -> None:
    texts = documents(300)
    (tmp_path / "in").mkdir()
    write_jsonl(tmp_path / "in" / "a.jsonl", texts[:100])
    (tmp_path / "in" / "b.jsonl.gz").write_bytes(
        gzip.compress(write_jsonl(tmp_path / "x", texts[100:299]).read_bytes())
    )
    (tmp_path / "in" / "c.txt").write_text(texts[299])
    summary = prepare(tmp_path / "in", tmp_path / "out" / "d", tokenizer, progress=False, workers=2)
    assert read(tmp_path / "out" / "d") == encode(tokenizer, texts)
    dataset = TokenDataset.open(tmp_path / "out" / "d")
    num_bytes = sum(len(text.encode()) for text in texts)
    assert (dataset.num_documents, dataset.num_bytes, dataset.eos_id) == (300, num_bytes, tokenizer.eos_id)
    assert (dataset.vocab_size, dataset.tokenizer_digest) == (tokenizer.vocab_size, tokenizer.digest)
    assert dataset.tokens.dtype == np.uint16
    assert vars(summary) | {"seconds": 1, "mb_per_s": 1} == {
        "documents": 300,
        "tokens": dataset.num_tokens,
        "bytes": num_bytes,
        "heldout": None,
        "skipped": {},
        "seconds": 1,
        "mb_per_s": 1,
        "workers": 2,
    }
    assert summary.mb_per_s == pytest.approx(num_bytes / summary.seconds / 1e6)
    assert names(tmp_path / "out") == ["d.bin", "d.idx", "d.json"]


def test_workers_and_batches_change_nothing(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    for seed in range(5):
        write_jsonl(tmp_path / "in" / f"{seed}.jsonl", documents(200, seed))
    contents = []
    for count, batch_bytes, ahead_bytes in ((1, 1 << 20, 1 << 20), (2, 5000, 1), (3, 100, 20_000), (5, 5000, 1 << 20)):
        monkeypatch.setattr("spt_fast.data.text._BLOCK_BYTES", 4096)
        monkeypatch.setattr(module, "BATCH_BYTES", batch_bytes)
        monkeypatch.setattr(workers, "AHEAD_BYTES", ahead_bytes)
        out = tmp_path / f"out{count}"
        prepare(tmp_path / "in", out / "d", tokenizer, heldout=Fraction(1, 10), workers=count, progress=False)
        contents.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert len(contents[0]) == 6
    assert all(content == contents[0] for content in contents)


def test_held_out_documents(tmp_path: Path, tokenizer: Tokenizer) -> None:
    texts = documents(4000)
    copies = [text.replace(" ", "\n  ") for text in texts[::2]] + texts[::3]
    write_jsonl(tmp_path / "a.jsonl", texts + copies)
    share = Fraction(1, 8)
    summary = prepare(tmp_path / "a.jsonl", tmp_path / "d", tokenizer, heldout=share, progress=False)
    train, held_out = read(tmp_path / "d"), read(f"{tmp_path / 'd'}.heldout")
    everything = encode(tokenizer, texts + copies)
    sides = {tuple(ids): "train" for ids in train} | {tuple(ids): "heldout" for ids in held_out}
    assert [ids for ids in everything if sides[tuple(ids)] == "train"] == train
    assert [ids for ids in everything if sides[tuple(ids)] == "heldout"] == held_out

    def bare(ids: list[int]) -> str:
        return "".join(tokenizer.decode(ids[:-1]).split())

    assert not {bare(ids) for ids in train} & {bare(ids) for ids in held_out}
    total, longest = summary.bytes + summary.heldout.bytes, max(map(len, texts)) * 4
    assert abs(summary.heldout.bytes - share * total) <= longest * 3  # a document and its copies
    assert summary.heldout.documents == len(held_out)
    assert summary.heldout.tokens == sum(map(len, held_out))
    assert summary.tokens == sum(map(len, train))
    both = [TokenDataset.open(prefix).num_bytes for prefix in (tmp_path / "d", f"{tmp_path / 'd'}.heldout")]
    assert both == [summary.bytes, summary.heldout.bytes]
    assert sum(both) == sum(len(text.encode()) for text in texts + copies)


def test_a_share_is_of_the_bytes_within_one_document_and_a_larger_one_holds_out_more_of_the_same(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where documents are few, and some of them hold most of the text; and read in many small pieces."""
    monkeypatch.setattr(split, "DOCUMENTS_AT_A_TIME", 7)
    monkeypatch.setattr(split, "TOKENS_AT_A_TIME", 300)
    rng = random.Random(5)
    for count, most in ((3, 30), (60, 50), (400, 3000)):
        texts = [f"{i} " + "x" * rng.choice([1, 5, most]) for i in range(count)]
        total, longest = sum(map(len, texts)), max(map(len, texts))
        write_jsonl(tmp_path / "a.jsonl", texts)
        smaller: set[tuple[int, ...]] = set()
        for share in (Fraction(1, 10**6), Fraction(1, 100), Fraction(1, 20), Fraction(1, 3), Fraction(99, 100)):
            summary = prepare(tmp_path / "a.jsonl", tmp_path / "d", tokenizer, heldout=share, progress=False)
            assert summary.heldout is not None
            assert summary.documents + summary.heldout.documents == count
            assert summary.bytes + summary.heldout.bytes == total
            assert min(summary.documents, summary.heldout.documents) >= 1
            assert abs(summary.heldout.bytes - share * total) <= longest
            held_out = {tuple(ids) for ids in read(tmp_path / "d.heldout")}
            assert smaller <= held_out
            smaller = held_out


def test_a_share_that_documents_do_not_allow_is_reported(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for texts, share, expected in (
        (
            ["a" * 90_000, *documents(3)],
            Fraction(1, 20),
            r"0\.\d\d% of the text is held out instead of 5\.00%: a document",
        ),
        (["a" * 9_000, "b" * 1_000], Fraction(1, 2), r"10\.00% of the text is held out instead of 50\.00%"),
    ):
        write_jsonl(tmp_path / "a.jsonl", texts)
        with pytest.warns(SptWarning, match=f"heldout: {expected}"):
            prepare(tmp_path / "a.jsonl", tmp_path / "d", tokenizer, heldout=share, progress=False)
    write_jsonl(tmp_path / "a.jsonl", documents(400))
    with warnings.catch_warnings(action="error"):
        prepare(tmp_path / "a.jsonl", tmp_path / "d", tokenizer, heldout=Fraction(1, 20), progress=False)


def test_ids_beyond_65535_get_uint32(tmp_path: Path) -> None:
    tokenizer = large_tokenizer()
    texts = ["日本語 日本語", "\x00\x02 plain"]
    prepare(write_jsonl(tmp_path / "a.jsonl", texts), tmp_path / "d", tokenizer, workers=1, progress=False)
    dataset = TokenDataset.open(tmp_path / "d")
    assert dataset.tokens.dtype == np.uint32
    assert dataset.max_id == tokenizer.eos_id == 65_792
    assert read(tmp_path / "d") == encode(tokenizer, texts)
    assert max(encode(tokenizer, texts)[1][:-1]) == 65_538


def test_bad_documents_stop_it_or_are_counted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    texts = documents(50)
    lines = [json.dumps({"text": text}).encode() for text in texts]
    bad = [b"{", b'{"txt": "a"}', b'{"text": 1}', b'{"text": "\xff"}', b'{"text": ""}', b"{"]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines[:20] + bad + lines[20:]))
    (tmp_path / "b.txt").write_text("")
    inputs = [tmp_path / "a.jsonl", tmp_path / "b.txt"]
    with pytest.raises(DataError, match=r"a\.jsonl:21: broken JSON"):
        prepare(inputs, tmp_path / "d", tokenizer, progress=False)
    assert names(tmp_path) == ["a.jsonl", "b.txt"]
    summary = prepare(inputs, tmp_path / "d", tokenizer, skip_bad=True, progress=False)
    assert read(tmp_path / "d") == encode(tokenizer, texts)
    assert summary.skipped == {
        "broken JSON": 2,
        "missing key": 1,
        "not a string": 1,
        "not UTF-8": 1,
        "empty": 1,
        "empty file": 1,
    }


def test_the_first_bad_document_is_reported_whoever_finds_it(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BATCH_BYTES", 1)
    for name, line in (("a", '{"text": "a b c"}\n' * 2000 + "{"), ("b", "{"), ("c", "")):
        (tmp_path / f"{name}.jsonl").write_text(line)
    for _ in range(3):
        with pytest.raises(DataError, match=r"a\.jsonl:2001"):
            prepare(tmp_path, tmp_path / "d", tokenizer, workers=3, progress=False)


def test_what_prepare_refuses(tmp_path: Path, tokenizer: Tokenizer) -> None:
    few = write_jsonl(tmp_path / "few.jsonl", documents(5))
    blank = write_jsonl(tmp_path / "blank.jsonl", ["", ""])
    empty = write_jsonl(tmp_path / "empty.jsonl", [])
    one_text = write_jsonl(tmp_path / "one_text.jsonl", ["a b", "a  b"])
    single = write_jsonl(tmp_path / "single.jsonl", ["a b"])
    for inputs, options, message in (
        (single, {"heldout": Fraction(1, 9)}, r"d: would be empty: 1 document of one text cannot be split with 1/9"),
        (one_text, {"heldout": Fraction(1, 9)}, r"d: would be empty: 2 documents of one text cannot be split with 1/9"),
        (few, {"heldout": Fraction(1)}, "heldout: '1' is invalid: write a share above 0 and below 1"),
        (few, {"workers": 0}, "workers: 0 is invalid: at least 1"),
        (blank, {}, r"d: no documents remain \(left out: 2 empty\)"),
        (empty, {}, "empty.jsonl holds no document"),
        (tmp_path / "none.jsonl", {}, "none.jsonl doesn't exist"),
        ("", {}, r"inputs: '' is invalid: name files or folders; \. is"),
        ([few, ""], {}, r"inputs: '' is invalid"),
    ):
        with pytest.raises(DataError, match=message):
            prepare(inputs, tmp_path / "d", tokenizer, progress=False, **options)
    with pytest.raises(MissingKey, match=r"few.jsonl:1: no text under 'body' .*text_key="):
        prepare(few, tmp_path / "d", tokenizer, text_key="body", progress=False)
    with pytest.raises(
        DataError, match="give a file of ranks, the path of a Hugging Face folder, or a tiktoken encoding"
    ):
        prepare(few, tmp_path / "d", "nothing", progress=False)
    assert names(tmp_path) == ["blank.jsonl", "empty.jsonl", "few.jsonl", "one_text.jsonl", "single.jsonl"]
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "recipe.yaml").touch()
    for place in ("run/d", "run/checkpoints/d"):
        with pytest.raises(DataError, match=r"out: .* is inside the run .*/run; choose another place"):
            prepare(few, tmp_path / place, tokenizer, progress=False)


def test_a_failing_run_leaves_the_old_dataset(tmp_path: Path, tokenizer: Tokenizer) -> None:
    good = write_jsonl(tmp_path / "good.jsonl", documents(200))
    prepare(good, tmp_path / "out" / "d", tokenizer, heldout=Fraction(1, 5), progress=False)
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    bad = tmp_path / "bad.jsonl"
    bad.write_text(good.read_text().replace("the", "a") + "{")
    with pytest.raises(DataError, match=r"bad\.jsonl:201"):
        prepare(bad, tmp_path / "out" / "d", tokenizer, heldout=Fraction(1, 5), progress=False)
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize(
    ("code", "how"), [("import os; os.kill(os.getpid(), 9)", "was killed by signal 9"), ("exit(3)", "exit code 3")]
)
def test_a_worker_that_dies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, how: str) -> None:
    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    monkeypatch.setattr(workers, "_start_worker", start)
    write_jsonl(tmp_path / "a.jsonl", documents(20))
    with pytest.raises(DataError, match=rf"a worker process .*{how} while encoding .*a\.jsonl from line 1 on"):
        prepare(tmp_path / "a.jsonl", tmp_path / "d", large_tokenizer(), progress=False)
    assert names(tmp_path) == ["a.jsonl"]


def test_a_full_disk(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_jsonl(tmp_path / "a.jsonl", documents(5000))
    tokenizer.save(tmp_path / "t.tiktoken")
    code = """if True:
        import resource
        from spt_fast.data.prepare import prepare
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        prepare("a.jsonl", "d", "t.tiktoken", progress=False)
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert "DataError: d.bin could not be written (File too large)" in done.stderr
    assert names(tmp_path) == ["a.jsonl", "t.tiktoken"]


def children(pid: int) -> list[int]:
    listed = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    return [int(child) for child in " ".join(listed).split()]


@pytest.mark.skipif(not Path(f"/proc/self/task/{os.getpid()}/children").exists(), reason="finds workers in /proc")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interruption_leaves_nothing_and_nobody(tmp_path: Path, tokenizer: Tokenizer, how: signal.Signals) -> None:
    tokenizer.save(tmp_path / "t.tiktoken")
    # Where pytest itself runs in the background, SIGINT would come to the process ignored.
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from spt_fast.data.prepare import prepare; prepare('-', 'd', 't.tiktoken', workers=2)"
    )
    lines = "".join(json.dumps({"text": text}) + "\n" for text in documents(20_000)).encode()
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, stdin=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stderr is not None
    process.stdin.write(lines)
    process.stdin.flush()  # and leave it open: more may come
    _until(lambda: len(children(process.pid)) > 0 and (tmp_path / ".d.bin.spt-fast.tmp").exists())
    found = children(process.pid)
    time.sleep(0.3)
    process.send_signal(how)
    process.wait(timeout=300)
    _until(lambda: not any(Path(f"/proc/{pid}/cmdline").exists() and _runs(pid) for pid in found))
    if how == signal.SIGINT:
        assert b"KeyboardInterrupt" in process.stderr.read()
        assert names(tmp_path) == ["t.tiktoken"]
    process.stdin.close()
    process.stderr.close()


def _runs(pid: int) -> bool:
    try:
        return "spt_fast" in Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return False


def _until(condition: object, seconds: float = 300.0) -> None:
    assert callable(condition)
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def test_reading_ahead_is_bounded(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "AHEAD_BYTES", 10_000)
    taken_bytes = 0

    def batches() -> Iterator[TextBatch]:
        nonlocal taken_bytes
        for _ in range(200):
            data = b"a few words. " * 77
            taken_bytes += len(data)
            yield TextBatch([Chunk("a.txt", "line", 1, data, [len(data)])], 0)

    with EncoderPool(tokenizer, Settings("text", skip_bad=False, hashed=False), 2) as pool:
        encoded = pool.encode(batches())
        for taken in range(1, 4):
            next(encoded)
            _until(lambda: taken_bytes > 18_000)
            time.sleep(0.2)
            # what may be under way, one batch that waits for room, and those that were taken out before
            assert taken_bytes <= 20_000 + 1001 * taken
        assert sum(1 for _ in encoded) == 197
    assert taken_bytes == 200 * 1001
    assert AHEAD_BYTES <= 16 << 20


def test_leaving_early_ends_workers_and_threads(tokenizer: Tokenizer) -> None:
    data = b"a few words. " * 50_000
    batch = TextBatch([Chunk("a.txt", "line", 1, data, [len(data)])], 0)
    before = threading.active_count()
    with EncoderPool(tokenizer, Settings("text", skip_bad=False, hashed=False), 2, starting=2) as pool:
        ahead = [*pool._processes]
        for _ in pool.encode(batch for _ in range(10**9)):
            break
    assert len(ahead) == 2
    assert pool._processes == ahead, "those that were started before there was text are the workers"
    assert all(process.returncode is not None for process in pool._processes)
    _until(lambda: threading.active_count() == before)


def test_workers_are_light() -> None:
    code = (
        "import spt_fast.data.workers, sys; sys.exit(any(name in sys.modules for name in ('torch', 'pyarrow', 'rich')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_progress(tmp_path: Path, tokenizer: Tokenizer, capfd: pytest.CaptureFixture[str]) -> None:
    write_jsonl(tmp_path / "a.jsonl", documents(500))
    prepare(tmp_path / "a.jsonl", tmp_path / "d", tokenizer, workers=1, progress=False)
    assert capfd.readouterr() == ("", "")
    prepare(tmp_path / "a.jsonl", tmp_path / "d", tokenizer, workers=1)
    shown = capfd.readouterr()
    size = (tmp_path / "a.jsonl").stat().st_size / 1000
    assert shown.out == ""
    assert "prepare d" in shown.err
    assert f"{size:.1f}/{size:.1f} kB" in shown.err
    assert "MB/s of text" in shown.err


def test_a_tokenizer_and_input_by_path(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer.save(tmp_path / "t.tiktoken")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in documents(10))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    monkeypatch.chdir(tmp_path)
    prepare("-", "d", "t.tiktoken", workers=1, progress=False)
    assert read("d") == encode(tokenizer, documents(10))
    assert list(iter_documents(write_jsonl(tmp_path / "a.jsonl", documents(10)))) == documents(10)


def test_a_tokenizer_that_datasets_beside_it_need_is_not_replaced(tmp_path: Path) -> None:
    text, file = write_jsonl(tmp_path / "a.jsonl", documents(50)), tmp_path / "t.tiktoken"
    train_tokenizer(text, 270, file)
    train_tokenizer(text, 271, file)  # nothing is of it yet
    prepare(text, tmp_path / "d", file, progress=False)
    train_tokenizer(text, 271, file)  # the same again
    with pytest.raises(
        DataError, match=r"out: .*t\.tiktoken is the tokenizer of the dataset d beside it, which another"
    ):
        train_tokenizer(text, 270, file)
    assert Tokenizer.load(file).digest == TokenDataset.open(tmp_path / "d").tokenizer_digest


def test_an_older_held_out_part_never_outlives_its_training_part(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_jsonl(tmp_path / "a.jsonl", documents(200))
    prepare(tmp_path / "a.jsonl", tmp_path / "d", tokenizer, heldout=Fraction(1, 4), progress=False)
    for heldout in (None, Fraction(1, 4)):
        with pytest.raises(DataError, match=r"out: .*d.heldout is the held-out part of .*/d; choose another prefix"):
            prepare(tmp_path / "a.jsonl", tmp_path / "d.heldout.bin", tokenizer, heldout=heldout, progress=False)
    with pytest.warns(SptWarning, match="d.heldout: removed; it was the held-out part of an older"):
        prepare(tmp_path / "a.jsonl", tmp_path / "d", tokenizer, progress=False)
    assert names(tmp_path) == ["a.jsonl", "d.bin", "d.idx", "d.json"]
    prepare(tmp_path / "a.jsonl", tmp_path / "d.heldout", tokenizer, progress=False)  # a text of its own
    prepare(tmp_path / "a.jsonl", tmp_path / "d", tokenizer, progress=False)
    assert len(read(tmp_path / "d.heldout")) == 200
    metadata = json.loads((tmp_path / "d.heldout.json").read_text())
    del metadata["part"], metadata["sha256"]  # as an earlier version wrote it
    (tmp_path / "d.heldout.json").write_text(json.dumps(metadata | {"sha256": sha256_of(metadata)}))
    with pytest.raises(DataError, match=r"out: .*d.heldout may be the held-out part of an older .*delete it or move"):
        prepare(tmp_path / "a.jsonl", tmp_path / "d", tokenizer, progress=False)
