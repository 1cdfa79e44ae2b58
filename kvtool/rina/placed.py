"""Stages of RINA where their noise would do most damage, ``-o target_bits``: sub-spaces and depth fitted per layer.

A stage codes 32 coefficients: those of a basis fitted per head, in the metric of the queries or of the output, whose
estimated noise is largest after the stages before it. They are scaled to one size and mixed, and get one bit, +-g, or
two that share one level, +-g a +- g b: the best four levels of a bell-shaped density *are* such sums, so the second bit
needs no level of its own. g has 4 bits per token. How many stages the keys and values of a layer get is decided over
the whole model, by the damage that was measured for every number of them.

That is transform coding with stages of one or two bits, and it is coded as ``transform`` (kvtool/methods/transform.py),
which goes on to stages of 3, 4 and 8 bits. Values are read by a map fitted to attention outputs there as well.
"""

from typing import ClassVar

from pydantic.dataclasses import dataclass

from kvtool.methods.transform import Transform


@dataclass(frozen=True)
class Placed(Transform):
    """Transform coding of one-bit stages, at most two of which share a level."""

    widest: ClassVar[int] = 2

    @property
    def evicts(self) -> bool:
        """Every token is kept, however few the bits."""
        return False
