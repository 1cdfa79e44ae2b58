"""A certificate: what was verified, on what, with which seeds, so that anyone can run it again bit for bit.

One JSON object:

    certificate   1, the format
    kind          ``rabitq`` (per-pair bound over fresh rotations) or ``claims`` (an artifact's own)
    holds         the verdict; failures: who and why
    inputs        capture, calibration or method with options, and their hashes; layers: hash of the numbers measured
    settings      seeds, counts, epsilon, delta, confidence
    results       one record per layer, head and width, or per layer and claim; floats to six digits
    made          kvtool, torch and platform versions, threads, date, seconds: not compared by ``--check``
"""

import json
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import kvtool
from kvtool import home
from kvtool.bounds.claims import check_claims
from kvtool.bounds.rabitq import Settings, check_bound
from kvtool.calibration import CachePolicy, Calibration
from kvtool.capture import Capture
from kvtool.errors import InputError
from kvtool.fitting import FitPart
from kvtool.methods import make_method
from kvtool.methods.base import Method, Progress

FORMAT = 1
COMPARED = ("certificate", "kind", "holds", "failures", "inputs", "settings", "results")


@dataclass(frozen=True)
class Inputs:
    """What is verified: a calibration and the capture that tests it.

    artifact: the file the calibration was read from; None if it was fitted here, to the capture itself.
    """

    calibration: Calibration
    capture: Capture
    artifact: Path | None = None

    def record(self) -> dict[str, Any]:
        """Paths and hashes; of a method fitted here, its options instead."""
        method = self.calibration.method
        return {
            "capture": str(self.capture.path),
            "capture_sha256": self.capture.sha256,
            "calibration": None if self.artifact is None else str(self.artifact),
            "fingerprint": self.calibration.fingerprint,
            "method": method.name,
            "options": asdict(method),
            "model": self.capture.manifest.model,
        }


def read_inputs(artifact: Path, capture: Path | None = None) -> Inputs:
    """An artifact, and the capture it names or the one at ``capture``.

    Raises:
        InputError: the artifact names no capture, or it is gone.
        CalibrationError: the artifact was made for another shape.
    """
    calibration = Calibration.load(artifact)
    if capture is None:
        named = calibration.provenance.get("capture")
        if not named:
            raise InputError(f"{artifact}: its provenance names no capture; pass --capture DIR")
        capture = Path(str(named))
        if not capture.exists():
            raise InputError(f"{artifact}: fitted to the capture {capture}, which is gone; pass --capture DIR")
    data = Capture.open(capture)
    calibration.check_fits(data.shape, f"the capture {capture}")
    return Inputs(calibration, data, artifact.resolve())


def fit_inputs(capture: Path, method: Method, policy: CachePolicy | None = None) -> Inputs:
    """``method`` fitted to the first three quarters of a capture, in memory."""
    data, policy = Capture.open(capture), policy or CachePolicy()
    part = FitPart(data, policy.sinks)
    tensors = method.fit(part)  # type: ignore[arg-type]  # a view with the capture's own interface
    return Inputs(Calibration(method, data.shape, tensors, policy, {"fit_tokens": part.stop}), data)


def verify_claims(
    inputs: Inputs, *, confidence: float, layers: Sequence[int] | None, progress: Progress | None = None
) -> dict[str, Any]:
    """The certificate of an artifact's claims."""
    settings = {"confidence": confidence, "layers": None if layers is None else list(layers)}

    def measure() -> tuple[list[dict[str, Any]], list[str], dict[str, str]]:
        results = check_claims(
            inputs.calibration, inputs.capture, layers=layers, confidence=confidence, progress=progress
        )
        failures = [
            f"layer {r.layer} {r.quantity}: {r.bound:.6g} > {r.limit:.6g} (worst head {r.worst_head})"
            for r in results
            if not r.holds
        ]
        return [result.as_dict() for result in results], failures, {}

    return _certificate("claims", inputs, settings, measure)


def verify_rabitq(
    inputs: Inputs, settings: Settings, *, layers: Sequence[int] | None, progress: Progress | None = None
) -> dict[str, Any]:
    """The certificate of RaBitQ's per-pair bound."""
    limits = {
        str(i): settings.limit(inputs.capture.shape.layers[i].head_dim)
        for i in inputs.capture.layers
        if layers is None or i in layers
    }
    recorded = {**asdict(settings), "layers": None if layers is None else list(layers), "limits": limits}

    def measure() -> tuple[list[dict[str, Any]], list[str], dict[str, str]]:
        records, failures, hashes = [], [], {}
        for digest, results in check_bound(
            inputs.calibration, inputs.capture, settings, layers=layers, progress=progress
        ):
            hashes[str(results[0].layer)] = digest
            for result in results:
                records.append(result.as_dict())
                failures += [f"layer {result.layer} head {result.head} {result.bits}-bit: {f}" for f in result.failures]
        return records, failures, hashes

    return _certificate("rabitq", inputs, recorded, measure)


