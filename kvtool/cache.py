"""The compressed cache that a model is served from: one layer for transformers, and the cache of all layers.

A layer holds its tokens in two places. *Exact*: the sinks and the most recent tokens, in the model's dtype.
*Compressed*: everything between, in whole blocks, as the method left it. A forward pass attends first and compresses
what has left the window afterwards, so prefill attention is exact and the compressed tokens are read from then on.
"""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from kvtool import attention
from kvtool.attention import Attended
from kvtool.backends import MAX_STEP, Backend, choose_backend
from kvtool.calibration import Calibration
from kvtool.errors import ModelError
from kvtool.exact import exact_attention
from kvtool.methods.base import LayerCalibration, Method, mapped
from kvtool.packing import PAGE
from kvtool.parts import Parts
from kvtool.policy import CachePolicy

if TYPE_CHECKING:
    from kvtool.captured import CapturedDecoder
    from kvtool.runtime import Prefill

# elements of one block of logits: 256 MiB in float32
_LOGITS = 1 << 26
_OBSERVED = 64  # queries of a pass whose attention a method that moves tokens is shown


@dataclass(frozen=True)
class CacheBytes:
    """What a cache costs, for the layers whose cache grows with the context.

    compressed: bytes of the packed parts. exact: bytes of sinks, window and exact layers, as held.
    values: numbers the cache stands for, 2 T H D summed over layers and sequences. tokens: length of the sequence.
    exact_values: how many of them are held exactly. resident: all bytes allocated, spare capacity included.
    host, disk: bytes that a method keeps in host memory and in a file besides, in none of the other figures.
    """

    compressed: int
    exact: int
    values: int
    exact_values: int
    resident: int
    tokens: int
    host: int = 0
    disk: int = 0

    @property
    def stored(self) -> int:
        """Bytes that a 16-bit deployment stores: the packed parts as they are, exact tokens at 2 bytes a value.

        On a CPU the model often runs in float32; counting its window at 4 bytes would charge the method for that.
        """
        return self.compressed + min(self.exact, 2 * self.exact_values)

    @property
    def bits_per_value(self) -> float:
        """Stored bits over values; 16 for an uncompressed cache."""
        return 8 * self.stored / self.values if self.values else 0.0


