"""What a kernel cannot read is refused by its launcher, in one sentence: nothing is read out of bounds."""

from importlib import import_module

import pytest
import torch

from kvtool.bench.subject import Subject
from kvtool.errors import BackendError
from kvtool.kernels.launch import refuse
from kvtool.kernels.samples import Shape, fitted_layer
from kvtool.methods import make_method

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPE = Shape(64, 2, B=1)
METHODS = {
    "turboquant": ("turboquant", {"k_bits": 2, "v_bits": 2, "mean": "rotated"}),
    "affine": ("affine", {"k_bits": 2, "v_bits": 4}),
    "affine per token": ("affine", {"k_bits": 4, "v_bits": 2, "k_axis": "token", "k_group": 0}),
    "h1b": ("h1b", {}),
    "rina": ("rina", {"k_stages": 2}),
    "rina by target": ("rina", {"target_bits": 1.25}),
    "rdkv": ("rdkv", {"budget": "25%"}),
    "rabitq": ("rabitq", {"k_bits": 2, "v_bits": 2}),
    "top-p": ("rabitq", {"mode": "topp", "mean": "rotated"}),
    "tiered": ("tiered", {"tiers": "25,25,25,25", "bits": 9.0}),
}


@pytest.fixture(scope="module", params=METHODS)
def attend(request):
    """``attend(queries=..., kv=..., positions=...)`` of a method's kernel, with what is not given as it should be."""
    name, options = METHODS[request.param]
    method, kernel = make_method(name, options), import_module(f"kvtool.kernels.{name}")
    subject = Subject(method, fitted_layer(method, SHAPE), "a test").to(DEVICE)
    given = {
        "queries": subject.queries(1, DEVICE).float(),
        "kv": subject.cache(256, 1, DEVICE),
        "positions": torch.arange(256, device=DEVICE),
    }

    def call(**changed):
        queries, kv, positions = (given | changed).values()
        return kernel.attend(method, queries, kv, subject.layer, positions=positions, scale=0.125)

    call.given, call.method, call.kernel, call.layer = given, method, kernel, subject.layer
    return call


def refused(call, **changed):
    with pytest.raises(BackendError, match="expected .*, found .*; use --backend reference") as refusal:
        call(**changed)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda q: q[..., :48], "head_dim"),
        (lambda q: torch.cat([q, q], -1), ""),  # a head_dim that there is, of another model
        (lambda q: q.repeat(1, 9, 1, 1), "per KV head"),
        (lambda q: q[:, :3], "per KV head"),
        (lambda q: q.repeat(1, 1, 9, 1), "query tokens"),
        (lambda q: q.repeat(1, 1, 1, 2)[..., ::2], "contiguous"),
        (lambda q: q.int(), "floats"),
        (lambda q: q.repeat(2, 1, 1, 1), ""),  # more sequences than the cache has
    ],
)
def test_queries(attend, change, says):
    assert says in refused(attend, queries=change(attend.given["queries"]))


def test_a_cache_of_another_shape(attend):
    other = fitted_layer(attend.method, Shape(128, 2, B=1))
    kv = Subject(attend.method, other, "another").to(DEVICE).cache(256, 1, DEVICE)
    if "levels" in kv._fields:
        pytest.skip("rdkv's pages do not say how wide they are; serving has checked the artifact")
    refused(attend, kv=kv)


def test_positions_of_another_length(attend):
    if attend.method.name == "affine" or getattr(attend.method, "mean", "") == "none":
        pytest.skip("does not look at positions")
    refused(attend, positions=attend.given["positions"][:64])


@pytest.mark.parametrize("spoil", ["halved", "strided", "other dtype", "fewer pages"])
def test_every_field(attend, spoil):
    change = {
        "halved": lambda x: x[..., : x.shape[-1] // 2].contiguous(),
        "strided": lambda x: torch.cat([x, x], -1)[..., ::2],
        "other dtype": lambda x: x.double(),
        "fewer pages": lambda x: x[:, :, :-1],
    }[spoil]
    kv = attend.given["kv"]
    for name, field in kv._asdict().items():
        if isinstance(field, torch.Tensor) and field.ndim >= 4 and field.numel() and "tier" not in kv._fields:
            refused(attend, kv=kv._replace(**{name: change(field)}))


@pytest.mark.parametrize("pages", [torch.tensor([4, 4]).int(), torch.tensor([4])])
def test_counts_of_pages(attend, pages):
    queries, kv, positions = attend.given.values()
    if {"levels", "tier"} & set(kv._fields):
        pytest.skip("has no count")
    arguments = {"positions": positions, "scale": 0.125, "pages": pages.to(DEVICE)}
    with pytest.raises(BackendError, match="pages in use"):
        attend.kernel.attend(attend.method, queries, kv, attend.layer, **arguments)


def test_a_refusal_says_what_to_do():
    with pytest.raises(BackendError, match="^kernels: x: expected a, found b; use --backend reference$"):
        refuse("x", "a", "b")
