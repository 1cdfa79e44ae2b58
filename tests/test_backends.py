"""Back ends: chosen by name, refused in one sentence, and never asked for more than they can do."""

from types import SimpleNamespace

import pytest
import torch

from kvtool.attention import Attended
from kvtool.backends import MAX_STEP, Backend, choose_backend
from kvtool.errors import BackendError
from kvtool.methods import make_method
from kvtool.methods.exact import Exact, ExactKV
from kvtool.shapes import LayerShape


@pytest.mark.parametrize("name", ["triton", "gluon"])
def test_a_method_without_a_kernel_is_refused_by_name(name):
    with pytest.raises(BackendError, match="exact has no kernel yet; use --backend reference"):
        choose_backend(name, Exact(), torch.device("cuda"))


def test_an_unknown_back_end_is_refused():
    with pytest.raises(BackendError, match="expected one of auto, reference, triton, gluon"):
        choose_backend("cutlass", Exact(), torch.device("cpu"))


def test_without_a_gpu_auto_is_the_reference():
    assert choose_backend("auto", Exact(), torch.device("cpu")).name == "reference"


CUDA = SimpleNamespace(type="cuda")
SERVED = LayerShape(kind="full", num_heads=8, num_kv_heads=2, head_dim=64, scale=0.125)


@pytest.mark.parametrize(
    ("capability", "change", "says"),
    [
        ((7, 5), {}, "kernels need compute capability 8.0 or newer, found 7.5"),
        ((9, 0), {"head_dim": 48}, "head_dim: expected one of 64, 80, 96, 128, 256, found 48"),
        ((8, 0), {"num_heads": 18}, "query heads: expected 1 to 8 per KV head, found 9"),
    ],
)
def test_what_no_kernel_serves_is_the_references_with_auto_and_refused_by_name(monkeypatch, capability, change, says):
    """With auto the first decode step was refused, after the whole prefill."""
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    shapes = [SERVED, SERVED.model_copy(update=change)]
    method = make_method("turboquant")
    assert choose_backend("auto", method, CUDA, shapes).name == "reference"
    for name in ("triton", "gluon"):
        with pytest.raises(BackendError, match=f"--backend {name}: {says}; use --backend reference"):
            choose_backend(name, method, CUDA, shapes)


def test_without_triton_auto_is_the_reference(monkeypatch):
    def missing(name):
        raise ImportError("No module named 'triton'")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("kvtool.backends.import_module", missing)
    assert choose_backend("auto", make_method("turboquant"), CUDA, [SERVED]).name == "reference"
    with pytest.raises(BackendError, match="Triton 3.6 or newer.*No module named 'triton'.*; use --backend reference"):
        choose_backend("triton", make_method("turboquant"), CUDA, [SERVED])


@pytest.mark.parametrize(("S", "by_kernel"), [(1, True), (MAX_STEP, True), (MAX_STEP + 1, False), (64, False)])
def test_long_steps_go_to_the_reference(S, by_kernel):
    """eval scores 64 tokens a pass; on a GPU the decode kernel refused them and the whole run failed."""
    asked = []

    def attend(method, queries, kv, layer, **options):
        asked.append(queries.shape[2])
        return Attended(torch.zeros_like(queries), torch.zeros(queries.shape[:3]))

    backend = Backend("triton", SimpleNamespace(attend=attend, refuses=lambda method: None))
    x = torch.ones(1, 2, 64, 16)
    positions = torch.arange(64)
    out = backend.attend(Exact(), torch.ones(1, 4, S, 16), ExactKV(x, x), None, positions=positions, scale=0.25).out
    assert asked == ([S] if by_kernel else [])
    assert out.eq(0 if by_kernel else 1).all()
