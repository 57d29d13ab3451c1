"""Foreign token files, written here byte for byte after their public descriptions."""

from __future__ import annotations

import itertools
import os
import resource
import struct
from pathlib import Path

import numpy as np
import pytest

from spt_fast.data import formats, shards
from spt_fast.data.shards import DatasetWriter, TokenDataset
from spt_fast.errors import DataError, SptWarning

MEGATRON_CODES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}


def write_megatron(
    prefix: Path, documents: list[list[list[int]]], code: int = 8, modes: bool = False, version: int = 1
) -> None:
    """Documents of sequences of ids."""
    sequences = [sequence for document in documents for sequence in document]
    dtype = np.dtype(MEGATRON_CODES.get(code, "<f4"))
    index = b"MMIDIDX\x00\x00" + struct.pack("<QB", version, code)
    index += struct.pack("<QQ", len(sequences), len(documents) + 1)
    index += b"".join(struct.pack("<i", len(sequence)) for sequence in sequences)
    pointer = 0
    for sequence in sequences:
        index += struct.pack("<q", pointer)
        pointer += len(sequence) * dtype.itemsize
    first = 0
    for document in [*documents, []]:
        index += struct.pack("<q", first)
        first += len(document)
    if modes:
        index += bytes(len(sequences))
    Path(f"{prefix}.idx").write_bytes(index)
    Path(f"{prefix}.bin").write_bytes(np.array([i for sequence in sequences for i in sequence], dtype).tobytes())


def write_llmc(path: Path, ids: list[int], magic: int = 20240520, version: int = 1, count: int | None = None) -> None:
    header = struct.pack("<iii", magic, version, len(ids) if count is None else count) + bytes(253 * 4)
    assert len(header) == 1024
    path.write_bytes(header + np.array(ids, "<u2" if version == 1 else "<u4").tobytes())


DOCUMENTS = [[[1, 2, 3]], [[4], [5, 6]], [[100]]]
IDS = [1, 2, 3, 4, 5, 6, 100]


@pytest.mark.parametrize("modes", [False, True])
@pytest.mark.parametrize("code", MEGATRON_CODES)
def test_megatron(tmp_path: Path, code: int, modes: bool) -> None:
    write_megatron(tmp_path / "d", DOCUMENTS, code, modes)
    for name in ("d", "d.bin", "d.idx"):
        dataset = TokenDataset.open(tmp_path / name)
        assert dataset.format == "megatron"
        assert dataset.tokens.dtype == np.dtype(MEGATRON_CODES[code])
        assert dataset.tokens.tolist() == IDS
        assert dataset.document_ends is not None
        assert dataset.document_ends.tolist() == [3, 6, 7]
        assert (dataset.path, dataset.offset_bytes) == (tmp_path / "d.bin", 0)
        assert (dataset.max_id, dataset.vocab_size, dataset.eos_id, dataset.num_bytes) == (None,) * 4
    assert TokenDataset.open(tmp_path / "d").limit(5).document_ends.tolist() == [3]  # type: ignore[union-attr]


def test_megatron_with_empty_documents_and_sequences(tmp_path: Path) -> None:
    write_megatron(tmp_path / "d", [[], [[1, 2], []], [], [[], [3]], []])
    dataset = TokenDataset.open(tmp_path / "d")
    assert dataset.document_ends is not None
    assert dataset.document_ends.tolist() == [0, 2, 2, 3, 3]


@pytest.mark.parametrize("code", [0, 6, 7, 9])
def test_megatron_of_no_integer_dtype(tmp_path: Path, code: int) -> None:
    write_megatron(tmp_path / "d", DOCUMENTS, code)
    with pytest.raises(DataError, match=f"dtype code {code}"):
        TokenDataset.open(tmp_path / "d")


def test_megatron_of_another_version(tmp_path: Path) -> None:
    write_megatron(tmp_path / "d", DOCUMENTS, version=2)
    with pytest.raises(DataError, match="version 2"):
        TokenDataset.open(tmp_path / "d")


