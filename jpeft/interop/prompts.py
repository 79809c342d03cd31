"""Prompt tuning and P-tuning: `prompt_embeddings` [n, D], the rows that the encoder of P-tuning has made.

For encoder-decoders PEFT stores 2 n rows, of which its models use the first n, before the encoder's input.
"""

from __future__ import annotations

from typing import Any

from jpeft.errors import JpeftError
from jpeft.interop.config import Schema, Settings
from jpeft.interop.converter import Converter, Tensors
from jpeft.interop.links import Link, View
from jpeft.interop.names import places
from jpeft.methods import PromptTuning, PTuning
from jpeft.methods.prompt_wrappers import PromptWrapper
from jpeft.models.model import Model
from jpeft.virtual_tokens import prompt_of

NAME = "prompt_embeddings"

SHAPE: dict[str, Any] = {
    "modules_to_save": None,
    "num_attention_heads": None,
    "num_layers": None,
    "num_transformer_submodules": None,
    "num_virtual_tokens": None,
    "token_dim": None,
}
_PROMPT = Schema(
    {
        **SHAPE,
        "prompt_tuning_init": "RANDOM",
        "prompt_tuning_init_text": None,
        "tokenizer_kwargs": None,
        "tokenizer_name_or_path": None,
    }
)
_ENCODED = Schema(
    {
        **SHAPE,
        "encoder_dropout": 0.0,
        "encoder_hidden_size": None,
        "encoder_num_layers": 2,
        "encoder_reparameterization_type": "MLP",
    }
)


def _read(settings: Settings, model: Model, tensors: Tensors) -> PromptTuning:
    return PromptTuning(num_virtual_tokens=settings.integer("num_virtual_tokens"))


def _links(model: Model, method: PromptTuning, settings: Settings | None) -> list[Link]:
    node = next(place.node for place in places(model) if isinstance(place.node.module, PromptWrapper))
    count, width = method.num_virtual_tokens, node.module.features
    rows = count * submodules(model)
    return [Link(f"{node.name}/{method.name}/embeddings", None, NAME, (rows, width), theirs=_first(count))]


def _first(count: int) -> View:
    return lambda tensor: tensor[:count]


def submodules(model: Model) -> int:
    """PEFT's `num_transformer_submodules`."""
    return 2 if model.task == "seq2seq-lm" else 1


def sizes(model: Model, count: int) -> dict[str, Any]:
    """The fields that tell the shape of what is stored, which PEFT makes its own arrays from."""
    heads = next(
        int(value)
        for name in ("num_attention_heads", "num_heads")
        if (value := getattr(model.config, name, None)) is not None
    )
    return {
        "num_attention_heads": heads,
        "num_layers": model.config.num_hidden_layers,
        "num_transformer_submodules": submodules(model),
        "num_virtual_tokens": count,
        "token_dim": model.config.hidden_size,
    }


def _write(model: Model, method: PromptTuning | PTuning) -> dict[str, Any]:
    if method.position != "front":
        raise JpeftError(
            f"save_peft: {type(method).__name__} has position={method.position!r}, and PEFT puts virtual tokens "
            "in front only; jpeft.save_adapter saves every position"
        )
    wrapper = prompt_of(model)
    if wrapper is None or (wrapper.base is not None and wrapper.base.features != model.config.hidden_size):
        raise JpeftError("save_peft: the virtual tokens are not those of the model's token embedding")
    return sizes(model, method.num_virtual_tokens)


def _write_encoded(model: Model, method: PTuning) -> dict[str, Any]:
    return {
        **_write(model, method),
        "encoder_hidden_size": method.hidden_size or model.config.hidden_size,
        "encoder_num_layers": method.encoder_layers if method.encoder == "lstm" else 2,
        "encoder_reparameterization_type": method.encoder.upper(),
    }


PROMPT_TUNING = Converter("PROMPT_TUNING", (PromptTuning,), _PROMPT, _read, _links, _write)
P_TUNING = Converter(
    "P_TUNING", (PTuning,), _ENCODED, _read, _links, _write_encoded, training=lambda method: isinstance(method, PTuning)
)
