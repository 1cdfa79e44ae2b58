"""What rdkv learns from a capture: how keys are turned, what each width costs, and what attention is worth.

Distortions are in units of eviction: D(0) = 1 is what losing a token costs to second order, p^2 ||v - o||^2, and

    keys    eps_K(b) = sum w (q . dk(b))^2 scale^2 / sum w     w = p^2 ||v - o||^2, over captured queries and tokens
    values  eps_V(b) = sum p^2 ||dv(b)||^2         / sum w

so one number multiplies everything about a token: its own w. Errors of key groups and values add, being independent.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from kvtool import centring, rotation
from kvtool.allocation import lower_hull
from kvtool.errors import CaptureError, MethodOptionError
from kvtool.methods.base import Progress
from kvtool.packing import GROUP, PAGE, groups
from kvtool.rdkv.layers import SINKS, Demand, demand, spread_over_layers
from kvtool.rdkv.pages import EXACT, LEVELS, gain, gain_code, level_bytes, table_codes, table_values
from kvtool.scores import apart
from kvtool.shapes import LayerShape

if TYPE_CHECKING:
    from kvtool.capture import Capture, LayerSample
    from kvtool.methods.rdkv import RDKV

WIDTHS = (0, 1, 2, 3, 4, 8)
_TOKENS = 2048  # tokens and queries a distortion is measured on, per sample
_QUERIES = 64


class Statistics(NamedTuple):
    """Of one layer, streamed over its samples.

    mean: pre-RoPE key mean [H, D]. key: mean square of the centred keys per channel [H, D]. query: the queries' [H, D].
    """

    mean: Tensor
    key: Tensor
    query: Tensor


def statistics(samples: Sequence["LayerSample"]) -> Statistics:
    """First and second moments that the key transform needs.

    Raises:
        CaptureError: the capture has no queries, or is too short.
    """
    first = next(iter(samples), None)
    if first is None or first.queries is None:
        raise CaptureError(
            "rdkv weighs tokens by attention, but this capture has no queries; capture with --queries all"
        )
    count, total = 0, torch.zeros(())
    for sample in samples:
        keys = sample.pre_rope_keys()[:, SINKS:]
        count, total = count + keys.shape[1], total + keys.sum(1)
    if count < 2 * _QUERIES:
        raise CaptureError(
            f"rdkv needs {2 * _QUERIES} captured tokens besides sinks, found {count}; capture a longer text"
        )
    mean = total / count
    key = torch.zeros_like(mean)
    query, seen = torch.zeros_like(mean), 0
    for sample in samples:
        key += _centred(sample, mean)[:, SINKS:].pow(2).sum(1) / count
        queries = _queries(sample).float().unflatten(0, (mean.shape[0], -1))  # [H, G, S, D]
        query += queries.pow(2).sum((1, 2))
        seen += queries.shape[1] * queries.shape[2]
    return Statistics(mean, key, query / seen)


def _queries(sample: "LayerSample") -> Tensor:
    assert sample.queries is not None
    return sample.queries


def _centred(sample: "LayerSample", mean: Tensor) -> Tensor:
    return sample.keys.float() - centring.at(mean, "rotated", sample.rope, sample.positions)


def key_maps(stats: Statistics, seed: int) -> tuple[Tensor, Tensor]:
    """The key bases [H, 2, D, D] (whole, grouped) and the spread [H, G] of each group in the grouped one."""
    H, D = stats.mean.shape
    generator = torch.Generator().manual_seed(seed)
    whole = random_rotation(D, generator)
    sizes = [min(GROUP, D - start) for start in range(0, D, GROUP)]
    inside = torch.block_diag(*[random_rotation(n, generator) for n in sizes])
    order = (stats.key * stats.query).argsort(-1, descending=True)
    grouped = torch.zeros(H, D, D)
    for h in range(H):
        grouped[h, order[h]] = inside  # row c of the basis is where channel c goes
    sorted_energy = stats.key.gather(1, order)
    rms = stats.key.mean(-1, keepdim=True)
    spread = torch.stack([part.mean(-1) for part in sorted_energy.split(GROUP, -1)], -1) / rms
    return torch.stack([whole.expand(H, D, D), grouped], 1), spread.clamp(min=1e-6).sqrt()


def random_rotation(dim: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix [dim, dim] with random signs, Hadamard where the size allows."""
    if dim == 1:
        return torch.ones(1, 1)
    return rotation.matrix(rotation.draw("hadamard", 1, dim, generator))[0].mT.contiguous()


