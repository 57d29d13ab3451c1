"""Whether every launch of a Triton kernel is one that is compiled ahead of time (tests/kernels/aot.py)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from spt_fast.kernels.launch import TensorDescriptor, Variant
from tests.kernels.aot import variants_of

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
POINTERS = {
    BF16: "*bf16", FP16: "*fp16", FP32: "*fp32", torch.bool: "*i1", torch.int32: "*i32", torch.int64: "*i64",
    torch.float8_e4m3fn: "*fp8e4nv", torch.float8_e5m2: "*fp8e5",
}  # fmt: skip
WIDTHS = (64, 96, 128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 5120, 8192, 12288, 16384)


@contextmanager
def compiled_launches(module: ModuleType) -> Iterator[None]:
    """Within it the kernels of a file of kernels/ do nothing when they are launched, on CPU tensors too. Every launch
    must be among the file's variants, by arguments, constants and options."""
    variants, launches = variants_of(module.__name__.rpartition(".")[2]), []
    with pytest.MonkeyPatch.context() as patch:
        for name, value in list(vars(module).items()):
            if any(variant.kernel is value for variant in variants):
                patch.setattr(module, name, Kernel(value, launches))
        yield
    assert launches
    multiples = {variant.kernel: multiples_of_16(variant.kernel, variants) for variant in variants}
    missing = {
        f"{kernel.__name__} {describe(given)}"
        for kernel, given in launches
        if not any(is_launched_by(variant, kernel, given, multiples[kernel]) for variant in variants)
    }
    assert not missing


class Kernel:
    def __init__(self, kernel: Any, launches: list) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: object) -> Kernel:
        return self

    def __call__(self, *arguments: Any, **constants: Any) -> None:
        self.launches.append((self.kernel, dict(zip(self.kernel.arg_names, arguments, strict=False)) | constants))


def is_launched_by(variant: Variant, kernel: Any, launch: dict[str, Any], multiples: set[str]) -> bool:
    if variant.kernel is not kernel or variant.num_warps != launch["num_warps"]:
        return False
    if (variant.num_stages, variant.maxnreg) != (launch.get("num_stages", 3), launch.get("maxnreg")):
        return False
    odd = [launch[name] for name in multiples if variant.arguments[name] == "i32"]
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
    if isinstance(given, TensorDescriptor):
        return kind == f"tensordesc<{POINTERS[given.base.dtype][1:]}{given.block_shape}>"
    if isinstance(given, float):
        return kind == "fp32"
    return kind == "i32" or (kind == "i32:16" and given % 16 == 0)


def describe(launch: dict[str, Any]) -> str:
    shown = {name: POINTERS[x.dtype] if isinstance(x, Tensor) else x for name, x in launch.items()}
    return " ".join(f"{name}={x}" for name, x in shown.items())
