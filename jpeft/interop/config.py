"""adapter_config.json: the fields that PEFT 0.21.2 knows, typed, and what becomes of the others."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping
from typing import Any

from jpeft.errors import JpeftError
from jpeft.models.config import MAX_SIZE, Fields

PEFT_VERSION = "0.21.2"
TASK_TYPES = {
    "causal-lm": "CAUSAL_LM",
    "sequence-classification": "SEQ_CLS",
    "token-classification": "TOKEN_CLS",
    "seq2seq-lm": "SEQ_2_SEQ_LM",
    "base": "FEATURE_EXTRACTION",
}
_TASKS = (*TASK_TYPES.values(), "QUESTION_ANS")

# What every kind of adapter has, with the values PEFT gives it. None of them changes what an adapter computes.
_COMMON: dict[str, Any] = {
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "inference_mode": True,
    "peft_type": None,
    "peft_version": PEFT_VERSION,
    "revision": None,
    "task_type": None,
}


@dataclasses.dataclass(frozen=True)
class Schema:
    """The fields of one `peft_type` in PEFT 0.21.2.

    used: those that our method has too, and others that change nothing, with PEFT's defaults. refused: those that
    change the result and are not supported here, unless they have the default given or are null, false or empty.
    """

    used: Mapping[str, Any]
    refused: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def defaults(self) -> dict[str, Any]:
        """Every field with its default."""
        return {**_COMMON, **self.used, **self.refused}


class Settings(Fields):
    """The checked fields of one adapter_config.json."""

    def __init__(self, raw: Mapping[str, Any], where: str):
        super().__init__(raw, where)
        self.peft_type = str(raw.get("peft_type"))
        self.task_type = raw.get("task_type")
        if self.task_type is not None and self.task_type not in _TASKS:
            raise self.refuse("task_type", f"null or one of {sorted(_TASKS)}")

    def refuse(self, name: str, expected: str) -> JpeftError:
        """The error for a bad value at `name`."""
        return JpeftError(f"{self.where}: {name} = {_short(self.raw.get(name))}: expected {expected}")

    def conform(self, schema: Schema) -> None:
        """Raises JpeftError, naming the fields, for any that change the result and are not supported.

        Unknown ones, which a newer version of PEFT or another program wrote, are named in one warning.
        """
        odd = {name: self.raw[name] for name, default in schema.refused.items() if self._differs(name, default)}
        if odd:
            said = ", ".join(f"{name} = {_short(value)}" for name, value in odd.items())
            raise JpeftError(
                f"{self.where}: {self.peft_type} adapters are read without {said}, which changes what the adapter "
                "computes; use an adapter without it, or merge this one into its model with PEFT"
            )
        unknown = [name for name in self.raw if name not in schema.defaults and self._differs(name, None)]
        if unknown:
            warnings.warn(
                f"{self.where}: fields that PEFT {PEFT_VERSION} does not have for {self.peft_type} are ignored: "
                f"{', '.join(sorted(unknown)[:20])}",
                stacklevel=4,
            )

    def _differs(self, name: str, default: Any) -> bool:
        value = self.raw.get(name)
        return not (value is None or value is False or value in ("", [], {}) or value == default)

    def names(self, name: str) -> str | tuple[str, ...] | None:
        """A string, a list of strings as a tuple, or None."""
        value = self.raw.get(name)
        return value if isinstance(value, str) else self.texts(name)

    def numbers(self, name: str) -> tuple[int, ...]:
        """A natural number or a list of them; null is ()."""
        value = self.raw.get(name)
        given = [] if value is None else value if isinstance(value, list) else [value]
        if any(isinstance(entry, bool) or not isinstance(entry, int) or not 0 <= entry <= MAX_SIZE for entry in given):
            raise self.refuse(name, "a layer number, a list of them or null")
        return tuple(given)

    def real(self, name: str, default: float) -> float:
        """A finite number, of either sign."""
        return finite(self, name, self.raw.get(name, default))

    def rate(self, name: str) -> float:
        """A probability below 1; 0 where it is absent."""
        value = self.real(name, 0.0)
        if not 0 <= value < 1:
            raise self.refuse(name, "a number from 0 up to but not including 1")
        return value


def finite(settings: Settings, name: str, value: Any) -> float:
    """`value`, of the field `name`, as a finite number."""
    try:
        if not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value):
            return value
    except OverflowError:  # a whole number beyond every float
        pass
    raise settings.refuse(name, "a finite number")


def whole(settings: Settings, name: str, value: Any) -> int:
    """`value`, of the field `name`, as a whole number from 1."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_SIZE:
        raise settings.refuse(name, "whole numbers from 1")
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
