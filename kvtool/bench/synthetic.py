"""A layer that a method is fitted to without a capture: random tokens in a known shape, to time and to check code.

What is fitted to them says nothing of quality: they have a mean and uneven channels, as real keys have, and no more.
"""

from collections.abc import Iterator
from typing import Any

import torch

from kvtool.calibration import Calibration
from kvtool.capture.sample import LayerSample
from kvtool.errors import CaptureError, InputError
from kvtool.methods.base import Method
from kvtool.shapes import CacheShape, LayerShape, Rope

FITTED_TO = "random vectors: speed only, no quality"
TOKENS = 1024  # that are fitted to
_BASE = 500000.0  # of rotary embedding, as Llama 3 has it
_OF_ALL_LAYERS = ("bytes_per_token", "max_gib")


def synthetic_calibration(method: Method, layer: LayerShape, *, tokens: int = TOKENS) -> Calibration:
    """``method`` fitted to random tokens in one layer of that shape, with rotary embedding of all channels.

    Raises:
        InputError: an option asks for what one layer of random tokens has not.
    """
    asked = [name for name in _OF_ALL_LAYERS if getattr(method, name, None) is not None]
    if asked:
        raise InputError(
            f"--method {method.name}: {asked[0]} speaks of all layers of a model, and here one layer is fitted to "
            "random vectors; give the budget as a share, or an artifact with --calibration"
        )
    D = layer.head_dim
    rope = Rope(inv_freq=tuple(_BASE ** (-2 * i / D) for i in range(D // 2)))
    sample: Any = _Random(layer.model_copy(update={"rope": 0}), rope, tokens)
    try:
        tensors = method.fit(sample)
    except CaptureError as error:
        raise InputError(
            f"--method {method.name}: it cannot be fitted to {tokens} random tokens ({error}); "
            "fit it to a capture and give --calibration"
        ) from error
    return Calibration(method, sample.shape, tensors, provenance={"fitted_to": FITTED_TO})


class _Random:
    """What ``fit`` may look at: a sample of random tokens with a mean and uneven channels."""

    def __init__(self, layer: LayerShape, rope: Rope, tokens: int) -> None:
        self.shape, self.layers = CacheShape(layers=(layer,), ropes=(rope,)), [0]
        g, H, D, T = torch.Generator().manual_seed(2), layer.num_kv_heads, layer.head_dim, tokens
        at = torch.arange(T)
        spread = torch.rand(H, 1, D, generator=g) + 0.3
        keys = torch.randn(H, 1, D, generator=g) + spread * torch.randn(H, T, D, generator=g)
        queries = torch.randn(layer.num_heads, T, D, generator=g)
        values = torch.randn(H, T, D, generator=g)
        self._sample = LayerSample(0, 0, layer, rope, rope.rotate(keys, at), values, at, rope.rotate(queries, at), at)

    def samples(self, layer: int, *, tokens: slice | None = None) -> Iterator[LayerSample]:
        return iter([self._sample])
