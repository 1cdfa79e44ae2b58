"""``kvtool generate`` says what the compressed cache says, and counts what it cost."""

import io
import json

import pytest

from kvtool import cli, generation, models
from kvtool.calibration import Calibration
from kvtool.errors import InputError
from kvtool.methods import make_method
from kvtool.policy import CachePolicy

PROMPT = "The quick brown fox jumps over the lazy dog. " * 6


@pytest.fixture
def exact(tiny_model):
    return Calibration(make_method("exact"), tiny_model.shape, {}, CachePolicy(), {"model": "tiny"})


@pytest.fixture
def artifact(exact, tmp_path, tiny_model, monkeypatch):
    monkeypatch.setattr(models, "load_model", lambda name, **options: tiny_model)
    return str(exact.save(tmp_path / "exact.safetensors"))


def test_the_no_op_says_what_the_full_cache_says(tiny_model, exact):
    ids = generation.encode(tiny_model, PROMPT)
    served = generation.generate(tiny_model, ids, exact, max_new_tokens=40)
    full = generation.generate(tiny_model, ids, None, max_new_tokens=40)
    assert served.ids == full.ids
    assert generation.first_difference(served.ids, full.ids) is None
    assert served.full_bytes == full.full_bytes == full.stored_bytes
    assert full.bits_per_value == 16


def test_pieces_streamed_add_up_to_the_text(tiny_model, exact):
    pieces = []
    ids = generation.encode(tiny_model, PROMPT)
    made = generation.generate(tiny_model, ids, exact, max_new_tokens=20, on_text=pieces.append)
    assert len(pieces) > 1
    assert "".join(pieces) == made.text


def test_half_a_character_is_not_shown():
    class Tokenizer:
        def decode(self, ids, **options):
            return bytes(ids).decode(errors="replace")

    class Ids(list):
        def flatten(self):
            return self

        def tolist(self):
            return list(self)

    pieces = []
    streamer = generation._Streamer(Tokenizer(), pieces.append)
    streamer.put(Ids([1, 2, 3]))
    for byte in "né!".encode():
        streamer.put(Ids([byte]))
    streamer.end()
    assert pieces == ["n", "é", "!"]


@pytest.mark.parametrize(
    ("a", "b", "parted"), [([1, 2], [1, 2], None), ([1, 2], [1, 3], 1), ([1], [1, 2], 1), ([], [], None), ([2], [1], 0)]
)
def test_first_difference(a, b, parted):
    assert generation.first_difference(a, b) == parted


@pytest.mark.parametrize(("prompt", "chat", "message"), [("", None, "found none"), ("x", True, "no chat template")])
def test_a_prompt_that_cannot_be_used_is_refused(tiny_model, prompt, chat, message):
    with pytest.raises(InputError, match=message):
        generation.encode(tiny_model, prompt, chat=chat)


def test_command_prints_text_on_stdout_and_cost_on_stderr(artifact, capsys):
    assert cli.main(["generate", PROMPT, "--calibration", artifact, "--max-new-tokens", "8", "--compare"]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[: len(lines) // 2] == lines[len(lines) // 2 :]
    assert "bits per value" in err
    assert "the same tokens" in err


def test_command_speaks_json_and_reads_stdin(artifact, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(PROMPT))
    assert cli.main(["generate", "-", "--calibration", artifact, "--max-new-tokens", "3", "--compare", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["prompt_tokens"] == len(PROMPT)
    assert len(record["ids"]) == 3
    assert record["first_difference"] is None
    assert record["method"] == "exact"


def test_a_prompt_of_two_tokens_works(artifact, capsys):
    assert cli.main(["generate", "ab", "--calibration", artifact, "--max-new-tokens", "2"]) == 0
    assert "2 + 2 tokens" in capsys.readouterr().err
