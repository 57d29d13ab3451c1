"""The L2 norm of all gradients together.

A CPU adds in order: in float32 the norm of three million values has an error of up to 6e-5. So squares are summed in
float64, by csrc/total_norm.cpp in one pass, elsewhere in pieces that PyTorch copies to float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spt_fast import native
from spt_fast.kernels.backend import CPU_LIBRARY

PIECE = 1 << 16
"""Number of values in one norm by PyTorch on a CPU."""


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """A 0-d float32 tensor on the device of the tensors, of which there is at least one; of any floating dtype."""
    if tensors[0].is_cuda:
        return torch.linalg.vector_norm(tensors[0]) if len(tensors) == 1 else torch.nn.utils.get_total_norm(tensors)
    if CPU_LIBRARY and all(x.dtype == torch.float32 for x in tensors):
        return torch.tensor(native.ops().cpu_total_norm([x.contiguous() for x in tensors]), dtype=torch.float32)
    pieces = [piece for x in tensors for piece in x.flatten().split(PIECE)]
    norms = [torch.linalg.vector_norm(piece, dtype=torch.float64) for piece in pieces]
    return torch.linalg.vector_norm(torch.stack(norms)).float()
