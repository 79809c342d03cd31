"""Text generation: a KV cache, left-padded batches, one compilation for each bucket of lengths.

    ids = jpeft.generate(model, input_ids, attention_mask, max_new_tokens=64)

Prompt and decoding are one jitted function of the model's arrays: another adapter of the same structure, other lengths
of the same bucket, another seed, temperature or end token run the same program.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jpeft import kv_cache, surgery
from jpeft.baking import bake
from jpeft.errors import JpeftError
from jpeft.partition import GraphDef, check_ids, combine, partition, tasks_of
from jpeft.sampling import Sampling, next_tokens
from jpeft.stack import Stack
from jpeft.virtual_tokens import inserted_before_decoding, places_taken, prompt_of

Cache = dict[str, jax.Array]
_LEAST_BUCKET = 16
_SHALLOW = 16  # layers


def generate(
    model: Any,
    input_ids: Any,
    attention_mask: Any = None,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    adapter_ids: Any = None,
) -> np.ndarray:
    """Continues each row of `input_ids`, an integer array [B, T], and returns int32 [B, T + N], N <= max_new_tokens.

    attention_mask: [B, T], 1 at real tokens; without it every token is real, whatever its id. Prompts may be padded on
    either side; the result has them padded on the left. Encoder-decoders return decoder tokens alone, the first of
    which is the config's `decoder_start_token_id`: [B, 1 + N].

    temperature: 0 takes the likeliest token, otherwise tokens are drawn from softmax(logits / temperature), of the
    `top_k` likeliest only, and of the likeliest that together have probability `top_p` (Holtzman et al., 2020). What is
    drawn depends on `seed`, the row's number and the step.

    A row ends with any of `eos_token_id` (default: the model's), and is filled up with `pad_token_id` (default: the
    model's, else its first end token); N is where the last row ends.

    adapter_ids: [B], for a model made by `jpeft.multi`: which task each row uses, -1 for the base alone.

    Raises JpeftError for arguments outside these, for ids outside the vocabulary, and where prompt and new tokens do
    not fit into the model's context.
    """
    seq2seq = _is_encoder_decoder(model)
    sampling = _sampling(temperature, top_k, top_p)
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int | np.integer) or max_new_tokens < 1:
        raise JpeftError(f"max_new_tokens={max_new_tokens!r}: expected a positive integer")
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer):
        raise JpeftError(f"seed={seed!r}: expected an integer")
    ids, mask = _prompt(model, input_ids, attention_mask)
    ends = _tokens("eos_token_id", eos_token_id, _config(model, "eos_token_id"))
    pad = (_tokens("pad_token_id", pad_token_id, _config(model, "pad_token_id"), most=1) or ends or (0,))[0]
    context = None if seq2seq else _config(model, "max_position_embeddings")
    taken = places_taken(model)
    context, behind = (
        (context, "") if context is None or not taken else (context - taken, f" beside {taken} virtual tokens")
    )
    longest = int(mask.sum(axis=1).max())
    if context is not None and longest + max_new_tokens > context:
        raise JpeftError(
            f"the longest prompt has {longest} tokens and max_new_tokens is {max_new_tokens}: "
            f"{longest + max_new_tokens} together, but the model's context is {context}{behind}; shorten one of them"
        )
    if not seq2seq:
        ids, mask = _to_the_right(ids, mask, pad)
    # An encoder's padding may stand anywhere; a decoder's is on the left, and what all rows have of it is dropped.
    length = ids.shape[1] if seq2seq else longest
    width = bucket(length) if context is None else min(bucket(length), context)
    padded = [_resize(array, length, width, left=not seq2seq) for array in (ids, mask)]
    plan = Plan(sampling, bucket(max_new_tokens), seq2seq)
    drawing = {
        "temperature": np.float32(temperature),
        "top_p": np.float32(1.0 if top_p is None else top_p),
        "key": jax.random.key(int(seed) % 2**32),
        "eos": np.asarray(ends, np.int32),
        "pad": np.int32(pad),
        "steps": np.int32(max_new_tokens),
    }
    graphdef, *arrays = partition(model)
    rows = None if adapter_ids is None else np.asarray(adapter_ids)
    if rows is not None:
        check_ids(rows, tasks_of(model))
    made, steps = _generate(graphdef, tuple(arrays), rows, *padded, drawing, plan)
    if not made.is_fully_addressable and isinstance(made.sharding, NamedSharding):  # each process has some rows
        made = jax.jit(lambda x: x, out_shardings=NamedSharding(made.sharding.mesh, PartitionSpec()))(made)
    first = np.full((len(ids), 1), _config(model, "decoder_start_token_id"), np.int32) if seq2seq else ids
    return np.concatenate([first, np.asarray(made)[:, : int(steps)]], axis=1)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a compilation depends on, beside the model's structure and the padded prompt's shape.

    new: room for new tokens, a bucket.
    """

    sampling: Sampling
    new: int
    seq2seq: bool


def bucket(length: int) -> int:
    """The next of 16, 32, 48, 64, 96, 128, 192, ...: two sizes for each doubling, so few programs are compiled."""
    step = max(_LEAST_BUCKET, (1 << (length - 1).bit_length()) // 4)
    return -(-length // step) * step


@functools.partial(jax.jit, static_argnames=("graphdef", "plan"))
def _generate(
    graphdef: GraphDef,
    arrays: tuple[Any, ...],
    rows: jax.Array | None,
    ids: jax.Array,
    mask: jax.Array,
    drawing: dict[str, Any],
    plan: Plan,
) -> tuple[jax.Array, jax.Array]:
    """New tokens [B, plan.new] for padded prompts [B, T], and how many steps were taken."""
    model = _unrolled(bake(combine(graphdef, *arrays, adapter_ids=rows)))
    ids, mask = inserted_before_decoding(model, ids, mask)
    start = _start_seq2seq if plan.seq2seq else _start
    logits, cache = start(model, ids, mask, plan.new)

    def choose(logits: jax.Array, done: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
        drawn = next_tokens(logits, plan.sampling, drawing["temperature"], drawing["top_p"], drawing["key"], step)
        token = jnp.where(done, drawing["pad"], drawn)
        return token, done | jnp.isin(token, drawing["eos"])

    def more(carry: tuple[Any, ...]) -> jax.Array:
        _, _, _, done, step = carry
        return (step < drawing["steps"]) & ~jnp.all(done)

    def advance(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        made, token, cache, done, step = carry
        logits, cache = _decode(model, token[:, None], mask, cache, plan)
        token, done = choose(logits, done, step)
        return jax.lax.dynamic_update_slice(made, token[:, None], (0, step)), token, cache, done, step + 1

    zero = jnp.zeros((), jnp.int32)
    token, done = choose(logits, jnp.zeros(len(ids), bool), zero)
    made = jnp.full((len(ids), plan.new), drawing["pad"]).at[:, 0].set(token)
    made, _, _, _, steps = jax.lax.while_loop(more, advance, (made, token, cache, done, zero + 1))
    return made, steps


def _unrolled(model: Any) -> Any:
    """On CPUs, `model` with the layers of shallow stacks side by side; elsewhere the model as it is.

    Decoding is bound by reading the weights, and XLA's CPU backend copies each layer's slice of a stack before it
    multiplies with it. Side by side, the layers are copied once before the first token. Deep stacks stay: compiling
    their layers one by one takes longer than most generations.
    """
    if jax.default_backend() != "cpu":
        return model
    return surgery.rewrite(
        model, lambda m: m.unstack() if isinstance(m, Stack) and m.length <= _SHALLOW else m, copy=False
    )


def _start(model: Any, ids: jax.Array, mask: jax.Array, new: int) -> tuple[jax.Array, Cache]:
    """Logits [B, V] after left-padded prompts, and a cache that holds them and has room for `new` tokens."""
    dtype = jax.eval_shape(_embedding(model), ids).dtype
    hidden, cache = model.states(ids, mask, cache=model.init_cache(*ids.shape, dtype))
    # The room is added afterwards, so that prompts attend to themselves only.
    cache = {
        **cache,
        **{name: kv_cache.lengthened(cache[name], new) for name in ("k", "v")},
        "mask": jnp.pad(cache["mask"], [(0, 0), (0, new)]),
    }
    return model.logits(hidden[:, -1]), cache


def _start_seq2seq(model: Any, ids: jax.Array, mask: jax.Array, new: int) -> tuple[jax.Array, Cache]:
    """Logits [B, V] after the decoder's first token, and a cache that holds the encoder's keys and values too."""
    first = jnp.full((len(ids), 1), model.config.decoder_start_token_id, jnp.int32)
    encoded = model.encode(ids, mask)
    logits, cache = model.decode(first, encoded=encoded, encoder_mask=mask, cache=model.init_cache(len(ids), new))
    return logits[:, -1], cache


def _decode(model: Any, ids: jax.Array, mask: jax.Array, cache: Cache, plan: Plan) -> tuple[jax.Array, Cache]:
    if plan.seq2seq:
        logits, cache = model.decode(ids, encoder_mask=mask, cache=cache)
    else:
        logits, cache = model(ids, cache=cache)
    return logits[:, -1], cache


def _embedding(model: Any) -> Any:
    return getattr(model, getattr(model, "embedding", "shared"))


def _is_encoder_decoder(model: Any) -> bool:
    if not hasattr(model, "init_cache") or not hasattr(model, "logits"):
        kind, task = type(model).__name__, getattr(model, "task", None)
        said = f' (task={task!r}); load it with task="causal-lm" or "seq2seq-lm"' if task else ""
        raise JpeftError(f"generate: {kind} is not a language model with a KV cache{said}")
    if not hasattr(model, "encode"):
        return False
    if _config(model, "decoder_start_token_id") is None:
        raise JpeftError("generate: config.json names no decoder_start_token_id, with which decoding starts; add it")
    return True


def _config(model: Any, name: str) -> Any:
    return getattr(getattr(model, "config", None), name, None)


def _sampling(temperature: Any, top_k: Any, top_p: Any) -> Sampling:
    def number(value: Any) -> bool:
        return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)

    if not number(temperature) or not 0 <= temperature < float("inf"):
        raise JpeftError(f"temperature={temperature!r}: expected 0 (the likeliest token) or a positive number")
    if top_k is not None and (not isinstance(top_k, int | np.integer) or isinstance(top_k, bool) or top_k < 1):
        raise JpeftError(f"top_k={top_k!r}: expected a positive integer, or None for all tokens")
    if top_p is not None and (not number(top_p) or not 0 < top_p <= 1):
        raise JpeftError(f"top_p={top_p!r}: expected a probability above 0 and up to 1, or None for all tokens")
    if temperature == 0:
        return Sampling(greedy=True)
    return Sampling(False, None if top_k is None else int(top_k), top_p is not None and top_p < 1)


def _prompt(model: Any, input_ids: Any, attention_mask: Any) -> tuple[np.ndarray, np.ndarray]:
    """The prompts as int32 [B, T] and which of their tokens are real, checked."""
    ids = np.asarray(input_ids)
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
        raise JpeftError(
            f"input_ids: expected an integer array [batch, tokens], found {ids.dtype}{list(ids.shape)}"
            + ("; give one row as input_ids[None]" if ids.ndim == 1 else "")
        )
    mask = np.ones(ids.shape, bool) if attention_mask is None else np.asarray(attention_mask)
    if mask.shape != ids.shape or not (np.issubdtype(mask.dtype, np.integer) or mask.dtype == bool):
        raise JpeftError(
            f"attention_mask: expected integers or booleans of the shape of input_ids, {list(ids.shape)}, "
            f"found {mask.dtype}{list(mask.shape)}"
        )
    mask = mask.astype(bool)
    empty = np.flatnonzero(~mask.any(axis=1))
    if not ids.size or empty.size:
        raise JpeftError(
            f"input_ids: rows {empty.tolist()[:8] or 'none'} of {list(ids.shape)} have a real token to go on from"
        )
    size = getattr(_embedding(model), "num_embeddings", _config(model, "vocab_size"))
    prompt = prompt_of(model)
    size += prompt.virtual_tokens if prompt is not None and prompt.position is None else 0
    odd = np.argwhere(mask & ((ids < 0) | (ids >= size)))
    if len(odd):
        row, column = odd[0]
        raise JpeftError(f"input_ids[{row}, {column}] = {ids[row, column]}: the vocabulary has the ids 0 to {size - 1}")
    return np.where(mask, ids, 0).astype(np.int32), mask


def _tokens(name: str, given: Any, default: Any, most: int | None = None) -> tuple[int, ...]:
    value = default if given is None else given
    found = () if value is None else tuple(value) if np.iterable(value) else (value,)
    for token in found:
        if isinstance(token, bool) or not isinstance(token, int | np.integer) or token < 0 or len(found) > (most or 64):
            raise JpeftError(f"{name}={given!r}: expected a token id{'' if most else ' or a few of them'}")
    return tuple(int(token) for token in found)


def _to_the_right(ids: np.ndarray, mask: np.ndarray, pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Real tokens moved to the right edge, in order: padding on the left, in whatever place it was."""
    order = np.argsort(mask, axis=1, kind="stable")
    mask = np.take_along_axis(mask, order, axis=1)
    return np.where(mask, np.take_along_axis(ids, order, axis=1), pad).astype(np.int32), mask


def _resize(array: np.ndarray, length: int, width: int, *, left: bool) -> np.ndarray:
    """The last `length` columns, padded with zeros to `width` on the left or on the right."""
    room = width - length
    return np.pad(array[:, -length:], [(0, 0), (room, 0) if left else (0, room)])
