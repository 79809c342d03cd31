"""Whether a run is still worth its compute."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping

_WINDOW = 20  # steps whose mean is compared


class Health:
    """Watches the losses of the steps.

    divergence: how many times the mean loss of the first 20 steps the mean of the latest 20 may be; None: any number.
    """

    def __init__(self, divergence: float | None):
        self._divergence = divergence
        self._first: list[float] = []
        self._latest: deque[float] = deque(maxlen=_WINDOW)

    def fault(self, metrics: Mapping[str, float]) -> str | None:
        """What is wrong after a step with these metrics, in words; None if nothing is."""
        loss = metrics["loss"]
        if not all(math.isfinite(value) for value in metrics.values()):
            norm = metrics["gradient_norm"]
            return f"the loss or its gradient is not a number any more (loss {loss}, gradient norm {norm})"
        if len(self._first) < _WINDOW:
            self._first.append(loss)
        self._latest.append(loss)
        first, latest = (sum(losses) / len(losses) for losses in (self._first, self._latest))
        if self._divergence is None or len(self._first) < _WINDOW or latest <= self._divergence * max(first, 1e-6):
            return None
        return (
            f"the loss diverges: its mean over the latest {_WINDOW} steps is {latest:.4g}, over the first {_WINDOW} it "
            f"was {first:.4g} (training.divergence allows {self._divergence:g} times that)"
        )
