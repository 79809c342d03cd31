"""VeRA, LoHa, LoKr and OFT: the variables of `jpeft.methods.weight_updates` under PEFT's names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from flax import nnx

from jpeft.errors import JpeftError
from jpeft.interop.config import Schema, Settings
from jpeft.interop.converter import Converter, Tensors
from jpeft.interop.links import Link, turned, whole
from jpeft.interop.names import Place, is_transposed, model_and_family, places
from jpeft.interop.selection import selected, target_names, targets_for
from jpeft.methods import OFT, LoHa, LoKr, VeRA
from jpeft.methods.weight_updates import LinearUpdate
from jpeft.models.model import Model
from jpeft.wrapper import at

_WHERE = {"layers_pattern": None, "layers_to_transform": None, "modules_to_save": None, "target_modules": None}
_LYCORIS_USED = {**_WHERE, "alpha": 8, "exclude_modules": None, "init_weights": True, "r": 8}
_LYCORIS_REFUSED = {
    "alpha_pattern": {},
    "module_dropout": 0.0,
    "rank_dropout": 0.0,
    "rank_pattern": {},
    "use_effective_conv2d": False,
}


def _chosen(settings: Settings, model: Model) -> tuple[str, ...]:
    everything = list(places(model))
    chosen = selected(settings, everything, lambda place: place.kind is nnx.Linear, "linear layers")
    return targets_for(chosen, [place for place in everything if place.kind is nnx.Linear])


def _adapted(model: Model, method: Any) -> Iterator[tuple[Place, int | None, LinearUpdate]]:
    """Every place with an update, its row and the wrapper."""
    by_node = {(place.node.name, place.member): place for place in places(model)}
    for node, layers in method.resolve(model):
        wrapper: Any = at(node.module, method.name)
        for row, member in enumerate(node.members if layers is None else layers):
            yield by_node[node.name, member], None if member is None else row, wrapper


def _names(model: Model, method: Any) -> list[str]:
    return target_names(model, [place.name for place, _, _ in _adapted(model, method)])


def _by_name(model: Model, method: Any, names: dict[str, tuple[str, bool]]) -> list[Link]:
    """names: {our variable: (the name in the file, whether it is stored the other way round)}."""
    made = []
    for place, row, wrapper in _adapted(model, method):
        for own, (name, other_way) in names.items():
            variable = vars(wrapper).get(own)
            if variable is not None:
                shape = tuple(variable.shape)[0 if row is None else 1 :]
                stored = shape[::-1] if other_way else shape
                key = f"{place.node.name}/{method.name}/{own}"
                made.append(Link(key, row, f"{place.key}.{name}", stored, turned if other_way else whole))
    return made


def _refuse_transposed(model: Model, method: Any) -> None:
    found = model_and_family(model, "save_peft")[1]
    odd = next((place.name for place, _, _ in _adapted(model, method) if is_transposed(found, place)), None)
    if odd is not None:
        raise JpeftError(f"save_peft: PEFT's {type(method).__name__} does not know layers such as {odd!r} (Conv1D)")


def _read_vera(settings: Settings, model: Model, tensors: Tensors) -> VeRA:
    settings.flag("fan_in_fan_out", False)
    if not settings.flag("save_projection", True):
        raise JpeftError(
            f"{settings.where}: save_projection = False leaves the projections to torch's random numbers, which are "
            "not to be had here; save the adapter with save_projection=True"
        )
    rank, initial = settings.integer("r", 256), settings.real("d_initial", 0.1)
    return VeRA(rank=rank, initial=initial, dropout=settings.rate("vera_dropout"), targets=_chosen(settings, model))


def _vera_links(model: Model, method: VeRA, settings: Settings | None) -> list[Link]:
    made = _by_name(model, method, {"d": ("vera_lambda_d", False), "b": ("vera_lambda_b", False)})
    wrappers = {place.node.name: wrapper for place, _, wrapper in _adapted(model, method)}
    inputs = max(wrapper.down.shape[0] for wrapper in wrappers.values())
    outputs = max(wrapper.up.shape[1] for wrapper in wrappers.values())
    for node, wrapper in wrappers.items():  # each of ours is a part of the one in the file
        own_in, own_out, rank = wrapper.down.shape[0], wrapper.up.shape[1], method.rank
        key = f"{node}/{method.name}/"
        made.append(Link(key + "down", None, "base_model.vera_A", (rank, inputs), turned, _columns(own_in)))
        made.append(Link(key + "up", None, "base_model.vera_B", (outputs, rank), turned, _rows(own_out)))
    return made


def _columns(count: int) -> Callable[[Any], Any]:
    return lambda tensor: tensor[:, :count]


def _rows(count: int) -> Callable[[Any], Any]:
    return lambda tensor: tensor[:count]


def _write_vera(model: Model, method: VeRA) -> dict[str, Any]:
    found = model_and_family(model, "save_peft")[1]
    return {
        "d_initial": method.initial,
        "fan_in_fan_out": any(is_transposed(found, place) for place, _, _ in _adapted(model, method)),
        "r": method.rank,
        "target_modules": _names(model, method),
        "vera_dropout": method.dropout,
    }


def _read_loha(settings: Settings, model: Model, tensors: Tensors) -> LoHa:
    rank, alpha = settings.integer("r", 8), settings.real("alpha", 8)
    return LoHa(rank=rank, alpha=alpha, targets=_chosen(settings, model))


def _loha_links(model: Model, method: LoHa, settings: Settings | None) -> list[Link]:
    theirs = {"a1": "hada_w1_b", "b1": "hada_w1_a", "a2": "hada_w2_b", "b2": "hada_w2_a"}
    return _by_name(model, method, {own: (name, True) for own, name in theirs.items()})


def _write_lycoris(model: Model, method: LoHa) -> dict[str, Any]:
    _refuse_transposed(model, method)
    alpha = method.rank if method.alpha is None else method.alpha
    return {"alpha": alpha, "r": method.rank, "target_modules": _names(model, method)}


def _read_lokr(settings: Settings, model: Model, tensors: Tensors) -> LoKr:
    factor = settings.raw.get("decompose_factor", -1)
    if isinstance(factor, bool) or not isinstance(factor, int) or not (factor == -1 or factor >= 1):
        raise settings.refuse("decompose_factor", "-1 or a whole number from 1")
    rank, alpha = settings.integer("r", 8), settings.real("alpha", 8)
    return LoKr(rank=rank, alpha=alpha, factor=factor, targets=_chosen(settings, model))


def _lokr_links(model: Model, method: LoKr, settings: Settings | None) -> list[Link]:
    theirs = {"w1": "lokr_w1", "w2": "lokr_w2", "a": "lokr_w2_b", "b": "lokr_w2_a"}
    return _by_name(model, method, {own: (name, True) for own, name in theirs.items()})


def _write_lokr(model: Model, method: LoKr) -> dict[str, Any]:
    return {**_write_lycoris(model, method), "decompose_factor": method.factor}


def _read_oft(settings: Settings, model: Model, tensors: Tensors) -> OFT:
    settings.flag("fan_in_fan_out", False)
    series = settings.flag("use_cayley_neumann", True)
    terms = settings.integer("num_cayley_neumann_terms", 5) if series else None
    block = settings.integer("oft_block_size", 32, minimum=0)
    if not block:
        raise JpeftError(
            f"{settings.where}: oft_block_size = 0 with r = {settings.raw.get('r')!r} gives every layer blocks of its "
            "own size; here one block_size is for all"
        )
    return OFT(block_size=block, terms=terms, targets=_chosen(settings, model))


def _oft_links(model: Model, method: OFT, settings: Settings | None) -> list[Link]:
    return _by_name(model, method, {"skew": ("oft_R.weight", False)})


def _write_oft(model: Model, method: OFT) -> dict[str, Any]:
    found = model_and_family(model, "save_peft")[1]
    terms = {} if method.terms is None else {"num_cayley_neumann_terms": method.terms}
    return {
        "fan_in_fan_out": any(is_transposed(found, place) for place, _, _ in _adapted(model, method)),
        "oft_block_size": method.block_size,
        "target_modules": _names(model, method),
        "use_cayley_neumann": method.terms is not None,
        **terms,
    }


_VERA_SCHEMA = Schema(
    {
        **_WHERE,
        "bias": "none",
        "d_initial": 0.1,
        "fan_in_fan_out": False,
        "init_weights": True,
        "projection_prng_key": 0,
        "r": 256,
        "save_projection": True,
        "vera_dropout": 0.0,
    }
)
_LOHA_SCHEMA = Schema(_LYCORIS_USED, _LYCORIS_REFUSED)
_LOKR_SCHEMA = Schema(
    {**_LYCORIS_USED, "decompose_factor": -1},
    {**_LYCORIS_REFUSED, "decompose_both": False, "rank_dropout_scale": False},
)
_OFT_SCHEMA = Schema(
    {
        **_WHERE,
        "bias": "none",
        "eps": 6e-05,
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "init_weights": True,
        "num_cayley_neumann_terms": 5,
        "oft_block_size": 32,
        "r": 0,
        "use_cayley_neumann": True,
    },
    {"block_share": False, "coft": False, "module_dropout": 0.0},
)

WEIGHT_UPDATES = (
    Converter("VERA", (VeRA,), _VERA_SCHEMA, _read_vera, _vera_links, _write_vera, prefix="vera_"),
    Converter(
        "LOHA",
        (LoHa,),
        Schema(_LYCORIS_USED, _LYCORIS_REFUSED),
        _read_loha,
        _loha_links,
        _write_lycoris,
        prefix="hada_",
    ),
    Converter("LOKR", (LoKr,), _LOKR_SCHEMA, _read_lokr, _lokr_links, _write_lokr, prefix="lokr_"),
    Converter("OFT", (OFT,), _OFT_SCHEMA, _read_oft, _oft_links, _write_oft, prefix="oft_"),
)
