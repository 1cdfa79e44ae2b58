"""A capture holds what attention was given, to the bit it says, and is whole or not there."""

import filecmp
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from kvtool.capture import Capture, planning, recording
from kvtool.capture.recording import record, run
from kvtool.errors import CaptureError, InputError, ModelError
from kvtool.models import LoadedModel

TEXT = "".join(random.Random(1).choices("abcdefgh ,.", k=700))

BASE = dict(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=2048,
    pad_token_id=None,
    bos_token_id=None,
    eos_token_id=None,
    initializer_range=0.2,
)
MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=32)
LINEAR = dict(linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=16, linear_value_head_dim=16)
FAMILIES = {
    "llama": ("Llama", {}),
    "qwen2, biased keys": ("Qwen2", {}),
    "qwen3, key norm": ("Qwen3", dict(head_dim=32)),
    "gemma2, softcap": ("Gemma2", dict(head_dim=256, sliding_window=40)),
    "gemma3, two ropes": (
        "Gemma3",
        dict(head_dim=256, sliding_window=40, layer_types=["sliding_attention", "full_attention"] * 2),
    ),
    "phi, partial": ("Phi", dict(partial_rotary_factor=0.5)),
    "phi3, partial, fused": ("Phi3", dict(partial_rotary_factor=0.75)),
    "mistral, sliding": ("Mistral", dict(sliding_window=40, head_dim=16)),
    "qwen2 moe": ("Qwen2Moe", MOE | dict(decoder_sparse_step=1)),
    "qwen3-next, hybrid": ("Qwen3Next", MOE | LINEAR | dict(head_dim=32)),
}


@pytest.fixture
def build(wrap):
    """``build(family)``: a tiny random model of it."""

    def build(family, **overrides):
        name, options = FAMILIES[family]
        config = getattr(transformers, "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config", None)
        if config is None:
            pytest.skip(f"this transformers has no {name}")
        return wrap(getattr(transformers, f"{name}ForCausalLM"), config(**(BASE | options | overrides)), family)

    return build


