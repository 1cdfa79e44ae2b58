"""An artifact's claims against held-out tokens of a capture.

Tokens of one text are not independent, so means carry the standard error of blocks of 64 tokens, and shares the
Clopper-Pearson limit for as many independent cases as those blocks are worth. A claim fails when it is refuted at the
stated confidence.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from scipy import stats
from torch import Tensor

from kvtool import scores
from kvtool.bounds.measures import Evidence, measure
from kvtool.bounds.statistics import clopper_pearson, effective_cases
from kvtool.calibration import Calibration
from kvtool.errors import CaptureError
from kvtool.methods.base import Claim, Progress
from kvtool.packing import PAGE

if TYPE_CHECKING:
    from kvtool.capture import Capture, LayerSample

QUERIES = 128  # of each query head, from the end of the text
SHOWN = 32  # of them, to the method


@dataclass(frozen=True)
class ClaimResult:
    """One claim in one layer: what was said, what was measured.

    measured: maximum, mean or share over all heads and held-out tokens, as the claim's kind says.
    standard_error: of a mean or share, from blocks of 64 tokens; None for a maximum.
    bound: what is compared with the limit: the maximum, the lower confidence limit of a mean, the upper one of a share.
    worst_head, worst: the head with the largest figure.
    """

    layer: int
    quantity: str
    kind: str
    source: str
    limit: float
    measured: float
    standard_error: float | None
    bound: float
    worst_head: int
    worst: float
    tokens: int
    holds: bool

    def as_dict(self) -> dict[str, Any]:
        """The record of ``--json``."""
        return asdict(self)


def check_claims(
    calibration: Calibration,
    capture: "Capture",
    *,
    layers: Sequence[int] | None = None,
    confidence: float = 0.99,
    progress: Progress | None = None,
) -> list[ClaimResult]:
    """Every claim of the artifact's method, layer by layer, on tokens it was not fitted to.

    Raises:
        CaptureError: the capture has no queries and a claim speaks of them, or it is too short.
    """
    chosen = [i for i in capture.layers if layers is None or i in layers]
    chosen = [i for i in chosen if i not in calibration.policy.exact_layers]
    claims = calibration.method.claims(calibration.shape, calibration.tensors)
    results: list[ClaimResult] = []
    for done, index in enumerate(chosen):
        mine = [claim for claim in claims if claim.layer in (None, index)]
        if mine:
            results += _check_layer(calibration, list(_evidence(calibration, capture, index)), index, mine, confidence)
        if progress:
            progress(done + 1, len(chosen))
    return results


def held_out(calibration: Calibration, tokens: int) -> tuple[int, int]:
    """The tokens [start, stop) of a sample that are measured: not fitted to, not kept exact, whole blocks.

    The artifact says what it was fitted to (provenance ``fit_tokens``, of each sample); else it is the last quarter.
    """
    fitted = calibration.provenance.get("fit_tokens")
    start = int(fitted) if isinstance(fitted, int) and fitted < tokens else tokens - tokens // 4
    start = max(start, calibration.policy.sinks)
    block = calibration.method.block or PAGE
    # the newest tokens stay exact in serving; a text too short for that is measured to its end
    outside = calibration.policy.window if tokens - calibration.policy.window - start >= block else 0
    return start, start + (tokens - outside - start) // block * block


def _evidence(calibration: Calibration, capture: "Capture", index: int) -> "Iterator[Evidence]":
    layer = calibration.layer(index)
    for sample in capture.samples(index):
        yield evidence(calibration, sample, layer)


def evidence(calibration: Calibration, sample: "LayerSample", layer: Any) -> Evidence:
    """The held-out tokens of one sample, compressed.

    Raises:
        CaptureError: fewer than one page of tokens is left.
    """
    start, stop = held_out(calibration, sample.keys.shape[1])
    if stop - start < PAGE:
        raise CaptureError(
            f"layer {sample.layer} sample {sample.sample}: expected at least {PAGE} held-out tokens, found "
            f"{stop - start} of {sample.keys.shape[1]}; capture a longer context"
        )
    keys, values = sample.keys[:, start:stop].float(), sample.values[:, start:stop].float()
    positions = sample.positions[start:stop]
    queries = None if sample.queries is None else sample.queries[:, -QUERIES:].float()
    last = None if queries is None else queries[None, :, -SHOWN:]
    sinks = calibration.policy.sinks
    outside = torch.cat([torch.arange(sinks), torch.arange(stop, sample.keys.shape[1])])
    exact = sample.keys[None, :, outside].float(), sample.values[None, :, outside].float()
    carry = calibration.method.begin(last, *exact, layer, sinks=sinks)
    kv, _ = calibration.method.compress(keys[None], values[None], layer, positions=positions, queries=last, carry=carry)
    decoded = calibration.method.decompress(kv, layer, positions=positions)
    rest = None
    if queries is not None and sample.query_positions is not None:
        ago = (sample.positions > sample.query_positions[-QUERIES:, None]).sum(1)
        rest = scores.around(queries[None], *exact, sample.shape, sinks=sinks, ago=ago)
    return Evidence(calibration.method, layer, keys, values, queries, positions, kv, decoded, rest, SHOWN)


def _check_layer(
    calibration: Calibration, parts: Sequence[Evidence], index: int, claims: Sequence[Claim], confidence: float
) -> list[ClaimResult]:
    results = []
    for claim in claims:
        cases = [measure(claim.quantity, part) for part in parts]
        results.append(_judge(claim, index, torch.cat(cases, 1).double(), confidence))
    return results


def _judge(claim: Claim, index: int, cases: Tensor, confidence: float) -> ClaimResult:
    """``cases`` [H, N] against the claim."""
    heads = cases.amax(1) if claim.kind == "always" else cases.mean(1)
    measured, error = float(heads.max()), None
    bound = measured
    if claim.kind != "always":
        measured, error = float(cases.mean()), _block_error(cases)
    if claim.kind == "expected":
        freedom = max(1, cases.shape[1] // PAGE - 1)
        bound = measured - float(stats.t.ppf(confidence, freedom)) * (error or 0.0)
    if claim.kind == "probability":
        bound = clopper_pearson(measured, effective_cases(measured, error or 0.0, cases.numel()), confidence)
    worst = int(heads.argmax())
    return ClaimResult(
        layer=index,
        quantity=claim.quantity,
        kind=claim.kind,
        source=claim.source,
        limit=claim.limit,
        measured=measured,
        standard_error=error,
        bound=bound,
        worst_head=worst,
        worst=float(heads[worst]),
        tokens=cases.shape[1],
        holds=bound <= claim.limit,
    )


def _block_error(cases: Tensor) -> float:
    """Standard error of the mean of ``cases`` [H, N] from blocks of 64 neighbours; 0 if there is only one block."""
    blocks = cases.shape[1] // PAGE
    if blocks < 2:
        return 0.0
    means = cases[:, : blocks * PAGE].mean(0).unflatten(0, (blocks, PAGE)).mean(1)
    return float(means.std() / blocks**0.5)
