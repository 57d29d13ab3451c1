"""Tokenizers of Hugging Face: their ids are those of the `tokenizers` library, whatever the text."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, normalizers, pre_tokenizers
from tokenizers.normalizers import NFC, NFKC, NFKD, BertNormalizer, Lowercase, Strip, StripAccents
from tokenizers.pre_tokenizers import BertPreTokenizer, Digits, Metaspace, Whitespace, WhitespaceSplit

from spt_fast.data import fast_bpe
from spt_fast.data.hf_tokenizer import HFTokenizer
from spt_fast.data.prepare import prepare
from spt_fast.data.shards import TokenDataset
from spt_fast.data.tokenizer import EOS, Tokenizer, rebuilt
from spt_fast.errors import DataError, SptWarning
from tests import hf_tokenizers
from tests.data.test_prepare import read, write_jsonl

KINDS = ("byte_level", "digits", "nfc", "byte_fallback", "unigram", "wordpiece")

NASTY = [
    *("", " ", "\n", "\0", "a\0b", "  leading", "trailing  ", "a\r\nb\r\rc\n\n\n d", "\t\t x", " \n \n", "\ufeff"),
    *("don't DON'T 'ſ 'LL we'Ll", "1234567890123 ١٢٣٤ ½²Ⅷ", "a1b22c333", "e\u0301 é \u1100\u1161\u11a8 각 ｆｕｌｌ"),
    *(
        "👩‍👩‍👧‍👦 \u200d\u200c\u200b",
        "日本語、中文。한국어",
        "\x85\u2028\u2029\u3000\u00a0\u202f\x1c\x0b",
        "ﬃ ǅ İı ß ẞ",
    ),
    *("".join(map(chr, range(0x250))), f"a{hf_tokenizers.EOS}b <tool>x{hf_tokenizers.BOS}", f"see {EOS} here"),
    *("[UNK] <unk> <0x41> ▁a▁▁b", "\U0001f600\U0010ffff\ue000\ufffd", "x" * 3000, " " * 3000, "1" * 3000, "ab " * 3000),
    *("\u0378\U000323af\U0001cc00\u1c89\ua7cb", "(a) [b] {c} <d> a_b-c/d\\e", "http://x.org/?q=1&r=%20#z"),
]


FEW = ((0, 0x300, 1),)
"""Of the characters that are tried: those tests that need no others have no time for them."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: hf_tokenizers.write(tmp_path_factory.mktemp("tokenizers") / kind, kind) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_the_tokenizers_library(folders: dict[str, Path], kind: str) -> None:
    own, library = Tokenizer.load(folders[kind]), tokenizers.Tokenizer.from_file(str(folders[kind] / "tokenizer.json"))
    again = rebuilt(own.to_bytes())
    for text in [*NASTY, *hf_tokenizers.TEXTS]:
        ids = library.encode(text, add_special_tokens=False).ids
        assert own.encode(text) == again.encode(text) == ids, repr(text)
        assert own.encode_array(text).dtype == np.uint32
    assert own.eos_id == library.token_to_id(hf_tokenizers.EOS)
    assert own.bos_id is None
    assert own.vocab_size == library.get_vocab_size()
    assert isinstance(own, HFTokenizer)
    own.bos_id = own.usual_bos_id
    begun = [library.token_to_id(hf_tokenizers.BOS), *own.encode("fox")]
    assert own.prompt("fox") == library.encode("fox").ids == begun
    assert own.decode([*own.encode("fox"), own.eos_id]).strip() == "fox"
    library.post_processor = tokenizers.processors.TemplateProcessing(
        "$A <|end|>", special_tokens=[("<|end|>", own.eos_id)]
    )
    assert HFTokenizer(library.to_str().encode()).usual_bos_id is None, "it ends texts and begins none"
    with pytest.raises(DataError, match="half a surrogate pair"):
        own.encode("a\ud800b")


