"""SIGTERM and Ctrl-C: a run stops where nothing is lost."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Stopped(BaseException):
    """The run was asked to end. Like KeyboardInterrupt it passes by those who handle errors."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number

    @property
    def exit_code(self) -> int:
        """130 for Ctrl-C, 143 for SIGTERM: 128 and the number of the signal, as shells count."""
        return 128 + self.number


class Stopping:
    """While entered, SIGTERM and SIGINT raise `Stopped`: at once, or at the end of a `held` part.

    A second signal ends the process as if there were no handler. Signals reach the main thread only; elsewhere this
    does nothing.
    """

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}
        self._asked: int | None = None
        self._depth = 0

    def __enter__(self) -> Stopping:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _handle(self, number: int, _: FrameType | None) -> None:
        for every, handler in self._before.items():
            signal.signal(every, handler)
        self._asked = number
        if not self._depth:
            raise Stopped(number)

    @contextmanager
    def held(self) -> Iterator[None]:
        """A part that must not be cut in two: a step with its donated arrays, the writing of a checkpoint."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
        if self._asked is not None and not self._depth:
            asked, self._asked = self._asked, None
            raise Stopped(asked)
