"""--kernels: what runs beside the matrix products and the attention, chosen before anything is loaded.

eager: PyTorch's operations. compiled: the parts of a layer by torch.compile. triton: one kernel for each norm, gated
product, rotary embedding and dropout (`triton_kernels.py`).
"""

from __future__ import annotations

import os
import sys
from functools import cache
from importlib.util import find_spec
from typing import Literal

import torch
from higgs_tune.shards.errors import UserError

KernelName = Literal["eager", "compiled", "triton"]


def choose_kernels(asked: Literal["auto", "eager", "compiled", "triton"], device: torch.device) -> KernelName:
    """The kernels of a run. `auto` is triton on a GPU where it is installed and works, eager elsewhere.

    Raises:
        UserError: triton is asked for and missing, or cannot run on this device.
    """
    is_installed = find_spec("triton") is not None
    if asked == "auto":
        return "triton" if device.type == "cuda" and is_installed and _triton_works(str(device)) else "eager"
    if asked == "triton" and not is_installed:
        hint = "It comes with torch's CUDA builds; pip install triton."
        raise UserError("--kernels triton needs triton, which is not installed", hint=hint)
    if asked == "triton" and device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        hint = "For a test, TRITON_INTERPRET=1 runs them on a CPU, slowly."
        raise UserError("--kernels triton needs a GPU", expected="--kernels auto or eager", got=device.type, hint=hint)
    return asked


@cache
def _triton_works(device: str) -> bool:
    """Whether the kernels run on this GPU and give the eager operations' values. If not, it is said why."""
    try:
        from higgs_tune.train.model.triton_kernels import compare_with_eager

        compare_with_eager(torch.device(device))
    except Exception as error:  # noqa: BLE001 - whatever a compiler meets on a GPU that it does not know
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        print(
            f"warning: --kernels eager, because Triton's kernels fail on {device}: {reason}",
            file=sys.stderr,
            flush=True,
        )
        return False
    return True
