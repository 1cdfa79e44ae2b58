"""What RINA fits to attention: how values are read is better on queries it has not seen, or is left alone."""

from dataclasses import replace

import pytest
import torch

from kvtool import attention, rotation
from kvtool.attention import relative_error
from kvtool.calibration import CachePolicy, Calibration
from kvtool.capture import LayerSample
from kvtool.methods.base import LayerCalibration
from kvtool.methods.rina import RINA
from kvtool.rina import fit
from kvtool.shapes import CacheShape, LayerShape

SHAPE = LayerShape(kind="full", num_heads=6, num_kv_heads=2, head_dim=64, scale=1 / 8)
PLAIN = RINA(feedback=False, correction=False, mean="none")


def sample(seed, tokens=1028):
    """Tokens whose values have a direction in common: what attention averages is not noise alone."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, 2, tokens, 64, generator=generator)
    shared = torch.randn(2, 1, 64, generator=torch.Generator().manual_seed(0))
    queries = torch.randn(6, tokens, 64, generator=generator)
    at = torch.arange(tokens)
    return LayerSample(0, 0, SHAPE, None, keys, values + shared, at, queries, at)


def fitted(method, seen):
    return LayerCalibration(0, SHAPE, None, method.fit_layer(SHAPE, None, [seen], layer=0))


def error(method, layer, seen):
    positions = seen.positions[4:]
    keys, values, queries = seen.keys[None, :, 4:], seen.values[None, :, 4:], seen.queries[None, :, -64:]
    kv, _ = method.compress(keys, values, layer, positions=positions)
    found = method.attend(queries, kv, layer, positions=positions, scale=1 / 8).out
    return relative_error(found, attention.attend(queries, keys, values, scale=1 / 8).out).item()


def turned_back(layer):
    decoder = rotation.matrix(layer["value_rotation"]).clone()
    return replace(layer, tensors={**layer.tensors, "value_decoder": decoder})


@pytest.mark.parametrize("options", [{}, {"v_stages": 2}])
def test_values_read_by_a_fitted_map_are_nearer_on_text_it_has_not_seen(options):
    method = replace(PLAIN, **options)
    layer = fitted(method, sample(1))
    held_out = [sample(seed) for seed in (2, 3, 4)]
    with_map = sum(error(method, layer, one) for one in held_out)
    without = sum(error(method, turned_back(layer), one) for one in held_out)
    # one bit takes a third of a vector's length, two take an eighth
    assert with_map < (0.7 if not options else 0.9) * without


def test_a_map_that_does_not_win_is_not_used(monkeypatch):
    # what does not pull it back learns the noise of the queries it is fitted on
    seen = sample(1)
    noise = replace(seen, values=torch.randn(seen.values.shape, generator=torch.Generator().manual_seed(9)))
    monkeypatch.setattr(fit, "RIDGE", 0.0)
    monkeypatch.setattr(fit, "_QUERIES", 32)
    layer = fitted(replace(PLAIN, v_stages=4), noise)
    assert torch.equal(layer["value_decoder"], rotation.matrix(layer["value_rotation"]))


def test_too_short_a_text_leaves_values_alone():
    layer = fitted(PLAIN, sample(1, tokens=60))
    assert torch.equal(layer["value_decoder"], rotation.matrix(layer["value_rotation"]))


def test_sinks_are_weighed_but_never_coded():
    """With the sinks out of sight, heads that look at them would count as looking at what is coded."""
    scene = next(fit.scenes([sample(1)]))
    assert scene.tokens == slice(4, 1028)
    assert not scene.seen.coded[:, :4].any()
    kv, _ = PLAIN.compress(scene.keys, scene.values, fitted(PLAIN, sample(1)), positions=scene.positions)
    found = fit.logits(PLAIN, kv, fitted(PLAIN, sample(1)), scene)
    apart = found != scene.seen.logits
    assert apart[:, scene.seen.coded].any()
    assert not apart[:, ~scene.seen.coded].any()


def test_the_map_is_part_of_the_artifact(tmp_path):
    layer = fitted(PLAIN, sample(1))
    tensors = {f"layers.0.{name}": tensor for name, tensor in layer.tensors.items()}
    path = Calibration(PLAIN, CacheShape(layers=(SHAPE,)), tensors, CachePolicy()).save(tmp_path / "a.safetensors")
    read = Calibration.load(path).layer(0)
    assert torch.equal(read["value_decoder"], layer["value_decoder"])
    assert error(PLAIN, read, sample(2)) == error(PLAIN, layer, sample(2))
