"""python -m higgs_tune.train: train one stage of LoRA.

    torchrun --nproc_per_node 8 -m higgs_tune.train --training_stage stage1 \
        --model_path BASE --train_data_dir SHARDS --output_dir OUT1

`--estimate --gpu h200` tells what it would take, on any machine. `--config run.yaml` gives flags from a file (a run's
config.yaml, too); flags on the command line win.
"""

from __future__ import annotations

import sys

from higgs_tune.shards.errors import run_command
from higgs_tune.train.arguments import parse_arguments
from higgs_tune.train.dist.last_words import outlive_terminal, recorded_for_torchrun


def main() -> None:
    run_command(_main)


def _main() -> None:
    with recorded_for_torchrun():
        config = parse_arguments(sys.argv[1:])
        if config.planning.estimate:
            from higgs_tune.train.estimate import print_estimate

            print_estimate(config)
            return
        from higgs_tune.train.loop import (
            train,  # after the flags are checked: torch and transformers take seconds to import
        )

        train(config)


if __name__ == "__main__":
    outlive_terminal()
    main()
