"""The trainer's options in groups: a module takes its own group. Each field has a unit, a bound and a line of help.

The command line and YAML files are flat: a field's name is its flag.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from higgs_tune.shards.bounds import AT_LEAST_0, AT_LEAST_1, FROM_0_BELOW_1, MORE_THAN_0
from higgs_tune.shards.remote import Cache
from higgs_tune.train.presets import PresetName, preset_help

_PLAIN_NAME = re.compile(r"[\w.]+")


@dataclass(frozen=True)
class ModelArgs:
    """Where the model is, and how it runs."""

    base_model: Path | None = None
    """Base checkpoint of the adapter in --model_path, in place of the one that its config names."""
    encode_whisper_embed: bool = False
    """Insist on Whisper features: refused where the checkpoint has no tower."""
    whisper_path: Path | None = None
    """Whisper checkpoint (a folder, or a name on the Hub) whose encoder becomes the audio tower of a base without one;
    its projector is new and trains in full, except in stage1. By default that of the adapter that is continued."""
    quantize_base: Literal["nf4", "int8"] | None = None
    """Keep the frozen linear layers of attention and FFNs in 4 or 8 bits, for small GPUs; adapters, norms, embeddings
    and heads stay as they are. Needs bitsandbytes, an optional extra."""
    forward: Literal["packed", "reference"] = "packed"
    """packed: ours. reference: boson's padded forward and collator, several times slower, for anyone who doubts."""
    kernels: Literal["auto", "eager", "compiled", "triton"] = "auto"
    """What runs beside the matrix products: PyTorch's operations (eager), the layers' parts by torch.compile (compiled;
    the first steps take a minute more), or one Triton kernel each (triton). auto: triton on a GPU, eager elsewhere."""
    compile: bool = False
    """Short for --kernels compiled."""
    activation_checkpointing: Literal["none", "selective", "full", "auto"] = "auto"
    """What backward computes again to save memory: nothing, each FFN, each layer, or the least that fits."""

    @property
    def asked_kernels(self) -> Literal["auto", "eager", "compiled", "triton"]:
        return "compiled" if self.compile else self.kernels


@dataclass(frozen=True)
class LoraArgs:
    """Which modules train, and how LoRA adapts them."""

    full_finetune: bool = False
    """Train every weight of the stage, without LoRA; on several GPUs sharded by FSDP2."""
    lora_r: Annotated[int | None, MORE_THAN_0] = None
    """Rank of LoRA; by default 16, or that of the adapter that is continued."""
    lora_alpha: Annotated[float | None, MORE_THAN_0] = None
    """Scaling of LoRA is alpha / r; by default 2 r, or that of the adapter that is continued."""
    lora_dropout: Annotated[float | None, FROM_0_BELOW_1] = None
    """Dropout of LoRA's input; by default 0, or that of the adapter that is continued."""
    lora_preset: Annotated[PresetName | None, tyro.conf.arg(help=preset_help())] = None
    lora_target_modules: tuple[str, ...] | None = None
    """In place of a preset: one regular expression that matches whole module names, or last parts of names as PEFT
    takes them (q_proj v_proj)."""
    lora_extra: tuple[Literal["heads", "projector"], ...] = ()
    """LoRA on more layers: heads (in stage1 the text head), projector (of Whisper features)."""
    use_rslora: bool = False
    """Scale LoRA by alpha / sqrt(r)."""
    use_dora: bool = False
    """Train LoRA's magnitude apart from its direction; slower."""
    train_heads: bool = False
    """Train both output heads in full (in stage1 the text head)."""
    train_text_head: bool = False
    """Train the text head in full."""
    train_audio_head: bool = False
    """Train the audio head in full."""
    train_norms: bool = False
    """Train the norms of all layers and the last one in full (in stage1 the text norms)."""
    train_text_embeddings: bool = False
    """Train the embeddings of text tokens in full."""
    train_audio_embeddings: bool = False
    """Train the codebook embeddings in full."""
    use_audio_out_self_attention: bool = False
    """Add self-attention among audio positions, trained in full; it starts without changing the model."""
    train_audio_tower: bool = False
    """Train the Whisper tower in full."""
    train_audio_encoder_proj: bool = False
    """Train the projector of Whisper features in full."""

    @property
    def target_pattern(self) -> str | None:
        """`lora_target_modules` as one regular expression over whole module names.

        Last parts of names do not reach into the Whisper tower; a regular expression may name it.
        """
        targets = self.lora_target_modules
        if not targets or (len(targets) == 1 and not _PLAIN_NAME.fullmatch(targets[0])):
            return targets[0] if targets else None
        return rf"(?!audio_tower\.)(.*\.)?({'|'.join(re.escape(name) for name in targets)})"

    @property
    def is_given(self) -> bool:
        """Whether an option of LoRA differs from its default."""
        values = (self.lora_r, self.lora_alpha, self.lora_preset, self.lora_target_modules)
        others = (self.use_rslora, self.use_dora, self.lora_dropout, self.lora_extra)
        return any(value is not None for value in values) or any(others)


