"""What there is to set under `method:`: the methods by name, and the keys of each with their meaning."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import re
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from train.schema import shown, type_name


def names() -> list[str]:
    """The names of all methods, read from the text of `jpeft.methods`: importing it would bring JAX along."""
    spec = find_spec("jpeft")
    assert spec is not None
    assert spec.origin is not None
    tree = ast.parse((Path(spec.origin).parent / "methods" / "__init__.py").read_text(encoding="utf-8"))
    table = next(
        node.value
        for node in tree.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == "METHODS"
    )
    assert isinstance(table, ast.Dict)
    return [str(key.value) for key in table.keys if isinstance(key, ast.Constant)]


def overview() -> Iterator[tuple[str, str]]:
    """(name, what it is) of every method."""
    from jpeft.methods import METHODS

    for name, kind in METHODS.items():
        yield name, _first(kind)


def describe(name: str) -> tuple[str, list[tuple[str, str, str, str]]]:
    """What the method is, and (key, type, default, meaning) of each of its keys.

    Raises JpeftError if there is no such method.
    """
    from jpeft.errors import JpeftError, nearest
    from jpeft.methods import METHODS
    from train.config import method_keys
    from train.starts import more_keys

    if name not in METHODS:
        near = nearest(name, METHODS, 1)[0]
        raise JpeftError(f"no method {name!r}; did you mean {near}? (there are {', '.join(METHODS)})")
    kind = METHODS[name]
    said, types = _meanings(kind), method_keys(kind)
    rows = []
    for field in dataclasses.fields(kind):
        key = "adapter_name" if field.name == "name" else field.name
        default = "required" if field.default is dataclasses.MISSING else _shown(field.default)
        rows.append((key, type_name(types[key]), default, said.get(field.name, "")))
    rows += [
        (key, type_name(hint), _shown(default), meaning) for key, (hint, default, meaning) in more_keys(kind).items()
    ]
    return _first(kind), rows


def _first(kind: type) -> str:
    return (inspect.getdoc(kind) or "").partition("\n")[0]


def _shown(value: Any) -> str:
    """A default as it would be written in the file."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_shown(item)}" for key, item in value.items()) + "}"
    return f"[{', '.join(map(_shown, value))}]" if isinstance(value, list | tuple) else shown(value)


def _meanings(kind: type) -> dict[str, str]:
    """What the docstring of a method says of its fields; of those it leaves out, what that of a relative does.

    Relatives are the classes that it derives from, those that it names ("the fields of `Houlsby`"), and LoRA, which
    shares most of its fields with most.
    """
    from jpeft.methods import METHODS, LoRA

    text = inspect.getdoc(kind) or ""
    named = [other for other in METHODS.values() if re.search(rf"`{other.__name__}`", text)]
    found: dict[str, str] = {}
    for other in (*kind.__mro__, *named, LoRA):
        if dataclasses.is_dataclass(other):
            found = {**_documented(other), **found}
    return found


def _documented(kind: type) -> dict[str, str]:
    """The entries `rank: ...` and `targets, exclude: ...` of a docstring, by field."""
    fields = {field.name for field in dataclasses.fields(kind)}
    made: dict[str, str] = {}
    for paragraph in inspect.cleandoc(kind.__doc__ or "").split("\n\n"):
        text = " ".join(paragraph.split())
        entries = [
            match
            for match in re.finditer(r"(?:^|(?<=\. ))(\w+(?:, \w+)*): ", text)
            if fields & set(match[1].split(", "))
        ]
        for match, following in itertools.zip_longest(entries, entries[1:]):
            meaning = text[match.end() : following.start() if following else None].strip().rstrip(".")
            meaning = re.sub(r"\bNone\b", "null", meaning)
            made |= dict.fromkeys(match[1].split(", "), meaning)
    return made
