"""The parts of T5: relative position buckets, attention, feed-forward, blocks and the two stacks."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jpeft import kv_cache
from jpeft.models.attention import Attends, Attention
from jpeft.models.encoder_decoder_config import EncoderDecoderConfig
from jpeft.models.layers import RMSNorm, activation, embed, gated, linear
from jpeft.stack import Stack, run_layers

# The part of a KV cache that the layers write: self- and cross-attention's keys and values (`kv_cache`).
LayerCache = dict[str, jax.Array]
CROSS = ("cross_k", "cross_v")


def relative_buckets(num_buckets: int, max_distance: int, *, bidirectional: bool) -> np.ndarray:
    """The bucket of every relative position (key minus query) from -max_distance to max_distance, int32.

    Half of the buckets of a direction hold one distance each, the others grow logarithmically; everything beyond
    `max_distance` is in the last. A causal stack has no buckets for keys ahead: they count as distance 0. It is a
    table made on the host, since rounding decides which bucket a distance at a boundary of the logarithm falls into.
    """
    relative = np.arange(-max_distance, max_distance + 1)
    side = num_buckets // 2 if bidirectional else num_buckets
    distance = np.abs(relative) if bidirectional else np.maximum(-relative, 0)
    exact = side // 2
    ratio = np.maximum(distance, 1).astype(np.float32) / np.float32(exact)
    octaves = np.log(ratio) / np.float32(math.log(max_distance / exact)) * np.float32(side - exact)
    far = np.minimum(exact + octaves.astype(np.int32), side - 1)
    ahead = np.where(bidirectional & (relative > 0), side, 0)
    return (ahead + np.where(distance < exact, distance, far)).astype(np.int32)


class T5Attention(Attends):
    """Unscaled multi-head attention of [B, T, D] over keys and values [B, S, N, H]; N H need not be D."""

    def __init__(self, config: EncoderDecoderConfig, attention: Attention, *, param_dtype: Any, rngs: nnx.Rngs):
        width, inner = config.hidden_size, config.num_heads * config.d_kv

        def make(inputs: int, outputs: int, stddev: float) -> nnx.Linear:
            stddev *= config.initializer_factor
            return linear(inputs, outputs, bias=False, stddev=stddev, param_dtype=param_dtype, rngs=rngs)

        self.q = make(width, inner, (width * config.d_kv) ** -0.5)
        self.k = make(width, inner, width**-0.5)
        self.v = make(width, inner, width**-0.5)
        self.o = make(inner, width, inner**-0.5)
        self.num_heads = config.num_heads
        self.attention_fn = attention

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return self.q.in_features

    @property
    def kv_shape(self) -> tuple[int, int]:
        """(heads, head width) of the keys and values."""
        return self.num_heads, self.k.out_features // self.num_heads

    def _heads(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:-1], self.num_heads, -1)

    def keys_values(self, source: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values [B, S, N, H] of `source` [B, S, D]."""
        return self._heads(self.k(source)), self._heads(self.v(source))

    def __call__(
        self,
        x: jax.Array,
        keys_values: tuple[jax.Array, jax.Array],
        mask: jax.Array | None,
        bias: jax.Array | None = None,
    ) -> jax.Array:
        attended = self.attention_fn(self._heads(self.q(x)), *keys_values, mask=mask, bias=bias, scale=1.0)
        return self.o(attended.reshape(*x.shape[:-1], -1))


class T5FeedForward(nnx.Module):
    """`wo(act(wi(x)))`, or gated (Shazeer 2020): `wo(act(wi_0(x)) * wi_1(x))`."""

    def __init__(self, config: EncoderDecoderConfig, *, param_dtype: Any, rngs: nnx.Rngs):
        def make(inputs: int, outputs: int) -> nnx.Linear:
            stddev = config.initializer_factor * inputs**-0.5
            return linear(inputs, outputs, bias=False, stddev=stddev, param_dtype=param_dtype, rngs=rngs)

        if config.gated:
            self.wi_0 = make(config.hidden_size, config.d_ff)
            self.wi_1 = make(config.hidden_size, config.d_ff)
        else:
            self.wi = make(config.hidden_size, config.d_ff)
        self.wo = make(config.d_ff, config.hidden_size)
        self.act, self.gated = config.act, config.gated

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return (self.wi_0 if self.gated else self.wi).in_features

    @property
    def out_features(self) -> int:
        """Width of the output."""
        return self.wo.out_features

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.gated:
            return self.wo(gated(self.act, self.wi_0(x), self.wi_1(x)))
        return self.wo(activation(self.act)(self.wi(x)))


class _Sublayer(nnx.Module):
    """A norm and, under the checkpoint's name, the one of these that follows it."""

    SelfAttention: T5Attention
    EncDecAttention: T5Attention
    DenseReluDense: T5FeedForward

    def __init__(self, config: EncoderDecoderConfig, name: str, inner: nnx.Module, *, param_dtype: Any):
        setattr(self, name, inner)
        self.layer_norm = RMSNorm(config.hidden_size, epsilon=config.layer_norm_epsilon, param_dtype=param_dtype)


