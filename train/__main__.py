"""python -m higgs_tune.train: train one stage of LoRA.

    torchrun --nproc_per_node 8 -m higgs_tune.train --training_stage stage1 \
        --model_path BASE --train_data_dir SHARDS --output_dir OUT1

`--config run.yaml` gives flags from a file (a run's config.yaml, too); flags on the command line win.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import tyro
from higgs_tune.shards.errors import run_command
from higgs_tune.train.config import TrainConfig, arguments_of_file


def main() -> None:
    run_command(_main)


def parse_arguments(arguments: list[str]) -> TrainConfig:
    """Flags, after those of a `--config` file; both are checked alike.

    Raises:
        UserError: the file cannot be read, or a value is out of its range.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", type=Path)
    given, rest = first.parse_known_args(arguments)
    from_file = arguments_of_file(given.config) if given.config else []
    return tyro.cli(TrainConfig, prog="higgs_tune.train", args=from_file + rest).validate()


def _main() -> None:
    config = parse_arguments(sys.argv[1:])
    from higgs_tune.train.loop import (
        train,  # after the flags are checked: torch and transformers take seconds to import
    )

    train(config)


if __name__ == "__main__":
    main()
