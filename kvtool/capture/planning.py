"""Decide what a capture will hold before any of it is made: layers, tokens, disk, time."""

import hashlib
import importlib.metadata
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import kvtool
from kvtool.capture.manifest import Manifest
from kvtool.errors import InputError, ModelError
from kvtool.models import LoadedModel
from kvtool.models.geometry import RECORDABLE, Geometry, decoder, geometry, text_config
from kvtool.shapes import LayerKind
from kvtool.units import format_bytes, parse_indices

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_TRIAL = 128  # tokens of the forward that the estimate of time rests on


@dataclass(frozen=True)
class Plan:
    """A capture yet to be made: ``manifest`` without files, token ``ids`` [N, T], ``notes`` for the user."""

    manifest: Manifest
    ids: Tensor
    geometry: Geometry
    notes: tuple[str, ...]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype on disk."""
        return _DTYPES[self.manifest.dtype]

    @property
    def query_positions(self) -> Tensor:
        """[S] int64: all positions, or the asked number of them spread evenly, the last included."""
        queries, context = self.manifest.queries, self.manifest.context
        if queries == "none":
            return torch.empty(0, dtype=torch.int64)
        count = context if queries == "all" else min(int(queries), context)
        return torch.arange(1, count + 1) * context // count - 1

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values, queries and the stream's norms on disk."""
        kept = len(self.query_positions)
        layers = [self.manifest.shape.layers[i] for i in self.manifest.recorded]
        values = sum(
            layer.head_dim * (2 * layer.num_kv_heads * self.manifest.context + layer.num_heads * kept)
            for layer in layers
        )
        norms = 4 * len(layers) * self.manifest.context
        return (values * self.dtype.itemsize + norms) * self.manifest.samples

    @property
    def cache_nbytes(self) -> int:
        """Bytes of the model's own cache at the end of a sample, at most."""
        itemsize = _DTYPES[self.manifest.computed_in].itemsize
        shapes = self.manifest.shape.layers
        return sum(2 * layer.num_kv_heads * layer.head_dim for layer in shapes) * self.manifest.context * itemsize

    def seconds(self, loaded: LoadedModel) -> float:
        """Time it will take, from one short forward: the dense part grows linearly, attention with the square."""
        model = decoder(loaded.model)
        ids = self.ids[:1, :_TRIAL].to(loaded.model.device)
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
            begin = time.perf_counter()
            model(input_ids=ids, use_cache=False)
            if ids.is_cuda:
                torch.cuda.synchronize()
            per_token = (time.perf_counter() - begin) / ids.shape[1]
        dense = 2 * sum(p.numel() for name, p in model.named_parameters() if "embed" not in name)
        # two products of every query with half of the keys
        attention = (
            sum(2 * layer.num_heads * layer.head_dim for layer in self.manifest.shape.layers) * self.manifest.context
        )
        return per_token * (1 + attention / max(dense, 1)) * self.manifest.context * self.manifest.samples


