"""The calls of each op in a model's step, on random inputs: for the tuner and the self-check.

A function of TRIALS gives the Trial of its op at a shape. Ops without a choice have none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from spt_fast.kernels.activation import swiglu_linear, swiglu_packed
from spt_fast.kernels.adamw import adamw_step_all
from spt_fast.kernels.attention import flash_attention, qkv_attention
from spt_fast.kernels.backend import OPS
from spt_fast.kernels.cross_entropy import linear_cross_entropy
from spt_fast.kernels.embedding import embedding
from spt_fast.kernels.feed_forward import swiglu_mlp
from spt_fast.kernels.fp8 import fp8_linear
from spt_fast.kernels.judging import Question, Trial
from spt_fast.kernels.linear import linear
from spt_fast.kernels.norm import add_rms_norm, rms_norm
from spt_fast.kernels.rotary import qk_norm_rope, rope
from spt_fast.kernels.self_attention import self_attention

DOCUMENTS = 4
"""Documents per window, in trials with documents."""
MOST_NUMBERS = 1 << 26
"""Size of AdamW's trial: it goes through memory once, however much there is."""


@dataclass(frozen=True)
class Shape:
    """The shape of a micro-batch and the model."""

    sequences: int
    context: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab_size: int
    window: int | None
    documents: bool
    parameters: int

    @property
    def small(self) -> Shape:
        """A smaller shape with the same launch."""
        return replace(self, sequences=1, context=min(self.context, 256), parameters=min(self.parameters, 1 << 16))


Make = Callable[[Shape, Callable[..., Tensor]], tuple[Callable[..., Any], Sequence[Tensor], int]]
"""(shape, random numbers of a shape) -> the fields of a Trial besides its candidates."""


def _attention(
    s: Shape, random: Callable[..., Tensor], *, packed: bool
) -> tuple[Callable[..., Any], Sequence[Tensor], int]:
    heads = (s.heads, s.kv_heads, s.kv_heads)
    inputs = [random(s.sequences, s.context, n, s.head_dim) for n in ([sum(heads)] if packed else heads)]
    call = partial(qkv_attention, kv_heads=s.kv_heads) if packed else flash_attention
    return partial(call, cu_seqlens=_ends(s, inputs[0].device), window=s.window), inputs, len(inputs)


def _self_attention(s: Shape, random: Callable[..., Tensor]) -> tuple[Callable[..., Any], Sequence[Tensor], int]:
    x, rows = random(s.sequences, s.context, s.width), (s.heads + 2 * s.kv_heads) * s.head_dim
    weight = random(rows, s.width) * s.width**-0.5
    call = partial(self_attention, cu_seqlens=_ends(s, x.device), window=s.window)

    def attend(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, backend: str) -> Tensor:
        return call(x, weight, s.kv_heads, s.head_dim, None, cos, sin, backend=backend)

    return attend, (x, weight, *_angles(s, x.device)), 2


