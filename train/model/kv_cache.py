"""Keys and values of the positions that running sequences have seen.

Shapes: B running sequences, N positions of prompts, k key heads, h = k g query heads, L cached positions, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


class KeyValueCache:
    """Keys and values of every attention module, and how many positions each slot holds of each kind of span.

    Memory is allocated once, at the first prompt: [slots, k, capacity, D] for keys and for values of each module.
    """

    def __init__(self, slots: int, capacity: int) -> None:
        self.slots, self.capacity = slots, capacity
        self._keys: list[torch.Tensor] = []
        self._values: list[torch.Tensor] = []
        self._module = 0

    def begin(self) -> None:
        """Before each pass over the layers: the next attention module is the first."""
        self._module = 0

    def move(self, source: int, target: int) -> None:
        """Put a slot's positions into another slot."""
        for memory in (*self._keys, *self._values):
            memory[target] = memory[source]

    def _memories(self, k_NkD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        number, self._module = self._module, self._module + 1
        if number == len(self._keys):
            shape = (self.slots, k_NkD.shape[1], self.capacity, k_NkD.shape[2])
            self._keys.append(k_NkD.new_zeros(shape))
            self._values.append(k_NkD.new_zeros(shape))
        return self._keys[number], self._values[number]

    def store(self, k_NkD: torch.Tensor, v_NkD: torch.Tensor, lengths: Sequence[int], slots: Sequence[int]) -> None:
        """Keep the keys and values of whole prompts."""
        keys, values = self._memories(k_NkD)
        for memory, rows in ((keys, k_NkD), (values, v_NkD)):
            for slot, part in zip(slots, rows.split(list(lengths)), strict=True):
                memory[slot, :, : len(part)] = part.transpose(0, 1)

    def attend(
        self, q_BhD: torch.Tensor, k_BkD: torch.Tensor, v_BkD: torch.Tensor, slots: torch.Tensor, held: torch.Tensor
    ) -> torch.Tensor:
        """Keep one position of each sequence, and attend to all that it has: [B, h, D].

        Args:
            slots: int64 [B]. held: positions that each slot holds so far, int64 [B].
        """
        keys, values = self._memories(k_BkD)
        if not len(held):
            return q_BhD
        keys[slots, :, held], values[slots, :, held] = k_BkD, v_BkD
        q_BkgD = q_BhD.unflatten(1, (keys.shape[1], -1)) * q_BhD.shape[-1] ** -0.5
        if keys.device.type == "cpu":  # one by one: sums of other lengths would round in another order
            parts = [
                _attended(q_BkgD[i : i + 1], keys[slot, None, :, : count + 1], values[slot, None, :, : count + 1])
                for i, (slot, count) in enumerate(zip(slots.tolist(), held.tolist(), strict=True))
            ]
            return torch.cat(parts).flatten(1, 2)
        count = int(held.max()) + 1
        keys_BkLD, values_BkLD = (self._of(memory, slots)[:, :, :count] for memory in (keys, values))
        later_BL = torch.arange(count, device=held.device) > held[:, None]
        return _attended(q_BkgD, keys_BkLD, values_BkLD, later_BL[:, None, None]).flatten(1, 2)

    @staticmethod
    def _of(memory: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """The slots' part, without a copy where they are the first ones in order."""
        in_order = bool((slots == torch.arange(len(slots), device=slots.device)).all())
        return memory[: len(slots)] if in_order else memory.index_select(0, slots)


def _attended(
    q_BkgD: torch.Tensor, keys_BkLD: torch.Tensor, values_BkLD: torch.Tensor, never: torch.Tensor | None = None
) -> torch.Tensor:
    """Attention of one position of each sequence over its cached ones: [B, k, g, D]. never: positions to leave out."""
    score_BkgL = (q_BkgD @ keys_BkLD.transpose(2, 3)).float()
    if never is not None:
        score_BkgL = score_BkgL.masked_fill(never, -torch.inf)
    return score_BkgL.softmax(-1).to(values_BkLD.dtype) @ values_BkLD
