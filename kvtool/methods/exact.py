"""No compression at all: the yardstick, and the proof that the runtime adds no error of its own."""

from typing import ClassVar, NamedTuple

from pydantic.dataclasses import dataclass
from torch import Tensor

from kvtool.methods.base import Carry, Decompressed, LayerCalibration, Method
from kvtool.methods.finite import require_finite_tokens


class ExactKV(NamedTuple):
    """Keys and values as they came, [B, H, T, D]."""

    keys: Tensor
    values: Tensor


@dataclass(frozen=True)
class Exact(Method):
    """Keep every token in the model's dtype."""

    name: ClassVar[str] = "exact"
    paper: ClassVar[str] = ""
    summary: ClassVar[str] = "keeps the cache as it is: the no-op every other method is compared with"

    def compress(
        self,
        keys: Tensor,
        values: Tensor,
        layer: LayerCalibration,
        *,
        positions: Tensor,
        queries: Tensor | None = None,
        carry: Carry = None,
    ) -> tuple[ExactKV, Carry]:
        require_finite_tokens(keys, values, layer.index)
        return ExactKV(keys, values), None

    def decompress(self, kv: ExactKV, layer: LayerCalibration, *, positions: Tensor) -> Decompressed:
        return Decompressed(kv.keys, kv.values)
