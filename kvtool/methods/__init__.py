"""The registry of methods: one dict, and everything else derives from it."""

import difflib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from pydantic import ValidationError

from kvtool.errors import MethodOptionError
from kvtool.methods.affine import Affine
from kvtool.methods.base import Method
from kvtool.methods.eviction import Eviction
from kvtool.methods.exact import Exact
from kvtool.methods.fp8 import Fp8
from kvtool.methods.h1b import H1B
from kvtool.methods.rabitq import RaBitQ
from kvtool.methods.rdkv import RDKV
from kvtool.methods.rina import RINA
from kvtool.methods.tiered import Tiered
from kvtool.methods.transform import Transform
from kvtool.methods.turboquant import TurboQuant

METHODS: dict[str, type[Method]] = {
    "exact": Exact,
    "fp8": Fp8,
    "affine": Affine,
    "turboquant": TurboQuant,
    "transform": Transform,
    "rdkv": RDKV,
    "eviction": Eviction,
    "rabitq": RaBitQ,
    "rina": RINA,
    "h1b": H1B,
    "tiered": Tiered,
}


def make_method(name: str, options: Mapping[str, Any] | None = None, *, where: str = "--method") -> Method:
    """The method ``name`` with ``options``; strings are parsed as the option's type.

    Raises:
        MethodOptionError: unknown method or option (the nearest name is suggested), or a value out of range.
    """
    if name not in METHODS:
        raise MethodOptionError(f"{where}: no method '{name}'; {suggest(name, METHODS)}")
    method, options = METHODS[name], dict(options or {})
    known = [field.name for field in fields(method)]
    for option in options:
        if option not in known:
            raise MethodOptionError(f"{where}: {name} has no option '{option}'; {suggest(option, known)}")
    try:
        return method(**options)
    except ValidationError as error:
        first = error.errors()[0]
        # what speaks of several options together has no place of its own
        option = ".".join(map(str, first["loc"]))
        what = f"{name} {option}={first['input']!r}" if option else name
        message = str(first["msg"]).removeprefix("Value error, ")
        raise MethodOptionError(f"{where}: {what}: {message}") from error


def suggest(word: str, known: Any) -> str:
    """``did you mean 'x'?`` for the nearest of ``known``, or what there is."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"did you mean '{near[0]}'?" if near else "there are: " + ", ".join(sorted(known))
