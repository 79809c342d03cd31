"""What the reader and the writer have to know about a method."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from jpeft.interop.config import Schema, Settings
from jpeft.interop.links import Link
from jpeft.interop.names import PREFIX
from jpeft.methods import Method
from jpeft.models.model import Model
from jpeft.models.tensors import TensorInfo

Tensors: TypeAlias = Mapping[str, TensorInfo]


@dataclasses.dataclass(frozen=True)
class Converter:
    """One `peft_type` and the methods of ours that it stores.

    read: the method that a configuration means on a model. tensors tells what the file holds, where the configuration
    leaves that open. links: for a model with the method on it (abstract while reading), where each of its arrays
    stands; the settings are those of a file that is read. write: the fields of adapter_config.json that differ from
    PEFT's defaults. All raise JpeftError for what the other side cannot express.
    prefix: what the names of its tensors start with behind the module's; "" for prompts, which are on no module.
    training: whether arrays of the method serve training only; they then go into a file of their own.
    """

    peft_type: str
    methods: tuple[type[Method], ...]
    schema: Schema
    read: Callable[[Settings, Model, Tensors], Method]
    links: Callable[[Model, Any, Settings | None], Sequence[Link]]
    write: Callable[[Model, Any], dict[str, Any]]
    prefix: str = ""
    training: Callable[[Any], bool] = lambda method: False

    def targeted(self, links: Sequence[Link]) -> set[str]:
        """The names in the file of the modules that have an adapter."""
        return {link.name.rpartition(f".{self.prefix}")[0] for link in links} if self.prefix else set()

    @property
    def before(self) -> str:
        """What stands in the file before transformers' names for modules trained as a whole."""
        return PREFIX if self.prefix else "base_model."
