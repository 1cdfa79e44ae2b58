"""The model's own attention: exact, causal, with the mask or bias a caller brings, through torch's fused kernels."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvtool import attention


def exact_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Attention of ``queries`` [B, HQ, S, D], the last S tokens, over ``keys`` and ``values`` [B, H, T, D].

    Causal unless ``mask`` (boolean, True where visible, broadcastable to [B, HQ, S, T]) says otherwise; ``bias``
    [B, H, T] is added to the logits.
    """
    B, HQ, S, _ = queries.shape
    H, T = keys.shape[1:3]
    if mask is None and S > 1 and S < T:
        mask = torch.ones(S, T, dtype=torch.bool, device=keys.device).tril_(T - S)
    if bias is not None:
        mask_bias = bias.to(queries.dtype).repeat_interleave(HQ // H, 1)[:, :, None]  # [B, HQ, 1, T]
        hidden = attention.future(S, T, keys.device) if mask is None and S > 1 else None if mask is None else ~mask
        mask = mask_bias if hidden is None else mask_bias.masked_fill(hidden, -torch.inf)
    if softcap is not None:
        scores = attention.logits(queries, keys, scale=scale, softcap=softcap).flatten(1, 2)
        if mask is None and S > 1:
            mask = ~attention.future(S, T, keys.device)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        weights = scores.softmax(-1).reshape(B, H, HQ // H, S, T)
        return (weights @ values[:, :, None].to(weights.dtype)).flatten(1, 2).to(queries.dtype)
    if mask is None:
        gqa = HQ != H
        return F.scaled_dot_product_attention(queries, keys, values, is_causal=S > 1, scale=scale, enable_gqa=gqa)
    # grouped attention with a mask leaves the fast kernels, repeated heads do not
    keys, values = (x.repeat_interleave(HQ // H, 1) for x in (keys, values))
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale)


def logit_scale(module: Any, kwargs: Mapping[str, Any]) -> float:
    """The scale of an attention ``module``'s logits: what transformers hands over, or that of its head_dim."""
    scaling = kwargs.get("scaling")
    return float(module.head_dim**-0.5 if scaling is None else scaling)
