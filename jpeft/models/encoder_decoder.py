"""T5 in all its versions (Raffel et al. 2020, arXiv:1910.10683): 1.0, 1.1 (gated, with its own output layer), Flan-T5.

What is particular to T5: no absolute positions but a learned bias per head and bucket of relative distance, one table a
stack, added to unscaled attention scores; norms without mean or bias; heads whose width need not divide the model's.
Attributes have the checkpoint's names, except that `relative_attention_bias`, which files keep in the first block,
stands beside the blocks, so that all blocks have one structure:

    shared    lm_head    classification_head.{dense,out_proj}    classifier
    encoder.block.layer.0.{SelfAttention.{q,k,v,o},layer_norm}
    encoder.block.layer.1.{DenseReluDense.{wi | wi_0,wi_1,wo},layer_norm}
    encoder.{relative_attention_bias,final_layer_norm}
    decoder: the same, with layer.1.{EncDecAttention.{q,k,v,o},layer_norm} and the feed-forward as layer.2
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.core import FrozenDict

from jpeft import kv_cache
from jpeft.errors import JpeftError
from jpeft.models.attention import Attention
from jpeft.models.attention.masks import causal_mask, padding_mask
from jpeft.models.encoder_decoder_config import EncoderDecoderConfig, parse
from jpeft.models.encoder_decoder_layers import CROSS, T5Stack
from jpeft.models.families import Family
from jpeft.models.layers import embed, linear
from jpeft.models.model import (
    READS,
    WRITES,
    Model,
    check_mask,
    check_tokens,
    compiled,
    last_token,
    mean_token,
    new_head,
)
from jpeft.virtual_tokens import with_prompt

Cache = dict[str, jax.Array]

_DECODER = (r"(transformer\.)?decoder\..*",)


def shift_right(labels: jax.Array, *, start: int, pad: int) -> jax.Array:
    """Decoder inputs for `labels` [..., T]: moved right by one behind `start`, ignored labels (-100) as `pad`."""
    shifted = jnp.roll(labels, 1, axis=-1).at[..., 0].set(start)
    return jnp.where(shifted == -100, pad, shifted)


class T5Encoder(Model):
    """The embedding and the encoder, which all tasks have."""

    roles = FrozenDict(
        attention=("SelfAttention", "EncDecAttention"),
        query=("q",),
        key=("k",),
        value=("v",),
        attention_output=("o",),
        feed_forward=("DenseReluDense",),
        feed_forward_output=("wo",),
        norm=(r".*layer_norm",),
        embedding=("shared",),
    )
    sharding_rules = FrozenDict(
        {
            r"(Self|EncDec)Attention\.[qkv]": READS,
            r"(Self|EncDec)Attention\.o": WRITES,
            r"wi.*": READS,
            "wo": WRITES,
            "shared": WRITES,
            "lm_head": READS,
        }
    )

    config: EncoderDecoderConfig
    pooling: str | None

    def __init__(
        self,
        config: EncoderDecoderConfig,
        *,
        param_dtype: Any,
        pooling: str | None,
        remat: bool,
        attention: Attention,
        rngs: nnx.Rngs,
    ):
        super().__init__(config)
        self.pooling = pooling
        self.param_dtype = jnp.dtype(param_dtype)
        self.shared = embed(
            config.vocab_size,
            config.hidden_size,
            stddev=config.initializer_factor,
            param_dtype=param_dtype,
            rngs=rngs,
        )

        def stack(decoder: bool) -> T5Stack:
            return T5Stack(config, attention, decoder=decoder, remat=remat, param_dtype=param_dtype, rngs=rngs)

        self.encoder = stack(False)
        if self.has_decoder:
            self.decoder = stack(True)
        self.add_head(rngs)

    @property
    def has_decoder(self) -> bool:
        """Whether the task needs the decoder too."""
        return False

    def add_head(self, rngs: nnx.Rngs) -> None:
        """Adds what the task needs beside the stacks."""

    def _linear(self, outputs: int, stddev: float, rngs: nnx.Rngs, *, bias: bool = True) -> nnx.Linear:
        width, stddev = self.config.hidden_size, stddev * self.config.initializer_factor
        return linear(width, outputs, bias=bias, stddev=stddev, param_dtype=self.param_dtype, rngs=rngs)

    @compiled
    def encode(self, input_ids: jax.Array, attention_mask: jax.Array | None = None) -> jax.Array:
        """The encoder's output [B, S, D]."""
        check_tokens("input_ids", input_ids)
        check_mask("attention_mask", attention_mask, input_ids)
        return self.by_rows(self.encoder(self.embedded(self.shared(input_ids)), mask=padding_mask(attention_mask))[0])


