"""rdkv on the kernels: one launch over the pages of all levels, with evicted tokens absent.

    x_t = sum_i f_w(i) gain_t (q U)_i . byte_ti + q . R(n_t) m        o = (sum p_t f_w gain_t byte_t) V^T

A part never grows, so where its pages lie and how heads share the card is settled once, when it is first attended to:
an :class:`Index` of 32 bytes a step and 4 a token slot, kept as long as the part is. From then on nothing is read back.
"""

import math
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from kvtool import codebooks, packing
from kvtool.attention import Attended
from kvtool.kernels import decode_levels, query_levels
from kvtool.kernels.fragments import OFFSET
from kvtool.kernels.launch import (
    check_queries,
    default_launch,
    merged,
    nvidia,
    processors,
    refuse,
    remembered,
    square_map,
    tiles_of,
)
from kvtool.kernels.packed import LOG2E, table
from kvtool.kernels.planes import SIXTEEN
from kvtool.methods.base import LayerCalibration
from kvtool.methods.rdkv import RDKV
from kvtool.rdkv.pages import EXACT, Pages, exact_step, token_levels

WARPS = 4
_RESIDENT = 3  # programs a multiprocessor holds, of up to 4 groups and 8 rows
_REGISTERS = 168  # of a thread, so that they fit
_MOST_SLOTS = 128  # of a KV head: what one program merges


class Index(NamedTuple):
    """Where the pages of one part are, and who reads which.

    positions: int32 [pages, 2, 8, 4], as decode_levels.py takes them.
    steps, shares: see decode_levels.py. slots: int32 [B*H + 1], the first slot of each KV head; most: of one head.
    """

    positions: Tensor
    steps: Tensor
    shares: Tensor
    slots: Tensor
    most: int


class Maps(NamedTuple):
    """What a layer's codes mean, in the kernels' terms; see decode_levels.py. levels: of each head, see ``_record``."""

    query: Tensor
    output: Tensor
    table: Tensor
    widths: Tensor
    levels: list[list[tuple[int, int, int, int]]]


class Mean(NamedTuple):
    """The mean of a layer's keys, by the pairs of channels in which it turns; see query_levels.py and waves.py."""

    channels: Tensor
    turns: Tensor
    means: Tensor
    rest: Tensor
    half: int
    still: bool


_indices = WeakIdKeyDictionary()  # by the levels of a part


def refuses(method: RDKV, *, gluon: bool = False) -> str | None:
    """Why there is no kernel; None if there is one."""
    return "rdkv has pages of many widths, which only the triton back end reads" if gluon else None


