"""Hugging Face's byte-level BPE with tiktoken's engine: five times the speed, the same ids.

Hugging Face merges a pair of tokens by its position in the list of merges; tiktoken merges any pair whose bytes are a
token, by the id of that token. Both take the best pair first and the leftmost among equals, so they agree if

- ids rise along the list of merges, and
- every token results from its own bytes by the merges alone. Then no pair outside the list ever makes a token: until
  two adjacent tokens together are t, all merges were inside the bytes of t, as when t is encoded alone; there the last
  merge, which makes t, is in the list. A token that the merges don't produce never occurs, and is left out here, unless
  `ignore_merges` looks whole words up: then all its pairs must be in the list.

The two regular-expression engines may still differ, with their own tables of characters. So both are compared on some
of the text to come and on characters from all of Unicode. Text that contains an added token is left to Hugging Face,
and so is long text without a place to cut.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import tiktoken

from spt_fast.data.base_tokenizer import PIECE_CHARS, byte_letters, encode_ordinary, pieces

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
GPT2_AFTER_DIGITS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
"""`GPT2` for each of the parts that remain when every digit is split off."""


_RANGES = ((0, 0x3400, 1), (0x9FF0, 0xAC10, 1), (0xD7A0, 0xD800, 1), (0xF900, 0x10000, 1), (0x10000, 0x20000, 3))
"""Characters to compare on: the first plane except ideographs, Hangul and private ones, and a third of the next."""
SAMPLE_PIECE_CHARS = 200
"""Pieces of a sample are shorter than in use, so that cuts are compared too."""


@dataclass(frozen=True)
class FastBPE:
    """ranks: {bytes of a token: its id}. nfc: whether text is normalised. marks: added tokens by first character."""

    pattern: str
    nfc: bool
    marks: dict[str, list[str]]
    ranks: dict[bytes, int] = field(repr=False)

    @cached_property
    def _encoding(self) -> tiktoken.Encoding:
        return tiktoken.Encoding("fast", pat_str=self.pattern, mergeable_ranks=self.ranks, special_tokens={})

    @cached_property
    def _normalizer(self) -> Any:
        import tokenizers

        return tokenizers.normalizers.NFC()

    def encode(self, text: str, piece_chars: int = PIECE_CHARS) -> np.ndarray | None:
        """Ids of a text, uint32 [tokens]; None if Hugging Face must encode it."""
        try:
            if self.nfc and not text.isascii() and not self._is_marked(text):
                text = self._normalizer.normalize_str(text)
            if self._is_marked(text):
                return None
            parts = [*pieces(text, piece_chars)]
            if any(len(part) == piece_chars for part in parts[:-1]):  # it had no place to cut
                return None
            return encode_ordinary(self._encoding, parts)
        except (UnicodeEncodeError, TypeError):  # half a surrogate pair
            return None

    def agrees(self, theirs: Any, texts: list[str]) -> bool:
        """Whether it gives the ids of `tokenizers.Tokenizer` for the texts and for characters from all of Unicode."""
        texts = [*texts, *("".join(f"a{char}1 {char}\n" for char in map(chr, range(*part))) for part in _RANGES)]
        try:
            encodings = theirs.encode_batch_fast(texts, add_special_tokens=False)
            for text, encoding in zip(texts, encodings, strict=True):
                for piece_chars in (PIECE_CHARS, SAMPLE_PIECE_CHARS):
                    ids = self.encode(text, piece_chars)
                    if ids is not None and not np.array_equal(ids, encoding.ids):
                        return False
        except BaseException as error:  # a pattern that tiktoken can't compile, or panics of
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            return False
        return True

    def _is_marked(self, text: str) -> bool:
        return any(begin in text and any(name in text for name in names) for begin, names in self.marks.items())

    def to_bytes(self) -> bytes:
        head = json.dumps([len(self.ranks), {"pattern": self.pattern, "nfc": self.nfc, "marks": self.marks}]).encode()
        ids, lengths = np.array([*self.ranks.values()], np.uint32), np.array([*map(len, self.ranks)], np.uint32)
        return b"".join((head, b"\n", ids.tobytes(), lengths.tobytes(), *self.ranks))

    @classmethod
    def from_bytes(cls, data: bytes) -> FastBPE:
        head, _, body = data.partition(b"\n")
        count, fields = json.loads(head)
        ids, lengths = np.frombuffer(body, np.uint32, 2 * count).reshape(2, -1)
        ends = (8 * count + np.cumsum(lengths)).tolist()
        tokens = (body[start:end] for start, end in pairwise((8 * count, *ends)))
        return cls(**fields, ranks=dict(zip(tokens, ids.tolist(), strict=True)))


def fast_bpe(content: Mapping[str, Any], model: Any) -> FastBPE | None:
    """From a tokenizer.json and the model that `tokenizers` made of it; None if ids could differ."""
    stated, normalizer = content["model"], content.get("normalizer")
    pattern = _pattern(content.get("pre_tokenizer"))
    nfc = normalizer == {"type": "NFC"}
    plain = nfc or normalizer is None or normalizer == {"type": "Sequence", "normalizers": []}
    others = ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix", "dropout")
    if not stated.get("merges") or any(stated.get(name) for name in others) or pattern is None or not plain:
        return None
    letters = byte_letters()
    is_bytes = frozenset(letters).issuperset
    names = {name: id_ for name, id_ in stated["vocab"].items() if is_bytes(name)}
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in stated["merges"]]
    made = [names.get(a + b) for a, b in pairs]
    if None in made or any(a > b for a, b in pairwise(made)) or not names.keys() >= {*letters}:  # type: ignore[operator]
        return None
    looked_up = bool(stated.get("ignore_merges"))
    model.ignore_merges = False
    try:
        unmade = [name for name in names if len(model.tokenize(name)) != 1]
    finally:
        model.ignore_merges = looked_up
    merges = {(a, b) for a, b in pairs} if looked_up and unmade else set()
    for name in unmade:
        splits = [(name[:at], name[at:]) for at in range(1, len(name))]
        if looked_up and any(a in names and b in names and (a, b) not in merges for a, b in splits):
            return None
        if not looked_up:
            del names[name]
    bytes_of = {ord(letter): byte for byte, letter in enumerate(letters)}
    ranks = {name.translate(bytes_of).encode("latin-1"): id_ for name, id_ in names.items()}
    added = [token["content"] for token in content.get("added_tokens") or ()]
    marks: dict[str, list[str]] = {}
    for name in sorted({*added, *(unicodedata.normalize("NFC", name) for name in added)}):
        marks.setdefault(name[:2], []).append(name)
    return FastBPE(pattern, nfc, marks, ranks)


def _pattern(pre_tokenizer: Any) -> str | None:
    """One pattern that cuts text as the pre-tokeniser does; None if there is no known one."""
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer])
    *before, last = [{key: value for key, value in (step or {}).items() if key != "trim_offsets"} for step in steps]
    by_gpt2 = last.pop("use_regex", True)
    if last != {"type": "ByteLevel", "add_prefix_space": False}:
        return None
    if by_gpt2 and not before:
        return GPT2
    if by_gpt2:
        return GPT2_AFTER_DIGITS if before == [{"type": "Digits", "individual_digits": True}] else None
    if len(before) != 1 or before[0].get("type") != "Split":
        return None
    split = {key: before[0].get(key) for key in ("behavior", "invert")}
    pattern: str | None = before[0].get("pattern", {}).get("Regex")
    return pattern if split == {"behavior": "Isolated", "invert": False} else None