def _certificate(
    kind: str,
    inputs: Inputs,
    settings: dict[str, Any],
    measure: Callable[[], tuple[list[dict[str, Any]], list[str], dict[str, str]]],
) -> dict[str, Any]:
    started = datetime.now(UTC)
    results, failures, hashes = measure()
    return {
        "certificate": FORMAT,
        "kind": kind,
        "holds": not failures,
        "failures": failures,
        "inputs": {**inputs.record(), "layers": hashes},
        "settings": settings,
        "results": results,
        "made": {
            "kvtool": kvtool.__version__,
            "torch": torch.__version__,
            "platform": platform.platform(),
            "threads": torch.get_num_threads(),
            "date": started.isoformat(timespec="seconds"),
            "seconds": round((datetime.now(UTC) - started).total_seconds(), 1),
        },
    }


def save(certificate: dict[str, Any], out: Path | None = None) -> Path:
    """Write a certificate, by default under ``$KVTOOL_HOME/certificates``; it becomes the newest one."""
    if out is None:
        inputs = certificate["inputs"]
        name = f"{Path(inputs['model']).name}-{inputs['method']}-{certificate['kind']}-{inputs['fingerprint'][:8]}.json"
        out = home.home() / "certificates" / name
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        home.write_atomically(out, json.dumps(certificate, indent=1) + "\n")
    except OSError as error:
        raise InputError(f"{out}: cannot write the certificate: {error.strerror}") from error
    home.remember("certificate", out)
    return out


def check(path: Path, *, capture: Path | None = None, progress: Progress | None = None) -> str | None:
    """Run a certificate again; the first difference as ``results[3].bulk.violations: 17 against 18``, or None.

    Raises:
        InputError: it is no certificate, or its inputs changed.
    """
    recorded = _read(path)
    inputs, settings = recorded["inputs"], dict(recorded["settings"])
    threads = torch.get_num_threads()
    torch.set_num_threads(int(recorded.get("made", {}).get("threads") or os.cpu_count() or 1))
    try:
        found_inputs = _reopen(path, inputs, capture)
        layers = settings.pop("layers")
        if recorded["kind"] == "claims":
            again = verify_claims(found_inputs, confidence=settings["confidence"], layers=layers, progress=progress)
        else:
            settings.pop("limits")
            settings["bits"] = tuple(settings["bits"])
            again = verify_rabitq(found_inputs, Settings(**settings), layers=layers, progress=progress)
    finally:
        torch.set_num_threads(threads)
    # paths may differ, what they hold may not
    again["inputs"] |= {key: inputs[key] for key in ("capture", "calibration")}
    for key in COMPARED:
        difference = _difference(key, recorded[key], json.loads(json.dumps(again[key])))
        if difference:
            return difference
    return None


def _reopen(path: Path, inputs: dict[str, Any], capture: Path | None) -> Inputs:
    where = capture or Path(inputs["capture"])
    if inputs["calibration"] is not None:
        found = read_inputs(Path(inputs["calibration"]), where)
    else:
        found = fit_inputs(where, make_method(inputs["method"], inputs["options"], where=str(path)))
    if found.capture.sha256 != inputs["capture_sha256"]:
        raise InputError(f"{path}: the capture {where} has changed since: expected sha256 {inputs['capture_sha256']}")
    if found.calibration.fingerprint != inputs["fingerprint"]:
        raise InputError(f"{path}: the calibration has changed since: expected fingerprint {inputs['fingerprint']}")
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        recorded = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: expected a certificate (JSON), found something unreadable: {error}") from error
    if not isinstance(recorded, dict) or recorded.get("certificate") != FORMAT:
        raise InputError(f"{path}: expected a kvtool certificate of format {FORMAT}; 'kvtool verify-bound' makes one")
    missing = [key for key in COMPARED if key not in recorded]
    if missing:
        raise InputError(f"{path}: a certificate without {', '.join(missing)}; make it again")
    return recorded


def _difference(where: str, one: Any, other: Any) -> str | None:
    """The first leaf in which two JSON values differ."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        pairs = [(f"{where}.{key}", one[key], other[key]) for key in one]
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = [(f"{where}[{i}]", a, b) for i, (a, b) in enumerate(zip(one, other, strict=True))]
    else:
        return None if one == other else f"{where}: {one} against {other}"
    return next((found for pair in pairs if (found := _difference(*pair))), None)
