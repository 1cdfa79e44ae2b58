"""The benchmark itself: check the numerics, then time compressed and full attention side by side at every length."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvtool import packing
from kvtool.backends import Backend, choose_backend
from kvtool.bench.baselines import COMPRESSED, time_full
from kvtool.bench.layout import check_layout, lay_out, page_counts
from kvtool.bench.machine import CARDS, machine
from kvtool.bench.numerics import attend, check_numerics, judge, reads
from kvtool.bench.subject import Subject
from kvtool.bench.timing import Timing, bandwidth, copies_needed, time_step
from kvtool.methods.base import mapped

CPU_BYTES = 16 << 20  # of the full cache, what a CPU is asked to read in one step


@dataclass(frozen=True)
class Request:
    """What to measure. ``contexts`` in tokens; ``baselines`` from baselines.BASELINES; ``layout`` from layout.LAYOUTS.

    ragged: the sequences of a batch have from all of the context down to half of it.
    """

    contexts: Sequence[int]
    batches: Sequence[int] = (1,)
    baselines: Sequence[str] = ("flash", "cudnn")
    backend: str = "auto"
    layout: str = "whole"
    ragged: bool = False


def bench(subject: Subject, request: Request, device: torch.device) -> Iterator[dict[str, Any]]:
    """Records in order: ``machine``, ``step`` per context and batch, ``crossover`` per batch, on a CPU ``predicted``.

    Raises:
        BackendError: the back end cannot run, or its output is wrong.
    """
    subject = subject.to(device)
    backend = choose_backend(request.backend, subject.method, device, [subject.shape])
    check_layout(request.layout, request.ragged, backend, subject)
    measured = bandwidth(device)
    yield {
        "record": "machine",
        **machine(device),
        "subject": subject.origin,
        "backend": backend.name,
        "copy_bytes_per_s": measured["copy"],
        "read_bytes_per_s": measured["read"],
        "bytes_per_token": subject.bytes_per_token,
        "full_bytes_per_token": subject.full_bytes_per_token,
    }
    error = check_numerics(subject, backend, device, layout=request.layout, ragged=request.ragged)
    speedups: dict[int, dict[int, float | None]] = {batch: {} for batch in request.batches}
    for batch in request.batches:
        for context in held(subject, request.contexts, batch, device):
            record = _step(subject, backend, context, batch, request, device, measured["read"])
            yield record | {"relative_error": error, "judged_by": judge(subject.method)}
            if "ms" in record:
                speedups[batch][context] = record["speedup"]
    for batch, found in speedups.items():
        yield {"record": "crossover", "batch": batch, "context": crossover(found), "measured": len(found)}
    if device.type == "cpu":
        yield from _predictions(subject, request)


def crossover(speedups: Mapping[int, float | None]) -> int | None:
    """The shortest length from which on every length measured wins; None if the longest does not."""
    found = None
    for context, speedup in sorted(speedups.items(), reverse=True):
        if speedup is None or speedup < 1:
            break
        found = context
    return found


def held(subject: Subject, contexts: Sequence[int], batch: int, device: torch.device) -> list[int]:
    """The lengths that are run: all on a GPU, on a CPU those that it can hold and read in reasonable time."""
    if device.type != "cpu":
        return list(contexts)
    longest = max(packing.PAGE, CPU_BYTES // (subject.full_bytes_per_token * batch))
    return sorted({min(context, longest) for context in contexts})


def _step(
    subject: Subject,
    backend: Backend,
    context: int,
    batch: int,
    request: Request,
    device: torch.device,
    read: float,
) -> dict[str, Any]:
    # the tokens of the last page are in the exact window
    counts, lengths = _lengths(context, batch, request.ragged)
    size = int(subject.bytes_per_token * packing.PAGE * sum(counts))
    record = {
        "record": "step",
        "context": context,
        "tokens": packing.PAGE * counts[0],
        "batch": batch,
        "lengths": lengths,
        "layout": request.layout,
        "bytes": size,
        "full_bytes": subject.full_bytes_per_token * sum(lengths),
    }
    if counts[0] == 0:
        return record | {"not_run": f"shorter than one page of {packing.PAGE} tokens"}
    with torch.inference_mode():
        ours, part = _time_compressed(subject, backend, counts, request.layout, size, device)
        theirs = {n: time_full(subject, lengths, n, device) for n in _baselines(request.baselines, device)}
    times = {name: found.ms for name, found in theirs.items() if isinstance(found, Timing)}
    best = min((ms for name, ms in times.items() if name not in COMPRESSED), default=None)
    size = part.get("bytes", size)
    return record | {
        **part,
        "ms": ours.ms,
        "spread_ms": ours.spread,
        "bytes_per_s": size / ours.ms * 1e3,
        "of_read_bandwidth": size / ours.ms * 1e3 / read,
        "baselines_ms": {name: times.get(name) for name in theirs},
        "baselines_not_run": {name: reason for name, reason in theirs.items() if isinstance(reason, str)},
        "speedup": best and best / ours.ms,
    }


def _time_compressed(
    subject: Subject, backend: Backend, counts: Sequence[int], layout: str, size: int, device: torch.device
) -> tuple[Timing, dict[str, Any]]:
    batch = len(counts)
    first = subject.cache(packing.PAGE * max(counts), batch, device)
    part = _part(subject, backend, first, packing.PAGE * max(counts), batch, device)
    copies = copies_needed(part.get("bytes", size), device)
    laid = lay_out(first, layout, counts)
    caches = [laid, *(laid._replace(kv=mapped(laid.kv, torch.clone)) for _ in range(copies - 1))]
    queries = subject.queries(batch, device)
    for cache in caches:
        # a kernel may look at a part once before its step can be captured
        attend(subject, backend, queries, cache)
    return time_step(lambda i: attend(subject, backend, queries, caches[i]), copies, device), part


def _part(subject: Subject, backend: Backend, kv: Any, tokens: int, batch: int, device: torch.device) -> dict[str, Any]:
    """Bytes of a step that reads a part of the cache and the shares of it, or the share of tokens that is in the cache.

    A row is counted once for all queries of a group.
    """
    if not subject.reads_a_part:
        share = subject.kept(kv, tokens)
        return {} if share is None else {"kept": share}
    positions = torch.arange(kv.keys.shape[2], device=device)
    selected = reads(subject, backend, subject.queries(batch, device), kv, positions)
    if selected is None:
        return {}
    kept, rescored = (mask.flatten(2, 3).any(2) for mask in selected)
    row = kv.keys.shape[-1] * kv.keys.element_size()
    index = sum(x.numel() * x.element_size() for name, x in kv._asdict().items() if name not in ("keys", "values"))
    return {
        "bytes": index + row * int(rescored.sum() + kept.sum()),
        "kept": float(kept.float().mean()),
        "rescored": float(rescored.float().mean()),
    }


def _baselines(wanted: Sequence[str], device: torch.device) -> Sequence[str]:
    """A CPU has torch's plain attention, whatever was asked for; the others then say that they did not run."""
    return wanted if device.type == "cuda" or "math" in wanted else ("math", *wanted)


def _lengths(context: int, batch: int, ragged: bool) -> tuple[list[int], list[int]]:
    """Compressed pages, and tokens in all, of each sequence."""
    counts = page_counts(context // packing.PAGE, batch, ragged)
    return counts, [context - packing.PAGE * (counts[0] - count) for count in counts]


def _predictions(subject: Subject, request: Request) -> Iterator[dict[str, Any]]:
    for batch in request.batches:
        for context in request.contexts:
            tokens = sum(_lengths(context, batch, request.ragged)[1])
            yield {
                "record": "predicted",
                "context": context,
                "batch": batch,
                "floor_ms": {
                    card: {
                        "compressed": 1e3 * subject.bytes_per_token * tokens / rate,
                        "full": 1e3 * subject.full_bytes_per_token * tokens / rate,
                    }
                    for card, rate in CARDS.items()
                },
            }
