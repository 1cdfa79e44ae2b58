"""A capture: the real queries, keys and values of a model, on disk."""

from kvtool.capture.sample import LayerSample

__all__ = ["LayerSample"]
