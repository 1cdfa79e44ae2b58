"""Every kernel against its reference on small odd shapes: ``python -m kvtool.kernels.check``.

This is what a new card is asked first, and what ``compute-sanitizer`` watches: a line per case, PASS or FAIL with the
relative L2 error of the output and the largest error of a log-sum-exp, and status 1 if any failed. Without a GPU the
same cases run in Triton's interpreter (TRITON_INTERPRET=1), those of Gluon excepted.
"""

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvtool import attention
from kvtool.attention import Attended, relative_error
from kvtool.backends import Backend
from kvtool.bench.numerics import yardstick
from kvtool.bench.subject import Subject
from kvtool.errors import BackendError
from kvtool.kernels.launch import Launch, default_launch, nvidia
from kvtool.kernels.packed import Packed, attend_packed
from kvtool.kernels.reference import reference
from kvtool.kernels.samples import Shape, fitted_layer, random_packed
from kvtool.kernels.tail import attend_tail
from kvtool.methods import make_method

LIMIT = 3e-3  # weights have 15 bits relative to the largest of a warp's pages, queries 16


class Found(NamedTuple):
    """What a case came to: errors, and what each may be."""

    error: float
    lse: float = 0.0
    limit: float = LIMIT


@dataclass(frozen=True)
class Case:
    """A name, what runs, and why it is left out, if it is."""

    name: str
    run: Callable[[torch.device], Found]
    refused: str | None = field(default=None)


def cases(dialects: Sequence[str]) -> Iterator[Case]:
    """All cases, those of packed pages in each of ``dialects``."""
    for dialect in dialects:
        for name, shape, widths, options in _PACKED:
            run = partial(_packed, shape, *widths, dialect=dialect, **options)
            yield Case(f"decode {dialect}: {name}, {_told(shape)}", run)
    for method, options, shape in _METHODS:
        kernel = import_module(f"kvtool.kernels.{method}")
        made = make_method(method, options)
        name = " ".join([method, *(f"{key}={value}" for key, value in options.items())])
        yield Case(f"{name}, {_told(shape)}", partial(_method, made, shape), kernel.refuses(made))
    guarded = partial(_method, make_method("transform"), Shape(64, 3), outside=True)
    yield Case("transform with pages outside its statistics", guarded)
    for D, bits, mean in _ENCODED:
        yield Case(f"encode {bits} bits, mean {mean}, D {D}", partial(_encode, D, bits, mean))
    yield Case("encode stages, pages outside their statistics", partial(_encode_stages, Shape(64, 3)))
    for shape, dtype, held in _TAILS:
        yield Case(f"tail of {held} {str(dtype)[6:]}, {_told(shape)}", partial(_tail, shape, dtype, held))


# every width alone and mixed, every head_dim and group of query heads, one to eight query tokens
_PACKED: list[tuple[str, Shape, tuple[tuple[int, ...], tuple[int, ...]], dict[str, Any]]] = [
    ("4 bits", Shape(128, 4), ((4,) * 4, (4,) * 4), {}),
    ("3 bits", Shape(128, 4), ((3,) * 4, (3,) * 4), {"ragged": True}),
    ("2 bits", Shape(128, 4, N=17), ((2,) * 4, (2,) * 4), {"table": True}),
    ("1 bit", Shape(128, 8), ((1,) * 4, (1,) * 4), {"softcap": 3.0}),
    ("8 bits", Shape(64, 3), ((8, 8), (8, 8)), {"bias": True}),
    ("mixed", Shape(128, 4), ((4, 2, 2, 1), (3, 2, 2, 2)), {"table": True, "ragged": True}),
    ("mixed", Shape(80, 1, S=3), ((4, 0, 3), (8, 2, 0)), {"bias": True, "softcap": 5.0}),
    ("mixed", Shape(96, 7, H=1, S=2), ((1, 8, 3), (2, 4, 1)), {"ragged": True}),
    ("mixed", Shape(256, 2, S=1, N=3), ((4, 2, 2, 1) * 2, (3, 2, 2, 2) * 2), {}),
    ("2 bits", Shape(64, 8, H=1, S=8, N=3), ((2, 2), (2, 2)), {"bias": True}),
]

