"""Causal attention: documents, sliding window, grouped queries.

    o_i = sum_j p_ij v_j,   p_i = softmax over the visible j of scale q_i·k_j                    (Dao, arXiv 2307.08691)

Key j is visible to query i if j <= i (causal), j > i - window (with a window) and both are in one document (with
cu_seqlens). Query head h reads key/value head floor(h Hk / Hq).

Documents are given as the cumulative ends of the B·T positions, flattened: document d is cu_seqlens[d] …
cu_seqlens[d+1] - 1. Ends of rows cut too, documents may be empty, and positions past the last document are padding:
they see nothing and are seen by nothing; their output and all their gradients are 0, whatever they hold (NaN too).

`qkv_attention` is the same for a projection with queries, keys and values side by side, and includes rotary positions
and QK-norm: attention_packed.py.

Legend: B rows, T positions, H heads, D head dimension; doc_BT the document number of every position.

The work is 4·T·D multiply-adds per head and row of queries forward and 10 backward, half of it under the causal mask. A
T x T matrix of scores per head would cost bytes; no implementation here writes one except a masked SDPA:

triton      our kernels, with documents, window and grouped queries in them; the backward pass is deterministic:
            attention_triton.py
flash_attn  the flash-attn package in its versions (flash_attn_2, _3, _4), if one can be imported, and the one inside
            PyTorch (flash_attn_torch); its backward pass adds atomically, in any order: flash_attn.py
sdpa        PyTorch's fused kernels (on a GPU cuDNN's or flash's) for plain attention; documents need a mask of B·T·T
            booleans and a window one of T·T, which is simple but not fast; the backward pass of cuDNN's is not
            deterministic
cpu         our kernel for CPUs, csrc/attention.cpp, causal; float32 needs AVX-512, bf16 AVX512-BF16: attention_cpu.py
reference   sdpa

Triton's and the CPU's kernels are custom ops; the others are differentiable PyTorch calls. If PyTorch is set to be
deterministic, `auto` uses only Triton's kernels on a GPU.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from spt_fast.errors import invalid
from spt_fast.kernels import attention_cpu, attention_packed, attention_triton, documents, flash_attn, rotary
from spt_fast.kernels.backend import Candidate, Op, is_transformed
from spt_fast.kernels.linear import as_autocast

MAX_HEAD_DIM = 256
"""Largest head dimension of the Triton kernels and of flash-attn, which also needs a multiple of 8."""


def flash_attention(
    q_BTHD: Tensor,
    k_BTHD: Tensor,
    v_BTHD: Tensor,
    *,
    causal: bool = True,
    cu_seqlens: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of every query to its visible keys; the result has the shape and dtype of q_BTHD,
    under torch.autocast its dtype.

    k_BTHD and v_BTHD may have fewer heads, a divisor of q's (grouped queries). cu_seqlens is int32 [n+1] on q's device:
    starts at 0, non-decreasing, at most B·T. window counts the visible keys, the query's own included, and needs
    causal=True. scale, positive, defaults to D^(-1/2). ValueError: shapes, dtypes, window, scale or cu_seqlens that
    don't fit (cu_seqlens' values are checked only on a CPU, where that needs no synchronisation), or a backend that
    isn't available.
    """
    q_BTHD, k_BTHD, v_BTHD = as_autocast(q_BTHD, k_BTHD, v_BTHD)
    _check(q_BTHD, k_BTHD, v_BTHD, causal, cu_seqlens, window, scale)
    if window is not None and window >= q_BTHD.shape[1]:
        window = None
    scale = q_BTHD.shape[-1] ** -0.5 if scale is None else scale
    chosen = pick(backend, q_BTHD, causal, masked=cu_seqlens is not None or window is not None)
    if chosen == "triton":
        return attention_triton.attention(q_BTHD, k_BTHD, v_BTHD, cu_seqlens, causal, window, scale)[0]
    if chosen == "cpu":
        return attention_cpu.attend(q_BTHD, k_BTHD, v_BTHD, cu_seqlens, window, scale)
    function = partial(_flash_attn, chosen) if chosen in flash_attn.BACKENDS else _sdpa
    return function(q_BTHD, k_BTHD, v_BTHD, causal, cu_seqlens, window, scale)


