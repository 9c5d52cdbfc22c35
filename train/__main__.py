"""python -m higgs_tune.train: train one stage of LoRA.

    torchrun --nproc_per_node 8 -m higgs_tune.train --training_stage stage1 \
        --model_path BASE --train_data_dir SHARDS --output_dir OUT1
"""

from __future__ import annotations

import tyro

from ..shards.errors import run_command
from .config import TrainConfig


def main() -> None:
    run_command(_main)


def _main() -> None:
    config = tyro.cli(TrainConfig, prog="higgs_tune.train")
    from .loop import train  # after the flags are checked: torch and transformers take seconds to import

    train(config)


if __name__ == "__main__":
    main()