def _ends(s: Shape, device: torch.device) -> Tensor | None:
    """Of the documents, if there are some."""
    step = max(1, s.context // DOCUMENTS)
    return torch.arange(0, s.sequences * s.context + 1, step, dtype=torch.int32, device=device) if s.documents else None


def _angles(s: Shape, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin."""
    angle = torch.arange(s.context, device=device).unsqueeze(1) * torch.logspace(0, -4, s.head_dim // 2).to(device)
    return angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)


def _loss(s: Shape, random: Callable[..., Tensor]) -> tuple[Callable[..., Any], Sequence[Tensor], int]:
    x, weight = random(s.sequences * s.context, s.width), random(s.vocab_size, s.width) * s.width**-0.5
    targets = torch.arange(len(x), device=x.device) * 7 % s.vocab_size
    return linear_cross_entropy, (x, weight, targets), 2


def _rope(s: Shape, random: Callable[..., Tensor], *, normalised: bool) -> Any:
    q, k = (random(s.sequences, s.context, heads, s.head_dim) for heads in (s.heads, s.kv_heads))
    cos, sin = _angles(s, q.device)
    if not normalised:
        return rope, (q, k, cos, sin), 2
    return qk_norm_rope, (q, k, random(s.head_dim), random(s.head_dim), cos, sin), 4


def _embedding(s: Shape, random: Callable[..., Tensor]) -> tuple[Callable[..., Any], Sequence[Tensor], int]:
    weight = random(s.vocab_size, s.width)
    tokens = (torch.arange(s.sequences * s.context) * 7 % s.vocab_size).view(s.sequences, s.context).to(weight.device)

    def look_up(weight: Tensor, tokens: Tensor, backend: str) -> Tensor:
        return embedding(tokens, weight, backend=backend)

    return look_up, (weight, tokens), 1


def _in_fp8(x: Tensor, weight: Tensor, backend: str) -> Tensor:
    """Float64 without fp8, so that a backend may have fp8's own error."""
    return linear(x, weight) if x.dtype == torch.float64 else fp8_linear(x, weight, backend=backend)


def _adamw(s: Shape, random: Callable[..., Tensor]) -> tuple[Callable[..., Any], Sequence[Tensor], int]:
    N = min(s.parameters, MOST_NUMBERS)
    param, grad, m = (random(N) for _ in range(3))
    fp32 = [x.float() for x in (m, random(N).square(), param)]

    def update(param: Tensor, grad: Tensor, m: Tensor, v: Tensor, master: Tensor, backend: str) -> tuple[Tensor, ...]:
        masters = [master] if param.dtype == torch.bfloat16 else None
        adamw_step_all([param], [grad], [m], [v], step=3, lr=1e-3, masters=masters, backend=backend)
        return param, m, v

    return update, (param, grad, *fp32), 0


TRIALS: dict[str, Make] = {
    "flash_attention": partial(_attention, packed=False),
    "qkv_attention": partial(_attention, packed=True),
    "self_attention": _self_attention,
    "linear_cross_entropy": _loss,
    "add_rms_norm": lambda s, random: (
        add_rms_norm,
        (*(random(s.sequences * s.context, s.width) for _ in range(2)), random(s.width)),
        3,
    ),
    "rms_norm": lambda s, random: (rms_norm, (random(s.sequences * s.context, s.width), random(s.width)), 2),
    "embedding": _embedding,
    "swiglu_packed": lambda s, random: (swiglu_packed, (random(s.sequences * s.context, 2 * s.ffn),), 1),
    "swiglu_linear": lambda s, random: (
        swiglu_linear,
        (random(s.sequences * s.context, 2 * s.ffn), random(s.width, s.ffn) * s.ffn**-0.5),
        2,
    ),
    "swiglu_mlp": lambda s, random: (
        swiglu_mlp,
        (
            random(s.sequences * s.context, s.width),
            random(2 * s.ffn, s.width) * s.width**-0.5,
            random(s.width, s.ffn) * s.ffn**-0.5,
        ),
        3,
    ),
    "fp8_linear": lambda s, random: (
        _in_fp8,
        (random(s.sequences * s.context, s.width), random(2 * s.ffn, s.width) * s.width**-0.5),
        2,
    ),
    "rope": partial(_rope, normalised=False),
    "qk_norm_rope": partial(_rope, normalised=True),
    "adamw_step": _adamw,
}


def questions(
    ops: Sequence[str], shape: Shape, dtype: torch.dtype, device: torch.device, *, deterministic: bool
) -> list[Question]:
    """The tuner's questions on these ops."""
    name = str(dtype).removeprefix("torch.")
    source, whole, small = "spt_fast.kernels.trials:trial", asdict(shape), asdict(shape.small)
    return [Question(op, source, whole, small, name, str(device), deterministic) for op in ops]


def trial(op: str, shape: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> Trial:
    """The Trial of an op."""
    return trial_of(op, Shape(**shape), dtype, device)


def trial_of(op: str, shape: Shape, dtype: torch.dtype, device: torch.device) -> Trial:
    """The Trial of an op."""
    generator = torch.Generator().manual_seed(0)

    def random(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator).to(device, dtype)

    call, inputs, gradients = TRIALS[op](shape, random)
    return Trial(call, inputs, gradients, OPS[op].candidates(*inputs))
