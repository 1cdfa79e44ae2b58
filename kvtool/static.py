"""A layer of the compressed cache whose attention of one new token has static shapes.

Everything whose size changes from step to step is a buffer of fixed size and a number on the device: the exact tokens
lie in a buffer that the newest is written into, the packed pages in tensors with room to grow.

    tail   | sinks | most recent tokens ......... | newest | free |      length: tokens before the newest
    pages  | 0 | 1 | 2 | ...................... | free ......... |      pages: in use, per sequence
"""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from kvtool import attention
from kvtool.attention import Attended
from kvtool.cache import CompressedLayer


class Counters:
    """The numbers on the device that all layers share.

    length: int64 [1], tokens in the tail. pages: int32 [B], compressed pages. positions: of the tokens there is room
    for, by first position and number.
    """

    def __init__(self, batch: int, device: torch.device) -> None:
        self.length = torch.zeros(1, dtype=torch.int64, device=device)
        self.pages = torch.zeros(batch, dtype=torch.int32, device=device)
        self._positions: dict[tuple[int, int], Tensor] = {}

    def positions(self, start: int, tokens: int) -> Tensor:
        """int64 [tokens], from ``start`` on: one tensor for all layers, kept as long as this object."""
        span = (start, tokens)
        if span not in self._positions:
            self._positions[span] = torch.arange(start, start + tokens, device=self.length.device)
        return self._positions[span]


class StaticLayer(CompressedLayer):
    """A compressed layer whose attention of one new token has static shapes. It takes over ``layer``'s tokens.

    ``keys`` and ``values`` are views of the used part of the buffers; the host's ``filled`` counts it.
    """

    def __init__(self, layer: CompressedLayer, counters: Counters, *, spare: int) -> None:
        super().__init__(layer.method, layer.layer, layer.policy, layer.backend)
        self.dtype, self.device, self.is_initialized = layer.keys.dtype, layer.keys.device, True
        self.parts, self.carry, self.counters = layer.parts, layer.carry, counters
        B, H, held, D = layer.keys.shape
        room = max(held, self.policy.sinks + self.policy.window + spare)
        # not inference tensors, wherever this is called: steps may be outside inference mode
        with torch.inference_mode(False):
            buffers = [torch.zeros(B, H, room, D, dtype=self.dtype, device=self.device) for _ in range(2)]
        self.tail = buffers[0], buffers[1]
        fused = layer.backend.kernel is not None
        self._early = self.parts.growing and getattr(layer.backend.kernel, "FIRST_IS_WHOLE", False)
        self._attend_tail = import_module("kvtool.kernels.tail").attend_tail if fused else _attend_tail
        self.queries: Tensor | None = None
        self.hold(layer.keys, layer.values)

    def hold(self, keys: Tensor, values: Tensor) -> None:
        """Have ``keys`` and ``values`` [B, H, T, D] in the buffers."""
        for buffer, held in zip(self.tail, (keys, values), strict=True):
            buffer[:, :, : held.shape[2]] = held
        self.show(keys.shape[2])

    def show(self, filled: int) -> None:
        """Say that the first ``filled`` tokens of the buffers are in use."""
        self.filled = filled
        self.keys, self.values = (buffer[:, :, :filled] for buffer in self.tail)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take in one new token [B, H, 1, D] and return it alone; :meth:`attend` writes it into the buffers."""
        self.fresh, self.fresh_values = key_states, value_states
        return key_states, value_states

    def attend(self, queries: Tensor, *, scale: float, softcap: float | None) -> Tensor:
        """Attention of the new token's ``queries`` [B, HQ, 1, D] over everything; [B, HQ, 1, D]."""
        assert self.fresh is not None
        self.queries = queries
        parts = []
        for run, start, tokens in self.parts.whole():
            pages = self.counters.pages if self.parts.growing else None
            positions = self.counters.positions(start, tokens)
            part = self.backend.attend(
                self.method, queries, run, self.layer, positions=positions, scale=scale, softcap=softcap, pages=pages
            )
            parts.append(part)
        packed = parts[0] if len(parts) == 1 else attention.merge(*parts)
        new, length = (self.fresh, self.fresh_values), self.counters.length
        attended: Tensor = self._attend_tail(
            queries, new, self.tail, length, packed, scale=scale, softcap=softcap, early=self._early
        )
        return attended

    def settle(self, queries: Tensor | None) -> None:
        """Nothing during the step: :meth:`compress` follows it."""

    def compress(self) -> None:
        """Compress what has left the window, as :meth:`CompressedLayer.settle` does."""
        super().settle(self.queries)
        self.hold(self.keys, self.values)

    def turn(self, at: Tensor, positions: Tensor) -> Tensor:
        """As :meth:`compress`, of one block whose place is known to the device alone; whether it is finite.

        at: int64 [1], blocks before it. positions: int64 [block], of its tokens.
        """
        sinks, window, block = self.policy.sinks, self.policy.window, len(positions)
        keys, values = (x[:, :, sinks : sinks + block] for x in self.tail)
        kv, _ = self.backend.compress(self.method, keys, values, self.layer, positions=positions)
        # codes and gains alone would hide what was not finite
        fields = [x for x in (keys, values, *kv) if isinstance(x, Tensor) and x.is_floating_point()]
        finite = torch.stack([x.isfinite().all() for x in fields]).all()
        self.parts.write(kv, at)
        for x in self.tail:
            x[:, :, sinks : sinks + window] = x[:, :, sinks + block : sinks + block + window].clone()
        return finite

    def turned(self, block: int) -> None:
        """Count what :meth:`turn` did."""
        self.parts.advance(block)
        self.show(self.filled - block)

    def released(self) -> CompressedLayer:
        """The same tokens in a layer that grows."""
        layer = CompressedLayer(self.method, self.layer, self.policy, self.backend)
        layer.lazy_initialization(self.keys, self.values)
        layer.parts, layer.carry = self.parts, self.carry
        layer.keys, layer.values = self.keys.clone(), self.values.clone()
        return layer


def _attend_tail(
    queries: Tensor,
    new: tuple[Tensor, Tensor],
    tail: tuple[Tensor, Tensor],
    length: Tensor,
    packed: Attended,
    *,
    scale: float,
    softcap: float | None,
    early: bool,
) -> Tensor:
    """The reference of ``kernels/tail.py``."""
    keys, values = (buffer.index_copy_(2, length, token) for buffer, token in zip(tail, new, strict=True))
    beyond = torch.arange(keys.shape[2], device=length.device) > length
    bias = torch.zeros(beyond.shape, device=length.device).masked_fill(beyond, -torch.inf)
    exact = attention.attend(queries, keys, values, bias.expand(*keys.shape[:2], -1), scale=scale, softcap=softcap)
    return attention.merge(exact, packed).out.to(queries.dtype)
