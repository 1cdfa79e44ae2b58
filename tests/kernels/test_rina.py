"""rina's kernel attends as rina's reference does: sub-spaces of every size, stages, extra stages, correction."""

from dataclasses import replace

import pytest
import torch

from kvtool import rotation
from kvtool.attention import relative_error
from kvtool.errors import BackendError
from kvtool.kernels import rina as kernels
from kvtool.kernels.launch import Launch
from kvtool.kernels.samples import Shape, fitted_layer
from kvtool.methods import make_method
from kvtool.methods.base import LayerCalibration
from kvtool.shapes import LayerKind, LayerShape, Rope

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# the weights have 15 bits below the largest norm of a warp's pages at the largest level there can be
LIMIT = 2e-3


def compressed(method, D, group, *, B=1, H=1, S=1, tokens=64):
    """Random queries and pages, and a layer all of whose fitted numbers differ by head, sub-space and stage."""
    rope = Rope(inv_freq=tuple(1e4 ** (-2 * i / D) for i in range(D // 2)))
    shape = LayerShape(kind=LayerKind.FULL, num_heads=group * H, num_kv_heads=H, head_dim=D, scale=D**-0.5)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, spec in method.layer_schema(shape).items():
        tensors[name] = torch.randn(spec.shape, generator=generator)
        if name.endswith("_rotation"):
            tensors[name] = rotation.draw("hadamard", H, D, generator)
        elif name.endswith(("_halves", "_noise", "_energy")):
            # every stage leaves about half of the one before
            tensors[name] = (0.8 + 0.4 * tensors[name].sigmoid()) * 0.5 ** torch.arange(float(spec.shape[-1]))
        elif name.endswith("_mids"):
            tensors[name] *= 0.1
        elif name in ("beta", "kappa"):
            tensors[name] = tensors[name].sigmoid()
    layer = LayerCalibration(0, shape, rope, {name: tensor.to(DEVICE) for name, tensor in tensors.items()})
    keys, values = torch.randn(2, B, H, tokens, D, generator=generator).to(DEVICE)
    values = values * torch.exp(0.5 * torch.randn(B, H, tokens, 1, generator=generator)).to(DEVICE)
    queries = (2 * torch.randn(B, group * H, S, D, generator=generator)).to(DEVICE)
    positions = torch.arange(4, 4 + tokens, device=DEVICE)
    kv, _ = method.compress(keys, values, layer, positions=positions)
    return queries, kv, layer, {"positions": positions, "scale": shape.scale}


@pytest.mark.parametrize(
    ("options", "D", "dims"),
    [
        ({}, 64, {"group": 3, "B": 2}),
        ({"subspace": 16}, 128, {"group": 4, "H": 2, "tokens": 192}),
        ({"k_stages": 2, "v_stages": 2}, 80, {"group": 1, "S": 3}),  # sub-spaces of 16, the last group half empty
        ({"subspace": 64, "mean": "channel", "v_stages": 3}, 96, {"group": 7}),  # sub-spaces of 32
        ({"subspace": 64, "k_stages": 2}, 256, {"group": 2}),
        ({"k_stages": 3, "mean": "none", "correction": False}, 64, {"group": 8, "S": 3}),
        ({"extra": 5}, 128, {"group": 4, "tokens": 192}),
        ({"extra": 32, "k_stages": 2}, 80, {"group": 3, "H": 2}),
    ],
)
def test_the_kernel_agrees_with_the_reference(options, D, dims):
    method = make_method("rina", options)
    queries, kv, layer, arguments = compressed(method, D, **dims)
    exact = method.attend(queries, kv, layer, **arguments)
    found = kernels.attend(method, queries, kv, layer, **arguments)
    assert relative_error(found.out, exact.out) < LIMIT
    # 16-bit queries, 16 bits of the mean's bias
    assert (found.lse - exact.lse).abs().max() < 1e-3


@pytest.mark.parametrize(("target", "D", "group"), [(1.25, 64, 3), (2.0, 80, 1)])
def test_placed_stages_have_a_kernel(target, D, group):
    method = make_method("rina", {"target_bits": target})
    layer = fitted_layer(method, Shape(D, group))
    layer = replace(layer, tensors={name: tensor.to(DEVICE) for name, tensor in layer.tensors.items()})
    generator = torch.Generator().manual_seed(3)
    keys, values = torch.randn(2, 1, 2, 128, D, generator=generator).to(DEVICE)
    values[:, :1, :64] *= 300  # a page unlike what was fitted to
    queries = torch.randn(1, 2 * group, 2, D, generator=generator).to(DEVICE)
    arguments = {"positions": torch.arange(4, 132, device=DEVICE), "scale": layer.shape.scale}
    kv, _ = method.compress(keys, values, layer, positions=arguments["positions"])
    assert (kv.outside & 2).any()
    exact = method.attend(queries, kv, layer, **arguments)
    found = kernels.attend(method, queries, kv, layer, **arguments)
    assert relative_error(found.out, exact.out) < LIMIT
    assert (found.lse - exact.lse).abs().max() < 1e-3


def test_a_cap_and_splits_without_pages():
    method = make_method("rina", {"extra": 3})
    queries, kv, layer, arguments = compressed(method, 64, 2, tokens=192)
    exact = method.attend(queries, kv, layer, **arguments, softcap=2.0)
    found = kernels.attend(method, queries, kv, layer, **arguments, softcap=2.0, launch=Launch(splits=5))
    assert relative_error(found.out, exact.out) < LIMIT
    assert (found.lse - exact.lse).abs().max() < 1e-3


def test_pages_beyond_those_in_use_are_not_read():
    method = make_method("rina", {"extra": 2})
    queries, kv, layer, arguments = compressed(method, 64, 2, B=2, tokens=192)
    found = kernels.attend(method, queries, kv, layer, **arguments, pages=torch.tensor([1, 3], device=DEVICE).int())
    part = type(kv)(*(x[:1, :, :1] for x in kv))
    alone = method.attend(queries[:1], part, layer, positions=arguments["positions"][:64], scale=arguments["scale"])
    assert relative_error(found.out[:1], alone.out) < LIMIT


def test_what_has_no_kernel_is_refused():
    method = make_method("rina")
    assert "triton" in kernels.refuses(method, gluon=True)
    assert kernels.refuses(method) is None
    assert "published" in kernels.refuses(make_method("rina", {"variant": "published"}))
    assert kernels.refuses(make_method("rina", {"extra": 5})) is None
    assert kernels.refuses(make_method("rina", {"target_bits": 1.25})) is None
    assert "triton" in kernels.refuses(make_method("rina", {"target_bits": 1.25}), gluon=True)
    queries, kv, layer, arguments = compressed(method, 64, 2)
    with pytest.raises(BackendError, match="value_halves"):
        kernels.attend(method, queries, kv._replace(value_halves=kv.value_halves[..., ::2]), layer, **arguments)
