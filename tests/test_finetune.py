"""Fine-tuning a model to H1B: it learns what is served, is kept only if it helps, and belongs to one model."""

import dataclasses
import sys

import pytest
import torch

from kvtool.adapter import Adapter, adapted
from kvtool.calibration import CachePolicy, Calibration, read_header
from kvtool.capture import record
from kvtool.cli import main
from kvtool.errors import CalibrationError, CaptureError, InputError
from kvtool.finetune.gradient import Split, attend, sketched
from kvtool.finetune.training import finetune
from kvtool.fitting import fit
from kvtool.generation import generate
from kvtool.methods.base import LayerCalibration
from kvtool.methods.h1b import H1B
from kvtool.models import LoadedModel
from kvtool.runtime import exact_prefill, serve
from kvtool.shapes import LayerShape

peft = pytest.importorskip("peft")
POLICY = CachePolicy(sinks=4, window=16)


def method(steps=40, **options):
    return H1B(finetune_steps=steps, finetune_tokens=128, finetune_rank=4, **options)


@pytest.fixture(scope="module")
def tiny(make_tiny):
    """A tiny model whose attention is smoother than that of the others': a few steps can mend it."""
    return make_tiny(initializer_range=0.15)


@pytest.fixture(scope="module")
def capture(tiny, tmp_path_factory):
    text = "".join(chr(33 + (7 * i * i + i // 3) % 90) for i in range(2000))
    out = tmp_path_factory.mktemp("captures") / "long"
    return record(tiny, out, text=text, context=768, samples=2, chunk=256, dtype="float32")


@pytest.fixture(scope="module")
def made(tiny, capture, tmp_path_factory):
    """The report of a fit with a fine-tune, its artifact where it was written."""
    out = tmp_path_factory.mktemp("made") / "tuned.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVTOOL_HOME", str(out.parent))
        return fit(capture, method(), policy=POLICY, out=out, model=lambda: tiny)


def weights(loaded):
    return {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}


def logits(loaded, calibration, ids):
    """Of the last 32 tokens, the others served from the compressed cache."""
    with serve(loaded.model, calibration) as cache, torch.inference_mode():
        loaded.model(ids[:, :-32], past_key_values=cache, use_cache=True, logits_to_keep=1)
        return loaded.model(ids[:, -32:], past_key_values=cache, use_cache=True).logits[0]


def drift(loaded, calibration, ids):
    full = loaded.model(ids).logits[0, -32:].log_softmax(-1)
    found = logits(loaded, calibration, ids).log_softmax(-1)
    return (full.exp() * (full - found)).sum(-1).mean().item()


# the attention that is trained


@pytest.mark.parametrize("score", ["cosine", "published"])
@pytest.mark.parametrize(("H", "G", "D"), [(2, 3, 32), (1, 1, 80)])
def test_what_is_trained_is_what_is_served(score, H, G, D):
    shape = LayerShape(kind="full", num_heads=H * G, num_kv_heads=H, head_dim=D, scale=D**-0.5)
    h1b = H1B(score=score, mean="none" if score == "published" else "channel", sketch_bits=2)
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, 128, D, generator=g) for n in (H * G, H, H))
    tensors = {
        "projection": torch.randn(H, 2 * D, D, generator=g),
        "temperature": torch.rand(H * G, generator=g),
        "key_mean": torch.randn(H, D, generator=g),
    }
    layer, positions = LayerCalibration(0, shape, None, tensors), torch.arange(128)
    kv, _ = h1b.compress(k, v, layer, positions=positions)
    served = h1b.attend(q, kv, layer, positions=positions, scale=shape.scale)
    trained = sketched(h1b, q, k, v, layer, positions, scale=shape.scale)
    # the norms that are served are in float16: 2^-11 of logits of a few units
    torch.testing.assert_close(trained.out, served.out, atol=5e-3, rtol=5e-3)
    torch.testing.assert_close(trained.lse, served.lse, atol=5e-3, rtol=5e-3)


def test_the_gradient_reaches_queries_keys_and_values_and_the_prefix_is_exact():
    shape = LayerShape(kind="full", num_heads=4, num_kv_heads=2, head_dim=32, scale=32**-0.5)
    g = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, n, 128, 32, generator=g).requires_grad_() for n in (4, 2, 2))
    tensors = {"projection": torch.randn(2, 32, 32, generator=g), "temperature": torch.ones(4).requires_grad_()}
    layer = LayerCalibration(0, shape, None, tensors)
    out = attend(H1B(mean="none"), q, k, v, layer, Split(96, 4, 1), scale=shape.scale)
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(out[:, :, :96], exact[:, :, :96])
    out[:, :, 96:].square().sum().backward()
    # of the sketched keys, 4 to 68, of the queries that read them, and of the temperature
    for gradient in (q.grad[:, :, 96:], k.grad[:, :, 4:68], v.grad[:, :, 4:68], tensors["temperature"].grad):
        assert gradient.isfinite().all()
        assert gradient.abs().amax(-1).gt(0).all()
    assert q.grad[:, :, :96].eq(0).all()


