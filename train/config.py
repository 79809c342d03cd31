"""A configuration file and its overrides, checked completely before anything is loaded.

All faults come in one message with file, line, key and nearest valid name. The keys are in `train.schema`; those of
`method` are the fields of the dataclass registered under its name.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import pydantic
import yaml

from jpeft.errors import JpeftError, nearest
from train import consistency, schema, starts
from train import strict_yaml as sy
from train.convert import convert_keys, missing
from train.other_names import OTHERS
from train.schema import Config
from train.strict_yaml import Fault, Faults, Node, NotThis

# Keys that a method's dataclass leaves open because Python code may give more than a file can.
_OPEN = {"targets": str | list[str], "exclude": str | list[str] | None, "layers": tuple[int, ...] | None}


Made = TypeVar("Made")
Kind = TypeVar("Kind", bound=schema.Section)


def load(path: Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration in `path` with `section.key=value` overrides.

    Raises JpeftError with every fault found.
    """
    return read(path, overrides, build, _required())


def read(
    path: Path, overrides: Sequence[str], build: Callable[[Node, Faults], Made | None], required: Sequence[str]
) -> Made:
    """What `build` makes of the file's tree with its overrides; required: keys that an empty file is told of.

    Raises JpeftError with every fault found.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        beside = [str(other) for other in (*path.parent.glob("*.y*ml"), *Path("configs").glob("*.y*ml"))]
        near = f"; did you mean {nearest(str(path), beside, 1)[0]}?" if beside else ""
        raise JpeftError(f"{path}: no such file{near}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise JpeftError(f"{path}: cannot be read as UTF-8 text: {error}") from None
    faults: Faults = []
    root = sy.read(text, faults)
    if root is None and not faults:
        faults.append(Fault("line 1", "", f"the file is empty; needed are {', '.join(required)}"))
    if root is not None:
        root = _overridden(root, overrides, faults)
        made = build(root, faults)
        if made is not None and not faults:
            return made
    count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
    listed = "\n".join(f"  {fault}" for fault in sorted(faults, key=lambda fault: fault.order))
    raise JpeftError(f"{path}: {count} in the configuration\n{listed}")


def save(config: Config, path: Path) -> None:
    """Writes every key, defaults included; `load` reads it back to the same configuration."""
    path.write_text(dumps(config), encoding="utf-8")


def dumps(config: Config) -> str:
    """The configuration as the YAML that `load` reads."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def difference(old: Config, new: Config) -> list[str]:
    """`key: old -> new` for every value that differs, but for those that change no result."""
    unessential = {"output", "checkpoints", "mesh"}
    before, after = (_flat(config.model_dump(mode="json", exclude=unessential)) for config in (old, new))
    keys = dict.fromkeys((*before, *after))
    return [
        f"{key}: {json.dumps(before.get(key))} -> {json.dumps(after.get(key))}"
        for key in keys
        if before.get(key) != after.get(key)
    ]


def methods_of(config: Config, encode: starts.Encode) -> list[Any]:
    """The methods that the configuration names, in order. encode: from words of `init_text` to token ids."""
    from jpeft.methods import METHODS

    entries = config.method if isinstance(config.method, list) else [config.method]
    return [METHODS[entry["name"]](**starts.settings(entry, encode)) for entry in entries]


class _Dumper(yaml.SafeDumper):
    """Writes text that looks like something else in quotes, so that strict reading gives text again."""


def _represent_text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    plain = Node(value, "")
    looks = sy.null(plain)
    for reader in (sy.boolean, sy.number):
        try:
            reader(plain)
            looks = True
        except sy.NotThis:
            pass
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="'" if looks else None)


_Dumper.add_representer(str, _represent_text)


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping):
        return {k: v for name, item in value.items() for k, v in _flat(item, f"{key}.{name}" if key else name).items()}
    return {key: value}


def _required() -> list[str]:
    return [name for name, field in Config.model_fields.items() if field.is_required()]


