"""Full fine-tuning: every weight of the stage trains; on several GPUs weights, gradients and optimizer are sharded.

In: boson's model. Out: the same model, its layers wrapped by FSDP2 (`torch.distributed.fsdp.fully_shard`), whose hooks
gather a layer's weights for our own packed forward. Guarantees (test_diagnostics.py): what the stage freezes does not
train.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from higgs_tune.train.model.forward import decoder_layer
from higgs_tune.train.model.load import HiggsAudioModel
from higgs_tune.train.model.trainable import AUDIO_PARAMETER, Stage
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

_TOWER = ("audio_tower.", "audio_encoder_proj.")


def train_in_full(model: HiggsAudioModel, stage: Stage, *, tower: bool, projector: bool) -> None:
    """Let every parameter of the stage train, in float32.

    Args:
        tower, projector: the Whisper tower and its projector train too.
    """
    for name, parameter in model.named_parameters():
        frozen = stage == "stage1" and AUDIO_PARAMETER.search(name)
        frozen = frozen or (name.startswith(_TOWER[0]) and not tower) or (name.startswith(_TOWER[1]) and not projector)
        if not frozen:
            parameter.requires_grad_(True)
            parameter.data = parameter.data.float()


def shard(model: HiggsAudioModel, root: nn.Module, device: torch.device, compute: torch.dtype) -> None:
    """Shard a model over all ranks, layer by layer.

    Args:
        root: the module whose call runs the whole forward; holds the model.
        compute: dtype that weights are gathered in.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    options: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False),
    }
    for layer in model.layers:
        _take_packed(layer)
        fully_shard(layer, **options)
    fully_shard(root, **options)


def _take_packed(layer: nn.Module) -> None:
    """Let a layer's own call, and so FSDP's hooks, run our packed layer."""
    own = layer.forward

    def forward(*args: Any, packed: tuple[Any, ...] | None = None, **kwargs: Any) -> Any:
        return own(*args, **kwargs) if packed is None else decoder_layer(layer, *packed)

    layer.forward = forward


def whole(value: torch.Tensor) -> torch.Tensor:
    """A tensor that may be spread over ranks, in one piece; all ranks call this together."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def local(value: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor that may be spread over ranks."""
    return value.to_local() if isinstance(value, DTensor) else value


def spread_like(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A whole tensor, spread over ranks as `like` is."""
    value = value.to(like.device)
    return distribute_tensor(value, like.device_mesh, like.placements) if isinstance(like, DTensor) else value
