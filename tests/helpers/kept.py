"""What forward and loss keep for backward, seen by autograd's hooks, beside the estimate."""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from higgs_tune.train.data.batch import Batch
from higgs_tune.train.model import forward
from higgs_tune.train.model.forward import ExecOptions, hidden_states
from higgs_tune.train.model.load import HiggsAudioModel
from higgs_tune.train.model.loss import LossOptions, pack_loss
from higgs_tune.train.model.memory import activation_bytes, head_gradient_bytes, lora_matrix_bytes
from higgs_tune.train.model.quantized import QuantizedWeight
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint


@dataclass(eq=False)
class Held:
    """A tensor that autograd keeps; it is gone when autograd lets it go."""

    value: torch.Tensor


def kept_share(
    model: HiggsAudioModel, batch: Batch, exec_options: ExecOptions, monkeypatch: pytest.MonkeyPatch
) -> float:
    """What autograd and checkpoints keep for backward, but for weights and the batch, over the estimate."""
    weights = [value for value in (*model.parameters(), *model.buffers()) if not isinstance(value, QuantizedWeight)]
    weights += [part for value in model.parameters() if isinstance(value, QuantizedWeight) for part in value.parts]
    inputs = [batch.flat, *([batch.mels] if batch.mels is not None else [])]
    owned = {value.untyped_storage().data_ptr() for value in (*weights, *inputs)}
    held: weakref.WeakSet[Held] = weakref.WeakSet()
    arguments: list[Held] = []

    def keep(value: torch.Tensor) -> Held:
        held.add(box := Held(value))
        return box

    def checkpointed(function: Any, *args: Any, **options: Any) -> torch.Tensor:
        """A checkpoint holds the arguments, out of sight of autograd's hooks."""
        out = checkpoint(function, *args, **options)
        assert isinstance(out, torch.Tensor)
        for value in tree_leaves(args) if out.requires_grad else ():
            if isinstance(value, torch.Tensor):
                arguments.append(keep(value))
        return out

    with monkeypatch.context() as patched:
        patched.setattr(forward, "checkpoint", checkpointed)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda box: box.value):
            counts = torch.cat([batch["label_counts"], batch["pairs"]]).float()
            states = hidden_states(model, batch, exec_options)
            loss = pack_loss(model, states, batch, LossOptions().per_label(counts), LossOptions()).total
    text_share, compiled = 1 - batch["codes_KA"].shape[1] / batch.positions, exec_options.kernels == "compiled"
    label_share = (len(batch["text_labels"]) + batch["audio_labels_KL"].shape[1]) / batch.positions
    estimate = activation_bytes(model, exec_options.checkpointing, compiled=compiled, text_share=text_share,
                                label_share=label_share, windows=batch.windows / batch.positions)  # fmt: skip
    gc.collect()  # what a checkpoint without gradient held is gone
    values = [box.value for box in held if not isinstance(box.value, QuantizedWeight)]
    kept = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in values}
    del states, loss
    expected = batch.positions * estimate + head_gradient_bytes(model)
    expected += lora_matrix_bytes(model, exec_options.checkpointing)
    return sum(size for at, size in kept.items() if at not in owned) / expected
