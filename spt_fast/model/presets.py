"""Model shapes by name: the name is the approximate number of parameters, embedding included, at the preset's
vocabulary.

`1m` to `60m` are ours: heads of 32 or 64, feed-forward near 8/3 of the width, vocabularies for a tokenizer trained on
the user's data. `124m` is GPT-2 small's depth and width, `350m` GPT-2 medium's, `3b` and `8b` have the shapes of
Llama 3.2 3B and Llama 3 8B.

The four `olmo-…` follow the sizes of the specialized-pretraining paper (arXiv 2603.16177): OLMo 1B with 16 layers, a 3B
with twice as many, 600M and 300M with half. The paper gives no widths: if OLMo 1B's doesn't give the size of the name,
ours is the nearest that does. Heads are 128 wide, the feed-forward layer is four times the width, the head is tied and
the vocabulary OLMo's.
"""

from __future__ import annotations

from typing import Any


def _shape(layers: int, width: int, heads: int, ffn: int, context: int, vocab_size: int, **more: Any) -> dict[str, Any]:
    shape = dict(
        layers=layers, width=width, heads=heads, kv_heads=heads, ffn=ffn, context=context, vocab_size=vocab_size
    )
    return {**shape, **more}


PRESETS: dict[str, dict[str, Any]] = {
    "1m": _shape(6, 96, 3, 256, 256, 4096),
    "3m": _shape(5, 192, 3, 512, 256, 4096),
    "10m": _shape(5, 384, 6, 1024, 256, 4096),
    "30m": _shape(8, 512, 8, 1408, 512, 8192),
    "60m": _shape(10, 640, 10, 1728, 1024, 16_384),
    "124m": _shape(12, 768, 12, 2048, 1024, 50_304),
    "350m": _shape(24, 1024, 16, 2816, 2048, 50_304),
    "1b": _shape(18, 2048, 16, 5632, 2048, 50_304),
    "3b": _shape(28, 3072, 24, 8192, 4096, 128_256, kv_heads=8, rope_theta=500_000.0),
    "8b": _shape(32, 4096, 32, 14_336, 8192, 128_256, kv_heads=8, rope_theta=500_000.0, tied=False),
    "olmo-300m": _shape(8, 1408, 11, 5632, 2048, 50_304),
    "olmo-600m": _shape(8, 2048, 16, 8192, 2048, 50_304),
    "olmo-1b": _shape(16, 2048, 16, 8192, 2048, 50_304),
    "olmo-3b": _shape(32, 2432, 19, 9728, 2048, 50_304),
}
