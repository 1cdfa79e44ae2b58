"""What a path is: a capture, an artifact, a directory of them, or else a model."""

from pathlib import Path

from kvtool.capture.manifest import COMPLETE, PARTIAL
from kvtool.errors import CalibrationError, InputError
from kvtool.inspection.records import Record, calibration_record, capture_record, model_record


def find(path: str) -> list[Record]:
    """The record of ``path``, or of everything in it two levels down if it is a directory of such things.

    Raises:
        InputError: there is nothing there that kvtool knows.
        KvtoolError: what is there cannot be read, with the reason.
    """
    place = Path(path).expanduser()
    if place.is_file() and place.suffix != ".gguf":
        return [calibration_record(place)]
    if _is_capture(place):
        return [capture_record(place)]
    if not place.is_dir() or (place / "config.json").is_file():
        return [_model(path)]
    found = [record for record in map(_peek, sorted([*place.glob("*"), *place.glob("*/*")])) if record]
    if not found:
        raise InputError(
            f"{place}: expected a model, a capture, an artifact or a directory of them, found none of these"
        )
    return found


def _is_capture(place: Path) -> bool:
    return (place / COMPLETE).is_file() or (place / PARTIAL).is_file()


def _model(path: str) -> Record:
    # a path that was mistyped must not be asked for at the hub
    if path.startswith((".", "/", "~")) and not Path(path).expanduser().exists():
        raise InputError(
            f"{path}: expected a model, a capture, an artifact or a directory of them, found nothing there"
        )
    return model_record(path)


def _peek(place: Path) -> Record | None:
    """The record of one entry of a directory; None for what is something else. Models are not loaded for a list."""
    if _is_capture(place):
        return capture_record(place)
    if place.suffix == ".safetensors" and place.is_file():
        try:
            return calibration_record(place)
        except CalibrationError:
            return None  # a shard, or some other tensor file
    return None
