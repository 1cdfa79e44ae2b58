"""Run a model over text, chunk by chunk with its own cache, and write down what attention is given.

Only the base model runs, never the language head. One shard per sample and chunk is written beside its place and
renamed, so a shard is whole or absent; an interrupted capture goes on where it stopped, to the same bytes.
"""

import errno
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from kvtool.capture.manifest import COMMON, COMPLETE, PARTIAL, FileRecord, Manifest, record_of
from kvtool.capture.planning import Plan, check_space, plan
from kvtool.capture.reader import Capture
from kvtool.errors import CaptureError, InputError, ModelError
from kvtool.models import LoadedModel
from kvtool.models.attention import attention_replaced
from kvtool.models.geometry import decoder

# repeated keys and values larger than this are never made: attention runs one KV head at a time instead
_EXPANDED_LIMIT = 128 << 20

Report = Callable[[int, int], None]


def record(
    loaded: LoadedModel, out: Path | str, *, text: str | Mapping[str, str] | None = None, **options: Any
) -> Capture:
    """Capture ``text``, or several by name (default: the shipped calibration text), into ``out``; see ``plan``."""
    from kvtool import texts

    if text is None:
        options = {"text_name": texts.CALIBRATION} | options
        text = texts.load(texts.CALIBRATION)
    return run(loaded, plan(loaded, text, **options), Path(out))


def run(
    loaded: LoadedModel, plan: Plan, out: Path, *, resume: bool = False, report: Report = lambda done, total: None
) -> Capture:
    """Make the capture that ``plan`` describes; ``report(tokens done, tokens in all)`` is called after every chunk.

    Raises:
        CaptureError: ``out`` is in use by something else, or holds an unfinished capture and ``resume`` was not said.
        InputError: the disk is full; what was written can be resumed.
    """
    files = _prepare(plan, out, resume)
    manifest = plan.manifest
    if files is None:
        return Capture.open(out)
    try:
        _write(out, COMMON, _common(plan), files)
        manifest.model_copy(update={"files": files}).write(out / PARTIAL)
        for sample in range(manifest.samples):
            mine = [manifest.shard(sample, chunk) for chunk in range(manifest.chunks)]
            if any(name not in files for name in mine):
                _sample(loaded, plan, out, sample, files, report)
            report((sample + 1) * manifest.context, manifest.samples * manifest.context)
        manifest.model_copy(update={"files": dict(sorted(files.items()))}).write(out / COMPLETE)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        written = sum(name in files for name in manifest.shards)
        raise InputError(
            f"{out}: the disk is full after {written} of {len(manifest.shards)} shards; "
            "free space, then run the same command with --resume"
        ) from error
    (out / PARTIAL).unlink(missing_ok=True)
    return Capture.open(out)


def _prepare(plan: Plan, out: Path, resume: bool) -> dict[str, FileRecord] | None:
    """Files already there; None if the capture is complete."""
    if (out / COMPLETE).is_file():
        there = Capture.open(out).manifest
        if difference := there.difference(plan.manifest):
            raise CaptureError(f"{out}: holds another capture ({difference}); choose another --out or remove it")
        (out / PARTIAL).unlink(missing_ok=True)
        return None
    files: dict[str, FileRecord] = {}
    if (out / PARTIAL).is_file():
        if not resume:
            raise CaptureError(f"{out}: holds an unfinished capture; add --resume to finish it, or remove it")
        there = Manifest.read(out / PARTIAL)
        if difference := there.difference(plan.manifest):
            raise CaptureError(f"{out}: the unfinished capture is another one ({difference}); choose another --out")
        files = {name: record for name, record in there.files.items() if _intact(out / name, record)}
    elif out.exists() and (not out.is_dir() or any(not _is_leftover(path) for path in out.iterdir())):
        raise CaptureError(f"{out}: is in use by something else; choose another --out")
    check_space(plan, out, sum(record.bytes for record in files.values()))
    try:
        out.mkdir(parents=True, exist_ok=True)
        # what a killed process was writing when it died
        for leftover in filter(_is_leftover, out.rglob("*")):
            leftover.unlink()
    except OSError as error:
        raise InputError(f"{out}: cannot write there: {error.strerror}") from error
    return files


def _is_leftover(path: Path) -> bool:
    return path.name.startswith(".") and path.name.endswith(".tmp")


def _intact(path: Path, record: FileRecord) -> bool:
    return path.is_file() and path.stat().st_size == record.bytes


