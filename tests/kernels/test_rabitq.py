"""rabitq's kernels: codes attend as the reference does; top-p keeps the mass it promises and attends exactly over it."""

import pytest
import torch

from kvtool.attention import relative_error
from kvtool.kernels import rabitq as kernels
from kvtool.methods import make_method
from kvtool.methods.base import LayerCalibration
from kvtool.shapes import LayerKind, LayerShape, Rope

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROPE = Rope(inv_freq=tuple(1e4 ** (-i / 32) for i in range(32)), scaling=1.1)


def calibrated(method, D, group, H=2, rope=ROPE):
    """A layer as ``fit`` leaves it, its means drawn at random."""
    shape = LayerShape(kind=LayerKind.FULL, num_heads=H * group, num_kv_heads=H, head_dim=D, scale=D**-0.5)
    tensors = (method.data_free() or method).fit_layer(shape, rope, iter(()), layer=0)
    generator = torch.Generator().manual_seed(1)
    schema = method.layer_schema(shape)
    tensors |= {
        name: torch.randn(schema[name].shape, generator=generator)
        for name in ("key_mean", "query_mean")
        if name in schema
    }
    return LayerCalibration(0, shape, rope, {name: tensor.to(DEVICE) for name, tensor in tensors.items()})


@pytest.mark.parametrize(
    ("options", "D", "group", "softcap"),
    [
        ({"k_bits": 1, "v_bits": 8, "mean": "none", "rotation": "haar"}, 80, 4, None),
        ({"k_bits": 4, "v_bits": 3, "mean": "rotated"}, 64, 3, 30.0),
        ({"k_bits": 8, "v_bits": 2, "mean": "channel", "delta": "least-squares"}, 96, 1, None),
    ],
)
def test_codes_attend_as_the_reference_does(options, D, group, softcap):
    method = make_method("rabitq", options)
    layer = calibrated(method, D, group)
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 1, 2, 128, D, generator=generator).to(DEVICE)
    queries = 2 * torch.randn(1, 2 * group, 2, D, generator=generator).to(DEVICE)
    positions = torch.arange(4, 4 + 128, device=DEVICE)
    kv, _ = method.compress(keys, values, layer, positions=positions)
    arguments = {"positions": positions, "scale": layer.shape.scale, "softcap": softcap}
    exact = method.attend(queries, kv, layer, **arguments)
    found = kernels.attend(method, queries, kv, layer, **arguments)
    assert relative_error(found.out, exact.out) < 3e-3  # weights of 15 bits
    assert (found.lse - exact.lse).abs().max() < 2e-3


@pytest.mark.parametrize("options", [{"k_bits": 5}, {"v_bits": 7}])
def test_options_without_a_kernel_are_refused_by_name(options):
    assert "rabitq" in kernels.refuses(make_method("rabitq", options))
