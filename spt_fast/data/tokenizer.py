"""Byte-level BPE: trained here, loaded from a file of ranks, or one of tiktoken's encodings by name. `Tokenizer.load`
also loads Hugging Face tokenizers of every kind.

A tokenizer file has tiktoken's format: a line per token, base64 bytes and rank, in the order of the ranks 0, 1, 2 …;
text is cut by `PATTERN` before merging, and `<|endoftext|>` has the id after the last rank. If pattern or special
tokens differ (a saved copy of `gpt2`, say), a first line `#{"pattern": …, "special_tokens": …}` gives them.

Special tokens are never read out of text: "<|endoftext|>" in a document is ordinary characters.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken

from spt_fast.data import hf_tokenizer
from spt_fast.data.base_tokenizer import MOST_IDS, BaseTokenizer, byte_letters, encode_ordinary, pieces, rank_lines
from spt_fast.data.dataset_files import datasets_in
from spt_fast.data.hf_tokenizer import HF_FILE, HFTokenizer
from spt_fast.data.inputs import STDIN, Inputs, find_files
from spt_fast.data.text import iter_documents
from spt_fast.errors import DataError, TooFewPieces, invalid, nearest
from spt_fast.files import download, looked_in, place, replacing
from spt_fast.outputs import check_output, is_tokenizer
from spt_fast.quantities import amount

EOS = "<|endoftext|>"
FILE = "tokenizer.tiktoken"
"""The name of the tokenizer's file in the folder of a run, of weights and of an export."""

