"""A capture: the real queries, keys and values of a model, on disk.

``record`` makes one, ``Capture`` reads it; reading needs no transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from kvtool.capture.reader import Capture
from kvtool.capture.sample import LayerSample

if TYPE_CHECKING:
    from kvtool.capture.planning import Plan, plan
    from kvtool.capture.recording import record

__all__ = ["Capture", "LayerSample", "Plan", "plan", "record"]

# these import transformers
_LAZY = {"Plan": "kvtool.capture.planning", "plan": "kvtool.capture.planning", "record": "kvtool.capture.recording"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'kvtool.capture' has no attribute '{name}'")
    return getattr(import_module(_LAZY[name]), name)
