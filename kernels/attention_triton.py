"""Attention in Triton, after FlashAttention-2 (Dao, arXiv 2307.08691): no T x T matrix is ever written.

    s_ij = scale q_i·k_j        lse_i = log sum_j exp s_ij        p_ij = exp(s_ij - lse_i)        o_i = sum_j p_ij v_j
    dv_j = sum_i p_ij do_i      ds_ij = p_ij (do_i·v_j - delta_i),  delta_i = do_i·o_i
    dq_i = scale sum_j ds_ij k_j        dk_j = scale sum_i ds_ij q_i

Legend: B rows, T positions, H query heads, K key/value heads, D head dimension; M a block of queries, N one of keys.

Forward, a program takes a block of queries of one head and walks over blocks of keys with a running maximum and sum. It
saves lse, one number per query and head, from which the backward pass recomputes p: 14 T²D multiply-adds per head
instead of 10, but nothing of size T². Backward is two kernels, each of which owns the sums that it makes: one loops
over keys for dq (and computes delta, which the other reads), one loops over queries for dk and dv, through all query
heads of its key/value head. So nothing is added atomically, and the backward pass is deterministic.

A query sees an interval of keys, a key is seen by an interval of queries, and both ends never decrease from one
position to the next, for any mixture of causality, window and documents. So the intervals of a block's first and last
position give the range of its loop, and the blocks that all of it sees, where no mask is needed. These are one loop
with a branch, or, in the launches called split, separate loops: more registers, no branch. Forward, keys and values may
be copied by Hopper's copy unit (TMA) instead of loads, and a program may take several blocks of queries (a persistent
grid), if the tuner finds it faster. The start and end of each position's document are computed once, on the device.
Padding, past the last document, counts as the end of a row: it is never loaded.

p is a power of 2: scale times log2(e) is multiplied into s, and lse is kept in base 2. Sums are in float32. Both
operands of a matmul have the dtype of the inputs: p and ds are rounded to it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from spt_fast.kernels.backend import custom_op, differentiable, new_like, with_dense_rows
from spt_fast.kernels.documents import spans as spans_of
from spt_fast.kernels.launch import (
    DTYPES,
    INTERPRETED,
    TRITON_VERSION,
    Config,
    TensorDescriptor,
    Variant,
    jit,
    launched,
    multiprocessors,
    next_power_of_2,
    tl,
)

# ------------------------------------------------------------------------------------------------ custom ops


def _empty_results(
    q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, cu_seqlens: Tensor | None, *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    B, T, H, D = q_BTHD.shape
    spans = q_BTHD.new_empty(0 if cu_seqlens is None else (2, B, T), dtype=torch.int32)
    return q_BTHD.new_empty(B, T, H, D), q_BTHD.new_empty(B, H, T, dtype=torch.float32), spans


@custom_op("flash_attention", _empty_results)
def attention(
    q_BTHD: Tensor,
    k_BTKD: Tensor,
    v_BTKD: Tensor,
    cu_seqlens: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(o [B, T, H, D], lse [B, H, T] in base 2, [2, B, T]: start and end in its row of each position's document, or [0]
    without documents). scale must be positive."""
    q_BTHD, k_BTKD, v_BTKD = with_dense_rows(q_BTHD, k_BTKD, v_BTKD)
    B, T, H, D = q_BTHD.shape
    K = k_BTKD.shape[2]
    o_BTHD = q_BTHD.new_empty(B, T, H, D)
    lse_BHT = q_BTHD.new_empty(B, H, T, dtype=torch.float32)
    spans = None if cu_seqlens is None else spans_of(cu_seqlens, B, T)
    config = _launched("forward", q_BTHD)
    constants = _constants(q_BTHD, config)
    keys: list[Any] = [k_BTKD, v_BTKD]
    fit = cu_seqlens is None and all(_fits_descriptor(x, constants["WIDTH"]) for x in keys)
    constants["TMA"] = int(fit and constants.get("TMA", 0))  # a checkpoint's launches may lack it
    per_sm = constants.setdefault("PERSISTENT", 0)
    if constants["TMA"]:
        keys = [
            TensorDescriptor(x, list(x.shape), list(x.stride()), [1, config["N"], 1, constants["WIDTH"]]) for x in keys
        ]
    if o_BTHD.numel():
        tiles = -(-T // config["M"]) * B * H
        programs = min(tiles, per_sm * multiprocessors(q_BTHD.device)) if per_sm else tiles
        _forward_kernel[(programs,)](
            q_BTHD, *keys, o_BTHD, lse_BHT, *_documents_arguments(cu_seqlens, spans),
            *q_BTHD.stride()[:3], *k_BTKD.stride()[:3], *v_BTKD.stride()[:3],
            B, T, H, H // K, window, scale, CAUSAL=causal, **constants,
        )  # fmt: skip
    return o_BTHD, lse_BHT, o_BTHD.new_empty(0, dtype=torch.int32) if spans is None else spans


@custom_op("flash_attention_backward", lambda do_BTHD, q_BTHD, k_BTKD, v_BTKD, *_: new_like(q_BTHD, k_BTKD, v_BTKD))
def _attention_backward(
    do_BTHD: Tensor,
    q_BTHD: Tensor,
    k_BTKD: Tensor,
    v_BTKD: Tensor,
    o_BTHD: Tensor,
    lse_BHT: Tensor,
    spans: Tensor,
    cu_seqlens: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv), each contiguous."""
    dq_BTHD, dk_BTKD, dv_BTKD = new_like(q_BTHD, k_BTKD, v_BTKD)
    backward_into(
        dq_BTHD, dk_BTKD, dv_BTKD, do_BTHD, q_BTHD, k_BTKD, v_BTKD, o_BTHD, lse_BHT, spans, cu_seqlens,
        causal, window, scale,
    )  # fmt: skip
    return dq_BTHD, dk_BTKD, dv_BTKD


def backward_into(
    dq_BTHD: Tensor,
    dk_BTKD: Tensor,
    dv_BTKD: Tensor,
    do_BTHD: Tensor,
    q_BTHD: Tensor,
    k_BTKD: Tensor,
    v_BTKD: Tensor,
    o_BTHD: Tensor,
    lse_BHT: Tensor,
    spans: Tensor,
    cu_seqlens: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float,
) -> None:
    """Writes the three gradients; the numbers of a head are contiguous, and dk has dv's strides."""
    do_BTHD, q_BTHD, k_BTKD, v_BTKD = with_dense_rows(do_BTHD, q_BTHD, k_BTKD, v_BTKD)
    B, T, H, _ = q_BTHD.shape
    K = k_BTKD.shape[2]
    if not dq_BTHD.numel():
        dk_BTKD.zero_()
        dv_BTKD.zero_()
        return
    delta_BHT = torch.empty_like(lse_BHT)
    documents = _documents_arguments(cu_seqlens, spans)
    strides = [stride for x in (q_BTHD, k_BTKD, v_BTKD, do_BTHD) for stride in x.stride()[:3]]
    config = _launched("dq", q_BTHD)
    _dq_kernel[(-(-T // config["M"]) * B * H,)](
        q_BTHD, k_BTKD, v_BTKD, o_BTHD, do_BTHD, lse_BHT, delta_BHT, dq_BTHD, *documents,
        *strides, *dq_BTHD.stride()[:3],
        T, H, H // K, window, scale, CAUSAL=causal, **_constants(q_BTHD, config),
    )  # fmt: skip
    config = _launched("dkv", q_BTHD)
    _dkv_kernel[(-(-T // config["N"]) * B * K,)](
        q_BTHD, k_BTKD, v_BTKD, do_BTHD, lse_BHT, delta_BHT, dk_BTKD, dv_BTKD, *documents,
        *strides, *dk_BTKD.stride()[:3],
        T, K, H // K, window, scale, CAUSAL=causal, **_constants(q_BTHD, config),
    )  # fmt: skip


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    q_BTHD, k_BTKD, v_BTKD, cu_seqlens, ctx.causal, ctx.window, ctx.scale = inputs
    ctx.save_for_backward(q_BTHD, k_BTKD, v_BTKD, *output, cu_seqlens)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, do_BTHD: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if do_BTHD is None:
        return (None,) * 7
    gradients = _attention_backward(do_BTHD, *ctx.saved_tensors, ctx.causal, ctx.window, ctx.scale)
    return *gradients, None, None, None, None


differentiable(attention, _gradients, _setup_context)


def _documents_arguments(cu_seqlens: Tensor | None, spans: Tensor | None) -> tuple[Tensor | int | None, ...]:
    if cu_seqlens is None or spans is None:
        return None, None, None, 0
    return spans[0], spans[1], cu_seqlens.contiguous(), len(cu_seqlens) - 1


# ------------------------------------------------------------------------------------------------ launches


def _shape_class(q_BTHD: Tensor) -> tuple[int, int, int]:
    """The properties that decide a launch: the padded head dimension, the size of a number, the architecture.

    A half-precision head is padded to at least 64, since Triton from 3.6 on reads beyond narrower tiles on Hopper.
    Launches for 80 use less than 99 KB of shared memory, so that they run on every GPU that is neither 90 nor 100."""
    major = 0 if INTERPRETED else torch.cuda.get_device_capability(q_BTHD.device)[0]
    return _width(q_BTHD.shape[-1], q_BTHD.itemsize), q_BTHD.itemsize, {9: 90, 10: 100}.get(major, 80)


def _width(D: int, itemsize: int) -> int:
    return max(16 if INTERPRETED or itemsize == 4 else 64, next_power_of_2(D))


FENCED = tuple(int(part) for part in (TRITON_VERSION or "0.0").split(".")[:2]) >= (3, 7)
"""Whether the compiler puts a fence between asynchronous copies to shared memory and the matmuls (wgmma) of Hopper and
later that read them. 3.6 doesn't inside a loop, so copies are not asynchronous there: one stage."""


def _config(
    kernel: str,
    arch: int,
    M: int,
    N: int,
    warps: int,
    stages: int,
    *,
    split: bool = False,
    tma: bool = False,
    persistent: int = 0,
) -> Config:
    """split: fully visible blocks of keys have a separate loop, without a branch. tma: keys and values are copied by
    Hopper's copy unit, if there are no documents; it needs no fence. persistent: if not 0, the programs per
    multiprocessor, which take one block of queries after the other, those with the most keys first."""
    flags = {
        "forward": (("SPLIT", int(split)), ("TMA", int(tma)), ("PERSISTENT", persistent)),
        "dq": (("SPLIT", int(split)),),
        "dkv": (),
    }[kernel]
    return Config((("M", M), ("N", N), *flags), warps, stages if FENCED or arch == 80 or tma else 1)


def _fits_descriptor(x_BTKD: Tensor, width: int) -> bool:
    aligned = x_BTKD.data_ptr() % 16 == 0 and all(step * x_BTKD.itemsize % 16 == 0 for step in x_BTKD.stride()[:3])
    return aligned and x_BTKD.shape[-1] == width


def default(kernel: str, width: int, itemsize: int, arch: int) -> Config:
    """The launch of a kernel ("forward", "dq" or "dkv") without measurements; the rest as in `_shape_class`."""
    if INTERPRETED:
        return _config(kernel, 80, *((16, 32) if kernel == "dkv" else (32, 16)), 4, 1)
    if itemsize == 4:
        return _config(kernel, 80, *FLOAT32[kernel][0 if width <= 64 else 1])
    return _config(kernel, arch, *HALF[kernel, arch][_size(width)])


def candidates(kernel: str, width: int, itemsize: int, arch: int) -> list[Config]:
    """The launches to measure, the default first; arguments as in `default`."""
    every = [default(kernel, width, itemsize, arch)]
    if itemsize == 2 and arch == 90:
        every += [_config(kernel, arch, *sizes) for sizes in CANDIDATES[kernel][_size(width)]]
        if kernel != "dkv" and width <= 128:
            every += [_config(kernel, arch, *sizes, split=True) for sizes in SPLIT[kernel][_size(width)]]
        if kernel == "forward" and width <= 128:
            every += [_config(kernel, arch, *sizes, split=split, tma=True) for split, *sizes in TMA[_size(width)]]
            every += [
                _config(kernel, arch, *sizes, tma=tma, persistent=programs)
                for tma, programs, *sizes in PERSISTENT[_size(width)]
            ]
    return list(dict.fromkeys(every))


def launches(q_BTHD: Tensor) -> list[tuple[str, tuple, Config]]:
    """Further launches to measure for such queries, each for one kernel."""
    shape = _shape_class(q_BTHD)
    kernels = ("forward", "dq", "dkv")
    return [(f"attention_{kernel}", shape, config) for kernel in kernels for config in candidates(kernel, *shape)[1:]]


def _size(width: int) -> int:
    return 0 if width <= 64 else 1 if width == 128 else 2


HALF = {
    ("forward", 80): ((128, 64, 8, 3), (128, 64, 8, 2), (64, 32, 8, 2)),
    ("forward", 90): ((128, 64, 8, 2), (128, 64, 8, 3), (64, 64, 8, 2)),
    ("forward", 100): ((128, 128, 8, 3), (128, 64, 8, 3), (64, 64, 8, 2)),
    ("dq", 80): ((128, 64, 8, 2), (64, 64, 8, 2), (64, 32, 8, 1)),
    ("dq", 90): ((128, 64, 8, 2), (128, 64, 8, 2), (64, 64, 8, 1)),
    ("dq", 100): ((128, 64, 8, 2), (128, 64, 8, 2), (64, 64, 8, 1)),
    ("dkv", 80): ((32, 64, 8, 2), (32, 64, 8, 2), (32, 32, 8, 1)),
    ("dkv", 90): ((64, 128, 8, 2), (64, 64, 8, 2), (32, 64, 8, 1)),
    ("dkv", 100): ((64, 128, 8, 2), (64, 64, 8, 2), (32, 64, 8, 1)),
}
"""(M, N, warps, stages) for 2-byte numbers, by heads padded to 64, 128 and 256. On Hopper and later at least 64 each,
since Triton has bugs with narrower tiles there; but dkv at 256 spills with more than 32. On Hopper dkv at 128 is right
before it is fast: of 64 rows and 8 warps, both halves compute all of one product and share another, and the assembler
lets each product wait for the last. With 32 queries none waits, which is for the tuner to check. Forward at 64 has 128
registers per thread on Hopper, so that two programs share a multiprocessor: one computes exponentials while the other
multiplies."""

FLOAT32 = {
    "forward": ((32, 32, 8, 2), (32, 16, 8, 2)),
    "dq": ((32, 32, 4, 2), (32, 16, 8, 2)),
    "dkv": ((16, 32, 4, 2), (16, 16, 4, 2)),
}
"""For heads padded to at most 64, and for wider ones."""

CANDIDATES = {
    "forward": (
        ((128, 128, 8, 3), (128, 128, 8, 2), (128, 64, 8, 3), (128, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 3)),
        ((128, 64, 8, 2), (64, 64, 4, 2), (64, 64, 8, 2)),
        ((64, 64, 8, 1),),
    ),
    "dq": (
        ((128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 2), (64, 64, 4, 3)),
        ((128, 64, 8, 3), (64, 64, 4, 2)),
        (),
    ),
    "dkv": (((64, 128, 8, 3), (64, 64, 4, 2)), ((32, 128, 8, 2), (32, 128, 8, 3)), ()),
}
"""In addition to the defaults, on Hopper; none of them spills, and no product waits for the last."""

SPLIT = {
    "forward": (
        ((128, 64, 8, 2), (128, 128, 8, 3), (64, 64, 4, 3)),
        ((128, 64, 8, 3), (128, 64, 8, 2)),
    ),
    "dq": (((128, 64, 8, 2), (64, 64, 4, 2)), ((128, 64, 8, 2),)),
}
"""The split ones. dq of heads of 80 spills 8 bytes."""

TMA = (
    ((False, 128, 64, 8, 2), (False, 128, 128, 8, 2), (True, 128, 128, 8, 2), (False, 128, 64, 4, 3)),
    ((False, 128, 64, 8, 2), (False, 128, 128, 8, 2), (True, 128, 64, 8, 3)),
)
"""Forward, split or not, with keys and values copied by descriptors."""

PERSISTENT = (
    ((False, 1, 128, 64, 8, 2), (True, 1, 128, 128, 8, 2), (True, 2, 64, 64, 4, 3)),
    ((False, 1, 128, 64, 8, 3), (True, 1, 128, 64, 8, 2)),
)
"""Forward, by descriptors or not, with as many programs per multiprocessor as its registers hold at once."""


def _launched(kernel: str, q_BTHD: Tensor) -> Config:
    shape = _shape_class(q_BTHD)
    return launched(f"attention_{kernel}", shape, default(kernel, *shape))


def _constants(q_BTHD: Tensor, config: Config) -> dict[str, Any]:
    D = q_BTHD.shape[-1]
    return {"D": D, "WIDTH": _width(D, q_BTHD.itemsize), **config.options}


# ------------------------------------------------------------------------------------------------ kernels


jit_for_any_documents = partial(jit, do_not_specialize=("documents",))
"""Otherwise Triton would compile a kernel again for one document and for multiples of 16."""


@jit
def _load(ptr, first, length, stride, ROWS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr):
    """[ROWS, WIDTH] from row `first` on, 0 past `length` and past D."""
    rows, columns = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    mask = (first + rows < length)[:, None]
    if D != WIDTH:
        mask = mask & (columns < D)[None, :]
    ptr += tl.cast(first, tl.int64) * stride
    return tl.load(ptr + rows[:, None] * stride + columns[None, :], mask, 0.0)


@jit
def _store(ptr, x, first, length, T, stride, ROWS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr):
    """Write x [ROWS, WIDTH] to the rows from `first` on, and zeros to those from `length` to T."""
    rows, columns = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    mask = (first + rows < T)[:, None]
    if D != WIDTH:
        mask = mask & (columns < D)[None, :]
    ptr += tl.cast(first, tl.int64) * stride
    x = tl.where((first + rows < length)[:, None], x, 0.0).to(ptr.dtype.element_ty)
    tl.store(ptr + rows[:, None] * stride + columns[None, :], x, mask)


@jit
def _row_length(cu_seqlens_ptr, documents, row, T):
    """The number of positions of a row in documents; the rest is padding."""
    length = T
    if cu_seqlens_ptr is not None:
        length = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + documents) - row * T, 0), T)
    return length


@jit
def _keys_of(i, starts_ptr, ends_ptr, row, T, length, window, CAUSAL: tl.constexpr):
    """The first key that query i sees, and the one after the last; i is a number or a block."""
    low, high = i * 0, i * 0 + length
    if starts_ptr is not None:
        low = tl.load(starts_ptr + row * T + i, i < length, 0)
        high = tl.load(ends_ptr + row * T + i, i < length, 0)
    if CAUSAL:
        high = tl.minimum(high, i + 1)
    if window is not None:
        low = tl.maximum(low, i - window + 1)
    return low, high


@jit
def _queries_of(j, starts_ptr, ends_ptr, row, T, length, window, CAUSAL: tl.constexpr):
    """The first query that sees key j, and the one after the last; j is a number or a block."""
    low, high = j * 0, j * 0 + length
    if starts_ptr is not None:
        low = tl.load(starts_ptr + row * T + j, j < length, 0)
        high = tl.load(ends_ptr + row * T + j, j < length, 0)
    if CAUSAL:
        low = tl.maximum(low, j)
    if window is not None:
        high = tl.minimum(high, j + window)
    return low, high


@jit
def _full_blocks(low_of_first, low_of_last, high_of_first, high_of_last, N: tl.constexpr):
    """(start of the first block of keys that any query sees, of the first that all see, of the first after these)."""
    start = low_of_first // N * N
    full = tl.cdiv(low_of_last, N) * N
    return start, full, tl.maximum(full, high_of_first // N * N)


@jit
def _visible(x, n, low, high, other: tl.constexpr, N: tl.constexpr):
    j = n + tl.arange(0, N)[None, :]
    return tl.where((j >= low[:, None]) & (j < high[:, None]), x, other)


@jit
def _load_keys(
    ptr, row, head, first, length, stride,
    TMA: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """_load, or a descriptor's, which gives 0 past a row's end."""
    if TMA:
        x = tl.reshape(ptr.load([row, first, head, 0]), (ROWS, WIDTH))
    else:
        x = _load(ptr, first, length, stride, ROWS, D, WIDTH)
    return x


@jit
def _attend(
    q, k_ptr, v_ptr, row, kv_head, n, low, high, o, total, largest, edge, length, k_t, v_t, scale,
    TMA: tl.constexpr, N: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Add a block of keys to the three sums; edge: whether some queries see only a part of it."""
    k = _load_keys(k_ptr, row, kv_head, n, length, k_t, TMA, N, D, WIDTH)
    s = tl.dot(q, tl.trans(k), input_precision="ieee")
    if edge:
        s = _visible(s, n, low, high, float("-inf"), N)
    larger = tl.maximum(largest, tl.max(s, 1) * scale)
    p = tl.exp2(s * scale - larger[:, None])
    shrink = tl.exp2(largest - larger)
    v = _load_keys(v_ptr, row, kv_head, n, length, v_t, TMA, N, D, WIDTH)
    o = tl.dot(p.to(v.dtype), v, o * shrink[:, None], input_precision="ieee")
    return o, total * shrink + tl.sum(p, 1), larger


@jit
def _forward_block(
    first, row, head,
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, starts_ptr, ends_ptr, cu_seqlens_ptr, documents,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    T, H, GROUP, window, scale,
    CAUSAL: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, M: tl.constexpr, N: tl.constexpr, SPLIT: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """M queries of a head, from `first` on. TMA: k_ptr and v_ptr are descriptors of the whole tensors."""
    kv_head = head // GROUP
    length = _row_length(cu_seqlens_ptr, documents, row, T)
    last = tl.maximum(tl.minimum(first + M, length) - 1, first)
    row_64, head_64 = tl.cast(row, tl.int64), tl.cast(head, tl.int64)
    if not TMA:
        k_ptr += row_64 * k_b + head_64 // GROUP * k_h
        v_ptr += row_64 * v_b + head_64 // GROUP * v_h
    low_of_first, high_of_first = _keys_of(first, starts_ptr, ends_ptr, row, T, length, window, CAUSAL)
    low_of_last, high_of_last = _keys_of(last, starts_ptr, ends_ptr, row, T, length, window, CAUSAL)
    i = first + tl.arange(0, M)
    low, high = _keys_of(i, starts_ptr, ends_ptr, row, T, length, window, CAUSAL)
    q = _load(q_ptr + row_64 * q_b + head_64 * q_h, first, length, q_t, M, D, WIDTH)
    scale *= 1.4426950408889634
    largest = tl.full([M], -1e38, tl.float32)  # finite, so that a row that sees nothing in a block gives no NaN
    total = tl.zeros([M], tl.float32)
    o = tl.zeros([M, WIDTH], tl.float32)
    start, full, full_end = _full_blocks(low_of_first, low_of_last, high_of_first, high_of_last, N)
    if not SPLIT:
        for n in range(start, high_of_last, N):
            edge = n < full or n >= full_end
            o, total, largest = _attend(
                q, k_ptr, v_ptr, row, kv_head, n, low, high, o, total, largest, edge, length, k_t, v_t, scale,
                TMA, N, D, WIDTH,
            )  # fmt: skip
    else:
        if starts_ptr is not None or window is not None:
            for n in range(start, tl.minimum(full, high_of_last), N):
                o, total, largest = _attend(
                    q, k_ptr, v_ptr, row, kv_head, n, low, high, o, total, largest, True, length, k_t, v_t, scale,
                    TMA, N, D, WIDTH,
                )  # fmt: skip
        for n in range(full, full_end, N):
            o, total, largest = _attend(
                q, k_ptr, v_ptr, row, kv_head, n, low, high, o, total, largest, False, length, k_t, v_t, scale,
                TMA, N, D, WIDTH,
            )  # fmt: skip
        for n in range(full_end, high_of_last, N):
            o, total, largest = _attend(
                q, k_ptr, v_ptr, row, kv_head, n, low, high, o, total, largest, True, length, k_t, v_t, scale,
                TMA, N, D, WIDTH,
            )  # fmt: skip
    total = tl.where(i < length, total, 1.0)  # padding sees nothing
    tl.store(lse_ptr + (row_64 * H + head) * T + i, largest + tl.log2(total), i < T)
    o_ptr += (row_64 * T * H + head) * D
    _store(o_ptr, o / total[:, None], first, length, T, H * D, M, D, WIDTH)


@partial(jit, do_not_specialize=("documents", "B"))
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, starts_ptr, ends_ptr, cu_seqlens_ptr, documents,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    B, T, H, GROUP, window, scale,
    CAUSAL: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, M: tl.constexpr, N: tl.constexpr, SPLIT: tl.constexpr,
    TMA: tl.constexpr, PERSISTENT: tl.constexpr,
):  # fmt: skip
    # Under a causal mask the last queries take longest, so they come first.
    blocks, program = tl.cdiv(T, M), tl.program_id(0)
    if PERSISTENT:
        for tile in range(program, blocks * B * H, tl.num_programs(0)):
            _forward_block(
                (blocks - 1 - tile // (B * H)) * M, tile // H % B, tile % H,
                q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, starts_ptr, ends_ptr, cu_seqlens_ptr, documents,
                q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
                T, H, GROUP, window, scale, CAUSAL, D, WIDTH, M, N, SPLIT, TMA,
            )  # fmt: skip
    else:
        _forward_block(
            (blocks - 1 - program % blocks) * M, program // blocks // H, program // blocks % H,
            q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, starts_ptr, ends_ptr, cu_seqlens_ptr, documents,
            q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
            T, H, GROUP, window, scale, CAUSAL, D, WIDTH, M, N, SPLIT, TMA,
        )  # fmt: skip


@jit
def _add_dq(
    q, do, k_ptr, v_ptr, n, low, high, dq, lse, delta, edge, length, k_t, v_t, scale_2,
    N: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The part of a block of keys in dq / scale; edge: as in _attend."""
    k = _load(k_ptr, n, length, k_t, N, D, WIDTH)
    s = tl.dot(q, tl.trans(k), input_precision="ieee")
    p = tl.exp2(s * scale_2 - lse[:, None])
    if edge:
        p = _visible(p, n, low, high, 0.0, N)
    v = _load(v_ptr, n, length, v_t, N, D, WIDTH)
    ds = p * (tl.dot(do, tl.trans(v), input_precision="ieee") - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")


@jit_for_any_documents
def _dq_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr, starts_ptr, ends_ptr, cu_seqlens_ptr, documents,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, do_b, do_t, do_h, dq_b, dq_t, dq_h,
    T, H, GROUP, window, scale,
    CAUSAL: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, M: tl.constexpr, N: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(T, M)
    program = tl.program_id(0)
    head, row = program // blocks % H, program // blocks // H
    first = (blocks - 1 - program % blocks) * M
    length = _row_length(cu_seqlens_ptr, documents, row, T)
    last = tl.maximum(tl.minimum(first + M, length) - 1, first)
    row_64, head_64 = tl.cast(row, tl.int64), tl.cast(head, tl.int64)
    k_ptr += row_64 * k_b + head_64 // GROUP * k_h
    v_ptr += row_64 * v_b + head_64 // GROUP * v_h
    low_of_first, high_of_first = _keys_of(first, starts_ptr, ends_ptr, row, T, length, window, CAUSAL)
    low_of_last, high_of_last = _keys_of(last, starts_ptr, ends_ptr, row, T, length, window, CAUSAL)
    i = first + tl.arange(0, M)
    low, high = _keys_of(i, starts_ptr, ends_ptr, row, T, length, window, CAUSAL)
    o = _load(o_ptr + (row_64 * T * H + head) * D, first, length, H * D, M, D, WIDTH)
    do = _load(do_ptr + row_64 * do_b + head_64 * do_h, first, length, do_t, M, D, WIDTH)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    of_query = (row_64 * H + head) * T + i
    tl.store(delta_ptr + of_query, delta, i < T)
    lse = tl.load(lse_ptr + of_query, i < length, 0.0)
    q = _load(q_ptr + row_64 * q_b + head_64 * q_h, first, length, q_t, M, D, WIDTH)
    scale_2 = scale * 1.4426950408889634
    dq = tl.zeros([M, WIDTH], tl.float32)
    start, full, full_end = _full_blocks(low_of_first, low_of_last, high_of_first, high_of_last, N)
    if not SPLIT:
        for n in range(start, high_of_last, N):
            edge = n < full or n >= full_end
            dq = _add_dq(
                q, do, k_ptr, v_ptr, n, low, high, dq, lse, delta, edge, length, k_t, v_t, scale_2, N, D, WIDTH
            )
    else:
        if starts_ptr is not None or window is not None:
            for n in range(start, tl.minimum(full, high_of_last), N):
                dq = _add_dq(
                    q, do, k_ptr, v_ptr, n, low, high, dq, lse, delta, True, length, k_t, v_t, scale_2, N, D, WIDTH
                )
        for n in range(full, full_end, N):
            dq = _add_dq(
                q, do, k_ptr, v_ptr, n, low, high, dq, lse, delta, False, length, k_t, v_t, scale_2, N, D, WIDTH
            )
        for n in range(full_end, high_of_last, N):
            dq = _add_dq(
                q, do, k_ptr, v_ptr, n, low, high, dq, lse, delta, True, length, k_t, v_t, scale_2, N, D, WIDTH
            )
    _store(dq_ptr + row_64 * dq_b + head_64 * dq_h, dq * scale, first, length, T, dq_t, M, D, WIDTH)


@jit_for_any_documents
def _dkv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, starts_ptr, ends_ptr, cu_seqlens_ptr, documents,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, do_b, do_t, do_h, dk_b, dk_t, dk_h,
    T, K, GROUP, window, scale,
    CAUSAL: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(T, N)
    program = tl.program_id(0)
    kv_head, row = program // blocks % K, program // blocks // K
    first = program % blocks * N  # under a causal mask the first keys take longest
    length = _row_length(cu_seqlens_ptr, documents, row, T)
    last = tl.maximum(tl.minimum(first + N, length) - 1, first)
    row_64, kv_head_64 = tl.cast(row, tl.int64), tl.cast(kv_head, tl.int64)
    low_of_first, high_of_first = _queries_of(first, starts_ptr, ends_ptr, row, T, length, window, CAUSAL)
    low_of_last, high_of_last = _queries_of(last, starts_ptr, ends_ptr, row, T, length, window, CAUSAL)
    if starts_ptr is None and window is None:
        high_of_first = tl.cdiv(length, M) * M  # queries past the end are zeros, so they need no mask
    j = first + tl.arange(0, N)
    low, high = _queries_of(j, starts_ptr, ends_ptr, row, T, length, window, CAUSAL)
    k = _load(k_ptr + row_64 * k_b + kv_head_64 * k_h, first, length, k_t, N, D, WIDTH)
    v = _load(v_ptr + row_64 * v_b + kv_head_64 * v_h, first, length, v_t, N, D, WIDTH)
    scale_2 = scale * 1.4426950408889634
    dk = tl.zeros([N, WIDTH], tl.float32)
    dv = tl.zeros([N, WIDTH], tl.float32)
    start = low_of_first // M * M
    blocks_of_head = tl.cdiv(high_of_last - start, M)
    for step in range(blocks_of_head * GROUP):
        head = kv_head_64 * GROUP + step // blocks_of_head
        m = start + step % blocks_of_head * M
        i = m + tl.arange(0, M)
        of_queries = (row_64 * K * GROUP + head) * T + i
        q = _load(q_ptr + row_64 * q_b + head * q_h, m, length, q_t, M, D, WIDTH)
        s = tl.dot(k, tl.trans(q), input_precision="ieee")
        lse = tl.load(lse_ptr + of_queries, i < length, 0.0)
        p = tl.exp2(s * scale_2 - lse[None, :])
        if m < low_of_last or m + M > high_of_first:
            p = tl.where((i[None, :] >= low[:, None]) & (i[None, :] < high[:, None]), p, 0.0)
        do = _load(do_ptr + row_64 * do_b + head * do_h, m, length, do_t, M, D, WIDTH)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
        delta = tl.load(delta_ptr + of_queries, i < length, 0.0)
        ds = p * (tl.dot(v, tl.trans(do), input_precision="ieee") - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    of_block = row_64 * dk_b + kv_head_64 * dk_h
    _store(dk_ptr + of_block, dk * scale, first, length, T, dk_t, N, D, WIDTH)
    _store(dv_ptr + of_block, dv, first, length, T, dk_t, N, D, WIDTH)


KERNELS = {"forward": _forward_kernel, "dq": _dq_kernel, "dkv": _dkv_kernel}


def variants() -> list[Variant]:
    """Every kind of mask at head dimensions 64 and 128 in bf16, plain and documents at others; with and without grouped
    queries."""
    found = []
    masks = [(True, kind) for kind in ("plain", "documents", "window", "both")]
    masks += [(False, kind) for kind in ("plain", "documents")]
    cases: list[tuple[int, str, str | int, bool, str]] = [
        (D, "*bf16", "i32", *mask) for D in (64, 128) for mask in masks
    ]
    cases += [(D, "*bf16", 1, True, "plain") for D in (64, 128)]
    cases += [(D, "*bf16", "i32", *mask) for D in (80, 256) for mask in masks[:2]]
    cases += [(D, "*fp32", "i32", *mask) for D in (64, 128) for mask in masks[:2]]
    others = ((32, "*bf16"), (32, "*fp32"), (128, "*fp16"))
    cases += [(D, dtype, "i32", True, "plain") for D, dtype in others]
    for D, dtype, group, causal, kind in cases:
        absent = {"starts_ptr", "ends_ptr", "cu_seqlens_ptr"} if kind not in ("documents", "both") else set()
        absent |= {"window"} if kind not in ("window", "both") else set()
        usually = dtype == "*bf16" and D in (64, 128) and (causal, kind) == (True, "documents")
        width = _width(D, DTYPES[dtype].itemsize)
        for name_of_kernel, kernel in KERNELS.items():
            arguments = {}
            for name in kernel.arg_names:
                if name in absent or (name.isupper() and name not in ("B", "T", "H", "K")):
                    continue
                arguments[name] = "i32:16" if name[-2:] in ("_b", "_t", "_h") else "i32"
                if name.endswith("_ptr"):
                    arguments[name] = dtype
                if name in ("lse_ptr", "delta_ptr"):
                    arguments[name] = "*fp32"
                if name in ("starts_ptr", "ends_ptr", "cu_seqlens_ptr"):
                    arguments[name] = "*i32"
            arguments["scale"] = "fp32"
            if group != 1:
                arguments["GROUP"] = "i32"
            for arch in (80, 90, 100):
                shape = (name_of_kernel, width, DTYPES[dtype].itemsize, arch)
                absences = {**dict.fromkeys(absent), **({"GROUP": 1} if group == 1 else {})}
                every = candidates(*shape) if causal and kind in ("plain", "documents") else [default(*shape)]
                for config in every:
                    constants = absences | {"CAUSAL": causal, "D": D, "WIDTH": width, **dict(config.constants)}
                    if constants.get("TMA") and (kind != "plain" or width != D):
                        continue
                    block = f"tensordesc<{dtype[1:]}[1, {config['N']}, 1, {width}]>"
                    described = dict.fromkeys(("k_ptr", "v_ptr"), block) if constants.get("TMA") else {}
                    usual = usually and config == default(*shape)
                    found.append(
                        Variant(
                            kernel,
                            arguments | described,
                            constants,
                            config.num_warps,
                            config.num_stages,
                            default=usual,
                            archs=(arch,),
                        )
                    )
    return found
