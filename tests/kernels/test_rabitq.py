"""rabitq's kernels: codes attend as the reference does; top-p keeps what it promises and attends exactly over it."""

import math

import pytest
import torch

from kvtool import attention, packing, sparse
from kvtool.attention import relative_error
from kvtool.backends import Backend
from kvtool.bench.run import _part, check_numerics
from kvtool.bench.subject import Subject
from kvtool.errors import BackendError
from kvtool.kernels import rabitq as kernels
from kvtool.kernels import sparse as launches
from kvtool.methods import make_method
from kvtool.methods.base import LayerCalibration
from kvtool.shapes import LayerKind, LayerShape, Rope

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROPE = Rope(inv_freq=tuple(1e4 ** (-i / 32) for i in range(32)), scaling=1.1)


def calibrated(method, D, group, H=2, rope=ROPE):
    """A layer as ``fit`` leaves it, its means drawn at random."""
    shape = LayerShape(kind=LayerKind.FULL, num_heads=H * group, num_kv_heads=H, head_dim=D, scale=D**-0.5)
    tensors = (method.data_free() or method).fit_layer(shape, rope, iter(()), layer=0)
    generator = torch.Generator().manual_seed(1)
    schema = method.layer_schema(shape)
    tensors |= {
        name: torch.randn(schema[name].shape, generator=generator)
        for name in ("key_mean", "query_mean")
        if name in schema
    }
    return LayerCalibration(0, shape, rope, {name: tensor.to(DEVICE) for name, tensor in tensors.items()})


@pytest.mark.parametrize(
    ("options", "D", "group", "softcap"),
    [
        ({"k_bits": 1, "v_bits": 8, "mean": "none", "rotation": "haar"}, 80, 4, None),
        ({"k_bits": 4, "v_bits": 3, "mean": "rotated"}, 64, 3, 30.0),
        ({"k_bits": 8, "v_bits": 2, "mean": "channel", "delta": "least-squares"}, 96, 1, None),
    ],
)
def test_codes_attend_as_the_reference_does(options, D, group, softcap):
    method = make_method("rabitq", options)
    layer = calibrated(method, D, group)
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 1, 2, 128, D, generator=generator).to(DEVICE)
    queries = 2 * torch.randn(1, 2 * group, 2, D, generator=generator).to(DEVICE)
    positions = torch.arange(4, 4 + 128, device=DEVICE)
    kv, _ = method.compress(keys, values, layer, positions=positions)
    arguments = {"positions": positions, "scale": layer.shape.scale, "softcap": softcap}
    exact = method.attend(queries, kv, layer, **arguments)
    found = kernels.attend(method, queries, kv, layer, **arguments)
    assert relative_error(found.out, exact.out) < 3e-3  # weights of 15 bits
    assert (found.lse - exact.lse).abs().max() < 2e-3


def sketched(options, D, group, S, tokens, *, B=1, H=1, dtype=torch.float32, needles=3, alike=False):
    """A layer, its sketched cache and queries for which a few keys stand out; logits deviate by 1, noise by .75."""
    method = make_method("rabitq", {"mode": "topp", **options})
    layer = calibrated(method, D, group, H)
    generator = torch.Generator().manual_seed(D + group)
    queries = torch.randn(B, H * group, S, D, generator=generator)
    keys, values = torch.randn(2, B, H, tokens, D, generator=generator)
    for i in range(needles):
        keys[:, :, (29 * i + 7) % tokens] += 6 * queries[:, ::group, 0] / D**0.5
    if alike:
        keys[:] = keys[:, :, :1]
    keys, values, queries = (x.to(DEVICE, dtype) for x in (keys, values, queries))
    positions = torch.arange(4, 4 + tokens, device=DEVICE)
    kv, _ = method.compress(keys, values, layer, positions=positions)
    return method, layer, kv, queries, positions


