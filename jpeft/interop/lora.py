"""LoRA and its variants: `lora_A.weight` [r, in], `lora_B.weight` [out, r]; of embeddings `lora_embedding_A`, `_B`.

DoRA adds `lora_magnitude_vector` [out]. An update that starts from the weight (PiSSA, OLoRA) is here less what it
started as, which no PEFT file says; it is written as the plain update of twice the rank that it is:
[A; A0] and [B, -B0].
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from flax import nnx

from jpeft.errors import JpeftError
from jpeft.interop import config
from jpeft.interop.config import Schema, Settings
from jpeft.interop.converter import Converter, Tensors
from jpeft.interop.links import Link, View, turned, whole
from jpeft.interop.names import PREFIX, Place, is_transposed, model_and_family, places, tied_embedding, tied_head
from jpeft.interop.selection import Pattern, selected, shortest, target_names, targets_for
from jpeft.kinds import own_shape
from jpeft.methods import DoRA, LoRA, LoRAFA, LoRAPlus
from jpeft.models.model import Model
from jpeft.targets import Pattern as OurPattern
from jpeft.targets import prefix_of
from jpeft.wrapper import at

_KINDS = (nnx.Linear, nnx.Embed)

SCHEMA = Schema(
    used={
        "alpha_pattern": {},
        "bias": "none",
        "corda_config": None,
        "ensure_weight_tying": False,
        "eva_config": None,
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "loftq_config": {},
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "lora_ga_config": None,
        "megatron_core": "megatron.core",
        "modules_to_save": None,
        "qalora_group_size": 16,
        "r": 8,
        "rank_pattern": {},
        "target_modules": None,
        "trainable_token_indices": None,
        "use_dora": False,
        "use_rslora": False,
    },
    refused={
        "alora_invocation_tokens": None,
        "arrow_config": None,
        "kasa_config": None,
        "layer_replication": None,
        "lora_bias": False,
        "megatron_config": None,
        "monteclora_config": None,
        "target_parameters": None,
        "use_bdlora": None,
        "use_qalora": False,
        "velora_config": None,
    },
)

# Initialisations that change the base, to which the adapter then belongs: PEFT repeats the change when it loads.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def _read(settings: Settings, model: Model, tensors: Tensors) -> LoRA:
    initial = settings.raw.get("init_lora_weights", True)
    if isinstance(initial, str) and initial.lower().startswith(_CHANGES_BASE):
        raise JpeftError(
            f"{settings.where}: init_lora_weights = {initial!r} changes the base model, and the file belongs to the "
            "changed one; write it as a plain LoRA with PEFT: save_pretrained(folder, "
            "path_initial_model_for_weight_conversion=...)"
        )
    settings.flag("fan_in_fan_out", False)  # the layout in files is one and the same
    everything = list(places(model))
    kind = DoRA if settings.flag("use_dora", False) else LoRA
    kinds = [each for each in _KINDS if each in kind.wraps]
    said = "linear layers and embeddings" if nnx.Embed in kinds else "linear layers (with use_dora)"
    chosen = selected(settings, everything, lambda place: place.kind in kinds, said)
    check_tied(settings, model, [place.name for place in chosen])
    rank, alpha = settings.integer("r", 8), settings.real("lora_alpha", 8)
    ranks, alphas = Pattern(settings, "rank_pattern"), Pattern(settings, "alpha_pattern")
    own_ranks = {place: config.whole(settings, "rank_pattern", ranks(place.name, rank)) for place in chosen}
    own_alphas = {place: config.finite(settings, "alpha_pattern", alphas(place.name, alpha)) for place in chosen}
    ranks.check()
    alphas.check()
    return kind(
        rank=rank,
        alpha=alpha,
        dropout=settings.rate("lora_dropout"),
        targets=targets_for(chosen, [place for place in everything if place.kind in kind.wraps]),
        rank_pattern=_table(own_ranks, rank),
        alpha_pattern=_table(own_alphas, alpha),
        use_rslora=settings.flag("use_rslora", False),
        init="gaussian" if initial == "gaussian" else "kaiming",
    )


def _table(values: dict[Place, Any], default: Any) -> dict[str, Any]:
    """A pattern of ours that gives each place its value."""
    table = {}
    for value in dict.fromkeys(values.values()):
        if value != default:
            having = [place for place, own in values.items() if own == value]
            table.update(dict.fromkeys(targets_for(having, list(values)), value))
    return table


def check_tied(settings: Settings, model: Model, names: Sequence[str]) -> None:
    """Raises JpeftError if an embedding among `names` is the output head too, and PEFT would adapt one side of it."""
    tied = tied_embedding(model, model_and_family(model, "load_peft")[1])
    if tied is None or tied not in names:
        return
    check_tie(model, tied, settings.where)
    if not settings.flag("ensure_weight_tying", False):
        raise JpeftError(
            f"{settings.where}: {tied!r} is adapted without ensure_weight_tying, so only as the input; here it "
            "is the output head too, and what trains it serves both"
        )


def check_tie(model: Model, tied: str, where: str) -> None:
    """Raises JpeftError if PEFT cannot keep the embedding `tied` and the output head one while an adapter trains it."""
    if tied.rpartition(".")[2] != "embed_tokens":
        raise JpeftError(
            f"{where}: {tied!r} is adapted or trained; it is the output head too, and PEFT's ensure_weight_tying knows "
            f"such embeddings by the name embed_tokens only, so that its {model.config.model_type} models lose the tie"
        )


@dataclasses.dataclass(frozen=True)
class _Adapted:
    """One layer of a wrapped module: its row in the wrapper's arrays, and its rank and alpha."""

    place: Place
    row: int | None
    rank: int
    alpha: float


