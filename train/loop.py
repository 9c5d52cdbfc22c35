"""The trainer's main path: set up, load, plan, step, save.

In: a `TrainConfig`. Out: the output folder (config.yaml, metrics.jsonl, tensorboard, the adapter in PEFT format).
Never: a step that the ranks do not take together; a loss that depends on how many ranks share the work.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from ..preprocess.checkpoint import describe_checkpoint
from ..shards.errors import UserError
from ..shards.reader import ShardSet
from .batch import Batch
from .config import TrainConfig
from .data import Loader, LoaderOptions, Schedule, World
from .forward import hidden_states
from .lora import DEFAULT_PRESET, LoraOptions, add_lora, read_adapter_config, trainable
from .loss import LossParts, LossWeights, pack_loss
from .metrics import Reporter, loss_metrics, max_memory_gb
from .model import HiggsAudioModel, load_model
from .output import prepare_folder, save_adapter, save_config


def train(config: TrainConfig) -> None:
    """Train one stage.

    Raises:
        UserError: bad paths or options, or a checkpoint, adapter and shard set that do not fit together.
    """
    world, device = join_world()
    try:
        # 1. data and checkpoint fit together
        if world.rank == 0:
            prepare_folder(config.output_dir, overwrite=config.overwrite_output_dir)
        base, adapter = resolve_model(config.model_path)
        sets = [ShardSet(location, config.cache()) for location in config.train_data_dir]
        for shards in sets:
            check_provenance(shards, base)
        # 2. model, frozen but for LoRA
        torch.manual_seed(config.seed)  # the same new weights on every rank
        model = load_model(base, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
        peft_model = add_lora(model, lora_options(config, adapter), config.training_stage, base, adapter)
        # 3. plan and loader
        schedule = Schedule(
            sets,
            mix_weights=config.mix_weights,
            tokens_per_pack=config.tokens_per_pack,
            seed=config.seed,
            accumulation=config.gradient_accumulation_steps,
            world=world,
        )
        loader = Loader(schedule, loader_options(config, world, device))
        # 4. steps
        run = make_run(config, model, peft_model, schedule, world, device)
        if world.rank == 0:
            save_config(config, {"base_model": str(base), "total_steps": run.total_steps})
            print(describe_run(run), flush=True)
        run_steps(run, loader)
        # 5. save
        if world.rank == 0:
            save_adapter(peft_model, config.output_dir)
            print(f"adapter saved in {config.output_dir}", flush=True)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def join_world() -> tuple[World, torch.device]:
    """This process's place, from torchrun's environment, and its device."""
    env = {name: int(os.environ.get(name, default)) for name, default in
           (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))}  # fmt: skip
    world = World(env["RANK"], env["WORLD_SIZE"], env["LOCAL_RANK"], env["LOCAL_WORLD_SIZE"])
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", world.local_rank)
        torch.cuda.set_device(device)
    elif "OMP_NUM_THREADS" not in os.environ or world.local_size > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // world.local_size))
    if world.size > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return world, device


def resolve_model(path: Path) -> tuple[Path, Path | None]:
    """The base checkpoint of `--model_path`, and the adapter in it, if it is the output folder of a stage."""
    adapter = read_adapter_config(path)
    if adapter is None:
        return path.absolute(), None
    base = Path(adapter.get("base_model_name_or_path") or "")
    if not base.is_dir():
        raise UserError("the adapter's base checkpoint is not there", where=path / "adapter_config.json", got=base)
    return base, path


def check_provenance(shards: ShardSet, base: Path) -> None:
    """Refuse a shard set that was made for another tokenizer or other special ids."""
    made_for, have = shards.provenance["model"], describe_checkpoint(base)
    for name in ("special_ids", "codebook_size", "tokenizer_sha256"):
        if made_for[name] != have[name]:
            raise UserError(
                f"the shard set was made for another checkpoint: {name} differs",
                where=shards.location,
                expected=have[name],
                got=made_for[name],
            )


def loader_options(config: TrainConfig, world: World, device: torch.device) -> LoaderOptions:
    return LoaderOptions(
        workers=config.loader_workers(world.local_size),
        start_method=config.dataloader_start_method,
        pin_memory=device.type == "cuda",
        on_bad_sample=config.on_bad_sample,
        max_bad_samples=config.max_bad_samples,
    )


def lora_options(config: TrainConfig, adapter: Path | None) -> LoraOptions:
    """LoRA's options, with what is not given taken from the adapter that is continued, or from the defaults."""
    earlier = read_adapter_config(adapter) if adapter else None
    r, alpha = config.lora_r, config.lora_alpha
    if earlier:
        for name, given, had in (("lora_r", r, earlier["r"]), ("lora_alpha", alpha, earlier["lora_alpha"])):
            if given is not None and given != had:
                raise UserError(f"--{name} differs from the adapter's", where=adapter, expected=had, got=given)
        r, alpha = earlier["r"], earlier["lora_alpha"]
    r = r or 16
    preset = config.lora_preset or DEFAULT_PRESET[config.training_stage]
    return LoraOptions(r, alpha or 2.0 * r, config.lora_dropout, preset)


