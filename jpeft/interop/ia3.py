"""(IA)3: `ia3_l`, [out, 1] after a module and [1, in] before one of `feedforward_modules`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from flax import nnx

from jpeft import expressions
from jpeft.interop.config import Schema, Settings
from jpeft.interop.converter import Converter, Tensors
from jpeft.interop.links import Link
from jpeft.interop.names import Place, is_transposed, places
from jpeft.interop.selection import selected, target_names, targets_for
from jpeft.methods import IA3
from jpeft.methods.ia3 import Rescaled
from jpeft.models.families import family
from jpeft.models.model import Model
from jpeft.wrapper import Wrapper

_SCHEMA = Schema(
    {
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "feedforward_modules": None,
        "init_ia3_weights": True,
        "modules_to_save": None,
        "target_modules": None,
    }
)


def _read(settings: Settings, model: Model, tensors: Tensors) -> IA3:
    settings.flag("fan_in_fan_out", False)
    everything = list(places(model))
    chosen = selected(settings, everything, lambda place: place.kind is nnx.Linear, "linear layers")
    given = settings.names("feedforward_modules")
    if isinstance(given, str):
        pattern = expressions.compiled(given, f"{settings.where}: feedforward_modules")
        before = [place for place in chosen if pattern.fullmatch(place.name)]
    else:  # PEFT compares ends of names here, also within a segment
        before = [place for place in chosen if any(place.name.endswith(entry) for entry in given or ())]
    after = [place for place in chosen if place not in before]
    linear = [place for place in everything if place.kind in IA3.wraps]
    inputs = targets_for(before, linear)
    # What is in both is rescaled before.
    return IA3(targets=targets_for(after, linear) or inputs, feed_forward=inputs)


def _rescaled(model: Model, name: str) -> Iterator[tuple[Place, int | None, Rescaled]]:
    """Every place with a wrapper called `name`, its row and the wrapper."""
    for place in places(model):
        module = place.node.module
        while isinstance(module, Wrapper):
            if isinstance(module, Rescaled) and module.name == name:
                layers, member = module.layers, place.member
                if layers is None or member in layers:
                    yield place, member if layers is None or member is None else layers.index(member), module
            module = module.base


def _links(model: Model, method: IA3, settings: Settings | None) -> list[Link]:
    made = []
    for place, row, module in _rescaled(model, method.name):
        size = module.l.shape[-1]
        shape, view = ((1, size), _only_row) if module.before else ((size, 1), _only_column)
        made.append(Link(f"{place.node.name}/{method.name}/l", row, f"{place.key}.ia3_l", shape, theirs=view))
    return made


def _only_row(tensor: Any) -> Any:
    return tensor[0]


def _only_column(tensor: Any) -> Any:
    return tensor[:, 0]


def _write(model: Model, method: IA3) -> dict[str, Any]:
    entries = list(_rescaled(model, method.name))
    before = [place.name for place, _, module in entries if module.before]
    after = [place.name for place, _, module in entries if not module.before]
    inner = target_names(model, before)
    if any(name.endswith(entry) for name in after for entry in inner):
        inner = sorted(before)
    found = family(model.config.model_type)
    return {
        "fan_in_fan_out": any(is_transposed(found, place) for place, _, _ in entries),
        "feedforward_modules": inner,
        "target_modules": sorted({*target_names(model, after), *inner}),
    }


IA3_CONVERTER = Converter("IA3", (IA3,), _SCHEMA, _read, _links, _write, prefix="ia3_")