# The pattern that cuts text before merging, in tokenizer files without another one: GPT-4's, as rustbpe has it.
# Contractions; letters with one leading space or sign; up to three digits; signs with newlines; newlines; spaces.
PATTERN = (
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"""
)

_DOWNLOAD_S = 60.0
_DAMAGE = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)

_LETTERS = dict(enumerate(byte_letters()))
_ALL_KINDS = (
    "Ab don't 日本 naïve e\u0301 1 12345 ²½ $x+y=z_\"#… \t  \u00a0\n\r\n\n \U0001f600\u200d\x00\x7f\ue000 end \n"
)
"""Text with characters of every kind, all of which a pattern must match."""


class Tokenizer(BaseTokenizer):
    """A byte-level BPE tokenizer with an end-of-text token.

    ranks             {bytes of a token: its id}
    special_tokens    {name: id}
    eos_id            id of <|endoftext|>, unless `load` was told another
    """

    def __init__(self, ranks: dict[bytes, int], pattern: str, special_tokens: dict[str, int]) -> None:
        self.ranks, self.pattern, self.special_tokens = ranks, pattern, special_tokens
        self.eos_id = special_tokens[EOS]
        self.vocab_size = 1 + max(max(ranks.values()), max(special_tokens.values()))
        self.digest = hashlib.sha256(_header(pattern, special_tokens) + rank_lines(ranks)).hexdigest()
        self._encoding = tiktoken.Encoding(
            f"spt_fast-{self.digest[:12]}", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special_tokens
        )

    @staticmethod
    def load(name_or_path: str | os.PathLike[str], *, eos: str | None = None, bos: str | None = None) -> BaseTokenizer:
        """From a file of ranks, a Hugging Face folder or tokenizer.json, or a tiktoken encoding by name ("gpt2",
        "cl100k_base", …).

        eos, bos: the tokens that end and begin each document, if they differ from the tokenizer's files; without `bos`
        none begins it. Raises DataError for a file that doesn't exist or is damaged, an unknown name or token, or an
        encoding that isn't available.
        """
        tokenizer = _found(place(name_or_path, "tokenizer", DataError), with_eos=eos is None)
        tokenizer.set_ends(eos, bos)
        return tokenizer

    @classmethod
    def from_bytes(cls, data: bytes, source: str = "tokenizer") -> Tokenizer:
        """From the content of a tokenizer file; `source` names it in errors. Raises DataError for a damaged one."""
        data = data.removeprefix(b"\xef\xbb\xbf")  # a byte-order mark
        head, lines = None, data.split(b"\n")
        try:
            if data.startswith(b"#"):
                head = json.loads(lines.pop(0)[1:])
            pairs = [line.split(b" ") for line in lines if line]
            ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
            pattern, special_tokens = (
                (head["pattern"], head["special_tokens"]) if head else (PATTERN, {EOS: len(ranks)})
            )
            if not data.endswith(b"\n"):
                raise ValueError("its last line is cut off")
            if not all(bytes([byte]) in ranks for byte in range(256)):
                raise ValueError("some of the 256 single bytes are missing")
            if b"" in ranks:
                raise ValueError("a token is empty")
            if len({*ranks.values(), *special_tokens.values()}) != len(pairs) + len(special_tokens):
                raise ValueError("a token or a rank comes twice")
            if not head and list(ranks.values()) != list(range(len(ranks))):
                raise ValueError("its ranks aren't 0, 1, 2 … in this order")
            if max(0, *special_tokens.values(), *ranks.values()) >= MOST_IDS:
                raise ValueError(f"an id is {MOST_IDS:,} or more")
            if _matches_nothing(pattern):
                raise ValueError(
                    "its pattern matches the empty string, or drops what it matched (\\K); fix it in the first line"
                )
            tokenizer = cls(ranks, pattern, special_tokens)
            if tokenizer.decode(tokenizer.encode(_ALL_KINDS)) != _ALL_KINDS:
                raise ValueError(
                    "its pattern leaves text out: a match must begin where the previous one ends; fix it in the "
                    "first line"
                )
            return tokenizer
        except BaseException as error:
            if not isinstance(error, _DAMAGE) and type(error).__name__ != "PanicException":  # tiktoken's panic
                raise
            raise DataError(
                f"{source}: is damaged, or not a file of tiktoken ranks ({error}); copy it again, or train another one "
                "and prepare the data again"
            ) from None

    @classmethod
    def _named(cls, name: str) -> Tokenizer:
        names = tiktoken.list_encoding_names()
        if name not in names:
            what = "a file of ranks, the path of a Hugging Face folder, or a tiktoken encoding"
            expected = f"give {what}; {nearest(name, names)}"
            raise DataError(invalid("tokenizer", name, expected), argument=True)
        encoding = _get_encoding(name)
        if EOS not in encoding._special_tokens:
            raise DataError(f"tiktoken encoding {name!r} has no {EOS}, which ends each document; use another")
        # o200k_harmony gives one id two names, which a vocabulary can't have: the later one is left out.
        first = {id_: token for token, id_ in reversed(encoding._special_tokens.items())}
        special_tokens = {token: id_ for token, id_ in encoding._special_tokens.items() if first[id_] == token}
        return cls(encoding._mergeable_ranks, encoding._pat_str, special_tokens)

    def _check_hf(self, source: str) -> None:
        """DataError if an export could not express the pattern: better before training than after it."""
        if self.pattern == PATTERN:
            return
        import tokenizers

        try:
            tokenizers.Regex(_oniguruma(self.pattern))
        except Exception as error:  # tokenizers raises Exception itself
            raise DataError(
                f"{source}: Hugging Face's tokenizers cannot read its pattern ({error}), so that the trained "
                "model could not be exported; write it without syntax that only tiktoken knows"
            ) from None

    def to_bytes(self) -> bytes:
        """The content of a tokenizer file."""
        plain = self.pattern == PATTERN and self.special_tokens == {EOS: len(self.ranks)}
        return (b"" if plain else b"#" + _header(self.pattern, self.special_tokens) + b"\n") + rank_lines(self.ranks)

    def keep(self, folder: str | os.PathLike[str]) -> None:
        self.save(Path(folder, FILE))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a tokenizer file, atomically. Raises DataError if that fails."""
        path = place(path, "path", DataError)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary:
                temporary.write_bytes(self.to_bytes())
        except OSError as error:
            raise DataError(
                f"{path} can't be written ({error.strerror}); choose another place, or make room"
            ) from error

    def named_tokens(self) -> dict[str, int]:
        return self.special_tokens

    def encode_array(self, text: str) -> np.ndarray:
        """Ids of a text, uint32 [tokens], without special tokens.

        Text over 100,000 characters is encoded in pieces, which are cut between a letter or digit and white space or
        punctuation, and give the ids of the whole. If half of a piece has no such place, it is cut anyway, and ids may
        differ. Raises DataError for half a surrogate pair, which has no UTF-8.
        """
        try:
            return encode_ordinary(self._encoding, pieces(text))
        except UnicodeEncodeError as error:
            raise DataError(f"text holds half a surrogate pair at character {error.start}: fix it") from None

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """Text of ids, special tokens included; U+FFFD for bytes that aren't UTF-8, and for ids below `vocab_size` that
        no token has, which a model may still generate. DataError for other ids."""
        ids = list(ids)
        for id_ in ids:
            if not 0 <= id_ < self.vocab_size:
                raise DataError(f"{id_}: not an id of this tokenizer, which has {self.vocab_size:,}")
        try:
            return self._encoding.decode(ids)
        except KeyError:
            return b"".join(map(self._bytes_of, ids)).decode(errors="replace")

    def _bytes_of(self, id_: int) -> bytes:
        try:
            return self._encoding.decode_single_token_bytes(id_)
        except KeyError:
            return "\ufffd".encode()

    def _hf_vocab(self) -> dict[str, int]:
        return {_name(token): rank for token, rank in self.ranks.items()} | self.special_tokens

    def save_hf(self, folder: str | os.PathLike[str]) -> None:
        """Write tokenizer.json and tokenizer_config.json, for transformers' AutoTokenizer, and the ranks beside them.

        Ids and decoding are the same, but special tokens *are* read out of text, as usual there, and the token that
        begins documents, if there is one, is put before a text.
        """
        import tokenizers
        from tokenizers import decoders, models, pre_tokenizers, processors

        merges = [(_name(left), _name(right)) for left, right in _merges(self.ranks)]
        hf = tokenizers.Tokenizer(models.BPE(vocab=self._hf_vocab(), merges=merges, ignore_merges=True))
        hf.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(tokenizers.Regex(_oniguruma(self.pattern)), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        hf.decoder = decoders.ByteLevel()
        assert self.eos_id is not None
        by_id = sorted(self.special_tokens, key=self.special_tokens.__getitem__)
        hf.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in by_id])
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": self.decode([self.eos_id]),
            "clean_up_tokenization_spaces": False,
        }
        if self.bos_id is not None:
            config["bos_token"] = self.decode([self.bos_id])
            begin = {"id": "begin", "ids": [self.bos_id], "tokens": [config["bos_token"]]}
            hf.post_processor = processors.TemplateProcessing(
                single="begin $A", pair="begin $A begin $B", special_tokens=[begin]
            )
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        hf.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        self.keep(folder)


