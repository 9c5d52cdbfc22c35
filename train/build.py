"""From resolved inputs to a run: load the model, add LoRA, wrap it for several ranks, restore a checkpoint."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from higgs_tune.shards.errors import UserError
from higgs_tune.train.checkpoint.resume import restore
from higgs_tune.train.config import TrainConfig
from higgs_tune.train.data.loader import Loader
from higgs_tune.train.dist.context import DistContext
from higgs_tune.train.dist.faults import NonFiniteSteps
from higgs_tune.train.model.adapter import merge_adapter, read_adapter
from higgs_tune.train.model.forward import Checkpointing, ExecOptions
from higgs_tune.train.model.fsdp import shard, train_in_full
from higgs_tune.train.model.fused_linear import stack_layer
from higgs_tune.train.model.kernel_choice import choose_kernels
from higgs_tune.train.model.load import HiggsAudioModel, Loaded, load_model
from higgs_tune.train.model.lora import add_lora, describe_trainable, trainable
from higgs_tune.train.model.loss import LossOptions
from higgs_tune.train.model.memory import choose_checkpointing, free_bytes
from higgs_tune.train.model.pack_model import PackModel
from higgs_tune.train.model.paths import describe_kernels, describe_paths
from higgs_tune.train.optim import Ema, make_optimizer
from higgs_tune.train.resolve import (
    Inputs,
    loss_options,
    trainable_options,
    wants_audio_attention,
)
from higgs_tune.train.state import Progress, Run, StepStats
from higgs_tune.train.whisper import trains_projector
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def build_run(
    config: TrainConfig, context: DistContext, inputs: Inputs, checkpoint: Path | None
) -> tuple[Run, StepStats, dict[str, Any]]:
    """The run, the sums of an unfinished logging interval, and the checkpoint's state (empty for a fresh start).

    Raises:
        UserError: weights do not fit, or the checkpoint is of another run.
    """
    torch.manual_seed(config.optim.seed)  # the same new weights on every rank
    half = context.device.type == "cuda" and not config.lora.full_finetune
    dtype = torch.bfloat16 if half else torch.float32
    attention = wants_audio_attention(config, inputs.adapter)
    tower = inputs.tower.folder if inputs.tower else None
    loaded = load_model(
        inputs.base, device=context.device, dtype=dtype, audio_attention=attention, tower=tower,
        quantization=config.model.quantize_base,
    )  # fmt: skip
    loss = loss_options(config, loaded)
    model: nn.Module = loaded.model
    if config.lora.full_finetune:
        _begin_full_finetune(loaded, inputs, context)
        train_in_full(
            loaded.model,
            config.training_stage,
            tower=config.lora.train_audio_tower,
            projector=trains_projector(config, inputs.tower),
        )
    else:
        options = trainable_options(config, inputs.adapter, inputs.features, inputs.tower)
        model = add_lora(loaded.model, options, config.training_stage, inputs.base, inputs.adapter)
    module = wrap(config, context, loaded.model, model, loss)
    parameters = trainable(model)
    schedule = inputs.schedule
    run = Run(
        config=config,
        context=context,
        base=inputs.base,
        model=loaded.model,
        peft_model=model,
        module=module,
        parameters=parameters,
        optimizer=make_optimizer(parameters, config.optim),
        loss_options=loss,
        tower=inputs.tower,
        loader=Loader(schedule, inputs.loading),
        schedule=schedule,
        total_steps=0,
        progress=Progress(),
        bad_steps=NonFiniteSteps(config.optim.max_bad_steps, context.world.rank),
        ema=Ema(parameters, config.optim.ema_decay) if config.optim.ema_decay else None,
    )
    stats = run.new_stats()
    state = restore(run, checkpoint, stats) if checkpoint else {}
    run.total_steps = count_steps(run, state)
    if run.progress.step > run.total_steps:
        hint = "Give more steps, or resume from an earlier checkpoint."
        raise UserError("the checkpoint is beyond the end of the run", where=checkpoint,
                        expected=f"at most {run.total_steps} steps", got=run.progress.step, hint=hint)  # fmt: skip
    run.loader.start_at(run.progress.cursor)
    return run, stats, state


def _begin_full_finetune(loaded: Loaded, inputs: Inputs, context: DistContext) -> None:
    """Merge an earlier stage's adapter into the weights that will train.

    Raises:
        UserError: the result would be a checkpoint without a text head; or the adapter does not fit.
    """
    if not loaded.has_text_head:
        hint = "Train LoRA, or take a base that holds it, as the released checkpoint does in both layouts."
        raise UserError("--full_finetune writes Boson's layout, and the base checkpoint has no text head for it",
                        where=inputs.base, hint=hint)  # fmt: skip
    if inputs.adapter:
        merge_adapter(loaded.model, read_adapter(inputs.adapter))
        if context.is_main:
            print(f"merged the adapter {inputs.adapter} into its base before training in full", flush=True)


def wrap(
    config: TrainConfig, context: DistContext, model: HiggsAudioModel, peft_model: nn.Module, loss: LossOptions
) -> nn.Module:
    """The module that a step calls: DDP around what trains, or FSDP around everything."""
    several = context.world.size > 1
    if config.lora.full_finetune and several:
        module = PackModel(model, None, loss, ExecOptions(choose_kernels(config.model.asked_kernels, context.device)))
        compute = torch.bfloat16 if context.device.type == "cuda" else torch.float32
        shard(model, module, context.device, compute)
        return module
    for layer in model.layers if not config.lora.full_finetune else ():
        stack_layer(layer)
    module = PackModel(model, trainable(peft_model).values(), loss, choose_execution(config, context, model))
    return DistributedDataParallel(module, gradient_as_bucket_view=True) if several else module


def choose_execution(config: TrainConfig, context: DistContext, model: HiggsAudioModel) -> ExecOptions:
    """The kernels, and the checkpointing that is asked for or that fits; the same on every rank."""
    kernels = choose_kernels(config.model.asked_kernels, context.device)
    compiled = kernels == "compiled"
    if config.model.activation_checkpointing != "auto":
        return ExecOptions(kernels, config.model.activation_checkpointing)
    modes: list[Checkpointing] = ["none", "selective", "full"]
    free = free_bytes(context.device) / (1 if context.device.type == "cuda" else context.world.local_size)
    mine = modes.index(choose_checkpointing(model, config.data.tokens_per_pack, free, compiled=compiled))
    worst = int(context.gather(torch.tensor([mine])).max())
    if worst and context.is_main:
        print(f"--activation_checkpointing {modes[worst]}: {free / 1e9:.1f} GB are free", flush=True)
    return ExecOptions(kernels, modes[worst])


def count_steps(run: Run, state: dict[str, Any]) -> int:
    """Optimizer steps of the whole run, those of earlier starts included."""
    config = run.config
    if config.optim.max_steps > 0:
        return config.optim.max_steps
    first_epoch = run.schedule.steps(run.schedule.plan(run.progress.cursor.epoch))
    if not state or state["packs_per_step"] == run.schedule.packs_per_step:
        return math.ceil(config.optim.num_train_epochs * first_epoch)
    rest = max(0.0, config.optim.num_train_epochs - run.epochs_done)
    return run.progress.step + math.ceil(rest * first_epoch)


def checkpoint_bytes(run: Run) -> int:
    """About what a checkpoint takes on disk: float32 weights, two moments, perhaps an average; of a whole model frozen
    weights, too, at two bytes."""
    count = sum(parameter.numel() for parameter in run.parameters.values())
    every = sum(value.numel() for value in run.model.parameters()) if run.config.lora.full_finetune else count
    return 4 * count * (4 if run.ema else 3) + 2 * (every - count)


def describe_run(run: Run, checkpoint: Path | None) -> str:
    """What the run is about to do: a line, then what trains, then how its layers run."""
    count = sum(parameter.numel() for parameter in run.parameters.values())
    base = f", base in {kind}" if (kind := run.config.model.quantize_base) else ""
    begun = f", from step {run.progress.step} ({checkpoint})" if checkpoint else ""
    line = (
        f"{run.config.training_stage}: {count / 1e6:.2f} M trainable parameters in {len(run.parameters)} tensors, "
        f"{run.total_steps} steps ({run.steps_per_epoch} an epoch) on {run.context.world.size} x "
        f"{run.context.device.type}{base}{begun}"
    )
    by_boson = run.config.model.forward == "reference"
    paths = describe_paths(run.model, run.exec_options, reference=by_boson)
    paths += [] if by_boson else describe_kernels(run.model, run.exec_options)
    ways = f"which way each kind of layer runs, with --kernels {run.exec_options.kernels}:"
    return "\n".join([line, *describe_trainable(run.parameters), ways, *paths])
