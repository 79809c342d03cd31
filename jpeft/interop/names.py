"""Our modules under the names that they have in transformers, which PEFT's files use."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from flax import nnx

from jpeft import paths
from jpeft.errors import JpeftError
from jpeft.kinds import kind_of
from jpeft.models.families import Family, checkpoint_key, family
from jpeft.models.model import Model
from jpeft.paths import Node

PREFIX = "base_model.model."  # before every name in a file but those of prompts


@dataclasses.dataclass(frozen=True)
class Place:
    """One module of transformers' model: ours at `node`, and of a stack the layer `member`."""

    node: Node
    member: int | None
    name: str

    @property
    def ours(self) -> str:
        """Our dotted name for it, `layers.3.self_attn.q_proj`."""
        return self.node.expanded(self.member)

    @property
    def kind(self) -> type[nnx.Module] | None:
        """Which kind of layer it is, if it holds a weight."""
        return kind_of(self.node.module)

    @property
    def key(self) -> str:
        """The name in a PEFT file, `base_model.model.model.layers.3.self_attn.q_proj`."""
        return PREFIX + self.name


def model_and_family(model: Any, caller: str) -> tuple[Model, Family]:
    """`model` and its family. Raises JpeftError for what is no model of `jpeft.models`."""
    if not isinstance(model, Model):
        raise JpeftError(
            f"{caller}: PEFT's files name the modules of transformers' models; expected a model of jpeft.models, found "
            f"a {type(model).__name__} (jpeft.save_adapter and jpeft.load_adapter work on every model)"
        )
    return model, family(model.config.model_type)


def places(model: Model) -> Iterator[Place]:
    """Every module, layer by layer, under transformers' name for it."""
    found = family(model.config.model_type)
    for node in paths.nodes(model):
        for member in node.members if node.parts else ():
            yield Place(node, member, module_name(model, found, node.expanded(member)))


def module_name(model: Model, found: Family, ours: str) -> str:
    """transformers' name for the module with our dotted name."""
    return tensor_name(model, found, f"{ours}.kernel").removesuffix(".weight")


def tensor_name(model: Model, found: Family, ours: str) -> str:
    """transformers' name for the variable with our dotted name, in the model of this task."""
    return in_task(model, checkpoint_key(model, found, ours))


def in_task(model: Model, key: str) -> str:
    """A checkpoint's key as the model of this task has it: one without a head has no prefix before its names."""
    return key.removeprefix(f"{model.base_prefix}.") if model.task == "base" and model.base_prefix else key


def is_transposed(found: Family, place: Place) -> bool:
    """Whether transformers stores the weight [in, out], as GPT-2's `Conv1D` does."""
    return place.node.parts[-1] in found.untransposed


def tied_head(found: Family) -> str:
    """transformers' name of the output head of a model that ties it to the embedding."""
    return (found.tied or ("",))[0].removesuffix(".weight")


def tied_embedding(model: Model, found: Family) -> str | None:
    """transformers' name of the embedding that is the output head too, or None."""
    if found.tied is None or not model.config.tie_word_embeddings or not model.heads:
        return None
    if model.task not in ("causal-lm", "masked-lm", "seq2seq-lm"):
        return None
    return f"{model.base_prefix}.{found.tied[1]}".removeprefix(".").removesuffix(".weight")
