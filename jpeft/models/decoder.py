"""The Llama family of decoders: Llama 2 and 3, SmolLM, Mistral, Qwen2 and Qwen3.

RMSNorm before attention and a gated feed-forward, rotary positions, grouped key-value heads (Touvron et al., 2023).
The families differ in biases, norms of queries and keys, and sliding windows: all of it is in `DecoderConfig`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
from flax import nnx
from flax.core import FrozenDict

from jpeft.models.attention import Attends, Attention
from jpeft.models.causal import CacheSlot, CausalModel, ClassifierHead, LanguageHead, LayerMasks
from jpeft.models.config import Config, Fields
from jpeft.models.families import Family
from jpeft.models.layers import ACTIVATIONS, RMSNorm, embed, gated, linear
from jpeft.models.model import READS, WRITES
from jpeft.models.rope import Rope, parse_rope, rotate
from jpeft.stack import Stack, run_layers


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig(Config):
    """qkv_bias, o_bias, mlp_bias: which linear layers have one. qk_norm: RMSNorm of queries and keys per head.

    layer_windows: for each layer, whether it sees only the last `sliding_window` tokens.
    """

    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_act: str
    rms_norm_eps: float
    max_position_embeddings: int
    rope: Rope
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    sliding_window: int | None
    layer_windows: tuple[bool, ...]


class SelfAttention(Attends):
    """Causal self-attention with rotary positions."""

    def __init__(self, config: DecoderConfig, *, attention: Attention, param_dtype: Any, rngs: nnx.Rngs):
        make = functools.partial(linear, stddev=config.initializer_range, param_dtype=param_dtype, rngs=rngs)
        heads, groups, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.q_proj = make(config.hidden_size, heads * width, bias=config.qkv_bias)
        self.k_proj = make(config.hidden_size, groups * width, bias=config.qkv_bias)
        self.v_proj = make(config.hidden_size, groups * width, bias=config.qkv_bias)
        self.o_proj = make(heads * width, config.hidden_size, bias=config.o_bias)
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            self.q_norm = RMSNorm(width, epsilon=config.rms_norm_eps, param_dtype=param_dtype)
            self.k_norm = RMSNorm(width, epsilon=config.rms_norm_eps, param_dtype=param_dtype)
        self.head_dim = width
        self.attention_fn = attention

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return self.q_proj.in_features

    @property
    def kv_shape(self) -> tuple[int, int]:
        """(heads, head width) of the keys and values."""
        return self.k_proj.out_features // self.head_dim, self.head_dim

    def __call__(
        self, x: jax.Array, index: Any, angles: Any, masks: LayerMasks, arrays: Any, slot: CacheSlot | None
    ) -> tuple[jax.Array, Any]:
        """x [B, T, D] and the cache's arrays, to the same."""
        batch, length = x.shape[:2]
        q, k, v = (
            project(x).reshape(batch, length, -1, self.head_dim)  # [B, T, heads, H]
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, *angles), rotate(k, *angles)
        if slot is not None:
            arrays, k, v = slot.write(arrays, index, k, v)
        mask = masks.at(index)
        out = self.attention_fn(q, k.astype(q.dtype), v.astype(q.dtype), mask=mask, is_causal=mask is None)
        return self.o_proj(out.reshape(batch, length, -1)), arrays


class MLP(nnx.Module):
    """`down_proj(act(gate_proj(x)) * up_proj(x))`."""

    def __init__(self, config: DecoderConfig, *, param_dtype: Any, rngs: nnx.Rngs):
        make = functools.partial(
            linear, bias=config.mlp_bias, stddev=config.initializer_range, param_dtype=param_dtype, rngs=rngs
        )
        self.gate_proj = make(config.hidden_size, config.intermediate_size)
        self.up_proj = make(config.hidden_size, config.intermediate_size)
        self.down_proj = make(config.intermediate_size, config.hidden_size)
        self.act = config.hidden_act

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return self.up_proj.in_features

    @property
    def out_features(self) -> int:
        """Width of the output."""
        return self.down_proj.out_features

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(gated(self.act, self.gate_proj(x), self.up_proj(x)))