class PackModel(nn.Module):
    """Forward and loss as one module. It registers only what trains, so that is all that DDP sees and sends."""

    def __init__(self, model: HiggsAudioModel, parameters: Iterable[nn.Parameter], *, with_audio: bool) -> None:
        super().__init__()
        self.trained = nn.ParameterList(parameters)
        self.with_audio = with_audio
        self._model = (model,)  # in a tuple: not a submodule

    def forward(self, batch: Batch, label_weights: torch.Tensor) -> LossParts:
        model = self._model[0]
        return pack_loss(model, hidden_states(model, batch), batch, label_weights, with_audio=self.with_audio)


@dataclass
class Window:
    """What happened since the last report, on this rank."""

    sums: torch.Tensor
    counts: torch.Tensor
    positions: int = 0
    samples: int = 0
    seconds: float = 0.0
    wait_s: float = 0.0
    began: float = field(default_factory=time.perf_counter)


@dataclass
class Run:
    """Everything that the steps need."""

    config: TrainConfig
    module: nn.Module
    parameters: dict[str, nn.Parameter]
    optimizer: AdamW
    scheduler: LambdaLR
    world: World
    device: torch.device
    weights: LossWeights
    codebooks: int
    steps_per_epoch: int
    total_steps: int

    @property
    def with_audio(self) -> bool:
        return self.config.training_stage != "stage1"

    def window(self) -> Window:
        zeros = torch.zeros(1 + self.codebooks, device=self.device)
        return Window(zeros, zeros.clone())


def make_run(
    config: TrainConfig,
    model: HiggsAudioModel,
    peft_model: PeftModel,
    schedule: Schedule,
    world: World,
    device: torch.device,
) -> Run:
    """Optimizer, schedule of the learning rate, and DDP around the model."""
    parameters = trainable(peft_model)
    steps_per_epoch = schedule.steps(schedule.plan(0))
    total = config.max_steps if config.max_steps > 0 else math.ceil(config.num_train_epochs * steps_per_epoch)
    warmup = math.ceil(0.03 * total) if config.warmup_steps is None else config.warmup_steps
    optimizer = AdamW(
        parameters.values(),
        lr=config.learning_rate,
        betas=(0.9, 0.95),
        weight_decay=config.weight_decay,
        fused=device.type == "cuda",
    )
    module: nn.Module = PackModel(model, parameters.values(), with_audio=config.training_stage != "stage1")
    if world.size > 1:
        module = DistributedDataParallel(module, gradient_as_bucket_view=True)
    return Run(
        config=config,
        module=module,
        parameters=parameters,
        optimizer=optimizer,
        scheduler=LambdaLR(optimizer, lambda step: cosine(step, warmup, total)),
        world=world,
        device=device,
        weights=LossWeights(config.text_loss_weight, config.audio_loss_weight),
        codebooks=model.config.audio_num_codebooks,
        steps_per_epoch=steps_per_epoch,
        total_steps=total,
    )


