"""Dropout whose mask is a function of a seed and of positions: the definition that every implementation follows.

Nothing is stored between forward and backward, and the same seed gives the same mask on every device. The random bytes
are those of Philox4x32 with seven rounds (Salmon et al., 2011, "Parallel random numbers: as easy as 1, 2, 3"): one call
decides about 16 neighbouring columns, a byte each.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Columns that one call of the generator decides about.
COLUMNS = 16

ROUNDS = 7
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def draw_seeds(count: int) -> Tensor:
    """`count` fresh seeds, (count,) int64 on the CPU, from torch's default generator (`torch.manual_seed`)."""
    return torch.randint(2**63 - 1, (count,), dtype=torch.int64)


def threshold(dropout_p: float) -> int:
    """The bytes below it drop their element: 256 p, rounded, but 0 and 256 for p = 0 and p = 1 only."""
    if dropout_p in (0.0, 1.0):
        return int(256 * dropout_p)
    return min(max(round(256 * dropout_p), 1), 255)


def kept_scale(dropout_p: float) -> float:
    """What kept values are multiplied by: one over the probability with which they are kept; 0 if none is."""
    dropped = threshold(dropout_p)
    return 256 / (256 - dropped) if dropped < 256 else 0.0


def dropout(
    x: Tensor, dropout_p: float, seed: Tensor | None, rows: Tensor | None = None, plane: Tensor | int = 0
) -> Tensor:
    """x, with elements zeroed with probability `threshold(dropout_p) / 256` and the others scaled up.

    Args:
        x: (..., columns).
        dropout_p: the probability; 0 gives x itself.
        seed: int64 scalar; not read where dropout_p is 0.
        rows: a number for each row of x; when not given the rows are numbered from 0.
        plane: another number that the mask depends on, attention's heads; rows and plane broadcast to x's rows.

    Raises:
        ValueError: dropout_p is not 0 and there is no seed.
    """
    if dropout_p == 0:
        return x
    if seed is None:
        raise ValueError(f"dropout_p is {dropout_p} without a seed")
    if rows is None:
        rows = torch.arange(x.shape[:-1].numel(), device=x.device).view(x.shape[:-1])
    keep = random_bytes(seed, rows, x.shape[-1], plane) >= threshold(dropout_p)
    return torch.where(keep, x * kept_scale(dropout_p), torch.zeros((), dtype=x.dtype, device=x.device))


def random_bytes(seed: Tensor, rows: Tensor, columns: int, plane: Tensor | int = 0) -> Tensor:
    """(*rows.shape, columns) int64 in [0, 256): element c of row r is byte c % 16 of the call numbered (c // 16, r).

    Args:
        seed: int64 scalar, the key.
        rows: int64, the numbers of the rows, not negative.
        columns: how many.
        plane: the last word of the counter; broadcasts with `rows`.
    """
    blocks = -(-columns // COLUMNS)
    words = philox(
        seed.to(rows.device),
        torch.arange(blocks, device=rows.device),
        (rows & _LOW)[..., None],
        (rows >> 32)[..., None],
        torch.as_tensor(plane, device=rows.device)[..., None],
    )  # each (..., blocks)
    shifts = torch.arange(0, 32, 8, device=rows.device)
    chosen = torch.stack(torch.broadcast_tensors(*words), -1)[..., None] >> shifts & 255  # (..., blocks, 4 words, 4)
    return chosen.flatten(-3)[..., :columns]


def philox(seed: Tensor, *counter: Tensor) -> tuple[Tensor, ...]:
    """The four 32-bit words of Philox4x32 at a counter of four, as int64; all arguments broadcast."""
    key = [seed & _LOW, seed >> 32 & _LOW]
    c0, c1, c2, c3 = counter
    for _ in range(ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ key[0], low1, high0 ^ c3 ^ key[1], low0
        key = [(k + weyl) & _LOW for k, weyl in zip(key, _WEYL, strict=True)]
    return c0, c1, c2, c3


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """The high and low 32 bits of a product of 32-bit numbers, within what int64 holds."""
    low = a * (b & 0xFFFF)  # 48 bits
    high = a * (b >> 16) + (low >> 16)  # 49 bits
    return high >> 16, (high & 0xFFFF) << 16 | low & 0xFFFF
