"""From a capture to an artifact: fit on the first three quarters of every sample, judge on the last.

The judge is the error of the attention output on held-out tokens, with captured queries, against exact attention.
What was learnt from data must beat the same method without data there, or the latter is what is written.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from kvtool import attention, home
from kvtool.calibration import CachePolicy, Calibration
from kvtool.capture import Capture, LayerSample
from kvtool.errors import CaptureError
from kvtool.methods.base import Method, Progress
from kvtool.models import LoadedModel, load_model
from kvtool.packing import PAGE

QUERY_BLOCK = 32  # queries whose errors count as one observation: neighbours are alike
LAST_QUERIES = 32  # handed to methods that look at attention, as the runtime does


@dataclass(frozen=True)
class LayerScore:
    """Relative L2 error of one layer's attention output on held-out tokens; data_free is None if nothing was learnt."""

    layer: int
    fitted: float
    data_free: float | None


@dataclass(frozen=True)
class FitReport:
    """What ``fit`` made.

    kept: ``fitted``, or ``data-free`` if that was better.
    fitted, data_free: mean error over layers; difference: fitted - data_free with its paired standard error over
        blocks of queries. None where there is nothing to compare.
    """

    calibration: Calibration
    path: Path
    verdict: str
    kept: str
    scores: tuple[LayerScore, ...]
    fitted: float | None = None
    data_free: float | None = None
    difference: float | None = None
    standard_error: float | None = None


