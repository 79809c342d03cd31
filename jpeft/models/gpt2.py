"""GPT-2 (Radford et al., 2019): learned positions, LayerNorm, one matrix for queries, keys and values.

Its checkpoints store the layers' weights [in, out], as `nnx.Linear` does.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
from flax import nnx
from flax.core import FrozenDict
from jax.sharding import PartitionSpec

from jpeft.errors import JpeftError
from jpeft.models.attention import Attends, Attention
from jpeft.models.causal import CacheSlot, CausalModel, ClassifierHead, LanguageHead, LayerMasks
from jpeft.models.config import Config, Fields
from jpeft.models.families import Family
from jpeft.models.layers import ACTIVATIONS, activation, embed, layer_norm, linear
from jpeft.models.model import READS, WRITES
from jpeft.stack import Stack, run_layers
from jpeft.virtual_tokens import most_positions


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPT2Config(Config):
    """scale_weights: divide the scores by sqrt(head width). scale_by_layer: and by the layer's number from 1."""

    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    activation: str
    layer_norm_eps: float
    scale_weights: bool
    scale_by_layer: bool


class SelfAttention(Attends):
    """Causal self-attention."""

    def __init__(self, config: GPT2Config, *, attention: Attention, param_dtype: Any, rngs: nnx.Rngs):
        make = functools.partial(linear, bias=True, stddev=config.initializer_range, param_dtype=param_dtype, rngs=rngs)
        self.c_attn = make(config.hidden_size, 3 * config.hidden_size)
        self.c_proj = make(config.hidden_size, config.hidden_size)
        self.heads = config.num_attention_heads
        self.scale = None if config.scale_weights else 1.0
        self.scale_by_layer = config.scale_by_layer
        self.attention_fn = attention

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return self.c_attn.in_features

    @property
    def kv_shape(self) -> tuple[int, int]:
        """(heads, head width) of the keys and values."""
        return self.heads, self.c_proj.in_features // self.heads

    def __call__(
        self, x: jax.Array, index: Any, masks: LayerMasks, arrays: Any, slot: CacheSlot | None
    ) -> tuple[jax.Array, Any]:
        """x [B, T, D] and the cache's arrays, to the same."""
        batch, length, features = x.shape
        mixed = self.c_attn(x).reshape(batch, length, 3, self.heads, features // self.heads)
        q, k, v = mixed[:, :, 0], mixed[:, :, 1], mixed[:, :, 2]  # [B, T, N, H]
        if self.scale_by_layer:
            q = (q / (index + 1)).astype(q.dtype)
        if slot is not None:
            arrays, k, v = slot.write(arrays, index, k, v)
        mask = masks.at(index)
        out = self.attention_fn(
            q, k.astype(q.dtype), v.astype(q.dtype), mask=mask, is_causal=mask is None, scale=self.scale
        )
        return self.c_proj(out.reshape(batch, length, features)), arrays


class MLP(nnx.Module):
    """`c_proj(act(c_fc(x)))`."""

    def __init__(self, config: GPT2Config, *, param_dtype: Any, rngs: nnx.Rngs):
        make = functools.partial(linear, bias=True, stddev=config.initializer_range, param_dtype=param_dtype, rngs=rngs)
        self.c_fc = make(config.hidden_size, config.intermediate_size)
        self.c_proj = make(config.intermediate_size, config.hidden_size)
        self.act = config.activation

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return self.c_fc.in_features

    @property
    def out_features(self) -> int:
        """Width of the output."""
        return self.c_proj.out_features

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.c_proj(activation(self.act)(self.c_fc(x)))


class Layer(nnx.Module):
    """One layer; its carry is (x, the cache's arrays or None)."""

    def __init__(self, config: GPT2Config, *, attention: Attention, param_dtype: Any, rngs: nnx.Rngs):
        norm = functools.partial(
            layer_norm, config.hidden_size, epsilon=config.layer_norm_eps, param_dtype=param_dtype, rngs=rngs
        )
        self.ln_1 = norm()
        self.attn = SelfAttention(config, attention=attention, param_dtype=param_dtype, rngs=rngs)
        self.ln_2 = norm()
        self.mlp = MLP(config, param_dtype=param_dtype, rngs=rngs)

    def __call__(
        self, carry: tuple[jax.Array, Any], index: Any, masks: LayerMasks, slot: CacheSlot | None
    ) -> tuple[jax.Array, Any]:
        x, arrays = carry
        attended, arrays = self.attn(self.ln_1(x), index, masks, arrays, slot)
        x = x + attended
        return x + self.mlp(self.ln_2(x)), arrays


class GPT2(CausalModel):
    """The model without a head."""

    base_prefix = "transformer"
    embedding = "wte"
    roles = FrozenDict(
        attention=("attn",),
        query=("c_attn",),
        key=("c_attn",),
        value=("c_attn",),
        attention_output=("attn.c_proj",),
        feed_forward=("mlp",),
        feed_forward_output=("mlp.c_proj",),
        norm=(r"ln_.*",),
        embedding=("wte",),
    )
    # The vocabulary of 50,257 can be cut into nothing.
    sharding_rules = FrozenDict({"c_attn": READS, "c_fc": READS, "c_proj": WRITES, "wte": PartitionSpec(None, "fsdp")})
    config: GPT2Config

    def __init__(
        self,
        config: GPT2Config,
        *,
        param_dtype: Any,
        remat: bool,
        attention: Attention,
        rngs: nnx.Rngs,
        pooling: str | None = None,
    ):
        super().__init__(config, attention=attention)
        width = config.hidden_size // config.num_attention_heads
        self.cache_shape = (config.num_hidden_layers, config.num_attention_heads, width)
        table = functools.partial(
            embed, features=config.hidden_size, stddev=config.initializer_range, param_dtype=param_dtype, rngs=rngs
        )
        self.wte = table(config.vocab_size)
        self.wpe = table(config.max_position_embeddings)

        def make(rngs: nnx.Rngs) -> Layer:
            return Layer(config, attention=attention, param_dtype=param_dtype, rngs=rngs)

        self.h = Stack.create(make, config.num_hidden_layers, rngs=rngs, remat=remat)
        self.ln_f = layer_norm(config.hidden_size, epsilon=config.layer_norm_eps, param_dtype=param_dtype, rngs=rngs)

    def run(
        self, input_ids: jax.Array, positions: jax.Array, layer_masks: LayerMasks, arrays: Any, slot: CacheSlot | None
    ) -> tuple[jax.Array, Any]:
        """Embedding, layers and final norm, and the cache's arrays after them."""
        taken = most_positions(self)
        if taken + input_ids.shape[1] > self.config.max_position_embeddings:
            behind = f" behind a prefix of {taken}" if taken else ""
            raise JpeftError(
                f"input_ids: {input_ids.shape[1]} tokens{behind}, but this model has learned positions for "
                f"{self.config.max_position_embeddings}; cut the texts"
            )
        x = self.embedded(self.wte(input_ids) + self.wpe(positions))
        x, arrays = run_layers(self.h, (x, arrays), layer_masks, slot)
        return self.by_rows(self.ln_f(x)), arrays


class GPT2LM(LanguageHead, GPT2):
    """With logits over the vocabulary."""


class GPT2Classifier(ClassifierHead, GPT2):
    """With a head for sequence classification."""


# GPT-2's own names of the shared fields.
_OWN_NAMES = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}


