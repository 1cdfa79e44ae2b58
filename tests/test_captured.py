"""A decode step of static shapes says what the growing cache says, token after token, page after page."""

from contextlib import ExitStack

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvtool.cache import CompressedLayer
from kvtool.calibration import CachePolicy, Calibration
from kvtool.captured import CapturedDecoder
from kvtool.errors import ModelError
from kvtool.methods import make_method
from kvtool.models.geometry import cache_shape
from kvtool.runtime import serve
from kvtool.static import StaticLayer

PLAIN = dict(do_sample=False, pad_token_id=0, eos_token_id=None)
SIZES = dict(vocab_size=97, hidden_size=64, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2)
TURBO = {"k_bits": 4, "v_bits": 3, "codebook": "sphere", "mean": "none", "outliers": "first"}


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=2, head_dim=64, initializer_range=0.1)).eval()


def calibration(model, method="turboquant", window=32, **options):
    """Data-free: what needs no data is fitted to nothing."""
    method = make_method(method, options or (TURBO if method == "turboquant" else {}))
    shape = cache_shape(model)
    tensors = {
        f"layers.{i}.{name}": tensor
        for i, layer in enumerate(shape.layers)
        for name, tensor in method.fit_layer(layer, shape.rope(i), [], layer=i).items()
    }
    return Calibration(method, shape, tensors, CachePolicy(window=window))


def prompt(tokens=300, batch=2):
    return torch.randint(3, 97, (batch, tokens), generator=torch.Generator().manual_seed(1))


def steps_of(model, made, ids, more, *, static, backend=None, monkeypatch=None, capacity=0):
    """Logits of every step after a prefill of ``ids``, given the tokens ``more``."""
    with serve(model, made) as cache, torch.no_grad():
        if backend:
            cache.backend = backend
            for _, layer in cache.compressed_layers():
                layer.backend = backend
        model(ids, past_key_values=cache)
        if static:
            decoder = CapturedDecoder(model, cache, capacity=capacity)
            assert decoder.captures == 0  # no GPU here
        found = [
            decoder.step(token) if static else model(token[:, None], past_key_values=cache).logits[:, -1]
            for token in more.T
        ]
        sizes = cache.nbytes()
        tokens = cache.get_seq_length()
    return torch.stack(found), sizes, tokens


@pytest.mark.parametrize("method", ["exact", "turboquant", "affine"])
def test_a_static_step_gives_the_growing_caches_logits(llama, method):
    """Over two pages that leave the window, or three."""
    made = calibration(llama, method)
    ids, more = prompt(160), prompt(70 + 64 * (method == "exact")).flip(1)
    grown, grown_sizes, grown_tokens = steps_of(llama, made, ids, more, static=False)
    fixed, fixed_sizes, fixed_tokens = steps_of(llama, made, ids, more, static=True, capacity=512)
    # float32 sums in another order, once for the tail and once for its merge with the pages
    torch.testing.assert_close(fixed, grown, rtol=1e-3, atol=1e-3)
    assert grown_tokens == fixed_tokens == 160 + more.shape[1]
    for name in ("compressed", "exact", "values", "exact_values"):
        assert getattr(grown_sizes, name) == getattr(fixed_sizes, name)


def test_room_that_is_used_up_grows(llama):
    """Without any capacity the first page that leaves the window moves the others; nothing is lost."""
    made = calibration(llama)
    ids, more = prompt(160), prompt(6).flip(1)
    grown, *_ = steps_of(llama, made, ids, more, static=False)
    fixed, sizes, _ = steps_of(llama, made, ids, more, static=True, capacity=0)
    torch.testing.assert_close(fixed, grown, rtol=1e-3, atol=1e-3)
    assert sizes.resident > sizes.compressed + sizes.exact


def test_room_is_made_at_once_and_nothing_moves_within_it(llama):
    with serve(llama, calibration(llama)) as cache, torch.no_grad():
        llama(prompt(160), past_key_values=cache)
        decoder = CapturedDecoder(llama, cache, capacity=512)
        before = [id(x) for x in decoder._tensors()] + [x.data_ptr() for x in cache.layers[0].tail]
        for token in prompt(70).T:
            decoder.step(token)
        assert cache.layers[0].parts.tokens == 64 + 128
        assert [id(x) for x in decoder._tensors()] + [x.data_ptr() for x in cache.layers[0].tail] == before


@pytest.mark.parametrize("method", ["exact", "turboquant", "affine"])
def test_a_block_is_compressed_where_the_device_says(llama, method):
    """What a GPU replays, run as it is: the same pages in the same places as compressing into a growing run."""
    more = prompt(70).flip(1)
    held = []
    for turns in (False, True):
        with serve(llama, calibration(llama, method)) as cache, torch.no_grad():
            llama(prompt(160), past_key_values=cache)
            decoder = CapturedDecoder(llama, cache, capacity=512)
            decoder._may_turn = turns
            for token in more.T:
                decoder.step(token)
            layer = cache.layers[0]  # the second layer's keys differ by roundings
            used = layer.parts._used(layer.parts.whole()[0][0])
            held.append([*used, layer.keys, layer.values, torch.tensor([layer.parts.tokens, layer.filled])])
            assert decoder._turns == turns
    for grown, turned in zip(*held, strict=True):
        assert torch.equal(grown, turned)
    assert held[0][-1].tolist() == [192, 38]


