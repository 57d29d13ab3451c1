"""Attention by csrc/attention.cpp, in bf16: more than one tile of 64, short last tiles, documents, windows, padding."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from spt_fast.kernels import attention_cpu, flash_attention
from tests.kernels.compare import assert_as_exact_as_torch, by_more_than_chance, random_tensors, run
from tests.kernels.contract import Contract
from tests.kernels.test_attention import CUTS, plain_attention, samples

pytestmark = pytest.mark.skipif(not attention_cpu.SUPPORTED, reason="this CPU has no AVX512-BF16")

# A weight is rounded to bf16 before it is multiplied with values, as in every fused attention, and the gradient of a
# score twice (itself and as a factor): roundings that the composition makes of other intermediate results.
ROUNDINGS = 3


def draw(B: int, T: int, H: int, K: int, D: int) -> list[Tensor]:
    """q, k and v as views of one tensor, as a model makes them, and an upstream gradient."""
    (qkv,) = random_tensors([(B, T, H + 2 * K, D)], torch.bfloat16)
    return [*(x.cpu() for x in qkv.split([H, K, K], 2)), random_tensors([(B, T, H, D)], torch.bfloat16)[0].cpu()]


def ours(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
    return flash_attention(q, k, v, backend="cpu", **options)


def visible(B: int, T: int, cuts: list[int] | None, window: int | None) -> Tensor:
    document = torch.full((B * T,), -1)
    for number, (start, end) in enumerate(itertools.pairwise([0, B * T] if cuts is None else cuts)):
        document[start:end] = number
    document = document.view(B, T)
    distance = torch.arange(T)[:, None] - torch.arange(T)
    near = (distance >= 0) & (distance < (window or T))
    return near & (document[:, :, None] == document[:, None, :]) & (document[:, :, None] >= 0)


def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    groups = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~mask[:, None], -torch.inf).softmax(-1).nan_to_num(0)
    return torch.einsum("bhij,bjhd->bihd", weights, v)


class TestContract(Contract):
    samples = samples(16, exact=False, many=(2, 100))
    usable = staticmethod(lambda backend, dtype: (backend, dtype) == ("cpu", torch.bfloat16))


@pytest.mark.parametrize(
    ("B", "T", "H", "K", "D"),
    [
        (2, 37, 6, 2, 64),
        (1, 1, 1, 1, 16),
        (1, 130, 2, 1, 128),
        (2, 65, 4, 4, 80),
        (1, 200, 3, 3, 64),
        (1, 64, 1, 1, 256),
    ],
)
@by_more_than_chance
def test_as_exact_as_torch(B: int, T: int, H: int, K: int, D: int) -> None:
    *inputs, upstream = draw(B, T, H, K, D)
    mask = visible(B, T, None, None)
    assert_as_exact_as_torch(ours, lambda q, k, v: plain(q, k, v, mask), inputs, (upstream,), ROUNDINGS)


@pytest.mark.parametrize("cuts", [None, [0, 5, 90, 90, 131, 280], [0, 140, 200], [0, 1, 2, 3, 139, 279], [0], [0, 60]])
@pytest.mark.parametrize("window", [None, 2, 7, 100])
@by_more_than_chance
def test_documents_and_windows_as_exact_as_torch(cuts: list[int] | None, window: int | None) -> None:
    B, T = 2, 140
    *inputs, upstream = draw(B, T, 2, 1, 32)
    cu_seqlens = None if cuts is None else torch.tensor(cuts, dtype=torch.int32)
    mask = visible(B, T, cuts, window)
    assert_as_exact_as_torch(
        lambda q, k, v: ours(q, k, v, cu_seqlens=cu_seqlens, window=window),
        lambda q, k, v: plain(q, k, v, mask),
        inputs,
        (upstream,),
        ROUNDINGS,
    )


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS.keys())
@by_more_than_chance
def test_small_documents_by_the_definition(cuts: list[int]) -> None:
    *inputs, upstream = draw(2, 12, 4, 2, 16)
    assert_as_exact_as_torch(
        lambda q, k, v: ours(q, k, v, cu_seqlens=torch.tensor(cuts, dtype=torch.int32), scale=0.3),
        lambda q, k, v: plain_attention(q, k, v, cu_seqlens=cuts, scale=0.3),
        inputs,
        (upstream,),
        ROUNDINGS,
    )


def test_a_query_that_sees_only_itself() -> None:
    """Its weight is 1 whatever the score, whose gradient do·v - do·o is 0 but for the order of two sums in float32."""
    *inputs, upstream = draw(2, 70, 4, 4, 32)
    o, dq, dk, dv = run(lambda q, k, v: ours(q, k, v, window=1), inputs, (upstream,))
    assert torch.equal(o, inputs[2])
    assert torch.equal(dv, upstream)
    assert max(dq.abs().max(), dk.abs().max()) < 1e-5


def test_padding_harms_nothing_whatever_it_holds() -> None:
    q, k, v, upstream = (x.contiguous() for x in draw(2, 70, 4, 2, 32))
    cu_seqlens = torch.tensor([0, 60, 90], dtype=torch.int32)
    clean = run(lambda q, k, v: ours(q, k, v, cu_seqlens=cu_seqlens), (q, k, v), (upstream,))
    for x in (q, k, v, upstream):
        x.view(140, -1)[90:] = float("nan")
    found = run(lambda q, k, v: ours(q, k, v, cu_seqlens=cu_seqlens), (q, k, v), (upstream,))
    for f, c in zip(found, clean, strict=True):
        assert torch.equal(f, c)
        assert not f.view(140, -1)[90:].any()


def test_large_scores_stay_finite() -> None:
    *inputs, upstream = draw(1, 80, 2, 2, 64)
    inputs = [inputs[0] * 100, inputs[1] * 100, inputs[2]]
    for result in run(ours, inputs, (upstream,)):
        assert result.isfinite().all()
    one_hot = plain(*(x.double() for x in inputs), visible(1, 80, None, None))
    torch.testing.assert_close(ours(*inputs).double(), one_hot, rtol=0.02, atol=0.02)


def test_what_it_cannot_do_is_said_and_auto_goes_elsewhere() -> None:
    q, k, v, _ = draw(1, 9, 2, 1, 8)
    with pytest.raises(ValueError, match="multiples of 16 up to 256, not 8"):
        ours(q, k, v)
    with pytest.raises(ValueError, match="only causal"):
        ours(*draw(1, 9, 2, 1, 16)[:3], causal=False)
    with pytest.raises(ValueError, match=r"bfloat16 on the CPU, not torch\.float32"):
        ours(q.float(), k.float(), v.float())
    assert flash_attention(q, k, v).shape == q.shape
