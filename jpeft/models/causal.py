"""What causal language models share: masks of their layers, the KV cache, and their heads.

A family defines a `CausalModel` (embedding, layers, final norm) and gets its heads by inheriting `LanguageHead` or
`ClassifierHead` in front of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jpeft import kv_cache
from jpeft.errors import JpeftError
from jpeft.models.attention import Attention
from jpeft.models.attention.masks import token_positions
from jpeft.models.config import Config
from jpeft.models.layers import linear
from jpeft.models.model import Model, check_mask, check_tokens, compiled, last_token, mean_token, new_head
from jpeft.virtual_tokens import position_offset, with_prompt
from jpeft.visible import Visible

Cache = dict[str, jax.Array]
Mask = jax.Array | Visible | None


@dataclasses.dataclass(frozen=True)
class LayerMasks:
    """The masks of full and of sliding-window layers, and which layers slide; None stands for plain causal order."""

    full: Mask
    sliding: Mask
    slides: tuple[bool, ...]

    def at(self, index: Any) -> Mask:
        """The mask of layer `index`, which may be traced."""
        if self.full is None or self.sliding is None or not any(self.slides):
            return self.full
        if all(self.slides):
            return self.sliding
        slides = jnp.asarray(self.slides)[index]
        if isinstance(self.sliding, Visible):
            return dataclasses.replace(self.sliding, slides=slides)
        assert not isinstance(self.full, Visible)
        return jnp.where(slides, self.sliding, self.full)


def layer_masks(
    rules: Visible, keys: int, window: int | None, slides: tuple[bool, ...], attention: Attention, queries: int
) -> LayerMasks:
    """The masks under `rules`, which know no window: arrays of all layers, made once, or rules if `attention` asks.

    None where plain causal order can be left to the attention function.
    """
    windowed = window is not None and window < keys and any(slides)
    if rules.first is None and rules.real is None and rules.segments is None and not windowed:
        return LayerMasks(None, None, slides)
    sliding = dataclasses.replace(rules, window=window) if windowed else rules
    if attention.prefers_rules(queries, keys):
        return LayerMasks(rules, sliding, slides if windowed else (False,) * len(slides))
    full = rules.array(queries, keys)
    return LayerMasks(full, sliding.array(queries, keys) if windowed else full, slides)


@dataclasses.dataclass(frozen=True)
class CacheSlot:
    """Where a call's first token stands in the KV cache; a layer writes its keys and values there, in place."""

    slot: jax.Array

    def write(
        self, arrays: tuple[jax.Array, jax.Array], index: Any, k: jax.Array, v: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array, jax.Array]:
        """Writes k, v [B, T, K, H] at layer `index`: the cache's arrays, and all keys and values [B, S, K, H] there."""
        keys, values = (kv_cache.write(whole, index, self.slot, new) for whole, new in zip(arrays, (k, v), strict=True))
        return (keys, values), kv_cache.read(keys, index), kv_cache.read(values, index)


