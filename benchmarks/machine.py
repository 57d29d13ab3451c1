"""The machine and versions recorded with every figure."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]

PEERS = ("liger-kernel", "cut-cross-entropy", "flashoptim", "torchao", "flash-attn")
"""Libraries that ops and training step are compared with, if installed."""


def cpu_name() -> str:
    """From /proc/cpuinfo, or else from Python."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def machine(*packages: str) -> dict[str, Any]:
    """Date, processor, cores, load, GPU (if there is one), system, Python, commit, and the versions of `packages`."""
    return {
        "date": date.today().isoformat(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        **gpu(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "commit": commit(),
        **{package: version_of(package) for package in packages},
    }


def version_of(package: str) -> str:
    try:
        return torch.__version__ if package == "torch" else version(package)  # with its build, as +cu130
    except PackageNotFoundError:
        return "absent"


def gpu() -> dict[str, str]:
    """Name, driver, power limit and largest clock of the first GPU, from nvidia-smi; empty without one."""
    fields = {"gpu": "name", "driver": "driver_version", "power limit": "power.limit", "clock": "clocks.max.sm"}
    said = _said("nvidia-smi", f"--query-gpu={','.join(fields.values())}", "--format=csv,noheader")
    values = said.splitlines()[0].split(",") if said else []
    return {name: value.strip() for name, value in zip(fields, values, strict=False)}


def commit() -> str:
    """Commit of the working tree, marked if files differ from it; SPT_COMMIT if the tree has no history."""
    head = _said("git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD")
    if not head:
        return os.environ.get("SPT_COMMIT", "unknown")
    return head + (" and changes" if _said("git", "-C", str(ROOT), "status", "--porcelain", "-uno") else "")


def _said(*command: str) -> str:
    """A command's output; empty if it fails or doesn't exist."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