def _name(token: bytes) -> str:
    """Hugging Face's name of a token."""
    return token.decode("latin-1").translate(_LETTERS)


def rebuilt(data: bytes) -> BaseTokenizer:
    """The tokenizer that `to_bytes` serialised."""
    return HFTokenizer.rebuilt(data) if data.startswith(hf_tokenizer.SENT) else Tokenizer.from_bytes(data)


def train_tokenizer(
    inputs: Inputs,
    vocab_size: int,
    out: str | os.PathLike[str],
    text_key: str = "text",
    *,
    skip_bad: bool = False,
    sample_bytes: int = 200_000_000,
    progress: bool = True,
) -> Tokenizer:
    """Train a byte-level BPE of `vocab_size` ids, <|endoftext|> included, and save it at `out`.

    It reads the first documents of every file: all of the text, or `sample_bytes` if the inputs are larger, shared
    evenly (longer files use what short ones leave). Equal inputs give equal tokenizers. Raises DataError for unreadable
    inputs, and for a vocabulary below 257 (256 bytes and <|endoftext|>) or too large for the text.
    """
    if not 257 <= vocab_size <= MOST_IDS:
        expected = f"at least 257 (256 bytes and {EOS}) and at most {MOST_IDS:,}"
        raise DataError(invalid("vocab_size", vocab_size, expected), argument=True)
    try:
        import rustbpe
    except ImportError:
        raise DataError("training a tokenizer needs rustbpe: pip install rustbpe") from None
    check_output(Path(out), "out", is_tokenizer)
    trainer = rustbpe.Tokenizer()
    sample = _sample(inputs, text_key, skip_bad, sample_bytes)
    with _shown(sample, f"tokenizer {Path(out).name}", show=progress) as texts:
        trainer.train_from_iterator(texts, vocab_size - 1, buffer_size=256, pattern=PATTERN)
    ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
    if len(ranks) < vocab_size - 1:
        expected = f"this text yields at most {len(ranks) + 1} ids; request fewer, or give more text"
        raise TooFewPieces(invalid("vocab_size", vocab_size, expected), argument=True)
    tokenizer = Tokenizer(ranks, PATTERN, {EOS: len(ranks)})
    _check_unused(Path(out), tokenizer)
    tokenizer.save(out)
    return tokenizer


