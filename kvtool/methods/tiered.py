"""Tiers: blocks that attention looks at are exact, the others cost less the less they are looked at.

After the adaptive KV memory of https://pypi.org/project/akv-cache, built from methods that are here already:

    hot       16 bits, as the model left them
    warm      affine, 8 bits, keys and values per channel of a block
    cold      turboquant, 3 bits
    archive   turboquant, 2 or 1 bits

The unit is a block of 64 tokens (the page) of one KV head. ``tiered/places.py`` says which tier a unit belongs to,
``tiered/pools.py`` how it is stored. After every pass the squared share of the softmax on each block, where a share is
exp(lse_block - lse), enters its score, and units change places within sizes that a byte budget fixes. A unit that goes
up is made from its original, if host memory still has it; without one it stays, for no code gives back what it dropped.
Sizes and thresholds are fitted to the harm that each tier does to later queries of a capture.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from pydantic import Field, field_validator, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from kvtool import attention, scores
from kvtool.errors import CaptureError, MethodOptionError
from kvtool.methods.affine import Affine
from kvtool.methods.base import Carry, Claim, Decompressed, LayerCalibration, Method, Progress, nbytes
from kvtool.methods.exact import Exact
from kvtool.methods.turboquant import TurboQuant
from kvtool.packing import PAGE
from kvtool.rdkv.budget import parse_share
from kvtool.shapes import CacheShape, LayerShape, Rope, TensorSpec
from kvtool.tiered import originals, places, pools
from kvtool.tiered.originals import Originals
from kvtool.tiered.pools import Codec, Source, TieredKV

if TYPE_CHECKING:
    from kvtool.capture import Capture, LayerSample

_LOOKED = 64  # last queries of a prompt, which place its blocks
_SAMPLES = 4  # of a capture that sizes are fitted to
_DEFAULT_BITS = 3.5
_WARM: dict[str, Any] = {"k_bits": 8, "v_bits": 8, "k_group": 0, "v_group": 0}  # one range per channel or token
_NEVER = -(2**30)  # when a new unit has moved last


class TieredState(NamedTuple):
    """The carry.

    kv: all that is compressed. held: originals. first: int64 [B], position of block 0. step: int64 [B], queries seen.
    looked: int64 [B], of them since the last move. seen: [B, HQ, N], mean squared share of the softmax on each block
    for those; nothing if none were seen. lse: [B, HQ, W], of what stays exact, for the last queries of the prompt.
    """

    kv: TieredKV
    held: Originals
    first: Tensor
    step: Tensor
    looked: Tensor
    seen: Tensor
    lse: Tensor


@dataclass(frozen=True)
class Tiered(Method):
    """Hot, warm, cold and archive blocks, placed by attention within a byte budget."""

    name: ClassVar[str] = "tiered"
    paper: ClassVar[str] = "https://pypi.org/project/akv-cache/"
    summary: ClassVar[str] = "blocks of 16, 8, 3 and 2 bits that change places as attention moves"
    sees_sinks: ClassVar[bool] = True
    moves: ClassVar[bool] = True

    bits: float | None = Field(
        None, gt=0, le=17, description="budget in bits per value, all included; 3.5 if not given"
    )
    budget: str | None = Field(None, description="the same budget as a share of 16 bits per value, such as 22%")
    tiers: str | None = Field(
        None, description="percentages of hot, warm, cold, archive, such as 5,15,80,0, instead of fitted ones"
    )
    cold_bits: int = Field(3, ge=2, le=4, description="bits of the cold tier")
    archive_bits: int = Field(2, ge=1, le=2, description="bits of the archive, fewer than those of the cold tier")
    host_mib: float = Field(
        256.0, ge=0, le=2**20, description="MiB per sequence of host memory for originals; 0: nothing can go up again"
    )
    disk_mib: float = Field(
        0.0, ge=0, le=2**24, description="MiB per sequence of a temporary file for originals beyond host_mib"
    )
    halflife: float = Field(16.0, gt=0, description="queries in which a score halves")
    hysteresis: float = Field(2.0, ge=1, description="priority to overtake with, as a factor")
    cooldown: int = Field(32, ge=0, description="queries for which a block that has moved stays")
    recency: float = Field(1.0, ge=0, description="bonus of the newest block, in mean scores; halves every 8 blocks")
    seed: int = Field(0, ge=0, description="of the random matrices")

    @field_validator("budget")
    @classmethod
    def _is_a_share(cls, text: str | None) -> str | None:
        if text is not None:
            parse_share(text)
        return text

    @field_validator("tiers")
    @classmethod
    def _are_shares(cls, text: str | None) -> str | None:
        if text is not None:
            _parse_tiers(text)
        return text

    @model_validator(mode="after")
    def _fits_together(self) -> "Tiered":
        if self.bits is not None and self.budget is not None:
            raise ValueError("expected one budget, found bits and budget; give one of them")
        if self.archive_bits >= self.cold_bits:
            raise ValueError(f"expected archive_bits below cold_bits {self.cold_bits}, found {self.archive_bits}")
        return self

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
        state = self._empty(keys, layer) if carry is None else carry
        if queries is None or state.kv.tier.numel():
            return state
        looked = queries[:, :, -min(_LOOKED, max(1, keys.shape[2] - sinks)) :]
        return state._replace(lse=scores.around(looked, keys, values, layer.shape, sinks=sinks).lse)

    def observe(self, shares: Tensor, carry: TieredState) -> TieredState:
        looked = torch.full_like(carry.looked, shares.shape[2])
        return carry._replace(seen=shares.square().mean(2), looked=looked)

    def compress(
        self,
        keys: Tensor,
        values: Tensor,
        layer: LayerCalibration,
        *,
        positions: Tensor,
        queries: Tensor | None = None,
        carry: Carry = None,
    ) -> tuple[TieredKV, TieredState]:
        state = self._empty(keys, layer) if carry is None else carry
        kv, H, T = state.kv, keys.shape[1], keys.shape[2]
        before, U = kv.tier.shape[1], kv.tier.shape[1] + H * (T // PAGE)
        first = state.first if before else torch.full_like(state.first, int(positions[0]))
        step = state.step + state.looked
        score = self._scores(state, keys, layer, queries)
        new = (0, U - before)
        old = torch.nn.functional.pad(kv.tier, new, value=places.FRESH)
        moved = torch.nn.functional.pad(kv.moved, new, value=_NEVER)
        tier = places.place(
            old,
            places.priority(score, H, self.recency),
            originals.held(state.held, U).to(old.device),
            step[:, None] - moved < self.cooldown,
            places.capacities(layer["shares"], U),
            layer["thresholds"],
            self.hysteresis,
        )
        source = self._source(state, keys, values, layer, (tier != old).unflatten(1, (-1, H)), int(first[0]))
        stored = pools.rebuild(kv, tier, source, self.codecs(layer), int(first[0]), H)
        moved = torch.where((tier != old) & (old != places.FRESH), step[:, None].int(), moved)
        made = TieredKV(tier, score, moved, kv.like, *stored)
        size = 4 * PAGE * keys.shape[-1] + originals.BOOKS
        rooms = int(layer["host_bytes"]) // size, int(layer.tensors.get("disk_bytes", 0)) // size
        touched = score >= score.mean(1, keepdim=True)
        held = originals.store(state.held, source, tier, touched, int(step.max()), rooms)
        nothing = score.new_empty(len(keys), layer.shape.num_heads, 0)
        return made, TieredState(made, held, first, step, torch.zeros_like(step), nothing, nothing)

    def decompress(self, kv: TieredKV, layer: LayerCalibration, *, positions: Tensor) -> Decompressed:
        H = layer.shape.num_kv_heads
        blocks = torch.arange(kv.tier.shape[1] // H, device=positions.device)
        keys, values = pools.restore(kv, self.codecs(layer), blocks, int(positions[0]), H)
        return Decompressed(keys.flatten(2, 3), values.flatten(2, 3))

    def host_bytes(self, carry: Carry) -> int:
        return 0 if carry is None else nbytes(carry.held.host)

    def disk_bytes(self, carry: Carry) -> int:
        return 0 if carry is None else nbytes(carry.held.disk)

    def _empty(self, keys: Tensor, layer: LayerCalibration) -> TieredState:
        none = torch.empty(len(keys), 0, device=keys.device)
        kv = TieredKV(none.to(torch.uint8), none, none.int(), keys.new_empty(len(keys), 0))
        zero = torch.zeros(len(keys), dtype=torch.int64, device=keys.device)
        nothing = none[:, None].expand(-1, layer.shape.num_heads, -1)
        return TieredState(kv, originals.nothing_held(keys), zero, zero, zero, nothing, nothing)

    def _scores(self, state: TieredState, keys: Tensor, layer: LayerCalibration, queries: Tensor | None) -> Tensor:
        """The scores of all units, [B, U]: old ones moved towards what was seen, new ones as they were seen."""
        H, fresh = keys.shape[1], keys.shape[2] // PAGE
        old = state.kv.score
        blocks = old.shape[1] // H
        seen = state.seen.unflatten(1, (H, -1)).mean(2).mT  # [B, N, H]
        if seen.shape[1] >= blocks:
            if blocks:
                fades = torch.exp2(-state.looked / self.halflife)[:, None]
                old = fades * old + (1 - fades) * seen[:, :blocks].flatten(1)
            new = seen[:, blocks : blocks + fresh].flatten(1)
        else:
            new = old.new_empty(len(old), 0)
        if new.shape[1] == fresh * H:
            return torch.cat([old, new], 1)
        if queries is not None and fresh:
            new = _look(queries, keys, state.lse, layer)
        else:
            new = old.mean(1, keepdim=True).nan_to_num().expand(-1, fresh * H)
        return torch.cat([old, new], 1)

    def _source(
        self, state: TieredState, keys: Tensor, values: Tensor, layer: LayerCalibration, moves: Tensor, first: int
    ) -> Source:
        """The blocks of which some unit ``moves`` [B, N, H], as good as they can still be had."""
        B, H = keys.shape[:2]
        blocks = moves.any(2).any(0).nonzero().squeeze(1)
        before = state.kv.tier.shape[1] // H
        read, new = blocks[blocks < before], blocks[blocks >= before] - before
        old_keys, old_values = pools.restore(state.kv, self.codecs(layer), read, first, H)
        hot = (state.kv.tier == 0).unflatten(1, (-1, H))[:, read].mT if len(read) else moves.new_empty(B, H, 0)
        source = Source(
            blocks,
            torch.cat([old_keys.float(), keys.unflatten(2, (-1, PAGE))[:, :, new].float()], 2),
            torch.cat([old_values.float(), values.unflatten(2, (-1, PAGE))[:, :, new].float()], 2),
            torch.cat([hot, hot.new_ones(B, H, len(new))], 2),
        )
        return originals.recall(state.held, source, moves.shape[1] * H)

    def codecs(self, layer: LayerCalibration) -> list[Codec]:
        """How each tier stores a block."""

        def share(name: str) -> LayerCalibration:
            own = {key.removeprefix(name): tensor for key, tensor in layer.tensors.items() if key.startswith(name)}
            return LayerCalibration(layer.index, layer.shape, layer.rope, own)

        return [
            Codec(Exact(), layer),
            Codec(Affine(**_WARM), layer),
            *(Codec(method, share(prefix)) for prefix, method in self._coded().items()),
        ]

    def _coded(self) -> dict[str, TurboQuant]:
        """The methods of cold and archive by the prefix of their tensors."""
        bits = {"cold_": self.cold_bits, "archive_": self.archive_bits}
        options: dict[str, dict[str, Any]] = {
            prefix: {"k_bits": b, "v_bits": b, "seed": self.seed} for prefix, b in bits.items()
        }
        return {prefix: TurboQuant(**chosen) for prefix, chosen in options.items()}

    def schema(self, shape: CacheShape) -> dict[str, TensorSpec]:
        rooms = ("host_bytes", "disk_bytes") if self.disk_mib else ("host_bytes",)
        return {**super().schema(shape), **dict.fromkeys(rooms, TensorSpec("int64", ()))}

    def layer_schema(self, shape: LayerShape) -> dict[str, TensorSpec]:
        coded = {p + field: spec for p, m in self._coded().items() for field, spec in m.layer_schema(shape).items()}
        return {**coded, "shares": TensorSpec("float32", (4,)), "thresholds": TensorSpec("float32", (3,))}

    def fit(self, capture: "Capture", *, progress: Progress | None = None) -> dict[str, Tensor]:
        # layers share host memory and file equally
        mib = {"host_bytes": self.host_mib} | ({"disk_bytes": self.disk_mib} if self.disk_mib else {})
        rooms = {name: torch.tensor(int(x * 2**20 / len(capture.shape.compressible))) for name, x in mib.items()}
        return {**super().fit(capture, progress=progress), **rooms}

    def fit_layer(
        self, shape: LayerShape, rope: Rope | None, samples: "Iterable[LayerSample]", *, layer: int
    ) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for prefix, method in self._coded().items():
            fitted = method.fit_layer(shape, rope, samples, layer=layer)
            tensors |= {prefix + field: tensor for field, tensor in fitted.items()}
        fitted_so_far = LayerCalibration(layer, shape, rope, tensors)
        bits = self.costs(fitted_so_far)
        given = self._given(bits, shape.head_dim)
        damages = []
        for _, sample in zip(range(_SAMPLES), samples, strict=False):
            if sample.queries is None:
                raise CaptureError(
                    f"layer {layer}: tiered places blocks by attention and the capture has no queries; capture again "
                    "with --queries all"
                )
            found = places.damage(sample, self.codecs(fitted_so_far), self.recency)
            damages += [found] if found else []
        if not damages:
            raise CaptureError(
                f"layer {layer}: expected samples of at least {4 * PAGE} tokens with queries to fit tiers to, found "
                "shorter ones; capture a longer --context"
            )
        shares = places.choose(damages, bits, self._limit(bits)) if given is None else given
        return {**tensors, "shares": shares, "thresholds": places.thresholds(damages, shares)}

    def costs(self, layer: LayerCalibration) -> list[float]:
        """Bits per value of each tier, bookkeeping included."""
        H, D = layer.shape.num_kv_heads, layer.shape.head_dim
        page = torch.ones(1, H, PAGE, D)
        positions = torch.arange(PAGE)
        sizes = [4 * H * PAGE * D]
        for codec in self.codecs(layer)[1:]:
            sizes.append(nbytes(codec.method.compress(page, page, codec.layer, positions=positions)[0]))
        return [8 * (size / H + _BOOKS) / (2 * PAGE * D) for size in sizes]

    def _given(self, bits: Sequence[float], head_dim: int) -> Tensor | None:
        """The shares a person chose, or None; either must fit the budget.

        Raises:
            MethodOptionError: they do not.
        """
        limit = self._limit(bits)
        if self.tiers is None:
            if limit < bits[3]:
                raise MethodOptionError(
                    f"tiered at {limit:g} bits: expected at least {bits[3]:.3f}, what the archive alone takes at "
                    f"head_dim {head_dim}; give more bits or a smaller archive_bits"
                )
            return None
        shares = _parse_tiers(self.tiers)
        cost = sum(share * b for share, b in zip(shares, bits, strict=True))
        if cost > limit + 1e-9:
            raise MethodOptionError(
                f"tiered tiers {self.tiers}: expected at most {limit:g} bits, found {cost:.3f} at head_dim {head_dim}; "
                "give more bits or less to the upper tiers"
            )
        return torch.tensor(shares)

    def _limit(self, bits: Sequence[float]) -> float:
        """The budget in bits per value, given what each tier costs."""
        if self.budget is not None:
            return 16 * parse_share(self.budget)
        if self.bits is not None or self.tiers is None:
            return self.bits or _DEFAULT_BITS
        return sum(share * b for share, b in zip(_parse_tiers(self.tiers), bits, strict=True))

    def claims(self, shape: CacheShape, tensors: Mapping[str, Tensor]) -> Sequence[Claim]:
        """The budget, of every layer."""
        claims = []
        for i in shape.compressible:
            own = {k.removeprefix(f"layers.{i}."): t for k, t in tensors.items() if k.startswith(f"layers.{i}.")}
            bits = self.costs(LayerCalibration(i, shape.layers[i], shape.rope(i), own))
            claims.append(Claim("bits_per_value", self._limit(bits) * (1 + 1e-6), "always", "budget", layer=i))
        return claims


def _look(queries: Tensor, keys: Tensor, rest: Tensor, layer: LayerCalibration) -> Tensor:
    """Mean squared share of the softmax of the last queries on each unit of ``keys``, [B, U]; rest: lse elsewhere."""
    count = rest.shape[-1] or _LOOKED
    found = attention.logits(queries[:, :, -count:], keys, scale=layer.shape.scale, softcap=layer.shape.softcap)
    blocks = found.unflatten(-1, (-1, PAGE)).logsumexp(-1)  # [B, H, G, W, N]
    whole = blocks.logsumexp(-1)
    if rest.shape[-1]:
        whole = torch.logaddexp(whole, rest.reshape(whole.shape))
    return (blocks - whole[..., None]).exp().square().mean((2, 3)).mT.flatten(1)


def _parse_tiers(text: str) -> list[float]:
    """``5,15,80,0`` as shares."""
    try:
        shares = [float(part.strip().removesuffix("%")) / 100 for part in text.split(",")]
    except ValueError:
        shares = []
    if len(shares) != 4 or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
        raise ValueError("expected percentages of hot, warm, cold and archive that sum to 100, such as 5,15,80,0")
    return shares


_BOOKS = 1 + 4 + 4  # bytes of a unit's tier, score and last move