def _sample(
    loaded: LoadedModel, plan: Plan, out: Path, sample: int, files: dict[str, FileRecord], report: Report
) -> None:
    """Prefill one sample; shards that are there already are computed again, for the cache, but not written."""
    manifest = plan.manifest
    tap = _Tap(plan)
    model, cache = decoder(loaded.model), None
    ids = plan.ids[sample].to(loaded.model.device)
    with (
        torch.no_grad(),
        attention_replaced(loaded.model, "kvtool-capture", tap, masks=True),
        _Watch(tap, plan),
        _Stream(tap, plan, model),
    ):
        for chunk in range(manifest.chunks):
            begin, end = chunk * manifest.chunk, min((chunk + 1) * manifest.chunk, manifest.context)
            name = manifest.shard(sample, chunk)
            tap.start(begin, end, keep=name not in files)
            positions = torch.arange(begin, end, device=ids.device)[None]
            output = model(
                input_ids=ids[None, begin:end], position_ids=positions, past_key_values=cache, use_cache=True
            )
            cache = output.past_key_values
            if name not in files:
                _write(out, name, tap.tensors, files)
                manifest.model_copy(update={"files": files}).write(out / PARTIAL)
            report(sample * manifest.context + end, manifest.samples * manifest.context)


class _Tap:
    """The attention function during capture: keeps what it is given for the new tokens, and attends as sdpa does."""

    def __init__(self, plan: Plan) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._plan, self._wanted = plan, frozenset(plan.manifest.recorded)
        self._asked = plan.query_positions
        self._keep, self._here, self._positions = False, self._asked, self._asked

    def start(self, begin: int, end: int, *, keep: bool) -> None:
        """The next forward is of positions ``begin`` to ``end``."""
        self.tensors, self._keep = {}, keep
        self._here = self._asked[(self._asked >= begin) & (self._asked < end)] - begin
        self._positions = torch.arange(begin, end)

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        layer = getattr(module, "layer_idx", -1)
        if self._keep and layer in self._wanted:
            new = query.shape[2]
            self._put(f"layers.{layer}.keys", key[0, :, -new:])
            self._put(f"layers.{layer}.values", value[0, :, -new:])
            if self._plan.manifest.queries != "none":
                whole = len(self._here) == new
                self._put(f"layers.{layer}.queries", query[0] if whole else query[0, :, self._here.to(query.device)])
        return _attend(module, query, key, value, mask, **options)

    def stream(self, layer: int, hidden: Tensor) -> None:
        """Note the squared norms of what comes into ``layer``, [B, S, width]."""
        if self._keep:
            self.tensors[f"layers.{layer}.stream"] = hidden[0].float().square().sum(-1).cpu()

    def _put(self, name: str, tensor: Tensor) -> None:
        self.tensors[name] = tensor.to("cpu", self._plan.dtype, copy=True).contiguous()

    @property
    def positions(self) -> Tensor:
        """Positions of the tokens of the present forward."""
        return self._positions


class _Watch:
    """Compares the cosines that one attention module per table receives with the capture's own table.

    A table that changes with the length (dynamic NTK, LongRoPE) is caught here: nothing could turn such keys back.
    """

    def __init__(self, tap: _Tap, plan: Plan) -> None:
        self._tap, self._plan = tap, plan
        self._handles: list[Any] = []

    def __enter__(self) -> None:
        first: dict[int, int] = {}
        shape = self._plan.manifest.shape
        for layer in self._plan.manifest.recorded:
            rope = shape.layers[layer].rope
            if rope is not None:
                first.setdefault(rope, layer)
        for layer in first.values():
            module = self._plan.geometry.attention[layer]

            def check(_: nn.Module, __: Any, options: dict[str, Any], layer: int = layer) -> None:
                self._check(layer, options.get("position_embeddings"))

            self._handles.append(module.register_forward_pre_hook(check, with_kwargs=True))

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _check(self, layer: int, received: Any) -> None:
        rope = self._plan.manifest.shape.rope(layer)
        if rope is None or not isinstance(received, tuple | list) or received[0].shape[-1] != 2 * len(rope.inv_freq):
            return
        cos = rope.table(self._tap.positions)[0]
        theirs = received[0][0, :, : cos.shape[1]].float().cpu()
        # a float32 angle of 1e6 rad is off by 0.06; a bfloat16 cosine by 2^-9
        if (cos - theirs).abs().max() > 0.1:
            at = int(self._tap.positions[0])
            raise ModelError(
                f"{self._plan.manifest.model}: the rotary table of layer {layer} changes with the length of the text, "
                f"by position {at} at the latest; capture with --context {at or 1} or less"
            )