def adapted_places(model: Model, method: Any, name: str) -> Iterator[_Adapted]:
    """The places that `method`, with ranks and alphas by pattern, adapts in `model` by the wrapper `name`."""
    by_node = {(place.node.name, place.member): place for place in places(model)}
    prefix = prefix_of(model)
    ranks = OurPattern(method.rank_pattern, field="rank_pattern", method="LoRA")
    alphas = OurPattern(method.alpha_pattern, field="alpha_pattern", method="LoRA")
    default = float(method.rank if method.alpha is None else method.alpha)
    for node, layers in method.resolve(model):
        for member in node.members if layers is None else layers:
            rank = ranks(node, member, prefix, method.rank)
            if not rank:
                continue
            covered = at(node.module, name).layers
            row = member if member is None or covered is None else covered.index(member)
            alpha = float(alphas(node, member, prefix, default))
            yield _Adapted(by_node[node.name, member], row, rank, alpha)


def _links(model: Model, method: LoRA, settings: Settings | None) -> list[Link]:
    found = model_and_family(model, "peft")[1]
    tied, made = tied_embedding(model, found), []
    for entry in adapted_places(model, method, method.name):
        place, row, rank = entry.place, entry.row, entry.rank
        key, slots = f"{place.node.name}/{method.name}/", tuple(range(entry.rank))
        inputs, outputs = own_shape(place.node.module)
        embedding = place.kind is nnx.Embed
        names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
        first, second = (f"{place.key}.{name}" for name in names)
        total = rank * (2 if _has_start(place, method) else 1)
        for part, start in enumerate(("", "0")[: total // rank]):
            ranks = slice(part * rank, (part + 1) * rank)
            made.append(Link(f"{key}a{start}", row, first, (total, inputs), turned, _ranks(ranks), slots))
            own, sign = f"{key}b{start}", -1 if start else 1
            made.append(Link(own, row, second, (outputs, total), whole, _turned_ranks(ranks), slots, sign))
            if place.name == tied:  # PEFT stores the head's side too, as a linear layer's
                at_head = [f"{PREFIX}{tied_head(found)}.lora_{side}.weight" for side in "AB"]
                made.append(Link(own, row, at_head[0], (total, outputs), whole, _ranks(ranks), slots, sign, copy=True))
                view = _turned_ranks(ranks)
                made.append(Link(f"{key}a{start}", row, at_head[1], (inputs, total), turned, view, slots, copy=True))
        if isinstance(method, DoRA):
            made.append(Link(key + "m", row, f"{place.key}.lora_magnitude_vector", (outputs,)))
    return made


def _has_start(place: Place, method: LoRA) -> bool:
    """Whether the update is less what it started as: then it is written as one of twice the rank."""
    return at(place.node.module, method.name).a0 is not None


def _ranks(ranks: slice) -> View:
    return lambda tensor: tensor[ranks]


def _turned_ranks(ranks: slice) -> View:
    return lambda tensor: tensor[:, ranks].T


def _write(model: Model, method: LoRA) -> dict[str, Any]:
    found = model_and_family(model, "save_peft")[1]
    entries = list(adapted_places(model, method, method.name))
    odd = next((entry.place for entry in entries if entry.place.kind not in _KINDS), None)
    if odd is not None:
        raise JpeftError(f"save_peft: {odd.node.name!r} is a {odd.kind.__name__}, which is no layer of a PEFT file")  # type: ignore[union-attr]
    names = [entry.place.name for entry in entries]
    tied = tied_embedding(model, found)
    if tied is not None and tied in names:
        check_tie(model, tied, "save_peft")
    twice = any(_has_start(entry.place, method) for entry in entries)
    alpha = float(method.rank if method.alpha is None else method.alpha)
    wider = (math.sqrt(2) if method.use_rslora else 2) if twice else 1  # the scale stays as it is
    alphas = {entry.place.name: number(_alpha(method, entry) * wider) for entry in entries}
    rank = method.rank * (2 if twice else 1)
    return {
        "alpha_pattern": _pattern(alphas, number(alpha * wider)),
        "ensure_weight_tying": tied in names,
        "fan_in_fan_out": any(is_transposed(found, entry.place) for entry in entries),
        "init_lora_weights": "gaussian" if method.init == "gaussian" else True,
        "lora_alpha": number(alpha * wider),
        "lora_dropout": method.dropout,
        "r": rank,
        "rank_pattern": _pattern({entry.place.name: entry.rank * rank // method.rank for entry in entries}, rank),
        "target_modules": target_names(model, names),
        "use_dora": isinstance(method, DoRA),
        "use_rslora": method.use_rslora,
    }


def _pattern(values: dict[str, Any], default: Any) -> dict[str, Any]:
    """`rank_pattern` or `alpha_pattern` for values by transformers' names."""
    table = {}
    for value in dict.fromkeys(values.values()):
        if value != default:
            having = [name for name, own in values.items() if own == value]
            table.update(dict.fromkeys(shortest(having, values.keys()), value))
    return table


def _alpha(method: LoRA, entry: _Adapted) -> float:
    """The alpha of one module, as its scale has it."""
    root = math.sqrt(entry.rank) if method.use_rslora else entry.rank
    scale = at(entry.place.node.module, method.name).scale.get_value()
    scale = np.asarray(scale if entry.row is None else scale[entry.row])[: entry.rank]
    if np.all(scale == np.float32(entry.alpha / root)):
        return entry.alpha
    if np.any(scale != scale[0]):
        raise JpeftError(
            f"save_peft: the scales of {entry.place.ours!r} differ by rank, which a PEFT file has no place for"
        )
    return float(scale[0]) * root


def number(value: float) -> int | float:
    """A whole number as such, for people to read."""
    return int(value) if float(value).is_integer() else value


LORA = Converter("LORA", (LoRA, LoRAPlus, LoRAFA, DoRA), SCHEMA, _read, _links, _write, prefix="lora_")
