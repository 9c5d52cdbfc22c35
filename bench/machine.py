"""What every benchmark prints beside its numbers: the machine and the versions."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from higgs_tune.shards.memory import set_thresholds

PACKAGES = ("torch", "triton", "transformers", "peft", "numpy", "webdataset")


def describe_machine() -> str:
    """CPU with its vector instructions, GPU, cores, memory, load, and the versions that matter."""
    names = [
        line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpu = ", no GPU"
    if torch.cuda.is_available():
        gpu = f", {torch.cuda.device_count()} x {torch.cuda.get_device_name()} with CUDA {torch.version.cuda}"
    versions = ", ".join(filter(None, map(_version, PACKAGES)))
    load = os.getloadavg()[0]
    cpu = f"{names[0] if names else platform.machine()} ({torch.backends.cpu.get_cpu_capability()})"
    python = platform.python_version()
    return f"{cpu}, {os.cpu_count()} cores, {memory:.0f} GiB{gpu}; Python {python}, {versions}; load {load:.1f}"


def _version(name: str) -> str:
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:  # not every benchmark needs every package
        return ""


def usual_memory() -> None:
    """Undo `keep_memory`: what glibc's thresholds come to by themselves where large blocks are freed."""
    set_thresholds(mmap=32 << 20, trim=64 << 20)