def _check_unused(out: Path, new: Tokenizer) -> None:
    """DataError if datasets beside the tokenizer at `out` use it, and `new` is another one."""
    if not out.exists() or out.stat().st_size == 0:
        return
    old = Tokenizer.from_bytes(out.read_bytes(), str(out)).digest
    users = [name for name, digest in datasets_in(out.parent).items() if digest == old != new.digest]
    if users:
        raise DataError(
            f"out: {out} is the tokenizer of the dataset {users[0]} beside it, which another could not read; choose "
            "another name, or delete what was prepared with it",
            argument=True,
        )


def _found(path: Path, *, with_eos: bool) -> BaseTokenizer:
    """with_eos: whether the files must be read for the token that ends a document."""
    if path.is_dir() and not (path / FILE).exists():
        return HFTokenizer.load(path, with_eos)
    if path.is_dir():
        tokenizer = _found(path / FILE, with_eos=with_eos)
        check_alike(tokenizer, path)
        return tokenizer
    if path.is_file():
        data = path.read_bytes()
        if path.suffix in (".json", ".model") or _is_json(data):
            return HFTokenizer.load(path, with_eos)
        tokenizer = Tokenizer.from_bytes(data, str(path))
        tokenizer._check_hf(str(path))
        return tokenizer
    if path.suffix not in (".tiktoken", ".json", ".model", ".txt") and (remedy := download(path)):
        raise DataError(f"tokenizer: there is no folder {path} here; {remedy}", argument=True)
    if path.suffix or len(path.parts) != 1 or path.exists():
        missing = f"tokenizer: file {path} doesn't exist{looked_in(path)}; create one with `spt-fast tokenizer train`"
        raise DataError(missing, argument=True)
    return Tokenizer._named(str(path))


def check_alike(ours: BaseTokenizer, folder: Path) -> None:
    """DataError if the tokenizer.json of a folder differs from `ours`, its ranks."""
    if not isinstance(ours, Tokenizer) or not (folder / HF_FILE).exists():
        return
    theirs = HFTokenizer.load(folder, with_eos=False)
    if theirs.vocab() != ours._hf_vocab() or theirs.encode(_ALL_KINDS) != ours.encode(_ALL_KINDS):
        raise DataError(
            f"tokenizer: {folder} holds two that give different ids, {FILE} and {HF_FILE}; remove the one "
            "that isn't the model's",
            argument=True,
        )


