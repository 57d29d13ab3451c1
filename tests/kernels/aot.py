"""Every Triton kernel compiled ahead of time, without a GPU: registers, stack and shared memory on each architecture.

    python -m tests.kernels.aot [--default] [--arch 80 90 100] [--file norm ...]

A kernel fails where it spills registers (its stack is not 0) or asks for more shared memory than the GPU has. Must run
without TRITON_INTERPRET. Prints one line for each kernel, variant and architecture; exit code 1 if any fails. A line
also says where on Hopper the assembler lets each product wait for the last, since other code touches their sums.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from spt_fast.kernels.backend import OPS
from spt_fast.kernels.launch import OPTIONS, Variant

FILES = {op.variants.__module__.rpartition(".")[2]: op.variants for op in OPS.values()}
"""The launches of each file with Triton kernels in it."""
SHARED_LIMIT_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}


class Resources(NamedTuple):
    registers: int
    stack_bytes: int
    shared_bytes: int
    serialized: str | None = None
    """Why Hopper's products wait for each other."""

    def problem(self, arch: int) -> str | None:
        if self.stack_bytes:
            return f"spills: {self.stack_bytes} bytes of stack"
        if self.shared_bytes > SHARED_LIMIT_BYTES[arch]:
            return f"takes {self.shared_bytes:,} bytes of shared memory, the GPU has {SHARED_LIMIT_BYTES[arch]:,}"
        return None


def compile_for(variant: Variant, arch: int) -> Resources:
    """Compile as the launcher would, with pointers divisible by 16."""
    names = variant.kernel.arg_names
    missing = set(names) - variant.arguments.keys() - variant.constants.keys()
    assert not missing, f"{variant.kernel.__name__}: the variant doesn't give {missing}"
    given = {name: kind for name, kind in variant.arguments.items() if kind is not None}
    kinds = {name: kind.removesuffix(":16") for name, kind in given.items()}
    constants = dict(variant.constants) | dict.fromkeys(variant.arguments.keys() - given.keys())
    signature = {name: kinds.get(name, "constexpr") for name in names}
    divisible = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name, kind in given.items()
        if kind.startswith("*") or kind.endswith(":16")
    }
    source = ASTSource(variant.kernel, signature, constants, divisible)
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages, "maxnreg": variant.maxnreg}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options | OPTIONS)
    said = _said(triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", of=compiled.asm["cubin"])
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK):(\d+)", said)}
    serialized = None
    if "wgmma.mma_async" in (ptx := compiled.asm["ptx"]):
        said = _said(get_ptxas(arch).path, "-v", f"-arch=sm_{arch}a", "-o", os.devnull, of=ptx.encode())
        serialized = next(iter(re.findall(r"instructions are serialized due to (.*) in ", said)), None)
    return Resources(usage["REG"], usage["STACK"], compiled.metadata.shared, serialized)


def _said(tool: str, *arguments: str, of: bytes) -> str:
    with tempfile.NamedTemporaryFile() as file:
        file.write(of)
        file.flush()
        done = subprocess.run([tool, *arguments, file.name], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def variants_of(file: str) -> list[Variant]:
    """Each once, since many shapes are launched alike; a file's first, so list what is default first."""
    distinct: dict[str, Variant] = {}
    for variant in FILES[file]():
        distinct.setdefault(repr(replace(variant, default=True)), variant)
    return list(distinct.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--default", action="store_true", help="only what a usual call chooses")
    parser.add_argument("--arch", type=int, nargs="+", default=sorted(SHARED_LIMIT_BYTES))
    parser.add_argument("--file", nargs="+", choices=FILES, default=list(FILES))
    options = parser.parse_args()
    compiled, failed, start = 0, 0, time.perf_counter()
    print(f"triton {triton.__version__}")
    for file in options.file:
        for variant in variants_of(file):
            if options.default and not variant.default:
                continue
            constants = " ".join(f"{name}={value}" for name, value in variant.constants.items())
            for arch in sorted({*options.arch} & {*variant.archs}):
                resources = compile_for(variant, arch)
                problem = resources.problem(arch)
                compiled += 1
                failed += problem is not None
                print(
                    f"sm_{arch} {file}.{variant.kernel.__name__} warps={variant.num_warps} {constants}: "
                    f"{resources.registers} registers, {resources.shared_bytes:,} bytes shared"
                    + (f", serialized due to {resources.serialized}" if resources.serialized else "")
                    + (f": FAILED, {problem}" if problem else ""),
                    flush=True,
                )
    print(f"{compiled} kernels in {time.perf_counter() - start:.0f} s, {failed} failed")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
