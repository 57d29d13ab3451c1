from __future__ import annotations

import bz2
import contextlib
import gzip
import json
import lzma
import os
import random
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spt_fast.data import parquet_pages, text
from spt_fast.data.inputs import find_files, is_pipe
from spt_fast.data.text import TextReader, iter_documents, parse
from spt_fast.errors import DataError, MissingKey, SptWarning

DOCUMENTS = ["one\ntwo  \n", "naïve 日本語 😀", 'say "hi"\\\t\u2028', " ", "x" * 5000]


def compress(data: bytes, compression: str) -> bytes:
    if compression == ".gz":
        return gzip.compress(data, mtime=0)  # else its bytes, which name tests, would tell the time
    if compression == ".zst":
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, "zstd") as stream:
            stream.write(data)
        return sink.getvalue().to_pybytes()
    return {".xz": lzma.compress, ".bz2": bz2.compress}.get(compression, bytes)(data)


TOOLS = ("zcat", "zstdcat", "xzcat", "bzcat")


def jsonl(documents: list[str], key: str = "text") -> bytes:
    return b"".join(json.dumps({"id": 7, key: document}).encode() + b"\n" for document in documents)


def parquet(column: Any, key: str = "text", **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"id": list(range(len(column))), key: column}), sink, **options)
    return sink.getvalue().to_pybytes()