class T5Block(nnx.Module):
    """One pre-norm block: self-attention, in a decoder cross-attention, feed-forward.

    The carry is the activations [B, T, D] and the cache of all layers (empty without one).
    """

    def __init__(
        self,
        config: EncoderDecoderConfig,
        attention: Attention,
        *,
        decoder: bool,
        param_dtype: Any,
        rngs: nnx.Rngs,
    ):
        def attend() -> T5Attention:
            return T5Attention(config, attention, param_dtype=param_dtype, rngs=rngs)

        parts: list[tuple[str, nnx.Module]] = [("SelfAttention", attend())]
        parts += [("EncDecAttention", attend())] if decoder else []
        parts += [("DenseReluDense", T5FeedForward(config, param_dtype=param_dtype, rngs=rngs))]
        self.layer = nnx.List([_Sublayer(config, name, part, param_dtype=param_dtype) for name, part in parts])

    def __call__(
        self,
        carry: tuple[jax.Array, LayerCache],
        index: jax.Array | int,
        *,
        bias: jax.Array,
        mask: jax.Array | None,
        slot: jax.Array | None = None,
        encoded: jax.Array | None = None,
        encoder_mask: jax.Array | None = None,
    ) -> tuple[jax.Array, LayerCache]:
        """bias [1, N, T, S] and masks [B, 1, T or 1, S] are all layers'. slot: first free place in the cache.

        encoded: the encoder's output [B, S, D]; without it cross-attention reads its keys and values from the cache.
        """
        x, cache = carry
        normed = self.layer[0].layer_norm(x)
        own = self.layer[0].SelfAttention
        keys_values = own.keys_values(normed)
        if slot is not None:
            cache, keys_values = _store(cache, ("k", "v"), index, slot, keys_values)
        x = x + own(normed, keys_values, mask, bias)
        if len(self.layer) == 3:
            cross = self.layer[1].EncDecAttention
            if encoded is None:
                keys_values = _rows(cache, CROSS, index, x.dtype)
            else:
                keys_values = cross.keys_values(encoded)
                if CROSS[0] in cache:
                    cache, keys_values = _store(cache, CROSS, index, 0, keys_values)
            x = x + cross(self.layer[1].layer_norm(x), keys_values, encoder_mask)
        last = self.layer[-1]
        return x + last.DenseReluDense(last.layer_norm(x)), cache


def _rows(cache: LayerCache, names: tuple[str, str], index: Any, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Keys and values of layer `index`, as the attention computes with them."""
    keys, values = (kv_cache.read(cache[name], index).astype(dtype) for name in names)
    return keys, values


def _store(
    cache: LayerCache,
    names: tuple[str, str],
    index: jax.Array | int,
    slot: jax.Array | int,
    fresh: tuple[jax.Array, jax.Array],
) -> tuple[LayerCache, tuple[jax.Array, jax.Array]]:
    """Writes new keys and values of layer `index` at `slot`; the cache, and all keys and values of the layer."""
    cache = dict(cache)
    for name, new in zip(names, fresh, strict=True):
        cache[name] = kv_cache.write(cache[name], index, slot, new)
    return cache, _rows(cache, names, index, fresh[0].dtype)


class T5Stack(nnx.Module):
    """The encoder or the decoder: embedded tokens [B, T, D] -> normalised hidden states [B, T, D]."""

    def __init__(
        self,
        config: EncoderDecoderConfig,
        attention: Attention,
        *,
        decoder: bool,
        remat: bool,
        param_dtype: Any,
        rngs: nnx.Rngs,
    ):
        self.block = Stack.create(
            lambda rngs: T5Block(config, attention, decoder=decoder, param_dtype=param_dtype, rngs=rngs),
            config.num_decoder_layers if decoder else config.num_hidden_layers,
            rngs=rngs,
            remat=remat,
        )
        self.relative_attention_bias = embed(
            config.relative_attention_num_buckets,
            config.num_heads,
            stddev=config.initializer_factor * config.hidden_size**-0.5,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.final_layer_norm = RMSNorm(config.hidden_size, epsilon=config.layer_norm_epsilon, param_dtype=param_dtype)
        self.num_buckets = config.relative_attention_num_buckets
        self.max_distance = config.relative_attention_max_distance
        self.decoder = decoder

    def bias(self, queries: int, keys: int, first: jax.Array | int = 0) -> jax.Array:
        """The position bias [1, N, T, S] of queries in slots first, first + 1, ... over keys in slots 0, 1, ..."""
        relative = jnp.arange(keys)[None, :] - (first + jnp.arange(queries)[:, None])
        table = jnp.asarray(relative_buckets(self.num_buckets, self.max_distance, bidirectional=not self.decoder))
        buckets = table[jnp.clip(relative, -self.max_distance, self.max_distance) + self.max_distance]
        return jnp.moveaxis(self.relative_attention_bias(buckets), -1, 0)[None]

    def __call__(
        self, x: jax.Array, cache: LayerCache | None = None, *, first: jax.Array | int = 0, **settings: Any
    ) -> tuple[jax.Array, LayerCache]:
        """`settings` are the arguments of `T5Block` but for the bias. first: the slot of the first query."""
        keys = x.shape[1] if not cache or "k" not in cache else kv_cache.slots(cache["k"])
        bias = self.bias(x.shape[1], keys, first)
        x, cache = run_layers(self.block, (x, cache or {}), bias=bias, **settings)
        return self.final_layer_norm(x), cache
