"""Command line and YAML files → `TrainConfig`.

A file's options become arguments, so both are checked alike; arguments on the command line win. A file means what it
says: `null` is None, lists are lists, quoted booleans are booleans, and an option given twice is an error.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_origin

import yaml
from higgs_tune.preprocess.checkpoints.hub import BASE_MODEL
from higgs_tune.shards.errors import UserError
from higgs_tune.train.config import Option, TrainConfig, all_options

_BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_PRECISION = "Nothing to set: a GPU computes in bfloat16, a CPU in float32."
_EVAL = "--eval_steps N validates every N steps."
_SAVE = "--save_steps N saves every N steps."
_PACKS = (
    "--tokens_per_pack is the size of a rank's micro-batch in positions; --gradient_accumulation_steps adds them up."
)
# what --estimate takes where nothing is given
ESTIMATED = {"training_stage": ["single"], "model_path": [BASE_MODEL], "train_data_dir": [], "output_dir": ["."]}
PROG = "python -m higgs_tune.train"
_ALWAYS = "Nothing to set: that is always done."
# flags of the Hugging Face Trainer and of other scripts for this model, and what stands for them here
ELSEWHERE = {
    "per_device_train_batch_size": _PACKS,
    "per_device_eval_batch_size": _PACKS,
    "per_gpu_train_batch_size": _PACKS,
    "train_batch_size": _PACKS,
    "batch_size": _PACKS,
    "max_seq_length": _PACKS,
    "max_length": _PACKS,
    "cutoff_len": _PACKS,
    "model_max_length": _PACKS,
    "group_by_length": _PACKS,
    "bf16": _PRECISION,
    "fp16": _PRECISION,
    "tf32": _PRECISION,
    "torch_dtype": _PRECISION,
    "mixed_precision": _PRECISION,
    "gradient_checkpointing": "--activation_checkpointing none|selective|full|auto.",
    "evaluation_strategy": _EVAL,
    "eval_strategy": _EVAL,
    "do_eval": _EVAL,
    "do_train": _ALWAYS,
    "remove_unused_columns": _ALWAYS,
    "save_strategy": _SAVE,
    "logging_strategy": "--logging_steps N writes every N steps.",
    "logging_dir": "TensorBoard's files stand in OUTPUT_DIR/tensorboard.",
    "load_best_model_at_end": "The best by validation is kept as OUTPUT_DIR/best-STEP.",
    "metric_for_best_model": "Here it is --best_by NAME:metric.",
    "warmup_ratio": "--warmup_steps N; by default 3 % of all steps.",
    "lr": "Here it is --learning_rate.",
    "lora_rank": "Here it is --lora_r.",
    "rank": "Here it is --lora_r.",
    "target_modules": "Here it is --lora_target_modules, or --lora_preset.",
    "lora_target": "Here it is --lora_target_modules, or --lora_preset.",
    "use_lora": "LoRA is what trains unless --full_finetune is given.",
    "use_peft": "LoRA is what trains unless --full_finetune is given.",
    "modules_to_save": "--train_heads, --train_norms, --train_text_embeddings, … train modules in full.",
    "model_name_or_path": "Here it is --model_path.",
    "pretrained_model_name_or_path": "Here it is --model_path.",
    "tokenizer_name_or_path": "The tokenizer is that of --model_path.",
    "audio_tokenizer": "Here it is --audio_tokenizer_path.",
    "dataset": "Here it is --train_data_dir: shard sets that higgs-preprocess made.",
    "train_data_file": "Here it is --train_data_dir: shard sets that higgs-preprocess made.",
    "train_file": "Here it is --train_data_dir: shard sets that higgs-preprocess made.",
    "data_dir": "Here it is --train_data_dir.",
    "eval_dataset": "Here it is --eval_data_dir NAME=SHARDS.",
    "num_epochs": "Here it is --num_train_epochs.",
    "epochs": "Here it is --num_train_epochs.",
    "max_train_steps": "Here it is --max_steps.",
    "adam_epsilon": "Nothing to set: AdamW's usual 1e-8.",
    "max_norm": "Here it is --max_grad_norm.",
    "gradient_clipping": "Here it is --max_grad_norm.",
    "clip_grad": "Here it is --max_grad_norm.",
    "deepspeed": "Not needed: LoRA runs under DDP; --full_finetune is sharded by FSDP2.",
    "fsdp": "Not needed: LoRA runs under DDP; --full_finetune is sharded by FSDP2.",
    "ddp_find_unused_parameters": "Nothing to set: only what trains is registered with DDP.",
    "local_rank": "torchrun sets the rank in the environment.",
    "load_in_4bit": "Here it is --quantize_base nf4.",
    "load_in_8bit": "Here it is --quantize_base int8.",
    "torch_compile": "Here it is --kernels compiled.",
    "freeze_audio_tower": "The tower is frozen unless --train_audio_tower is given.",
}


class _UniqueKeys(yaml.SafeLoader):
    """YAML that refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = {str(key) for key in keys if keys.count(key) > 1}
        if twice:
            raise yaml.YAMLError(f"given twice: {', '.join(sorted(twice))}")
        return super().construct_mapping(node, deep)


