"""A step of a model: its loss and every gradient, for tests that compare two ways of computing them."""

from __future__ import annotations

import torch
from higgs_tune.train.data.batch import Batch
from higgs_tune.train.model.forward import ExecOptions, label_states
from higgs_tune.train.model.load import HiggsAudioModel
from higgs_tune.train.model.lora import trainable
from higgs_tune.train.model.loss import LossOptions, pack_loss

LOSS = LossOptions()


def loss_and_gradients(model: HiggsAudioModel, batch: Batch, exec_options: ExecOptions) -> dict[str, torch.Tensor]:
    """The gradients by parameter, and `loss`; dropout has a fixed seed."""
    torch.manual_seed(3)
    weights = LOSS.per_label(torch.cat([batch["label_counts"], batch["pairs"]]).float())
    total = pack_loss(model, label_states(model, batch, exec_options), batch, weights, LOSS, at_labels=True).total
    total.backward()
    found = {name: p.grad for name, p in trainable(model).items() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found | {"loss": total.detach()}
