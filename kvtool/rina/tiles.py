"""The tile pursuit of RINA-1bit-KV as its repository runs it: what ``rina -o variant published`` compares with.

Source: "sigma-delta residual binary pursuit" of https://github.com/Misaka477/RINA-1bit-KV, with what its configuration
C1 sets. A tile is 16 tokens x 16 channels, M = 256 numbers W. For n = 1..N, from rem = W, mom = 0:

    target  = rem + beta mom          alpha_n = mean |target|        B_n = sign(target)
    W'     <- W' + alpha_n B_n        rem = W - W'                   mom = target - alpha_n B_n

alpha in float16: 1 + 16/256 bits per number and stage. Values are multiplied by a fixed random orthogonal matrix; keys
are taken as they are. Left out: the second-order term (0 in C1), and the shaping of the noise by a PCA of the tiles.
Its second residual stage of one step counts as one more stage here, without a blend.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kvtool import packing, rotation
from kvtool.methods.base import Decompressed, LayerCalibration
from kvtool.methods.finite import require_finite
from kvtool.shapes import LayerShape, TensorSpec

BETA = 0.15
TILE = 16  # tokens, and channels


class TilesKV(NamedTuple):
    """N pages of 64 tokens.

    key_pages, value_pages: uint8 [B, H, N, J * page bytes], the signs of J stages as 1-bit pages.
    key_alphas, value_alphas: float16 [B, H, N, J, 4, D/16], one per stage and tile.
    """

    key_pages: Tensor
    key_alphas: Tensor
    value_pages: Tensor
    value_alphas: Tensor


def compress(keys: Tensor, values: Tensor, layer: LayerCalibration, k_stages: int, v_stages: int) -> TilesKV:
    """``keys`` and ``values`` [B, H, T, D], T a multiple of 64, by as many stages."""
    widths = [1] * packing.groups(keys.shape[-1])
    packed = []
    v = rotation.rotate(values, layer["value_rotation"])
    for x, stages, pack in ((keys.float(), k_stages, packing.pack_keys), (v, v_stages, packing.pack_values)):
        signs, alphas = pursue(tiles(x), stages)  # [B, H, N, J, 4, m, 256], [B, H, N, J, 4, m]
        bits = untile((signs > 0).to(torch.uint8))
        packed += [torch.cat([pack(bits[:, :, j], widths) for j in range(stages)], -1), alphas]
    kv = TilesKV(*packed)
    require_finite(kv, layer.index)
    return kv


def decompress(kv: TilesKV, layer: LayerCalibration) -> Decompressed:
    """Sums of alpha_n B_n: the factor 1/N of the whitepaper is not in its code, and would leave .66 of the energy."""
    D = layer.shape.head_dim
    widths = [1] * packing.groups(D)
    restored = []
    for pages, alphas, unpack in (
        (kv.key_pages, kv.key_alphas, packing.unpack_keys),
        (kv.value_pages, kv.value_alphas, packing.unpack_values),
    ):
        stages = alphas.shape[3]
        bits = torch.stack([unpack(stage, widths, D) for stage in pages.chunk(stages, -1)], 2)  # [B, H, J, T, D]
        restored.append(untile((2.0 * tiles(bits) - 1) * alphas.float()[..., None]).sum(2))
    return Decompressed(restored[0], rotation.unrotate(restored[1], layer["value_rotation"]))


def pursue(x: Tensor, stages: int, beta: float = BETA) -> tuple[Tensor, Tensor]:
    """Signs +-1 and alphas float16 of tiles ``x`` [B, H, N, 1, 4, m, M], a stage each along dimension 3."""
    remaining, momentum = x, torch.zeros_like(x)
    signs, alphas = [], []
    for _ in range(stages):
        target = remaining + beta * momentum
        alpha = target.abs().mean(-1, keepdim=True).half()
        sign = torch.where(target > 0, 1.0, -1.0)
        step = alpha.float() * sign
        remaining, momentum = remaining - step, target - step
        signs.append(sign)
        alphas.append(alpha.squeeze(-1))
    return torch.cat(signs, 3), torch.cat(alphas, 3)


def tiles(x: Tensor) -> Tensor:
    """[B, H, T, D] to [B, H, N, 1, 4, m, M], and [B, H, J, T, D] to [B, H, N, J, 4, m, M]."""
    x = x[:, :, None] if x.dim() == 4 else x
    cut = x.unflatten(-1, (-1, width(x.shape[-1]))).unflatten(3, (-1, packing.PAGE // TILE, TILE))
    return cut.permute(0, 1, 3, 2, 4, 6, 5, 7).flatten(-2)  # from [B, H, J, N, 4, 16, m, w]


def untile(x: Tensor) -> Tensor:
    """The inverse of :func:`tiles`: [B, H, J, T, D]."""
    cut = x.unflatten(-1, (TILE, -1)).permute(0, 1, 3, 2, 4, 6, 5, 7)
    return cut.flatten(-2).flatten(3, 5)


def width(head_dim: int) -> int:
    """Channels of a tile: 16, or what divides the head."""
    return math.gcd(head_dim, TILE)


def layer_schema(shape: LayerShape) -> dict[str, TensorSpec]:
    """The fixed matrix of the values; nothing is fitted."""
    return {"value_rotation": rotation.spec("haar", shape.num_kv_heads, shape.head_dim)}


def draw(shape: LayerShape, seed: int) -> dict[str, Tensor]:
    """The tensors of :func:`layer_schema`; every head has the same matrix, as published."""
    one = rotation.draw("haar", 1, shape.head_dim, torch.Generator().manual_seed(seed))
    return {"value_rotation": one.expand(shape.num_kv_heads, -1, -1).contiguous()}
