"""BERT and RoBERTa (Devlin et al. 2019, arXiv:1810.04805; Liu et al. 2019, arXiv:1907.11692): post-norm encoders.

The two differ in where positions start and in their heads. Attributes have the checkpoint's names, without the base
prefix:

    embeddings.{word_embeddings,position_embeddings,token_type_embeddings,LayerNorm}
    encoder.layer.{attention.{self.{query,key,value},output.{dense,LayerNorm}},intermediate.dense,output.{dense,LayerNorm}}
    pooler.dense    classifier[.{dense,out_proj}]    cls.predictions.{transform.{dense,LayerNorm},bias | decoder}
    lm_head.{dense,layer_norm,bias | decoder}
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.core import FrozenDict
from jax.sharding import PartitionSpec

from jpeft.errors import JpeftError
from jpeft.models.attention import Attention
from jpeft.models.attention.masks import padding_mask
from jpeft.models.config import Fields
from jpeft.models.encoder_layers import (
    ClassificationHead,
    Embeddings,
    EncoderConfig,
    Layers,
    Make,
    Pooler,
    PretrainingHeads,
    RobertaHead,
)
from jpeft.models.families import Family
from jpeft.models.layers import ACTIVATIONS
from jpeft.models.model import READS, WRITES, Model, check_mask, check_tokens, mean_token, new_head
from jpeft.virtual_tokens import most_positions, position_offset, with_prompt


class Encoder(Model):
    """The encoder alone: input ids [B, T] -> last hidden state [B, T, D].

    attention_mask: [B, T], 1 for tokens. token_type_ids: [B, T], default 0. positions: [B, T], rows of the position
    table; the families differ in the default.
    """

    roles = FrozenDict(
        attention=("attention.self",),
        query=("query",),
        key=("key",),
        value=("value",),
        attention_output=("attention.output.dense",),
        feed_forward=(r"layer\.\d+\.output",),
        feed_forward_output=(r"layer\.\d+\.output\.dense",),
        norm=(r"encoder\..*\.LayerNorm", "embeddings.LayerNorm"),
        embedding=("word_embeddings",),
    )
    # Vocabularies of 30,522 and 50,265 can hardly be cut.
    sharding_rules = FrozenDict(
        {
            "query|key|value": READS,
            "intermediate.dense": READS,
            "output.dense": WRITES,
            "word_embeddings": PartitionSpec(None, "fsdp"),
        }
    )

    pads_positions: bool = False  # whether padding has a row of its own in the position table
    config: EncoderConfig
    pooling: str | None

    def __init__(
        self,
        config: EncoderConfig,
        *,
        param_dtype: Any,
        pooling: str | None,
        remat: bool,
        attention: Attention,
        rngs: nnx.Rngs,
    ):
        super().__init__(config)
        make = Make(config, param_dtype)
        self.pooling = pooling
        self.embeddings = Embeddings(make, rngs=rngs)
        self.encoder = Layers(make, attention, remat=remat, rngs=rngs)
        self.add_head(make, rngs)

    def add_head(self, make: Make, rngs: nnx.Rngs) -> None:
        """Adds what the task needs beside the encoder."""

    def output(self, hidden: jax.Array, attention_mask: jax.Array | None) -> jax.Array:
        """What the task makes of the last hidden state [B, T, D]."""
        return hidden

    def default_positions(self, input_ids: jax.Array) -> jax.Array:
        """Rows of the position table [B, T]: 0, 1, ..., whatever the mask."""
        self.check_length(input_ids, self.config.max_position_embeddings)
        return jnp.broadcast_to(jnp.arange(input_ids.shape[1]), input_ids.shape)

    def check_length(self, input_ids: jax.Array, longest: int) -> None:
        """Refuses rows that are longer than the position table allows."""
        taken = most_positions(self)
        if taken + input_ids.shape[1] > longest:
            behind = f" behind a prefix of {taken}" if taken else ""
            raise JpeftError(
                f"input_ids: rows of {input_ids.shape[1]} tokens{behind}, but this {self.config.model_type} has "
                f"positions for {longest}; truncate them"
            )

    def forward(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        token_type_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> jax.Array:
        return self.output(self.states(input_ids, attention_mask, token_type_ids, positions), attention_mask)

    def hidden(self, *args: Any, **kwargs: Any) -> jax.Array:
        """The last hidden state [B, T, D]."""
        return with_prompt(self, self.states, *args, **kwargs)

    def states(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        token_type_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> jax.Array:
        """The last hidden state [B, T, D] of the tokens as they are."""
        check_tokens("input_ids", input_ids)
        check_mask("attention_mask", attention_mask, input_ids)
        if token_type_ids is None:
            token_type_ids = jnp.zeros_like(input_ids)
        if positions is None:
            positions = self.default_positions(input_ids)
        check_tokens("token_type_ids", token_type_ids, input_ids)
        check_tokens("positions", positions, input_ids)
        # Padding keeps RoBERTa's row for it, which is no position.
        fixed = positions == self.config.pad_token_id if self.pads_positions else False
        positions = jnp.where(fixed, positions, positions + position_offset(self))
        x = self.embedded(self.embeddings(input_ids, token_type_ids, positions))
        return self.by_rows(self.encoder(x, padding_mask(attention_mask)))


class Bert(Encoder):
    """BERT without a head; its `pooler` belongs to sequence classification."""

    base_prefix = "bert"


class Roberta(Encoder):
    """RoBERTa without a head."""

    base_prefix = "roberta"
    pads_positions = True

    def default_positions(self, input_ids: jax.Array) -> jax.Array:
        """Rows of the position table [B, T] as in training: from `pad_token_id` + 1 over what is not padding."""
        padding = self.config.pad_token_id
        assert padding is not None
        self.check_length(input_ids, self.config.max_position_embeddings - padding - 1)
        tokens = (input_ids != padding).astype(jnp.int32)
        return jnp.cumsum(tokens, axis=1) * tokens + padding


class BertForSequenceClassification(Bert):
    """Logits [B, C] for each sequence.

    pooling: None for `pooler` (on the first token) and `classifier`, or "mean" for one linear `classifier` on the mean
    of the last hidden state, which suits sentence encoders such as MiniLM (Reimers and Gurevych 2019).
    """

    task = "sequence-classification"
    heads = ("classifier",)
    renewable = ("classifier", "pooler")

    def add_head(self, make: Make, rngs: nnx.Rngs) -> None:
        if self.pooling is None:
            self.pooler = new_head(Pooler(make, rngs=rngs))
        self.classifier = new_head(make.linear(make.config.hidden_size, make.config.num_labels, rngs))

    def output(self, hidden: jax.Array, attention_mask: jax.Array | None) -> jax.Array:
        pooled = self.pooler(hidden) if self.pooling is None else mean_token(hidden, attention_mask)
        return self.classifier(pooled)


class RobertaForSequenceClassification(Roberta):
    """Logits [B, C] for each sequence.

    pooling: None for `classifier.dense` and `classifier.out_proj` on the first token, or "mean" for one linear
    `classifier` on the mean of the last hidden state.
    """

    task = "sequence-classification"
    heads = ("classifier",)
    renewable = ("classifier",)

    def add_head(self, make: Make, rngs: nnx.Rngs) -> None:
        if self.pooling is None:
            self.classifier: Any = new_head(ClassificationHead(make, rngs=rngs))
        else:
            self.classifier = new_head(make.linear(make.config.hidden_size, make.config.num_labels, rngs))

    def output(self, hidden: jax.Array, attention_mask: jax.Array | None) -> jax.Array:
        return self.classifier(hidden if self.pooling is None else mean_token(hidden, attention_mask))


class _TokenClassification(Encoder):
    task = "token-classification"
    heads = ("classifier",)
    renewable = ("classifier",)

    def add_head(self, make: Make, rngs: nnx.Rngs) -> None:
        self.classifier = new_head(make.linear(make.config.hidden_size, make.config.num_labels, rngs))

    def output(self, hidden: jax.Array, attention_mask: jax.Array | None) -> jax.Array:
        return self.classifier(hidden)


class BertForTokenClassification(_TokenClassification, Bert):
    """Logits [B, T, C] for each token."""


class RobertaForTokenClassification(_TokenClassification, Roberta):
    """Logits [B, T, C] for each token."""


class BertForMaskedLM(Bert):
    """Logits [B, T, V] for each token."""

    task = "masked-lm"
    heads = ("cls",)

    def add_head(self, make: Make, rngs: nnx.Rngs) -> None:
        self.cls = PretrainingHeads(make, rngs=rngs)

    def output(self, hidden: jax.Array, attention_mask: jax.Array | None) -> jax.Array:
        return self.logits(hidden)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Logits [B, T, V] of the last hidden state [B, T, D]."""
        return self.cls.predictions(hidden, self.embeddings.word_embeddings)


