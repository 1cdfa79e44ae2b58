"""The compressed tokens of one layer, as a method left them, growing without copying the past at every step."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from kvtool.methods.base import mapped, nbytes
from kvtool.packing import PAGE

# spare room on growth: one copy of the past per quarter of its length
_GROWTH = 1.25
_ROUNDED = 2 * PAGE  # tokens: whole blocks of every method


class Parts:
    """Runs of compressed tokens in order.

    growing: the method compresses in blocks, so every field of a run grows along dimension 2 and there is one run.
    Otherwise each call to compress stays a run of its own.
    """

    def __init__(self, *, growing: bool) -> None:
        self.growing = growing
        self.tokens = 0
        self.capacity = 0  # tokens that a growing run has room for before it is moved
        self._runs: list[Any] = []
        self._spans: list[tuple[int, int]] = []  # first position and tokens of each run
        self._lengths: list[int] = []  # used extent of dimension 2, for the growing run

    def __len__(self) -> int:
        return len(self._runs)

    def append(self, kv: Any, start: int, tokens: int) -> None:
        """Add ``tokens`` compressed tokens that begin at position ``start``."""
        if not self.growing or not self._runs:
            self.tokens += tokens
            self._runs.append(kv)
            self._spans.append((start, tokens))
            if self.growing:
                self._lengths = [x.shape[2] if isinstance(x, Tensor) else 0 for x in kv]
                self.reserve(self.capacity)
            return
        if self.tokens + tokens > self.capacity:
            self.reserve(int(_GROWTH * (self.tokens + tokens)))
        for i, (old, new) in enumerate(zip(self._runs[0], kv, strict=True)):
            if isinstance(old, Tensor):
                used, self._lengths[i] = self._lengths[i], self._lengths[i] + new.shape[2]
                old[:, :, used : self._lengths[i]] = new
        first, before = self._spans[0]
        self._spans[0] = (first, before + tokens)
        self.tokens += tokens

    def room(self, tokens: int) -> bool:
        """Whether ``tokens`` more fit where the growing run is."""
        return self.growing and bool(self._runs) and self.tokens + tokens <= self.capacity

    def write(self, kv: Any, at: Tensor) -> None:
        """Write a block into the growing run where ``at``, int64 [1], says: how many such blocks come before it.

        All on the device, so that it can be captured; :meth:`advance` counts the tokens.
        """
        for old, new in zip(self._runs[0], kv, strict=True):
            if isinstance(old, Tensor) and new.numel():
                n = new.shape[2]
                old.index_copy_(2, n * at + torch.arange(n, device=at.device), new)

    def advance(self, tokens: int) -> None:
        """Count ``tokens`` that were written into the room there is."""
        self._lengths = [used + used * tokens // self.tokens for used in self._lengths]
        first, before = self._spans[0]
        self._spans[0] = (first, before + tokens)
        self.tokens += tokens

    def reserve(self, capacity: int) -> None:
        """Make room for ``capacity`` tokens in all: until then a growing run's tensors stay where they are."""
        self.capacity = max(self.capacity, -(-capacity // _ROUNDED) * _ROUNDED)
        if self.growing and self._runs and self.capacity > self.tokens:
            fields = zip(self._runs[0], self._lengths, strict=True)
            self._runs[0] = type(self._runs[0])(
                *(
                    _moved(x, used, -(-used * self.capacity // self.tokens)) if isinstance(x, Tensor) else x
                    for x, used in fields
                )
            )

    def whole(self) -> list[tuple[Any, int, int]]:
        """Each run with its room to grow, its first position and the tokens it has room for."""
        return [
            (run, start, max(tokens, self.capacity) if self.growing else tokens)
            for run, (start, tokens) in zip(self._runs, self._spans, strict=True)
        ]

    def replace(self, kv: Any, start: int, tokens: int) -> None:
        """Hold ``kv`` alone, ``tokens`` compressed tokens from position ``start`` on."""
        self.tokens, self._runs, self._spans = tokens, [kv], [(start, tokens)]

    def read(self, device: torch.device) -> Iterator[tuple[Any, Tensor]]:
        """Each run with the positions [T] its tokens were compressed at."""
        for run, (start, tokens) in zip(self._runs, self._spans, strict=True):
            yield self._used(run), torch.arange(start, start + tokens, device=device)

    def map(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply ``function`` to every tensor: beams and batches are reordered along dimension 0."""
        self._runs = [mapped(run, function) for run in self._runs]

    @property
    def nbytes(self) -> int:
        """Bytes in use."""
        return sum(nbytes(self._used(run)) for run in self._runs)

    @property
    def spare(self) -> int:
        """Bytes allocated ahead of use."""
        return sum(nbytes(run) for run in self._runs) - self.nbytes

    def _used(self, run: Any) -> Any:
        if not self.growing:
            return run
        return type(run)(
            *(x.narrow(2, 0, n) if isinstance(x, Tensor) else x for x, n in zip(run, self._lengths, strict=True))
        )


def _moved(old: Tensor, used: int, extent: int) -> Tensor:
    """``old`` with room for ``extent`` in dimension 2; what is not used yet is 0, so that it may be read and masked."""
    if extent <= old.shape[2]:
        return old
    # not an inference tensor, wherever it is first needed: those cannot be written to outside inference mode
    with torch.inference_mode(False):
        grown = torch.zeros((*old.shape[:2], extent, *old.shape[3:]), dtype=old.dtype, device=old.device)
    grown[:, :, :used] = old[:, :, :used]
    return grown
