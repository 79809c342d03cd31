"""Prefix tuning and P-tuning v2: `prompt_embeddings` [P, layers * 2 * width], for each layer keys, then values.

Decoders and encoders only. In encoder-decoders PEFT gives a prefix to the decoder's self-attention alone, lets two
layers share each row, and adds T5's relative position bias to it, which here a prefix has none of.
"""

from __future__ import annotations

from typing import Any

from jpeft.errors import JpeftError
from jpeft.interop.config import Schema, Settings
from jpeft.interop.converter import Converter, Tensors
from jpeft.interop.links import Link, View
from jpeft.interop.names import places
from jpeft.interop.prompts import NAME, SHAPE, sizes, submodules
from jpeft.methods import PrefixTuning, PTuningV2
from jpeft.methods.prefix import kv_shape
from jpeft.models.model import Model
from jpeft.paths import Node
from jpeft.wrapper import innermost

_SCHEMA = Schema({**SHAPE, "encoder_hidden_size": None, "init_weights": None, "prefix_projection": False})


def _read(settings: Settings, model: Model, tensors: Tensors) -> PrefixTuning:
    settings.flag("prefix_projection", False)  # what is stored is the result
    _refuse_two_stacks(model, settings.where)
    return PrefixTuning(num_virtual_tokens=settings.integer("num_virtual_tokens"), reparameterize=False)


def _refuse_two_stacks(model: Model, where: str) -> None:
    if submodules(model) == 2:
        raise JpeftError(
            f"{where}: prefix tuning of encoder-decoders is another function in PEFT (the decoder's self-attention "
            "alone, layers that share rows, a relative position bias on the prefix); jpeft.save_adapter saves the one "
            "here"
        )


def _nodes(model: Model) -> list[Node]:
    """The attention modules, in the order of the layers."""
    every = {place.node.name: place.node for place in places(model)}
    return [node for node in every.values() if hasattr(innermost(node.module), "attention_fn")]


def _links(model: Model, method: PrefixTuning, settings: Settings | None) -> list[Link]:
    layers = [(node, member) for node in _nodes(model) for member in node.members]
    heads, width = kv_shape(layers[0][0])
    count, total = method.num_virtual_tokens, len(layers)
    shape = (count, total * 2 * heads * width)
    made = []
    for number, (node, member) in enumerate(layers):
        for side, part in enumerate(("keys", "values")):
            view = _rows(count, total, heads, number, side)
            made.append(Link(f"{node.name}/attention_fn/{method.name}/{part}", member, NAME, shape, theirs=view))
    return made


def _rows(count: int, layers: int, heads: int, layer: int, side: int) -> View:
    return lambda tensor: tensor.reshape(count, layers, 2, heads, -1)[:, layer, side]


def _write(model: Model, method: PrefixTuning) -> dict[str, Any]:
    _refuse_two_stacks(model, "save_peft")
    wanted = {node.name for node in _nodes(model)}
    chosen = method.resolve(model)
    if {node.name for node, _ in chosen} != wanted or any(layers is not None for _, layers in chosen):
        raise JpeftError(
            f"save_peft: PEFT's prefix is on every layer of {', '.join(sorted(wanted))}, and {type(method).__name__} "
            "here is on others; leave out targets= and layers=, or use jpeft.save_adapter"
        )
    heads, width = kv_shape(chosen[0][0])
    return {**sizes(model, method.num_virtual_tokens), "num_attention_heads": heads, "token_dim": heads * width}


PREFIX_TUNING = Converter(
    "PREFIX_TUNING",
    (PrefixTuning, PTuningV2),
    _SCHEMA,
    _read,
    _links,
    _write,
    training=lambda method: method.reparameterize,
)
