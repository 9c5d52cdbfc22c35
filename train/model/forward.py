"""The packed forward: one flat sequence of many samples through boson's own modules.

In: boson's `HiggsAudioModel` (with or without PEFT adapters inside) and a `Batch`. Out: the residual stream after the
last layer, in the batch's sorted order. Guarantees: without padding, it gives boson's logits and gradients
(test_forward.py); no sample sees another one or its own future (test_leaks.py); the host never waits for the device
(test_speed.py).

What each layer computes is `HiggsAudioDualFFNDecoderLayer.forward` of boson-multimodal 0.1.1, restricted to real
positions: attention is causal within a sample and blind across samples; text rows use the text norms and FFN, audio
rows the audio ones; a fast-forward layer changes text rows only; audio self-attention, where it exists, runs over the
audio rows before the shared attention.

To check it against boson's, read this file from `decoder_layer` on as `ExecOptions(plain=True)` runs it: linear layers
by `linear.plain_project`, norms and gates by the `forward` methods of `layer_input.py`, attention by
`attention.plain_attention`, rotary embeddings by `attention.plain_rope_and_reorder`. The faster kernels (fused,
blocked, compiled, Triton's) stand behind the same calls.

Shapes: N positions (P text rows, then A audio rows), H hidden, D head size, h heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal

import torch
from boson_multimodal.model.higgs_audio.modeling_higgs_audio import HiggsAudioDualFFNDecoderLayer
from higgs_tune.train.data.batch import Batch
from higgs_tune.train.model.attention import (
    causal_attention,
    plain_attention,
    plain_rope_and_reorder,
    rope_and_reorder,
)
from higgs_tune.train.model.embed import embed_audio, embed_text
from higgs_tune.train.model.fused_linear import fused_project
from higgs_tune.train.model.kernel_choice import KernelName
from higgs_tune.train.model.layer_input import Gated, Normed, Rows
from higgs_tune.train.model.linear import AnyLayer, layers_of, may_compile, plain_project
from higgs_tune.train.model.load import HiggsAudioModel
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint

Checkpointing = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class ExecOptions:
    """How layers are run; none of it changes a number beyond rounding.

    kernels: see `kernel_choice.py`; compiled ones take row counts that change from batch to batch. checkpointing: which
    parts backward recomputes instead of saving them: `none`, `selective` (each FFN) or `full` (each layer). plain: by
    plain PyTorch operations under autograd, slower; for reading and for tests.
    """

    kernels: KernelName = "eager"
    checkpointing: Checkpointing = "none"
    plain: bool = False


@dataclass(frozen=True)
class Kernels:
    """The operations that layers are made of, plain or fast.

    project: linear layers on a source, see `plain_project`. attend: queries, keys, values and their span, see
    `causal_attention`. qkv, ffn: `_qkv` and
    `_ffn`, perhaps compiled or checkpointed.
    """

    project: Callable[..., list[torch.Tensor]]
    attend: Callable[..., torch.Tensor]
    qkv: Callable[..., tuple[torch.Tensor, ...]]
    ffn: Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Span:
    """Rows that attend to each other, and how their order relates to the sequence.

    cos_ND, sin_ND: rotary embedding of each row. lengths: rows of each sample. cu_lengths: where they begin, int32
    [samples + 1] on the device. to_sequence, to_sorted: row orders, or None where the rows already stand in sequence
    order.
    """

    cos_ND: torch.Tensor
    sin_ND: torch.Tensor
    lengths: list[int]
    cu_lengths: torch.Tensor
    to_sequence: torch.Tensor | None = None
    to_sorted: torch.Tensor | None = None


@dataclass(frozen=True)
class PackContext:
    """What every layer takes besides the residual stream.

    text_rows: how many of the rows are text; they come first. every, text, audio: the three sets of rows that attend
    to each other.
    """

    text_rows: int
    every: Span
    text: Span
    audio: Span
    kernels: Kernels


@dataclass(frozen=True)
class LabelRows:
    """The rows that a label needs: in sorted order, their places in the sequence, how many of them are text."""

    rows: torch.Tensor
    places: torch.Tensor
    text_rows: int


def hidden_states(model: HiggsAudioModel, batch: Batch, exec_options: ExecOptions = ExecOptions()) -> torch.Tensor:
    """The residual stream [N, H] after the last layer, before the final norm, in sorted order."""
    hidden_NH, context = _embed(model, batch, exec_options)
    for layer in model.layers:
        hidden_NH = _run_layer(layer, exec_options, hidden_NH, context)
    return hidden_NH


def label_states(model: HiggsAudioModel, batch: Batch, exec_options: ExecOptions = ExecOptions()) -> torch.Tensor:
    """The rows `batch["label_rows"]` of `hidden_states`: [rows, H].

    After the last attention rows no longer mix, so only labelled rows are computed.
    """
    hidden_NH, context = _embed(model, batch, exec_options)
    for layer in model.layers[:-1]:
        hidden_NH = _run_layer(layer, exec_options, hidden_NH, context)
    rows = batch["label_rows"]
    labelled = LabelRows(rows, batch["to_sorted"].index_select(0, rows), batch.label_text_rows)
    last: Any = model.layers[-1]
    if not isinstance(last, HiggsAudioDualFFNDecoderLayer) or last.fast_forward:
        return _run_layer(last, exec_options, hidden_NH, context).index_select(0, rows)
    return _run_layer(last, exec_options, hidden_NH, context, labelled)


def _embed(model: HiggsAudioModel, batch: Batch, exec_options: ExecOptions) -> tuple[torch.Tensor, PackContext]:
    """The embeddings in sorted order [N, H], and the context of the layers."""
    hidden_NH = torch.cat([embed_text(model, batch), embed_audio(model, batch["codes_KA"])])
    return hidden_NH, make_context(model, batch, hidden_NH, kernels_of(exec_options))


def _run_layer(layer: nn.Module, exec_options: ExecOptions, *packed: Any) -> torch.Tensor:
    """One layer; FSDP's hooks run around the layer's own call, and `full` checkpointing around ours."""
    if isinstance(layer, FSDPModule):
        return layer(packed=packed)
    if exec_options.checkpointing == "full" and torch.is_grad_enabled():
        out = checkpoint(decoder_layer, layer, *packed, use_reentrant=False)
        assert isinstance(out, torch.Tensor)
        return out
    return decoder_layer(layer, *packed)


def make_context(model: HiggsAudioModel, batch: Batch, hidden_NH: torch.Tensor, kernels: Kernels) -> PackContext:
    """Row orders and rotary embeddings of a batch.

    Args:
        hidden_NH: the embeddings, which name dtype and device.
    """
    cos, sin = (table[0] for table in model.rotary_emb(hidden_NH, batch["positions"][None]))
    text_rows = len(hidden_NH) - batch["codes_KA"].shape[1]
    text, audio = slice(None, text_rows), slice(text_rows, None)
    return PackContext(
        text_rows=text_rows,
        every=Span(cos, sin, batch.lengths, batch["cu_all"], batch["to_sequence"], batch["to_sorted"]),
        text=Span(cos[text], sin[text], batch.text_lengths, batch["cu_text"]),
        audio=Span(cos[audio], sin[audio], batch.audio_lengths, batch["cu_audio"]),
        kernels=kernels,
    )


def decoder_layer(
    layer: Any, hidden_NH: torch.Tensor, context: PackContext, labelled: LabelRows | None = None
) -> torch.Tensor:
    """One layer over the sorted residual stream; with `labelled`, only those rows go on after its attention."""
    kernels = context.kernels
    if not isinstance(layer, HiggsAudioDualFFNDecoderLayer):
        return _text_layer(layer, hidden_NH, context.every, kernels)
    if layer.fast_forward:
        text_PH, audio_AH = _split(hidden_NH, context.text_rows)
        return torch.cat([_text_layer(layer, text_PH, context.text, kernels), audio_AH])
    audio_norm = layer.audio_input_layernorm
    if layer.use_audio_attention:
        text_PH, audio_AH = _split(hidden_NH, context.text_rows)
        source = norm_of(audio_AH, audio_norm)
        audio_AH = attention(layer.audio_attn, source, audio_AH, context.audio, kernels)
        hidden_NH, audio_norm = torch.cat([text_PH, audio_AH]), layer.audio_post_audio_attn_layer_norm
    source = norm_of(hidden_NH, layer.input_layernorm, audio_norm, context.text_rows)
    hidden_NH = attention(layer.self_attn, source, hidden_NH, context.every, kernels, labelled)
    text_PH, audio_AH = _split(hidden_NH, labelled.text_rows if labelled else context.text_rows)
    text_PH = feed_forward(layer.mlp, layer.post_attention_layernorm, text_PH, kernels)
    audio_AH = feed_forward(layer.audio_mlp, layer.audio_post_attention_layernorm, audio_AH, kernels)
    return torch.cat([text_PH, audio_AH])


def _split(hidden_NH: torch.Tensor, text_rows: int) -> Sequence[torch.Tensor]:
    """Text rows and audio rows."""
    return hidden_NH.split([text_rows, len(hidden_NH) - text_rows])


def _text_layer(layer: Any, hidden_NH: torch.Tensor, span: Span, kernels: Kernels) -> torch.Tensor:
    hidden_NH = attention(layer.self_attn, norm_of(hidden_NH, layer.input_layernorm), hidden_NH, span, kernels)
    return feed_forward(layer.mlp, layer.post_attention_layernorm, hidden_NH, kernels)


def norm_of(x_NH: torch.Tensor, norm: Any, audio_norm: Any = None, text_rows: int | None = None) -> Normed:
    """The norm of the residual stream; of its audio rows, by a norm of their own where there is one."""
    rows = len(x_NH) if text_rows is None else text_rows
    return Normed(x_NH, norm.weight, (audio_norm or norm).weight, rows, norm.variance_epsilon)


def feed_forward(mlp: Any, norm: Any, x_NH: torch.Tensor, kernels: Kernels) -> torch.Tensor:
    """Llama's gated FFN over the norm of the residual stream, added to it."""
    return kernels.ffn(norm_of(x_NH, norm), layers_of(mlp.gate_proj, mlp.up_proj), layers_of(mlp.down_proj))


