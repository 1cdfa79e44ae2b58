"""The artifact: what is written is read, and what does not fit is refused with the exact reason."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from kvtool.calibration import CachePolicy, Calibration, read_header
from kvtool.errors import CalibrationError, MethodOptionError
from kvtool.methods import make_method
from kvtool.shapes import CacheShape, LayerShape, Rope

LAYER = LayerShape(kind="full", num_heads=4, num_kv_heads=2, head_dim=32, scale=0.2, rope=0)
SHAPE = CacheShape(layers=(LAYER, LAYER), ropes=(Rope(inv_freq=tuple(1e4 ** (-i / 16) for i in range(16))),))


def calibration(**options):
    method = make_method("turboquant", {"k_bits": 2, "v_bits": 3, **options})
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randint(-9, 9, spec.shape, generator=generator).to(getattr(torch, spec.dtype))
        for name, spec in method.schema(SHAPE).items()
    }
    return Calibration(method, SHAPE, tensors, CachePolicy(sinks=2), {"model": "tiny"})


def rewrite(path, tensors=None, **header):
    """The artifact at ``path`` with parts of it exchanged."""
    loaded = Calibration.load(path)
    raw = json.loads(read_header(path).model_dump_json()) | {"sha256": None} | header
    save_file(tensors or dict(loaded.tensors), path, {"format": "pt", "kvtool": json.dumps(raw)})
    return path


@pytest.fixture
def path(tmp_path):
    return calibration().save(tmp_path / "a.safetensors")


def test_it_comes_back_bit_for_bit(path):
    before, after = calibration(), Calibration.load(path)
    assert after.method == before.method
    assert after.shape == before.shape
    assert after.policy == before.policy
    assert after.provenance["model"] == "tiny"
    assert after.tensors.keys() == before.tensors.keys()
    assert all(torch.equal(after.tensors[name], tensor) for name, tensor in before.tensors.items())
    assert after.fingerprint == before.fingerprint


def test_the_fingerprint_depends_on_what_it_does_and_not_on_where_it_comes_from(path):
    one = calibration()
    assert one.fingerprint != calibration(scale="mse").fingerprint
    changed = {name: tensor + 1 for name, tensor in one.tensors.items()}
    assert one.fingerprint != Calibration(one.method, SHAPE, changed, one.policy).fingerprint
    assert one.fingerprint == Calibration(one.method, SHAPE, one.tensors, one.policy, {"model": "other"}).fingerprint


def test_a_layer_sees_its_own_tensors(path):
    layer = Calibration.load(path).layer(1)
    assert torch.equal(layer["key_mean"], calibration().tensors["layers.1.key_mean"])
    assert layer.rope == SHAPE.ropes[0]


def test_unknown_metadata_is_kept(path):
    assert read_header(rewrite(path, colour="blue")).model_extra == {"colour": "blue"}


def test_one_changed_bit_is_found(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CalibrationError, match="changed or damaged"):
        Calibration.load(path)


def test_a_changed_header_is_found(path):
    header = json.loads(read_header(path).model_dump_json())
    # written again with its keys in another order, it is the same artifact
    assert Calibration.load(rewrite(path, **dict(reversed(header.items())))).policy.sinks == 2
    with pytest.raises(CalibrationError, match="changed or damaged"):
        Calibration.load(rewrite(path, sha256=header["sha256"], policy=header["policy"] | {"sinks": 3}))


def test_a_method_without_tensors_has_an_artifact_too(tmp_path):
    path = Calibration(make_method("affine"), SHAPE).save(tmp_path / "b.safetensors")
    assert Calibration.load(path).tensors == {}


def test_hostile_files_are_refused_with_the_reason(path, tmp_path):
    def refused(path, reason, error=CalibrationError):
        with pytest.raises(error, match=reason) as caught:
            Calibration.load(path)
        assert "\n" not in str(caught.value)

    refused(tmp_path / "none.safetensors", "expected a calibration artifact .*, found nothing there")
    refused(tmp_path, "found nothing there")
    whole = path.read_bytes()
    for cut in (0, 7, 100, len(whole) - 1):
        (tmp_path / "cut.safetensors").write_bytes(whole[:cut])
        refused(tmp_path / "cut.safetensors", "not a readable safetensors file")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    refused(tmp_path / "other.safetensors", "not a kvtool artifact")
    save_file({"x": torch.zeros(1)}, tmp_path / "text.safetensors", {"kvtool": "hello"})
    refused(tmp_path / "text.safetensors", "metadata is not JSON")
    save_file({"x": torch.zeros(1)}, tmp_path / "list.safetensors", {"kvtool": "[1]"})
    refused(tmp_path / "list.safetensors", "expected format 1, found None")


@pytest.mark.parametrize(
    ("header", "reason", "error"),
    [
        ({"format": 2}, "expected format 1, found 2; upgrade kvtool", CalibrationError),
        ({"method": "turboquantum"}, "no method 'turboquantum'; did you mean 'turboquant'", MethodOptionError),
        ({"options": {"k_bits": 2, "v_bits": 99}}, "v_bits=99", MethodOptionError),
        ({"options": {"k_bitz": 2}}, "has no option 'k_bitz'; did you mean 'k_bits'", MethodOptionError),
        ({"shape": {"layers": []}}, "metadata shape.layers", CalibrationError),
        ({"policy": {"sinks": -1}}, "metadata policy.sinks", CalibrationError),
    ],
)
def test_headers_that_do_not_fit_are_refused(path, header, reason, error):
    rewrite(path, **header)
    with pytest.raises(error, match=reason):
        Calibration.load(path)


def test_tensors_that_do_not_fit_are_refused(path):
    tensors = dict(calibration().tensors)
    name = "layers.1.key_mean"

    def refused(changed, reason):
        rewrite(calibration().save(path), changed)
        with pytest.raises(CalibrationError, match=reason):
            Calibration.load(path)

    refused(tensors | {name: torch.zeros(2, 16)}, r"expected float32 \[2, 32\], found float32 \[2, 16\]")
    refused(tensors | {name: torch.zeros(2, 32).half()}, r"expected float32 \[2, 32\], found float16 \[2, 32\]")
    refused(tensors | {"layers.7.x": torch.zeros(1)}, "layers.7.x: a tensor that turboquant does not have")
    refused({k: v for k, v in tensors.items() if k != name}, f"{name}: expected float32 .*, found nothing")
    refused(tensors | {name: torch.full((2, 32), torch.nan)}, f"{name}: expected finite numbers")


def test_an_artifact_that_does_not_fit_its_schema_is_not_written(path):
    before = path.read_bytes()
    one = calibration()
    broken = Calibration(one.method, SHAPE, {**one.tensors, "layers.0.key_mean": torch.zeros(3)})
    with pytest.raises(CalibrationError, match=r"layers.0.key_mean: expected float32 \[2, 32\]"):
        broken.save(path)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_another_model_is_refused_by_its_first_difference():
    wider = LAYER.model_copy(update={"head_dim": 64})
    with pytest.raises(CalibrationError, match="made for tiny does not fit mine: layer 1 head_dim: 32 against 64"):
        calibration().check_fits(SHAPE.model_copy(update={"layers": (LAYER, wider)}), "mine")
    turned = Rope(inv_freq=tuple(1e5 ** (-i / 16) for i in range(16)))
    with pytest.raises(CalibrationError, match="layer 0 rotary embedding"):
        calibration().check_fits(SHAPE.model_copy(update={"ropes": (turned,)}), "mine")
    calibration().check_fits(SHAPE, "mine")
