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


def is_launched_by(variant: Variant, kernel: Any, launch: dict[str, Any], variants: list[Variant]) -> bool:
    if variant.kernel is not kernel or variant.num_warps != launch["num_warps"]:
        return False
    if (variant.num_stages, variant.maxnreg) != (launch.get("num_stages", 3), launch.get("maxnreg")):
        return False
    odd = [launch[name] for name in multiples_of_16(kernel, variants) if variant.arguments[name] == "i32"]
    if odd and all(size % 16 == 0 for size in odd):
        return False
    return all(is_given(variant, name, launch) for name in kernel.arg_names)


def multiples_of_16(kernel: Any, variants: list[Variant]) -> set[str]:
    """The sizes that make another kernel where they are."""
    arguments = [variant.arguments for variant in variants if variant.kernel is kernel]
    return {name for given in arguments for name, kind in given.items() if kind == "i32:16"}


def is_given(variant: Variant, name: str, launch: dict[str, Any]) -> bool:
    given = launch[name]
    if name == "D" and "WIDTH" in launch:  # of attention, where it only decides which columns are masked
        return (variant.constants["D"] == variant.constants["WIDTH"]) == (given == launch["WIDTH"])
    if name == "GROUPS":  # of rotary, where more than one only shift numbers
        return (variant.constants["GROUPS"] == 1) == (given == 1)
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
    cases = [(D, BF16, whole) for D in WIDTHS for whole in (False, True)]
    cases += [(D, FP32, True) for D in (768, 1024, 3072, 4096, 12288, 16384)]
    cases += [(1024, FP32, False), (768, FP16, True)]
    cases += [(1000, BF16, True), (3000, BF16, True), (5000, BF16, True), (1000, FP32, True)]
    for D, dtype, whole in cases:
        x, weight = torch.empty(2, D, dtype=dtype), torch.empty(D, dtype=dtype)
        other = x if whole else None
        norm._triton_forward(x, other, weight, 1e-6)
        norm._triton_backward(x, other, x, weight, torch.empty(2))


def launch_rotary() -> None:
    models = (
        (12, 12, 64), (16, 16, 64), (25, 25, 64), (6, 6, 64), (9, 3, 64), (15, 5, 64), (14, 2, 64), (32, 8, 64),
        (16, 16, 128), (32, 32, 128), (16, 8, 128), (12, 2, 128), (28, 4, 128), (24, 8, 128), (32, 8, 128),
        (40, 8, 128), (64, 8, 128), (4, 4, 32), (32, 32, 80), (32, 8, 80), (32, 32, 96), (24, 8, 96), (32, 32, 112),
        (4, 1, 256), (8, 1, 256), (8, 4, 256),
    )  # fmt: skip
    heads = (4, 6, 8, 9, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 71, 96, 128)
    cases = [(shape, BF16, True) for shape in models]
    cases += [((12, 12, 64), FP32, True), ((32, 8, 128), FP32, True)]
    cases += [((Hq, Hk, D), BF16, False) for Hq in heads for Hk in range(1, Hq + 1) if Hq % Hk == 0 for D in (64, 128)]
    for (Hq, Hk, D), dtype, forward in cases:
        q, k, weight = (torch.empty(*size, D, dtype=dtype) for size in ((1, 1, Hq), (1, 1, Hk), ()))
        table = torch.empty(1, D)
        if forward:
            rotary._triton_rope(q, k, table, table, False)
            rotary._triton_forward(q, k, weight, weight, table, table, 1e-6)
        rotary._triton_backward(q, k, q, k, weight, weight, table, table, 1e-6)


def launch_activation() -> None:
    cases = [(F, BF16) for F in (64, 128, 256, 1000, 1365, 4096)]
    cases += [(F, FP32) for F in (256, 1000, 1365, 4096)] + [(256, FP16), (4096, FP16)]
    for F, dtype in cases:
        gate_up = torch.empty(2, 2 * F, dtype=dtype)
        gate, up = gate_up.split(F, -1)
        activation._triton_forward(gate, up)
        activation._triton_backward(up, gate, up, *torch.empty_like(gate_up).split(F, -1))


