"""--estimate: what a run takes, by arithmetic, on any machine.

In: the options, a checkpoint's config.json (or the released sizes), the sets' manifests (or hours of speech), the name
of a GPU. Out: lines for people: memory by part, the largest pack that fits, tokens/s, steps, GPU hours. Nothing else is
read: no weights, no index, no shards. Guarantees (test_estimate.py): sizes are the loaded run's, memory is within 15 %
of a measured step's on a CPU.

Speed is that of a measured step of the same GPU (`Gpu.measured_mfu`), for runs like the measured one; else an estimate
that says so.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from higgs_tune.preprocess.checkpoints.checkpoint import read_config
from higgs_tune.preprocess.checkpoints.hub import BASE_MODEL, CONFIG_FILES, local_checkpoint
from higgs_tune.shards.errors import UserError
from higgs_tune.shards.reader import read_manifest
from higgs_tune.shards.remote import Source
from higgs_tune.train.amount import Amount, amount_of
from higgs_tune.train.config import TrainConfig
from higgs_tune.train.model.base import resolve_model
from higgs_tune.train.model.flops import estimated_seconds, model_flops
from higgs_tune.train.model.forward import Checkpointing
from higgs_tune.train.model.fsdp import train_in_full
from higgs_tune.train.model.gpus import GPUS, Gpu, gpu_named
from higgs_tune.train.model.load import RELEASED, HiggsAudioModel, checked_config, meta_model
from higgs_tune.train.model.lora import add_lora, trainable
from higgs_tune.train.model.memory import (
    StateBytes,
    activation_bytes,
    choose_checkpointing,
    largest_pack,
    state_bytes,
    working_bytes,
)
from higgs_tune.train.model.quantized import quantize_layers
from higgs_tune.train.model.whisper_tower import TOWER_FILE, WhisperTower, find_tower
from higgs_tune.train.resolve import trainable_options, wants_audio_attention
from higgs_tune.train.whisper import trains_projector
from torch import nn

RESERVE_BYTES = 1.5e9  # assumed: CUDA's context, libraries, what the allocator loses
MEASURED_PACK = 16_384  # positions; where a GPU was measured, in bfloat16 and without checkpointing
MODES: tuple[Checkpointing, ...] = ("none", "selective", "full")


@dataclass(frozen=True)
class Planned:
    """The model of a run without memory for its weights.

    peft_model: the same with what trains marked. states: of a rank. ranks: that share the states (full fine-tuning).
    """

    model: HiggsAudioModel
    peft_model: nn.Module
    states: StateBytes
    ranks: int = 1


@dataclass(frozen=True)
class Measured:
    """What two steps took, in bytes: weights that stay, weights that train, what the steps added, the peak of all."""

    frozen: float
    trained: float
    steps: float
    peak: float


@dataclass(frozen=True)
class Memory:
    """A rank's memory in a step, in bytes, by arithmetic."""

    states: StateBytes
    activations: float
    working: float
    reserve: float = field(default=RESERVE_BYTES)

    @property
    def total(self) -> float:
        return self.states.total + self.activations + self.working + self.reserve

    def lines(self, measured: Measured | None = None) -> list[str]:
        """A line for each part; with what was measured beside it, where it was."""
        states, of_step = self.states, None if measured is None else measured.steps
        added = states.gradients + states.moments + self.activations + self.working
        rows = [
            ("weights that stay", states.frozen, measured and measured.frozen),
            ("weights that train, float32", states.trained, measured and measured.trained),
            ("their gradients", states.gradients, None),
            ("optimizer's moments", states.moments, None),
            *([("moving average", states.average, None)] if states.average else []),
            ("activations that backward keeps", self.activations, None),
            ("working memory of the loss or a layer", self.working, None),
            *([("what a step adds: the four kinds above", added, of_step)] if measured else []),
            *([("CUDA, libraries, allocator (assumed)", self.reserve, None)] if self.reserve else []),
            ("all" if self.reserve else "all; measured with Python itself", self.total, measured and measured.peak),
        ]
        return [f"  {name:<44}{value / 1e9:>9.3f} GB" + _beside(seen) for name, value, seen in rows]


def _beside(measured: float | None) -> str:
    return "" if measured is None else f"   measured {measured / 1e9:>8.3f} GB"


def print_estimate(config: TrainConfig) -> None:
    """Print what a run would take on `--gpus` of `--gpu`.

    Raises:
        UserError: the GPU is not named or not known, or config.json or a manifest cannot be read.
    """
    if config.planning.gpu is None:
        raise UserError("--estimate needs --gpu", expected=f"one of {', '.join(gpu.name for gpu in GPUS)}", got=None)
    gpu = gpu_named(config.planning.gpu)
    manifests = [] if config.planning.hours else [_manifest(config, name) for name in config.train_data_dir]
    planned, features = plan_model(config, manifests)
    amount = amount_of(config, manifests, features)
    print("\n".join(estimate_lines(config, gpu, planned, amount)), flush=True)


