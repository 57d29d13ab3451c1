from __future__ import annotations

import base64
import itertools
import json
import random
import re
import sys
import sysconfig
import time
import unicodedata
from pathlib import Path

import pytest
import tiktoken
import tiktoken.load
import tiktoken_ext.openai_public
from hypothesis import given, settings
from hypothesis import strategies as st

from spt_fast.data import base_tokenizer
from spt_fast.data import tokenizer as module
from spt_fast.data.tokenizer import EOS, PATTERN, Tokenizer, train_tokenizer
from spt_fast.errors import DataError, TooFewPieces

VOCAB_SIZE = 700
SOURCES = [Path(sysconfig.get_path("stdlib")) / f"{name}.py" for name in ("argparse", "typing", "decimal", "tarfile")]
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=80)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """t.tiktoken, trained on text.jsonl."""
    folder = tmp_path_factory.mktemp("tokenizer")
    extra = [
        "It's naïve — 日本語の文、ここまで。" * 20,
        "a\n\n\tb  c 1234 567\r\n" * 20,
        "😀👍🏽 été" * 20,
        "000 00 1000 " * 50,
    ]
    documents = [path.read_text() for path in SOURCES] + extra
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    train_tokenizer(folder / "text.jsonl", VOCAB_SIZE, folder / "t.tiktoken")
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder / "t.tiktoken")


