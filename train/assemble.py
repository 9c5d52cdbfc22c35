"""From options to a run: what can be checked without the weights first, then the model, then where it stands.

In: a `TrainConfig`, this process's place. Out: a `Run`, fresh or as a checkpoint left it. Never: minutes of loading
before a mistake in the options is found.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..shards.errors import UserError
from .config import TrainConfig
from .cost import choose_checkpointing, free_bytes
from .data import Loader, LoaderOptions
from .faults import BadSteps
from .forward import Checkpointing, Running
from .fused import stack_layer
from .lora import TrainableOptions, add_lora, describe_trainable, trainable
from .loss import LossOptions
from .model import HiggsAudioModel, load_config, load_model
from .optim import Ema, make_optimizer
from .output import prepare_folder
from .resume import find_checkpoint, restore
from .samples import codec_path
from .schedule import Schedule
from .setup import (
    Place,
    loader_options,
    loss_options,
    open_sets,
    resolve_model,
    trainable_options,
    wants_audio_attention,
    whisper_features,
)
from .sharded import shard, train_in_full
from .step import PackModel, Progress, Run, Window
from .validation import Validation


@dataclass(frozen=True)
class Checked:
    """What is known before the weights are read.

    base: the checkpoint. adapter: of an earlier stage. checkpoint: what the run goes on from.
    features: Whisper features that the model takes.
    """

    base: Path
    adapter: Path | None
    checkpoint: Path | None
    features: str
    options: TrainableOptions
    schedule: Schedule
    loading: LoaderOptions
    validation: Validation


def check(config: TrainConfig, place: Place) -> Checked:
    """Check everything that needs no weights, and make the output folder.

    Raises:
        UserError: paths or options are bad, or checkpoint, adapter and shard sets do not fit together.
    """
    base, adapter = resolve_model(config.model_path)
    sets = open_sets(config, base)
    model_config = load_config(base)
    features = whisper_features(config, model_config, sets)
    options = trainable_options(config, adapter)
    options.full_modules(config.training_stage)
    schedule = Schedule(
        sets,
        tokens_per_pack=config.tokens_per_pack,
        seed=config.seed,
        accumulation=config.gradient_accumulation_steps,
        world=place.world,
        mix_weights=config.mix_weights,
        features=features,
    )
    loading = loader_options(config, place, features, model_config.pad_token_id)
    validation = Validation(schedule, loading, config.eval_steps)
    if config.early_stopping_patience and not validation.every:
        raise UserError("--early_stopping_patience needs validation", expected="a validation split, and --eval_steps")
    if config.sample_steps:
        codec_path(config, sets)
        if config.full_finetune and place.world.size > 1:
            hint = "Samples of different lengths would wait for each other's weights; generate from the saved model."
            raise UserError("--sample_steps has no place in --full_finetune on several ranks", hint=hint)
    checkpoint = find_checkpoint(config, place)
    if place.is_main and not config.dry_run:
        overwrite, resuming = config.overwrite_output_dir, config.resume_from_checkpoint
        prepare_folder(config.output_dir, overwrite=overwrite, resuming=resuming, checkpoint=checkpoint)
    return Checked(base, adapter, checkpoint, features, options, schedule, loading, validation)


def build(config: TrainConfig, place: Place, checked: Checked) -> tuple[Run, Window, dict[str, Any]]:
    """The run, sums of an unfinished logging window, and the checkpoint's state (empty for a fresh start).

    Raises:
        UserError: weights do not fit, or the checkpoint is of another run.
    """
    torch.manual_seed(config.seed)  # the same new weights on every rank
    half = place.device.type == "cuda" and not config.full_finetune
    dtype = torch.bfloat16 if half else torch.float32
    attention = wants_audio_attention(config, checked.adapter)
    loaded = load_model(checked.base, device=place.device, dtype=dtype, audio_attention=attention)
    loss = loss_options(config, loaded)
    model: nn.Module = loaded.model
    if config.full_finetune:
        train_in_full(
            loaded.model,
            config.training_stage,
            tower=config.train_audio_tower,
            projector=config.train_audio_encoder_proj,
        )
    else:
        model = add_lora(loaded.model, checked.options, config.training_stage, checked.base, checked.adapter)
    module = wrap(config, place, loaded.model, model, loss)
    parameters = trainable(model)
    schedule = checked.schedule
    run = Run(
        config=config,
        place=place,
        model=loaded.model,
        peft_model=model,
        module=module,
        parameters=parameters,
        optimizer=make_optimizer(parameters, config),
        loss=loss,
        loader=Loader(schedule, checked.loading),
        schedule=schedule,
        total_steps=0,
        progress=Progress(),
        bad=BadSteps(config.max_bad_steps, place.world.rank),
        ema=Ema(parameters, config.ema_decay) if config.ema_decay else None,
    )
    window = run.window()
    state = restore(run, checked.checkpoint, window) if checked.checkpoint else {}
    run.total_steps = count_steps(run, state)
    run.loader.start_at(run.progress.cursor)
    return run, window, state


def wrap(
    config: TrainConfig, place: Place, model: HiggsAudioModel, peft_model: nn.Module, loss: LossOptions
) -> nn.Module:
    """The module that a step calls: DDP around what trains, or FSDP around everything."""
    several = place.world.size > 1
    if config.full_finetune and several:
        module = PackModel(model, None, loss, Running(config.compile, "none"))
        compute = torch.bfloat16 if place.device.type == "cuda" else torch.float32
        shard(model, module, place.device, compute)
        return module
    for layer in model.layers if not config.full_finetune else ():
        stack_layer(layer)
    module = PackModel(model, trainable(peft_model).values(), loss, way_to_run(config, place, model))
    return DistributedDataParallel(module, gradient_as_bucket_view=True) if several else module


def way_to_run(config: TrainConfig, place: Place, model: HiggsAudioModel) -> Running:
    """Compiled or not, and the checkpointing that is asked for or that fits; the same on every rank."""
    if config.activation_checkpointing != "auto":
        return Running(config.compile, config.activation_checkpointing)
    modes: list[Checkpointing] = ["none", "selective", "full"]
    free = free_bytes(place.device) / (1 if place.device.type == "cuda" else place.world.local_size)
    mine = modes.index(choose_checkpointing(model, config.tokens_per_pack, free, compiled=config.compile))
    worst = int(place.gather(torch.tensor([mine])).max())
    if worst and place.is_main:
        print(f"--activation_checkpointing {modes[worst]}: {free / 1e9:.1f} GB are free", flush=True)
    return Running(config.compile, modes[worst])


def count_steps(run: Run, state: dict[str, Any]) -> int:
    """Optimizer steps of the whole run, those of earlier starts included."""
    config = run.config
    if config.max_steps > 0:
        return config.max_steps
    first_epoch = run.schedule.steps(run.schedule.plan(run.progress.cursor.epoch))
    if not state or state["packs_per_step"] == run.schedule.packs_per_step:
        return math.ceil(config.num_train_epochs * first_epoch)
    rest = max(0.0, config.num_train_epochs - run.epochs_done)
    return run.progress.step + math.ceil(rest * first_epoch)


def checkpoint_bytes(run: Run) -> int:
    """About what a checkpoint takes on disk: float32 weights, two moments, perhaps an average."""
    count = sum(parameter.numel() for parameter in run.parameters.values())
    return 4 * count * (4 if run.ema else 3)


def describe_run(run: Run, checkpoint: Path | None) -> str:
    """What the run is about to do: a line, then what trains."""
    count = sum(parameter.numel() for parameter in run.parameters.values())
    begun = f", from step {run.progress.step} ({checkpoint})" if checkpoint else ""
    line = (
        f"{run.config.training_stage}: {count / 1e6:.2f} M trainable parameters in {len(run.parameters)} tensors, "
        f"{run.total_steps} steps ({run.steps_per_epoch} an epoch) on {run.place.world.size} x {run.place.device.type}"
        f"{begun}"
    )
    return "\n".join([line, *describe_trainable(run.parameters)])
