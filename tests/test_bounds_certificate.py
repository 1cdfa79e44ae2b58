"""verify-bound from the command line: certificates are written, run again bit for bit, and refuse changed inputs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kvtool import home
from kvtool.capture import record
from kvtool.cli import main

RABITQ = ["--rotations", "8", "--keys", "64", "--queries", "16", "--delta", "0.2"]


@pytest.fixture
def artifact(tiny_capture) -> Path:  # type: ignore[no-untyped-def]
    """A top-p sketch fitted to the tiny capture."""
    path = home.home() / "sketch.safetensors"
    options = ["-o", "mode", "topp", "--window", "16", "--out", str(path)]
    assert main(["calibrate", str(tiny_capture.path), "--method", "rabitq", *options]) == 0
    return path


def verify(*arguments: object) -> int:
    return main(["verify-bound", *map(str, arguments)])


def test_a_capture_is_certified_and_the_certificate_reproduced(tiny_capture, capsys) -> None:  # type: ignore[no-untyped-def]
    out = home.home() / "c.json"
    # a random model has no structure to speak of: the rate is near the worst case, so delta is asked for
    assert verify(tiny_capture.path, *RABITQ, "--bits", "1,2", "--out", out, "--json") == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(r["layer"], r["bits"], r["head"]) for r in records] == [
        (layer, bits, head) for layer in (0, 1) for bits in (1, 2) for head in (0, 1)
    ]
    certificate = json.loads(out.read_text())
    assert certificate["holds"]
    assert certificate["inputs"]["capture_sha256"] == tiny_capture.sha256
    assert set(certificate["inputs"]["layers"]) == {"0", "1"}
    assert certificate["settings"]["seed"] == 0
    assert home.newest("certificate", "") == out
    assert verify("--check", out) == 0
    assert "bit for bit" in capsys.readouterr().err


def test_another_seed_draws_other_rotations(tiny_capture) -> None:  # type: ignore[no-untyped-def]
    first, second = home.home() / "1.json", home.home() / "2.json"
    verify(tiny_capture.path, *RABITQ, "--out", first, "--layers", "0")
    verify(tiny_capture.path, *RABITQ, "--out", second, "--layers", "0", "--seed", "1")
    results = [json.loads(path.read_text())["results"][0]["bulk"] for path in (first, second)]
    assert results[0]["rate"] != results[1]["rate"]
    assert results[0]["predicted"] == results[1]["predicted"]


def test_a_certificate_with_other_numbers_is_found_out(tiny_capture, capsys) -> None:  # type: ignore[no-untyped-def]
    out = home.home() / "c.json"
    verify(tiny_capture.path, *RABITQ, "--out", out, "--layers", "0")
    forged = json.loads(out.read_text())
    forged["results"][1]["bulk"]["violations"] -= 1
    out.write_text(json.dumps(forged))
    assert verify("--check", out) == 1
    assert "results[1].bulk.violations" in capsys.readouterr().err


def test_a_certificate_whose_inputs_changed_is_refused(tiny_capture, capsys) -> None:  # type: ignore[no-untyped-def]
    out = home.home() / "c.json"
    verify(tiny_capture.path, *RABITQ, "--out", out, "--layers", "0")
    forged = json.loads(out.read_text())
    forged["inputs"]["capture_sha256"] = "0" * 64
    out.write_text(json.dumps(forged))
    assert verify("--check", out) == 2
    assert "has changed since" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "[]", '{"certificate": 9}', '{"certificate": 1}'])
def test_what_is_no_certificate_is_refused(text: str, capsys) -> None:  # type: ignore[no-untyped-def]
    path = home.home() / "x.json"
    path.write_text(text)
    assert verify("--check", path) == 2
    assert "certificate" in capsys.readouterr().err


def test_a_rate_above_delta_exits_with_one(tiny_capture, capsys) -> None:  # type: ignore[no-untyped-def]
    assert verify(tiny_capture.path, *RABITQ[:-1], "0.001", "--layers", "0") == 1
    assert "rate limit" in capsys.readouterr().err


def test_without_arguments_the_newest_calibration_is_verified(artifact: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    # the held-out quarter of the tiny capture is 48 tokens, less than a page: one sentence says so
    assert verify() == 2
    said = capsys.readouterr().err
    assert str(artifact) in said.replace("\n", "")
    assert "held-out tokens" in said


def test_nothing_fitted_yet_is_one_sentence(capsys) -> None:  # type: ignore[no-untyped-def]
    assert verify() == 2
    assert "kvtool calibrate" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["--bits", "0"], ["--epsilon", "0"], ["--top-p", "1.5"], ["--rotations", "2"], ["--layers", "7"]]
)
def test_bad_options_exit_with_two(arguments: list[str], tiny_capture, capsys) -> None:  # type: ignore[no-untyped-def]
    assert verify(tiny_capture.path, *arguments) == 2
    assert capsys.readouterr().err.count("\n") <= 3


def test_top_p_readers_are_compared_at_equal_bytes(artifact: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    capsys.readouterr()
    assert verify(artifact, "--top-p", ".5,.9", "--json") == 0
    rows = {(r["p"], r["reader"]): r for r in map(json.loads, capsys.readouterr().out.splitlines())}
    assert {reader for _, reader in rows} == {"rescored", "estimate", "top-k", "quest", "oracle"}
    for p in (0.5, 0.9):
        assert rows[p, "oracle"]["mass"] >= p
        assert rows[p, "rescored"]["mass"] >= p
        assert rows[p, "oracle"]["tokens"] <= rows[p, "rescored"]["tokens"] <= rows[p, "rescored"]["context"] == 128
        # below the bytes that were to be matched by less than what every query head may read more: a token, or a page
        spent = rows[p, "rescored"]["bytes"]
        row, heads = 2 * 32 * 4, 2 * 4
        assert spent - heads * row < rows[p, "top-k"]["bytes"] <= spent
        assert spent - heads * 16 * row < rows[p, "quest"]["bytes"] <= spent
        assert all(rows[p, reader]["bounded"] for reader in ("rescored", "estimate", "top-k", "quest", "oracle"))
    assert rows[0.9, "rescored"]["output_error"] < rows[0.5, "rescored"]["output_error"]


def test_top_p_reading_is_measured_on_another_text(artifact: Path, tiny_model, tiny_capture, tmp_path, capsys) -> None:  # type: ignore[no-untyped-def]
    """What was fitted to one text, centres of keys and queries, is read by on another, of another length."""
    other = record(tiny_model, tmp_path / "other", text="Z9 " * 1000, context=320, samples=1, dtype="float32")
    masses = []
    for capture in (tiny_capture, other):
        capsys.readouterr()
        assert verify(artifact, "--capture", capture.path, "--top-p", ".9", "--json") == 0
        rows = {r["reader"]: r for r in map(json.loads, capsys.readouterr().out.splitlines())}
        assert rows["rescored"]["mass"] >= 0.9
        assert all(row["bounded"] for row in rows.values())
        masses.append((rows["rescored"]["context"], rows["oracle"]["mass"]))
    assert masses[0][0] == 128 < masses[1][0] == 256
    assert masses[0][1] != masses[1][1]


_PEAK = """
import resource, torch
from kvtool.bounds.sparsity import compare
from kvtool.calibration import Calibration
from kvtool.capture import LayerSample
from kvtool.methods.rabitq import RaBitQ
from kvtool.shapes import CacheShape, LayerKind, LayerShape

T = 16384
layer = LayerShape(kind=LayerKind.FULL, num_heads=3, num_kv_heads=1, head_dim=64, scale=0.125)
keys, values, queries = (torch.randn(n, T, 64) for n in (1, 1, 3))
at = torch.arange(T)

class Text:
    shape, layers = CacheShape(layers=(layer,)), [0]
    samples = staticmethod(lambda index: iter([LayerSample(0, 0, layer, None, keys, values, at, queries, at)]))

method = RaBitQ(mode="topp")
calibration = Calibration(method, Text.shape, method.fit(Text))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
assert all(reading.bounded for reading in compare(calibration, Text, [0.9]))
print((peak() - before) // 1024)
"""


def test_top_p_reading_of_a_long_text_needs_little_memory() -> None:
    found = subprocess.run([sys.executable, "-c", _PEAK], capture_output=True, text=True, check=True)
    # logits of 48 queries are 3 MiB, of which two dozen live at once; a vector for each of them would be 192
    assert int(found.stdout) < 120


def test_top_p_needs_a_sketch(tiny_capture, capsys) -> None:  # type: ignore[no-untyped-def]
    assert verify(tiny_capture.path, "--method", "exact", "--top-p", ".9") == 2
    assert "mode topp" in capsys.readouterr().err