def cosine(step: int, warmup: int, total: int) -> float:
    """Share of the peak learning rate before step `step + 1`: linear warm-up, then a half cosine to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def describe_run(run: Run) -> str:
    count = sum(parameter.numel() for parameter in run.parameters.values())
    return (
        f"{run.config.training_stage}: {count / 1e6:.2f} M trainable parameters in {len(run.parameters)} tensors, "
        f"{run.total_steps} steps ({run.steps_per_epoch} an epoch) on {run.world.size} x {run.device.type}"
    )


def run_steps(run: Run, batches: Iterator[Batch]) -> None:
    """Take every step of the run, with a report every `logging_steps` and at the last."""
    reporter = Reporter(run.config.output_dir, run.total_steps) if run.world.rank == 0 else None
    window = run.window()
    for step in range(1, run.total_steps + 1):
        norm = train_step(run, next_batches(run, batches, window), window)
        if reporter:
            reporter.step(step)
        if step % run.config.logging_steps == 0 or step in (1, run.total_steps):
            metrics = summarise(run, window, step, norm)
            if reporter:
                reporter.report(metrics)
            window = run.window()
    if reporter:
        reporter.close()


def next_batches(run: Run, batches: Iterator[Batch], window: Window) -> list[Batch]:
    """The micro-batches of one optimizer step; the time spent waiting for them is counted."""
    began = time.perf_counter()
    taken = [next(batches) for _ in range(run.config.gradient_accumulation_steps)]
    window.wait_s += time.perf_counter() - began
    for batch in taken:
        window.positions += batch.positions * batch.weight
        window.samples += len(batch.keys) * batch.weight
        window.seconds += batch.seconds * batch.weight
    return [batch.to(run.device) for batch in taken]


def train_step(run: Run, batches: list[Batch], window: Window) -> torch.Tensor:
    """One optimizer step over this rank's micro-batches; returns the gradient norm."""
    counts = torch.stack([batch["label_counts"] for batch in batches]).sum(0).float()
    if run.world.size > 1:
        dist.all_reduce(counts)
    # DDP averages gradients over ranks; the loss is a sum over them
    label_weights = run.weights.per_label(counts) * run.world.size
    for number, batch in enumerate(batches):
        last = number == len(batches) - 1
        ddp = isinstance(run.module, DistributedDataParallel)
        with run.module.no_sync() if ddp and not last else contextlib.nullcontext():  # pyright: ignore
            parts: LossParts = run.module(batch, label_weights)
            parts.total.backward()
        window.sums += parts.sums
        window.counts += parts.counts
    limit = run.config.max_grad_norm or math.inf
    norm = nn.utils.clip_grad_norm_(run.parameters.values(), limit)
    run.optimizer.step()
    run.scheduler.step()
    run.optimizer.zero_grad(set_to_none=True)
    return norm


def summarise(run: Run, window: Window, step: int, norm: torch.Tensor) -> dict[str, object]:
    """Sum the window over all ranks and name its numbers. This is where the device is waited for."""
    host = torch.tensor([window.positions, window.samples, window.seconds, window.wait_s], dtype=torch.float64)
    packed = torch.cat([window.sums.double(), window.counts.double(), host.to(run.device)])
    if run.world.size > 1:
        dist.all_reduce(packed)
    values = packed.tolist()
    width = 1 + run.codebooks
    positions, samples, seconds, wait_s = values[2 * width :]
    elapsed = time.perf_counter() - window.began
    return {
        "kind": "train",
        "step": step,
        "epoch": step / run.steps_per_epoch,
        **loss_metrics(values[:width], values[width : 2 * width], run.weights, with_audio=run.with_audio),
        "learning_rate": run.scheduler.get_last_lr()[0],
        "grad_norm": float(norm),
        "tokens_per_second": positions / elapsed,
        "samples_per_second": samples / elapsed,
        "audio_hours_per_gpu_hour": seconds / elapsed / run.world.size,
        "data_wait_fraction": wait_s / run.world.size / elapsed,
        "step_time_s": elapsed / _steps_in_window(run, step),
        "max_memory_gb": max_memory_gb(run.device),
    }


def _steps_in_window(run: Run, step: int) -> int:
    every = run.config.logging_steps
    if step == 1:
        return 1
    last = max(1, (step - 1) // every * every)
    return step - last
