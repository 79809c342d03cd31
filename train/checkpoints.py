"""What a run goes on from after it was killed: adapter, optimizer state and step, through Orbax.

Saving is asynchronous: a save copies the arrays and returns, a thread writes them. A checkpoint appears whole or not at
all, so a process that is killed while it saves leaves the one before. Everything else that a step depends on (order of
rows, dropout) is a function of the seed and the step's number, hence the rest of an interrupted run is bit for bit the
rest of the uninterrupted one.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jpeft.errors import JpeftError
from train import placing, processes

_PART = "state"


@dataclasses.dataclass(frozen=True)
class State:
    """Everything that changes from step to step.

    adapter: by path. optimizer: optax's state. best: the adapter of the best evaluation so far, empty if none is kept.
    notes: what else the run must remember, as JSON.
    """

    adapter: dict[str, jax.Array]
    optimizer: Any
    best: dict[str, jax.Array]
    notes: dict[str, Any]

    def arrays(self) -> dict[str, dict[str, Any]]:
        """As named arrays; the optimizer's by their place in its state."""
        leaves = jax.tree_util.tree_leaves_with_path(self.optimizer)
        return {
            "adapter": dict(self.adapter),
            "optimizer": {jax.tree_util.keystr(path): leaf for path, leaf in leaves},
            "best": dict(self.best),
        }

    def filled(self, arrays: Mapping[str, Mapping[str, Any]], notes: dict[str, Any]) -> State:
        """A state of this one's structure with other arrays and notes."""
        leaves, structure = jax.tree_util.tree_flatten_with_path(self.optimizer)
        optimizer = jax.tree.unflatten(
            structure, [arrays["optimizer"][jax.tree_util.keystr(path)] for path, _ in leaves]
        )
        return State(dict(arrays["adapter"]), optimizer, dict(arrays.get("best", {})), notes)


class Checkpoints:
    """The checkpoints of a run in `folder`, of which the latest `keep` stay.

    every: steps between two of them; minutes: and at the latest after this time, whichever comes first. Of several
    processes none goes by its own clock: they agree and set `late`.
    """

    def __init__(self, folder: Path, *, keep: int, every: int, minutes: float, say: Callable[[str], None]):
        from orbax.checkpoint import v1 as ocp

        self._folder, self._every, self._seconds, self._say = folder, every, 60 * minutes, say
        self._last_time = time.monotonic()
        self.late = False
        try:
            self._orbax = ocp.training.Checkpointer(
                folder.absolute(),
                save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
                preservation_policy=ocp.training.preservation_policies.LatestN(keep),
                cleanup_tmp_directories=True,
            )
        except OSError as error:
            raise self._cannot_write(error) from None
        self._pending: Any = None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        fault: JpeftError | None = None
        for end in (self.wait, self._orbax.close):  # closing raises what the thread met once more
            try:
                end()
            except (JpeftError, OSError, ValueError) as error:
                fault = fault or (error if isinstance(error, JpeftError) else self._cannot_write(error))
        if fault is not None and kind is None:  # else what went wrong first is what the user should read
            raise fault

    @property
    def latest(self) -> int | None:
        """The step of the latest checkpoint that is whole."""
        return None if self._orbax.latest is None else int(self._orbax.latest.step)

    @property
    def overdue(self) -> bool:
        """Whether the last one is longer ago than `minutes`, by the clock of this process."""
        return time.monotonic() - self._last_time >= self._seconds

    def due(self, step: int) -> bool:
        """Whether the run should be saved after `step`."""
        return step % self._every == 0 or self.late or (jax.process_count() == 1 and self.overdue)

    def save(self, step: int, state: State) -> None:
        """Begins to write the state after `step`; waits only for the checkpoint before.

        Raises JpeftError if that one could not be written, for a run whose checkpoints fail must not go on for days,
        and if the adapter is not finite: what is on disk is always worth going on from.
        """
        broken = [name for name, finite in jax.device_get(_finite(state.adapter)).items() if not finite]
        if broken:
            raise JpeftError(f"after step {step}, {', '.join(broken[:4])} is not finite any more")
        self.wait()
        self.late = False
        if self.latest == step:
            return
        # The next step donates its arrays, while the thread still writes them.
        arrays = jax.tree.map(_copied, {name: part for name, part in state.arrays().items() if part})
        try:
            self._pending = self._orbax.save_checkpointables_async(
                step, {_PART: arrays}, force=True, custom_metadata=dict(state.notes)
            )
        except (OSError, ValueError) as error:
            raise self._cannot_write(error) from error
        self._last_time = time.monotonic()

    def wait(self) -> None:
        """Returns when what was begun is written. Raises JpeftError if it could not be."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.result()
        except (OSError, ValueError) as error:
            raise self._cannot_write(error) from error

    def restore(self, like: State) -> tuple[int, State] | None:
        """(step, state) of the latest checkpoint that can be read, on the devices of `like`; None if there is none.

        A checkpoint that cannot be read is passed over, with a word: the run then repeats a few steps more.
        """
        abstract = {
            name: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), part)
            for name, part in like.arrays().items()
            if part
        }
        steps = [int(entry.step) for entry in reversed(self._orbax.checkpoints)]
        damaged, reason = [], ""
        for step in steps:
            fault = ""
            try:
                arrays = self._orbax.load_checkpointables(step, {_PART: abstract})[_PART]
                notes = dict(self._orbax.metadata(step).custom_metadata or {})
                state = like.filled(arrays, notes)
            except Exception as error:  # whatever a damaged file makes Orbax raise
                fault = _first_line(error)
            reason = next(filter(None, processes.gathered(fault)), "")
            if reason:
                damaged.append(step)
                self._say(f"warning   the checkpoint of step {step} cannot be read: {reason}")
                continue
            for other in damaged:  # the run comes to these steps again
                self._orbax.delete(other)
            return step, state
        if steps:
            raise JpeftError(
                f"{self._folder}: no checkpoint can be read ({reason}); output.overwrite=true moves the run aside "
                "and starts again"
            )
        return None

    def _cannot_write(self, error: Exception) -> JpeftError:
        latest = getattr(self, "_orbax", None) and self.latest
        kept = f"the checkpoint of step {latest} stays" if latest is not None else "there is no earlier one"
        return JpeftError(
            f"{self._folder}: a checkpoint cannot be written: {_first_line(error)}; {kept}. "
            "With room on the disk, the same command goes on from there"
        )


def _copied(array: jax.Array) -> jax.Array:
    if array.sharding.memory_kind == placing.HOST:  # it is not brought to the device for that
        return jax.device_put(array, array.sharding, may_alias=False)
    return jnp.copy(array)


@jax.jit
def _finite(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: jnp.all(jnp.isfinite(array)) for name, array in arrays.items()}


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
