"""The memory of a run, by arithmetic: weights and states, what forward keeps, the checkpointing that fits.

Guarantees: what autograd keeps, within 5 %, for every kind of LoRA and of checkpointing, heads and loss included
(test_lora_paths.py), within 10 % with a Whisper tower that trains too (test_whisper_path.py); a step's measured peak
on a CPU, within 15 % (test_estimate.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from higgs_tune.shards.sequence import MEL_WINDOW
from higgs_tune.train.model.embed import stream_dtype
from higgs_tune.train.model.forward import Checkpointing
from higgs_tune.train.model.linear import Layer, layer_of, layers_of, may_compile
from higgs_tune.train.model.load import HiggsAudioModel
from higgs_tune.train.model.loss import CHUNK_ELEMENTS
from higgs_tune.train.model.quantized import QuantizedWeight, stored_bytes
from torch import nn

FREE_SHARE = 0.8  # of the free memory that activations may take
TEXT_SHARE = 0.3  # of a pack's positions
WINDOWS = 1 / 650  # of 30 s that the Whisper tower takes, for a position: one for each sample's reference
SMALLEST_8_BIT = 4096  # elements of a tensor whose moments bitsandbytes keeps in 8 bits
LABEL_SHARES = (0.1, 0.4)  # of a pack's positions: those with a text label, and with an audio label


def activation_bytes(
    model: HiggsAudioModel,
    checkpointing: Checkpointing = "none",
    *,
    compiled: bool = False,
    text_share: float = TEXT_SHARE,
    label_share: float = sum(LABEL_SHARES),
    windows: float = WINDOWS,
) -> float:
    """Bytes that are saved for backward, for a position of the packed forward, over all layers and the loss.

    Args:
        text_share, label_share: of the positions. windows: of the Whisper tower, for a position; they count where it
            trains.

    A layer saves the residual stream before each half, queries, keys, values and output of the attention, gate and
    up, the attention's normaliser, and what LoRA adds (`_lora_values`). A compiled one also saves its norms' outputs
    and SiLU(gate) * up. Layers below the first that trains save nothing. A fast-forward layer runs over text alone.
    """
    size, values, others = stream_dtype(model).itemsize, 0.0, 0.0
    layers = _layers_with_gradient(model)
    for layer in layers:
        shared, *audio = (getattr(layer, name) for name in ("self_attn", "audio_attn") if hasattr(layer, name))
        width = shared.config.hidden_size
        values += width
        if checkpointing == "full":
            continue
        audio_share = 0.0 if getattr(layer, "fast_forward", False) else 1 - text_share
        shared_share = text_share + audio_share
        values += shared_share * (width + _attention_values(shared))
        values += sum(width + audio_share * _attention_values(own) for own in audio)
        others += 4 * shared.num_heads * (shared_share + audio_share * len(audio))
        if checkpointing == "none":
            for name, share in (("mlp", text_share), ("audio_mlp", audio_share)):
                values += share * _ffn_values(getattr(layer, name, layer.mlp), compiled=compiled)
        values += shared_share * width * (compiled and _compiles(shared, "q_proj", "k_proj", "v_proj"))
    if layers:
        others += label_share * _label_bytes(model)
    kept = values * size + others + size * (1 - text_share) * _projector_values(model)
    return kept + windows * _tower_bytes(model)


def lora_matrix_bytes(model: HiggsAudioModel, checkpointing: Checkpointing = "none") -> float:
    """Bytes of LoRA's matrices as forward stacks, scales or casts them, which backward reuses; whatever the pack."""
    total = _matrix_bytes(model, getattr(model, "audio_out_embed_projector", None))
    for layer in _layers_with_gradient(model) if checkpointing != "full" else []:
        for attention in (getattr(layer, name) for name in ("self_attn", "audio_attn") if hasattr(layer, name)):
            total += _matrix_bytes(model, attention.q_proj, attention.k_proj, attention.v_proj)
            total += _matrix_bytes(model, attention.o_proj)
        runs = ("mlp",) if getattr(layer, "fast_forward", False) else ("mlp", "audio_mlp")
        for ffn in (getattr(layer, name, layer.mlp) for name in runs if checkpointing == "none"):
            total += _matrix_bytes(model, ffn.gate_proj, ffn.up_proj) + _matrix_bytes(model, ffn.down_proj)
    return total