def _is_json(data: bytes) -> bool:
    return data.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"{"


def _sample(inputs: Inputs, text_key: str, skip_bad: bool, sample_bytes: int) -> Iterator[str]:
    """Pieces of the first documents of every file, the small files first."""
    files = sorted(find_files(inputs).files, key=lambda path: float("inf") if path == STDIN else path.stat().st_size)
    for position, path in enumerate(files):
        share_bytes = left_bytes = sample_bytes // (len(files) - position)
        documents = iter_documents(path, text_key, skip_bad=skip_bad)
        for piece in (piece for text in documents for piece in pieces(text)):
            yield piece
            left_bytes -= len(piece.encode())
            if left_bytes <= 0:
                break
        sample_bytes -= share_bytes - left_bytes


@contextmanager
def _shown(sample: Iterator[str], title: str, *, show: bool) -> Iterator[Iterator[str]]:
    """The pieces; the number of characters read is shown on standard error."""
    from spt_fast.progress import Line, Screen  # workers import this module and don't need rich

    def texts() -> Iterator[str]:
        read = 0
        for piece in sample:
            read += len(piece)
            screen.update(Line([title, f"{amount(read)} characters read"]))
            yield piece
        screen.update(Line([title, f"{amount(read)} characters read", "learning the merges"]))

    with Screen(show=show) as screen:
        yield texts()


def _matches_nothing(pattern: str) -> bool:
    """Whether it can match the empty string, as `\\b`, `(?=x)` and `x\\K` do, which crashes tiktoken's engine; False if
    Python's engine can't tell."""
    try:
        with warnings.catch_warnings(action="ignore"):  # future changes of Python's syntax
            parsed = re._parser.parse(re.sub(r"\\[pP]\{\^?[\w=]*\}", r"\\w", pattern))  # type: ignore[attr-defined]
        return bool(parsed.getwidth()[0] == 0)
    except re.error:
        return re.search(r"(?<!\\)(\\\\)*\\K", pattern) is not None


def _header(pattern: str, special_tokens: dict[str, int]) -> bytes:
    return json.dumps({"pattern": pattern, "special_tokens": special_tokens}, sort_keys=True).encode()


def _get_encoding(name: str) -> tiktoken.Encoding:
    """tiktoken's encoding, from its cache or the network, within a minute."""
    result: list[Any] = []

    def fetch() -> None:
        try:
            result.append(tiktoken.get_encoding(name))
        except Exception as error:
            result.append(error)

    thread = threading.Thread(target=fetch, daemon=True)
    thread.start()
    thread.join(_DOWNLOAD_S)
    if result and isinstance(result[0], tiktoken.Encoding):
        return result[0]
    reason = type(result[0]).__name__ if result else f"no answer in {_DOWNLOAD_S:.0f} s"
    raise DataError(
        f"tiktoken encoding {name!r} isn't in tiktoken's cache and can't be downloaded ({reason}); set "
        "TIKTOKEN_CACHE_DIR to a folder that another machine's tiktoken has filled, or train a tokenizer of your own "
        "(spt-fast tokenizer train)"
    ) from (result[0] if result else None)


def _merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Every pair of tokens that is a token, lowest rank first: tiktoken merges by the rank of the result."""
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        splits = ((token[:at], token[at:]) for at in range(1, len(token)))
        merges += sorted(
            (pair for pair in splits if pair[0] in ranks and pair[1] in ranks),
            key=lambda pair: (ranks[pair[0]], ranks[pair[1]]),
        )
    return merges


def _oniguruma(pattern: str) -> str:
    """The pattern for Hugging Face's regex engine: there {1,3}+ isn't possessive, and $ matches before any newline."""
    return re.sub(r"(?<!\\)\$", r"\\z", re.sub(r"(\{\d+(?:,\d*)?\})\+", r"\1", pattern))
