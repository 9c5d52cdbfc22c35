"""A frozen base in 4 or 8 bits (--quantize_base), by bitsandbytes; QLoRA (https://arxiv.org/abs/2305.14314).

In: a weight as it is read. Out: a `QuantizedWeight`, a tensor that holds fewer bits and that every operation sees as
the weight those bits stand for, so that nothing else need know of it. It is made whole for an operation and let go
after it; backward makes it whole again. Only the linear layers of attention and FFNs are quantized; adapters, norms,
embeddings and heads stay as they are. Guarantees (test_quantized.py): loss and gradients of a model that holds
bitsandbytes' dequantized weights.

nf4: blocks of 64 values, their scales in 8 bits in blocks of 256 (double quantization). int8: rows, a scale each.
"""

from __future__ import annotations

import re
from importlib.util import find_spec
from typing import Any, Literal

import torch
from higgs_tune.shards.errors import UserError
from torch import nn
from torch.utils._pytree import tree_map

Quantization = Literal["nf4", "int8"]
BLOCK, SCALES_BLOCK = 64, 256  # values of a scale, scales of a scale
QUANTIZED = re.compile(r"layers\.\d+\.(self_attn|mlp|audio_mlp)\.\w+_proj\.weight")


class QuantizedWeight(torch.Tensor):
    """A frozen weight [O, H] in fewer bits; see the top of this file.

    Attributes:
        kind: nf4 or int8. parts: the tensors that are kept. state: what bitsandbytes needs besides, for nf4.
    """

    kind: Quantization
    parts: list[torch.Tensor]
    state: Any

    @staticmethod
    def __new__(
        cls, kind: Quantization, parts: list[torch.Tensor], state: Any, shape: torch.Size, dtype: torch.dtype
    ) -> QuantizedWeight:
        made = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=parts[0].device)  # pyright: ignore
        made.kind, made.parts, made.state = kind, parts, state
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            (same,) = args
            return QuantizedWeight(same.kind, same.parts, same.state, same.shape, same.dtype)
        whole = tree_map(lambda value: value.whole() if isinstance(value, QuantizedWeight) else value, (args, kwargs))
        return func(*whole[0], **(whole[1] or {}))

    def __repr__(self, **_: Any) -> str:
        return f"QuantizedWeight({self.kind}, {tuple(self.shape)}, {self.dtype})"

    @property
    def stored_bytes(self) -> int:
        return sum(part.numel() * part.itemsize for part in self.parts)

    def whole(self) -> torch.Tensor:
        """The weight that the bits stand for, in its dtype."""
        from bitsandbytes import functional  # pyright: ignore[reportMissingImports]

        if self.kind == "nf4":
            return functional.dequantize_4bit(self.parts[0], self.state).view(self.shape).to(self.dtype)
        return functional.int8_vectorwise_dequant(*self.parts).to(self.dtype)


def quantize(weight_OH: torch.Tensor, kind: Quantization) -> QuantizedWeight:
    """A weight in fewer bits; of one on meta, the sizes.

    Args:
        weight_OH: a plain tensor; not kept.
    """
    if weight_OH.is_meta:
        return QuantizedWeight(kind, _sizes(weight_OH, kind), None, weight_OH.shape, weight_OH.dtype)
    from bitsandbytes import functional  # pyright: ignore[reportMissingImports]

    if kind == "int8":
        codes_OH, scale_O, _ = functional.int8_vectorwise_quant(weight_OH.half())  # on a GPU it takes no other dtype
        return QuantizedWeight(kind, [codes_OH, scale_O], None, weight_OH.shape, weight_OH.dtype)
    packed, state = functional.quantize_4bit(
        weight_OH.contiguous(), blocksize=BLOCK, compress_statistics=True, quant_type="nf4"
    )
    inner: Any = state.state2
    parts = [packed, state.absmax, state.code, state.offset, inner.absmax, inner.code]
    return QuantizedWeight(kind, parts, state, weight_OH.shape, weight_OH.dtype)


def _sizes(weight_OH: torch.Tensor, kind: Quantization) -> list[torch.Tensor]:
    """The parts of `quantize`, on meta."""
    if kind == "int8":
        return [weight_OH.to(torch.int8), weight_OH.new_empty(len(weight_OH), dtype=torch.float32)]
    count = weight_OH.numel()
    scales = -(-count // BLOCK)
    packed = weight_OH.new_empty(-(-count // 2), 1, dtype=torch.uint8)
    floats = (16, 1, -(-scales // SCALES_BLOCK), 256)
    tables = [weight_OH.new_empty(size, dtype=torch.float32) for size in floats]
    return [packed, weight_OH.new_empty(scales, dtype=torch.uint8), *tables]


def quantize_layers(model: nn.Module, kind: Quantization) -> None:
    """Quantize the linear layers of a model's attention and FFNs, in place."""
    for name, parameter in list(model.named_parameters()):
        if QUANTIZED.fullmatch(name):
            module, _, last = name.rpartition(".")
            held = nn.Parameter(quantize(parameter.detach(), kind), requires_grad=False)
            setattr(model.get_submodule(module), last, held)


def stored_bytes(parameter: torch.Tensor) -> int:
    """What a parameter takes in memory."""
    if isinstance(parameter, QuantizedWeight):
        return parameter.stored_bytes
    return parameter.numel() * parameter.itemsize


def require_bitsandbytes(flag: str) -> None:
    """Refuse an option that needs bitsandbytes where it is not installed.

    Raises:
        UserError: names the option and the extra.
    """
    if find_spec("bitsandbytes") is None:
        raise UserError(f"{flag} needs bitsandbytes, which is not installed", hint="pip install 'higgs-tune[quantize]'")
