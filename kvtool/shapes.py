"""Shapes: what a model's cache looks like, layer by layer, and what a stored tensor must look like.

``CacheShape`` is recorded in every capture and artifact, so that neither can be used with a model it was not made for.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor


class LayerKind(StrEnum):
    """What a layer keeps between tokens; only ``full`` layers grow with the context and are compressed."""

    FULL = "full"
    SLIDING = "sliding"
    CHUNKED = "chunked"
    SHARED = "shared"  # reads the keys and values of an earlier layer
    LINEAR = "linear"  # linear attention, state space or any other fixed-size state
    MLA = "mla"  # keys and values are expanded from one latent vector
    OTHER = "other"


class Rope(BaseModel):
    """Rotary embedding in the half-split convention: channel c turns with channel c + R/2, R the rotary width.

    ``inv_freq`` is in radians per token; ``scaling`` multiplies cosine and sine (YaRN's attention factor).
    Channels beyond R are left alone (partial rotary).
    """

    model_config = ConfigDict(frozen=True)

    inv_freq: tuple[float, ...] = Field(min_length=1)
    scaling: float = 1.0

    def table(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine, float32 [T, R/2] each, for integer ``positions`` [T]; scaled."""
        # float64: at 1M positions a float32 angle is off by 0.06 rad
        angle = positions.to(torch.float64)[:, None] * _frequencies(self.inv_freq, positions.device)
        return (angle.cos() * self.scaling).float(), (angle.sin() * self.scaling).float()

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Pre-RoPE ``x`` [..., T, D] turned to ``positions`` [T]; float32."""
        cos, sin = self.table(positions)
        return self._turn(x.float(), cos, sin)

    def unrotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """The inverse of :meth:`rotate`: post-RoPE ``x`` [..., T, D] back to pre-RoPE; float32."""
        cos, sin = self.table(positions)
        return self._turn(x.float(), cos / self.scaling**2, -sin / self.scaling**2)

    def _turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        half = len(self.inv_freq)
        first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)


@lru_cache
def _frequencies(inv_freq: tuple[float, ...], device: torch.device) -> Tensor:
    # not kept on the Rope: two of them must compare by their fields alone; on the device, because a step that is
    # captured in a CUDA graph may not copy from the host
    return torch.tensor(inv_freq, dtype=torch.float64, device=device)


class LayerShape(BaseModel):
    """One layer's cache: heads, width, and how attention reads it."""

    model_config = ConfigDict(frozen=True)

    kind: LayerKind
    num_heads: int = Field(gt=0)
    num_kv_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    scale: float = Field(gt=0)  # logits are scale * q.k
    softcap: float | None = None  # logits become softcap * tanh(logits / softcap)
    window: int | None = None  # tokens, for sliding and chunked layers
    rope: int | None = None  # index into CacheShape.ropes; None: no rotary embedding, or one kvtool cannot invert

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.num_heads // self.num_kv_heads


class CacheShape(BaseModel):
    """The cache of a whole model; ``layers[i]`` is transformer layer i."""

    model_config = ConfigDict(frozen=True)

    layers: tuple[LayerShape, ...] = Field(min_length=1)
    ropes: tuple[Rope, ...] = ()
    context: int | None = Field(None, ge=1, description="tokens that the model takes at most, if it says")

    @property
    def compressible(self) -> list[int]:
        """Indices of the layers whose cache grows with the context."""
        return [i for i, layer in enumerate(self.layers) if layer.kind is LayerKind.FULL]

    def rope(self, layer: int) -> Rope | None:
        """The rotary embedding of a layer, or None."""
        index = self.layers[layer].rope
        return None if index is None else self.ropes[index]

    def difference(self, other: "CacheShape") -> str | None:
        """The first thing in which ``other`` differs, as ``layer 3 head_dim: 64 against 128``; None if nothing does."""
        if len(self.layers) != len(other.layers):
            return f"number of layers: {len(self.layers)} against {len(other.layers)}"
        for i, (mine, theirs) in enumerate(zip(self.layers, other.layers, strict=True)):
            for field in LayerShape.model_fields:
                a, b = getattr(mine, field), getattr(theirs, field)
                if field != "rope" and a != b:
                    return f"layer {i} {field}: {a} against {b}"
            if not _same_rope(self.rope(i), other.rope(i)):
                return f"layer {i} rotary embedding: {_brief(self.rope(i))} against {_brief(other.rope(i))}"
        return None


def _same_rope(a: Rope | None, b: Rope | None) -> bool:
    if a is None or b is None:
        return a is b
    return (
        len(a.inv_freq) == len(b.inv_freq)
        and abs(a.scaling - b.scaling) < 1e-5
        and all(abs(x - y) <= 1e-5 * x for x, y in zip(a.inv_freq, b.inv_freq, strict=True))
    )


def _brief(rope: Rope | None) -> str:
    if rope is None:
        return "none"
    return f"{2 * len(rope.inv_freq)} channels, slowest {rope.inv_freq[-1]:.3g} rad/token, scaling {rope.scaling:.4g}"


@dataclass(frozen=True)
class TensorSpec:
    """What a stored tensor must be: ``TensorSpec("float32", (3, 64))``."""

    dtype: str
    shape: tuple[int, ...]

    def mismatch(self, tensor: Tensor) -> str | None:
        """``expected float32 [3, 64], found float16 [3, 32]``, or None if it fits."""
        found = TensorSpec(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        return None if found == self else f"expected {self}, found {found}"

    def __str__(self) -> str:
        return f"{self.dtype} {_brackets(self.shape)}"


def _brackets(shape: Sequence[int]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"
