"""``kvtool capture``: one line before, one table or object after, and a sentence when something does not fit."""

import json

import pytest

from kvtool.capture import Capture
from kvtool.cli import main


@pytest.fixture(scope="module")
def model(make_tiny, tmp_path_factory):
    """The tiny model as a directory."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    tiny = make_tiny()
    tiny.model.save_pretrained(path)
    tiny.tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture
def capture(model, capsys):
    """``capture(*options)``: exit status, stdout, stderr of the command on the tiny model and CPU."""

    def call(*options, name=model):
        capsys.readouterr()
        status = main(["capture", name, "--device", "cpu", "--context", "128", *options])
        return status, *capsys.readouterr()

    return call


def test_without_an_out_it_goes_home_and_is_remembered(capture, kvtool_home):
    status, out, err = capture("--json")
    assert status == 0
    record = json.loads(out)
    assert record["path"].startswith(str(kvtool_home / "captures" / "tiny-128-"))
    assert json.loads((kvtool_home / "newest.json").read_text())["capture"] == record["path"]
    made = Capture.open(record["path"])
    assert made.sha256 == record["sha256"]
    assert made.layers == record["layers"] == [0, 1]
    assert made.manifest.text == "austen"
    assert "capturing 2 of 2 layers" in err
    # the same again is the same capture, and done at once
    assert json.loads(capture("--json")[1])["sha256"] == record["sha256"]


def test_dry_run_writes_nothing(capture, tmp_path):
    status, out, _ = capture("--dry-run", "--json", "--out", str(tmp_path / "c"))
    assert status == 0
    record = json.loads(out)
    assert record["dry_run"] is True
    # keys and values of 2 heads, queries of 4, 32 channels, 2 layers, bfloat16; the stream's size, float32, per layer
    assert record["bytes"] == 128 * (2 * 2 + 4) * 32 * 2 * 2 + 128 * 2 * 4
    assert record["estimated_seconds"] >= 0
    assert not list(tmp_path.iterdir())


def test_table_names_what_was_captured(capture, tmp_path):
    status, out, _ = capture("--out", str(tmp_path / "c"), "--layers", "1", "--queries", "8", "--text", "kjv")
    assert status == 0
    assert "captured 1 of 2" in out
    assert "kjv, 1 x 128 tokens" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--context", "0"), "length '0'"),
        (("--layers", "5"), "outside 0-1"),
        (("--text", "nosuch"), "none of the shipped texts"),
        (("--context", "8m"), "tokens, 1 x 8388608 are needed"),
        (("--dtype", "int3"), "dtype 'int3'"),
        (("--queries", "few"), "queries 'few'"),
        (("--device", "abacus"), "device 'abacus'"),
        (("--samples", "0"), "--samples"),
    ],
)
def test_bad_option_is_one_sentence(capture, options, message):
    status, out, err = capture(*options)
    assert status == 2
    assert message in err
    assert not out
    assert "Traceback" not in err


def test_missing_model_is_one_sentence(capture):
    status, _, err = capture(name="./nosuch")
    assert status == 2
    assert "no such directory" in err
