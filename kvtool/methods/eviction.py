"""Eviction alone: the baselines rdkv is measured against, at equal bytes and through the same cache.

    snapkv      attention of the last queries, averaged over 5 neighbouring tokens (arXiv 2404.14469)
    pyramidkv   the same scores; lower layers keep more, on a straight line with beta = 20 (arXiv 2406.02069)
    tova        attention of the last query, one score for all heads (arXiv 2401.06104)
    expected    attention that a Gaussian of queries at the next 512 positions expects, times ||v|| (kvpress 0.5.5):
                E exp(q.k s) = exp(s k.mu + s^2 k^T Sigma k / 2)
    h2o         attention of all queries so far, summed; half of what is kept are the newest tokens (arXiv 2306.14048)
    streaming   the most recent tokens (arXiv 2309.17453)

Kept tokens stay in 16 bits at their own positions. Sinks and window are exact outside, as for every method. Of tokens
that leave the window later each block keeps its share, fractions carried on.
"""

from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field, field_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from kvtool import scores
from kvtool.attention import Attended
from kvtool.methods.base import LOOKS_BACK, WHOLE_PROMPT, Carry, Decompressed, LayerCalibration, Method, Progress
from kvtool.methods.finite import require_finite_tokens
from kvtool.rdkv.budget import parse_share
from kvtool.shapes import LayerShape, TensorSpec

if TYPE_CHECKING:
    from kvtool.capture import Capture

_WEIGHTS = 1 << 26  # attention weights held at a time: 256 MiB
_BETA = 20  # PyramidKV: the topmost layer keeps 1/20 of the mean


class KeptKV(NamedTuple):
    """The tokens that were kept, 16-bit [B, H, K, D], in order."""

    keys: Tensor
    values: Tensor


