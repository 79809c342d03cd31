"""The parts of BERT and RoBERTa: embeddings, post-norm layers and heads, named as in the checkpoints."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jpeft.models.attention import Attends, Attention
from jpeft.models.config import Config
from jpeft.models.layers import activation, embed, layer_norm, linear
from jpeft.stack import Stack, run_layers


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig(Config):
    """What config.json of a BERT or RoBERTa says about the architecture."""

    num_attention_heads: int
    intermediate_size: int
    hidden_act: str
    max_position_embeddings: int
    type_vocab_size: int
    layer_norm_eps: float


@dataclasses.dataclass(frozen=True)
class Make:
    """Builds the primitive layers of one model: its initial scale, dtype and norm epsilon in one place."""

    config: EncoderConfig
    param_dtype: Any

    def linear(self, inputs: int, outputs: int, rngs: nnx.Rngs) -> nnx.Linear:
        stddev = self.config.initializer_range
        return linear(inputs, outputs, bias=True, stddev=stddev, param_dtype=self.param_dtype, rngs=rngs)

    def embed(self, rows: int, rngs: nnx.Rngs) -> nnx.Embed:
        stddev = self.config.initializer_range
        return embed(rows, self.config.hidden_size, stddev=stddev, param_dtype=self.param_dtype, rngs=rngs)

    def norm(self, rngs: nnx.Rngs) -> nnx.LayerNorm:
        epsilon = self.config.layer_norm_eps
        return layer_norm(self.config.hidden_size, epsilon=epsilon, param_dtype=self.param_dtype, rngs=rngs)


class Embeddings(nnx.Module):
    """Word, token type and position embeddings, added and normalised: [B, T] -> [B, T, D]."""

    def __init__(self, make: Make, *, rngs: nnx.Rngs):
        self.word_embeddings = make.embed(make.config.vocab_size, rngs)
        self.position_embeddings = make.embed(make.config.max_position_embeddings, rngs)
        self.token_type_embeddings = make.embed(make.config.type_vocab_size, rngs)
        self.LayerNorm = make.norm(rngs)

    def __call__(self, input_ids: jax.Array, token_type_ids: jax.Array, positions: jax.Array) -> jax.Array:
        words = self.word_embeddings(input_ids) + self.token_type_embeddings(token_type_ids)
        return self.LayerNorm(words + self.position_embeddings(positions))


class SelfAttention(Attends):
    """Bidirectional attention without the output projection: [B, T, D] -> [B, T, D]."""

    def __init__(self, make: Make, attention: Attention, *, rngs: nnx.Rngs):
        width = make.config.hidden_size
        self.query = make.linear(width, width, rngs)
        self.key = make.linear(width, width, rngs)
        self.value = make.linear(width, width, rngs)
        self.num_heads = make.config.num_attention_heads
        self.attention_fn = attention

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return self.query.in_features

    @property
    def kv_shape(self) -> tuple[int, int]:
        """(heads, head width) of the keys and values."""
        return self.num_heads, self.key.out_features // self.num_heads

    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        heads = (*x.shape[:-1], self.num_heads, -1)
        q, k, v = (project(x).reshape(heads) for project in (self.query, self.key, self.value))  # [B, T, N, H]
        return self.attention_fn(q, k, v, mask=mask).reshape(x.shape)


class Output(nnx.Module):
    """The end of a sublayer: projection, residual, norm."""

    adds_residual = True

    def __init__(self, inputs: int, make: Make, *, rngs: nnx.Rngs):
        self.dense = make.linear(inputs, make.config.hidden_size, rngs)
        self.LayerNorm = make.norm(rngs)

    @property
    def out_features(self) -> int:
        """Width of the output, and of the residual."""
        return self.dense.out_features

    def __call__(self, x: jax.Array, residual: jax.Array) -> jax.Array:
        return self.LayerNorm(self.dense(x) + residual)


class AttentionSublayer(nnx.Module):
    """Attention, its output projection, residual and norm."""

    def __init__(self, make: Make, attention: Attention, *, rngs: nnx.Rngs):
        self.self = SelfAttention(make, attention, rngs=rngs)
        self.output = Output(make.config.hidden_size, make, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        return self.output(self.self(x, mask), x)


class Intermediate(nnx.Module):
    """The first half of the feed-forward sublayer: [B, T, D] -> [B, T, F]."""

    def __init__(self, make: Make, *, rngs: nnx.Rngs):
        self.dense = make.linear(make.config.hidden_size, make.config.intermediate_size, rngs)
        self.hidden_act = make.config.hidden_act

    def __call__(self, x: jax.Array) -> jax.Array:
        return activation(self.hidden_act)(self.dense(x))


class EncoderLayer(nnx.Module):
    """One post-norm transformer layer: [B, T, D] -> [B, T, D]."""

    def __init__(self, make: Make, attention: Attention, *, rngs: nnx.Rngs):
        self.attention = AttentionSublayer(make, attention, rngs=rngs)
        self.intermediate = Intermediate(make, rngs=rngs)
        self.output = Output(make.config.intermediate_size, make, rngs=rngs)

    def __call__(self, x: jax.Array, index: jax.Array | int, mask: jax.Array | None) -> jax.Array:
        x = self.attention(x, mask)
        return self.output(self.intermediate(x), x)


class Layers(nnx.Module):
    """The layers, stacked, under the checkpoint's name `encoder.layer`."""

    def __init__(self, make: Make, attention: Attention, *, remat: bool, rngs: nnx.Rngs):
        count = make.config.num_hidden_layers
        self.layer = Stack.create(lambda rngs: EncoderLayer(make, attention, rngs=rngs), count, rngs=rngs, remat=remat)

    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        return run_layers(self.layer, x, mask)