class T5(T5Encoder):
    """Encoder and decoder without a head: the decoder's last hidden state [B, T, D].

    Called as `model(input_ids, attention_mask=None, decoder_input_ids=ids, decoder_attention_mask=None)`, all of them
    [batch, tokens]; `shift_right(labels)` makes the decoder's input from labels.

    Step by step: `encoded = model.encode(input_ids, mask)`, `cache = model.init_cache(batch, length)`, then as often as
    wanted `logits, cache = model.decode(ids, encoded=encoded, encoder_mask=mask, cache=cache)`. The first call computes
    the cross-attention's keys and values and adds them to the cache; later calls read them there.
    """

    @property
    def has_decoder(self) -> bool:
        return True

    def forward(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        decoder_input_ids: jax.Array | None = None,
        decoder_attention_mask: jax.Array | None = None,
    ) -> jax.Array:
        return self.states(input_ids, attention_mask, decoder_input_ids, decoder_attention_mask)

    def hidden(self, *args: Any, **kwargs: Any) -> jax.Array:
        """The decoder's last hidden state [B, T, D]."""
        return with_prompt(self, self.states, *args, **kwargs)

    def states(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        decoder_input_ids: jax.Array | None = None,
        decoder_attention_mask: jax.Array | None = None,
    ) -> jax.Array:
        """The decoder's last hidden state [B, T, D], of the tokens as they are."""
        if decoder_input_ids is None:
            raise JpeftError(
                "decoder_input_ids is missing: an encoder-decoder needs the tokens so far (model.shift_right(labels) "
                "makes them from labels)"
            )
        encoded = self.encode(input_ids, attention_mask)
        return self._decode(decoder_input_ids, encoded, attention_mask, decoder_attention_mask, None)[0]

    def init_cache(self, batch: int, length: int, dtype: Any = None) -> Cache:
        """An empty cache for `length` tokens of `batch` rows; dtype: default the parameters'."""
        config = self.config
        dtype = self.param_dtype if dtype is None else dtype
        shape = (config.num_decoder_layers, batch, length, config.num_heads, config.d_kv)
        return {
            **{name: kv_cache.empty(*shape, dtype) for name in ("k", "v")},
            "mask": jnp.zeros((batch, length), bool),
            "positions": jnp.zeros((batch,), jnp.int32),
            "index": jnp.zeros((), jnp.int32),
        }

    @compiled
    def decode(
        self,
        decoder_input_ids: jax.Array,
        *,
        encoded: jax.Array | None = None,
        encoder_mask: jax.Array | None = None,
        decoder_attention_mask: jax.Array | None = None,
        cache: Cache | None = None,
    ) -> Any:
        """What the model gives for decoder tokens [B, T], after the encoder: logits, or (logits, cache) with a cache.

        encoded: [B, S, D] from `encode`; not needed once the cache holds its keys and values. encoder_mask: the
        encoder's attention mask [B, S]. decoder_attention_mask: [B, T], of the tokens given here.
        """
        hidden, new = self._decode(decoder_input_ids, encoded, encoder_mask, decoder_attention_mask, cache)
        outputs = self.output(hidden)
        return outputs if new is None else (outputs, new)

    def output(self, hidden: jax.Array) -> jax.Array:
        """What `decode` gives for the decoder's hidden state [B, T, D]."""
        return hidden

    def _decode(
        self,
        decoder_input_ids: jax.Array,
        encoded: jax.Array | None,
        encoder_mask: jax.Array | None,
        decoder_mask: jax.Array | None,
        cache: Cache | None,
    ) -> tuple[jax.Array, Cache | None]:
        check_tokens("decoder_input_ids", decoder_input_ids)
        check_mask("decoder_attention_mask", decoder_mask, decoder_input_ids)
        if encoded is None and (cache is None or CROSS[0] not in cache):
            raise JpeftError("encoded is missing: pass what model.encode(input_ids, attention_mask) gave")
        x, tokens = self.embedded(self.shared(decoder_input_ids)), decoder_input_ids.shape[1]
        cross = padding_mask(encoder_mask)
        if cache is None:
            mask = causal_mask(tokens, tokens)
            if decoder_mask is not None:
                mask &= decoder_mask.astype(bool)[:, None, None, :]
            return self.by_rows(self.decoder(x, mask=mask, encoded=encoded, encoder_mask=cross)[0]), None
        if tokens > cache["mask"].shape[1]:
            raise JpeftError(f"cache: {tokens} tokens do not fit into its length of {cache['mask'].shape[1]}")
        slot, cache = cache["index"], dict(cache)
        real = jnp.ones_like(decoder_input_ids, bool) if decoder_mask is None else decoder_mask.astype(bool)
        cache["mask"] = jax.lax.dynamic_update_slice(cache["mask"], real, (0, slot))
        cache["positions"] += real.sum(axis=1, dtype=jnp.int32)
        cache["index"] = slot + tokens
        if CROSS[0] in cache:
            encoded = None
        else:
            layers, batch, heads, _, width = cache["k"].shape
            assert encoded is not None
            empty = kv_cache.empty(layers, batch, encoded.shape[1], heads, width, cache["k"].dtype)
            cache.update(dict.fromkeys(CROSS, empty))
        names = ("k", "v", *CROSS)
        mask = causal_mask(tokens, cache["mask"].shape[1], slot) & cache["mask"][:, None, None, :]
        hidden, written = self.decoder(
            x,
            {name: cache[name] for name in names},
            first=slot,
            slot=slot,
            mask=mask,
            encoded=encoded,
            encoder_mask=cross,
        )
        return hidden, {**cache, **written}

    def shift_right(self, labels: jax.Array) -> jax.Array:
        """Decoder inputs for `labels` [..., T]: moved right by one, behind the config's `decoder_start_token_id`."""
        start, pad = self.config.decoder_start_token_id, self.config.pad_token_id
        if start is None or pad is None:
            raise JpeftError("shift_right: config.json names no decoder_start_token_id or no pad_token_id; add them")
        return shift_right(labels, start=start, pad=pad)


