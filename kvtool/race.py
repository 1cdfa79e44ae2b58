"""The race: rdkv's allocation against every uniform pair of widths that costs no more, and fp8, on held-out tokens.

A mix of widths usually loses to the best uniform pair unless it is measured (docs/methods/rdkv.md), so the artifact
is the winner, whichever it is. Each contestant compresses the middle of a held-out prompt; queries that come after the
prompt attend to it. The measure is the squared error of the attention output over its energy, heads weighted by W_O,
mean over layers; intervals are paired over blocks of queries.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from scipy import special
from torch import Tensor

from kvtool import attention
from kvtool.attention import Attended
from kvtool.methods.base import LayerCalibration
from kvtool.rdkv.pages import level_bytes, restore

if TYPE_CHECKING:
    from kvtool.capture import Capture, LayerSample
    from kvtool.methods.rdkv import RDKV
    from kvtool.policy import CachePolicy

WIDTHS = (1, 2, 3, 4, 8)
QUERY_BLOCK = 32  # neighbouring queries are alike: their errors count as one observation
_ASKED = 256  # queries after the prompt, at most
_TUNE_TOKENS, _TUNE_ASKED = 1024, 128  # what a choice is tuned on: it is made many times
_LEAST = 128  # compressed tokens below which nothing is decided
_TUNED = {"second-order": (4.0, 16.0, 64.0), "paper": (4.0, 16.0)}  # costs of eviction for each family of weights
_ONE = torch.tensor(1.0)


@dataclass(frozen=True)
class Raced:
    """What the race decided: the tensors to write, one line for a person, and the record of all contestants."""

    tensors: dict[str, Tensor]
    verdict: str
    record: dict[str, Any]


class Scene(NamedTuple):
    """A prompt and the queries that come after it.

    keys, values: the tokens to compress, [1, H, T, D], at ``positions`` [T].
    around_keys, around_values: the ``sinks`` first tokens and the window of the prompt; before: its last queries.
    asked: later queries [1, HQ, S, D]; rest: their attention over everything else; exact: over everything.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    around_keys: Tensor
    around_values: Tensor
    before: Tensor
    asked: Tensor
    rest: Attended
    exact: Attended
    sinks: int


class Plan(NamedTuple):
    """What rdkv does with a scene: the level of each token, uint8 [1, H, T], and the bytes [1] it did not spend."""

    levels: Tensor
    left: Tensor


def race(
    method: "RDKV",
    capture: "Capture",
    tensors: dict[str, Tensor],
    *,
    policy: "CachePolicy",
    start: int,
    report: Callable[[int], None] | None = None,
) -> Raced:
    """Tune what is left open on tokens before ``start``, race on those from ``start`` on, and pick the winner."""
    tensors, errors, bits, tuned = dict(tensors), dict[str, list[Tensor]](), dict[str, list[float]](), dict[int, str]()
    for done, i in enumerate(capture.layers):
        own = {name.removeprefix(f"layers.{i}."): t for name, t in tensors.items() if name.startswith(f"layers.{i}.")}
        layer = LayerCalibration(i, capture.shape.layers[i], capture.shape.rope(i), own)
        samples = list(capture.samples(i))
        worth = own["importance"]
        fitted = (scene(x, policy, policy.sinks, start, tokens=_TUNE_TOKENS, asked=_TUNE_ASKED) for x in samples[:2])
        tuning = [s for s in fitted if s]
        if tuning:
            layer, tuned[i] = _tune(method, layer, tuning, worth)
            tensors |= {f"layers.{i}.{field}": layer[field] for field in ("family", "eviction")}
        scenes = [s for s in (scene(x, policy, start, x.keys.shape[1]) for x in samples) if s]
        maps = []
        for held in scenes:
            chosen = _plan(method, layer, held)
            maps.append(_allocated(chosen.levels, layer))
            for name, (found, size) in _contest(method, layer, held, chosen).items():
                errors.setdefault(name, []).append(_by_block(found, held.exact.out, worth))
                bits.setdefault(name, []).append(size)
        if maps:
            tensors[f"layers.{i}.allocated"] = torch.stack(maps).mean(0)
        if report:
            report(done + 1)
    if not errors:
        verdict = (
            f"not raced: held-out samples leave below {_LEAST} tokens to compress or {QUERY_BLOCK} queries to ask; "
            "capture a longer --context with all queries"
        )
        return Raced(tensors, verdict, {"raced": False, "tuned": tuned})
    layers = len(capture.layers)
    return _decide(tensors, _table(errors, bits, layers), tuned)


