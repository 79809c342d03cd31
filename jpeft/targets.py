"""Which modules a method adapts, and in which layers: one matcher for targets, exclusions and patterns.

Names are matched on whole segments against the expanded per-layer names (`layers.3.self_attn.q_proj`), so `v_proj` does
not match `kv_proj`, and `layers.1` is not `layers.10`. An entry is

- a name: the last segments of a module's name (`q_proj`, `self_attn.q_proj`, `layers.3.self_attn.q_proj`, or the
  canonical `layers/self_attn/q_proj` for all layers).
- a regular expression, recognised by any of ``^$*+?()[]{}|\\``: it must match from the start of a segment to the
  end of the name (`(q|v)_proj`, `layers\\.[0-3]\\..*`, `^lm_head$`).
- a module type (`nnx.Conv`): every module of it.
- `"all-linear"`: every linear layer except the output head that a model declares in `heads`.
- a predicate `(name, module) -> bool` on the expanded name and the module without its wrappers.

In `exclude` and in patterns, names and expressions may also mean a module around it (`layers.1`, `layers\\.[01]`).
Dots and slashes are the same. The names of Hugging Face PEFT files, which carry the family's prefix
(`model.layers.3...`), match as well.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from flax import nnx

from jpeft import expressions, paths
from jpeft.errors import JpeftError, nearest
from jpeft.kinds import kind_of
from jpeft.paths import Node
from jpeft.wrapper import innermost

Entry: TypeAlias = str | Callable[[str, Any], bool]
Layers: TypeAlias = tuple[int, ...] | None

ALL_LINEAR = "all-linear"
_LINEAR = (nnx.Linear, nnx.LinearGeneral, nnx.Einsum)
_REGEX = re.compile(r"[\^$*+?()\[\]{}|\\]")


def entries(given: Entry | Iterable[Entry] | None) -> tuple[Entry, ...]:
    """One entry or several, as a tuple; refuses what is neither."""
    if given is None:
        return ()
    several: Iterable[Any] = (given,) if isinstance(given, str) or callable(given) else given
    try:
        made = (given,) if isinstance(given, Mapping) else tuple(several)
    except TypeError:
        made = (given,)
    for entry in made:
        if not (callable(entry) or (isinstance(entry, str) and entry.strip())):
            raise JpeftError(
                f"{entry!r} is no target: give a module name, a regular expression, a module type, or a predicate"
            )
        if isinstance(entry, str):
            _compile(entry)
    return made


def lasting(entry: Entry) -> bool:
    """Whether a file can hold `entry`: a name, or an expression that ends soon whatever it is matched with."""
    return isinstance(entry, str) and (not _REGEX.search(entry) or expressions.ends_soon(entry))


def _compile(entry: str) -> re.Pattern[str] | None:
    """The regular expression that `entry` is, anchored at segment boundaries, or None for a plain name."""
    if not _REGEX.search(entry):
        return None
    try:
        re.compile(entry)
        return re.compile(rf"(?:.*\.)?(?:{entry.replace('/', '[.]')})")
    except re.error as error:
        raise JpeftError(f"{entry!r} is no valid regular expression: {error}") from None


def matches(entry: str, names: Iterable[str], *, around: bool = False) -> bool:
    """Whether a name or regular expression fits any of `names`; with `around`, also a module around them."""
    pattern = _compile(entry)
    if pattern is not None:
        return any(pattern.fullmatch(part) for name in names for part in (_above(name) if around else (name,)))
    wanted = entry.replace("/", ".").split(".")
    for name in names:
        segments = name.split(".")
        starts = range(len(segments) - len(wanted) + 1) if around else (len(segments) - len(wanted),)
        if any(start >= 0 and segments[start : start + len(wanted)] == wanted for start in starts):
            return True
    return False


def _above(name: str) -> list[str]:
    """`a.b.c` and the names of what is around it: `a`, `a.b`, `a.b.c`."""
    segments = name.split(".")
    return [".".join(segments[:end]) for end in range(1, len(segments) + 1)]


def names(node: Node, member: int | None, prefix: str) -> tuple[str, ...]:
    """All names under which one layer of a node can be addressed."""
    plain = dict.fromkeys((node.expanded(member), ".".join(node.parts)))
    return (*plain, *(f"{prefix}.{name}" for name in plain)) if prefix else tuple(plain)


def listing(model: nnx.Module) -> list[str]:
    """The canonical paths of every module that some method can adapt, in the order of the model."""
    return [node.name for node in paths.nodes(model) if kind_of(node.module) is not None]


def coverage(model: nnx.Module, entry: str) -> dict[str, tuple[int, int]]:
    """{canonical path: (how many of its layers `entry` matches, how many it has)}; 1 of 1 outside a `Stack`.

    Of modules that some method can adapt; if it matches none of them itself, of those around which it stands.
    """
    prefix, heads = prefix_of(model), _heads_of(model)
    able = [node for node in paths.nodes(model) if node.parts and kind_of(innermost(node.module)) is not None]
    for fits in (_selects, _excludes):
        counts = {
            node.name: (sum(fits(entry, node, names(node, m, prefix), heads) for m in node.members), len(node.members))
            for node in able
        }
        if any(count for count, _ in counts.values()):
            break
    return {name: count for name, count in counts.items() if count[0]}


def resolve(
    model: nnx.Module,
    *,
    targets: Sequence[Entry],
    exclude: Sequence[Entry] = (),
    layers: Layers = None,
    kinds: Sequence[type[nnx.Module]],
    method: str,
    accepts: Callable[[Any], bool] | None = None,
) -> list[tuple[Node, Layers]]:
    """The nodes that `targets` select and the layers of each (None: all, or not in a `Stack`).

    kinds: what the method can wrap. accepts: instead of kinds, whether it can wrap a module (without its wrappers);
    targets may then also name a module around it.

    Raises JpeftError if an entry of `targets` or `exclude` matches nothing, if it names a module of another kind, or if
    `layers` holds a number that no matched module has.
    """
    found = [node for node in paths.nodes(model) if node.parts or kind_of(node.module) is not None]
    prefix, heads = prefix_of(model), _heads_of(model)
    hits: dict[Entry, int] = dict.fromkeys((*targets, *exclude), 0)
    wrong: dict[Entry, list[Node]] = {}
    chosen: list[tuple[Node, Layers]] = []
    present: set[int] = set()

    for node in found:
        able = (
            isinstance(node.module, tuple(kinds)) or kind_of(node.module) in kinds
            if accepts is None
            else accepts(innermost(node.module))
        )
        kept: list[int | None] = []
        for member in node.members:
            called = names(node, member, prefix)
            hit = [e for e in targets if (_selects if accepts is None else _excludes)(e, node, called, heads)]
            out = [e for e in exclude if _excludes(e, node, called, heads)]
            for entry in (*(hit if able else ()), *out):
                hits[entry] += 1
            if not able:
                for entry in hit if accepts is None else ():
                    if entry != ALL_LINEAR and isinstance(entry, str):
                        wrong.setdefault(entry, []).append(node)
                continue
            number = node.layer(member)
            if hit and number is not None:
                present.add(number)
            if hit and not out and (layers is None or number in layers):
                kept.append(member)
        if kept:
            whole = node.stack is None or len(kept) == node.length
            chosen.append((node, None if whole else tuple(m for m in kept if m is not None)))

    _check(hits, wrong, found, targets, exclude, kinds, method, accepts)
    if layers is not None:
        _check_layers(layers, present, method)
    if not chosen:
        raise JpeftError(f"{method}: exclude={list(exclude)!r} leaves none of what targets={list(targets)!r} matches")
    return chosen


def prefix_of(model: nnx.Module) -> str:
    """The family's prefix in Hugging Face names (`model`, `bert`), which jpeft's models declare as `base_prefix`."""
    declared = getattr(model, "base_prefix", "")
    return declared if isinstance(declared, str) else ""


def role(model: nnx.Module, name: str, method: str) -> tuple[Entry, ...]:
    """What a model declares as playing a role, as targets; jpeft's models do (`jpeft.models.model` lists the roles).

    Raises JpeftError if the model declares none: a user's own model is told which modules are meant by `targets=`.
    """
    declared = getattr(model, "roles", None)
    found = declared.get(name) if isinstance(declared, Mapping) else None
    if not found:
        near = ", ".join(listing(model)[:8])
        raise JpeftError(
            f"{method}: {type(model).__name__} does not declare its {name!r} modules; give targets= "
            f"(it has {near}, ...)"
        )
    return tuple(found)


def _heads_of(model: nnx.Module) -> tuple[str, ...]:
    # A user's model may have an attribute `heads` of its own: only a tuple of names declares output heads.
    declared = getattr(model, "heads", ()) if prefix_of(model) or hasattr(model, "task") else ()
    named = isinstance(declared, tuple) and all(isinstance(name, str) for name in declared)
    return declared if named else ()


def _selects(entry: Entry, node: Node, called: tuple[str, ...], heads: tuple[str, ...]) -> bool:
    if isinstance(entry, type):
        return isinstance(innermost(node.module), entry) or kind_of(node.module) is entry
    if not isinstance(entry, str):
        return bool(entry(called[0], innermost(node.module)))
    if entry == ALL_LINEAR:
        kind = kind_of(node.module)
        return kind is not None and issubclass(kind, _LINEAR) and not _in_head(node, heads)
    return matches(entry, called)


def _excludes(entry: Entry, node: Node, called: tuple[str, ...], heads: tuple[str, ...]) -> bool:
    if isinstance(entry, str) and entry != ALL_LINEAR:
        return matches(entry, called, around=True)
    return _selects(entry, node, called, heads)


def _in_head(node: Node, heads: tuple[str, ...]) -> bool:
    return any(node.name == head or node.name.startswith(f"{head}/") for head in heads)


def _check(
    hits: dict[Entry, int],
    wrong: dict[Entry, list[Node]],
    found: list[Node],
    targets: Sequence[Entry],
    exclude: Sequence[Entry],
    kinds: Sequence[type[nnx.Module]],
    method: str,
    accepts: Callable[[Any], bool] | None,
) -> None:
    fit = accepts or (lambda module: kind_of(module) in kinds)
    able = sorted({node.name or "(the model itself)" for node in found if fit(innermost(node.module))})
    problems = []
    for entry, count in hits.items():
        role = "target" if entry in targets else "exclude"
        if count:
            continue
        if entry in wrong:
            node = wrong[entry][0]
            problems.append(
                f"{role} {entry!r} names {node.name!r}, a {type(node.module).__name__}; "
                f"{method} can wrap {', '.join(kind.__name__ for kind in kinds)}"
            )
        elif not isinstance(entry, str):
            problems.append(f"{role} predicate {getattr(entry, '__name__', entry)!r} accepts no module")
        else:
            near = nearest(entry, able) if role == "target" else nearest(entry, [n.name for n in found])
            problems.append(f"{role} {entry!r} matches nothing; nearest names: {', '.join(near) or 'none'}")
    if not targets:
        problems.append(f"targets is empty; give names such as {', '.join(able[:3])}, or 'all-linear'")
    if problems:
        raise JpeftError(f"{method}: " + "; ".join(problems))


def _check_layers(layers: tuple[int, ...], present: set[int], method: str) -> None:
    missing = [number for number in layers if number not in present]
    if missing:
        has = f"0 to {max(present)}" if present else "none (no target lies in a numbered layer)"
        raise JpeftError(f"{method}: layers={missing!r} not among the layers of the targets, which are {has}")


class Pattern:
    """Values by module: `{entry: value}`, where an entry is a name or a regular expression as in targets.

    If several entries match one module, the one given first decides. Entries that match nothing are an error.
    """

    def __init__(self, table: dict[str, Any] | Any, *, field: str, method: str):
        if not isinstance(table, Mapping) or not all(isinstance(entry, str) for entry in table):
            raise JpeftError(f"{method}: {field}={table!r} is no mapping of names or regular expressions to values")
        self._table = dict(table)
        self._unused = set(self._table)
        self._field, self._method = field, method
        self._seen: list[str] = []

    def __call__(self, node: Node, member: int | None, prefix: str, default: Any) -> Any:
        called = names(node, member, prefix)
        self._seen.append(called[0])
        fitting = [entry for entry in self._table if matches(entry, called, around=True)]
        self._unused.difference_update(fitting)
        return self._table[fitting[0]] if fitting else default

    def check(self) -> None:
        """Raises JpeftError naming each entry that matched none of the modules asked about."""
        if self._unused:
            said = "; ".join(f"{e!r} (nearest: {', '.join(nearest(e, self._seen, 3))})" for e in sorted(self._unused))
            raise JpeftError(f"{self._method}: {self._field} entries that match no adapted module: {said}")