def judged(method, layer, kv, queries, positions, softcap=None, sampled=False):
    """Attends, checks every promise, and returns what was kept and read, [B, H, rows, T], and the exact logits."""
    B, HQ, S, _ = queries.shape
    H, T = kv.keys.shape[1:3]
    arguments = {"positions": positions, "scale": layer.shape.scale, "softcap": softcap}
    found, trace = kernels.attend_top_p(method, queries, kv, layer, **arguments)
    used = HQ // H * S
    kept, seen = (x.to(DEVICE) for x in trace.selection((B, H, used, T)))
    exact = attention.logits(queries.double(), kv.keys.double(), scale=layer.shape.scale, softcap=softcap)
    exact = exact.flatten(2, 3)
    estimate = method.estimate(queries, kv, layer, **arguments).flatten(2, 3)
    mine = trace.estimates.float() * math.log(2)
    mine = packing.unpack_tokens(mine.unflatten(-1, (-1, packing.PAGE))).reshape(B, H, -1, T)[:, :, :used]
    # float16 of numbers up to 64 (in units of log2), and 16 bits of the mean's logits
    assert (mine - estimate).abs().max() < 0.03
    # the rule of sparse.select, whose candidates are what was read
    noise = method.noise(queries, kv, layer, scale=layer.shape.scale).flatten(2, 3)
    likely = sparse.likely_logits(mine.double(), noise.double())
    share = 1 - (1 - method.p) / 5
    mass = torch.where(seen, exact, -torch.inf).logsumexp(-1).exp()
    rest = torch.where(seen, -torch.inf, likely).logsumexp(-1).exp()
    heavy = torch.where(kept, exact, -torch.inf).logsumexp(-1).exp()
    assert sampled or (rest <= (1 - share) / share * mass * (1 + 1e-3)).all()
    assert (heavy >= method.p * (mass + 2 * rest) * (1 - 1e-3)).all()
    assert (sparse.mass(exact, kept) >= method.p - 1e-6).all()
    # bins are a quarter wide, in units of log2, and weighed by their upper edges: not a bin more is kept than that
    spared = 2**-0.25 * (mass - method.p * (mass + 2 * rest))
    least = sparse.top_p(torch.where(seen, exact, -torch.inf), 0.5, (2 * (mass - spared)).log())
    lowest = [torch.where(x, exact, torch.inf).amin(-1) for x in (kept, least)]
    assert (lowest[0] >= lowest[1] - 0.25 * math.log(2) - 1e-4).all() or method.p == 1
    want = attention.from_logits(torch.where(kept, exact, -torch.inf).unflatten(2, (HQ // H, S)), kv.values.double())
    assert relative_error(found.out, want.out) < 1e-5  # weights are in two parts, the rest in float32
    assert (found.lse - want.lse).abs().max() < 1e-5
    return kept, seen, exact


@pytest.mark.parametrize(
    ("options", "D", "group", "S", "tokens", "softcap"),
    [
        ({"p": 0.9}, 64, 3, 1, 576, None),
        ({"p": 0.5, "mean": "none", "query_bits": 8, "rotation": "haar"}, 80, 7, 1, 192, 30.0),
        ({"p": 0.95, "mean": "channel", "query_bits": 3}, 96, 1, 3, 64, None),
        ({"p": 0.99, "mean": "none"}, 64, 8, 3, 64, None),
        ({"p": 0.9, "mean": "none"}, 256, 1, 1, 64, None),
    ],
)
def test_top_p_keeps_what_it_promises_and_attends_exactly(options, D, group, S, tokens, softcap):
    judged(*sketched(options, D, group, S, tokens), softcap)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cache_of_16_bits_in_a_batch(dtype):
    case = sketched({"p": 0.95, "mean": "none"}, 128, 4, 1, 192, B=2 if dtype == torch.float16 else 1, dtype=dtype)
    kept, seen, _ = judged(*case)
    assert kept.float().mean() < 0.7
    assert (kept <= seen).all()


def test_p_of_1_reads_everything():
    kept, _, _ = judged(*sketched({"p": 1.0, "mean": "none", "query_mean": False}, 64, 4, 1, 128))
    assert kept.all()


def test_tokens_that_tie_are_kept_together():
    kept, _, _ = judged(*sketched({"p": 0.5, "mean": "none"}, 64, 1, 1, 128, alike=True))
    assert kept.all()


def test_counting_every_fourth_token_keeps_the_promise(monkeypatch):
    monkeypatch.setattr(launches, "SAMPLED", 0)
    judged(*sketched({"p": 0.9, "mean": "none"}, 64, 2, 1, 576), sampled=True)


def test_only_pages_in_use_are_read():
    method, layer, kv, queries, positions = sketched({"p": 0.9, "mean": "none"}, 64, 2, 1, 320, B=2)
    pages = torch.tensor([3, 0], dtype=torch.int32, device=DEVICE)
    arguments = {"positions": positions, "scale": layer.shape.scale}
    found = kernels.attend(method, queries, kv, layer, pages=pages, **arguments)
    kv = type(kv)(*(x[:1, :, : 3 * x.shape[2] // 5] for x in kv))
    whole = kernels.attend(method, queries[:1], kv, layer, positions=positions[:192], scale=layer.shape.scale)
    # the shares of programs differ, so the sums do
    assert relative_error(found.out[:1], whole.out) < 1e-5
    assert (found.lse[1] == -torch.inf).all()
    assert (found.out[1] == 0).all()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda kv: kv._replace(keys=kv.keys[:, :, :64]), "keys"),
        (lambda kv: kv._replace(values=kv.values.half()), "values"),
        (lambda kv: kv._replace(query_terms=kv.query_terms[..., :1]), "query_terms"),
        (lambda kv: kv._replace(code_pages=kv.code_pages[..., :256]), "code_pages"),
    ],
)
def test_the_launcher_refuses_in_one_sentence(change, says):
    method, layer, kv, queries, positions = sketched({"mean": "none"}, 64, 2, 1, 128)
    with pytest.raises(BackendError, match=says) as refusal:
        kernels.attend(method, queries, change(kv), layer, positions=positions, scale=1.0)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "options",
    [{"k_bits": 5}, {"v_bits": 7}, {"mode": "topp", "rescore": False}, {"mode": "topp", "query_bits": 0}],
)
def test_options_without_a_kernel_are_refused_by_name(options):
    assert "rabitq" in kernels.refuses(make_method("rabitq", options))


def test_bench_judges_and_counts_what_is_read():
    method = make_method("rabitq", {"mode": "topp", "p": 0.8, "mean": "none", "query_mean": False})
    subject = Subject(method, calibrated(method, 64, 2, H=1), "a test")
    # of the same selection; the back end that takes no minutes in the interpreter
    assert check_numerics(subject, Backend("reference"), DEVICE) < 1e-3
    found = _part(subject, Backend("triton", kernels), subject.cache(320, 1, DEVICE), 320, 1, DEVICE)
    sketch = 320 * (64 / 8 + 2)
    assert found["bytes"] == round(sketch + 2 * 64 * 320 * (found["kept"] + found["rescored"]))
    assert found["kept"] < found["rescored"] < 0.7
