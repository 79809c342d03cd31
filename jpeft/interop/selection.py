"""PEFT's rules on which modules a configuration means, and the shortest way to name a set of modules.

The rules are those of PEFT 0.21.2 (`tuners_utils.check_target_module_exists`): a name means modules whose name ends
with it, a single string is a regular expression for the whole name, `"all-linear"` is every linear layer but the output
head, and `layers_to_transform` looks at the first number in a name.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Iterable, Sequence

from flax import nnx

from jpeft import expressions
from jpeft.errors import JpeftError, nearest
from jpeft.interop.config import Settings
from jpeft.interop.names import Place, places
from jpeft.models.model import Model

ALL_LINEAR = "all-linear"
CLASSIFIERS = ("classifier", "score")  # PEFT saves these whole for classification tasks
_OUTPUTS = ("lm_head", "lm_head.decoder", "cls.predictions.decoder")
_INDEX = r".*?\.[^.]*\.(?P<index>\d+)\."


def ends_with(name: str, entry: str) -> bool:
    """Whether an entry of a list means the module `name`."""
    return name == entry or name.endswith(f".{entry}")


def modules_to_save(settings: Settings) -> tuple[str, ...]:
    """Names of modules that are trained as a whole; PEFT adds those of classifiers by itself."""
    given = settings.texts("modules_to_save") or ()
    heads = CLASSIFIERS if settings.task_type in ("SEQ_CLS", "TOKEN_CLS") else ()
    return tuple(dict.fromkeys((*given, *heads)))


@dataclasses.dataclass(frozen=True)
class _Layers:
    """`layers_to_transform` and `layers_pattern`."""

    numbers: tuple[int, ...]
    patterns: tuple[re.Pattern[str], ...]

    def __contains__(self, name: str) -> bool:
        found = next((match for pattern in self.patterns if (match := pattern.match(name))), None)
        return found is not None and int(found["index"]) in self.numbers


def selected(
    settings: Settings, everything: Sequence[Place], accepts: Callable[[Place], bool], said: str
) -> list[Place]:
    """The places that `target_modules`, `exclude_modules` and `layers_to_transform` select.

    Raises JpeftError for entries that match nothing or a module that the method does not accept (`said` names those it
    does), and for layers that no target lies in.
    """
    targets = settings.names("target_modules")
    if not targets:
        raise settings.refuse("target_modules", "names of modules, a regular expression or 'all-linear'")
    left_out = _left_out(settings)
    chosen = [place for place in everything if not left_out(place.name)]
    names = [place.name for place in chosen]
    linear = isinstance(targets, str) and targets.lower() == ALL_LINEAR
    if linear:
        chosen = [place for place in chosen if place.kind is nnx.Linear and not _is_output(settings, place.name)]
    elif isinstance(targets, str):
        pattern = expressions.compiled(targets, f"{settings.where}: target_modules")
        chosen = [place for place in chosen if pattern.fullmatch(place.name)]
    else:
        _check_entries(settings, targets, [place.name for place in everything])
        chosen = [place for place in chosen if any(ends_with(place.name, entry) for entry in targets)]
    layers = None if isinstance(targets, str) else _layers(settings)
    if layers is not None:
        before = [place.name for place in chosen]
        chosen = [place for place in chosen if place.name in layers]
        unused = [
            n for n in layers.numbers if not any(name in dataclasses.replace(layers, numbers=(n,)) for name in before)
        ]
        if unused:
            raise JpeftError(f"{settings.where}: layers_to_transform: no target lies in the layers {unused}")
    if not chosen:
        near = nearest(str(targets), names, 3)
        raise JpeftError(f"{settings.where}: target_modules {targets!r} selects no module; the nearest are {near}")
    wrong = [place for place in chosen if not accepts(place)]
    if wrong:
        raise JpeftError(
            f"{settings.where}: target_modules selects {wrong[0].name!r}, a {type(wrong[0].node.module).__name__}; "
            f"{settings.peft_type} is for {said} here"
        )
    return chosen


def _left_out(settings: Settings) -> Callable[[str], bool]:
    exclude = settings.names("exclude_modules") or ()
    where = settings.where
    regex = expressions.compiled(exclude, f"{where}: exclude_modules") if isinstance(exclude, str) else None
    saved = [
        expressions.compiled(rf"(^|.*\.){entry}($|\..*)", f"{where}: modules_to_save")
        for entry in modules_to_save(settings)
    ]

    def left_out(name: str) -> bool:
        out = regex.fullmatch(name) if regex else any(ends_with(name, entry) for entry in exclude)
        return bool(out) or any(pattern.match(name) for pattern in saved)

    return left_out


def _is_output(settings: Settings, name: str) -> bool:
    return name in _OUTPUTS or (settings.task_type == "SEQ_CLS" and name in CLASSIFIERS)


def _layers(settings: Settings) -> _Layers | None:
    numbers = settings.numbers("layers_to_transform")
    if not numbers:
        return None
    given = settings.names("layers_pattern") or ()
    entries = (given,) if isinstance(given, str) else given
    made = [rf"(?:^|.*?\.){entry}\.(?P<index>\d+)\." for entry in entries if entry] or [_INDEX]
    where = f"{settings.where}: layers_pattern"
    return _Layers(numbers, tuple(expressions.compiled(entry, where) for entry in made))


def _check_entries(settings: Settings, entries: Iterable[str], names: Sequence[str]) -> None:
    unused = [entry for entry in entries if not any(ends_with(name, entry) for name in names)]
    if unused:
        said = "; ".join(f"{entry!r} (nearest: {', '.join(nearest(entry, names, 3))})" for entry in unused)
        raise JpeftError(f"{settings.where}: target_modules names modules that this model does not have: {said}")


class Pattern:
    """`rank_pattern` or `alpha_pattern`: {name or regular expression: value}, the first that fits a name's end decides.

    Raises JpeftError on `check` for entries that fit none of the names asked about.
    """

    def __init__(self, settings: Settings, field: str):
        table = settings.object(field) or {}
        self._where = f"{settings.where}: {field}"
        self._table = [
            (expressions.compiled(rf"(.*\.)?({entry})$", self._where), entry, value) for entry, value in table.items()
        ]
        self._unused = set(table)
        self._seen: list[str] = []

    def __call__(self, name: str, default: object) -> object:
        self._seen.append(name)
        fitting = [(entry, value) for pattern, entry, value in self._table if pattern.match(name)]
        self._unused.difference_update(entry for entry, _ in fitting)
        return fitting[0][1] if fitting else default

    def check(self) -> None:
        """See the class."""
        if self._unused:
            said = "; ".join(f"{e!r} (nearest: {', '.join(nearest(e, self._seen, 3))})" for e in sorted(self._unused))
            raise JpeftError(f"{self._where}: entries that fit no adapted module: {said}")


def shortest(wanted: Collection[str], everything: Collection[str]) -> list[str]:
    """Names that mean exactly the modules `wanted` among `everything`: last segments where that is enough."""
    last: dict[str, set[str]] = {}
    for name in everything:
        last.setdefault(name.rpartition(".")[2], set()).add(name)
    made = []
    for name in wanted:
        tail = name.rpartition(".")[2]
        short = last.get(tail, set()) <= set(wanted) and not tail.isdecimal()
        made.append(tail if short else name)
    return sorted(set(made))


def target_names(model: Model, names: Collection[str]) -> list[str]:
    """`target_modules` for exactly the modules `names` of transformers' model."""
    heads = CLASSIFIERS if model.task in ("sequence-classification", "token-classification") else ()
    inside = [name for name in names if name.split(".", maxsplit=1)[0] in heads]
    if inside:
        raise JpeftError(
            f"save_peft: {inside[0]!r} is adapted, but PEFT trains and saves a classifier as a whole; leave it out of "
            "the targets, or train it with jpeft.FullTuning"
        )
    # transformers' model may have modules that this one lacks: a pooler that it does not use, a decoder.
    if model.task == "base" or model.pooling is not None:
        return sorted(names)
    return shortest(names, [p.name for p in places(model) if p.name.split(".", maxsplit=1)[0] not in heads])


def targets_for(chosen: Sequence[Place], everything: Sequence[Place]) -> tuple[str, ...]:
    """Targets, as our methods take them, for exactly the places `chosen`."""
    wanted = {place.ours for place in chosen}
    last: dict[str, set[str]] = {}
    for place in everything:
        last.setdefault(place.node.parts[-1], set()).add(place.ours)
    whole = [tail for tail, names in last.items() if names <= wanted and not tail.isdecimal()]
    rest: dict[str, list[Place]] = {}
    for place in chosen:
        if place.node.parts[-1] not in whole:
            rest.setdefault(place.node.name, []).append(place)
    return (*sorted(whole), *(_exactly(group) for group in rest.values()))


def _exactly(group: Sequence[Place]) -> str:
    """One regular expression for some layers of one node."""
    first = group[0]
    if first.member is None or first.node.stack is None:
        return f"^{re.escape(first.ours)}$"
    at = first.node.stack[0]
    parts = [re.escape(part) for part in first.node.parts]
    numbers = "|".join(str(place.member) for place in group)
    return "^" + "[.]".join([*parts[:at], f"({numbers})", *parts[at:]]) + "$"
