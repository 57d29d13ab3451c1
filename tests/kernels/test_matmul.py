from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spt_fast.kernels import matmul
from spt_fast.kernels.matmul import FEWEST_ROWS, multiply, rows_times

ours = pytest.mark.skipif(not matmul.RUNS, reason="this processor has no AVX-512")


@pytest.fixture(autouse=True)
def paying(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where it is faster than PyTorch's."""
    monkeypatch.setattr(matmul, "PAYS", matmul.RUNS)


def factor(rows: int, columns: int, contiguous: str) -> Tensor:
    """With gaps between its contiguous rows or columns, and something around it that must not be read as a number."""
    shape = (rows, columns) if contiguous == "rows" else (columns, rows)
    held = torch.full((shape[0], shape[1] + 3), torch.nan)
    held[:, : shape[1]] = torch.randn(shape)
    x = held[:, : shape[1]]
    return x if contiguous == "rows" else x.T


@ours
@pytest.mark.parametrize("left", ["rows", "columns"])
@pytest.mark.parametrize("right", ["rows", "columns"])
def test_every_layout_and_remainder(left: str, right: str) -> None:
    """Tiles of 6 and 8 rows, panels of 64 and 48 columns, blocks of 96 and 64 rows, sums in parts of 192."""
    for M, K, N in ((32, 1, 1), (97, 193, 64), (65, 400, 130), (40, 16, 49), (230, 33, 113), (33, 0, 5)):
        a, b = factor(M, K, left), factor(K, N, right)
        out = torch.full((M, N + 2), 7.0)
        exact = a.double() @ b.double()
        allowed = 1e-6 * (1 + a.double().abs() @ b.double().abs())
        assert multiply(a, b, out[:, :N]).data_ptr() == out.data_ptr()
        assert ((out[:, :N] - exact).abs() <= allowed).all()
        multiply(a, b, out[:, :N], add=True)
        assert ((out[:, :N] - 2 * exact).abs() <= 2 * allowed).all()
        assert (out[:, N:] == 7).all()


@ours
def test_a_row_is_the_same_beside_any_others_and_from_any_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr(torch, "mm", lambda *_, **__: called.append(1))
    x, w, bias = torch.randn(300, 70), torch.randn(90, 70), torch.randn(90)
    whole = rows_times(x, w.T, bias)
    assert torch.equal(rows_times(x[100 : 100 + FEWEST_ROWS], w.T, bias), whole[100 : 100 + FEWEST_ROWS])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(rows_times(x.view(3, 100, 70), w.T, bias).flatten(0, 1), whole)
    finally:
        torch.set_num_threads(before)
    assert not called


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_and_few_rows_are_left_to_pytorch(dtype: torch.dtype) -> None:
    a, b, few = torch.randn(40, 8).to(dtype), torch.randn(8, 12).to(dtype), torch.randn(3, 8)
    assert torch.equal(multiply(a, b), a @ b)
    assert torch.equal(multiply(few, b.float()), few @ b.float())
    total = torch.ones(40, 12, dtype=dtype)
    assert torch.equal(multiply(a, b, total.clone(), add=True), torch.addmm(total, a, b))


@ours
def test_shapes_that_do_not_fit() -> None:
    with pytest.raises(RuntimeError, match="shapes don't fit"):
        multiply(torch.randn(40, 8), torch.randn(9, 12))
