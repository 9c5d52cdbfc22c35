"""Figures of the machine that rank 0 runs on: CPU, host memory, disk, loader processes, and its GPU.

In: nothing but the time since the last call. Out: numbers for metrics.jsonl; rates are means since that call. GPU
figures need the extra `gpu` (nvidia-ml-py) and an NVIDIA GPU, and are left out without.
"""

from __future__ import annotations

import importlib
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch


class SystemMonitor:
    """Reads the machine's figures.

    Args:
        folder: the output folder, whose disk is watched.
        device: of this rank.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self._folder, self._process = folder, psutil.Process()
        self._gpu = gpu_reader(device)
        self._at, self._busy = time.monotonic(), _cpu_seconds(self._process)
        self._loader_busy: dict[int, float] = {}
        psutil.cpu_percent()  # the first call gives no figure

    def read(self) -> dict[str, float]:
        """`cpu_percent` is of all cores, the other `…_cpu_percent` of one core; memory and disk are in GB."""
        now = time.monotonic()
        elapsed_s = max(now - self._at, 1e-6)
        busy = _cpu_seconds(self._process)
        memory = psutil.virtual_memory()
        figures = {
            "cpu_percent": psutil.cpu_percent(),
            "process_cpu_percent": 100 * (busy - self._busy) / elapsed_s,
            "process_memory_gb": self._process.memory_info().rss / 1e9,
            "host_memory_used_gb": (memory.total - memory.available) / 1e9,
            "host_memory_free_gb": memory.available / 1e9,
            "disk_free_gb": shutil.disk_usage(self._folder).free / 1e9,
            **self._loaders(elapsed_s),
        }
        self._at, self._busy = now, busy
        return figures | self._gpu()

    def _loaders(self, elapsed_s: float) -> dict[str, float]:
        """Figures of this process's children: they are the loader's."""
        memory, used, now = 0.0, 0.0, {}
        for child in self._process.children(recursive=True):
            with suppress(psutil.Error):  # it has just ended
                memory += child.memory_info().rss / 1e9
                now[child.pid] = _cpu_seconds(child)
                used += now[child.pid] - self._loader_busy.get(child.pid, 0.0)
        self._loader_busy = now
        return {
            "loader_processes": float(len(now)),
            "loader_cpu_percent": 100 * used / elapsed_s,
            "loader_memory_gb": memory,
        }


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def gpu_reader(device: torch.device) -> Callable[[], dict[str, float]]:
    """A function that reads the GPU's figures; without a GPU or its package, one that reads nothing."""
    if device.type != "cuda":
        return dict
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        print("no GPU figures in metrics.jsonl: pip install 'higgs-tune[gpu]'", flush=True)
        return dict
    try:
        nvml.nvmlInit()
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        handle = nvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
    except nvml.NVMLError as error:
        print(f"no GPU figures in metrics.jsonl: {error}", flush=True)
        return dict

    def read() -> dict[str, float]:
        memory, rates = nvml.nvmlDeviceGetMemoryInfo(handle), nvml.nvmlDeviceGetUtilizationRates(handle)
        figures = {"gpu_percent": float(rates.gpu), "gpu_memory_used_gb": memory.used / 1e9}
        figures["gpu_memory_free_gb"] = memory.free / 1e9
        with suppress(nvml.NVMLError):  # not every GPU tells these
            figures["gpu_power_w"] = nvml.nvmlDeviceGetPowerUsage(handle) / 1000
            figures["gpu_temperature_c"] = float(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU))
            figures["gpu_clock_mhz"] = float(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM))
        return figures

    return read
