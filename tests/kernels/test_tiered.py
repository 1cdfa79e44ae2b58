"""tiered's kernels attend as its reference does, and say of every block what the reference says of it."""

from itertools import pairwise

import pytest
import torch

from kvtool import attention
from kvtool.attention import relative_error
from kvtool.backends import Backend
from kvtool.cache import CompressedLayer
from kvtool.capture.sample import LayerSample
from kvtool.kernels import tiered as kernels
from kvtool.methods import make_method
from kvtool.methods.base import LayerCalibration
from kvtool.policy import CachePolicy
from kvtool.shapes import LayerKind, LayerShape, Rope

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def layer_of(method, shares, H=2, G=2, D=64):
    """A layer whose codes are data-free and whose tiers are as given."""
    shape = LayerShape(kind=LayerKind.FULL, num_heads=H * G, num_kv_heads=H, head_dim=D, scale=D**-0.5, rope=0)
    g = torch.Generator().manual_seed(0)
    rope = Rope(inv_freq=tuple(1e4 ** (-2 * i / D) for i in range(D // 2)))
    keys = rope.rotate(torch.randn(H, 128, D, generator=g) + torch.randn(H, 1, D, generator=g), torch.arange(128))
    sample = LayerSample(0, 0, shape, rope, keys, torch.randn(H, 128, D, generator=g), torch.arange(128))
    tensors = {}
    for prefix, coded in method._coded().items():
        tensors |= {prefix + k: t for k, t in coded.fit_layer(shape, rope, [sample], layer=0).items()}
    tensors |= {"shares": torch.tensor(shares), "thresholds": torch.zeros(3), "host_bytes": torch.tensor(1 << 30)}
    tensors |= {"disk_bytes": torch.tensor(0)}
    return LayerCalibration(0, shape, rope, {name: tensor.to(DEVICE) for name, tensor in tensors.items()})


def compressed(method, layer, B, blocks):
    """Some blocks of random tokens, placed by random queries."""
    g = torch.Generator().manual_seed(1)
    H, D = layer.shape.num_kv_heads, layer.shape.head_dim
    keys, values = torch.randn(2, B, H, 64 * blocks, D, generator=g).to(DEVICE)
    queries = 2 * torch.randn(B, layer.shape.num_heads, 8, D, generator=g).to(DEVICE)
    positions = torch.arange(4, 4 + 64 * blocks, device=DEVICE)
    carry = method.begin(queries, keys[:, :, :0], values[:, :, :0], layer, sinks=4)
    return method.compress(keys, values, layer, positions=positions, queries=queries, carry=carry)[0], positions


@pytest.mark.parametrize(
    ("shares", "D", "G", "S", "softcap"),
    [
        ((0.25, 0.25, 0.25, 0.25), 64, 3, 1, None),
        ((0.0, 0.0, 1.0, 0.0), 80, 1, 3, 5.0),
        ((0.5, 0.0, 0.0, 0.5), 64, 4, 2, None),
        ((0.0, 1.0, 0.0, 0.0), 64, 1, 1, None),
    ],
)
def test_the_kernels_agree_with_the_reference_also_on_every_block(shares, D, G, S, softcap):
    method = make_method("tiered")
    layer = layer_of(method, shares, G=G, D=D)
    kv, positions = compressed(method, layer, 2, 4)
    if shares == (0.25, 0.25, 0.25, 0.25):
        counts = [(kv.tier.unflatten(1, (-1, 2)) == t).sum(1) for t in range(4)]
        assert any((count[:, 0] != count[:, 1]).any() for count in counts)  # heads differ in what they hold
    queries = torch.randn(2, 2 * G, S, D, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    arguments = {"positions": positions, "scale": layer.shape.scale, "softcap": softcap}
    exact = method.attend(queries, kv, layer, **arguments)
    found, blocks = kernels.attend_blocks(method, queries, kv, layer, **arguments)
    assert relative_error(found.out, exact.out) < 3e-3  # weights of 15 bits
    assert (found.lse - exact.lse).abs().max() < 2e-3  # 16-bit queries
    keys = method.decompress(kv, layer, positions=positions).keys
    logits = attention.logits(queries, keys, scale=layer.shape.scale, softcap=softcap).flatten(1, 2)
    assert (blocks - logits.unflatten(-1, (-1, 64)).logsumexp(-1)).abs().max() < 2e-3


def test_blocks_move_alike_whoever_attends():
    method = make_method("tiered", {"cooldown": 0, "hysteresis": 1.0, "halflife": 1.0})
    layer = layer_of(method, (0.25, 0.25, 0.25, 0.25), H=1)
    policy = CachePolicy(sinks=4, window=8)
    g = torch.Generator().manual_seed(3)
    caches = [CompressedLayer(method, layer, policy, Backend(*b)) for b in (("reference",), ("triton", kernels))]
    prompt = torch.randn(3, 1, 2, 12 + 256, 64, generator=g).to(DEVICE)
    for cache in caches:
        cache.update(prompt[0][:, :1], prompt[1][:, :1])
        cache.attend(prompt[2], scale=0.125, softcap=None)
        cache.settle(prompt[2])
    placed = []
    for _ in range(3):
        queries, keys, values = 4 * torch.randn(3, 1, 2, 1, 64, generator=g).to(DEVICE)
        outs = []
        for cache in caches:
            cache.update(keys[:, :1], values[:, :1])
            outs.append(cache.attend(queries, scale=0.125, softcap=None))
            assert torch.isclose(cache.shares.sum(-1), torch.ones(()), atol=0.2).all()  # all but the sinks
            cache.settle(queries)
        assert relative_error(outs[1], outs[0]) < 3e-3
        reference, kernel = (cache.carry.kv for cache in caches)
        assert torch.equal(reference.tier, kernel.tier)
        assert torch.allclose(reference.score, kernel.score, rtol=1e-2, atol=1e-6)  # squares of exp(2e-3)
        placed.append(kernel.tier)
    assert any(not torch.equal(a, b) for a, b in pairwise(placed))


def test_gluon_is_refused():
    assert "triton" in kernels.refuses(make_method("tiered"), gluon=True)
    assert kernels.refuses(make_method("tiered")) is None