def fit(
    capture: Capture,
    method: Method,
    *,
    policy: CachePolicy | None = None,
    out: Path | None = None,
    command: str | None = None,
    model: Callable[[], LoadedModel] | None = None,
    progress: Progress | None = None,
) -> FitReport:
    """Fit ``method`` to ``capture``, compare with its data-free self on held-out tokens, write the better artifact.

    out: default ``$KVTOOL_HOME/calibrations/<model>-<method>-<options>.safetensors``. The file becomes the newest
    calibration. ``command`` is recorded in its provenance.
    model: loads the model that was captured, for a method that adapts it; default: by the name in the capture.

    Raises:
        CaptureError: layers are missing from the capture, or it is too short.
        CalibrationError: the artifact cannot be written.
    """
    policy = policy or CachePolicy()
    _check_layers(capture, method)
    shown = FitPart(capture, 0 if method.sees_sinks else policy.sinks)
    free = method.data_free()
    steps = 2 * len(capture.layers)  # each layer is fitted, then scored

    def report(done: int, total: int = steps) -> None:
        if progress:
            progress(done, steps)

    tensors = method.fit(cast(Capture, shown), progress=report)
    raced = method.race(
        capture, tensors, policy=policy, start=shown.stop, report=lambda done: report(steps // 2 + done)
    )
    tensors = tensors if raced is None else raced.tensors
    candidates = [Calibration(method, capture.shape, tensors, policy)]
    if free is not None:
        candidates.append(Calibration(free, capture.shape, free.fit(cast(Capture, shown)), policy))
    errors: dict[int, Tensor] = {}
    notes: list[list[dict[str, float]]] = [[] for _ in candidates]
    if raced is None:
        errors = _errors(capture, candidates, shown.stop, lambda done: report(steps // 2 + done), notes)
    summary = _summary(errors)
    worse = (summary.get("difference") or 0.0) > 0
    kept = "data-free" if worse else "fitted"
    chosen, noted = candidates[1 if worse else 0], mean_notes(notes[1 if worse else 0])
    manifest = capture.manifest
    provenance: dict[str, Any] = {
        "model": manifest.model,
        "revision": manifest.revision,
        "fingerprint": manifest.fingerprint,
        "capture": str(capture.path.resolve()),
        "capture_sha256": capture.sha256,
        "text": manifest.text,
        "fit_tokens": shown.stop,
        "command": command,
        "kept": kept,
        "held_out": {"measure": "relative L2 error of the attention output, mean over layers", **summary},
    }
    if raced is not None:
        provenance["held_out"] = raced.record
    elif noted:
        provenance["notes"] = noted
    loader = model or partial(load_model, manifest.model, revision=manifest.revision)
    tuned = chosen.method.tune(chosen, capture, model=loader, stop=shown.stop, progress=progress)
    if tuned is not None:
        chosen = tuned.apply(chosen)
        provenance["finetune"] = tuned.record()
    calibration = replace(chosen, provenance=provenance)
    path = calibration.save(out or default_path(manifest.model, chosen.method))
    home.remember("calibration", path)
    scores = tuple(
        LayerScore(i, float(e[0].mean()), float(e[1].mean()) if len(e) > 1 else None) for i, e in errors.items()
    )
    verdict = _verdict(method, summary) if raced is None else raced.verdict
    if tuned is not None:
        verdict = f"{verdict}; {tuned.verdict}"
    return FitReport(calibration, path, verdict, kept, scores, **summary)


def default_path(model: str, method: Method) -> Path:
    """``$KVTOOL_HOME/calibrations/smollm2-turboquant-k3v3.safetensors``; options that are no default are named."""
    options = {name: getattr(method, name) for name in method.__dataclass_fields__}
    bits = [f"{side}{options.pop(f'{side}_bits')}" for side in "kv" if f"{side}_bits" in options]
    default = type(method)()
    others = [f"{name}-{value}" for name, value in options.items() if value != getattr(default, name)]
    parts = [Path(model).name, method.name, "".join(bits), *others]
    stem = "-".join(re.sub(r"[^\w.]+", "_", part).strip("_") for part in parts if part)
    return home.home() / "calibrations" / f"{stem}.safetensors"


class FitPart:
    """What a method may see of a capture: every sample without its sinks and its last quarter."""

    def __init__(self, capture: Capture, sinks: int) -> None:
        context = capture.manifest.context
        self.start, self.stop = sinks, context * 3 // 4 // PAGE * PAGE
        if self.stop - self.start < PAGE:
            raise CaptureError(
                f"{capture.path}: expected samples of at least {2 * PAGE + 4 * sinks} tokens to fit to three quarters "
                f"of each, found {context}; capture a longer --context"
            )
        self.path, self.shape, self.layers, self.manifest = (
            capture.path,
            capture.shape,
            capture.layers,
            capture.manifest,
        )
        self._capture = capture

    def samples(self, layer: int, *, tokens: slice | None = None) -> Iterator[LayerSample]:
        """The samples of a layer; ``tokens`` narrows the range further."""
        start, stop, _ = (tokens or slice(None)).indices(self.stop)
        return self._capture.samples(layer, tokens=slice(max(start, self.start), min(stop, self.stop)))


def _check_layers(capture: Capture, method: Method) -> None:
    if not capture.shape.compressible:
        kinds = ", ".join(sorted({str(layer.kind) for layer in capture.shape.layers}))
        raise CaptureError(
            f"{capture.path}: expected layers whose cache grows with the context, found only {kinds} in "
            f"{capture.manifest.model}; this model has nothing to compress"
        )
    missing = sorted(set(capture.shape.compressible) - set(capture.layers))
    needed = {name.split(".")[1] for name in method.schema(capture.shape) if name.startswith("layers.")}
    absent = [i for i in missing if str(i) in needed]
    if absent:
        raise CaptureError(
            f"{capture.path}: {method.name} needs every layer that grows with the context, and layers "
            f"{', '.join(map(str, absent))} were not captured; capture again with --layers all"
        )


def mean_notes(notes: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of each of the ``notes`` that a method made on several parts."""
    return {name: sum(one[name] for one in notes) / len(notes) for name in (notes[0] if notes else {})}


def _errors(
    capture: Capture,
    candidates: Sequence[Calibration],
    start: int,
    report: Callable[[int], None],
    notes: list[list[dict[str, float]]],
) -> dict[int, Tensor]:
    """Error of every candidate per layer and block of queries, {layer: [candidates, blocks]}; {} without queries.

    What the candidates note of the parts they are judged by is appended to ``notes``.
    """
    if capture.manifest.queries == "none":
        return {}
    errors = {}
    exact_layers = candidates[0].policy.exact_layers
    for done, i in enumerate(capture.layers):
        if i not in exact_layers:
            blocks = [_sample_errors(sample, candidates, start, notes) for sample in capture.samples(i)]
            errors[i] = torch.cat(blocks, 1)
        report(done + 1)
    return {i: e for i, e in errors.items() if e.shape[1]}


def _sample_errors(
    sample: LayerSample, candidates: Sequence[Calibration], start: int, notes: list[list[dict[str, float]]]
) -> Tensor:
    """Queries of the last quarter of the held-out tokens attend to the sinks, exact, and to the rest, compressed."""
    pages = (sample.keys.shape[1] - start) // PAGE
    stop = start + PAGE * (pages - pages // 4 if pages > 1 else pages)
    policy, shape = candidates[0].policy, sample.shape
    assert sample.queries is not None
    assert sample.query_positions is not None
    asked = sample.query_positions >= (stop if pages > 1 else start)
    queries = sample.queries[None, :, asked].float()[:, :, -candidates[0].method.judged_by :]
    if not pages or not queries.shape[2]:
        return torch.empty(len(candidates), 0)
    keys, values = sample.keys[None].float(), sample.values[None].float()
    seen = torch.cat([torch.arange(policy.sinks), torch.arange(start, stop)])
    whole = attention.attend(queries, keys[:, :, seen], values[:, :, seen], scale=shape.scale, softcap=shape.softcap)
    sinks = attention.attend(
        queries, keys[:, :, : policy.sinks], values[:, :, : policy.sinks], scale=shape.scale, softcap=shape.softcap
    )
    rows = []
    for candidate, own in zip(candidates, notes, strict=True):
        part, noted = _attend_compressed(candidate, sample, queries, slice(start, stop))
        own += [noted] if noted else []
        found = attention.merge(sinks, part) if policy.sinks else part
        rows.append(_by_block(found.out, whole.out))
    return torch.stack(rows)


def _attend_compressed(
    candidate: Calibration, sample: LayerSample, queries: Tensor, tokens: slice
) -> tuple[attention.Attended, dict[str, float]]:
    layer, method, shape = candidate.layer(sample.layer), candidate.method, sample.shape
    keys, values = sample.keys[None].float(), sample.values[None].float()
    sinks, positions = candidate.policy.sinks, sample.positions[tokens]
    outside = torch.cat([torch.arange(sinks), torch.arange(tokens.stop, keys.shape[2])])
    last = queries[:, :, -LAST_QUERIES:]
    carry = method.begin(last, keys[:, :, outside], values[:, :, outside], layer, sinks=sinks)
    kv, _ = method.compress(
        keys[:, :, tokens], values[:, :, tokens], layer, positions=positions, queries=last, carry=carry
    )
    found = method.attend(queries, kv, layer, positions=positions, scale=shape.scale, softcap=shape.softcap)
    return found, method.notes(kv)


def _by_block(found: Tensor, exact: Tensor) -> Tensor:
    """Relative L2 error of each block of queries over all heads, [blocks]."""
    blocks = [slice(i, i + QUERY_BLOCK) for i in range(0, exact.shape[2], QUERY_BLOCK)]
    return torch.stack([attention.relative_error(found[:, :, b], exact[:, :, b]) for b in blocks])


def _summary(errors: dict[int, Tensor]) -> dict[str, float | None]:
    """Means over layers and blocks, and the paired difference with its standard error over blocks."""
    if not errors:
        return {"fitted": None}
    over_layers = torch.stack(list(errors.values())).mean(0)  # [candidates, blocks]
    fitted = float(over_layers[0].mean())
    if len(over_layers) == 1:
        return {"fitted": fitted}
    difference = over_layers[0] - over_layers[1]
    blocks = len(difference)
    error = float(difference.std() / math.sqrt(blocks)) if blocks > 1 else None
    return {
        "fitted": fitted,
        "data_free": float(over_layers[1].mean()),
        "difference": float(difference.mean()),
        "standard_error": error,
    }


def _verdict(method: Method, summary: dict[str, float | None]) -> str:
    """One line for a person."""
    fitted, free, difference = (summary.get(name) for name in ("fitted", "data_free", "difference"))
    if fitted is None:
        return "not scored: the capture has no queries; capture with --queries all to compare with the data-free method"
    if free is None or difference is None:
        return f"attention-output error on held-out tokens {fitted:.4f}; no other {method.name} without data to compare"
    error = summary.get("standard_error")
    figures = (
        f"attention-output error on held-out tokens {fitted:.4f} calibrated, {free:.4f} data-free "
        f"(difference {difference:+.4f}" + (f" +- {error:.4f})" if error is not None else ")")
    )
    if difference > 0:
        return f"the calibrated artifact is worse, so the data-free one was written: {figures}"
    if error is not None and -difference < 2 * error:
        return f"calibrated kept, though within two standard errors of data-free: {figures}"
    return f"calibrated is better: {figures}"
