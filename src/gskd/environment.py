"""Versions, hardware and memory behind a number, for whoever wants the same number again."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("gskd", "torch", "torchvision", "segmentation-models-pytorch", "timm", "accelerate", "numpy")


def environment() -> dict[str, Any]:
    """Plain values: Python, platform, processor, packages, and the commit of a checkout."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "commit": commit(),
        "versions": {package: _version(package) for package in _PACKAGES},
    }


def processor() -> str:
    """The CPU's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def peak_memory() -> float | None:
    """GiB at the highest: on CUDA what PyTorch allocated, else of this whole process; None where the system is silent.

    On Linux without the pages of files that are mapped now, as a teacher cache is: the kernel takes them back when
    memory is short, and a run of 1 GiB beside a cache of 18 would seem to need 19.
    """
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return float(torch.cuda.max_memory_allocated() / 2**30)
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        kib = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines) if "kB" in rest}
        # The highest of getrusage would hold that of the process which started this one.
        return (kib["VmHWM"] - kib["RssFile"]) / 2**20
    except (OSError, KeyError):
        pass
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def commit() -> str | None:
    """The commit that the package runs from, where that is a checkout of its own."""
    folder = Path(__file__).parent
    if not (folder.parents[1] / ".git").exists():
        return None  # installed; git would find a repository that happens to lie around it
    found, changed = _git(folder, "rev-parse", "--short", "HEAD"), _git(folder, "status", "--porcelain")
    return f"{found} (modified)" if found and changed else found


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