def same_bytes(a: Path, b: Path) -> bool:
    """Both directories hold the same files with the same bytes."""
    files = [sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()) for root in (a, b)]
    return files[0] == files[1] and filecmp.cmpfiles(a, b, files[0], shallow=False)[0] == files[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_queries_and_keys_give_the_attention_the_model_itself_reports(family, build, tmp_path):
    """One uncut eager forward is the oracle: its attention weights are softmax of our q.k in every layer and head."""
    loaded = build(family)
    capture = record(loaded, tmp_path / "c", text=TEXT, context=100, chunk=32, dtype="float32")
    loaded.model.set_attn_implementation("eager")
    with torch.no_grad():
        theirs = loaded.model(capture.ids, output_attentions=True, use_cache=False).attentions
    theirs = [weights for weights in theirs if weights is not None]
    assert capture.recorded
    for layer in capture.recorded:
        (sample,) = capture.samples(layer)
        shape = sample.shape
        logits = shape.scale * sample.queries @ sample.keys.repeat_interleave(shape.group, 0).transpose(1, 2)
        if shape.softcap:
            logits = shape.softcap * torch.tanh(logits / shape.softcap)
        distance = sample.query_positions[:, None] - sample.positions[None]
        visible = (distance >= 0) & (distance < (shape.window or 1000))
        ours = logits.masked_fill(~visible, -torch.inf).softmax(-1)
        expected = theirs[layer if len(theirs) == 4 else capture.recorded.index(layer)][0]
        # float32, chunked against uncut: sums in another order through four layers
        torch.testing.assert_close(ours, expected, atol=2e-4, rtol=1e-2)


@pytest.mark.parametrize("family", [name for name in FAMILIES if "fused" not in name])
def test_keys_come_back_as_they_were_before_rope(family, build, tmp_path):
    """Against a hook on the key projection (or its norm) in float32: only rounding is lost."""
    loaded = build(family)
    seen: dict[int, torch.Tensor] = {}
    capture = record(loaded, tmp_path / "c", text=TEXT, context=100, chunk=100, dtype="float32")
    for module in loaded.model.modules():
        if hasattr(module, "k_proj"):

            def keep(_, __, out, layer=module.layer_idx):
                seen[layer] = out

            (getattr(module, "k_norm", None) or module.k_proj).register_forward_hook(keep)
    # sdpa of older transformers leaves out the soft cap
    loaded.model.set_attn_implementation("eager")
    with torch.no_grad():
        loaded.model(capture.ids, use_cache=False)
    for layer in capture.recorded:
        (sample,) = capture.samples(layer)
        heads, tokens, width = sample.keys.shape
        before = seen[layer][0].reshape(tokens, heads, width).transpose(0, 1)
        if seen[layer].shape == (1, heads, tokens, width):  # normed after the transposition
            before = seen[layer][0]
        assert sample.rope is not None
        # float32 angles at position 100: 100 * 2^-24 rad
        torch.testing.assert_close(sample.pre_rope_keys(), before, atol=2e-4, rtol=1e-3)
        cos, _ = capture.tables(layer)
        assert cos.shape == (100, len(sample.rope.inv_freq))


def test_bfloat16_capture_loses_rounding_only(tiny_model, tiny_capture, tmp_path):
    options = dict(text_name="text", text=TEXT, context=96, chunk=32)
    full, half = (record(tiny_model, tmp_path / t, dtype=t, **options) for t in ("float32", "bfloat16"))
    for a, b in zip(full.samples(1), half.samples(1), strict=True):
        assert b.keys.dtype == torch.bfloat16
        # 8 bits of precision: half a step is 2^-9, and turning back mixes two channels
        error = (a.pre_rope_keys() - b.pre_rope_keys()).norm() / a.pre_rope_keys().norm()
        assert 1e-4 < error < 2**-9
        assert torch.equal(a.values.bfloat16(), b.values)


def test_several_texts_are_samples_of_one_capture(tiny_model, tmp_path):
    """Each text gives its own samples, the same as alone."""
    other = TEXT.upper()
    both = record(tiny_model, tmp_path / "both", text={"one": TEXT, "other": other}, context=64, samples=2)
    assert (both.manifest.text, both.manifest.samples, len(both.manifest.starts)) == ("one,other", 4, 4)
    alone = [record(tiny_model, tmp_path / t[:3], text=t, context=64, samples=2) for t in (TEXT, other)]
    expected = [sample.keys for capture in alone for sample in capture.samples(0)]
    assert all(torch.equal(sample.keys, keys) for sample, keys in zip(both.samples(0), expected, strict=True))


def test_chunking_does_not_change_what_is_captured(tiny_model, tmp_path):
    captures = [record(tiny_model, tmp_path / f"{c}", text=TEXT, context=100, chunk=c) for c in (100, 33, 1)]
    for layer in (0, 1):
        parts = [next(iter(capture.samples(layer))) for capture in captures]
        for other in parts[1:]:
            for field in ("keys", "values", "queries"):
                torch.testing.assert_close(
                    getattr(other, field).float(), getattr(parts[0], field).float(), atol=2e-2, rtol=2e-2
                )


@pytest.mark.parametrize("tokens", [slice(0, 192), slice(63, 65), slice(64, 128), slice(10, 191), slice(191, 192)])
def test_a_range_of_tokens_is_that_part_of_the_whole(tiny_capture, tokens):
    for whole, part in zip(tiny_capture.samples(1), tiny_capture.samples(1, tokens=tokens), strict=True):
        assert torch.equal(part.keys, whole.keys[:, tokens])
        assert torch.equal(part.values, whole.values[:, tokens])
        assert torch.equal(part.queries, whole.queries[:, tokens])
        assert part.positions.tolist() == list(range(tokens.start, tokens.stop))


@pytest.mark.parametrize(("queries", "count"), [("all", 100), ("none", 0), ("7", 7), ("1000", 100), ("1", 1)])
def test_as_many_queries_as_asked_for_the_last_included(tiny_model, tiny_capture, tmp_path, queries, count):
    capture = record(tiny_model, tmp_path / "c", text=TEXT, context=100, chunk=32, queries=queries)
    (sample,) = capture.samples(0)
    if not count:
        assert sample.queries is None
        return
    assert sample.queries.shape == (4, count, 32)
    assert sample.query_positions[-1] == 99
    every = record(tiny_model, tmp_path / "all", text=TEXT, context=100, chunk=32)
    assert torch.equal(sample.queries, next(iter(every.samples(0))).queries[:, sample.query_positions])


def test_samples_do_not_overlap_and_follow_the_seed(tiny_model):
    def starts(seed):
        return planning.plan(tiny_model, TEXT, context=100, samples=3, seed=seed).manifest.starts

    assert starts(1) == starts(1)
    assert len({starts(seed) for seed in range(8)}) > 1
    for seed in range(8):
        assert all(b - a >= 100 for a, b in zip(starts(seed), starts(seed)[1:], strict=False))


def test_output_gram_weighs_each_heads_error(tiny_model, tiny_capture):
    sample = next(iter(tiny_capture.samples(1)))
    error = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    for head in range(4):
        alone = torch.zeros(128)
        alone[head * 32 : head * 32 + 32] = error[head]
        through = tiny_model.model.model.layers[1].self_attn.o_proj.weight @ alone
        weighed = error[head] @ sample.output_gram[head] @ error[head]
        assert weighed.item() == pytest.approx(through.square().sum().item(), rel=1e-4)


def test_stream_is_what_enters_the_layer(tiny_model, tiny_capture):
    sample = next(iter(tiny_capture.samples(1)))
    hidden = tiny_model.model(tiny_capture.ids[:1], output_hidden_states=True).hidden_states
    # another order of summation than the capture's, chunk by chunk
    torch.testing.assert_close(sample.stream, hidden[1][0].square().sum(-1), rtol=1e-3, atol=0)
    part = next(iter(tiny_capture.samples(1, tokens=slice(50, 130))))
    assert torch.equal(part.stream, sample.stream[50:130])


# interruption


def test_stopped_at_any_write_and_resumed_it_has_the_same_bytes(tiny_model, tmp_path, monkeypatch):
    """Every rename is a point where the process may die: before it and after it."""
    plan = planning.plan(tiny_model, TEXT, context=96, samples=2, chunk=32)
    run(tiny_model, plan, tmp_path / "whole")
    replace, points = os.replace, 0
    for point in range(100):
        out, count = tmp_path / f"{point}", iter(range(1000))

        def die(a, b, point=point, count=count):
            now = next(count)
            if now == 2 * point:
                raise KeyboardInterrupt
            replace(a, b)
            if now == 2 * point + 1:
                raise KeyboardInterrupt

        monkeypatch.setattr(os, "replace", die)
        try:
            run(tiny_model, plan, out)
        except KeyboardInterrupt:
            points += 1
        else:
            break
        finally:
            monkeypatch.setattr(os, "replace", replace)
        if not (out / "capture.json").exists():
            with pytest.raises(CaptureError, match=r"unfinished|not a capture"):
                Capture.open(out)
        # what a kill in the midst of writing leaves
        (out / ".capture.partial.json.tmp").write_text("{")
        run(tiny_model, plan, out, resume=True)
        assert same_bytes(tmp_path / "whole", out), point
    # the common file, six shards with the state after each, the manifest
    assert points >= 8


KILLED = """
import sys
sys.path.insert(0, {tests!r})
from conftest import make_tiny_model
from kvtool.capture import planning, recording
import time
loaded = make_tiny_model()
plan = planning.plan(loaded, {text!r}, context=240, samples=2, chunk=8)
print("ready", flush=True)
recording.run(loaded, plan, __import__("pathlib").Path({out!r}), resume=True, report=lambda *_: time.sleep(0.02))
"""


def test_killed_and_resumed_it_has_the_same_bytes(tiny_model, tmp_path):
    """SIGKILL, no matter when: a process of its own, shot after a random time, resumed here."""
    out = tmp_path / "out"
    script = KILLED.format(tests=str(Path(__file__).parent), text=TEXT, out=str(out))
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert process.stdout.readline() == b"ready\n"
    time.sleep(random.uniform(0.1, 1.0))
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    plan = planning.plan(tiny_model, TEXT, context=240, samples=2, chunk=8)
    run(tiny_model, plan, tmp_path / "whole")
    run(tiny_model, plan, out, resume=True)
    assert same_bytes(tmp_path / "whole", out)


def test_full_disk_leaves_what_can_be_resumed(tiny_model, tmp_path, monkeypatch):
    plan = planning.plan(tiny_model, TEXT, context=96, chunk=32)
    run(tiny_model, plan, tmp_path / "whole")

    def full(tensors, path):
        if "00001" in str(path):
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save_file(tensors, path)

    monkeypatch.setattr(recording, "save_file", full)
    with pytest.raises(InputError, match=r"disk is full after 1 of 3 shards.*--resume"):
        run(tiny_model, plan, tmp_path / "out")
    monkeypatch.undo()
    assert not list((tmp_path / "out").rglob("*.tmp"))
    run(tiny_model, plan, tmp_path / "out", resume=True)
    assert same_bytes(tmp_path / "whole", tmp_path / "out")


def test_nothing_is_overwritten(tiny_model, tmp_path, monkeypatch):
    plan = planning.plan(tiny_model, TEXT, context=96, chunk=32)
    other = planning.plan(tiny_model, TEXT, context=64, chunk=32)
    out = tmp_path / "out"
    run(tiny_model, plan, out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    run(tiny_model, plan, out)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    with pytest.raises(CaptureError, match="holds another capture \\(context: 96 against 64\\)"):
        run(tiny_model, other, out)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(CaptureError, match="in use by something else"):
        run(tiny_model, plan, tmp_path / "mine")
    (out / "capture.json").rename(out / "capture.partial.json")
    with pytest.raises(CaptureError, match="unfinished capture; add --resume"):
        run(tiny_model, plan, out)
    with pytest.raises(CaptureError, match="another one \\(context"):
        run(tiny_model, other, out, resume=True)
    monkeypatch.setattr(planning.shutil, "disk_usage", lambda _: SmallDisk)
    with pytest.raises(InputError, match="are free"):
        run(tiny_model, plan, tmp_path / "new")


class SmallDisk:
    free = 1000


# reading what is broken


def test_a_changed_byte_is_found_and_a_short_file_refused(tiny_model, tmp_path):
    capture = record(tiny_model, tmp_path / "c", text=TEXT, context=96, chunk=32)
    assert capture.verify() == []
    shard = tmp_path / "c" / "sample-000" / "chunk-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert capture.verify() == ["sample-000/chunk-00001.safetensors"]
    shard.write_bytes(content[:-10])
    with pytest.raises(CaptureError, match=r"chunk-00001.safetensors holds \d+ bytes"):
        Capture.open(tmp_path / "c")
    shard.unlink()
    with pytest.raises(CaptureError, match=r"chunk-00001.safetensors is missing"):
        Capture.open(tmp_path / "c")
    (tmp_path / "c" / "capture.json").write_text('{"format": 99}')
    with pytest.raises(CaptureError, match="expected capture format 1, found 99"):
        Capture.open(tmp_path / "c")
    (tmp_path / "c" / "capture.json").write_text('{"format": 1}')
    with pytest.raises(CaptureError, match="not a capture manifest: model: Field required"):
        Capture.open(tmp_path / "c")


def test_a_shard_of_garbage_is_named(tiny_model, tmp_path):
    capture = record(tiny_model, tmp_path / "c", text=TEXT, context=96, chunk=32)
    shard = tmp_path / "c" / "sample-000" / "chunk-00002.safetensors"
    shard.write_bytes(b"\xff" * shard.stat().st_size)
    with pytest.raises(CaptureError, match=r"chunk-00002.safetensors is not readable"):
        list(capture.samples(0))


def test_what_is_no_capture_is_one_sentence(tmp_path):
    with pytest.raises(CaptureError, match="no such directory; 'kvtool capture' makes one"):
        Capture.open(tmp_path / "nosuch")
    with pytest.raises(CaptureError, match=r"not a capture: it holds no capture\.json"):
        Capture.open(tmp_path)


# what cannot be captured


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(context=5000), "holds 700 tokens, 1 x 5000 are needed"),
        (dict(context=400, samples=2), "holds 700 tokens, 2 x 400 are needed"),
        (dict(context=64, layers="0,7"), "7 is outside 0-1"),
        (dict(context=64, queries="some"), "expected all, none or a positive number"),
        (dict(context=64, dtype="int8"), "dtype 'int8'"),
    ],
)
def test_options_that_do_not_fit_are_one_sentence(tiny_model, options, message):
    with pytest.raises(InputError, match=message):
        planning.plan(tiny_model, TEXT, **options)