def test_megatron_at_every_truncation_of_the_index(tmp_path: Path) -> None:
    write_megatron(tmp_path / "d", DOCUMENTS)
    whole = (tmp_path / "d.idx").read_bytes()
    for size in range(9, len(whole)):
        (tmp_path / "d.idx").write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"d\.idx: is (truncated|damaged)"):
            TokenDataset.open(tmp_path / "d")


@pytest.mark.parametrize("extra", [1, 3, 5, 8])  # 4 would be the modes of its 4 sequences
def test_megatron_index_that_has_grown(tmp_path: Path, extra: int) -> None:
    write_megatron(tmp_path / "d", DOCUMENTS)
    with (tmp_path / "d.idx").open("ab") as file:
        file.write(bytes(extra))
    with pytest.raises(DataError, match=r"d\.idx: is damaged"):
        TokenDataset.open(tmp_path / "d")


def test_megatron_index_with_a_negative_length(tmp_path: Path) -> None:
    """Its pointers and its sum agree with it; only its sign is wrong."""
    write_megatron(tmp_path / "d", [[[1] * 5], [[2] * 2]])
    index = bytearray((tmp_path / "d.idx").read_bytes())
    index[34:58] = struct.pack("<iiqq", 9, -2, 0, 18)
    (tmp_path / "d.idx").write_bytes(index)
    with pytest.raises(DataError, match="are not contiguous"):
        TokenDataset.open(tmp_path / "d")


def test_a_megatron_index_belongs_to_the_bin_of_its_name_only(tmp_path: Path) -> None:
    write_megatron(tmp_path / "part", DOCUMENTS)
    np.array([9, 9], "<u2").tofile(tmp_path / "part.00000")
    for dtype in ("uint16", np.uint16, np.dtype("uint16")):
        assert TokenDataset.open(tmp_path / "part.00000", dtype=dtype).tokens.tolist() == [9, 9]
    for other in (np.float32, np.dtype(">u2"), "<u2", int):
        with pytest.raises(DataError, match=r"the declared dtype: .* is invalid: token ids have one of uint8"):
            TokenDataset.open(tmp_path / "part.00000", dtype=other)


@pytest.mark.parametrize("change", [-2, -1, 1, 2])
def test_megatron_bin_of_another_size(tmp_path: Path, change: int) -> None:
    write_megatron(tmp_path / "d", DOCUMENTS)
    os.truncate(tmp_path / "d.bin", 14 + change)
    with pytest.raises(DataError, match=rf"d\.bin: is .*: {14 + change} bytes found, 14 expected"):
        TokenDataset.open(tmp_path / "d")


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (34 + 0, struct.pack("<i", -3), "are not contiguous"),
        (34 + 16 + 8, struct.pack("<q", 7), "are not contiguous"),  # the second sequence's pointer
        (34 + 48 + 0, struct.pack("<q", 1), "document boundaries"),
        (34 + 48 + 8, struct.pack("<q", 4), "document boundaries"),  # 0, 4, 3, 4
        (34 + 48 + 24, struct.pack("<q", 3), "document boundaries"),
    ],
)
def test_megatron_index_that_contradicts_itself(tmp_path: Path, offset: int, value: bytes, message: str) -> None:
    write_megatron(tmp_path / "d", DOCUMENTS)
    index = bytearray((tmp_path / "d.idx").read_bytes())
    index[offset : offset + len(value)] = value
    (tmp_path / "d.idx").write_bytes(index)
    with pytest.raises(DataError, match=message):
        TokenDataset.open(tmp_path / "d")


@pytest.mark.parametrize(("magic", "version", "dtype"), [(20240520, 1, "<u2"), (20240801, 7, "<u4")])
def test_llmc(tmp_path: Path, magic: int, version: int, dtype: str) -> None:
    ids = [50_256, 1, 2, 65_535]
    write_llmc(tmp_path / "d.bin", ids, magic, version)
    dataset = TokenDataset.open(tmp_path / "d")
    assert (dataset.format, dataset.offset_bytes, dataset.num_tokens) == ("llm.c", 1024, 4)
    assert dataset.tokens.dtype == np.dtype(dtype)
    assert dataset.tokens.tolist() == ids
    assert dataset.document_ends is None
    assert dataset.num_documents is None
    raw = np.fromfile(dataset.path, dtype, offset=dataset.offset_bytes)
    assert raw.tolist() == ids