def test_ids_are_those_of_the_library_by_any_normaliser_and_with_added_tokens_of_every_kind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fast_bpe, "_RANGES", FEW)
    added = [
        *(AddedToken("<left>", lstrip=True), AddedToken("<right>", rstrip=True), AddedToken("word", single_word=True)),
        *(AddedToken("Fox", normalized=True), AddedToken("\u00e9\u00c9", normalized=False, lstrip=True, rstrip=True)),
    ]
    around = (
        "a <left> b <right> c word words sword, \u00e9\u00c9 e\u0301E\u0301\n Fox  fox <LEFT>\t<left>\n<right>\n word"
    )
    for kind, normalizer, cut in (
        ("unigram", (NFKC(), Lowercase()), (Digits(individual_digits=True), Metaspace())),
        ("unigram", (NFKD(), StripAccents(), Strip()), (WhitespaceSplit(), Metaspace(prepend_scheme="first"))),
        ("wordpiece", (NFKC(), BertNormalizer(strip_accents=True)), (BertPreTokenizer(), Digits())),
        ("wordpiece", (BertNormalizer(lowercase=False, handle_chinese_chars=False),), (Whitespace(),)),
        ("byte_fallback", (NFKC(), Lowercase()), (Digits(),)),
        ("nfc", (NFC(),), None),
        ("byte_level", (), None),
    ):
        library = hf_tokenizers.build(kind)
        library.normalizer = normalizers.Sequence([*normalizer])
        if cut:
            library.pre_tokenizer = pre_tokenizers.Sequence([*cut])
        library.add_tokens(added)
        own = HFTokenizer(library.to_str().encode())
        proven = own.prove(hf_tokenizers.TEXTS)
        assert proven == (kind == "byte_level"), kind
        for text in [*NASTY, *hf_tokenizers.TEXTS, around, around.upper()]:
            ids = library.encode(text, add_special_tokens=False).ids
            assert own.encode(text) == rebuilt(own.to_bytes()).encode(text) == ids, (kind, normalizer, text)
        assert library.token_to_id("<left>") in own.encode(around)


def test_prepare_warns_of_an_end_for_which_the_model_beside_the_tokenizer_has_no_row(tmp_path: Path) -> None:
    inputs, folder = write_jsonl(tmp_path / "a.jsonl", ["some text"]), hf_tokenizers.write(tmp_path / "base")
    own = Tokenizer.load(folder)
    end, begin, tool = (own.named_tokens()[name] for name in (hf_tokenizers.EOS, hf_tokenizers.BOS, "<tool>"))

    def said(rows: object, **ends: str) -> list[str]:
        (folder / "config.json").write_text(json.dumps({"vocab_size": rows}))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            prepare(inputs, tmp_path / "d", folder, workers=1, progress=False, **ends)
        parts = r"tokenizer: (\S+), which (\w+) .* is id (\d+), .* (\d+) ids .*`(\w+)`"
        found = (re.match(parts, str(one.message)) for one in caught)
        return [" ".join(one.groups()) for one in found if one]

    assert begin == end + 1 == tool - 1
    assert said(end) == [f"'<|end|>' ends {end} {end} eos"]
    assert said(end, bos=hf_tokenizers.BOS)[1:] == [f"'<|begin|>' begins {begin} {end} bos"]
    assert said(tool, eos="<tool>") == [f"'<tool>' ends {tool} {tool} eos"]
    assert said(end + 1) == said("many") == said(None) == []


