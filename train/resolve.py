"""From options to inputs: checkpoint, adapter, shard sets, Whisper features, LoRA and loss options.

Each function checks that its inputs fit together and names what does not, before any weight is read.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from higgs_tune.preprocess.checkpoints.checkpoint import describe_checkpoint, load_tokenizer
from higgs_tune.preprocess.checkpoints.weights import weight_files
from higgs_tune.preprocess.judges.load import check_judges
from higgs_tune.shards.errors import ShardError, UserError
from higgs_tune.shards.reader import ShardSet
from higgs_tune.shards.split import ValidationSplit
from higgs_tune.train.config import TrainConfig
from higgs_tune.train.data.loader import LoaderOptions
from higgs_tune.train.data.sampler import Schedule
from higgs_tune.train.dist.context import DistContext
from higgs_tune.train.eval_sets import SAMPLES, parse_guard, parse_metric, parse_sets
from higgs_tune.train.model.adapter import read_adapter, read_adapter_config
from higgs_tune.train.model.base import resolve_model
from higgs_tune.train.model.kernel_choice import choose_kernels
from higgs_tune.train.model.load import Loaded, load_config
from higgs_tune.train.model.loss import LossOptions
from higgs_tune.train.model.quantized import require_bitsandbytes
from higgs_tune.train.model.reference import boson_inputs
from higgs_tune.train.model.trainable import TrainableOptions
from higgs_tune.train.model.whisper_tower import WhisperTower
from higgs_tune.train.monitor.logger import check_trackers
from higgs_tune.train.monitor.samples import codec_path
from higgs_tune.train.monitor.validation import Validation
from higgs_tune.train.presets import DEFAULT_PRESET
from higgs_tune.train.set_checks import (
    require_one_codec,
    require_speakers,
    say_no_features,
    say_unused_features,
)
from higgs_tune.train.whisper import resolve_features, resolve_tower, trains_projector

TEXT_PROBE = 64  # samples of a set that `require_text` looks at


@dataclass(frozen=True)
class Inputs:
    """What is known before the weights are read.

    base: the checkpoint. adapter: of an earlier stage. tower: attached to the base. features: Whisper features that the
    model takes.
    """

    base: Path
    adapter: Path | None
    tower: WhisperTower | None
    features: str
    schedule: Schedule
    loading: LoaderOptions
    validation: Validation


def resolve_inputs(config: TrainConfig, context: DistContext) -> Inputs:
    """Check everything that needs no weights.

    Raises:
        UserError: paths or options are bad, or checkpoint, adapter and shard sets do not fit together.
    """
    base, adapter = resolve_model(config.model_path, config.model.base_model)
    choose_kernels(config.model.asked_kernels, context.device)
    if config.model.quantize_base:
        require_bitsandbytes("--quantize_base")
    if config.optim.optim == "adamw8bit":
        require_bitsandbytes("--optim adamw8bit")
        if config.lora.full_finetune and context.world.size > 1:
            raise UserError("--optim adamw8bit has no place in --full_finetune on several ranks", expected="adamw",
                            got="adamw8bit")  # fmt: skip
    tower = resolve_tower(config, adapter)
    model_config = load_config(base, tower.folder if tower else None)
    weight_files(base)  # this and the line after the sets refuse what would else fail after minutes of loading
    sets = open_sets(config, base, config.train_data_dir)
    names = parse_sets(config.validation.eval_data_dir)
    named = dict(zip(names, open_sets(config, base, names.values()), strict=True))
    every_set = [*sets, *named.values()]
    load_tokenizer(base, sets[0].special_ids)
    if config.training_stage == "stage1" and not config.loss.allow_textless_stage1:
        require_text(sets, base)
    require_one_codec(every_set)
    features = resolve_features(config, model_config, every_set, tower, base, adapter)
    if context.is_main:
        (say_unused_features if features == "none" else say_no_features)(sets)
    if config.loss.contrastive_loss_weight and config.with_audio:
        require_speakers(sets)
    trainable_options(config, adapter, features, tower).full_modules(config.training_stage)
    schedule = Schedule(
        sets,
        tokens_per_pack=config.data.tokens_per_pack,
        seed=config.optim.seed,
        accumulation=config.optim.gradient_accumulation_steps,
        world=context.world,
        mix_weights=config.data.mix_weights,
        features=features,
    )
    loading = loader_options(config, context, features, model_config.pad_token_id)
    validation = Validation(schedule, loading, config.validation.eval_steps, named)
    check_evaluation(config, validation)
    check_trackers(config.reports.report_to)
    if config.validation.sample_steps:
        codec_path(config.validation.audio_tokenizer_path, sets)
        if context.is_main:
            check_judges(config.validation.sample_asr, config.validation.sample_speaker_model)
        if config.lora.full_finetune and context.world.size > 1:
            hint = "Samples of different lengths would wait for each other's weights; generate from the saved model."
            raise UserError("--sample_steps has no place in --full_finetune on several ranks", hint=hint)
    return Inputs(base, adapter, tower, features, schedule, loading, validation)


def input_folders(config: TrainConfig, inputs: Inputs) -> dict[str, Path]:
    """The local folders that a run reads, and those that its shards were made from, by name."""
    folders = {"--model_path": config.model_path, "the base checkpoint": inputs.base}
    if inputs.tower:
        folders["--whisper_path"] = inputs.tower.folder
    if config.validation.audio_tokenizer_path:
        folders["--audio_tokenizer_path"] = config.validation.audio_tokenizer_path
    for shards in inputs.schedule.sets.sets:
        made_from = shards.provenance.get("paths", {})
        folders |= {f"the {name} that {shards.location} was made with": Path(path) for name, path in made_from.items()}
        if "://" not in shards.location:
            folders[f"--train_data_dir {shards.location}"] = Path(shards.location)
    for name, location in parse_sets(config.validation.eval_data_dir).items():
        if "://" not in location:
            folders[f"--eval_data_dir {name}"] = Path(location)
    return folders


def check_evaluation(config: TrainConfig, validation: Validation) -> None:
    """Refuse options of validation where there is nothing to validate on.

    Raises:
        UserError: names the option.
    """
    options = config.validation
    best_by = parse_metric("--best_by", options.best_by) if options.best_by else None
    by_samples = best_by is not None and best_by.set_name == SAMPLES
    if options.early_stopping_patience and not validation.every and not by_samples:
        raise UserError("--early_stopping_patience needs validation", expected="a validation split, and --eval_steps")
    asked = [("--guard", parse_guard(text).metric) for text in options.guard]
    asked += [("--best_by", best_by)] if best_by and not by_samples else []
    for flag, metric in asked:
        if metric.set_name not in validation.names:
            hint = "--val_fraction 0.05 holds samples out."
            raise UserError(f"{flag} {metric}: no sample is held out", expected="a validation split", hint=hint)


def open_sets(config: TrainConfig, base: Path, locations: Iterable[str]) -> list[ShardSet]:
    """The shard sets at some locations.

    Raises:
        UserError: a set was made for another tokenizer or other special ids.
    """
    sets, have = (
        [ShardSet(location, config.data.cache()) for location in locations],
        describe_checkpoint(base),
    )
    if config.validation.val_fraction is not None:
        for shards in sets:
            shards.hold_out(ValidationSplit(config.validation.val_fraction, config.validation.val_by))
    for shards in sets:
        made_for = shards.provenance["model"]
        for name in ("special_ids", "codebook_size", "tokenizer_sha256"):
            if made_for[name] != have[name]:
                raise UserError(
                    f"the shard set was made for another checkpoint: {name} differs",
                    where=shards.location,
                    expected=have[name],
                    got=made_for[name],
                )
    return sets


def require_text(sets: list[ShardSet], base: Path) -> None:
    """Refuse stage 1 on sets whose answers are audio alone: their only text labels are special tokens.

    Looks at up to `TEXT_PROBE` training samples of each set.

    Raises:
        UserError: more than half of the samples of a set have no text to train on.
    """
    tokenizer = load_tokenizer(base, sets[0].special_ids)
    special = list({*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder})
    for shards in sets:
        rows = shards.rows_of(validation=False)
        probed = rows[np.linspace(0, len(rows) - 1, min(len(rows), TEXT_PROBE)).astype(int)].tolist()
        samples = [sample for sample in shards.read_arrays(probed) if not isinstance(sample, ShardError)]
        labels = [sample.tokens_2L[1][sample.tokens_2L[1] >= 0] for sample in samples]
        textless = sum(bool(np.isin(label, special).all()) for label in labels)
        if textless > len(samples) / 2:
            share = sum(map(len, labels)) / max(1, sum(sample.tokens_2L.shape[1] for sample in samples))
            hint = (
                "Train on audio at once with --training_stage single, or make the set from answers that say the text "
                "before the audio. --allow_textless_stage1 trains all the same."
            )
            raise UserError(
                f"stage1 has no text to train on: in {textless} of {len(samples)} samples looked at, only special "
                f"tokens have a text label ({share:.1%} of the tokens)",
                where=shards.location,
                expected="text in the answers",
                hint=hint,
            )


def wants_audio_attention(config: TrainConfig, adapter: Path | None) -> bool:
    """Whether the model has audio self-attention beyond what its checkpoint holds."""
    if config.lora.use_audio_out_self_attention:
        return True
    return adapter is not None and read_adapter(adapter).has_audio_attention


def trainable_options(
    config: TrainConfig, adapter: Path | None, features: str = "none", tower: WhisperTower | None = None
) -> TrainableOptions:
    """What trains; options that are not given are those of the adapter that is continued, or the defaults.

    Args:
        tower: attached to the base, so that its projector is new.

    Raises:
        UserError: an option of LoRA differs from the adapter's.
    """
    given = {name: getattr(config.lora, name) or None for name in ("lora_r", "lora_alpha", "use_rslora", "use_dora")}
    given["lora_dropout"] = config.lora.lora_dropout  # 0 is a value of it
    if earlier := read_adapter_config(adapter) if adapter else None:
        for name, wanted in given.items():
            had = earlier.get("r" if name == "lora_r" else name, 0)
            if wanted is not None and wanted != had:
                raise UserError(f"--{name} differs from the adapter's", where=adapter, expected=had, got=wanted)
            given[name] = had
    r = given["lora_r"] or 16
    return TrainableOptions(
        r=r,
        alpha=given["lora_alpha"] or 2.0 * r,
        dropout=given["lora_dropout"] or 0.0,
        preset=config.lora.lora_preset or DEFAULT_PRESET[config.training_stage],
        pattern=config.lora.target_pattern,
        rslora=bool(given["use_rslora"]),
        dora=bool(given["use_dora"]),
        extra=tuple(dict.fromkeys(config.lora.lora_extra)),
        heads=config.lora.train_heads,
        text_head=config.lora.train_text_head,
        audio_head=config.lora.train_audio_head,
        norms=config.lora.train_norms,
        text_embeddings=config.lora.train_text_embeddings,
        audio_embeddings=config.lora.train_audio_embeddings,
        audio_attention=config.lora.use_audio_out_self_attention,
        audio_tower=config.lora.train_audio_tower,
        audio_encoder_proj=trains_projector(config, tower),
        text_loss=config.loss.text_loss_weight > 0,
        features=features,
    )


def loss_options(config: TrainConfig, loaded: Loaded) -> LossOptions:
    """The loss of the stage.

    Raises:
        UserError: text is to be trained, and the checkpoint has no text head; or every loss has weight 0.
    """
    codebooks = loaded.model.config.audio_num_codebooks
    if config.loss.codebook_loss_weights and len(config.loss.codebook_loss_weights) != codebooks:
        got = len(config.loss.codebook_loss_weights)
        raise UserError("--codebook_loss_weights has a wrong length", expected=codebooks, got=got)
    with_text = config.loss.text_loss_weight > 0
    if not with_text and not (
        config.with_audio and (config.loss.audio_loss_weight or config.loss.contrastive_loss_weight)
    ):
        raise UserError(f"every loss of {config.training_stage} has weight 0", expected="one that trains")
    if with_text and not loaded.has_text_head:
        hint = "Train audio alone with --training_stage single --text_loss_weight 0, or use Boson's original layout."
        raise UserError("the checkpoint has no text head, so text cannot be trained", hint=hint)
    return LossOptions(
        text=config.loss.text_loss_weight,
        audio=config.loss.audio_loss_weight,
        contrastive=config.loss.contrastive_loss_weight if config.with_audio else 0.0,
        codebooks=config.loss.codebook_loss_weights,
        smoothing=config.loss.label_smoothing,
        with_text=with_text,
        with_audio=config.with_audio,
    )


def loader_options(config: TrainConfig, context: DistContext, features: str, pad_token_id: int) -> LoaderOptions:
    """How batches are made."""
    return LoaderOptions(
        workers=config.data.loader_workers(context.world.local_size),
        start_method=config.data.dataloader_start_method,
        pin_memory=context.device.type == "cuda",
        on_bad_sample=config.data.on_bad_sample,
        max_bad_samples=config.data.max_bad_samples,
        features=features,
        train_inputs=config.loss.train_on_reference,
        contrastive=config.loss.contrastive_loss_weight > 0 and config.with_audio,
        reference_collate=partial(boson_inputs, pad_token_id=pad_token_id, mel=features == "mel")
        if config.model.forward == "reference"
        else None,
    )