@pytest.mark.parametrize(("magic", "version"), [(20240520, 7), (20240801, 1), (20240520, 2)])
def test_llmc_of_an_unknown_version(tmp_path: Path, magic: int, version: int) -> None:
    write_llmc(tmp_path / "d.bin", IDS, magic, version)
    with pytest.raises(DataError, match=f"magic {magic} with version {version}"):
        TokenDataset.open(tmp_path / "d")


@pytest.mark.parametrize("count", [6, 8, -1, 2**31 - 1])
def test_llmc_of_another_size_than_its_header_says(tmp_path: Path, count: int) -> None:
    write_llmc(tmp_path / "d.bin", IDS, count=count)
    with pytest.raises(DataError, match=r"1,038 bytes found"):
        TokenDataset.open(tmp_path / "d")


@pytest.mark.parametrize("size", [8, 12, 1023])
def test_llmc_cut_inside_its_header(tmp_path: Path, size: int) -> None:
    write_llmc(tmp_path / "d.bin", IDS)
    os.truncate(tmp_path / "d.bin", size)
    with pytest.raises(DataError, match=f"{size:,} bytes found, its header alone has 1024"):
        TokenDataset.open(tmp_path / "d")


@pytest.mark.parametrize("dtype", formats.ID_DTYPES)
def test_npy(tmp_path: Path, dtype: str) -> None:
    np.save(tmp_path / "d.npy", np.array(IDS, dtype))
    for name in ("d.npy", "d"):
        dataset = TokenDataset.open(tmp_path / name)
        assert dataset.format == "npy"
        assert dataset.tokens.dtype == np.dtype(dtype)
        assert dataset.tokens.tolist() == IDS
        assert isinstance(dataset.tokens, np.memmap)
        assert not dataset.tokens.flags.writeable


def test_npy_header_version_2(tmp_path: Path) -> None:
    with (tmp_path / "d.npy").open("wb") as file:
        np.lib.format.write_array(file, np.array(IDS, "<u2"), version=(2, 0))
    assert TokenDataset.open(tmp_path / "d").tokens.tolist() == IDS


@pytest.mark.parametrize(
    "array",
    [np.zeros((2, 3), "<u2"), np.zeros(3, "<f4"), np.zeros(3, bool), np.array(5, "<u2"), np.zeros(3, [("a", "<u2")])],
    ids=["2-D", "float", "bool", "0-D", "struct"],
)
def test_npy_that_holds_no_ids(tmp_path: Path, array: np.ndarray) -> None:
    np.save(tmp_path / "d.npy", array)
    with pytest.raises(DataError, match="integers in one dimension"):
        TokenDataset.open(tmp_path / "d.npy")


def test_npy_of_objects_is_never_unpickled(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "exploded"),)

    np.save(tmp_path / "d.npy", np.array([Bomb()], object), allow_pickle=True)
    with pytest.raises(DataError, match="integers in one dimension"):
        TokenDataset.open(tmp_path / "d.npy")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("shape", ["(7", "(((" * 2000, "(7,), 'x'", "'7'", "(True"])
def test_npy_whose_header_is_broken_off_or_nested(tmp_path: Path, shape: str) -> None:
    header = f"{{'descr': '<u2', 'fortran_order': False, 'shape': {shape}".encode()
    (tmp_path / "d.npy").write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(14))
    with pytest.raises(DataError, match=r"its \.npy header is damaged"):
        TokenDataset.open(tmp_path / "d.npy")


