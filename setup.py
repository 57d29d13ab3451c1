"""Builds csrc/ into spt_fast/_C against torch's stable ABI: one binary for every torch >= 2.11 and every Python >= 3.11."""

from glob import glob

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

setup(
    ext_modules=[
        CppExtension(
            name="spt_fast._C",
            sources=sorted(glob("csrc/*.cpp")),
            py_limited_api=True,
            extra_compile_args=[
                "-O3",
                "-std=c++20",
                "-fvisibility=hidden",
                "-DTORCH_TARGET_VERSION=0x020b000000000000",
                "-DPy_LIMITED_API=0x030b0000",
                "-Wall",
                "-Wno-unused-variable",
            ],
        )
    ],
    cmdclass={"build_ext": BuildExtension.with_options(no_python_abi_suffix=True)},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