def named(name: str, ranks: dict[bytes, int]) -> Tokenizer:
    """A tiktoken encoding with its own pattern and special tokens but, lacking a network, with our ranks."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(tiktoken_ext.openai_public, "load_tiktoken_bpe", lambda *_, **__: ranks)
        monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
        return Tokenizer.load(name)


@pytest.fixture(scope="module")
def patterns(tokenizer: Tokenizer) -> dict[str, Tokenizer]:
    """The same ranks under every known pattern."""
    return {
        "ours": tokenizer,
        "gpt2": Tokenizer(tokenizer.ranks, tiktoken_ext.openai_public.r50k_pat_str, tokenizer.special_tokens),
        "cl100k_base": named("cl100k_base", tokenizer.ranks),
        "o200k_base": named("o200k_base", tokenizer.ranks),
    }


def test_training_gives_tiktoken_ranks_of_the_size_asked(folder: Path, tokenizer: Tokenizer) -> None:
    ranks = tiktoken.load.load_tiktoken_bpe(str(folder / "t.tiktoken"))
    assert ranks == tokenizer.ranks
    assert sorted(ranks.values()) == list(range(VOCAB_SIZE - 1))
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (VOCAB_SIZE, VOCAB_SIZE - 1)
    text = SOURCES[0].read_text()
    own = tiktoken.Encoding("own", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={}).encode_ordinary(text)
    assert tokenizer.encode(text) == own
    assert len(own) < len(text) / 2
    assert list(folder.glob("*.tmp")) == []


@given(ANY_TEXT)
@settings(max_examples=200)
def test_decode_undoes_encode(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.eos_id for i in ids)
    assert tokenizer.encode_array(text).tolist() == ids


def test_special_tokens_in_text_are_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(f"a{EOS}b")
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode(ids) == f"a{EOS}b" == tokenizer.decode([97, tokenizer.eos_id, 98])


def test_training_is_deterministic_and_reads_a_fair_bounded_sample(tmp_path: Path) -> None:
    for name, word in (("a", "alpha"), ("b", "beta"), ("c", "gamma")):
        line = json.dumps({"text": f"{word} " * 50}) + "\n"
        (tmp_path / f"{name}.jsonl").write_text(line * (3 if name == "b" else 1000))
    inputs = [tmp_path / "c.jsonl", tmp_path]
    sample = list(module._sample(inputs, "text", False, 40_000))
    num_bytes = {word: sum(len(text) for text in sample if word in text) for word in ("alpha", "beta", "gamma")}
    assert num_bytes["beta"] == 3 * 5 * 50
    assert 40_000 <= sum(num_bytes.values()) < 41_000
    assert num_bytes["gamma"] == pytest.approx(2 * num_bytes["alpha"], rel=0.05)  # it was given twice
    first = train_tokenizer(inputs, 262, tmp_path / "1", sample_bytes=40_000)
    again = train_tokenizer(inputs, 262, tmp_path / "2", sample_bytes=40_000)
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    assert first.digest == again.digest


def test_what_training_refuses(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for vocab_size, error, message in (
        (256, DataError, "vocab_size: 256 is invalid: at least 257"),
        (10**12, DataError, r"vocab_size: 1000000000000 is invalid: at least 257 .* and at most 16,777,216"),
        (100_000, TooFewPieces, "is invalid: this text yields at most"),
    ):
        with pytest.raises(error, match=message):
            train_tokenizer(folder / "text.jsonl", vocab_size, tmp_path / "t")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": 3}\n')
    with pytest.raises(DataError, match=r"bad.jsonl:2: 'text' is int"):
        train_tokenizer(tmp_path / "bad.jsonl", 257, tmp_path / "t")
    with pytest.raises(DataError, match="can't be written"):
        train_tokenizer(folder / "text.jsonl", 300, tmp_path / "bad.jsonl" / "t")
    monkeypatch.setitem(sys.modules, "rustbpe", None)
    with pytest.raises(DataError, match="pip install rustbpe"):
        train_tokenizer(folder / "text.jsonl", 300, tmp_path / "t")
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]


@given(
    st.lists(
        st.sampled_from(["word", "Don't", "we'LL", "42", "3.14", ",", ".", " ", "\n", "  ", "日本", "é", "…", "(", "_"])
    )
)
@settings(max_examples=150)
def test_pieces_of_long_text_give_the_same_ids(patterns: dict[str, Tokenizer], parts: list[str]) -> None:
    text = "".join(parts)
    whole = {name: each.encode(text) for name, each in patterns.items()}
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(base_tokenizer, "PIECE_CHARS", 16)
        pieces = list(base_tokenizer.pieces(text))
        assert "".join(pieces) == text
        assert all(len(piece) <= 16 for piece in pieces)
        ends = itertools.accumulate(map(len, pieces[:-1]))
        if all(base_tokenizer.CUT.match(text, end - 1) for end in ends):  # none was cut anyhow
            assert {name: each.encode(text) for name, each in patterns.items()} == whole


@pytest.mark.parametrize(
    "text", [" " * 1_000_000 + "x", "\n" * 1_000_000, "a" * 1_000_000, "字" * 300_000, ".-" * 400_000]
)
def test_endless_runs(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode_array(text)
    assert tokenizer.decode(ids.tolist()) == text


def test_long_text_is_the_same_as_short_text(tokenizer: Tokenizer) -> None:
    text = SOURCES[1].read_text() * 3
    assert len(text) > 3 * base_tokenizer.PIECE_CHARS
    assert len(list(base_tokenizer.pieces(text))) >= 4
    own = tiktoken.Encoding("own", pat_str=PATTERN, mergeable_ranks=tokenizer.ranks, special_tokens={})
    assert tokenizer.encode(text) == own.encode_ordinary(text)


def test_what_coding_refuses(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="half a surrogate pair at character 1"):
        tokenizer.encode("a\ud83d")
    for bad in (VOCAB_SIZE, -1, 1 << 40):
        with pytest.raises(DataError, match=f"^{bad}: not an id of this tokenizer, which has {VOCAB_SIZE}"):
            tokenizer.decode([97, bad])


def test_encodings_by_name(tokenizer: Tokenizer, tmp_path: Path) -> None:
    gpt4 = named("cl100k_base", tokenizer.ranks)
    assert (gpt4.eos_id, gpt4.vocab_size) == (100257, 100277)
    untrained = [*gpt4.encode("é"), 100_261, 100_275, *gpt4.encode("b"), 100_257]  # two ids that no token has
    assert gpt4.decode(untrained) == "é\ufffd\ufffdb<|endoftext|>"
    gpt4.save(tmp_path / "copy.tiktoken")
    copy = Tokenizer.load(tmp_path / "copy.tiktoken")
    text = "It's 12345\n\n\tnaïve   日本語 " + SOURCES[0].read_text()
    assert (copy.digest, copy.eos_id, copy.vocab_size) == (gpt4.digest, 100257, 100277)
    assert copy.encode(text) == gpt4.encode(text)
    assert copy.pattern == gpt4.pattern != PATTERN
    harmony = named("o200k_harmony", tokenizer.ranks)  # has <|endofprompt|> a second time, as <|reserved_200018|>
    assert (harmony.special_tokens["<|endofprompt|>"], harmony.vocab_size) == (200_018, 201_088)
    harmony.set_ends("<|return|>", None)
    harmony.save_hf(tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["eos_token"] == "<|return|>"
    assert Tokenizer.load(tmp_path).digest == Tokenizer.from_bytes(harmony.to_bytes()).digest == harmony.digest


def test_digests_tell_tokenizers_apart(tokenizer: Tokenizer) -> None:
    fewer = {token: rank for token, rank in tokenizer.ranks.items() if rank < 500}
    swapped = tokenizer.ranks | {b"a": tokenizer.ranks[b"b"], b"b": tokenizer.ranks[b"a"]}
    others = [
        Tokenizer(fewer, PATTERN, {EOS: 500}),
        Tokenizer(swapped, PATTERN, tokenizer.special_tokens),
        Tokenizer(tokenizer.ranks, r"\s+|\S+", tokenizer.special_tokens),
        Tokenizer(tokenizer.ranks, PATTERN, {EOS: VOCAB_SIZE}),
    ]
    assert len({tokenizer.digest, *(other.digest for other in others)}) == 5
    assert Tokenizer.from_bytes(tokenizer.to_bytes()).digest == tokenizer.digest


def test_encodings_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"'gpt-2' is invalid: .* or a tiktoken encoding; did you mean 'gpt2'"):
        Tokenizer.load("gpt-2")

    def offline(name: str) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    remedy = r"'gpt2' isn't in tiktoken's cache and can't be downloaded \({}\).*TIKTOKEN_CACHE_DIR.*tokenizer train"
    with pytest.raises(DataError, match=remedy.format("ConnectionError")):
        Tokenizer.load("gpt2")
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: time.sleep(5))
    monkeypatch.setattr(module, "_DOWNLOAD_S", 0.1)
    with pytest.raises(DataError, match=remedy.format("no answer in 0 s")):
        Tokenizer.load("gpt2")


def test_damaged_files(tokenizer: Tokenizer, tmp_path: Path) -> None:
    good = tokenizer.to_bytes()
    lines = good.splitlines(keepends=True)
    copy = Tokenizer(tokenizer.ranks, r"\s+|\S+", {EOS: 5000}).to_bytes()
    damaged = {
        "empty": b"",
        "cut off": good[:-3],
        "first line lost": b"".join(lines[1:]),
        "middle line lost": b"".join(lines[:400] + lines[401:]),
        "line twice": good + lines[-1],
        "token twice": good + lines[300].split()[0] + b" %d\n" % len(lines),
        "bit flipped": b"!" + good[1:],
        "not base64": b"".join(lines[:300]) + b"\xff" + b"".join(lines[300:]),
        "no rank": good + b"YWJjZA==\n",
        "text": b"just some text\n",
        "head cut": copy[10:],
        "head without pattern": copy.replace(b'"pattern"', b'"patter"'),
        "head broken": copy.replace(b"}", b"", 1),
        "head nested": b"#" + b"[" * 100_000 + b"\n" + good,
        "no regex": copy.replace(b"S+", b"S+["),
        "huge id": copy.replace(b"5000", b"2147483648"),
    }
    for name, data in damaged.items():
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(DataError, match=f"{name}: is damaged, or not a file of tiktoken ranks"):
            Tokenizer.load(path)
    for missing, where in ((tmp_path / "none", ""), ("none.tiktoken", re.escape(f" in {Path.cwd()}"))):
        with pytest.raises(DataError, match=rf"none.*doesn't exist{where}; create one"):
            Tokenizer.load(missing)


def varied_texts() -> list[str]:
    rng = random.Random(0)
    words = [*"aabcAB 0129 \n\t\r'sSlLdD.,!?-_/()字日ñéßſİıﬀ😀👍🏽\u0301\u200d\u00a0\u2003\u0085\u3000\x00\x0b\x1c٣²½Ⅷ"]
    words += ["'s", "'LL", "'ſ", "I've", " \n", "\r\n", "the ", " import", "ing", "    ", "self."]
    drawn = ["".join(rng.choice(words) for _ in range(rng.randrange(1, 60))) for _ in range(1500)]
    runs = [char * count for char in "a0. \n😀字=-" for count in (1, 2, 3, 5, 7, 10, 33, 100)]
    characters = map(chr, [*range(0xD800), *range(0xE000, 0x30000)])
    assigned = [char for char in characters if unicodedata.category(char) not in ("Cn", "Co", "Lo")]
    return [SOURCES[2].read_text()[:20_000], *drawn, *runs, *(f"a{char}b 1{char}2 '{char}" for char in assigned[::3])]


@pytest.mark.parametrize("name", ["ours", "gpt2", "cl100k_base", "o200k_base"])
def test_transformers_reads_the_same_tokenizer(patterns: dict[str, Tokenizer], tmp_path: Path, name: str) -> None:
    transformers = pytest.importorskip("transformers")
    own = patterns[name]
    own.save_hf(tmp_path / "hf")
    (tmp_path / "hf" / "config.json").write_text('{"model_type": "llama"}')
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert (theirs.eos_token, theirs.eos_token_id) == (EOS, own.eos_id)
    for text in varied_texts():
        ids = own.encode(text)
        assert theirs(text)["input_ids"] == ids, repr(text)
        assert theirs.decode(ids) == text
    cut = own.encode("日本")[:1]  # half a character
    assert theirs.decode(cut) == own.decode(cut)


def test_transformers_finds_tokens_that_merging_does_not(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokens = [*(bytes([byte]) for byte in range(256)), b"abcd", b"aa", b"aaa"]
    own = Tokenizer({token: rank for rank, token in enumerate(tokens)}, r"\s+$|\s|\S+", {EOS: len(tokens)})
    own.save_hf(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("abcd", "abcde", "aaaaa", "a  \nb  \n"):
        assert theirs(text)["input_ids"] == own.encode(text)
    assert own.encode("abcd") == [256]


def test_hugging_face_letters_are_those_of_byte_level_bpe(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save_hf(tmp_path)
    saved = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"]
    assert saved["Ġ"] == tokenizer.ranks[b" "]
    assert saved["Ċ"] == tokenizer.ranks[b"\n"]
    assert base64.b64encode(b"\n") + b" %d\n" % tokenizer.ranks[b"\n"] in tokenizer.to_bytes()


def test_a_pattern_must_cover_all_text_and_be_one_that_an_export_can_say(tmp_path: Path) -> None:
    ranks = b"".join(b"%b %d\n" % (base64.b64encode(bytes([byte])), byte) for byte in range(256))

    def file(pattern: str) -> Path:
        head = json.dumps({"pattern": pattern, "special_tokens": {EOS: 256}}).encode()
        (tmp_path / "t.tiktoken").write_bytes(b"#" + head + b"\n" + ranks)
        return tmp_path / "t.tiktoken"

    for lossy in ("x{5}", r"\p{L}+", r"\p{L}+|\s+", "."):
        with pytest.raises(DataError, match=r"t\.tiktoken: .*its pattern leaves text out"):
            Tokenizer.load(file(lossy))
    for empty in ("", "a*", r"\p{L}*|[\s\S]", "a|", r"\b|[\s\S]", r"(?=Q)|[\s\S]", r"(?<=9)|[\s\S]", r"[\s\S]\K"):
        with pytest.raises(DataError, match=r"t\.tiktoken: .*matches the empty string.*; fix it"):
            Tokenizer.load(file(empty))
    with pytest.raises(DataError, match="not a file of tiktoken ranks"):
        Tokenizer.load(file(r"[[:alpha:]]*|[\s\S]"))  # Python knows no such class, so the engine is asked, and panics
    with pytest.raises(DataError, match="Hugging Face's tokenizers cannot read its pattern"):
        Tokenizer.load(file(r"\p{Script=Han}+|[\s\S]"))
    assert Tokenizer.load(file(r"[\s\S]")).encode("añ") == [97, 195, 177]
    with_mark = tmp_path / "bom.tiktoken"
    with_mark.write_bytes(b"\xef\xbb\xbf" + ranks)
    assert Tokenizer.load(with_mark).digest == Tokenizer.from_bytes(ranks).digest