@dataclass(frozen=True)
class LossArgs:
    """The loss."""

    text_loss_weight: Annotated[float, AT_LEAST_0] = 1.0
    """Weight of the text loss."""
    audio_loss_weight: Annotated[float, AT_LEAST_0] = 1.0
    """Weight of the audio loss; without effect in stage1."""
    codebook_loss_weights: tuple[float, ...] | None = None
    """Relative weight of each codebook in the audio loss; by default equal."""
    label_smoothing: Annotated[float, FROM_0_BELOW_1] = 0.0
    """Label smoothing, 0 to 1."""
    contrastive_loss_weight: Annotated[float, AT_LEAST_0] = 0.0
    """Weight of the voice-similarity loss between reference and target; 0: off."""
    allow_textless_stage1: bool = False
    """Let stage1 train on answers of audio alone, whose only text labels are special tokens."""
    train_on_reference: bool = False
    """Train on the codes of reference audio too."""


@dataclass(frozen=True)
class OptimArgs:
    """Optimizer, learning rates, length of the run."""

    optim: Literal["adamw", "adamw8bit"] = "adamw"
    """adamw8bit: AdamW with moments in 8 bits, by bitsandbytes, an optional extra."""
    learning_rate: Annotated[float, MORE_THAN_0] = 2e-4
    """Peak learning rate of LoRA."""
    head_learning_rate: Annotated[float | None, MORE_THAN_0] = None
    """Peak learning rate of heads, embeddings and norms trained in full; by default a tenth of --learning_rate."""
    new_module_learning_rate: Annotated[float | None, MORE_THAN_0] = None
    """Peak learning rate of audio self-attention, tower and projector; by default --learning_rate."""
    projector_learning_rate: Annotated[float | None, MORE_THAN_0] = None
    """Peak learning rate of the projector of Whisper features; by default --new_module_learning_rate."""
    projector_warmup_steps: Annotated[int | None, AT_LEAST_0] = None
    """Steps of linear warm-up of that projector; by default those of --warmup_steps."""
    lr_scheduler_type: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Shape of the learning rate after warm-up; wsd: constant, then linear decay over the last steps."""
    lr_decay_fraction: Annotated[float, MORE_THAN_0] = 0.1
    """Share of all steps that wsd decays over."""
    warmup_steps: Annotated[int | None, AT_LEAST_0] = None
    """Steps of linear warm-up; by default 3 % of all steps."""
    num_train_epochs: Annotated[float, MORE_THAN_0] = 1.0
    """Epochs to train for, unless --max_steps is given."""
    max_steps: int = -1
    """Optimizer steps to train for; -1: by --num_train_epochs."""
    gradient_accumulation_steps: Annotated[int, AT_LEAST_1] = 1
    """Packs a rank for each optimizer step."""
    weight_decay: Annotated[float, AT_LEAST_0] = 0.0
    """AdamW's weight decay; norms and biases are left out of it."""
    adam_beta1: Annotated[float, FROM_0_BELOW_1] = 0.9
    """AdamW's first beta."""
    adam_beta2: Annotated[float, FROM_0_BELOW_1] = 0.95
    """AdamW's second beta."""
    max_grad_norm: Annotated[float, AT_LEAST_0] = 1.0
    """Gradients are scaled down to this norm; 0: never."""
    max_bad_steps: Annotated[int, AT_LEAST_1] = 20
    """Steps skipped for a loss or gradient that is not finite, before the run stops."""
    ema_decay: Annotated[float, FROM_0_BELOW_1] = 0.0
    """Decay of a moving average of what trains, used for validation, samples and the final adapter; 0: none."""
    seed: int = 42
    """Seed of the data order and of new weights."""