def test_prepare_begins_and_ends_documents_by_the_tokens_named(folders: dict[str, Path], tmp_path: Path) -> None:
    texts = [text for text in NASTY if text]
    inputs, folder = write_jsonl(tmp_path / "a.jsonl", texts), folders["byte_level"]
    with pytest.warns(SptWarning) as said:
        prepare(inputs, tmp_path / "d", folder, workers=2, progress=False)
    words = ("begins every text with '<|begin|>'", "1 document holds the token that ends documents in their text")
    assert len(said) == 2
    assert all(part in str(one.message) for part, one in zip(words, said, strict=True))
    own = Tokenizer.load(folder)
    assert read(tmp_path / "d") == [[*own.encode(text), own.eos_id] for text in texts]
    data = TokenDataset.open(tmp_path / "d")
    assert (data.tokenizer_digest, data.eos_id, data.bos_id) == (own.digest, own.eos_id, None)
    assert "bos_id" not in (data.metadata or {})
    with pytest.warns(SptWarning, match="1 document holds") as said:
        prepare(inputs, tmp_path / "e", folder / "tokenizer.json", eos="<tool>", bos=hf_tokenizers.BOS, progress=False)
    assert len(said) == 1, "a token that begins documents is named"
    tool, begin = (own.named_tokens()[name] for name in ("<tool>", hf_tokenizers.BOS))
    assert read(tmp_path / "e") == [[begin, *own.encode(text), tool] for text in texts]
    data = TokenDataset.open(tmp_path / "e")
    assert (data.tokenizer_digest, data.eos_id, data.bos_id) == (own.digest, tool, begin)
    with pytest.raises(DataError, match=r"has eos_id .*; prepare both in the same way"):
        TokenDataset.open([tmp_path / "d", tmp_path / "e"])  # type: ignore[arg-type]
    for ends, message in (
        ({"eos": "<|nd|>"}, r"eos: '<\|nd\|>' is invalid: .*did you mean '<\|end\|>'"),
        ({"bos": ""}, "bos: ''"),
    ):
        with pytest.raises(DataError, match=message):
            prepare(inputs, tmp_path / "f", folder, progress=False, **ends)
    (folder / "tokenizer_config.json").rename(folder / "kept")
    try:
        with pytest.raises(DataError, match=r"tokenizer: names no token that ends a text; .*`eos=…`"):
            prepare(inputs, tmp_path / "f", folder, progress=False)
        for name, stated, eos in (
            ("config.json", {"eos_token_id": 7}, 7),
            ("generation_config.json", {"eos_token_id": [8, 9]}, 8),
            ("special_tokens_map.json", {"eos_token": {"content": "<tool>"}}, tool),
        ):
            (folder / name).write_text(json.dumps(stated))
            assert Tokenizer.load(folder).eos_id == eos
        (folder / "special_tokens_map.json").write_text('{"eos_token": "gone"}')
        with pytest.raises(DataError, match=r"special_tokens_map.json: eos_token: 'gone' is invalid"):
            Tokenizer.load(folder)
        assert Tokenizer.load(folder, eos="<tool>").eos_id == tool
        (folder / "special_tokens_map.json").write_text("version https://git-lfs.github.com/spec/v1\n")
        with pytest.raises(DataError, match=r"special_tokens_map.json: cannot be read as JSON .*; .*git lfs pull"):
            Tokenizer.load(folder)
    finally:
        (folder / "kept").rename(folder / "tokenizer_config.json")


