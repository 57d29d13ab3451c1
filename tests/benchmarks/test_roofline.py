from __future__ import annotations

import importlib
import json
import pkgutil
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import roofline
from benchmarks.roofline import Ceilings, Kernel, Rates, Shape, Step, ours
from spt_fast import kernels
from spt_fast.kernels import accumulate_in_place, backend, fp8, persistent
from spt_fast.kernels.backend import Candidate, install
from spt_fast.kernels.gradients import sum_parts_at_last
from spt_fast.model import gpt
from spt_fast.model.flops import train_flops_per_token
from spt_fast.model.gpt import GPT, GPTConfig

CEILINGS = Ceilings(Rates(600, 300, 200), memory=3e12)
PASSES = ("forward", "backward")
NO_LAUNCH = {
    "empty",
    "empty_like",
    "new_empty",
    "empty_strided",
    "detach",
    "promote_types",
    "_unsafe_view",
    "ones_like",
}


class Launches(TorchDispatchMode):
    """What a GPU would start: PyTorch's ops that aren't views, and Triton kernels, which do nothing here."""

    def __init__(self) -> None:
        super().__init__()
        self.of: Counter[str] = Counter()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        views = any(result.alias_info and not result.alias_info.is_write for result in op._schema.returns)
        if not views and op._schema.name.removeprefix("aten::") not in NO_LAUNCH:
            self.of[op._schema.name] += 1
        return op(*args, **(kwargs or {}))

    def product(self, a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype, _: str) -> Tensor:
        self.of["fp8 product"] += 1
        return a.new_empty(len(a), len(b), dtype=dtype)


class Stub:
    def __init__(self, name: str, launches: Launches) -> None:
        self.name, self.launches = name, launches

    def __getitem__(self, grid: object) -> Stub:
        return self

    def __call__(self, *_: Any, **__: Any) -> None:
        self.launches.of[self.name] += 1


@contextmanager
def counted() -> Iterator[Launches]:
    launches = Launches()
    with pytest.MonkeyPatch.context() as patch, backend.prefer("triton"):
        for file in pkgutil.iter_modules(kernels.__path__):
            module = importlib.import_module(f"spt_fast.kernels.{file.name}")
            if hasattr(module, "is_looked_at"):
                patch.setattr(module, "is_looked_at", lambda _: False)
            for name, value in list(vars(module).items()):
                if type(value).__name__ in ("InterpretedFunction", "JITFunction"):
                    patch.setattr(module, name, Stub(f"{file.name}.{name}", launches))
        patch.setattr(fp8, "_product", launches.product)
        with launches:
            yield launches


def launches_of(layers: int, *, in_fp8: bool = False) -> dict[str, Counter[str]]:
    """Of a step's first micro-batch, forward and backward; what Triton would have computed is left as it lies."""
    model = GPT(GPTConfig(layers=layers, width=64, heads=2, kv_heads=2, ffn=128, context=32, vocab_size=256))
    model.fp8 = in_fp8
    model.to(torch.bfloat16 if in_fp8 else torch.float32)
    accumulate_in_place(model.parameters())
    (parts,) = sum_parts_at_last(weight for weight in model.parameters() if weight.ndim == 1)
    tokens_BT = torch.zeros(2, 32, dtype=torch.int64)
    model._hidden(tokens_BT, None)  # makes the tables of positions
    with counted() as weights:
        _in_fp8(model)
    with counted() as forward:
        loss = model(tokens_BT, tokens_BT, scale=1.0)
    with counted() as backward:
        loss.backward()
    with counted() as last:
        parts.add_up()
    return {"forward": forward.of, "backward": backward.of, "weights": weights.of, "last": last.of}


TILES = persistent.config(16, 32, 16, 4, 1)
FUSED = {
    "self_attention": Candidate("triton", (("qkv_projection", (192, 64, 32, 4), TILES),)),
    "swiglu_mlp": Candidate("triton", tuple((f"swiglu_mlp_{kernel}", (64, 128, 4), TILES) for kernel in PASSES)),
}


