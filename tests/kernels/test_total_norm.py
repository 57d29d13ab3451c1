from __future__ import annotations

import math

import pytest
import torch

from spt_fast.kernels import total_norm as module
from spt_fast.kernels.total_norm import total_norm


@pytest.mark.parametrize("library", [True, False])
def test_exact_for_many_values_of_any_layout_and_threads(library: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 one of three million would be lost beside the first."""
    monkeypatch.setattr(module, "CPU_LIBRARY", library and module.CPU_LIBRARY)
    tensors = [torch.full((3, 1_000_003), 0.25), torch.tensor([4096.0]), torch.randn(70, 50).T, torch.empty(0, 4)]
    expected = math.sqrt(sum(x.double().square().sum().item() for x in tensors))
    found = total_norm(tensors)
    assert (found.dtype, found.shape) == (torch.float32, ())
    assert found.item() == pytest.approx(expected, rel=1e-7)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(total_norm(tensors), found)
    finally:
        torch.set_num_threads(before)
    assert total_norm([x.bfloat16() for x in tensors]).item() == pytest.approx(expected, rel=1e-3)
    assert total_norm([torch.tensor([torch.nan])]).isnan()
