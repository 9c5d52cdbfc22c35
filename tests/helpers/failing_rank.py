"""The training command, whose rank 1 fails in its second step. Started by torchrun in `test_signals.py`."""

from __future__ import annotations

import os
from typing import Any

from higgs_tune.train import loop
from higgs_tune.train.__main__ import main

train_step = loop.train_step


def failing(run: Any, *rest: Any) -> Any:
    if os.environ["RANK"] == "1" and run.progress.step == 1:
        raise ValueError("injected failure")
    return train_step(run, *rest)


loop.train_step = failing  # pyright: ignore[reportPrivateLocalImportUsage]
main()
