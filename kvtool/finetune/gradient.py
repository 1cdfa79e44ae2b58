"""H1B's attention with a gradient: forward it is what is served, backward the sign lets pass what it can.

    sign(u): forward +-1, backward the identity where |u| <= 1        u = sqrt(D) R k / ||k||, of unit mean square
    values:  forward 4-bit min-max, backward the identity

The straight-through estimator is that of Bengio et al. 2013, https://arxiv.org/abs/1308.3432, clipped as by Hubara et
al. 2016. The paper says that the model is fine-tuned; how is ours.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvtool import attention
from kvtool.attention import Attended
from kvtool.exact import exact_attention
from kvtool.methods import affine
from kvtool.methods.base import LayerCalibration
from kvtool.methods.h1b import H1B
from kvtool.packing import PAGE


class Split(NamedTuple):
    """What is compressed of a text: of its first ``prefix`` tokens ``pages`` whole pages after the ``sinks``.

    The rest of the prefix is the window. What follows is exact to itself, as it is in a chunk that is served.
    """

    prefix: int
    sinks: int
    pages: int

    @property
    def compressed(self) -> slice:
        """Positions of the sketched keys."""
        return slice(self.sinks, self.sinks + self.pages * PAGE)


def attend(
    method: H1B,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    layer: LayerCalibration,
    split: Split,
    *,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """Attention of a whole text, [B, HQ, T, D]: exact in the prefix; what follows reads the prefix compressed."""
    P, c = split.prefix, split.compressed
    whole = exact_attention(*(x[:, :, :P] for x in (queries, keys, values)), scale=scale, softcap=softcap)
    asked = queries[:, :, P:]
    exact_keys, exact_values = (torch.cat([x[:, :, : c.start], x[:, :, c.stop :]], 2) for x in (keys, values))
    near = attention.attend(asked, exact_keys, exact_values, scale=scale, softcap=softcap, causal=True)
    positions = torch.arange(c.start, c.stop, device=keys.device)
    far = sketched(method, asked, keys[:, :, c], values[:, :, c], layer, positions, scale=scale, softcap=softcap)
    return torch.cat([whole, attention.merge(near, far).out.to(whole.dtype)], 2)


def sketched(
    method: H1B,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    layer: LayerCalibration,
    positions: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
) -> Attended:
    """``method.attend`` of what ``method.compress`` makes of ``keys`` and ``values`` [B, H, T, D], with a gradient."""
    B, HQ, S, D = queries.shape
    H = layer.shape.num_kv_heads
    q = queries.float().reshape(B, H, HQ // H, S, D)
    mean = method.removed(layer, positions)
    k = keys.float() - mean
    projection = layer["projection"]
    sketch_q, sketch_k = _signs(q, projection[:, None]), _signs(k, projection)
    logits = sketch_q @ sketch_k[:, :, None].mT / projection.shape[1]  # [B, H, G, S, T]
    if method.score == "cosine":
        tau = layer["temperature"].reshape(H, HQ // H, 1, 1)
        norms = k.norm(dim=-1)[:, :, None, None]
        logits = tau * q.norm(dim=-1, keepdim=True) * norms * torch.sin(math.pi / 2 * logits)
        if isinstance(mean, Tensor):
            logits = logits + q @ mean[:, None].mT
        logits = scale * logits
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    codes, scales, minima = affine.encode(values.detach(), method.v_bits, "token", 0)
    restored = affine.decode(codes, scales, minima, "token", 0)
    return attention.from_logits(logits, values.float() + (restored - values.float()).detach())


def _signs(x: Tensor, projection: Tensor) -> Tensor:
    """sign(R x) as +-1 of ``x`` [..., T, D] and R [..., b, D]."""
    unit = x * (math.sqrt(x.shape[-1]) / x.norm(dim=-1, keepdim=True).clamp_min(1e-20))
    signs: Tensor = _Sign.apply(unit @ projection.mT)  # type: ignore[no-untyped-call]
    return signs


class _Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor) -> Tensor:
        ctx.save_for_backward(u)
        return torch.where(u > 0, 1.0, -1.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (u,) = ctx.saved_tensors
        return grad * (u.abs() <= 1)