# the fine-tune


def test_the_loss_falls_on_what_is_learnt_from_and_on_what_is_held_out(tiny, capture, made):
    untuned = fit(capture, method(0), policy=POLICY, out=made.path.with_name("u.safetensors")).calibration
    untuned = dataclasses.replace(untuned, method=method())
    before = weights(tiny)
    tuned = finetune(tiny, untuned, capture, stop=576)
    # a step sees a single segment, so ten of them are compared with ten
    assert sum(tuned.losses[-10:]) < 0.95 * sum(tuned.losses[:10])
    assert tuned.improved
    assert tuned.after < 0.9 * tuned.before
    # nothing of it stays in the model
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny.model.state_dict().items())
    assert not any(p.requires_grad for p in tiny.model.parameters())
    assert not hasattr(tiny.model, "peft_config")


def test_a_kept_fine_tune_is_written_beside_the_artifact_and_said(made):
    assert "fine-tune kept: KL to the full cache on held-out text" in made.verdict
    header = read_header(made.path)
    assert header.adapter.file == "tuned.adapter.safetensors"
    assert header.provenance["finetune"]["kept"] is True
    assert header.provenance["finetune"]["after"] < header.provenance["finetune"]["before"]
    loaded = Calibration.load(made.path)
    assert loaded.fingerprint == made.calibration.fingerprint
    assert loaded.fingerprint != dataclasses.replace(loaded, adapter=None).fingerprint
    # factors of four projections in two layers; the heads' temperatures were learnt with them
    assert len(loaded.adapter.modules) == 8
    assert loaded.nbytes > dataclasses.replace(loaded, adapter=None).nbytes


def test_serving_applies_the_adapter_and_removes_it(tiny, capture, made):
    ids = capture.ids[:1, -192:]
    calibration = Calibration.load(made.path)
    plain = tiny.model(ids).logits
    bare = dataclasses.replace(calibration, adapter=None)
    assert not torch.allclose(logits(tiny, calibration, ids), logits(tiny, bare, ids))
    assert torch.equal(tiny.model(ids).logits, plain)
    with pytest.raises(ZeroDivisionError), serve(tiny.model, calibration):
        _ = 1 / 0
    assert torch.equal(tiny.model(ids).logits, plain)


def test_what_is_served_drifts_less_than_before(tiny, capture, made):
    untuned = fit(capture, method(0), policy=POLICY, out=made.path.with_name("u.safetensors")).calibration
    parts = [capture.ids[i : i + 1, start : start + 192] for i in (0, 1) for start in (576,)]
    tuned = sum(drift(tiny, Calibration.load(made.path), ids) for ids in parts)
    assert tuned < 0.95 * sum(drift(tiny, untuned, ids) for ids in parts)


def test_generation_and_evaluation_take_the_adapter(tiny, capture, made, capsys, tmp_path):
    from kvtool.evaluate.contestants import from_files
    from kvtool.evaluate.run import Corpus, Protocol, evaluate

    ids = capture.ids[:1, :192]
    calibration = Calibration.load(made.path)
    served = generate(tiny, ids, calibration, max_new_tokens=8)
    with serve(tiny.model, calibration) as cache:
        expected = tiny.model.generate(ids, past_key_values=cache, max_new_tokens=8, do_sample=False)
    assert served.ids == expected[0, 192:].tolist()
    corpus = Corpus("own", "0", capture.ids[0, 576:].tolist())
    untuned = fit(capture, method(0), policy=POLICY, out=tmp_path / "untuned.safetensors")
    tested = from_files([made.path, untuned.path], sinks=None, window=None)
    protocol = Protocol(tasks=("kld",), prefix=128, score=32, segments=1, chunk=32)
    rows = {row["name"]: row for row in evaluate(tiny, tested, protocol, text=corpus, haystack=corpus).rows}
    # the prefix has the adapted model's keys: drift as computed here, by hand
    row = torch.tensor([corpus.ids[:161]])
    with adapted(tiny.model, calibration.adapter):
        prefill = exact_prefill(tiny.model, row[:, :128])
    with serve(tiny.model, calibration) as cache, torch.inference_mode():
        cache.adopt(prefill)
        found = tiny.model(row[:, 128:-1], past_key_values=cache).logits[0].log_softmax(-1)
    full = tiny.model(row[:, :-1]).logits[0, 128:].log_softmax(-1)
    expected = (full.exp() * (full - found)).sum(-1).mean().item()
    # chunked and whole forward passes sum in another order
    assert rows["tuned"]["kld"] == pytest.approx(expected, rel=1e-3)
    assert rows["tuned"]["kld"] != rows["untuned"]["kld"]


