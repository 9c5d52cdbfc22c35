"""Where judges run."""

from __future__ import annotations


def torch_device(device: str) -> str:
    """The device that `auto` stands for."""
    import torch

    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
