"""The quantities a claim may speak of: each measured on held-out tokens, per KV head and case.

A measure returns [H, N]: one number per head and case, a case being a token unless said otherwise. The claim's kind
says how cases are judged: their maximum (always), their mean (expected) or the share of ones (probability).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvtool import attention
from kvtool.attention import Attended
from kvtool.errors import CaptureError
from kvtool.methods.base import Decompressed, LayerCalibration, Method, nbytes


@dataclass(frozen=True)
class Evidence:
    """One layer of a held-out stretch of text, and what the method made of it.

    keys, values: [H, T, D] float32, as captured. queries: [HQ, S, D] float32 from the end of the text, or None.
    kv: the compressed form; decoded: what attention sees of it, [1, H, T, D].
    rest: attention of the queries over the tokens that stay exact, or None. shown: how many of the last queries the
    method looked at.
    """

    method: Method
    layer: LayerCalibration
    keys: Tensor
    values: Tensor
    queries: Tensor | None
    positions: Tensor
    kv: Any
    decoded: Decompressed
    rest: Attended | None = None
    shown: int = 0


Measure = Callable[[Evidence], Tensor]


def key_nmse(evidence: Evidence) -> Tensor:
    """||k - k^||^2 / ||k||^2 of each token."""
    return _nmse(evidence.decoded.keys[0], evidence.keys)


def value_nmse(evidence: Evidence) -> Tensor:
    """||v - v^||^2 / ||v||^2 of each token."""
    return _nmse(evidence.decoded.values[0], evidence.values)


def residual_nmse(evidence: Evidence) -> Tensor:
    """||k - k^||^2 / ||k - c||^2 of each token: relative to what is coded, for methods that centre keys on c."""
    centre = getattr(evidence.method, "centre", None)
    if centre is None:
        return key_nmse(evidence)
    coded = evidence.keys - centre(evidence.layer, evidence.positions)
    error = (evidence.decoded.keys[0].float() - evidence.keys).square().sum(-1)
    return error / coded.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)


def inner_product_nmse(evidence: Evidence) -> Tensor:
    """(q.k - q.k^)^2 / (||q||^2 ||k||^2) of each token, averaged over the queries of its group."""
    queries = grouped(evidence)
    queries = queries / queries.norm(dim=-1, keepdim=True)
    errors = queries @ (evidence.decoded.keys[0] - evidence.keys).mT  # [H, G*S, T]
    return errors.square().mean(1) / evidence.keys.square().sum(-1)


def inner_product_bias(evidence: Evidence) -> Tensor:
    """|slope - 1| of q.k^ against q.k over all pairs of a head; [H, 1]."""
    queries = grouped(evidence)
    exact = queries @ evidence.keys.mT
    found = queries @ evidence.decoded.keys[0].mT
    return ((found * exact).sum((1, 2)) / exact.square().sum((1, 2)) - 1).abs()[:, None]


def logit_mse(evidence: Evidence) -> Tensor:
    """Squared error of the scaled logits of each token, nats squared, averaged over the queries of its group.

    The mean error of a query is taken out: softmax does not see it.
    """
    errors = grouped(evidence) @ (evidence.decoded.keys[0] - evidence.keys).mT * evidence.layer.shape.scale
    return (errors - errors.mean(-1, keepdim=True)).square().mean(1)


def output_error(evidence: Evidence) -> Tensor:
    """Relative error of the attention output over the held-out tokens; a case is a query of the group: [H, G*S]."""
    exact, found = _both(evidence)
    return _by_head(evidence, attention.relative_error(found.out, exact.out, dim=-1))


def bits_per_value(evidence: Evidence) -> Tensor:
    """Bits stored per cached number, side information and padding included; [H, 1]."""
    bits = 8 * nbytes(evidence.kv) / (2 * evidence.keys.numel())
    return torch.full((evidence.keys.shape[0], 1), bits)


def missing_mass(evidence: Evidence) -> Tensor:
    """1 - the share of the softmax over the held-out tokens that was read; a case is a query: [H, G*S]."""
    exact, found = _both(evidence)
    return _by_head(evidence, 1 - (found.lse - exact.lse).exp())


def missing_mass_excess(evidence: Evidence) -> Tensor:
    """By how much the output misses beyond what its missing mass allows, relative to its size; [H, G*S].

    Reading a subset cannot move the output by more than the missing mass times the farthest value; 0 or less.
    """
    exact, found = _both(evidence)
    missing = (1 - (found.lse - exact.lse).exp())[0]  # [HQ, S]
    values = evidence.values.repeat_interleave(evidence.layer.shape.group, 0)  # [HQ, T, D]
    farthest = torch.cdist(found.out[0], values).amax(-1)
    excess = (found.out - exact.out)[0].norm(dim=-1) - missing.clamp_min(0) * farthest
    # float32 sums over the tokens leave 1e-4 of the size of the values
    size = values.norm(dim=-1).amax(-1, keepdim=True)
    return _by_head(evidence, (excess / size - 1e-4).clamp_min(0.0)[None])


MEASURES: dict[str, Measure] = {
    measure.__name__: measure
    for measure in (
        key_nmse,
        value_nmse,
        residual_nmse,
        inner_product_nmse,
        inner_product_bias,
        logit_mse,
        output_error,
        bits_per_value,
        missing_mass,
        missing_mass_excess,
    )
}


def measure(quantity: str, evidence: Evidence) -> Tensor:
    """The cases [H, N] of ``quantity``, one of :data:`MEASURES` or of the method's own."""
    return (MEASURES | dict(evidence.method.measures()))[quantity](evidence)


def _both(evidence: Evidence) -> tuple[Attended, Attended]:
    """Attention over the held-out tokens, exact and as the method has it."""
    queries, shape = _queries(evidence)[None], evidence.layer.shape
    exact = attention.attend(
        queries, evidence.keys[None], evidence.values[None], scale=shape.scale, softcap=shape.softcap
    )
    found = evidence.method.attend(
        queries, evidence.kv, evidence.layer, positions=evidence.positions, scale=shape.scale, softcap=shape.softcap
    )
    return exact, found


def _by_head(evidence: Evidence, cases: Tensor) -> Tensor:
    """[1, HQ, S] by KV head, [H, G*S]."""
    return cases[0].float().unflatten(0, (evidence.layer.shape.num_kv_heads, -1)).flatten(1)


def _nmse(found: Tensor, exact: Tensor) -> Tensor:
    return (found.float() - exact).square().sum(-1) / exact.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)


def _queries(evidence: Evidence) -> Tensor:
    if evidence.queries is None:
        raise CaptureError(
            f"layer {evidence.layer.index}: {evidence.method.name} claims something of queries, and the capture has "
            "none; capture again with --queries all"
        )
    return evidence.queries


def grouped(evidence: Evidence) -> Tensor:
    """Queries by the KV head they read, [H, G*S, D].

    Raises:
        CaptureError: the capture has none.
    """
    return _queries(evidence).unflatten(0, (evidence.keys.shape[0], -1)).flatten(1, 2)