class T5ForConditionalGeneration(T5):
    """Logits [B, T, V] for each decoder token."""

    task = "seq2seq-lm"
    heads = ("lm_head",)

    def add_head(self, rngs: nnx.Rngs) -> None:
        if not self.config.tie_word_embeddings:
            self.lm_head = self._linear(self.config.vocab_size, 1.0, rngs, bias=False)

    def forward(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        decoder_input_ids: jax.Array | None = None,
        decoder_attention_mask: jax.Array | None = None,
    ) -> jax.Array:
        return self.logits(self.states(input_ids, attention_mask, decoder_input_ids, decoder_attention_mask))

    def output(self, hidden: jax.Array) -> jax.Array:
        return self.logits(hidden)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Logits [B, T, V] of the decoder's hidden state [B, T, D]."""
        if self.config.scale_outputs:
            hidden = hidden * self.config.hidden_size**-0.5
        return self.shared.attend(hidden) if self.config.tie_word_embeddings else self.lm_head(hidden)


class T5ClassificationHead(nnx.Module):
    """[B, D] -> [B, C] through a hidden layer."""

    def __init__(self, dense: nnx.Linear, out_proj: nnx.Linear):
        self.dense, self.out_proj = dense, out_proj

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.out_proj(jnp.tanh(self.dense(x)))


