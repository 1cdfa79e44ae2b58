"""No method hides an overflow: what it stores is finite, or the model is named as the cause."""

from typing import Any

import torch
from torch import Tensor

from kvtool.errors import ModelError


def require_finite(kv: Any, layer: int) -> None:
    """Refuse a compressed NamedTuple with a NaN or infinity in a floating-point field.

    Raises:
        ModelError: the keys or values were not finite, or too large for float16 scales.
    """
    for name, field in kv._asdict().items():
        if field.is_cuda and torch.cuda.is_current_stream_capturing():
            continue  # whoever captures asks: nothing can be read back now
        if field.is_floating_point() and not field.isfinite().all():
            raise ModelError(
                f"layer {layer}: {name}: expected finite numbers below 65504, found NaN or more; "
                "the model's cache overflows: load the model in bfloat16 or float32"
            )


def require_finite_tokens(keys: Tensor, values: Tensor, layer: int) -> None:
    """The same of ``keys`` and ``values`` themselves, for a method whose scales or choices would not show it.

    Raises:
        ModelError: a NaN or an infinity among them.
    """
    for name, x in (("keys", keys), ("values", values)):
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            continue
        if not x.isfinite().all():
            raise ModelError(
                f"layer {layer}: {name}: expected finite numbers, found NaN or infinity; "
                "the model's cache overflows: load the model in bfloat16 or float32"
            )