class Curves(NamedTuple):
    """Measured distortion in units of eviction, for each width in WIDTHS.

    whole: keys with one width, [H, W]. grouped: each key group, [H, G, W]. values: [H, W].
    """

    whole: Tensor
    grouped: Tensor
    values: Tensor


def measure(
    samples: Sequence["LayerSample"], stats: Statistics, bases: Tensor, spread: Tensor, value_basis: Tensor, seed: int
) -> Curves:
    """Distortion of every width on captured queries and tokens."""
    H, _, D, _ = bases.shape
    G, W = groups(D), len(WIDTHS)
    whole, grouped, values, total = torch.zeros(H, W), torch.zeros(H, G, W), torch.zeros(H, W), torch.zeros(H)
    generator = torch.Generator().manual_seed(seed)
    for sample in samples:
        seen = sensitivity(sample, generator)
        total += seen.weight.sum((1, 2))
        centred = _centred(sample, stats.mean)[:, seen.tokens]
        scales = spread.repeat_interleave(GROUP, -1)[:, :D]
        for basis, out in ((0, whole), (1, grouped)):
            y = centred @ bases[:, basis]
            scale = scales[:, None] if basis else torch.ones(H, 1, D)
            q = seen.queries @ bases[:, basis] * sample.shape.scale  # [H, G*Q, D]
            size = gain(gain_code((y / scale).flatten(0, 1))).reshape(*y.shape[:2], 1)
            for w, width in enumerate(WIDTHS):
                widths = [width] * G
                error = table_values(table_codes(y / scale / size, widths), widths) * size * scale - y
                for g in range(G if basis else 1):
                    part = slice(g * GROUP, (g + 1) * GROUP) if basis else slice(None)
                    noise = (q[..., part] @ error[..., part].mT).square_().mul_(seen.weight)
                    (out[:, g] if basis else out)[:, w] += noise.sum((1, 2))
        v = sample.values.float()[:, seen.tokens] @ value_basis
        size = gain(gain_code(v.flatten(0, 1))).reshape(*v.shape[:2], 1)
        for w, width in enumerate(WIDTHS):
            widths = [width] * G
            error = table_values(table_codes(v / size, widths), widths) * size - v
            values[:, w] += (seen.squared * error.pow(2).sum(-1)[:, None]).sum((1, 2))
    total = total.clamp(min=1e-30)
    return Curves(whole / total[:, None], grouped / total[:, None, None], values / total[:, None])


class Sensitivity(NamedTuple):
    """What sampled queries [H, G*Q, D] feel of sampled tokens: squared = p^2, weight = p^2 ||v - o||^2, [H, G*Q, N]."""

    queries: Tensor
    tokens: Tensor
    squared: Tensor
    weight: Tensor