class RobertaForMaskedLM(Roberta):
    """Logits [B, T, V] for each token."""

    task = "masked-lm"
    heads = ("lm_head",)

    def add_head(self, make: Make, rngs: nnx.Rngs) -> None:
        self.lm_head = RobertaHead(make, rngs=rngs)

    def output(self, hidden: jax.Array, attention_mask: jax.Array | None) -> jax.Array:
        return self.logits(hidden)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Logits [B, T, V] of the last hidden state [B, T, D]."""
        return self.lm_head(hidden, self.embeddings.word_embeddings)


def parse(fields: Fields) -> EncoderConfig:
    """The configuration in a config.json of model_type "bert" or "roberta"."""
    roberta = fields.text("model_type") == "roberta"
    shared = fields.shared(
        vocab_size=50265 if roberta else 30522,
        hidden_size=768,
        num_hidden_layers=12,
        pad_token_id=1 if roberta else 0,
        bos_token_id=0 if roberta else None,
        eos_token_id=2 if roberta else None,
    )
    fields.choice("position_embedding_type", "absolute", ("absolute",))
    for name in ("is_decoder", "add_cross_attention"):
        if fields.flag(name, False):
            raise fields.refuse(name, f"false: a {shared['model_type']} is an encoder here")
    config = EncoderConfig(
        **shared,
        num_attention_heads=fields.integer("num_attention_heads", 12),
        intermediate_size=fields.integer("intermediate_size", 3072),
        hidden_act=fields.choice("hidden_act", "gelu", ACTIVATIONS),
        max_position_embeddings=fields.integer("max_position_embeddings", 512),
        type_vocab_size=fields.integer("type_vocab_size", 2),
        layer_norm_eps=fields.number("layer_norm_eps", 1e-12),
    )
    if config.hidden_size % config.num_attention_heads:
        raise fields.refuse("num_attention_heads", f"a divisor of hidden_size, {config.hidden_size}")
    if roberta and config.pad_token_id is None:
        raise fields.refuse("pad_token_id", "a token id: RoBERTa counts positions from it")
    return config


# Heads of other tasks and what a task leaves out: known, and no sign that the file is another model's.
_POOLER = r"pooler\.dense\.(weight|bias)"

FAMILIES = {
    "bert": Family(
        model_type="bert",
        parse=parse,
        classes={
            "base": Bert,
            "sequence-classification": BertForSequenceClassification,
            "token-classification": BertForTokenClassification,
            "masked-lm": BertForMaskedLM,
        },
        architectures={
            "BertModel": "base",
            "BertForSequenceClassification": "sequence-classification",
            "BertForTokenClassification": "token-classification",
            "BertForMaskedLM": "masked-lm",
            "BertForPreTraining": "masked-lm",
        },
        tied=("cls.predictions.decoder.weight", "embeddings.word_embeddings.weight"),
        older=((r"\.LayerNorm\.weight$", ".LayerNorm.gamma"), (r"\.LayerNorm\.bias$", ".LayerNorm.beta")),
        ignored=(rf"(bert\.)?{_POOLER}", r"cls\..*", r"classifier\.(weight|bias)"),
    ),
    "roberta": Family(
        model_type="roberta",
        parse=parse,
        classes={
            "base": Roberta,
            "sequence-classification": RobertaForSequenceClassification,
            "token-classification": RobertaForTokenClassification,
            "masked-lm": RobertaForMaskedLM,
        },
        architectures={
            "RobertaModel": "base",
            "RobertaForSequenceClassification": "sequence-classification",
            "RobertaForTokenClassification": "token-classification",
            "RobertaForMaskedLM": "masked-lm",
        },
        tied=("lm_head.decoder.weight", "embeddings.word_embeddings.weight"),
        ignored=(rf"(roberta\.)?{_POOLER}", r"lm_head\..*", r"classifier\..*"),
    ),
}
