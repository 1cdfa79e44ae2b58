"""transform's kernel attends as transform's reference does: stages of any number and width, gains, plain pages."""

from types import SimpleNamespace

import pytest
import torch

from kvtool import backends, centring, packing, rotation
from kvtool.attention import relative_error
from kvtool.backends import Backend, choose_backend
from kvtool.bench.subject import Subject
from kvtool.cache import CompressedLayer
from kvtool.errors import BackendError, ModelError
from kvtool.kernels import transform as kernels
from kvtool.methods import make_method
from kvtool.methods.base import LayerCalibration
from kvtool.policy import CachePolicy
from kvtool.shapes import LayerKind, LayerShape, Rope
from kvtool.static import Counters, StaticLayer
from kvtool.transform import code as chain
from kvtool.transform import fit as fitting

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROPE = Rope(inv_freq=tuple(1e4 ** (-i / 32) for i in range(32)))


def calibrated(key_widths, value_widths, D=64, H=2, group=3, tokens=128):
    """A layer as ``fit`` leaves it, for vectors of a steep spectrum, without the minutes that a fit takes."""
    generator = torch.Generator().manual_seed(0)
    shape = LayerShape(kind=LayerKind.FULL, num_heads=H * group, num_kv_heads=H, head_dim=D, scale=D**-0.5)
    method = make_method("transform")
    stages = method.layer_schema(shape)["key_widths"].shape[0]
    steep = torch.exp(-torch.arange(D) / 12.0)
    vectors = torch.randn(H, 4096, D, generator=generator) * steep
    tensors = {"key_mean": torch.randn(H, D, generator=generator)}
    for side, widths in (("key", key_widths), ("value", value_widths)):
        plain = rotation.draw("hadamard", H, D, generator)
        code = fitting.make_code(torch.eye(D).expand(H, D, D).contiguous(), (steep**2).expand(H, D), widths, vectors)
        turn, variance = fitting.plain_basis(plain)
        ordinary = fitting.make_code(turn, variance, widths, vectors)
        missing = stages - len(widths)

        def padded(x, rows=1, missing=missing):
            return torch.cat([x, x.new_zeros(H, missing * rows, *x.shape[2:])], 1)

        fields = {
            "widths": torch.tensor([*widths, *[0] * missing], dtype=torch.int8),
            "basis": code.basis,
            "order": padded(code.order).to(torch.int16),
            "deviation": padded(code.deviation),
            "gain_base": padded(code.gain_base),
            "decoder": padded(chain.decoder(code), packing.GROUP).half(),
            "plain": plain,
            "plain_base": padded(ordinary.gain_base) + 3,
        }
        tensors |= {f"{side}_{name}": tensor for name, tensor in fields.items()}
    layer = LayerCalibration(0, shape, ROPE, {name: tensor.to(DEVICE) for name, tensor in tensors.items()})
    keys, values = (torch.randn(2, 1, H, tokens, D, generator=generator) * steep).to(DEVICE)
    queries = (3 * torch.randn(1, H * group, 2, D, generator=generator)).to(DEVICE)
    return method, layer, keys, values, queries


def both(method, layer, keys, values, queries, softcap=None):
    positions = torch.arange(4, 4 + keys.shape[2], device=DEVICE)
    keys = keys + centring.at(layer["key_mean"], "rotated", layer.rope, positions)
    kv, _ = method.compress(keys, values, layer, positions=positions)
    arguments = {"positions": positions, "scale": layer.shape.scale, "softcap": softcap}
    exact = method.attend(queries, kv, layer, **arguments)
    return kernels.attend(method, queries, kv, layer, **arguments), exact, kv


def agree(found, exact):
    assert relative_error(found.out, exact.out) < 3e-3  # weights of 15 bits
    assert (found.lse - exact.lse).abs().max() < 2e-3  # 16-bit queries


@pytest.mark.parametrize(
    ("key_widths", "value_widths", "softcap"),
    [((4, 2, 2), (3, 1), None), ((8,), (4, 2, 1, 1), 30.0), ((3, 1), (2, 2), None)],
)
def test_the_kernel_agrees_with_the_reference(key_widths, value_widths, softcap):
    found, exact, kv = both(*calibrated(key_widths, value_widths, H=1, tokens=320), softcap)
    assert not kv.outside.any()
    agree(found, exact)


@pytest.mark.parametrize(("key_widths", "value_widths"), [((), (2,)), ((2,), ())])
def test_a_side_without_bits(key_widths, value_widths):
    found, exact, _ = both(*calibrated(key_widths, value_widths, H=1))
    assert (found.out - exact.out).abs().max() < 3e-3 * exact.out.abs().max().clamp_min(1e-3)
    assert (found.lse - exact.lse).abs().max() < 2e-3