def test_digests_are_of_what_decides_ids(folders: dict[str, Path], tmp_path: Path) -> None:
    content = json.loads((folders["byte_level"] / "tokenizer.json").read_text())
    digest = Tokenizer.load(folders["byte_level"]).digest

    def digest_of(**changes: object) -> str:
        (tmp_path / "tokenizer.json").write_text(json.dumps(content | changes, indent=3))
        return Tokenizer.load(tmp_path).digest

    model = {key: value for key, value in content["model"].items() if value not in (None, False)}
    old = model | {"merges": [" ".join(pair) for pair in model["merges"]]}
    assert digest_of() == digest_of(model=old, decoder=None, post_processor=None, version="1.0") == digest
    for changes in (
        {"added_tokens": content["added_tokens"][:-1]},
        {"normalizer": {"type": "NFC"}},
        {"model": model | {"ignore_merges": True}},
        {"model": model | {"merges": model["merges"][:-1]}},
    ):
        assert digest_of(**changes) != digest
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    words = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first"}
    accents = {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "lowercase": True}
    for field, unsaid, said, other in (
        ("pre_tokenizer", bytes_, {"use_regex": True}, {"use_regex": False}),
        ("pre_tokenizer", words, {"split": True}, {"split": False}),
        ("normalizer", accents, {"strip_accents": None}, {"strip_accents": False}),
    ):
        digests = [digest_of(**{field: unsaid | one}) for one in (said, other)]
        assert digests[0] != digests[1]
        assert field == "normalizer" or digests[0] == digest_of(**{field: unsaid})
    letters = {"vocab": {"a": 0, "<unk>": 1}, "unk_token": "<unk>"}
    both = [digest_of(model=letters | kind, added_tokens=[]) for kind in ({"type": "WordLevel"}, {"merges": []})]
    assert both[0] != both[1], "words, or parts of words"
    limits = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    assert digest_of(truncation=limits) == digest
    assert len(Tokenizer.load(tmp_path).encode("a b c d e f g h i j")) > 5, "no text is left out"


