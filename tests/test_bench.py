"""The benchmark: what it says it measured it measured, wrong code is not timed, and a CPU is told what was not run."""

import json
import random
import string

import pytest
import torch
from typer.testing import CliRunner

from kvtool.attention import Attended
from kvtool.backends import Backend
from kvtool.bench import Request, bench, default_subject, subject_of
from kvtool.bench.numerics import check_numerics
from kvtool.bench.run import crossover
from kvtool.bench.subject import MODEL_SHAPES, Subject
from kvtool.bench.timing import time_step
from kvtool.calibration import Calibration
from kvtool.cli import app
from kvtool.errors import BackendError, InputError
from kvtool.methods import METHODS, make_method
from kvtool.methods.base import LayerCalibration, nbytes

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Bandwidth and repetitions are not under test."""
    monkeypatch.setattr("kvtool.bench.run.bandwidth", lambda device: {"copy": 1e9, "read": 1e9})
    monkeypatch.setattr("kvtool.bench.run.CPU_BYTES", 1 << 17)


def test_bytes_are_those_of_the_stored_tensors():
    for bits in (1, 2, 3, 4, 8):
        subject = default_subject("smollm2-135m", bits)
        scales = 2 * 3 * 2  # fp16 per token, head and side
        assert subject.bytes_per_token == 2 * 3 * 64 * bits / 8 + scales
    assert subject.full_bytes_per_token == 2 * 2 * 3 * 64


def test_a_cache_repeats_its_sample_page_by_page():
    subject = default_subject("smollm2-135m", 2)
    kv = subject.cache(4096 + 128, 2, CPU)
    assert kv.key_pages.shape[:3] == (2, 3, 66)
    assert torch.equal(kv.key_pages[1, :, 64:], kv.key_pages[0, :, :2])


def test_a_method_without_blocks_compresses_the_whole_prompt():
    shape = MODEL_SHAPES["smollm2-135m"]
    method = make_method("eviction", {"policy": "snapkv", "budget": "25%"})
    subject = Subject(method, LayerCalibration(0, shape, None, {"fraction": torch.tensor(0.25)}), "a test")
    kv = subject.cache(512, 2, CPU)
    assert nbytes(kv) <= 0.25 * 2 * 512 * subject.full_bytes_per_token
    assert subject.bytes_per_token <= 0.25 * subject.full_bytes_per_token
    assert check_numerics(subject, Backend("reference"), CPU) < 1e-5


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_wrong_code_is_not_timed(factor):
    class Wrong:
        def attend(self, method, queries, kv, layer, *, positions, scale, softcap=None, gluon=False):
            exact = method.attend(queries, kv, layer, positions=positions, scale=scale, softcap=softcap)
            # only the longer of the lengths that are tried is wrong
            return Attended(exact.out * (factor if len(positions) > 64 else 1), exact.lse)

    subject = default_subject("smollm2-135m", 4)
    assert check_numerics(subject, Backend("reference"), CPU) < 1e-5
    with pytest.raises(BackendError, match="nothing was timed"):
        check_numerics(subject, Backend("triton", Wrong()), CPU)


def test_records_of_a_cpu():
    request = Request([100, 131072], batches=[1])
    records = list(bench(default_subject("smollm2-135m", 4), request, CPU))
    kinds = [record["record"] for record in records]
    assert kinds == ["machine", "step", "step", "crossover", "predicted", "predicted"]
    machine, short, long = records[:3]
    assert machine["backend"] == "reference"
    assert short["tokens"] == 64  # whole pages
    assert long["context"] == (1 << 17) // 768  # as long as the limit above allows
    for step in (short, long):
        assert step["bytes"] == step["tokens"] * machine["bytes_per_token"]
        assert step["speedup"] == pytest.approx(step["baselines_ms"]["math"] / step["ms"])
    floor = records[-1]["floor_ms"]["H100 SXM"]
    assert floor["full"] == pytest.approx(1e3 * 131072 * 768 / 3.35e12)


def test_timing_takes_the_copies_in_turn():
    seen = []
    timing = time_step(seen.append, 3, CPU)
    assert set(seen) == {0, 1, 2}
    assert timing.ms >= 0


def test_command_line_gates_and_refuses():
    run = CliRunner().invoke
    base = ["bench", "--model-shape", "smollm2-135m", "--context", "64", "--json"]
    done = run(app, base)
    assert done.exit_code == 0
    assert [json.loads(line)["record"] for line in done.stdout.splitlines()][:2] == ["machine", "step"]
    assert run(app, [*base, "--fail-if-slower-than", "1e9"]).exit_code == 1
    assert run(app, [*base, "--fail-if-slower-than", "1e-9"]).exit_code == 0
    for wrong in (
        ["--batch", "0"],
        ["--ladder", "4k"],
        ["--ladder", "8k..4k"],
        ["--baseline", "fast"],
        ["--context", "no"],
        ["--device", "tpu"],
    ):
        refused = run(app, [*base, *wrong])
        assert isinstance(refused.exception, InputError) or refused.exit_code == 2
    with pytest.raises(InputError, match="llama-3.1-8b"):
        default_subject("llama-9", 4)


@pytest.fixture(scope="module")
def capture(make_tiny, tmp_path_factory):
    """One sample that every method can be fitted to."""
    from kvtool.capture import record

    out = tmp_path_factory.mktemp("captures") / "bench"
    text = "".join(random.Random(0).choices(string.ascii_letters, k=400))
    return record(make_tiny(head_dim=64), out, text=text, context=320, samples=1, queries="all")


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_benched_without_a_gpu_from_its_artifact(name, capture, tmp_path):
    method = make_method(name)
    file = Calibration(method, capture.shape, method.fit(capture)).save(tmp_path / "a.safetensors")
    asked = ["bench", "--calibration", str(file), "--context", "100,128k", "--json", "--fail-if-slower-than", "1e-9"]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0, done.output
    records = [json.loads(line) for line in done.stdout.splitlines()]
    machine, *steps = (r for r in records if r["record"] in ("machine", "step"))
    assert machine["backend"] == "reference"
    assert [step["context"] for step in steps] == [100, 256]  # 128 KiB of the full cache
    for step in steps:
        assert step["ms"] > 0
        assert step["bytes"] > 0
        # exact keeps 16 bits a value, top-p the same and a sketch beside it
        assert step["bytes"] <= 1.2 * step["tokens"] * machine["full_bytes_per_token"]
        assert step["relative_error"] < 1e-4
    assert [r["context"] for r in records if r["record"] == "predicted"] == [100, 131072]
    assert "not run: the kernels, which need a GPU, 128k x 1 (timed at 256)" in done.stderr


def test_an_estimator_is_judged_by_its_reference(capture):
    method = make_method("h1b")
    subject = subject_of(Calibration(method, capture.shape, method.fit(capture)), "a test")

    class Wrong:
        def attend(self, method, queries, kv, layer, *, gluon=False, **arguments):
            exact = method.attend(queries, kv, layer, **arguments)
            return Attended(1.01 * exact.out, exact.lse)

    with pytest.raises(BackendError, match="the method's reference"):
        check_numerics(subject, Backend("triton", Wrong()), CPU)


def test_the_crossover_is_where_winning_begins_to_last():
    assert crossover({1024: 0.5, 2048: 1.1, 2069: 0.9, 4096: 1.0, 4137: 1.2}) == 4096
    assert crossover({1024: 2.0, 2048: 1.5}) == 1024
    assert crossover({1024: 2.0, 2048: 0.9}) is None
    assert crossover({1024: 2.0, 2048: None}) is None  # nothing to compare with


def test_a_ladder_has_powers_of_two_and_odd_lengths_and_one_crossover_a_batch():
    asked = ["bench", "--model-shape", "smollm2-135m", "--bits", "2", "--ladder", "64..128", "--batch", "1,2"]
    done = CliRunner().invoke(app, [*asked, "--json"])
    assert done.exit_code == 0, done.output
    records = [json.loads(line) for line in done.stdout.splitlines()]
    lengths = [(r["context"], r["batch"]) for r in records if r["record"] == "step"]
    # a batch of two reaches the limit above at 85 tokens
    assert lengths == [(64, 1), (65, 1), (128, 1), (130, 1), (64, 2), (65, 2), (85, 2)]
    assert [r["batch"] for r in records if r["record"] == "crossover"] == [1, 2]
    shown = CliRunner().invoke(app, asked)
    for batch in (1, 2):
        said = f"batch {batch}: compression "
        assert said + "wins from" in shown.stdout or said + "does not win" in shown.stdout


def test_the_shape_may_be_that_of_a_model_on_disk(make_tiny, tmp_path):
    loaded = make_tiny(head_dim=64, num_key_value_heads=1)
    loaded.model.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    subject = default_subject(str(tmp_path), 2)
    assert (subject.shape.num_heads, subject.shape.num_kv_heads, subject.shape.head_dim) == (4, 1, 64)
    assert subject.bytes_per_token == 2 * 64 * 2 / 8 + 4


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused = CliRunner().invoke(app, ["bench", "--model-shape", "smollm2-135m", "--device", "cuda"])
    assert isinstance(refused.exception, InputError)
    assert "found none; use --device cpu" in str(refused.exception)