def _matrix_bytes(model: HiggsAudioModel, *modules: Any) -> float:
    """Of linear layers with one input (`lora_math.py`); a matrix that is used as it trains is no copy."""
    layers = [layer for layer in map(layer_of, filter(None, modules)) if layer is not None]
    dtype, a = stream_dtype(model), [layer.a_rH for layer in layers if layer.a_rH is not None]
    b = [layer.b_Or for layer in layers if layer.b_Or is not None]
    made = [matrix for matrix in (*a, *b) if not isinstance(matrix, nn.Parameter)]  # of several adapters
    used = [matrix for matrix in a if len(a) > 1 or matrix.dtype != dtype]
    used += [matrix for matrix in b if matrix.dtype != dtype]
    return sum(matrix.nbytes for matrix in made) + dtype.itemsize * sum(matrix.numel() for matrix in used)


def head_gradient_bytes(model: HiggsAudioModel) -> float:
    """Gradients of the heads, in float32: the loss has them from forward on (`loss.py`)."""
    return 4.0 * sum(p.numel() for p in model.audio_decoder_proj.parameters() if p.requires_grad)


def _label_bytes(model: HiggsAudioModel) -> float:
    """What the last norm and the loss keep of a row with a label: the row in float32, and its gradient."""
    norm: Any = model.norm
    trains = any(parameter.requires_grad for parameter in norm.parameters())
    size = stream_dtype(model).itemsize
    return model.config.text_config.hidden_size * (4 + size + (size if trains else 0)) + 4


def _tower_bytes(model: HiggsAudioModel) -> float:
    """Bytes that the Whisper tower saves for a window, where it trains; it runs by boson's modules, uncheckpointed.

    A layer saves its input and the sum after the attention, both norms' outputs and statistics, queries, keys, values,
    output, normaliser and mask of the attention, and the FFN before and after its GELU.
    """
    tower: Any = model.audio_tower
    if tower is None or not any(parameter.requires_grad for parameter in tower.parameters()):
        return 0.0
    rows, width, size = MEL_WINDOW // 2, tower.conv1.out_channels, tower.conv1.weight.dtype.itemsize
    values = rows * (2 * tower.conv1.in_channels + 5 * width)  # both convolutions, before and after the GELU
    values += rows * 1.5 * width  # before pooling, and before the last norm
    for layer in tower.layers:
        values += rows * (8 * width + 2 * layer.fc1.out_features + rows)
    return values * size + 4 * rows * sum(layer.self_attn.num_heads + 4 for layer in tower.layers)


def _layers_with_gradient(model: HiggsAudioModel) -> list[Any]:
    """The decoder layers from the first one that trains; all of them where something below trains."""
    layers: list[Any] = list(model.layers)
    inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
    above = (model.norm, model.audio_decoder_proj)
    inside |= {id(parameter) for module in above for parameter in module.parameters()}
    if any(parameter.requires_grad and id(parameter) not in inside for parameter in model.parameters()):
        return layers
    trains = [any(parameter.requires_grad for parameter in layer.parameters()) for layer in layers]
    return layers[trains.index(True) :] if any(trains) else []


def _attention_values(module: Any) -> float:
    """Queries, keys, values and output of a position, and what LoRA adds."""
    projections = [module.q_proj, module.k_proj, module.v_proj]
    inner, keys = module.num_heads * module.head_dim, module.num_key_value_heads * module.head_dim
    return 2 * inner + 2 * keys + _lora_values(projections) + _lora_values([module.o_proj])


