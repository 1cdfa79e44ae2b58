"""turboquant's kernels attend as turboquant's reference does, calibrated mean included."""

from dataclasses import replace

import pytest
import torch

from kvtool.attention import relative_error
from kvtool.backends import Backend, choose_backend
from kvtool.cache import CompressedLayer
from kvtool.errors import BackendError, ModelError
from kvtool.kernels import turboquant as kernels
from kvtool.kernels.mean import mean_logits
from kvtool.methods import make_method
from kvtool.methods.base import LayerCalibration
from kvtool.policy import CachePolicy
from kvtool.shapes import LayerKind, LayerShape, Rope

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROPE = Rope(inv_freq=tuple(1e4 ** (-i / 32) for i in range(32)), scaling=1.1)


def compressed(method, tokens, softcap=None, rope=ROPE, D=64):
    shape = LayerShape(kind=LayerKind.FULL, num_heads=6, num_kv_heads=2, head_dim=D, scale=0.125, softcap=softcap)
    tensors = replace(method, mean="none").fit_layer(shape, rope, iter(()), layer=0)
    generator = torch.Generator().manual_seed(0)
    if method.mean != "none":
        tensors["key_mean"] = torch.randn(2, D, generator=generator)
    layer = LayerCalibration(0, shape, rope, {name: tensor.to(DEVICE) for name, tensor in tensors.items()})
    keys, values = torch.randn(2, 1, 2, tokens, D, generator=generator).to(DEVICE)
    queries = 2 * torch.randn(1, 6, 2, D, generator=generator).to(DEVICE)
    positions = torch.arange(4, 4 + tokens, device=DEVICE)
    kv, _ = method.compress(keys, values, layer, positions=positions)
    return queries, kv, layer, positions


@pytest.mark.parametrize(
    "options",
    [
        {"k_bits": 2, "v_bits": 4, "codebook": "sphere", "mean": "rotated"},
        {"k_bits": 1, "v_bits": 3, "codebook": "sphere", "mean": "channel"},
        {"k_bits": 8, "v_bits": 1, "codebook": "sphere", "mean": "none"},
    ],
)
def test_kernels_agree_with_the_reference(options):
    method = make_method("turboquant", options)
    softcap = 30.0 if options["k_bits"] == 2 else None
    queries, kv, layer, positions = compressed(method, 128, softcap)
    exact = method.attend(queries, kv, layer, positions=positions, scale=0.125, softcap=softcap)
    found = kernels.attend(method, queries, kv, layer, positions=positions, scale=0.125, softcap=softcap)
    assert relative_error(found.out, exact.out) < 3e-3  # weights of 15 bits
    assert (found.lse - exact.lse).abs().max() < 2e-3


def test_mean_logits_far_from_the_origin():
    """At a million tokens the angle of a page's first token must come from float64."""
    generator = torch.Generator().manual_seed(1)
    queries, mean = torch.randn(1, 6, 1, 80, generator=generator), torch.randn(2, 80, generator=generator)
    positions = torch.arange(1_000_000, 1_000_000 + 128)
    codes, unit = mean_logits(queries.to(DEVICE), mean.to(DEVICE), ROPE, positions.to(DEVICE), 0.5)
    found = codes.cpu().double() * unit.cpu().double()[..., None]
    turned = ROPE.rotate(mean[:, None].expand(-1, 128, -1), positions)  # [H, T, D]
    exact = 0.5 * queries.double() @ turned.double().repeat_interleave(3, 0).mT
    # half a unit of 16 bits, and float32 sums of 80 terms
    assert ((found - exact).abs().amax(-1) < 0.5 * unit.cpu() + 1e-4).all()
    assert unit.max() * 32767 < 40  # the unit is of the size of the logits


@pytest.mark.parametrize("options", [{"k_bits": 2.5}, {"qjl": "gaussian", "k_bits": 3}])
def test_options_without_a_kernel_are_refused_by_name(options):
    assert "turboquant" in kernels.refuses(make_method("turboquant", options))


def test_kernels_without_a_gpu_are_refused():
    with pytest.raises(BackendError, match="need a GPU"):
        choose_backend("gluon", make_method("turboquant"), torch.device("cpu"))
    assert choose_backend("auto", make_method("turboquant"), torch.device("cpu")).name == "reference"


@pytest.mark.parametrize(
    ("options", "D"),
    [
        ({"k_bits": 3, "v_bits": 4, "scale": "norm", "mean": "rotated"}, 64),
        ({"k_bits": 1, "v_bits": 2, "scale": "unbiased", "mean": "channel"}, 64),
        ({"k_bits": 8, "v_bits": 3, "scale": "mse", "mean": "none"}, 64),
        # 16 channels of padding, which must not count as stored
        ({"k_bits": 4, "v_bits": 2, "scale": "unbiased", "mean": "rotated"}, 80),
        ({"k_bits": 1, "v_bits": 8, "scale": "mse", "mean": "none"}, 80),
    ],
)
def test_the_encoder_writes_the_bytes_of_the_reference(options, D):
    method = make_method("turboquant", options | {"codebook": "sphere"})
    _, exact, layer, positions = compressed(method, 128, D=D)
    keys, values = torch.randn(2, 1, 2, 128, D, generator=torch.Generator().manual_seed(5)).to(DEVICE).bfloat16()
    exact, _ = method.compress(keys, values, layer, positions=positions)
    found = kernels.compress(method, keys, values, layer, positions=positions)
    for name in ("key", "value"):
        pages, same = getattr(found, f"{name}_pages"), getattr(exact, f"{name}_pages")
        assert pages.shape == same.shape
        # centred keys are rounded to 11 bits, the rest is float32 in another order: a coordinate next to a boundary may
        # fall on its other side
        assert (pages != same).float().mean() < (2e-3 if name == "key" and options["mean"] != "none" else 2e-4)
        scales, right = getattr(found, f"{name}_scales").float(), getattr(exact, f"{name}_scales").float()
        off = (scales / right - 1).abs()
        # a token one of whose codes is another has another norm of its levels
        assert (off > 2e-3).float().mean() < 0.05
        assert off.max() < 0.06


def test_a_layer_served_by_kernels_is_that_served_by_the_reference():
    """It packed with torch, operation by operation, whatever the back end."""
    method = make_method("turboquant", {"k_bits": 4, "v_bits": 4, "codebook": "sphere"})
    queries, _, layer, _ = compressed(method, 64)
    keys, values = torch.randn(2, 1, 2, 140, 64, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    found = {}
    for backend in (Backend("reference"), Backend("triton", kernels)):
        cache = CompressedLayer(method, layer, CachePolicy(sinks=4, window=8), backend)
        cache.update(keys, values)
        cache.settle(None)
        found[backend.name] = cache.attend(queries, scale=0.125, softcap=None)
    # one code in a thousand is a neighbour: a quarter of a deviation off, as right as the other
    assert relative_error(found["triton"], found["reference"]) < 2e-2


def test_the_encoder_refuses_what_overflows():
    method = make_method("turboquant", {"k_bits": 2, "v_bits": 2, "codebook": "sphere"})
    _, _, layer, positions = compressed(method, 64)
    keys = torch.full((1, 2, 64, 64), torch.inf, device=DEVICE)
    with pytest.raises(ModelError, match="layer 0: key_scales"):
        kernels.compress(method, keys, keys, layer, positions=positions)
