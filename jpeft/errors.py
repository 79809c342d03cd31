"""The one exception a user can cause, and how its messages find near misses."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class JpeftError(ValueError):
    """Something the caller can fix: the message names the path, the value and the fix."""


def nearest(name: str, options: Iterable[str], count: int = 5) -> list[str]:
    """The `count` entries of `options` most like `name`, best first.

    Compares whole names and last segments, so that `q_porj` finds `layers.self_attn.q_proj`.
    """
    unique = list(dict.fromkeys(options))

    def likeness(option: str) -> float:
        tails = (option, option.replace("/", ".").rpartition(".")[2])
        return max(difflib.SequenceMatcher(None, name.lower(), tail.lower()).ratio() for tail in tails)

    return sorted(unique, key=likeness, reverse=True)[:count]
