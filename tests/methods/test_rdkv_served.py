"""rdkv and eviction through calibrate and serve on the tiny model."""

import pytest
import torch

from kvtool.calibration import Calibration
from kvtool.fitting import fit
from kvtool.methods import make_method
from kvtool.policy import CachePolicy
from kvtool.runtime import serve

POLICY = CachePolicy(sinks=4, window=32)


@pytest.fixture(scope="module")
def made(tiny_capture, tmp_path_factory):
    out = tmp_path_factory.mktemp("artifacts") / "rdkv.safetensors"
    return fit(tiny_capture, make_method("rdkv", {"budget": "25%"}), policy=POLICY, out=out)


def test_a_bare_fit_writes_an_artifact_and_says_one_line(made):
    assert "\n" not in made.verdict
    read = Calibration.load(made.path)
    assert read.method == made.calibration.method
    assert read.provenance["held_out"]["raced"] is False  # 192 tokens are too few to decide anything
    assert "longer --context" in made.verdict


@pytest.mark.parametrize("scoring", ["window", "expected"])
def test_generation_keeps_within_the_budget_while_it_grows(tiny_model, made, scoring):
    tensors, shape = made.calibration.tensors, made.calibration.shape
    calibration = Calibration(make_method("rdkv", {"budget": "25%", "scoring": scoring}), shape, tensors, POLICY)
    prompt = torch.randint(0, 95, (2, 300), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(), serve(tiny_model.model, calibration) as cache:
        options = {"max_new_tokens": 70, "min_new_tokens": 70, "do_sample": False, "pad_token_id": 0}
        tiny_model.model.generate(prompt, attention_mask=torch.ones_like(prompt), past_key_values=cache, **options)
        held = cache.nbytes()
    tokens = held.tokens
    compressed = 2 * 2 * 2 * 32 * 2 * 2 * (tokens - 36)  # 16-bit bytes of two layers, two sequences, all but the exact
    assert tokens == 369
    # the last tokens below a block are still exact
    assert 0 < held.compressed <= 0.25 * compressed


@pytest.mark.parametrize("policy", ["snapkv", "pyramidkv", "tova", "expected", "h2o", "streaming"])
def test_eviction_is_served_at_its_bytes(tiny_model, tiny_capture, tmp_path, policy):
    method = make_method("eviction", {"policy": policy, "budget": "25%"})
    calibration = fit(tiny_capture, method, policy=POLICY, out=tmp_path / "e.safetensors").calibration
    prompt = torch.randint(0, 95, (1, 436), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode(), serve(tiny_model.model, calibration) as cache:
        tiny_model.model(prompt, past_key_values=cache, use_cache=True)
        held = cache.nbytes()
    assert held.compressed == pytest.approx(0.25 * 400 * 2 * 2 * 2 * 32 * 2, rel=0.01)
