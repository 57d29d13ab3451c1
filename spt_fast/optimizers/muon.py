"""Muon: momentum with orthogonalised matrices (Jordan, kellerjordan.github.io/posts/muon; arXiv 2502.16982).

    B <- μ B + (1 - μ) G        O = NewtonSchulz((1 - μ) G + μ B)        W <- W - lr (0.2 √max(m, n) O + λ W)

NewtonSchulz brings the singular values of a matrix near 1 with matmuls only, so every direction of an update is equally
large. The factor 0.2 √max(m, n) gives an update [m, n] the root mean square of AdamW's, so that one learning rate and
one decay serve both (Moonlight). Muon is for the matrices between hidden activations: the blocks'. Embedding, head,
norms and biases use AdamW, with the same settings. q, k and v, and gate and up, which share one parameter, are separate
matrices.

Cost: 5 (4 m²n + 2 m³) FLOPs per matrix [m, n], m ≤ n, and update. State: one number per parameter; AdamW has two. An
iteration holds twice the stacked matrices and twice their products [m, m].
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from spt_fast.errors import RecipeError, invalid
from spt_fast.fields import number, setting, text
from spt_fast.optimizers.adamw import AdamW
from spt_fast.optimizers.base import Group, Update, register

if TYPE_CHECKING:
    import torch
    from torch import Tensor

COEFFICIENTS, ITERATIONS = (3.4445, -4.7750, 2.0315), 5
"""Coefficients of x -> a x + b x³ + c x⁵ (Jordan), the steepest at 0 that ends within about 0.7 to 1.2."""
RMS = 0.2
"""Root mean square of AdamW's updates (arXiv 2502.16982, section 2.2)."""
STACKED = 1 << 26
"""Numbers that are orthogonalised at a time, in matrices of one shape."""


def _momentum(value: object, where: str) -> float:
    given = number(0.0, 1.0)(value, where)
    if given == 1:
        raise RecipeError(invalid(where, value, "it must be below 1; with 1 gradients have no effect"))
    return given


@register
@dataclass(frozen=True, kw_only=True)
class Muon(AdamW):
    """`betas` and `eps` apply to the parameters that AdamW updates. The best `lr` falls with the length of training:
    choose it in runs as long as yours (at 1.1M parameters 3.2e-2 was best for 1M tokens, and 8e-3 far better for 10M).
    """

    name: str = setting(text, "muon")
    momentum: float = setting(_momentum, 0.95)
    """Decay rate of the momentum of the blocks' matrices."""

    kinds = ("exp_avg", "exp_avg_sq", "momentum")
    whole_matrices = True

    def kinds_of(self, hidden: bool) -> tuple[str, ...]:
        return ("momentum",) if hidden else AdamW.kinds

    def update_bytes(self, matrices: Mapping[tuple[int, int], int], itemsize: int) -> int:
        most = 0
        for (m, n), count in matrices.items():
            stacked = min(count, max(1, STACKED // (m * n)))
            numbers, products = stacked * m * n, stacked * min(m, n) ** 2
            norm = itemsize * numbers + (4 * numbers if itemsize < 4 else 0)
            most = max(most, 2 * itemsize * (numbers + products), norm, itemsize * numbers + 8 * m * n)
        return most

    def update_flops(self, matrices: Mapping[tuple[int, int], int]) -> int:
        sizes = [(min(shape), max(shape), count) for shape, count in matrices.items()]
        return sum(count * ITERATIONS * (4 * m * m * n + 2 * m**3) for m, n, count in sizes)

    def update(self, group: Group, by: Update) -> None:
        if group.matrices is None:
            super().update(group, by)
            return
        alike: defaultdict[tuple[int, int], list[tuple[Tensor, ...]]] = defaultdict(list)
        momenta, masters = group.state["momentum"], group.masters or group.params
        anchors = group.anchors or masters
        for rows, *tensors in zip(group.matrices, group.grads, momenta, masters, anchors, strict=True):
            for matrix in zip(*(tensor.split(rows) for tensor in tensors), strict=True):
                alike[matrix[0].shape].append(matrix)
        dtype = group.params[0].dtype
        for (m, n), matrices in alike.items():
            at_once = max(1, STACKED // (m * n))
            for first in range(0, len(matrices), at_once):
                self._update_alike(matrices[first : first + at_once], by, dtype)
        for param, master in zip(group.params, masters, strict=True):
            if param is not master:
                param.copy_(master)

    def _update_alike(self, matrices: list[tuple[Tensor, ...]], by: Update, dtype: torch.dtype) -> None:
        """Matrices of one shape, each given as (gradient, momentum, master, anchor); all of a block's have weight
        decay."""
        import torch

        m, n = matrices[0][0].shape
        new, lr = torch.full((), 1 - self.momentum), torch.as_tensor(by.lr)
        new, lr = (number.to(matrices[0][0].device) for number in (new, lr))
        if by.skip is not None:
            new, lr = new.masked_fill(by.skip, 0), lr.masked_fill(by.skip, 0)

        def steps() -> Tensor:
            stacked = matrices[0][1].new_empty(len(matrices), m, n, dtype=dtype)
            for step, (grad, momentum, _, _) in zip(stacked, matrices, strict=True):
                grad = grad * by.scale
                if by.skip is not None:
                    grad.masked_fill_(by.skip, 0)
                momentum.lerp_(grad, new)
                step.copy_(grad.lerp_(momentum, self.momentum))
            return stacked

        for change, (_, _, master, anchor) in zip(orthogonalised(steps()), matrices, strict=True):
            change = change.float() * (RMS * max(m, n) ** 0.5)
            if self.weight_decay:
                change.add_(master, alpha=self.weight_decay)
            if by.anchor_decay:
                change.add_(master - anchor, alpha=by.anchor_decay)
            master.sub_(change.mul_(lr))


def orthogonalised(matrices: Tensor) -> Tensor:
    """[K, m, n] with about the same singular vectors and singular values near 1, in the given dtype."""
    import torch

    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    del matrices  # frees them, unless the caller has them
    x = x / x.float().norm(dim=(1, 2), keepdim=True).clamp(min=1e-7).to(x.dtype)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
