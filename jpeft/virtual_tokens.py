"""Virtual tokens in a model: where they stand, and what they do to the positions of the real ones.

A prompt method gives a model with V token ids n more, V to V + n - 1, which its embedding looks up in the prompt. They
go into a batch at a `position`:

    "front"         before a row's first real token, behind padding on the left
    "back"          behind its last real token, before padding on the right
    (0, 0, 3, ...)  token by token: before the row's real token of that number (behind the last, if it has fewer)
    None            nowhere: whoever makes the batch writes the ids where they belong

Calling a model of `jpeft.models`, or its `hidden`, puts them in, and what comes out for each token comes out for the
given ones only: [B, T, ...] as without a prompt, so labels, losses and counts of tokens stay as they are. A classifier
that sums up a sequence sees them like any token. `jpeft.generate` does the same. Lower calls (`states`, `encode`,
`decode`, anything with a `cache`) and models of your own take the tokens as they are: use `insert_prompt` there.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jpeft import surgery
from jpeft.errors import JpeftError
from jpeft.wrapper import Wrapper

IGNORED = -100  # the label of a token that is not learnt


def insert_prompt(batch: Mapping[str, Any], model: nnx.Module, *, position: Any = None) -> dict[str, Any]:
    """`batch` with the virtual tokens of `model` in its rows; as it is, if the model has none.

    batch: `input_ids` [B, T], and any of `attention_mask`, `token_type_ids` and `labels` of that shape, which become
    [B, T + n]: 1, 0 and -100 at virtual tokens. Other entries stay as they are. Works under `jit`.

    position: instead of the method's own. Raises JpeftError if there is neither, or the batch has its own `positions`
    or `segment_ids`, which would have to change in ways that only their maker knows.
    """
    wrapper = prompt_of(model)
    if wrapper is None:
        return dict(batch)
    position = wrapper.position if position is None else position
    if position is None:
        raise JpeftError('insert_prompt: the method has position=None; give position="front", "back" or places')
    return _inserted(batch, wrapper, position)[0]


def with_prompt(model: nnx.Module, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`function(*args, **kwargs)`, which takes `input_ids`, with the model's virtual tokens in them.

    Of a result [B, T + n, ...], the rows of the given tokens are returned, [B, T, ...].
    """
    wrapper = prompt_of(model)
    if wrapper is None or wrapper.position is None or kwargs.get("cache") is not None:
        return function(*args, **kwargs)
    arguments = inspect.signature(function).bind(*args, **kwargs).arguments
    given, places = _inserted(arguments, wrapper, wrapper.position)
    result = function(**given)
    if getattr(model, "has_decoder", False) or result.ndim < 3:
        return result
    return jnp.take_along_axis(result, places[..., None], axis=1)


def prompt_of(model: nnx.Module) -> Wrapper | None:
    """The wrapper that holds the model's virtual tokens, or None.

    Raises JpeftError if another one is around it, which would be asked for ids that it does not know.
    """
    wrappers = [module for _, module in surgery.modules(model) if isinstance(module, Wrapper)]
    found = next((module for module in wrappers if module.virtual_tokens), None)
    around = next((module for module in wrappers if found is not None and module.base is found), None)
    if around is not None and found is not None:
        raise JpeftError(
            f"{around.name!r} wraps the embedding that has the virtual tokens of {found.name!r}, whose ids it does not "
            "know; apply the prompt method last"
        )
    return found


