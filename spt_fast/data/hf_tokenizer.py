"""Hugging Face tokenizers: everything that a tokenizer.json can hold, with the ids of the `tokenizers` library.

These are BPE (of bytes, or with a fallback to bytes), Unigram, WordPiece and WordLevel, with normalisers and added
tokens. As in transformers, added and special tokens *are* read out of text: a document with "<|endoftext|>" gets that
token's id. Truncation and padding are ignored. The digest covers what decides ids (model, normaliser, pre-tokeniser and
added tokens), not how the file is written.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from spt_fast.data.base_tokenizer import MOST_IDS, BaseTokenizer
from spt_fast.data.fast_bpe import FastBPE, fast_bpe
from spt_fast.errors import DataError, cut, invalid
from spt_fast.files import download, replacing

HF_FILE = "tokenizer.json"
SENT = b"hugging face "
"""First bytes of a tokenizer that one process sends another."""
SLOW_FILES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "merges.txt", "vocab.txt")
"""The vocabulary files of transformers' Python tokenizers, which `tokenizers` can't read."""
HF_FILES = (
    *(HF_FILE, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json", "tekken.json", *SLOW_FILES),
)
"""All files that a tokenizer may consist of, with `TEMPLATES`."""
TEMPLATES = "additional_chat_templates/*.jinja"
_NAMING = ("tokenizer_config.json", "special_tokens_map.json")
_NUMBERING = ("generation_config.json", "config.json")
"""Where the token that ends a text is given by name, and by id; the first one found counts."""


class HFTokenizer(BaseTokenizer):
    """A Hugging Face tokenizer; `files` are its files, {name: bytes}."""

    rows: int | None = None
    """Rows of the embedding of the model in its folder, if there is one."""

    def __init__(self, data: bytes, source: str = HF_FILE, files: Mapping[str, bytes] | None = None) -> None:
        try:
            content = json.loads(data)
            self.digest = _digest(content)
            _check_merges(content["model"])
            self.files = {HF_FILE: data, **(files or {})}
            self._theirs.encode("")  # fails if the post-processor is broken
            known = content["model"]["vocab"]
            ids = known.values() if isinstance(known, dict) else [len(known) - 1]
            self.vocab_size = 1 + max(*ids, *self._theirs.get_added_tokens_decoder(), -1)
            self._named = {token["content"]: token["id"] for token in content.get("added_tokens") or ()}
        except BaseException as error:
            if not _theirs_says(error):
                raise
            raise DataError(
                f"{source}: is damaged, or not a Hugging Face tokenizer.json ({cut(str(error), 160)}); {_remedy(data)}"
            ) from None
        if content["model"].get("dropout"):
            raise DataError(f"{source}: model.dropout makes ids random; set it to null")
        if not 0 < self.vocab_size <= MOST_IDS:
            raise DataError(f"{source}: has {self.vocab_size:,} ids; it must have 1 to {MOST_IDS:,}")
        self.eos_id = None
        self._fast: FastBPE | None = None

    @cached_property
    def _theirs(self) -> Any:
        import tokenizers

        theirs = tokenizers.Tokenizer.from_str(self.files[HF_FILE].decode("utf-8-sig"))
        theirs.no_truncation()
        theirs.no_padding()
        return theirs

    @classmethod
    def load(cls, path: Path, with_eos: bool = True) -> HFTokenizer:
        """From a folder with a tokenizer.json, or from such a file; related files are beside it.

        with_eos: read which token ends a document. DataError for a folder without one and for a damaged file.
        """
        file = path / HF_FILE if path.is_dir() else path
        if not file.is_file() or file.name in SLOW_FILES:
            raise without_hf_file(path)
        beside = {}
        if file.name.endswith(HF_FILE):  # maybe after a prefix, which the other files have too
            prefix = file.name.removesuffix(HF_FILE)
            templates = [place.relative_to(file.parent).as_posix() for place in file.parent.glob(TEMPLATES)]
            places = {name: file.with_name(prefix + name) for name in (*HF_FILES, *_NUMBERING)}
            places |= {name: file.parent / name for name in templates}
            beside = {name: place.read_bytes() for name, place in places.items() if place.is_file()}
        files = {name: data for name, data in beside.items() if name not in _NUMBERING}
        tokenizer = cls(file.read_bytes(), str(file), files)
        with suppress(KeyError, ValueError, AttributeError, RecursionError):
            rows = json.loads(beside["config.json"].decode("utf-8-sig")).get("vocab_size")
            tokenizer.rows = rows if isinstance(rows, int) else None
        if with_eos:
            tokenizer.eos_id = tokenizer._stated_eos(beside, file)
        return tokenizer

    def _stated_eos(self, beside: Mapping[str, bytes], file: Path) -> int | None:
        for name in (*_NAMING, *_NUMBERING):
            if name not in beside:
                continue
            where = file.with_name(file.name.removesuffix(HF_FILE) + name)
            try:
                stated = json.loads(beside[name].decode("utf-8-sig"))
                eos = stated.get("eos_token" if name in _NAMING else "eos_token_id")
            except (ValueError, AttributeError, RecursionError) as error:
                says = f"{where}: cannot be read as JSON ({cut(str(error), 160)}); {_remedy(beside[name])}"
                raise DataError(says) from None
            if isinstance(eos, dict):
                eos = eos.get("content")
            if isinstance(eos, list) and eos:
                eos = eos[0]
            if eos is None:
                continue
            eos_id = self._theirs.token_to_id(eos) if isinstance(eos, str) else eos
            if type(eos_id) is not int or not 0 <= eos_id < self.vocab_size:
                raise DataError(f"{where}: {invalid('eos_token', eos, 'a token of ' + file.name)}")
            return eos_id
        return None

    def vocab(self) -> dict[str, int]:
        """Ids by token."""
        return dict(self._theirs.get_vocab(with_added_tokens=True))

    def named_tokens(self) -> dict[str, int]:
        return self._named

    def _id_of(self, argument: str, token: str) -> int:
        found = self._theirs.token_to_id(token)
        return super()._id_of(argument, token) if found is None else found

    def name_of(self, id_: int) -> str:
        """The token of an id."""
        return str(self._theirs.id_to_token(id_))

    @property
    def usual_bos_id(self) -> int | None:
        """The token that transformers puts before a text."""
        begun = self._theirs.encode(next(iter(self._named), "a"))
        return begun.ids[0] if begun.special_tokens_mask[:1] == [1] and 0 in begun.special_tokens_mask else None

    def encode_array(self, text: str) -> np.ndarray:
        try:
            if self._fast is not None and (ids := self._fast.encode(text)) is not None:
                return ids
            (encoding,) = self._theirs.encode_batch_fast([text], add_special_tokens=False)
        except (TypeError, UnicodeEncodeError):  # what both raise for a string without UTF-8
            at = next(at for at, char in enumerate(text) if "\ud800" <= char <= "\udfff")
            raise DataError(f"text holds half a surrogate pair at character {at}: fix it") from None
        except BaseException as error:
            if not _theirs_says(error):
                raise
            says = f"text cannot be encoded ({error}); give tokenizer.json a token for unknown text"
            raise DataError(says) from None
        return np.array(encoding.ids, np.uint32)

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """Text of ids; special tokens only if `special`."""
        return self._theirs.decode(list(ids), skip_special_tokens=not special)

    def prove(self, texts: list[str]) -> bool:
        """Try a faster engine on some of the texts to come. If all ids are equal, use it from now on; return True."""
        fast = fast_bpe(json.loads(self.files[HF_FILE]), self._theirs.model)
        if fast is not None and fast.agrees(self._theirs, texts):
            self._fast = fast
        return self._fast is not None

    def to_bytes(self) -> bytes:
        fast = self._fast.to_bytes() if self._fast else b""
        head = {"digest": self.digest, "vocab_size": self.vocab_size, "_named": self._named}
        return b"\n".join((SENT + json.dumps([head, len(fast)]).encode(), fast + self.files[HF_FILE]))

    @classmethod
    def rebuilt(cls, data: bytes) -> HFTokenizer:
        """From `to_bytes`; slow parts are loaded when they are needed."""
        head, _, body = data.removeprefix(SENT).partition(b"\n")
        fields, fast_bytes = json.loads(head)
        tokenizer = cls.__new__(cls)
        vars(tokenizer).update(fields, files={HF_FILE: body[fast_bytes:]}, eos_id=None)
        tokenizer._fast = FastBPE.from_bytes(body[:fast_bytes]) if fast_bytes else None
        return tokenizer

    def keep(self, folder: str | os.PathLike[str]) -> None:
        for name, data in self.files.items():
            Path(folder, name).parent.mkdir(exist_ok=True)
            with replacing(Path(folder, name)) as temporary:
                temporary.write_bytes(data)

    save_hf = keep


def without_hf_file(path: Path) -> DataError:
    """The error for a missing tokenizer.json at `path`, with the remedy."""
    folder = path if path.is_dir() else path.parent
    slow = path.name if path.is_file() else next((name for name in SLOW_FILES if (path / name).exists()), None)
    if slow is None:
        remedy = download(path) or "name a folder or file that does"
        return DataError(f"tokenizer: {path} holds no {HF_FILE}; {remedy}", argument=True)
    return DataError(
        f"tokenizer: {folder / slow} belongs to a slow tokenizer, without {HF_FILE}; convert it, for example with "
        f"transformers' AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained(new_folder), and name the new "
        "folder",
        argument=True,
    )


def _theirs_says(error: BaseException) -> bool:
    """Whether `tokenizers` may have raised it: the library raises plain Exceptions, and panics."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _remedy(data: bytes) -> str:
    """The remedy for a file that cannot be read."""
    pointer = data.startswith(b"version https://git-lfs")
    return "it is a pointer of Git LFS: run `git lfs pull`" if pointer else "copy it again"


