"""torchrun --nproc_per_node 8 -m higgs_tune.evaluate: higgs-eval on several GPUs."""

from __future__ import annotations

from higgs_tune.evaluate.cli import main

if __name__ == "__main__":
    main()
