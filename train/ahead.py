"""Work that is done while the device is busy with something else."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

_Item = TypeVar("_Item")
_Made = TypeVar("_Made")


class Ahead(Generic[_Item, _Made]):
    """`make(item)` of every item in order, made in a thread up to `depth` items before they are asked for.

    waited: seconds that were spent waiting for the thread, but for the first item. An error in `make` or in
    `items` is raised where its item would have come.
    """

    def __init__(self, make: Callable[[_Item], _Made], items: Iterable[_Item], depth: int = 2):
        self._make, self._items, self._depth = make, iter(items), depth
        self._coming: deque[tuple[_Item, Future[_Made]]] = deque()
        self._fault: Exception | None = None
        self.waited = 0.0

    def __iter__(self) -> Iterator[tuple[_Item, _Made]]:
        with ThreadPoolExecutor(1, thread_name_prefix="ahead") as pool:
            try:
                first = True
                while True:
                    begun = time.monotonic()
                    self._fill(pool)
                    if not self._coming:
                        if self._fault is not None:
                            raise self._fault
                        return
                    item, future = self._coming.popleft()
                    made = future.result()
                    self.waited += 0.0 if first else time.monotonic() - begun
                    first = False
                    yield item, made
            finally:
                for _, future in self._coming:
                    future.cancel()

    def _fill(self, pool: ThreadPoolExecutor) -> None:
        """Gives the thread the next items."""
        while self._fault is None and len(self._coming) < self._depth:
            try:
                item = next(self._items, None)
            except Exception as error:  # those before it come first
                self._fault = error
                return
            if item is None:
                return
            self._coming.append((item, pool.submit(self._make, item)))
