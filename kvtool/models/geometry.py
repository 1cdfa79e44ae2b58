"""What a model keeps between tokens, found out by looking: a probe of a few one-token sequences, no list of names.

Every row of the probe is the same token at another position. One token attends only to itself, so whatever the layers
do, keys before rotary embedding are equal in all rows, and a rotary table is right if it makes them equal again.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kvtool.models.attention import attention_replaced
from kvtool.shapes import CacheShape, LayerKind, LayerShape, Rope

_TOKEN = 5
_POSITIONS = (0, 1, 2, 3, 7, 31, 127, 1023)
_LINEAR = ("linear", "mamba", "ssm", "recurrent", "conv", "rwkv", "delta", "mixer", "lightning")
_MLA = ("kv_a_proj_with_mqa", "kv_b_proj", "kv_lora_rank")
# what attention may be given that the plain formula of kvtool.attention does not know
_UNKNOWN = {
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "position_bias": "a position bias",
}

RECORDABLE = (LayerKind.FULL, LayerKind.SLIDING, LayerKind.CHUNKED)


@dataclass(frozen=True)
class Geometry:
    """The cache of a model, and in words what is special: ``reasons[i]`` why layer i cannot be captured, ``notes``."""

    shape: CacheShape
    reasons: dict[int, str]
    notes: tuple[str, ...]
    attention: dict[int, nn.Module] = field(repr=False)


@dataclass
class _Call:
    """One call of the attention function: rows are the probe's sequences, one token each."""

    module: nn.Module
    queries: Tensor  # [B, HQ, D]
    keys: Tensor  # [B, H, D]
    values: Tensor  # [B, H, Dv]
    source: Tensor  # the very tensor that was passed: kept alive so that its address means something
    options: dict[str, Any]


def cache_shape(model: nn.Module) -> CacheShape:
    """The cache of ``model``, layer by layer."""
    return geometry(model).shape


def geometry(model: nn.Module) -> Geometry:
    """Look at ``model``: run the probe, classify every layer, find and check its rotary tables.

    Raises:
        ModelError: no layer goes through the attention interface.
    """
    calls, positions = _probe(model)
    config = text_config(model)
    candidates = _rotary_tables(model)
    ropes: list[Rope] = []
    layers, reasons, unsure = [], {}, []
    for i in range(config.num_hidden_layers):
        call = calls.get(i)
        kind, reason = _classify(i, call, calls, config, model)
        if reason:
            reasons[i] = reason
        rope = None
        if call is not None and kind in RECORDABLE:
            rope, known = _find_rope(call, positions, candidates)
            if not known:
                unsure.append(i)
        if rope is not None and rope not in ropes:
            ropes.append(rope)
        layers.append(_layer(kind, call, config, i, None if rope is None else ropes.index(rope)))
    notes = []
    if unsure:
        notes.append(
            f"layers {_ranges(unsure)}: no half-split rotary table reproduces the keys, pre-RoPE keys are not to be had"
        )
    modules = {i: call.module for i, call in calls.items()}
    longest = getattr(config, "max_position_embeddings", None) or None
    shape = CacheShape(layers=tuple(layers), ropes=tuple(ropes), context=longest)
    return Geometry(shape, reasons, tuple(notes), modules)


def text_config(model: nn.Module) -> Any:
    """The language part of the model's config."""
    whole: Any = model.config
    return whole.get_text_config(decoder=True)


def decoder(model: Any) -> Any:
    """The model without its language head: what runs when logits are not wanted."""
    return model.get_decoder() if hasattr(model, "get_decoder") else model.base_model


