"""RDKV's predicted distortion, held against unseen tokens and queries: what ``kvtool verify-bound`` asks of it.

For an unseen query with softmax weights p over everything and output o, and w = p^2 ||v - o||^2, the allocation says

    kept at a level   p^2 (||v - o||^2 (scale q . dk)^2 + ||dv||^2)  is  w eps(level)  in the mean     level_distortion
    everything        ||o' - o||^2  is  sum over kept of w eps(level)
                                        + eviction * sum over evicted of (p / (1 - p))^2 ||v - o||^2   output_distortion

The first asks whether tables measured when fitted are those of other text, the second whether first-order terms of
independent errors add up to the error of the output. Both are ratios, measured over predicted.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvtool import attention, scores
from kvtool.errors import CaptureError
from kvtool.methods.base import FITTED_MARGIN, Claim
from kvtool.rdkv.pages import LEVELS, kept_tokens, token_levels
from kvtool.shapes import CacheShape

if TYPE_CHECKING:
    from kvtool.bounds.measures import Evidence

_EXACT_LEVEL = LEVELS - 1


def distortion_claims(shape: CacheShape, tensors: Mapping[str, Tensor]) -> Sequence[Claim]:
    """Of every layer with measured tables; a uniform pair from the race has none.

    The error of the output is predicted where eviction is charged in its units, by second-order weights.
    """
    claims = []
    for i in shape.compressible:
        widths = tensors.get(f"layers.{i}.widths")
        if widths is None or bool((widths[:, 1:] == widths[:, 1:2]).all()):
            continue
        said = ["level_distortion"]
        if int(tensors[f"layers.{i}.family"]) == 0:
            said.append("output_distortion")
        claims += [Claim(quantity, FITTED_MARGIN, "expected", "calibration", i) for quantity in said]
    return claims


def level_distortion(evidence: "Evidence") -> Tensor:
    """What the errors of kept tokens cost, to second order, over what the tables say; a case is a query: [H, G*S]."""
    seen = _observe(evidence)
    weights, out = (x[0].flatten(1, 2) for x in (seen.weights, seen.out))  # [H, N, T] and [H, N, D]
    apart = scores.apart(out, evidence.values)
    queries = _unseen(evidence).unflatten(0, (len(weights), -1)).flatten(1, 2) * evidence.layer.shape.scale
    levels = token_levels(evidence.kv.levels, len(evidence.positions))[0]
    ratios = []
    for h, level in enumerate(levels):
        order = kept_tokens(level)
        coded = level[order] < _EXACT_LEVEL  # float16 has no distortion in the tables
        tokens = order[coded]
        rows = [x[0, h, : len(order)][coded] for x in evidence.decoded[:2]]
        noise = (queries[h] @ (rows[0] - evidence.keys[h, tokens]).mT).square()
        moved = (rows[1] - evidence.values[h, tokens]).square().sum(-1)
        squared, far = weights[h][:, tokens].square(), apart[h][:, tokens]
        found = (squared * (far * noise + moved)).sum(-1)
        said = squared * far * evidence.layer["distortion"][h, level[tokens].long()]
        ratios.append(_ratio(found, said.sum(-1)))
    return torch.stack(ratios)


def output_distortion(evidence: "Evidence") -> Tensor:
    """Squared error of the attention output over what the allocation predicts; a case is a query: [H, G*S]."""
    seen, layer, queries = _observe(evidence), evidence.layer, _unseen(evidence)
    weights, out = (x[0].flatten(1, 2) for x in (seen.weights, seen.out))
    apart = scores.apart(out, evidence.values)
    levels = token_levels(evidence.kv.levels, len(evidence.positions))[0].long()
    kept = weights.square() * apart * layer["distortion"].gather(1, levels)[:, None]
    lost = (weights / (1 - weights).clamp(min=1e-3)).square() * apart * float(layer["eviction"])
    said = torch.where(levels[:, None] > 0, kept, lost).sum(-1)
    found = evidence.method.attend(
        queries[None],
        evidence.kv,
        layer,
        positions=evidence.positions,
        scale=layer.shape.scale,
        softcap=layer.shape.softcap,
    )
    if evidence.rest is not None:
        found = attention.merge(_rest(evidence), found)
    error = found.out[0].unflatten(0, (len(weights), -1)).flatten(1, 2) - out
    return _ratio(error.square().sum(-1), said)


def _ratio(found: Tensor, said: Tensor) -> Tensor:
    """Cases [..., N] whose mean is sum(found) / sum(said), and whose spread is that of this ratio of sums.

    Queries differ by orders of magnitude in both at once: found / mean(said) would have the spread of the queries.
    """
    size = said.mean(-1, keepdim=True)
    ratio = found.mean(-1, keepdim=True) / size
    # where all is float16 nothing is predicted, and nothing held against it
    return torch.where(size > 0, ratio + (found - ratio * said) / size, 0.0)


def _unseen(evidence: "Evidence") -> Tensor:
    """The queries [HQ, S, D] that the allocation was not shown."""
    if evidence.queries is None or evidence.queries.shape[1] <= evidence.shown:
        raise CaptureError(
            f"layer {evidence.layer.index}: rdkv's prediction is held against queries it was not shown, expected more "
            f"than {evidence.shown} of each head; capture again with --queries all"
        )
    return evidence.queries[:, : evidence.queries.shape[1] - evidence.shown]


def _rest(evidence: "Evidence") -> attention.Attended:
    assert evidence.rest is not None
    unseen = evidence.rest.lse.shape[2] - evidence.shown
    return attention.Attended(evidence.rest.out[:, :, :unseen], evidence.rest.lse[:, :, :unseen])


def _observe(evidence: "Evidence") -> scores.Observed:
    return scores.observe(
        _unseen(evidence)[None],
        evidence.keys[None],
        evidence.values[None],
        None if evidence.rest is None else _rest(evidence),
        scale=evidence.layer.shape.scale,
        softcap=evidence.layer.shape.softcap,
    )