def _in_fp8(model: GPT) -> None:
    """Quantise the weights, as a step's first micro-batch does."""
    for name, weight in model.named_parameters():
        if model.fp8 and name.startswith("blocks") and weight.dim() == 2:
            fp8._quantised(weight, "triton")


def test_the_table_has_the_launches_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpt, "FP8_WIDTH", 16)
    shape = Shape(GPTConfig.preset("124m"), N=1024)
    one, two = launches_of(1, in_fp8=True), launches_of(2, in_fp8=True)
    step = Step.of("ours in fp8", ours(fp8=True), shape, CEILINGS)
    weights = sum(kernel.count(shape) for kernel in ours(fp8=True) if kernel.where == "layer step")
    assert weights == one["weights"].total(), one["weights"]
    for pass_ in PASSES:
        assert step.in_layer(pass_, shape) == (two[pass_] - one[pass_]).total(), two[pass_] - one[pass_]
    for fused in (True, False):
        install(FUSED if fused else {})
        one, two = launches_of(1), launches_of(2)
        step = Step.of("ours", ours(fused=fused), shape, CEILINGS)
        for pass_ in PASSES:
            assert step.in_layer(pass_, shape) == (two[pass_] - one[pass_]).total(), two[pass_] - one[pass_]
        assert two["last"].total() == 1
        rest = sum(kernel.count(shape) for kernel in ours() if (kernel.where, kernel.pass_) == ("batch", "forward"))
        assert rest == 2 * one["forward"].total() - two["forward"].total()


def test_a_kernel_takes_its_bytes_or_its_flops_and_a_start() -> None:
    shape = Shape(GPTConfig.preset("124m"), N=1000)
    ceilings = Ceilings(Rates(1, 1, 1), memory=1e9, start=0.5)
    passes = Kernel("pass", "layer", "forward", lambda s: 2e6 * s.N, launches=2)
    products = Kernel("product", "batch", "forward", lambda s: 1e9, lambda s: 3e9 * s.N)
    step = Step.of("any", [passes, products], shape, ceilings)
    assert [row.seconds for row in step.rows] == pytest.approx([12 * (2 + 1), 3 + 0.5])
    assert step.rows[0].launches == 24
    assert step.mfu == pytest.approx(1000 * train_flops_per_token(shape.config) / step.seconds / 989e12)
    slow = Step.of("any", [passes], shape, Ceilings(Rates(1, 1, 1), memory=1e9, host=100.0))
    assert slow.mfu == pytest.approx(1000 * train_flops_per_token(shape.config) / 2400 / 989e12)


def test_products_are_the_flops_that_mfu_counts() -> None:
    """All of 6N; of 12·L·H·Q·T the half that the mask leaves, and a backward pass that computes the scores again."""
    for name in ("124m", "1b"):
        shape = Shape(GPTConfig.preset(name), N=2048, micro=2)
        c = shape.config
        counted = {kernel.rate: 0.0 for kernel in ours()}
        for kernel in ours():
            counted[kernel.rate] += kernel.times(shape) * kernel.flops(shape) if kernel.flops else 0
        attention = 12 * c.layers * shape.HQ * c.context * 4096
        assert counted["products"] + counted["fused"] == 4096 * train_flops_per_token(c) - attention
        found = counted["attention forward"] + counted["attention backward"]
        assert found == pytest.approx(attention * 7 / 12, rel=2e-3)


def test_a_run_prints_and_writes_all_sides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "roofline.json"
    monkeypatch.setattr(
        sys, "argv", ["roofline", "--preset", "10m", "1b", "--graphs", "--kernels", "--json", str(file)]
    )
    roofline.main()
    presets = json.loads(file.read_text())["presets"]
    sides = ["ours", "ours, separate kernels", "plain, compiled", "products and attention"]
    assert [side["side"] for side in presets["10m"]["sides"]] == sides
    assert presets["1b"]["sides"][2]["side"] == "ours in fp8"
    assert {side["host_seconds"] for side in presets["10m"]["sides"]} == {0.0}
    printed = capsys.readouterr().out
    assert "6N+12LHQT" in printed
    assert "| swiglu backward | backward | 18 |" in printed
