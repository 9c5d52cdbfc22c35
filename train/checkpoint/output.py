"""The output folder: options, versions, and the adapter in PEFT's format or the whole model."""

from __future__ import annotations

import json
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml
from higgs_tune.shards import durable
from higgs_tune.train.config import TrainConfig
from higgs_tune.train.model.adapter import adapter_state
from higgs_tune.train.model.base import base_reference
from higgs_tune.train.model.fsdp import whole
from higgs_tune.train.model.load import HiggsAudioModel, without_marks
from higgs_tune.train.model.whisper_tower import TOWER_FILE, WhisperTower
from peft import PeftModel
from safetensors.torch import save, save_file
from torch import nn
from transformers import PretrainedConfig

ADAPTER, ADAPTER_CONFIG, FULL = "adapter_model.safetensors", "adapter_config.json", "model.safetensors"
STOPPED = "stopped.json"  # a signal stopped the run; torchrun hides the exit code, so scripts look for this file
SELFTEST = "selftest.json"
METRICS, DIAGNOSTICS = "metrics.jsonl", "diagnostics.jsonl"
CONFIG, MODEL_CONFIG = "config.yaml", "config.json"


def save_config(config: TrainConfig, resolved: dict[str, Any]) -> None:
    """Write config.yaml: every option, values derived from them, versions, git revision."""
    content = {
        "options": config.plain(),
        "resolved": resolved,
        "versions": versions(),
        "git_revision": git_revision(),
    }
    durable.write_bytes(config.output_dir / CONFIG, yaml.safe_dump(content, sort_keys=False).encode())


def versions() -> dict[str, str]:
    """Versions of the packages that a run's numbers depend on."""
    by_name = {"python": platform.python_version()}
    for name in ("torch", "transformers", "peft", "numpy", "higgs-tune"):
        try:
            by_name[name] = version(name)
        except PackageNotFoundError:  # this package may run from a checkout
            by_name[name] = "not installed"
    return by_name


def git_revision() -> str | None:
    """The commit of this code, with `+` for local changes; None outside a git checkout."""
    folder = Path(__file__).parent
    try:
        command = ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def save_trainable(folder: Path, parameters: dict[str, nn.Parameter]) -> None:
    """Write trainable.json: name, shape and size of each trained parameter."""
    listed = [
        {"module": name.removeprefix("base_model.model."), "shape": list(value.shape), "count": value.numel()}
        for name, value in parameters.items()
    ]
    durable.write_bytes(folder / "trainable.json", durable.to_json(listed, indent=1) + b"\n")


def adapter_tensors(run_model: nn.Module, parameters: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """Host copies of the adapter under PEFT's names; without PEFT, of every weight, frozen ones in the base's dtype.

    All ranks call this together if the weights are sharded.
    """
    tensors = adapter_state(run_model) if isinstance(run_model, PeftModel) else run_model.state_dict()
    copies = {name: whole(value).detach().cpu().contiguous().clone() for name, value in tensors.items()}
    if isinstance(run_model, HiggsAudioModel):
        copies |= {name: v.to(stored_dtype(run_model)) for name, v in copies.items() if name not in parameters}
    return copies


def stored_dtype(model: HiggsAudioModel) -> torch.dtype:
    """The dtype that a model's config names."""
    return model.config.torch_dtype or torch.bfloat16


def adapter_config_json(peft_model: PeftModel, folder: Path) -> bytes:
    """adapter_config.json as PEFT's `save_pretrained` writes it, with the base named as `base_reference` says.

    Args:
        folder: the folder that it is written to.
    """
    config: dict[str, Any] = peft_model.peft_config["default"].to_dict() | {"inference_mode": True}
    base, revision = base_reference(Path(config["base_model_name_or_path"]), folder)
    config |= {"base_model_name_or_path": base, "revision": revision}
    config = {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}
    return durable.to_json(config, indent=2)


def adapter_texts(peft_model: PeftModel, tower: WhisperTower | None, folder: Path) -> dict[str, bytes]:
    """The files beside an adapter's tensors: its config, and the reference to an attached Whisper tower.

    Args:
        folder: the folder that they are written to.
    """
    texts = {ADAPTER_CONFIG: adapter_config_json(peft_model, folder)}
    return texts | ({TOWER_FILE: tower.reference(folder)} if tower else {})


def save_adapter(
    peft_model: PeftModel, tower: WhisperTower | None, tensors: dict[str, torch.Tensor], folder: Path
) -> None:
    """Write the final adapter, each file atomically, adapter_config.json last."""
    durable.write_bytes(folder / ADAPTER, save(tensors, metadata={"format": "pt"}))
    for name, text in reversed(adapter_texts(peft_model, tower, folder).items()):
        durable.write_bytes(folder / name, text)


def whole_weights(model: HiggsAudioModel, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Host copies of all weights; all ranks call this together if the weights are sharded."""
    return {name: whole(value).detach().to("cpu", dtype).contiguous() for name, value in model.state_dict().items()}


def model_texts(config: PretrainedConfig, base: Path) -> dict[str, bytes]:
    """The files beside a whole model's weights in Boson's layout, config.json last.

    Args:
        base: the checkpoint whose tokenizer files are copied.
    """
    begins = ("tokenizer", "special_tokens", "generation_config", "chat_template")
    copied = {file.name: file.read_bytes() for file in sorted(base.iterdir()) if file.name.startswith(begins)}
    return copied | {MODEL_CONFIG: config_json(config)}


def write_model(folder: Path, config: PretrainedConfig, weights: dict[str, torch.Tensor], base: Path) -> None:
    """Write a checkpoint in Boson's layout, config.json last.

    Args:
        base: the checkpoint whose tokenizer files are copied.
    """
    temp = folder / f"{durable.TEMP_PREFIX}{FULL}"
    save_file(weights, temp, metadata={"format": "pt"})
    durable.fsync_file(temp)
    temp.rename(folder / FULL)
    for name, text in model_texts(config, base).items():
        durable.write_bytes(folder / name, text)


def config_json(config: PretrainedConfig) -> bytes:
    """config.json of a model."""
    return durable.to_json(without_marks(json.loads(config.to_json_string())), indent=2)
