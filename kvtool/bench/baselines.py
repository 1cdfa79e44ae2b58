"""What a compressed cache is compared with: attention over the full cache, by torch and by libraries that are there.

    flash, cudnn, efficient, math    torch's scaled_dot_product_attention, one back end each, 16 bits
    flashinfer                       FlashInfer's paged decode, 16 bits, pages of 16 tokens
    fp8                              the same over a cache of float8_e4m3: half the bytes, without anything fitted

A baseline that cannot run says why; it is never left out in silence.
"""

from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvtool.bench.subject import Subject
from kvtool.bench.timing import Timing, copies_needed, time_step

TORCH = ("flash", "cudnn", "efficient", "math")
BASELINES = (*TORCH, "flashinfer", "fp8")
COMPRESSED = ("fp8",)  # not a full cache: no part of the speedup
_PAGE = 16  # tokens, FlashInfer's usual page
_WORKSPACE = 128 << 20  # bytes, as FlashInfer's documentation recommends


def time_full(subject: Subject, lengths: Sequence[int], name: str, device: torch.device) -> Timing | str:
    """One decode step of ``len(lengths)`` sequences over a random full cache, or why there is none."""
    if device.type == "cpu" and name != "math":
        return "needs a GPU"
    if name not in TORCH and find_spec("flashinfer") is None:
        return "needs FlashInfer: pip install flashinfer-python"
    make = _torch_step if name in TORCH else _flashinfer_step
    try:
        step, copies = make(subject, lengths, name, device)
        return time_step(step, copies, device)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, AttributeError, AssertionError, ImportError) as error:
        # another project's code, in any of its versions: what it says is the reason
        return f"refused: {str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}"


def _torch_step(
    subject: Subject, lengths: Sequence[int], name: str, device: torch.device
) -> tuple[Callable[[int], Any], int]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    which = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "math": SDPBackend.MATH,
    }[name]
    shape = subject.shape
    copies = copies_needed(subject.full_bytes_per_token * sum(lengths), device)
    # sequences of one length are one call, as a server would batch them; others take a call each
    runs = [(len(lengths), lengths[0])] if len(set(lengths)) == 1 else [(1, length) for length in lengths]
    caches = [
        [[_random(n, shape.num_kv_heads, T, shape.head_dim, device=device) for _ in range(2)] for n, T in runs]
        for _ in range(copies)
    ]
    queries = subject.queries(len(lengths), device).split([n for n, _ in runs])

    def step(i: int) -> list[Tensor]:
        with sdpa_kernel(which):
            return [
                F.scaled_dot_product_attention(q, keys, values, scale=shape.scale, enable_gqa=True)
                for q, (keys, values) in zip(queries, caches[i], strict=True)
            ]

    return step, copies


def _flashinfer_step(
    subject: Subject, lengths: Sequence[int], name: str, device: torch.device
) -> tuple[Callable[[int], Any], int]:
    flashinfer: Any = import_module("flashinfer")
    shape = subject.shape
    dtype = torch.float8_e4m3fn if name == "fp8" else torch.bfloat16
    pages = [-(-length // _PAGE) for length in lengths]
    size = 2 * sum(pages) * _PAGE * shape.num_kv_heads * shape.head_dim * dtype.itemsize
    copies = copies_needed(size, device)
    dims = (sum(pages), _PAGE, shape.num_kv_heads, shape.head_dim)
    caches = [tuple(_random(*dims, device=device).to(dtype) for _ in range(2)) for _ in range(copies)]
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        torch.zeros(_WORKSPACE, dtype=torch.uint8, device=device), "NHD", use_tensor_cores=shape.group >= 4
    )
    wrapper.plan(
        torch.tensor([0, *pages]).cumsum(0).to(device, torch.int32),
        torch.arange(sum(pages), dtype=torch.int32, device=device),
        torch.tensor([(length - 1) % _PAGE + 1 for length in lengths], dtype=torch.int32, device=device),
        shape.num_heads,
        shape.num_kv_heads,
        shape.head_dim,
        _PAGE,
        q_data_type=torch.bfloat16,
        kv_data_type=dtype,
        sm_scale=shape.scale,
        logits_soft_cap=shape.softcap,
    )
    queries = subject.queries(len(lengths), device)[:, :, 0]
    return lambda i: wrapper.run(queries, caches[i]), copies


def _random(*dims: int, device: torch.device) -> Tensor:
    return torch.randn(dims, dtype=torch.bfloat16, device=device)
