"""Tokenizers of every kind that Hugging Face has, small ones, made with its own library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

EOS, BOS = "<|end|>", "<|begin|>"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
TEXTS = [
    "The quick brown fox jumps over the lazy dog, don't they'll say; I'VE seen 12345 of 67 in 1999.\n" * 3,
    "def f(x):\n    return x  + 1\r\n\r\n\tpass  # ünïcödé naïve café 日本語の文章、ここまで。\n" * 3,
    "El veloz murciélago hindú comía feliz cardillo y kiwi. Été à Noël 😀👍🏽 ½ ²³ Ⅷ ١٢٣\n" * 3,
]


def build(kind: str) -> tokenizers.Tokenizer:
    """Kinds: byte_level as Llama 3's, digits as SmolLM2's, nfc as Qwen's, byte_fallback as Llama 2's, unigram as T5's,
    wordpiece as BERT's."""
    specials = [AddedToken(name, special=True, normalized=False) for name in (EOS, BOS)]
    if kind in ("byte_level", "digits", "nfc"):
        made = tokenizers.Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(tokenizers.Regex(LLAMA3), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
            if kind != "digits"
            else [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
        if kind == "nfc":
            made.normalizer = normalizers.NFC()
        made.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer: Any = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    elif kind == "byte_fallback":
        made = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        made.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        trainer = trainers.BpeTrainer(
            vocab_size=420,
            special_tokens=["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))],
            limit_alphabet=60,
            show_progress=False,
        )
    elif kind == "unigram":
        made = tokenizers.Tokenizer(models.Unigram())
        made.normalizer = normalizers.Sequence(
            [normalizers.NFKC(), normalizers.Replace(tokenizers.Regex(" {2,}"), " ")]
        )
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        made.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=200, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
        )
    else:
        assert kind == "wordpiece"
        made = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
        made.normalizer = normalizers.BertNormalizer()
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        made.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]"], show_progress=False)
    made.train_from_iterator(TEXTS, trainer)
    made.add_special_tokens(specials)
    made.add_tokens([AddedToken("<tool>", normalized=False)])
    begins = [(BOS, made.token_to_id(BOS))]
    made.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=begins)
    return made


def write(folder: Path, kind: str = "byte_level", *, eos: str | None = EOS) -> Path:
    """A folder with the tokenizer, and beside it what a base has."""
    folder.mkdir(parents=True, exist_ok=True)
    build(kind).save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos, "bos_token": BOS}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": BOS}))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder
