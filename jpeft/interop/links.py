"""Links: which part of which array of ours stands where in which tensor of a file.

Both directions copy between two views of equal shape, so one list of links reads a file and writes it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from jpeft.errors import JpeftError, nearest
from jpeft.models.tensors import TensorInfo

View: TypeAlias = Callable[[np.ndarray], np.ndarray]

_REPORTED = 8


def whole(array: np.ndarray) -> np.ndarray:
    """The view of all of it."""
    return array


def turned(array: np.ndarray) -> np.ndarray:
    """The view with the axes the other way round."""
    return array.T


@dataclasses.dataclass(frozen=True)
class Link:
    """One array of ours, or one row of it, and its place in a file.

    key: canonical. row: along the layer axis; None for an array without one. name, shape: of the tensor in the file.
    ours, theirs: views of the row and of the tensor, of one shape; what `ours` leaves out is zero when it is read.
    slots: of the first axis of `ours`, those that the file has; None for all. factor: 1 or -1, between theirs and ours.
    copy: a second place for values that another link has, which have to agree.
    """

    key: str
    row: int | None
    name: str
    shape: tuple[int, ...]
    ours: View = whole
    theirs: View = whole
    slots: tuple[int, ...] | None = None
    factor: int = 1
    copy: bool = False

    def get(self, array: np.ndarray) -> np.ndarray:
        """The values for the file in our array."""
        view = self._view(array)
        return self.factor * (view if self.slots is None else view[list(self.slots)])

    def put(self, array: np.ndarray, tensor: np.ndarray) -> None:
        """Puts the values in the file's tensor into our array."""
        view = self._view(array)
        view[... if self.slots is None else list(self.slots)] = self.factor * self.theirs(tensor)

    def _view(self, array: np.ndarray) -> np.ndarray:
        return self.ours(array if self.row is None else array[self.row])


def filled(
    links: Sequence[Link], shapes: Mapping[str, Any], read: Callable[[str], np.ndarray]
) -> dict[str, np.ndarray]:
    """Our arrays (of the shapes and dtypes of `shapes`) with the values of the tensors that `read` gives."""
    made: dict[str, np.ndarray] = {}
    for link in links:
        like, tensor = shapes[link.key], read(link.name)
        array = made.setdefault(link.key, np.zeros(like.shape, like.dtype))
        if link.copy and not np.array_equal(link.get(array), link.theirs(tensor).astype(array.dtype)):
            raise JpeftError(f"{link.name} and its tied copy differ; here one array stands for both")
        link.put(array, tensor)
    return made


def gathered(links: Sequence[Link], arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The tensors of a file with the values of our arrays."""
    held = {key: np.asarray(arrays[key]) for key in {link.key for link in links}}
    made: dict[str, np.ndarray] = {}
    for link in links:
        array = held[link.key]
        tensor = made.setdefault(link.name, np.zeros(link.shape, array.dtype))
        link.theirs(tensor)[...] = link.get(array)
    return made


def check(
    links: Sequence[Link], tensors: Mapping[str, TensorInfo], accounted: Sequence[str], where: str, *, hint: str = ""
) -> None:
    """Raises one JpeftError that names every tensor that is missing, unexpected, or of the wrong shape or type."""
    wanted = {link.name: link.shape for link in links}
    missing = [name for name in wanted if name not in tensors]
    unexpected = [name for name in tensors if name not in wanted and name not in accounted]
    wrong = []
    for name, shape in wanted.items():
        info = tensors.get(name)
        if info is None:
            continue
        if info.shape != shape:
            wrong.append(f"{name} has shape {list(info.shape)}, expected {list(shape)}")
        elif not _is_floating(info):
            wrong.append(f"{name} is {info.dtype.name}, expected a floating type of 16 bits or more")
    said = [_listed("missing", missing), _listed("of the wrong shape or type", wrong)]
    shown = [f"{name}{_near(name, missing)}" for name in unexpected[:_REPORTED]]
    said.append(_listed("unexpected", [*shown, *unexpected[_REPORTED:]]))
    if any(said):
        raise JpeftError(
            f"{where}: the tensors do not fit the configuration and the model"
            + "".join(said)
            + (hint and f"\n  {hint}")
        )


def _is_floating(info: TensorInfo) -> bool:
    return info.dtype.name in ("float64", "float32", "float16", "bfloat16")


def _listed(title: str, entries: Sequence[str]) -> str:
    more = f", and {len(entries) - _REPORTED} more" if len(entries) > _REPORTED else ""
    return f"\n  {title} ({len(entries)}): {', '.join(entries[:_REPORTED])}{more}" if entries else ""


def _near(name: str, missing: Sequence[str]) -> str:
    found = nearest(name, missing[:200], 1)
    return f" (nearest that is missing: {found[0]})" if found else ""
