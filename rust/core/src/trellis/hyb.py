"""Make the table of ``hyb.rs`` beside this file: pairs of numbers that stand for two normal ones.

``python rust/core/src/trellis/hyb.py`` prints the rows. The 512 entries are the centres that
Lloyd's algorithm finds for points of the plane, normally distributed and folded at the first axis,
since a bit of the state flips the sign of the first number. Points are those of the additive
recurrence of the plastic number, the first of them the first centres; means are those of their
cells. Numbers are rounded to bfloat16, so that one word holds an entry.
"""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

ENTRIES, POINTS, ROUNDS = 512, 1 << 16, 60
#: Plastic number, the root of x^3 = x + 1.
PLASTIC = 1.32471795724474602596


def points(n: int) -> NDArray[np.float64]:
    """Return points of a half plane, normally distributed."""
    i = np.arange(1, n + 1)
    u, v = (0.5 + i / PLASTIC) % 1.0, (0.5 + i / PLASTIC**2) % 1.0
    normal = NormalDist().inv_cdf
    return np.array([[normal(0.5 + a / 2), normal(b)] for a, b in zip(u, v, strict=True)])


def centres() -> NDArray[np.float64]:
    """Return the centres of the cells, in the order of the first points."""
    x = points(POINTS)
    c = x[:ENTRIES].copy()
    for _ in range(ROUNDS):
        near = np.concatenate(
            [np.argmin((c**2).sum(1) - 2 * part @ c.T, axis=1) for part in np.split(x, 64)]
        )
        count = np.bincount(near, minlength=ENTRIES)
        sums = np.stack([np.bincount(near, x[:, j], ENTRIES) for j in (0, 1)], axis=1)
        c = np.where(count[:, None] > 0, sums / np.maximum(count, 1)[:, None], c)
    return c


def words(c: NDArray[np.float64]) -> NDArray[np.uint32]:
    """Return entries as two bfloat16 numbers each, the first in the low half."""
    bits = c.astype(np.float32).view(np.uint32)
    bits = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return (bits[:, 0] | bits[:, 1] << 16).astype(np.uint32)


if __name__ == "__main__":
    for row in words(centres()).reshape(-1, 8):
        print("    " + ", ".join(f"0x{w >> 16:04X}_{w & 0xFFFF:04X}" for w in row.tolist()) + ",")