def attend(
    method: RDKV,
    queries: Tensor,
    kv: Pages,
    layer: LayerCalibration,
    *,
    positions: Tensor,
    scale: float,
    softcap: float | None = None,
    gluon: bool = False,
) -> Attended:
    """As ``RDKV.attend``. The first time a part is seen its levels are read back, which a CUDA graph may not do."""
    B, HQ, S, D = queries.shape
    H, G = layer.shape.num_kv_heads, packing.groups(D)
    check(queries, kv, layer, positions)
    launch = default_launch(queries.device, gluon)
    used_rows, ROWS, blocks, programs, dims = tiles_of(queries, H)
    maps, mean = maps_of(layer), mean_of(layer)
    index = index_of(kv, layer, maps, positions)
    C = packing.GROUP * G

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=queries.device)

    slots, count = len(index.shares), mean.turns.shape[2]
    query, sums = new(programs, 2, G, 2 * ROWS * 32, dtype=torch.int8), new(programs, 2, G, ROWS)
    query_scale, wave_unit = new(programs, 2, ROWS), new(programs, 2, ROWS)
    waves = new(programs, 4 * count * ROWS, dtype=torch.float16)
    out, lse = new(slots, blocks, ROWS, C), new(slots, blocks, ROWS)
    square = square_map(D, C)
    if torch.version.hip is not None:
        square["num_warps"] = max(1, square["num_warps"] // 2)  # of 64 lanes
    asm = nvidia(queries.device)
    query_levels.prepare[(3 * programs * ROWS,)](
        queries,
        maps.query,
        query,
        query_scale,
        sums,
        mean.channels,
        mean.means,
        mean.rest,
        waves,
        wave_unit,
        used_rows,
        mean.half,
        *queries.stride()[:3],
        scale * LOG2E,
        layer.rope.scaling if layer.rope else 1.0,
        S=S,
        COUNT=count,
        STILL=mean.still,
        PDL=launch.pdl,
        **dims,
        **square,
        **launch.dependent,
    )
    if slots:
        decode_levels.decode[(slots, blocks)](
            query.view(torch.int32),
            query_scale,
            sums,
            kv.key_codes.view(torch.int32),
            kv.value_codes.view(torch.int32),
            kv.key_gains.view(torch.int32),
            kv.value_gains.view(torch.int32),
            maps.table,
            maps.widths,
            index.shares,
            index.steps,
            index.positions,
            mean.turns,
            waves.view(torch.int32),
            wave_unit,
            out,
            lse,
            (softcap or 0.0) * LOG2E,
            H=H,
            COUNT=count,
            ROWS=ROWS,
            BLOCKS=blocks,
            GROUPS=G,
            CAPPED=softcap is not None,
            STAGES=launch.stages or 1,
            WARPS=WARPS,
            ASM=asm,
            PDL=launch.pdl,
            num_warps=WARPS,
            **({"maxnreg": _REGISTERS} if asm and G <= 4 and ROWS == 8 else {}),
            **launch.dependent,
        )
    return merged(out, lse, maps.output, (B, HQ, S, D), dims, launch.pdl, (index.slots, index.most))


def check(queries: Tensor, kv: Pages, layer: LayerCalibration, positions: Tensor) -> None:
    """Refuse what the kernels do not serve.

    Raises:
        BackendError: in one sentence.
    """
    H = layer.shape.num_kv_heads
    check_queries(queries, H, layer.shape.head_dim)
    expected = [len(queries), H, 3, -(-len(positions) // 8)]
    if list(kv.levels.shape) != expected:
        refuse("levels", f"{expected}, of all positions", list(kv.levels.shape))
    for name, stored in kv._asdict().items():
        if stored.dtype != torch.uint8 or not stored.is_contiguous() or len(stored) != len(queries):
            refuse(name, f"contiguous uint8 of {len(queries)} sequences", f"{stored.dtype} {list(stored.shape)}")


def resident(kv: Pages) -> int:
    """Bytes kept beside a part: its index."""
    index = _indices.get(kv.levels)
    return 0 if index is None else sum(x.numel() * x.element_size() for x in index[:-1])


def maps_of(layer: LayerCalibration) -> Maps:
    """The maps of a layer, made once."""

    def make() -> Maps:
        D, G = layer.shape.head_dim, packing.groups(layer.shape.head_dim)
        missing = packing.GROUP * G - D
        spread = layer["spread"].float().repeat_interleave(packing.GROUP, -1)[:, :D]
        basis = layer["key_basis"].float()
        query = torch.stack([basis[:, 0], basis[:, 1] * spread[:, None]], 1)
        device = query.device
        books = {width: codebooks.sphere_codebook(D, width) for width in (1, 2, 3, 4, 8)}
        meaning = torch.zeros(SIXTEEN.value + 1, 2)
        for width, unit in ((1, 1 / 32), (2, 1), (3, 1), (4, 2), (8, 1)):
            meaning[width] = torch.tensor([unit * books[width].step, OFFSET[width]])
        # high and low byte are both level + 1/2 of 8 bits
        meaning[SIXTEEN.value] = torch.tensor([exact_step(D), -128.5])
        return Maps(
            F.pad(query, (0, missing)).contiguous(),
            F.pad(layer["value_basis"].float().mT, (0, 0, 0, missing)).contiguous(),
            table({width: books[width].levels for width in (2, 3, 4)}).to(device),
            meaning.to(device),
            [[_record(widths) for widths in head] for head in layer["widths"].tolist()],
        )

    return remembered(("rdkv", layer.index), layer["widths"], make)


def _record(widths: list[int]) -> tuple[int, int, int, int]:
    """Of a level: widths of the key groups in 4 bits each, that of the values, the rotation, bytes of a page's keys."""
    *keys, value = (SIXTEEN.value if width == EXACT else width for width in widths)
    packed = sum(width << 4 * i for i, width in enumerate(keys))
    # the eighth group's 4 bits are the sign's too
    return packed - (1 << 32) * (packed >> 31), value, int(len(set(keys)) > 1), sum(widths[:-1])


def mean_of(layer: LayerCalibration) -> Mean:
    """The mean of a layer, looked at once."""
    return remembered(("rdkv mean", layer.index, layer.rope), layer["key_mean"], lambda: _mean(layer))


def _mean(layer: LayerCalibration) -> Mean:
    mean, rope = layer["key_mean"].float(), layer.rope
    H, half = len(mean), len(rope.inv_freq) if rope else 0
    pairs = mean[:, : 2 * half].unflatten(1, (2, half)).mT  # [H, half, 2]
    found = pairs.abs().amax(-1) > 0
    count = max(16, triton.next_power_of_2(int(found.sum(1).max()) if half else 0))
    chosen = found.float().argsort(dim=1, descending=True, stable=True)
    chosen = F.pad(chosen, (0, max(0, count - half)))[:, :count]
    real = torch.arange(count, device=mean.device) < found.sum(1, keepdim=True)
    frequency = torch.tensor(rope.inv_freq if rope else [0.0], dtype=torch.float64, device=mean.device)
    turns = (frequency / (2 * math.pi) * 2.0**32)[chosen] * real
    whole = turns.floor()
    less = ((turns - whole) * 2**31).floor()
    taken = pairs.gather(1, chosen[..., None].expand(-1, -1, 2)) if half else mean.new_zeros(H, count, 2)
    rest = mean.clone()
    rest[:, : 2 * half] = 0
    wrapped = torch.where(whole >= 2.0**31, whole - 2.0**32, whole).to(torch.int32)
    return Mean(
        chosen.to(torch.int32),
        torch.stack([wrapped, less.to(torch.int32)], 1),
        (taken * real[..., None]).contiguous(),
        rest,
        half,
        bool(rest.any()),
    )


def index_of(kv: Pages, layer: LayerCalibration, maps: Maps, positions: Tensor) -> Index:
    """The index of a part, made once."""
    found = _indices.get(kv.levels)
    if found is None:
        found = _indices[kv.levels] = _make_index(kv, layer, maps, positions)
    return found


def _make_index(kv: Pages, layer: LayerCalibration, maps: Maps, positions: Tensor) -> Index:
    levels = token_levels(kv.levels, len(positions)).long()  # [B, H, T]
    B, H, T = levels.shape
    L, G, device = layer["widths"].shape[1], packing.groups(layer.shape.head_dim), levels.device
    counts = F.one_hot(levels, L).sum(2) if T else levels.new_zeros(B, H, L)
    row_pages = kv.key_gains.shape[1] // packing.PAGE
    first_page = torch.zeros(B, H, L, dtype=torch.int64)
    runs: list[list[list[int]]] = [[] for _ in range(B * H)]
    for b, per_head in enumerate(counts.tolist()):
        key_at, value_at = (b * x.shape[1] // 256 for x in (kv.key_codes, kv.value_codes))
        page = 0
        for level in range(L - 1, 0, -1):
            for h in range(H):
                tokens = per_head[h][level]
                widths, value_width, turn, key_size = maps.levels[h][level]
                value_size = G * (EXACT if value_width == SIXTEEN.value else value_width)
                first_page[b, h, level] = b * row_pages + page
                for start in range(0, tokens, WARPS * packing.PAGE):
                    n = min(WARPS * packing.PAGE, tokens - start)
                    used = -(-n // packing.PAGE)
                    runs[b * H + h].append(
                        [key_at, value_at, b * row_pages + page, n, widths, value_width, turn, key_size]
                    )
                    key_at, value_at, page = key_at + used * key_size, value_at + used * value_size, page + used
    order = levels.argsort(dim=-1, descending=True, stable=True)
    by_level = levels.gather(2, order)
    # where tokens of a level begin among a head's tokens in falling order of level
    starts = counts.flip(-1).cumsum(-1).flip(-1) - counts
    rank = torch.arange(T, device=device) - starts.gather(2, by_level)
    place = first_page.to(device).gather(2, by_level) * packing.PAGE + rank
    kept = by_level > 0
    at = torch.zeros(B * row_pages * packing.PAGE, dtype=torch.int32, device=device)
    at[place[kept]] = positions.to(torch.int32)[order[kept]]
    resident = _RESIDENT if G <= 4 else 2
    shares, slots = _shared([len(run) for run in runs], processors(device) * resident)
    steps = [step for run in runs for step in run]
    return Index(
        at.view(-1, 2, 4, 8).mT.contiguous(),
        torch.tensor(steps, dtype=torch.int32).reshape(-1, decode_levels.RECORD.value).to(device),
        torch.tensor(shares, dtype=torch.int32).reshape(-1, 3).to(device),
        torch.tensor(slots, dtype=torch.int32).to(device),
        max(b - a for a, b in pairwise(slots)),
    )


def _shared(steps: list[int], wave: int) -> tuple[list[tuple[int, int, int]], list[int]]:
    """Slots of equally many steps each, one resident wave of them: head, first and last; and where heads begin."""
    each = 1
    while sum(-(-n // each) for n in steps) > max(wave, len(steps)) or max(steps) > _MOST_SLOTS * each:
        each += 1
    shares, slots, first = [], [0], 0
    for head, n in enumerate(steps):
        count = -(-n // each)
        shares += [(head, first + n * i // count, first + n * (i + 1) // count) for i in range(count)]
        slots.append(len(shares))
        first += n
    return shares, slots
