"""Decode steps of one token, captured once as a CUDA graph and replayed while the cache grows.

The layers of a step have static shapes (static.py). Between replays the host advances the numbers they read; when a
block of tokens has left the window it is compressed as ever, outside the graph, into the room that is there. Without a
GPU the same step runs as it is, uncaptured.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from kvtool.cache import CompressedCache, CompressedLayer
from kvtool.errors import ModelError
from kvtool.packing import PAGE
from kvtool.static import Counters, StaticLayer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# tokens beyond the window before they are compressed, for a method whose every call is a run and a capture of its own
_LAZY = 512


class CapturedDecoder:
    """Decode steps of one token for each sequence of a served ``cache``, replayed from a CUDA graph.

    Room for ``capacity`` compressed tokens is made at once; when it is used up the room grows by a quarter and the
    step is captured again. Made within ``serve``, by hand or by its own ``capacity``.

    forward: the model's own, if it has been replaced. captures: how often the step was captured; 0 without a GPU.

    Raises:
        ModelError: the model or the method cannot be served by a step of static shapes, or nothing is compressed yet.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        cache: CompressedCache,
        *,
        capacity: int = 0,
        forward: Callable[..., Any] | None = None,
    ) -> None:
        reason = refuses(cache) or (None if _begun(cache) else "nothing is compressed yet, prefill more tokens")
        if reason:
            raise ModelError(f"a decode step of static shapes: {reason}; use the model itself")
        self.cache, self.captures = cache, 0
        self._forward = forward or model.forward
        layers = [layer for _, layer in cache.compressed_layers()]
        B, device = len(layers[0].keys), layers[0].keys.device
        method, parts = cache.calibration.method, layers[0].parts
        self._block = (method.block or PAGE) if parts.growing else _LAZY
        self.counters = Counters(B, device)
        self._ids = torch.zeros(B, 1, dtype=torch.int64, device=device)
        self._positions = torch.full((B, 1), cache.get_seq_length(), dtype=torch.int64, device=device)
        for i, layer in list(cache.compressed_layers()):
            layer.parts.reserve(capacity)
            cache.layers[i] = StaticLayer(layer, self.counters, spare=self._block)
        self._count()
        self._at = torch.zeros(1, dtype=torch.int64, device=device)  # blocks compressed so far
        self._graph: torch.cuda.CUDAGraph | None = None
        self._turn_graph: torch.cuda.CUDAGraph | None = None
        self._finite = torch.ones((), dtype=torch.bool, device=device)
        self._logits: Tensor | None = None
        self._warm, self._capturable = False, device.type == "cuda"  # warm: the next step can be captured
        # compressing by a kernel can be replayed as well, after a first time that loads it
        self._may_turn = self._capturable and hasattr(cache.backend.kernel, "compress")
        self._turns = False
        self._read = self._tensors()

    def step(self, ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """Logits [B, vocabulary] after the tokens ``ids`` [B] or [B, 1]; position_ids [B, 1]: if not the next one."""
        with torch.no_grad():
            return self._step(ids, position_ids)

    def _step(self, ids: Tensor, position_ids: Tensor | None) -> Tensor:
        self._ids.copy_(ids.reshape(-1, 1))
        if position_ids is not None:
            self._positions.copy_(position_ids)
        if self._warm and self._graph is None:
            self._capture()
        if self._graph is None:
            self._logits = self._run()
            self._warm = self._capturable
        else:
            self._graph.replay()
        assert self._logits is not None
        logits = self._logits.clone()
        self._advance()
        return logits

    def release(self) -> None:
        """Give the cache its growing layers back, for passes of any length."""
        self._drop()
        for i, layer in list(self.cache.compressed_layers()):
            if isinstance(layer, StaticLayer):
                self.cache.layers[i] = layer.released()

    def _run(self) -> Tensor:
        out = self._forward(
            input_ids=self._ids, position_ids=self._positions, past_key_values=self.cache, use_cache=True
        )
        logits: Tensor = out.logits[:, -1]
        return logits

    def _capture(self) -> None:
        self._graph = self._captured(lambda: setattr(self, "_logits", self._run()))
        if self._graph is None:
            self._warm = self._capturable = False
        else:
            self.captures += 1

    def _captured(self, work: Callable[[], None]) -> torch.cuda.CUDAGraph | None:
        graph = torch.cuda.CUDAGraph()
        try:
            # relaxed: a kernel may be loaded on its first use
            with torch.cuda.graph(graph, capture_error_mode="relaxed"):
                work()
        except RuntimeError as error:
            warnings.warn(f"a part of decoding could not be captured, it runs as it is: {error}", stacklevel=4)
            return None
        return graph

    def _drop(self) -> None:
        self._graph, self._logits, self._warm = None, None, False
        self._turn_graph, self._turns = None, False

    def _advance(self) -> None:
        """After a step: count the token, and compress once a block has left the window."""
        self._positions += 1
        layers = self._static()
        for layer in layers:
            layer.show(layer.filled + 1)
        policy = self.cache.calibration.policy
        if layers[0].filled - policy.sinks - policy.window < self._block:
            self.counters.length += 1
            return
        if not (self._turns and layers[0].parts.room(self._block) and self._turn(layers)):
            for layer in layers:
                layer.compress()
            self._turns = self._may_turn
        self._count()
        before, self._read = self._read, self._tensors()
        # a part that was moved, or a new run: the graphs would read what was before
        if list(map(id, before)) != list(map(id, self._read)):
            self._drop()

    def _turn(self, layers: list[StaticLayer]) -> bool:
        """Compress a block of every layer, replayed like a step; whether it could be captured."""
        self._at.fill_(layers[0].parts.tokens // self._block)
        if self._turn_graph is None and self._capturable:
            self._turn_graph = self._captured(lambda: setattr(self, "_finite", self._compress(layers)))
            if self._turn_graph is None:
                self._may_turn = False
                return False
        if self._turn_graph is None:
            self._finite = self._compress(layers)
        else:
            self._turn_graph.replay()
        for layer in layers:
            layer.turned(self._block)
        if not bool(self._finite):
            raise ModelError(
                "a compressed page: expected finite numbers below 65504, found NaN or more; "
                "the model's cache overflows: load the model in bfloat16 or float32"
            )
        return True

    def _compress(self, layers: list[StaticLayer]) -> Tensor:
        within = torch.arange(self._block, device=self._at.device)
        positions = self.cache.calibration.policy.sinks + self._block * self._at + within
        return torch.stack([layer.turn(self._at, positions) for layer in layers]).all()

    def _count(self) -> None:
        layer = self._static()[0]
        self.counters.length.fill_(layer.filled)
        self.counters.pages.fill_(layer.parts.tokens // PAGE)

    def _static(self) -> list[StaticLayer]:
        return [layer for layer in self.cache.layers if isinstance(layer, StaticLayer)]

    def _tensors(self) -> list[Any]:
        return [field for layer in self._static() for run, _, _ in layer.parts.whole() for field in run]


@contextmanager
def replayed(model: "PreTrainedModel", cache: CompressedCache, capacity: int) -> Iterator[None]:
    """Within the context, passes of one token through ``model`` are steps of a :class:`CapturedDecoder`.

    The second such pass in a row begins it: beams, which reorder the cache between passes, and speculation, which
    crops it, decode as ever. Any other pass gives the cache its growing layers back.
    """
    if reason := refuses(cache):
        warnings.warn(f"capacity: {reason}; every pass is launched kernel by kernel", stacklevel=4)
        yield
        return
    for _, layer in cache.compressed_layers():
        layer.parts.reserve(capacity)
    forward, own = model.forward, "forward" in vars(model)

    @wraps(forward)
    def step(*args: Any, **kwargs: Any) -> Any:
        if len(args) == 1:  # every language model's first
            kwargs, args = {"input_ids": args[0], **kwargs}, ()
        if args or not _is_step(cache, kwargs):
            cache.release()
            return forward(*args, **kwargs)
        cache.steps += 1
        if cache.decoder is None:
            if cache.steps < 2 or not _begun(cache):
                return forward(**kwargs)
            cache.decoder = CapturedDecoder(model, cache, forward=forward)
        logits = cache.decoder.step(kwargs["input_ids"], kwargs.get("position_ids"))
        return CausalLMOutputWithPast(logits=logits[:, None], past_key_values=cache)

    model.forward = step
    try:
        yield
    finally:
        cache.release()
        if own:
            model.forward = forward
        else:
            del model.forward


# what a pass of one token may be given; the others ask for something that a graph does not return
_GIVEN = {"input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds", "cache_position"}
_GIVEN |= {"use_cache", "return_dict", "logits_to_keep"}


def _is_step(cache: CompressedCache, given: dict[str, Any]) -> bool:
    ids, mask, positions = (given.get(name) for name in ("input_ids", "attention_mask", "position_ids"))
    return (
        given.get("past_key_values") is cache
        and ids is not None
        and ids.shape[1:] == (1,)
        and (positions is None or positions.shape == ids.shape)
        and given.keys() <= _GIVEN
        and given.get("inputs_embeds") is None
        and given.get("use_cache") is not False
        and given.get("return_dict") is not False
        # one that hides something is refused by the pass itself
        and (mask is None or (mask.ndim == 2 and bool(mask.all())))
    )


def _begun(cache: CompressedCache) -> bool:
    return all(len(layer.parts) for _, layer in cache.compressed_layers())


def refuses(cache: CompressedCache) -> str | None:
    """Why a decode step of ``cache`` cannot have static shapes; None if it can."""
    method = cache.calibration.method
    for i, layer in enumerate(cache.layers):
        if not isinstance(layer, CompressedLayer):
            return f"layer {i} is not compressed"
    if method.moves:
        return f"{method.name} moves tokens after every pass"
    if method.block is not None and not cache.backend.counts_pages(method):
        return f"{method.name} with backend {cache.backend.name} does not read lengths on the device"
    if method.block is None and cache.backend.kernel is None:
        return f"{method.name} with backend {cache.backend.name} has shapes that depend on data"
    return None
