"""Norm tuning, PEFT's LN tuning: the trained copy of a norm's `weight` and `bias` under `ln_tuning_layers`."""

from __future__ import annotations

from typing import Any

from jpeft.interop.config import Schema, Settings
from jpeft.interop.converter import Converter, Tensors
from jpeft.interop.links import Link
from jpeft.interop.names import Place, places, tensor_name
from jpeft.interop.selection import selected, target_names, targets_for
from jpeft.methods import NormTuning
from jpeft.methods.retrained import parameters
from jpeft.models.families import family
from jpeft.models.model import Model
from jpeft.wrapper import at, innermost

_SCHEMA = Schema({"exclude_modules": None, "modules_to_save": None, "target_modules": None})
_INNER = "ln_tuning_layers"


def _is_norm(place: Place) -> bool:
    return place.kind is None and bool(parameters(innermost(place.node.module)))


def _read(settings: Settings, model: Model, tensors: Tensors) -> NormTuning:
    everything = list(places(model))
    chosen = selected(settings, everything, _is_norm, "norms")
    return NormTuning(targets=targets_for(chosen, everything))


def _links(model: Model, method: NormTuning, settings: Settings | None) -> list[Link]:
    found = family(model.config.model_type)
    by_node = {(place.node.name, place.member): place for place in places(model)}
    made = []
    for node, layers in method.resolve(model):
        wrapper = at(node.module, method.name)
        for row, member in enumerate(node.members if layers is None else layers):
            for own in wrapper.copied:
                last = tensor_name(model, found, f"{node.expanded(member)}.{own}").rpartition(".")[2]
                name = f"{by_node[node.name, member].key}.{_INNER}.{last}"
                shape = tuple(vars(wrapper)[own].shape)
                made.append(
                    Link(
                        f"{node.name}/{method.name}/{own}",
                        None if member is None else row,
                        name,
                        shape if member is None else shape[1:],
                    )
                )
    return made


def _write(model: Model, method: NormTuning) -> dict[str, Any]:
    by_node = {(place.node.name, place.member): place.name for place in places(model)}
    chosen = method.resolve(model)
    names = [by_node[node.name, member] for node, layers in chosen for member in layers or node.members]
    return {"target_modules": target_names(model, names)}


LN_TUNING = Converter("LN_TUNING", (NormTuning,), _SCHEMA, _read, _links, _write, prefix="ln_tuning_")
