"""Where verify-bound takes its tokens from."""

from pathlib import Path
from typing import TYPE_CHECKING

from kvtool.calibration import Calibration
from kvtool.errors import InputError

if TYPE_CHECKING:
    from kvtool.capture import Capture


def capture_of(calibration: Calibration, where: Path, instead: Path | None = None) -> "Capture":
    """The capture an artifact was fitted to, or the one at ``instead``.

    Raises:
        InputError: the artifact does not name one, or it is gone.
    """
    from kvtool.capture import Capture

    if instead is not None:
        return Capture.open(instead)
    named = calibration.provenance.get("capture")
    if isinstance(named, dict):
        named = named.get("path")
    if not named:
        raise InputError(f"{where}: its provenance names no capture; pass --capture DIR")
    if not Path(str(named)).exists():
        raise InputError(f"{where}: fitted to the capture {named}, which is gone; pass --capture DIR")
    return Capture.open(Path(str(named)))