def test_layers_left_out_say_why(build, tmp_path):
    loaded = build("qwen3-next, hybrid")
    capture = record(loaded, tmp_path / "c", text=TEXT, context=64)
    assert capture.layers == [3]
    assert set(capture.manifest.not_recorded) == {0, 1, 2}
    with pytest.raises(CaptureError, match=r"layer 0 was not captured: linear or recurrent"):
        list(capture.samples(0))
    with pytest.raises(ModelError, match=r"none of the layers asked for.*linear or recurrent"):
        planning.plan(loaded, TEXT, context=64, layers="0-2")


def test_context_beyond_the_positions_warns_and_runs(make_tiny, tmp_path):
    loaded = make_tiny(max_position_embeddings=64)
    plan = planning.plan(loaded, TEXT, context=96)
    assert "beyond the model's 64 positions" in plan.notes[0]
    assert run(loaded, plan, tmp_path / "c").ids.shape == (1, 96)


def test_rope_that_changes_with_length_is_refused(make_tiny, tmp_path):
    rope = dict(rope_type="dynamic", rope_theta=1e4, factor=8.0)
    loaded = make_tiny(max_position_embeddings=64, rope_parameters=rope)
    with pytest.raises(ModelError, match="changes with the length of the text"):
        record(loaded, tmp_path / "c", text=TEXT, context=600, chunk=64)