_METHODS: list[tuple[str, dict[str, Any], Shape]] = [
    ("turboquant", {"k_bits": 4, "v_bits": 3, "mean": "rotated"}, Shape(128, 4)),
    ("turboquant", {"k_bits": 2, "v_bits": 2, "mean": "channel"}, Shape(80, 7, S=3)),
    ("transform", {}, Shape(64, 3)),
    ("affine", {"k_bits": 2, "v_bits": 2}, Shape(64, 4)),
    ("affine", {"k_bits": 4, "v_bits": 8, "k_axis": "token", "k_group": 0}, Shape(80, 1, S=3, N=3)),
    ("h1b", {}, Shape(128, 4)),
    ("h1b", {"sketch_bits": 8, "v_bits": 2, "mean": "none"}, Shape(96, 8, H=1, S=2, N=3)),
    ("rina", {}, Shape(128, 4, N=17)),
    ("rina", {"subspace": 16, "k_stages": 2, "v_stages": 2}, Shape(80, 3, S=3, N=3)),
    ("rina", {"extra": 16}, Shape(64, 4, N=33)),
    ("rina", {"target_bits": 2.0}, Shape(64, 3)),
    ("rina", {"variant": "published"}, Shape(64, 4)),
    ("rdkv", {"budget": "25%"}, Shape(64, 3, N=9)),
    ("rabitq", {"k_bits": 4, "v_bits": 2}, Shape(64, 4)),
    ("rabitq", {"mode": "topp"}, Shape(128, 4, N=17)),
    ("rabitq", {"mode": "topp", "mean": "rotated"}, Shape(64, 7, H=1, N=9)),
    ("tiered", {"tiers": "25,25,25,25", "bits": 9.0}, Shape(64, 4, N=9)),
]

_ENCODED = [(64, 2, "none"), (80, 3, "channel"), (96, 8, "none"), (128, 4, "rotated"), (256, 1, "rotated")]

_TAILS = [
    (Shape(128, 4), torch.bfloat16, 195),
    (Shape(80, 7, H=1), torch.float16, 128),
    (Shape(256, 8, H=1), torch.float32, 1),
]


def _launch(device: torch.device, dialect: str) -> Launch:
    chosen = default_launch(device, dialect == "gluon")
    # two shares of the pages, so that there is something to merge
    return Launch(chosen.gluon, 2, chosen.stages, chosen.warps, chosen.pdl)


def _told(shape: Shape) -> str:
    return f"D {shape.D}, {shape.group * shape.H}/{shape.H} heads, S {shape.S}, {shape.B} x {64 * shape.N} tokens"


def _packed(
    shape: Shape,
    key_widths: tuple[int, ...],
    value_widths: tuple[int, ...],
    device: torch.device,
    *,
    dialect: str,
    table: bool = False,
    ragged: bool = False,
    bias: bool = False,
    softcap: float | None = None,
) -> Found:
    """``attend_packed``: through a page table, over sequences of different lengths, with a bias, capped."""
    B, N = shape.B, shape.N
    kv, codec = random_packed(shape, key_widths, value_widths, device)
    g = torch.Generator().manual_seed(1)
    dims = (B, shape.group * shape.H, shape.S)
    queries = (1.5 * torch.randn(*dims, shape.D, generator=g)).to(device)
    used = [N - 2 * b if ragged else N for b in range(B)]
    added = torch.randn(*dims, 64 * N, generator=g).to(device) if bias else None
    scale = shape.D**-0.5
    exact = []
    for b, n in enumerate(used):
        own, mine = Packed(*(x[b : b + 1, :, :n] for x in kv)), None if added is None else added[b : b + 1]
        exact.append(reference(queries[b : b + 1], own, codec, scale=scale, softcap=softcap, bias=mine))
    options: dict[str, Any] = {"launch": _launch(device, dialect)}
    if ragged:
        options["pages"] = torch.tensor(used, dtype=torch.int32, device=device)
    for b, n in enumerate(used):
        # room to grow holds anything
        kv.key_scales[b, :, n:] = kv.value_scales[b, :, n:] = torch.nan
    if table:
        order = torch.randperm(B * N, generator=g)
        options["page_table"] = torch.argsort(order).reshape(B, N).to(torch.int32).to(device)
        kv = Packed(*(x.transpose(1, 2).flatten(0, 1)[order.to(device)].transpose(0, 1)[None].contiguous() for x in kv))
    found = attend_packed(queries, kv, codec, scale=scale, softcap=softcap, bias=added, **options)
    return _compare(found, Attended(*(torch.cat(x) for x in zip(*exact, strict=True))))


