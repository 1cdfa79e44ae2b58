"""A whole model's decode step, in three ways, from a cache of random keys and values: no prompt is prefilled for it.

    transformers   the model as users run it: DynamicCache, scaled_dot_product_attention, launched from Python
    full           the best a full cache can do: fixed buffers, flash attention, the whole step one CUDA graph
    kvtool         the step that ``serve(capacity=...)`` replays (captured.py), compression of new pages included;
                   kernel by kernel where it cannot have static shapes, as serving does

The model has the named shape and random weights: bytes and launches do not depend on what they say.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from kvtool.backends import choose_backend
from kvtool.bench.intervals import Interval, empty, graphed, median, peak, reset_peak, synchronize
from kvtool.bench.machine import machine
from kvtool.bench.numerics import check_numerics
from kvtool.bench.subject import Subject
from kvtool.bench.whole_model import data_free, fill, random_cache, random_ids, random_model, repeated
from kvtool.calibration import Calibration
from kvtool.captured import CapturedDecoder, refuses
from kvtool.methods.base import Method, nbytes
from kvtool.models.attention import attention_replaced
from kvtool.models.geometry import cache_shape
from kvtool.packing import PAGE
from kvtool.runtime import serve
from kvtool.shapes import CacheShape

TOY_CONTEXT = 1024  # tokens, on a CPU
WAYS = ("kvtool", "full", "transformers")


@dataclass(frozen=True)
class Decode:
    """What to measure. context: tokens in the cache. prefill: tokens of a real prefill, 0: none.

    steps: tokens decoded by kvtool, of which every 64th compresses a page per layer and head.
    """

    context: int
    batches: Sequence[int] = (1,)
    backend: str = "auto"
    prefill: int = 16384
    steps: int = 192


def end_to_end(
    model_shape: str, calibration: Calibration | Method, request: Decode, device: torch.device
) -> Iterator[dict[str, Any]]:
    """Records in order: ``machine``, then ``decode`` for each batch and way, then ``prefill``.

    calibration: an artifact, or a method that needs no data. An artifact of as many heads and channels, but other
    layers, is used layer by layer over and over: what is read takes as long.

    Raises:
        InputError: the shape is not known, or the calibration is for other heads or channels.
    """
    toy = device.type == "cpu"
    if toy:
        context, prefill = min(request.context, TOY_CONTEXT), min(request.prefill, 256)
        request = replace(request, context=context, prefill=prefill, steps=min(request.steps, 8))
    model = random_model(model_shape, device)
    shape = cache_shape(model)
    made = repeated(calibration, shape) if isinstance(calibration, Calibration) else data_free(calibration, shape)
    error = _error(made, shape, request, device)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    yield {
        "record": "machine",
        **machine(device),
        "model_shape": f"toy, 2 layers, attention of {model_shape}" if toy else model_shape,
        "method": made.method.name,
        "fitted_to": made.provenance.get("fitted_to") or made.provenance.get("capture") or "nothing",
        "weights": "random",
        "weight_bytes": weights,
        "cache": "random keys and values; no prompt was prefilled",
        "relative_error": error,
    }
    for batch in request.batches:
        ms: dict[str, float] = {}
        for way in WAYS:
            empty(device)
            record = {"record": "decode", "way": way, "context": request.context, "batch": batch}
            try:
                found = _WAYS[way](model, made, request, batch)
            except torch.OutOfMemoryError:
                yield record | {"not_run": "out of memory"}
                continue
            ms[way] = found["ms"]
            yield record | found | {"tokens_per_s": 1e3 * batch / found["ms"]}
        ratios = {f"to_{way}": ms[way] / ms["kvtool"] if {way, "kvtool"} <= ms.keys() else None for way in WAYS[1:]}
        yield {"record": "ratio", "context": request.context, "batch": batch, **ratios, "speedup": ratios["to_full"]}
    if request.prefill:
        empty(device)
        yield {"record": "prefill", **_prefill(model, made, request)}


def _error(made: Calibration, shape: CacheShape, request: Decode, device: torch.device) -> float:
    """Of one layer against what its output should be, so that wrong code is not timed."""
    subject = Subject(made.method, made.layer(shape.compressible[0]), "").to(device)
    return check_numerics(subject, choose_backend(request.backend, made.method, device, [subject.shape]), device)


def _kvtool(model: PreTrainedModel, made: Calibration, request: Decode, batch: int) -> dict[str, Any]:
    device = model.device
    # the step is captured at the second token, compressing at the second block: neither is decoding
    warm = 3 if device.type == "cpu" else 3 + 2 * (made.method.block or PAGE)
    capacity = request.context + warm + request.steps
    with serve(model, made, backend=request.backend) as cache, torch.no_grad():
        fill(cache, model, request.context, batch, capacity)
        reset_peak(device)
        launched = refuses(cache)
        decoder = None if launched else CapturedDecoder(model, cache, capacity=capacity)
        ids = random_ids(model, batch, 1)

        def step() -> Tensor:
            if decoder:
                return decoder.step(ids)
            logits: Tensor = model(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1]
            return logits

        for _ in range(warm):
            logits = step()
        synchronize(device)
        begun, times = time.perf_counter(), []
        for _ in range(request.steps):
            # compressing after a step is not part of the next one's time, but of the whole
            times.append(Interval(device))
            logits = step()
            times[-1].end()
        synchronize(device)
        whole = 1e3 * (time.perf_counter() - begun) / request.steps
        size = cache.nbytes()
        each = sorted(interval.ms() for interval in times)
        return {
            "ms": whole,
            "step_ms": statistics.median(each),
            "spread_ms": each[3 * len(each) // 4] - each[len(each) // 4],
            "backend": cache.backend.name,
            "captures": decoder.captures if decoder else 0,
            **({"launched": launched} if launched else {}),
            "steps": request.steps,
            "cache_bytes": size.compressed + size.exact,
            "finite": bool(logits.isfinite().all()),
            **peak(device),
        }


def _full(model: PreTrainedModel, made: Calibration, request: Decode, batch: int) -> dict[str, Any]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    device, shape = model.device, cache_shape(model)
    newest = torch.tensor([request.context - 1], device=device)
    caches = [random_cache(layer, batch, request.context, model) for layer in shape.layers]
    which = [SDPBackend.FLASH_ATTENTION] if device.type == "cuda" else [SDPBackend.MATH]

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> tuple[Tensor, None]:
        keys, values = caches[module.layer_idx]
        keys.index_copy_(2, newest, key)
        values.index_copy_(2, newest, value)
        with sdpa_kernel(which):
            out = F.scaled_dot_product_attention(query, keys, values, scale=kwargs["scaling"], enable_gqa=True)
        return out.transpose(1, 2).contiguous(), None

    ids, positions = random_ids(model, batch, 1), torch.full((batch, 1), request.context - 1, device=device)
    nothing = torch.zeros(1, 1, 1, 1, device=device)  # a mask of four dimensions is handed on as it is

    def step() -> Tensor:
        logits: Tensor = model(input_ids=ids, position_ids=positions, attention_mask=nothing, use_cache=False).logits
        return logits

    with attention_replaced(model, "kvtool-full", attend, masks=False), torch.no_grad(), ExitStack() as stack:
        reset_peak(device)
        if device.type == "cuda":
            step = stack.enter_context(graphed(step))
        logits = step()
        ms, spread = median(step, 32, device)
        return {
            "ms": ms,
            "spread_ms": spread,
            "cache_bytes": sum(nbytes(pair) for pair in caches),
            "finite": bool(logits.isfinite().all()),
            **peak(device),
        }


def _transformers(model: PreTrainedModel, made: Calibration, request: Decode, batch: int) -> dict[str, Any]:
    device = model.device
    cache = DynamicCache(config=model.config)
    for i, layer in enumerate(cache_shape(model).layers):
        cache.update(*random_cache(layer, batch, request.context, model), i)
    ids = random_ids(model, batch, 1)

    def step() -> Tensor:
        logits: Tensor = model(ids, past_key_values=cache, use_cache=True).logits
        return logits

    def read() -> None:
        step()
        synchronize(device)  # the next pass needs this one's token

    with torch.inference_mode():
        logits = [step() for _ in range(3)][-1]
        reset_peak(device)
        ms, spread = median(read, 12, device)
    return {
        "ms": ms,
        "spread_ms": spread,
        "cache_bytes": sum(nbytes((layer.keys, layer.values)) for layer in cache.layers),
        "finite": bool(logits.isfinite().all()),
        **peak(device),
    }


_WAYS: dict[str, Callable[[PreTrainedModel, Calibration, Decode, int], dict[str, Any]]] = {
    "kvtool": _kvtool,
    "full": _full,
    "transformers": _transformers,
}


def _prefill(model: PreTrainedModel, made: Calibration, request: Decode) -> dict[str, Any]:
    """A prompt in one pass, with the model's own attention alone and with every layer compressed as it is done."""
    device = model.device
    ids = random_ids(model, 1, request.prefill)

    def plain() -> None:
        model(ids, past_key_values=DynamicCache(config=model.config), use_cache=True, logits_to_keep=1)

    found: dict[str, Any] = {"tokens": request.prefill}
    with torch.inference_mode():
        plain()
        reset_peak(device)
        found["ms"], _ = median(plain, 3, device)
        found |= peak(device)
        with serve(model, made, backend=request.backend) as cache:

            def served() -> None:
                cache.reset()
                model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)

            served()
            reset_peak(device)
            found["served_ms"], _ = median(served, 3, device)
            found |= {f"served_{name}": value for name, value in peak(device).items()}
            found["cache_bytes"] = cache.nbytes().compressed + cache.nbytes().exact
    return found | {"compression_share": found["served_ms"] / found["ms"] - 1}