def test_bos_is_put_before_every_sample_if_the_tokenizer_does(make_tiny, tiny_model, tmp_path):
    class WithBos:
        bos_token_id = 90

        def __call__(self, text, add_special_tokens=True, **options):
            out = tiny_model.tokenizer(text, **options)
            out["input_ids"] = [90] * add_special_tokens + out["input_ids"]
            return out

    loaded = LoadedModel(tiny_model.model, WithBos(), "tiny", "x")
    plan = planning.plan(loaded, TEXT, context=100, samples=2)
    assert plan.ids.shape == (2, 100)
    assert plan.ids[:, 0].tolist() == [90, 90]


def test_estimate_of_disk_is_what_is_written(tiny_model, tmp_path):
    plan = planning.plan(tiny_model, TEXT, context=96, samples=2, chunk=32, queries="10")
    run(tiny_model, plan, tmp_path / "c")
    stored = 0
    for path in (tmp_path / "c").rglob("chunk-*"):
        stored += sum(t.numel() * t.element_size() for t in load_file(path).values())
    assert stored == plan.nbytes


def test_model_is_left_as_it_was(make_tiny, tmp_path):
    loaded = make_tiny()
    before = loaded.model.config._attn_implementation

    def stop(done, total):
        raise KeyboardInterrupt

    plan = planning.plan(loaded, TEXT, context=96, chunk=32)
    with pytest.raises(KeyboardInterrupt):
        run(loaded, plan, tmp_path / "c", report=stop)
    assert loaded.model.config._attn_implementation == before
    assert not any(module._forward_pre_hooks for module in loaded.model.modules())
