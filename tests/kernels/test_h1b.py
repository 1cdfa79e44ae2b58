"""h1b's kernel attends as h1b's reference does: sketches of one to eight bits a channel, cosine map, min-max values."""

import pytest
import torch

from kvtool.attention import relative_error
from kvtool.errors import BackendError
from kvtool.kernels import h1b as kernels
from kvtool.kernels.decode_h1b import C0, C1, C2, C3
from kvtool.kernels.launch import Launch
from kvtool.methods import make_method
from kvtool.methods.base import LayerCalibration
from kvtool.shapes import LayerKind, LayerShape, Rope

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def compressed(method, D, group, *, B=1, H=1, S=1, tokens=64):
    """Random queries and pages, and a layer whose temperatures and means differ by head."""
    rope = Rope(inv_freq=tuple(1e4 ** (-2 * i / D) for i in range(D // 2)))
    shape = LayerShape(kind=LayerKind.FULL, num_heads=group * H, num_kv_heads=H, head_dim=D, scale=D**-0.5)
    generator = torch.Generator().manual_seed(0)
    free = make_method("h1b", {"sketch_bits": method.sketch_bits, "mean": "none", "score": "published"})
    tensors = free.fit_layer(shape, rope, iter(()), layer=0)
    tensors["temperature"] = 0.3 + torch.rand(group * H, generator=generator)
    tensors["key_mean"] = torch.randn(H, D, generator=generator)
    layer = LayerCalibration(0, shape, rope, {name: tensor.to(DEVICE) for name, tensor in tensors.items()})
    # values whose minima are far from zero
    keys, values = (torch.randn(2, B, H, tokens, D, generator=generator) + 0.5).to(DEVICE)
    queries = (3 * torch.randn(B, group * H, S, D, generator=generator)).to(DEVICE)
    positions = torch.arange(4, 4 + tokens, device=DEVICE)
    kv, _ = method.compress(keys, values, layer, positions=positions)
    return queries, kv, layer, {"positions": positions, "scale": shape.scale}


@pytest.mark.parametrize(
    ("options", "D", "dims"),
    [
        ({}, 64, {"group": 3}),
        ({}, 128, {"group": 4, "H": 2, "tokens": 192}),
        ({"sketch_bits": 3}, 80, {"group": 1, "S": 3}),  # 240 bits: the last group is half empty
        ({"sketch_bits": 2, "v_bits": 8, "mean": "channel"}, 96, {"group": 7}),
        ({"sketch_bits": 8, "v_bits": 2, "mean": "none"}, 96, {"group": 8, "S": 3}),  # queries read in the loop
        ({"v_bits": 3}, 256, {"group": 2, "B": 2}),
        ({"score": "published"}, 64, {"group": 4, "tokens": 192}),
    ],
)
def test_the_kernel_agrees_with_the_reference(options, D, dims):
    method = make_method("h1b", options)
    queries, kv, layer, arguments = compressed(method, D, **dims)
    exact = method.attend(queries, kv, layer, **arguments)
    found = kernels.attend(method, queries, kv, layer, **arguments)
    # weights of 15 bits
    assert relative_error(found.out, exact.out) < 1e-3
    # agreements are exact; the sine and 16 bits of the mean's bias are not
    assert (found.lse - exact.lse).abs().max() < 1e-3


def test_a_cap_and_splits_without_pages():
    method = make_method("h1b")
    queries, kv, layer, arguments = compressed(method, 64, 2, tokens=192)
    exact = method.attend(queries, kv, layer, **arguments, softcap=2.0)
    found = kernels.attend(method, queries, kv, layer, **arguments, softcap=2.0, launch=Launch(splits=5))
    assert relative_error(found.out, exact.out) < 1e-3
    assert (found.lse - exact.lse).abs().max() < 1e-3


def test_pages_beyond_those_in_use_are_not_read():
    method = make_method("h1b", {"mean": "channel"})
    queries, kv, layer, arguments = compressed(method, 64, 2, B=2, tokens=192)
    kv.value_scales[0, :, 1:] = torch.nan
    found = kernels.attend(method, queries, kv, layer, **arguments, pages=torch.tensor([1, 3], device=DEVICE).int())
    part = type(kv)(*(x[:1, :, :1] for x in kv))
    alone = method.attend(queries[:1], part, layer, positions=arguments["positions"][:64], scale=arguments["scale"])
    assert relative_error(found.out[:1], alone.out) < 1e-3
    assert found.out.isfinite().all()


def test_the_sine_of_the_kernel_is_the_sine():
    a = torch.linspace(-1, 1, 10_001, dtype=torch.float64)
    z = a.square()
    c0, c1, c2, c3 = (c.value for c in (C0, C1, C2, C3))
    found = a * (c0 + z * (c1 + z * (c2 + z * c3)))
    # a logit of 100 nats is then off by less than 1e-4
    assert (found - torch.sin(torch.pi / 2 * a)).abs().max() < 6e-7


def test_gluon_and_strange_pages_are_refused():
    method = make_method("h1b")
    assert "triton" in kernels.refuses(method, gluon=True)
    assert kernels.refuses(method) is None
    queries, kv, layer, arguments = compressed(method, 64, 2)
    with pytest.raises(BackendError, match="value_pages"):
        kernels.attend(method, queries, kv._replace(value_pages=kv.value_pages[..., ::2]), layer, **arguments)
