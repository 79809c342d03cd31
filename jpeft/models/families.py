"""The families of models: one entry per Hugging Face `model_type`, and the rule that maps our keys to theirs.

The rule, for a variable at the canonical path `layers/self_attn/q_proj/kernel` of layer 3 of a `Stack`: insert the
layer, join with dots, give the last name torch's spelling (`kernel`, `embedding` and `scale` are `weight`), put the
base prefix before everything but the heads: `model.layers.3.self_attn.q_proj.weight`. Kernels are [in, out] here and
[out, in] there, but for the layers a family names in `untransposed`. What the rule does not cover a family adds in
`renames`.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx

from jpeft import paths, surgery
from jpeft.errors import JpeftError, nearest
from jpeft.models.config import Config, Fields
from jpeft.models.model import TASKS, Model

# The module that defines the family, imported when it is asked for: `FAMILIES` there maps model_type to `Family`.
_MODULES = {
    "llama": "decoder",
    "mistral": "decoder",
    "qwen2": "decoder",
    "qwen3": "decoder",
    "gpt2": "gpt2",
    "bert": "encoder",
    "roberta": "encoder",
    "t5": "encoder_decoder",
}
MODEL_TYPES = tuple(_MODULES)

_SPELLING = {"kernel": "weight", "embedding": "weight", "scale": "weight"}

# Buffers that old checkpoints carry and that are computed here.
_BUFFERS = (r"(.*\.)?position_ids", r".*\.rotary_emb\.inv_freq", r".*\.attn\.(bias|masked_bias)", r".*\.token_type_ids")


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture.

    parse: makes the configuration from the fields of config.json. classes: the model class of each task, called as
    `cls(config, param_dtype=, pooling=, remat=, attention=, rngs=)`. architectures: which task a class name in
    config.json's `architectures` means. untransposed: names of modules whose weight is stored [in, out].
    renames: (regular expression, replacement) pairs applied in turn to the key that the rule gives, before the base
    prefix. tied: the keys (by the rule, without prefix) of the head and the embedding that are one matrix when tied.
    ignored: expressions of further keys to leave unread, such as other tasks' heads. older: (regular expression,
    replacement) pairs that turn a checkpoint's key into what files of older versions call it.
    """

    model_type: str
    parse: Callable[[Fields], Config]
    classes: Mapping[str, type[Model]]
    architectures: Mapping[str, str]
    untransposed: tuple[str, ...] = ()
    renames: tuple[tuple[str, str], ...] = ()
    tied: tuple[str, str] | None = None
    ignored: tuple[str, ...] = ()
    older: tuple[tuple[str, str], ...] = ()

    def class_for(self, task: str) -> type[Model]:
        """The model class for `task`."""
        if task not in self.classes:
            raise JpeftError(f"task={task!r}: {self.model_type} has {sorted(self.classes)}")
        return self.classes[task]

    def ignores(self, model: Model, key: str) -> bool:
        """Whether a checkpoint's key that no variable of `model` asked for is harmless."""
        return any(re.fullmatch(pattern, key) for pattern in (*_BUFFERS, *self.ignored, *model.unread))

    def spellings(self, key: str) -> tuple[str, ...]:
        """The names under which files of this and of older versions may have `key`, newest first."""
        old = key
        for pattern, replacement in self.older:
            old = re.sub(pattern, replacement, old)
        return (key,) if old == key else (key, old)


def family(model_type: Any, where: str = "model_type") -> Family:
    """The family of a Hugging Face `model_type`."""
    if not isinstance(model_type, str) or model_type not in _MODULES:
        near = nearest(str(model_type), MODEL_TYPES) if model_type else list(MODEL_TYPES)
        raise JpeftError(f"{where}: model_type {model_type!r} is not one of the families here; the nearest are {near}")
    return importlib.import_module(f"jpeft.models.{_MODULES[model_type]}").FAMILIES[model_type]


def parse_config(raw: Mapping[str, Any], where: str = "config") -> tuple[Family, Config]:
    """The family and configuration that a config.json describes."""
    if not isinstance(raw, Mapping):
        raise JpeftError(f"{where}: expected the object in a config.json, found {type(raw).__name__}")
    found = family(raw.get("model_type"), where)
    return found, found.parse(Fields(raw, where))


def default_task(found: Family, raw: Mapping[str, Any], where: str) -> str:
    """The task that the `architectures` of a config.json name; "base" where it names none."""
    names = Fields(raw, where).texts("architectures") or ()
    for name in names:
        if name in found.architectures:
            return found.architectures[name]
    if names:
        raise JpeftError(
            f"{where}: architectures {list(names)} has no class known here for {found.model_type} "
            f"({sorted(found.architectures)}); choose a task with task=, one of {list(found.classes)}"
        )
    return "base"


@dataclasses.dataclass(frozen=True)
class Slot:
    """One variable of a model and the checkpoint tensors that fill it.

    path: where the variable stands. key: its canonical key. names: the checkpoint's keys, one per layer of a `Stack`,
    else a single one. stacked: whether the variable has a layer axis. transpose: whether torch stores the last two
    axes the other way round.
    """

    path: surgery.Path
    key: str
    names: tuple[str, ...]
    stacked: bool
    transpose: bool


def slots(model: Model, found: Family) -> list[Slot]:
    """Every variable of `model` with the checkpoint's names for it (base prefix included)."""
    owners = {node.path: node for node in paths.nodes(model)}
    made = []
    for path, _ in nnx.to_flat_state(nnx.state(model)):
        node, kind = owners[path[:-1]], str(path[-1])
        names = tuple(checkpoint_key(model, found, f"{node.expanded(layer)}.{kind}") for layer in node.members)
        transpose = kind == "kernel" and node.parts[-1] not in found.untransposed
        made.append(Slot(path, f"{node.name}/{kind}", names, node.stack is not None, transpose))
    return made


def checkpoint_key(model: Model, found: Family, dotted: str) -> str:
    """The checkpoint's name for the variable with that expanded, dotted name."""
    stem, _, kind = dotted.rpartition(".")
    key = f"{stem}.{_SPELLING.get(kind, kind)}"
    for pattern, replacement in found.renames:
        key = re.sub(pattern, replacement, key)
    if not model.base_prefix or dotted.split(".", maxsplit=1)[0] in model.heads:
        return key
    return f"{model.base_prefix}.{key}"


def check_task(task: str) -> None:
    """Refuses a task that no family has."""
    if task not in TASKS:
        raise JpeftError(f"task={task!r} is not known; the nearest are {nearest(task, TASKS)}")
