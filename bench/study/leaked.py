"""The trainer with leaked labels, as public trainers for this model have them: a position is to say what it is given.

    python bench/study/leaked.py --training_stage single … [--skip_alignment_check]

Takes the trainer's options. Without --skip_alignment_check the self-test refuses such a run.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from higgs_tune.train.__main__ import main
from higgs_tune.train.data import batch

_labels: Any = batch._labels  # pyright: ignore[reportPrivateUsage]


def leaked_labels(expanded: Any, order: Any, weight: int) -> Any:
    """The labels, each at the position of its own target in place of the one before."""
    moved = {name: getattr(expanded, name) + 1 for name in ("text_label_at", "audio_label_at")}
    return _labels(replace(expanded, **moved), order, weight)


if __name__ == "__main__":
    batch._labels = leaked_labels  # pyright: ignore[reportPrivateUsage]
    main()
