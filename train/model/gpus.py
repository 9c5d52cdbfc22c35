"""GPUs that the cost model knows: memory, bandwidth and bfloat16 peak, from NVIDIA's data sheets and whitepapers.

Peaks are of dense products in bfloat16 that accumulate in float32; where a sheet gives the rate with sparsity, half of
it. Sheets call GiB "GB". A GPU whose name is not here has no estimate, and its metrics have no `mfu`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from higgs_tune.shards.errors import UserError

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """One model of GPU.

    Attributes:
        name: as in the name that CUDA gives, but for a memory size. memory_gib: what a program sees, so without ECC's
            sixteenth where the card keeps it in GDDR6. bytes_per_second: of device memory. flops: bfloat16 FLOP/s.
        source: of the three. measured_mfu: model FLOPs a second over `flops` of a measured training step; None where
            nobody has measured it, and speed is then an estimate.
    """

    name: str
    memory_gib: float
    bytes_per_second: float
    flops: float
    source: str
    measured_mfu: float | None = None

    @property
    def memory_bytes(self) -> float:
        return self.memory_gib * GIB

    @property
    def short_names(self) -> set[str]:
        """The names that a user may write, in lower case without spaces and hyphens: rtx4060ti16gb, 4060ti, 4060."""
        words = self.name.lower().split()
        own = words[1:] if words[0] == "rtx" else words
        texts = {"".join(own[:count]) for count in range(1, len(own) + 1)}
        return texts | {f"rtx{text}" for text in texts if words[0] == "rtx"}


GPUS = (
    Gpu("B200", 180, 8.0e12, 2250e12, "DGX B200 data sheet, an eighth of it"),
    Gpu("H200", 141, 4.8e12, 989e12, "H200 data sheet (SXM)", 0.44),  # docs/benchmarks.md
    Gpu("H100", 80, 3.35e12, 989e12, "H100 data sheet (SXM)"),
    Gpu("H100 NVL", 94, 3.9e12, 835e12, "H100 NVL data sheet"),
    Gpu("H100 PCIe", 80, 2.0e12, 756e12, "H100 data sheet (PCIe)"),
    Gpu("A100 80GB", 80, 2.039e12, 312e12, "A100 data sheet (SXM)"),
    Gpu("A100 40GB", 40, 1.555e12, 312e12, "A100 data sheet (SXM)"),
    Gpu("L40S", 45, 0.864e12, 362e12, "L40S data sheet"),
    Gpu("L4", 22.5, 0.3e12, 121e12, "L4 data sheet"),
    Gpu("A10", 22.5, 0.6e12, 125e12, "A10 data sheet"),
    Gpu("RTX 6000 Ada", 48, 0.96e12, 364e12, "RTX 6000 Ada data sheet"),
    Gpu("RTX A6000", 48, 0.768e12, 154.8e12, "GA102 whitepaper"),
    Gpu("RTX 5090", 32, 1.792e12, 209.5e12, "RTX Blackwell whitepaper"),
    Gpu("RTX 4090", 24, 1.008e12, 165.2e12, "Ada whitepaper"),
    Gpu("RTX 4080", 16, 0.717e12, 97.5e12, "Ada whitepaper"),
    Gpu("RTX 4070 Ti", 12, 0.504e12, 80.2e12, "Ada whitepaper"),
    Gpu("RTX 4060 Ti 16GB", 16, 0.288e12, 44.1e12, "GeForce page; peak: twice float32's"),
    Gpu("RTX 3090", 24, 0.936e12, 71e12, "GA102 whitepaper"),
    Gpu("RTX 3060 12GB", 12, 0.36e12, 25.5e12, "GeForce page; peak: twice float32's"),
)
_OTHER_CARD = r"(?! ?(ti|super|d|laptop|max-q|mobile|ada)\b)"  # what a longer name of another card goes on with


def gpu_named(text: str) -> Gpu:
    """The GPU of a name as people write it: h200, 4090, RTX-4090, a100, a100-40gb; the first of several.

    Raises:
        UserError: it is not known; names those that are.
    """
    plain = re.sub(r"nvidia|geforce|[\s_-]", "", text.lower())
    known = next((gpu for gpu in GPUS if plain in gpu.short_names), None)
    if known is None:
        raise UserError("--gpu names no GPU that the cost model knows", got=text,
                        expected=f"one of {', '.join(gpu.name for gpu in GPUS)}")  # fmt: skip
    return known


def gpu_of_device(name: str) -> Gpu | None:
    """The GPU of the name that CUDA gives a device; None where it is not known."""
    bare = {re.sub(r" \d+GB$", "", gpu.name): gpu for gpu in reversed(GPUS)}
    found = [known for known in bare if re.search(rf"\b{known}\b{_OTHER_CARD}", name, re.IGNORECASE)]
    return bare[max(found, key=len)] if found else None