def test_pages_outside_the_statistics_are_read_in_the_plain_rotation():
    method, layer, keys, values, queries = calibrated((4, 2), (2, 2))
    loud = torch.tensor([60.0, 1.0]).repeat_interleave(64)[:, None].to(DEVICE)
    keys[:, :1], values[:, 1:] = keys[:, :1] * loud, values[:, 1:] * loud
    found, exact, kv = both(method, layer, keys, values, queries / 8)
    assert kv.outside[0].tolist() == [[1, 0], [2, 0]]
    agree(found, exact)


def test_bench_times_pages_inside_the_statistics():
    method, layer, *_ = calibrated((4, 2), (2, 2), H=1)
    subject = Subject(method, layer, "a test")
    kv = subject.cache(64, 1, DEVICE)
    assert not kv.outside.any()
    queries, positions = subject.queries(1, DEVICE).float(), torch.arange(64, device=DEVICE)
    exact = method.attend(queries, kv, layer, positions=positions, scale=0.125)
    agree(kernels.attend(method, queries, kv, layer, positions=positions, scale=0.125), exact)


def test_auto_takes_triton_where_gluon_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    cuda = SimpleNamespace(type="cuda")
    assert choose_backend("auto", make_method("transform"), cuda).name == "triton"
    assert choose_backend("auto", make_method("turboquant"), cuda).name == "gluon"
    with pytest.raises(BackendError, match="use --backend triton"):
        backends.choose_backend("gluon", make_method("transform"), cuda)


@pytest.mark.parametrize(
    ("key_widths", "value_widths", "D", "H"),
    [((4, 2, 2), (3, 1), 64, 1), ((8,), (4, 2, 1, 1), 64, 3), ((3, 2, 2, 1), (2, 2), 80, 2), ((2,), (), 128, 1)],
)
def test_the_encoder_writes_the_bytes_of_the_reference(key_widths, value_widths, D, H):
    method, layer, keys, values, _ = calibrated(key_widths, value_widths, D=D, H=H)
    loud = torch.tensor([60.0, 1.0]).repeat_interleave(64)[:, None].to(DEVICE)
    keys[:, :1], values[:, -1:] = keys[:, :1] * loud, values[:, -1:] * loud  # a page of a head is outside
    positions = torch.arange(4, 4 + keys.shape[2], device=DEVICE)
    keys = (keys + centring.at(layer["key_mean"], "rotated", layer.rope, positions)).bfloat16()
    exact, _ = method.compress(keys, values.bfloat16(), layer, positions=positions)
    found = kernels.compress(method, keys, values.bfloat16(), layer, positions=positions)
    assert exact.outside.any()
    assert (exact.outside == 0).any()
    assert torch.equal(found.outside, exact.outside)
    for name in ("key_pages", "key_gains", "value_pages", "value_gains"):
        stored, same = getattr(found, name), getattr(exact, name)
        assert stored.shape == same.shape
        # the last stages of a chain see the levels before them: a code next to a boundary moves those behind it
        assert not stored.numel() or (stored != same).float().mean() < 4e-3


def test_what_is_not_finite_is_refused():
    method, layer, keys, values, _ = calibrated((2,), (2,), H=1, tokens=64)
    values[:, :, 5, 3] = torch.nan
    with pytest.raises(ModelError, match="layer 0: values"):
        kernels.compress(method, keys, values, layer, positions=torch.arange(64, device=DEVICE))


def test_what_is_beyond_the_products_range_is_left_to_the_reference():
    method, layer, keys, values, _ = calibrated((2,), (2,), H=1, tokens=64)
    values *= 1e6
    positions = torch.arange(64, device=DEVICE)
    found = kernels.compress(method, keys, values, layer, positions=positions)
    for stored, same in zip(found, method.compress(keys, values, layer, positions=positions)[0], strict=True):
        assert torch.equal(stored, same)


def test_a_block_that_is_replayed_is_that_of_a_growing_cache(monkeypatch):
    method, layer, keys, values, _ = calibrated((3, 1), (2,), H=1, tokens=160)
    held = CompressedLayer(method, layer, CachePolicy(sinks=4, window=24), Backend("triton", kernels))
    held.update(keys[:, :, :96], values[:, :, :96])
    held.settle(None)  # one page
    held.parts.reserve(192)
    static = StaticLayer(held, Counters(1, DEVICE), spare=64)
    static.hold(*(torch.cat([x[:, :, :4], x[:, :, 68:156]], 2) for x in (keys, values)))
    positions = torch.arange(68, 132, device=DEVICE)
    assert static.turn(torch.ones(1, dtype=torch.int64, device=DEVICE), positions)
    static.turned(64)
    exact = kernels.compress(method, keys[:, :, 68:132], values[:, :, 68:132], layer, positions=positions)
    for stored, same in zip(static.parts.whole()[0][0], exact, strict=True):
        assert torch.equal(stored[:, :, 1:2], same)
    monkeypatch.setattr(kernels, "_capturing", lambda x: True)  # when nothing can be read back
    static.hold(keys[:, :, :92].fill_(torch.nan), values[:, :, :92])
    assert not static.turn(torch.ones(1, dtype=torch.int64, device=DEVICE), positions)