def _method(made: Any, shape: Shape, device: torch.device, *, outside: bool = False) -> Found:
    """A method's kernel on pages of its own, against float64, or its reference where it estimates logits.

    outside: keys of one page and values of another are far from what the layer was fitted to.
    """
    subject = Subject(made, fitted_layer(made, shape), "check").to(device)
    backend = Backend("triton", import_module(f"kvtool.kernels.{made.name}"))
    kv = subject.cache(64 * shape.N, shape.B, device)
    positions = torch.arange(64 * shape.N, device=device)
    if outside:
        keys, values = subject.random(64 * shape.N, shape.B, device)
        keys[:, :, 64:128], values[:, :, 128:192] = 8 * keys[:, :, 64:128], 30 * values[:, :, 128:192]
        kv = made.compress(keys, values, subject.layer, positions=positions)[0]
        if len(kv.outside.unique()) < 3:
            raise RuntimeError("expected pages outside the statistics, keys and values apart")
    seeds = range(1, shape.S + 1)
    queries = torch.cat([subject.queries(shape.B, device, seed) for seed in seeds], 2).float()
    arguments = {"positions": positions, "scale": subject.shape.scale}
    found = backend.attend(made, queries, kv, subject.layer, **arguments)
    exact = Attended(yardstick(subject, backend, queries, kv, positions), found.lse)
    if not subject.reads_a_part:
        exact = exact._replace(lse=made.attend(queries, kv, subject.layer, **arguments).lse)
    return _compare(found, exact)


def _encode(D: int, bits: int, mean: str, device: torch.device) -> Found:
    """turboquant's encoder: the share of bytes that differ, and the relative error of the scales."""
    made = make_method("turboquant", {"k_bits": bits, "v_bits": bits, "mean": mean})
    subject = Subject(made, fitted_layer(made, Shape(D, 1)), "check").to(device)
    keys, values = (x.bfloat16() for x in subject.random(192, 2, device))
    positions = torch.arange(192, device=device)
    exact = made.compress(keys, values, subject.layer, positions=positions)[0]
    found = import_module("kvtool.kernels.turboquant").compress(made, keys, values, subject.layer, positions=positions)
    pages = [(found.key_pages, exact.key_pages), (found.value_pages, exact.value_pages)]
    scales = [(found.key_scales, exact.key_scales), (found.value_scales, exact.value_scales)]
    differ = max(float((a != b).float().mean()) for a, b in pages)
    # centred keys have 11 bits: a coordinate next to a boundary may fall on its other side
    return Found(differ, max(float(relative_error(a.float(), b.float())) for a, b in scales), 2e-2)


def _encode_stages(shape: Shape, device: torch.device) -> Found:
    """transform's encoder: the share of bytes that differ, and of pages in the wrong rotation."""
    made = make_method("transform")
    subject = Subject(made, fitted_layer(made, shape), "check").to(device)
    keys, values = (x.bfloat16() for x in subject.random(192, 2, device))
    keys[:, :1, :64] *= 500
    values[:, -1:, 128:] *= 500
    positions = torch.arange(192, device=device)
    exact = made.compress(keys, values, subject.layer, positions=positions)[0]
    found = import_module("kvtool.kernels.transform").compress(made, keys, values, subject.layer, positions=positions)
    names = ("key_pages", "key_gains", "value_pages", "value_gains")
    differ = max(float((getattr(found, name) != getattr(exact, name)).float().mean()) for name in names)
    return Found(differ, float((found.outside != exact.outside).float().mean()), 1e-2)