def plan(
    loaded: LoadedModel,
    text: str | Mapping[str, str],
    *,
    text_name: str = "text",
    context: int = 8192,
    samples: int = 1,
    layers: str | Sequence[int] = "all",
    queries: str | int = "all",
    dtype: str = "auto",
    chunk: int = 512,
    seed: int = 42,
) -> Plan:
    """What capturing ``text`` would make, or several texts by name: ``samples`` of each, one after the other.

    layers: ``all``, a list such as ``0,5-9``, or indices. queries: ``all``, ``none`` or how many per sample.
    dtype: on disk; ``auto`` is float16 for a float16 model and bfloat16 for any other.

    Raises:
        InputError: text too short, or an option that does not fit.
        ModelError: nothing of this model can be captured.
    """
    if min(context, samples, chunk) < 1:
        raise InputError("context, samples and chunk must be at least 1")
    found = geometry(loaded.model)
    notes = list(found.notes)
    recorded, why_not = _choose(loaded, found, layers)
    texts = {text_name: text} if isinstance(text, str) else text
    prefix = _prefix(loaded.tokenizer)
    stretches = [_stretches(loaded.tokenizer, of, name, context, samples, seed, prefix) for name, of in texts.items()]
    longest = getattr(text_config(loaded.model), "max_position_embeddings", None)
    if longest and context > longest:
        notes.append(
            f"context {context} is beyond the model's {longest} positions: it will run, but keys and values past "
            f"{longest} are those of a model that has lost the thread"
        )
    if any(layer.kind is LayerKind.LINEAR for layer in found.shape.layers):
        chunk = context
        notes.append("recurrent layers cannot be resumed mid-text: each sample is prefilled in one piece")
    computed_in = str(next(loaded.model.parameters()).dtype).removeprefix("torch.")
    if dtype == "auto":
        dtype = "float16" if computed_in == "float16" else "bfloat16"
    if dtype not in _DTYPES:
        raise InputError(f"dtype '{dtype}': expected auto, {', '.join(_DTYPES)}")
    manifest = Manifest(
        model=loaded.name,
        revision=loaded.revision,
        fingerprint=loaded.fingerprint,
        shape=found.shape,
        recorded=tuple(recorded),
        not_recorded=why_not,
        text=",".join(texts),
        text_sha256=hashlib.sha256("".join(texts.values()).encode()).hexdigest(),
        context=context,
        samples=samples * len(texts),
        starts=tuple(start for _, starts in stretches for start in starts),
        prefix=prefix,
        queries=_queries(queries),
        dtype=dtype,
        computed_in=computed_in,
        device=loaded.model.device.type,
        chunk=min(chunk, context),
        seed=seed,
        versions={"kvtool": kvtool.__version__}
        | {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
    )
    return Plan(manifest, torch.cat([ids for ids, _ in stretches]), found, tuple(notes))


def check_space(plan: Plan, out: Path, written: int = 0) -> None:
    """There is room for the capture where it goes, of which ``written`` bytes are there already.

    Raises:
        InputError: there is not.
    """
    place = out.absolute()
    while not place.exists():
        place = place.parent
    free, needed = shutil.disk_usage(place).free, plan.nbytes - written
    if free < needed:
        raise InputError(
            f"{out}: the capture needs {format_bytes(needed)}, {format_bytes(free)} are free; "
            "free space, or lower --context, --samples, --layers or --queries"
        )


def _choose(loaded: LoadedModel, found: Geometry, layers: str | Sequence[int]) -> tuple[list[int], dict[int, str]]:
    """Layers to record, and a reason for each other one."""
    count = len(found.shape.layers)
    asked = parse_indices(layers, count) if isinstance(layers, str) else sorted(set(layers))
    if not asked or asked[-1] >= count or asked[0] < 0:
        raise InputError(f"layers {asked}: expected indices in 0-{count - 1}")
    able = [i for i, layer in enumerate(found.shape.layers) if layer.kind in RECORDABLE]
    recorded = [i for i in asked if i in able]
    if not recorded:
        raise ModelError(
            f"{loaded.name}: none of the layers asked for can be captured; layer {asked[0]}: {found.reasons[asked[0]]}"
        )
    reasons = {i: found.reasons.get(i, "not asked for") for i in range(count) if i not in recorded}
    return recorded, reasons


def _stretches(
    tokenizer: Any, text: str, name: str, context: int, samples: int, seed: int, prefix: tuple[int, ...]
) -> tuple[Tensor, list[int]]:
    """Tokens [samples, T] of stretches of the text that do not overlap, special tokens first, and where each starts."""
    tokens = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
    length = context - len(prefix)
    if length < 1 or len(tokens) < length * samples:
        raise InputError(
            f"text '{name}': holds {len(tokens)} tokens, {samples} x {context} are needed; "
            "give a longer --text or lower --context or --samples"
        )
    places = len(tokens) // length
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(places, generator=generator)[:samples].sort().values * length
    ids = torch.stack([torch.cat([torch.tensor(prefix, dtype=torch.int64), tokens[i : i + length]]) for i in chosen])
    return ids, chosen.tolist()


def _prefix(tokenizer: Any) -> tuple[int, ...]:
    """What the tokenizer itself puts before a text, such as <bos>: without it some models are lost."""
    return (tokenizer.bos_token_id,) if _adds_bos(tokenizer) else ()


def _adds_bos(tokenizer: Any) -> bool:
    ids = tokenizer("a").input_ids
    return tokenizer.bos_token_id is not None and len(ids) > 1 and ids[0] == tokenizer.bos_token_id


def _queries(queries: str | int) -> str:
    text = str(queries).strip().lower()
    if text not in ("all", "none") and not (text.isdigit() and int(text) > 0):
        raise InputError(f"queries '{queries}': expected all, none or a positive number")
    return text