def test_what_overflows_when_compressed_is_refused(llama):
    with serve(llama, calibration(llama, "exact")) as cache, torch.no_grad():
        llama(prompt(160), past_key_values=cache)
        decoder = CapturedDecoder(llama, cache, capacity=512)
        decoder._turns = True
        cache.layers[0].tail[0][0, 0, 7, 0] = torch.nan
        steps = map(decoder.step, prompt(64).T)
        with pytest.raises(ModelError, match="found NaN"):
            list(steps)


@pytest.mark.parametrize("batch", [1, 3])
def test_generate_replays_within_a_capacity(llama, batch):
    made = calibration(llama)
    ids = prompt(160, batch)
    with serve(llama, made) as cache:
        plain = llama.generate(ids, max_new_tokens=80, past_key_values=cache, **PLAIN)
    with serve(llama, made, capacity=400) as cache:
        replayed = llama.generate(ids, max_new_tokens=80, past_key_values=cache, **PLAIN)
        assert all(isinstance(layer, StaticLayer) for layer in cache.layers)
        assert cache.get_seq_length() == 160 + 79
    assert torch.equal(plain, replayed)
    assert "forward" not in vars(llama)


def test_a_second_turn_and_a_crop_leave_the_static_shapes_and_come_back(llama):
    made = calibration(llama)
    ids = prompt(300, 1)

    def turns(cache):
        out = []
        with torch.no_grad():
            for piece in (ids[:, :160], *ids[:, 160:170].split(1, 1), ids[:, 170:250]):
                out.append(llama(piece, past_key_values=cache).logits[:, -1])
            cache.crop(-3)
            for piece in ids[:, 247:290].split(1, 1):
                out.append(llama(piece, past_key_values=cache).logits[:, -1])
        return torch.cat(out)

    with serve(llama, made) as cache:
        grown = turns(cache)
    with serve(llama, made, capacity=400) as cache:
        fixed = turns(cache)
        assert isinstance(cache.layers[0], StaticLayer)
        cache.reset()
        assert type(cache.layers[0]) is CompressedLayer
        assert cache.get_seq_length() == 0
    torch.testing.assert_close(fixed, grown, rtol=1e-3, atol=1e-3)


def test_beams_decode_as_ever(llama):
    made = calibration(llama, "exact")
    ids = prompt(160, 1)
    plain = llama.generate(ids, max_new_tokens=70, num_beams=3, **PLAIN)
    with serve(llama, made, capacity=400) as cache:
        served = llama.generate(ids, max_new_tokens=70, num_beams=3, past_key_values=cache, **PLAIN)
    assert torch.equal(plain, served)


def test_a_prompt_shorter_than_the_window_has_no_page_yet(llama):
    with serve(llama, calibration(llama)) as cache, torch.no_grad():
        llama(prompt(20), past_key_values=cache)
        with pytest.raises(ModelError, match="nothing is compressed yet"):
            CapturedDecoder(llama, cache)
    ids = prompt(20)
    with serve(llama, calibration(llama), capacity=300) as cache:
        replayed = llama.generate(ids, max_new_tokens=120, past_key_values=cache, **PLAIN)
        assert isinstance(cache.layers[0], StaticLayer)
    with serve(llama, calibration(llama)) as cache:
        assert torch.equal(replayed, llama.generate(ids, max_new_tokens=120, past_key_values=cache, **PLAIN))


def test_what_cannot_be_static_decodes_as_ever_after_a_warning(llama):
    made = calibration(llama, "exact")
    sparing = Calibration(made.method, made.shape, {}, CachePolicy(window=32, exact_layers=(0,)))
    ids = prompt(160)
    with ExitStack() as stack:
        with pytest.warns(UserWarning, match="layer 0 is not compressed"):
            cache = stack.enter_context(serve(llama, sparing, capacity=300))
        served = llama.generate(ids, max_new_tokens=5, past_key_values=cache, **PLAIN)
        with pytest.raises(ModelError, match="layer 0 is not compressed"):
            CapturedDecoder(llama, cache)
    assert torch.equal(served, llama.generate(ids, max_new_tokens=5, **PLAIN))


def test_padding_is_refused_within_a_capacity_too(llama):
    mask = torch.ones(2, 161, dtype=torch.long)
    with serve(llama, calibration(llama), capacity=300) as cache, torch.no_grad():
        llama(prompt(160), past_key_values=cache)
        mask[0, 3] = 0
        with pytest.raises(ModelError, match="padded batches"):
            llama(prompt(1), attention_mask=mask, past_key_values=cache)


def test_the_model_may_be_compiled(llama):
    """Graph breaks at the attention, the same numbers."""
    made = calibration(llama)
    ids, more = prompt(160), prompt(2)
    grown, *_ = steps_of(llama, made, ids, more, static=False)
    compiled = torch.compile(llama, backend="eager")
    with serve(llama, made) as cache, torch.no_grad():
        compiled(ids, past_key_values=cache)
        found = [compiled(token[:, None], past_key_values=cache).logits[:, -1] for token in more.T]
    torch.testing.assert_close(torch.stack(found), grown, rtol=1e-4, atol=1e-4)
