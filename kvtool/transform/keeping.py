"""``transform`` below 1.25 bits as it is served: tokens get levels by what they will be worth, within the layer's rate.

One run is compressed at a time: the whole prompt first, later each block of 64 tokens that leaves the window, by the
same rule and from the same rate per token; bits that were not spent are carried on. The heads of a layer share.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvtool import scores
from kvtool.methods.base import Decompressed, LayerCalibration
from kvtool.rdkv.pages import token_levels
from kvtool.rdkv.spending import in_order, page_sums, spend
from kvtool.scores import Known
from kvtool.shapes import LayerShape, TensorSpec
from kvtool.transform import ladder, worth
from kvtool.transform.ladder import LadderKV

if TYPE_CHECKING:
    from kvtool.methods.transform import Transform


def schema(shape: LayerShape) -> dict[str, TensorSpec]:
    """The tensors of one layer: the codes, what a token is worth, and the rate.

    importance: of each query head's error. worth: weights of the features. distortion: of each level, eviction first.
    rate: bits per token and head.
    """
    return {
        **ladder.schema(shape),
        "importance": TensorSpec("float32", (shape.num_heads,)),
        "worth": TensorSpec("float32", (shape.num_kv_heads, worth.FEATURES)),
        "distortion": TensorSpec("float32", (ladder.LEVELS,)),
        "rate": TensorSpec("float32", ()),
    }


def compress(
    method: "Transform",
    keys: Tensor,
    values: Tensor,
    layer: LayerCalibration,
    *,
    positions: Tensor,
    queries: Tensor | None,
    carry: Known | None,
) -> tuple[LadderKV, Known]:
    """See ``Method.compress``."""
    known = carry or scores.nothing_seen(torch.zeros(len(keys), device=keys.device))
    levels, left = plan(worth_of(keys, values, layer, positions, queries, known), layer, known.left)
    packed = ladder.pack(keys, values, levels, layer, positions, method.guard)
    return packed, scores.nothing_seen(left)


def worth_of(
    keys: Tensor, values: Tensor, layer: LayerCalibration, positions: Tensor, queries: Tensor | None, known: Known
) -> Tensor:
    """What each token will be worth, [B, H, T]; without queries the newest are."""
    if queries is None or queries.shape[2] == 0:
        return (1 / (positions[-1] + 1 - positions).float()).expand(keys.shape[:3])
    x = worth.features(queries, keys, values, layer, layer["importance"], known, positions=positions)
    return worth.predict(x, layer["worth"])


def plan(worths: Tensor, layer: LayerCalibration, left: Tensor) -> tuple[Tensor, Tensor]:
    """The level of each token, uint8 [B, H, T], and the bits [B] that remain."""
    H, T = worths.shape[1:]
    ordered = page_sums(worths.sort(-1, descending=True).values)
    distortion = ordered[..., None] * layer["distortion"]
    cost = torch.tensor(ladder.page_bits(layer), dtype=torch.float32, device=worths.device)
    each = float(layer["rate"]) * T - 8 * ladder.PLANES * -(-T // 8)
    levels, left = spend(cost.expand(H, distortion.shape[2], -1), distortion, each, left, heads=H)
    return in_order(levels, worths), left


def decompress(kv: LadderKV, layer: LayerCalibration, positions: Tensor) -> Decompressed:
    """See ``Method.decompress``."""
    keys, values, real = ladder.unpack(kv, layer, positions)
    return Decompressed(keys, values, torch.zeros(real.shape, device=real.device).masked_fill(~real, -torch.inf))


def notes(kv: LadderKV) -> dict[str, float]:
    """See ``Method.notes``."""
    kept = token_levels(kv.levels, 8 * kv.levels.shape[-1]) > 0
    outside = torch.stack([kv.outside & 1, kv.outside >> 1]).float()
    return {
        "of tokens kept": kept.float().mean().item(),
        "of pages outside what was calibrated": outside.mean().item() if outside.numel() else 0.0,
    }
