"""Whether a back end computes what its method means: asked before anything is timed."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvtool import sparse
from kvtool.attention import relative_error
from kvtool.backends import Backend
from kvtool.bench.layout import Laid, lay_out, page_counts
from kvtool.bench.subject import Subject
from kvtool.errors import BackendError
from kvtool.methods.base import Method, mapped
from kvtool.packing import PAGE

WRONG = 3e-3  # relative L2 error of the output beyond which nothing is timed


def check_numerics(
    subject: Subject, backend: Backend, device: torch.device, *, layout: str = "whole", ragged: bool = False
) -> float:
    """Relative L2 error of the back end against :func:`yardstick` over the same compressed cache, laid out alike.

    Raises:
        BackendError: more than 3e-3: a fast wrong answer is not timed.
    """
    errors = []
    for tokens in (64, 1088):  # one page, and 17 of them: no power of two
        kv = subject.cache(tokens, 2, device)
        counts = page_counts(tokens // PAGE, 2, ragged)
        queries = subject.queries(2, device).float()
        found = attend(subject, backend, queries, lay_out(kv, layout, counts))
        exact = torch.cat([yardstick(subject, backend, *own) for own in _alone(queries, kv, counts)])
        errors.append(float(relative_error(found, exact)) if exact.any() else float(found.abs().max()))
    worst = max(errors, key=lambda error: (error != error, error))  # what is not a number is worst
    if not worst <= WRONG:
        raise BackendError(
            f"backend {backend.name}: expected a relative error of at most {WRONG:g} against {judge(subject.method)}, "
            f"found {worst:.2g}; nothing was timed: please report this"
        )
    return worst


def _alone(queries: Tensor, kv: Any, counts: Sequence[int]) -> Iterator[tuple[Tensor, Any, Tensor]]:
    """Queries, cache and positions of the sequences that have the same number of pages."""
    if len(set(counts)) == 1:
        yield queries, kv, torch.arange(PAGE * counts[0], device=queries.device)
        return
    for b, count in enumerate(counts):
        own = mapped(kv, partial(_first_pages, b=b, share=(count, max(counts))))
        yield queries[b : b + 1], own, torch.arange(PAGE * count, device=queries.device)


def _first_pages(x: Tensor, b: int, share: tuple[int, int]) -> Tensor:
    """A field of sequence ``b`` alone, of as many of its pages or tokens."""
    return x[b : b + 1, :, : x.shape[2] * share[0] // share[1]]


def judge(method: Method) -> str:
    """What the error is measured against: a method that estimates logits has no keys to attend to in float64."""
    return "the method's reference in float32" if _estimates(method) else "float64"


def yardstick(subject: Subject, backend: Backend, queries: Tensor, kv: Any, positions: Tensor) -> Tensor:
    """What the output [B, HQ, S, D] should be: float64 attention over what comes back, or the method's reference."""
    shape = subject.shape
    if _estimates(subject.method):
        return attend(subject, Backend("reference"), queries, Laid(kv, positions))
    keys, values, bias = subject.method.decompress(kv, subject.layer, positions=positions)
    scores = queries.double() @ keys.double().repeat_interleave(shape.group, 1).mT * shape.scale
    if shape.softcap is not None:
        scores = shape.softcap * torch.tanh(scores / shape.softcap)
    if bias is not None:
        scores = scores + bias.double().repeat_interleave(shape.group, 1)[:, :, None]
    selected = reads(subject, backend, queries, kv, positions)
    if selected is not None:
        scores = scores.masked_fill(~selected.kept.flatten(1, 2), -torch.inf)
    # a head that keeps nothing attends to nothing
    return scores.softmax(-1).nan_to_num() @ values.double().repeat_interleave(shape.group, 1)


def attend(subject: Subject, backend: Backend, queries: Tensor, laid: Laid) -> Tensor:
    """The output of one decode step."""
    shape = subject.shape
    return backend.attend(
        subject.method,
        queries,
        laid.kv,
        subject.layer,
        positions=laid.positions,
        scale=shape.scale,
        softcap=shape.softcap,
        pages=laid.pages,
        page_table=laid.page_table,
    ).out


def reads(subject: Subject, backend: Backend, queries: Tensor, kv: Any, positions: Tensor) -> sparse.Selection | None:
    """What a method that reads a part of the cache reads of it, [B, H, G, S, T]; None for all others."""
    found: Callable[..., sparse.Selection | None] | None
    found = getattr(backend.kernel or type(subject.method), "reads", None)
    if found is None:
        return None
    shape = subject.shape
    return found(
        subject.method, queries, kv, subject.layer, positions=positions, scale=shape.scale, softcap=shape.softcap
    )


def _estimates(method: Method) -> bool:
    return type(method).attend is not Method.attend and not hasattr(method, "reads")
