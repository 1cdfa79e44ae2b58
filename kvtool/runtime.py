"""Serve a model from its compressed cache: one attention function, one context manager; the cache is in cache.py."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from kvtool.adapter import adapted
from kvtool.cache import CompressedCache, CompressedLayer
from kvtool.calibration import Calibration
from kvtool.errors import ModelError
from kvtool.exact import exact_attention, logit_scale
from kvtool.methods.base import LOOKS_BACK


@dataclass(frozen=True)
class Prefill:
    """An exact prefill: its cache, and the last queries [B, HQ, W, D] of each layer."""

    cache: Cache
    queries: dict[int, Tensor]


def exact_prefill(
    model: PreTrainedModel, input_ids: Tensor, *, last_queries: int = LOOKS_BACK, chunk: int = 0
) -> Prefill:
    """Prefill ``input_ids`` [B, T] with the model's own attention, in chunks of ``chunk`` tokens (0: all at once).

    Keeps the last queries as well, so that a method may look at them when the cache is adopted.
    """
    queries: dict[int, Tensor] = {}

    def record(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
        seen = torch.cat([queries[module.layer_idx], query], 2) if module.layer_idx in queries else query
        queries[module.layer_idx] = seen[:, :, -last_queries:].clone()
        softcap = kwargs.get("softcap")
        out = exact_attention(query, key, value, scale=logit_scale(module, kwargs), softcap=softcap, mask=mask)
        return out.transpose(1, 2).contiguous(), None

    cache = DynamicCache(config=model.config)
    with _attention(model, "kvtool-prefill", record), torch.inference_mode():
        for ids in input_ids.split(chunk or input_ids.shape[1], 1):
            # the last position's logits alone: a whole prompt's would be the largest tensor of all
            model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return Prefill(cache, queries)


_served: dict[int, CompressedCache] = {}


@contextmanager
def serve(
    model: PreTrainedModel, calibration: Calibration, *, backend: str = "auto", capacity: int | None = None
) -> Iterator[CompressedCache]:
    """Within the context, ``model`` attends from the cache this yields; pass it as ``past_key_values``.

    backend: auto, reference, triton or gluon. The artifact's adapter, if it has one, is applied. The model is as
    it was on leaving.
    capacity: tokens to make room for at once. Passes of one token then have static shapes and on a GPU are replayed
    from a CUDA graph, under ``generate`` as well; see captured.py. Beyond it the room grows. A model or method for
    which that is impossible decodes as without it, after a warning.

    Raises:
        CalibrationError: the artifact was made for another shape, or its adapter for other weights.
        ModelError: the model is being served already, or its attention does not go through transformers' interface.
        BackendError: the back end asked for cannot run here.
    """
    from kvtool.captured import replayed
    from kvtool.models.geometry import cache_shape

    calibration.check_fits(cache_shape(model), getattr(model, "name_or_path", "") or type(model).__name__)
    cache = CompressedCache(model, calibration, backend=backend)
    configs = {id(m.config) for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "config")}
    if configs & _served.keys():
        raise ModelError("this model is being served already; leave that context first")
    _served.update(dict.fromkeys(configs, cache))
    try:
        with (
            adapted(model, calibration.adapter),
            _attention(model, "kvtool", _serve_attention),
            nullcontext() if capacity is None else replayed(model, cache, capacity),
        ):
            yield cache
    finally:
        for config in configs:
            del _served[config]


@torch.compiler.disable  # type: ignore[untyped-decorator]  # what is around it may be compiled
def _serve_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    layer = _served[id(module.config)].layers[module.layer_idx]
    scale, softcap = logit_scale(module, kwargs), kwargs.get("softcap")
    if kwargs.get("s_aux") is not None:
        raise ModelError("attention with learned sink logits is not supported; serve this model uncompressed")
    if not isinstance(layer, CompressedLayer):
        out = exact_attention(query, key, value, scale=scale, softcap=softcap, mask=mask)
    else:
        if key is not layer.fresh:
            raise ModelError("the model ran without kvtool's cache; pass past_key_values=cache inside serve()")
        if mask is not None:
            raise ModelError("custom attention masks are not supported with a compressed cache; drop attention_mask")
        out = layer.attend(query, scale=scale, softcap=softcap)
        layer.settle(query)
    return out.transpose(1, 2).contiguous(), None


def _causal_or_padded(*args: Any, **kwargs: Any) -> Tensor | None:
    """No mask for full layers, which are causal by construction; sliding and chunked layers get theirs."""
    if kwargs.get("local_size") is not None:
        return sdpa_mask(*args, **kwargs | {"allow_is_causal_skip": False})
    padding = kwargs.get("attention_mask")
    if padding is not None and not padding.bool().all():
        raise ModelError("padded batches are not supported with a compressed cache; batch prompts of equal length")
    return None


@contextmanager
def _attention(model: PreTrainedModel, name: str, function: Any) -> Iterator[None]:
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, _causal_or_padded)
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation(name)
        yield
    finally:
        model.set_attn_implementation(before)
