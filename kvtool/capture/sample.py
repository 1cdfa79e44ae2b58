"""What a method sees of a capture: one layer of one sample."""

from dataclasses import dataclass

from torch import Tensor

from kvtool.shapes import LayerShape, Rope


@dataclass(frozen=True)
class LayerSample:
    """Queries, keys and values of one layer over one run of text, post-RoPE, as attention saw them.

    keys, values: [H, T, D] in the captured dtype.
    queries: [HQ, S, D], or None if they were not captured; query s stands at ``query_positions[s]``.
    positions: [T] int64, the rotary positions of the keys.
    query_positions: [S] int64.
    output_gram: [HQ, D, D] float32, W_O,h^T W_O,h of each query head: how much its output error matters; or None.
    stream: [T] float32, squared norm of the residual stream that each token brings into the layer; or None.
    """

    layer: int
    sample: int
    shape: LayerShape
    rope: Rope | None
    keys: Tensor
    values: Tensor
    positions: Tensor
    queries: Tensor | None = None
    query_positions: Tensor | None = None
    output_gram: Tensor | None = None
    stream: Tensor | None = None

    def pre_rope_keys(self) -> Tensor:
        """Keys before rotary embedding, [H, T, D] float32; exact up to the rounding of the captured dtype."""
        return self.keys.float() if self.rope is None else self.rope.unrotate(self.keys, self.positions)
