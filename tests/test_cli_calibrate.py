"""``kvtool calibrate`` as a user meets it."""

import json

import pytest

from kvtool import home
from kvtool.calibration import Calibration
from kvtool.cli import main


@pytest.fixture
def captured(tiny_capture):
    home.remember("capture", tiny_capture.path)
    return tiny_capture


def run(*arguments):
    return main(["calibrate", *map(str, arguments)])


def test_no_arguments_use_the_newest_capture_and_say_which(captured, capsys):
    assert run() == 0
    out, err = capsys.readouterr()
    assert str(captured.path) in err.replace("\n", "")
    assert "attention-output error on held-out tokens" in err.replace("\n", " ")
    assert "data-free" in out
    assert home.newest("calibration", "kvtool calibrate").name.startswith("tiny-turboquant-k3v3")


def test_json_has_the_documented_keys(captured, tmp_path, capsys):
    assert run(captured.path, "--bits", "k4v2", "--out", tmp_path / "a.safetensors", "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert set(record) == {
        *("path", "method", "options", "policy", "model", "capture", "kept", "verdict"),
        *("fitted", "data_free", "difference", "standard_error", "finetune", "layers"),
    }
    assert record["path"] == str(tmp_path / "a.safetensors")
    assert (record["options"]["k_bits"], record["options"]["v_bits"]) == (4, 2)
    assert [layer["layer"] for layer in record["layers"]] == [0, 1]


def test_options_reach_the_method_and_the_policy(captured, tmp_path):
    out = tmp_path / "a.safetensors"
    words = [
        "--method",
        "affine",
        "-o",
        "k_axis",
        "token",
        "--option",
        "k_group",
        "0",
        "--k-bits",
        "8",
        "--v-bits",
        "2",
    ]
    assert run(*words, "--sinks", "2", "--window", "16", "--exact-layers", "1", "--out", out) == 0
    made = Calibration.load(out)
    assert (made.method.k_axis, made.method.k_group, made.method.k_bits, made.method.v_bits) == ("token", 0, 8, 2)
    assert (made.policy.sinks, made.policy.window, made.policy.exact_layers) == (2, 16, (1,))
    assert made.provenance["command"].startswith("kvtool")


def test_name_equals_value_is_understood_too(captured, tmp_path):
    assert run("-o", "seed=3", "-o", "mean", "none", "--out", tmp_path / "a.safetensors") == 0
    assert Calibration.load(tmp_path / "a.safetensors").method.seed == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "turbo"], "no method 'turbo'; did you mean 'turboquant'?"),
        (["-o", "sede", "1"], "turboquant has no option 'sede'; did you mean 'seed'?"),
        (["-o", "seed"], "-o seed: expected a name and a value"),
        (["-o", "seed", "x"], "turboquant seed='x'"),
        (["--bits", "5"], "expected one of 1, 2, 2.5, 3, 3.5, 4, 8"),
        (["--bits", "three"], "bits 'three': expected a number such as 3 or a pair such as k4v3"),
        (["--bits", "3", "--k-bits", "4"], "k_bits: given twice, as 3 and 4"),
        (["--bits", "3", "--method", "exact"], "--bits 3: exact has no such choice"),
        (["--exact-layers", "7"], "layers '7': 7 is outside 0-1"),
        (["/nowhere"], "/nowhere: no such directory"),
        (["--sinks", "-1"], "greater than or equal to 0"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_2(captured, arguments, message, capsys, kvtool_home):
    assert run(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert "Traceback" not in err
    assert not (kvtool_home / "calibrations").exists()


def test_without_a_capture_it_says_how_to_make_one(capsys):
    assert run() == 2
    assert "no capture yet; run 'kvtool capture' first or name a path" in capsys.readouterr().err
