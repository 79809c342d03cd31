"""Trainable token rows: `trainable_tokens_delta` [n, D], the rows themselves, in the order of the ids.

Alone they are PEFT's TRAINABLE_TOKENS; beside LoRA they are its field `trainable_token_indices`, and the tensor is that
of a `token_adapter`. PEFT writes tied embeddings once beside LoRA, and in every place where they stand otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from flax import nnx

from jpeft.errors import JpeftError
from jpeft.interop.config import Schema, Settings
from jpeft.interop.converter import Converter, Tensors
from jpeft.interop.links import Link
from jpeft.interop.names import PREFIX, Place, model_and_family, places, tied_embedding, tied_head
from jpeft.interop.selection import ends_with, selected, target_names, targets_for
from jpeft.methods import Method, TrainableTokens
from jpeft.methods.trainable_tokens import TokenRows
from jpeft.models.model import Model
from jpeft.wrapper import Wrapper

FIELD = "trainable_token_indices"
_SCHEMA = Schema({"init_weights": True, "target_modules": None, "token_indices": []})
_BESIDE = "token_adapter.trainable_tokens_delta"
_ALONE = "trainable_tokens_delta"


def _embeddings(model: Model) -> list[Place]:
    return [place for place in places(model) if place.kind is nnx.Embed]


def _ids(settings: Settings, field: str, given: Any) -> tuple[int, ...]:
    if not isinstance(given, list) or not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in given):
        raise settings.refuse(field, "token ids")
    if len(set(given)) != len(given) or not given:
        raise settings.refuse(field, "token ids, each of them once")
    return tuple(given)


def _read(settings: Settings, model: Model, tensors: Tensors) -> TrainableTokens:
    everything = list(places(model))
    tokens = _ids(settings, "token_indices", settings.raw.get("token_indices"))
    if settings.raw.get("target_modules") is None:
        return TrainableTokens(tokens=tokens)
    chosen = selected(settings, everything, lambda place: place.kind is nnx.Embed, "embeddings")
    return TrainableTokens(tokens=tokens, targets=targets_for(chosen, _embeddings(model)))


def read_beside(settings: Settings, model: Model) -> list[Method]:
    """The methods for `trainable_token_indices` of a LoRA: token ids, or {module: token ids}."""
    given = settings.raw.get(FIELD)
    if not given:
        return []
    if isinstance(given, list):
        return [TrainableTokens(tokens=_ids(settings, FIELD, given))]
    if not isinstance(given, dict):
        raise settings.refuse(FIELD, "token ids, or token ids by module")
    methods: list[Method] = []
    for entry, ids in given.items():
        named = [place for place in places(model) if ends_with(place.name, entry)]
        if not named or any(place.kind is not nnx.Embed for place in named):
            kind = f"a {named[0].kind.__name__}" if named and named[0].kind else "no module of this model"
            raise JpeftError(
                f"{settings.where}: {FIELD} names {entry!r}, {kind}; rows of embeddings are trained here, and a tied "
                "head follows its embedding"
            )
        targets = targets_for(named, _embeddings(model))
        methods.append(TrainableTokens(tokens=_ids(settings, FIELD, ids), targets=targets))
    return methods


def _rows(model: Model, method: TrainableTokens) -> Iterator[tuple[Place, TokenRows]]:
    own = {node.name for node, _ in method.resolve(model)}  # several methods may have one name
    for place in places(model):
        module = place.node.module if place.node.name in own else None
        while isinstance(module, Wrapper):
            if isinstance(module, TokenRows) and module.name == method.name:
                yield place, module
            module = module.base


def _links(model: Model, method: TrainableTokens, settings: Settings | None, last: str = _ALONE) -> list[Link]:
    found = model_and_family(model, "peft")[1]
    tied, made = tied_embedding(model, found), []
    for place, module in _rows(model, method):
        key, shape = f"{place.node.name}/{method.name}/rows", tuple(module.rows.shape)
        made.append(Link(key, None, f"{place.key}.{last}", shape))
        if last == _ALONE:
            made += [
                Link(key, None, f"{PREFIX}{other}.{last}", shape, copy=True)
                for other in _other_places(model, place.name, tied, tied_head(found))
            ]
    return made


def _other_places(model: Model, name: str, tied: str | None, head: str) -> list[str]:
    """transformers' names for further places of the embedding `name`, which PEFT writes as well."""
    stacks = ["encoder.embed_tokens", "decoder.embed_tokens"] if name.rpartition(".")[2] == "shared" else []
    return [*stacks, *([head] if name == tied else [])]


def links(model: Model, methods: Sequence[Method]) -> list[Link]:
    """Where the rows of those of `methods` that train tokens stand in the file of another method."""
    rows = [method for method in methods if isinstance(method, TrainableTokens)]
    return [link for method in rows for link in _links(model, method, None, _BESIDE)]


def write(model: Model, methods: Sequence[TrainableTokens]) -> dict[str, Any]:
    """The field of adapter_config.json for rows beside LoRA. Raises JpeftError for what PEFT cannot say."""
    if not methods:
        return {}
    named = {place.name: list(method.tokens) for method in methods for place, _ in _rows(model, method)}
    if len(named) < sum(len(list(_rows(model, method))) for method in methods):
        raise JpeftError("save_peft: PEFT has one set of trainable tokens per embedding; give one TrainableTokens")
    if any(name.rpartition(".")[2] == "shared" for name in named):
        raise JpeftError(
            "save_peft: PEFT does not tie the trainable tokens of an encoder-decoder beside LoRA; use "
            "jpeft.save_adapter"
        )
    (first, ids), *more = named.items()
    declared = {node.name for node, _ in TrainableTokens(tokens=(0,)).resolve(model)}
    usual = [place.name for place in _embeddings(model) if place.node.name in declared]
    return {FIELD: ids if not more and first in usual else named}


def _write(model: Model, method: TrainableTokens) -> dict[str, Any]:
    names = [place.name for place, _ in _rows(model, method)]
    return {"target_modules": target_names(model, names), "token_indices": list(method.tokens)}


TRAINABLE_TOKENS = Converter(
    "TRAINABLE_TOKENS", (TrainableTokens,), _SCHEMA, _read, _links, _write, prefix="trainable_tokens_"
)
