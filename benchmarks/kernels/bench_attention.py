"""Causal attention, also in documents, with a window, of a whole projection: see --help.

FLOPs (kernels/attention.py): 4 per head, visible pair of query and key, and head dimension forward, 10 backward; pairs
that the mask hides are not counted. The check is on the first row's first two heads.

Every head has its own keys and values. "eager" is PyTorch's SDPA with its own choice, on [B, T, H, D] as in the model;
cuDNN and FlashAttention are its two fast backends. For documents and windows SDPA gets a mask; compiled flex_attention
and varlen_attn are PyTorch's own ways for them. torch.compile changes nothing in SDPA and has no row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels.bench_rotary import eager as rotate
from benchmarks.kernels.bench_rotary import tables
from benchmarks.kernels.harness import Case, Contender, Function, Run, main
from spt_fast.kernels import flash_attention, qkv_attention

SHARE = 4
CHECKED_HEADS = 2


def cases(run: Run) -> list[Callable[[], Case]]:
    tokens = 16384
    small = [(1, 300, 2, D) for D in (32, 64, 128)] if run.gpu else [(2, 32, 2, 16)]
    plain = run.sizes(
        gpu=[
            (16, 1024, 12, 64),
            *((tokens // T, T, 2048 // D, D) for D in (64, 128) for T in (1024, 2048, 4096, 8192)),
        ],
        cpu=[(16, 256, 6, 64)],
        dry=small,
    )
    masked = run.sizes(gpu=[(16, 1024, 12, 64), (8, 2048, 16, 128)], cpu=[(16, 256, 6, 64)], dry=small)
    return [
        *(partial(causal, run, *shape) for shape in plain),
        *(partial(projection, run, *shape) for shape in masked),
        *(partial(documents, run, *shape) for shape in masked),
        *(partial(windowed, run, *shape) for shape in masked),
    ]


def causal(run: Run, B: int, T: int, H: int, D: int) -> Case:
    contenders = [
        Contender("eager", lambda: sdpa, "torch"),
        *_ours(run),
        Contender("flash-attn", partial(flash_attn, None)),
        Contender("flash-attn 3", partial(flash_attn_3, None)),
    ]
    if run.gpu:
        contenders[1:1] = [
            Contender("SDPA, cuDNN", partial(sdpa_by, "CUDNN_ATTENTION"), "torch"),
            Contender("SDPA, FlashAttention", partial(sdpa_by, "FLASH_ATTENTION"), "torch"),
        ]
    return _case(run, "causal", (B, T, H, D), contenders, None, None)


def documents(run: Run, B: int, T: int, H: int, D: int) -> Case:
    """Documents of a fifth of the context on average; row ends cut too."""
    cuts = torch.randperm(T - 1)[: 4 * B].add_(1).reshape(B, 4).sort().values
    ends = (cuts + T * torch.arange(B)[:, None]).flatten().tolist()
    cu_seqlens = torch.tensor(sorted({0, *ends, *range(T, B * T + 1, T)}), dtype=torch.int32, device=run.device)
    contenders = [
        Contender("eager", lambda: sdpa, "torch"),
        *_ours(run, cu_seqlens=cu_seqlens),
        Contender("varlen_attn", partial(varlen_attn, cu_seqlens), "torch"),
        Contender("flex_attention", partial(flex_attention, run, (B, T), cu_seqlens, None), "torch"),
        Contender("flash-attn", partial(flash_attn_varlen, cu_seqlens)),
    ]
    return _case(run, f"{len(cu_seqlens) - 1} documents", (B, T, H, D), contenders, cu_seqlens, None)


def windowed(run: Run, B: int, T: int, H: int, D: int) -> Case:
    window = T // 4
    contenders = [
        Contender("eager", lambda: sdpa, "torch"),
        *_ours(run, window=window),
        Contender("flex_attention", partial(flex_attention, run, (B, T), None, window), "torch"),
        Contender("flash-attn", partial(flash_attn, window)),
        Contender("flash-attn 3", partial(flash_attn_3, window)),
    ]
    return _case(run, f"window of {window}", (B, T, H, D), contenders, None, window)


def projection(run: Run, B: int, T: int, H: int, D: int) -> Case:
    """Queries and keys rotated before, their gradients after, and all gradients in one tensor, as in the model."""
    cos, sin = tables(run, T, D)

    def eager(qkv_BTSD: Tensor) -> Tensor:
        q, k, v = qkv_BTSD.split(H, dim=2)
        return sdpa(*rotate(q, k, cos, sin), v)

    def ours(qkv_BTSD: Tensor, *, backend: str) -> Tensor:
        return qkv_attention(qkv_BTSD, H, cos, sin, backend=backend)

    contenders = [Contender("eager", lambda: eager, "torch"), *run.ours(ours, "sdpa", "flash_attn")]
    forward = 2.0 * B * T * (T + 1) * D * H
    work = {"forward": forward, "backward": 2.5 * forward, "both": 3.5 * forward}
    name = f"{B} x {T} x {H} heads of {D}"
    return Case("qkv_attention", name, [run.randn(B, T, 3 * H, D)], contenders, work, unit="TFLOP/s")


def _ours(run: Run, **options: Any) -> list[Contender]:
    def attend(q: Tensor, k: Tensor, v: Tensor, *, backend: str) -> Tensor:
        return flash_attention(q, k, v, backend=backend, **options)

    return run.ours(attend, "sdpa", "flash_attn")


def _case(
    run: Run,
    what: str,
    shape: tuple[int, int, int, int],
    contenders: list[Contender],
    cu_seqlens: Tensor | None,
    window: int | None,
) -> Case:
    B, T, H, D = shape
    q, k, v = (run.randn(*shape) for _ in range(3))
    visible = None
    pairs = B * T * (T + 1) // 2
    if cu_seqlens is not None or window is not None:
        visible = mask(B, T, cu_seqlens, window, run.device)
        pairs = int(visible.sum()) * (B // len(visible))
        contenders[0] = Contender("eager", lambda: partial(sdpa, visible=visible.unsqueeze(1)), "torch")
    forward = 4.0 * pairs * D * H
    work = {"forward": forward, "backward": 2.5 * forward, "both": 3.5 * forward}

    def spot(results: list[Tensor]) -> list[Tensor]:
        return [x[:1, :, :CHECKED_HEADS] for x in results]

    def exact(upstream: Sequence[Tensor]) -> list[Tensor]:
        row = spot([q, k, v, *upstream])
        leaves = [x.detach().double().requires_grad_() for x in row[:3]]
        seen = torch.ones(T, T, dtype=torch.bool, device=run.device).tril() if visible is None else visible[0]
        q_HTD, k_HTD, v_HTD = (x[0].transpose(0, 1) for x in leaves)
        scores_HTT = (q_HTD @ k_HTD.mT * D**-0.5).masked_fill(~seen, -torch.inf)
        o_BTHD = (scores_HTT.softmax(-1) @ v_HTD).transpose(0, 1).unsqueeze(0)
        return [o_BTHD.detach(), *torch.autograd.grad(o_BTHD, leaves, row[3].double())]

    name = f"{B} x {T} x {H} heads of {D}, {what}"
    return Case("flash_attention", name, (q, k, v), contenders, work, unit="TFLOP/s", exact=exact, spot=spot)


def mask(B: int, T: int, cu_seqlens: Tensor | None, window: int | None, device: torch.device) -> Tensor:
    """[B, T, T], or [1, T, T] if all rows are equal: the visible keys of each query."""
    t = torch.arange(T, device=device)
    distance_TT = t[:, None] - t
    visible = (distance_TT >= 0) & (distance_TT < (window or T))
    if cu_seqlens is None:
        return visible[None]
    doc_BT = document_of(B, T, cu_seqlens)
    return visible & (doc_BT[:, :, None] == doc_BT[:, None, :])


def document_of(B: int, T: int, cu_seqlens: Tensor) -> Tensor:
    flat = torch.arange(B * T, device=cu_seqlens.device, dtype=torch.int32)
    return torch.searchsorted(cu_seqlens, flat, right=True).view(B, T)


# ------------------------------------------------------------------------------------------------ contenders


def sdpa(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=visible is None)
    return o.transpose(1, 2)


def sdpa_by(backend: str) -> Function:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    chosen = SDPBackend.__members__[backend]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(chosen):
            return sdpa(q, k, v)

    return attend


def flex_attention(run: Run, shape: tuple[int, int], cu_seqlens: Tensor | None, window: int | None) -> Function:
    from torch.nn.attention.flex_attention import create_block_mask
    from torch.nn.attention.flex_attention import flex_attention as flex

    if not (run.gpu and run.compiled):
        raise ImportError("trains compiled on a GPU only")
    B, T = shape
    doc_BT = None if cu_seqlens is None else document_of(B, T, cu_seqlens)

    def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        visible = (i >= j) & (i - j < (window or T))
        return visible if doc_BT is None else visible & (doc_BT[b, i] == doc_BT[b, j])

    blocks = create_block_mask(sees, None if doc_BT is None else B, None, T, T, device=run.device)
    torch._dynamo.reset()
    compiled = torch.compile(flex, fullgraph=True, dynamic=False)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return compiled(q, k, v, block_mask=blocks).transpose(1, 2)

    return attend


def varlen_attn(cu_seqlens: Tensor) -> Function:
    import inspect

    from torch.nn.attention.varlen import varlen_attn as attend

    if not cu_seqlens.is_cuda:
        raise ImportError("runs on a GPU only")
    # torch 2.11 and later say causal by the window, the first versions by a flag.
    by_flag = "is_causal" in inspect.signature(attend).parameters
    causal: dict[str, Any] = {"is_causal": True} if by_flag else {"window_size": (-1, 0)}
    longest = int(cu_seqlens.diff().max())

    def flat(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = (x.flatten(0, 1) for x in (q, k, v))
        return attend(*rows, cu_seqlens, cu_seqlens, longest, longest, **causal).view_as(q)

    return flat


def flash_attn(window: int | None) -> Function:
    from flash_attn import flash_attn_func

    return partial(flash_attn_func, causal=True, window_size=(window - 1 if window else -1, 0 if window else -1))


def flash_attn_3(window: int | None) -> Function:
    from flash_attn_interface import flash_attn_func

    function = partial(flash_attn_func, causal=True, window_size=(window - 1 if window else -1, 0 if window else -1))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o = function(q, k, v)
        return o[0] if isinstance(o, tuple) else o  # the first versions return the log-sum-exp too

    return attend


def flash_attn_varlen(cu_seqlens: Tensor) -> Function:
    from flash_attn import flash_attn_varlen_func

    longest = int(cu_seqlens.diff().max())

    def flat(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = (x.flatten(0, 1) for x in (q, k, v))
        return flash_attn_varlen_func(*rows, cu_seqlens, cu_seqlens, longest, longest, causal=True).view_as(q)

    return flat


if __name__ == "__main__":
    main(cases, __doc__)