def test_what_a_tokenizer_that_cannot_be_used_is_answered(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "slow").mkdir()
    (tmp_path / "cache" / "snapshots" / "1").mkdir(parents=True)
    (tmp_path / "slow" / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")
    convert = (
        r"slow/tokenizer.model belongs to a slow tokenizer, .*AutoTokenizer.from_pretrained\('.*slow'\).save_pretrained"
    )
    for path, message in (
        (tmp_path / "slow", convert),
        (tmp_path / "slow" / "tokenizer.model", convert),
        (tmp_path, "holds no tokenizer.json; name a folder"),
        (tmp_path / "cache", "holds no tokenizer.json; give the folder .*cache/snapshots/1"),
        ("Qwen/Qwen2.5-0.5B", "no folder Qwen/Qwen2.5-0.5B here.*hf download Qwen/Qwen2.5-0.5B --local-dir"),
    ):
        with pytest.raises(DataError, match=f"tokenizer: .*{message}"):
            Tokenizer.load(path)
    content = json.loads((folders["byte_level"] / "tokenizer.json").read_text())
    for damage, message in (
        ("{}", "damaged, or not a Hugging Face tokenizer.json"),
        (json.dumps(content)[:-9], "damaged"),
        (json.dumps(content | {"model": {"type": "BPE"}}), "damaged"),
        (json.dumps(content | {"model": content["model"] | {"continuing_subword_prefix": "long##"}}), "shorter than"),
        (json.dumps(content | {"post_processor": content["post_processor"] | {"special_tokens": {}}}), "damaged"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull"),
        (json.dumps(content | {"model": content["model"] | {"dropout": 0.1}}), "makes ids random"),
    ):
        (tmp_path / "slow" / "tokenizer.json").write_text(damage)
        with pytest.raises(DataError, match=rf"tokenizer\.json: .*{message}"):
            Tokenizer.load(tmp_path / "slow")
    assert isinstance(Tokenizer.load(folders["unigram"]), HFTokenizer)
    words = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "<unk>"}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": words, "added_tokens": []}))
    assert Tokenizer.load(tmp_path).encode("a") == [0]
    with pytest.raises(DataError, match=r"text cannot be encoded \(.*\); give tokenizer\.json a token for unknown"):
        Tokenizer.load(tmp_path).encode("b")


@pytest.mark.parametrize("kind", KINDS)
def test_the_fast_way_gives_the_same_ids_or_is_not_taken(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    if kind != "nfc":
        monkeypatch.setattr(fast_bpe, "_RANGES", FEW)
    own, library = Tokenizer.load(folders[kind]), tokenizers.Tokenizer.from_file(str(folders[kind] / "tokenizer.json"))
    assert isinstance(own, HFTokenizer)
    assert own.prove(hf_tokenizers.TEXTS) == (kind in ("byte_level", "digits", "nfc"))
    again = rebuilt(own.to_bytes())
    assert "_theirs" not in vars(again), "a worker loads it where it must"
    long = "The fox, naïve. " * 7_000
    for text in [*NASTY, *hf_tokenizers.TEXTS, long, " " * 101_000]:
        ids = library.encode(text, add_special_tokens=False).ids
        assert own.encode(text) == again.encode(text) == ids, repr(text)
    for each in (own, again):
        with pytest.raises(DataError, match="half a surrogate pair at character 2"):
            each.encode("é \ud800b")
    with pytest.raises(DataError, match="half a surrogate pair at character 1"):
        own.encode("a\ud800b")
    assert (again.digest, again.vocab_size, again.named_tokens()) == (own.digest, own.vocab_size, own.named_tokens())


def test_what_could_give_other_ids_is_left_to_hugging_face(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = json.loads((folders["byte_level"] / "tokenizer.json").read_text())
    model = content["model"]
    monkeypatch.setattr(fast_bpe, "_RANGES", FEW)
    texts = [*NASTY, *hf_tokenizers.TEXTS]

    def proven(**changes: object) -> bool:
        (tmp_path / "tokenizer.json").write_text(json.dumps(content | {"model": model | changes}))
        own = Tokenizer.load(tmp_path)
        assert isinstance(own, HFTokenizer)
        taken = own.prove(texts[:1])
        library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        for text in texts:
            assert own.encode(text) == library.encode(text, add_special_tokens=False).ids, repr(text)
        return taken

    merges = model["merges"]
    assert proven()
    assert proven(merges=merges[:-5]), "five tokens are never made"
    assert not proven(merges=merges[:-5], ignore_merges=True), "they are where they are whole words"
    assert not proven(merges=merges[::-1]), "another order"
    swapped = {name: {300: 301, 301: 300}.get(id_, id_) for name, id_ in model["vocab"].items()}
    assert not proven(vocab=swapped), "an order of ids that isn't that of the merges"
    assert not proven(vocab={name: id_ for name, id_ in model["vocab"].items() if name != "A"})
    assert not proven(continuing_subword_prefix="##", merges=merges[:1])
    with monkeypatch.context() as patch:
        patch.setattr(fast_bpe, "_pattern", lambda _: r"\p{L}+|[^\p{L}]+")
        assert not proven(), "cut elsewhere"
        patch.setattr(fast_bpe, "_pattern", lambda _: r"(?<x")
        assert not proven(), "no pattern"
    for pattern in (r"\w+|\s+", hf_tokenizers.LLAMA3.replace("{1,3}", "{1,2}")):
        content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = pattern
        proven()


def test_prepare_takes_the_fast_way_after_a_sample(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [text for text in NASTY if text and hf_tokenizers.EOS not in text]
    monkeypatch.setattr(fast_bpe, "_RANGES", FEW)
    inputs = write_jsonl(tmp_path / "a.jsonl", texts)
    prepare(inputs, tmp_path / "slow", folders["nfc"], workers=1, progress=False, bos=hf_tokenizers.BOS)
    sent: list[bytes] = []
    to_bytes = HFTokenizer.to_bytes
    monkeypatch.setattr(HFTokenizer, "to_bytes", lambda self: sent.append(to_bytes(self)) or sent[-1])
    monkeypatch.setattr("spt_fast.data.prepare.ENOUGH_BYTES", 2000)
    prepare(inputs, tmp_path / "fast", folders["nfc"], workers=1, progress=False, bos=hf_tokenizers.BOS)
    assert rebuilt(sent[0])._fast is not None
    assert read(tmp_path / "fast") == read(tmp_path / "slow")
    inputs.write_text(inputs.read_text() + '{"text": 3}\n')
    with pytest.raises(DataError, match=rf"a.jsonl:{len(texts) + 1}: "):
        prepare(inputs, tmp_path / "fast", folders["nfc"], workers=1, progress=False, bos=hf_tokenizers.BOS)
