"""An evaluation reads back what was stored, notices when it was not, and computes the full cache's side once."""

import json
from pathlib import Path
from typing import ClassVar, NamedTuple

import pytest
import torch
import typer
from pydantic.dataclasses import dataclass
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM
from typer.testing import CliRunner

from kvtool.calibration import Calibration
from kvtool.errors import InputError, ModelError
from kvtool.evaluate import reference
from kvtool.evaluate.contestants import Contestant, from_files, parse_baselines
from kvtool.evaluate.measure import continue_segments
from kvtool.evaluate.reference import Store, prune, segments
from kvtool.evaluate.run import Corpus, Protocol, evaluate
from kvtool.evaluate.table import markdown
from kvtool.methods import make_method
from kvtool.methods.base import Decompressed, Method
from kvtool.methods.fp8 import Fp8
from kvtool.policy import CachePolicy

SMALL = Protocol(
    prefix=256, score=48, segments=3, chunk=16, passkey_context=700, passkey_trials=2, tasks=("kld", "passkey")
)
HAY = "The cat sat on the mat. It was warm there! Was it late? No one knew, and no one asked. " * 30


def corpus(loaded, text=HAY):
    return Corpus("hay", "sha of hay", loaded.tokenizer(text)["input_ids"])


def run(loaded, contestants, protocol=SMALL, **changes):
    own = corpus(loaded)
    return evaluate(loaded, contestants, protocol, text=changes.get("text", own), haystack=own)


def contestant(loaded, method="fp8", window=0, sinks=0, **options):
    calibration = Calibration(
        make_method(method, options), loaded.shape, policy=CachePolicy(sinks=sinks, window=window)
    )
    return Contestant(f"my {method}", calibration, Path("mine.safetensors"))


