"""Builds csrc/ into spt_fast/_C by torch's stable ABI: one binary for every torch >= 2.11 and Python >= 3.11."""

from glob import glob
from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

setup(
    ext_modules=[
        CppExtension(
            name="spt_fast._C",
            sources=sorted(glob("csrc/*.cpp")),
            depends=sorted(glob("csrc/*.h")),
            py_limited_api=True,
            extra_compile_args=[
                "-O3",
                "-g0",
                "-std=c++20",
                "-fvisibility=hidden",
                "-fopenmp-simd",
                "-fno-math-errno",
                "-fno-trapping-math",
                "-ffp-contract=fast",
                "-DTORCH_TARGET_VERSION=0x020b000000000000",
                "-Wall",
                f"-fmacro-prefix-map={Path.cwd()}/=",  # errors name csrc/, not the builder's folder
            ],
        )
    ],
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
