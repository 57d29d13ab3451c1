"""A small base model made with transformers only, for studies that start from a foreign model.

    python -m benchmarks.hf_base llama --text TEXT.jsonl --tokenizer TOKENIZER.json --out FOLDER

The tokenizer is a real one cut to 8,192 ids: its single characters and bytes, and its first merges. The base is a Llama
or a Qwen3 of 4 to 6M parameters with properties of the family: the Llama's documents begin with <s> and its head is
separate; the Qwen3 has QK-norm, a tied head, and more rows than there are ids. Both declare 4,096 positions and are
trained on windows of 256.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch

IDS, WINDOW, SEQUENCES, WARMUP, PEAK = 8192, 256, 16, 100, 2e-3

SPECIAL = {"llama": ("<s>", "</s>"), "qwen3": (None, "<|endoftext|>")}
"""Begin and end of a document."""


def cut(original: Path, size: int) -> dict[str, Any]:
    """tokenizer.json with the tokens that need no merge and, in order, as many merges as fit."""
    content = json.loads(original.read_text(encoding="utf-8"))
    model = content["model"]
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    added = [token["content"] for token in content["added_tokens"]]
    kept = (model["vocab"].keys() - {left + right for left, right in merges}) | (set(added) & model["vocab"].keys())
    room = size - len(kept | set(added))
    used = []
    for left, right in merges:
        if room and left in kept and right in kept:
            used.append([left, right])
            room -= left + right not in kept
            kept.add(left + right)
    ids = {token: new for new, token in enumerate(sorted(kept, key=model["vocab"].__getitem__))}
    for token in content["added_tokens"]:
        token["id"] = ids.setdefault(token["content"], len(ids))
    content["model"] = {**model, "vocab": {token: ids[token] for token in ids if token in kept}, "merges": used}
    content["post_processor"] = None
    return content


def windows(text: Path, tokenizer: tokenizers.Tokenizer, family: str, tokens: int) -> np.ndarray:
    """int64 [windows, WINDOW + 1] of the first documents, each between its special tokens."""
    begin, end = (None if name is None else tokenizer.token_to_id(name) for name in SPECIAL[family])
    ids: list[int] = []

    def documents() -> Iterator[str]:
        with text.open(encoding="utf-8") as lines:
            yield from (json.loads(line)["text"] for line in lines)

    for document in documents():
        ids += [] if begin is None else [begin]
        ids += [*tokenizer.encode(document, add_special_tokens=False).ids, end]
        if len(ids) > tokens:
            break
    whole = (len(ids) - 1) // WINDOW
    stream = np.asarray(ids, dtype=np.int64)
    return np.stack([stream[at * WINDOW : (at + 1) * WINDOW + 1] for at in range(whole)])


def model_of(family: str, ids: int, special: dict[str, int | None]) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    shape = {"hidden_size": 192, "num_hidden_layers": 8, "num_attention_heads": 6, "num_key_value_heads": 2}
    common = {**shape, "intermediate_size": 512, "max_position_embeddings": 4096, **special}
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(vocab_size=ids, tie_word_embeddings=False, rms_norm_eps=1e-5, **common))
    rows = 128 * (ids // 128 + 1)
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=rows, head_dim=32, tie_word_embeddings=True, **common))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=SPECIAL)
    for name in ("text", "tokenizer", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=6_000_000)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    content = cut(given.tokenizer, IDS)
    (given.out / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    tokenizer = tokenizers.Tokenizer.from_file(str(given.out / "tokenizer.json"))
    begin, end = SPECIAL[given.family]
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": begin, "eos_token": end}
    (given.out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    data = windows(given.text, tokenizer, given.family, given.tokens)
    special = {
        f"{name}_token_id": token and tokenizer.token_to_id(token) for name, token in (("bos", begin), ("eos", end))
    }

    torch.manual_seed(0)
    model = model_of(given.family, tokenizer.get_vocab_size(), special)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK, betas=(0.9, 0.95), weight_decay=0.1)
    steps, begun = len(data) // SEQUENCES, time.perf_counter()
    order = torch.randperm(len(data))
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {tokenizer.get_vocab_size():,} ids, {steps} steps"
    )
    for step in range(steps):
        fall = 0.1 + 0.9 * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.param_groups[0]["lr"] = PEAK * min((step + 1) / WARMUP, fall)
        batch = torch.from_numpy(data[order[step * SEQUENCES : (step + 1) * SEQUENCES].numpy()])
        logits = model(batch[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            left = (time.perf_counter() - begun) / (step + 1) * (steps - step - 1)
            print(f"step {step}/{steps}  loss {loss:.3f}  {left / 60:.0f} min left", flush=True)
    model.save_pretrained(given.out)


if __name__ == "__main__":
    main()
