"""Cached keys and values of a text, so that the next token costs one position instead of the whole text.

Legend: N texts, S slots, T positions, H query heads, K key/value heads, Q head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from spt_fast.kernels import flash_attention
from spt_fast.model.config import GPTConfig


class Cache:
    """Texts side by side, aligned at their ends: slot s holds position s − starts[n] of text n.

    Each text is read separately, in its `row`; after that all of them grow together, one token at a time.

    starts    the slot of each text's first token
    end       the slot of the next tokens
    """

    def __init__(self, config: GPTConfig, lengths: Sequence[int], slots: int, like: Tensor) -> None:
        """Room for texts of `lengths` tokens, the longest of which may grow to `slots`, on the device and in the dtype
        of `like`: 2 · layers · N · slots · K · Q numbers."""
        shape = (len(lengths), slots, config.kv_heads, config.head_dim)
        self.keys = [like.new_zeros(shape) for _ in range(config.layers)]
        self.values = [like.new_zeros(shape) for _ in range(config.layers)]
        self.end = max(lengths)
        self.starts = [self.end - length for length in lengths]

    def row(self, n: int) -> Cache:
        """The part of one text, still empty, in the same memory."""
        row = object.__new__(Cache)
        row.keys = [keys[n : n + 1, self.starts[n] :] for keys in self.keys]
        row.values = [values[n : n + 1, self.starts[n] :] for values in self.values]
        row.starts, row.end = [0], 0
        return row

    def keep(self, rows: Sequence[int]) -> None:
        """Drop the other texts."""
        for tensors in (self.keys, self.values):
            for layer, tensor in enumerate(tensors):
                tensors[layer] = tensor[list(rows)]
        self.starts = [self.starts[n] for n in rows]

    def positions(self, T: int) -> Tensor:
        """Positions of the next T tokens, int64 [N, T]."""
        return torch.arange(self.end, self.end + T) - torch.tensor(self.starts).unsqueeze(1)

    def attend(
        self, layer: int, q_NTHQ: Tensor, k_NTKQ: Tensor, v_NTKQ: Tensor, *, window: int | None = None
    ) -> Tensor:
        """Causal attention of the next tokens to themselves and all earlier ones, or to as many keys as the window has:
        [N, T, H, Q].

        They are a whole text, or one token of every text.
        """
        keys, values, T = self.keys[layer], self.values[layer], q_NTHQ.shape[1]
        now = self.end + T
        keys[:, self.end : now], values[:, self.end : now] = k_NTKQ, v_NTKQ
        if self.end == 0:
            return flash_attention(q_NTHQ, k_NTKQ, v_NTKQ, window=window)
        assert T == 1
        first, seen = max(0, now - (window or now)), None
        if max(self.starts) > first:
            starts_N1 = torch.tensor(self.starts, device=keys.device).unsqueeze(1)
            seen = (torch.arange(first, now, device=keys.device) >= starts_N1)[:, None, None]
        # The queries of one key's head take the place of positions in other attention, so nothing is repeated for them.
        q_NKGQ = q_NTHQ.squeeze(1).unflatten(1, (keys.shape[2], -1))
        k_NKSQ, v_NKSQ = keys[:, first:now].transpose(1, 2), values[:, first:now].transpose(1, 2)
        return F.scaled_dot_product_attention(q_NKGQ, k_NKSQ, v_NKSQ, attn_mask=seen).flatten(1, 2).unsqueeze(1)