def put(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def read(inputs: Any, key: str = "text") -> tuple[list[str], Counter[str]]:
    """Documents and what was left out, with skip_bad."""
    reader, skipped = TextReader(inputs, key, skip_bad=True), Counter()
    documents = [text for chunk in reader for text, _ in parse(chunk, key, skip_bad=True, skipped=skipped)]
    return documents, +(skipped + reader.skipped)


@pytest.mark.parametrize("compression", ["", ".gz", ".zst", ".xz", ".bz2"])
@pytest.mark.parametrize("key", ["text", "content"])
def test_every_format_and_compression(tmp_path: Path, compression: str, key: str) -> None:
    lines = put(tmp_path / f"a.jsonl{compression}", compress(jsonl(DOCUMENTS, key), compression))
    lines_too = put(tmp_path / f"a.ndjson{compression}", lines.read_bytes())
    table = put(tmp_path / f"a.parquet{compression}", compress(parquet(DOCUMENTS, key), compression))
    plain = put(tmp_path / f"a.txt{compression}", compress(DOCUMENTS[1].encode(), compression))
    for path, expected in ((lines, DOCUMENTS), (lines_too, DOCUMENTS), (table, DOCUMENTS), (plain, DOCUMENTS[1:2])):
        assert list(iter_documents(path, key)) == expected
        reader = TextReader(str(path), key)
        assert [utf8.decode() for chunk in reader for _, utf8 in parse(chunk, key)] == expected
        assert reader.read_bytes == reader.total_bytes == path.stat().st_size


@pytest.mark.parametrize("compression", [".gz", ".zst", ".xz", ".bz2"])
def test_frames_one_after_another_are_one_file(tmp_path: Path, compression: str) -> None:
    parts = [jsonl(DOCUMENTS[:2]), b"", jsonl(DOCUMENTS[2:])[:-20], jsonl(DOCUMENTS[2:])[-20:]]
    path = put(tmp_path / f"a.jsonl{compression}", b"".join(compress(part, compression) for part in parts))
    assert list(iter_documents(path)) == DOCUMENTS


@pytest.mark.parametrize("compression", [".gz", ".zst", ".xz", ".bz2"])
def test_data_after_a_frame_that_is_not_a_frame_is_not_dropped(tmp_path: Path, compression: str) -> None:
    path = put(tmp_path / f"a.jsonl{compression}", compress(GOOD, compression) + compress(GOOD, compression)[1:])
    with pytest.raises(DataError, match="is damaged or cut off"):
        list(iter_documents(path))


def test_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "from spt_fast.data.text import *; import json; print(json.dumps(list(iter_documents(['-', 'b.txt']))))"
    put(tmp_path / "b.txt", b"last")
    done = subprocess.run(
        [sys.executable, "-c", code], input=jsonl(DOCUMENTS), cwd=tmp_path, capture_output=True, check=True
    )
    assert json.loads(done.stdout) == [*DOCUMENTS, "last"]
    nothing = subprocess.run([sys.executable, "-c", code], input=b"", cwd=tmp_path, capture_output=True)
    assert b"DataError: standard input holds no document" in nothing.stderr
    monkeypatch.setattr(sys, "stdin", None)  # as Python has it where the shell says <&-
    with pytest.raises(DataError, match="standard input is closed; give files"):
        list(iter_documents("-"))


def test_a_folder_is_read_in_order_of_paths(tmp_path: Path) -> None:
    names = ["b/2.txt", "b/10.txt", "a.txt", "b.txt", "b/deep/x.JSONL", ".hidden.txt", ".git/y.txt", "c.json", "d.md"]
    for name in names:
        put(tmp_path / name, jsonl([name]) if name.endswith("JSONL") else name.encode())
    expected = ["a.txt", "b/10.txt", "b/2.txt", "b/deep/x.JSONL", "b.txt"]
    assert list(iter_documents(tmp_path)) == expected
    assert list(iter_documents([tmp_path / "b.txt", tmp_path])) == ["b.txt", *expected]
    assert find_files(tmp_path).files == [tmp_path / name for name in expected]


def test_what_is_passed_over_is_counted_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "in"
    for name in ("a.jsonl", "a.jsonl.gz", "b.json.gz", "c.csv", ".d.txt", ".DS_Store", "sub/e.txt"):
        put(folder / name, compress(jsonl([name]), ".gz" if name.endswith(".gz") else ""))
    put(tmp_path / "elsewhere" / "f.txt", b"not here")
    (folder / "more").symlink_to(tmp_path / "elsewhere")
    (folder / "gone.txt").symlink_to(tmp_path / "nothing")
    (folder / "z.jsonl").symlink_to(folder / "a.jsonl")
    said = (
        r"input: ignored: 1 × hidden file \(.d.txt\); 2 × same text twice \(a.jsonl.gz, z.jsonl\); "
        r"2 × other file \(b.json.gz, c.csv\); 1 × broken link \(gone.txt\); 1 × link to a folder \(more\)$"
    )
    with pytest.warns(SptWarning, match=said):
        documents, skipped = read(folder)
    assert documents == ["a.jsonl", jsonl(["sub/e.txt"]).decode()]
    kinds = {"hidden file": 1, "same text twice": 2, "other file": 2, "broken link": 1, "link to a folder": 1}
    assert skipped == kinds
    with pytest.warns(SptWarning, match="the same text is read more than once: a.jsonl, a.jsonl.gz"):
        assert list(iter_documents([folder / "a.jsonl", folder / "a.jsonl.gz"])) == ["a.jsonl", "a.jsonl.gz"]
    put(tmp_path / "hard" / "sub" / "a.jsonl", jsonl(["once"]))
    (tmp_path / "hard" / "b.jsonl").hardlink_to(tmp_path / "hard" / "sub" / "a.jsonl")
    with pytest.warns(SptWarning, match=r"ignored: 1 × same text twice \(a.jsonl\)"):
        assert read(tmp_path / "hard")[0] == ["once"]
    with pytest.warns(SptWarning, match="the same text is read more than once: a.jsonl, b.jsonl"):
        find_files([tmp_path / "hard" / "b.jsonl", tmp_path / "hard" / "sub" / "a.jsonl"])
    scan = os.scandir

    def closed(path: str) -> Any:
        if str(path).endswith(str(refused)):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", closed)
    refused = "sub"
    with pytest.warns(SptWarning, match=r"ignored: 1 × folder that can't be read \(sub\)"):
        assert find_files(tmp_path / "hard").files == [tmp_path / "hard" / "b.jsonl"]
    refused = "hard"
    with pytest.raises(DataError, match="hard can't be read; give this user"):
        find_files(tmp_path / "hard")
    monkeypatch.undo()
    put(tmp_path / "none" / "x.json", b"{}")
    with pytest.raises(DataError, match=r"none: holds no .* file; ignored: 1 × other file \(x.json\)"):
        find_files(tmp_path / "none")


@pytest.mark.parametrize(
    "names", [("test.jsonl", "train.jsonl"), ("pos/a.txt", "x-Validation-00.txt", "test/pos/b.txt")]
)
def test_a_folder_that_holds_a_test_set_beside_other_text_is_read_with_a_warning(
    tmp_path: Path, names: tuple[str, ...]
) -> None:
    for name in names:
        put(tmp_path / "in" / name, jsonl([name]))
    named = ", ".join(name for name in sorted(names) if "est" in name or "Val" in name)
    with pytest.warns(SptWarning, match=rf"^input: \S+in holds {named}, which by name is held out, and it is read"):
        assert len(find_files(tmp_path / "in").files) == len(names)
    with warnings.catch_warnings(record=True, action="default") as said:
        find_files(tmp_path / "in")
        find_files(tmp_path / "in")
    assert len(said) == 1, "of a command that asks more than once"
    for alone in names:
        put(tmp_path / "in" / alone, b"").unlink()
    put(tmp_path / "in" / "test.jsonl", jsonl(["all of it"]))
    with warnings.catch_warnings(action="error"):
        find_files(tmp_path / "in")
        find_files([tmp_path / "in" / "test.jsonl", put(tmp_path / "attest.txt", b"a")])


def test_a_pipe_is_read_as_lines_of_json(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.write(writing, jsonl(DOCUMENTS))
    os.close(writing)
    reader = TextReader(f"/dev/fd/{reading}")
    assert reader.total_bytes is None
    assert [text for chunk in reader for text, _ in parse(chunk)] == DOCUMENTS
    os.close(reading)


def test_a_damaged_parquet_footer_never_ends_the_process(tmp_path: Path) -> None:
    """pyarrow's own reader of a column's metadata does in a few of these."""
    good, damaged = parquet([f"document {i}" for i in range(40)]), tmp_path / "a.parquet"
    footer = len(good) - 8 - int.from_bytes(good[-8:-4], "little")
    rng = random.Random(5)
    for _ in range(400):
        data = bytearray(good)
        data[rng.randrange(footer, len(good) - 8)] = rng.randrange(256)
        damaged.write_bytes(data)
        with contextlib.suppress(DataError):
            list(TextReader(damaged))


def test_a_compressed_file_under_another_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = {how: compress(GOOD, ending) for ending, how in zip((".gz", ".zst", ".xz", ".bz2"), TOOLS, strict=True)}
    for how, data in (packed | {"Parquet, which": parquet(["a"]), "zip archive": b"PK\3\4" + bytes(99)}).items():
        for name in ("a.jsonl", "a.txt", "a.jsonl.gz"):
            path = put(tmp_path / name, compress(data, ".gz") if name.endswith(".gz") else data)
            with pytest.raises(DataError, match=rf"{name}: holds no text but .*{how}.*; unpack it first, or rename"):
                read(path)
        reading, writing = os.pipe()
        os.write(writing, data[:2])
        monkeypatch.setattr(text, "_BLOCK_BYTES", 2)
        os.write(writing, data[2:])
        os.close(writing)
        with pytest.raises(DataError, match=rf"/dev/fd/{reading}: holds no text but .*{how}"):
            read(f"/dev/fd/{reading}")
        os.close(reading)
        monkeypatch.undo()
    pointer = put(tmp_path / "a.txt", b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(DataError, match=r"a\.txt: holds no text but is a pointer of Git LFS: run `git lfs pull`"):
        read(pointer)
    for plain in ("BZh9 is how bzip2 begins", "PAR2", "\x1f"):
        assert read(put(tmp_path / "a.txt", plain.encode()))[0] == [plain]


def test_only_devices_and_descriptors_below_dev_are_pipes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "exists", lambda path: True)
    for name in ("-", "/dev/stdin", "/dev/fd/9", "/dev/null"):
        assert is_pipe(Path(name)), name
    assert not is_pipe(Path("/dev/shm/a.jsonl.gz"))


def test_a_line_that_is_too_long_can_be_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put(tmp_path / "a.jsonl", jsonl(["one", "x" * 400, "two", "y" * 999, "z" * 99]) + b"{")
    monkeypatch.setattr(text, "LINE_BYTES", 300)
    for block in (1, 7, 64, 500, 1 << 20):
        monkeypatch.setattr(text, "_BLOCK_BYTES", block)
        if block < 300:  # in a block of many lines nothing is cut off
            documents, skipped = read(path)
            assert documents == ["one", "two", "z" * 99]
            assert skipped == {"line over 0 MiB": 2, "broken JSON": 1}
            with pytest.raises(DataError, match=r"a\.jsonl:2: line over 0 MiB"):
                list(iter_documents(path))
            *_, last = TextReader(path, skip_bad=True)
            with pytest.raises(DataError, match=r"a\.jsonl:6: broken JSON"):
                list(parse(last))


def test_a_small_file_that_unfolds_to_much_takes_little_memory_or_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    big = "a b c d e f g h " * (1 << 16)
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 5000, pa.int32()), pa.array([big]))
    bomb = put(tmp_path / "a.parquet", parquet(column, compression="zstd", dictionary_pagesize_limit=1 << 30))
    assert bomb.stat().st_size < 20_000
    chunk = next(iter(TextReader(bomb)))
    assert len(chunk.data) <= 64 << 20
    assert set(chunk.lengths or ()) == {len(big)}
    monkeypatch.setattr(parquet_pages, "DICTIONARY_BYTES", 1 << 20 - 1)
    with pytest.raises(DataError, match="column 'text' decodes to 1 MiB in one page, over 0; write"):
        next(iter(TextReader(bomb)))
    uneven = ["y"] * 300 + [big + big] + ["y"] * 700 + [big, "y"]  # in two groups of a page each
    for options in ({}, {"data_page_version": "2.0", "compression": "zstd"}, {"column_encoding": {"text": "PLAIN"}}):
        path = put(tmp_path / "d.parquet", parquet(uneven, use_dictionary=False, row_group_size=1001, **options))
        assert [text for chunk in TextReader(path) for text, _ in parse(chunk)] == uneven
        monkeypatch.setattr(parquet_pages, "PAGE_BYTES", 3 << 20 - 1)
        with pytest.raises(DataError, match=r"decodes to 2 MiB in one page, over 1; write .* fewer rows per page"):
            next(iter(TextReader(path)))
        monkeypatch.undo()
        monkeypatch.setattr(parquet_pages, "DICTIONARY_BYTES", 1 << 20 - 1)
    monkeypatch.setattr(text, "LINE_BYTES", 1 << 20)
    with pytest.raises(DataError, match=r"d\.parquet, row 301: row over 1 MiB; write shorter documents, or"):
        list(TextReader(path))
    documents, skipped = read(path)
    assert documents == [document for document in uneven if len(document) < 2 << 20]
    assert skipped == {"row over 1 MiB": 1}

    for column, message in ((pa.array([[big]]), "holds list<.*>, not strings"), ([big], "holds documents over 0 MiB")):
        monkeypatch.setattr(text, "LINE_BYTES", 1 << 20 - 1)
        with pytest.raises(DataError, match=f"column 'text' {message}"):
            next(iter(TextReader(put(tmp_path / "b.parquet", parquet(column, use_dictionary=False)))))
    monkeypatch.setattr(text, "LINE_BYTES", 2 << 20)
    repeating = {"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}}
    chunk = next(iter(TextReader(put(tmp_path / "c.parquet", parquet([big] * 100, **repeating)))))
    assert len(chunk.data) <= 64 << 20

    monkeypatch.setattr(text, "_LONG_LINE_BYTES", 1000)
    monkeypatch.setattr(text, "STRUCTURE_BYTES", 100_000)
    for line in (b"[" + b"[]," * 2000 + b"1]", b'{"text": [' + b'"a",' * 2000 + b"1]}"):
        with pytest.raises(DataError, match=r"a\.jsonl:1: more than 0 GiB of JSON in one line; split it"):
            list(iter_documents(put(tmp_path / "a.jsonl", line)))
    much = 'quotes \\" and [brackets], ' * 1000
    assert list(iter_documents(put(tmp_path / "a.jsonl", jsonl([much])))) == [much]

    monkeypatch.setattr(text, "XZ_MEMORY_BYTES", 1 << 16)
    with pytest.raises(DataError, match=r"a\.jsonl\.xz: was compressed with a window too large .*smaller one"):
        list(iter_documents(put(tmp_path / "a.jsonl.xz", compress(GOOD, ".xz"))))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    documents=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), min_size=1),
    size=st.integers(1, 40),
)
def test_the_size_of_blocks_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, documents: list[str], size: int
) -> None:
    monkeypatch.setattr(text, "_BLOCK_BYTES", size)
    data = b"".join(json.dumps({"text": document}, ensure_ascii=False).encode() + b"\n\n" for document in documents)
    found, skipped = read(put(tmp_path / "a.jsonl", data + b"{"))
    assert found == list(filter(None, documents))
    assert skipped == +Counter({"empty": documents.count(""), "broken JSON": 1})
    with pytest.raises(DataError, match=rf"a\.jsonl:{2 * len(documents) + 1}: broken JSON"):
        list(iter_documents(tmp_path / "a.jsonl"))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.text(st.sampled_from("ab \n日😀"), min_size=50), limit=st.integers(8, 60), size=st.integers(1, 40))
