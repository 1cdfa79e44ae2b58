"""However a cache lies, with room, in a pool, of different lengths, what is timed attends to the same tokens."""

import json

import pytest
import torch
from typer.testing import CliRunner

from kvtool.attention import relative_error
from kvtool.backends import Backend
from kvtool.bench import default_subject
from kvtool.bench.layout import LAYOUTS, check_layout, lay_out, page_counts
from kvtool.bench.numerics import attend, check_numerics
from kvtool.bench.subject import MODEL_SHAPES, Subject
from kvtool.cli import app
from kvtool.errors import BackendError, InputError
from kvtool.kernels import turboquant
from kvtool.methods import make_method
from kvtool.methods.base import LayerCalibration

CPU = torch.device("cpu")
SHAPE = MODEL_SHAPES["smollm2-135m"]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def subject_of(name, **options):
    method = make_method(name, options)
    return Subject(method, LayerCalibration(0, SHAPE, None, method.fit_layer(SHAPE, None, (), layer=0)), "a test")


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["turboquant", "affine", "exact"])
def test_every_layout_is_the_same_cache_to_the_reference(name, layout, ragged):
    subject = default_subject("smollm2-135m", 3) if name == "turboquant" else subject_of(name)
    if name == "exact" and layout == "table":
        with pytest.raises(BackendError, match="single tokens"):
            check_numerics(subject, Backend("reference"), CPU, layout=layout, ragged=ragged)
        return
    assert check_numerics(subject, Backend("reference"), CPU, layout=layout, ragged=ragged) < 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_kernel_reads_every_layout(layout):
    subject = default_subject("smollm2-135m", 4).to(DEVICE)
    counts = page_counts(4, 2, ragged=True)
    laid = lay_out(subject.cache(256, 2, DEVICE), layout, counts)
    queries = subject.queries(2, DEVICE).float()
    exact = attend(subject, Backend("reference"), queries, laid)
    found = attend(subject, Backend("triton", turboquant), queries, laid)
    assert relative_error(found, exact) < 3e-3  # weights of 15 bits


def test_a_pool_is_shuffled_and_its_table_leads_back():
    subject = default_subject("smollm2-135m", 2)
    kv = subject.cache(512, 2, CPU)
    laid = lay_out(kv, "table", [8, 8])
    assert laid.page_table.shape == (2, 8)
    assert not torch.equal(laid.page_table.flatten(), torch.arange(16))
    assert laid.kv.key_pages.shape == (1, 3, 16, kv.key_pages.shape[-1])
    for b in range(2):
        assert torch.equal(laid.kv.key_pages[0][:, laid.page_table[b]], kv.key_pages[b])


def test_what_ignores_the_table_or_the_lengths_is_not_timed():
    class Ignores:
        def attend(self, method, queries, kv, layer, *, positions, scale, softcap=None, gluon=False, **ignored):
            pages = {name: x for name, x in ignored.items() if name != ignorant and x is not None}
            return Backend("reference").attend(
                method, queries, kv, layer, positions=positions, scale=scale, softcap=softcap, **pages
            )

    subject = default_subject("smollm2-135m", 4)
    for ignorant, layout in (("pages", "room"), ("pages", "whole")):
        with pytest.raises(BackendError, match="nothing was timed"):
            check_numerics(subject, Backend("triton", Ignores()), CPU, layout=layout, ragged=True)


def test_lengths_of_a_ragged_batch_go_down_to_half():
    assert page_counts(100, 3, ragged=True) == [100, 75, 50]
    assert page_counts(7, 1, ragged=True) == [7]
    assert page_counts(1, 4, ragged=True) == [1, 1, 1, 1]
    assert page_counts(5, 2, ragged=False) == [5, 5]


def test_what_cannot_be_read_so_is_refused_in_one_sentence():
    reference = Backend("reference")
    for name, options in (("eviction", {"policy": "snapkv"}), ("tiered", {}), ("rabitq", {"mode": "topp"})):
        subject = Subject(make_method(name, options), LayerCalibration(0, SHAPE, None, {}), "a test")
        for layout, ragged in (("room", False), ("table", False), ("whole", True)):
            with pytest.raises(BackendError, match=f"found {name} on reference; "):
                check_layout(layout, ragged, reference, subject)
        check_layout("whole", False, reference, subject)


def test_the_command_line_tells_lengths_and_counts_their_bytes(monkeypatch):
    monkeypatch.setattr("kvtool.bench.run.bandwidth", lambda device: {"copy": 1e9, "read": 1e9})
    asked = ["bench", "--model-shape", "smollm2-135m", "--context", "300", "--batch", "2", "--ragged", "--json"]
    done = CliRunner().invoke(app, [*asked, "--layout", "table"])
    assert done.exit_code == 0, done.output
    machine, step, _, predicted = (json.loads(line) for line in done.stdout.splitlines())
    assert (step["layout"], step["lengths"]) == ("table", [300, 172])
    assert step["bytes"] == machine["bytes_per_token"] * 64 * (4 + 2)
    assert step["full_bytes"] == machine["full_bytes_per_token"] * 472
    assert predicted["floor_ms"]["L40S"]["full"] == pytest.approx(1e3 * step["full_bytes"] / 0.864e12)
    refused = CliRunner().invoke(app, [*asked, "--layout", "heap"])
    assert isinstance(refused.exception, InputError)
