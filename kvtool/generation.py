"""Generate from a compressed cache: greedy, so that two caches can be compared token by token."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kvtool.backends import choose_backend
from kvtool.calibration import Calibration
from kvtool.errors import InputError
from kvtool.models import LoadedModel

OnText = Callable[[str], None]


@dataclass(frozen=True)
class Generated:
    """What came out, and what the cache cost when it was done; the full cache's own figures if it was not compressed.

    stored_bytes: of the whole cache, exact tokens at 16 bits. full_bytes: of the same tokens, uncompressed.
    host_bytes, disk_bytes: what the method keeps in host memory and in a file besides.
    """

    text: str
    ids: list[int]
    prompt_tokens: int
    backend: str
    bits_per_value: float
    stored_bytes: int
    full_bytes: int
    host_bytes: int = 0
    disk_bytes: int = 0


def encode(loaded: LoadedModel, prompt: str, *, chat: bool | None = None) -> Tensor:
    """Token ids [1, T] of ``prompt``, as one turn of a chat if the tokenizer has a template (or ``chat`` says so).

    Raises:
        InputError: the prompt is empty, or a chat was asked for and the tokenizer has no template.
    """
    tokenizer = loaded.tokenizer
    if chat and not tokenizer.chat_template:
        raise InputError(f"--chat: the tokenizer of {loaded.name} has no chat template; use --raw")
    if tokenizer.chat_template if chat is None else chat:
        turn = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        encoded = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
    else:
        encoded = tokenizer(prompt, return_tensors="pt")
    ids: Tensor = encoded["input_ids"]
    if ids.shape[1] == 0:
        raise InputError("prompt: expected some text, found none")
    return ids.long().to(loaded.model.device)


def generate(
    loaded: LoadedModel,
    ids: Tensor,
    calibration: Calibration | None,
    *,
    max_new_tokens: int = 128,
    backend: str = "auto",
    on_text: OnText | None = None,
) -> Generated:
    """Continue ``ids`` [1, T] greedily from the compressed cache, or from the full one without a ``calibration``.

    ``on_text`` is given every piece of text as soon as it is decided.
    """
    streamer = _Streamer(loaded.tokenizer, on_text) if on_text else None
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": False, "streamer": streamer}
    # one sequence without padding; said aloud, or transformers warns where pad and end are the same token
    options["attention_mask"] = torch.ones_like(ids)
    if calibration is None:
        out = loaded.model.generate(ids, **options)
        full = _full_bytes(loaded, out.shape[1] - 1)
        return _generated(loaded, ids, out, "full", 16.0, full, full)
    from kvtool.runtime import serve

    shapes = [calibration.shape.layers[i] for i in calibration.shape.compressible]
    chosen = choose_backend(backend, calibration.method, loaded.model.device, shapes)
    # launching kernels from Python would take longer than they do
    capacity = None if chosen.kernel is None else ids.shape[1] + max_new_tokens
    with serve(loaded.model, calibration, backend=chosen.name, capacity=capacity) as cache:
        out = loaded.model.generate(ids, past_key_values=cache, **options)
        cost = cache.nbytes()
        made = _generated(loaded, ids, out, cache.backend.name, cost.bits_per_value, cost.stored, 2 * cost.values)
        return replace(made, host_bytes=cost.host, disk_bytes=cost.disk)


def first_difference(a: list[int], b: list[int]) -> int | None:
    """Index of the first token in which two continuations differ; None if they are equal."""
    for i, (mine, theirs) in enumerate(zip(a, b, strict=False)):
        if mine != theirs:
            return i
    return None if len(a) == len(b) else min(len(a), len(b))


def _full_bytes(loaded: LoadedModel, tokens: int) -> int:
    # 16 bits for keys and for values
    layers = (loaded.shape.layers[i] for i in loaded.shape.compressible)
    return tokens * sum(4 * layer.num_kv_heads * layer.head_dim for layer in layers)


def _generated(
    loaded: LoadedModel, ids: Tensor, out: Tensor, backend: str, bits: float, stored: int, full: int
) -> Generated:
    new = out[0, ids.shape[1] :].tolist()
    text = loaded.tokenizer.decode(new, skip_special_tokens=True)
    return Generated(text, new, ids.shape[1], backend, bits, stored, full)


class _Streamer:
    """What ``generate`` calls with the prompt, then with every token; text that may still change is held back."""

    def __init__(self, tokenizer: Any, on_text: OnText) -> None:
        self._tokenizer, self._on_text = tokenizer, on_text
        self._ids: list[int] | None = None
        self._shown = 0

    def put(self, value: Tensor) -> None:
        if self._ids is None:  # the prompt comes first
            self._ids = []
            return
        self._ids += value.flatten().tolist()
        text = self._text()
        # half of a character made of several tokens decodes to the replacement character
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self._show(text)

    def end(self) -> None:
        self._show(self._text())

    def _text(self) -> str:
        text: str = self._tokenizer.decode(self._ids or [], skip_special_tokens=True)
        return text

    def _show(self, text: str) -> None:
        if len(text) > self._shown:
            self._on_text(text[self._shown :])
            self._shown = len(text)