def _compiles(module: Any, *names: str) -> bool:
    return may_compile(layers_of(*(getattr(module, name) for name in names)))


def _ffn_values(module: Any, *, compiled: bool) -> float:
    gate_up = [module.gate_proj, module.up_proj]
    inputs = module.gate_proj.in_features + module.down_proj.in_features  # compiled, they are kept
    again = inputs if compiled and _compiles(module, "gate_proj", "up_proj", "down_proj") else 0
    added = _lora_values(gate_up, are_kept=True) + _lora_values([module.down_proj])
    return again + 2 * module.gate_proj.out_features + added


def _projector_values(model: HiggsAudioModel) -> float:
    """Input of the projector of audio embeddings, if it trains, for an audio position."""
    module: Any = getattr(model, "audio_out_embed_projector", None)
    if module is None or not any(parameter.requires_grad for parameter in module.parameters()):
        return 0.0
    return module.in_features + _lora_values([module])


def _lora_values(modules: Sequence[nn.Module], *, are_kept: bool = False) -> float:
    """What LoRA keeps for a row of layers with one input: the outputs of A; with DoRA, what its magnitudes scale.

    Args:
        are_kept: whether the layers' outputs are kept anyway, and are those of DoRA without dropout.
    """
    layers = [layer for layer in map(layer_of, modules) if layer is not None]
    with_dora = [layer for layer in layers if layer.magnitude_O is not None]
    kept: list[Layer] = with_dora
    if with_dora and not any(layer.dropout for layer in with_dora):
        kept = [] if are_kept else layers  # stacked outputs lie in one block
    return sum(layer.rank for layer in layers) + sum(len(layer.weight_OH) for layer in kept)


def working_bytes(model: HiggsAudioModel, positions: float, checkpointing: Checkpointing = "none") -> float:
    """What the loss, or backward of one layer, needs beside that, for a pack: the larger of the two.

    That is a chunk of logits; or gradients and remade inputs of a layer, with what is recomputed of it. Gradients of
    heads count beside those of `StateBytes`: both are there where gradients accumulate, or lie in DDP's buckets.
    """
    logits = min(_logits_bytes(model) * positions, _most_logits_bytes(model)) + _head_weight_bytes(model)
    return max(logits, positions * _layer_bytes(model, checkpointing)) + _fixed_bytes(model, checkpointing)


def _logits_bytes(model: HiggsAudioModel) -> float:
    """Logits of a position and their gradients, in float32 and in the activations' dtype."""
    heads = model.audio_decoder_proj
    shares = ((heads.text_lm_head, LABEL_SHARES[0]), (heads.audio_lm_head, LABEL_SHARES[1]))
    return _logits_copies(model) * max(share * head.out_features for head, share in shares)


def _most_logits_bytes(model: HiggsAudioModel) -> float:
    return _logits_copies(model) * CHUNK_ELEMENTS


def _logits_copies(model: HiggsAudioModel) -> int:
    """Bytes of a logit: of two copies in float32, and one in a narrower dtype of activations.

    DoRA with dropout keeps one more. Where the gradient is computed, DoRA has four: the output that it scales, the
    gradient before and after its scale, and their product.
    """
    size = stream_dtype(model).itemsize
    with_dora = [layer for layer in _heads(model) if layer.magnitude_O is not None]
    dropped = size if any(layer.dropout for layer in with_dora) else 0
    return max(2 * 4 + (size if size < 4 else 0) + dropped, 4 * size if with_dora else 0)


def _heads(model: HiggsAudioModel) -> list[Layer]:
    heads = model.audio_decoder_proj
    return [layer for layer in map(layer_of, (heads.text_lm_head, heads.audio_lm_head)) if layer is not None]


def _head_weight_bytes(model: HiggsAudioModel) -> float:
    """Of the larger head that trains in full: a chunk's gradient, and its weight in a narrower dtype of activations."""
    size = stream_dtype(model).itemsize
    trained = [layer.weight_OH.numel() for layer in _heads(model) if layer.weight_OH.requires_grad]
    return max(trained, default=0) * size * (2 if size < 4 else 1)