class Pooler(nnx.Module):
    """BERT's summary of a sequence, tanh of a projection of its first token: [B, T, D] -> [B, D]."""

    def __init__(self, make: Make, *, rngs: nnx.Rngs):
        self.dense = make.linear(make.config.hidden_size, make.config.hidden_size, rngs)

    def __call__(self, hidden: jax.Array) -> jax.Array:
        return jnp.tanh(self.dense(hidden[:, 0]))


class ClassificationHead(nnx.Module):
    """RoBERTa's head on the first token: [B, T, D] -> [B, C]."""

    def __init__(self, make: Make, *, rngs: nnx.Rngs):
        self.dense = make.linear(make.config.hidden_size, make.config.hidden_size, rngs)
        self.out_proj = make.linear(make.config.hidden_size, make.config.num_labels, rngs)

    def __call__(self, hidden: jax.Array) -> jax.Array:
        return self.out_proj(jnp.tanh(self.dense(hidden[:, 0])))


class Vocabulary(nnx.Module):
    """Logits over the vocabulary: the word embeddings transposed and a `bias` when tied, otherwise `decoder`."""

    def __init__(self, make: Make, *, rngs: nnx.Rngs):
        self.tied = make.config.tie_word_embeddings
        if self.tied:
            self.bias = nnx.Param(jnp.zeros((make.config.vocab_size,), make.param_dtype))
        else:
            self.decoder = make.linear(make.config.hidden_size, make.config.vocab_size, rngs)

    def transformed(self, hidden: jax.Array) -> jax.Array:
        """[B, T, D] as it meets the vocabulary."""
        raise NotImplementedError(type(self).__name__)

    def __call__(self, hidden: jax.Array, words: Any) -> jax.Array:
        x = self.transformed(hidden)
        return words.attend(x) + self.bias[...] if self.tied else self.decoder(x)


class Transform(nnx.Module):
    """Projection, activation and norm in front of BERT's output vocabulary."""

    def __init__(self, make: Make, *, rngs: nnx.Rngs):
        self.dense = make.linear(make.config.hidden_size, make.config.hidden_size, rngs)
        self.LayerNorm = make.norm(rngs)
        self.hidden_act = make.config.hidden_act

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.LayerNorm(activation(self.hidden_act)(self.dense(x)))


class Predictions(Vocabulary):
    """BERT's `cls.predictions`."""

    def __init__(self, make: Make, *, rngs: nnx.Rngs):
        super().__init__(make, rngs=rngs)
        self.transform = Transform(make, rngs=rngs)

    def transformed(self, hidden: jax.Array) -> jax.Array:
        return self.transform(hidden)


class PretrainingHeads(nnx.Module):
    """BERT's `cls`, of which masked language modeling uses the predictions."""

    def __init__(self, make: Make, *, rngs: nnx.Rngs):
        self.predictions = Predictions(make, rngs=rngs)


class RobertaHead(Vocabulary):
    """RoBERTa's `lm_head`, whose activation is the exact GELU whatever the config says."""

    def __init__(self, make: Make, *, rngs: nnx.Rngs):
        super().__init__(make, rngs=rngs)
        self.dense = make.linear(make.config.hidden_size, make.config.hidden_size, rngs)
        self.layer_norm = make.norm(rngs)

    def transformed(self, hidden: jax.Array) -> jax.Array:
        return self.layer_norm(activation("gelu")(self.dense(hidden)))
