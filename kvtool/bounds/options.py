"""Settings of the per-pair check from what a person typed."""

from typing import Any

from pydantic import ValidationError

from kvtool.bounds.rabitq import Settings
from kvtool.errors import InputError
from kvtool.methods.base import Method
from kvtool.methods.rabitq import RaBitQ


def settings_from(method: Method, *, bits: str | None, **values: Any) -> Settings:
    """``bits`` such as ``1,2,4``; None: the width of the artifact's keys, 1 for a sketch.

    Raises:
        InputError: a value that is no number or out of range, in one sentence.
    """
    assert isinstance(method, RaBitQ)
    own = method.k_bits if method.mode == "codes" else 1
    try:
        widths = (own,) if bits is None else tuple(int(part) for part in bits.split(","))
    except ValueError:
        raise InputError(f"--bits {bits}: expected widths such as 1,2,4") from None
    if not all(1 <= width <= 8 for width in widths):
        raise InputError(f"--bits {bits}: expected widths from 1 to 8")
    try:
        return Settings(bits=widths, **values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"])).replace("_", "-")
        raise InputError(f"--{name} {first['input']}: {first['msg'][0].lower() + first['msg'][1:]}") from error
