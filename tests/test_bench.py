"""The benchmark: what it says it measured it measured, wrong code is not timed, and a CPU is told what was not run."""

import json

import pytest
import torch
from typer.testing import CliRunner

from kvtool.attention import Attended
from kvtool.backends import Backend
from kvtool.bench import Request, bench, default_subject
from kvtool.bench.run import check_numerics
from kvtool.bench.subject import MODEL_SHAPES, Subject
from kvtool.bench.timing import time_step
from kvtool.cli import app
from kvtool.errors import BackendError, InputError
from kvtool.methods import make_method
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
    for wrong in (["--batch", "0"], ["--ladder", "4k"], ["--baseline", "fast"], ["--context", "no"]):
        refused = run(app, [*base, *wrong])
        assert isinstance(refused.exception, InputError) or refused.exit_code == 2
    with pytest.raises(InputError, match="llama-3.1-8b"):
        default_subject("llama-9", 4)