class Layer(nnx.Module):
    """One decoder layer; its carry is (x, the cache's arrays or None)."""

    def __init__(self, config: DecoderConfig, *, attention: Attention, param_dtype: Any, rngs: nnx.Rngs):
        norm = functools.partial(RMSNorm, config.hidden_size, epsilon=config.rms_norm_eps, param_dtype=param_dtype)
        self.input_layernorm = norm()
        self.self_attn = SelfAttention(config, attention=attention, param_dtype=param_dtype, rngs=rngs)
        self.post_attention_layernorm = norm()
        self.mlp = MLP(config, param_dtype=param_dtype, rngs=rngs)

    def __call__(
        self, carry: tuple[jax.Array, Any], index: Any, angles: Any, masks: LayerMasks, slot: CacheSlot | None
    ) -> tuple[jax.Array, Any]:
        x, arrays = carry
        attended, arrays = self.self_attn(self.input_layernorm(x), index, angles, masks, arrays, slot)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), arrays


class Decoder(CausalModel):
    """The model without a head."""

    base_prefix = "model"
    embedding = "embed_tokens"
    roles = FrozenDict(
        attention=("self_attn",),
        query=("q_proj",),
        key=("k_proj",),
        value=("v_proj",),
        attention_output=("o_proj",),
        feed_forward=("mlp",),
        feed_forward_output=("down_proj",),
        norm=(r".*norm",),
        embedding=("embed_tokens",),
    )
    sharding_rules = FrozenDict(
        {
            r"(q|k|v|gate|up)_proj": READS,
            r"(o|down)_proj": WRITES,
            "embed_tokens": WRITES,
            "lm_head": READS,
        }
    )
    config: DecoderConfig

    def __init__(
        self,
        config: DecoderConfig,
        *,
        param_dtype: Any,
        remat: bool,
        attention: Attention,
        rngs: nnx.Rngs,
        pooling: str | None = None,
    ):
        super().__init__(config, attention=attention)
        self.cache_shape = (config.num_hidden_layers, config.num_key_value_heads, config.head_dim)
        self.embed_tokens = embed(
            config.vocab_size, config.hidden_size, stddev=config.initializer_range, param_dtype=param_dtype, rngs=rngs
        )

        def make(rngs: nnx.Rngs) -> Layer:
            return Layer(config, attention=attention, param_dtype=param_dtype, rngs=rngs)

        self.layers = Stack.create(make, config.num_hidden_layers, rngs=rngs, remat=remat)
        self.norm = RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps, param_dtype=param_dtype)

    def sliding(self) -> tuple[int | None, tuple[bool, ...]]:
        """The window, and for each layer whether it has it."""
        return self.config.sliding_window, self.config.layer_windows

    def run(
        self, input_ids: jax.Array, positions: jax.Array, layer_masks: LayerMasks, arrays: Any, slot: CacheSlot | None
    ) -> tuple[jax.Array, Any]:
        """Embedding, layers and final norm, and the cache's arrays after them."""
        x = self.embedded(self.embed_tokens(input_ids))
        angles = self.config.rope(positions, self.config.head_dim, x.dtype)
        x, arrays = run_layers(self.layers, (x, arrays), angles, layer_masks, slot)
        return self.by_rows(self.norm(x)), arrays


class DecoderLM(LanguageHead, Decoder):
    """With logits over the vocabulary."""


class DecoderClassifier(ClassifierHead, Decoder):
    """With a head for sequence classification."""