def _manifest(config: TrainConfig, location: str) -> dict[str, Any]:
    try:
        return read_manifest(Source(location, config.data.cache()))[0]
    except UserError as error:
        raise UserError(f"{error} --hours N estimates without shards") from error


def plan_model(config: TrainConfig, manifests: list[dict[str, Any]]) -> tuple[Planned, str]:
    """The model on meta, and the Whisper features that it takes.

    Raises:
        UserError: the checkpoint's config or the options do not fit together.
    """
    base, adapter, values = _checkpoint(config)
    tower = _tower(config, adapter)
    model_config = checked_config(values, base, tower.folder if tower else None)
    features = "none" if model_config.skip_audio_tower else _features_of(manifests)
    model = meta_model(model_config, audio_attention=wants_audio_attention(config, adapter))
    model.requires_grad_(False)
    full, gpus = config.lora.full_finetune, config.planning.gpus
    nn.Module.to(model, dtype=torch.float32 if full else torch.bfloat16)
    peft_model: nn.Module = model
    if config.model.quantize_base:
        quantize_layers(model, config.model.quantize_base)
    # an adapter that is continued is loaded onto meta, of which torch warns
    with torch.device("meta"), warnings.catch_warnings(action="ignore", category=UserWarning):
        if full:
            projector = trains_projector(config, tower)
            train_in_full(model, config.training_stage, tower=config.lora.train_audio_tower, projector=projector)
        else:
            options = trainable_options(config, adapter, features, tower)
            peft_model = add_lora(model, options, config.training_stage, base, adapter)
    ranks = gpus if full else 1
    states = states_of(config, peft_model, ranks)
    if ranks > 1:  # FSDP gathers weights in this dtype
        nn.Module.to(model, dtype=torch.bfloat16)
    return Planned(model, peft_model, states, ranks), features


def states_of(config: TrainConfig, model: nn.Module, ranks: int) -> StateBytes:
    """What a rank holds between two steps.

    Args:
        ranks: that share it.
    """
    with_average, in_8_bits = config.optim.ema_decay > 0, config.optim.optim == "adamw8bit"
    return state_bytes(model, with_average=with_average, in_8_bits=in_8_bits, ranks=ranks)


def _checkpoint(config: TrainConfig) -> tuple[Path, Path | None, dict[str, Any]]:
    """Base and adapter of `--model_path`, and the base's config; the released one is not downloaded for it."""
    path = config.model_path
    if path.as_posix().partition("@")[0] == BASE_MODEL and not path.exists():
        return path, None, RELEASED
    base, adapter = resolve_model(path, config.model.base_model, files=CONFIG_FILES)
    return base, adapter, read_config(base, with_ids=False)


def _tower(config: TrainConfig, adapter: Path | None) -> WhisperTower | None:
    """The tower that the run attaches; of one that the user names, the config is enough."""
    given = config.model.whisper_path
    if adapter and (adapter / TOWER_FILE).is_file():
        return find_tower(given, adapter)
    return WhisperTower(local_checkpoint(given, CONFIG_FILES), "") if given else None


def _features_of(manifests: list[dict[str, Any]]) -> str:
    kinds = {manifest["provenance"].get("features", {}).get("whisper", "none") for manifest in manifests}
    return next((kind for kind in ("encoder", "mel") if kind in kinds), "mel")


def estimate_lines(config: TrainConfig, gpu: Gpu, planned: Planned, amount: Amount) -> list[str]:
    """The estimate for people."""
    gpus, positions = config.planning.gpus, config.data.tokens_per_pack
    free = gpu.memory_bytes - RESERVE_BYTES - planned.states.total
    mode = _checkpointing(config, planned, free)
    memory = memory_of(config, planned, mode)
    modes = MODES if planned.ranks == 1 else MODES[:1]
    free -= _gathered_bytes(planned)
    largest = {one: largest_pack(planned.model, one, free, compiled=_compiles(config)) for one in modes}
    count = sum(parameter.numel() for parameter in planned.peft_model.parameters())
    training = sum(parameter.numel() for parameter in trainable(planned.peft_model).values())
    verdict = "fits" if positions <= largest[mode] else "DOES NOT FIT"
    helps = positions > largest[mode] and not (config.model.quantize_base or config.lora.full_finetune)
    hint = "; --quantize_base nf4 takes less" if helps else ""
    others = ", ".join(f"{one} {largest[one]:,}" for one in modes)
    return [
        f"estimate for {gpus} x {gpu.name}: {gpu.memory_gib:g} GiB = {gpu.memory_bytes / 1e9:.1f} GB, "
        f"{gpu.bytes_per_second / 1e9:,.0f} GB/s, {gpu.flops / 1e12:,.0f} TFLOP/s in bfloat16 ({gpu.source}). "
        "Nothing was loaded or measured.",
        f"{config.training_stage}: {count / 1e9:.2f} B parameters, {training / 1e6:.2f} M train",
        f"memory of a GPU, packs of {positions:,} positions, --activation_checkpointing {mode}:",
        *memory.lines(),
        f"  {verdict} into {gpu.memory_bytes / 1e9:.1f} GB, a fifth of what weights and states leave kept free{hint}",
        f"largest pack that fits, positions by --activation_checkpointing: {others}",
        *_time_lines(config, gpu, planned, amount, mode),
    ]


