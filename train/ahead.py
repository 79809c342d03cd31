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

    waited: seconds that were spent waiting for the thread, but for the first item. An error in `make` is raised where
    its item would have come.
    """

    def __init__(self, make: Callable[[_Item], _Made], items: Iterable[_Item], depth: int = 2):
        self._make, self._items, self._depth = make, iter(items), depth
        self.waited = 0.0

    def __iter__(self) -> Iterator[tuple[_Item, _Made]]:
        with ThreadPoolExecutor(1, thread_name_prefix="ahead") as pool:
            coming: deque[tuple[_Item, Future[_Made]]] = deque()
            try:
                first = True
                while True:
                    while len(coming) < self._depth and (item := next(self._items, None)) is not None:
                        coming.append((item, pool.submit(self._make, item)))
                    if not coming:
                        return
                    item, future = coming.popleft()
                    begun = time.monotonic()
                    made = future.result()
                    self.waited += 0.0 if first else time.monotonic() - begun
                    first = False
                    yield item, made
            finally:
                for _, future in coming:
                    future.cancel()
