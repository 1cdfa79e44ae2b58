"""``kvtool bench --e2e`` measures a whole model three ways and says what it did not do."""

import json

import pytest
import torch
from typer.testing import CliRunner

from kvtool.bench.end_to_end import Decode, end_to_end
from kvtool.bench.subject import data_free_method
from kvtool.bench.whole_model import data_free, fill, random_model, repeated
from kvtool.cli import app
from kvtool.errors import InputError
from kvtool.models.geometry import cache_shape
from kvtool.runtime import serve

CPU = torch.device("cpu")
SHAPE = "smollm2-135m"


def test_three_ways_and_a_prefill_are_measured():
    request = Decode(300, [1, 2], prefill=200, steps=3)
    records = list(end_to_end(SHAPE, data_free_method(4), request, CPU))
    assert [r["record"] for r in records] == ["machine", *["decode"] * 3, "ratio", *["decode"] * 3, "ratio", "prefill"]
    assert "no prompt was prefilled" in records[0]["cache"]
    assert records[0]["model_shape"] == f"toy, 2 layers, attention of {SHAPE}"
    assert records[0]["relative_error"] < 1e-5
    for record in records:
        if record["record"] == "decode":
            assert record["finite"]
            assert record["tokens_per_s"] == pytest.approx(1e3 * record["batch"] / record["ms"])
    kvtool, full, today = records[1:4]
    assert full["cache_bytes"] == 2 * 2 * 3 * 64 * 300 * 4
    assert kvtool["cache_bytes"] < full["cache_bytes"] < today["cache_bytes"]  # today's has grown
    assert records[4]["to_full"] == pytest.approx(full["ms"] / kvtool["ms"])


def test_the_cache_is_filled_as_serving_leaves_it():
    model = random_model(SHAPE, CPU)
    made = data_free(data_free_method(2), cache_shape(model))
    with serve(model, made) as cache, torch.no_grad():
        fill(cache, model, 300, 2, 400)
        filled = [(layer.parts.tokens, layer.keys.shape, layer.get_seq_length()) for layer in cache.layers]
        cache.reset()
        model(torch.zeros(2, 300, dtype=torch.long), past_key_values=cache)
        assert filled == [(layer.parts.tokens, layer.keys.shape, layer.get_seq_length()) for layer in cache.layers]
        with pytest.raises(InputError, match="more tokens than"):
            fill(cache, model, 150, 1, 400)


def test_an_artifact_of_other_layers_is_repeated_and_of_other_heads_refused():
    shape = cache_shape(random_model(SHAPE, CPU))
    made = data_free(data_free_method(4), shape)
    longer = shape.model_copy(update={"layers": shape.layers[:1] * 5})
    fitted = repeated(made, longer)
    fitted.check_fits(longer, "a longer model")
    assert set(fitted.tensors) == {f"layers.{i}.{n.split('.', 2)[2]}" for i in range(5) for n in made.tensors}
    with pytest.raises(InputError, match="num_heads: expected 32, found 9"):
        repeated(made, cache_shape(random_model("llama-3.2-1b", CPU)))


def test_command_line_says_that_it_is_a_toy():
    base = ["bench", "--e2e", "--model-shape", SHAPE, "--context", "300", "--prefill", "0", "--device", "cpu"]
    done = CliRunner().invoke(app, [*base, "--json"])
    assert done.exit_code == 0, done.output
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["record"] for line in lines] == ["machine", *["decode"] * 3, "ratio"]
    assert "toy" in done.stderr
    refused = CliRunner().invoke(app, [*base, "--model-shape", "gemma-3-4b"])
    assert isinstance(refused.exception, InputError) or refused.exit_code == 2