def test_a_long_txt_is_cut_where_it_hurts_least(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, limit: int, size: int
) -> None:
    monkeypatch.setattr(text, "_BLOCK_BYTES", size)
    monkeypatch.setattr(text, "TXT_BYTES", limit)
    path = put(tmp_path / "a.txt", ("x" + content).encode())
    documents = list(iter_documents(path))
    assert ("x" + content).startswith("".join(documents))
    assert ("x" + content)[len("".join(documents)) :].strip() == ""  # white space alone is no document
    assert all(len(document.encode()) <= limit for document in documents)
    for document in documents[:-1]:
        rest = document.encode()[limit // 2 :]
        assert document.endswith("\n\n") or b"\n\n" not in rest
        assert document.endswith((" ", "\n")) or not (b" " in rest or b"\n" in rest)


def test_a_txt_up_to_8_mib_is_one_document(tmp_path: Path) -> None:
    content = b"one line of text\n" * (text.TXT_BYTES // 17)
    assert [document.encode() for document in iter_documents(put(tmp_path / "a.txt", content))] == [content]
    longer = content + b"\n\n" + content
    pieces = [document.encode() for document in iter_documents(put(tmp_path / "b.txt", longer))]
    assert pieces == [content + b"\n\n", content]
    of_windows = [part.replace(b"\n", b"\r\n") for part in (content[: len(content) // 34 * 17] + b"\n", content)]
    documents = iter_documents(put(tmp_path / "c.txt", b"".join(of_windows)))
    assert next(documents).encode() == of_windows[0]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="finds the peak of memory in /proc")
def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    line = jsonl(["a page of text, always the same " * 100])
    with pa.CompressedOutputStream(str(tmp_path / "a.jsonl.zst"), "zstd") as stream:
        for _ in range(256):
            stream.write(line * (2**20 // len(line)))
    words = b"a word and another\n" * (150_000_000 // 19)
    put(tmp_path / "b.txt", words)
    put(tmp_path / "c.txt.gz", gzip.compress(words, 1))
    put(tmp_path / "e.parquet", parquet(["one row " * 1500] * 10_000, row_group_size=10_000))
    put(tmp_path / "d.parquet", parquet([str(row) * 3000 for row in range(10_000)], row_group_size=10_000))
    code = """if True:
        import sys, pyarrow.parquet
        from spt_fast.data.text import TextReader
        peak_kb = lambda: int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
        before_kb = peak_kb()
        print(sum(len(chunk.data) for chunk in TextReader(sys.argv[1])), peak_kb() - before_kb)
    """
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, check=True, text=True)
    read_bytes, grown_kb = map(int, done.stdout.split())
    assert read_bytes > 750e6
    assert grown_kb < 200_000


GOOD = b'{"text": "good"}\n'
BAD_LINES = {
    "broken": (b'{"text": "a"', "broken JSON", r"broken JSON \(Expecting ',' delimiter, column 13\)"),
    "two objects": (b'{"text": "a"} {"text": "b"}', "broken JSON", "Extra data"),
    "no object": (b'["a"]', "broken JSON", "list instead of a JSON object"),
    "deep": (b"[" * 100_000, "broken JSON", "broken JSON"),
    "no key": (b'{"id": 3, "body": "a"}', "missing key", r"'text' \(the line has 'id', 'body'\).*text_key="),
    "number": (b'{"text": 3}', "not a string", "'text' is int, not a string"),
    "null": (b'{"text": null}', "not a string", "NoneType"),
    "not UTF-8": ('{"text": "café"}'.encode("latin-1"), "not UTF-8", "0xe9.*iconv"),
    "surrogate": (b'{"text": "a \\ud83d b"}', "not UTF-8", "half a surrogate pair at character 2"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_named_or_counted(tmp_path: Path, name: str) -> None:
    line, kind, message = BAD_LINES[name]
    path = put(tmp_path / "a.jsonl", GOOD + b"\n" + line + b"\n" + GOOD)
    with pytest.raises(DataError, match=rf"{path}:3: .*{message}.*skip_bad=True"):
        list(iter_documents(path))
    assert read(path) == (["good", "good"], {kind: 1})


def test_a_bad_txt_is_named_or_counted(tmp_path: Path) -> None:
    good, bad = put(tmp_path / "a.txt", b"good"), put(tmp_path / "b.txt", b"one\ntwo\nthr\xe9e\nfour")
    with pytest.raises(DataError, match=rf"{bad}:3: not UTF-8"):
        list(iter_documents(tmp_path))
    assert read([good, bad]) == (["good"], {"not UTF-8": 1})


@pytest.mark.parametrize("block_bytes", [8, 1 << 20])
def test_a_bad_parquet_row_is_named_or_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int
) -> None:
    monkeypatch.setattr(text, "_BLOCK_BYTES", block_bytes)
    path = put(tmp_path / "a.parquet", parquet(["good", "", None, "fine\n"], row_group_size=2))
    with pytest.raises(DataError, match=rf"{path}, row 3: 'text' is null"):
        list(iter_documents(path))
    assert read(path) == (["good", "fine\n"], {"empty": 1, "not a string": 1})
    path = put(tmp_path / "b.parquet", parquet(pa.array([b"good", b"a\n\xff"], pa.binary())))
    with pytest.raises(DataError, match=rf"{path}, row 2: not UTF-8"):
        list(iter_documents(path))


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int8(), pa.string())])
def test_parquet_string_types(tmp_path: Path, kind: pa.DataType) -> None:
    path = put(tmp_path / "a.parquet", parquet(pa.array(DOCUMENTS, pa.string()).cast(kind), row_group_size=2))
    assert list(iter_documents(path)) == DOCUMENTS


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b"", "holds no document"),
        ("a.jsonl", b"\n  \n\r\n", "holds no document"),
        ("a.jsonl.gz", compress(b"", ".gz"), "holds no document"),
        ("a.jsonl.zst", b"", "holds no document"),
        ("a.txt", b" \n", "holds no document"),
        ("a.txt", b"\xef\xbb\xbf", "holds no document"),
        ("a.parquet", b"", "holds no document"),
        ("a.parquet", parquet(pa.array([], pa.string())), "holds no document"),
    ],
)
def test_an_empty_file_is_named_or_counted(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    path = put(tmp_path / name, data)
    with pytest.raises(DataError, match=f"{path} {message}"):
        list(iter_documents(path))
    assert read([path, put(tmp_path / "good.txt", b"good")]) == (["good"], {"empty file": 1})


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.txt.zst", "a.parquet", "a.parquet.gz"])
def test_a_damaged_file_is_named_even_when_skipping(tmp_path: Path, name: str) -> None:
    documents = [f"{i} text" * 100 for i in range(1000)]
    data = {"jsonl": jsonl(documents), "txt": "".join(documents).encode(), "parquet": parquet(documents)}
    whole = compress(data[name.split(".")[1]], name[-4:] if name.endswith("zst") else name[-3:])
    for damaged in (
        whole[:-1],
        whole[: len(whole) // 2],
        whole[:3],
        whole + b"more" if "zst" in name else b"no" + whole,
    ):
        path = put(tmp_path / name, damaged)
        for skip_bad in (False, True):
            with pytest.raises(DataError, match=rf"{path}:? (is damaged or cut off|can't be read as Parquet)"):
                list(iter_documents(path, skip_bad=skip_bad))


def test_inputs_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "a.json", GOOD)
    put(tmp_path / "a.parquet", parquet([1, 2]))
    put(tmp_path / "b.jsonl", GOOD * 10)
    pq.write_table(pa.table([pa.array(["a"])] * 2, ["text", "text"]), tmp_path / "two.parquet")
    put(tmp_path / "a.csv", b"text")
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr(text, "LINE_BYTES", 8)
    monkeypatch.setattr(text, "_BLOCK_BYTES", 4)
    for inputs, key, message in (
        (
            tmp_path / "a.json",
            "text",
            r"a\.json: is not a \.jsonl, \.ndjson, \.txt, \.parquet \(plain, \.gz, \.zst, \.xz, \.bz2\) file; rename",
        ),
        (tmp_path / "a.csv", "text", r"a\.csv: is not a .* or write its rows .* \(pandas.read_csv\(…\).to_json"),
        (tmp_path / "none.jsonl", "text", "none.jsonl doesn't exist"),
        (tmp_path / "folder", "text", "folder: holds no .jsonl.* rename files of plain text to end in .txt"),
        ([], "text", "no input given"),
        (tmp_path / "a.parquet", "text", r"a\.parquet: column 'text' holds int64, not strings"),
        (tmp_path / "two.parquet", "text", r"two\.parquet: has two columns 'text'; write it with the one"),
        (tmp_path / "b.jsonl", "text", r"b\.jsonl:1: line over 0 MiB; write one JSON object per line, or skip"),
    ):
        with pytest.raises(DataError, match=message):
            list(iter_documents(inputs, key))
    with pytest.raises(MissingKey, match=r"a\.parquet: no text under 'body' \(it has 'id', 'text'\).*text_key="):
        list(iter_documents(tmp_path / "a.parquet", "body"))


def test_a_byte_order_mark_is_dropped(tmp_path: Path) -> None:
    path = put(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + GOOD)
    assert list(iter_documents([path, put(tmp_path / "b.txt", b"\xef\xbb\xbfhi\xef\xbb\xbf")])) == ["good", "hi\ufeff"]
