"""Resume: find a checkpoint, check that it belongs to this run, restore it; and take the snapshots to resume from.

In: a `Run`. Out: a `Snapshot`, or the run as it was at a checkpoint.
Guarantees: a run resumes only on the same data, plan and model, unless --resume_anyway (test_resume.py).

The position in the data is a cursor into the epoch plan, independent of the number of ranks. The learning rate is a
function of the step. Random states and the sums of an unfinished logging interval are saved for every rank.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from higgs_tune.shards.errors import UserError
from higgs_tune.shards.plan import PLAN_VERSION
from higgs_tune.train.checkpoint.folder import (
    STATE,
    VERSION,
    Snapshot,
    checkpoint_path,
    newest_valid,
    read_tensors,
    verify_checkpoint,
)
from higgs_tune.train.checkpoint.output import (
    ADAPTER,
    ADAPTER_CONFIG,
    FULL,
    adapter_config_json,
    adapter_tensors,
    versions,
)
from higgs_tune.train.config import TrainConfig
from higgs_tune.train.data.sampler import Cursor
from higgs_tune.train.dist.context import DistContext
from higgs_tune.train.model.fsdp import spread_like, whole
from higgs_tune.train.state import Run, StepStats
from peft import PeftModel, set_peft_model_state_dict

OPTIMIZER, EMA, RANKS = "optimizer.safetensors", "ema.safetensors", "ranks.safetensors"


def find_checkpoint(config: TrainConfig, context: DistContext) -> Path | None:
    """The checkpoint to resume from; None for a fresh start. Verified by rank 0.

    Raises:
        UserError: the one asked for is not there or damaged, or a rank does not see it.
    """
    if config.checkpoints.resume_from_checkpoint is None:
        return None
    checkpoint: Path | None = None
    if context.is_main and config.checkpoints.resume_from_checkpoint != "auto":
        checkpoint = Path(config.checkpoints.resume_from_checkpoint)
        verify_checkpoint(checkpoint)
    elif context.is_main:
        checkpoint, problems = newest_valid(config.output_dir)
        for problem in problems:
            print(f"warning: {problem}; an older checkpoint is tried", flush=True)
    if config.checkpoints.resume_from_checkpoint == "auto":
        step = int(checkpoint.name.rpartition("-")[2]) if checkpoint else -1
        step = int(context.all_sum([float(step) if context.is_main else 0.0])[0])
        checkpoint = checkpoint_path(config.output_dir, step) if step >= 0 else None
    else:
        context.all_sum([0.0])  # rank 0 has verified it
        checkpoint = Path(config.checkpoints.resume_from_checkpoint)
    if checkpoint and not (checkpoint / STATE).is_file():
        expected = "a folder that all nodes share"
        raise UserError("this rank does not see the checkpoint", where=checkpoint, expected=expected)
    return checkpoint


def identity(run: Run) -> dict[str, Any]:
    """Properties of a run that must be the same when it is resumed."""
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
    }


def differences(saved: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """Names of the properties that have changed, with both values."""
    changes = []
    for name in sorted(saved.keys() | now.keys()):
        old, new = saved.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            changes += differences(old, new, f"{prefix}{name}.")
        elif old != new:
            changes.append(f"{prefix}{name}: {_short(old)} -> {_short(new)}")
    return changes


def _short(value: Any) -> str:
    text = ", ".join(map(_short, value)) if isinstance(value, list) else str(value)
    return text[:12] + "…" if len(text) == 64 else text


def snapshot(run: Run, stats: StepStats, written: dict[str, int]) -> Snapshot | None:
    """The state of a run; None on every rank but 0. All ranks call this together.

    Args:
        stats: sums since the last report.
        written: bytes of each log file so far.
    """
    adapter = adapter_tensors(run.peft_model, run.parameters)
    optimizer = {
        f"{key}.{name}": whole(value).detach().cpu().clone()
        for name, parameter in run.parameters.items()
        for key, value in run.optimizer.state.get(parameter, {}).items()
    }
    random_states = {f"rng.{name}": run.context.gather(value) for name, value in rng_state(run.context.device).items()}
    ranks = random_states | {"window": run.context.gather(stats.packed_sums.cpu())}
    if not run.context.is_main:
        return None
    progress = run.progress
    state = {
        "version": VERSION,
        "step": progress.step,
        "total_steps": run.total_steps,
        "epoch": progress.cursor.epoch,
        "pack": progress.cursor.pack,
        "ranks": run.context.world.size,
        "packs_per_step": run.schedule.packs_per_step,
        "bad_steps": run.bad_steps.count,
        "best_loss": progress.best_loss,
        "best_step": progress.best_step,
        "stale": progress.stale,
        "learning_rate_share": run.rate_share,
        "written": written,
        "identity": identity(run),
        "options": run.config.plain(),
        "versions": versions(),
    }
    tensors = {ADAPTER if isinstance(run.peft_model, PeftModel) else FULL: adapter}
    tensors |= {OPTIMIZER: optimizer, RANKS: ranks}
    if run.ema:
        tensors[EMA] = {name: value.cpu().clone() for name, value in run.ema.values.items()}
    texts = {ADAPTER_CONFIG: adapter_config_json(run.peft_model)} if isinstance(run.peft_model, PeftModel) else {}
    return Snapshot(progress.step, state, tensors, texts)


def restore(run: Run, folder: Path, stats: StepStats) -> dict[str, Any]:
    """Restore a run from a checkpoint; returns the checkpoint's state.

    Raises:
        UserError: data, plan or model have changed; names each change.
    """
    state = json.loads((folder / STATE).read_bytes())
    run.progress.cursor = Cursor(state["epoch"], state["pack"])
    changed = differences(state["identity"], identity(run))
    fits = not any(text.startswith(("trained", "architecture")) for text in changed)
    if changed and not (run.config.checkpoints.resume_anyway and fits):
        hint = "--resume_anyway resumes all the same." if fits else "Its weights do not fit this model."
        raise UserError(f"the checkpoint is of another run: {'; '.join(changed)}", where=folder, hint=hint)
    progress = run.progress
    progress.step, progress.stale = state["step"], state["stale"]
    progress.best_loss, progress.best_step = state["best_loss"], state["best_step"]
    run.bad_steps.count = state["bad_steps"]
    _restore_weights(run, folder)
    _restore_optimizer(run, folder)
    ranks = dict(read_tensors(folder / RANKS))
    same_ranks = state["ranks"] == run.context.world.size
    rank = run.context.world.rank
    if same_ranks:
        states = {name.removeprefix("rng."): v[rank] for name, v in ranks.items() if name.startswith("rng.")}
        restore_rng(states, run.context.device)
    if same_ranks or run.context.is_main:
        stats.packed_sums += (ranks["window"][rank] if same_ranks else ranks["window"].sum(0)).to(
            stats.packed_sums.device
        )
    return state


def _restore_weights(run: Run, folder: Path) -> None:
    if isinstance(run.peft_model, PeftModel):
        set_peft_model_state_dict(run.peft_model, dict(read_tensors(folder / ADAPTER)))
    else:
        for name, value in read_tensors(folder / FULL):
            with torch.no_grad():
                run.parameters[name].copy_(spread_like(value, run.parameters[name]))
    if run.ema:
        if not (folder / EMA).is_file():
            raise UserError(
                "the checkpoint has no moving average", where=folder, hint="It was made without --ema_decay."
            )
        for name, value in read_tensors(folder / EMA):
            run.ema.values[name].copy_(value)


def _restore_optimizer(run: Run, folder: Path) -> None:
    for key, value in read_tensors(folder / OPTIMIZER):
        kind, _, name = key.partition(".")
        parameter = run.parameters[name]
        run.optimizer.state[parameter][kind] = (
            value.to(parameter.device) if kind == "step" else spread_like(value, parameter)
        )


def rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    """The states of this process's random generators, as host tensors."""
    mersenne: Any = np.random.get_state()
    states = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(random.getstate()[1], dtype=torch.int64),
        "numpy": torch.tensor([*mersenne[1].tolist(), mersenne[2]], dtype=torch.int64),
    }
    return states | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def restore_rng(states: dict[str, torch.Tensor], device: torch.device) -> None:
    """Restore the states that `rng_state` returned."""
    torch.set_rng_state(states["torch"].clone())  # it does not take a view into a larger tensor
    random.setstate((3, tuple(states["python"].tolist()), None))
    words = states["numpy"].numpy()
    np.random.set_state(("MT19937", words[:-1].astype(np.uint32), int(words[-1]), 0, 0.0))
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"].clone(), device)


def changed_options(state: dict[str, Any], config: TrainConfig) -> Iterator[str]:
    """Options that differ from the checkpoint's, with both values."""
    same = {"resume_from_checkpoint", "resume_anyway", "overwrite_output_dir", "output_dir", "debug", "dry_run"}
    now = config.plain()
    for name, old in state["options"].items():
        if name not in same and name in now and now[name] != old:
            yield f"{name}: {old} -> {now[name]}"
