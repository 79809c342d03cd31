"""Bottleneck adapters as AdapterHub's `adapters` 1.3.0 saves them with `use_safetensors=True`: read onto a model.

    bert.encoder.layer.0.attention.output.adapters.NAME.adapter_down.0.weight    [width, D], behind attention
    bert.encoder.layer.0.output.adapters.NAME.adapter_up.weight                  [D, width], behind the feed-forward
    model.layers.0.attention_adapters.adapters.NAME...                           in decoders, likewise
    model.layers.0.output_adapters.adapters.NAME.scaling                         [1], where it is learned

Only what computes the same is read. AdapterHub's Pfeiffer adapters pass through the model's own norm first
(`original_ln_before`) unless told otherwise, and its parallel adapters start, in models whose norms come first, from
what no norm has seen.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from jpeft.errors import JpeftError
from jpeft.interop import folder
from jpeft.interop.config import Schema, Settings
from jpeft.interop.converter import Tensors
from jpeft.interop.links import Link, View, check, filled, turned
from jpeft.interop.load import abstract, combined
from jpeft.interop.names import Place, model_and_family, places
from jpeft.methods import Houlsby, Method, ParallelAdapter, Pfeiffer
from jpeft.methods.bottleneck_wrappers import Bottleneck
from jpeft.models.model import Model
from jpeft.partition import partition
from jpeft.targets import role
from jpeft.wrapper import Wrapper

WEIGHTS = "adapter.safetensors"
_NORM_LAST = ("bert", "roberta")
_FAMILIES = (*_NORM_LAST, "gpt2", "llama", "mistral")
_ACTIVATIONS = {name: name for name in ("relu", "gelu", "gelu_new", "swish", "silu", "tanh")} | {
    "leakyrelu": "leaky_relu"
}

_USED = """adapter_residual_before_ln architecture dropout factorized_phm_W factorized_phm_rule
    hypercomplex_nonlinearity init_weights init_weights_seed inv_adapter_reduction_factor is_parallel learn_phm
    leave_out mh_adapter non_linearity original_ln_after output_adapter phm_bias phm_c_init phm_dim phm_init_range
    phm_rank reduction_factor residual_before_ln scaling shared_W_phm shared_phm_rule stochastic_depth"""
_REFUSED = "cross_adapter inv_adapter ln_after ln_before original_ln_before phm_layer use_gating"
_SCHEMA = Schema(used=dict.fromkeys(_USED.split()), refused=dict.fromkeys(_REFUSED.split(), False))
_LAYER = re.compile(r".*?\.(\d+)\.")

_M = TypeVar("_M", bound=Model)


def load_bottleneck(model: _M, where: Path) -> _M:
    """`model` with the adapter saved in the folder `where`; see `load_adapterhub`."""
    model, _ = model_and_family(model, "load_adapterhub")  # type: ignore[assignment]
    raw = folder.read_config(where)
    at = str(where / folder.CONFIG)
    settings = Settings({"peft_type": "bottleneck", **_config(raw, at)}, at)
    settings.conform(_SCHEMA)
    name = raw.get("name")
    if not isinstance(name, str) or not name:
        raise JpeftError(f"{at}: name = {str(name)[:60]!r}: expected the adapter's name")
    file = folder.read_weights(where, WEIGHTS)
    widths = _widths(settings, file.tensors)
    method = _method(settings, model, widths)
    adapted = abstract((method,), model, at)
    links = _links(adapted, method, name, widths)
    check(links, file.tensors, (), file.where)
    graphdef, adapter, buffers, _ = partition(adapted)
    values = filled(links, {**adapter, **buffers}, lambda tensor: folder.read_tensor(file, tensor))
    return combined((method,), model, graphdef, adapter, buffers, values)


def _config(raw: dict[str, Any], where: str) -> dict[str, Any]:
    config = raw.get("config")
    if not isinstance(config, dict):
        raise JpeftError(
            f"{where}: expected the fields of a bottleneck adapter under 'config', found {str(config)[:60]!r}"
        )
    architecture = config.get("architecture")
    if architecture is not None or "mh_adapter" not in config:
        raise JpeftError(f"{where}: the adapter is no bottleneck adapter (architecture {str(architecture)[:60]!r})")
    return {name: value for name, value in config.items() if name != "peft_type"}


def _method(settings: Settings, model: Model, widths: dict[int, int]) -> Method:
    family = model.config.model_type
    if family not in _FAMILIES:
        raise JpeftError(f"{settings.where}: adapters on {family!r} are not read; those on {list(_FAMILIES)} are")
    if not settings.flag("original_ln_after", True) or settings.raw.get("residual_before_ln") == "post_add":
        raise JpeftError(
            f"{settings.where}: original_ln_after = false and residual_before_ln = 'post_add' have no counterpart here"
        )
    attention, feed_forward = settings.flag("mh_adapter", False), settings.flag("output_adapter", True)
    left_out = settings.numbers("leave_out")
    layers = tuple(n for n in range(model.config.num_hidden_layers) if n not in left_out) if left_out else None
    activation = settings.choice("non_linearity", "relu", tuple(_ACTIVATIONS))
    scaling = settings.raw.get("scaling", 1.0)
    common: dict[str, Any] = {
        "activation": _ACTIVATIONS[activation],
        "bottleneck_size": max(widths.values()),
        "bottleneck_pattern": _narrower(model, widths),
        "dropout": settings.rate("dropout"),
        "layers": layers,
        "scaling": scaling if scaling == "learned" else settings.real("scaling", 1.0),
    }
    if settings.flag("is_parallel", False):
        if family not in _NORM_LAST or attention or not feed_forward:
            raise JpeftError(
                f"{settings.where}: parallel adapters are read on {list(_NORM_LAST)} and beside the feed-forward; in "
                f"{family!r} AdapterHub's start from what no norm has seen, which is another function than here"
            )
        return ParallelAdapter(**common)
    if attention and feed_forward:
        return Houlsby(train_norms=False, **common)
    if feed_forward:
        return Pfeiffer(**common)
    if attention:
        return Pfeiffer(targets=role(model, "attention_output", "load_adapterhub"), **common)
    raise JpeftError(f"{settings.where}: neither mh_adapter nor output_adapter is true, so there is no adapter")


def _widths(settings: Settings, tensors: Tensors) -> dict[int, int]:
    """The width of the bottlenecks of each layer, which the file's tensors tell; a reduction factor may be by layer."""
    found: dict[int, set[int]] = {}
    for name, info in tensors.items():
        if name.endswith(".adapter_down.0.bias") and info.shape and (layer := _LAYER.match(name)):
            found.setdefault(int(layer[1]), set()).add(info.shape[0])
    if not found or any(len(widths) != 1 or 0 in widths for widths in found.values()):
        raise JpeftError(
            f"{settings.where}: expected adapters of one width in each layer, found "
            f"{ {layer: sorted(widths) for layer, widths in sorted(found.items())} } "
            f"(reduction_factor = {str(settings.raw.get('reduction_factor'))[:60]})"
        )
    return {layer: widths.pop() for layer, widths in found.items()}


