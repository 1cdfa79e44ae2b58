"""What a token will be worth to the queries to come: a score fitted to the model rather than chosen.

    worth_t = mean over future queries of  p_t^2 ||v_t - o||^2

is what independent noise of one unit on the logit of token t costs (scores.py). What is known when a prompt has been
read: the attention its last queries paid, the attention queries spread over it paid, what a Gaussian of them expects,
how old the token is and how long its value. Each is the best score somewhere and useless elsewhere (sinks, heads that
look at their neighbours, heads that search), so every KV head has its own weights a of their logarithms x,

    log E[worth_t] = a . x_t

fitted on the capture, where the future is known, as a gamma regression: the mean is what an allocation needs, not the
mean logarithm. H = KV heads, F = features.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from kvtool import scores
from kvtool.attention import Attended
from kvtool.scores import Known

if TYPE_CHECKING:
    from kvtool.capture import LayerSample
    from kvtool.methods.base import LayerCalibration

FEATURES = 13
NEAR, FAR = 64, 64  # the last queries, and as many spread over those before
_LAST = 8
_EXPECTED = 512  # queries whose moments a Gaussian takes
_POOL = 5
_TINY = 1e-12
_WEIGHTS = 1 << 26  # attention weights held at a time
_STEPS = 12  # of the regression


def ago(count: int, device: torch.device) -> Tensor:
    """How many tokens came after each query that is looked at, of ``count`` known: the last ones, then the spread."""
    near = torch.arange(min(count, NEAR) - 1, -1, -1, device=device)
    if count <= NEAR:
        return near
    return torch.cat([torch.linspace(count - 1, NEAR, FAR, device=device).round().long(), near])


def begin(
    queries: Tensor | None, keys: Tensor, values: Tensor, layer: "LayerCalibration", *, sinks: int, carry: Known | None
) -> Known:
    """See ``Method.begin``."""
    if queries is None:
        return scores.begin(None, keys, values, layer.shape, sinks=sinks, carry=carry)
    since = ago(queries.shape[2], queries.device)
    return scores.begin(queries[:, :, -1 - since], keys, values, layer.shape, sinks=sinks, carry=carry, ago=since)


def features(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    layer: "LayerCalibration",
    importance: Tensor,
    known: Known,
    *,
    positions: Tensor,
) -> Tensor:
    """x, float32 [B, H, T, F], of the tokens ``keys``, ``values`` [B, H, T, D] that are about to be compressed.

    importance: [HQ], what a squared error of each query head's output is worth.
    """
    keys, values = keys.float(), values.float()
    since = ago(queries.shape[2], queries.device)
    near = max(0, len(since) - NEAR)
    last = _attended(queries, keys, values, layer, importance, known, since, slice(max(near, len(since) - _LAST), None))
    recently = _attended(queries, keys, values, layer, importance, known, since, slice(near, None))
    before = _attended(queries, keys, values, layer, importance, known, since, slice(0, near or None))
    end = int(positions[-1]) + 1 + int(known.recent.max())
    asked = queries[:, :, -_EXPECTED:]
    expected = scores.expect(asked, keys, values, scale=layer.shape.scale, rope=layer.rope, end=end)
    found = [
        recently.worth,
        scores.smooth(recently.worth, _POOL),
        recently.mass,
        last.worth,
        before.worth,
        scores.smooth(before.worth, _POOL),
        before.mass,
        scores.mass(expected),
        scores.second_order(expected, values, importance, evicted=False),
    ]
    age = (end - positions).float().log().expand(keys.shape[:3])
    length = values.norm(dim=-1).clamp(min=_TINY).log()
    logs = [(x.clamp(min=0) + _TINY).log() for x in found]
    return torch.stack([torch.ones_like(age), *logs, age, age.square(), length], -1)


class _Attended(NamedTuple):
    """By the queries looked at, [B, H, T] each."""

    worth: Tensor
    mass: Tensor


def _attended(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    layer: "LayerCalibration",
    importance: Tensor,
    known: Known,
    since: Tensor,
    chosen: slice,
) -> _Attended:
    """What the ``chosen`` of the queries saw, some at a time."""
    rows = torch.arange(len(since), device=since.device)[chosen]
    recent = int(known.recent.max())
    worth = mass = keys.new_zeros(keys.shape[:3])
    votes = keys.new_zeros(keys.shape[2])
    step = max(1, _WEIGHTS // (queries.shape[0] * queries.shape[1] * keys.shape[2]))
    for some in rows.split(step):
        rest = Attended(known.out[:, :, some], known.lse[:, :, some]) if known.lse.numel() else None
        seen = scores.observe(
            queries[:, :, -1 - since[some]],
            keys,
            values,
            rest,
            scale=layer.shape.scale,
            softcap=layer.shape.softcap,
            ago=(since[some] - recent).clamp(min=0),
        )
        worth = worth + scores.second_order(seen, values, importance, evicted=False) * seen.votes.clamp(min=1)
        mass = mass + scores.mass(seen) * seen.votes.clamp(min=1)
        votes = votes + seen.votes
    return _Attended(worth / votes.clamp(min=1), mass / votes.clamp(min=1))


def predict(x: Tensor, weights: Tensor) -> Tensor:
    """The expected worth [..., H, T] of tokens with features ``x`` [..., H, T, F], ``weights`` [H, F]."""
    # beyond e^+-60 nothing is to be told apart, and sums must stay finite
    return torch.einsum("...htf,hf->...ht", x, weights).clamp(-60, 60).exp()


def regress(x: Tensor, worth: Tensor) -> Tensor:
    """The weights a, float32 [H, F], for features ``x`` [H, N, F] and what the tokens were worth, [H, N]."""
    x, y = x.double(), worth.double() + _TINY
    gram = x.mT @ x
    gram += 1e-3 * gram.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None] * torch.eye(x.shape[-1], dtype=x.dtype)
    goal = y.log()
    for _ in range(_STEPS):
        a = torch.linalg.solve(gram, x.mT @ goal[..., None])
        eta = (x @ a).squeeze(-1)
        # iteratively reweighted least squares of a gamma family with a logarithmic link: all weights are one
        goal = eta + (y.log() - eta).clamp(-3, 1.4).expm1()
    return a.squeeze(-1).float()


class Future(NamedTuple):
    """How queries after a cut attend to everything before them, the queries of a KV head in a row.

    queries: [H, G*Q, D]. weights: [H, G*Q, N], of all tokens up to the last query. out: [H, G*Q, D], exact.
    """

    queries: Tensor
    weights: Tensor
    out: Tensor


def future(sample: "LayerSample", cut: int, ahead: int, count: int) -> Future:
    """Up to ``count`` queries spread over the ``ahead`` tokens that follow token ``cut`` of a sample."""
    assert sample.queries is not None
    assert sample.query_positions is not None
    H = len(sample.keys)
    at = sample.query_positions - sample.positions[0]
    those = ((at >= cut) & (at < cut + ahead)).nonzero().flatten()
    those = those[torch.linspace(0, len(those) - 1, min(count, len(those))).round().long()]
    keys, values = sample.keys[:, : cut + ahead].float(), sample.values[:, : cut + ahead].float()
    queries = sample.queries[:, those].float().reshape(H, -1, keys.shape[-1])
    shape = sample.shape
    logits = queries @ keys.mT * shape.scale
    logits = logits if shape.softcap is None else shape.softcap * torch.tanh(logits / shape.softcap)
    hidden = torch.arange(keys.shape[1]) > at[those].repeat(shape.group)[:, None]
    weights = logits.masked_fill(hidden, -torch.inf).softmax(-1)
    return Future(queries, weights, weights @ values)


def turned_out(seen: Future, values: Tensor, importance: Tensor) -> Tensor:
    """What tokens of ``values`` [H, N, D], the first that ``seen`` speaks of, were worth, [H, N]."""
    H, N, _ = values.shape
    p = seen.weights[..., :N].unflatten(1, (len(importance) // H, -1))[None]
    out = seen.out.unflatten(1, (len(importance) // H, -1))[None]
    observed = scores.Observed(p, out, p.new_full((N,), float(p.shape[3])))
    return scores.second_order(observed, values[None], importance, evicted=False)[0]