def sensitivity(sample: "LayerSample", generator: torch.Generator) -> Sensitivity:
    """Exact attention of some late queries, and its second-order weights on some tokens."""
    keys, values = sample.keys.float(), sample.values.float()
    H, T = keys.shape[:2]
    queries = _queries(sample)
    assert sample.query_positions is not None
    late = (sample.query_positions >= sample.positions[T // 2]).nonzero().squeeze(1)
    rows = late[torch.randperm(len(late), generator=generator)[:_QUERIES]]
    tokens = SINKS + torch.randperm(max(1, T // 2 - SINKS), generator=generator)[:_TOKENS].sort().values
    q = queries[:, rows].float().unflatten(0, (H, -1)).flatten(1, 2)  # [H, G*Q, D]
    scores = q @ keys.mT * sample.shape.scale
    if sample.shape.softcap is not None:
        scores = sample.shape.softcap * torch.tanh(scores / sample.shape.softcap)
    hidden = sample.positions[None] > sample.query_positions[rows].repeat(q.shape[1] // len(rows))[:, None]
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    out = weights @ values
    squared = weights[..., tokens].pow(2)
    return Sensitivity(q, tokens, squared, squared * apart(out, values[:, tokens]))


def ladder(curves: Curves, head_dim: int) -> tuple[Tensor, Tensor]:
    """The levels of each head: widths uint8 [H, LEVELS, G+1] and distortion [H, LEVELS], from the measured hull."""
    H, G, _ = curves.grouped.shape
    widths = torch.zeros(H, LEVELS, G + 1, dtype=torch.uint8)
    distortion = torch.zeros(H, LEVELS)
    for h in range(H):
        found = _hull_points(curves, h, head_dim)
        for level, (point, value) in enumerate(thin(found, LEVELS)):
            widths[h, level], distortion[h, level] = torch.tensor(point, dtype=torch.uint8), value
    return widths, distortion


Point = tuple[tuple[float, ...], float]  # widths of key groups and values, distortion


def _hull_points(curves: Curves, h: int, head_dim: int) -> list[Point]:
    G = curves.grouped.shape[1]
    points: list[Point] = [((0,) * (G + 1), 1.0)]
    real = range(1, len(WIDTHS))
    for k in real:
        points += [((WIDTHS[k],) * G + (WIDTHS[v],), float(curves.whole[h, k] + curves.values[h, v])) for v in real]
    for v in real:
        points += [
            ((*key, WIDTHS[v]), error + float(curves.values[h, v])) for key, error in _key_path(curves.grouped[h])
        ]
    points.append(((EXACT,) * (G + 1), 0.0))
    table = torch.tensor([point for point, _ in points], dtype=torch.uint8)[None]
    cost = level_bytes(table, head_dim).float()
    hull = lower_hull(cost, torch.tensor([[value for _, value in points]]))
    return [points[i] for i in hull.vertices(0)]


def _key_path(grouped: Tensor) -> list[tuple[tuple[int, ...], float]]:
    """Widths of the key groups along the steepest descent of their summed distortion ``grouped`` [G, W]."""
    G = grouped.shape[0]
    at, path = [0] * G, []
    while min(at) < len(WIDTHS) - 1:
        slopes = {
            (g, w): float(grouped[g, at[g]] - grouped[g, w]) / (WIDTHS[w] - WIDTHS[at[g]])
            for g in range(G)
            for w in range(at[g] + 1, len(WIDTHS))
        }
        g, w = max(slopes, key=lambda step: slopes[step])
        at[g] = w
        path.append((tuple(WIDTHS[i] for i in at), float(sum(grouped[i, at[i]] for i in range(G)))))
    return [(key, error) for key, error in path if any(key)]


def thin(points: list[Point], count: int) -> list[Point]:
    """At most ``count`` points; the ends stay, and the points least missed go. Short lists repeat the last point."""
    kept = list(points)
    while len(kept) > count:
        del kept[min(range(1, len(kept) - 1), key=lambda i: _missed(*kept[i - 1 : i + 2]))]
    return kept + [kept[-1]] * (count - len(kept))


def _missed(before: Point, here: Point, after: Point) -> float:
    """How far the logarithm of the distortion ``here`` lies below the line between its neighbours."""
    bits = [sum(widths) for widths, _ in (before, here, after)]
    logs = [math.log2(max(value, 1e-9)) for _, value in (before, here, after)]
    share = (bits[1] - bits[0]) / max(1, bits[2] - bits[0])
    return logs[0] + share * (logs[2] - logs[0]) - logs[1]


def importance(samples: Sequence["LayerSample"], shape: LayerShape) -> Tensor:
    """What a squared error of each query head's output is worth, [HQ]: tr(W_O^T W_O) / D, or 1 if it is unknown."""
    gram = next(iter(samples)).output_gram
    if gram is None:
        return torch.ones(shape.num_heads)
    return gram.float().diagonal(dim1=-2, dim2=-1).mean(-1)


def fit(method: "RDKV", capture: "Capture", progress: Progress | None = None) -> dict[str, Tensor]:
    """The tensors of rdkv's schema, from a capture.

    Raises:
        MethodOptionError: the budget cannot be met, or would evict everything in a head.
        CaptureError: no queries, or too little text.
    """
    share = method.share(capture.shape)
    layers: dict[int, dict[str, Tensor]] = {}
    demands: dict[int, Demand] = {}
    for done, i in enumerate(capture.layers):
        samples = list(capture.samples(i))
        layers[i] = fit_layer(samples, capture.shape.layers[i], seed=method.seed)
        if method.weights != "auto":
            layers[i]["family"] = torch.tensor(method.families.index(method.weights), dtype=torch.uint8)
        if method.eviction is not None:
            layers[i]["eviction"] = torch.tensor(method.eviction)
        _check_length(method, samples)
        _check_keeps_something(method, share, samples, layers[i])
        if method.scope == "model":
            demands[i] = demand(method, samples, layers[i], capture.shape.rope(i))
        if progress:
            progress(done + 1, len(capture.layers))
    fractions = spread_over_layers(demands, share) if demands else dict.fromkeys(layers, share)
    for i, tensors in layers.items():
        tensors["fraction"] = torch.tensor(fractions[i])
    return {f"layers.{i}.{field}": tensor for i, tensors in layers.items() for field, tensor in tensors.items()}


def fit_layer(samples: "Sequence[LayerSample]", shape: LayerShape, *, seed: int) -> dict[str, Tensor]:
    """The tensors of one layer, but for its share of the budget."""
    stats = statistics(samples)
    bases, spread = key_maps(stats, seed)
    value_basis = random_rotation(shape.head_dim, torch.Generator().manual_seed(seed + 1))
    curves = measure(samples, stats, bases, spread, value_basis, seed)
    widths, distortion = ladder(curves, shape.head_dim)
    return {
        "key_mean": stats.mean,
        "key_basis": bases,
        "spread": spread,
        "value_basis": value_basis.expand(shape.num_kv_heads, -1, -1).contiguous(),
        "widths": widths,
        "distortion": distortion,
        "importance": importance(samples, shape),
        "fraction": torch.tensor(1.0),
        # until tuned: what served the embedded model best
        "family": torch.tensor(0, dtype=torch.uint8),
        "eviction": torch.tensor(16.0),
        # bits per value and share of tokens kept, of a held-out prompt: the race fills it in
        "allocated": torch.zeros(shape.num_kv_heads, 2),
    }


def _check_length(method: "RDKV", samples: "Sequence[LayerSample]") -> None:
    tokens = min(sample.keys.shape[1] for sample in samples)
    if tokens < SINKS + method.window + PAGE:
        raise CaptureError(
            f"rdkv layer {samples[0].layer}: a window of {method.window} queries leaves no page of {PAGE} tokens to "
            f"weigh in samples of {tokens}; use a smaller -o window or capture a longer --context"
        )


def _check_keeps_something(
    method: "RDKV", share: float, samples: "Sequence[LayerSample]", tensors: dict[str, Tensor]
) -> None:
    H, D = samples[0].shape.num_kv_heads, samples[0].shape.head_dim
    tokens = max(sample.keys.shape[1] for sample in samples)
    heads = 1 if method.scope == "head" else H
    bytes_here = heads * (share * 4 * tokens * D - 3 * -(-tokens // 8))
    least = int(level_bytes(tensors["widths"], D)[:, 1].min())
    if bytes_here < least:
        raise MethodOptionError(
            f"rdkv layer {samples[0].layer}: {bytes_here:.0f} bytes at {tokens} tokens would evict everything in a "
            f"head, a page of 64 tokens takes {least}; ask for a larger budget or capture a longer text"
        )
