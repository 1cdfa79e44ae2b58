"""Rows: what is printed, written and gated. docs/eval.md lists every key; none is ever renamed."""

import math
from dataclasses import asdict
from statistics import fmean
from typing import Any

import torch
import transformers

import kvtool
from kvtool.cache import CacheBytes
from kvtool.evaluate.contestants import Contestant
from kvtool.evaluate.kld import Drift, Estimate
from kvtool.evaluate.measure import Tally
from kvtool.evaluate.passkey import Recall
from kvtool.fitting import mean_notes

Row = dict[str, Any]


def describe(one: Contestant) -> Row:
    """What a contestant is."""
    row: Row = {"name": one.name, "kind": one.kind, "method": None, "options": {}, "artifact": None, "backend": None}
    row |= {"sinks": None, "window": None, "exact_layers": [], "fingerprint": None}
    if one.calibration is not None:
        policy = one.calibration.policy
        row |= {"method": one.calibration.method.name, "options": asdict(one.calibration.method)}
        row |= {"sinks": policy.sinks, "window": policy.window, "exact_layers": list(policy.exact_layers)}
        row |= {"artifact": str(one.path) if one.path else None, "fingerprint": one.calibration.fingerprint}
    return row


def versions() -> dict[str, str]:
    """The software that was measured with."""
    return {"kvtool": kvtool.__version__, "torch": torch.__version__, "transformers": transformers.__version__}


def drift_row(measured: Drift) -> Row:
    """The figures of the task kld."""
    return {
        "ppl": known(measured.ppl),
        "ppl_full": known(measured.ppl_full),
        **_estimate("ppl_ratio", measured.ppl_ratio),
        **_estimate("kld", measured.kld),
        "kld_token_error": known(measured.kld_token_error),
        "kld_median": known(measured.kld_median),
        "kld_p99": known(measured.kld_p99),
        "kld_p999": known(measured.kld_p999),
        "kld_max": known(measured.kld_max),
        **_estimate("same_top", measured.same_top),
        "rms_dp": known(measured.rms_dp),
        "positions": [{"from": a, "to": b, **_estimate("kld", kld)} for a, b, kld in measured.positions],
    }


def full_row(measured: Drift) -> Row:
    """The full cache against itself."""
    nothing = Estimate(0.0, 0.0)
    itself = Drift(
        ppl=measured.ppl_full,
        ppl_full=measured.ppl_full,
        ppl_ratio=Estimate(1.0, 0.0),
        kld=nothing,
        kld_token_error=0.0,
        kld_median=0.0,
        kld_p99=0.0,
        kld_p999=0.0,
        kld_max=0.0,
        same_top=Estimate(1.0, 0.0),
        rms_dp=0.0,
        positions=[(a, b, nothing) for a, b, _ in measured.positions],
    )
    return drift_row(itself)


def tally_row(tally: Tally) -> Row:
    """Attention errors and cost of one contestant."""
    errors = tally.attention_error()
    return {
        "attention_error": known(fmean(errors.values())) if errors else None,
        "attention_error_max": known(max(errors.values())) if errors else None,
        "attention_error_layers": {str(i): known(error) for i, error in errors.items()},
        "backend": tally.backend,
        "bytes_peak": tally.peak,
        "seconds": tally.seconds,
        "notes": mean_notes(tally.notes),
    }


def bytes_row(size: CacheBytes, *, compressed: bool) -> Row:
    """What the cache costs right after the prefix; kept as it is, what 16 bits a value would."""
    stored = size.stored if compressed else 2 * size.values
    return {
        "bits": 8 * stored / size.values,
        "bytes_stored": stored,
        "bytes_resident": size.resident if compressed else 2 * size.values,
        "bytes_host": size.host if compressed else 0,
        "bytes_disk": size.disk if compressed else 0,
        "tokens": size.tokens,
    }


def recall_row(task: str, found: Recall, size: CacheBytes | None, context: int) -> Row:
    """The figures of the task passkey or multikey."""
    return {
        task: found.hits / found.trials,
        f"{task}_hits": found.hits,
        f"{task}_trials": found.trials,
        f"{task}_low": found.low,
        f"{task}_high": found.high,
        f"{task}_by_depth": {f"{depth:g}": list(counts) for depth, counts in found.by_depth.items()},
        f"{task}_margin": found.median_margin,
        f"{task}_context": context,
        f"{task}_bits": size.bits_per_value if size else 16.0,
    }


def known(value: float) -> float | None:
    """None for what is not a number, which JSON cannot say."""
    return value if math.isfinite(value) else None


def mark_pareto(rows: list[Row]) -> None:
    """Add ``pareto`` and ``dominated_by``: another row is no worse in bits, drift and recall, and better in one.

    A row whose drift is not a number is dominated by nothing and dominates nothing.
    """
    for row in rows:
        better = [other["name"] for other in rows if other is not row and _dominates(other, row)]
        row["pareto"], row["dominated_by"] = not better, better[0] if better else None


def _dominates(a: Row, b: Row) -> bool:
    signs = {"bits": 1, "kld": 1, "passkey": -1, "multikey": -1}
    signed = [(sign, a[key], b[key]) for key, sign in signs.items() if key in a]
    if any(None in pair for pair in signed):
        return False
    gains = [sign * (theirs - mine) for sign, mine, theirs in signed]
    return all(gain >= 0 for gain in gains) and any(gain > 0 for gain in gains)


def _estimate(name: str, value: Estimate) -> Row:
    return {name: known(value.mean), f"{name}_error": known(value.error)}
