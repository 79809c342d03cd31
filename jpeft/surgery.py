"""Find and replace modules and variables of an NNX tree without touching the tree that was passed in.

`nnx.clone` gives new Variables over the same arrays, so a replacement costs no memory. A module that stands in two
places (tied layers) is replaced in both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

from flax import nnx

Path: TypeAlias = tuple[str | int, ...]


def children(node: Any) -> Iterator[tuple[str | int, Any]]:
    """Attributes or items of `node` with their names, in a fixed order; nothing for leaves."""
    if isinstance(node, nnx.List):
        yield from enumerate(node)
    elif isinstance(node, nnx.Pytree):
        yield from sorted((name, value) for name, value in vars(node).items() if not name.startswith("_pytree__"))
    elif isinstance(node, dict):
        yield from node.items()
    elif isinstance(node, list | tuple):
        yield from enumerate(node)


def child(node: Any, name: str | int) -> Any:
    """The attribute or item of `node` called `name`."""
    if isinstance(node, nnx.List | dict | list | tuple):
        return node[name]
    return vars(node)[str(name)]


def get(model: nnx.Module, path: Path) -> Any:
    """What stands at `path`."""
    node: Any = model
    for name in path:
        node = child(node, name)
    return node


def _assign(parent: Any, name: str | int, value: Any) -> None:
    if isinstance(parent, nnx.List | dict | list):
        parent[name] = value
    elif isinstance(parent, nnx.Pytree):
        # nnx.data also turns an attribute that was static (a plain attention function) into one that holds a module.
        setattr(parent, str(name), nnx.data(value) if isinstance(value, nnx.Pytree) else value)
    else:
        raise TypeError(f"cannot replace item {name!r} of a {type(parent).__name__}")


def _slots(node: Any, path: Path = (), above: frozenset[int] = frozenset()) -> Iterator[tuple[Path, Any, Any]]:
    """Every (path, parent, value) below `node`, depth first; a shared module is entered from each of its places."""
    if id(node) in above:
        return
    above |= {id(node)}
    for name, value in list(children(node)):
        here = (*path, name)
        yield here, node, value
        if not isinstance(value, nnx.Variable):
            yield from _slots(value, here, above)


def modules(model: nnx.Module) -> Iterator[tuple[Path, nnx.Module]]:
    """Every module once, with the first path that leads to it, parents before their children."""
    seen = {id(model)}
    yield (), model
    for path, _, value in _slots(model):
        if isinstance(value, nnx.Module) and id(value) not in seen:
            seen.add(id(value))
            yield path, value


def replace(model: nnx.Module, replacements: Mapping[Path, Callable[[Any], Any]]) -> nnx.Module:
    """A copy of `model` in which what stands at each path is what its function makes of it.

    The copy shares every array with `model`. Paths must not lie inside one another. The function receives the copy's
    own object, so it may hold on to it; `()` replaces the whole model.
    """
    copy = nnx.clone(model)
    if () in replacements:
        return replacements[()](copy)
    made: dict[int, tuple[Any, Any]] = {}  # by identity; the old object is kept so that its id stays its own
    for path, function in replacements.items():
        old = get(copy, path)
        if isinstance(old, nnx.Pytree):
            made[id(old)] = (old, function(old))
        else:
            _assign(get(copy, path[:-1]), path[-1], function(old))
    if made:
        _swap(copy, made)
    return copy


def _swap(model: nnx.Module, made: Mapping[int, tuple[Any, Any]]) -> None:
    # What was made is never entered, so a wrapper keeps the old module as its base.
    pending, seen = [model], {id(model)}
    while pending:
        node = pending.pop()
        for name, value in list(children(node)):
            if id(value) in made:
                _assign(node, name, made[id(value)][1])
            elif not isinstance(value, nnx.Variable) and id(value) not in seen:
                seen.add(id(value))
                pending.append(value)


def map_variables(model: nnx.Module, function: Callable[[nnx.Variable], nnx.Variable]) -> nnx.Module:
    """A copy of `model` whose Variables are `function` of the old ones; a shared Variable stays shared."""
    copy = nnx.clone(model)
    made: dict[int, tuple[nnx.Variable, nnx.Variable]] = {}
    for path, parent, value in list(_slots(copy)):
        if isinstance(value, nnx.Variable):
            if id(value) not in made:
                made[id(value)] = (value, function(value))
            if made[id(value)][1] is not value:
                _assign(parent, path[-1], made[id(value)][1])
    return copy
