"""One contestant on one segment: adopt the exact prefix, measure what became of attention, score what follows."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvtool import attention
from kvtool.cache import CacheBytes, CompressedCache
from kvtool.errors import InputError
from kvtool.evaluate.contestants import Contestant
from kvtool.evaluate.kld import TokenScores, compare, join
from kvtool.evaluate.reference import Segment, own_prefill
from kvtool.methods.base import LOOKS_BACK
from kvtool.runtime import Prefill, serve

# relative L2; a lossy layer that reproduces attention better than this was not read back from what was stored
_ROUNDING = 1e-5


@dataclass
class Tally:
    """What has been measured of one contestant so far."""

    scores: list[TokenScores] = field(default_factory=list)
    attention: list[dict[int, float]] = field(default_factory=list)
    nbytes: CacheBytes | None = None
    peak: int | None = None
    backend: str = ""
    seconds: float = 0.0
    notes: list[dict[str, float]] = field(default_factory=list)

    def attention_error(self) -> dict[int, float]:
        """Relative L2 error of the attention output of each compressed layer, mean over segments."""
        return {i: fmean(errors[i] for errors in self.attention) for i in (self.attention[0] if self.attention else {})}


def score_segment(
    model: PreTrainedModel, contestant: Contestant, segment: Segment, tally: Tally, *, chunk: int, backend: str
) -> None:
    """Score the tokens after the prefix, in chunks that read the compressed cache, against the full cache's logits.

    Raises:
        InputError: the prefix is so short that nothing would be compressed.
    """
    assert contestant.calibration is not None
    prefix = segment.prefill.cache.get_seq_length()
    prefill = own_prefill(model, contestant.calibration, segment.ids[:, :prefix], segment.prefill)
    started = time.perf_counter()
    with _peak(model.device, tally), serve(model, contestant.calibration, backend=backend) as cache:
        cache.adopt(prefill)
        if not any(layer.parts.tokens for _, layer in cache.compressed_layers()):
            policy = contestant.calibration.policy
            raise InputError(
                f"--prefix {prefix}: {contestant.name} compresses nothing of it, with {policy.sinks} sinks and a "
                f"window of {policy.window} exact tokens; use a longer prefix"
            )
        if tally.nbytes is None:
            tally.nbytes, tally.backend = cache.nbytes(), cache.backend.name
        tally.attention.append(attention_errors(cache, prefill))
        tally.notes += notes_of(cache)
        parts, position = [], 0
        for ids in segment.ids[:, prefix:-1].split(chunk, 1):
            logits = model(ids, past_key_values=cache, use_cache=True).logits[0]
            at = slice(position, position + ids.shape[1])
            targets = segment.ids[0, prefix + 1 :][at]
            parts.append(compare(segment.logits[at], logits, targets))
            position = at.stop
    tally.scores.append(join(parts))
    tally.seconds += time.perf_counter() - started


def attention_errors(cache: CompressedCache, prefill: Prefill) -> dict[int, float]:
    """Relative L2 error of each compressed layer's attention output, for the last queries of the prefix."""
    errors = {}
    for i, layer in cache.compressed_layers():
        if i not in prefill.queries or not layer.parts.tokens:
            continue
        shape = layer.layer.shape
        # queries older than the window would see tokens that came after them
        recent = max(1, min(LOOKS_BACK, layer.keys.shape[2] - layer.policy.sinks))
        exact, queries = prefill.cache.layers[i], prefill.queries[i][:, :, -recent:]
        yardstick = attention.attend(
            queries.float(), exact.keys, exact.values, scale=shape.scale, softcap=shape.softcap, causal=True
        )
        # kernels take the model's dtype; the reference takes float32, so that no rounding is mistaken for error
        asked = queries.float() if cache.backend.kernel is None else queries
        found = layer.attend(asked, scale=shape.scale, softcap=shape.softcap)
        errors[i] = attention.relative_error(found, yardstick.out).item()
    return errors


def notes_of(cache: CompressedCache) -> list[dict[str, float]]:
    """What the method notes of each layer's compressed tokens; most have nothing to say."""
    read = [
        (layer.method, kv) for _, layer in cache.compressed_layers() for kv, _ in layer.parts.read(layer.keys.device)
    ]
    return [noted for method, kv in read if (noted := method.notes(kv))]


def problems(contestant: Contestant, tally: Tally) -> list[str]:
    """Why the figures of a contestant cannot be believed: nothing drifted, or something is not a number."""
    found = []
    kld = torch.cat([scores.kld for scores in tally.scores]) if tally.scores else torch.ones(1)
    if not kld.isfinite().all():
        found.append(f"{contestant.name}: the logits are not finite on {int((~kld.isfinite()).sum())} tokens")
    if contestant.lossless:
        return found
    if not kld.any():
        found.append(f"{contestant.name}: the drift is exactly zero, so the compressed cache was not read")
    errors = tally.attention_error()
    unread = [i for i, error in errors.items() if error < _ROUNDING]
    if unread:
        layers = ", ".join(map(str, unread))
        found.append(f"{contestant.name}: attention of layers {layers} is exact, so what was stored was not read")
    return found


@contextmanager
def _peak(device: torch.device, tally: Tally) -> Iterator[None]:
    """The most device memory that was in use above what was in use before; a CPU does not say."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    yield
    tally.peak = max(tally.peak or 0, torch.cuda.max_memory_allocated(device) - before)


def begin_of_text(tokenizer: Any) -> list[int]:
    """The token that a model of this tokenizer always sees first; none for many."""
    added = list(tokenizer("")["input_ids"])[:1]
    return added if added == [tokenizer.bos_token_id] else []


def take_segments(ids: Sequence[int], *, count: int, length: int, bos: Sequence[int]) -> Tensor:
    """``count`` stretches of ``length`` tokens spread evenly over ``ids``, int64 [count, length], each after ``bos``.

    Raises:
        InputError: the text is too short to give them without overlap.
    """
    own = length - len(bos)
    if own * count > len(ids):
        raise InputError(
            f"--text: {count} segments of {length} tokens need {own * count} tokens, found {len(ids)}; "
            "use fewer --segments, a shorter --prefix or a longer text"
        )
    step = len(ids) // count
    return torch.tensor([[*bos, *ids[i * step : i * step + own]] for i in range(count)])


def continue_segments(model: PreTrainedModel, ids: Tensor, *, prefix: int, seed: int) -> Tensor:
    """``ids`` [n, P + S + 1] with what follows the prefix replaced by the model's own words: S + 1 sampled tokens.

    Sampled from the full cache at temperature 1: greedy text of a small model soon repeats itself and drifts less.
    """
    length = ids.shape[1] - prefix
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        grown = model.generate(
            ids[:, :prefix].to(model.device),
            attention_mask=torch.ones_like(ids[:, :prefix], device=model.device),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            min_new_tokens=length,
            max_new_tokens=length,
        )
    return torch.as_tensor(grown).to(ids.device)
