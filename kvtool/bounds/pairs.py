"""RaBitQ's bound on real (query, key) pairs, over freshly drawn rotations.

The probability in theorem 3.2 is over the rotation, so one rotation proves nothing: each is drawn anew from the Haar
measure, and the pairs stay fixed. For unit residuals o = (k - c_k)/|k - c_k| and q = (q - c_q)/|q - c_q|, rotated to o'
and q', and the code u of o', everything is in units of the stated bound without its epsilon:

    e = (rescale <q', u> - <q', o'>) / (sqrt(1/a^2 - 1) / sqrt(P - 1)),    a = <obar, o>

and the bound fails if |e| > epsilon. All e are one product, q' (rescale u - o')^T, and their first two moments are
products of Gram matrices.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kvtool import rotation as rotations
from kvtool.errors import CaptureError
from kvtool.methods import rabitq_code as code
from kvtool.methods import rabitq_query

if TYPE_CHECKING:
    from kvtool.capture import LayerSample
    from kvtool.methods.base import LayerCalibration
    from kvtool.methods.rabitq import RaBitQ

BINS, RANGE = 4096, 16.0  # histogram of |e|
_CHUNK = 1 << 21  # pairs at once: 8 MiB of float32


class Factors(NamedTuple):
    """errors = queries @ keys^T, in units of a cosine: [N, M] and [T, M]."""

    queries: Tensor
    keys: Tensor


# of rotated queries [N, P], rotated keys [T, P], their codes and the bits of those
Estimator = Callable[[Tensor, Tensor, Tensor, int], Factors]


def estimator(rotated_queries: Tensor, rotated_keys: Tensor, codes: Tensor, bits: int) -> Factors:
    """The paper's unbiased estimate, minus the truth."""
    scale = code.rescale(rotated_keys, codes, bits, "unbiased")[:, None]
    return Factors(rotated_queries, scale * code.grid(codes, bits) - rotated_keys)


def quantised_estimator(query_bits: int) -> Estimator:
    """The same with a query of ``query_bits`` bits, rounded to the nearest; the law of the bound leaves that out."""

    def estimate(rotated_queries: Tensor, rotated_keys: Tensor, codes: Tensor, bits: int) -> Factors:
        scale = code.rescale(rotated_keys, codes, bits, "unbiased")[:, None]
        query = rabitq_query.quantise(rotated_queries, query_bits).dequantised()
        return Factors(
            torch.cat([query, -rotated_queries], 1), torch.cat([scale * code.grid(codes, bits), rotated_keys], 1)
        )

    return estimate


class HeadPairs(NamedTuple):
    """The pairs of one KV head in one text: every query with every key.

    keys: residuals k - c_k [T, D] and ``special`` [T]: 0 bulk, 1 sink, 2 massive norm. queries: q - c_q [N, D], the
    heads of the group one after the other. scale: of the logits.
    """

    keys: Tensor
    special: Tensor
    queries: Tensor
    scale: float


@dataclass
class Tally:
    """What the rotations of one KV head have shown so far; all in float64.

    hits: pairs beyond the bound, of each key in each rotation [R, T]. histogram: of |e|, [BINS], and its largest value.
    slope, mean, square: per rotation [R], sums over pairs of e' c, e' and (e')^2 relative to what the law says, where
    e' is in units of a cosine for the first two and of the bound for the last. logit, logit_law: sums of the squared
    error of the logit, measured and by the law.
    """

    hits: list[Tensor] = field(default_factory=list)
    histogram: Tensor = field(default_factory=lambda: torch.zeros(BINS, dtype=torch.float64))
    largest: float = 0.0
    slope: list[float] = field(default_factory=list)
    mean: list[float] = field(default_factory=list)
    square: list[float] = field(default_factory=list)
    logit: list[float] = field(default_factory=list)
    logit_law: list[float] = field(default_factory=list)
    cosine: list[float] = field(default_factory=list)


