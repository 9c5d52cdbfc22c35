"""The properties of a run that must be the same when it is resumed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from higgs_tune.shards.errors import few
from higgs_tune.shards.plan import PLAN_VERSION
from higgs_tune.train.checkpoint.output import ADAPTER, ADAPTER_CONFIG
from higgs_tune.train.model.adapter import adapter_state
from higgs_tune.train.state import Run
from peft import PeftModel
from safetensors import safe_open

_LORA = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")


def identity(run: Run) -> dict[str, Any]:
    """Stage, data, plan, model, trained tensors and LoRA of a run."""
    schedule, config = run.schedule, run.config
    architecture = json.dumps(run.model.config.to_dict(), sort_keys=True, default=str)
    kinds = {name: list(parameter.shape) for name, parameter in run.parameters.items()}
    return {
        "stage": config.training_stage,
        "data": [shards.manifest_hash for shards in schedule.sets.sets],
        "plan": {
            "version": PLAN_VERSION,
            "seed": schedule.seed,
            "tokens_per_pack": schedule.tokens_per_pack,
            "mix_weights": list(config.data.mix_weights) if config.data.mix_weights else None,
            "whisper_features": schedule.features,
            "hash": schedule.plan(run.progress.cursor.epoch).hash,
        },
        "architecture": hashlib.sha256(architecture.encode()).hexdigest(),
        "trained": hashlib.sha256(json.dumps(kinds, sort_keys=True).encode()).hexdigest(),
        "whisper_tower": run.tower.sha256 if run.tower else None,
        "quantized_base": config.model.quantize_base,
        "optimizer": None if config.optim.optim == "adamw" else config.optim.optim,
        "lora": lora_of_model(run.peft_model) if isinstance(run.peft_model, PeftModel) else None,
    }


def lora_of_model(model: PeftModel) -> dict[str, Any]:
    """Scaling, dropout and target modules of a model's LoRA."""
    return _lora(model.peft_config["default"].to_dict(), adapter_state(model))


def lora_of_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The same of a checkpoint, for those whose identity lacks it; None without an adapter."""
    if not (folder / ADAPTER_CONFIG).is_file():
        return None
    with safe_open(folder / ADAPTER, framework="pt") as stored:
        return _lora(json.loads((folder / ADAPTER_CONFIG).read_bytes()), stored.keys())


def _lora(config: dict[str, Any], tensors: Iterable[str]) -> dict[str, Any]:
    modules = {name.removeprefix("base_model.model.").partition(".lora_A.") for name in tensors}
    values = {name: config.get(name) or 0 for name in _LORA}
    return values | {"targets": sorted(name for name, lora_a, _ in modules if lora_a)}


def differences(saved: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """Names of the properties that have changed, with both values."""
    changes = []
    for name in sorted(saved.keys() | now.keys()):
        old, new = saved.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            changes += differences(old, new, f"{prefix}{name}.")
        elif name == "targets" and isinstance(old, list) and isinstance(new, list) and old != new:
            changes.append(f"{prefix}{name}: {_sets(set(old), set(new))}")
        elif old != new:
            changes.append(f"{prefix}{name}: {_short(old)} -> {_short(new)}")
    return changes


def _sets(old: set[str], new: set[str]) -> str:
    parts = {"no longer": sorted(old - new), "new": sorted(new - old)}
    return "; ".join(f"{word} {few(names)}" for word, names in parts.items() if names)


def _short(value: Any) -> str:
    text = ", ".join(map(_short, value)) if isinstance(value, list) else str(value)
    return text[:12] + "…" if len(text) == 64 else text
