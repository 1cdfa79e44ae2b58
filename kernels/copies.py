"""Copies of pages to shared memory, for the Gluon decode: four warps, each its own page, stage by stage.

A page is copied 16 bytes a lane, in segments of whole chunks (128 words). A group of even width is one segment; planes
of odd widths (64 words) are paired, also across groups, and what is left over is a segment of 8 bytes a lane. Each
segment has its own buffer, because two copies into one buffer would be kept apart by a barrier.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

# Triton 3.9 renamed it
async_load = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared

CHUNK = gl.constexpr(gl.BlockedLayout([1, 1, 4], [1, 1, 32], [4, 1, 1], [2, 1, 0]))  # 128 words of a warp's page
PLANE = gl.constexpr(gl.BlockedLayout([1, 1, 2], [1, 1, 32], [4, 1, 1], [2, 1, 0]))  # 64 words
SCALES = gl.constexpr(gl.BlockedLayout([1, 2], [1, 32], [4, 1], [1, 0]))
LINEAR3 = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0]))
LINEAR2 = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))


@gluon.jit
def allocate_scales(STAGES: gl.constexpr):
    """Key scales at 2*stage and value scales beside them, [warps, 64] each."""
    return gl.allocate_shared_memory(gl.float16, [2 * STAGES, 4, 64], LINEAR2)


@gluon.jit
def allocate(WIDTHS: gl.constexpr, STAGES: gl.constexpr):
    """One buffer per segment: [stages, warps, chunks, words]."""
    stores = ()
    for i in gl.static_range(_segments(WIDTHS)):
        stores = stores + (gl.allocate_shared_memory(gl.int32, _buffer(WIDTHS, i, STAGES), LINEAR3),)
    return stores


@gluon.jit
def fetch(
    KEY_PAGES, VALUE_PAGES, KEY_SCALES, VALUE_SCALES, PAGE_TABLE, step, last, stage, key_store, value_store,
    scale_store, key_p, value_p, scale_p,
    KEY_WIDTHS: gl.constexpr, VALUE_WIDTHS: gl.constexpr, PAGED: gl.constexpr,
):  # fmt: skip
    """Start copying the four pages from ``step`` on; absent ones read as zeros."""
    where, used = _locate(PAGE_TABLE, step, last, gl.SliceLayout(1, SCALES), PAGED)
    lane = gl.arange(0, 64, gl.SliceLayout(0, SCALES))[None, :]
    at = where[:, None] * scale_p + lane
    mask = used[:, None] & (lane >= 0)
    async_load(scale_store.index(2 * stage), KEY_SCALES + at, mask=mask)
    async_load(scale_store.index(2 * stage + 1), VALUE_SCALES + at, mask=mask)
    _fetch_side(KEY_PAGES, PAGE_TABLE, step, last, stage, key_store, key_p, KEY_WIDTHS, PAGED)
    _fetch_side(VALUE_PAGES, PAGE_TABLE, step, last, stage, value_store, value_p, VALUE_WIDTHS, PAGED)
    async_copy.commit_group()


@gluon.jit
def _fetch_side(
    BASE, PAGE_TABLE, step, last, stage, store, page_stride, WIDTHS: gl.constexpr, PAGED: gl.constexpr
):  # fmt: skip
    for i in gl.static_range(_segments(WIDTHS)):
        _fetch_segment(
            BASE + _segment(WIDTHS, i, 0), PAGE_TABLE, step, last, store[i].index(stage), page_stride,
            _segment(WIDTHS, i, 1), _segment(WIDTHS, i, 2), PAGED,
        )  # fmt: skip


@gluon.jit
def _fetch_segment(
    BASE, PAGE_TABLE, step, last, store, page_stride, CHUNKS: gl.constexpr, N: gl.constexpr, PAGED: gl.constexpr
):  # fmt: skip
    LAYOUT: gl.constexpr = PLANE if N == 64 else CHUNK
    where, used = _locate(PAGE_TABLE, step, last, gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)), PAGED)
    lane = gl.arange(0, N, gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))[None, None, :]
    chunk = gl.arange(0, CHUNKS, gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))[None, :, None]
    at = BASE + (where * page_stride)[:, None, None] + lane + N * chunk
    mask = used[:, None, None] & (lane >= 0) & (chunk >= 0)
    async_load(store, at, mask=mask)


@gluon.jit
def _locate(PAGE_TABLE, step, last, LAYOUT: gl.constexpr, PAGED: gl.constexpr):
    """Where the pages of the four warps are, int64 [4], and whether they are in use."""
    page = step + gl.arange(0, 4, LAYOUT)
    used = page < last
    if PAGED:
        return gl.load(PAGE_TABLE + page, mask=used, other=0).to(gl.int64), used
    else:
        return page.to(gl.int64), used


@gluon.jit
def unit_words(store, stage, WIDTHS: gl.constexpr, i: gl.constexpr):
    """The words of group ``i`` as :func:`fragments` takes them."""
    if WIDTHS[i] % 2 == 0:
        return store[_place(WIDTHS, i, 0, 0)].index(stage).load(CHUNK)
    elif WIDTHS[i] == 1:
        return _plane(store, stage, WIDTHS, i, 0)
    else:
        return (
            _plane(store, stage, WIDTHS, i, 0),
            _plane(store, stage, WIDTHS, i, 1),
            _plane(store, stage, WIDTHS, i, 2),
        )


@gluon.jit
def _plane(store, stage, WIDTHS: gl.constexpr, i: gl.constexpr, plane: gl.constexpr):
    SEGMENT: gl.constexpr = _place(WIDTHS, i, plane, 0)
    return store[SEGMENT].index(stage).slice(_place(WIDTHS, i, plane, 1), 64, dim=2).load(PLANE)


@gluon.constexpr_function
def _plan(widths):
    """Segments (offset in words, chunks, words of a chunk), and for every group its (segment, first word) per plane."""
    segments, places, offset, open_plane = [], [], 0, False
    for width in widths:
        if width % 2 == 0:
            open_plane = False
            places.append(((len(segments), 0),))
            if width:
                segments.append((offset, width // 2, 128))
        else:
            planes = []
            for plane in range(width):
                if open_plane:
                    first = segments.pop()[0]
                    segments.append((first, 1, 128))
                else:
                    segments.append((offset + 64 * plane, 1, 64))
                planes.append((len(segments) - 1, 64 if open_plane else 0))
                open_plane = not open_plane
            places.append(tuple(planes))
        offset += 64 * width
    return tuple(segments), tuple(places)


@gluon.constexpr_function
def _segments(widths):
    return len(_plan(widths)[0])


@gluon.constexpr_function
def _segment(widths, index, what):
    return _plan(widths)[0][index][what]


@gluon.constexpr_function
def _place(widths, group, plane, what):
    return _plan(widths)[1][group][plane][what]


@gluon.constexpr_function
def _buffer(widths, index, stages):
    _, chunks, words = _plan(widths)[0][index]
    return [stages, 4, chunks, words]
