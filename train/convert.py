"""From strict YAML to Python values, led by type annotations.

Serves pydantic sections (`train.schema`) and the dataclasses of methods alike: the annotation of a key says whether
`no` is a word or false, `8` a number or a label.
"""

from __future__ import annotations

import collections.abc
import re
import types
from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from jpeft.errors import nearest
from train import strict_yaml as sy
from train.schema import type_name
from train.strict_yaml import Fault, Faults, Node, NotThis

_SEQUENCES = (list, tuple, set, frozenset, collections.abc.Sequence, collections.abc.Iterable)
_MAPPINGS = (dict, collections.abc.Mapping)
_RANGE = re.compile(r"(\d+):(\d+)")


def convert(node: Node, annotation: Any) -> Any:
    """The value of `node` as `annotation` wants it; raises NotThis saying what is accepted.

    Of a union, null comes first, then true/false, numbers, collections, and text last, so text is what nothing else
    fits; quoted scalars are text always.
    """
    members = sorted(_members(annotation), key=_rank)
    if not members:
        raise NotThis("cannot be given in a configuration file")
    errors = []
    for member in members:
        try:
            return _one(node, member)
        except NotThis as error:
            errors.append(str(error))
    if len([member for member in members if member is not type(None)]) == 1:
        raise NotThis(errors[-1])
    kinds = " or ".join(dict.fromkeys(type_name(member) for member in members if member is not type(None)))
    # A list that is at fault inside says more than "is not a list".
    inner = [error for error in errors if error.startswith("item ")]
    raise NotThis(inner[0] if inner else f"{sy.show(node)} is not {kinds}")


def _members(annotation: Any) -> list[Any]:
    """The alternatives of a (nested) union that YAML can express."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _members(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [leaf for arg in get_args(annotation) for leaf in _members(arg)]
    if annotation in (bool, int, float, str, type(None)) or origin is Literal:
        return [annotation]
    if origin in _SEQUENCES or annotation in _SEQUENCES or origin in _MAPPINGS or annotation in _MAPPINGS:
        return [annotation]
    if annotation is Any:
        return [type(None), bool, int, float, list[Any], dict[str, Any], str]
    return []  # predicates, compiled patterns, arrays: for Python only


def _rank(annotation: Any) -> int:
    order = (type(None), bool, int, float)
    if annotation in order:
        return order.index(annotation)
    return 7 if annotation is str else 6 if get_origin(annotation) is Literal else 5


def _one(node: Node, annotation: Any) -> Any:
    if annotation is type(None):
        if not sy.null(node):
            raise NotThis(f"{sy.show(node)} is not null")
        return None
    readers: dict[Any, Callable[[Node], Any]] = {bool: sy.boolean, int: sy.integer, float: sy.number, str: _text}
    if annotation in readers:
        return readers[annotation](node)
    origin, args = get_origin(annotation) or annotation, get_args(annotation)
    if origin is Literal:
        return _literal(node, args)
    if origin in _SEQUENCES:
        return _sequence(node, args)
    if not isinstance(node.value, dict):
        raise NotThis(f"{sy.show(node)} is not a mapping")
    key_type, value_type = args or (str, Any)
    made = {}
    for name, value in node.value.items():
        try:
            made[convert(Node(name, node.where), key_type)] = convert(value, value_type)
        except NotThis as error:
            raise NotThis(f"item {name!r}: {error}") from None
    return made


def _text(node: Node) -> str:
    if not isinstance(node.value, str) or sy.null(node):
        # `{question}` and `[INST]` are what YAML writes mappings and lists with.
        hint = "" if isinstance(node.value, str) else "; text that begins with a bracket goes between quotes"
        raise NotThis(f"{sy.show(node)} is not text{hint}")
    if "\0" in node.value:  # which no path can have
        raise NotThis(f"{sy.show(node)} has a character of code 0 in it")
    return node.value


def _literal(node: Node, options: tuple[Any, ...]) -> Any:
    for option in options:
        if isinstance(node.value, str) and (node.value == option or node.value == str(option)) and not sy.null(node):
            return option
    listed = [str(option) for option in options]
    near = f"; did you mean {nearest(node.value, listed, 1)[0]}?" if isinstance(node.value, str) and node.value else ""
    raise NotThis(f"{sy.show(node)} is not one of {', '.join(listed)}{near}")


def _sequence(node: Node, args: tuple[Any, ...]) -> list[Any]:
    # `8:16` is range(8, 16) where whole numbers are asked for.
    item = args[0] if args else Any
    if isinstance(node.value, str) and not node.quoted and (span := _RANGE.fullmatch(node.value)) and item is int:
        return list(range(int(span[1]), int(span[2])))
    if not isinstance(node.value, list):
        raise NotThis(f"{sy.show(node)} is not a list")
    made = []
    for index, child in enumerate(node.value):
        try:
            made.append(convert(child, item))
        except NotThis as error:
            raise NotThis(f"item {index + 1} of the list: {error}") from None
    return made


def convert_keys(
    node: Node, annotations: dict[str, Any], key: str, faults: Faults, unknown: Callable[[str, Node], str]
) -> dict[str, Any]:
    """The values of a mapping's known keys; faults for other keys (`unknown(name, value)`) and wrong values."""
    if not isinstance(node.value, dict):
        if not sy.null(node):
            faults.append(Fault(node.where, key, f"{sy.show(node)} is not a mapping of {', '.join(annotations)}"))
        return {}
    made = {}
    for name, child in node.value.items():
        path = f"{key}.{name}" if key else name
        if name not in annotations:
            faults.append(Fault(child.where, path, unknown(name, child)))
            continue
        try:
            made[name] = convert(child, annotations[name])
        except NotThis as error:
            faults.append(Fault(child.where, path, str(error)))
    return made


def missing(needed: Iterable[str], node: Node, key: str, faults: Faults) -> None:
    """A fault for each needed key that the mapping does not have (a wrong value was reported already)."""
    given = node.value if isinstance(node.value, dict) else {}
    faults.extend(
        Fault(node.where, f"{key}.{name}" if key else name, "required") for name in needed if name not in given
    )
