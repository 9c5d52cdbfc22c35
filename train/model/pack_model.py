"""Forward and loss of one pack as a single module, so that DDP and FSDP see one call.

In: a `Batch` and the weight of each label. Out: `LossParts`. The forward pass is `model/forward.py`, the loss
`model/loss.py`; `--forward reference` takes `model/reference.py` for both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from higgs_tune.train.data.batch import Batch
from higgs_tune.train.model.forward import ExecOptions, hidden_states, label_states
from higgs_tune.train.model.load import HiggsAudioModel
from higgs_tune.train.model.loss import LossOptions, pack_loss
from higgs_tune.train.model.reference import reference_loss
from torch import nn


class PackModel(nn.Module):
    """Forward and loss of one pack.

    Args:
        parameters: the parameters that train. Only these are registered, so DDP sees and sends nothing else. None
            registers the whole model, for FSDP.
    """

    def __init__(
        self,
        model: HiggsAudioModel,
        parameters: Iterable[nn.Parameter] | None,
        options: LossOptions,
        exec_options: ExecOptions = ExecOptions(),  # noqa: B008
    ) -> None:
        super().__init__()
        if parameters is None:
            self.model = model
        else:
            self.trained = nn.ParameterList(parameters)
        self.options, self.exec_options = options, exec_options
        self._model = (model,)  # in a tuple: not a submodule

    def forward(self, batch: Batch, label_weights: torch.Tensor, probe: Callable[..., Any] | None = None) -> Any:
        """The pack's `LossParts`; with `probe`, the result of `probe(model, batch)` instead.

        A probe runs inside this call because FSDP gathers the weights around it.

        Args:
            label_weights: [2 + K], from `LossOptions.per_label`.
        """
        model = self._model[0]
        if probe is not None:
            return probe(model, batch)
        if batch.reference is not None:
            return reference_loss(model, batch.reference, label_weights, self.options, weight=batch.weight)
        if self.options.contrastive:
            return pack_loss(model, hidden_states(model, batch, self.exec_options), batch, label_weights, self.options)
        states = label_states(model, batch, self.exec_options)
        return pack_loss(model, states, batch, label_weights, self.options, at_labels=True)
