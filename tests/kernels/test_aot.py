"""Every Triton kernel compiles for each GPU architecture, spills no register and fits its shared memory."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spt_fast.kernels import activation, adamw, attention_triton, cross_entropy, fp8, norm, rotary
from spt_fast.kernels.launch import Variant
from tests.kernels.aot import OPS, Resources, variants_of

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("op", OPS)
def test_default_kernels_compile_for_every_gpu(op: str, tmp_path: Path) -> None:
    """In a process of its own, since this one may have set Triton to interpret."""
    expected = sum(len(variant.archs) for variant in variants_of(op) if variant.default)
    if not expected:
        pytest.skip("no Triton kernel")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    finished = subprocess.run(
        [sys.executable, "-m", "tests.kernels.aot", "--default", "--op", op],
        capture_output=True,
        text=True,
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        cwd=ROOT,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert finished.stdout.count("registers") == expected


def test_a_spill_and_too_much_shared_memory_are_problems() -> None:
    assert Resources(255, 0, 100_000).problem(90) is None
    assert "spills: 8 bytes" in str(Resources(255, 8, 0).problem(90))
    assert "shared memory" in str(Resources(32, 0, 200_000).problem(80))
    assert Resources(32, 0, 200_000).problem(90) is None


# Every launch, on CPU tensors with the kernels replaced by what takes the launch down, is one that is compiled.

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
POINTERS = {
    BF16: "*bf16", FP16: "*fp16", FP32: "*fp32", torch.bool: "*i1", torch.int32: "*i32", torch.int64: "*i64",
    torch.float8_e4m3fn: "*fp8e4nv", torch.float8_e5m2: "*fp8e5",
}  # fmt: skip
MODULES = {op: importlib.import_module(f"spt_fast.kernels.{op}") for op in OPS} | {"attention": attention_triton}
WIDTHS = (64, 96, 128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 5120, 8192, 12288, 16384)


class Kernel:
    def __init__(self, kernel: Any, launches: list) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: object) -> Kernel:
        return self

    def __call__(self, *arguments: Any, **constants: Any) -> None:
        self.launches.append((self.kernel, dict(zip(self.kernel.arg_names, arguments, strict=False)) | constants))


def is_launched_by(variant: Variant, kernel: Any, launch: dict[str, Any]) -> bool:
    if variant.kernel is not kernel or variant.num_warps != launch["num_warps"]:
        return False
    if (variant.num_stages, variant.maxnreg) != (launch.get("num_stages", 3), launch.get("maxnreg")):
        return False
    return all(is_given(variant, name, launch) for name in kernel.arg_names)


def is_given(variant: Variant, name: str, launch: dict[str, Any]) -> bool:
    given = launch[name]
    if name == "D" and "WIDTH" in launch:  # of attention, where it only decides which columns are masked
        return (variant.constants["D"] == variant.constants["WIDTH"]) == (given == launch["WIDTH"])
    if name in variant.constants:
        return variant.constants[name] == given
    kind = variant.arguments[name]
    if kind is None or given is None:
        return kind is given
    if isinstance(given, Tensor):
        return kind == POINTERS[given.dtype]
    if isinstance(given, float):
        return kind == "fp32"
    return kind == "i32" or (kind == "i32:16" and given % 16 == 0)


def launch_norm() -> None:
    odd = [(D, dtype) for D in (1000, 3000, 6000) for dtype in (BF16, FP32)]
    for D, dtype in [*odd, *((D, dtype) for D in WIDTHS for dtype in (BF16, FP16, FP32))]:
        x, weight = torch.empty(2, D, dtype=dtype), torch.empty(D, dtype=dtype)
        for other in (None, x):
            norm._triton_forward(x, other, weight, 1e-6)
            norm._triton_backward(x, other, x, weight, torch.empty(2))


def launch_rotary() -> None:
    heads = (1, 2, 3, 4, 6, 8, 9, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 71, 96, 128)
    shapes = [(Hq, Hk, D) for Hq in heads for Hk in range(1, Hq + 1) if Hq % Hk == 0 for D in (64, 128)]
    shapes += [
        (Hq, Hk, D) for Hq in (1, 4, 12, 32, 128) for Hk in (1, 2, 4) if Hk <= Hq for D in (32, 96, 160, 192, 256)
    ]
    cases = [(shape, BF16) for shape in (*shapes, (12, 2, 80), (32, 8, 112))]
    for shape, dtype in cases + [(shape, dtype) for shape in rotary.HEAD_SHAPES for dtype in (FP16, FP32)]:
        Hq, Hk, D = shape
        q, k, weight = (torch.empty(*size, D, dtype=dtype) for size in ((1, 1, Hq), (1, 1, Hk), ()))
        table = torch.empty(1, D)
        rotary._triton_rope(q, k, table, table, False)
        rotary._triton_forward(q, k, weight, weight, table, table, 1e-6)
        rotary._triton_backward(q, k, q, k, weight, weight, table, table, 1e-6)


def launch_activation() -> None:
    for F in (16, 32, 64, 100, 128, 256, 1000, 1365, 4096):
        for dtype in (BF16, FP16, FP32):
            gate_up = torch.empty(2, 2 * F, dtype=dtype)
            gate, up = gate_up.split(F, -1)
            activation._triton_forward(gate, up)
            activation._triton_backward(up, gate, up, *torch.empty_like(gate_up).split(F, -1))


def launch_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, documents, window = (None, None), (torch.tensor([0, 3, 8], dtype=torch.int32), None), (None, 4)
    masks = [(True, *mask) for mask in (plain, documents, window, (documents[0], 4))]
    masks += [(False, *mask) for mask in (plain, documents)]
    cases = [(D, BF16, mask) for D in (64, 128) for mask in masks]
    cases += [(D, BF16, mask) for D in (32, 80, 96, 112, 256) for mask in masks[:2]]
    cases += [(D, FP32, mask) for D in (64, 128) for mask in masks[:2]]
    cases += [
        (D, dtype, masks[0]) for dtype, Ds in ((BF16, (48, 192)), (FP16, (64, 128)), (FP32, (32, 96))) for D in Ds
    ]
    for arch in ((8, 0), (8, 9), (9, 0), (10, 0), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, arch=arch: arch)
        for D, dtype, (causal, cu_seqlens, seen) in cases:
            for heads in ((4, 4), (4, 1), (6, 2)):
                q, k = (torch.zeros(2, 4, H, D, dtype=dtype) for H in heads)
                o, lse, spans = attention_triton.attention(q, k, k, cu_seqlens, causal, seen, 0.1)
                attention_triton._attention_backward(o, q, k, k, o, lse, spans, cu_seqlens, causal, seen, 0.1)


def launch_cross_entropy() -> None:
    for V in (256, 512, 1024, 2048, 4096, 8192, 32_000, 50_257, 151_936):
        for dtype in (BF16, FP16, FP32):
            x = torch.empty(1, 16, dtype=dtype)
            z_CV = cross_entropy._logits_buffer(x, 1, V)
            for softcap in (0.0, 30.0):
                for wants_grad in (False, True):
                    cross_entropy._triton_rows(
                        z_CV, torch.zeros(1, dtype=torch.long), torch.ones(1), -100, 0.0, softcap, wants_grad
                    )


def launch_adamw() -> None:
    for dtype, state, has_master, seed in (
        (FP32, FP32, False, None),
        (BF16, FP32, True, None),
        (FP16, FP32, True, None),
        (BF16, BF16, False, None),
        (BF16, BF16, False, 1),
        (BF16, FP32, False, None),
        (BF16, FP32, False, 1),
    ):
        param, moment = torch.empty(64, dtype=dtype), torch.empty(64, dtype=state)
        master = torch.empty(64) if has_master else None
        for anchor in (None, master if has_master else param):
            for skip in (None, False):
                adamw.adamw_step(
                    param, moment, moment.clone(), moment.clone(), step=1, lr=0.1, master=master, skip=skip,
                    anchor=anchor, anchor_decay=0.1 if anchor is not None else 0.0, stochastic_rounding=seed,
                    backend="triton",
                )  # fmt: skip


def launch_embedding() -> None:
    for D in (16, 32, 64, 100, 128, 384, 1000, 4096):
        for dtype in (BF16, FP16, FP32):
            MODULES["embedding"]._triton(torch.empty(2, D, dtype=dtype), torch.zeros(2, dtype=torch.int64), 4)


def launch_fp8() -> None:
    for D in WIDTHS:
        for dtype in (BF16, FP16, FP32):
            for kind in (fp8.FORWARD, fp8.BACKWARD):
                fp8._triton_rows(torch.empty(3, D, dtype=dtype), kind)
                fp8._triton_columns(torch.empty(3, D, dtype=dtype), kind)


@pytest.mark.parametrize("op", OPS)
def test_what_is_launched_is_compiled(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_triton, "INTERPRETED", False)
    module, variants, launches = MODULES[op], variants_of(op), []
    for name, value in list(vars(module).items()):
        if name.endswith("_kernel") and any(variant.kernel is value for variant in variants):
            monkeypatch.setattr(module, name, Kernel(value, launches))
    launch = globals()[f"launch_{op}"]
    launch(monkeypatch) if op == "attention" else launch()
    assert launches
    missing = {
        f"{kernel.__name__} {describe(given)}"
        for kernel, given in launches
        if not any(is_launched_by(variant, kernel, given) for variant in variants)
    }
    assert not missing


def describe(launch: dict[str, Any]) -> str:
    shown = {name: POINTERS[x.dtype] if isinstance(x, Tensor) else x for name, x in launch.items()}
    return " ".join(f"{name}={x}" for name, x in shown.items())