@dataclass(frozen=True)
class DataArgs:
    """Packs and their loader."""

    tokens_per_pack: Annotated[int, AT_LEAST_1] = 8192
    """Positions a pack holds at most; the batch of one rank and micro-step."""
    mix_weights: tuple[float, ...] | None = None
    """Share of packs from each set; an epoch is then one pass over the first. By default all are packed together."""
    on_bad_sample: Literal["stop", "skip"] = "stop"
    """What to do about a damaged sample: stop the run, or leave it out, counted and logged."""
    max_bad_samples: Annotated[int, AT_LEAST_0] = 100
    """Damaged samples that a rank skips before it stops all the same."""
    cache_dir: Path | None = None
    """Where files of remote sets are kept; by default $HIGGS_TUNE_CACHE, else ~/.cache/higgs-tune."""
    cache_max_gb: Annotated[float | None, MORE_THAN_0] = None
    """Size of that cache in GB; by default without limit."""
    dataloader_num_workers: Annotated[int | None, AT_LEAST_0] = None
    """Loader processes of each rank; by default up to 4, as the machine's cores allow."""
    dataloader_start_method: Literal["fork", "spawn"] = "fork"
    """How loader processes are started."""

    def cache(self) -> Cache:
        """Where files of remote sets are kept."""
        default = Cache.default(None if self.cache_max_gb is None else int(self.cache_max_gb * 1e9))
        return default if self.cache_dir is None else Cache(self.cache_dir, default.max_bytes)

    def loader_workers(self, local_world: int) -> int:
        """Loader processes of one rank on this machine."""
        if self.dataloader_num_workers is not None:
            return self.dataloader_num_workers
        return max(0, min(4, (os.cpu_count() or 1) // local_world - 1))


@dataclass(frozen=True)
class CheckpointArgs:
    """Checkpoints and resuming."""

    save_steps: Annotated[int, AT_LEAST_0] = 500
    """Steps between checkpoints; one is also saved at the end. 0: no checkpoints."""
    save_every_minutes: Annotated[float, AT_LEAST_0] = 0.0
    """Minutes between checkpoints, besides --save_steps; 0: by steps alone."""
    save_total_limit: Annotated[int | None, MORE_THAN_0] = 3
    """Checkpoints that are kept; the best by validation is kept apart. None: all."""
    allow_failed_saves: bool = False
    """Train on when a checkpoint cannot be saved."""
    resume_from_checkpoint: str | None = None
    """auto: go on from the newest valid checkpoint of the output folder, if there is one; True or latest: refuse to
    start without one; or a run's folder, or a checkpoint's."""
    resume_anyway: bool = False
    """Resume even though data, plan or model have changed."""
    overwrite_output_dir: bool = False
    """Remove an earlier run's files from the output folder first."""


@dataclass(frozen=True)
class ValidationArgs:
    """Validation and generated samples."""

    val_fraction: Annotated[float | None, FROM_0_BELOW_1] = None
    """Share of each set that is held out for validation; by default as the set was made."""
    val_by: Literal["sample", "speaker"] = "sample"
    """What is held out with --val_fraction: samples, or speakers with all of theirs."""
    eval_steps: Annotated[int | None, AT_LEAST_0] = None
    """Steps between validations; by default 500 where there is a validation split or an --eval_data_dir. 0: never."""
    eval_data_dir: tuple[str, ...] = ()
    """More sets to validate on, as NAME=SHARDS; the training sets' own split is called held_out."""
    best_by: str | None = None
    """NAME:metric that chooses the best checkpoint (loss, text_loss, audio_loss, eos_loss, text_accuracy,
    audio_accuracy, eos_accuracy), or samples:cer, samples:similarity of the generated samples; by default the loss of
    held_out, or of the first --eval_data_dir."""
    guard: tuple[str, ...] = ()
    """NAME:metric:tolerance: a metric that may get worse than the base model's by at most the tolerance, such as
    old:loss:0.1 on a set of the languages that must not be forgotten."""
    guard_action: Literal["warn", "stop"] = "warn"
    """What to do when a --guard is broken: warn, or stop the run after a warning."""
    early_stopping_patience: Annotated[int, AT_LEAST_0] = 0
    """Stop after this many validations (or samples) without a better --best_by; 0: never."""
    early_stopping_threshold: Annotated[float, AT_LEAST_0] = 0.0
    """How much better it must be to count as better."""
    sample_steps: Annotated[int, AT_LEAST_0] = 0
    """Steps between samples of generated speech; 0: never."""
    num_samples: Annotated[int, AT_LEAST_1] = 4
    """Samples generated each time, of fixed keys."""
    sample_max_seconds: Annotated[float, MORE_THAN_0] = 20.0
    """Generated speech is cut off here: it has run on."""
    sample_asr: str | None = None
    """Recogniser that measures the samples' character error rate, as --asr of higgs-eval."""
    sample_speaker_model: str | None = None
    """Speaker encoder that measures how near the samples' voice is, as --speaker_model of higgs-eval."""
    sample_language: str = ""
    """Language of the samples for --sample_asr, as a code (ar, en); empty: it is detected."""
    audio_tokenizer_path: Path | None = None
    """Codec that makes samples audible; by default the one that the shards were made with."""


@dataclass(frozen=True)
class PlanningArgs:
    """What a run will cost, told on a machine without a GPU."""

    estimate: bool = False
    """Print memory, speed and GPU hours by arithmetic and stop. Needs no weights, no GPU and no shards: sizes are those
    of the checkpoint's config.json (by default the released ones), amounts those of the sets' manifests."""
    gpu: str | None = None
    """With --estimate: the GPU, such as h200 or 4090."""
    gpus: Annotated[int, AT_LEAST_1] = 1
    """With --estimate: how many of them."""
    hours: Annotated[float | None, MORE_THAN_0] = None
    """With --estimate: hours of target speech in place of the sets' manifests."""


@dataclass(frozen=True)
class ReportArgs:
    """Logging."""

    logging_steps: Annotated[int, AT_LEAST_1] = 10
    """Steps between two lines of metrics.jsonl."""
    diagnostics_steps: Annotated[int, AT_LEAST_0] = 0
    """Steps between two looks at predictions in training, gradients and updates; 0: never. Every validation shows
    predictions by itself."""
    profile: bool = False
    """Write a trace of three early steps, and print where they go."""
    report_to: tuple[Literal["tensorboard", "wandb", "trackio", "none"], ...] = ("tensorboard",)
    """Trackers besides metrics.jsonl, apart by spaces or commas; none: metrics.jsonl alone. wandb and trackio are
    optional extras."""
    run_name: str | None = None
    """Name of the run in those trackers; by default that of the output folder."""
