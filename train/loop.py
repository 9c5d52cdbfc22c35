"""The trainer's main path: set up, load, plan, check, step, save.

In: a `TrainConfig`. Out: the output folder (config.yaml, metrics.jsonl, tensorboard, the adapter in PEFT format).
Never: a step that the ranks do not take together; a loss that depends on how many ranks share the work.
"""

from __future__ import annotations

import math
import time

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedTokenizerBase

from ..preprocess.checkpoint import load_tokenizer
from ..shards.durable import to_json, write_bytes
from .config import TrainConfig
from .data import Loader
from .diagnostics import UpdateWatch, assert_frozen, fingerprint, look_at_predictions
from .lora import add_lora, describe_trainable, trainable
from .loss import LossOptions
from .metrics import Reporter, loss_metrics, max_memory_gb
from .model import HiggsAudioModel, load_config, load_model
from .optim import make_optimizer, make_scheduler
from .output import prepare_folder, save_adapter, save_config, save_trainable
from .schedule import Schedule
from .selftest import run_selftest
from .setup import (
    Place,
    join_world,
    loader_options,
    loss_options,
    open_sets,
    resolve_model,
    trainable_options,
    wants_audio_attention,
    whisper_features,
)
from .step import PackModel, Run, Window, take_batches, train_step


def train(config: TrainConfig) -> None:
    """Train one stage.

    Raises:
        UserError: bad paths or options, or a checkpoint, adapter and shard set that do not fit together.
    """
    config.validate()
    place = join_world()
    try:
        _train(config, place)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _train(config: TrainConfig, place: Place) -> None:
    # 1. everything that can be checked without the weights
    base, adapter = resolve_model(config.model_path)
    sets = open_sets(config, base)
    model_config = load_config(base)
    features = whisper_features(config, model_config, sets)
    options = trainable_options(config, adapter)
    schedule = Schedule(
        sets,
        tokens_per_pack=config.tokens_per_pack,
        seed=config.seed,
        accumulation=config.gradient_accumulation_steps,
        world=place.world,
        mix_weights=config.mix_weights,
        features=features,
    )
    if place.is_main:
        prepare_folder(config.output_dir, overwrite=config.overwrite_output_dir)
    # 2. the model, frozen but for what trains
    torch.manual_seed(config.seed)  # the same new weights on every rank
    dtype = torch.bfloat16 if place.device.type == "cuda" else torch.float32
    attention = wants_audio_attention(config, adapter)
    loaded = load_model(base, device=place.device, dtype=dtype, audio_attention=attention)
    loss = loss_options(config, loaded)
    peft_model = add_lora(loaded.model, options, config.training_stage, base, adapter)
    # 3. the steps
    loader = Loader(schedule, loader_options(config, place, features, model_config.pad_token_id))
    run = make_run(config, place, loaded.model, peft_model, schedule, loader, loss)
    if place.is_main:
        save_config(config, {"base_model": str(base), "total_steps": run.total_steps, "whisper_features": features})
        save_trainable(config.output_dir, run.parameters)
        print(describe_run(run), flush=True)
    report = run_selftest(run, base)
    if place.is_main:
        print("\n".join(report.lines()), flush=True)
        write_bytes(config.output_dir / "selftest.json", to_json(report.to_dict(), indent=1) + b"\n")
    frozen = fingerprint(peft_model.named_parameters())
    run_steps(run, load_tokenizer(base, run.special_ids))
    # 4. the adapter
    assert_frozen(peft_model, frozen)
    if place.is_main:
        save_adapter(peft_model, config.output_dir)
        print(f"adapter saved in {config.output_dir}", flush=True)


def make_run(
    config: TrainConfig,
    place: Place,
    model: HiggsAudioModel,
    peft_model: PeftModel,
    schedule: Schedule,
    loader: Loader,
    loss: LossOptions,
) -> Run:
    """Optimizer, schedule of the learning rate, and DDP around the model."""
    parameters = trainable(peft_model)
    steps_per_epoch = schedule.steps(schedule.plan(0))
    total = config.max_steps if config.max_steps > 0 else math.ceil(config.num_train_epochs * steps_per_epoch)
    optimizer = make_optimizer(parameters, config, place.device)
    module: nn.Module = PackModel(model, parameters.values(), loss)
    if place.world.size > 1:
        module = DistributedDataParallel(module, gradient_as_bucket_view=True)
    return Run(
        config=config,
        place=place,
        model=model,
        module=module,
        parameters=parameters,
        optimizer=optimizer,
        scheduler=make_scheduler(optimizer, config, total),
        loss=loss,
        loader=loader,
        steps_per_epoch=steps_per_epoch,
        total_steps=total,
    )


def describe_run(run: Run) -> str:
    """What the run is about to do: a line, then what trains."""
    count = sum(parameter.numel() for parameter in run.parameters.values())
    line = (
        f"{run.config.training_stage}: {count / 1e6:.2f} M trainable parameters in {len(run.parameters)} tensors, "
        f"{run.total_steps} steps ({run.steps_per_epoch} an epoch) on {run.place.world.size} x {run.place.device.type}"
    )
    return "\n".join([line, *describe_trainable(run.parameters)])


def run_steps(run: Run, tokenizer: PreTrainedTokenizerBase) -> None:
    """Take every step of the run, with a report every `logging_steps` and at the last."""
    reporter = Reporter(run.config.output_dir, run.total_steps) if run.place.is_main else None
    window = run.window()
    for step in range(1, run.total_steps + 1):
        batches, counts = take_batches(run, window)
        looks = run.config.diagnostics_steps and step % run.config.diagnostics_steps == 0
        watch = UpdateWatch(run.parameters) if looks and reporter else None
        predictions = look_at_predictions(run.model, batches[0], tokenizer, run.loss) if watch else {}
        norm = train_step(run, batches, run.place.agree(counts), window, watch)
        if reporter and watch:
            reporter.diagnose(predictions | watch.norms(), step)
        if reporter:
            reporter.step(step)
        if step % run.config.logging_steps == 0 or step in (1, run.total_steps):
            metrics = summarise(run, window, step, norm)
            if reporter:
                reporter.report(metrics)
            window = run.window()
    if reporter:
        reporter.close()


def summarise(run: Run, window: Window, step: int, norm: torch.Tensor) -> dict[str, object]:
    """Sum the window over all ranks and name its numbers. This is where the device is waited for."""
    size, stats = run.place.world.size, window.stats().tolist()
    host = [window.positions, window.samples, window.seconds, window.wait_s, len(run.loader.damaged)]
    values = run.place.agree([*stats, *host])
    positions, samples, seconds, wait_s, damaged = values[len(stats) :]
    elapsed = time.perf_counter() - window.began
    return {
        "kind": "train",
        "step": step,
        "epoch": step / run.steps_per_epoch,
        **loss_metrics(values[: len(stats)], run.loss),
        "learning_rate": run.scheduler.get_last_lr()[0],
        "grad_norm": float(norm),
        "tokens_per_second": positions / elapsed,
        "samples_per_second": samples / elapsed,
        "audio_hours_per_gpu_hour": seconds / elapsed / size,
        "data_wait_fraction": wait_s / size / elapsed,
        "data_wait_s": run.loader.waits.summary(),
        "bad_samples": int(damaged),
        "step_time_s": elapsed / window.steps,
        "max_memory_gb": max_memory_gb(run.place.device),
    }
