"""The trainer's configuration: one frozen dataclass of option groups, validated once, saved resolved as config.yaml."""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from higgs_tune.shards.bounds import Bound, bounds_of, check_bound
from higgs_tune.shards.errors import UserError
from higgs_tune.train.eval_sets import AUDIO_ONLY, HELD_OUT, SAMPLES, parse_guard, parse_metric, parse_sets
from higgs_tune.train.options import (
    CheckpointArgs,
    DataArgs,
    LoraArgs,
    LossArgs,
    ModelArgs,
    OptimArgs,
    PlanningArgs,
    ReportArgs,
    ValidationArgs,
)

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
    dry_run: bool = False
    """Load everything, run the self-test and two steps, print what the run will take, and stop."""
    skip_alignment_check: bool = False
    """Train even where the self-test before the first step says that the training signal is wrong."""
    debug: bool = False
    """Show tracebacks of user errors."""
    model: ModelArgs = field(default_factory=ModelArgs)
    lora: LoraArgs = field(default_factory=LoraArgs)
    loss: LossArgs = field(default_factory=LossArgs)
    optim: OptimArgs = field(default_factory=OptimArgs)
    data: DataArgs = field(default_factory=DataArgs)
    checkpoints: CheckpointArgs = field(default_factory=CheckpointArgs)
    validation: ValidationArgs = field(default_factory=ValidationArgs)
    reports: ReportArgs = field(default_factory=ReportArgs)
    planning: PlanningArgs = field(default_factory=PlanningArgs)

    @staticmethod
    def of(**options: Any) -> TrainConfig:
        """A configuration from flat option names."""
        groups = {option.name: option.group for option in all_options()}
        nested: dict[str, dict[str, Any]] = {group: {} for group in groups.values() if group}
        flat: dict[str, Any] = {}
        for name, value in options.items():
            (nested[groups[name]] if groups[name] else flat)[name] = value
        hints = get_type_hints(TrainConfig)
        return TrainConfig(**flat, **{group: hints[group](**values) for group, values in nested.items()})

    def with_home(self) -> TrainConfig:
        """The same, with `~` at the beginning of paths replaced by the home folder."""
        values = {option.name: option.value_in(self) for option in all_options()}
        expanded: dict[str, Any] = {
            name: value.expanduser() for name, value in values.items() if isinstance(value, Path)
        }
        expanded["train_data_dir"] = tuple(
            str(Path(name).expanduser()) if name.startswith("~") else name for name in self.train_data_dir
        )
        expanded["eval_data_dir"] = tuple(
            f"{name}={Path(location).expanduser()}" if location.startswith("~") else f"{name}{equals}{location}"
            for name, equals, location in (text.partition("=") for text in self.validation.eval_data_dir)
        )
        return TrainConfig.of(**(values | expanded))

    @property
    def with_audio(self) -> bool:
        """Whether the stage has an audio loss."""
        return self.training_stage != "stage1"

    def plain(self) -> dict[str, Any]:
        """Every option by its flat name, as YAML and JSON can hold it."""
        return {option.name: _plain(option.value_in(self)) for option in all_options()}

    def validate(self) -> TrainConfig:
        """Check every value; returns itself.

        Raises:
            UserError: a value is out of its range; says which, expected and got.
        """
        for option in all_options():
            check_bound(option.name, option.bound, option.value_in(self))
        self._check_combinations()
        return self

    def _check_combinations(self) -> None:
        """Refuse values that no bound can tell, and options that exclude each other."""
        weights, books, sets = self.data.mix_weights, self.loss.codebook_loss_weights, len(self.train_data_dir)
        _require(self.optim.max_steps == -1 or self.optim.max_steps > 0, "--max_steps is out of range",
                 "-1, or more than 0", self.optim.max_steps)  # fmt: skip
        _require(sets > 0 or self.planning.estimate, "--train_data_dir names no set", "at least one", sets)
        _require(weights is None or (len(weights) == sets and min(weights) > 0), "--mix_weights is out of range",
                 "a weight above 0 for each data folder", weights)  # fmt: skip
        _require(books is None or (min(books) >= 0 < sum(books)), "--codebook_loss_weights is out of range",
                 "weights, not all 0", books)  # fmt: skip
        lora = self.lora
        _require(not (lora.full_finetune and lora.is_given), "--full_finetune takes no option of LoRA",
                 "one of the two", "both")  # fmt: skip
        _require(not (lora.lora_preset and lora.lora_target_modules),
                 "--lora_preset and --lora_target_modules exclude each other", "one of the two", "both")  # fmt: skip
        hint = "--lora_preset comprehensive adapts every linear layer of the attention and of both FFNs."
        _require("all-linear" not in (lora.lora_target_modules or ()), "--lora_target_modules all-linear is no name",
                 "names or a regular expression", "all-linear", hint)  # fmt: skip
        trackers = self.reports.report_to
        _require(not ("none" in trackers and len(trackers) > 1), "--report_to none stands alone", "none", trackers)
        _require(not self.model.compile or self.model.kernels in ("auto", "compiled"),
                 "--compile is --kernels compiled", "one of the two", f"--kernels {self.model.kernels}")  # fmt: skip
        compiles = self.model.asked_kernels == "compiled"
        for flag, excluded in (("--full_finetune", lora.full_finetune), ("--kernels compiled", compiles)):
            _require(not (self.model.quantize_base and excluded), f"--quantize_base and {flag} exclude each other",
                     "one of the two", "both")  # fmt: skip
        planning = self.planning
        asked = [f"--{name}" for name in ("gpu", "gpus", "hours") if getattr(planning, name) not in (None, 1)]
        _require(planning.estimate or not asked, f"{' and '.join(asked)} belong to --estimate", "--estimate", None)
        self._check_evaluation()
        validation = self.validation
        _require(validation.val_fraction is not None or validation.val_by == "sample", "--val_by needs --val_fraction",
                 "a share to hold out", None)  # fmt: skip
        by_samples = (validation.best_by or "").startswith(f"{SAMPLES}:")
        _require(not validation.early_stopping_patience or validation.eval_steps != 0 or by_samples,
                 "--early_stopping_patience needs validation", "--eval_steps above 0", 0)  # fmt: skip
        if self.model.forward == "reference":
            hint = "Boson's forward computes the text loss and the audio loss of target audio, and nothing else."
            _require(not self.loss.contrastive_loss_weight, "--forward reference has no contrastive loss",
                     "--contrastive_loss_weight 0", self.loss.contrastive_loss_weight, hint)  # fmt: skip
            _require(not self.loss.train_on_reference, "--forward reference cannot --train_on_reference",
                     "--forward packed", "reference", hint)  # fmt: skip

    def _check_evaluation(self) -> None:
        """Refuse metrics and guards of sets that are not there, and those that the stage does not compute."""
        validation = self.validation
        known = [HELD_OUT, *parse_sets(validation.eval_data_dir)]
        asked = [("--guard", parse_guard(text).metric) for text in validation.guard]
        if validation.best_by is not None:
            asked.append(("--best_by", parse_metric("--best_by", validation.best_by)))
        scored = [metric for flag, metric in asked if flag == "--best_by" and metric.set_name == SAMPLES]
        for metric in scored:
            judge = {"cer": "sample_asr", "similarity": "sample_speaker_model"}[metric.metric]
            _require(bool(getattr(validation, judge)), f"--best_by {metric} needs a judge", f"--{judge}", None)
        judged = validation.sample_asr or validation.sample_speaker_model
        _require(validation.sample_steps > 0 or not judged, "--sample_asr and --sample_speaker_model judge samples",
                 "--sample_steps above 0", validation.sample_steps)  # fmt: skip
        _require(self.with_audio or not judged, "stage 1 trains no speech to judge",
                 "no --sample_asr, no --sample_speaker_model", judged)  # fmt: skip
        for flag, metric in (pair for pair in asked if pair[1] not in scored):
            _require(validation.eval_steps != 0, f"{flag} needs validation", "--eval_steps above 0", 0)
            _require(metric.set_name in known, f"{flag}: no evaluation set {metric.set_name}", ", ".join(known), metric,
                     "--eval_data_dir NAME=SHARDS names one.")  # fmt: skip
            absent = (metric.metric in AUDIO_ONLY and not self.with_audio) or (
                metric.metric.startswith("text") and not self.loss.text_loss_weight
            )
            _require(not absent, f"{flag}: {self.training_stage} computes no {metric.metric} with these options",
                     "a metric of a loss that trains", metric)  # fmt: skip


def _require(condition: bool, what: str, expected: str, got: object, hint: str = "") -> None:
    if not condition:
        raise UserError(what, expected=expected, got=got, hint=hint)


@dataclass(frozen=True)
class Option:
    """An option as the command line sees it: flat name, group ("" for none), type without `Annotated`, bound."""

    name: str
    group: str
    kind: Any
    bound: Bound | None

    def value_in(self, config: TrainConfig) -> Any:
        return getattr(getattr(config, self.group) if self.group else config, self.name)

    @property
    def optional(self) -> bool:
        """Whether None is a value of it."""
        return type(None) in self.choices

    @property
    def choices(self) -> tuple[Any, ...]:
        """The members of a union, or the type itself."""
        return get_args(self.kind) if get_origin(self.kind) in (Union, types.UnionType) else (self.kind,)


def all_options() -> Iterator[Option]:
    """Every option, in the order of the command line."""
    yield from _options_of(TrainConfig, "")


def _options_of(owner: type, group: str) -> Iterator[Option]:
    for name, (kind, bound) in bounds_of(owner).items():
        if isinstance(kind, type) and is_dataclass(kind):
            yield from _options_of(kind, name)
        else:
            yield Option(name, group, kind, bound)


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value
