"""How a decode step is launched, whatever its pages hold: what is refused, how it is cut up, and the last merge."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from kvtool import packing
from kvtool.attention import Attended
from kvtool.backends import HEAD_DIMS, MAX_GROUP, MAX_STEP
from kvtool.errors import BackendError
from kvtool.kernels.merge import merge


@dataclass(frozen=True)
class Launch:
    """How a decode is cut up. The defaults are for the H100; see docs/kernels.md for the measurements.

    gluon: which of the two kernels.  splits: programs per KV head, None for one resident wave.
    stages: steps of pages in flight, None for the measured best.
    pdl: programmatic dependent launch, compute capability 9.0 and up.
    """

    gluon: bool = False
    splits: int | None = None
    stages: int | None = None
    warps: int = 4
    pdl: bool = False

    @property
    def dependent(self) -> dict[str, bool]:
        """The option of a launch that may begin before the one before it has ended."""
        return {"launch_pdl": True} if self.pdl else {}

    def splits_of(self, tiles: "Tiles", pages: int, resident: int, device: torch.device) -> int:
        """Programs that share a KV head's ``pages``: one wave, of ``resident`` a multiprocessor, with work for each."""
        wave = resident * processors(device)
        return self.splits or max(1, min(wave // tiles.programs, -(-pages // (2 * self.warps))))


_codecs: dict[tuple[Any, ...], tuple[Tensor, Any]] = {}


def remembered(key: tuple[Any, ...], marker: Tensor, make: Callable[[], Any]) -> Any:
    """``make()``, once for each ``key`` and ``marker``, which is kept so that its address is not used again."""
    whole = (*key, marker.data_ptr(), marker.device)
    if whole not in _codecs:
        _codecs[whole] = (marker, make())
    return _codecs[whole][1]


def default_launch(device: torch.device, gluon: bool | None = None) -> Launch:
    """The measured best for a device; ``gluon`` forces one of the two kernels."""
    hopper = nvidia(device) and torch.cuda.get_device_capability(device) >= (9, 0)
    return Launch(gluon=hopper if gluon is None else gluon, pdl=hopper)


def refuse(what: str, expected: str, found: object) -> None:
    """Say what the kernels do not serve.

    Raises:
        BackendError: always.
    """
    raise BackendError(f"kernels: {what}: expected {expected}, found {found}; use --backend reference")


def check_queries(queries: Tensor, kv_heads: int, head_dim: int | None = None) -> None:
    """Refuse ``queries`` [B, HQ, S, D] that no kernel serves, or of another width than the layer's ``head_dim``.

    Raises:
        BackendError: in one sentence.
    """
    _, HQ, S, D = queries.shape
    if D not in HEAD_DIMS:
        refuse("head_dim", f"one of {', '.join(map(str, HEAD_DIMS))}", D)
    if head_dim not in (None, D):
        refuse("queries", f"{head_dim} channels, as the artifact's layer has", D)
    if HQ % kv_heads or HQ // kv_heads > MAX_GROUP:
        refuse("query heads", f"1 to {MAX_GROUP} per KV head", f"{HQ} for {kv_heads}")
    if not 1 <= S <= MAX_STEP:
        refuse("query tokens in a step", f"1 to {MAX_STEP}", S)
    if queries.stride(-1) != 1 or not queries.is_floating_point():
        refuse("queries", "floats, contiguous in the last dimension", f"{queries.dtype}, strides {queries.stride()}")


def check_stored(name: str, stored: Tensor, queries: Tensor, heads: int, dtype: torch.dtype, *dims: int) -> None:
    """Refuse ``stored`` unless it is ``dtype`` [B, heads, pages, *dims], of as many sequences as ``queries`` [B, ...].

    Raises:
        BackendError: in one sentence.
    """
    expected = (dtype, (len(queries), heads), dims)
    if (stored.dtype, tuple(stored.shape[:2]), tuple(stored.shape[3:])) != expected:
        sizes = ", ".join(map(str, (len(queries), heads, "pages", *dims)))
        refuse(name, f"{dtype} [{sizes}]", f"{stored.dtype} {list(stored.shape)}")


def check_counts(stored: Mapping[str, Tensor], positions: Tensor | None, pages: Tensor | None, batch: int) -> None:
    """Refuse fields that are not as many pages, ``positions`` that are not their tokens', ``pages`` that are no counts.

    Raises:
        BackendError: in one sentence.
    """
    counts = {name: field.shape[2] for name, field in stored.items()}
    if len(set(counts.values())) > 1:
        refuse("pages", "as many in every field", ", ".join(f"{n} in {name}" for name, n in counts.items()))
    tokens = packing.PAGE * next(iter(counts.values()))
    if positions is not None and len(positions) != tokens:
        refuse("positions", f"{tokens}, of all pages", len(positions))
    if pages is not None and (pages.dtype != torch.int32 or tuple(pages.shape) != (batch,)):
        refuse("pages in use", f"torch.int32 [{batch}]", f"{pages.dtype} {list(pages.shape)}")


def check_pages(name: str, pages: Tensor) -> None:
    """Refuse ``pages`` [B, H, N, bytes] that cannot be read 16 bytes at a time.

    Raises:
        BackendError: in one sentence.
    """
    if pages.stride(-1) != 1 or pages.data_ptr() % 16 or any(stride % 16 for stride in pages.stride()[:3]):
        refuse(name, "contiguous pages on 16-byte boundaries", f"strides {pages.stride()}")


def tile_rows(used: int, gluon: bool) -> int:
    """Query rows of a program: the smallest tile that holds them; more rows take more programs."""
    tiles = (4, 8) if gluon else (8, 16)
    return next((rows for rows in tiles if used <= rows), tiles[-1])


class Tiles(NamedTuple):
    """How the query rows of a step are cut up: the ``used`` rows of each KV head in ``blocks`` of ``rows``."""

    used: int
    rows: int
    blocks: int
    programs: int  # B * H * blocks
    dims: dict[str, int]  # as kernels take them


def tiles_of(queries: Tensor, kv_heads: int, *, gluon: bool = False) -> Tiles:
    """The tiles of ``queries`` [B, HQ, S, D]."""
    B, HQ, S, _ = queries.shape
    used = HQ // kv_heads * S
    rows = tile_rows(used, gluon)
    blocks = -(-used // rows)
    return Tiles(used, rows, blocks, B * kv_heads * blocks, {"H": kv_heads, "ROWS": rows, "BLOCKS": blocks})


def square_map(D: int, C: int) -> dict[str, int]:
    """A linear map between ``D`` and ``C`` channels, as the kernels that apply it take it: held in registers."""
    dims, channels = triton.next_power_of_2(D), triton.next_power_of_2(C)
    warps = max(1, min(16, dims * channels // 2048))
    return {"D": D, "C": C, "DIMS": dims, "CHANNELS": channels, "num_warps": warps}


def merged(
    out: Tensor,
    lse: Tensor,
    output_map: Tensor,
    shape: tuple[int, int, int, int],
    dims: dict[str, int],
    pdl: bool,
    slots: tuple[Tensor, int] | None = None,
) -> Attended:
    """The splits of a step as one part, [B, HQ, S, D] = ``shape``.

    out: float32 [programs, splits, ROWS, C].  lse: float32 [programs, splits, ROWS], log2.
    output_map: float32 [H or 1, C, D].  dims: H, ROWS and BLOCKS of the decode.
    slots: where each KV head's splits begin, int32 [B*H + 1], and the most that one has; ``out`` is then
        [slots, BLOCKS, ROWS, C].
    """
    B, HQ, S, D = shape
    rows, channels = out.shape[2:]
    programs = B * dims["H"] * dims["BLOCKS"]
    splits = slots[1] if slots else out.shape[1]
    result = torch.empty(shape, dtype=torch.float32, device=out.device)
    result_lse = torch.empty(shape[:3], dtype=torch.float32, device=out.device)
    merge[(programs, rows)](
        out,
        lse,
        output_map,
        result,
        result_lse,
        splits,
        HQ // dims["H"] * S,
        output_map.stride(0) if output_map.shape[0] > 1 else 0,
        SPLITS=triton.next_power_of_2(max(1, splits)),
        **dims,
        **square_map(D, channels),
        PDL=pdl,
        SLOTS=slots[0] if slots else None,
        **({"launch_pdl": True} if pdl else {}),
    )
    return Attended(result, result_lse)


@lru_cache(maxsize=64)
def full(B: int, pages: int, device: torch.device) -> Tensor:
    """int32 [B]: every sequence uses all its ``pages``."""
    return torch.full((B,), pages, dtype=torch.int32, device=device)


def nvidia(device: torch.device) -> bool:
    """Whether kernels are compiled for an NVIDIA card, whose assembly they may use."""
    return device.type == "cuda" and torch.version.hip is None and os.environ.get("TRITON_INTERPRET") != "1"


@lru_cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a device."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
