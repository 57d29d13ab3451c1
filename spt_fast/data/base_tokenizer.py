"""The interface of every tokenizer."""

from __future__ import annotations

import base64
import os
import re
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Iterator

import numpy as np
import tiktoken

from spt_fast.errors import DataError, invalid, nearest

MOST_IDS = 1 << 24
"""Limit on a tokenizer's ids: an embedding has a row for each."""

WITHOUT_ROW = "leave such tokens out, or add rows with transformers' resize_token_embeddings"
"""What to do with tokens for which weights have no row."""

# tiktoken's regex engine overflows its stack in runs of some 500,000 spaces: longer text is encoded in pieces, cut
# between a letter or digit and the white space or punctuation after it, where every known pattern cuts as well.
PIECE_CHARS = 100_000
CUT = re.compile(r"[^\W_](?=[\s,.;:!?…。、，；：！？])")


class BaseTokenizer(ABC):
    """Turns text into ids and back.

    vocab_size        largest id + 1, special and added tokens included
    digest            equal digests mean equal ids for any text
    eos_id            the id that ends each document; None if none is known
    bos_id            the id that begins each document; None without one
    """

    vocab_size: int
    digest: str
    eos_id: int | None
    bos_id: int | None = None

    @abstractmethod
    def named_tokens(self) -> dict[str, int]:
        """The tokens that may begin or end a document, with their ids."""

    @abstractmethod
    def encode_array(self, text: str) -> np.ndarray:
        """Ids of a text, uint32 [tokens], without begin and end tokens. DataError for half a surrogate pair, which has
        no UTF-8."""

    @abstractmethod
    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """Text of ids. special: include the special tokens that are read out of text."""

    @abstractmethod
    def to_bytes(self) -> bytes:
        """The state from which another process rebuilds it, apart from eos_id and bos_id."""

    @abstractmethod
    def keep(self, folder: str | os.PathLike[str]) -> None:
        """Write the files from which `Tokenizer.load` reads it."""

    @abstractmethod
    def save_hf(self, folder: str | os.PathLike[str]) -> None:
        """Write the files that transformers' AutoTokenizer reads."""

    def encode(self, text: str) -> list[int]:
        """`encode_array` as a list."""
        return self.encode_array(text).tolist()

    def prompt(self, text: str) -> list[int]:
        """Ids of a text that begins a document."""
        return [*([] if self.bos_id is None else [self.bos_id]), *self.encode(text)]

    def beyond(self, rows: int) -> str | None:
        """A doubt about ids that an embedding of so many rows lacks; None if there are no such ids."""
        ids = range(rows, self.vocab_size)
        if not ids:
            return None
        names = ", ".join(f"{id_} ({self.decode([id_], special=True)!r})" for id_ in ids[:3])
        more = f" and {len(ids) - 3:,} more" if len(ids) > 3 else ""
        says = f"has ids beyond the {rows:,} rows of the weights, {names}{more}"
        return f"{says}; text that holds one is refused: {WITHOUT_ROW}"

    def set_ends(self, eos: str | None, bos: str | None) -> None:
        """Set the tokens that end and begin each document, by name. DataError for an unknown one."""
        if eos is not None:
            self.eos_id = self._id_of("eos", eos)
        if bos is not None:
            self.bos_id = self._id_of("bos", bos)

    def _id_of(self, argument: str, token: str) -> int:
        known = self.named_tokens()
        if token not in known:
            expected = f"name a token of the tokenizer; {nearest(token, known)}"
            raise DataError(invalid(argument, token, expected), argument=True)
        return known[token]


def check_rows(tokenizer: BaseTokenizer, ids: Iterable[int], rows: int) -> None:
    """DataError for an id of a text for which an embedding of so many rows has none."""
    if (id_ := max(ids, default=0)) >= rows:
        token = tokenizer.decode([id_], special=True)
        raise DataError(f"text holds {token!r}, id {id_}, but the weights have rows for {rows:,} ids: {WITHOUT_ROW}")


def pieces(text: str, most: int | None = None) -> Iterator[str]:
    """`text` in order, in pieces of fewer than `most` characters, by default PIECE_CHARS; of as many where there is no
    place to cut."""
    most, start = most or PIECE_CHARS, 0
    while len(text) - start > most:
        cut = CUT.search(text, start + most // 2, start + most)
        end = cut.end() if cut else start + most
        yield text[start:end]
        start = end
    yield text[start:]


def encode_ordinary(encoding: tiktoken.Encoding, texts: Iterable[str]) -> np.ndarray:
    """Ids of all texts, uint32 [tokens], without special tokens. UnicodeEncodeError for half a surrogate pair."""
    # Lists are faster than tiktoken's own conversion to an array, which also repairs invalid text; NumPy reads a list
    # at a third of the speed of `array`.
    parts = [np.frombuffer(array("I", encoding._core_bpe.encode_ordinary(text)), np.uint32) for text in texts]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def byte_letters() -> list[str]:
    """The printable character that stands for each byte in byte-level BPE files, since GPT-2."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in printable)
    codes = {byte: byte for byte in printable} | {byte: 256 + place for place, byte in enumerate(others)}
    return [chr(codes[byte]) for byte in range(256)]


def rank_lines(ranks: dict[bytes, int]) -> bytes:
    """A file of tiktoken ranks."""
    by_rank = sorted(ranks.items(), key=lambda item: item[1])
    return b"".join(b"%b %d\n" % (base64.b64encode(token), rank) for token, rank in by_rank)