def _overridden(root: Node, overrides: Sequence[str], faults: Faults) -> Node:
    """`root` with each `key.path=value` put in; one that would undo one before it is a fault."""
    given: dict[tuple[str, ...], str] = {}
    for override in overrides:
        where = f"command line, {override}"
        key, equals, text = override.partition("=")
        # `method[0].rank`, as faults name it, is `method.0.rank`.
        names = tuple(_INDEX.sub(r".\1", key.strip()).split("."))
        if not equals or not all(names):
            said = "an override is written section.key=value, such as training.learning_rate=1e-3"
            faults.append(Fault(where, "", said))
            continue
        undone = [other for names_of, other in given.items() if names_of[: len(names)] == names]
        if undone:
            faults.append(Fault(where, "", f"takes the place of {undone[0]}, given before it; leave one of them out"))
            continue
        given[names] = override
        value = _value(text, where, faults)
        try:
            root = _put(root, names, (), value)
        except NotThis as error:
            faults.append(Fault(where, "", str(error)))
    return root


_INDEX = re.compile(r"\[(\d+)\]")


def _value(text: str, where: str, faults: Faults) -> Node:
    """What stands behind the equals sign: lists, mappings and quoted text as in a file, anything else word for word.

    So `#`, `: ` and `*` need no quotes there, as they do in a file.
    """
    text = text.strip()
    if not text.startswith(("[", "{", '"', "'")):
        return Node(text, where)
    return sy.read(text, faults, where) or Node("", where)


def _put(node: Node, names: Sequence[str], above: Sequence[str], value: Node) -> Node:
    """`node`, which stands at the key `above`, with `value` at `names` in it. Raises NotThis where that is no place."""
    if not names:
        return value
    name, *rest = names
    here, full = ".".join(above), (*above, name)
    if isinstance(node.value, list) and node.value:
        entries, last = list(node.value), len(node.value) - 1
        if not name.isdigit() or int(name) > last:
            keys = names[name.isdigit() :] if isinstance(entries[0].value, dict) else ()
            raise NotThis(
                f"{here} is a list: write {'.'.join((here, '0', *keys))} with the number of the entry "
                f"({'0' if last == 0 else f'0 to {last}'}), or give the whole list, {here}=[...]"
            )
        entries[int(name)] = _put(entries[int(name)], rest, full, value)
        return Node(entries, node.where)
    if not isinstance(node.value, dict) and not sy.null(node):
        raise NotThis(f"{here} is {sy.show(node)}, which has no keys; give it as a whole, {here}=...")
    children = dict(node.value) if isinstance(node.value, dict) else {}
    children[name] = _put(children.get(name, Node({}, value.where)), rest, full, value)
    return Node(children, node.where)


def build(root: Node, faults: Faults) -> Config | None:
    """The configuration of a file's tree, with all that is wrong added to `faults`."""
    if not isinstance(root.value, dict):
        faults.append(Fault(root.where, "", f"{sy.show(root)} is not a mapping of {', '.join(Config.model_fields)}"))
        return None
    children = root.value
    faults += [
        Fault(child.where, name, unknown(name, child, "", list(Config.model_fields)))
        for name, child in children.items()
        if name not in Config.model_fields
    ]
    missing(_required(), root, "", faults)
    values: dict[str, Any] = {}
    for name, section in schema.sections().items():
        if name in children:
            values[name] = _section(section, children[name], name, faults)
    if "method" in children:
        values["method"] = build_method(children["method"], "method", faults)
    if faults:
        # Limits are checked all the same, so that one message has everything.
        for name, section in schema.sections().items():
            if name in values:
                _validate(section, values[name], children[name], name, faults)
        return None
    sections = {
        name: _validate(section, values[name], children[name], name, faults)
        for name, section in schema.sections().items()
        if name in values
    }
    if faults:
        return None
    config = Config(**{**values, **sections})
    faults += consistency.faults(config, children)
    return config


def build_section(section: type[Kind], node: Node, key: str, faults: Faults) -> Kind | None:
    """One section, which stands at `key` of the file ("" for the file as a whole)."""
    before = len(faults)
    made = _validate(section, _section(section, node, key, faults), node, key, faults)
    return made if len(faults) == before else None


def _section(section: type[schema.Section], node: Node, key: str, faults: Faults) -> dict[str, Any]:
    annotations = {name: field.annotation for name, field in section.model_fields.items()}
    made = convert_keys(
        node, annotations, key, faults, lambda name, child: unknown(name, child, key, list(annotations))
    )
    missing([name for name, field in section.model_fields.items() if field.is_required()], node, key, faults)
    return made