class CompressedLayer(DynamicLayer):
    """One layer's cache. ``keys`` and ``values`` are the exact tokens: sinks first, then the most recent."""

    keys: Tensor
    values: Tensor
    is_initialized: bool

    def __init__(self, method: Method, layer: LayerCalibration, policy: CachePolicy, backend: Backend) -> None:
        super().__init__()
        self.method, self.layer, self.policy, self.backend = method, layer, policy, backend
        self._start_empty()

    def _start_empty(self) -> None:
        self.parts = Parts(growing=self.method.block is not None and not self.method.moves)
        self.carry: Any = None
        self.shares: Tensor | None = None  # what the last pass attended to, until settle() shows it to the method
        self.fresh: Tensor | None = None  # the keys update() last returned; attend() must be given the same

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take in new tokens [B, H, S, D] and return them alone: attention reads the past from this layer."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = torch.cat([self.keys, key_states], -2) if self.keys.numel() else key_states
        self.values = torch.cat([self.values, value_states], -2) if self.values.numel() else value_states
        self.fresh = key_states
        return key_states, value_states

    def attend(self, queries: Tensor, *, scale: float, softcap: float | None) -> Tensor:
        """Attention of the newest S tokens' ``queries`` [B, HQ, S, D] over everything; [B, HQ, S, D]."""
        kernels = self.backend.kernel is not None
        whole = not kernels and type(self.method).attend is Method.attend
        if not len(self.parts):
            return exact_attention(queries, self.keys, self.values, scale=scale, softcap=softcap)
        if whole or (self.method.moves and queries.shape[2] > MAX_STEP):
            return self._attend_whole(queries, scale=scale, softcap=softcap)
        if self.method.moves and kernels:
            return self._attend_blocks(queries, scale=scale, softcap=softcap).to(queries.dtype)
        return self._attend_parts(queries, scale=scale, softcap=softcap).out.to(queries.dtype)

    def _attend_whole(self, queries: Tensor, *, scale: float, softcap: float | None) -> Tensor:
        # one softmax over the restored cache is the definition; with a lossless method it is the model's own
        read = [self.method.decompress(kv, self.layer, positions=at) for kv, at in self.parts.read(self.keys.device)]
        sinks = min(self.policy.sinks, self.keys.shape[-2])
        dtype = read[0].keys.dtype
        bias = None
        if any(part.bias is not None for part in read):
            nothing = torch.zeros((), device=self.keys.device)
            shapes = [part.keys.shape[:-1] for part in read]
            biases = [nothing.expand(s) if p.bias is None else p.bias for p, s in zip(read, shapes, strict=True)]
            before, after = (nothing.expand(*self.keys.shape[:2], n) for n in (sinks, self.keys.shape[-2] - sinks))
            bias = torch.cat([before, *biases, after], -1)
        keys = torch.cat(
            [self.keys[:, :, :sinks].to(dtype), *(p.keys for p in read), self.keys[:, :, sinks:].to(dtype)], 2
        )
        values = torch.cat(
            [self.values[:, :, :sinks].to(dtype), *(p.values for p in read), self.values[:, :, sinks:].to(dtype)], 2
        )
        if self.method.moves:
            last = queries[:, :, -_OBSERVED:]
            self.shares = attention.block_shares(last, keys, first=sinks, block=PAGE, scale=scale, softcap=softcap)
        out = exact_attention(queries.to(dtype), keys, values, scale=scale, softcap=softcap, bias=bias)
        return out.to(queries.dtype)

    def _attend_blocks(self, queries: Tensor, *, scale: float, softcap: float | None) -> Tensor:
        """By a kernel that says what each block weighs, for a method that moves."""
        merged = attention.attend(queries, self.keys, self.values, scale=scale, softcap=softcap, causal=True)
        sinks = min(self.policy.sinks, self.keys.shape[-2])
        _, recent = attention.block_lse(queries, self.keys, first=sinks, block=PAGE, scale=scale, softcap=softcap)
        blocks = []
        for kv, at in self.parts.read(self.keys.device):
            part, found = self.backend.attend_blocks(
                self.method, queries, kv, self.layer, positions=at, scale=scale, softcap=softcap
            )
            merged = attention.merge(merged, part)
            blocks.append(found)
        self.shares = (torch.cat([*blocks, recent], -1) - merged.lse[..., None]).exp()
        return merged.out

    def _attend_parts(self, queries: Tensor, *, scale: float, softcap: float | None) -> Attended:
        step = max(1, _LOGITS // (queries.shape[0] * queries.shape[1] * self.get_seq_length()))
        S = queries.shape[2]
        # the exact part is causal, so its queries cannot be split without shifting: it is small
        merged = attention.attend(queries, self.keys, self.values, scale=scale, softcap=softcap, causal=True)
        for kv, positions in self.parts.read(self.keys.device):
            read = [
                self.backend.attend(
                    self.method,
                    queries[:, :, i : i + step],
                    kv,
                    self.layer,
                    positions=positions,
                    scale=scale,
                    softcap=softcap,
                )
                for i in range(0, S, step)
            ]
            part = Attended(torch.cat([r.out for r in read], 2), torch.cat([r.lse for r in read], 2))
            merged = attention.merge(merged, part)
        return merged

    def settle(self, queries: Tensor | None) -> None:
        """Compress what has left the window. ``queries`` [B, HQ, W, D] are the newest, for methods that read them."""
        if self.shares is not None:
            self.carry, self.shares = self.method.observe(self.shares, self.carry), None
        sinks, block = self.policy.sinks, self.method.block or PAGE
        overflow = self.keys.shape[-2] - sinks - self.policy.window
        # a method without blocks takes the whole prefill at once, whatever its length
        count = overflow if self.method.block is None and not len(self.parts) else overflow // block * block
        if self.method.moves and len(self.parts):
            count = max(0, count)
        elif count <= 0 or (self.method.block is None and overflow < block):
            return
        chosen = slice(sinks, sinks + count)
        start = sinks + self.parts.tokens
        # copies, not views: the compressed tokens' memory is really given back
        keys = torch.cat([self.keys[:, :, :sinks], self.keys[:, :, sinks + count :]], 2)
        values = torch.cat([self.values[:, :, :sinks], self.values[:, :, sinks + count :]], 2)
        kv, self.carry = self.backend.compress(
            self.method,
            self.keys[:, :, chosen],
            self.values[:, :, chosen],
            self.layer,
            positions=torch.arange(start, start + count, device=self.keys.device),
            queries=queries,
            carry=self.method.begin(queries, keys, values, self.layer, sinks=sinks, carry=self.carry),
        )
        if self.method.moves:
            self.parts.replace(kv, sinks, start - sinks + count)
        else:
            self.parts.append(kv, start, count)
        self.keys, self.values = keys, values

    def get_seq_length(self) -> int:
        """Tokens seen, exact and compressed."""
        exact = self.keys.shape[-2] if self.is_initialized and self.keys.numel() else 0
        return exact + self.parts.tokens

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """Length and offset for mask creation; transformers before 5.6 passes positions rather than a count."""
        count = query_length.shape[0] if isinstance(query_length, Tensor) else query_length
        return self.get_seq_length() + count, 0

    def reset(self) -> None:
        """Forget every token."""
        self.keys = self.values = torch.empty(0)
        self.is_initialized = False
        self._start_empty()

    def crop(self, max_length: int) -> None:
        """Drop the newest tokens: down to ``max_length``, or that many if negative.

        Raises:
            ModelError: the cut would reach into compressed blocks.
        """
        drop = -max_length if max_length < 0 else max(0, self.get_seq_length() - max_length)
        recent = self.keys.shape[-2] - (self.policy.sinks if len(self.parts) else 0)
        if drop > recent:
            raise ModelError(
                f"cannot drop {drop} tokens from the cache: only the {recent} most recent are held exactly; "
                "calibrate with a larger --window"
            )
        if drop:
            self.keys, self.values = self.keys[:, :, :-drop], self.values[:, :, :-drop]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow the beams."""
        self._map_batch(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        self._map_batch(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some sequences."""
        self._map_batch(lambda x: x[indices.to(x.device)])

    def _map_batch(self, function: Any) -> None:
        if not self.is_initialized:
            return
        self.keys, self.values = function(self.keys), function(self.values)
        self.parts.map(function)
        self.carry = mapped(self.carry, function)


class CompressedCache(Cache):
    """A transformers cache whose growing layers are compressed; pass it as ``past_key_values``."""

    def __init__(self, model: PreTrainedModel, calibration: Calibration, *, backend: str = "auto") -> None:
        self.calibration = calibration.to(model.device)
        layers = list(DynamicCache(config=model.config).layers)
        chosen = set(calibration.shape.compressible) - set(calibration.policy.exact_layers)
        shapes = {calibration.shape.layers[i] for i in chosen}
        self.backend = choose_backend(backend, calibration.method, model.device, shapes)
        for i in chosen:
            layers[i] = CompressedLayer(calibration.method, self.calibration.layer(i), calibration.policy, self.backend)
        self.decoder: CapturedDecoder | None = None  # while steps are replayed, whose shapes must not change
        self.steps = 0  # passes of one token in a row
        super().__init__(layers=layers)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take in new tokens of one layer; what is around this may be compiled."""
        keys, values = super().update(*args, **kwargs)
        return keys, values

    def compressed_layers(self) -> Iterator[tuple[int, CompressedLayer]]:
        """Index and layer of every layer that is compressed."""
        return ((i, layer) for i, layer in enumerate(self.layers) if isinstance(layer, CompressedLayer))

    def adopt(self, prefill: "Prefill") -> None:
        """Take over an exact cache as if prefilled here; what lies outside sinks and window is compressed."""
        self.reset()
        for i, (mine, theirs) in enumerate(zip(self.layers, prefill.cache.layers, strict=True)):
            if not getattr(theirs, "is_initialized", False):
                continue
            if not isinstance(mine, CompressedLayer):
                # a sliding layer counts what it has dropped: its state is more than its tensors
                self.layers[i] = deepcopy(theirs)
                continue
            mine.update(theirs.keys, theirs.values)
            queries = prefill.queries.get(i)
            mine.settle(None if queries is None else queries[:, :, -mine.method.looks_back :])

    def release(self) -> None:
        """Let the layers grow again, if steps of static shapes are being replayed."""
        self.steps = 0
        if self.decoder is not None:
            decoder, self.decoder = self.decoder, None
            decoder.release()

    def reset(self) -> None:
        """Forget every token."""
        self.release()
        super().reset()

    def crop(self, max_length: int) -> None:
        """Drop the newest tokens of every layer."""
        self.release()
        super().crop(max_length)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow the beams."""
        self.release()
        super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        self.release()
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some sequences."""
        self.release()
        super().batch_select_indices(indices)

    def nbytes(self) -> CacheBytes:
        """What the cache costs now."""
        compressed = exact = values = exact_values = resident = host = disk = 0
        for i in self.calibration.shape.compressible:
            layer = self.layers[i]
            if not getattr(layer, "is_initialized", False):
                continue
            held = layer.keys.numel() + layer.values.numel()
            size = layer.keys.element_size() * held
            packed, spare = (layer.parts.nbytes, layer.parts.spare) if isinstance(layer, CompressedLayer) else (0, 0)
            if isinstance(layer, CompressedLayer):
                host += layer.method.host_bytes(layer.carry)
                disk += layer.method.disk_bytes(layer.carry)
                resident += sum(self.backend.resident(kv) for kv, _ in layer.parts.read(layer.keys.device))
            compressed, exact, exact_values = compressed + packed, exact + size, exact_values + held
            # not from what is held: without sinks and window it may be nothing
            B, H, _, D = layer.keys.shape
            values += 2 * B * H * D * layer.get_seq_length()
            resident += packed + spare + size
        return CacheBytes(compressed, exact, values, exact_values, resident, self.get_seq_length(), host, disk)

    def bits_per_value(self) -> float:
        """Stored bits per value, sinks, window and exact layers included."""
        return self.nbytes().bits_per_value