@pytest.fixture(scope="module")
def result(tiny_model, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVTOOL_HOME", str(tmp_path_factory.mktemp("home")))
        return run(tiny_model, [*parse_baselines("fp8,int8,kivi4,kivi2,exact", tiny_model.shape)])


def rows_by_name(result):
    return {row["name"]: row for row in result.rows}


def test_the_no_op_has_no_drift_at_all_and_that_is_right(result):
    exact = rows_by_name(result)["exact"]
    assert exact["kld"] == exact["kld_max"] == 0
    assert exact["ppl"] == exact["ppl_full"]
    assert exact["same_top"] == 1
    assert result.problems == []


def test_every_baseline_drifts_in_the_order_of_its_precision(result):
    rows = rows_by_name(result)
    assert set(rows) == {"full", "exact", "fp8", "int8", "kivi4", "kivi2"}
    assert rows["full"]["kld"] == 0
    assert 0 < rows["int8"]["kld"] < rows["kivi4"]["kld"] < rows["kivi2"]["kld"]
    assert 0 < rows["int8"]["attention_error"] < rows["kivi4"]["attention_error"] < rows["kivi2"]["attention_error"]


def test_bits_are_those_of_the_bytes(result):
    rows = rows_by_name(result)
    # 8 bits and an fp16 scale and minimum per token and head of 32 channels
    assert rows["int8"]["bits"] == 8 + 32 / 32
    # 128 of 256 tokens are exact at 16 bits; the others have 4 bits, scale and minimum per group of 32
    assert rows["kivi4"]["bits"] == (16 + (4 + 1)) / 2
    values = 2 * 256 * 2 * 32 * 2  # K and V, tokens, heads, channels, layers
    assert rows["kivi4"]["bytes_stored"] == values * rows["kivi4"]["bits"] / 8
    assert rows["full"]["bits"] == rows["exact"]["bits"] == 16
    assert [row["bits"] for row in result.rows] == sorted(row["bits"] for row in result.rows)


def test_rows_carry_both_tasks_and_their_protocol(result):
    for row in result.rows:
        assert row["passkey_trials"] == 2
        assert 0 <= row["passkey_low"] <= row["passkey"] <= row["passkey_high"] <= 1
        assert [(at["from"], at["to"]) for at in row["positions"]] == [(256, 268), (268, 280), (280, 292), (292, 304)]
        assert (row["prefix"], row["score"], row["segments"], row["model"]) == (256, 48, 3, "tiny")
        assert json.loads(json.dumps(row, allow_nan=False)) == row


def test_the_table_shows_every_row_and_what_its_columns_mean(result):
    text = markdown(result.rows)
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(lines) == 1 + len(result.rows)
    assert "KLD in nats, +- one standard error over segments" in text
    assert "256 tokens compressed, then 48 scored" in text


class KeptKV(NamedTuple):
    """What it pretends to have compressed."""

    keys: Tensor
    values: Tensor


@dataclass(frozen=True)
class Unread(Method):
    """Stores codes, attends to the originals: the fault of every evaluation that scores one forward pass."""

    name: ClassVar[str] = "unread"
    paper: ClassVar[str] = ""
    summary: ClassVar[str] = ""

    def compress(self, keys, values, layer, *, positions, queries=None, carry=None):
        return KeptKV(keys, values), None

    def decompress(self, kv, layer, *, positions):
        return Decompressed(kv.keys, kv.values)


def test_a_cache_that_is_not_read_back_is_caught(tiny_model):
    calibration = Calibration(Unread(), tiny_model.shape, policy=CachePolicy(sinks=0, window=0))
    found = run(tiny_model, [Contestant("liar", calibration)], Protocol(**{**vars(SMALL), "tasks": ("kld",)}))
    assert found.problems == [
        "liar: the drift is exactly zero, so the compressed cache was not read",
        "liar: attention of layers 0, 1 is exact, so what was stored was not read",
    ]


def test_logits_that_are_not_numbers_are_caught(tiny_model, monkeypatch):
    decompress = Unread.decompress

    def broken(self, kv, layer, *, positions):
        keys, values, _ = decompress(self, kv, layer, positions=positions)
        return Decompressed(keys, values * torch.nan)

    monkeypatch.setattr(Unread, "decompress", broken)
    calibration = Calibration(Unread(), tiny_model.shape, policy=CachePolicy(sinks=0, window=0))
    found = run(tiny_model, [Contestant("broken", calibration)], Protocol(**{**vars(SMALL), "tasks": ("kld",)}))
    assert found.problems == ["broken: the logits are not finite on 144 tokens"]
    assert found.rows[0]["kld"] is None


def test_the_full_cache_is_computed_once(tiny_model, monkeypatch):
    first = run(tiny_model, [contestant(tiny_model)])
    monkeypatch.setattr(reference, "exact_prefill", lambda *a, **k: pytest.fail("prefilled again"))
    monkeypatch.setattr(reference, "_compute", lambda *a, **k: pytest.fail("scored again"))
    kld = Protocol(**{**vars(SMALL), "tasks": ("kld",)})
    second = run(tiny_model, [contestant(tiny_model)], kld)
    for key in ("kld", "kld_max", "ppl", "ppl_full", "attention_error", "bits"):
        assert second.rows[0][key] == first.rows[0][key]


@pytest.mark.parametrize("change", [{"prefix": 192}, {"segments": 2}, {"chunk": 24}, {"score": 32}])
def test_another_protocol_does_not_take_the_old_results(tiny_model, monkeypatch, change):
    kld = {**vars(SMALL), "tasks": ("kld",)}
    run(tiny_model, [contestant(tiny_model)], Protocol(**kld))
    computed = []
    compute = reference._compute
    monkeypatch.setattr(reference, "_compute", lambda *a, **k: computed.append(1) or compute(*a, **k))
    run(tiny_model, [contestant(tiny_model)], Protocol(**(kld | change)))
    assert len(computed) == (kld | change)["segments"]


def test_stored_states_give_back_capped_logits_and_sliding_layers(kvtool_home):
    torch.manual_seed(0)
    sizes = dict(vocab_size=97, hidden_size=64, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2)
    config = Gemma2Config(**sizes, num_hidden_layers=4, head_dim=16, sliding_window=32, final_logit_softcapping=3.0)
    model = Gemma2ForCausalLM(config).eval().requires_grad_(False)
    ids = torch.randint(3, 97, (2, 133))
    with torch.inference_mode():
        store = Store.of(test="gemma")
        first = list(segments(model, ids, store, prefix=100, chunk=20))
        assert set(store.load("0")) == {"states", *(f"queries.{i}" for i in range(4))}
        again = list(segments(model, ids, store, prefix=100, chunk=20))
    for a, b in zip(first, again, strict=True):
        assert a.logits.abs().max() <= 3
        assert torch.equal(a.logits, b.logits)
        assert a.logits.shape == (32, 97)
        assert a.prefill.cache.get_seq_length() == b.prefill.cache.get_seq_length() == 100


def test_logits_that_states_do_not_give_back_are_stored_themselves(tiny_model, monkeypatch):
    project = reference._project
    monkeypatch.setattr(reference, "_project", lambda model, states: project(model, states) * 2)
    ids = torch.randint(0, 97, (1, 81))
    with torch.inference_mode():
        store = Store.of(test="scaled")
        (first,) = segments(tiny_model.model, ids, store, prefix=64, chunk=8)
        assert "logits" in store.load("0")
        (again,) = segments(tiny_model.model, ids, store, prefix=64, chunk=8)
    assert torch.equal(first.logits, again.logits)


def test_what_a_method_notes_of_its_pages_is_in_the_row_and_the_caption(tiny_model, monkeypatch):
    monkeypatch.setattr(Fp8, "notes", lambda self, kv: {"of pages odd": 0.125})
    for task in ("kld", "passkey"):
        found = run(tiny_model, [contestant(tiny_model)], Protocol(**vars(SMALL) | {"tasks": (task,)})).rows
        (row,) = (row for row in found if row["kind"] == "calibration")
        assert row["notes"] == {"of pages odd": 0.125}
        assert "my fp8: 12.5% of pages odd" in markdown(found)


@pytest.mark.parametrize(
    ("steps", "tasks", "segments", "trials"), [(5, ["kld"], 2, None), (9, ["kld", "passkey"], 3, 1)]
)
def test_an_interrupted_run_keeps_what_all_had_finished(tiny_model, steps, tasks, segments, trials):
    calls = []

    def stop(done, total):
        calls.append(done)
        if done == steps:
            raise KeyboardInterrupt

    own, contestants = corpus(tiny_model), [contestant(tiny_model), Contestant("full", None)]
    found = evaluate(tiny_model, contestants, SMALL, text=own, haystack=own, progress=stop)
    assert isinstance(found.stopped, KeyboardInterrupt)
    for row in found.rows:
        assert row["tasks"] == tasks
        assert row["segments"] == segments
        assert (row["passkey_trials"] if "passkey" in tasks else None) == trials
    assert "my fp8" in markdown(found.rows)
    calls.clear()
    steps = 1
    with pytest.raises(KeyboardInterrupt):
        evaluate(tiny_model, contestants, SMALL, text=own, haystack=own, progress=lambda done, total: stop(1, total))


def test_generated_text_is_the_models_own_and_depends_on_the_seed_alone(tiny_model):
    ids = torch.randint(3, 97, (3, 61))
    torch.manual_seed(1)
    with torch.inference_mode():
        first, again, other = (continue_segments(tiny_model.model, ids, prefix=40, seed=seed) for seed in (0, 0, 1))
    assert first.shape == ids.shape
    assert torch.equal(first[:, :40], ids[:, :40])
    assert torch.equal(first, again)
    assert not torch.equal(first[:, 40:], other[:, 40:])
    protocol = Protocol(**vars(SMALL) | {"tasks": ("kld",), "generated": True})
    (row,) = (row for row in run(tiny_model, [contestant(tiny_model)], protocol).rows if row["kind"] == "calibration")
    assert row["generated"]
    assert row["kld"] > 0


def test_a_disk_that_is_full_costs_time_only(tiny_model, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(reference, "save_file", full)
    kld = Protocol(**{**vars(SMALL), "tasks": ("kld",)})
    assert run(tiny_model, [contestant(tiny_model)], kld).rows[0]["kld"] > 0


def test_the_store_stays_below_its_limit(tmp_path):
    for i in range(4):
        (tmp_path / f"s{i}").mkdir()
        (tmp_path / f"s{i}" / "0.safetensors").write_bytes(bytes(100))
    prune(tmp_path, keep=tmp_path / "s0", limit=250)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s0", "s3"]


def test_recall_of_the_full_cache_is_kept_too(tiny_model, monkeypatch):
    passkey = Protocol(**{**vars(SMALL), "tasks": ("passkey",)})
    first = run(tiny_model, [contestant(tiny_model), *parse_baselines("none", tiny_model.shape)], passkey)
    monkeypatch.setattr("kvtool.evaluate.run.fork", lambda *a: pytest.fail("asked again"))
    second = run(tiny_model, [contestant(tiny_model), *parse_baselines("none", tiny_model.shape)], passkey)
    assert [row["passkey_margin"] for row in first.rows] == [row["passkey_margin"] for row in second.rows]


@pytest.mark.parametrize(
    ("protocol", "message"),
    [
        ({"prefix": 1000}, "--text: 3 segments of 1049 tokens need 3147 tokens, found 2610"),
        ({"prefix": 60}, "--prefix 60: my fp8 compresses nothing of it, with 0 sinks and a window of 0"),
    ],
)
def test_a_protocol_that_cannot_be_run_is_refused(tiny_model, protocol, message):
    with pytest.raises(InputError) as error:
        run(tiny_model, [contestant(tiny_model)], Protocol(**(vars(SMALL) | protocol)))
    assert message in str(error.value)


def test_the_full_cache_alone_is_no_comparison(tiny_model):
    with pytest.raises(InputError, match="nothing to compare"):
        run(tiny_model, parse_baselines("none", tiny_model.shape))


def test_an_unknown_baseline_is_refused_with_the_nearest(tiny_model):
    with pytest.raises(InputError, match="no baseline 'kivi3'; did you mean 'kivi"):
        parse_baselines("fp8,kivi3", tiny_model.shape)


def test_policy_of_an_artifact_can_be_overridden(tiny_model, tmp_path):
    path = Calibration(make_method("fp8"), tiny_model.shape).save(tmp_path / "a.safetensors")
    other = Calibration(make_method("fp8"), tiny_model.shape).save(tmp_path / "sub" / "a.safetensors")
    one, two = from_files([path, other], sinks=0, window=None)
    assert (one.calibration.policy.sinks, one.calibration.policy.window) == (0, CachePolicy().window)
    # two files of one name are told apart by their paths
    assert (one.name, two.name) == (str(path), str(other))


@pytest.fixture
def command(tiny_model, tmp_path, monkeypatch):
    from kvtool.cli.evaluate import evaluate as evaluate_command

    monkeypatch.setattr("kvtool.models.load_model", lambda *a, **k: tiny_model)
    (tmp_path / "hay.txt").write_text(HAY)
    path = Calibration(make_method("fp8"), tiny_model.shape, policy=CachePolicy(window=64)).save(
        tmp_path / "mine.safetensors"
    )
    app = typer.Typer()
    app.command()(evaluate_command)
    small = ["--prefix=256", "--score=16", "--segments=2", "--chunk=8", "--passkey-context=700", "--passkey-trials=2"]
    texts = ["--text", str(tmp_path / "hay.txt"), "--haystack", str(tmp_path / "hay.txt")]
    return lambda *args: CliRunner().invoke(app, [str(path), *small, *texts, *args])


def test_the_command_prints_one_object_a_row(command, tmp_path):
    done = command("--json", "--baselines", "kivi2", "--out", str(tmp_path / "rows.md"))
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["name"]: row["kind"] for row in rows} == {"full": "full", "mine": "calibration", "kivi2": "baseline"}
    assert "| mine |" in (tmp_path / "rows.md").read_text()


def test_a_model_that_the_artifact_cannot_find_is_asked_for(command, monkeypatch):
    def missing(*_, **__):
        raise ModelError("mine: no such directory")

    monkeypatch.setattr("kvtool.models.load_model", missing)
    failed = command()
    assert isinstance(failed.exception, ModelError)
    assert str(failed.exception).startswith("mine: no such directory; or name it: 'kvtool eval MODEL ")


def test_a_gate_sets_the_exit_status(command):
    assert command("--json", "--baselines", "none", "--tasks", "kld", "--fail-if", "bits>16").exit_code == 0
    failed = command("--json", "--baselines", "none", "--tasks", "kld", "--fail-if", "bits>2")
    assert failed.exit_code == 1
    assert "'bits>2' must not hold" in " ".join(failed.stderr.split())


def test_baselines_are_there_to_compare_with_not_to_pass(command):
    options = ("--json", "--tasks", "kld", "--sinks", "0", "--window", "192")
    kld = {row["name"]: row["kld"] for row in map(json.loads, command(*options).stdout.splitlines())}
    assert kld["mine"] < kld["kivi2"]
    assert command(*options, "--fail-if", f"kld>{(kld['mine'] + kld['kivi2']) / 2:g}").exit_code == 0


def test_the_command_refuses_what_it_does_not_know(command):
    failed = command("--tasks", "kld,paskey")
    assert isinstance(failed.exception, InputError)
    assert "no task 'paskey'; did you mean 'passkey'?" in str(failed.exception)
