"""What inspect says of a cache is true: statistics with known answers, streamed or not, and the right kind of thing."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from kvtool import cli
from kvtool.calibration import CachePolicy, Calibration
from kvtool.capture.sample import LayerSample
from kvtool.errors import InputError
from kvtool.inspection import find, layer_statistics, statistics
from kvtool.inspection.heat import heat_map
from kvtool.methods import make_method
from kvtool.shapes import CacheShape, LayerShape, Rope

D = 16


class FakeCapture:
    """Tensors in memory behind the reading side of a capture."""

    def __init__(self, keys, values, queries=None, *, rope=None, **layer):
        H, T, _ = keys.shape
        HQ = H if queries is None else queries.shape[0]
        ropes = () if rope is None else (rope,)
        shape = LayerShape(kind="full", num_heads=HQ, num_kv_heads=H, head_dim=D, scale=D**-0.5, **layer)
        self.shape = CacheShape(layers=(shape.model_copy(update={"rope": 0 if rope else None}),), ropes=ropes)
        self.manifest = SimpleNamespace(context=T)
        self.keys, self.values, self.queries = keys, values, queries

    def samples(self, layer, *, tokens):
        at = torch.arange(self.manifest.context)[tokens]
        queries = None if self.queries is None else self.queries[:, tokens]
        yield LayerSample(
            layer, 0, self.shape.layers[0], self.shape.rope(0), self.keys[:, tokens], self.values[:, tokens], at,
            queries, None if queries is None else at,
        )  # fmt: skip


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_moments_of_a_shifted_gaussian_are_the_known_ones():
    # mean 1 in every channel, deviation 1: half of the energy is in the mean; T is no multiple of a slice
    T = 5000
    keys, values = gaussian(2, T, D) + 1, 3 * gaussian(2, T, D, seed=1)
    found = layer_statistics(FakeCapture(keys, values), 0)
    assert found.tokens == T - statistics.SINKS
    # tolerances are several standard errors at 80,000 numbers
    assert found.mean_share_post == pytest.approx([0.5, 0.5], abs=0.01)
    assert found.mean_share_pre == found.mean_share_post
    assert found.value_kurtosis == pytest.approx([3, 3], abs=0.1)
    # E (1+z)^4 / (E (1+z)^2)^2 = 10 / 4
    assert found.key_kurtosis == pytest.approx([2.5, 2.5], abs=0.05)
    assert found.value_norm == pytest.approx([3 * math.sqrt(D)] * 2, rel=0.01)
    assert found.entropy is None
    assert found.outliers == [[], []]


def test_an_outlier_channel_is_found_and_its_ratio_measured():
    keys = gaussian(2, 3000, D)
    keys[1, :, 5] *= 8
    found = layer_statistics(FakeCapture(keys, keys), 0)
    assert found.outliers == [[], [5]]
    assert found.outlier_ratio[1] == pytest.approx(8, rel=0.05)


def test_sinks_do_not_enter_the_moments():
    keys = gaussian(1, 3000, D)
    keys[:, : statistics.SINKS] = 1e4
    assert layer_statistics(FakeCapture(keys, keys), 0).key_kurtosis[0] == pytest.approx(3, abs=0.1)


def test_rope_hides_a_mean_that_pre_rope_keys_show():
    rope = Rope(inv_freq=tuple(10000 ** (-i / (D // 2)) for i in range(D // 2)))
    before = 0.1 * gaussian(1, 3000, D) + 1
    keys = rope.rotate(before, torch.arange(3000))
    found = layer_statistics(FakeCapture(keys, keys, rope=rope), 0)
    assert found.mean_share_pre[0] == pytest.approx(1 / 1.01, abs=0.005)
    assert found.mean_share_post[0] < 0.6


@pytest.mark.parametrize("window", [None, 100])
def test_uniform_attention_has_the_entropy_of_its_width(window):
    T = 3000
    layer = {"window": window} if window else {}
    found = layer_statistics(FakeCapture(gaussian(1, T, D), gaussian(1, T, D), torch.zeros(3, T, D), **layer), 0)
    if window:
        assert found.entropy == pytest.approx([math.log(window)] * 3, abs=1e-4)
        assert found.sink_mass == [0, 0, 0]
    else:
        # queries stand evenly in the second half: mean of log(position + 1) and of 4 / (position + 1) there
        half = torch.arange(T // 2, T) + 1.0
        assert found.entropy == pytest.approx([half.log().mean().item()] * 3, abs=0.02)
        assert found.sink_mass == pytest.approx([(4 / half).mean().item()] * 3, rel=0.05)


def test_streamed_attention_equals_the_softmax_at_once(monkeypatch):
    T = 700
    keys, queries = gaussian(2, T, D), 2 * gaussian(4, T, D, seed=3)
    whole = layer_statistics(FakeCapture(keys, keys, queries), 0)
    scores = torch.einsum("hgsd,htd->hgst", queries.view(2, 2, T, D).double(), keys.double()).flatten(0, 1) * D**-0.5
    p = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf).softmax(-1)
    entropy = -(p * p.clamp_min(1e-300).log()).sum(-1)
    at = torch.linspace(0, T - T // 2 - 1, statistics.QUERIES).round().long().unique() + T // 2
    # float32 sums of 700 terms
    assert whole.entropy == pytest.approx(entropy[:, at].mean(-1).tolist(), rel=1e-4)
    assert whole.sink_mass == pytest.approx(p[:, at, :4].sum(-1).mean(-1).tolist(), rel=1e-4)


def test_slices_do_not_change_the_answer(monkeypatch):
    keys, queries = gaussian(2, 700, D), gaussian(4, 700, D, seed=3)
    capture = FakeCapture(keys, keys, queries)
    monkeypatch.setattr(statistics, "QUERIES", 10**9)  # all of them, however they are sliced
    whole = layer_statistics(capture, 0)
    monkeypatch.setattr(statistics, "SLICE", 64)
    sliced = layer_statistics(capture, 0)
    for name in ("key_norm", "key_kurtosis", "mean_share_pre", "outlier_ratio", "entropy", "sink_mass"):
        assert getattr(sliced, name) == pytest.approx(getattr(whole, name), rel=1e-5), name


def test_heat_map_marks_smallest_and_largest():
    text = heat_map("x", {0: [0.0, 1.0], 7: [0.5, 0.5]}).plain.splitlines()
    assert text[0] == "x"
    assert text[2] == "  0   ██"
    assert text[3].startswith("  7 ")
    assert "0.00" in text[1]
    assert "1.00" in text[1]


@pytest.mark.parametrize("rows", [{}, {0: []}, {0: [2.0, 2.0]}])
def test_heat_map_of_nothing_or_of_equal_figures(rows):
    assert heat_map("x", rows).plain


@pytest.fixture
def artifact(tmp_path):
    layer = LayerShape(kind="full", num_heads=4, num_kv_heads=2, head_dim=D, scale=0.25)
    made = Calibration(make_method("exact"), CacheShape(layers=(layer,) * 3), {}, CachePolicy(exact_layers=(2,)))
    return made.save(tmp_path / "artifacts" / "x.safetensors")


def test_an_artifact_is_described_from_its_header(artifact, capsys):
    assert cli.main(["inspect", str(artifact), "--json"]) == 0
    (record,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert record["kind"] == "calibration"
    assert (record["method"], record["layers"], record["of_layers"], record["head_dims"]) == ("exact", 2, 3, [D])
    assert cli.main(["inspect", str(artifact), "--verify"]) == 0
    assert "exact" in capsys.readouterr().out


def test_a_damaged_artifact_fails_the_check(artifact, capsys):
    content = artifact.read_bytes()
    artifact.write_bytes(content.replace(b'sinks\\":4', b'sinks\\":5'))
    assert artifact.read_bytes() != content
    assert cli.main(["inspect", str(artifact.parent), "--verify"]) == 1
    assert str(artifact) in capsys.readouterr().err


def test_a_directory_lists_what_it_holds_and_ignores_the_rest(artifact, capsys):
    (artifact.parent / "notes.txt").write_text("no tensor")
    (artifact.parent / "other.safetensors").write_bytes(b"not one of ours")
    assert [record.path for record in find(str(artifact.parent.parent))] == [str(artifact)]
    assert cli.main(["inspect", str(artifact.parent)]) == 0
    assert "x.safetensors" in capsys.readouterr().out


@pytest.mark.parametrize("path", ["./nowhere", "/no/such/thing", "~/no-such-thing-of-kvtool"])
def test_a_mistyped_path_is_not_asked_for_at_the_hub(path):
    with pytest.raises(InputError, match="found nothing there"):
        find(path)


def test_an_empty_directory_says_what_was_expected(tmp_path):
    with pytest.raises(InputError, match="expected a model, a capture, an artifact"):
        find(str(tmp_path))


def test_a_race_is_drawn_as_a_table(artifact, tmp_path, capsys):
    rows = {
        name: {"bits": 2.0, "error": 0.25, "ratio": 1.5, "low": 1.25, "high": 1.75} for name in ("rdkv", "k2v1", "fp8")
    }
    read = Calibration.load(artifact)
    held_out = {"held_out": {"raced": True, "contestants": rows, "winner": "k2v1", "tuned": {"0": "paper x4"}}}
    raced = Calibration(read.method, read.shape, {}, read.policy, held_out).save(tmp_path / "raced.safetensors")
    assert cli.main(["inspect", str(raced)]) == 0
    lines = capsys.readouterr().out.splitlines()
    (winner,) = [line for line in lines if "* k2v1" in line]
    assert [word in winner for word in ("2.00", "0.25", "1.5", "1.25 to 1.75")] == [True] * 4
    # the record is not printed as a dictionary as well
    assert not [line for line in lines if "{" in line]
