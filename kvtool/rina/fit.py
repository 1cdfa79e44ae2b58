"""What RINA fits to exact attention: feedback per head, noise correction per query head, how values are read per head.

Each is judged as a served cache is read: sinks and the newest tokens exact, one softmax over all that a query sees.

Values are read back by a map A, D x D, of their rotated codes. The inverse rotation would do, were levels not the means
of their cells: decoded vectors are shorter than what they stand for, by a third at one bit, and averaging over tokens
removes the noise of the codes but not that. With p' the weights that the *decoded* keys give, y_t the decoded values
before they are turned back and o_q the exact output less what exact tokens contribute under p',

    f_q = sum_t p'_qt y_t        A = argmin  sum_q |o_q - f_q A|^2 + ridge |A - a Pi|^2        a the best multiple of Pi
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from kvtool import centring, packing, rotation
from kvtool.methods.base import LayerCalibration
from kvtool.methods.transform import TransformKV
from kvtool.rina.tiles import TilesKV
from kvtool.transform.fit import Attention, attention_of
from kvtool.transform.waterfill import beginning

if TYPE_CHECKING:
    from kvtool.capture import LayerSample
    from kvtool.methods.rina import RINA, AnyKV

RIDGE = 1.0  # of the mean power of a channel of f
_QUERIES = 128  # of each sample
_BETAS = [0.0, 0.1, 0.2, 0.3, 0.4]
_TOKENS = 2048  # of two samples, for what is found by trying: every trial codes and reads all of them
_KAPPAS = [-1.0, -0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0]


class Scene(NamedTuple):
    """One sample as its queries see it, and the tokens of it that are compressed, whole pages beyond the sinks.

    keys, values: [1, H, T, D] of those tokens; positions: [T]. tokens: where they lie in the sample.
    """

    sample: "LayerSample"
    seen: Attention
    tokens: slice
    keys: Tensor
    values: Tensor
    positions: Tensor


def scenes(samples: "Sequence[LayerSample]", tokens: int | None = None) -> Iterator[Scene]:
    """The samples that are long enough to be fitted to, or the first ``tokens`` of them."""
    for whole in samples:
        sample = beginning(whole, tokens) if tokens else whole
        seen = attention_of(sample, _QUERIES)
        first = int((sample.positions < centring.SINKS).sum())
        pages = (sample.keys.shape[1] - first) // packing.PAGE
        if seen is not None and pages:
            chosen = slice(first, first + pages * packing.PAGE)
            keys, values = sample.keys[None, :, chosen].float(), sample.values[None, :, chosen].float()
            yield Scene(sample, seen, chosen, keys, values, sample.positions[chosen])


def fit_beta(method: "RINA", layer: LayerCalibration, samples: "Sequence[LayerSample]") -> Tensor:
    """Per head, the feedback of least error of the attention output, [H]."""
    H = layer.shape.num_kv_heads
    total = torch.zeros(len(_BETAS), H)
    for scene in islice(scenes(samples, _TOKENS), 2):
        # noise of the keys upsets what feedback arranges between neighbours
        kv, _ = method.compress(scene.keys, scene.values, layer, positions=scene.positions)
        weights = (logits(method, kv, layer, scene).softmax(-1) * scene.seen.coded)[..., scene.tokens]
        exact = scene.seen.weights[..., scene.tokens] @ scene.values[0]
        for i, beta in enumerate(_BETAS):
            trial = _with(layer, beta=torch.full((H,), beta))
            kv, _ = method.compress(scene.keys, scene.values, trial, positions=scene.positions)
            found = weights @ method.decompress(kv, trial, positions=scene.positions).values[0]
            # its length will be put right, so only the direction counts
            along = (found * exact).sum((1, 2)) / found.square().sum((1, 2)).clamp_min(1e-30)
            total[i] += (along[:, None, None] * found - exact).square().sum((1, 2))
    return torch.tensor(_BETAS)[total.argmin(0)]


def fit_kappa(method: "RINA", layer: LayerCalibration, samples: "Sequence[LayerSample]") -> Tensor:
    """Per query head, the correction of least KL divergence from exact attention, [HQ]."""
    HQ = layer.shape.num_heads
    total = torch.zeros(len(_KAPPAS), HQ)
    for scene in islice(scenes(samples, _TOKENS), 2):
        log_exact = scene.seen.logits.log_softmax(-1)
        exact = log_exact.exp()
        kv, _ = method.compress(scene.keys, scene.values, layer, positions=scene.positions)
        for i, kappa in enumerate(_KAPPAS):
            found = logits(method, kv, _with(layer, kappa=torch.full((HQ,), kappa)), scene).log_softmax(-1)
            apart = (exact * (log_exact - found).nan_to_num(0.0)).sum(-1)  # [H, Q]
            total[i] += apart.reshape(HQ, -1).sum(-1)
    return torch.tensor(_KAPPAS)[total.argmin(0)]


def fit_output(method: "RINA", layer: LayerCalibration, samples: "Sequence[LayerSample]") -> Tensor:
    """Per head, what reads values back, [H, D, D]: a map fitted on every other query if it wins on the rest."""
    turn = rotation.matrix(layer["value_rotation"])
    halves = [Regression(turn), Regression(turn)]
    observed = []
    unturned = _with(layer, value_decoder=torch.eye(turn.shape[-1]).expand_as(turn))
    for scene in scenes(samples):
        values = scene.sample.values.float()
        kv, _ = method.compress(scene.keys, scene.values, layer, positions=scene.positions)
        read = method.decompress(kv, unturned, positions=scene.positions).values[0]
        weights = logits(method, kv, layer, scene).softmax(-1)
        features = (weights * scene.seen.coded)[..., scene.tokens] @ read
        outputs = scene.seen.logits.softmax(-1) @ values - (weights * ~scene.seen.coded) @ values
        for i, half in enumerate(halves):
            half.add(features[:, i::2], outputs[:, i::2])
        observed.append((features[:, 1::2], outputs[:, 1::2]))
    if not observed:
        return turn
    found = halves[0].solve()
    fitted, plain = (torch.stack([(o - f @ A).square().sum((1, 2)) for f, o in observed]).sum(0) for A in (found, turn))
    halves[0].gram += halves[1].gram
    halves[0].cross += halves[1].cross
    return torch.where((fitted < plain)[:, None, None], halves[0].solve(), turn)


def logits(method: "RINA", kv: "AnyKV", layer: LayerCalibration, scene: Scene) -> Tensor:
    """Logits [H, Q, all tokens of the sample] with compressed keys wherever the query would meet them compressed."""
    H, Q, _ = scene.seen.logits.shape
    shape = layer.shape
    assert not isinstance(kv, TilesKV | TransformKV)
    queries = scene.seen.queries.reshape(1, shape.num_heads, -1, shape.head_dim)
    found = method.logits(queries, kv, layer, positions=scene.positions, scale=shape.scale, softcap=shape.softcap)
    whole = scene.seen.logits.clone()
    coded = scene.seen.coded[:, scene.tokens]
    whole[..., scene.tokens] = torch.where(coded, found.reshape(H, Q, -1), whole[..., scene.tokens])
    return whole


class Regression:
    """Outputs on features, summed over queries, pulled towards a multiple of ``start`` [H, M, D]."""

    def __init__(self, start: Tensor) -> None:
        self.start = start.double()
        H, M, _ = start.shape
        self.gram, self.cross = torch.zeros(H, M, M).double(), torch.zeros_like(self.start)

    def add(self, features: Tensor, outputs: Tensor) -> None:
        """Take in ``features`` [H, Q, M] and ``outputs`` [H, Q, D]."""
        features = features.double()
        self.gram += features.mT @ features
        self.cross += features.mT @ outputs.double()

    def solve(self) -> Tensor:
        """The map, float32 [H, M, D]."""
        guess = self.gram @ self.start
        power, match = ((self.start * x).sum((1, 2)) for x in (guess, self.cross))
        scale = torch.where(power > 0, (match / power).clamp(0.8, 2.0), 1.0)
        start = scale[:, None, None] * self.start
        level = self.gram.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-30)
        ridge = RIDGE * level[:, None, None] * torch.eye(self.gram.shape[-1]).double()
        return (start + torch.linalg.solve(self.gram + ridge, self.cross - self.gram @ start)).float()


def _with(layer: LayerCalibration, **tensors: Tensor) -> LayerCalibration:
    """``layer`` with some of its tensors exchanged."""
    return replace(layer, tensors={**layer.tensors, **tensors})
