"""RDKV: one rate-distortion problem over tokens and channels, with eviction as the width 0 (arXiv 2605.08317).

Once, after prefill: every token gets a weight from the attention of the last queries, tokens are sorted into pages of
64, and every page gets a level, a set of widths for its key channel groups and its values. Levels are chosen by
reverse water-filling (allocation.py) on distortions measured when fitted (rdkv/fit.py):

    minimise  sum over pages of  W_page * eps_head(level)      subject to  sum of bytes <= budget

W is the second-order weight p^2 ||v - o||^2 or the paper's attention mass; both are in scores.py. The packed form is in
rdkv/pages.py. Tokens that leave the window later come in blocks of 64 and are one page per head: they are allocated
by the same rule within the same budget per token, and bytes left over are carried to the next block.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field, field_validator, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from kvtool import scores
from kvtool.attention import Attended
from kvtool.methods.base import (
    LOOKS_BACK,
    WHOLE_PROMPT,
    Carry,
    Claim,
    Decompressed,
    LayerCalibration,
    Method,
    Progress,
)
from kvtool.methods.finite import require_finite_tokens
from kvtool.packing import groups
from kvtool.rdkv.budget import budget_fraction, parse_share
from kvtool.rdkv.claims import distortion_claims, level_distortion, output_distortion
from kvtool.rdkv.pages import LEVELS, Pages, level_bytes, pack, unpack
from kvtool.rdkv.spending import in_order, page_sums, spend
from kvtool.shapes import CacheShape, LayerShape, TensorSpec

if TYPE_CHECKING:
    from kvtool.bounds.measures import Measure
    from kvtool.capture import Capture
    from kvtool.policy import CachePolicy
    from kvtool.race import Raced


_WEIGHTS = 1 << 26  # attention weights held at a time: 256 MiB
_ACCUMULATED = 256  # queries of the whole prompt that are looked at


@dataclass(frozen=True)
class RDKV(Method):
    """Rate-distortion bit allocation over tokens, key channels, heads and layers."""

    name: ClassVar[str] = "rdkv"
    paper: ClassVar[str] = "https://arxiv.org/abs/2605.08317"
    summary: ClassVar[str] = "spends a byte budget where attention needs it; eviction is the width 0"
    block: ClassVar[int | None] = None
    sees_sinks: ClassVar[bool] = True
    families: ClassVar[tuple[str, ...]] = ("second-order", "paper")

    budget: str = Field("12.5%", description="bytes of the compressed tokens, as a share of 16 bits per value")
    bits: float | None = Field(None, gt=0, le=16, description="the same budget in bits per value")
    bytes_per_token: float | None = Field(None, gt=0, description="the same budget in bytes per token of all layers")
    max_gib: float | None = Field(None, gt=0, description="the same budget as GiB of cache at at_context")
    at_context: str | None = Field(None, description="tokens of context that max_gib speaks of, e.g. 128k")
    scope: Literal["head", "layer", "model"] = Field("layer", description="what shares one budget")
    weights: Literal["auto", "second-order", "paper"] = Field(
        "auto", description="what a token is worth; auto measures which one serves a layer better"
    )
    scoring: Literal["window", "accumulated", "expected"] = Field(
        "accumulated",
        description="which queries weigh tokens: the last, some of the whole prompt, or a Gaussian of those to come",
    )
    window: int = Field(32, ge=1, le=1024, description="last queries that window scoring looks at")
    pool: int = Field(5, ge=1, le=63, description="tokens over which scores are averaged; odd")
    eviction: float | None = Field(
        None, gt=0, le=1e4, description="cost of evicting in units of its second-order cost; measured if not given"
    )
    seed: int = Field(0, ge=0, description="of rotations and of the tokens measured when fitted")

    @field_validator("budget")
    @classmethod
    def _is_a_share(cls, text: str) -> str:
        parse_share(text)
        return text

    @model_validator(mode="after")
    def _one_budget(self) -> "RDKV":
        given = [name for name in ("bits", "bytes_per_token", "max_gib") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"expected one budget, found {' and '.join(given)}; give one of them")
        if (self.max_gib is None) != (self.at_context is None):
            raise ValueError("max_gib and at_context belong together; give both, such as max_gib 4 at_context 128k")
        return self

    @property
    def looks_back(self) -> int:
        return max(LOOKS_BACK, self.window) if self.scoring == "window" else WHOLE_PROMPT

    def layer_schema(self, shape: LayerShape) -> dict[str, TensorSpec]:
        H, D, G = shape.num_kv_heads, shape.head_dim, groups(shape.head_dim)
        return {
            "key_mean": TensorSpec("float32", (H, D)),
            "key_basis": TensorSpec("float32", (H, 2, D, D)),
            "spread": TensorSpec("float32", (H, G)),
            "value_basis": TensorSpec("float32", (H, D, D)),
            "widths": TensorSpec("uint8", (H, LEVELS, G + 1)),
            "distortion": TensorSpec("float32", (H, LEVELS)),
            "importance": TensorSpec("float32", (shape.num_heads,)),
            "fraction": TensorSpec("float32", ()),
            "family": TensorSpec("uint8", ()),
            "eviction": TensorSpec("float32", ()),
            "allocated": TensorSpec("float32", (H, 2)),
        }

    def fit(self, capture: "Capture", *, progress: Progress | None = None) -> dict[str, Tensor]:
        from kvtool.rdkv.fit import fit

        return fit(self, capture, progress)

    def race(
        self,
        capture: "Capture",
        tensors: dict[str, Tensor],
        *,
        policy: "CachePolicy",
        start: int,
        report: Callable[[int], None] | None = None,
    ) -> "Raced":
        """Tune and compare on a capture; see race.py."""
        from kvtool.race import race

        return race(self, capture, tensors, policy=policy, start=start, report=report)

    def share(self, shape: CacheShape) -> float:
        """The budget as a share of 16 bits per compressed value."""
        return budget_fraction(
            shape,
            budget=self.budget,
            bits=self.bits,
            bytes_per_token=self.bytes_per_token,
            max_gib=self.max_gib,
            at_context=self.at_context,
        )

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
        if queries is None or self.scoring == "expected":
            return scores.begin(None, keys, values, layer.shape, sinks=sinks, carry=carry)
        ago = self._ago(queries)
        return scores.begin(queries[:, :, -1 - ago], keys, values, layer.shape, sinks=sinks, carry=carry, ago=ago)

    def _ago(self, queries: Tensor) -> Tensor:
        """How many tokens came after each query that is looked at: the last ones, or as many spread over all."""
        S = queries.shape[2]
        if self.scoring == "window":
            return torch.arange(min(S, self.window) - 1, -1, -1, device=queries.device)
        return torch.linspace(S - 1, 0, min(S, _ACCUMULATED), device=queries.device).round().long()

    def compress(
        self,
        keys: Tensor,
        values: Tensor,
        layer: LayerCalibration,
        *,
        positions: Tensor,
        queries: Tensor | None = None,
        carry: Carry = None,
    ) -> tuple[Pages, Carry]:
        require_finite_tokens(keys, values, layer.index)
        evicted, kept = self.token_weights(keys, values, layer, positions, queries, carry)
        left = torch.zeros(len(keys), device=keys.device) if carry is None else carry.left
        levels, left = self.plan(evicted, kept, layer, left)
        packed = pack(keys, values, levels, layer, positions)
        return packed, scores.nothing_seen(left)

    def decompress(self, kv: Pages, layer: LayerCalibration, *, positions: Tensor) -> Decompressed:
        keys, values, real = unpack(kv, layer, positions)
        bias = torch.zeros(real.shape, device=real.device).masked_fill(~real, -torch.inf)
        return Decompressed(keys, values, bias)

    def claims(self, shape: CacheShape, tensors: Mapping[str, Tensor]) -> Sequence[Claim]:
        """The budget of every layer, and the distortion that the allocation predicts."""
        budgets = [
            Claim("bits_per_value", 16 * float(tensors[f"layers.{i}.fraction"]), "always", "calibration", layer=i)
            for i in shape.compressible
            if f"layers.{i}.fraction" in tensors
        ]
        return [*budgets, *distortion_claims(shape, tensors)]

    def measures(self) -> "Mapping[str, Measure]":
        return {"level_distortion": level_distortion, "output_distortion": output_distortion}

    def token_weights(
        self,
        keys: Tensor,
        values: Tensor,
        layer: LayerCalibration,
        positions: Tensor,
        queries: Tensor | None,
        carry: Carry,
    ) -> tuple[Tensor, Tensor]:
        """What each token's eviction costs and what its noise costs, [B, H, T] each."""
        eviction = float(layer["eviction"])
        if queries is None or queries.shape[2] == 0:
            # nothing is known: every token is worth the same
            flat = keys.new_ones(keys.shape[:3], dtype=torch.float32)
            return flat * eviction, flat
        sums, votes = [], []
        for seen in self._observed(keys, values, layer, positions, queries, carry):
            if self.families[int(layer["family"])] == "paper":
                both = scores.mass(seen)[None].expand(2, -1, -1, -1)
            else:
                worth = layer["importance"]
                both = torch.stack([scores.second_order(seen, values, worth, evicted=lost) for lost in (True, False)])
            sums.append(both * seen.votes)
            votes.append(seen.votes)
        mean = torch.stack(sums).sum(0) / torch.stack(votes).sum(0).clamp(min=1)
        lost, noisy = scores.smooth(mean, self.pool)
        return lost * eviction, noisy

    def _observed(
        self,
        keys: Tensor,
        values: Tensor,
        layer: LayerCalibration,
        positions: Tensor,
        queries: Tensor,
        carry: Carry,
    ) -> Iterator[scores.Observed]:
        """What the queries that are looked at saw, some at a time."""
        B, HQ = queries.shape[:2]
        scale, softcap = layer.shape.scale, layer.shape.softcap
        recent = 0 if carry is None else int(carry.recent.max())
        if self.scoring == "expected":
            end = int(positions[-1]) + 1 + recent
            yield scores.expect(queries, keys, values, scale=scale, rope=layer.rope, end=end)
            return
        ago = self._ago(queries)
        step = max(1, _WEIGHTS // (B * HQ * keys.shape[2]))
        for first in range(0, len(ago), step):
            part = slice(first, first + step)
            known = carry is not None and carry.lse.numel() > 0
            yield scores.observe(
                queries[:, :, -1 - ago[part]],
                keys,
                values,
                Attended(carry.out[:, :, part], carry.lse[:, :, part]) if known else None,
                scale=scale,
                softcap=softcap,
                ago=(ago[part] - recent).clamp(min=0),
            )

    def pages(self, evicted: Tensor, kept: Tensor, layer: LayerCalibration) -> tuple[Tensor, Tensor]:
        """Bytes [H, P, L] and predicted distortion [B, H, P, L] of every page at every level."""
        order = evicted.argsort(-1, descending=True)
        lost, noisy = (page_sums(x.gather(-1, order)) for x in (evicted, kept))  # [B, H, P]
        distortion = noisy[..., None] * layer["distortion"][:, None].to(kept.device)
        distortion[..., 0] = lost
        cost = level_bytes(layer["widths"], layer.shape.head_dim).to(kept.device)
        return cost[:, None].expand(distortion.shape[1:]), distortion

    def plan(self, evicted: Tensor, kept: Tensor, layer: LayerCalibration, left: Tensor) -> tuple[Tensor, Tensor]:
        """The level of each token, uint8 [B, H, T], and the bytes [B] that remain."""
        H, T = kept.shape[1:]
        cost, distortion = self.pages(evicted, kept, layer)
        # the level of each token is stored too
        each = float(layer["fraction"]) * 4 * T * layer.shape.head_dim - 3 * -(-T // 8)
        levels, remains = spend(cost, distortion, each, left, heads=1 if self.scope == "head" else H)
        return in_order(levels, evicted), remains
