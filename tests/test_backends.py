"""Back ends: chosen by name, refused in one sentence, and never asked for more than they can do."""

from types import SimpleNamespace

import pytest
import torch

from kvtool.attention import Attended
from kvtool.backends import MAX_STEP, Backend, choose_backend
from kvtool.errors import BackendError
from kvtool.methods.exact import Exact, ExactKV


@pytest.mark.parametrize("name", ["triton", "gluon"])
def test_a_method_without_a_kernel_is_refused_by_name(name):
    with pytest.raises(BackendError, match="exact has no kernel yet; use --backend reference"):
        choose_backend(name, Exact(), torch.device("cuda"))


def test_an_unknown_back_end_is_refused():
    with pytest.raises(BackendError, match="expected one of auto, reference, triton, gluon"):
        choose_backend("cutlass", Exact(), torch.device("cpu"))


def test_without_a_gpu_auto_is_the_reference():
    assert choose_backend("auto", Exact(), torch.device("cpu")).name == "reference"


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
