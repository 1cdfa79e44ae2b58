"""Serving from a compressed cache changes nothing but what the method changes."""

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from kvtool.cache import CompressedCache, CompressedLayer
from kvtool.calibration import CachePolicy, Calibration
from kvtool.errors import BackendError, CalibrationError, ModelError
from kvtool.exact import exact_attention
from kvtool.methods.exact import Exact
from kvtool.models.geometry import cache_shape
from kvtool.runtime import exact_prefill, serve

SIZES = dict(vocab_size=97, hidden_size=64, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2)
PLAIN = dict(do_sample=False, pad_token_id=0, eos_token_id=None)


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=3)).eval()


@pytest.fixture(scope="module")
def gemma():
    torch.manual_seed(0)
    config = Gemma2Config(**SIZES, num_hidden_layers=4, head_dim=16, sliding_window=32)
    return Gemma2ForCausalLM(config).eval()


def calibration(model, window=32, **policy):
    return Calibration(Exact(), cache_shape(model), {}, CachePolicy(window=window, **policy))


def prompt(tokens=300, batch=1):
    return torch.randint(3, 97, (batch, tokens), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["llama", "gemma"])
@pytest.mark.parametrize("tokens", [2, 63, 300])
def test_a_lossless_method_generates_the_same_tokens(name, tokens, request):
    model = request.getfixturevalue(name)
    ids = prompt(tokens, batch=2)
    plain = model.generate(ids, max_new_tokens=80, **PLAIN)
    with serve(model, calibration(model)) as cache:
        served = model.generate(ids, max_new_tokens=80, past_key_values=cache, **PLAIN)
        assert cache.get_seq_length() == tokens + 79
        assert len(cache.layers[1].parts) == (tokens + 79 > 36 + 64)
    assert torch.equal(plain, served)


def test_a_lossless_method_gives_the_same_logits_bit_for_bit(llama):
    ids = prompt(240)
    prefill = exact_prefill(llama, ids[:, :200])
    with torch.inference_mode():
        plain = llama(ids[:, 200:201], past_key_values=prefill.cache).logits
        prefill.cache.crop(-1)
        with serve(llama, calibration(llama)) as cache:
            cache.adopt(prefill)
            assert cache.layers[0].parts.tokens == 128
            served = llama(ids[:, 200:201], past_key_values=cache).logits
    assert torch.equal(plain, served)


def test_beams_follow_the_compressed_tokens(llama):
    ids = prompt()
    plain = llama.generate(ids, max_new_tokens=70, num_beams=3, **PLAIN)
    with serve(llama, calibration(llama)) as cache:
        served = llama.generate(ids, max_new_tokens=70, num_beams=3, past_key_values=cache, **PLAIN)
    assert torch.equal(plain, served)


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_prefill_in_chunks_equals_prefill_at_once(name, request):
    model = request.getfixturevalue(name)
    ids = prompt(200)
    with serve(model, calibration(model)) as cache, torch.inference_mode():
        for piece in ids.split(70, 1):
            chunked = model(piece, past_key_values=cache).logits[:, -1]
    with torch.inference_mode():
        whole = model(ids).logits[:, -1]
    # float32 sums in another order
    torch.testing.assert_close(chunked, whole, rtol=1e-4, atol=1e-5)


def test_every_token_is_held_once_and_its_bytes_are_counted(llama):
    with serve(llama, calibration(llama, window=32, sinks=4)) as cache:
        cache.adopt(exact_prefill(llama, prompt(300)))
        layer = cache.layers[0]
        assert layer.parts.tokens == 256  # 264 have left the window, in whole pages
        assert layer.keys.shape[-2] == 44
        size = cache.nbytes()
    values = 3 * 2 * 2 * 16 * 300
    assert size.values == values
    assert size.compressed == 3 * 2 * 2 * 16 * 256 * 4
    assert size.exact == 3 * 2 * 2 * 16 * 44 * 4
    assert size.resident >= size.compressed + size.exact


