"""Several processes that train one model: how they find each other, agree, and end together.

All of them run the same program on the same configuration, and whatever waits for the others must be reached by each.
So what a process may see differently (files, clocks, signals) is decided by one or by vote: `from_first`, `agreed`,
`Votes`. With one process all of this does nothing.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jpeft.errors import JpeftError
from train.launch import Group
from train.stopping import Stopped

_Made = TypeVar("_Made")
_LONGEST = 4096  # bytes of a message that goes around


class SharedError(JpeftError):
    """An error that every process raises at the same place."""


def first() -> bool:
    """Whether this process writes the files and speaks."""
    return jax.process_index() == 0


@contextmanager
def joined(group: Group, heartbeat_timeout: int) -> Iterator[None]:
    """Makes this process one of `group`, before JAX starts its backend, and ends so that no other waits for ever.

    heartbeat_timeout: seconds after which a process that is not heard of counts as dead; JAX's runtime then ends the
    others. What goes wrong here alone is said and ends the process at once, so that they hear no more of it.

    Raises JpeftError if the processes do not find each other.
    """
    # It would have a handler of SIGTERM of its own; `train.stopping` has one for all signals, and `Votes` agrees.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            group.coordinator, group.count, group.number, heartbeat_timeout_seconds=heartbeat_timeout
        )
    except (ValueError, TypeError, RuntimeError) as error:
        raise JpeftError(
            f"--processes: the processes of the run did not find each other: {error}; give --coordinator, --processes "
            "and --process-id, or start them with a launcher that JAX knows"
        ) from error
    try:
        yield
    except (Stopped, SharedError):
        jax.distributed.shutdown()  # which all do
        raise
    except BaseException as error:
        if isinstance(error, JpeftError):
            print(f"error: process {jax.process_index()}: {error}", file=sys.stderr)
        else:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        if isinstance(error, jax.errors.JaxRuntimeError):
            # A collective fails when a process at its other end is gone. The runtime, which will know, ends this one.
            time.sleep(heartbeat_timeout + 10)
        # An orderly end would wait for the others, which wait for this process.
        os._exit(2 if isinstance(error, JpeftError) else 130 if isinstance(error, KeyboardInterrupt) else 1)
    jax.distributed.shutdown()


def from_first(make: Callable[[], _Made]) -> _Made:
    """What `make` returns on the first process (something that JSON can hold), on all of them.

    Raises its JpeftError on all of them.
    """
    if jax.process_count() == 1:
        return make()
    said = b""
    if first():
        try:
            said = json.dumps([make(), None]).encode()
        except JpeftError as error:
            said = json.dumps([None, str(error)]).encode()
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(said))))
    padded = np.zeros(1 << size.bit_length(), np.uint8)  # few sizes, few programs
    padded[: len(said)] = np.frombuffer(said, np.uint8)
    received = np.asarray(multihost_utils.broadcast_one_to_all(padded)).astype(np.uint8)
    made, fault = json.loads(received[:size].tobytes())
    if fault is not None:
        raise SharedError(fault)
    return made


@contextmanager
def agreed() -> Iterator[None]:
    """A JpeftError that any process meets inside is raised by all at the end. Nothing inside waits for the others."""
    if jax.process_count() == 1:
        yield
        return
    fault = ""
    try:
        yield
    except JpeftError as error:
        fault = str(error) or type(error).__name__
    said = gathered(fault)
    number = next((number for number, text in enumerate(said) if text), None)
    if number is not None:
        raise SharedError(said[number] if all(said) else f"process {number}: {said[number]}")


def gathered(text: str) -> list[str]:
    """The texts of all processes, in their order."""
    if jax.process_count() == 1:
        return [text]
    own = np.zeros(_LONGEST, np.uint8)
    content = np.frombuffer(text.encode()[:_LONGEST], np.uint8)
    own[: len(content)] = content
    rows = np.asarray(multihost_utils.process_allgather(own)).astype(np.uint8)
    return [row.tobytes().rstrip(b"\0").decode(errors="replace") for row in rows]


class Votes:
    """What a process wants and all then do after the same step: stop because of a signal, save because it is time.

    stop: the number of a signal, 0 for none. late: whether the first process finds that a checkpoint is overdue.
    """

    def __init__(self, mesh: Mesh | None):
        self._mesh = mesh if jax.process_count() > 1 else None
        self.stop, self.late = 0, False
        if self._mesh is not None:
            axes = tuple(self._mesh.axis_names)
            self._sharding = NamedSharding(self._mesh, PartitionSpec(axes))
            whole = NamedSharding(self._mesh, PartitionSpec())
            self._most = jax.jit(lambda votes: votes.max(0), out_shardings=whole)

    def cast(self, stop: int, late: bool = False) -> jax.Array | None:
        """Gives the vote of this process; every process must. Returns what `count` takes, without waiting for it."""
        if self._mesh is None:
            return None
        own = np.array([[stop, late and first()]], np.int32)
        shape = (self._mesh.size, own.shape[1])
        return self._most(jax.make_array_from_callback(shape, self._sharding, lambda _: own))

    def count(self, votes: jax.Array | None) -> None:
        """Counts the votes of all, when they are there."""
        if votes is None:
            return
        stop, late = (int(value) for value in np.asarray(votes))
        self.stop, self.late = stop or self.stop, bool(late) or self.late


def whole(tree: Any, mesh: Mesh | None) -> Any:
    """Arrays of which every process has all values."""
    if mesh is None or jax.process_count() == 1:
        return tree
    return jax.jit(_same, out_shardings=NamedSharding(mesh, PartitionSpec()))(tree)


def _same(tree: Any) -> Any:
    return tree
