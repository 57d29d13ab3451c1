"""The machine and the versions that stand beside every figure."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

PEERS = ("liger-kernel", "cut-cross-entropy", "flashoptim", "torchao", "flash-attn")
"""The libraries that ops and training step are compared with, where they are installed."""


def cpu_name() -> str:
    """As /proc/cpuinfo gives it, or Python."""
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
        return version(package)
    except PackageNotFoundError:
        return "absent"


def gpu() -> dict[str, str]:
    """Name, driver, power limit and largest clock of the first GPU, as nvidia-smi gives them; nothing without one."""
    fields = {"gpu": "name", "driver": "driver_version", "power limit": "power.limit", "clock": "clocks.max.sm"}
    said = _said("nvidia-smi", f"--query-gpu={','.join(fields.values())}", "--format=csv,noheader")
    values = said.splitlines()[0].split(",") if said else []
    return {name: value.strip() for name, value in zip(fields, values, strict=False)}


def commit() -> str:
    """Of the working tree, marked where files differ from it; SPT_COMMIT where the tree came without its history."""
    head = _said("git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD")
    if not head:
        return os.environ.get("SPT_COMMIT", "unknown")
    return head + (" and changes" if _said("git", "-C", str(ROOT), "status", "--porcelain", "-uno") else "")


def _said(*command: str) -> str:
    """What a command prints; nothing where it fails or isn't there."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