def _layer_bytes(model: HiggsAudioModel, checkpointing: Checkpointing) -> float:
    """What backward of one layer needs, for a position."""
    config: Any = model.config.text_config
    recomputed = activation_bytes(model) - activation_bytes(model, checkpointing)
    own = stream_dtype(model).itemsize * 4 * (config.hidden_size + config.intermediate_size)
    return own + recomputed / max(1, len(_layers_with_gradient(model)))


def _fixed_bytes(model: HiggsAudioModel, checkpointing: Checkpointing) -> float:
    """What does not depend on the pack."""
    return head_gradient_bytes(model) + _whole_weight_bytes(model) + lora_matrix_bytes(model, checkpointing)


def _whole_weight_bytes(model: HiggsAudioModel) -> float:
    """The largest weight of a quantized base, while it is made whole; bitsandbytes makes int8's in float32, twice."""
    quantized = [p for p in model.parameters() if isinstance(p, QuantizedWeight)]
    return max((p.numel() * (p.itemsize + (8 if p.kind == "int8" else 0)) for p in quantized), default=0)


@dataclass(frozen=True)
class StateBytes:
    """What a rank holds between two steps, in bytes; the fields in the order that they are told in.

    frozen: weights that stay. trained: weights that train. gradients, moments: of those, and what AdamW keeps of them.
    average: their moving average, where there is one.
    """

    frozen: float
    trained: float
    gradients: float
    moments: float
    average: float

    @property
    def total(self) -> float:
        return sum(vars(self).values())


def state_bytes(model: nn.Module, *, with_average: bool = False, in_8_bits: bool = False, ranks: int = 1) -> StateBytes:
    """The memory of weights and optimizer, of a rank.

    Args:
        model: with what trains marked; it may be on meta.
        in_8_bits: whether the moments are; those of small tensors are not.
        ranks: that share all of it (full fine-tuning).
    """
    frozen = trained = moments = 0.0
    for parameter in model.parameters():
        if parameter.requires_grad:
            trained += stored_bytes(parameter)
            eight_bit = in_8_bits and parameter.numel() >= SMALLEST_8_BIT
            moments += parameter.numel() * (2 + 2 * 4 / 256 if eight_bit else 8)
        else:
            frozen += stored_bytes(parameter)
    average = trained if with_average else 0.0
    return StateBytes(*(part / ranks for part in (frozen, trained, trained, moments, average)))


def largest_pack(model: HiggsAudioModel, checkpointing: Checkpointing, free: float, *, compiled: bool = False) -> int:
    """Positions of the largest pack whose estimate fits into the free memory (bytes); 0 where none does."""
    kept, room = (
        activation_bytes(model, checkpointing, compiled=compiled),
        FREE_SHARE * free - _fixed_bytes(model, checkpointing),
    )
    by_layer = room / (kept + _layer_bytes(model, checkpointing))
    room -= _head_weight_bytes(model)
    by_logits = max(room / (kept + _logits_bytes(model)), (room - _most_logits_bytes(model)) / max(1.0, kept))
    return max(0, int(min(by_layer, by_logits)))


def choose_checkpointing(
    model: HiggsAudioModel, positions: int, free: float, *, compiled: bool = False
) -> Checkpointing:
    """The least checkpointing whose estimate fits into the free memory (bytes)."""
    modes: tuple[Checkpointing, ...] = ("none", "selective")
    for mode in modes:
        kept = positions * activation_bytes(model, mode, compiled=compiled)
        if kept + working_bytes(model, positions, mode) <= FREE_SHARE * free:
            return mode
    return "full"


def free_bytes(device: torch.device) -> float:
    """Free memory of the device, or of the host where that is the device."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    with open("/proc/meminfo") as lines:  # noqa: PTH123
        return next(float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
