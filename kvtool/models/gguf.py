"""GGUF to an ordinary Hugging Face model directory: weights dequantised, names mapped, tokenizer rebuilt.

transformers can read GGUF too, but it needs ``accelerate``, takes ten seconds, takes the tokenizer for a CodeLlama one
and loses the true end-of-sequence id. Here the tokenizer comes from the file's own vocabulary and merges.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from kvtool.errors import ModelError

INSTALL = "pip install 'kvtool[demo]'"

# model_type -> class, and whether llama.cpp interleaved the two halves of every query and key head
_ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", True),
    "qwen2": ("Qwen2ForCausalLM", False),
    "qwen3": ("Qwen3ForCausalLM", False),
}
_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{%s}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# tokenizer.ggml.pre -> (each digit alone first, how the rest is split before byte-level BPE)
_SPLITS = {
    "smollm": (True, _GPT2),
    "gpt-2": (False, _GPT2),
    "default": (False, _GPT2),
    "llama-bpe": (False, _LLAMA3 % "1,3"),
    "qwen2": (False, _LLAMA3 % "1"),
}
_CONTROL = 3  # tokenizer.ggml.token_type of special tokens


def convert(path: Path, into: Path) -> None:
    """Write the model of GGUF file ``path`` into directory ``into``: config, float32 safetensors, tokenizer.

    Raises:
        ModelError: no ``gguf`` package, not a GGUF file, or an architecture or tokenizer that is not known.
    """
    try:
        from gguf import GGUFReader
    except ImportError:
        raise ModelError(f"{path.name}: reading GGUF needs the package gguf; {INSTALL}") from None
    try:
        reader = GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise ModelError(f"{path}: not a readable GGUF file: {error}") from error
    config = _config(path, fields)
    weights = _weights(path, reader.tensors, config)
    config["tie_word_embeddings"] = "lm_head.weight" not in weights
    tokenizer = _tokenizer(path, fields)
    generation = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config}
    (into / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    (into / "generation_config.json").write_text(json.dumps(generation, indent=1) + "\n")
    tokenizer.save_pretrained(into)
    save_file(weights, into / "model.safetensors", metadata={"format": "pt"})


def _config(path: Path, fields: dict[str, Any]) -> dict[str, Any]:
    """config.json from the file's metadata."""
    architecture = fields.get("general.architecture")
    if architecture not in _ARCHITECTURES:
        known = ", ".join(_ARCHITECTURES)
        raise ModelError(
            f"{path}: GGUF architecture {architecture} is not one of {known}; use the model's Hugging Face directory"
        )

    def get(name: str, default: Any = None) -> Any:
        return fields.get(f"{architecture}.{name}", default)

    hidden, heads = get("embedding_length"), get("attention.head_count")
    config: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[architecture][0]],
        "model_type": architecture,
        "dtype": "float32",
        "hidden_size": hidden,
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": get("attention.key_length", hidden // heads),
        "max_position_embeddings": get("context_length"),
        # stored as float32: 9.999999747378752e-06 was written as 1e-05
        "rms_norm_eps": float(f"{get('attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_parameters": _rope(path, get),
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
    }
    for name, key in {"bos": "bos", "eos": "eos", "pad": "padding"}.items():
        if (token := fields.get(f"tokenizer.ggml.{key}_token_id")) is not None:
            config[f"{name}_token_id"] = token
    return config


def _rope(path: Path, get: Any) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(get("rope.freq_base", 10000.0))}
    kind = get("rope.scaling.type", "none")
    if kind in ("linear", "yarn"):
        rope |= {"rope_type": kind, "factor": float(get("rope.scaling.factor", 1.0))}
        if original := get("rope.scaling.original_context_length"):
            rope["original_max_position_embeddings"] = original
    elif kind != "none":
        raise ModelError(f"{path}: rope scaling '{kind}' is not known; use the model's Hugging Face directory")
    return rope


def _weights(path: Path, tensors: Any, config: dict[str, Any]) -> dict[str, Tensor]:
    """Every tensor in float32, under its Hugging Face name."""
    from gguf import dequantize

    interleaved = _ARCHITECTURES[config["model_type"]][1]
    weights = {}
    for tensor in tensors:
        name = _name(path, tensor.name)
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).float()
        if interleaved and name.split(".")[-2] in ("q_proj", "k_proj"):
            heads = config["num_attention_heads" if ".q_proj" in name else "num_key_value_heads"]
            weight = _deinterleave(weight, heads)
        weights[name] = weight
    return weights


def _name(path: Path, name: str) -> str:
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if not match or match[2] not in _NAMES:
        raise ModelError(f"{path}: tensor {name} has no known place; use the model's Hugging Face directory")
    layer = f"model.layers.{match[1]}." if match[1] else ""
    return f"{layer}{_NAMES[match[2]]}.{match[3]}"


def _deinterleave(weight: Tensor, heads: int) -> Tensor:
    """llama.cpp turns channels (2c, 2c+1) together, transformers (c, c + D/2): reorder the rows of every head."""
    rows = weight.shape[0]
    return (
        weight.view(heads, rows // heads // 2, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape).contiguous()
    )


def _tokenizer(path: Path, fields: dict[str, Any]) -> Any:
    """Byte-level BPE from the file's vocabulary and merges; adds no special tokens by itself."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    kind, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre", "default")
    if kind != "gpt2" or pre not in _SPLITS:
        raise ModelError(f"{path}: tokenizer {kind}/{pre} is not known; use the model's Hugging Face directory")
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    digits, pattern = _SPLITS[pre]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *([pre_tokenizers.Digits(individual_digits=True)] if digits else []),
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = fields["tokenizer.ggml.token_type"]
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    named = {
        f"{name}_token": tokens[fields[f"tokenizer.ggml.{key}_token_id"]]
        for name, key in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items()
        if f"tokenizer.ggml.{key}_token_id" in fields
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=fields.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **named,
    )
