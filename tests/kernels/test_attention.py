from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from spt_fast.kernels import flash_attention
from tests.kernels.compare import assert_as_exact_as_torch, run, strided


def plain_attention(
    q_BTHD: Tensor,
    k_BTHD: Tensor,
    v_BTHD: Tensor,
    *,
    causal: bool = True,
    cu_seqlens: list[int] | None = None,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """By the definition, pair by pair of positions."""
    B, T, H, D = q_BTHD.shape
    groups = H // k_BTHD.shape[2]
    k_BTHD, v_BTHD = k_BTHD.repeat_interleave(groups, 2), v_BTHD.repeat_interleave(groups, 2)
    document = [0] * (B * T)
    if cu_seqlens is not None:
        document = [next((d for d in range(len(cu_seqlens) - 1) if n < cu_seqlens[d + 1]), -1) for n in range(B * T)]
    visible = torch.zeros(B, T, T, dtype=torch.bool)
    for b in range(B):
        for i in range(T):
            for j in range(T):
                same = document[b * T + i] == document[b * T + j] != -1
                near = (j <= i or not causal) and (window is None or i - j < window)
                visible[b, i, j] = same and near
    scores = torch.einsum("bihd,bjhd->bhij", q_BTHD, k_BTHD) * (D**-0.5 if scale is None else scale)
    weights = scores.masked_fill(~visible[:, None], -torch.inf).softmax(-1).nan_to_num(0)
    return torch.einsum("bhij,bjhd->bihd", weights, v_BTHD)


def draw(B: int, T: int, H: int, K: int, D: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q, k, v and an upstream gradient."""
    return [torch.randn(B, T, heads, D).to(dtype) for heads in (H, K, K, H)]


# SDPA's backward pass makes the weights again as exp(score - logsumexp), which multiplies the rounding of a score by
# its size: up to about 4 here.
ROUNDINGS = 4


CUTS = {
    "one document": [0, 24],
    "rows": [0, 12, 24],
    "across rows": [0, 5, 17, 24],
    "empty ones": [0, 0, 7, 7, 7, 13, 24, 24],
    "padding": [0, 4, 15],
    "a row of padding": [0, 3, 9],
    "no documents": [0],
    "only empty ones": [0, 0, 0],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("B", "T", "H", "K", "D"), [(2, 37, 6, 2, 64), (1, 1, 1, 1, 8), (3, 20, 4, 4, 16), (1, 130, 2, 1, 128)]
)
def test_as_exact_as_torch(dtype: torch.dtype, B: int, T: int, H: int, K: int, D: int) -> None:
    torch.manual_seed(T)
    *inputs, upstream = draw(B, T, H, K, D, dtype)
    assert_as_exact_as_torch(flash_attention, plain_attention, inputs, (upstream,), ROUNDINGS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS.keys())
@pytest.mark.parametrize("window", [None, 3])
def test_documents_as_exact_as_torch(dtype: torch.dtype, cuts: list[int], window: int | None) -> None:
    torch.manual_seed(len(cuts))
    *inputs, upstream = draw(2, 12, 4, 2, 8, dtype)
    cu_seqlens = torch.tensor(cuts, dtype=torch.int32)
    assert_as_exact_as_torch(
        lambda q, k, v: flash_attention(q, k, v, cu_seqlens=cu_seqlens, window=window),
        lambda q, k, v: plain_attention(q, k, v, cu_seqlens=cuts, window=window),
        inputs,
        (upstream,),
        ROUNDINGS,
    )


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("cuts", [None, CUTS["empty ones"], CUTS["padding"]])
@pytest.mark.parametrize("window", [None, 1, 4, 12, 100])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_every_combination_in_float64(
    causal: bool, cuts: list[int] | None, window: int | None, scale: float | None
) -> None:
    if window is not None and not causal:
        pytest.skip("a window needs causal=True")
    torch.manual_seed(0)
    *inputs, upstream = draw(2, 12, 4, 2, 8)
    cu_seqlens = None if cuts is None else torch.tensor(cuts, dtype=torch.int32)
    options = {"causal": causal, "window": window, "scale": scale}
    found = run(lambda q, k, v: flash_attention(q, k, v, cu_seqlens=cu_seqlens, **options), inputs, (upstream,))
    expected = run(lambda q, k, v: plain_attention(q, k, v, cu_seqlens=cuts, **options), inputs, (upstream,))
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e)


def test_each_document_is_as_if_alone() -> None:
    torch.manual_seed(1)
    q, k, v, _ = draw(1, 24, 4, 2, 8)
    cuts = CUTS["empty ones"]
    together = flash_attention(q, k, v, cu_seqlens=torch.tensor(cuts, dtype=torch.int32))
    for start, end in itertools.pairwise(cuts):
        alone = flash_attention(q[:, start:end], k[:, start:end], v[:, start:end])
        torch.testing.assert_close(together[:, start:end], alone)


def test_padding_harms_nothing_whatever_it_holds() -> None:
    """Past the last document: zeros and zero gradients, NaN in the padding included, and upstream gradients ignored."""
    torch.manual_seed(2)
    q, k, v, upstream = draw(2, 12, 4, 2, 8)
    cu_seqlens = torch.tensor([0, 4, 15], dtype=torch.int32)
    clean = run(lambda q, k, v: flash_attention(q, k, v, cu_seqlens=cu_seqlens), (q, k, v), (upstream,))
    for x in (q, k, v, upstream):
        x.view(24, -1)[15:] = float("nan")
    found = run(lambda q, k, v: flash_attention(q, k, v, cu_seqlens=cu_seqlens), (q, k, v), (upstream,))
    for f, c in zip(found, clean, strict=True):
        assert torch.equal(f, c)
        assert not f.view(24, -1)[15:].any()


def test_gradcheck() -> None:
    torch.manual_seed(3)
    q, k, v, _ = (x.requires_grad_() for x in draw(2, 5, 2, 1, 4))
    assert torch.autograd.gradcheck(flash_attention, (q, k, v))
    cu_seqlens = torch.tensor([0, 3, 3, 8], dtype=torch.int32)
    assert torch.autograd.gradcheck(
        lambda q, k, v: flash_attention(q, k, v, cu_seqlens=cu_seqlens, window=2), (q, k, v)
    )


@pytest.mark.parametrize("layout", [strided, lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_inputs_and_upstream_gradients(layout, dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    *inputs, upstream = draw(2, 9, 4, 2, 16, dtype)
    expected = run(flash_attention, inputs, (upstream,))
    found = run(flash_attention, [layout(x) for x in inputs], (layout(upstream),))
    for e, f in zip(expected, found, strict=True):
        torch.testing.assert_close(f, e)


@pytest.mark.parametrize("cuts", [None, [0], [0, 0]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_empty_batch(cuts: list[int] | None, dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(0, 4, heads, 8, dtype=dtype, requires_grad=True) for heads in (4, 2, 2))
    o = flash_attention(q, k, v, cu_seqlens=None if cuts is None else torch.tensor(cuts, dtype=torch.int32))
    o.sum().backward()
    assert o.shape == q.shape
    assert k.grad is not None


def test_bad_arguments_are_refused() -> None:
    q, k, v, _ = draw(2, 4, 4, 2, 8)
    for shapes in ((q, k[:, :3], v[:, :3]), (q, k, v[..., :4]), (q[:, :, :3], k, v), (q[0], k[0], v[0])):
        with pytest.raises(ValueError, match="k and v"):
            flash_attention(*shapes)
    for window, causal in ((0, True), (2, False)):
        with pytest.raises(ValueError, match="window"):
            flash_attention(q, k, v, window=window, causal=causal)
    for cuts in ([1, 8], [0, 5, 4], [0, 9], []):
        with pytest.raises(ValueError, match="cu_seqlens"):
            flash_attention(q, k, v, cu_seqlens=torch.tensor(cuts, dtype=torch.int32))
    with pytest.raises(ValueError, match="int32"):
        flash_attention(q, k, v, cu_seqlens=torch.tensor([0, 8]))
