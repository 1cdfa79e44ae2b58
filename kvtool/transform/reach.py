"""Keys where none were captured: what is fitted to 8k tokens is read at 32k.

A basis of post-RoPE keys knows only angles that were seen. The slow pairs of the rotary embedding turn by less than a
circle over a capture, so their statistics are those of its positions, and far away the variance lies elsewhere. Keys
and queries that move together leave every logit as it is: a capture moved by n positions is as good as the capture. So
with ``far`` positions to go, and z = x_c + i x_{c+R/2} the pair c, which turns by t_c a position,

    E_n[R(n) M R(n)^T]:   <z_c z_d*> g(t_c - t_d),  <z_c z_d> g(t_c + t_d)      g(t) = 1/(far+1) sum_{n<=far} e^{itn}

is the second moment over all places that the same text may take.
"""

import torch
from torch import Tensor

from kvtool.shapes import Rope


def averaged(moment: Tensor, rope: Rope | None, far: int) -> Tensor:
    """E[R(n) M R(n)^T] over n = 0 ... ``far``; ``moment`` [H, D, D], symmetric. Without ``rope`` nothing turns."""
    if rope is None or far <= 0:
        return moment
    half = len(rope.inv_freq)
    turns = torch.tensor(rope.inv_freq, dtype=torch.float64, device=moment.device)
    x, y = slice(half), slice(half, 2 * half)
    M = moment.double()
    apart = torch.complex(M[:, x, x] + M[:, y, y], M[:, y, x] - M[:, x, y]) * _mean_turn(turns[:, None] - turns, far)
    alike = torch.complex(M[:, x, x] - M[:, y, y], M[:, y, x] + M[:, x, y]) * _mean_turn(turns[:, None] + turns, far)
    out = M.clone()
    out[:, x, x], out[:, y, y] = (apart + alike).real / 2, (apart - alike).real / 2
    out[:, y, x] = (apart + alike).imag / 2
    out[:, x, y] = out[:, y, x].mT
    # with channels that do not turn
    rest = torch.complex(M[:, x, 2 * half :], M[:, y, 2 * half :]) * _mean_turn(turns, far)[:, None]
    out[:, : 2 * half, 2 * half :] = torch.cat([rest.real, rest.imag], 1)
    out[:, 2 * half :, : 2 * half] = out[:, : 2 * half, 2 * half :].mT
    return out.to(moment.dtype)


def moved(x: Tensor, rope: Rope | None, positions: Tensor, far: int, *, back: bool = False) -> Tensor:
    """Post-RoPE ``x`` [H, T, D] float32, every token a different way on, up to ``far``; ``back`` undoes it."""
    if rope is None or far <= 0:
        return x
    # scaled once already
    turn = Rope(inv_freq=rope.inv_freq)
    # the golden ratio's multiples lie evenly in any stretch
    ways = (positions.double() * 0.6180339887498949 % 1 * (far + 1)).long()
    return turn.unrotate(x, ways) if back else turn.rotate(x, ways)


def _mean_turn(angle: Tensor, far: int) -> Tensor:
    """1/(far+1) sum over n = 0 ... ``far`` of e^{i n angle}, complex128."""
    n = far + 1
    below = n * torch.sin(angle / 2)
    still = below.abs() < 1e-12
    size = torch.where(still, 1.0, torch.sin(n * angle / 2) / torch.where(still, 1.0, below))
    return torch.polar(torch.ones_like(angle), angle * far / 2) * size
