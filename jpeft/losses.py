"""Cross-entropy of language models, computed in blocks of tokens so that logits [B, T, V] never exist.

A model here is anything with `logits(hidden [..., D]) -> [..., V]`; `causal_lm_loss` needs `hidden(input_ids)` too.

Where nothing that the logits depend on is trained, the gradient of a block with respect to its hidden states is
computed in the forward pass, while the block's logits are at hand: it is [B, T, D], and the logits are computed once.
Otherwise (LoRA on the head, a trained head) each block is recomputed in the backward pass.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jpeft import surgery
from jpeft.errors import JpeftError
from jpeft.stack import Stack

IGNORED = -100  # the label of what is no target, as everywhere in the field
BLOCK = 512


def token_losses(model: Any, hidden: jax.Array, labels: jax.Array, *, block: int = BLOCK) -> jax.Array:
    """The cross-entropy [B, T] in float32 of predicting `labels` [B, T] from `hidden` [B, T, D].

    0 where the label is -100, NaN where it is another number that is no token. block: about how many tokens' logits
    exist at a time. In reverse mode only.
    """
    if hidden.ndim != 3 or labels.shape != hidden.shape[:2]:
        raise JpeftError(
            f"labels: expected one for each hidden state [batch, tokens], {list(hidden.shape[:2])}, found "
            f"{list(labels.shape)}"
        )
    if block < 1:
        raise JpeftError(f"block={block}: expected a positive number of tokens")
    if 0 in labels.shape:
        return jnp.zeros(labels.shape, jnp.float32)
    graphdef, state = nnx.split(model)
    compute = _kept if _head_is_frozen(model) else _recomputed
    parts = _parts(model)
    blocks = (_cut(hidden, block, parts), _cut(labels, block, parts))
    return _joined(compute(graphdef, state, *blocks), labels.shape[1], parts)


def language_model_loss(
    model: Any, hidden: jax.Array, labels: jax.Array, weights: jax.Array | None = None, *, block: int = BLOCK
) -> tuple[jax.Array, jax.Array]:
    """(sum of the losses of the targets, number of targets), as float32 scalars: divide after adding up batches.

    hidden: [B, T, D]; labels: [B, T], what each state is to predict, -100 for nothing. weights: [B, T]; each loss is
    multiplied by its weight, and the number is the sum of the weights.
    """
    counted = (labels != IGNORED).astype(jnp.float32)
    if weights is not None:
        if weights.shape != labels.shape:
            raise JpeftError(f"weights: expected one for each label, {list(labels.shape)}, found {list(weights.shape)}")
        counted = counted * weights
    losses = token_losses(model, hidden, labels, block=block)
    return jnp.sum(losses * counted), jnp.sum(counted)


def causal_lm_loss(
    model: Any,
    input_ids: jax.Array,
    *,
    attention_mask: jax.Array | None = None,
    labels: jax.Array | None = None,
    weights: jax.Array | None = None,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    block: int = BLOCK,
) -> tuple[jax.Array, jax.Array]:
    """`language_model_loss` of predicting each next token of [B, T].

    labels: [B, T], beside the tokens they name (they are shifted here), -100 where a token is not to be learnt; by
    default `input_ids`. weights: likewise. Padding, and the first token of a text or segment, are no targets.
    """
    hidden = model.hidden(input_ids, attention_mask, positions=positions, segment_ids=segment_ids)
    targets = _next(input_ids if labels is None else labels, IGNORED)
    if attention_mask is not None:
        seen = attention_mask.astype(bool)
        targets = jnp.where(seen & _next(seen, False), targets, IGNORED)
    if segment_ids is not None:
        targets = jnp.where(segment_ids == _next(segment_ids, -1), targets, IGNORED)
    return language_model_loss(model, hidden, targets, None if weights is None else _next(weights, 0), block=block)


def _next(x: jax.Array, last: Any) -> jax.Array:
    x = jnp.asarray(x)
    return jnp.concatenate([x[:, 1:], jnp.full((x.shape[0], 1), last, x.dtype)], axis=1)


def _head_is_frozen(model: nnx.Module) -> bool:
    # Logits come from what stands beside the layers: the head, and the embedding where the two are tied.
    for _, part in surgery.children(model):
        if not isinstance(part, nnx.Module) or isinstance(part, nnx.List):  # a list holds unstacked layers
            continue
        if any(isinstance(inner, Stack) for _, inner in surgery.modules(part)):
            continue
        if nnx.to_flat_state(nnx.state(part, nnx.Param)):  # Frozen is no nnx.Param
            return False
    return True


def _parts(model: Any) -> int:
    """Over how many devices a mesh deals out the tokens of a row."""
    rows = getattr(model, "batch_sharding", None)
    return 1 if rows is None else rows.mesh.shape.get("context", 1)


def _cut(x: jax.Array, block: int, parts: int) -> jax.Array:
    # Blocks are cut along the tokens and keep the batch axis, over which a mesh shards the data. With tokens in parts
    # on several devices, each block has some of every part: neighbours in a block are `count` tokens apart.
    batch, length = x.shape[:2]
    count = -(-length // max(1, block // batch))
    size = -(-length // count)
    if parts > 1:
        size = -(-size // parts) * parts
        count = -(-length // size)
    fill = IGNORED if jnp.issubdtype(x.dtype, jnp.integer) else 0
    padding = [(0, 0), (0, count * size - length)] + [(0, 0)] * (x.ndim - 2)
    x = jnp.pad(x, padding, constant_values=fill)
    if parts > 1:
        return jnp.moveaxis(x.reshape(batch, size, count, *x.shape[2:]), 2, 0)
    return jnp.moveaxis(x.reshape(batch, count, size, *x.shape[2:]), 1, 0)  # [blocks, B, tokens, ...]


def _joined(x: jax.Array, length: int, parts: int) -> jax.Array:
    x = jnp.moveaxis(x, 0, 2 if parts > 1 else 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def _logits(graphdef: Any, state: Any, hidden: jax.Array) -> jax.Array:
    return nnx.merge(graphdef, state).logits(hidden).astype(jnp.float32)


def _losses(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Losses and log-partition functions of one block."""
    total = jax.nn.logsumexp(logits, axis=-1)
    # Beyond the end stands NaN, before the start Python's negative index: so a bad label goes to the end.
    index = jnp.where(labels == IGNORED, 0, jnp.where(labels < 0, logits.shape[-1], labels))
    chosen = jnp.take_along_axis(logits, index[..., None], axis=-1, mode="fill")[..., 0]
    return jnp.where(labels == IGNORED, 0.0, total - chosen), total


