"""The compressed tokens of one layer, as a method left them, growing without copying the past at every step."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from kvtool.methods.base import mapped, nbytes

# spare room on growth: one copy of the past per quarter of its length
_GROWTH = 1.25


class Parts:
    """Runs of compressed tokens in order.

    growing: the method compresses in blocks, so every field of a run grows along dimension 2 and there is one run.
    Otherwise each call to compress stays a run of its own.
    """

    def __init__(self, *, growing: bool) -> None:
        self.growing = growing
        self.tokens = 0
        self._runs: list[Any] = []
        self._spans: list[tuple[int, int]] = []  # first position and tokens of each run
        self._lengths: list[int] = []  # used extent of dimension 2, for the growing run

    def __len__(self) -> int:
        return len(self._runs)

    def append(self, kv: Any, start: int, tokens: int) -> None:
        """Add ``tokens`` compressed tokens that begin at position ``start``."""
        self.tokens += tokens
        if not self.growing or not self._runs:
            self._runs.append(kv)
            self._spans.append((start, tokens))
            if self.growing:
                self._lengths = [x.shape[2] if isinstance(x, Tensor) else 0 for x in kv]
            return
        run = self._runs[0]
        fields = [
            _extend(old, used, new) if isinstance(old, Tensor) else old
            for old, used, new in zip(run, self._lengths, kv, strict=True)
        ]
        self._lengths = [
            used + x.shape[2] if isinstance(x, Tensor) else 0 for used, x in zip(self._lengths, kv, strict=True)
        ]
        self._runs[0] = type(run)(*fields)
        first, before = self._spans[0]
        self._spans[0] = (first, before + tokens)

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


def _extend(old: Tensor, used: int, new: Tensor) -> Tensor:
    needed = used + new.shape[2]
    if needed > old.shape[2]:
        grown = old.new_empty((*old.shape[:2], max(needed, int(needed * _GROWTH)), *old.shape[3:]))
        grown[:, :, :used] = old[:, :, :used]
        old = grown
    old[:, :, used:needed] = new
    return old
