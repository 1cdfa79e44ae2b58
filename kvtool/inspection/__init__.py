"""Look at a model, a capture, an artifact, or a directory of them, without changing anything.

Captures and artifacts are known by their headers; tensors are read for statistics only.
"""

from kvtool.inspection.find import find
from kvtool.inspection.records import CalibrationRecord, CaptureRecord, ModelRecord, Record
from kvtool.inspection.statistics import LayerStatistics, layer_statistics

__all__ = ["CalibrationRecord", "CaptureRecord", "LayerStatistics", "ModelRecord", "Record", "find", "layer_statistics"]
