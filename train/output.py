"""What a run leaves behind: its resolved options, and the adapter in PEFT's format."""

from __future__ import annotations

import platform
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save
from torch import nn

from ..shards import durable
from ..shards.errors import UserError
from .config import TrainConfig

RUN_FILES = (
    "config.yaml",
    "metrics.jsonl",
    "diagnostics.jsonl",
    "selftest.json",
    "trainable.json",
    "adapter_config.json",
    "adapter_model.safetensors",
)


def prepare_folder(folder: Path, *, overwrite: bool) -> None:
    """Make the output folder, and clear an earlier run's files from it where that is wanted.

    Raises:
        UserError: it holds a run already, or cannot be made.
    """
    found = [name for name in RUN_FILES if (folder / name).exists()]
    if found and not overwrite:
        hint = "Choose another --output_dir, or give --overwrite_output_dir."
        raise UserError("the output folder holds a run already", where=folder, got=", ".join(found), hint=hint)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in found:
            (folder / name).unlink()
        shutil.rmtree(folder / "tensorboard", ignore_errors=True)
    except OSError as error:
        raise UserError(f"cannot prepare the output folder: {error.strerror}", where=folder) from error


def save_config(config: TrainConfig, resolved: dict[str, Any]) -> None:
    """Write config.yaml: every option, what was worked out from them, versions, git revision."""
    versions = {name: version(name) for name in ("torch", "transformers", "peft", "numpy", "higgs-tune")}
    content = {
        "options": config.plain(),
        "resolved": resolved,
        "versions": {"python": platform.python_version(), **versions},
        "git_revision": git_revision(),
    }
    durable.write_bytes(config.output_dir / "config.yaml", yaml.safe_dump(content, sort_keys=False).encode())


def git_revision() -> str | None:
    """The commit that this code stands at, with `+` for local changes; None where it is no checkout."""
    folder = Path(__file__).parent
    try:
        command = ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def save_trainable(folder: Path, parameters: dict[str, nn.Parameter]) -> None:
    """Write trainable.json: module, shape and number of values of everything that trains."""
    listed = [
        {"module": name.removeprefix("base_model.model."), "shape": list(value.shape), "count": value.numel()}
        for name, value in parameters.items()
    ]
    durable.write_bytes(folder / "trainable.json", durable.to_json(listed, indent=1) + b"\n")


def save_adapter(peft_model: PeftModel, folder: Path) -> None:
    """Write adapter_model.safetensors and adapter_config.json as PEFT's `save_pretrained` would, each atomically."""
    tensors = {name: value.contiguous().cpu() for name, value in get_peft_model_state_dict(peft_model).items()}
    durable.write_bytes(folder / "adapter_model.safetensors", save(tensors, metadata={"format": "pt"}))
    config: dict[str, Any] = peft_model.peft_config["default"].to_dict() | {"inference_mode": True}
    config = {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}
    durable.write_bytes(folder / "adapter_config.json", durable.to_json(config, indent=2))