def _narrower(model: Model, widths: dict[int, int]) -> dict[str, int]:
    """The widths of layers that have not the largest, by the names of these layers here."""
    names = {
        place.node.layer(place.member): place.node.expanded(place.member)
        for place in places(model)
        if place.node.layer(place.member) is not None
    }
    found = {}
    for layer, width in sorted(widths.items()):
        if width < max(widths.values()) and layer in names:
            match = _LAYER.match(names[layer])
            assert match is not None
            found[match[0].removesuffix(".")] = width
    return found


def _placed(model: Model, method: Any) -> Iterator[tuple[Place, int | None, Bottleneck]]:
    for place in places(model):
        module = place.node.module
        while isinstance(module, Wrapper):
            if isinstance(module, Bottleneck) and module.name == method.name:
                layers, member = module.layers, place.member
                if layers is None or member in layers:
                    yield place, member if layers is None or member is None else layers.index(member), module
            module = module.base


def _links(model: Model, method: Any, name: str, widths: dict[int, int]) -> list[Link]:
    made = []
    for place, row, wrapper in _placed(model, method):
        key, before = f"{place.node.name}/{method.name}/", f"{holder(model, place)}.adapters.{name}."
        inputs, widest = wrapper.down.shape[-2:]
        outputs = wrapper.up.shape[-1]
        layer = place.node.layer(place.member)
        width = widest if layer is None else widths.get(layer, widest)
        own = _first(width)  # the rest of a narrower layer is zeros
        made += [
            Link(key + "down", row, before + "adapter_down.0.weight", (width, inputs), _first_turned(width)),
            Link(key + "down_bias", row, before + "adapter_down.0.bias", (width,), own),
            Link(key + "up", row, before + "adapter_up.weight", (outputs, width), own, turned),
            Link(key + "up_bias", row, before + "adapter_up.bias", (outputs,)),
        ]
        if method.scaling == "learned":
            made.append(Link(key + "scale", None, before + "scaling", (1,), _entry(row)))
    return made


def _first(width: int) -> View:
    """The view of the first units of a network."""
    return lambda array: array[:width]


def _first_turned(width: int) -> View:
    return lambda array: array[:, :width].T


def _entry(row: int | None) -> Any:
    """The view of one layer's number, [1]."""
    return lambda scale: scale.reshape(-1)[slice(row, None if row is None else row + 1)]


def holder(model: Model, place: Place) -> str:
    """The module of AdapterHub's model that holds the adapter of a place."""
    if model.config.model_type in _NORM_LAST:
        return place.name.removesuffix(".dense")
    layer = re.match(r".*?\.\d+(?=\.)", place.name)
    assert layer is not None
    attention = re.search(r"\.(self_attn|attn)\.", place.name)
    return layer[0] + (".attention_adapters" if attention else ".output_adapters")
