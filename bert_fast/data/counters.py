"""Random numbers by counter: they depend on the place they are drawn for, not on what was drawn before."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class Uniforms:
    """Numbers of [0, 1), one stream of them for each place: the same in any order, process and release of NumPy.

    Philox (Salmon et al., 2011) with its raw bits: places are 2^128 numbers apart.

    Args:
        key: of all streams, the seed among them; at least 0.
    """

    def __init__(self, *key: int) -> None:
        self._bits = np.random.Philox(np.random.SeedSequence(key))
        self._state = self._bits.state

    def go_to(self, place: int, group: int = 0) -> None:
        """To the beginning of the stream of a place."""
        self._state["state"]["counter"][2:] = place, group
        self._bits.state = self._state

    def take(self, count: int) -> NDArray[np.float64]:
        """The next numbers, (count,)."""
        return np.ldexp(self._bits.random_raw(count) >> np.uint64(11), -53)

    def integer(self, low: int, high: int) -> int:
        """From the next number one of low to high, both included."""
        return low + int(self.take(1)[0] * (high - low + 1))
