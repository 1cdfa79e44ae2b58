"""What a decode loop costs: milliseconds between two points, a step as one CUDA graph, and the peak of memory."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def graphed(step: Callable[[], Tensor]) -> Iterator[Callable[[], Tensor]]:
    """A step as one CUDA graph: what it returns is overwritten by every replay."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()

    def replay() -> Tensor:
        graph.replay()
        return out

    yield replay


def median(step: Callable[[], Any], repetitions: int, device: torch.device) -> tuple[float, float]:
    """Milliseconds of ``step``, and the distance between their quartiles."""
    times = []
    for _ in range(repetitions):
        interval = Interval(device)
        step()
        interval.end()
        times.append(interval)
    synchronize(device)
    each = sorted(interval.ms() for interval in times)
    return statistics.median(each), each[3 * len(each) // 4] - each[len(each) // 4]


class Interval:
    """Milliseconds from here to :meth:`end`."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks = [self._mark()]

    def end(self) -> None:
        """Mark the end."""
        self._marks.append(self._mark())

    def ms(self) -> float:
        """What it took; on a GPU after :func:`synchronize`."""
        first, last = self._marks
        elapsed: float = first.elapsed_time(last) if self._cuda else 1e3 * (last - first)
        return elapsed

    def _mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def empty(device: torch.device) -> None:
    """Give unused memory back to the device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def reset_peak(device: torch.device) -> None:
    """Begin to watch the peak of memory."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak(device: torch.device) -> dict[str, int | None]:
    """Bytes allocated at most since; None without a GPU."""
    return {"peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None}
