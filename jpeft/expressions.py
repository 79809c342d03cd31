"""Regular expressions from a file, which are run only if they end soon.

Python's `re` takes exponential time on some expressions, and a file can hold any. What is safe is decided before an
expression runs: a loop may hold no loop, no choice and nothing optional, and no path through the expression has more
than a few loops, so that the time is at most a small power of the length of a module's name.
"""

from __future__ import annotations

import re
from typing import Any

from jpeft.errors import JpeftError

_MOST_LOOPS = 5
_LONGEST = 4000

_parser: Any = re._parser  # type: ignore[attr-defined]


def ends_soon(expression: str) -> bool:
    """Whether `compiled` would take it."""
    try:
        compiled(expression, "")
    except JpeftError:
        return False
    return True


def compiled(expression: str, where: str) -> re.Pattern[str]:
    """`expression`, compiled. Raises JpeftError, naming `where` it stands, if it is invalid or could run too long."""
    try:
        if len(expression) > _LONGEST:
            raise ValueError(f"it has {len(expression)} characters, more than {_LONGEST}")
        tree = _parser.parse(expression)
        if _loops(tree, inside=False) > _MOST_LOOPS:
            raise ValueError(f"it has more than {_MOST_LOOPS} repetitions in a row")
        return re.compile(expression)
    except (ValueError, RecursionError, OverflowError, re.error) as error:
        shown = expression if len(expression) <= 80 else f"{expression[:80]}..."
        raise JpeftError(
            f"{where}: the regular expression {shown!r} is not used: {error}; list the names of the modules instead"
        ) from None


def _loops(tree: Any, *, inside: bool) -> int:
    """The most loops on a path through a parsed expression; raises ValueError for one that could run too long."""
    total = 0
    for operator, argument in tree:
        name = str(operator)
        if name in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
            _, most, body = argument
            if inside:
                raise ValueError("it repeats what repeats itself")
            total += (most != 1) + _loops(body, inside=most != 1)
        elif name == "BRANCH":
            if inside:
                raise ValueError("it repeats a choice")
            total += max(_loops(branch, inside=inside) for branch in argument[1])
        elif name in ("SUBPATTERN", "ATOMIC_GROUP", "ASSERT", "ASSERT_NOT"):
            total += _loops(argument if name == "ATOMIC_GROUP" else argument[-1], inside=inside)
        elif name not in ("LITERAL", "NOT_LITERAL", "IN", "ANY", "AT"):
            raise ValueError("it refers back to what it matched")
    return total
