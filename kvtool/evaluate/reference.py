"""The full cache's side of the comparison: computed once per segment, kept on disk by hash.

A stored segment is what the last layer hands to the output embedding, [S, hidden], rather than logits a hundred times
that size; it is used only if it gives the model's logits back bit for bit (soft caps included), otherwise the logits
are stored. With it lie the last queries of the prefix and, where the layers allow and the size is moderate, the exact
keys and values, so that a second calibration costs its own pass and nothing else.
"""

import copy
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from kvtool.adapter import adapted
from kvtool.calibration import Calibration
from kvtool.home import home, replacing
from kvtool.methods.base import LOOKS_BACK
from kvtool.runtime import Prefill, exact_prefill

FORMAT = 1
PREFILL_CHUNK = 4096  # tokens; bounds the activations of a long prefix
_KEEP_PREFIX = 2 << 30  # bytes of exact keys and values kept on disk for all segments of a run
_KEEP_TOTAL = 6 << 30  # bytes of all runs; the least recently used goes first


class Segment(NamedTuple):
    """One stretch of text with the full cache's answers. ids: [1, P + S + 1]. logits: [S, V], one per scored token."""

    ids: Tensor
    prefill: Prefill
    logits: Tensor


@dataclass(frozen=True)
class Store:
    """A directory of ``eval-cache`` named by the hash of everything its content depends on."""

    path: Path

    @classmethod
    def of(cls, **what: Any) -> "Store":
        """The store for ``what``: plain JSON values; versions are added."""
        what |= {"format": FORMAT, "torch": torch.__version__, "transformers": transformers.__version__}
        name = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:32]
        return cls(home() / "eval-cache" / name)

    def load(self, name: str) -> dict[str, Tensor] | None:
        """Tensors stored under ``name``, or None."""
        try:
            tensors = load_file(self.path / f"{name}.safetensors")
        except (OSError, SafetensorError):
            return None
        os.utime(self.path)
        return tensors

    def save(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Store ``tensors`` atomically; a full disk costs time in the next run, not this one's result."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with replacing(self.path / f"{name}.safetensors") as beside:
                save_file({key: tensor.cpu().contiguous() for key, tensor in tensors.items()}, beside)
            prune(self.path.parent, keep=self.path)
        except (OSError, SafetensorError):
            return


def prune(root: Path, *, keep: Path, limit: int = _KEEP_TOTAL) -> None:
    """Remove the least recently used stores until all together stay below ``limit`` bytes; ``keep`` stays."""
    stores = [path for path in root.iterdir() if path.is_dir()]
    sizes = {path: sum(file.stat().st_size for file in path.iterdir()) for path in stores}
    total = sum(sizes.values())
    for path in sorted(stores, key=lambda path: path.stat().st_mtime):
        if total > limit and path != keep:
            shutil.rmtree(path, ignore_errors=True)
            total -= sizes[path]


def segments(
    model: PreTrainedModel, ids: Tensor, store: Store, *, prefix: int, chunk: int, queries: int = LOOKS_BACK
) -> Iterator[Segment]:
    """The segments of ``ids`` [n, P + S + 1], P = ``prefix``, one at a time, with the prefix's last ``queries``."""
    for i, row in enumerate(ids):
        segment = _restore(model, row[None], store.load(str(i)), prefix, chunk, queries)
        if segment is None:
            segment, tensors = _compute(model, row[None], prefix, chunk, queries, segments=len(ids))
            store.save(str(i), tensors)
        yield segment


def own_prefill(model: PreTrainedModel, calibration: Calibration, ids: Tensor, prefill: Prefill) -> Prefill:
    """``prefill`` of ``ids``, or another one if the calibration adapts the model, which then has other keys."""
    if calibration.adapter is None:
        return prefill
    with adapted(model, calibration.adapter):
        return exact_prefill(model, ids, last_queries=calibration.method.looks_back, chunk=PREFILL_CHUNK)


def fork(cache: Cache) -> Cache:
    """A cache that continues ``cache`` without changing it; memory is shared until it grows."""
    twin = copy.copy(cache)
    # growing layers replace their tensors, they never write into them; others may
    twin.layers = [copy.copy(x) if isinstance(x, DynamicLayer) else copy.deepcopy(x) for x in cache.layers]
    return twin


def _compute(
    model: PreTrainedModel, ids: Tensor, prefix: int, chunk: int, queries: int, *, segments: int
) -> tuple[Segment, dict[str, Tensor]]:
    prefill = exact_prefill(model, ids[:, :prefix], last_queries=queries, chunk=PREFILL_CHUNK)
    states, logits, cache = [], [], fork(prefill.cache)
    for part in ids[:, prefix:-1].split(chunk, 1):
        with _output_input(model) as seen:
            logits.append(model(part, past_key_values=cache, use_cache=True).logits[0])
        states.append(seen)
    segment = Segment(ids, prefill, torch.cat(logits))
    reproduced = all(
        len(seen) == 1 and torch.equal(_project(model, seen[0])[0], found)
        for seen, found in zip(states, logits, strict=True)
    )
    tensors = {"states": torch.cat([seen[0][0] for seen in states])} if reproduced else {"logits": segment.logits}
    tensors |= {f"queries.{i}": kept for i, kept in prefill.queries.items()}
    tensors |= _prefix_tensors(prefill.cache, _KEEP_PREFIX // segments)
    return segment, tensors


def _restore(
    model: PreTrainedModel, ids: Tensor, tensors: dict[str, Tensor] | None, prefix: int, chunk: int, queries: int
) -> Segment | None:
    if tensors is None:
        return None
    tensors = {name: tensor.to(model.device) for name, tensor in tensors.items()}
    if "states" in tensors:
        logits = torch.cat([_project(model, part[None])[0] for part in tensors["states"].split(chunk)])
    else:
        logits = tensors["logits"]
    cache = DynamicCache(config=model.config)
    if "keys.0" not in tensors:
        prefill = exact_prefill(model, ids[:, :prefix], last_queries=queries, chunk=PREFILL_CHUNK)
        return Segment(ids, prefill, logits)
    for i, layer in enumerate(cache.layers):
        layer.update(tensors[f"keys.{i}"], tensors[f"values.{i}"])
    kept = {int(name.split(".")[1]): t for name, t in tensors.items() if name.startswith("queries.")}
    return Segment(ids, Prefill(cache, kept), logits)


def _prefix_tensors(cache: Cache, limit: int) -> dict[str, Tensor]:
    # a sliding or recurrent layer is more than its keys and values
    if any(type(layer) is not DynamicLayer for layer in cache.layers):
        return {}
    tensors = {f"keys.{i}": layer.keys for i, layer in enumerate(cache.layers)}
    tensors |= {f"values.{i}": layer.values for i, layer in enumerate(cache.layers)}
    return tensors if sum(t.numel() * t.element_size() for t in tensors.values()) <= limit else {}


class _output_input:
    """Records what the output embedding is given."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.embedding: nn.Module | None = model.get_output_embeddings()
        self.seen: list[Tensor] = []

    def __enter__(self) -> list[Tensor]:
        if self.embedding is not None:
            self.hook = self.embedding.register_forward_pre_hook(lambda module, given: self.seen.append(given[0]))
        return self.seen

    def __exit__(self, *_: object) -> None:
        if self.embedding is not None:
            self.hook.remove()


def _project(model: PreTrainedModel, states: Tensor) -> Tensor:
    logits: Tensor = model.get_output_embeddings()(states)
    softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap
