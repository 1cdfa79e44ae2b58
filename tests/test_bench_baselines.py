"""Every baseline runs or says why not; FlashInfer is asked for what it documents."""

import json
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
from typer.testing import CliRunner

from kvtool.bench import baselines, default_subject
from kvtool.bench.timing import Timing
from kvtool.cli import app

CPU = torch.device("cpu")


class Wrapper:
    """As FlashInfer's, by its documentation: plan once, then run over pages of [pages, page size, H, D]."""

    seen: list = []  # noqa: RUF012
    refuses: type[Exception] | None = None

    def __init__(self, workspace, layout, use_tensor_cores=False):
        assert workspace.dtype == torch.uint8
        assert layout == "NHD"

    def plan(self, indptr, indices, last_page_len, heads, kv_heads, head_dim, page_size, **options):
        if self.refuses:
            raise self.refuses("unsupported head_dim\nand more")
        assert indptr.dtype == indices.dtype == last_page_len.dtype == torch.int32
        self.lengths = (page_size * (indptr.diff() - 1) + last_page_len).tolist()
        assert len(indices) == indptr[-1]
        self.heads, self.dims, self.options = heads, (page_size, kv_heads, head_dim), options

    def run(self, queries, cache):
        keys, values = cache
        assert keys.shape[1:] == values.shape[1:] == self.dims
        assert keys.dtype == self.options["kv_data_type"]
        assert queries.shape == (len(self.lengths), self.heads, self.dims[2])
        Wrapper.seen.append((self.lengths, keys.dtype, self.options["sm_scale"]))
        return queries


@pytest.fixture
def flashinfer(monkeypatch):
    """A module of that name, which a CPU can run."""
    module = ModuleType("flashinfer")
    module.BatchDecodeWithPagedKVCacheWrapper, module.__spec__ = Wrapper, ModuleSpec("flashinfer", None)
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    monkeypatch.setattr(Wrapper, "seen", [])
    monkeypatch.setattr(baselines, "_WORKSPACE", 16)
    return module


def run_anywhere(name, lengths=(100, 33)):
    step, copies = baselines._flashinfer_step(default_subject("smollm2-135m", 4), lengths, name, CPU)
    step(copies - 1)


@pytest.mark.parametrize(("name", "dtype"), [("flashinfer", torch.bfloat16), ("fp8", torch.float8_e4m3fn)])
def test_flashinfer_is_given_pages_of_both_lengths(flashinfer, name, dtype):
    run_anywhere(name)
    assert Wrapper.seen == [([100, 33], dtype, 64**-0.5)]


@pytest.mark.parametrize("error", [ValueError, NotImplementedError, TypeError])
def test_what_another_library_says_is_the_reason(flashinfer, monkeypatch, error):
    monkeypatch.setattr(Wrapper, "refuses", error)
    monkeypatch.setattr(baselines, "time_step", lambda step, copies, device: step(0))
    subject = default_subject("smollm2-135m", 4)
    cuda = torch.device("cuda")
    monkeypatch.setattr(
        baselines, "_flashinfer_step", lambda s, n, name, d, f=baselines._flashinfer_step: f(s, n, name, CPU)
    )
    assert baselines.time_full(subject, [64], "fp8", cuda) == "refused: unsupported head_dim"


def test_without_flashinfer_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(baselines, "find_spec", lambda name: None)
    for name in ("flashinfer", "fp8"):
        found = baselines.time_full(default_subject("smollm2-135m", 4), [64], name, torch.device("cuda"))
        assert found == "needs FlashInfer: pip install flashinfer-python"


def test_torch_attends_to_each_length_of_a_ragged_batch():
    subject = default_subject("smollm2-135m", 4)
    assert isinstance(baselines.time_full(subject, [64, 64], "math", CPU), Timing)
    step, _ = baselines._torch_step(subject, [64, 65], "math", CPU)
    assert [tuple(out.shape) for out in step(0)] == [(1, 9, 1, 64)] * 2
    step, _ = baselines._torch_step(subject, [64, 64], "math", CPU)
    assert [tuple(out.shape) for out in step(0)] == [(2, 9, 1, 64)]


def test_a_baseline_is_never_left_out_in_silence(monkeypatch):
    monkeypatch.setattr("kvtool.bench.run.bandwidth", lambda device: {"copy": 1e9, "read": 1e9})
    asked = ["bench", "--model-shape", "smollm2-135m", "--context", "64", "--baseline", "flash,flashinfer,fp8"]
    done = CliRunner().invoke(app, [*asked, "--json"])
    assert done.exit_code == 0, done.output
    step = next(r for r in map(json.loads, done.stdout.splitlines()) if r["record"] == "step")
    assert step["baselines_ms"].keys() == {"math", "flash", "flashinfer", "fp8"}
    assert step["baselines_not_run"] == dict.fromkeys(("flash", "flashinfer", "fp8"), "needs a GPU")
    for name in ("flash", "flashinfer", "fp8"):
        assert f"not run: {name} needs a GPU" in done.stderr
    assert "fp8 cache" in CliRunner().invoke(app, asked).stdout


def test_an_fp8_cache_is_no_full_cache(monkeypatch):
    """What is faster because it is smaller does not lower the speedup over the full cache."""
    from kvtool.bench import run

    times = {"flash": Timing(4.0, 0.0), "fp8": Timing(2.0, 0.0), "math": "needs patience"}
    monkeypatch.setattr(run, "time_full", lambda subject, lengths, name, device: times[name])
    monkeypatch.setattr(run, "bandwidth", lambda device: {"copy": 1e9, "read": 1e9})
    request = run.Request([64], baselines=["flash", "fp8"])
    step = list(run.bench(default_subject("smollm2-135m", 4), request, CPU))[1]
    assert step["speedup"] == pytest.approx(4.0 / step["ms"])
    assert step["baselines_ms"] == {"math": None, "flash": 4.0, "fp8": 2.0}