def _checkpointing(config: TrainConfig, planned: Planned, free: float) -> Checkpointing:
    """The checkpointing that the run would choose."""
    if planned.ranks > 1:
        return "none"
    asked = config.model.activation_checkpointing
    if asked != "auto":
        return asked
    return choose_checkpointing(planned.model, config.data.tokens_per_pack, free, compiled=_compiles(config))


def _compiles(config: TrainConfig) -> bool:
    return config.model.asked_kernels == "compiled"


def memory_of(
    config: TrainConfig, planned: Planned, mode: Checkpointing, *, positions: float | None = None,
    text_share: float | None = None, windows: float | None = None, reserve: float = RESERVE_BYTES,
) -> Memory:  # fmt: skip
    """The parts of a rank's memory.

    Args:
        positions, text_share: of a pack; by default those of a full pack of usual samples.
        windows: that the Whisper tower takes, for a position; by default those of usual samples.
    """
    model, count = planned.model, config.data.tokens_per_pack if positions is None else positions
    given = {"text_share": text_share, "windows": windows}
    known = {name: value for name, value in given.items() if value is not None}
    kept = count * activation_bytes(model, mode, compiled=_compiles(config), **known)
    return Memory(planned.states, kept, working_bytes(model, count, mode) + _gathered_bytes(planned), reserve)


def _gathered_bytes(planned: Planned) -> float:
    """Whole layers that a rank has where all ranks share the weights: the one in use, and the next one."""
    layers: Any = planned.model.layers
    return 2 * max(sum(p.numel() * p.itemsize for p in one.parameters()) for one in layers) if planned.ranks > 1 else 0


def _slower_tower(model: HiggsAudioModel) -> str:
    """A reservation, where the Whisper tower runs in float32 since it trains: its products miss bfloat16's peak."""
    tower: Any = model.audio_tower
    in_float32 = tower is not None and tower.conv1.weight.dtype == torch.float32
    return "; the Whisper tower trains in float32 and will be slower" if in_float32 else ""


def _time_lines(config: TrainConfig, gpu: Gpu, planned: Planned, amount: Amount, mode: Checkpointing) -> list[str]:
    """Speed, steps and hours."""
    gpus, accumulation = config.planning.gpus, config.optim.gradient_accumulation_steps
    packs = amount.packs(config.data.tokens_per_pack)
    pack = amount.rows * (1 / packs)
    flops = model_flops(planned.model, pack)
    large, quantized = config.data.tokens_per_pack >= MEASURED_PACK, config.model.quantize_base
    if gpu.measured_mfu and large and mode == "none" and not quantized:
        pack_s, how = flops / (gpu.measured_mfu * gpu.flops), "at the share of the peak that was measured on this GPU"
    else:
        pack_s = estimated_seconds(planned.model, pack, gpu, mode)
        other = f", but in bfloat16 with packs of {MEASURED_PACK:,}" if gpu.measured_mfu else ""
        how = f"ESTIMATE: nobody has measured this GPU{other}" + _slower_tower(planned.model)
    epoch_steps = math.ceil(packs / (gpus * accumulation))
    asked, epochs = config.optim.max_steps, config.optim.num_train_epochs
    steps = asked if asked > 0 else math.ceil(epochs * epoch_steps)
    hours = steps * accumulation * pack_s / 3600
    return [
        f"speed: {pack.positions / pack_s:,.0f} tokens/s a GPU, {flops / pack_s / gpu.flops:.0%} of the peak ({how}); "
        f"{flops / pack.positions / 1e9:.1f} GFLOP a position",
        f"set: {amount.source}: {amount.samples:,.0f} samples, {amount.rows.positions:,.0f} positions, {packs:,} packs",
        f"run: {steps:,} steps ({epoch_steps:,} an epoch), {hours:,.2f} h, {hours * gpus:,.2f} GPU hours",
    ]