def launch_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, documents, window = (None, None), (torch.tensor([0, 3, 8], dtype=torch.int32), None), (None, 4)
    masks = [(True, *mask) for mask in (plain, documents, window, (documents[0], 4))]
    masks += [(False, *mask) for mask in (plain, documents)]
    cases = [(D, BF16, mask) for D in (64, 128) for mask in masks]
    cases += [(D, BF16, mask) for D in (80, 96, 112, 256) for mask in masks[:2]]
    cases += [(D, FP32, mask) for D in (64, 128) for mask in masks[:2]]
    cases += [(D, dtype, masks[0]) for D, dtype in ((32, BF16), (32, FP32), (128, FP16))]
    for arch in ((8, 0), (8, 9), (9, 0), (10, 0), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, arch=arch: arch)
        for D, dtype, (causal, cu_seqlens, seen) in cases:
            for heads in ((4, 4), (4, 1), (6, 2)):
                q, k = (torch.zeros(2, 4, H, D, dtype=dtype) for H in heads)
                o, lse, spans = attention_triton.attention(q, k, k, cu_seqlens, causal, seen, 0.1)
                attention_triton._attention_backward(o, q, k, k, o, lse, spans, cu_seqlens, causal, seen, 0.1)


def launch_cross_entropy() -> None:
    cases = [(V, BF16) for V in (256, 4096, 8192, 32_000, 50_257, 151_936)]
    cases += [(V, FP32) for V in (8192, 32_000, 50_257)] + [(V, FP16) for V in (8192, 32_000)]
    for V, dtype in cases:
        z_CV = cross_entropy._logits_buffer(torch.empty(1, 16, dtype=dtype), 1, V)
        for softcap in (0.0, 30.0):
            for wants_grad in (False, True):
                cross_entropy._triton_rows(
                    z_CV, torch.zeros(1, dtype=torch.long), torch.ones(1), -100, 0.0, softcap, wants_grad
                )


def launch_adamw() -> None:
    for N, dtype, state, has_master in (
        (64, FP32, FP32, False),
        (99, FP32, FP32, False),
        (64, BF16, FP32, True),
        (99, BF16, FP32, True),
        (64, FP16, FP32, True),
        (64, BF16, BF16, False),
        (64, BF16, FP32, False),
    ):
        param, moment = torch.empty(N, dtype=dtype), torch.empty(N, dtype=state)
        master = torch.empty(N) if has_master else None
        for anchor in (None, master if has_master else param):
            for skip in (None, False):
                adamw.adamw_step(
                    param, moment, moment.clone(), moment.clone(), step=1, lr=0.1, master=master, skip=skip,
                    anchor=anchor, anchor_decay=0.1 if anchor is not None else 0.0, backend="triton",
                )  # fmt: skip


def launch_embedding() -> None:
    cases = [(D, BF16) for D in (64, 128, 384, 1000, 4096)] + [(D, FP32) for D in (384, 1000, 4096)] + [(384, FP16)]
    for D, dtype in cases:
        MODULES["embedding"]._triton(torch.empty(2, D, dtype=dtype), torch.zeros(2, dtype=torch.int64), 4)


def launch_fp8() -> None:
    cases = [(D, BF16) for D in WIDTHS if D > 1024] + [(D, dtype) for D in (1536, 2048) for dtype in (FP16, FP32)]
    for D, dtype in cases:
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
        if not any(is_launched_by(variant, kernel, given, variants) for variant in variants)
    }
    assert not missing


def describe(launch: dict[str, Any]) -> str:
    shown = {name: POINTERS[x.dtype] if isinstance(x, Tensor) else x for name, x in launch.items()}
    return " ".join(f"{name}={x}" for name, x in shown.items())
