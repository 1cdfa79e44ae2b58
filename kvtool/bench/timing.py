"""Timing: CUDA graphs over buffers that do not fit the cache, medians and spread; plain repetition on a CPU."""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

Step = Callable[[int], Any]  # one decode step on the i-th copy of the data


class Timing(NamedTuple):
    """Milliseconds of one step: the median of the repetitions, and the distance between their quartiles."""

    ms: float
    spread: float


def time_step(step: Step, copies: int, device: torch.device) -> Timing:
    """Time ``step`` over ``copies`` of its data in turn."""
    return _time_cuda(step, copies) if device.type == "cuda" else _time_cpu(step, copies)


def copies_needed(size: int, device: torch.device) -> int:
    """How many copies of ``size`` bytes it takes that none is still in the cache when its turn comes."""
    if device.type != "cuda":
        return 1
    cache: int = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, -(-3 * cache // size))


def _time_cuda(step: Step, copies: int) -> Timing:
    steps = max(8, copies)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step(0)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(steps):
            step(i % copies)
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(15):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / steps)
    return _summary(times)


def _time_cpu(step: Step, copies: int, budget: float = 3.0) -> Timing:
    step(0)
    times: list[float] = []
    begun = time.perf_counter()
    while len(times) < 3 or (len(times) < 15 and time.perf_counter() - begun < budget):
        start = time.perf_counter()
        step(len(times) % copies)
        times.append(1e3 * (time.perf_counter() - start))
    return _summary(times)


def _summary(times: list[float]) -> Timing:
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    return Timing(median, high - low)


def bandwidth(device: torch.device) -> dict[str, float]:
    """Bytes per second that this machine copies (read plus written) and reads, from 1 GiB (CPU: 128 MiB)."""
    size = 1 << (30 if device.type == "cuda" else 27)
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    copy = time_step(lambda _: target.copy_(source), 1, device)
    read = time_step(lambda _: source.amax(), 1, device)
    return {"copy": 2 * size / copy.ms * 1e3, "read": size / read.ms * 1e3}
