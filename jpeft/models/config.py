"""Reading config.json: every value is checked, nothing is trusted.

A family's configuration is a frozen dataclass that inherits `Config` and is made by a function that takes its fields
from `Fields`. Absent keys have transformers' defaults, since transformers leaves out what equals a default.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from jpeft.errors import JpeftError, nearest

MAX_JSON_BYTES = 64 * 2**20
MAX_SIZE = 2**31 - 1  # dimensions are 32-bit in every file format read here

# Layers have names each, so a file that announces millions would fill the memory before it is found to be wrong.
_MAX_LAYERS = 10_000
_LIMITS = dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "num_decoder_layers"), _MAX_LAYERS)

_C = TypeVar("_C", bound="Config")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What all families share.

    eos_token_id: every id that ends a text. labels: names of the classes. source: the JSON it was read from.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    initializer_range: float
    tie_word_embeddings: bool
    pad_token_id: int | None
    bos_token_id: int | None
    eos_token_id: tuple[int, ...]
    labels: tuple[str, ...]
    source: str = dataclasses.field(default="{}", compare=False, repr=False)

    @property
    def num_labels(self) -> int:
        """Number of classes of a classification head."""
        return len(self.labels)

    def with_labels(self: _C, count: int) -> _C:
        """The configuration for `count` classes; their names are kept where the count is the same."""
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MAX_SIZE:
            raise JpeftError(f"num_labels={count!r}: expected a positive integer")
        if count == self.num_labels:
            return self
        return dataclasses.replace(self, labels=tuple(f"LABEL_{i}" for i in range(count)))

    @property
    def raw(self) -> dict[str, Any]:
        """The JSON object it was read from (a copy)."""
        return json.loads(self.source)


_REQUIRED = object()


class Fields:
    """Checked access to the keys of a JSON object; `where` names it in errors."""

    def __init__(self, raw: Mapping[str, Any], where: str):
        self.raw, self.where = raw, where

    def refuse(self, name: str, expected: str) -> JpeftError:
        """The error for a bad value at `name`."""
        return JpeftError(f"{self.where}: {name} = {self.raw.get(name)!r}: expected {expected}")

    def _get(self, name: str, default: Any) -> Any:
        if name in self.raw:
            return self.raw[name]
        if default is _REQUIRED:
            near = nearest(name, self.raw)
            raise JpeftError(f"{self.where}: the key {name!r} is missing; the nearest present are {near}")
        return default

    def integer(self, name: str, default: Any = _REQUIRED, *, minimum: int = 1) -> int:
        """An integer from `minimum` up."""
        value = self._get(name, default)
        maximum = _LIMITS.get(name, MAX_SIZE)
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
            raise self.refuse(name, f"an integer from {minimum} to {maximum}")
        return value

    def optional_integer(self, name: str, default: int | None = None, *, minimum: int = 1) -> int | None:
        """An integer from `minimum` up, or null."""
        return None if self._get(name, default) is None else self.integer(name, default, minimum=minimum)

    def number(self, name: str, default: Any = _REQUIRED, *, positive: bool = True) -> float:
        """A finite number, positive unless said otherwise."""
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.refuse(name, "a finite number")
        if value < 0 or (positive and value == 0):
            raise self.refuse(name, "a positive number" if positive else "a number that is not negative")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """true or false."""
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self.refuse(name, "true or false")
        return value

    def text(self, name: str, default: Any = _REQUIRED) -> str:
        """A string."""
        value = self._get(name, default)
        if not isinstance(value, str):
            raise self.refuse(name, "a string")
        return value

    def choice(self, name: str, default: Any, options: tuple[str, ...]) -> str:
        """One of `options`."""
        value = self.text(name, default)
        if value not in options:
            raise self.refuse(name, f"one of {nearest(value, options)}")
        return value

    def object(self, name: str) -> Mapping[str, Any] | None:
        """A JSON object, or None where it is absent or null."""
        value = self.raw.get(name)
        if value is not None and not isinstance(value, Mapping):
            raise self.refuse(name, "an object")
        return value

    def texts(self, name: str) -> tuple[str, ...] | None:
        """A list of strings, or None where it is absent or null."""
        value = self.raw.get(name)
        if value is None:
            return None
        if not isinstance(value, list | tuple) or not all(isinstance(entry, str) for entry in value):
            raise self.refuse(name, "a list of strings")
        return tuple(value)

    def token(self, name: str, default: int | None = None) -> int | None:
        """A token id or null; -1 means none in old files."""
        value = self._get(name, default)
        return None if value == -1 and not isinstance(value, bool) else self.optional_integer(name, default, minimum=0)

    def tokens(self, name: str, default: int | None = None) -> tuple[int, ...]:
        """A token id, a list of them or null, as a tuple."""
        value = self._get(name, default)
        found = () if value is None else tuple(value) if isinstance(value, list | tuple) else (value,)
        if any(isinstance(token, bool) or not isinstance(token, int) or not 0 <= token <= MAX_SIZE for token in found):
            raise self.refuse(name, "a token id, a list of token ids or null")
        return found

    def labels(self) -> tuple[str, ...]:
        """The class names in `id2label`, or LABEL_0, ... for `num_labels` (2 where that is absent too)."""
        names = self.object("id2label")
        if names is None:
            return tuple(f"LABEL_{i}" for i in range(self.integer("num_labels", 2)))
        try:
            ordered = {int(key): value for key, value in names.items()}
        except (TypeError, ValueError):
            ordered = {}
        if sorted(ordered) != list(range(len(names))) or not names:
            raise self.refuse("id2label", 'an object with the keys "0", "1", ...')
        if not all(isinstance(value, str) for value in ordered.values()):
            raise self.refuse("id2label", "names that are strings")
        return tuple(ordered[index] for index in range(len(ordered)))

    def shared(self, **defaults: Any) -> dict[str, Any]:
        """The fields of `Config` under their usual keys. `defaults` are the family's where they differ."""
        return {
            "model_type": self.text("model_type"),
            "vocab_size": self.integer("vocab_size", defaults.get("vocab_size", _REQUIRED)),
            "hidden_size": self.integer("hidden_size", defaults.get("hidden_size", _REQUIRED)),
            "num_hidden_layers": self.integer("num_hidden_layers", defaults.get("num_hidden_layers", _REQUIRED)),
            "initializer_range": self.number("initializer_range", 0.02, positive=False),
            "tie_word_embeddings": self.flag("tie_word_embeddings", defaults.get("tie_word_embeddings", True)),
            "pad_token_id": self.token("pad_token_id", defaults.get("pad_token_id")),
            "bos_token_id": self.token("bos_token_id", defaults.get("bos_token_id")),
            "eos_token_id": self.tokens("eos_token_id", defaults.get("eos_token_id")),
            "labels": self.labels(),
            "source": json.dumps(dict(self.raw), sort_keys=True, default=str),
        }


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An `object_pairs_hook` that refuses a key that stands twice, which readers would resolve differently."""
    made = dict(pairs)
    if len(made) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the keys {sorted({name for name in names if names.count(name) > 1})} stand twice")
    return made


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """The JSON object in `data`; NaN, repeated keys and anything else that is not an object are refused."""
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique_keys, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise JpeftError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise JpeftError(f"{where}: expected a JSON object, found a {type(value).__name__}")
    return value


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in the file `path`."""
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise JpeftError(f"{path}: {size} bytes are too many for a configuration (at most {MAX_JSON_BYTES})")
        return parse_json(path.read_bytes(), str(path))
    except OSError as error:
        raise JpeftError(f"{path}: cannot be read: {error.strerror or error}") from error
