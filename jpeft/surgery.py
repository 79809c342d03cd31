"""Find and replace modules and variables of an NNX tree without touching the tree that was passed in.

`nnx.clone` gives new Variables over the same arrays, so a replacement costs no memory. A module that stands in two
places (tied layers) is replaced in both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

from flax import nnx

from jpeft.errors import JpeftError

Path: TypeAlias = tuple[Any, ...]  # attribute names and indices


def children(node: Any) -> Iterator[tuple[Any, Any]]:
    """Attributes or items of `node` with their names, in a fixed order; nothing for leaves."""
    if isinstance(node, nnx.List):
        yield from enumerate(node)
    elif isinstance(node, nnx.Pytree):
        yield from sorted((name, value) for name, value in vars(node).items() if not name.startswith("_pytree__"))
    elif isinstance(node, dict):
        yield from node.items()
    elif isinstance(node, list | tuple):
        yield from enumerate(node)


def child(node: Any, name: Any) -> Any:
    """The attribute or item of `node` called `name`."""
    if isinstance(node, nnx.List | dict | list | tuple):
        items: Any = node
        return items[name]
    return vars(node)[str(name)]


def get(model: nnx.Module, path: Path) -> Any:
    """What stands at `path`."""
    node: Any = model
    for name in path:
        node = child(node, name)
    return node


def _assign(parent: Any, name: Any, value: Any) -> None:
    if isinstance(parent, nnx.List | dict | list):
        items: Any = parent
        items[name] = value
    elif isinstance(parent, nnx.Pytree):
        # A plain attention function is static. nnx.data makes the attribute hold a module, nnx.static undoes that.
        if isinstance(value, nnx.Pytree):
            value = nnx.data(value)
        elif callable(value) and not nnx.is_data(value):
            value = nnx.static(value)
        setattr(parent, str(name), value)
    else:
        raise JpeftError(
            f"item {name!r} of a {type(parent).__name__} in the model cannot be replaced; keep modules and variables "
            "in attributes, nnx.List or nnx.Dict"
        )


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
    """A copy of `model` in which what stands at each path is what its function makes of it; `()` is the model itself.

    The copy shares every array with `model`. The function receives the copy's own object, so it may hold on to it.
    """
    copy = nnx.clone(model)
    functions: dict[int, Callable[[Any], Any]] = {}
    for path, function in replacements.items():
        old = get(copy, path)
        if isinstance(old, nnx.Pytree):
            functions[id(old)] = function
        else:  # a static attribute, such as a plain attention function
            _assign(get(copy, path[:-1]), path[-1], function(old))
    return rewrite(copy, lambda node: functions[id(node)](node) if id(node) in functions else node, copy=False)


def rewrite(model: nnx.Module, function: Callable[[Any], Any], *, copy: bool = True) -> Any:
    """A copy of `model` (or, with `copy=False`, the model itself) with each module replaced by `function(module)`.

    Inner modules come first, so `function` sees a module whose children were rewritten. What it makes is not entered
    again. A module that stands in several places is rewritten once and stays shared.
    """
    done: dict[int, tuple[Any, Any]] = {}  # by identity; the old object is kept so that its id stays its own

    def visit(node: Any) -> Any:
        if isinstance(node, nnx.Variable) or not isinstance(node, nnx.Pytree | dict | list | tuple):
            return node
        if id(node) not in done:
            done[id(node)] = (node, node)  # a cycle leads back to the node as it was
            for name, value in list(children(node)):
                made = visit(value)
                if made is not value:
                    _assign(node, name, made)
            done[id(node)] = (node, function(node) if isinstance(node, nnx.Module) else node)
        return done[id(node)][1]

    return visit(nnx.clone(model) if copy else model)


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