class T5ForSequenceClassification(T5):
    """Logits [B, C] for each sequence.

    pooling: None for `classification_head` on the decoder's state at the end-of-text token, the decoder being given the
    input once more (by default shifted right); "mean" for one linear `classifier` on the mean of the encoder's
    output, without a decoder. Rows without an end-of-text token are summed up at their last token.
    """

    task = "sequence-classification"
    base_prefix = "transformer"
    heads = ("classification_head", "classifier")
    renewable = ("classification_head", "classifier")

    @property
    def has_decoder(self) -> bool:
        return self.pooling is None

    def add_head(self, rngs: nnx.Rngs) -> None:
        width, labels = self.config.hidden_size, self.config.num_labels
        out = self._linear(labels, width**-0.5, rngs)
        if self.pooling is None:
            head = T5ClassificationHead(self._linear(width, width**-0.5, rngs), out)
            self.classification_head = new_head(head)
        else:
            self.classifier = new_head(out)
            self.unread = _DECODER

    def forward(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        decoder_input_ids: jax.Array | None = None,
        decoder_attention_mask: jax.Array | None = None,
    ) -> jax.Array:
        if self.pooling is not None:
            return self.classifier(mean_token(self.encode(input_ids, attention_mask), attention_mask))
        if decoder_input_ids is None:
            decoder_input_ids = self.shift_right(input_ids)
        check_tokens("decoder_input_ids", decoder_input_ids, input_ids)
        hidden = self.states(input_ids, attention_mask, decoder_input_ids, decoder_attention_mask)
        ends = jnp.isin(input_ids, jnp.array(self.config.eos_token_id, input_ids.dtype))
        tokens = jnp.ones_like(ends) if attention_mask is None else attention_mask.astype(bool)
        at = jnp.where(ends.any(axis=1, keepdims=True), ends, tokens)
        return self.classification_head(last_token(hidden, input_ids, at, None))


class T5ForTokenClassification(T5Encoder):
    """Logits [B, T, C] for each token, from the encoder."""

    task = "token-classification"
    base_prefix = "transformer"
    unread = _DECODER
    heads = ("classifier",)
    renewable = ("classifier",)

    def add_head(self, rngs: nnx.Rngs) -> None:
        self.classifier = new_head(self._linear(self.config.num_labels, self.config.hidden_size**-0.5, rngs))

    def forward(self, input_ids: jax.Array, attention_mask: jax.Array | None = None) -> jax.Array:
        return self.classifier(self.encode(input_ids, attention_mask))


FAMILIES = {
    "t5": Family(
        model_type="t5",
        parse=parse,
        classes={
            "base": T5,
            "seq2seq-lm": T5ForConditionalGeneration,
            "sequence-classification": T5ForSequenceClassification,
            "token-classification": T5ForTokenClassification,
        },
        architectures={
            "T5Model": "base",
            "T5ForConditionalGeneration": "seq2seq-lm",
            "T5WithLMHeadModel": "seq2seq-lm",
            "T5ForSequenceClassification": "sequence-classification",
            "T5ForTokenClassification": "token-classification",
        },
        renames=(
            (
                r"^(encoder|decoder)\.relative_attention_bias\.",
                r"\1.block.0.layer.0.SelfAttention.relative_attention_bias.",
            ),
        ),
        tied=("lm_head.weight", "shared.weight"),
        ignored=(
            r"(transformer\.)?(encoder|decoder)\.embed_tokens\.weight",
            r"(transformer\.)?decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
            r"lm_head\.weight",
            r"classifier\..*|classification_head\..*",
        ),
    )
}
