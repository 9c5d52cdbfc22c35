"""`--profile`: a torch trace of three steps and a table of their time by kind of work, on rank 0.

Out: `OUT/profile/trace.json` (for chrome://tracing or Perfetto) and `OUT/profile/table.txt`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

WAIT, WARM_UP, ACTIVE = 2, 1, 3  # steps
# an operator or kernel is of the first kind whose pattern its name contains
KINDS = {
    "communication": "nccl|gloo|c10d|all_?reduce",
    "attention": "flash|attention|fmha|aten::(bmm|_softmax)",
    "matrix products": "gemm|linear_pointwise|aten::(mm|addmm|linear|matmul)|cutlass|nvjet|sm90_xmma",
    "optimizer": "adam|foreach|multi_tensor",
    "copies": "memcpy|copy|memset|aten::(cat|to)|fill|zero",
    "gather and scatter": "index|gather|scatter|embedding",
    "compiled": "triton|inductor|compiled",
}


class StepProfiler:
    """Call `step` after each optimizer step.

    Args:
        folder: receives the trace and the table.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder, self.device = folder, device
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
        self._left = WAIT + WARM_UP + ACTIVE
        self._profiler = profile(
            activities=activities,
            schedule=schedule(wait=WAIT, warmup=WARM_UP, active=ACTIVE, repeat=1),
            on_trace_ready=self._write,
        )
        self._profiler.start()

    def step(self) -> str | None:
        """Count a step; returns the table after the last profiled one."""
        if not self._left:
            return None
        self._left -= 1
        self._profiler.step()
        if self._left:
            return None
        self._profiler.stop()
        return (self.folder / "table.txt").read_text()

    def close(self) -> None:
        """Stop profiling if the run ended before the last profiled step."""
        if self._left:
            self._left = 0
            self._profiler.stop()

    def _write(self, profiler: Any) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(self.folder / "trace.json"))
        on_gpu = self.device.type == "cuda"
        name = "self_device_time_total" if on_gpu else "self_cpu_time_total"
        # on a GPU operators carry their kernels' time too, and annotations span several of them: kernels alone count
        counted = [event for event in profiler.key_averages() if not on_gpu or is_kernel(event)]
        times = {event.key: getattr(event, name) / 1e3 / ACTIVE for event in counted}
        detail = profiler.key_averages().table(sort_by=name, row_limit=30, max_name_column_width=60)
        (self.folder / "table.txt").write_text(f"{table(times.items())}\n\n{detail}\n")


def is_kernel(event: Any) -> bool:
    """Whether a profiler's event is a kernel or copy on a GPU."""
    return event.device_type.name == "CUDA" and not event.is_user_annotation


def table(times: Iterable[tuple[str, float]]) -> str:
    """The time of a step by kind of work: kind, milliseconds, share.

    Args:
        times: names of operators or kernels, and their own milliseconds a step.
    """
    sums = dict.fromkeys([*KINDS, "pointwise and other"], 0.0)
    for name, time_ms in times:
        if not name.startswith("ProfilerStep"):
            sums[kind_of(name)] += time_ms
    total = sum(sums.values()) or 1.0
    lines = [f"{'where a step goes':<22}{'ms':>10}{'share':>8}"]
    lines += [f"{kind:<22}{time_ms:>10.2f}{time_ms / total:>8.1%}" for kind, time_ms in sums.items() if time_ms]
    return "\n".join([*lines, f"{'all':<22}{total:>10.2f}"])


def kind_of(name: str) -> str:
    """The kind of work of an operator or kernel, by its name."""
    matching = (kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE))
    return next(matching, "pointwise and other")