def inserted_before_decoding(model: nnx.Module, ids: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Token ids and mask [B, T] of texts that are to be continued, with the virtual tokens in them."""
    wrapper = prompt_of(model)
    if wrapper is None or wrapper.position is None:
        return ids, mask
    given, _ = _inserted({"input_ids": ids, "attention_mask": mask}, wrapper, wrapper.position, hidden_first=True)
    return given["input_ids"], given["attention_mask"]


def _inserted(
    batch: Mapping[str, Any], wrapper: Wrapper, position: Any, *, hidden_first: bool = False
) -> tuple[dict[str, Any], jax.Array]:
    """The batch with virtual tokens, and where its own tokens stand in it, [B, T].

    Rows of a batch for several tasks that use the base alone have them masked, at the end or (`hidden_first`) at the
    start.
    """
    if batch.get("input_ids") is None:
        raise JpeftError(f"the batch has no input_ids for virtual tokens to go into, but {sorted(batch)}")
    ids = jnp.asarray(batch["input_ids"])
    mask, count = batch.get("attention_mask"), wrapper.virtual_tokens
    odd = [name for name in ("positions", "segment_ids") if batch.get(name) is not None]
    if odd or ids.ndim != 2:
        said = f"{odd[0]} cannot be given" if odd else f"input_ids must be [batch, tokens], not {list(ids.shape)}"
        raise JpeftError(f"{said} where virtual tokens go into the batch; unpack the texts, or use position=None")
    rows, length = ids.shape
    real = jnp.ones(ids.shape, bool) if mask is None else jnp.asarray(mask).astype(bool)
    first = jnp.argmax(real, axis=1)
    span = length - jnp.argmax(real[:, ::-1], axis=1) - first
    goal = {"front": [0] * count, "back": [length] * count}.get(position, position)
    if isinstance(goal, str) or len(goal) != count:
        raise JpeftError(
            f'position={position!r}: choose "front", "back", or a place for each of {count} virtual tokens'
        )
    before = first[:, None] + jnp.minimum(jnp.asarray(goal, jnp.int32), span[:, None])
    shown = jnp.ones((rows, 1), bool)
    if wrapper.adapter_ids is not None:
        shown = (wrapper.adapter_ids[...] >= 0)[:, None]
        before = jnp.where(shown, before, 0 if hidden_first else length)
        mask = jnp.ones(ids.shape, jnp.int32) if mask is None else mask
    virtual = before + jnp.arange(count)
    own = jnp.arange(length) + jnp.sum(before[:, :, None] <= jnp.arange(length), axis=1)
    numbers = wrapper.num_embeddings + jnp.arange(count)

    def place(old: Any, new: Any) -> jax.Array:
        old, row = jnp.asarray(old), jnp.arange(rows)[:, None]
        made = jnp.zeros((rows, length + count), old.dtype).at[row, own].set(old)
        return made.at[row, virtual].set(jnp.broadcast_to(new, (rows, count)).astype(old.dtype))

    made = {**batch, "input_ids": place(ids, numbers)}
    for name, value in (("attention_mask", shown), ("token_type_ids", 0), ("labels", IGNORED)):
        old = mask if name == "attention_mask" else batch.get(name)
        if old is not None and jnp.shape(old) == ids.shape:
            made[name] = place(old, value)
    return made, own


def position_offset(model: nnx.Module) -> int | jax.Array:
    """The position of a model's first real token: how many positions its wrappers take before the tokens.

    A whole number, or one per row, [B, 1], where rows use different adapters.
    """
    found = [_offset(module) for _, module in surgery.modules(model) if isinstance(module, Wrapper)]
    if all(isinstance(number, int) for number in found):
        return max(found, default=0)
    most = found[0]
    for number in found[1:]:
        most = jnp.maximum(most, number)
    return most


def most_positions(model: nnx.Module) -> int:
    """The largest `position_offset` of any row."""
    return max((_taken(module) for _, module in surgery.modules(model) if isinstance(module, Wrapper)), default=0)


def places_taken(model: nnx.Module) -> int:
    """How many of the places that a model has for tokens its virtual ones take, where the model puts them in itself."""
    prompt = prompt_of(model)
    return most_positions(model) + (0 if prompt is None or prompt.position is None else prompt.virtual_tokens)


def _taken(module: Any) -> int:
    """By a wrapper and those inside it."""
    return module.positions_taken + _taken(module.base) if isinstance(module, Wrapper) else 0


def _offset(module: Any) -> Any:
    """The same, with 0 for rows that use the base alone."""
    if not isinstance(module, Wrapper):
        return 0
    own: Any = module.positions_taken
    if own and module.adapter_ids is not None:
        own = jnp.where(module.adapter_ids[...] < 0, 0, own)[:, None]
    return own + _offset(module.base)