def test_npy_big_endian(tmp_path: Path) -> None:
    np.save(tmp_path / "d.npy", np.array(IDS, ">u2"))
    with pytest.raises(DataError, match=r"big-endian.*astype\('<u2'\)"):
        TokenDataset.open(tmp_path / "d.npy")


def test_npy_of_another_size_than_its_header_says(tmp_path: Path) -> None:
    np.save(tmp_path / "d.npy", np.array(IDS, "<u2"))
    size = (tmp_path / "d.npy").stat().st_size
    for changed in (*range(6, size), size + 2):
        np.save(tmp_path / "d.npy", np.array(IDS, "<u2"))
        os.truncate(tmp_path / "d.npy", changed)
        with pytest.raises(DataError, match=r"d\.npy"):
            TokenDataset.open(tmp_path / "d.npy")


@pytest.mark.parametrize("name", ["d", "d.bin", "d.npy", "000_tokens.ds"])
@pytest.mark.parametrize("dtype", ["uint16", "uint32", "int32", "int64"])
def test_headerless_with_a_declared_dtype(tmp_path: Path, name: str, dtype: str) -> None:
    """nanoGPT calls them .bin, OLMo .npy, datatrove .ds: the name tells nothing."""
    np.array(IDS, dtype).tofile(tmp_path / name)
    dataset = TokenDataset.open(tmp_path / name, dtype=dtype)
    assert (dataset.format, dataset.offset_bytes, dataset.document_ends) == ("headerless", 0, None)
    assert dataset.tokens.dtype == np.dtype(dtype)
    assert dataset.tokens.tolist() == IDS


@pytest.mark.parametrize("name", ["d.bin", "d.npy", "d.ds"])
def test_headerless_without_a_dtype_is_never_guessed(tmp_path: Path, name: str) -> None:
    np.array(IDS, "<u2").tofile(tmp_path / name)
    with pytest.raises(DataError, match=r"no header.*declare their dtype \(dtype: uint16"):
        TokenDataset.open(tmp_path / name)


@pytest.mark.parametrize("dtype", ["float32", "u2", "bool", ">u2", "object", ""])
def test_a_dtype_that_no_ids_have(tmp_path: Path, dtype: str) -> None:
    np.array(IDS, "<u2").tofile(tmp_path / "d.bin")
    with pytest.raises(DataError, match="token ids have one of"):
        TokenDataset.open(tmp_path / "d", dtype=dtype)


def test_headerless_of_an_odd_size(tmp_path: Path) -> None:
    (tmp_path / "d.bin").write_bytes(bytes(13))
    with pytest.raises(DataError, match="13 bytes, not a multiple of the 2 bytes"):
        TokenDataset.open(tmp_path / "d", dtype="uint16")


def test_datatrove_index_gives_the_documents(tmp_path: Path) -> None:
    np.array(IDS, "<u2").tofile(tmp_path / "d.ds")
    np.array([3, 6, 7], "<u8").tofile(tmp_path / "d.ds.index")
    dataset = TokenDataset.open(tmp_path / "d.ds", dtype="uint16")
    assert dataset.document_ends is not None
    assert dataset.document_ends.tolist() == [3, 6, 7]
    for ends in ([3, 6], [3, 6, 8], [6, 3, 7], [-1, 6, 7], []):
        np.array(ends, "<i8").tofile(tmp_path / "d.ds.index")
        with pytest.raises(DataError, match=r"d\.ds\.index doesn't hold the document ends"):
            TokenDataset.open(tmp_path / "d.ds", dtype="uint16")


@pytest.mark.parametrize("kind", ["megatron", "llm.c", "npy"])
def test_a_declared_dtype_that_contradicts_the_header(tmp_path: Path, kind: str) -> None:
    if kind == "megatron":
        write_megatron(tmp_path / "d", DOCUMENTS)
    elif kind == "llm.c":
        write_llmc(tmp_path / "d.bin", IDS)
    else:
        np.save(tmp_path / "d.npy", np.array(IDS, "<u2"))
    assert TokenDataset.open(tmp_path / "d", dtype="uint16").format == kind
    with pytest.raises(DataError, match="int32 was declared, but its header says uint16"):
        TokenDataset.open(tmp_path / "d", dtype="int32")


