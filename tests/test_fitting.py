"""fit learns from three quarters of each sample, is judged on the rest, and keeps what is better."""

from dataclasses import dataclass, replace

import pytest
import torch

from kvtool import home
from kvtool.calibration import CachePolicy, Calibration, read_header
from kvtool.capture import Capture, LayerSample
from kvtool.errors import CaptureError
from kvtool.fitting import default_path, fit
from kvtool.methods import make_method
from kvtool.methods.turboquant import TurboQuant


@dataclass
class Manifest:
    model: str = "toy"
    revision: str | None = None
    fingerprint: str = "fingerprint of toy"
    text: str = "noise"
    context: int = 1024
    samples: int = 2
    queries: str = "all"


class ToyCapture:
    """Keys with a mean that turns with the position; in the last quarter it may be another one."""

    def __init__(self, shape, path, drift=0.0, **manifest):
        self.shape, self.path, self.sha256, self.manifest = shape, path, "0" * 64, Manifest(**manifest)
        self.layers, self.drift = list(shape.compressible), drift
        self.seen = []

    def samples(self, layer, *, tokens=None):
        start, stop, _ = (tokens or slice(None)).indices(self.manifest.context)
        self.seen.append((start, stop))
        for sample in range(self.manifest.samples):
            whole = self._sample(layer, sample)
            keep = slice(start, stop)
            queries = None if self.manifest.queries == "none" else whole.queries[:, keep]
            yield replace(
                whole,
                keys=whole.keys[:, keep],
                values=whole.values[:, keep],
                positions=whole.positions[keep],
                queries=queries,
                query_positions=whole.positions[keep],
            )

    def _sample(self, layer, sample):
        shape, rope, T = self.shape.layers[layer], self.shape.rope(layer), self.manifest.context
        g = torch.Generator().manual_seed(100 * layer + sample)
        H, HQ, D = shape.num_kv_heads, shape.num_heads, shape.head_dim
        mean = 3 * torch.randn(H, 1, D, generator=torch.Generator().manual_seed(layer))
        change = torch.zeros(1, T, 1)
        change[:, T * 3 // 4 // 64 * 64 :] = self.drift
        positions = torch.arange(T)
        keys = rope.rotate(mean * (1 - change) + torch.randn(H, T, D, generator=g), positions)
        values, queries = torch.randn(H, T, D, generator=g), torch.randn(HQ, T, D, generator=g)
        return LayerSample(
            layer, sample, shape, rope, keys, values, positions, rope.rotate(queries, positions), positions
        )


@pytest.fixture
def toy(tiny_model, tmp_path):
    return lambda **options: ToyCapture(tiny_model.shape, tmp_path / "capture", **options)


def test_what_is_learnt_is_kept_when_it_helps(toy, tmp_path):
    made = fit(toy(), make_method("turboquant", dict(k_bits=2, v_bits=4)), out=tmp_path / "a.safetensors")
    assert made.kept == "fitted"
    assert made.verdict.startswith("calibrated is better")
    # the mean holds nine tenths of the keys' energy
    assert made.fitted < 0.7 * made.data_free
    assert made.difference == pytest.approx(made.fitted - made.data_free)
    assert 0 < made.standard_error < -made.difference / 2
    assert [score.layer for score in made.scores] == [0, 1]
    assert made.calibration.method.mean == "rotated"


def test_a_calibration_that_misleads_is_replaced_and_said_so(toy, tmp_path):
    """The mean turns to its opposite in the held-out text."""
    made = fit(toy(drift=2.0), make_method("turboquant", dict(k_bits=2, v_bits=4)), out=tmp_path / "a.safetensors")
    assert made.kept == "data-free"
    assert "worse, so the data-free one was written" in made.verdict
    assert made.difference > 0
    read = Calibration.load(tmp_path / "a.safetensors")
    assert (read.method.mean, read.method.k_bits) == ("none", 2)
    assert read.provenance["kept"] == "data-free"


def test_fitting_sees_neither_sinks_nor_the_last_quarter(toy, tmp_path):
    capture = toy()
    fit(capture, make_method("turboquant"), policy=CachePolicy(sinks=7), out=tmp_path / "a.safetensors")
    fitted = [seen for seen in capture.seen if seen != (0, 1024)]
    assert fitted
    assert set(fitted) == {(7, 768)}
    # scoring reads each layer once, whole
    assert capture.seen.count((0, 1024)) == 2


def test_provenance_says_where_it_comes_from(toy, tmp_path):
    capture = toy()
    fit(capture, make_method("turboquant"), out=tmp_path / "a.safetensors", command="kvtool calibrate")
    provenance = read_header(tmp_path / "a.safetensors").provenance
    assert provenance["model"] == "toy"
    assert provenance["fingerprint"] == "fingerprint of toy"
    assert provenance["capture"] == str(capture.path.resolve())
    assert provenance["capture_sha256"] == capture.sha256
    assert provenance["fit_tokens"] == 768
    assert provenance["command"] == "kvtool calibrate"
    assert provenance["held_out"]["fitted"] < provenance["held_out"]["data_free"]


def test_what_a_method_notes_of_held_out_tokens_is_recorded(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(TurboQuant, "notes", lambda self, kv: {"odd": 0.25})
    fit(toy(), make_method("turboquant"), out=tmp_path / "a.safetensors")
    assert read_header(tmp_path / "a.safetensors").provenance["notes"] == {"odd": 0.25}


def test_the_newest_calibration_is_remembered_under_a_name_that_says_what_it_is(toy):
    made = fit(toy(), make_method("turboquant", dict(k_bits=4, codebook="fitted")))
    assert made.path.name == "toy-turboquant-k4v3-codebook_fitted.safetensors"
    assert home.newest("calibration", "kvtool calibrate") == made.path.resolve()


@pytest.mark.parametrize(
    ("model", "options", "name"),
    [
        ("smollm2", {}, "smollm2-turboquant-k3v3"),
        ("org/Some Model", dict(k_bits=2.5), "Some_Model-turboquant-k2.5v3"),
        ("m", dict(mean="none"), "m-turboquant-k3v3-mean_none"),
    ],
)
def test_default_names(model, options, name):
    assert default_path(model, TurboQuant(**options)).stem == name


def test_a_method_that_learns_nothing_is_scored_alone(toy, tmp_path):
    made = fit(toy(), make_method("affine"), out=tmp_path / "a.safetensors")
    assert (made.kept, made.data_free, made.difference) == ("fitted", None, None)
    assert 0 < made.fitted < 0.2
    assert "no other affine without data" in made.verdict


def test_exact_has_no_error(toy, tmp_path):
    # float32 softmax in two parts against one
    assert fit(toy(), make_method("exact"), out=tmp_path / "a.safetensors").fitted < 1e-5


def test_without_queries_it_fits_and_says_that_it_did_not_score(toy, tmp_path):
    made = fit(toy(queries="none"), make_method("turboquant"), out=tmp_path / "a.safetensors")
    assert made.verdict.startswith("not scored: the capture has no queries")
    assert (made.kept, made.fitted, made.scores) == ("fitted", None, ())


def test_exact_layers_are_fitted_but_not_scored(toy, tmp_path):
    policy = CachePolicy(exact_layers=(0,))
    made = fit(toy(), make_method("turboquant"), policy=policy, out=tmp_path / "a.safetensors")
    assert [score.layer for score in made.scores] == [1]
    assert Calibration.load(made.path).policy == policy


def test_progress_ends_when_the_work_does(toy, tmp_path):
    steps = []
    fit(toy(), make_method("turboquant"), out=tmp_path / "a", progress=lambda done, total: steps.append((done, total)))
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_a_short_capture_is_refused(toy):
    with pytest.raises(CaptureError, match=r"expected samples of at least 144 tokens .*, found 80; capture a longer"):
        fit(toy(context=80), make_method("turboquant"))


def test_missing_layers_are_named(toy):
    capture = toy()
    capture.layers = [0]
    with pytest.raises(CaptureError, match="layers 1 were not captured; capture again with --layers all"):
        fit(capture, make_method("turboquant"))
    assert fit(capture, make_method("affine")).scores[0].layer == 0


def test_a_real_capture_is_fitted_end_to_end(tiny_capture):
    made = fit(Capture.open(tiny_capture.path), make_method("turboquant", dict(k_bits=4, v_bits=4)))
    assert Calibration.load(made.path).provenance["capture_sha256"] == tiny_capture.sha256
    assert made.kept in ("fitted", "data-free")


def test_samples_can_be_read_twice_from_a_capture(tiny_capture):
    """Samples came as a generator once: the second pass saw nothing, and codebooks could not be fitted."""
    capture = Capture.open(tiny_capture.path)
    assert TurboQuant(codebook="fitted").fit(capture)["layers.1.key_distortion"] > 0


def test_a_model_whose_cache_does_not_grow_is_refused(wrap, tmp_path):
    from transformers import MistralConfig, MistralForCausalLM

    from kvtool.capture import record

    config = MistralConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=64, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = wrap(MistralForCausalLM, config, "all-sliding")
    capture = record(model, tmp_path / "capture", text="abc " * 100, context=192)
    with pytest.raises(CaptureError, match="found only sliding in all-sliding; this model has nothing to compress"):
        fit(capture, make_method("turboquant"))