def parse(fields: Fields) -> GPT2Config:
    """Reads a config.json."""
    usual = {
        name: fields.integer(own, default)
        for (name, own), default in zip(_OWN_NAMES.items(), (768, 12, 12), strict=True)
    }
    heads = usual["num_attention_heads"]
    if usual["hidden_size"] % heads:
        raise fields.refuse("n_embd", f"a multiple of n_head, {heads}")
    if fields.flag("add_cross_attention", False):
        raise fields.refuse("add_cross_attention", "false: GPT-2 is a decoder alone here")
    shared = fields.shared(
        vocab_size=50257,
        hidden_size=usual["hidden_size"],
        num_hidden_layers=usual["num_hidden_layers"],
        bos_token_id=50256,
        eos_token_id=50256,
    )
    return GPT2Config(
        **{**shared, **usual},
        intermediate_size=fields.optional_integer("n_inner") or 4 * usual["hidden_size"],
        max_position_embeddings=fields.integer("n_positions", 1024),
        activation=fields.choice("activation_function", "gelu_new", ACTIVATIONS),
        layer_norm_eps=fields.number("layer_norm_epsilon", 1e-5),
        scale_weights=fields.flag("scale_attn_weights", True),
        scale_by_layer=fields.flag("scale_attn_by_inverse_layer_idx", False),
    )


FAMILIES = {
    "gpt2": Family(
        model_type="gpt2",
        parse=parse,
        classes={"base": GPT2, "causal-lm": GPT2LM, "sequence-classification": GPT2Classifier},
        architectures={
            "GPT2Model": "base",
            "GPT2LMHeadModel": "causal-lm",
            "GPT2ForSequenceClassification": "sequence-classification",
        },
        untransposed=("c_attn", "c_proj", "c_fc"),
        tied=("lm_head.weight", "wte.weight"),
        ignored=(r"lm_head\.weight", r"score\.weight"),
    )
}