def test_our_own_json_comes_first_and_magic_before_a_declared_dtype(tmp_path: Path) -> None:
    header = np.frombuffer(struct.pack("<iii", 20240520, 1, 5) + bytes(1012) + bytes(10), "<u2")
    with DatasetWriter(tmp_path / "own", vocab_size=65_536, eos_id=None, tokenizer_digest=None) as writer:
        writer.write(header, np.array([len(header)]), 0)
    assert TokenDataset.open(tmp_path / "own").format == "spt_fast"  # though its ids read as an llm.c header
    header.tofile(tmp_path / "d.bin")
    assert TokenDataset.open(tmp_path / "d", dtype="uint16").format == "llm.c"
    write_megatron(tmp_path / "m", [[header.tolist()]])
    assert TokenDataset.open(tmp_path / "m").format == "megatron"


def test_another_programs_json_beside_a_token_file_is_ignored(tmp_path: Path) -> None:
    write_llmc(tmp_path / "d.bin", IDS)
    (tmp_path / "d.json").write_text('{"text": "a corpus"}\n{"text": "in lines"}\n')
    assert TokenDataset.open(tmp_path / "d").tokens.tolist() == IDS


def test_a_missing_dataset_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no token dataset at .*nothing: none of"):
        TokenDataset.open(tmp_path / "nothing")
    (tmp_path / "text.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r"text\.jsonl: is text, not a token dataset; .* `spt-fast prepare`"):
        TokenDataset.open(tmp_path / "text.jsonl")
    (tmp_path / "empty.bin").touch()
    with pytest.raises(DataError, match=r"empty\.bin is empty"):
        TokenDataset.open(tmp_path / "empty", dtype="uint16")


def test_many_files_are_one_dataset(tmp_path: Path) -> None:
    """A folder, a pattern or a list of llm.c shards, in the order of their names; indexed like the one file of all."""
    parts = [IDS, IDS[::-1], IDS[:1], IDS * 3]
    for i, ids in enumerate(parts):
        write_llmc(tmp_path / f"train_{i:06d}.bin", ids)
    (tmp_path / "README").write_text("not ids")
    whole = np.concatenate(parts)
    names = [tmp_path / f"train_{i:06d}.bin" for i in range(4)]
    with pytest.warns(SptWarning, match=r"ignored 1 × not a token file \(README\)$"):
        opened = [TokenDataset.open(tmp_path)]
    opened += [TokenDataset.open(given) for given in (tmp_path / "train_*.bin", names, list(map(str, names)))]
    for data in opened:
        assert (len(data.tokens), data.num_tokens, data.tokens.dtype) == (len(whole), len(whole), np.uint16)
        for start, stop in itertools.combinations(range(0, len(whole) + 1, 3), 2):
            assert data.tokens[start:stop].tolist() == whole[start:stop].tolist()
        for key in (slice(None, None, 3), slice(None, None, -2), slice(len(whole), 1, -1), whole > 5):
            assert data.tokens[key].tolist() == whole[key].tolist()
        with pytest.raises(IndexError, match="a mask of shape"):
            data.tokens[whole[1:] > 5]
        places = np.array([[0, -1], [len(IDS), 2 * len(IDS)]])
        assert data.tokens[places].tolist() == whole[places].tolist()
        assert data.tokens[-2] == whole[-2]
        assert (data.tokens.min(), data.tokens.max()) == (whole.min(), whole.max())
        assert np.asarray(data.tokens).tolist() == whole.tolist()
    assert len({data.digest for data in opened}) == 1
    assert TokenDataset.open(names[::-1]).digest != opened[0].digest
    assert TokenDataset.open(names[:1]).digest == TokenDataset.open(names[0]).digest
    for limit in (1, len(IDS), len(IDS) + 3, len(whole) - 1):
        cut = opened[0].limit(limit)
        assert cut.tokens[:].tolist() == whole[:limit].tolist()
        assert sum(shard.num_tokens for shard in cut.shards) == limit
    assert opened[0].verify()
    assert opened[0].modified_ns == max(name.stat().st_mtime_ns for name in names)


def test_more_files_than_a_process_may_open_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(12):
        np.save(tmp_path / f"{i}.npy", np.arange(3, dtype=np.uint16))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = {int(name) for name in os.listdir("/proc/self/fd")}
    low = next(limit for limit in itertools.count() if len({*range(limit)} - taken) == 6)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (low, hard))
        with monkeypatch.context() as patched:
            patched.setattr(resource, "setrlimit", lambda *limits: None)
            with pytest.raises(DataError, match=r"\.npy: can't be read \(Too many open files\); raise the limit"):
                TokenDataset.open(tmp_path)
        data = TokenDataset.open(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert data.tokens[:].tolist() == [0, 1, 2] * 12


def test_documents_of_many_files_are_one_after_the_other(tmp_path: Path) -> None:
    lengths = [[3, 0, 2], [], [4]]
    for i, each in enumerate(lengths):
        with DatasetWriter(tmp_path / f"d{i}", vocab_size=9, eos_id=0, tokenizer_digest="t") as writer:
            writer.write(np.full(sum(each), i), np.array(each, np.int64), 10)
    data = TokenDataset.open(tmp_path)
    assert data.document_ends is not None
    assert data.document_ends.tolist() == [3, 3, 5, 9]
    assert (data.num_bytes, data.max_id, data.eos_id, data.tokenizer_digest) == (30, 2, 0, "t")
    assert data.limit(6).tokens[:].tolist() == [0] * 5
    (tmp_path / "d0.bin").write_bytes(b"\1" * 10)
    with pytest.raises(DataError, match=r"d0\.bin: is damaged: block 0"):
        data.verify()


def test_files_that_make_no_one_corpus(tmp_path: Path) -> None:
    def own(name: str, tokenizer: str = "t", vocab: int = 9) -> Path:
        with DatasetWriter(tmp_path / name, vocab_size=vocab, eos_id=0, tokenizer_digest=tokenizer) as writer:
            writer.write(np.ones(5, int), np.array([5]), 5)
        return tmp_path / name

    a, b, wide = own("in/a"), own("other/b", tokenizer="u"), own("wide/c", vocab=70_000)
    own("in/a.heldout")
    ids, link = tmp_path / "linked" / "a.npy", tmp_path / "linked" / "b.npy"
    ids.parent.mkdir()
    np.save(ids, np.ones(5, np.uint16))
    link.symlink_to(ids)
    (tmp_path / "empty").mkdir()
    (tmp_path / "hard").mkdir()
    (tmp_path / "hard" / "a.npy").hardlink_to(ids)
    (tmp_path / "hard" / "b.npy").hardlink_to(ids)
    own("stem/a")
    np.save(tmp_path / "stem" / "a.npy", np.ones(5, np.uint16))
    for given, message in (
        ("", r"prefix: '' is invalid: name a token dataset, or several; \. is"),
        ([], r"prefix: \[\] is invalid: name a token dataset"),
        (b"a", r"prefix: b'a' is invalid: name a token dataset"),
        (None, "prefix: None is invalid: name a token dataset"),
        (tmp_path / "hard", "hard: names a file twice, maybe by a link"),
        (tmp_path / "stem", r"stem: holds both a\.bin and a\.npy, maybe the same ids twice; name the files"),
        (tmp_path / "in", r"in: holds a.heldout, which looks held out, beside other text; name the files"),
        (tmp_path / "empty", r"empty: holds no token files \(.bin, .npy, .ds\)"),
        (tmp_path / "in" / "x*", r"x\*: holds no token files"),
        ([a, b], r"other/b has tokenizer_digest u, .*in/a t; prepare both in the same way"),
        ([a, wide], r"wide/c has dtype uint32, .*in/a uint16"),
        ([a, Path(f"{a}.bin")], "names a file twice"),
        (ids.parent, "linked: names a file twice, maybe by a link"),
        ([a, tmp_path / "none"], "no token dataset at .*none"),
    ):
        with pytest.raises(DataError, match=message):
            TokenDataset.open(given)


def test_what_a_folder_holds_besides_token_files_is_counted_and_named(tmp_path: Path) -> None:
    write_llmc(tmp_path / "t_0.bin", IDS)
    write_megatron(tmp_path / "m", DOCUMENTS)
    for name in ("t_1.bin.gz", "t_2.bin.part", ".t_3.bin", "t_4.idx", "t_0.json", "m.json", ".m.lock"):
        (tmp_path / name).touch()
    (tmp_path / "sub").mkdir()
    (tmp_path / "t_5.bin").symlink_to(tmp_path / "nothing")
    others = r"6 × not a token file \(\.t_3\.bin, sub, t_1\.bin\.gz, t_2\.bin\.part, t_4\.idx, …\)"
    with pytest.warns(SptWarning, match=f"ignored {others}"):
        shards._matching(tmp_path)
    with pytest.warns(SptWarning, match=r"ignored 4 × not a token file \(t_1\.bin\.gz, "):
        TokenDataset.open(tmp_path / "t_*")


def test_a_folder_of_the_same_name_does_not_hide_the_file(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    write_llmc(tmp_path / "d.bin", IDS)
    assert TokenDataset.open(tmp_path / "d").tokens.tolist() == IDS


def test_the_digest_follows_size_header_ids_and_documents(tmp_path: Path) -> None:
    digests = set()
    for documents in (DOCUMENTS, [[[1, 2, 3, 4]], [[5, 6]], [[100]]], [[[1, 2, 3]], [[4], [5, 6]], [[101]]]):
        write_megatron(tmp_path / "d", documents)
        digests.add(TokenDataset.open(tmp_path / "d").digest)
        write_megatron(tmp_path / "copy", documents)
        assert TokenDataset.open(tmp_path / "copy").digest in digests
    assert len(digests) == 3


def test_the_sampled_digest_reads_all_of_a_small_file_and_64_stretches_of_a_large_one(tmp_path: Path) -> None:
    ids = np.zeros(4 << 20, "<u2")  # 8 MiB: a stretch of 64 KiB about every 129 KiB
    ids.tofile(tmp_path / "d.bin")
    whole = formats.sampled_digest(tmp_path / "d.bin")
    noticed = 0
    for place in range(0, len(ids), 1 << 14):  # every 32 KiB
        ids[place] = 1
        ids.tofile(tmp_path / "d.bin")
        noticed += formats.sampled_digest(tmp_path / "d.bin") != whole
        ids[place] = 0
    assert noticed == pytest.approx(128, abs=4)
    for place in (0, len(ids) - 1):
        ids[place] = 1
        ids.tofile(tmp_path / "d.bin")
        assert formats.sampled_digest(tmp_path / "d.bin") != whole
        ids[place] = 0
    small = ids[: 2 << 20]
    small.tofile(tmp_path / "d.bin")
    whole = formats.sampled_digest(tmp_path / "d.bin")
    for place in range(5, len(small), 1 << 17):
        small[place] = 1
        small.tofile(tmp_path / "d.bin")
        assert formats.sampled_digest(tmp_path / "d.bin") != whole
        small[place] = 0


def test_the_sampled_digest_tells_sizes_apart(tmp_path: Path) -> None:
    (tmp_path / "d.bin").touch()
    digests = set()
    for size in (8 << 20, 9 << 20):  # all zeros: the samples are the same
        os.truncate(tmp_path / "d.bin", size)
        digests.add(formats.sampled_digest(tmp_path / "d.bin"))
    assert len(digests) == 2


def test_verify_passes_where_no_hashes_are_recorded(tmp_path: Path) -> None:
    write_llmc(tmp_path / "d.bin", IDS)
    TokenDataset.open(tmp_path / "d").verify()
