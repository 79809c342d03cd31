"""What T5's config.json says, in its several dialects."""

from __future__ import annotations

import dataclasses
import json

from jpeft.models.config import Config, Fields
from jpeft.models.layers import ACTIVATIONS


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderDecoderConfig(Config):
    """What config.json of a T5 says about the architecture.

    scale_outputs: multiply the decoder's output by hidden_size**-0.5 in front of the logits, as version 1.0 does.
    """

    d_kv: int
    d_ff: int
    num_heads: int
    num_decoder_layers: int
    relative_attention_num_buckets: int
    relative_attention_max_distance: int
    layer_norm_epsilon: float
    initializer_factor: float
    act: str
    gated: bool
    scale_outputs: bool
    decoder_start_token_id: int | None


def parse(fields: Fields) -> EncoderDecoderConfig:
    """The configuration in a config.json of model_type "t5".

    Version 1.1 says `tie_word_embeddings: false`, by which it means two things: an output layer of its own, and no
    scaling. transformers 5 writes `scale_decoder_outputs` for the second and always true for the first.
    """
    width, layers = fields.integer("d_model", 512), fields.integer("num_layers", 6)
    shared = fields.shared(
        vocab_size=32128, hidden_size=width, num_hidden_layers=layers, pad_token_id=0, eos_token_id=1
    )
    scale = fields.flag("scale_decoder_outputs", shared["tie_word_embeddings"])
    # A file may have an output layer although it claims to be tied: what is saved again must keep the scaling.
    shared["source"] = json.dumps({**fields.raw, "scale_decoder_outputs": scale}, sort_keys=True)
    kind = fields.text("feed_forward_proj", "relu")
    gated, act = kind.startswith("gated-"), kind.removeprefix("gated-")
    if act not in ACTIVATIONS:
        raise fields.refuse("feed_forward_proj", f'one of {list(ACTIVATIONS)}, or "gated-" and one of them')
    buckets = fields.integer("relative_attention_num_buckets", 32, minimum=4)
    decoders = fields.optional_integer("num_decoder_layers")
    return EncoderDecoderConfig(
        **shared,
        d_kv=fields.integer("d_kv", 64),
        d_ff=fields.integer("d_ff", 2048),
        num_heads=fields.integer("num_heads", 8),
        num_decoder_layers=layers if decoders is None else decoders,
        relative_attention_num_buckets=buckets,
        relative_attention_max_distance=fields.integer(
            "relative_attention_max_distance", 128, minimum=buckets // 2 + 1
        ),
        layer_norm_epsilon=fields.number("layer_norm_epsilon", 1e-6),
        initializer_factor=fields.number("initializer_factor", 1.0),
        act="gelu_new" if kind == "gated-gelu" else act,
        gated=gated,
        scale_outputs=scale,
        decoder_start_token_id=fields.token("decoder_start_token_id", shared["pad_token_id"]),
    )