def parse_arguments(arguments: list[str]) -> TrainConfig:
    """Flags, after those of a `--config` file.

    Raises:
        UserError: the file cannot be read, an option is unknown, or a value is out of its range.
    """
    import tyro  # later than --help of other commands needs it

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", type=Path)
    given, rest = first.parse_known_args(arguments)
    check_names((_name_of(argument), argument) for argument in rest if argument.startswith("--"))
    from_file = arguments_of_file(given.config) if given.config else []
    arguments = _with_estimates(from_file + rest)
    flat = (tyro.conf.OmitArgPrefixes,)
    about = f"{TrainConfig.__doc__} --config FILE.yaml gives options by their names; flags win over it."
    config = tyro.cli(TrainConfig, prog=PROG, description=about, args=tracker_names(arguments), config=flat)
    return config.with_home().validate()


def _with_estimates(arguments: list[str]) -> list[str]:
    """The arguments; with --estimate, also those that are required elsewhere."""
    names = {_name_of(argument) for argument in arguments if argument.startswith("--")}
    absent = {name: values for name, values in ESTIMATED.items() if "estimate" in names and name not in names}
    return [part for name, values in absent.items() for part in (f"--{name}", *values)] + arguments


def tracker_names(arguments: list[str]) -> list[str]:
    """The arguments with the names after `--report_to` in lower case, apart, and each once."""
    written: list[str] = []
    named: set[str] | None = None  # those after the last --report_to
    for argument in arguments:
        if argument.startswith("--"):
            flag, _, value = argument.partition("=")
            named = set() if _name_of(argument) == "report_to" else None
            written.append(argument if named is None else flag)
        else:
            value = argument
            written += [argument] if named is None else []
        if named is not None:
            new = [name for name in dict.fromkeys(value.lower().split(",")) if name and name not in named]
            named.update(new)
            written += new
    return written


def _name_of(argument: str) -> str:
    return argument.removeprefix("--").partition("=")[0].replace("-", "_")


def check_names(given: Iterable[tuple[str, str]], where: Path | None = None) -> None:
    """Refuse names that are no options, with the option that stands for them here.

    Args:
        given: pairs of an option's name with underscores, and the name as the user wrote it.
    """
    known = {option.name for option in all_options()}
    switches = {f"no_{option.name}" for option in all_options() if option.kind is bool}
    for name, written in given:
        if name not in known | switches | {"help", "config"}:
            near = get_close_matches(name, known, n=1, cutoff=0.6)
            hint = ELSEWHERE.get(name) or (f"Did you mean --{near[0]}?" if near else "--help lists the options.")
            raise UserError(f"unknown option {written.partition('=')[0]}", where=where, hint=hint)


def arguments_of_file(path: Path) -> list[str]:
    """A YAML file of options as command-line arguments.

    Takes a mapping of option names, or a run's config.yaml, whose options stand under `options`.

    Raises:
        UserError: the file cannot be read, is no such mapping, or names an unknown option.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8-sig"), Loader=_UniqueKeys)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"cannot read the config: {error}", where=path) from error
    options = content.get("options", content) if isinstance(content, dict) else None
    if not isinstance(options, dict) or not all(isinstance(name, str) for name in options):
        raise UserError("not a config", where=path, expected="a mapping of option names", got=type(content).__name__)
    named = {name.replace("-", "_"): value for name, value in options.items()}
    if len(named) < len(options):
        raise UserError("an option is given twice, with underscores and with hyphens", where=path)
    check_names(((name.replace("-", "_"), name) for name in options), path)
    known = {option.name: option for option in all_options()}
    arguments: list[str] = []
    for name, value in named.items():
        if name not in known:
            raise UserError(f"{name} is a switch of the command line only", where=path, hint="Write `option: false`.")
        arguments += _arguments_of(known[name], value, path)
    return arguments


def _arguments_of(option: Option, value: Any, path: Path) -> list[str]:
    """One option of a file as arguments."""
    flag = f"--{option.name}"
    if option.kind is bool:
        value = _BOOLEANS.get(value.lower(), value) if isinstance(value, str) else value
        if not isinstance(value, bool):
            raise UserError(f"{option.name} is a switch", where=path, expected="true or false", got=value)
        return [flag if value else f"--no-{option.name}"]
    if value is None and not option.optional:
        raise UserError(f"{option.name} cannot be null", where=path, expected="a value, or no line of it", got="null")
    is_list = any(get_origin(choice) is tuple for choice in option.choices)
    if isinstance(value, dict) or (isinstance(value, list) and not is_list):
        raise UserError(f"{option.name} takes one value", where=path, expected="one value", got=value)
    if isinstance(value, list):
        return [flag, *map(str, value)]
    return [flag, str(value)] if is_list else [f"{flag}={value}"]