def _probe(model: nn.Module) -> tuple[dict[int, _Call], Tensor]:
    calls: dict[int, _Call] = {}

    def record(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        index = getattr(module, "layer_idx", len(calls))
        calls[index] = _Call(module, query[:, :, -1], key[:, :, -1], value[:, :, -1], key, options)
        # one token: attention is its own value, once per query head
        out = value[:, :, -1:].repeat_interleave(query.shape[1] // value.shape[1], dim=1)
        return out.transpose(1, 2).contiguous(), None

    config = text_config(model)
    longest = getattr(config, "max_position_embeddings", None) or max(_POSITIONS) + 1
    device = next(model.parameters()).device
    positions = torch.tensor([min(p, longest - 1) for p in _POSITIONS], device=device)
    tokens = torch.full((len(_POSITIONS), 1), min(_TOKEN, config.vocab_size - 1), device=device)
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), attention_replaced(model, "kvtool-probe", record, masks=False):
            decoder(model)(input_ids=tokens, position_ids=positions[:, None], use_cache=False)
    finally:
        model.train(training)
    return calls, positions


def _classify(
    i: int, call: _Call | None, calls: dict[int, _Call], config: Any, model: nn.Module
) -> tuple[LayerKind, str | None]:
    """Kind of layer i, and why it cannot be captured, if so."""
    declared = (getattr(config, "layer_types", None) or [None] * (i + 1))[i]
    if call is None:
        if any(word in f"{declared} {_module_names(model, i)}".lower() for word in _LINEAR):
            return LayerKind.LINEAR, "linear or recurrent: its state does not grow with the context"
        return LayerKind.OTHER, "its attention does not go through the attention interface"
    if any(hasattr(call.module, name) for name in _MLA):
        return LayerKind.MLA, "latent attention (MLA): keys and values are expanded from one cached vector"
    if call.values.shape != call.keys.shape:
        return LayerKind.OTHER, "keys and values differ in width"
    for earlier in range(i):
        if earlier in calls and calls[earlier].source.data_ptr() == call.source.data_ptr():
            return LayerKind.SHARED, f"shares the keys and values of layer {earlier}"
    for name, what in _UNKNOWN.items():
        if call.options.get(name) is not None:
            return LayerKind.OTHER, f"its attention uses {what}"
    if declared == "chunked_attention":
        return LayerKind.CHUNKED, None
    if declared == "sliding_attention" or (declared is None and _window(call, config, declared)):
        return LayerKind.SLIDING, None
    return LayerKind.FULL, None


def _module_names(model: nn.Module, i: int) -> str:
    """Class names inside layer i."""
    layers = getattr(decoder(model), "layers", None)
    return " ".join(type(module).__name__ for module in layers[i].modules()) if layers is not None else ""


def _window(call: _Call, config: Any, declared: str | None) -> int | None:
    if declared == "chunked_attention":
        return getattr(config, "attention_chunk_size", None)
    window = call.options.get("sliding_window") or getattr(call.module, "sliding_window", None)
    return window or (getattr(config, "sliding_window", None) if declared == "sliding_attention" else None)


def _layer(kind: LayerKind, call: _Call | None, config: Any, i: int, rope: int | None) -> LayerShape:
    if call is None:
        heads = getattr(config, "num_attention_heads", None) or 1
        width = getattr(config, "head_dim", None) or max(1, config.hidden_size // heads)
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        return LayerShape(kind=kind, num_heads=heads, num_kv_heads=kv_heads, head_dim=width, scale=width**-0.5)
    declared = (getattr(config, "layer_types", None) or [None] * (i + 1))[i]
    scale, softcap = call.options.get("scaling"), call.options.get("softcap")
    width = call.keys.shape[-1]
    return LayerShape(
        kind=kind,
        num_heads=call.queries.shape[1],
        num_kv_heads=call.keys.shape[1],
        head_dim=width,
        scale=float(scale) if scale is not None else width**-0.5,
        softcap=float(softcap) if softcap is not None else None,
        window=_window(call, config, declared) if kind in (LayerKind.SLIDING, LayerKind.CHUNKED) else None,
        rope=rope,
    )


def _rotary_tables(model: nn.Module) -> list[Rope]:
    """Every table that any module of the model holds: buffers named ``*inv_freq`` and their attention scaling."""
    tables = []
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name.endswith("inv_freq") and "original" not in name and buffer.ndim == 1:
                scaling = getattr(module, name.removesuffix("inv_freq") + "attention_scaling", 1.0)
                rope = Rope(inv_freq=tuple(buffer.double().tolist()), scaling=float(scaling))
                if rope not in tables:
                    tables.append(rope)
    return tables


def _find_rope(call: _Call, positions: Tensor, candidates: list[Rope]) -> tuple[Rope | None, bool]:
    """The table that turns all rows back to the same key; (None, True) if there is no rotation at all."""
    keys = call.keys.transpose(0, 1)  # [H, B, D]: rows of the probe are positions
    # a bfloat16 cosine is off by 2^-9; two rounded products a key channel
    tolerance = 1e-3 if keys.dtype == torch.float32 else 3e-2
    if _spread(keys.float()) <= tolerance:
        return None, True
    for rope in candidates:
        if 2 * len(rope.inv_freq) <= keys.shape[-1] and _spread(rope.unrotate(keys, positions)) <= tolerance:
            return rope, True
    return None, False


def _spread(keys: Tensor) -> float:
    """Largest relative distance of any row's keys [H, B, D] from the first row's."""
    first = keys[:, :1]
    return float(((keys - first).norm(dim=-1) / first.norm(dim=-1).clamp_min(1e-12)).max())


def _ranges(indices: list[int]) -> str:
    """``0-3,7`` from 0, 1, 2, 3, 7."""
    parts: list[list[int]] = []
    for i in indices:
        if parts and parts[-1][-1] == i - 1:
            parts[-1][1:] = [i]
        else:
            parts.append([i])
    return ",".join("-".join(map(str, part)) for part in parts)
