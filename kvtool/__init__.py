"""kvtool: capture a model's KV cache, fit compression to it, verify what it claims, serve it compressed."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# resolved on first use: importing torch alone takes longer than this package may
_PUBLIC = {
    "Attended": "kvtool.attention",
    "CachePolicy": "kvtool.policy",
    "CacheShape": "kvtool.shapes",
    "Calibration": "kvtool.calibration",
    "Capture": "kvtool.capture",
    "KvtoolError": "kvtool.errors",
    "METHODS": "kvtool.methods",
    "Method": "kvtool.methods.base",
    "attend": "kvtool.attention",
    "fit": "kvtool.fitting",
    "load_model": "kvtool.models",
    "make_method": "kvtool.methods",
    "merge": "kvtool.attention",
    "record": "kvtool.capture",
    "serve": "kvtool.runtime",
}

__all__ = [
    "METHODS",
    "Attended",
    "CachePolicy",
    "CacheShape",
    "Calibration",
    "Capture",
    "KvtoolError",
    "Method",
    "__version__",
    "attend",
    "fit",
    "load_model",
    "make_method",
    "merge",
    "record",
    "serve",
]

if TYPE_CHECKING:
    from kvtool.attention import Attended, attend, merge
    from kvtool.calibration import Calibration
    from kvtool.capture import Capture, record
    from kvtool.errors import KvtoolError
    from kvtool.fitting import fit
    from kvtool.methods import METHODS, make_method
    from kvtool.methods.base import Method
    from kvtool.models import load_model
    from kvtool.policy import CachePolicy
    from kvtool.runtime import serve
    from kvtool.shapes import CacheShape


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'kvtool' has no attribute '{name}'")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return __all__
