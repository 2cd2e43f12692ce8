"""How long a run may still take."""

from __future__ import annotations

import math
import time


class Budget:
    """Seconds that may still be spent, by a clock that nobody sets back.

    Args:
        seconds: from now on; None for a run without an end.
    """

    def __init__(self, seconds: float | None = None) -> None:
        self._end = math.inf if seconds is None else time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds, infinite without an end, and never negative."""
        return max(0.0, self._end - time.monotonic())

    def share(self, weight: float, others: float) -> float:
        """What a part of this weight may take of what is left, where `others` is the weight of those after it."""
        return self.left * weight / (weight + others)
