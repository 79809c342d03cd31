"""Several short texts in one row, so that little of a batch is padding."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from train.examples import Example

_OPEN = 64  # rows that still take texts: more would pack little better and search longer


def pack(examples: Sequence[Example], length: int) -> list[Example]:
    """The examples in rows of at most `length` tokens, each in the first of the last rows that has room for it.

    Each is a segment of its row: models see tokens of their own segment only, at positions that start from 0 in each.
    A packed example is of the row of its first text. A pure function of the examples and their order.
    """
    rows: list[list[Example]] = []
    room: dict[int, int] = {}  # of rows that are open, by their place
    for example in examples:
        at = next((place for place, left in room.items() if len(example) <= left), None)
        if at is None:
            at = len(rows)
            rows.append([])
            room[at] = length
            if len(room) > _OPEN:
                del room[min(room, key=room.__getitem__)]
        rows[at].append(example)
        room[at] -= len(example)
        if not room[at]:
            del room[at]
    return [_joined(row) for row in rows]


def _joined(row: Sequence[Example]) -> Example:
    segments = np.repeat(np.arange(1, len(row) + 1, dtype=np.int32), [len(example) for example in row])
    ids, targets = (np.concatenate([getattr(example, name) for example in row]) for name in ("ids", "targets"))
    return Example(ids, targets, row[0].row, segments=segments)