def _check_merges(model: Mapping[str, Any]) -> None:
    """ValueError for merges that crash `tokenizers`, which cuts the prefix off without a check."""
    if prefix := (model.get("continuing_subword_prefix") or "").encode():
        for pair in model.get("merges") or ():
            second = (pair.split(" ") if isinstance(pair, str) else pair)[1].encode()
            if len(second) < len(prefix):
                raise ValueError(f"merge {pair} is shorter than continuing_subword_prefix")
            second[len(prefix) :].decode()


def _digest(content: Mapping[str, Any]) -> str:
    model = dict(content["model"])
    if model.get("type") == "BPE":
        del model["type"]  # which older files leave out
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model.pop("merges", None) or ()]
    vocab = model.pop("vocab")
    if isinstance(vocab, dict):
        vocab = {
            name: vocab[name] for name in sorted(vocab)
        }  # json would compare pairs, which takes three times as long
    parts = [
        _stated({key: content.get(key) for key in ("added_tokens", "normalizer", "pre_tokenizer")}),
        _stated(model),
    ]
    return hashlib.sha256(json.dumps([*parts, vocab, merges], sort_keys=True).encode()).hexdigest()


_UNSAID: Mapping[str, object] = {"use_regex": True, "split": True, "strip_accents": None}
"""Defaults of fields other than False."""


def _stated(value: Any) -> Any:
    """`value` without fields that have their default and without those that don't affect ids."""
    if isinstance(value, list):
        return [_stated(item) for item in value]
    if not isinstance(value, dict):
        return value
    stated = {key: _stated(item) for key, item in value.items() if key != "trim_offsets"}
    empty: tuple[object, ...] = (None, "", [], {})
    return {key: item for key, item in stated.items() if item not in empty and item is not _UNSAID.get(key, False)}