def _validate(section: type[schema.Section], values: dict[str, Any], node: Node, key: str, faults: Faults) -> Any:
    try:
        return section(**values)
    except pydantic.ValidationError as error:
        for entry in error.errors():
            name = str(entry["loc"][0])
            if entry["type"] != "missing":
                child = node.value.get(name, node) if isinstance(node.value, dict) else node
                message = entry["msg"].replace("Input should", "must")
                path = f"{key}.{name}" if key else name
                faults.append(Fault(child.where, path, f"{entry['input']!r} {message}"))
        return None


def build_method(node: Node, key: str, faults: Faults) -> Any:
    """The method (or list of methods) with its settings that stands at `key` of the file."""
    if isinstance(node.value, list):
        if not node.value:
            faults.append(Fault(node.where, key, "the list is empty; give at least one method"))
        return [_one_method(child, f"{key}[{index}]", faults) for index, child in enumerate(node.value)]
    return _one_method(node, key, faults)


def method_keys(kind: type) -> dict[str, Any]:
    """The keys that a method has in a file beside its own name, with their types."""
    hints, made = get_type_hints(kind), {}
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        hint = _OPEN[field.name] if hint is Any and field.name in _OPEN else hint
        made["adapter_name" if field.name == "name" else field.name] = hint
    return made | {key: hint for key, (hint, *_) in starts.more_keys(kind).items()}


def _one_method(node: Node, key: str, faults: Faults) -> dict[str, Any]:
    from jpeft.methods import METHODS

    listed = ", ".join(METHODS)
    if not isinstance(node.value, dict) or "name" not in node.value:
        faults.append(Fault(node.where, f"{key}.name", f"required: the method, one of {listed}"))
        return {}
    name = node.value["name"]
    if name.value not in METHODS:
        near = f"; did you mean {nearest(str(name.value), METHODS, 1)[0]}?"
        faults.append(Fault(name.where, f"{key}.name", f"no method {sy.show(name)}; there are {listed}{near}"))
        return {}
    kind = METHODS[str(name.value)]
    annotations = {"name": str, **method_keys(kind)}
    before = len(faults)
    made = convert_keys(
        node, annotations, key, faults, lambda name, child: unknown(name, child, key, list(annotations))
    )
    if len(faults) == before:
        try:
            kind(**starts.settings(made, lambda text: [0] * bool(text.strip())))
        except (JpeftError, TypeError) as error:
            at = next((child for k, child in node.value.items() if f"{k}=" in str(error)), node)
            faults.append(Fault(at.where, key, str(error)))
    return made


def unknown(name: str, node: Node, key: str, options: list[str]) -> str:
    """What to say of an unknown key: the name meant, here or in another section, and its value if that changes too."""
    from jpeft.methods import METHODS

    plain = name.replace("-", "_").lower()
    within = f"{key}." if key else ""
    if plain in options:
        return f"unknown key; did you mean {within}{plain}?"
    others = [f"{section}.{plain}" for section, model in schema.sections().items() if plain in model.model_fields]
    ours = OTHERS.get(plain)
    if ours is not None and not others:
        section, _, field = ours.key.partition(".")
        hint = f" ({ours.hint})" if ours.hint else ""
        if not section:
            return f"unknown key; {ours.hint}"
        if section != "method" or not key.startswith("method"):
            here = "" if section == key else " here" if key else ""
            return f"unknown key{here}; did you mean {ours.entry(_scalar(node))}?{hint}"
        if field in options:
            meant = ours.entry(_scalar(node)).replace("method", key, 1)
            return f"unknown key; did you mean {meant}?{hint}"
    others += [f"method.{plain}"] * any(plain in method_keys(kind) for kind in METHODS.values())
    if others and not key.startswith("method"):
        return f"unknown key{' here' * bool(key)}; did you mean {' or '.join(others)}?"
    if others and others != [f"method.{plain}"]:
        return f"unknown key here; did you mean {' or '.join(other for other in others if other[:7] != 'method.')}?"
    return f"unknown key; did you mean {within}{nearest(plain, options, 1)[0]}? (known: {', '.join(options)})"


def _scalar(node: Node) -> str | None:
    return node.value if isinstance(node.value, str) else None
