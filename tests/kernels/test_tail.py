"""The kernel of a captured step's exact tokens agrees with float64 attention and puts the newest where it belongs."""

import pytest
import torch

from kvtool import attention
from kvtool.attention import Attended, relative_error
from kvtool.kernels.tail import attend_tail

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(
    ("B", "H", "group", "D", "held", "dtype"),
    [
        (1, 2, 4, 128, 195, torch.bfloat16),
        (2, 1, 3, 64, 63, torch.float32),
        (1, 1, 7, 80, 128, torch.float16),
        (1, 2, 1, 96, 0, torch.bfloat16),
        (1, 1, 8, 256, 129, torch.float32),
    ],
)
@pytest.mark.parametrize("softcap", [None, 8.0])
def test_tail_attention_is_exact_attention(B, H, group, D, held, dtype, softcap):
    g = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=g).to(DEVICE, dtype)

    HQ, room = H * group, held + 5
    # as the model hands them over: transposed
    queries = random(B, 1, HQ, D).transpose(1, 2)
    new = random(B, 1, H, D).transpose(1, 2), random(B, 1, H, D).transpose(1, 2)
    tail = random(B, H, room, D), random(B, H, room, D)
    kept = tuple(x.clone() for x in tail)
    packed = Attended(random(B, HQ, 1, D).float(), random(B, HQ, 1).float() + 3)
    if held == 0:
        packed = Attended(torch.zeros_like(packed.out), torch.full_like(packed.lse, -torch.inf))  # no page in use
    length = torch.tensor([held], device=DEVICE)
    options = {"scale": D**-0.5, "softcap": softcap}
    found = attend_tail(queries, new, tail, length, packed, **options)
    seen = [torch.cat([x[:, :, :held], token], 2).double() for x, token in zip(kept, new, strict=True)]
    exact = attention.merge(attention.attend(queries.double(), *seen, **options), packed)
    # what rounding the result to the model's dtype leaves, and float32 sums
    limit = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}[dtype]
    assert relative_error(found.double(), exact.out) < limit
    for buffer, before, token in zip(tail, kept, new, strict=True):
        assert torch.equal(buffer[:, :, held : held + 1], token)
        assert torch.equal(buffer[:, :, :held], before[:, :, :held])
        assert torch.equal(buffer[:, :, held + 1 :], before[:, :, held + 1 :])
