"""Tokens that stand in for a captured layer: what any method can be fitted to and timed on in a known shape.

Pre-RoPE, for each KV head, n, n' standard normal, one s per token, directions of unit norm:

    k = mean + spread n + K_RECENT near + K_CONTENT s content        q = Q (n' + SHARED (near + content))

``content`` lies in the slowest quarter of the rotary pairs, so s decides what all queries look at. ``near`` lies in the
fastest half, so its part of a logit falls with distance, from 4 nats: recent tokens have more of the attention. Logits
deviate by 3.4 nats over 8k tokens, of which all queries share 2.7; captured ones of SmolLM2-135M by 3.5 to 5.4 and 2.4
to 5.8. What a method keeps depends on this, and on nothing else that a model has: it says nothing of quality.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvtool.calibration import Calibration
from kvtool.capture.sample import LayerSample
from kvtool.errors import CaptureError, InputError
from kvtool.methods.base import Method
from kvtool.shapes import CacheShape, LayerShape, Rope

FITTED_TO = "random vectors: speed only, no quality"
TOKENS = 1024  # that are fitted to
_BASE = 500000.0  # of rotary embedding, as Llama 3 has it
_NOISE = 1.5  # nats, standard deviation of what each query sees differently
_CONTENT = 2.5  # nats, standard deviation of what all queries see alike
_RECENT = 4.0  # nats, by which the newest tokens are ahead of those far away
_SHARED = 6.0  # how much of queries is alike: 6 in one direction, 1 in every other
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
    sample: Any = _Sample(layer.model_copy(update={"rope": 0}), rope, tokens)
    try:
        tensors = method.fit(sample)
    except CaptureError as error:
        raise InputError(
            f"--method {method.name}: it cannot be fitted to {tokens} random tokens ({error}); "
            "fit it to a capture and give --calibration"
        ) from error
    return Calibration(method, sample.shape, tensors, provenance={"fitted_to": FITTED_TO})


class Tokens(NamedTuple):
    """Keys and values [B, H, T, D] and the last queries [B, HQ, S, D], float32, post-RoPE."""

    keys: Tensor
    values: Tensor
    queries: Tensor


def random_tokens(
    layer: LayerShape,
    rope: Rope | None,
    tokens: int,
    queries: int,
    *,
    batch: int = 1,
    seed: int = 0,
    device: torch.device | None = None,
) -> Tokens:
    """Tokens from position 0 on, and queries at the last positions; means and directions are the same for any seed."""
    device = device or torch.device("cpu")
    H, HQ, D = layer.num_kv_heads, layer.num_heads, layer.head_dim
    mean, spread, near, content = (x.to(device) for x in _head(layer))
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*dims: int) -> Tensor:
        return torch.randn(batch, *dims, generator=generator, device=device)

    unit = _NOISE / (layer.scale * D**0.5)  # of queries, so that their logits with noise of variance 1 deviate by it
    logit = layer.scale * unit * _SHARED  # nats per unit of a shared direction in a key
    keys = spread * normal(H, tokens, D)
    keys += mean + (_RECENT / logit) * near
    keys += (_CONTENT / logit) * normal(H, tokens, 1) * content
    asked = normal(HQ, queries, D)
    asked += (_SHARED * (near + content)).repeat_interleave(HQ // H, 0)
    asked *= unit
    values = normal(H, tokens, D)
    if rope is None:
        return Tokens(keys, values, asked)
    at = torch.arange(tokens, device=device)
    return Tokens(rope.rotate(keys, at), values, rope.rotate(asked, at[tokens - queries :]))


def _head(layer: LayerShape) -> tuple[Tensor, ...]:
    """Mean, spread, ``near`` and ``content`` of each KV head's keys, [H, 1, D]."""
    H, D = layer.num_kv_heads, layer.head_dim
    g = torch.Generator().manual_seed(2)
    mean, spread = torch.randn(H, 1, D, generator=g), torch.rand(H, 1, D, generator=g) + 0.3
    pair = torch.arange(D) % (D // 2)  # 0 turns fastest
    directions = []
    for inside in (pair < D // 4, pair >= D // 2 - D // 8):
        x = torch.randn(H, 1, D, generator=g) * inside
        directions.append(x / x.norm(dim=-1, keepdim=True))
    return mean, spread, *directions


class _Sample:
    """What ``fit`` may look at."""

    def __init__(self, layer: LayerShape, rope: Rope, tokens: int) -> None:
        self.shape, self.layers = CacheShape(layers=(layer,), ropes=(rope,)), [0]
        keys, values, queries = (x[0] for x in random_tokens(layer, rope, tokens, tokens))
        at = torch.arange(tokens)
        self._sample = LayerSample(0, 0, layer, rope, keys, values, at, queries, at)

    def samples(self, layer: int, *, tokens: slice | None = None) -> Iterator[LayerSample]:
        return iter([self._sample])