def scene(
    sample: "LayerSample",
    policy: "CachePolicy",
    start: int,
    stop: int,
    *,
    tokens: int | None = None,
    asked: int = _ASKED,
) -> Scene | None:
    """A prompt of the sinks and of tokens ``start`` to ``stop``, whose last sixth asks; None if it is too short.

    tokens: compress the last so many of them only. asked: queries at most.
    """
    asked_count = min(asked, (stop - start) // 6)
    end = stop - asked_count
    recent = min(policy.window, (stop - start) // 6)
    first = max(start, policy.sinks, end - recent - (tokens or stop))
    if end - recent - first < _LEAST or asked_count < QUERY_BLOCK:
        return None
    assert sample.queries is not None
    assert sample.query_positions is not None
    shape, at = sample.shape, sample.query_positions
    keys, values, queries = (x[None].float() for x in (sample.keys, sample.values, sample.queries))
    before = queries[:, :, (at >= first) & (at < end)]
    later = (at >= end) & (at < stop)
    questions = queries[:, :, later]
    if not before.shape[2] or questions.shape[2] < QUERY_BLOCK:
        return None
    inner = slice(first, end - recent)
    around = torch.cat([torch.arange(policy.sinks), torch.arange(end - recent, end)])
    others = torch.cat([around, torch.arange(end, stop)])
    visible = sample.positions[others][None] <= at[later][:, None]
    rest = _attend_visible(questions, keys[:, :, others], values[:, :, others], visible, shape.scale, shape.softcap)
    part = attention.attend(questions, keys[:, :, inner], values[:, :, inner], scale=shape.scale, softcap=shape.softcap)
    return Scene(
        keys[:, :, inner],
        values[:, :, inner],
        sample.positions[inner],
        keys[:, :, around],
        values[:, :, around],
        before,
        questions,
        rest,
        attention.merge(rest, part),
        policy.sinks,
    )


def _attend_visible(
    queries: Tensor, keys: Tensor, values: Tensor, visible: Tensor, scale: float, softcap: float | None
) -> Attended:
    scores = attention.logits(queries, keys, scale=scale, softcap=softcap).masked_fill(~visible, -torch.inf)
    lse = scores.logsumexp(-1)
    out = scores.softmax(-1) @ values[:, :, None]
    return Attended(out.flatten(1, 2), lse.flatten(1, 2))


def _tune(
    method: "RDKV", layer: LayerCalibration, scenes: Sequence[Scene], worth: Tensor
) -> tuple[LayerCalibration, str]:
    """The family of weights and the cost of eviction that serve this layer best on fitted text, unless chosen."""
    best, chosen = math.inf, layer
    for family, costs in _TUNED.items():
        if method.weights not in ("auto", family):
            continue
        unit = _with(layer, family=torch.tensor(method.families.index(family), dtype=torch.uint8), eviction=_ONE)
        weights = [_weights(method, unit, one) for one in scenes]
        for eviction in costs if method.eviction is None else (method.eviction,):
            candidate = _with(unit, eviction=torch.tensor(eviction))
            error = 0.0
            for one, (lost, noisy) in zip(scenes, weights, strict=True):
                plan = Plan(*method.plan(lost * eviction, noisy, candidate, torch.zeros(1)))
                error += float(_by_block(_mixed(candidate, one, plan)[0], one.exact.out, worth).mean())
            if error < best:
                best, chosen = error, candidate
    return chosen, f"{method.families[int(chosen['family'])]} x{float(chosen['eviction']):g}"


def _contest(method: "RDKV", layer: LayerCalibration, one: Scene, chosen: Plan) -> dict[str, tuple[Tensor, float]]:
    """Attention output and bits per value of every contestant; ``chosen`` is what rdkv does here."""
    found = {"rdkv": _mixed(layer, one, chosen)}
    for kind, family in enumerate(method.families if method.weights == "auto" else ()):
        other = _with(layer, family=torch.tensor(kind, dtype=torch.uint8))
        own = kind == int(layer["family"])
        found[f"rdkv {family}"] = found["rdkv"] if own else _mixed(other, one, _plan(method, other, one))
    tokens = torch.ones(one.keys.shape[:3], dtype=torch.uint8)
    overhead = 3 / (2 * layer.shape.head_dim)
    pairs = {(k, v): _bits(uniform(layer, k, v)) + overhead for k in WIDTHS for v in WIDTHS}
    fitting = {pair: bits for pair, bits in pairs.items() if bits <= 16 * float(layer["fraction"]) + 1e-6}
    coded = {
        width: restore(one.keys, one.values, tokens, uniform(layer, width, width), one.positions)
        for width in sorted({width for pair in fitting for width in pair})
    }
    for k in coded:
        widths = [v for v in coded if (k, v) in fitting]
        if not widths:
            continue
        # one softmax serves every width of the values
        values = torch.cat([coded[v][1] for v in widths], -1)
        part = attention.attend(one.asked, coded[k][0], values, scale=layer.shape.scale, softcap=layer.shape.softcap)
        for v, out in zip(widths, part.out.chunk(len(widths), -1), strict=True):
            found[f"k{k}v{v}"] = attention.merge(one.rest, Attended(out, part.lse)).out, fitting[k, v]
    scale, softcap = layer.shape.scale, layer.shape.softcap
    part = attention.attend(one.asked, _fp8(one.keys), _fp8(one.values), scale=scale, softcap=softcap)
    found["fp8"] = attention.merge(one.rest, part).out, 8.0
    return found


def _mixed(layer: LayerCalibration, one: Scene, plan: Plan) -> tuple[Tensor, float]:
    """Attention output and bits per value of one allocation."""
    keys, values = restore(one.keys, one.values, plan.levels, layer, one.positions)
    bias = torch.zeros(plan.levels.shape).masked_fill(plan.levels == 0, -torch.inf)
    part = attention.attend(one.asked, keys, values, bias, scale=layer.shape.scale, softcap=layer.shape.softcap)
    H, T, D = one.keys.shape[1:]
    spent = 4 * H * T * D * float(layer["fraction"]) - float(plan.left)
    return attention.merge(one.rest, part).out, 4 * spent / (H * T * D)


def _plan(method: "RDKV", layer: LayerCalibration, one: Scene) -> Plan:
    return Plan(*method.plan(*_weights(method, layer, one), layer, torch.zeros(1)))


def _weights(method: "RDKV", layer: LayerCalibration, one: Scene) -> tuple[Tensor, Tensor]:
    carry = method.begin(one.before, one.around_keys, one.around_values, layer, sinks=one.sinks)
    return method.token_weights(one.keys, one.values, layer, one.positions, one.before, carry)


def _with(layer: LayerCalibration, **tensors: Tensor) -> LayerCalibration:
    return replace(layer, tensors={**layer.tensors, **tensors})


def _allocated(levels: Tensor, layer: LayerCalibration) -> Tensor:
    """Mean bits per value and the share of tokens kept of each KV head, [H, 2]."""
    bits = level_bytes(layer["widths"], layer.shape.head_dim) / (16 * layer.shape.head_dim)  # [H, L]
    return torch.stack([bits.gather(1, levels[0].long()).mean(1), (levels[0] > 0).float().mean(1)], -1)


def uniform(layer: LayerCalibration, k: int, v: int) -> LayerCalibration:
    """The same layer with one level besides eviction: every token at ``k`` bits for keys and ``v`` for values."""
    return _with(layer, **_uniform(layer["widths"], k, v))


def _uniform(widths: Tensor, k: int, v: int) -> dict[str, Tensor]:
    one = torch.full_like(widths, k)
    one[..., -1] = v
    one[:, 0] = 0
    # a tiny distortion: a level that the budget pays for is always taken
    distortion = torch.full(widths.shape[:2], 1e-6)
    distortion[:, 0] = 1
    return {"widths": one, "distortion": distortion}


def _bits(layer: LayerCalibration) -> float:
    size = level_bytes(layer["widths"], layer.shape.head_dim)[:, 1].double().mean()
    return float(size) / (16 * layer.shape.head_dim)


def _fp8(x: Tensor) -> Tensor:
    scale = x.abs().amax((2, 3), keepdim=True).clamp(min=1e-12) / 448
    return (x / scale).to(torch.float8_e4m3fn).float() * scale


def _by_block(found: Tensor, exact: Tensor, worth: Tensor) -> Tensor:
    """Squared error over energy for each block of queries, [blocks]; heads count by their ``worth`` [HQ]."""
    weight = worth[:, None, None]
    moved, energy = (found - exact).pow(2) * weight, exact.pow(2) * weight
    blocks = range(0, exact.shape[2] - QUERY_BLOCK + 1, QUERY_BLOCK)
    return torch.stack(
        [moved[:, :, b : b + QUERY_BLOCK].sum() / energy[:, :, b : b + QUERY_BLOCK].sum() for b in blocks]
    )


class _Row(NamedTuple):
    bits: float
    errors: Tensor  # [observations], mean over layers


def _table(errors: dict[str, list[Tensor]], bits: dict[str, list[float]], layers: int) -> dict[str, _Row]:
    """Contestants that every layer could afford, with the error of each observation averaged over layers."""
    full = max(len(found) for found in errors.values())
    return {
        name: _Row(
            sum(bits[name]) / len(bits[name]),
            # layers come one after the other, each with the same samples
            torch.cat([torch.stack(found[i :: full // layers]).mean(0) for i in range(full // layers)]),
        )
        for name, found in errors.items()
        if len(found) == full
    }


def _decide(tensors: dict[str, Tensor], rows: dict[str, _Row], tuned: dict[int, str]) -> Raced:
    mix = rows["rdkv"]
    pairs = {name: row for name, row in rows.items() if name[0] == "k"}
    record: dict[str, Any] = {
        "raced": True,
        "measure": "squared error of the attention output over its energy, mean over layers, held-out tokens",
        "contestants": {
            name: {"bits": round(row.bits, 4), "error": float(row.errors.mean())} | _against(row, mix)
            for name, row in sorted(rows.items(), key=lambda item: float(item[1].errors.mean()))
        },
        "tuned": tuned,
        "winner": "rdkv",
    }
    at = f"at {mix.bits:.2f} bits per value"
    if not pairs:
        verdict = f"{at} no uniform pair of widths fits, so the mix is written: attention error {_mean(mix):.3g}"
        return Raced(tensors, verdict, record)
    name, best = min(pairs.items(), key=lambda item: _mean(item[1]))
    ratio = _against(best, mix)
    figures = f"attention error {_mean(mix):.3g} of the mix, {_mean(best):.3g} of {name} at {best.bits:.2f} bits"
    spread = f"{ratio['ratio']:.3g} times, 95 % {ratio['low']:.3g} to {ratio['high']:.3g}"
    if _mean(best) < _mean(mix):
        record["winner"] = name
        k, v = (int(x) for x in name[1:].split("v"))
        everywhere = torch.tensor([best.bits, 1.0])
        changed = {
            key.replace("widths", field): t
            for key, widths in tensors.items()
            if key.endswith(".widths")
            for field, t in (
                _uniform(widths, k, v) | {"allocated": everywhere.expand(len(widths), 2).contiguous()}
            ).items()
        }
        return Raced(
            {**tensors, **changed},
            f"{at} the uniform pair {name} beats the mix and is written: {figures} ({spread})",
            record,
        )
    clear = "beats" if ratio["low"] > 1 else "is ahead of, though not clearly,"
    return Raced(tensors, f"{at} the mix {clear} every uniform pair and is written: {figures} ({spread})", record)


def _mean(row: _Row) -> float:
    return float(row.errors.mean())


def _against(row: _Row, mix: _Row) -> dict[str, float]:
    """How many times the error of the mix, with the paired 95 % interval over observations."""
    logs = (row.errors.clamp(min=1e-20) / mix.errors.clamp(min=1e-20)).log().double()
    n, middle = len(logs), float(logs.mean())
    if n < 2:
        return {"ratio": math.exp(middle), "low": 0.0, "high": math.inf}
    half = float(special.stdtrit(n - 1, 0.975) * logs.std() / math.sqrt(n))
    return {"ratio": math.exp(middle), "low": math.exp(middle - half), "high": math.exp(middle + half)}