def choose_pairs(
    sample: "LayerSample",
    method: "RaBitQ",
    layer: "LayerCalibration",
    *,
    keys: int,
    queries: int,
    sinks: int,
    massive: float,
) -> Iterator[HeadPairs]:
    """Up to ``keys`` keys from the first three quarters of a text and ``queries`` queries of each query head after it.

    So every query really attends to every key. massive: times the median norm of a residual, where "massive" begins.

    Raises:
        CaptureError: no queries, or a key or query that is not finite.
    """
    if sample.queries is None or sample.query_positions is None:
        raise CaptureError(
            f"layer {sample.layer}: the bound is about queries, and the capture has none; use --queries all"
        )
    T = sample.keys.shape[1]
    asked = (sample.query_positions >= sample.positions[3 * T // 4]).nonzero()[:, 0]
    if not len(asked):
        raise CaptureError(
            f"layer {sample.layer}: no query after the first three quarters of the text; use --queries all"
        )
    chosen_queries = asked[_spread(len(asked), queries)]
    before = int((sample.positions < sample.query_positions[chosen_queries[0]]).sum())
    chosen_keys = torch.cat(
        [torch.arange(min(sinks, before)), min(sinks, before) + _spread(before - sinks, keys - sinks)]
    )
    positions = sample.positions[chosen_keys]
    residuals = sample.keys[:, chosen_keys].float() - method.centre(layer, positions)
    asking = sample.queries[:, chosen_queries].float()
    if "query_mean" in layer.tensors:
        asking = asking - layer["query_mean"][:, None]
    for name, x in (("key", residuals), ("query", asking)):
        if not x.isfinite().all():
            head = int((~x.isfinite()).flatten(1).any(1).nonzero()[0])
            raise CaptureError(
                f"layer {sample.layer} {name} head {head}: expected finite numbers, found NaN or infinity"
            )
    for k, q in zip(residuals, asking.unflatten(0, (len(residuals), -1)), strict=True):
        norms = k.norm(dim=-1)
        special = torch.where(norms > massive * norms.median(), 2, 0)
        special[positions < sinks] = 1
        real = norms > 0  # a key on its centre has no direction, and no error
        yield HeadPairs(k[real], special[real], q.flatten(0, 1), sample.shape.scale)


def _spread(available: int, count: int) -> Tensor:
    """``count`` indices below ``available``, evenly spaced; all of them if there are no more."""
    if available <= count:
        return torch.arange(max(available, 0))
    return (torch.arange(count, dtype=torch.float64) * available / count).long()


def digest(pairs: Sequence[HeadPairs]) -> str:
    """sha256 of the numbers that are measured."""
    found = hashlib.sha256()
    for pair in pairs:
        for tensor in (pair.keys, pair.queries):
            found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()


class Fixed(NamedTuple):
    """What does not depend on the rotation: unit vectors [T, P] and [N, P], norms, and sums over pairs."""

    keys: Tensor
    queries: Tensor
    key_norms: Tensor
    query_norms: Tensor
    squared_cosines: float
    room: Tensor  # [T], sum over queries of 1 - c^2
    logit_room: Tensor  # [T], sum over queries of |q|^2 (1 - c^2)


def fix(pair: HeadPairs) -> Fixed:
    """Normalise and pad a head's pairs."""
    P = code.padded(pair.keys.shape[1])
    keys, queries = (F.pad(x, (0, P - x.shape[1])) for x in (pair.keys, pair.queries))
    key_norms, query_norms = keys.norm(dim=-1), queries.norm(dim=-1)
    keys, queries = keys / key_norms[:, None], queries / query_norms.clamp_min(1e-30)[:, None]
    room, logit_room, squared = torch.zeros(len(keys)), torch.zeros(len(keys)), 0.0
    for span in _spans(len(keys), len(queries)):
        cosines = (queries @ keys[span].T).square()
        room[span] = (1 - cosines).sum(0)
        logit_room[span] = (query_norms.square()[:, None] * (1 - cosines)).sum(0)
        squared += float(cosines.sum(dtype=torch.float64))
    return Fixed(keys, queries, key_norms, query_norms, squared, room, logit_room)


def rotate_once(
    tally: Tally, pair: HeadPairs, fixed: Fixed, rotation: Tensor, bits: int, epsilon: float, estimate: Estimator
) -> None:
    """Add one rotation [P, P] to a tally."""
    P, N, T = rotation.shape[0], len(fixed.queries), len(fixed.keys)
    o, q = fixed.keys @ rotation.T, fixed.queries @ rotation.T
    codes = code.encode(o, bits)
    factors = estimate(q, o, codes, bits)
    a = code.cosine(o, codes, bits)
    spread = (1 / a.square() - 1).clamp_min(0).sqrt() / (P - 1) ** 0.5  # the bound without its epsilon
    scaled = factors.keys / spread.clamp_min(1e-12)[:, None]
    hits = torch.zeros(T)
    for span in _spans(T, N):
        errors = (factors.queries @ scaled[span].T).abs_()
        hits[span] = (errors > epsilon).float().sum(0)
        tally.histogram += torch.histc(errors, BINS, 0.0, RANGE).double()
        tally.largest = max(tally.largest, float(errors.max()))
    tally.hits.append(hits.double())
    # sums over all pairs, as products of Gram matrices [M, M] and [M, P]
    left, right = factors.queries.double(), factors.keys.double()
    truth = (left.T @ q.double(), right.T @ o.double())
    tally.slope.append(float((truth[0] * truth[1]).sum()) / fixed.squared_cosines)
    tally.mean.append(float(left.sum(0) @ right.sum(0)) / (N * T))
    tally.square.append(_gram(left, scaled.double()) / float(fixed.room.sum(dtype=torch.float64)))
    queries, keys = left * fixed.query_norms[:, None], right * fixed.key_norms[:, None]
    tally.logit.append(pair.scale**2 * _gram(queries, keys) / (N * T))
    law = (fixed.key_norms * spread).square() * fixed.logit_room
    tally.logit_law.append(pair.scale**2 * float(law.sum(dtype=torch.float64)) / (N * T))
    tally.cosine.append(float(a.mean()))


def _gram(left: Tensor, right: Tensor) -> float:
    """The sum over all pairs of (left right^T)^2."""
    return float(((left.T @ left) * (right.T @ right)).sum())


def _spans(keys: int, queries: int) -> Iterator[slice]:
    step = max(1, _CHUNK // max(queries, 1))
    return (slice(i, min(i + step, keys)) for i in range(0, keys, step))


def fresh_rotations(heads: int, dim: int, generator: torch.Generator) -> Tensor:
    """A Haar rotation for every head, [H, P, P]."""
    return rotations.draw("haar", heads, code.padded(dim), generator)