def _tail(shape: Shape, dtype: torch.dtype, held: int, device: torch.device) -> Found:
    """The exact tokens of a captured step, merged with a packed part."""
    g = torch.Generator().manual_seed(0)
    B, H, D, HQ = shape.B, shape.H, shape.D, shape.H * shape.group

    def random(*dims: int) -> Tensor:
        return torch.randn(*dims, generator=g).to(device, dtype)

    queries, new = random(B, HQ, 1, D), (random(B, H, 1, D), random(B, H, 1, D))
    tail = random(B, H, held + 5, D), random(B, H, held + 5, D)
    packed = Attended(random(B, HQ, 1, D).float(), random(B, HQ, 1).float())
    seen = [torch.cat([x[:, :, :held], token], 2).double() for x, token in zip(tail, new, strict=True)]
    exact = attention.merge(attention.attend(queries.double(), *seen, scale=D**-0.5), packed)
    found = attend_tail(queries, new, tail, torch.tensor([held], device=device), packed, scale=D**-0.5)
    # the output has the model's dtype
    return Found(float(relative_error(found.double(), exact.out)), limit=5e-3)


def _compare(found: Attended, exact: Attended) -> Found:
    seen = exact.lse.isfinite()
    same = bool((seen == found.lse.isfinite()).all()) and bool(found.out.isfinite().all())
    off = float((found.lse.double() - exact.lse)[seen].abs().max()) if same and seen.any() else float("nan")
    return Found(float(relative_error(found.out, exact.out)), off)


def main() -> int:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(prog="python -m kvtool.kernels.check", description=__doc__)
    parser.add_argument("only", nargs="*", help="words; cases whose name has one of them, such as 'gluon' or 'h1b'")
    parser.add_argument("--list", action="store_true", help="names of the cases, and no more")
    parser.add_argument("--refused", action="store_true", help="also what no back end would run")
    asked = parser.parse_args()
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not torch.cuda.is_available() and not interpreted and not asked.list:
        print(
            "kvtool: no GPU found; set TRITON_INTERPRET=1 to run the kernels in Triton's interpreter", file=sys.stderr
        )
        return 2
    device = torch.device("cpu" if interpreted else "cuda")
    failed = 0
    for case in cases(("triton", "gluon") if asked.list or nvidia(device) else ("triton",)):
        if asked.only and not any(word in case.name for word in asked.only):
            continue
        if asked.list:
            print(case.name)
            continue
        if case.refused and not asked.refused:
            print(f"SKIP {case.name}: {case.refused}", flush=True)
            continue
        failed += not _run(case, device)
    return min(failed, 1)


def _run(case: Case, device: torch.device) -> bool:
    begun = time.perf_counter()
    try:
        with torch.inference_mode():
            found = case.run(device)
        if device.type == "cuda":
            torch.cuda.synchronize()
    except (BackendError, RuntimeError) as error:
        traceback.print_exc()
        print(f"FAIL {case.name}: {error}", flush=True)
        return False
    passed = found.error <= found.limit and found.lse <= found.limit  # false as well for what is not a number
    took = time.perf_counter() - begun
    errors = f"{found.error:.1e}, lse {found.lse:.1e}"
    print(f"{'PASS' if passed else 'FAIL'} {case.name}: {errors}, {took:.1f} s", flush=True)
    return passed


def _poison() -> None:
    """Fill uninitialised memory with what is not a number, so that an output nobody wrote is seen."""
    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        found = empty(*args, **kwargs)
        return found.fill_(torch.nan) if found.is_floating_point() else found

    torch.empty = poisoned


if __name__ == "__main__":
    _poison()
    sys.exit(main())
