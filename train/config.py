"""Options of the trainer: one frozen dataclass, validated once, saved resolved as config.yaml."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import yaml
from higgs_tune.shards.errors import UserError
from higgs_tune.shards.remote import Cache

Stage = Literal["stage1", "stage2", "single"]


@dataclass(frozen=True)
class TrainConfig:
    """Train LoRA on Higgs Audio v2: stage1 (text), then stage2 (text and audio) from stage 1's output."""

    training_stage: Stage
    """stage1: text loss only, every audio parameter frozen. stage2: both losses. single: stage2 without stage1."""
    model_path: Path
    """Base checkpoint (a folder, or a name on the Hub), or the output folder of an earlier stage."""
    train_data_dir: tuple[str, ...]
    """Shard sets to train on: folders, or URLs that fsspec knows (s3://, hf://, …)."""
    output_dir: Path
    """Folder that receives config, metrics, checkpoints and the adapter."""

    # what trains
    full_finetune: bool = False
    """Train every weight of the stage, without LoRA; on several GPUs sharded by FSDP2."""
    lora_r: int | None = None
    """Rank of LoRA; by default 16, or that of the adapter that is continued."""
    lora_alpha: float | None = None
    """Scaling of LoRA is alpha / r; by default 2 r, or that of the adapter that is continued."""
    lora_dropout: float = 0.0
    """Dropout of LoRA's input."""
    lora_preset: Literal["comprehensive", "text_only", "audio_focused", "attention_only"] | None = None
    """Which linear layers get LoRA; by default text_only in stage1, else comprehensive."""
    lora_target_modules: str | None = None
    """Regular expression over module names, in place of a preset; it must match a whole name."""
    use_rslora: bool = False
    """Scale LoRA by alpha / sqrt(r)."""
    use_dora: bool = False
    """Train LoRA's magnitude apart from its direction; slower."""
    train_heads: bool = False
    """Train the output heads in full (in stage1 the text head)."""
    train_audio_embeddings: bool = False
    """Train the codebook embeddings in full."""
    use_audio_out_self_attention: bool = False
    """Add self-attention among audio positions, trained in full; it starts without changing the model."""
    train_audio_tower: bool = False
    """Train the Whisper tower in full."""
    train_audio_encoder_proj: bool = False
    """Train the projector of Whisper features in full."""
    encode_whisper_embed: bool = False
    """Insist on Whisper features: refused where the checkpoint has no tower."""

    # loss
    text_loss_weight: float = 1.0
    """Weight of the text loss."""
    audio_loss_weight: float = 1.0
    """Weight of the audio loss; without effect in stage1."""
    codebook_loss_weights: tuple[float, ...] | None = None
    """Relative weight of each codebook in the audio loss; by default equal."""
    label_smoothing: float = 0.0
    """Label smoothing, 0 to 1."""
    contrastive_loss_weight: float = 0.0
    """Weight of the voice-similarity loss between reference and target; 0: off."""
    train_on_reference: bool = False
    """Train on the codes of reference audio too."""

    # optimization
    learning_rate: float = 2e-4
    """Peak learning rate of LoRA."""
    head_learning_rate: float | None = None
    """Peak learning rate of heads and embeddings trained in full; by default a tenth of --learning_rate."""
    new_module_learning_rate: float | None = None
    """Peak learning rate of audio self-attention, tower and projector; by default --learning_rate."""
    lr_scheduler_type: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Shape of the learning rate after warm-up; wsd: constant, then linear decay over the last steps."""
    lr_decay_fraction: float = 0.1
    """Share of all steps that wsd decays over."""
    warmup_steps: int | None = None
    """Steps of linear warm-up; by default 3 % of all steps."""
    num_train_epochs: float = 1.0
    """Epochs to train for, unless --max_steps is given."""
    max_steps: int = -1
    """Optimizer steps to train for; -1: by --num_train_epochs."""
    gradient_accumulation_steps: int = 1
    """Packs a rank for each optimizer step."""
    weight_decay: float = 0.0
    """AdamW's weight decay; norms and biases are left out of it."""
    adam_beta1: float = 0.9
    """AdamW's first beta."""
    adam_beta2: float = 0.95
    """AdamW's second beta."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0: never."""
    max_bad_steps: int = 20
    """Steps skipped for a loss or gradient that is not finite, before the run stops."""
    ema_decay: float = 0.0
    """Decay of a moving average of what trains, used for validation, samples and the final adapter; 0: none."""
    seed: int = 42
    """Seed of the data order and of new weights."""

    # data
    tokens_per_pack: int = 8192
    """Positions a pack holds at most; the batch of one rank and micro-step."""
    mix_weights: tuple[float, ...] | None = None
    """Share of packs from each set; an epoch is then one pass over the first. By default all are packed together."""
    on_bad_sample: Literal["stop", "skip"] = "stop"
    """What to do about a damaged sample: stop the run, or leave it out, counted and logged."""
    max_bad_samples: int = 100
    """Damaged samples that a rank skips before it stops all the same."""
    cache_dir: Path | None = None
    """Where files of remote sets are kept; by default $HIGGS_TUNE_CACHE, else ~/.cache/higgs-tune."""
    cache_max_gb: float | None = None
    """Size of that cache in GB; by default without limit."""
    dataloader_num_workers: int | None = None
    """Loader processes of each rank; by default up to 4, as the machine's cores allow."""
    dataloader_start_method: Literal["fork", "spawn"] = "fork"
    """How loader processes are started."""

    # checkpoints
    save_steps: int = 500
    """Steps between checkpoints; one is also saved at the end. 0: no checkpoints."""
    save_every_minutes: float = 0.0
    """Minutes between checkpoints, besides --save_steps; 0: by steps alone."""
    save_total_limit: int | None = 3
    """Checkpoints that are kept; the best by validation is kept apart. None: all."""
    allow_failed_saves: bool = False
    """Train on when a checkpoint cannot be saved."""
    resume_from_checkpoint: str | None = None
    """auto: go on from the newest valid checkpoint of the output folder, if there is one; or a checkpoint folder."""
    resume_anyway: bool = False
    """Resume even though data, plan or model have changed."""

    # validation and samples
    eval_steps: int | None = None
    """Steps between validations; by default 500 where the sets have a validation split. 0: never."""
    early_stopping_patience: int = 0
    """Stop after this many validations without a better loss; 0: never."""
    early_stopping_threshold: float = 0.0
    """How much lower a loss must be to count as better."""
    sample_steps: int = 0
    """Steps between samples of generated speech; 0: never."""
    num_samples: int = 4
    """Samples generated each time, of fixed keys."""
    sample_max_seconds: float = 20.0
    """Generated speech is cut off here: it has run on."""
    audio_tokenizer_path: Path | None = None
    """Codec that makes samples audible; by default the one that the shards were made with."""

    # checks and reports
    dry_run: bool = False
    """Load everything, run the self-test and two steps, print what the run will take, and stop."""
    skip_alignment_check: bool = False
    """Train even where the self-test before the first step says that the training signal is wrong."""
    forward: Literal["packed", "reference"] = "packed"
    """packed: ours. reference: boson's padded forward and collator, several times slower, for anyone who doubts."""
    compile: bool = False
    """Compile the layers (torch.compile), which pays on a GPU; the first steps take a minute more."""
    activation_checkpointing: Literal["none", "selective", "full", "auto"] = "auto"
    """What backward computes again to save memory: nothing, each FFN, each layer, or the least that fits."""
    profile: bool = False
    """Write a trace of three early steps, and print where they go."""
    logging_steps: int = 10
    """Steps between two lines of metrics.jsonl."""
    diagnostics_steps: int = 0
    """Steps between two looks at predictions, gradients and updates; 0: never."""
    report_to: tuple[Literal["wandb", "trackio"], ...] = ()
    """Trackers besides metrics.jsonl and TensorBoard; each is an optional extra of the package."""
    run_name: str | None = None
    """Name of the run in those trackers; by default that of the output folder."""
    overwrite_output_dir: bool = False
    """Remove an earlier run's files from the output folder first."""
    debug: bool = False
    """Show tracebacks of user errors."""

    def validate(self) -> TrainConfig:
        """Check every value; returns itself.

        Raises:
            UserError: a value is out of its range; says which, expected and got.
        """
        weights, books = self.mix_weights, self.codebook_loss_weights
        positive = ("learning_rate", "num_train_epochs", "lr_decay_fraction", "sample_max_seconds")
        at_least_0 = "weight_decay max_grad_norm text_loss_weight audio_loss_weight contrastive_loss_weight"
        at_least_1 = "gradient_accumulation_steps tokens_per_pack logging_steps max_bad_steps num_samples"
        counts = "max_bad_samples diagnostics_steps save_steps save_every_minutes early_stopping_patience sample_steps"
        counts += " early_stopping_threshold"
        optional_positive = "save_total_limit lora_r lora_alpha head_learning_rate new_module_learning_rate"
        optional_positive += " cache_max_gb"
        checks: list[tuple[str, bool, str]] = [
            *((name, getattr(self, name) > 0, "more than 0") for name in positive),
            *((name, getattr(self, name) >= 0, "at least 0") for name in (at_least_0 + " " + counts).split()),
            *((name, getattr(self, name) >= 1, "at least 1") for name in at_least_1.split()),
            *((name, _none_or_positive(getattr(self, name)), "more than 0") for name in optional_positive.split()),
            ("max_steps", self.max_steps == -1 or self.max_steps > 0, "-1, or more than 0"),
            ("warmup_steps", self.warmup_steps is None or self.warmup_steps >= 0, "at least 0"),
            ("eval_steps", (self.eval_steps or 0) >= 0, "at least 0"),
            ("ema_decay", 0 <= self.ema_decay < 1, "0 to 1"),
            ("full_finetune", not (self.full_finetune and self._lora_given()), "no option of LoRA beside it"),
            ("early_stopping_patience", not self.early_stopping_patience or self.eval_steps != 0, "--eval_steps"),
            ("lora_dropout", 0 <= self.lora_dropout < 1, "0 to 1"),
            ("label_smoothing", 0 <= self.label_smoothing < 1, "0 to 1"),
            ("adam_beta1", 0 <= self.adam_beta1 < 1, "0 to 1"),
            ("adam_beta2", 0 <= self.adam_beta2 < 1, "0 to 1"),
            ("train_data_dir", len(self.train_data_dir) >= 1, "at least one"),
            ("mix_weights", _all_positive(weights, len(self.train_data_dir)), "a weight above 0 for each data folder"),
            ("codebook_loss_weights", books is None or (min(books) >= 0 < sum(books)), "weights, not all 0"),
            ("dataloader_num_workers", (self.dataloader_num_workers or 0) >= 0, "at least 0"),
            ("lora_preset", not (self.lora_preset and self.lora_target_modules), "a preset or a pattern, not both"),
            ("forward", self.forward == "packed" or self._reference_can(), "packed, for what boson's forward lacks"),
        ]
        for name, good, expected in checks:
            if not good:
                raise UserError(f"--{name} is out of range", expected=expected, got=getattr(self, name))
        return self

    def _lora_given(self) -> bool:
        given = (self.lora_r, self.lora_alpha, self.lora_preset, self.lora_target_modules)
        return any(value is not None for value in given) or self.use_rslora or self.use_dora or self.lora_dropout > 0

    def _reference_can(self) -> bool:
        return not self.contrastive_loss_weight and not self.train_on_reference

    @property
    def with_audio(self) -> bool:
        """Whether the stage has an audio loss."""
        return self.training_stage != "stage1"

    def cache(self) -> Cache:
        """Where files of remote sets are kept."""
        default = Cache.default(None if self.cache_max_gb is None else int(self.cache_max_gb * 1e9))
        return default if self.cache_dir is None else Cache(self.cache_dir, default.max_bytes)

    def loader_workers(self, local_world: int) -> int:
        """Loader processes of one rank on this machine."""
        if self.dataloader_num_workers is not None:
            return self.dataloader_num_workers
        return max(0, min(4, (os.cpu_count() or 1) // local_world - 1))

    def plain(self) -> dict[str, Any]:
        """Every option as YAML and JSON can hold it."""
        return {name: _plain(value) for name, value in asdict(self).items()}


def _none_or_positive(value: float | None) -> bool:
    return value is None or value > 0


def _all_positive(weights: tuple[float, ...] | None, count: int) -> bool:
    return weights is None or (len(weights) == count and min(weights) > 0)


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def arguments_of_file(path: Path) -> list[str]:
    """A YAML file of options as command-line arguments, so that both are checked alike.

    Takes a mapping of option names, or a run's config.yaml, whose options stand under `options`.

    Raises:
        UserError: the file cannot be read, is no such mapping, or names an unknown option.
    """
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"cannot read the config: {error}", where=path) from error
    options = content.get("options", content) if isinstance(content, dict) else None
    if not isinstance(options, dict) or not all(isinstance(name, str) for name in options):
        raise UserError("not a config", where=path, expected="a mapping of option names", got=type(content).__name__)
    known = [field.name for field in fields(TrainConfig)]
    arguments: list[str] = []
    for given, value in options.items():
        name = given.replace("-", "_")
        if name not in known:
            near = get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"Did you mean {near[0]}?" if near else "higgs_tune.train --help lists the options."
            raise UserError(f"unknown option {given!r}", where=path, hint=hint)
        if isinstance(value, bool):
            arguments.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, list):
            arguments += [f"--{name}", *map(str, value)]
        elif value is not None:
            arguments += [f"--{name}", str(value)]
    return arguments