@dataclass(frozen=True)
class Eviction(Method):
    """Keep the tokens that score best, drop the others."""

    name: ClassVar[str] = "eviction"
    paper: ClassVar[str] = "https://arxiv.org/abs/2404.14469"
    summary: ClassVar[str] = "keeps some tokens in 16 bits and drops the others: SnapKV and its relatives"
    block: ClassVar[int | None] = None

    policy: Literal["snapkv", "pyramidkv", "tova", "expected", "h2o", "streaming"] = Field(
        "snapkv", description="how tokens are scored"
    )
    budget: str = Field("12.5%", description="share of the tokens between sinks and window that is kept")
    window: int = Field(64, ge=1, le=1024, description="last queries whose attention is looked at")
    pool: int = Field(5, ge=1, le=63, description="tokens over which scores are averaged; odd")

    @field_validator("budget")
    @classmethod
    def _is_a_share(cls, text: str) -> str:
        parse_share(text)
        return text

    @property
    def looks_back(self) -> int:
        return WHOLE_PROMPT if self.policy in ("expected", "h2o") else max(LOOKS_BACK, self.window)

    def layer_schema(self, shape: LayerShape) -> dict[str, TensorSpec]:
        return {"fraction": TensorSpec("float32", ())}

    def fit(self, capture: "Capture", *, progress: Progress | None = None) -> dict[str, Tensor]:
        layers = capture.shape.compressible
        share = parse_share(self.budget)
        fractions = pyramid(share, len(layers)) if self.policy == "pyramidkv" else [share] * len(layers)
        return {f"layers.{i}.fraction": torch.tensor(f) for i, f in zip(layers, fractions, strict=True)}

    def begin(
        self,
        queries: Tensor | None,
        keys: Tensor,
        values: Tensor,
        layer: LayerCalibration,
        *,
        sinks: int,
        carry: Carry = None,
    ) -> Carry:
        if queries is not None and self.policy != "h2o":
            queries = queries[:, :, -min(self._looked(), max(1, keys.shape[2] - sinks)) :]
        return scores.begin(queries, keys, values, layer.shape, sinks=sinks, carry=carry)

    def compress(
        self,
        keys: Tensor,
        values: Tensor,
        layer: LayerCalibration,
        *,
        positions: Tensor,
        queries: Tensor | None = None,
        carry: Carry = None,
    ) -> tuple[KeptKV, Carry]:
        require_finite_tokens(keys, values, layer.index)
        T = keys.shape[2]
        wanted = float(layer["fraction"]) * T + (0.0 if carry is None else float(carry.left.max()))
        kept = min(T, int(wanted + 1e-6))
        score = self.score(keys, values, layer, positions, queries, carry)
        if self.policy == "h2o":
            score = score.masked_fill(torch.arange(T, device=keys.device) >= T - (kept - kept // 2), torch.inf)
        chosen = score.topk(kept, -1).indices.sort(-1).values
        at = chosen[..., None].expand(-1, -1, -1, keys.shape[-1])
        half = keys.dtype if keys.element_size() == 2 else torch.float16
        # the fraction of a token that rounding has not yet kept
        left = torch.full((len(keys),), wanted - kept, device=keys.device)
        return KeptKV(keys.gather(2, at).to(half), values.gather(2, at).to(half)), scores.nothing_seen(left)

    def decompress(self, kv: KeptKV, layer: LayerCalibration, *, positions: Tensor) -> Decompressed:
        return Decompressed(kv.keys.float(), kv.values.float())

    def score(
        self,
        keys: Tensor,
        values: Tensor,
        layer: LayerCalibration,
        positions: Tensor,
        queries: Tensor | None,
        carry: Carry,
    ) -> Tensor:
        """What each token is worth, [B, H, T]; only the order matters."""
        B, H, T, _ = keys.shape
        if queries is None or self.policy == "streaming":
            return torch.arange(T, device=keys.device, dtype=torch.float32).expand(B, H, T)
        if self.policy == "expected":
            end = int(positions[-1]) + 1 + (0 if carry is None else int(carry.recent.max()))
            seen = scores.expect(queries, keys, values, scale=layer.shape.scale, rope=layer.rope, end=end)
            return scores.mass(seen) * values.float().norm(dim=-1)
        rest = None if carry is None or carry.lse.numel() == 0 else Attended(carry.out, carry.lse)
        if self.policy == "h2o":
            return _accumulated(queries, keys, values, layer, rest, 0 if carry is None else int(carry.recent.max()))
        queries = queries[:, :, -(self._looked() if rest is None else rest.lse.shape[-1]) :]
        seen = scores.observe(queries, keys, values, rest, scale=layer.shape.scale, softcap=layer.shape.softcap)
        if self.policy == "tova":
            return scores.mass(seen).mean(1, keepdim=True).expand(B, H, T)
        return scores.smooth(scores.mass(seen), self.pool)

    def _looked(self) -> int:
        return 1 if self.policy == "tova" else self.window


def _accumulated(
    queries: Tensor, keys: Tensor, values: Tensor, layer: LayerCalibration, rest: Attended | None, recent: int
) -> Tensor:
    """The attention [B, H, T] that each token had from all queries after it; ``recent`` tokens are newer than these."""
    B, HQ, S = queries.shape[:3]
    ago = (torch.arange(S - 1, -1, -1, device=keys.device) - recent).clamp(min=0)
    total = keys.new_zeros(keys.shape[:3], dtype=torch.float32)
    step = max(1, _WEIGHTS // (B * HQ * keys.shape[2]))
    for first in range(0, S, step):
        part = slice(first, first + step)
        known = None if rest is None else Attended(rest.out[:, :, part], rest.lse[:, :, part])
        scale, softcap = layer.shape.scale, layer.shape.softcap
        seen = scores.observe(queries[:, :, part], keys, values, known, scale=scale, softcap=softcap, ago=ago[part])
        total += seen.weights.sum(3).mean(2)
    return total


def pyramid(share: float, layers: int) -> list[float]:
    """Shares falling linearly from the first layer to the last, with mean ``share``."""
    if layers == 1:
        return [share]
    least = share / _BETA
    most = 2 * share - least
    if most > 1:
        most, least = 1.0, 2 * share - 1
    return [most - (most - least) * i / (layers - 1) for i in range(layers)]