class CausalModel(Model):
    """Hidden states [B, T, D] of tokens [B, T]; with `cache=`, a pair of them and the cache."""

    embedding: ClassVar[str]  # the attribute that holds the token embedding
    cache_shape: tuple[int, int, int]  # layers, key-value heads, head width

    def __init__(self, config: Config, *, attention: Attention, **settings: Any):
        super().__init__(config)
        self.attention = attention

    def on_mesh(self, rows: NamedSharding, own: Mapping[str, PartitionSpec]) -> None:
        """Told by `jpeft.shard` how the rows of a batch lie."""
        super().on_mesh(rows, own)
        self.attention = dataclasses.replace(self.attention, rows=rows)

    def _masks(self, rules: Visible, queries: int, keys: int) -> LayerMasks:
        return layer_masks(rules, keys, *self.sliding(), self.attention, queries)

    def run(
        self, input_ids: jax.Array, positions: jax.Array, layer_masks: LayerMasks, arrays: Any, slot: CacheSlot | None
    ) -> tuple[jax.Array, Any]:
        """Embedding, layers and final norm, and the cache's (k, v) arrays after them. The family defines it."""
        raise NotImplementedError

    def sliding(self) -> tuple[int | None, tuple[bool, ...]]:
        """The window, and for each layer whether it has it."""
        return None, (False,) * self.config.num_hidden_layers

    def init_cache(self, batch: int, length: int, dtype: Any = None) -> Cache:
        """An empty KV cache for `batch` texts of at most `length` tokens each, padding included.

        dtype: of keys and values; default the token embedding's.
        """
        layers, heads, width = self.cache_shape
        dtype = getattr(self, self.embedding).dtype if dtype is None else dtype
        return {
            **{name: kv_cache.empty(layers, batch, length, heads, width, dtype) for name in ("k", "v")},
            "mask": jnp.zeros((batch, length), bool),
            "positions": jnp.zeros((batch,), jnp.int32),
            "index": jnp.zeros((), jnp.int32),
        }

    def states(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        cache: Cache | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """Hidden states [B, T, D] after the final norm, and the cache with these tokens in it.

        attention_mask: [B, T], 1 at real tokens. positions: [B, T]; by default counted over real tokens; a prefix moves
        both on. segment_ids:
        [B, T], for packed texts: a token sees its own segment only, and positions start again in each. cache: from
        `init_cache`; the tokens go into its next slots, of which there must be enough.
        """
        check_tokens("input_ids", input_ids)
        check_mask("attention_mask", attention_mask, input_ids)
        for name, ids in (("positions", positions), ("segment_ids", segment_ids)):
            if ids is not None:
                check_tokens(name, ids, input_ids)
        if cache is not None:
            if segment_ids is not None:
                raise JpeftError("segment_ids: packed texts cannot go into a cache; decode them as rows of a batch")
            return self._cached(input_ids, attention_mask, positions, cache)
        if positions is None:
            positions = token_positions(attention_mask, segment_ids, input_ids.shape)
        positions = positions + position_offset(self)
        rules = Visible(causal=True, real=attention_mask, segments=segment_ids)
        chosen = self._masks(rules, *(input_ids.shape[1],) * 2)
        return self.run(input_ids, positions, chosen, None, None)[0], None

    def _cached(
        self, input_ids: jax.Array, mask: jax.Array | None, positions: jax.Array | None, cache: Cache
    ) -> tuple[jax.Array, Cache]:
        batch, length = input_ids.shape
        rows, room = cache["mask"].shape
        if rows != batch or length > room:
            raise JpeftError(f"cache: made for {rows} texts of {room} tokens, the input has {batch} of {length}")
        real = jnp.ones(input_ids.shape, bool) if mask is None else mask.astype(bool)
        slot = cache["index"]
        seen = jax.lax.dynamic_update_slice(cache["mask"], real, (jnp.zeros((), slot.dtype), slot))
        count = jnp.cumsum(real, axis=1, dtype=jnp.int32)
        if positions is None:
            positions = jnp.maximum(cache["positions"][:, None] + count - 1, 0)
        positions = positions + position_offset(self)
        chosen = self._masks(Visible(causal=True, real=seen, first=slot), length, room)
        arrays = (cache["k"], cache["v"])
        hidden, (k, v) = self.run(input_ids, positions, chosen, arrays, CacheSlot(slot))
        following = cache["positions"] + count[:, -1]
        return hidden, {"k": k, "v": v, "mask": seen, "positions": following, "index": slot + length}

    @compiled
    def hidden(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
    ) -> jax.Array:
        """Hidden states [B, T, D] after the final norm, for losses that compute the logits in blocks."""

        def run(
            input_ids: jax.Array,
            attention_mask: jax.Array | None,
            positions: jax.Array | None,
            segment_ids: jax.Array | None,
        ) -> jax.Array:
            return self.states(input_ids, attention_mask, positions, segment_ids)[0]

        return with_prompt(self, run, input_ids, attention_mask, positions, segment_ids)

    def forward(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        cache: Cache | None = None,
    ) -> Any:
        """The arguments of `states`: hidden states [B, T, D]; with `cache=`, a pair of them and the cache."""
        hidden, cache = self.states(input_ids, attention_mask, positions, segment_ids, cache)
        return hidden if cache is None else (hidden, cache)


class LanguageHead(CausalModel):
    """Logits [B, T, V]: `lm_head`, or the token embedding where the two are tied."""

    heads = ("lm_head",)
    task = "causal-lm"

    def __init__(self, config: Config, *, param_dtype: Any, rngs: nnx.Rngs, **settings: Any):
        super().__init__(config, param_dtype=param_dtype, rngs=rngs, **settings)
        if not config.tie_word_embeddings:
            self.lm_head = linear(
                config.hidden_size,
                config.vocab_size,
                bias=False,
                stddev=config.initializer_range,
                param_dtype=param_dtype,
                rngs=rngs,
            )

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Logits [..., V] of hidden states [..., D]."""
        return getattr(self, self.embedding).attend(hidden) if self.config.tie_word_embeddings else self.lm_head(hidden)

    def forward(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        cache: Cache | None = None,
    ) -> Any:
        """Logits [B, T, V]; with `cache=`, a pair of them and the cache."""
        hidden, cache = self.states(input_ids, attention_mask, positions, segment_ids, cache)
        return self.logits(hidden) if cache is None else (self.logits(hidden), cache)


class ClassifierHead(CausalModel):
    """Logits [B, C] of one state per text: the last real token's (as Hugging Face pools), or the mean."""

    heads = ("score",)
    renewable = ("score",)
    task = "sequence-classification"

    def __init__(self, config: Config, *, pooling: str | None, param_dtype: Any, rngs: nnx.Rngs, **settings: Any):
        super().__init__(config, pooling=pooling, param_dtype=param_dtype, rngs=rngs, **settings)
        self.pooling = pooling
        self.score = new_head(
            linear(
                config.hidden_size,
                config.num_labels,
                bias=False,
                stddev=config.initializer_range,
                param_dtype=jnp.float32,
                rngs=rngs,
            )
        )

    def forward(  # type: ignore[override]
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> Any:
        """Logits [B, C]. Without a mask, the tokens that are not `pad_token_id` are taken for the real ones."""
        hidden, _ = self.states(input_ids, attention_mask, positions)
        if self.pooling == "mean":
            return self.score(mean_token(hidden, attention_mask))
        return self.score(last_token(hidden, input_ids, attention_mask, self.config.pad_token_id))