class _Stream:
    """Shows the tap what comes into each layer: the residual stream that attention adds to.

    An attention error matters as much as it is large against it, which lets layers be compared. The layer is the
    module that holds the attention module; where its first argument is no hidden state, nothing is recorded.
    """

    def __init__(self, tap: _Tap, plan: Plan, model: nn.Module) -> None:
        self._tap, self._handles = tap, list[Any]()
        attention = {id(plan.geometry.attention[i]): i for i in plan.manifest.recorded}
        self._layers = {attention[id(c)]: m for m in model.modules() for c in m.children() if id(c) in attention}

    def __enter__(self) -> None:
        for layer, module in self._layers.items():

            def note(_: nn.Module, args: Any, options: dict[str, Any], layer: int = layer) -> None:
                hidden = args[0] if args else options.get("hidden_states")
                if isinstance(hidden, Tensor) and hidden.ndim == 3:
                    self._tap.stream(layer, hidden)

            self._handles.append(module.register_forward_pre_hook(note, with_kwargs=True))

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """Attention as sdpa computes it, in bounded memory; soft-capped logits, which sdpa lacks, as eager does."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    softcap = options.get("softcap")
    expanded = 2 * query.shape[1] * key.shape[2] * key.shape[3] * key.element_size()
    if softcap is None and expanded <= _EXPANDED_LIMIT:
        return sdpa_attention_forward(module, query, key, value, mask, **options)
    if mask is None and query.shape[2] > 1:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
        mask = mask.tril(key.shape[2] - query.shape[2])[None, None]
    group = query.shape[1] // key.shape[1]
    scale = options.get("scaling") or query.shape[-1] ** -0.5
    outs = []
    for head in range(key.shape[1]):
        q = query[:, head * group : (head + 1) * group]
        k, v = (tensor[:, head : head + 1].expand(-1, group, -1, -1) for tensor in (key, value))
        own = mask if mask is None or mask.shape[1] == 1 else mask[:, head * group : (head + 1) * group]
        if softcap is None:
            outs.append(nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=own, scale=scale))
        else:
            outs.append(_softcapped(q, k, v, own, float(softcap), scale))
    return torch.cat(outs, 1).transpose(1, 2).contiguous(), None


def _softcapped(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, softcap: float, scale: float) -> Tensor:
    logits = softcap * torch.tanh(query @ key.transpose(2, 3) * (scale / softcap))
    if mask is not None:
        allowed = mask if mask.dtype == torch.bool else mask == 0
        logits = logits.masked_fill(~allowed, torch.finfo(logits.dtype).min)
    return logits.softmax(-1, dtype=torch.float32).to(query.dtype) @ value


def _common(plan: Plan) -> dict[str, Tensor]:
    """What does not depend on the chunk: ids, positions, rotary tables, and how much each head's error matters."""
    positions = torch.arange(plan.manifest.context)
    tensors = {"ids": plan.ids, "positions": positions}
    if plan.manifest.queries != "none":
        tensors["query_positions"] = plan.query_positions
    for number, rope in enumerate(plan.manifest.shape.ropes):
        cos, sin = rope.table(positions)
        tensors |= {f"ropes.{number}.cos": cos, f"ropes.{number}.sin": sin}
    for layer in plan.manifest.recorded:
        gram = _output_gram(plan.geometry.attention[layer], plan.manifest.shape.layers[layer].num_heads)
        if gram is not None:
            tensors[f"layers.{layer}.output_gram"] = gram
    return tensors


def _output_gram(module: nn.Module, heads: int) -> Tensor | None:
    """W_h^T W_h of every query head, [HQ, D, D] float32, W the output projection; None if it is not found."""
    for name in ("o_proj", "out_proj", "dense", "wo", "c_proj"):
        weight = getattr(getattr(module, name, None), "weight", None)
        if (
            isinstance(weight, Tensor)
            and weight.ndim == 2
            and weight.is_floating_point()
            and weight.shape[1] % heads == 0
        ):
            split = weight.detach().float().view(weight.shape[0], heads, -1)
            return torch.einsum("ohd,ohe->hde", split, split).cpu()
    return None


def _write(out: Path, name: str, tensors: dict[str, Tensor], files: dict[str, FileRecord]) -> None:
    """Write one file whole, then note its hash."""
    if name in files:
        return
    path = out / name
    path.parent.mkdir(exist_ok=True)
    beside = path.with_name(f".{path.name}.tmp")
    try:
        save_file(tensors, beside)
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        written = record_of(beside)
        os.replace(beside, path)
    except BaseException as error:
        beside.unlink(missing_ok=True)
        # safetensors passes the system's error on in words only
        if isinstance(error, SafetensorError) and f"os error {errno.ENOSPC}" in str(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        raise
    files[name] = written
