"""Held-out rows worth looking at: what the model said before and after, right and wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from itertools import chain, zip_longest


@dataclasses.dataclass(frozen=True)
class Sample:
    """One held-out row and the answers to it.

    right: whether each is right; by default where it reads as what is wanted.
    """

    asked: str
    wanted: str
    before: str
    after: str
    right: tuple[bool, bool] | None = None

    @property
    def course(self) -> str:
        """What became of the answer: one of `COURSES`."""
        before, after = (answer.strip() == self.wanted.strip() for answer in (self.before, self.after))
        return COURSES[self.right or (before, after)]


# By (right before, right after), in the order in which they are shown.
COURSES = {(False, True): "learnt", (False, False): "still wrong", (True, False): "lost", (True, True): "kept right"}


def collect(
    asked: Sequence[str],
    wanted: Sequence[str],
    before: Sequence[str],
    after: Sequence[str],
    agree: Callable[[Sequence[str], Sequence[str]], list[bool]] | None = None,
) -> list[Sample]:
    """One sample for each held-out row; none if there were no answers.

    agree: tells which of some answers are right, beside what is wanted; by default those that read like it.
    """
    if not (before and after):
        return []
    rows = zip(asked, wanted, before, after, strict=True)
    if agree is None:
        return [Sample(*row) for row in rows]
    right = zip(agree(before, wanted), agree(after, wanted), strict=True)
    return [Sample(*row, both) for row, both in zip(rows, right, strict=True)]


def counts(samples: Sequence[Sample]) -> dict[str, int]:
    """How many rows took each course."""
    courses = [sample.course for sample in samples]
    return {course: courses.count(course) for course in COURSES.values()}


def pick(samples: Sequence[Sample], count: int) -> list[Sample]:
    """`count` of the samples: of each course as many as of the others as far as there are, changed answers first."""
    groups = [[sample for sample in samples if sample.course == course] for course in COURSES.values()]
    for group in groups:
        group.sort(key=lambda sample: sample.before.strip() == sample.after.strip())
    in_turn = [sample for sample in chain.from_iterable(zip_longest(*groups)) if sample is not None][:count]
    order = list(COURSES.values())
    return sorted(in_turn, key=lambda sample: order.index(sample.course))


def shortened(text: str, most: int = 100) -> str:
    """`text` on one line, its middle left out if it is longer than `most` characters."""
    flat = " ".join(text.split())
    return flat if len(flat) <= most else f"{flat[: most * 3 // 5]} ... {flat[-most * 7 // 20 :]}"


def entry(sample: Sample, most: int = 3_000) -> dict[str, str]:
    """The sample as it stands in summary.json; of each text at most `most` characters."""
    texts = {name: getattr(sample, name) for name in ("asked", "wanted", "before", "after")}
    cut = {name: value if len(value) <= most else f"{value[:most]} ..." for name, value in texts.items()}
    return {**cut, "course": sample.course}
