"""What every benchmark prints beside its numbers: the machine and the versions."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path

import torch


def describe_machine() -> str:
    """CPU or GPU, cores, memory, load, and the versions that matter."""
    names = [
        line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ", no GPU"
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "numpy", "webdataset"))
    load = os.getloadavg()[0]
    cpu = names[0] if names else platform.machine()
    python = platform.python_version()
    return f"{cpu}, {os.cpu_count()} cores, {memory:.0f} GiB{gpu}; Python {python}, {versions}; load {load:.1f}"