# transformers' defaults where they differ from Llama's.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"vocab_size": 32000, "intermediate_size": 11008, "context": 2048, "bos": 1, "eos": 2},
    "mistral": {"vocab_size": 32000, "intermediate_size": 14336, "context": 131072, "bos": 1, "eos": 2, "groups": 8},
    "qwen2": {"vocab_size": 151936, "intermediate_size": 22016, "context": 32768, "groups": 32},
    "qwen3": {"vocab_size": 151936, "intermediate_size": 22016, "context": 32768, "groups": 32, "head_dim": 128},
}


def parse(fields: Fields) -> DecoderConfig:
    """Reads the config.json of any of the families."""
    kind = fields.text("model_type")
    default = _DEFAULTS[kind]
    shared = fields.shared(
        vocab_size=default["vocab_size"],
        hidden_size=4096,
        num_hidden_layers=32,
        tie_word_embeddings=False,
        bos_token_id=default.get("bos"),
        eos_token_id=default.get("eos"),
    )
    heads = fields.integer("num_attention_heads", 32)
    groups = fields.optional_integer("num_key_value_heads", default.get("groups")) or heads
    if heads % groups:
        raise fields.refuse("num_key_value_heads", f"a divisor of num_attention_heads, {heads}")
    width = fields.optional_integer("head_dim", default.get("head_dim"))
    if width is None:
        if shared["hidden_size"] % heads:
            raise fields.refuse("hidden_size", f"a multiple of num_attention_heads, {heads}, or head_dim beside it")
        width = shared["hidden_size"] // heads
    if width % 2:
        raise fields.refuse("head_dim", f"an even number (rotary positions turn pairs), found {width}")
    context = fields.integer("max_position_embeddings", default["context"])
    own_bias = fields.flag("attention_bias", False) if kind in ("llama", "qwen3") else False
    window, windows = _windows(fields, kind, shared["num_hidden_layers"])
    return DecoderConfig(
        **shared,
        intermediate_size=fields.integer("intermediate_size", default["intermediate_size"]),
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=width,
        hidden_act=fields.choice("hidden_act", "silu", ACTIVATIONS),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        max_position_embeddings=context,
        rope=parse_rope(fields, context),
        qkv_bias=kind == "qwen2" or own_bias,
        o_bias=own_bias,
        mlp_bias=fields.flag("mlp_bias", False) if kind == "llama" else False,
        qk_norm=kind == "qwen3",
        sliding_window=window,
        layer_windows=windows,
    )


def _windows(fields: Fields, kind: str, layers: int) -> tuple[int | None, tuple[bool, ...]]:
    everywhere = (False,) * layers
    if kind == "llama":
        return None, everywhere
    window = fields.optional_integer("sliding_window", 4096)
    if kind == "mistral":
        return window, (window is not None,) * layers
    if not fields.flag("use_sliding_window", False) or window is None:
        return None, everywhere
    kinds = fields.texts("layer_types")
    if kinds is None:
        first = fields.integer("max_window_layers", 28, minimum=0)
        return window, tuple(index >= first for index in range(layers))
    if len(kinds) != layers or not set(kinds) <= {"full_attention", "sliding_attention"}:
        raise fields.refuse("layer_types", f'{layers} entries, each "full_attention" or "sliding_attention"')
    return window, tuple(entry == "sliding_attention" for entry in kinds)


def _family(model_type: str, name: str) -> Family:
    return Family(
        model_type=model_type,
        parse=parse,
        classes={"base": Decoder, "causal-lm": DecoderLM, "sequence-classification": DecoderClassifier},
        architectures={
            f"{name}Model": "base",
            f"{name}ForCausalLM": "causal-lm",
            f"{name}ForSequenceClassification": "sequence-classification",
        },
        tied=("lm_head.weight", "embed_tokens.weight"),
        ignored=(r"lm_head\.weight", r"score\.weight"),
    )


FAMILIES = {
    name: _family(name, title)
    for name, title in (("llama", "Llama"), ("mistral", "Mistral"), ("qwen2", "Qwen2"), ("qwen3", "Qwen3"))
}
