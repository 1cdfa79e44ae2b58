"""Promises of the race: the winner is written whichever it is, all contestants are on record, nothing is scored on
what was fitted."""

import math

import pytest
import torch

from kvtool.calibration import Calibration
from kvtool.capture.sample import LayerSample
from kvtool.methods.rdkv import RDKV
from kvtool.policy import CachePolicy
from kvtool.race import scene, uniform
from kvtool.rdkv.fit import fit
from kvtool.rdkv.pages import level_bytes, pack
from kvtool.shapes import CacheShape, LayerKind, LayerShape, Rope

SHAPE = LayerShape(kind=LayerKind.FULL, num_heads=4, num_kv_heads=2, head_dim=64, scale=0.125, rope=0)
ROPE = Rope(inv_freq=tuple(1e4 ** (-2 * i / 64) for i in range(32)))
POLICY, START = CachePolicy(sinks=4, window=32), 1024


def sample(layer, T=1536, seed=0):
    g = torch.Generator().manual_seed(seed + layer)
    scale = torch.logspace(0.3, -1, 64)
    positions = torch.arange(T)
    keys = ROPE.rotate(torch.randn(2, T, 64, generator=g) * scale, positions)
    queries = ROPE.rotate(2 * torch.randn(4, T, 64, generator=g), positions)
    return LayerSample(layer, 0, SHAPE, ROPE, keys, torch.randn(2, T, 64, generator=g), positions, queries, positions)


class TwoLayers:
    def __init__(self, stop=None, **options):
        self.shape, self.layers = CacheShape(layers=(SHAPE, SHAPE), ropes=(ROPE,)), [0, 1]
        self.stop, self.options = stop, options

    def samples(self, layer, *, tokens=None):
        one = sample(layer, **self.options)
        if self.stop is None:
            return [one]
        parts = (x[:, : self.stop] for x in (one.keys, one.values, one.queries))
        keys, values, queries = parts
        at = one.positions[: self.stop]
        return [LayerSample(layer, 0, SHAPE, ROPE, keys, values, at, queries, at)]


@pytest.fixture(scope="module")
def raced():
    method = RDKV(bits=3)
    tensors = fit(method, TwoLayers(START))
    return method, tensors, method.race(TwoLayers(), tensors, policy=POLICY, start=START)


def test_every_uniform_pair_that_costs_no_more_takes_part(raced):
    _method, _tensors, found = raced
    overhead = 3 / 128
    expected = {f"k{k}v{v}" for k in (1, 2, 3, 4, 8) for v in (1, 2, 3, 4, 8) if (k + v) / 2 + 0.125 + overhead <= 3}
    rows = found.record["contestants"]
    assert {name for name in rows if name.startswith("k")} == expected
    assert {"rdkv", "fp8"} <= set(rows)
    assert rows["rdkv"]["bits"] <= 3
    for row in rows.values():
        assert row["low"] <= row["ratio"] <= row["high"]
    assert found.record["winner"] in rows
    assert "\n" not in found.verdict
    assert found.record["winner"] in found.verdict or "mix" in found.verdict


def test_the_winner_has_the_least_error_and_is_what_is_written(raced, tmp_path):
    method, _tensors, found = raced
    rows = found.record["contestants"]
    fair = {name: row["error"] for name, row in rows.items() if name == "rdkv" or name.startswith("k")}
    assert found.record["winner"] == min(fair, key=fair.get)
    shape = TwoLayers().shape
    written = Calibration(method, shape, found.tensors, POLICY, {"held_out": found.record})
    read = Calibration.load(written.save(tmp_path / "a.safetensors"))
    assert read.provenance["held_out"]["contestants"].keys() == rows.keys()


def test_a_uniform_pair_that_wins_is_written(raced, monkeypatch):
    """A ladder that lies: its levels are said to be nearly free of distortion and are 1 bit."""
    method, tensors, _ = raced
    broken = dict(tensors)
    for i in (0, 1):
        widths = tensors[f"layers.{i}.widths"].clone()
        widths[:, 1:] = 1
        broken[f"layers.{i}.widths"] = widths
    found = method.race(TwoLayers(), broken, policy=POLICY, start=START)
    name = found.record["winner"]
    assert name.startswith("k")
    assert name in found.verdict
    k, v = (int(x) for x in name[1:].split("v"))
    for i in (0, 1):
        widths = found.tensors[f"layers.{i}.widths"]
        assert (widths[:, 1:, :-1] == k).all()
        assert (widths[:, 1:, -1] == v).all()
    # served, it is that pair on every token
    layer = Calibration(method, TwoLayers().shape, found.tensors).layer(0)
    one = sample(0)
    weights = torch.rand(1, 2, 640)
    levels, _ = method.plan(weights, weights, layer, torch.zeros(1))
    kv = pack(one.keys[None, :, :640], one.values[None, :, :640], levels, layer, one.positions[:640])
    assert (levels > 0).all()
    assert kv.key_codes.shape[1] == 2 * 10 * 256 * 2 * k
    assert kv.value_codes.shape[1] == 2 * 10 * 256 * 2 * v


def test_the_scene_asks_only_after_the_prompt_and_sees_it_all():
    one = sample(0)
    held = scene(one, POLICY, START, 1536)
    assert held is not None
    assert int(held.positions[0]) == START
    asked = 1536 - int(held.positions[-1]) - 1 - held.around_keys.shape[2] + 4
    assert asked == held.asked.shape[2]
    # exact attention of the last query: sinks, then everything from the start of the held-out part
    seen = torch.cat([torch.arange(4), torch.arange(START, 1536)])
    weights = (one.queries[0, -1] @ one.keys[0, seen].T * 0.125).softmax(-1)
    assert torch.allclose(held.exact.out[0, 0, -1], weights @ one.values[0, seen], atol=1e-4)


def test_too_little_text_is_said_not_raced():
    method = RDKV()
    tensors = fit(method, TwoLayers(192, T=256))
    found = method.race(TwoLayers(T=256), tensors, policy=POLICY, start=192)
    assert not found.record["raced"]
    assert "longer --context" in found.verdict


def test_uniform_levels_cost_what_their_name_says(raced):
    method, tensors, _ = raced
    layer = uniform(Calibration(method, TwoLayers().shape, tensors).layer(0), 4, 2)
    size = level_bytes(layer["widths"], 64)[:, 1]
    assert (size == 64 * 64 * (4 + 2) // 8 + 128).all()
    assert math.isclose(float(layer["distortion"][0, 0]), 1)
