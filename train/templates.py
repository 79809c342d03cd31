"""Text made of a row's columns."""

from __future__ import annotations

import string
from collections.abc import Mapping
from typing import Any

from jpeft.errors import JpeftError


class Template:
    """A column, or text with columns in braces: `Question: {text}`."""

    def __init__(self, given: str, key: str):
        self._given = given
        try:
            fields = [field for field in string.Formatter().parse(given) if field[1] is not None]
        except ValueError as error:
            raise JpeftError(
                f"data.{key}: {given!r} is no template: {error}; a brace itself is written twice"
            ) from None
        names = [str(name) for _, name, _, _ in fields]
        for _, name, form, conversion in fields:
            if form or conversion:
                extra = (f"!{conversion}" if conversion else "") + (f":{form}" if form else "")
                raise JpeftError(
                    f"data.{key}: {given!r}: {{{name}{extra}}} asks for formatting, but columns are written as they "
                    f"are; write {{{name}}}"
                )
        bad = [name for name in names if not name.isidentifier()]
        if bad:
            raise JpeftError(f"data.{key}: {given!r}: {{{bad[0]}}} is no column name; a brace itself is written twice")
        self.columns: tuple[str, ...] = tuple(names) or (given,)
        self._plain = not names

    def __call__(self, row: Mapping[str, Any]) -> str:
        return (
            str(row[self._given]) if self._plain else self._given.format(**{name: row[name] for name in self.columns})
        )