def attention(
    module: Any,
    source: Normed,
    residual_NH: torch.Tensor,
    span: Span,
    kernels: Kernels,
    labelled: LabelRows | None = None,
) -> torch.Tensor:
    """Llama's grouped-query attention over the rows of a span, added to the residual stream: [N, H].

    With `labelled`, its output at those rows only.
    """
    layers = layers_of(module.q_proj, module.k_proj, module.v_proj)
    q_NhD, k_NhD, v_NhD = kernels.qkv(source, layers, span, module.head_dim)
    out_NhD = kernels.attend(q_NhD, k_NhD, v_NhD, span)
    out = Rows(out_NhD.flatten(1), span.to_sorted, span.to_sequence)
    if labelled:
        out, residual_NH = Rows(out.x_NH, labelled.places), residual_NH.index_select(0, labelled.rows)
    return kernels.project(out, layers_of(module.o_proj), residual_NH)[0]


def _qkv(
    project: Callable[..., Any],
    rope: Callable[..., torch.Tensor],
    source: Normed,
    layers: tuple[AnyLayer, ...],
    span: Span,
    head_dim: int,
) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values [N, h, D] in sequence order."""
    q_NhD, k_NhD, v_NhD = (x_NO.unflatten(1, (x_NO.shape[1] // head_dim, head_dim)) for x_NO in project(source, layers))
    order, angles = (span.to_sequence, span.to_sorted), (span.cos_ND, span.sin_ND)
    return rope(q_NhD, *order, *angles), rope(k_NhD, *order, *angles), rope(v_NhD, *order)


def _ffn(
    project: Callable[..., Any], source: Normed, gate_up: tuple[AnyLayer, ...], down: tuple[AnyLayer, ...]
) -> torch.Tensor:
    return project(Gated(*project(source, gate_up)), down, source.x_NH)[0]


def _attend(
    attend: Callable[..., torch.Tensor], q_NhD: torch.Tensor, k_NhD: torch.Tensor, v_NhD: torch.Tensor, span: Span
) -> torch.Tensor:
    return attend(q_NhD, k_NhD, v_NhD, span.lengths, span.cu_lengths)


def kernels_of(exec_options: ExecOptions) -> Kernels:
    """The operations that layers run by."""
    if exec_options.plain:
        qkv = partial(_qkv, plain_project, plain_rope_and_reorder)
        return Kernels(plain_project, partial(_attend, plain_attention), qkv, partial(_ffn, plain_project))
    project, rope = fused_project, rope_and_reorder
    if exec_options.kernels == "triton":
        from higgs_tune.train.model.triton_kernels import TRITON, triton_rope_and_reorder

        project, rope = partial(fused_project, elementwise=TRITON), triton_rope_and_reorder
    qkv, ffn = partial(_qkv, project, rope), partial(_ffn, project)
    if exec_options.kernels == "compiled":  # the compiler sees by itself what to fuse and what to recompute
        qkv = partial(_compiled_or_not, partial(_compiled(_qkv), plain_project, rope), qkv)
        ffn = partial(_compiled_or_not, partial(_compiled(_ffn), plain_project), ffn)
    if exec_options.checkpointing == "selective":
        ffn = partial(checkpoint, ffn, use_reentrant=False)
    return Kernels(project, partial(_attend, causal_attention), qkv, ffn)


def _compiled_or_not(compiled: Callable[..., Any], fused: Callable[..., Any], source: Normed, *arguments: Any) -> Any:
    layers = [layer for group in arguments if type(group) is tuple for layer in group]
    return (compiled if may_compile(layers) else fused)(source, *arguments)


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True)
