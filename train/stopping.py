"""SIGTERM and Ctrl-C: a run stops where nothing is lost."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_ECHO = 2.0  # seconds in which a signal that comes again is the same one


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

    raising: with False a signal is only noted in `asked`, for a process that stops where others do. It may come twice,
    from a scheduler and from the parent that passes it on, so only one that comes much later counts as the second.
    """

    def __init__(self, *, raising: bool = True) -> None:
        self._before: dict[int, Any] = {}
        self._asked: int | None = None
        self._depth = 0
        self._raising, self._since = raising, 0.0

    @property
    def asked(self) -> int:
        """The number of the signal that came, 0 if none did."""
        return self._asked or 0

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
        if not self._raising:
            self._note(number)
            return
        for every, handler in self._before.items():
            signal.signal(every, handler)
        self._asked = number
        if not self._depth:
            raise Stopped(number)

    def _note(self, number: int) -> None:
        if self._asked is None:
            self._asked, self._since = number, time.monotonic()
        elif time.monotonic() - self._since > _ECHO:
            self.__exit__()
            signal.raise_signal(number)

    @contextmanager
    def held(self) -> Iterator[None]:
        """A part that must not be cut in two: a step with its donated arrays, the writing of a checkpoint."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
        if self._raising and self._asked is not None and not self._depth:
            asked, self._asked = self._asked, None
            raise Stopped(asked)
