"""Which tier a block belongs to: placement by attention, and the sizes of the tiers for a budget.

A *unit* is a block of 64 tokens of one KV head; units are numbered block by block, so that new ones come last. The
score of a unit is a running mean of p^2, p the share of the softmax on it: noise in a block moves the attention output
in proportion to p, so its squared error goes with p^2. Units are ranked by

    priority = score + recency * mean(score) * 2^(-age / 8 blocks)

and the first C_0 are hot, those up to C_1 warm, and so on. C_t = floor(share_t summed * units) follows from bytes
alone, so every sequence of a batch holds the same. Going up takes an original to go back to, a fitted threshold and
more than ``hysteresis`` times the priority of who leaves; who has just moved stays for a while.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from kvtool import attention
from kvtool.centring import SINKS
from kvtool.packing import PAGE

if TYPE_CHECKING:
    from kvtool.capture import LayerSample
    from kvtool.tiered.pools import Codec

TIERS = ("hot", "warm", "cold", "archive")
FRESH = 255  # the tier of a unit that was not compressed before
_AGE = 8  # blocks in which the bonus of recency halves
_TINY = 1e-12
_BARRED = 1e6  # in octaves of priority
_STEPS = 100  # a share of hot or warm is a whole percentage
_LOOKED = 64  # last queries of a prompt, which place its blocks
_ASKED = 128  # queries after it, which say what a tier costs
_BLOCKS = 64  # of a sample that is looked at


def capacities(shares: Tensor, units: int) -> list[int]:
    """Units of each tier, [4], for ``shares`` [4] that sum to 1; rounding goes to the cheapest tier that is used."""
    upto = [min(units, int(x * units + 1e-4)) for x in shares.double().cumsum(0).tolist()]
    upto[-1] = units
    return [b - a for a, b in zip([0, *upto], upto, strict=False)]


def priority(scores: Tensor, heads: int, recency: float) -> Tensor:
    """What units are ranked by, [B, U], from their scores [B, U]."""
    blocks = scores.shape[1] // heads
    age = torch.arange(blocks - 1, -1, -1, device=scores.device).repeat_interleave(heads)
    return scores + recency * scores.mean(1, keepdim=True).clamp(min=_TINY) * torch.exp2(-age / _AGE)


def place(
    old: Tensor,
    ranked: Tensor,
    held: Tensor,
    pinned: Tensor,
    counts: Sequence[int],
    thresholds: Tensor,
    hysteresis: float,
) -> Tensor:
    """The tier of each unit, uint8 [B, U].

    old: the tier before, or FRESH. ranked: priorities [B, U]. held: whether the original is still held somewhere.
    pinned: whether it has moved too recently to move again. counts: units of each tier. thresholds: [3], the least
    priority, relative to the mean, with which a unit goes up into hot, warm and cold.
    """
    octaves = ranked.clamp(min=_TINY).log2()
    relative = ranked / ranked.mean(1, keepdim=True).clamp(min=_TINY)
    fresh = old == FRESH
    tier = torch.full_like(old, len(counts) - 1)
    left = torch.ones_like(fresh)
    for t, count in enumerate(counts[:-1]):
        inside = old <= t
        able = fresh | inside | (held & ~pinned & (relative >= thresholds[t]))
        key = octaves + inside * torch.log2(torch.tensor(hysteresis)) + (inside & pinned) * _BARRED
        key = key.masked_fill(~able, -_BARRED).masked_fill(~left, -torch.inf)
        chosen = torch.zeros_like(left).scatter_(1, key.topk(count, 1).indices, True)
        tier[chosen] = t
        left &= ~chosen
    return tier


class Damage(NamedTuple):
    """What one prompt says of its units, in order of priority.

    harm: [4, U], squared error of later attention outputs, over their energy, if the unit were in a tier.
    relative: [U], priority over its mean.
    """

    harm: Tensor
    relative: Tensor


def damage(sample: "LayerSample", codecs: "Sequence[Codec]", recency: float) -> Damage | None:
    """What the tiers would do to the last sixth of ``sample``, asking about what came before; None if it is too short.

    To first order in the noise: a unit moves the output by  sum p_i (dl_i (v_i - o) + dv_i)  over its tokens, with dl
    and dv the errors of the logit and of the value. Sinks and the recent window are exact, as in serving.
    """
    assert sample.queries is not None
    assert sample.query_positions is not None
    shape, T = sample.shape, sample.keys.shape[1]
    end = T - min(_ASKED, T // 6)
    last = end - min(2 * PAGE, T // 6)
    blocks = min(_BLOCKS, (last - SINKS) // PAGE)
    inner = slice(last - blocks * PAGE, last)
    before, after = sample.query_positions < sample.positions[end], sample.query_positions >= sample.positions[end]
    if blocks < 1 or not before.any() or not after.any():
        return None
    keys, values, queries = (x[None].float() for x in (sample.keys, sample.values, sample.queries))

    def weights(chosen: Tensor) -> Tensor:
        found = attention.logits(queries[:, :, chosen], keys, scale=shape.scale, softcap=shape.softcap)
        visible = sample.positions <= sample.query_positions[chosen][:, None]  # type: ignore[index]
        return found.masked_fill(~visible, -torch.inf).softmax(-1)  # [1, H, G, S, T]

    shares = weights(before.nonzero().squeeze(1)[-_LOOKED:])[..., inner].unflatten(-1, (blocks, PAGE)).sum(-1)
    score = shares.square().mean((2, 3))  # [1, H, N]
    ranked = priority(score.mT.flatten(1), shape.num_kv_heads, recency)[0]
    chosen = after.nonzero().squeeze(1)
    p = weights(chosen)
    out = p @ values[:, :, None]
    p, v = p[..., inner].unflatten(-1, (blocks, PAGE)), values[:, :, inner].unflatten(2, (blocks, PAGE))
    harm = [torch.zeros_like(score)]  # hot
    for codec in codecs[1:]:
        at = sample.positions[inner]
        kv, _ = codec.method.compress(keys[:, :, inner], values[:, :, inner], codec.layer, positions=at)
        read = codec.method.decompress(kv, codec.layer, positions=at)
        noise = read.keys - keys[:, :, inner]
        dl = attention.logits(queries[:, :, chosen], noise, scale=shape.scale).unflatten(-1, (blocks, PAGE))
        dv = (read.values - values[:, :, inner]).unflatten(2, (blocks, PAGE))
        moved = torch.einsum("bhgsnt,bhntd->bhgsnd", p * dl, v) + torch.einsum("bhgsnt,bhntd->bhgsnd", p, dv)
        moved -= (p * dl).sum(-1)[..., None] * out[..., None, :]
        harm.append(moved.square().sum(-1).mean((2, 3)) / out.square().sum(-1).mean())
    order = ranked.argsort(descending=True)
    by_unit = torch.stack(harm)[:, 0].mT.flatten(1)  # [4, U]
    return Damage(by_unit[:, order], ranked[order] / ranked.mean())


def choose(damages: Sequence[Damage], bits: Sequence[float], budget: float) -> Tensor:
    """The shares [4] with the least summed harm among those that cost at most ``budget`` bits per value.

    bits: of each tier, falling. Cold takes all that hot and warm leave, as far as the budget goes.
    """
    grid = torch.arange(_STEPS + 1, dtype=torch.float64) / _STEPS
    hot, warm = (x.flatten() for x in torch.meshgrid(grid, grid, indexing="ij"))
    rest = budget - hot * bits[0] - warm * bits[1] - (1 - hot - warm) * bits[3]
    # a thousandth stays free, so that rounding never costs more than the budget
    cold = ((1000 * rest / (bits[2] - bits[3])).floor() / 1000).minimum(1 - hot - warm)
    fits = (hot + warm <= 1 + 1e-9) & (rest >= -1e-9)
    shares = torch.stack([hot, warm, cold, 1 - hot - warm - cold], -1)[fits].clamp(min=0)
    upto = shares.cumsum(-1).clamp(max=1)  # [options, 4]
    total = torch.zeros(len(shares), dtype=torch.float64)
    for damage in damages:
        prefix = torch.nn.functional.pad(damage.harm.double().cumsum(1), (1, 0))
        ends = torch.nn.functional.pad((upto * damage.harm.shape[1] + 1e-4).long(), (1, 0))
        ends[:, -1] = damage.harm.shape[1]
        for t in range(4):
            total += prefix[t][ends[:, t + 1]] - prefix[t][ends[:, t]]
    # among equals the first: the fewest hot, then warm
    return shares[int(total.argmin())].float()


def thresholds(damages: Sequence[Damage], shares: Tensor) -> Tensor:
    """Priority over its mean of the last unit inside hot, warm and cold, [3], averaged over prompts."""
    rows = []
    for damage in damages:
        ends = torch.tensor(capacities(shares, len(damage.relative))).cumsum(0)[:3]
        rows.append(damage.relative[(ends - 1).clamp(min=0)])
    return torch.stack(rows).mean(0).float() if rows else torch.zeros(3)
