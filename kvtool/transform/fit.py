"""Fit the method ``transform``: statistics, candidate codes, and what each costs in attention output.

One layer at a time, one sample at a time; what is kept between samples does not grow with the number of tokens.

Keys.    delta_n = k_n - R(n) mu.  M = E[q q^T] over the queries of a KV head, C = E[delta delta^T].  The basis is
         W = U^T M^(1/2) with U the eigenvectors of M^(1/2) C M^(1/2), so that the squared error of the coefficients is
         the mean squared error of the logits.
         C and M are those of all places that the text may take in the served context (reach.py).
Values.  Either a random rotation, or the same construction with M = sum_h W_O,h^T W_O,h and with C over values of unit
         length. Their decoder is fitted to attention outputs, not to values: with o = sum_t p_t v_t and
         f = sum_t p_t g_t c_t summed with the same weights,  A = argmin sum_q |o_q - f_q A|^2 + ridge |A - a A_0|^2,
         a the least-squares scale. A Lloyd-Max level is the mean of its cell, so it shrinks every value by the
         quantiser's distortion; averaging over tokens removes the noise and keeps the shrinkage.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from kvtool import centring, rotation
from kvtool.packing import GROUP
from kvtool.shapes import LayerShape
from kvtool.transform import code as chain
from kvtool.transform import reach
from kvtool.transform.code import Code

if TYPE_CHECKING:
    from kvtool.capture import LayerSample

Samples = Callable[[], "Iterable[LayerSample]"]  # the samples of a layer, from the first, whenever called

SHARPEN = 0.02  # of the mean eigenvalue, added to every metric: no direction is free
RIDGE = 1.0
RECENT = 128  # tokens before a query that count as exact, as a served model's window
HEADROOM = 0.5  # octaves above the 99.9 % quantile of the gains
_WEIGHTS = 1 << 24  # attention weights held at a time


@dataclass(frozen=True)
class Statistics:
    """Second moments of one layer.

    mean: [H, D]. keys: C, [H, D, D]. queries: M, [H, D, D]. values: of unit vectors in the metric ``outputs``.
    outputs: [H, D, D]. value_power: [H]. stream: mean log of the squared norm of the residual stream, or None.
    far: positions by which the served context is longer than the samples.
    """

    mean: Tensor
    keys: Tensor
    queries: Tensor
    values: Tensor
    outputs: Tensor
    value_power: Tensor
    stream: float | None
    far: int = 0


def statistics(samples: "Samples", context: int | None = None) -> Statistics:
    """Read every sample twice: the mean first, then what remains around it.

    context: the longest context served, if it may be longer than the samples.
    """
    mean = centring.fit_mean(samples(), "rotated")
    sums: dict[str, Tensor] = {}
    tokens = asked = seen = 0
    stream: list[Tensor] = []
    metric = None
    for sample in samples():
        keep = sample.positions >= centring.SINKS
        delta, values = centred(sample, mean)[:, keep], sample.values.float()[:, keep]
        H, _, D = values.shape
        if metric is None:
            metric = sharpened(output_metric(sample))
        length = torch.einsum("htd,hde,hte->ht", values, metric, values).clamp_min(1e-20).sqrt()
        unit = values / length[..., None]
        moments = {"keys": delta.mT @ delta, "values": unit.mT @ unit, "power": values.square().sum((1, 2))}
        if sample.queries is not None and sample.queries.shape[1]:
            queries = sample.queries.float().reshape(H, -1, D)
            moments["queries"] = queries.mT @ queries
            asked += queries.shape[1]
        for name, moment in moments.items():
            sums[name] = sums.get(name, 0) + moment.double()
        tokens += delta.shape[1]
        seen = max(seen, int(sample.positions[-1]) + 1)
        norms = getattr(sample, "stream", None)
        if norms is not None:
            stream.append(norms[keep].clamp_min(1e-20).log().double())
    assert metric is not None
    queries = sums["queries"] / asked if asked else torch.eye(D).expand(H, D, D).double()
    far = max(0, (context or 0) - seen)
    return Statistics(
        mean=mean,
        keys=reach.averaged(sums["keys"] / tokens, sample.rope, far),
        queries=reach.averaged(queries, sample.rope, far),
        values=sums["values"] / tokens,
        outputs=metric,
        value_power=(sums["power"] / (tokens * D)).float(),
        stream=float(torch.cat(stream).mean()) if stream else None,
        far=far,
    )


def centred(sample: "LayerSample", mean: Tensor) -> Tensor:
    """Keys less their rotated mean, [H, T, D] float32."""
    return sample.keys.float() - centring.at(mean, "rotated", sample.rope, sample.positions)


def output_metric(sample: "LayerSample") -> Tensor:
    """sum_h W_O,h^T W_O,h over the query heads of each KV head, [H, D, D]; the identity if it was not captured."""
    H, _, D = sample.values.shape
    if sample.output_gram is None:
        return torch.eye(D).expand(H, D, D)
    return sample.output_gram.float().unflatten(0, (H, -1)).mean(1)


def vectors(side: str, sample: "LayerSample", statistics: Statistics) -> Tensor:
    """What the codes of a side are made for, [H, T, D]."""
    return centred(sample, statistics.mean) if side == "key" else sample.values.float()


def examples(side: str, sample: "LayerSample", statistics: Statistics) -> Tensor:
    """The same wherever they may stand in the served context."""
    x = vectors(side, sample, statistics)
    return reach.moved(x, sample.rope, sample.positions, statistics.far) if side == "key" else x


def sharpened(metric: Tensor) -> Tensor:
    """A metric in which no direction is free."""
    D = metric.shape[-1]
    level = metric.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-30)
    return metric + SHARPEN * level[:, None, None] * torch.eye(D, dtype=metric.dtype, device=metric.device)


def basis(covariance: Tensor, metric: Tensor) -> tuple[Tensor, Tensor]:
    """W = U^T M^(1/2), float32 [H, C, D], and the variances of its coefficients [H, C], falling; C = max(D, 32)."""
    power, vectors = torch.linalg.eigh(sharpened(metric.double()))
    root = (vectors * power.clamp_min(0).sqrt()[:, None]) @ vectors.mT
    variance, turn = torch.linalg.eigh(root @ covariance.double() @ root)
    return _padded((turn.mT @ root).flip(1), variance.flip(1).clamp_min(0))


def plain_basis(signs: Tensor) -> tuple[Tensor, Tensor]:
    """The same for a random rotation: every coefficient alike."""
    turn = rotation.matrix(signs)
    return _padded(turn, torch.ones(turn.shape[:2], device=turn.device))


def _padded(turn: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    missing = max(0, GROUP - turn.shape[1])
    pad = torch.nn.functional.pad
    return pad(turn, (0, 0, 0, missing)).float(), pad(variance, (0, missing)).float()


def make_code(turn: Tensor, variance: Tensor, widths: Sequence[int], examples: Tensor) -> Code:
    """The code of ``widths`` in a basis; the range of its gains is that of ``examples`` [H, T, D]."""
    order, deviation, _ = chain.pick(variance, widths)
    base = torch.zeros(len(turn), len(widths))
    span = chain.GAIN_STEP * (chain.GAIN_CODES - 1)
    z = examples.float() @ turn.mT
    rotate = chain.stage_rotation(z.device)
    for s, width in enumerate(widths):
        picked = order[:, s, None].expand(*z.shape[:-1], GROUP)
        y = (z.gather(-1, picked) / deviation[:, s, None]) @ rotate.mT
        base[:, s] = chain.log_rms(y).quantile(0.999, dim=-1) + HEADROOM - span
        stage = Code((width,), turn, order[:, s : s + 1], deviation[:, s : s + 1], base[:, s : s + 1])
        back = z.gather(-1, picked) - _decoded(chain.encode_coefficients(z, stage), stage)
        z = z.scatter(-1, picked, back)
    return Code(tuple(widths), turn, order, deviation, base)


def _decoded(coded: chain.Coded, stage: Code) -> Tensor:
    levels = chain.features(coded, stage) * chain.table(stage.widths[0], coded.codes.device)[1]
    return (levels @ chain.stage_rotation(levels.device)) * stage.deviation[:, 0, None]


class Attention(NamedTuple):
    """How chosen queries attend to one sample, the queries of a KV head in a row.

    weights: [H, Q, T], zero where a served model would hold the token exactly: sinks and the most recent ones.
    logits: [H, Q, T], hidden tokens at -inf. queries: [H, Q, D]. coded: bool [Q, T], where weights may be non-zero.
    """

    weights: Tensor
    logits: Tensor
    queries: Tensor
    coded: Tensor


def attention_of(sample: "LayerSample", limit: int) -> Attention | None:
    """Weights of up to ``limit`` queries per head, evenly spread over the later seven eighths of the sample."""
    if sample.queries is None or sample.query_positions is None:
        return None
    H, T, D = sample.keys.shape
    late = (sample.query_positions >= sample.positions[0] + T // 8).nonzero().flatten()
    count = min(limit, len(late), max(1, _WEIGHTS // (sample.shape.num_heads * T)))
    if not count:
        return None
    chosen = late[torch.linspace(0, len(late) - 1, count).round().long()]
    at = sample.query_positions[chosen].repeat(sample.shape.group)
    queries = sample.queries[:, chosen].float().reshape(H, -1, D)
    seen = logits(queries, sample.keys.float(), sample.shape)
    seen.masked_fill_(sample.positions > at[:, None], -torch.inf)
    coded = (sample.positions >= centring.SINKS) & (sample.positions <= at[:, None] - RECENT)
    return Attention(seen.softmax(-1) * coded, seen, queries, coded)


def logits(queries: Tensor, keys: Tensor, shape: LayerShape) -> Tensor:
    """Scaled and capped logits [H, Q, T]."""
    scores = queries @ keys.mT * shape.scale
    return scores if shape.softcap is None else shape.softcap * torch.tanh(scores / shape.softcap)


class Moments:
    """Normal equations of a value decoder: attended features against attended values, summed over queries."""

    def __init__(self, code: Code, metric: Tensor) -> None:
        self.code, self.metric = code, metric
        units = [torch.full((GROUP,), chain.table(w, metric.device)[1]) for w in code.widths]
        self.units = torch.cat(units) if units else torch.zeros(0)
        self.start = chain.decoder(code).double() / self.units[:, None]
        H, M, D = self.start.shape
        self.gram, self.cross = torch.zeros(H, M, M).double(), torch.zeros(H, M, D).double()

    def features(self, values: Tensor, weights: Tensor) -> Tensor:
        """Attended features [H, Q, 32 S], in units in which every channel has unit variance."""
        return weights @ (chain.features(chain.encode(values, self.code), self.code) * self.units)

    def add(self, features: Tensor, outputs: Tensor) -> None:
        """Take in attended features [H, Q, 32 S] and the exact outputs [H, Q, D]."""
        features = features.double()
        self.gram += features.mT @ features
        self.cross += features.mT @ outputs.double()

    def solve(self) -> Tensor:
        """The decoder, float32 [H, 32 S, D], for the levels as the kernels have them."""
        if not len(self.units):
            return self.start.float()
        guess = self.gram @ self.start
        power = torch.einsum("hmd,hde,hme->h", self.start, self.metric.double(), guess)
        match = torch.einsum("hmd,hde,hme->h", self.start, self.metric.double(), self.cross)
        scale = (match / power.clamp_min(1e-30)).clamp(0.8, 2.0).nan_to_num(1.0)
        start = self.start * torch.where(power > 0, scale, 1.0)[:, None, None]
        level = self.gram.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-30)
        eye = torch.eye(len(self.units), dtype=torch.float64)
        fitted = start + torch.linalg.solve(
            self.gram + RIDGE * level[:, None, None] * eye, self.cross - self.gram @ start
        )
        return (fitted * self.units[:, None]).float()


def value_decoders(codes: Sequence[Code], statistics: Statistics, samples: Samples) -> list[Tensor]:
    """The decoders of value codes, regressed on attention outputs, float32 [H, 32 S, D] each."""
    moments = [Moments(code, statistics.outputs) for code in codes]
    for sample in samples():
        seen = attention_of(sample, 128)
        if seen is not None:
            values = sample.values.float()
            for one in moments:
                one.add(one.features(values, seen.weights), seen.weights @ values)
    return [one.solve() for one in moments]


def tensors_of(code: Code, decoder: Tensor, signs: Tensor, examples: Tensor, *, stages: int) -> dict[str, Tensor]:
    """A code as an artifact stores it, with room for ``stages``; ``signs`` is the rotation outside the statistics."""
    missing = stages - len(code.widths)

    def padded(x: Tensor, rows: int = 1) -> Tensor:
        return torch.cat([x, x.new_zeros(len(x), missing * rows, *x.shape[2:])], 1)

    ordinary = make_code(*plain_basis(signs), code.widths, examples)
    return {
        "widths": torch.tensor([*code.widths, *[0] * missing], dtype=torch.int8),
        "order": padded(code.order).to(torch.int16),
        "deviation": padded(code.deviation),
        "gain_base": padded(code.gain_base),
        "decoder": padded(decoder, GROUP).half(),
        # three octaves higher than anything seen: what is outside is usually too large
        "plain_base": padded(ordinary.gain_base) + 3,
    }
