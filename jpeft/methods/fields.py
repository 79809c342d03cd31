"""Checks of a method's fields, shared by all methods: what a user wrote, in one form, or one clear error."""

from __future__ import annotations

import numbers
from typing import Any

from jpeft.errors import JpeftError

_LARGEST = 3.4028234e38  # a float32, in which methods compute

DTYPES = ("float32", "bfloat16", "float16")


def settle(method: Any, **values: Any) -> None:
    """Sets fields of a frozen dataclass from its `__post_init__`."""
    for field, value in values.items():
        object.__setattr__(method, field, value)


def whole(value: Any) -> Any:
    """NumPy's whole numbers as Python's; anything else as it is."""
    return int(value) if isinstance(value, numbers.Integral) and not isinstance(value, bool) else value


def real(value: Any) -> Any:
    """NumPy's numbers as Python's; anything else as it is."""
    plain = isinstance(value, bool | int | float) or not isinstance(value, numbers.Real)
    return value if plain else float(value)


def is_number(value: Any) -> bool:
    """Whether `value` is a Python number, which a truth value is not meant to be."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_whole(method: Any, field: str, value: Any, *, least: int, most: int = 2**20) -> None:
    """Raises JpeftError unless `value` is a whole number from `least` to `most`.

    The default is more than any size of an adapter; without a bound a file of a few bytes could fill the memory.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise JpeftError(f"{_name(method)}: {field}={value!r} is not a whole number of at least {least}")
    if value > most:
        raise JpeftError(f"{_name(method)}: {field} is {shown(value)}, more than the {most:,} that there can be")


def check_finite(method: Any, field: str, value: Any) -> None:
    """Raises JpeftError unless `value` is a finite number."""
    if not (is_number(value) and abs(value) <= _LARGEST):
        raise JpeftError(f"{_name(method)}: {field}={shown(value)} is not a finite number (of float32)")


def check_rate(method: Any, field: str, value: Any) -> None:
    """Raises JpeftError unless `value` is a probability below 1."""
    if not (is_number(value) and 0 <= value < 1):
        raise JpeftError(f"{_name(method)}: {field}={value!r} is not in [0, 1)")


def check_choice(method: Any, field: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raises JpeftError unless `value` is one of `choices`."""
    if value not in choices:
        raise JpeftError(f"{_name(method)}: {field}={value!r}; choose {_either(choices)}")


def check_switch(method: Any, *names: str) -> None:
    """Raises JpeftError unless each of the fields `names` is True or False."""
    for field in names:
        value = getattr(method, field)
        if not isinstance(value, bool):
            raise JpeftError(f"{_name(method)}: {field}={value!r}; choose True or False")


def check_name(method: Any) -> None:
    """Raises JpeftError unless the method's `name` can stand in a key."""
    name = method.name
    if not (isinstance(name, str) and name.isidentifier() and name[0] != "_"):
        raise JpeftError(f"{_name(method)}: name={name!r} is not an identifier (a letter, then letters, digits and _)")


def token_ids(method: Any, field: str, given: Any) -> tuple[int, ...]:
    """Token ids (a sequence or an integer array [T]) as a tuple. Raises JpeftError for anything else."""
    try:
        made = tuple(whole(token) for token in given)
    except TypeError:
        made = (None,)
    if isinstance(given, str) or not all(isinstance(t, int) and not isinstance(t, bool) and t >= 0 for t in made):
        raise JpeftError(f"{_name(method)}: {field}={given!r}: give token ids, as tokenizer.encode(text) makes them")
    return made


def shown(value: Any) -> str:
    """`value` as an error shows it; Python refuses to write out very long numbers."""
    return "a number of very many digits" if isinstance(value, int) and value.bit_length() > 256 else repr(value)


def layer_numbers(given: Any, field: str = "layers") -> tuple[int, ...] | None:
    """`layers` as a sorted tuple; None stays None. Raises JpeftError for what are no distinct layer numbers."""
    if given is None:
        return None
    try:
        numbers_ = [given] if isinstance(given, numbers.Integral) else list(given)
    except TypeError:
        numbers_ = []
    made = sorted({whole(number) for number in numbers_ if isinstance(whole(number), int)})
    if not made or len(made) != len(numbers_) or made[0] < 0 or any(isinstance(number, bool) for number in numbers_):
        raise JpeftError(f"{field}={given!r}: give distinct layer numbers from 0, such as range(8, 16) or [0, 1]")
    return tuple(made)


def _name(method: Any) -> str:
    return method if isinstance(method, str) else type(method).__name__


def _either(choices: tuple[str, ...]) -> str:
    *most, last = (repr(choice) for choice in choices)
    return f"{', '.join(most)} or {last}" if most else last
