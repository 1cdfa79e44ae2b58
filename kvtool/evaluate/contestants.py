"""What is compared: calibrations from files, and the baselines every table shows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kvtool.calibration import Calibration
from kvtool.errors import InputError
from kvtool.methods import make_method, suggest
from kvtool.methods.exact import Exact
from kvtool.policy import CachePolicy
from kvtool.shapes import CacheShape

DEFAULT_BASELINES = ("full", "fp8", "int8", "kivi4", "kivi2")


@dataclass(frozen=True)
class Contestant:
    """One row of the table. ``calibration`` is None for the full cache itself."""

    name: str
    calibration: Calibration | None
    path: Path | None = None

    @property
    def kind(self) -> str:
        """``full``, ``baseline`` or ``calibration``."""
        return "full" if self.calibration is None else "baseline" if self.path is None else "calibration"

    @property
    def lossless(self) -> bool:
        """Whether a drift of exactly zero is what it should be."""
        return self.calibration is None or isinstance(self.calibration.method, Exact)


def parse_baselines(text: str, shape: CacheShape) -> list[Contestant]:
    """Baselines from ``full,fp8`` for a model of ``shape``; ``none`` is the full cache alone, which is always there.

    Raises:
        InputError: an unknown name; the nearest is suggested.
    """
    names = [name.strip() for name in text.lower().split(",") if name.strip() not in ("", "none")]
    for name in names:
        if name not in BASELINES:
            raise InputError(f"--baselines: no baseline '{name}'; {suggest(name, BASELINES)}")
    return [BASELINES[name](shape) for name in dict.fromkeys(["full", *names])]


def from_files(paths: Sequence[Path], *, sinks: int | None, window: int | None) -> list[Contestant]:
    """Calibrations under test, named by their files; ``sinks`` and ``window`` override the artifacts' policy."""
    contestants = []
    for path in paths:
        calibration = Calibration.load(path)
        changes = {"sinks": sinks, "window": window}
        policy = calibration.policy.model_copy(update={k: v for k, v in changes.items() if v is not None})
        contestants.append(Contestant(path.stem, replace(calibration, policy=policy), path))
    names = [one.name for one in contestants]
    return [replace(one, name=str(one.path)) if names.count(one.name) > 1 else one for one in contestants]


def _full(shape: CacheShape) -> Contestant:
    return Contestant("full", None)


def _baseline(name: str, method: str, window: int = 0, **options: object) -> Callable[[CacheShape], Contestant]:
    policy = CachePolicy(sinks=0, window=window)
    return lambda shape: Contestant(name, Calibration(make_method(method, options), shape, policy=policy))


# keys in groups of 32 tokens per channel, values of 32 channels per token, the last 128 tokens exact: KIVI's setting
_KIVI_WINDOW = 128

BASELINES: dict[str, Callable[[CacheShape], Contestant]] = {
    "full": _full,
    "exact": _baseline("exact", "exact"),
    "fp8": _baseline("fp8", "fp8"),
    "int8": _baseline("int8", "affine", k_bits=8, v_bits=8, k_axis="token", v_axis="token", k_group=0, v_group=0),
    "kivi4": _baseline("kivi4", "affine", _KIVI_WINDOW, k_bits=4, v_bits=4),
    "kivi2": _baseline("kivi2", "affine", _KIVI_WINDOW, k_bits=2, v_bits=2),
}