def _recomputed(graphdef: Any, state: Any, hidden: jax.Array, labels: jax.Array) -> jax.Array:
    @jax.checkpoint
    def body(hidden: jax.Array, labels: jax.Array) -> jax.Array:
        return _losses(_logits(graphdef, state, hidden), labels)[0]

    return jax.lax.scan(lambda _, xs: (None, body(*xs)), None, (hidden, labels))[1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _kept(graphdef: Any, state: Any, hidden: jax.Array, labels: jax.Array) -> jax.Array:
    return _recomputed(graphdef, state, hidden, labels)


def _kept_forward(graphdef: Any, state: Any, hidden: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    def body(_: None, xs: tuple[jax.Array, jax.Array]) -> tuple[None, tuple[jax.Array, jax.Array]]:
        hidden, labels = xs
        logits, pull = jax.vjp(lambda h: _logits(graphdef, state, h), hidden)
        losses, total = _losses(logits, labels)
        hit = jax.lax.broadcasted_iota(labels.dtype, logits.shape, logits.ndim - 1) == labels[..., None]
        slope = jnp.exp(logits - total[..., None]) - hit
        (gradient,) = pull(jnp.where((labels == IGNORED)[..., None], 0.0, slope))
        return None, (losses, gradient)

    return jax.lax.scan(body, None, (hidden, labels))[1]


def _kept_backward(graphdef: Any, gradient: jax.Array, dy: jax.Array) -> tuple[None, jax.Array, None]:
    return None, (gradient * dy[..., None]).astype(gradient.dtype), None


_kept.defvjp(_kept_forward, _kept_backward)
