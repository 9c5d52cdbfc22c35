"""Snapshots of a run, and restoring a run from them.

In: a `Run`. Out: a `Snapshot`, or the run as it was at a checkpoint.
Guarantees: a run resumes only on the same data, plan and model, unless --resume_anyway (test_resume.py).

The position in the data is a cursor into the epoch plan, independent of the number of ranks. The learning rate is a
function of the step. Random states and the sums of an unfinished logging interval are saved for every rank.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from higgs_tune.preprocess.checkpoints.training_record import RECORD
from higgs_tune.shards.errors import UserError
from higgs_tune.train.checkpoint.folder import STATE, VERSION, Snapshot, checkpoint_path, read_tensors
from higgs_tune.train.checkpoint.identity import differences, identity, lora_of_checkpoint
from higgs_tune.train.checkpoint.output import (
    ADAPTER,
    FULL,
    adapter_tensors,
    adapter_texts,
    model_texts,
    versions,
)
from higgs_tune.train.config import TrainConfig
from higgs_tune.train.data.sampler import Cursor
from higgs_tune.train.model.fsdp import spread_like, whole
from higgs_tune.train.state import Run, StepStats
from peft import PeftModel, set_peft_model_state_dict
from torch.optim import AdamW

OPTIMIZER, EMA, RANKS = "optimizer.safetensors", "ema.safetensors", "ranks.safetensors"


def snapshot(run: Run, stats: StepStats, written: dict[str, int]) -> Snapshot | None:
    """The state of a run; None on every rank but 0. All ranks call this together.

    Args:
        stats: sums since the last report.
        written: bytes of each log file so far.
    """
    adapter = adapter_tensors(run.peft_model, run.parameters)
    optimizer = {
        f"{key}.{name}": whole(torch.as_tensor(value)).detach().cpu().clone()
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
        "best_by": run.config.validation.best_by,
        "best_value": progress.best_value,
        "best_step": progress.best_step,
        "stale": progress.stale,
        "base_metrics": progress.base_metrics,
        "written": written,
        "identity": identity(run),
        "options": run.config.plain(),
        "versions": versions(),
    }
    tensors = {ADAPTER if isinstance(run.peft_model, PeftModel) else FULL: adapter}
    tensors |= {OPTIMIZER: optimizer, RANKS: ranks}
    if run.ema:
        tensors[EMA] = {name: value.cpu().clone() for name, value in run.ema.values.items()}
    folder = checkpoint_path(run.config.output_dir, progress.step)
    return Snapshot(progress.step, state, tensors, texts_beside(run, folder))


def texts_beside(run: Run, folder: Path) -> dict[str, bytes]:
    """The small files that stand beside a run's weights in a folder."""
    if isinstance(run.peft_model, PeftModel):
        texts = adapter_texts(run.peft_model, run.tower, folder)
    else:
        texts = model_texts(run.model.config, run.base)
    return texts | ({RECORD: run.record.to_bytes()} if run.record else {})


def restore(run: Run, folder: Path, stats: StepStats) -> dict[str, Any]:
    """Restore a run from a checkpoint; returns the checkpoint's state.

    Raises:
        UserError: data, plan or model have changed; names each change.
    """
    state = json.loads((folder / STATE).read_bytes())
    run.progress.cursor = Cursor(state["epoch"], state["pack"])
    saved = {"lora": lora_of_checkpoint(folder)} | state["identity"]
    changed = differences(saved, identity(run))
    fits = not any(text.startswith(("trained", "architecture", "optimizer")) for text in changed)
    if changed and not (run.config.checkpoints.resume_anyway and fits):
        hint = "--resume_anyway resumes all the same." if fits else "Its weights do not fit this model."
        raise UserError(f"the checkpoint is of another run: {'; '.join(changed)}", where=folder, hint=hint)
    progress = run.progress
    progress.step, progress.base_metrics = state["step"], state.get("base_metrics", {})
    if state.get("best_by") == run.config.validation.best_by:  # else the best of another metric says nothing
        progress.best_value, progress.best_step = state.get("best_value"), state["best_step"]
        progress.stale = state["stale"]
    run.bad_steps.count = state["bad_steps"]
    _restore_weights(run, folder)
    _restore_optimizer(run, folder)
    ranks = dict(read_tensors(folder / RANKS))
    same_ranks = state["ranks"] == run.context.world.size
    rank = run.context.world.rank
    if same_ranks:
        states = {name.removeprefix("rng."): v[rank] for name, v in ranks.items() if name.startswith("rng.")}
        restore_rng(states, run.context.device)
    _restore_sums(run, ranks["window"], stats, same_ranks=same_ranks)
    return state


def _restore_sums(run: Run, window: torch.Tensor, stats: StepStats, *, same_ranks: bool) -> None:
    """Add the sums of the unfinished logging interval, [ranks, sums]; say so where they are an earlier version's."""
    if window.shape[-1] != len(stats.packed_sums):
        if run.context.is_main and window.any():
            print("warning: the checkpoint counts its losses as an earlier version did; the next line of metrics.jsonl "
                  "has only the steps from here on", file=sys.stderr, flush=True)  # fmt: skip
    elif same_ranks or run.context.is_main:
        own = window[run.context.world.rank] if same_ranks else window.sum(0)
        stats.packed_sums += own.to(stats.packed_sums.device)


def _restore_weights(run: Run, folder: Path) -> None:
    if isinstance(run.peft_model, PeftModel):
        set_peft_model_state_dict(run.peft_model, dict(read_tensors(folder / ADAPTER)))
    else:
        for name, value in read_tensors(folder / FULL):
            if name not in run.parameters:  # frozen
                continue
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
        if kind == "step":  # of bitsandbytes a plain number
            is_adamw = isinstance(run.optimizer, AdamW)
            run.optimizer.state[parameter][kind] = value.to(parameter.device) if is_adamw else int(value)
        else:
            run.optimizer.state[parameter][kind] = spread_like(value, parameter)


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
