"""What is benchmarked: one layer's shape, a method fitted to it, and pages that look like the method's own."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvtool import packing
from kvtool.bench.synthetic import FITTED_TO, random_tokens, synthetic_calibration
from kvtool.calibration import Calibration
from kvtool.errors import InputError
from kvtool.methods import make_method
from kvtool.methods.base import LOOKS_BACK, LayerCalibration, Method, nbytes
from kvtool.shapes import LayerKind, LayerShape

_SAMPLE = 4096  # tokens compressed once; longer caches repeat them


def _shape(heads: int, kv_heads: int, head_dim: int) -> LayerShape:
    return LayerShape(
        kind=LayerKind.FULL, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, scale=head_dim**-0.5
    )


MODEL_SHAPES = {
    "llama-3.1-8b": _shape(32, 8, 128),
    "llama-3.1-70b": _shape(64, 8, 128),
    "llama-3.2-1b": _shape(32, 8, 64),
    "mistral-7b": _shape(32, 8, 128),
    "qwen2.5-7b": _shape(28, 4, 128),
    "qwen3-8b": _shape(32, 8, 128),
    "gemma-3-4b": _shape(8, 4, 256),
    "smollm2-135m": _shape(9, 3, 64),
}


@dataclass(frozen=True)
class Subject:
    """One compressed layer; ``origin`` says where it comes from."""

    method: Method
    layer: LayerCalibration
    origin: str

    @property
    def shape(self) -> LayerShape:
        """The layer's heads and widths."""
        return self.layer.shape

    def to(self, device: torch.device) -> "Subject":
        """The same with its tensors on ``device``."""
        tensors = {name: tensor.to(device) for name, tensor in self.layer.tensors.items()}
        layer = LayerCalibration(self.layer.index, self.layer.shape, self.layer.rope, tensors)
        return Subject(self.method, layer, self.origin)

    def random(self, tokens: int, batch: int, device: torch.device, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, T, D] float32, of unit variance."""
        generator = torch.Generator(device).manual_seed(seed)
        dims = (batch, self.shape.num_kv_heads, tokens, self.shape.head_dim)
        keys, values = (torch.randn(dims, generator=generator, device=device) for _ in range(2))
        return keys, values

    @property
    def reads_a_part(self) -> bool:
        """Whether the method keeps the exact cache and reads what matters of it."""
        return getattr(self.method, "mode", "") == "topp"

    def _peaked(self, keys: Tensor) -> Tensor:
        """``keys`` whose logits deviate by 3.6 nats: random ones all matter alike, and nothing could be left out."""
        B, H, T, D = keys.shape
        queries = self.queries(1, keys.device).float().reshape(1, H, -1, D)
        towards = queries.mean(2, keepdim=True)
        towards = towards / towards.norm(dim=-1, keepdim=True)
        logits = self.shape.scale * (queries @ towards.mT).mean()
        random = torch.randn(B, H, T, 1, generator=torch.Generator(keys.device).manual_seed(2), device=keys.device)
        return keys + (3.3 / logits) * random * towards

    def queries(self, batch: int, device: torch.device, seed: int = 1) -> Tensor:
        """One query token [B, HQ, 1, D] bfloat16; logits have a standard deviation near 1.5."""
        if batch > 1 and self.reads_a_part:  # the keys are made for these queries
            return self.queries(1, device, seed).repeat(batch, 1, 1, 1)
        generator = torch.Generator(device).manual_seed(seed)
        dims = (batch, self.shape.num_heads, 1, self.shape.head_dim)
        scale = 1.5 / (self.shape.scale * self.shape.head_dim**0.5)
        return (scale * torch.randn(dims, generator=generator, device=device)).to(torch.bfloat16)

    def cache(self, tokens: int, batch: int, device: torch.device, seed: int = 0) -> Any:
        """A compressed cache of ``tokens``, whole pages; beyond a sample of 4096 tokens its pages repeat."""
        if self._takes_all:
            return self._at_once(tokens, batch, device, seed)
        # estimates and keys must agree at every position
        sample = tokens if self.reads_a_part else min(tokens, _SAMPLE)
        positions = torch.arange(sample, device=device)
        keys, values = self.random(sample, 1, device, seed)
        if self.reads_a_part:
            keys = self._peaked(keys)
        # as a model hands them over: what is kept as it is takes 16 bits
        kv, _ = self.method.compress(keys.bfloat16(), values.bfloat16(), self.layer, positions=positions)
        if "outside" in kv._fields:
            # random vectors are outside any statistics; what is timed are pages as a real cache has them
            kv = kv._replace(outside=torch.zeros_like(kv.outside))
        return type(kv)(*(_repeat(field, tokens, sample, batch) for field in kv))

    def _at_once(self, tokens: int, batch: int, device: torch.device, seed: int) -> Any:
        """A cache that is made once from a whole prompt, whose last queries say what matters of it."""
        keys, values, queries = random_tokens(
            self.shape, self.layer.rope, tokens, min(tokens, LOOKS_BACK), batch=batch, seed=seed, device=device
        )
        positions = torch.arange(tokens, device=device)
        keys, values = keys.bfloat16(), values.bfloat16()
        carry = self.method.begin(queries, keys[:, :, :0], values[:, :, :0], self.layer, sinks=0)
        return self.method.compress(keys, values, self.layer, positions=positions, queries=queries, carry=carry)[0]

    def kept(self, kv: Any, tokens: int) -> float | None:
        """The share of ``tokens`` that is in ``kv``; None for a method that keeps them all."""
        if self.method.block is not None:
            return None
        device = next(tensor.device for tensor in self.layer.tensors.values())
        keys, _, bias = self.method.decompress(kv, self.layer, positions=torch.arange(tokens, device=device))
        held = keys.shape[2] if bias is None else float((bias > -torch.inf).sum(-1).float().mean())
        return held / tokens

    @property
    def _takes_all(self) -> bool:
        """Whether what is kept of a token depends on the others."""
        return self.method.block is None or self.method.moves

    @cached_property
    def bytes_per_token(self) -> float:
        """Bytes of one layer per token and sequence, measured on a compressed sample."""
        tokens = _SAMPLE if self._takes_all else 4 * packing.PAGE
        device = next((tensor.device for tensor in self.layer.tensors.values()), torch.device("cpu"))
        return nbytes(self.cache(tokens, 1, device)) / tokens

    @property
    def full_bytes_per_token(self) -> int:
        """The same for keys and values in bfloat16."""
        return 4 * self.shape.num_kv_heads * self.shape.head_dim


def subject_of(calibration: Calibration, origin: str) -> Subject:
    """The first compressed layer of an artifact."""
    kept = [i for i in calibration.shape.compressible if i not in calibration.policy.exact_layers]
    if not kept:
        raise InputError(f"{origin}: expected a layer that is compressed, found none; calibrate again")
    return Subject(calibration.method, calibration.layer(kept[0]), f"{origin}, layer {kept[0]}")


def default_subject(model_shape: str, bits: int) -> Subject:
    """Data-free turboquant at ``bits``, fitted to nothing, in the shape of a known model or of one that is loaded."""
    method = data_free_method(bits)
    shape = MODEL_SHAPES.get(model_shape) or _loaded_shape(model_shape)
    tensors = method.fit_layer(shape, None, _no_samples(), layer=0)
    return Subject(
        method, LayerCalibration(0, shape, None, tensors), f"data-free turboquant at {bits} bits, {model_shape}"
    )


def synthetic_subject(model_shape: str, method: Method) -> Subject:
    """``method`` fitted to random vectors in the shape of a known model or of one that is loaded."""
    made = synthetic_calibration(method, MODEL_SHAPES.get(model_shape) or _loaded_shape(model_shape))
    return Subject(method, made.layer(0), f"{method.name} fitted to {FITTED_TO}, {model_shape}")


def _loaded_shape(model: str) -> LayerShape:
    """The first layer that compresses of a built-in model, a directory, a GGUF file or a hub id."""
    from kvtool.models import BUILT_IN, load_model

    if model not in BUILT_IN and "/" not in model and not Path(model).exists():
        known = ", ".join(MODEL_SHAPES)
        raise InputError(f"--model-shape {model}: expected one of {known}, or a model as kvtool capture takes them")
    shape = load_model(model, device="cpu").shape
    if not shape.compressible:
        raise InputError(f"--model-shape {model}: expected a layer that can be compressed, found none")
    return shape.layers[shape.compressible[0]].model_copy(update={"rope": None})


def data_free_method(bits: int) -> Method:
    """turboquant that is fitted to nothing."""
    options = {"k_bits": bits, "v_bits": bits, "codebook": "sphere", "mean": "none", "outliers": "first"}
    return make_method("turboquant", options, where="--bits")


def _no_samples() -> Iterator[Any]:
    yield from ()


def _repeat(field: Any, tokens: int, sample: int, batch: int) -> Any:
    if not isinstance(field, Tensor):
        return field
    per_token = field.shape[2] / sample
    times = -(-tokens // sample)
    repeated = field.repeat(batch, 1, times, *(1 for _ in field.shape[3:]))
    return repeated[:, :, : int(tokens * per_token)].contiguous()
