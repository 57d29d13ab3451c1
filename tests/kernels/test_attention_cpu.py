"""Attention by csrc/attention.cpp: more than one tile of 64, short last tiles, documents, windows, padding."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from spt_fast.kernels import attention, attention_cpu, flash_attention, qkv_attention
from tests.kernels.compare import assert_as_exact_as_torch, by_more_than_chance, random_tensors, run
from tests.kernels.contract import Contract
from tests.kernels.test_attention import CUTS, plain_attention, samples

pytestmark = pytest.mark.skipif(not attention_cpu.SUPPORTED, reason="this CPU has no AVX-512")

in_every_dtype = pytest.mark.parametrize(
    "dtype", [dtype for dtype in (torch.float32, torch.bfloat16) if dtype in attention_cpu.SUPPORTED]
)

# In float32 the backward pass makes weights again from scores, whose roundings count as often as the largest is large:
# 4 in most draws, up to 8 in 99 of 100. In bf16 twice the composition's own error hides them.
ROUNDINGS = {torch.bfloat16: 1, torch.float32: 8}


def draw(B: int, T: int, H: int, K: int, D: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """q, k and v as views of one tensor, as a model makes them, and an upstream gradient."""
    (qkv,) = random_tensors([(B, T, H + 2 * K, D)], dtype)
    return [*(x.cpu() for x in qkv.split([H, K, K], 2)), random_tensors([(B, T, H, D)], dtype)[0].cpu()]


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
    usable = staticmethod(lambda backend, dtype: backend == "cpu" and dtype in attention_cpu.SUPPORTED)


@in_every_dtype
@pytest.mark.parametrize(
    ("B", "T", "H", "K", "D"),
    [
        (2, 37, 6, 2, 64),
        (1, 1, 1, 1, 16),
        (1, 130, 2, 1, 128),
        (2, 65, 4, 4, 80),
        (1, 200, 3, 3, 64),
        (1, 64, 1, 1, 256),
        (3, 128, 2, 2, 32),
        (1, 97, 2, 1, 96),
        (1, 129, 4, 1, 48),
    ],
)
@by_more_than_chance
def test_as_exact_as_torch(B: int, T: int, H: int, K: int, D: int, dtype: torch.dtype) -> None:
    *inputs, upstream = draw(B, T, H, K, D, dtype)
    mask = visible(B, T, None, None)
    assert_as_exact_as_torch(ours, lambda q, k, v: plain(q, k, v, mask), inputs, (upstream,), ROUNDINGS[dtype])


@in_every_dtype
@pytest.mark.parametrize("cuts", [None, [0, 5, 90, 90, 131, 280], [0, 140, 200], [0, 1, 2, 3, 139, 279], [0], [0, 60]])
@pytest.mark.parametrize("window", [None, 2, 7, 100])
@by_more_than_chance
def test_documents_and_windows_as_exact_as_torch(
    cuts: list[int] | None, window: int | None, dtype: torch.dtype
) -> None:
    B, T = 2, 140
    *inputs, upstream = draw(B, T, 2, 1, 32, dtype)
    cu_seqlens = None if cuts is None else torch.tensor(cuts, dtype=torch.int32)
    mask = visible(B, T, cuts, window)
    assert_as_exact_as_torch(
        lambda q, k, v: ours(q, k, v, cu_seqlens=cu_seqlens, window=window),
        lambda q, k, v: plain(q, k, v, mask),
        inputs,
        (upstream,),
        ROUNDINGS[dtype],
    )


@in_every_dtype
@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS.keys())
@by_more_than_chance
def test_small_documents_by_the_definition(cuts: list[int], dtype: torch.dtype) -> None:
    *inputs, upstream = draw(2, 12, 4, 2, 16, dtype)
    assert_as_exact_as_torch(
        lambda q, k, v: ours(q, k, v, cu_seqlens=torch.tensor(cuts, dtype=torch.int32), scale=0.3),
        lambda q, k, v: plain_attention(q, k, v, cu_seqlens=cuts, scale=0.3),
        inputs,
        (upstream,),
        ROUNDINGS[dtype],
    )


@in_every_dtype
def test_a_query_that_sees_only_itself(dtype: torch.dtype) -> None:
    """Its weight is 1 whatever the score, whose gradient do·v - do·o is 0 but for the order of two sums in float32. In
    float32 the backward pass makes the weight again as 2^(s - s), of which the first s is one rounding further."""
    *inputs, upstream = draw(2, 70, 4, 4, 32, dtype)
    o, dq, dk, dv = run(lambda q, k, v: ours(q, k, v, window=1), inputs, (upstream,))
    assert torch.equal(o, inputs[2])
    torch.testing.assert_close(dv, upstream, rtol=0 if dtype == torch.bfloat16 else 2e-6, atol=0)
    assert max(dq.abs().max(), dk.abs().max()) < 1e-5


@in_every_dtype
def test_padding_harms_nothing_whatever_it_holds(dtype: torch.dtype) -> None:
    q, k, v, upstream = (x.contiguous() for x in draw(2, 70, 4, 2, 32, dtype))
    cu_seqlens = torch.tensor([0, 60, 90], dtype=torch.int32)
    clean = run(lambda q, k, v: ours(q, k, v, cu_seqlens=cu_seqlens), (q, k, v), (upstream,))
    for x in (q, k, v, upstream):
        x.view(140, -1)[90:] = float("nan")
    found = run(lambda q, k, v: ours(q, k, v, cu_seqlens=cu_seqlens), (q, k, v), (upstream,))
    for f, c in zip(found, clean, strict=True):
        assert torch.equal(f, c)
        assert not f.view(140, -1)[90:].any()


@in_every_dtype
def test_large_scores_stay_finite(dtype: torch.dtype) -> None:
    *inputs, upstream = draw(1, 80, 2, 2, 64, dtype)
    inputs = [inputs[0] * 100, inputs[1] * 100, inputs[2]]
    for result in run(ours, inputs, (upstream,)):
        assert result.isfinite().all()
    one_hot = plain(*(x.double() for x in inputs), visible(1, 80, None, None))
    torch.testing.assert_close(ours(*inputs).double(), one_hot, rtol=0.02, atol=0.02)


@in_every_dtype
@pytest.mark.parametrize(("which", "value"), [("q", "nan"), ("k", "nan"), ("k", "inf"), ("q", "-inf"), ("qk", "1e20")])
def test_what_a_softmax_cannot_weigh_is_nan(which: str, value: str, dtype: torch.dtype) -> None:
    """Else a step whose scores overflow would go on with an attention of zeros."""
    inputs = dict(zip(("q", "k", "v", "upstream"), draw(1, 140, 1, 1, 32, dtype), strict=True))
    for name in which:
        inputs[name][0, 70] = float(value)
    q, k, v, upstream = inputs.values()
    cuts = [0, 20, 140]
    cu_seqlens = torch.tensor(cuts, dtype=torch.int32)
    o, dq, *_ = run(lambda q, k, v: ours(q, k, v, cu_seqlens=cu_seqlens), (q, k, v), (upstream,))
    scores = torch.einsum("bihd,bjhd->bij", q.float(), k.float()).masked_fill(~visible(1, 140, cuts, None), -torch.inf)
    expected = scores.softmax(-1).isnan().any(-1)
    assert expected[0, 70]
    assert torch.equal(o.isnan().all(-1)[..., 0], expected)
    assert torch.equal(dq.isnan().any(-1)[..., 0] & expected, expected)


@in_every_dtype
@pytest.mark.parametrize("D", [16, 32, 64, 96])
def test_gradients_written_into_one_tensor_are_those_of_three(D: int, dtype: torch.dtype) -> None:
    """Bit for bit, with grouped queries, documents, a window and the last tile not full."""
    (qkv, upstream), K = random_tensors([(2, 130, 8, D), (2, 130, 4, D)], dtype), 2
    options: dict[str, Any] = {"cu_seqlens": torch.tensor([0, 99, 200], dtype=torch.int32), "window": 50}
    together = run(lambda qkv: qkv_attention(qkv, K, backend="cpu", **options), [qkv], [upstream])
    apart = run(lambda q, k, v: ours(q, k, v, **options), [x.clone() for x in qkv.split([4, K, K], 2)], [upstream])
    assert torch.equal(together[0], apart[0])
    assert torch.equal(together[1], torch.cat(apart[1:], 2))


def test_what_it_cannot_run_is_refused_and_auto_takes_another_backend() -> None:
    q, k, v, _ = draw(1, 9, 2, 1, 8)
    with pytest.raises(ValueError, match="multiples of 16 up to 256, not 8"):
        ours(q, k, v)
    with pytest.raises(ValueError, match="only causal"):
        ours(*draw(1, 9, 2, 1, 16)[:3], causal=False)
    with pytest.raises(ValueError, match=r"the C\+\+ kernels support float32 and bfloat16, not torch\.float16"):
        ours(q.half(), k.half(), v.half())
    assert flash_attention(q, k, v).shape == q.shape


def test_auto_takes_it_only_in_dtypes_that_the_cpu_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    """An Intel Xeon before AMX has AVX-512 for float32 only; others have none."""
    for dtypes in ({torch.float32, torch.bfloat16}, {torch.float32}, set()):
        monkeypatch.setattr(attention_cpu, "SUPPORTED", frozenset(dtypes))
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            q = torch.zeros(1, 4, 2, 16, dtype=dtype)
            expected = "cpu" if dtype in dtypes else "reference"
            assert attention.pick("auto", q, True, masked=False) == expected
            assert attention.pick("auto", q, True, masked=True) == expected
    with pytest.raises(ValueError, match="this CPU has no AVX512-BF16, which torch"):
        ours(*draw(1, 9, 2, 1, 16, torch.bfloat16)[:3])
    with pytest.raises(ValueError, match="this CPU has no AVX-512, which torch"):
        ours(*draw(1, 9, 2, 1, 16)[:3])
