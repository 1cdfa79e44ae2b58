"""affine's kernel attends as affine's reference does: ranges per token and per channel, every packed width."""

import pytest
import torch

from kvtool.attention import relative_error
from kvtool.kernels import affine as kernels
from kvtool.methods import make_method
from kvtool.methods.base import LayerCalibration
from kvtool.shapes import LayerKind, LayerShape

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
INT8 = {"k_bits": 8, "v_bits": 8, "k_axis": "token", "k_group": 0, "v_group": 0}


@pytest.mark.parametrize(
    ("options", "D", "group", "softcap"),
    [
        ({"k_bits": 2, "v_bits": 2}, 64, 3, None),  # KIVI-2
        ({"k_bits": 4, "v_bits": 4, "k_group": 64, "v_group": 64}, 80, 4, 20.0),
        (INT8, 64, 1, None),
        ({"k_bits": 3, "v_bits": 6, "k_axis": "token", "v_axis": "channel"}, 96, 2, None),
    ],
)
def test_the_kernel_agrees_with_the_reference(options, D, group, softcap):
    method = make_method("affine", options)
    shape = LayerShape(kind=LayerKind.FULL, num_heads=group, num_kv_heads=1, head_dim=D, scale=D**-0.5)
    layer = LayerCalibration(0, shape, None, {})
    generator = torch.Generator().manual_seed(0)
    # minima far from zero and channels of very different size, as keys have them
    size = torch.exp(torch.linspace(-1.5, 1.0, D))
    keys, values = ((torch.randn(2, 1, 1, 320, D, generator=generator) + 1.0) * size).to(DEVICE)
    queries = torch.randn(1, group, 2, D, generator=generator).to(DEVICE)
    positions = torch.arange(320, device=DEVICE)
    kv, _ = method.compress(keys, values, layer, positions=positions)
    arguments = {"positions": positions, "scale": shape.scale, "softcap": softcap}
    exact = method.attend(queries, kv, layer, **arguments)
    found = kernels.attend(method, queries, kv, layer, **arguments)
    assert relative_error(found.out, exact.out) < 1e-3
    assert (found.lse - exact.lse).abs().max() < 2e-3  # 16-bit queries


def test_gluon_is_refused():
    assert "triton" in kernels.refuses(make_method("affine"), gluon=True)
    assert kernels.refuses(make_method("affine")) is None
