"""YAML read without guesses: every scalar stays text until the schema says what it should be.

Plain YAML 1.1 reads `2e-5` as text, `no` as false and `08` as eight or as text; here the type of the key decides, for
files and for `key=value` on the command line alike. A key given twice, a tab in the indentation, an alias and a tag are
faults. All faults are collected with their lines.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, TypeAlias

import yaml


@dataclass(frozen=True)
class Node:
    """A mapping, a sequence, or the text of a scalar, and where it stands (`line 7`)."""

    value: dict[str, Node] | list[Node] | str
    where: str
    quoted: bool = False


@dataclass(frozen=True)
class Fault:
    """What is wrong, at which key, where."""

    where: str
    key: str
    message: str

    @property
    def order(self) -> tuple[int, str]:
        """Faults of the file by line, then those of the command line."""
        digits = self.where.removeprefix("line ")
        return (int(digits), "") if digits.isdigit() else (1_000_000_000, self.where)

    def __str__(self) -> str:
        return f"{self.where}: {self.key}: {self.message}" if self.key else f"{self.where}: {self.message}"


Faults: TypeAlias = list[Fault]


def read(text: str, faults: Faults, where: str | None = None) -> Node | None:
    """The tree of one YAML document; None if there is no tree to go on with. `where` replaces the line numbers."""

    def place(line: int) -> str:
        return where or f"line {line + 1}"

    lines = text.split("\n")
    for number, line in enumerate(lines):
        indent = re.match(r"[ \t]*", line)
        if indent and "\t" in indent[0] and line.strip():
            faults.append(Fault(place(number), "", "a tab in the indentation; use spaces"))
            lines[number] = indent[0].replace("\t", "  ") + line[indent.end() :]
    source = "\n".join(lines)
    try:
        aliases = [event for event in yaml.parse(source, Loader=yaml.BaseLoader) if isinstance(event, yaml.AliasEvent)]
        if aliases:
            lines_of = [event.start_mark.line if event.start_mark else 0 for event in aliases]
            faults += [
                Fault(place(line), "", f"alias *{event.anchor}; write the value out")
                for line, event in zip(lines_of, aliases, strict=True)
            ]
            return None
        root = yaml.compose(source, Loader=yaml.BaseLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        # With tabs in the file, the syntax error is most likely their echo.
        if not faults:
            problem = error.problem or error.context
            faults.append(Fault(place(mark.line if mark else 0), "", f"not valid YAML: {problem}"))
        return None
    except yaml.YAMLError as error:
        faults.append(Fault(where or "line 1", "", f"not valid YAML: {error}"))
        return None
    return None if root is None else _node(root, "", place, faults)


def _node(node: yaml.Node, key: str, place: Any, faults: Faults) -> Node:
    here = place(node.start_mark.line)
    if node.tag not in {f"tag:yaml.org,2002:{kind}" for kind in ("str", "map", "seq")}:
        faults.append(Fault(here, key, f"tag {node.tag}; values are written without tags"))
    if isinstance(node, yaml.ScalarNode):
        return Node(node.value, here, quoted=node.style is not None)
    if isinstance(node, yaml.SequenceNode):
        return Node([_node(item, f"{key}[{i}]", place, faults) for i, item in enumerate(node.value)], here)
    made: dict[str, Node] = {}
    for name, value in node.value:
        line = place(name.start_mark.line)
        if not isinstance(name, yaml.ScalarNode):
            faults.append(Fault(line, key, "a key must be plain text"))
            continue
        path = f"{key}.{name.value}" if key else name.value
        child = _node(value, path, place, faults)
        if name.value in made:
            faults.append(Fault(line, path, f"given twice, first on {made[name.value].where}"))
            continue
        # A fault of a key is reported on the key's line, also where its value starts below.
        made[name.value] = Node(child.value, line, child.quoted)
    return Node(made, here)


_NUMBER = re.compile(r"[+-]?(\d[\d_]*)?(\.[\d_]*)?([eE][+-]?\d+)?")
_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_NULL = {"", "~", "null", "Null", "NULL"}


class NotThis(Exception):
    """A scalar is not of the kind asked for; the message says what is accepted."""


def null(node: Node) -> bool:
    """Whether a plain scalar stands for "nothing"."""
    return isinstance(node.value, str) and not node.quoted and node.value in _NULL


def boolean(node: Node) -> bool:
    """`true`, `false` and YAML 1.1's words for them."""
    if not isinstance(node.value, str) or node.quoted or node.value.lower() not in _WORDS:
        raise NotThis(f"{show(node)} is not true or false")
    return _WORDS[node.value.lower()]


def number(node: Node) -> float:
    """`2e-5`, `2E-5`, `.1`, `1_000`, finite; not quoted, no leading zeros (octal to some, decimal to others)."""
    text = node.value
    if not isinstance(text, str):
        raise NotThis(f"{show(node)} is not a number")
    if node.quoted:
        raise NotThis(f"{show(node)} is quoted text, not a number; remove the quotes")
    match = _NUMBER.fullmatch(text)
    if not match or not any(char.isdigit() for char in (match[1] or "") + (match[2] or "")) or text.endswith("_"):
        raise NotThis(f"{show(node)} is not a number (accepted: 3, 0.1, .1, 2e-5, 1_000)")
    digits = (match[1] or "").replace("_", "")
    if len(digits) > 1 and digits[0] == "0":
        raise NotThis(f"{show(node)} has a leading zero; write {text.lstrip('+-').lstrip('0_') or '0'}")
    value = float(text.replace("_", ""))
    if value in (float("inf"), float("-inf")):
        raise NotThis(f"{show(node)} is too large")
    return value


def integer(node: Node) -> int:
    """A number without a fraction: `8`, `1_000`, `1e3`."""
    value = number(node)
    if not value.is_integer():
        raise NotThis(f"{show(node)} is not a whole number")
    if abs(value) >= 2**63:  # which no array has a size or a value of
        raise NotThis(f"{show(node)} is too large")
    text = str(node.value).replace("_", "")
    return int(text) if text.lstrip("+-").isdigit() else int(value)


def show(node: Node) -> str:
    """A node as it appears in a message."""
    if isinstance(node.value, dict):
        return "a mapping"
    if isinstance(node.value, list):
        return "a list"
    return repr(node.value) if node.value or node.quoted else "nothing"
