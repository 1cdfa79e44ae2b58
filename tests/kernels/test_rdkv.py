"""rdkv's kernel attends as rdkv's reference does: levels of all widths, heads that keep different tokens, or none."""

from dataclasses import replace

import pytest
import torch

from kvtool import packing
from kvtool.attention import relative_error
from kvtool.kernels import rdkv as kernels
from kvtool.methods import make_method
from kvtool.methods.base import LayerCalibration, mapped
from kvtool.rdkv import pages
from kvtool.rdkv.fit import random_rotation
from kvtool.shapes import LayerKind, LayerShape, Rope

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
METHOD = make_method("rdkv")


def calibrated(D, H, group, seed=0, widths=None, rotary=None):
    """A layer as ``fit`` leaves it; ``widths`` of each head's levels are drawn if not given, the last one is 16."""
    g = torch.Generator().manual_seed(seed)
    G = packing.groups(D)
    half = (rotary or D) // 2
    shape = LayerShape(kind=LayerKind.FULL, num_heads=H * group, num_kv_heads=H, head_dim=D, scale=D**-0.5, rope=0)
    drawn = torch.tensor([1, 2, 3, 4, 8])[torch.randint(0, 5, (H, 8, G + 1), generator=g)].to(torch.uint8)
    drawn[:, 1:3, :-1] = drawn[:, 1:3, :1]  # the same in all groups: rotated as a whole
    drawn[:, 3, 0] = 0
    drawn[:, 0], drawn[:, 7] = 0, 16
    turns = [torch.stack([random_rotation(D, g) for _ in range(H)]) for _ in range(3)]
    tensors = {
        "key_mean": torch.randn(H, D, generator=g),
        "key_basis": torch.stack(turns[:2], 1),
        "spread": torch.rand(H, G, generator=g) + 0.5,
        "value_basis": turns[2],
        "widths": drawn if widths is None else widths,
    }
    rope = Rope(inv_freq=tuple(1e4 ** (-i / half) for i in range(half)), scaling=1.1)
    return LayerCalibration(0, shape, rope, {name: tensor.to(DEVICE) for name, tensor in tensors.items()})


def both(layer, levels, S=1, softcap=None, seed=1, start=70_000, scale=None, apart=1):
    """What kernel and reference make of random tokens at ``levels`` [B, H, T]."""
    g = torch.Generator().manual_seed(seed)
    B, H, T = levels.shape
    D = layer.shape.head_dim
    keys, values = (torch.randn(2, B, H, T, D, generator=g)).to(DEVICE)
    queries = torch.randn(B, layer.shape.num_heads, S, D, generator=g).to(DEVICE)
    positions = start + apart * torch.arange(T, device=DEVICE)
    kv = pages.pack(keys, values, levels.to(DEVICE), layer, positions)
    arguments = {"positions": positions, "scale": scale or layer.shape.scale, "softcap": softcap}
    exact = METHOD.attend(queries, kv, layer, **arguments)
    return kernels.attend(METHOD, queries, kv, layer, **arguments), exact, (queries, kv, arguments)


def agree(found, exact):
    seen = torch.isfinite(exact.lse)
    assert torch.equal(seen, torch.isfinite(found.lse))
    assert relative_error(found.out, exact.out) < 3e-3  # weights of 15 bits
    # 16-bit queries, and 16 bits of the mean's amplitude
    assert (found.lse - exact.lse)[seen].abs().max() < 3e-3


def drawn_levels(B, H, T, seed=0, kept=0.6, among=(1, 2, 3, 4, 5, 6, 7)):
    """A level for every token; at about 1 - ``kept`` of them 0."""
    g = torch.Generator().manual_seed(seed)
    levels = torch.tensor(among)[torch.randint(0, len(among), (B, H, T), generator=g)]
    return (levels * (torch.rand(B, H, T, generator=g) < kept)).to(torch.uint8)


@pytest.mark.parametrize(
    ("D", "group", "S", "among"),
    [
        (64, 3, 1, (1, 2, 3, 4, 5, 6, 7)),
        (80, 4, 1, (3,)),
        (96, 1, 3, (5,)),
        (128, 8, 1, (4,)),
        (256, 2, 1, (6,)),
        (64, 7, 3, (2,)),
    ],
)
def test_the_kernel_agrees_with_the_reference(D, group, S, among):
    layer = calibrated(D, 1, group)
    found, exact, _ = both(layer, drawn_levels(1, 1, 250, among=among), S)
    agree(found, exact)


