"""RoPE, alone and with QK-norm before it: python -m benchmarks.kernels.bench_rotary [--help]

Bytes that must be moved, for numbers of b bytes and q and k together of E elements: RoPE 2bE each way; with QK-norm 2bE
forward, and 3bE backward, which also needs q and k. Each is a separate tensor here, [B, T, H, D]. Eager PyTorch and
Liger work as in Hugging Face Llama: tables rounded to the dtype of q, heads before positions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels.harness import Case, Contender, Function, Run, main
from spt_fast.kernels import qk_norm_rope, rope

SHARE = 2
EPS = 1e-6


def cases(run: Run) -> list[Callable[[], Case]]:
    shapes = run.sizes(
        gpu=[
            (32, 1024, 12, 64),
            (16, 2048, 16, 64),
            *((2**15 // width, 2048, width // 128, 128) for width in (2048, 8192)),
        ],
        cpu=[(16, 256, 6, 64)],
        dry=[(1, 8, 2, 16)],
    )
    return [partial(case, run, *shape) for shape in shapes for case in (plain, with_norm)]


def plain(run: Run, B: int, T: int, H: int, D: int) -> Case:
    contenders = [
        *run.torch_contenders(eager),
        *run.ours(rope),
        Contender("liger", liger),
    ]
    q, k = run.randn(B, T, H, D), run.randn(B, T, H, D)
    return _case("rope", (q, k, *tables(run, T, D)), contenders, backward=2)


def with_norm(run: Run, B: int, T: int, H: int, D: int) -> Case:
    def ours(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor, k_weight: Tensor, backend: str):
        return qk_norm_rope(q, k, q_weight, k_weight, cos, sin, EPS, backend=backend)

    contenders = [
        *run.torch_contenders(eager_with_norm),
        *run.ours(ours),
        Contender("liger, a kernel each", liger_with_norm),
    ]
    q, k = run.randn(B, T, H, D), run.randn(B, T, H, D)
    inputs = (q, k, *tables(run, T, D), run.randn(D), run.randn(D))
    return _case("qk_norm_rope", inputs, contenders, backward=3)


def _case(op: str, inputs: tuple[Tensor, ...], contenders: list[Contender], *, backward: int) -> Case:
    q, k = inputs[:2]
    tensor_bytes = q.numel() * q.itemsize + k.numel() * k.itemsize
    work = {"forward": 2 * tensor_bytes, "backward": backward * tensor_bytes, "both": (2 + backward) * tensor_bytes}
    B, T, H, D = q.shape
    return Case(op, f"{B} x {T} x {H} heads of {D}", inputs, contenders, work)


def tables(run: Run, T: int, D: int) -> tuple[Tensor, Tensor]:
    """cos and sin [T, D], float32."""
    frequencies = 10_000.0 ** (-torch.arange(0, D, 2, device=run.device) / D)
    angles = torch.outer(torch.arange(T, device=run.device).float(), frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()


def eager(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = (table.to(q.dtype).unsqueeze(-2) for table in (cos, sin))
    return q * cos + _rotate_half(q) * sin, k * cos + _rotate_half(k) * sin


def _rotate_half(x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1)


def eager_with_norm(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor, k_weight: Tensor):
    q, k = F.rms_norm(q, q_weight.shape, q_weight, EPS), F.rms_norm(k, k_weight.shape, k_weight, EPS)
    return eager(q, k, cos, sin)


def liger() -> Function:
    from liger_kernel.transformers.functional import liger_rope

    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:  # writes over q and k
        cos, sin = (table.to(q.dtype).unsqueeze(0) for table in (cos, sin))
        return tuple(x.transpose(1, 2) for x in liger_rope(q.transpose(1, 2), k.transpose(1, 2), cos, sin))

    return rotate


def liger_with_norm() -> Function:
    from liger_kernel.transformers.functional import liger_rms_norm

    rotate = liger()

    def norm_and_rotate(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor, k_weight: Tensor
    ) -> tuple[Tensor, ...]:
        q, k = liger_rms_norm(q, q_weight, EPS, in_place=False), liger_rms_norm(k, k_weight, EPS, in_place=False)
        return rotate(q, k, cos, sin)

    return norm_and_rotate


if __name__ == "__main__":
    main(cases, __doc__)