# when it is refused, or not wanted


def test_zero_steps_give_the_artifact_of_a_fit_without_fine_tuning(tiny, capture, tmp_path):
    def unwanted():
        raise AssertionError("no model is needed")

    one = fit(capture, method(0), policy=POLICY, out=tmp_path / "a.safetensors", model=unwanted)
    two = fit(capture, method(0), policy=POLICY, out=tmp_path / "b.safetensors")
    assert one.calibration.fingerprint == two.calibration.fingerprint
    assert one.calibration.adapter is None
    assert not list(tmp_path.glob("*.adapter.*"))


def test_a_fine_tune_that_does_not_improve_is_kept_out_and_said(tiny, capture, tmp_path, monkeypatch):
    # steps so long that they can only do harm
    monkeypatch.setattr("kvtool.finetune.training._RATE", 100.0)
    made = fit(capture, method(2), policy=POLICY, out=tmp_path / "a.safetensors", model=lambda: tiny)
    assert "the fine-tune did not improve and was kept out" in made.verdict
    assert made.calibration.provenance["finetune"]["kept"] is False
    plain = fit(capture, method(0), policy=POLICY, out=tmp_path / "b.safetensors")
    options = {"finetune_tokens": 128, "finetune_rank": 4}
    assert made.calibration.method == H1B(**options)
    assert made.calibration.fingerprint == plain.calibration.fingerprint
    assert not list(tmp_path.glob("*.adapter.*"))


def test_another_model_is_refused(make_tiny, tiny, capture, made):
    calibration = Calibration.load(made.path)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        other = make_tiny(initializer_range=0.15)
        for parameter in other.model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    with (
        pytest.raises(CalibrationError, match="found other weights than it was made for"),
        serve(other.model, calibration),
    ):
        pass
    # nothing is left of the attempt: the model can be served with what does fit it
    with serve(other.model, dataclasses.replace(calibration, adapter=None)):
        pass
    with (
        pytest.raises(CalibrationError, match="expected weights"),
        adapted(make_tiny(hidden_size=32).model, calibration.adapter),
    ):
        pass
    with pytest.raises(CalibrationError, match="no such module"), adapted(torch.nn.Linear(2, 2), calibration.adapter):
        pass
    stranger = LoadedModel(tiny.model, tiny.tokenizer, "stranger", "another fingerprint")
    with pytest.raises(CaptureError, match="fine-tune the model that was captured"):
        finetune(stranger, calibration, capture, stop=576)


def test_the_same_weights_in_bfloat16_are_the_same_model(make_tiny, made):
    Calibration.load(made.path).adapter.check_fits(make_tiny(initializer_range=0.15).model.to(torch.bfloat16))


def test_a_tampered_swapped_or_missing_adapter_is_refused(made, tmp_path):
    calibration = Calibration.load(made.path)
    path = calibration.save(tmp_path / "copy.safetensors")
    beside = tmp_path / "copy.adapter.safetensors"
    content = bytearray(beside.read_bytes())
    content[-5] ^= 1
    beside.write_bytes(bytes(content))
    with pytest.raises(CalibrationError, match="exchanged or damaged"):
        Calibration.load(path)
    swapped = Adapter({name: 2 * tensor for name, tensor in calibration.adapter.tensors.items()})
    swapped.save(beside)
    with pytest.raises(CalibrationError, match="exchanged or damaged"):
        Calibration.load(path)
    beside.unlink()
    with pytest.raises(CalibrationError, match="copy both files together"):
        Calibration.load(path)


def test_too_short_a_capture_and_too_few_tokens_are_refused_in_a_sentence(tiny, capture, made):
    calibration = made.calibration
    long = dataclasses.replace(calibration, method=H1B(finetune_steps=1, finetune_tokens=512))
    with pytest.raises(CaptureError, match="lower -o finetune_tokens"):
        finetune(tiny, long, capture, stop=576)
    sinks = dataclasses.replace(calibration, policy=CachePolicy(sinks=80))
    with pytest.raises(InputError, match="expected a page of 64 tokens"):
        finetune(tiny, sinks, capture, stop=576)


def test_without_peft_the_command_line_says_how_to_get_it(tiny, capture, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setattr("kvtool.models.load_model", lambda *args, **kwargs: tiny)
    words = ["calibrate", str(capture.path), "--method", "h1b", "-o", "finetune_steps", "1"]
    words += ["-o", "finetune_tokens", "128", "--out", str(tmp_path / "a.safetensors")]
    assert main(words) == 2
    assert "pip install 'kvtool[finetune]'" in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "a.safetensors").exists()
