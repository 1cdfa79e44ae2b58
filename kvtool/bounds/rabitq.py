"""The whole check of RaBitQ's bound: layers, heads, widths, rotations; and what the error does to attention."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from kvtool import attention as exact_attention
from kvtool.bounds import theory
from kvtool.bounds.judging import HeadResult, judge
from kvtool.bounds.pairs import (
    Estimator,
    Tally,
    choose_pairs,
    digest,
    estimator,
    fix,
    fresh_rotations,
    quantised_estimator,
    rotate_once,
)
from kvtool.methods import rabitq_code as code
from kvtool.methods.base import LayerCalibration, Progress
from kvtool.methods.rabitq import RaBitQ

if TYPE_CHECKING:
    from kvtool.calibration import Calibration
    from kvtool.capture import Capture, LayerSample


@dataclass(frozen=True)
class Settings:
    """What is checked, and on how many pairs. A certificate records it."""

    bits: tuple[int, ...] = Field((1,), min_length=1)
    epsilon: float = Field(1.9, gt=0, le=16)
    delta: float | None = Field(None, gt=0, lt=1)
    rotations: int = Field(32, ge=8)
    confidence: float = Field(0.99, ge=0.5, lt=1)
    keys: int = Field(2048, ge=64)
    queries: int = Field(128, ge=1)
    query_bits: int = Field(0, ge=0, le=8)
    massive: float = Field(3.0, gt=1)
    seed: int = Field(0, ge=0)

    def limit(self, head_dim: int) -> float:
        """delta: as asked, or what the theorem promises for the worst pair, an orthogonal one."""
        return self.delta or theory.worst_violation(self.epsilon, code.padded(head_dim))


ROTATIONS_ATTENDED = 2  # rotations and queries per head for which whole attention is computed
QUERIES_ATTENDED = 8


def check_bound(
    calibration: "Calibration",
    capture: "Capture",
    settings: Settings,
    *,
    layers: Sequence[int] | None = None,
    estimate: Estimator | None = None,
    progress: Progress | None = None,
) -> Iterator[tuple[str, list[HeadResult]]]:
    """For each layer: the hash of what was measured and the results of its heads and widths.

    calibration: of method rabitq; its centres are used, its rotations are not: fresh ones are drawn.
    estimate: what is checked instead of the paper's estimate.
    """
    method = calibration.method
    assert isinstance(method, RaBitQ)
    if estimate is None:
        estimate = quantised_estimator(settings.query_bits) if settings.query_bits else estimator
    chosen = [i for i in capture.layers if layers is None or i in layers]
    # sinks, massive keys, bias, offset and variance of every head
    comparisons = 5 * sum(capture.shape.layers[i].num_kv_heads for i in chosen) * len(settings.bits)
    done, total = 0, len(chosen) * len(settings.bits) * settings.rotations
    for index in chosen:
        layer = calibration.layer(index)
        texts = [
            (sample, list(_choose(sample, method, layer, settings, calibration.policy.sinks)))
            for sample in capture.samples(index)
        ]
        results = []
        for bits in settings.bits:
            H, D = layer.shape.num_kv_heads, layer.shape.head_dim
            generator = torch.Generator().manual_seed((settings.seed * 1_000_003 + index) * 16 + bits)
            fixed = [[fix(pair) for pair in pairs] for _, pairs in texts]
            tallies = [[Tally() for _ in texts] for _ in range(H)]
            induced: list[Tensor] = []
            for number in range(settings.rotations):
                matrices = fresh_rotations(H, D, generator)
                for text, (sample, pairs) in enumerate(texts):
                    for head in range(H):
                        rotate_once(
                            tallies[head][text],
                            pairs[head],
                            fixed[text][head],
                            matrices[head],
                            bits,
                            settings.epsilon,
                            estimate,
                        )
                    if number < ROTATIONS_ATTENDED and not text:
                        induced.append(_induced(sample, method, layer, matrices, bits, estimate))
                done += 1
                if progress:
                    progress(done, total)
            effect = torch.stack(induced).mean(0)  # [H, 2]
            for head in range(H):
                results.append(
                    judge(
                        tallies[head],
                        [(pairs[head], fixed[text][head]) for text, (_, pairs) in enumerate(texts)],
                        layer=index,
                        head=head,
                        bits=bits,
                        epsilon=settings.epsilon,
                        delta=settings.limit(D),
                        confidence=settings.confidence,
                        comparisons=comparisons,
                        attention={
                            "weights_moved": float(effect[head, 0]),
                            "output_error": float(effect[head, 1]),
                        },
                    )
                )
        yield digest([pair for _, pairs in texts for pair in pairs]), results


def _choose(sample: "LayerSample", method: RaBitQ, layer: LayerCalibration, settings: Settings, sinks: int) -> Any:
    return choose_pairs(
        sample,
        method,
        layer,
        keys=settings.keys,
        queries=settings.queries,
        sinks=sinks,
        massive=settings.massive,
    )


def _induced(
    sample: "LayerSample", method: RaBitQ, layer: LayerCalibration, matrices: Tensor, bits: int, estimate: Estimator
) -> Tensor:
    """What the estimate does to attention over every token before a query, [H, 2].

    The share of the softmax that is moved (total variation) and the relative error of the output, the mean over the
    last queries of each head's group.
    """
    assert sample.queries is not None
    assert sample.query_positions is not None
    H, scale = sample.shape.num_kv_heads, sample.shape.scale
    asking = sample.queries[:, -QUERIES_ATTENDED:].float()  # [HQ, S, D]
    seen = sample.positions[None] <= sample.query_positions[-QUERIES_ATTENDED:, None]  # [S, T]
    residuals = sample.keys.float() - method.centre(layer, sample.positions)
    centred = asking - layer["query_mean"][:, None] if "query_mean" in layer.tensors else asking
    truth = exact_attention.logits(asking[None], sample.keys[None].float(), scale=scale)[0]  # [H, G, S, T]
    found = []
    for head in range(H):
        queries = centred.unflatten(0, (H, -1))[head].flatten(0, 1)
        norms = residuals[head].norm(dim=-1).clamp_min(1e-30), queries.norm(dim=-1).clamp_min(1e-30)
        q, k = (
            code.rotate((x / n[:, None])[None], matrices[head][None])[0]
            for x, n in ((queries, norms[1]), (residuals[head], norms[0]))
        )
        factors = estimate(q, k, code.encode(k, bits), bits)
        errors = scale * norms[1][:, None] * norms[0] * (factors.queries @ factors.keys.T)
        exact = truth[head].flatten(0, 1).masked_fill(~seen.repeat(truth.shape[1], 1), -torch.inf)
        before, after = exact.softmax(-1), (exact + errors).softmax(-1)
        values = sample.values[head].float()
        out = before @ values
        moved = (before - after).abs().sum(-1) / 2
        error = exact_attention.relative_error(after @ values, out, dim=-1)
        found.append(torch.stack([moved.mean(), error.mean().float()]))
    return torch.stack(found)