def test_heads_and_sequences_keep_different_tokens():
    layer = calibrated(64, 2, 2)
    levels = drawn_levels(2, 2, 100, seed=3, among=(2, 4))
    levels[0, 1] = 0  # a head without pages
    levels[1, 0, :] = (levels[1, 0] > 3) * 6  # one level only
    levels[1, 1, 30:] = 0
    found, exact, _ = both(layer, levels)
    agree(found, exact)
    assert (found.out[0, 2:] == 0).all()


def test_nothing_kept_is_nothing_attended():
    found, _, _ = both(calibrated(64, 2, 1), torch.zeros(1, 2, 100, dtype=torch.uint8))
    assert (found.out == 0).all()
    assert (found.lse == -torch.inf).all()


def test_logits_are_capped_after_the_mean_is_added():
    found, exact, _ = both(calibrated(64, 1, 4), drawn_levels(1, 1, 200, among=(1, 6)), softcap=4.0, scale=1.0)
    agree(found, exact)


def test_a_mean_in_few_channels_without_rotary_embedding_or_none():
    layer, levels = calibrated(64, 1, 2, rotary=32), drawn_levels(1, 1, 70, among=(2,))
    agree(*both(layer, levels)[:2])
    mean = layer["key_mean"].clone()
    mean[:, 5:16], mean[:, 20:] = 0, 0
    for changed in (mean, 0 * mean):
        few = replace(layer, tensors={**layer.tensors, "key_mean": changed})
        agree(*both(few, levels)[:2])
    agree(*both(replace(layer, rope=None), levels)[:2])


def test_a_million_tokens_away_the_mean_is_still_right():
    layer = calibrated(64, 1, 2)
    agree(*both(layer, drawn_levels(1, 1, 130, among=(2,)), start=1_000_000)[:2])


def test_so_is_it_where_the_tokens_of_a_page_are_far_apart():
    layer = calibrated(64, 1, 2)
    agree(*both(layer, drawn_levels(1, 1, 130, among=(2,)), start=3, apart=8_000)[:2])


def test_a_sequence_of_a_batch_is_read_as_if_it_were_alone():
    layer = calibrated(64, 1, 2)
    together, _, (queries, kv, arguments) = both(layer, drawn_levels(2, 1, 100, seed=5, among=(3,)))
    for b in (0, 1):
        alone = kernels.attend(METHOD, queries[b : b + 1], mapped(kv, lambda x, b=b: x[b : b + 1]), layer, **arguments)
        assert relative_error(alone.out, together.out[b : b + 1]) < 1e-3  # pages meet in another order


def test_the_index_is_made_once_counted_and_forgotten_with_its_part():
    layer = calibrated(64, 1, 1)
    _, _, (queries, kv, arguments) = both(layer, drawn_levels(1, 1, 200, among=(4,)))
    made = kernels._indices[kv.levels]
    kernels.attend(METHOD, queries, kv, layer, **arguments)
    assert kernels._indices[kv.levels] is made
    # 4 bytes a token slot, 32 a step, 12 a slot, 8 for where the head begins and ends
    assert kernels.resident(kv) == made.positions.numel() * 4 + 32 + 12 + 8
    before = len(kernels._indices)
    del kv, made, queries, arguments, _
    assert len(kernels._indices) < before


@pytest.mark.parametrize("wave", [4, 40])
def test_heads_share_the_card_by_what_they_keep(wave):
    steps = [30, 0, 3, 7]
    shares, slots = kernels._shared(steps, wave)
    assert [shares[i][0] for i in range(len(shares))] == sorted(shares[i][0] for i in range(len(shares)))
    assert len(shares) <= wave
    lengths = [last - first for _, first, last in shares]
    assert max(lengths) <= -(-sum(steps) // wave) + 9
    at = 0
    for head, n in enumerate(steps):
        mine = shares[slots[head] : slots[head + 1]]
        assert sum(last - first for _, first, last in mine) == n
        assert all(first == before for (_, first, _), before in zip(mine, [at, *(x[2] for x in mine)], strict=False))
        at += n


def test_gluon_is_refused():
    assert "triton" in kernels.refuses(METHOD, gluon=True)
    assert kernels.refuses(METHOD) is None
