"""What users install: an sdist that builds, a wheel of it that works outside the checkout, one package all over."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import spt_fast
from spt_fast.study.load import ready_studies

pytestmark = pytest.mark.long

CHECKOUT = Path(__file__).parents[1]
SHIPPED = [
    "csrc",
    "kernels",
    "spt_fast",
    "setup.py",
    "pyproject.toml",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
    "CHANGELOG.md",
    "CITATION.cff",
    "SECURITY.md",
    "constraints.txt",
    "tests",
]

USE_IT = """
import spt_fast, spt_fast.kernels, torch
assert {folder!r} in spt_fast.__file__, spt_fast.__file__
source, k = spt_fast.Mixture({{"web": "98%", "chem": "2%"}}).locate_many(10**15, 100)  # runs in C++
assert len(source) == 100
print(spt_fast.kernels.swiglu(torch.ones(2), torch.ones(2)))
"""


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    finished = subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True, env=os.environ | environment
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An sdist of the sources, and the wheel that is built from that sdist."""
    source = tmp_path_factory.mktemp("source")
    for name in SHIPPED:
        path = CHECKOUT / name
        if path.is_dir():
            shutil.copytree(path, source / name, symlinks=True, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(path, source / name)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", source / "dist", source, cwd=source)
    return source / "dist"


def test_the_wheel_of_the_sdist_works_outside_the_checkout(dist: Path, tmp_path: Path) -> None:
    wheel = next(dist.glob("*.whl"))
    assert wheel.name.startswith(f"spt_fast-{spt_fast.__version__}-cp311-abi3-linux")
    site = tmp_path / "site"
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", site, wheel, cwd=tmp_path)
    said = run(sys.executable, "-c", USE_IT.format(folder=str(site)), cwd=tmp_path, PYTHONPATH=str(site))
    assert said.startswith("tensor([0.7311")
    assert "spt-fast = spt_fast.cli:main" in (next(site.glob("*.dist-info")) / "entry_points.txt").read_text()


def test_what_the_archives_hold(dist: Path) -> None:
    with zipfile.ZipFile(next(dist.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
    assert {"spt_fast/_C.abi3.so", "spt_fast/kernels/norm.py", "spt_fast/py.typed", "spt_fast/train/loop.py"} <= names
    assert {f"spt_fast/study/ready/{name}.yaml" for name in ready_studies()} <= names
    assert {f"spt_fast/report/templates/report.{kind}" for kind in ("html", "css", "js")} <= names
    assert not any(name.startswith(("kernels/", "tests/", "benchmarks/")) for name in names)
    with tarfile.open(next(dist.glob("*.tar.gz"))) as sdist:
        files = {name.split("/", 1)[1] for name in sdist.getnames() if "/" in name}
    assert {"csrc/gather.cpp", "csrc/shuffle.h", "spt_fast/kernels/norm.py", "LICENSE", "constraints.txt"} <= files
    assert {"CHANGELOG.md", "CITATION.cff", "SECURITY.md"} <= files
    assert not any(name.startswith("tests") for name in files), "setuptools would take some of them, without the rest"


def test_the_checkout_itself_is_installed_editable(tmp_path: Path) -> None:
    assert Path(spt_fast.__file__).parent == CHECKOUT / "spt_fast"
    run(sys.executable, "-c", USE_IT.format(folder=str(CHECKOUT)), cwd=tmp_path)


def test_importing_the_package_costs_next_to_nothing(tmp_path: Path) -> None:
    """Worker processes import it; torch must not come along."""
    run(
        sys.executable,
        "-c",
        "import sys, spt_fast; assert 'torch' not in sys.modules and 'numpy' not in sys.modules",
        cwd=tmp_path,
    )


def test_the_same_version_is_printed_packed_cited_and_in_the_changelog(tmp_path: Path) -> None:
    for file, line in (("CITATION.cff", "version: {}\n"), ("CHANGELOG.md", "## {} · ")):
        assert "\n" + line.format(spt_fast.__version__) in (CHECKOUT / file).read_text()
    assert run(sys.executable, "-m", "spt_fast", "--version", cwd=tmp_path) == f"spt-fast {spt_fast.__version__}\n"
