"""AdaLoRA: `lora_A` [r, in], `lora_E` [r, 1] and `lora_B` [out, r], of which a pruned file has the rows that are left.

`rank_pattern` says for each matrix which of its first `init_r` ranks those are. Scales stay those of `init_r`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from flax import nnx

from jpeft.errors import JpeftError
from jpeft.interop import lora
from jpeft.interop.config import Schema, Settings
from jpeft.interop.converter import Converter, Tensors
from jpeft.interop.links import Link, turned
from jpeft.interop.names import Place, is_transposed, places
from jpeft.interop.selection import selected, target_names, targets_for
from jpeft.kinds import own_shape
from jpeft.methods import AdaLoRA
from jpeft.models.families import family
from jpeft.models.model import Model
from jpeft.wrapper import at

_SCHEMA = Schema(
    used={
        **lora.SCHEMA.used,
        "beta1": 0.85,
        "beta2": 0.85,
        "deltaT": 1,
        "init_r": 12,
        "orth_reg_weight": 0.5,
        "rank_pattern": None,
        "target_r": 8,
        "tfinal": 0,
        "tinit": 0,
        "total_step": None,
    },
    refused=lora.SCHEMA.refused,
)


def _read(settings: Settings, model: Model, tensors: Tensors) -> AdaLoRA:
    everything = list(places(model))
    chosen = selected(settings, everything, lambda place: place.kind is nnx.Linear, "linear layers")
    return AdaLoRA(
        rank=settings.integer("target_r", 8),
        initial_rank=settings.integer("init_r", 12),
        alpha=settings.number("lora_alpha", 8),
        dropout=settings.rate("lora_dropout"),
        total_steps=settings.optional_integer("total_step"),
        warmup_steps=settings.integer("tinit", 0, minimum=0),
        final_steps=settings.integer("tfinal", 0, minimum=0),
        interval=settings.integer("deltaT", 1),
        beta1=settings.number("beta1", 0.85, positive=False),
        beta2=settings.number("beta2", 0.85, positive=False),
        orthogonality=settings.number("orth_reg_weight", 0.5, positive=False),
        targets=targets_for(chosen, [place for place in everything if place.kind in AdaLoRA.wraps]),
    )


def _adapted(model: Model, method: AdaLoRA) -> Iterator[tuple[Place, int | None, Any]]:
    by_node = {(place.node.name, place.member): place for place in places(model)}
    for node, layers in method.resolve(model):
        wrapper = at(node.module, method.name)
        for row, member in enumerate(node.members if layers is None else layers):
            yield by_node[node.name, member], None if member is None else row, wrapper


def _links(model: Model, method: AdaLoRA, settings: Settings | None) -> list[Link]:
    left = _left(model, method) if settings is None else _stated(settings, model, method)
    made = []
    for place, row, _ in _adapted(model, method):
        slots = left.get(place.name)
        rank = method.initial_rank if slots is None else len(slots)
        key = f"{place.node.name}/{method.name}/"
        inputs, outputs = own_shape(place.node.module)
        made += [
            Link(key + "a", row, f"{place.key}.lora_A", (rank, inputs), ours=turned, slots=slots),
            Link(key + "e", row, f"{place.key}.lora_E", (rank, 1), theirs=_column, slots=slots),
            Link(key + "b", row, f"{place.key}.lora_B", (outputs, rank), theirs=turned, slots=slots),
        ]
    return made


def _column(array: np.ndarray) -> np.ndarray:
    return array[:, 0]


def _stated(settings: Settings, model: Model, method: AdaLoRA) -> dict[str, tuple[int, ...]]:
    """{module: the ranks that are left}, as `rank_pattern` has them."""
    table = {}
    known = {place.name for place, _, _ in _adapted(model, method)}
    for name, kept in (settings.object("rank_pattern") or {}).items():
        module = name.removesuffix(".default").removesuffix(".lora_E")
        if module not in known or not _is_mask(kept, method.initial_rank):
            raise JpeftError(
                f"{settings.where}: rank_pattern: expected, for each adapted module, {method.initial_rank} times true "
                f"or false under '<module>.lora_E', found {str(kept)[:60]} under {name[:80]!r}"
            )
        table[module] = tuple(number for number, live in enumerate(kept) if live)
    return table


def _is_mask(kept: Any, length: int) -> bool:
    return isinstance(kept, list) and len(kept) == length and all(isinstance(live, bool) for live in kept)


def _left(model: Model, method: AdaLoRA) -> dict[str, tuple[int, ...]]:
    """{module: the ranks whose singular value is not zero}; empty if none was pruned, or nothing was trained yet."""
    live = {}
    for place, row, wrapper in _adapted(model, method):
        values = np.asarray(wrapper.e.get_value())
        live[place.name] = tuple(int(slot) for slot in np.flatnonzero(values if row is None else values[row]))
    kept = sum(len(slots) for slots in live.values())
    return live if 0 < kept < len(live) * method.initial_rank else {}


def _write(model: Model, method: AdaLoRA) -> dict[str, Any]:
    found = family(model.config.model_type)
    chosen = [place for place, _, _ in _adapted(model, method)]
    if any(place.kind is not nnx.Linear for place in chosen) or method.alpha <= 0:
        raise JpeftError("save_peft: PEFT's AdaLoRA is on linear layers, with an alpha above 0; use jpeft.save_adapter")
    ranks = range(method.initial_rank)
    pattern = {f"{name}.lora_E": [rank in slots for rank in ranks] for name, slots in _left(model, method).items()}
    least = method.warmup_steps + method.final_steps + 1  # PEFT wants a number, and room to prune in
    return {
        "beta1": method.beta1,
        "beta2": method.beta2,
        "deltaT": method.interval,
        "fan_in_fan_out": any(is_transposed(found, place) for place in chosen),
        "init_r": method.initial_rank,
        "lora_alpha": lora.number(method.alpha),
        "lora_dropout": method.dropout,
        "orth_reg_weight": method.orthogonality,
        "rank_pattern": pattern or None,
        "target_modules": target_names(model, [place.name for place in chosen]),
        "target_r": method.rank,
        "tfinal": method.final_steps,
        "tinit": method.warmup_steps,
        "total_step": method.total_steps or least,
    }


ADALORA = Converter("ADALORA", (AdaLoRA,), _SCHEMA, _read, _links, _write, prefix="lora_")
