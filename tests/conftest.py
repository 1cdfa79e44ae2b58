"""Shared fixtures: a tiny random model, and one capture of it per session."""

import os
import random
import string
import sys

# a test never sees the user's own directory, nor the network
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # read when triton is first imported, by whichever test comes first
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def kvtool_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("KVTOOL_HOME", str(home))
    return home


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """kvtool's uninitialised memory holds NaN, so that an output nobody wrote fails loudly."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.startswith("kvtool") and tensor.is_floating_point():
            tensor.fill_(float("nan"))
        return tensor

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture(scope="session")
def tiny_model():
    """A random Llama: 2 layers, 4 query heads on 2 KV heads, head_dim 32, 97 tokens; the tokenizer knows bytes."""
    return make_tiny_model()


@pytest.fixture(scope="session")
def make_tiny():
    """``make_tiny(**config)``: another random Llama."""
    return make_tiny_model


@pytest.fixture(scope="session")
def wrap():
    """``wrap(cls, config, name)``: a random model of any class, with the tokenizer of the tiny one."""
    return wrap_model


@pytest.fixture(scope="session")
def tiny_capture(tiny_model, tmp_path_factory):
    """Two samples of 192 tokens of the tiny model, in float32, captured once."""
    from kvtool.capture import record

    out = tmp_path_factory.mktemp("captures") / "tiny"
    return record(tiny_model, out, text=TEXT, context=192, samples=2, chunk=64, dtype="float32")


TEXT = "".join(random.Random(0).choices(string.ascii_letters + " .,\n", k=1000))


def make_tiny_model(**overrides):
    """A random Llama as ``LoadedModel``; ``overrides`` go to its config."""
    from transformers import LlamaConfig, LlamaForCausalLM

    options = dict(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=None,
        # wide enough that attention is not flat and greedy choices are not ties
        initializer_range=0.3,
    )
    return wrap_model(LlamaForCausalLM, LlamaConfig(**(options | overrides)))


def wrap_model(cls, config, name="tiny"):
    """A random model of class ``cls``, always the same one, as ``LoadedModel``."""
    from kvtool.models import LoadedModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = cls(config).eval().requires_grad_(False)
    return LoadedModel(model, tiny_tokenizer(), name, f"fingerprint of {name}")


def tiny_tokenizer():
    """One token per printable character."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {chr(ord(" ") + i): i for i in range(95)} | {"\n": 95, "?unknown": 96}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?unknown"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?unknown")
