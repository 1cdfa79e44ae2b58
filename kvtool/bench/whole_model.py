"""A whole model of a known shape with random weights, and a cache of random tokens for it."""

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from kvtool.bench.subject import Subject
from kvtool.bench.synthetic import random_tokens
from kvtool.cache import CompressedCache, CompressedLayer
from kvtool.calibration import Calibration
from kvtool.errors import InputError
from kvtool.methods.base import LOOKS_BACK, Method, mapped
from kvtool.policy import CachePolicy
from kvtool.shapes import CacheShape, LayerKind, LayerShape

# hidden size, size of the feed-forward layers, layers, vocabulary, heads, KV heads, head_dim
MODELS = {
    "llama-3.1-8b": (4096, 14336, 32, 128256, 32, 8, 128),
    "llama-3.1-70b": (8192, 28672, 80, 128256, 64, 8, 128),
    "llama-3.2-1b": (2048, 8192, 16, 128256, 32, 8, 64),
    "mistral-7b": (4096, 14336, 32, 32768, 32, 8, 128),
    "smollm2-135m": (576, 1536, 30, 49152, 9, 3, 64),
}
TOY = (64, 2, 512)  # feed-forward size, layers and vocabulary on a CPU, whatever the model


def random_model(model_shape: str, device: torch.device) -> PreTrainedModel:
    """A Llama of a known shape with random weights: bfloat16 on a GPU; on a CPU a toy of two layers in float32.

    Raises:
        InputError: the shape is not known.
    """
    hidden, inner, layers, vocabulary, heads, kv_heads, head_dim = _known(model_shape)
    if device.type == "cpu":
        hidden, (inner, layers, vocabulary) = 8 * heads, TOY
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=1 << 20,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        attn_implementation="sdpa",
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32 if device.type == "cpu" else torch.bfloat16)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)


def attention_shape(model_shape: str) -> LayerShape:
    """Of each layer of :func:`random_model`.

    Raises:
        InputError: the shape is not known.
    """
    *_, heads, kv_heads, head_dim = _known(model_shape)
    return LayerShape(
        kind=LayerKind.FULL, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, scale=head_dim**-0.5
    )


def _known(model_shape: str) -> tuple[int, ...]:
    if model_shape not in MODELS:
        raise InputError(f"--model-shape {model_shape}: with --e2e expected one of {', '.join(MODELS)}")
    return MODELS[model_shape]


def data_free(method: Method, shape: CacheShape) -> Calibration:
    """An artifact of a ``method`` that is fitted to nothing."""
    tensors: dict[str, Tensor] = {}
    fitted: dict[Any, dict[str, Tensor]] = {}
    for i in shape.compressible:
        layer = shape.layers[i]
        if layer not in fitted:
            fitted[layer] = method.fit_layer(layer, shape.rope(i), (), layer=i)
        tensors |= {f"layers.{i}.{name}": tensor for name, tensor in fitted[layer].items()}
    return Calibration(method, shape, tensors, CachePolicy())


def repeated(calibration: Calibration, shape: CacheShape) -> Calibration:
    """The same artifact for a model of other layers, whose layers have as many heads and channels."""
    if calibration.shape.difference(shape) is None:
        return calibration
    kept = [i for i in calibration.shape.compressible if i not in calibration.policy.exact_layers]
    mine, theirs = shape.layers[shape.compressible[0]], calibration.shape.layers[kept[0]]
    for field in ("num_heads", "num_kv_heads", "head_dim"):
        if getattr(mine, field) != getattr(theirs, field):
            raise InputError(
                f"--calibration: {field}: expected {getattr(mine, field)}, found {getattr(theirs, field)}; "
                "give an artifact for this model's attention, or none"
            )
    tensors = {name: x for name, x in calibration.tensors.items() if not name.startswith("layers.")}
    for n, i in enumerate(shape.compressible):
        prefix = f"layers.{kept[n % len(kept)]}."
        tensors |= {
            f"layers.{i}.{name.removeprefix(prefix)}": x
            for name, x in calibration.tensors.items()
            if name.startswith(prefix)  # the dot ends the number
        }
    policy = calibration.policy.model_copy(update={"exact_layers": ()})
    return Calibration(calibration.method, shape, tensors, policy, calibration.provenance)


def fill(cache: CompressedCache, model: PreTrainedModel, context: int, batch: int, capacity: int) -> None:
    """Have ``context`` random tokens in every layer of ``cache``, compressed as serving would leave them."""
    method, policy = cache.calibration.method, cache.calibration.policy
    device, dtype = model.device, model.dtype
    block = method.block or 64
    tokens = max(0, context - policy.sinks - policy.window) // block * block
    if tokens == 0:
        raise InputError(f"--context {context}: expected more tokens than the exact window and a page of 64")
    first: Any = None
    for i, layer in cache.compressed_layers():
        subject = Subject(method, cache.calibration.layer(i), "")
        recent_keys, recent_values = (x.to(dtype) for x in subject.random(context - tokens, batch, device, seed=i))
        layer.lazy_initialization(recent_keys, recent_values)
        layer.keys, layer.values = recent_keys, recent_values
        layer.parts.reserve(capacity)
        if method.block is None or method.moves:
            # what is kept depends on all tokens; the layers after the first take its copy
            first = first or _whole_prompt(cache, layer, subject, context, tokens, recent_keys)
            kv, layer.carry = mapped(first[0], torch.clone), first[1]
        else:
            kv = subject.cache(tokens, batch, device, seed=i)
        layer.parts.append(kv, policy.sinks, tokens)


def _whole_prompt(
    cache: CompressedCache, layer: CompressedLayer, subject: Subject, context: int, tokens: int, like: Tensor
) -> tuple[Any, Any]:
    """What the method makes of ``tokens`` between sinks and window of a prompt [B] as in ``like``, and its carry."""
    method, sinks, device = cache.calibration.method, cache.calibration.policy.sinks, like.device
    made = random_tokens(subject.shape, subject.layer.rope, context, LOOKS_BACK, batch=len(like), device=device)
    keys, values, queries = (x.to(like.dtype) for x in made)
    inside = slice(sinks, sinks + tokens)
    outside = torch.ones(context, dtype=torch.bool, device=device)
    outside[inside] = False
    carry = method.begin(queries, keys[:, :, outside], values[:, :, outside], subject.layer, sinks=sinks)
    return layer.backend.compress(
        method,
        keys[:, :, inside],
        values[:, :, inside],
        subject.layer,
        positions=torch.arange(context, device=device)[inside],
        queries=queries,
        carry=carry,
    )


def random_cache(layer: LayerShape, batch: int, tokens: int, model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Keys and values [B, H, T, D] of one layer in the model's dtype."""
    dims = (batch, layer.num_kv_heads, tokens, layer.head_dim)
    keys, values = (torch.randn(dims, dtype=model.dtype, device=model.device) for _ in range(2))
    return keys, values


def random_ids(model: PreTrainedModel, batch: int, tokens: int) -> Tensor:
    """Token ids [B, T]."""
    generator = torch.Generator(model.device).manual_seed(0)
    return torch.randint(model.config.vocab_size, (batch, tokens), generator=generator, device=model.device)