def qkv_attention(
    qkv_BTSD: Tensor,
    kv_heads: int,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    cu_seqlens: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Causal attention of a whole projection: H query heads, then kv_heads key heads and as many value heads, S in
    total; the result is [B, T, H, D].

    With cos and sin, as in `rope`, queries and keys are rotated to their positions; with q_weight and k_weight, as in
    `qk_norm_rope`, normalised before. The rest as in `flash_attention`. The numbers are those of the separate ops, but
    the gradients of all three are written to one tensor. ValueError: shapes, dtypes and values that don't fit, or a
    backend that isn't available.
    """
    return attend(
        qkv_BTSD, kv_heads, cos, sin, q_weight, k_weight, eps, cu_seqlens, window, scale, backend, _QKV_ATTENTION
    )


def attend(
    qkv_BTSD: Tensor,
    K: int,
    cos: Tensor | None,
    sin: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    cu_seqlens: Tensor | None,
    window: int | None,
    scale: float | None,
    backend: str,
    op: Op,
) -> Tensor:
    """`qkv_attention`, for an op with the same backends."""
    (qkv_BTSD,) = as_autocast(qkv_BTSD)
    if not eps >= 0:
        raise ValueError(invalid(f"{op.name}(eps)", eps, "it must be at least 0"))
    window, scale = checked(qkv_BTSD, K, cos, sin, q_weight, k_weight, cu_seqlens, window, scale)
    q_BTHD, k_BTHD, v_BTHD = attention_packed.split(qkv_BTSD, K)
    if is_transformed():
        if cos is not None and sin is not None:
            if q_weight is None or k_weight is None:
                q_BTHD, k_BTHD = rotary.rope(q_BTHD, k_BTHD, cos, sin)
            else:
                q_BTHD, k_BTHD = rotary.qk_norm_rope(q_BTHD, k_BTHD, q_weight, k_weight, cos, sin, eps)
        return flash_attention(
            q_BTHD, k_BTHD, v_BTHD, cu_seqlens=cu_seqlens, window=window, scale=scale, backend=backend
        )
    masked = cu_seqlens is not None or window is not None
    chosen = pick(backend, q_BTHD, True, masked=masked, op=op)
    positions = (qkv_BTSD, q_weight, k_weight, cos, sin)
    if chosen in ("triton", "cpu"):
        return attention_packed.Attention.apply(*positions, cu_seqlens, K, window, scale, eps, chosen)
    if cos is not None:
        by = rotary.pick("reference" if backend == "reference" else "auto", q_BTHD, normalised=q_weight is not None)
        q_BTHD, k_BTHD, v_BTHD = attention_packed.Rotated.apply(*positions, K, eps, by)
    function = partial(_flash_attn, chosen) if chosen in flash_attn.BACKENDS else _sdpa
    return function(q_BTHD, k_BTHD, v_BTHD, True, cu_seqlens, window, scale)


def checked(
    qkv_BTSD: Tensor,
    K: int,
    cos: Tensor | None,
    sin: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cu_seqlens: Tensor | None,
    window: int | None,
    scale: float | None,
) -> tuple[int | None, float]:
    """The window, None if it is as long as the rows, and the scale. ValueError for invalid arguments of
    `qkv_attention`."""
    if qkv_BTSD.dim() != 4 or not 0 < K <= (qkv_BTSD.shape[2] - 1) // 2:
        expected = f"a number of heads of qkv [B, T, H + 2 K, D], which is {tuple(qkv_BTSD.shape)}"
        raise ValueError(invalid("qkv_attention(kv_heads)", K, expected))
    q_BTHD, k_BTHD, v_BTHD = attention_packed.split(qkv_BTSD, K)
    _check(q_BTHD, k_BTHD, v_BTHD, True, cu_seqlens, window, scale, op="qkv_attention")
    if cos is not None and sin is not None:
        rotary.check("qkv_attention", q_BTHD, k_BTHD, cos, sin, q_weight, k_weight)
    elif q_weight is not None or k_weight is not None or cos is not sin:
        given = {"cos": cos, "sin": sin, "q_weight": q_weight, "k_weight": k_weight}
        missing = next(name for name, x in given.items() if x is None)
        raise ValueError(f"qkv_attention: {missing} is missing; weights need cos and sin, and each of a pair the other")
    if window is not None and window >= qkv_BTSD.shape[1]:
        window = None
    return window, qkv_BTSD.shape[-1] ** -0.5 if scale is None else scale


def pick(backend: str, q_BTHD: Tensor, causal: bool, *, masked: bool, op: Op | None = None) -> str:
    """The backend that runs; `masked`: there are documents or a window, for which SDPA would need a mask of T x T."""
    D = q_BTHD.shape[-1]
    most = MAX_HEAD_DIM // 2 if q_BTHD.dtype == torch.float32 else MAX_HEAD_DIM  # bytes decide a program's registers
    too_wide = f"it supports head dimensions up to {most} in {q_BTHD.dtype}, not {D}" if most < D else None
    odd = f"it supports head dimensions that are multiples of 8, not {D}" if D % 8 else None
    unordered = flash_attn.BACKENDS if torch.are_deterministic_algorithms_enabled() else ()
    return (op or _FLASH_ATTENTION).pick(
        backend,
        q_BTHD,
        passed_over=("sdpa", *unordered) if masked or unordered else (),
        triton=too_wide,
        cpu=attention_cpu.obstacle(q_BTHD, causal),
        **dict.fromkeys(flash_attn.BACKENDS, too_wide or odd),
    )


def _check(
    q_BTHD: Tensor,
    k_BTHD: Tensor,
    v_BTHD: Tensor,
    causal: bool,
    cu_seqlens: Tensor | None,
    window: int | None,
    scale: float | None,
    op: str = "flash_attention",
) -> None:
    shapes = f"q is {tuple(q_BTHD.shape)}, k is {tuple(k_BTHD.shape)}, v is {tuple(v_BTHD.shape)}"
    if q_BTHD.dim() != 4 or k_BTHD.shape != v_BTHD.shape or not q_BTHD.shape[3]:
        raise ValueError(f"{op}: {shapes}; they must be [B, T, H, D] with D above 0, k and v alike")
    B, T, H, D = q_BTHD.shape
    if (
        k_BTHD.dim() != 4
        or (k_BTHD.shape[0], k_BTHD.shape[1], k_BTHD.shape[3]) != (B, T, D)
        or (H % k_BTHD.shape[2] if k_BTHD.shape[2] else H)
    ):
        raise ValueError(f"{op}: {shapes}; k and v must agree with q in B, T and D, and their heads must divide q's")
    if not q_BTHD.dtype == k_BTHD.dtype == v_BTHD.dtype:
        raise ValueError(
            f"{op}: q is {q_BTHD.dtype}, k is {k_BTHD.dtype}, v is {v_BTHD.dtype}; they must have one dtype"
        )
    if window is not None and (window < 1 or not causal):
        raise ValueError(invalid(f"{op}(window)", window, "it must be at least 1, and needs `causal`"))
    if scale is not None and not scale > 0:  # fused kernels, PyTorch's too, scale the largest score
        raise ValueError(invalid(f"{op}(scale)", scale, "it must be positive"))
    if cu_seqlens is None:
        return
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or len(cu_seqlens) == 0:
        given = (cu_seqlens.dtype, tuple(cu_seqlens.shape))
        raise ValueError(invalid(f"{op}(cu_seqlens)", given, "it must be int32 [n+1]"))
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        ends = cu_seqlens.tolist()
        if ends[0] != 0 or ends != sorted(ends) or ends[-1] > B * T:
            expected = f"it must start at 0, never fall and end by B·T = {B * T}"
            raise ValueError(invalid(f"{op}(cu_seqlens)", ends, expected))


def _sdpa(
    q_BTHD: Tensor,
    k_BTHD: Tensor,
    v_BTHD: Tensor,
    causal: bool,
    cu_seqlens: Tensor | None,
    window: int | None,
    scale: float,
) -> Tensor:
    if cu_seqlens is None and window is None:
        return _sdpa_of(q_BTHD, k_BTHD, v_BTHD, None, causal, scale)
    B, T, device = q_BTHD.shape[0], q_BTHD.shape[1], q_BTHD.device
    distance_TT = torch.arange(T, device=device).unsqueeze(1) - torch.arange(T, device=device)
    visible = distance_TT >= (0 if causal else -T)
    if window is not None:
        visible = visible & (distance_TT < window)
    if cu_seqlens is None:
        return _sdpa_of(q_BTHD, k_BTHD, v_BTHD, visible, False, scale)
    # A padding query, which would otherwise see nothing and divide 0 by 0, sees the other padding.
    doc_BT = documents.spans(cu_seqlens, B, T)[0]  # no two documents of a row start at the same place
    padding_BT11 = _padding(q_BTHD, cu_seqlens)
    q_BTHD, k_BTHD, v_BTHD = (x.masked_fill(padding_BT11, 0) for x in (q_BTHD, k_BTHD, v_BTHD))
    visible_B1TT = (visible & (doc_BT.unsqueeze(2) == doc_BT.unsqueeze(1))).unsqueeze(1)
    return _sdpa_of(q_BTHD, k_BTHD, v_BTHD, visible_B1TT, False, scale).masked_fill(padding_BT11, 0)


def _sdpa_of(
    q_BTHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, visible: Tensor | None, causal: bool, scale: float
) -> Tensor:
    q_BHTD, k_BHTD, v_BHTD = (x.transpose(1, 2) for x in (q_BTHD, k_BTHD, v_BTHD))
    grouped = {"enable_gqa": True} if k_BHTD.shape[1] != q_BHTD.shape[1] else {}  # never of a symbolic value
    o_BHTD = F.scaled_dot_product_attention(
        q_BHTD, k_BHTD, v_BHTD, attn_mask=visible, is_causal=causal, scale=scale, **grouped
    )
    return o_BHTD.transpose(1, 2)


def _padding(q_BTHD: Tensor, cu_seqlens: Tensor) -> Tensor:
    """[B, T, 1, 1], True past the last document.

    Padding is zeroed in inputs (a weight of 0 times NaN is NaN) and in outputs; both give zero gradients.
    """
    B, T = q_BTHD.shape[:2]
    return (torch.arange(B * T, device=q_BTHD.device) >= cu_seqlens[-1]).view(B, T, 1, 1)


def _flash_attn(
    backend: str,
    q_BTHD: Tensor,
    k_BTHD: Tensor,
    v_BTHD: Tensor,
    causal: bool,
    cu_seqlens: Tensor | None,
    window: int | None,
    scale: float,
) -> Tensor:
    if cu_seqlens is None:
        return flash_attn.attention(backend, q_BTHD, k_BTHD, v_BTHD, None, causal, window, scale)
    B, T = q_BTHD.shape[:2]
    cuts = documents.cut_by_rows(cu_seqlens, B, T)
    padding_BT11 = _padding(q_BTHD, cu_seqlens)
    q_BTHD, k_BTHD, v_BTHD = (x.masked_fill(padding_BT11, 0) for x in (q_BTHD, k_BTHD, v_BTHD))
    o_BTHD = flash_attn.attention(backend, q_BTHD, k_BTHD, v_BTHD, cuts, causal, window, scale)
    return o_BTHD.masked_fill(padding_BT11, 0)


def _launches(x: Tensor, *_: Tensor) -> list[Candidate]:
    return [Candidate("triton", (launch,)) for launch in attention_triton.launches(x)] if x.is_cuda else []


ATTENTION_BACKENDS = {
    "cuda": {
        "flash_attn_3": "the fastest on Hopper in published figures, 560 to 685 TFLOP/s forward on an H100 over 2K "
        "to 8K tokens; nothing is measured here yet",
        "flash_attn_4": "the fastest on Blackwell in published figures; nothing is measured here yet",
        "sdpa": "cuDNN's kernels: 302 to 490 TFLOP/s forward and 229 to 353 backward in a step on an H200, over 1K "
        "and 2K tokens; for documents and windows it would need a mask of T x T",
        "flash_attn_2": "documents and windows without a mask of T x T; published figures are 300 to 400 TFLOP/s "
        "on an H100; nothing is measured here yet",
        "triton": "documents and windows without a mask of T x T, and deterministic; published figures of Triton "
        "kernels are 330 to 480 TFLOP/s on an H100; ours are not measured yet",
        "flash_attn_torch": "flash-attn 2 inside PyTorch, where no package is installed; nothing is measured here yet, "
        "so only the tuner chooses it",
        "flash_attn": "the first available version of flash-attn",
        "reference": "PyTorch ops",
    },
    "cpu": {
        **({"cpu": "6 times SDPA in bf16, 3 to 4 times in float32 (AMD EPYC)"} if attention_cpu.SUPPORTED else {}),
        "reference": "PyTorch ops",
    },
}
_FLASH_ATTENTION = Op("flash_attention", ATTENTION_BACKENDS, attention_triton.variants, _launches)
_QKV_ATTENTION = Op("qkv_attention", ATTENTION_BACKENDS, attention_triton.variants, _launches)
