"""Top-p reading on a real cache: what each way of choosing tokens reads, and what it misses.

For queries at the end of a captured text, every token between sinks and window is a candidate; sinks and window are
read in any case, as in serving. Readers, each choosing for every query head by itself:

    rescored    the sketch's candidates, rescored exactly (``sparse.select``)
    estimate    top-p of the sketch's estimate, as published
    top-k       a fixed number by the estimate, at the bytes of ``rescored``
    quest       pages of 16 by Quest's bound, at the bytes of ``rescored``
    oracle      top-p of the exact logits: what no reader can beat, index not counted

Bytes are of one decode step over the measured layers: the index, and each key and value that some query head of the
group reads, once.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from kvtool import attention, sparse
from kvtool.errors import CaptureError, InputError
from kvtool.methods.base import LayerCalibration, Progress, nbytes
from kvtool.methods.rabitq import RaBitQ, SketchKV

if TYPE_CHECKING:
    from kvtool.calibration import Calibration
    from kvtool.capture import Capture, LayerSample

QUERIES = 16  # of each query head
QUEST_PAGE = 16


@dataclass(frozen=True)
class Reading:
    """One reader at one p, over all measured layers, heads and queries.

    mass: mean share of the softmax over the candidates that was read; least: its minimum; short: how often it is
    below p. tokens: read by a query head, of ``context``. bytes: a step. output_error: mean relative error of the
    attention output, sinks and window included. bounded: the output never missed by more than the missing mass allows.
    """

    p: float
    reader: str
    mass: float
    least: float
    short: float
    tokens: float
    context: int
    bytes: float
    output_error: float
    bounded: bool

    def as_dict(self) -> dict[str, Any]:
        """The record of ``--json``."""
        return asdict(self)


def parse_shares(text: str) -> list[float]:
    """``.8,.9`` as numbers between 0 and 1."""
    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError:
        shares = []
    if not shares or not all(0 < share < 1 for share in shares):
        raise InputError(f"--top-p {text}: expected shares between 0 and 1, such as .8,.9,.95")
    return shares


def compare(
    calibration: "Calibration",
    capture: "Capture",
    shares: Sequence[float],
    *,
    layers: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> list[Reading]:
    """Every reader at every share, on the calibration's layers.

    Raises:
        InputError: the calibration is no rabitq sketch. CaptureError: no queries, or too short a text.
    """
    method = calibration.method
    if not isinstance(method, RaBitQ) or method.mode != "topp":
        raise InputError(f"--top-p: expected a calibration of rabitq with -o mode topp, found {method.name}")
    chosen = [i for i in capture.layers if layers is None or i in layers]
    found: dict[tuple[float, str], list[_Layer]] = {}
    context = 0
    for done, index in enumerate(chosen):
        scene = _scene(next(iter(capture.samples(index))), method, calibration.layer(index), calibration.policy)
        context = scene.exact.shape[-1]
        for p in shares:
            for reader, mask in _readers(scene, replace(method, p=p)).items():
                found.setdefault((p, reader), []).append(_measure(scene, mask, p))
        if progress:
            progress(done + 1, len(chosen))
    return [_reading(p, reader, context, of) for (p, reader), of in found.items()]


class _Scene(NamedTuple):
    """One layer, ready to be read: logits [1, H, G, S, T], and attention over what is read anyway."""

    method: RaBitQ
    layer: LayerCalibration
    kv: SketchKV
    queries: Tensor
    positions: Tensor
    exact: Tensor
    estimate: Tensor
    outside: attention.Attended
    whole: Tensor


class _Mask(NamedTuple):
    kept: Tensor
    bytes: float


class _Layer(NamedTuple):
    mass: Tensor
    short: Tensor
    tokens: Tensor
    bytes: float
    error: Tensor
    bounded: bool


def _scene(sample: "LayerSample", method: RaBitQ, layer: LayerCalibration, policy: Any) -> _Scene:
    T, scale, softcap = sample.keys.shape[1], sample.shape.scale, sample.shape.softcap
    block = method.block or 1
    stop = policy.sinks + (T - policy.sinks - max(policy.window, 1)) // block * block
    if sample.queries is None or sample.query_positions is None:
        raise CaptureError(f"layer {sample.layer}: top-p reading needs queries; capture again with --queries all")
    asked = (sample.query_positions >= sample.positions[-max(policy.window, 1)]).nonzero()[:, 0]
    if stop <= policy.sinks or not len(asked):
        raise CaptureError(
            f"layer {sample.layer}: expected more than {block} tokens and queries at the end of the text"
        )
    asked = asked[:: max(1, len(asked) // QUERIES)][-QUERIES:]
    queries = sample.queries[None, :, asked].float()
    keys, values = sample.keys[None], sample.values[None]
    positions = sample.positions[policy.sinks : stop]
    kv, _ = method.compress(
        keys[:, :, policy.sinks : stop], values[:, :, policy.sinks : stop], layer, positions=positions
    )
    assert isinstance(kv, SketchKV)
    exact = attention.logits(queries, kv.keys.float(), scale=scale, softcap=softcap)
    rest = torch.cat([torch.arange(policy.sinks), torch.arange(stop, T)])
    hidden = sample.positions[rest][None] > sample.query_positions[asked][:, None]
    logits = attention.logits(queries, keys[:, :, rest].float(), scale=scale, softcap=softcap)
    outside = attention.from_logits(logits.masked_fill(hidden, -torch.inf), values[:, :, rest].float())
    inside = attention.from_logits(exact, kv.values.float())
    return _Scene(
        method,
        layer,
        kv,
        queries,
        positions,
        exact,
        method.estimate(queries, kv, layer, positions=positions, scale=scale, softcap=softcap),
        outside,
        attention.merge(outside, inside).out,
    )


def _readers(scene: _Scene, method: RaBitQ) -> dict[str, _Mask]:
    _, H, _, S, T = scene.exact.shape
    row = scene.kv.keys.shape[-1] * scene.kv.keys.element_size()
    sketch = nbytes(scene.kv[2:])

    def read(mask: Tensor) -> float:
        """Tokens that some head of a group reads, over all KV heads: the mean over queries."""
        return float(mask.any(2).sum()) / S

    scale, softcap = scene.layer.shape.scale, scene.layer.shape.softcap
    selection = method.select(
        scene.queries, scene.kv, scene.layer, scene.exact, positions=scene.positions, scale=scale, softcap=softcap
    )
    rescored = _Mask(selection.kept, sketch + row * (read(selection.candidates) + read(selection.kept)))
    estimate = sparse.top_p(scene.estimate, method.p)
    top = _best(scene.estimate, (rescored.bytes - sketch) / (2 * row))
    pages = T // QUEST_PAGE * QUEST_PAGE
    bound = sparse.quest_scores(
        scene.queries.unflatten(1, (H, -1)), scene.kv.keys[:, :, None, :pages].float(), QUEST_PAGE
    )
    index = H * (T // QUEST_PAGE) * 2 * row
    chosen = _best(bound, (rescored.bytes - index) / (2 * row * QUEST_PAGE)).repeat_interleave(QUEST_PAGE, -1)
    quest = torch.nn.functional.pad(chosen, (0, T - pages))
    oracle = sparse.top_p(scene.exact, method.p)
    return {
        "rescored": rescored,
        "estimate": _Mask(estimate, sketch + 2 * row * read(estimate)),
        "top-k": _Mask(top, sketch + 2 * row * read(top)),
        "quest": _Mask(quest, index + 2 * row * read(quest)),
        "oracle": _Mask(oracle, 2 * row * read(oracle)),
    }


def _best(scores: Tensor, budget: float) -> Tensor:
    """The k largest of every row [1, H, G, S, T]; groups read up to ``budget`` of them a query, and one at least."""
    ranks = scores.argsort(-1, descending=True).argsort(-1)
    first = ranks.amin(2).flatten().sort().values
    # of the first entry that is too much: it and all others of its rank stay unread
    over = int(budget * scores.shape[3])
    return ranks < max(1, int(first[over]) if over < len(first) else scores.shape[-1])


def _measure(scene: _Scene, mask: _Mask, p: float) -> _Layer:
    values = scene.kv.values.float()
    part = attention.from_logits(scene.exact.masked_fill(~mask.kept, -torch.inf), values)
    inside = attention.from_logits(scene.exact, values)
    share = sparse.mass(scene.exact, mask.kept)
    out = part.out.unflatten(1, scene.exact.shape[1:3])  # [1, H, G, S, D]
    bound = sparse.output_bound(1 - share, values[:, :, None], mask.kept, out)
    missed = (out - inside.out.unflatten(1, scene.exact.shape[1:3])).norm(dim=-1)
    found = attention.merge(scene.outside, part).out
    return _Layer(
        share,
        # a share is a quotient of float32 sums
        share < p - 1e-5,
        mask.kept.sum(-1).float(),
        mask.bytes,
        attention.relative_error(found, scene.whole, dim=-1),
        # float32 sums over the tokens: 1e-4 of the output's size
        bool((missed <= bound + 1e-4 * out.norm(dim=-1).clamp_min(1e-3)).all()),
    )


def _reading(p: float, reader: str, context: int, layers: Sequence[_Layer]) -> Reading:
    return Reading(
        p=p,
        reader=reader,
        mass=_mean([layer.mass for layer in layers]),
        least=min(float(layer.mass.min()) for layer in layers),
        short=_mean([layer.short.float() for layer in layers]),
        tokens=_mean([layer.tokens for layer in layers]),
        context=context,
        bytes=sum(layer.bytes for layer in layers),
        output_error=_mean([layer.error for layer in layers]),
        bounded=all(layer.bounded for layer in layers),
    )


def _mean(tensors: Sequence[Tensor]) -> float:
    return float(torch.cat([tensor.flatten() for tensor in tensors]).double().mean())
