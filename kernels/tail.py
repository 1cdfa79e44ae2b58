"""The exact tokens of a captured decode step: take in the newest, attend, and merge with the compressed part.

One program is a KV head of a sequence; its query heads share what it reads. How many tokens lie in the buffer is read
on the device. The weights meet the values as two numbers of the values' dtype, w = high + low, so that bfloat16 costs
nothing: what is left is 2^-17 of a weight.

    x_t = cap(scale * q . k_t)        o = (sum_t e^x_t v_t + e^lse o_packed) / (sum_t e^x_t + e^lse)
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from kvtool.attention import Attended
from kvtool.kernels.launch import check_queries, default_launch
from kvtool.kernels.packed import LOG2E


def attend_tail(
    queries: Tensor,
    new: tuple[Tensor, Tensor],
    tail: tuple[Tensor, Tensor],
    length: Tensor,
    packed: Attended,
    *,
    scale: float,
    softcap: float | None = None,
    early: bool = False,
) -> Tensor:
    """Attention of one query token [B, HQ, 1, D] over the tail, itself and the ``packed`` part; [B, HQ, 1, D].

    new: its key and value [B, H, 1, D], written at index ``length``.  tail: keys and values [B, H, capacity, D].
    length: int64 [1], tokens in the tail before.  packed: float32 out [B, HQ, 1, D] and lse [B, HQ, 1].
    early: the launches of ``packed`` began when ``queries`` and ``new`` were complete, so that nothing but ``packed``
        has to be waited for.
    """
    B, HQ, _, D = queries.shape
    H = tail[0].shape[1]
    check_queries(queries, H)
    out = queries.new_empty(B, 1, HQ, D)  # the order in which the model goes on
    launch = default_launch(queries.device)
    _tail[(B * H,)](
        queries,
        *new,
        *tail,
        length,
        packed.out,
        packed.lse,
        out,
        *queries.stride()[:2],
        *(stride for x in new for stride in x.stride()[:2]),
        *tail[0].stride()[:3],
        scale * LOG2E,
        (softcap or 0.0) * LOG2E,
        H=H,
        GROUP=HQ // H,
        D=D,
        DIMS=triton.next_power_of_2(D),
        BLOCK=min(128, 16384 // (triton.next_power_of_2(D) * tail[0].element_size())),
        CAPPED=softcap is not None,
        WIDE=not queries.is_cuda,
        EARLY=early,
        PDL=launch.pdl,
        num_stages=2,
        num_warps=8,
        **({"launch_pdl": True} if launch.pdl else {}),
    )
    return out.transpose(1, 2)


@triton.jit
def _tail(
    QUERIES,  # [B, HQ, 1, D]
    NEW_KEY,  # [B, H, 1, D]
    NEW_VALUE,
    KEYS,  # [B, H, capacity, D]
    VALUES,
    LENGTH,  # int64 [1]
    PACKED,  # float32 [B, HQ, D]
    PACKED_LSE,  # float32 [B, HQ], natural log
    OUT,  # [B, HQ, D]
    query_b,
    query_h,
    key_b,
    key_h,
    value_b,
    value_h,
    tail_b,
    tail_h,
    tail_t,
    factor,  # softmax scale * log2 e
    softcap,  # times log2 e
    H: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DIMS: tl.constexpr,  # D, rounded up to a power of two
    BLOCK: tl.constexpr,
    CAPPED: tl.constexpr,
    WIDE: tl.constexpr,  # products in float32: Triton's interpreter has none of bfloat16
    EARLY: tl.constexpr,
    PDL: tl.constexpr,
):
    program = tl.program_id(0)
    b, h = (program // H).to(tl.int64), program % H
    d, r = tl.arange(0, DIMS), tl.arange(0, 16)
    live = (r < GROUP)[:, None] & (d < D)[None, :]
    if PDL and not EARLY:
        gdc_wait()
    q = tl.load(QUERIES + b * query_b + (h * GROUP + r)[:, None] * query_h + d[None, :], mask=live, other=0.0)
    if WIDE:
        q = q.to(tl.float32)
    length = tl.load(LENGTH).to(tl.int32)
    base = b * tail_b + h * tail_h
    m = tl.full([16], -1e30, tl.float32)
    total = tl.zeros([16], tl.float32)
    out = tl.zeros([16, DIMS], tl.float32)
    for start in tl.range(0, length, BLOCK):
        t = start + tl.arange(0, BLOCK)
        at = base + t.to(tl.int64)[:, None] * tail_t + d[None, :]
        inside = (t < length)[:, None] & (d < D)[None, :]
        k = tl.load(KEYS + at, mask=inside, other=0.0)
        v = tl.load(VALUES + at, mask=inside, other=0.0)
        if WIDE:
            k, v = k.to(tl.float32), v.to(tl.float32)
        x = _capped(tl.dot(q, k.T, input_precision="ieee") * factor, softcap, CAPPED)
        x = tl.where((t < length)[None, :], x, -1e30)
        top = tl.maximum(m, tl.max(x, 1))
        p = tl.where((t < length)[None, :], tl.exp2(x - top[:, None]), 0.0)
        high = p.to(v.dtype)
        low = (p - high.to(tl.float32)).to(v.dtype)
        fade = tl.exp2(m - top)
        out = out * fade[:, None] + tl.dot(high, v, input_precision="ieee") + tl.dot(low, v, input_precision="ieee")
        total = total * fade + tl.sum(p, 1)
        m = top
    # the newest token
    k = tl.load(NEW_KEY + b * key_b + h * key_h + d, mask=d < D, other=0.0)
    v = tl.load(NEW_VALUE + b * value_b + h * value_h + d, mask=d < D, other=0.0)
    to = base + length.to(tl.int64) * tail_t + d
    tl.store(KEYS + to, k, mask=d < D)
    tl.store(VALUES + to, v, mask=d < D)
    x = _capped(tl.sum(q.to(tl.float32) * k.to(tl.float32)[None, :], 1) * factor, softcap, CAPPED)
    heads = b * (H * GROUP) + h * GROUP + r
    if PDL and EARLY:
        gdc_wait()
    lse = tl.load(PACKED_LSE + heads, mask=r < GROUP, other=0.0) * 1.4426950408889634
    packed = tl.load(PACKED + heads[:, None] * D + d[None, :], mask=live, other=0.0)
    top = tl.maximum(tl.maximum(m, x), lse)
    fade, one, share = tl.exp2(m - top), tl.exp2(x - top), tl.exp2(lse - top)
    out = out * fade[:, None] + one[:, None] * v.to(tl.float32)[None, :] + share[:, None] * packed
    out /= (total * fade + one + share)[:, None]
    tl.store(OUT + heads[:, None] * D + d[None, :], out.to(OUT.dtype.element_ty), mask=live)


@triton.jit
def _capped(x, softcap, CAPPED: tl.constexpr):
    if CAPPED:
        # tanh z = 1 - 2 / (e^2z + 1), in units of log2
        x = softcap * (1 - 2 / (tl.exp2(x * (2.8853900817779268 / softcap)) + 1))
    return x