def test_a_method_is_shown_the_queries_it_looks_back_on(llama, monkeypatch):
    """However many the prefill kept, for it is shared with methods that look at more."""
    shown = []
    monkeypatch.setattr(CompressedLayer, "settle", lambda self, queries: shown.append(queries.shape[2]))
    with serve(llama, calibration(llama)) as cache:
        cache.adopt(exact_prefill(llama, prompt(300), last_queries=300))
    assert shown == [64] * 3


def test_exact_layers_are_left_alone(llama):
    cache = CompressedCache(llama, calibration(llama, exact_layers=(0, 2)))
    assert [i for i, _ in cache.compressed_layers()] == [1]


def test_sliding_layers_are_left_alone(gemma):
    cache = CompressedCache(gemma, calibration(gemma))
    kinds = [layer.kind for layer in cache_shape(gemma).layers]
    assert [i for i, _ in cache.compressed_layers()] == [i for i, kind in enumerate(kinds) if kind == "full"] != []


def test_recent_tokens_can_be_cropped_and_compressed_ones_not(llama):
    with serve(llama, calibration(llama)) as cache:
        cache.adopt(exact_prefill(llama, prompt(300)))
        cache.layers[0].crop(-40)
        assert cache.layers[0].get_seq_length() == 260
        with pytest.raises(ModelError, match="only the 0 most recent are held exactly"):
            cache.layers[0].crop(-1)


def test_padded_batches_are_refused(llama):
    mask = torch.ones(2, 300, dtype=torch.long)
    mask[0, :3] = 0
    with serve(llama, calibration(llama)) as cache, pytest.raises(ModelError, match="padded batches"):
        llama.generate(prompt(batch=2), attention_mask=mask, max_new_tokens=2, past_key_values=cache, **PLAIN)


def test_running_without_the_cache_is_refused(llama):
    with serve(llama, calibration(llama)), pytest.raises(ModelError, match="past_key_values=cache"):
        llama(prompt(), use_cache=False)


def test_the_models_own_attention_comes_back(llama):
    before = llama.config._attn_implementation
    with pytest.raises(RuntimeError, match="mine"), serve(llama, calibration(llama)):
        raise RuntimeError("mine")
    assert llama.config._attn_implementation == before
    with serve(llama, calibration(llama)), pytest.raises(ModelError, match="already"):
        serve(llama, calibration(llama)).__enter__()


def test_an_artifact_for_another_model_is_refused(llama, gemma):
    with pytest.raises(CalibrationError, match="number of layers: 4 against 3"):
        serve(llama, calibration(gemma)).__enter__()


def test_kernels_without_a_gpu_are_refused(llama):
    with pytest.raises(BackendError, match="reference"):
        serve(llama, calibration(llama), backend="triton").__enter__()


@pytest.mark.parametrize(("S", "T"), [(1, 70), (70, 70), (5, 70)])
@pytest.mark.parametrize("softcap", [None, 20.0])
def test_exact_attention_is_causal_attention(S, T, softcap):
    generator = torch.Generator().manual_seed(0)
    queries, keys, values = (
        torch.randn(2, h, n, 16, dtype=torch.float64, generator=generator) for h, n in ((6, S), (2, T), (2, T))
    )
    bias = torch.randn(2, 2, T, dtype=torch.float64, generator=generator)
    out = exact_attention(queries, keys, values, scale=0.3, softcap=softcap, bias=bias)
    for s in range(S):
        seen = T - S + s + 1
        for head in range(6):
            scores = keys[1, head // 3, :seen] @ queries[1, head, s] * 0.3
            scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
            weights = (scores + bias[1, head // 3, :seen]).softmax(-1)
            # float64 throughout: only the order of sums differs
            torch.testing.assert_close(out[1, head, s], weights @ values[1, head // 3, :seen], rtol=1e-10, atol=1e-10)
