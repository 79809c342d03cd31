"""`Model`: what every model of `jpeft.models` is, and how an eager call compiles once per shape.

A model's attributes carry the names of the Hugging Face checkpoint, so targets, key tables and PEFT files agree. Beside
them it holds static attributes:

    config        frozen dataclass read from config.json
    task          "causal-lm", "sequence-classification", ... ("base" has no head)
    base_prefix   what the checkpoint puts before the names of everything but the heads ("model", "bert", ...)
    heads         attributes that are output heads; "all-linear" leaves them out
    roles         which modules play a part that methods speak of, as targets: {role: entries}; the roles are
                    attention             modules that hold an `attention_fn`
                    query, key, value     linear layers that make them (one layer may make all three)
                    attention_output      the linear layer at the end of an attention
                    feed_forward          the feed-forward sublayer x -> y; where no one module is it, the module
                                          that ends it, which is called with (y, x) and says `adds_residual`
                    feed_forward_output   the linear layer at the end of a feed-forward sublayer
                    norm                  the normalisations
                    embedding             the token embedding
    pooling       how a classifier sums up a sequence: None for Hugging Face's way, or "mean"
    renewable     attributes that may be missing in a checkpoint and are then made anew, trainable
    sharding_rules   how weights lie on a mesh, as `jpeft.shard` takes rules: {target: spec of (in, out)}
    unread        expressions of checkpoint keys that the task has no use for, such as the decoder's
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from flax.core import FrozenDict
from jax.sharding import NamedSharding, PartitionSpec

from jpeft import surgery
from jpeft.errors import JpeftError
from jpeft.models.config import Config
from jpeft.variables import Trainable, retype
from jpeft.virtual_tokens import with_prompt

# Layers that read the residual stream and layers that write to it. Along `tensor` the former are cut by what they make
# and the latter by what they are made of, so that one sum over devices ends each sublayer; along `fsdp` both are cut by
# the features of the stream and gathered where they are used.
READS = PartitionSpec("fsdp", "tensor")
WRITES = PartitionSpec("tensor", "fsdp")

TASKS = ("causal-lm", "sequence-classification", "token-classification", "masked-lm", "seq2seq-lm", "base")

_P = ParamSpec("_P")
_R = TypeVar("_R")


@functools.partial(jax.jit, static_argnums=(0, 1))
def _jitted(method: Callable[..., Any], graphdef: Any, state: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    return method(nnx.merge(graphdef, state), *args, **kwargs)


def compiled(method: Callable[_P, _R]) -> Callable[_P, _R]:
    """A method that runs directly while JAX traces, and through one cached `jax.jit` when it is called eagerly.

    The arguments are pytrees of arrays (or None). Eager calls of the same shapes share one compilation, whatever the
    values in the model.
    """

    @functools.wraps(method)
    def call(*arguments: _P.args, **kwargs: _P.kwargs) -> _R:
        model, *args = arguments
        graphdef, state = nnx.split(model)
        leaves = jax.tree.leaves((state, args, kwargs))
        if any(isinstance(leaf, jax.core.Tracer | jax.ShapeDtypeStruct) for leaf in leaves):
            return method(*arguments, **kwargs)
        return _jitted(method, graphdef, state, tuple(args), kwargs)

    return call


class Model(nnx.Module):
    """Base of all models: subclasses define `forward` and the attributes in the module's docstring."""

    heads: tuple[str, ...] = ()
    renewable: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    base_prefix: str = ""
    roles: Mapping[str, tuple[str, ...]] = FrozenDict()
    sharding_rules: Mapping[str, PartitionSpec] = FrozenDict()
    task: str = "base"
    pooling: str | None = None
    batch_sharding: NamedSharding | None = None

    def __init__(self, config: Config):
        self.config = config

    def on_mesh(self, rows: NamedSharding, own: Mapping[str, PartitionSpec]) -> None:
        """Told by `jpeft.shard` how the rows of a batch lie."""
        self.batch_sharding = rows

    def by_rows(self, x: jax.Array) -> jax.Array:
        """x [B, ...], on a mesh with its rows where those of the batch are; hidden states [B, T, D] with their tokens
        along `context`.
        """
        at = self._rows_for(x)
        return x if at is None else jax.lax.with_sharding_constraint(x, at)

    def embedded(self, x: jax.Array) -> jax.Array:
        """What came out of an embedding, [B, T, D], by rows.

        If nothing is said it lies as the table: features along `fsdp`, every row on every device, and so do all
        activations after it. The way from there is said too: the compiler would go by the whole batch.
        """
        at = self._rows_for(x)
        if at is not None and x.shape[-1] % at.mesh.shape.get("fsdp", 1) == 0 and "fsdp" in at.spec[0]:
            others = tuple(axis for axis in at.spec[0] if axis != "fsdp")
            tokens = at.spec[1] if len(at.spec) > 1 else None
            features = NamedSharding(at.mesh, PartitionSpec(others or None, tokens, "fsdp"))
            x = jax.lax.with_sharding_constraint(x, features)
        return self.by_rows(x)

    def _rows_for(self, x: jax.Array) -> NamedSharding | None:
        """How x [B, ...] is to lie; None without a mesh, and where the rows cannot be dealt out evenly."""
        at = self.batch_sharding
        if at is None or not at.spec or x.shape[0] % math.prod(at.mesh.shape[axis] for axis in at.spec[0]):
            return None
        parts = at.mesh.shape.get("context", 1)
        if x.ndim == 3 and parts > 1 and x.shape[1] % parts == 0:
            return NamedSharding(at.mesh, PartitionSpec(at.spec[0], "context"))
        return at

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's function; call the model itself instead."""
        raise NotImplementedError(f"{type(self).__name__} defines no forward")

    @compiled
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs `forward`: directly under tracing, else through one cached `jax.jit`."""
        return with_prompt(self, self.forward, *args, **kwargs)


_M = TypeVar("_M", bound=nnx.Module)


def new_head(module: _M) -> _M:
    """`module` with every parameter `Trainable` in group "head", as a head that no checkpoint has trained must be."""

    def train(variable: nnx.Variable) -> nnx.Variable:
        return retype(variable, Trainable, group="head") if isinstance(variable, nnx.Param) else variable

    return surgery.map_variables(module, train)  # type: ignore[return-value]


def check_tokens(name: str, ids: Any, like: Any = None) -> None:
    """Refuses what is not an integer array [B, T] (of the shape of `like`, if given)."""
    if getattr(ids, "ndim", None) != 2 or not jnp.issubdtype(ids.dtype, jnp.integer):
        found = f"{getattr(ids, 'dtype', type(ids).__name__)}{list(getattr(ids, 'shape', ()))}"
        raise JpeftError(f"{name}: expected an integer array [batch, tokens], found {found}")
    if 0 in ids.shape:
        raise JpeftError(f"{name}: expected at least one row and one token, found {list(ids.shape)}")
    if like is not None and ids.shape != like.shape:
        raise JpeftError(f"{name}: expected the shape of the tokens, {list(like.shape)}, found {list(ids.shape)}")


def check_mask(name: str, mask: Any, like: Any) -> None:
    """Refuses what is not None or an array [B, T] of ones and zeros of the shape of `like`."""
    if mask is not None and getattr(mask, "shape", None) != like.shape:
        found = list(getattr(mask, "shape", ()))
        raise JpeftError(f"{name}: expected the shape of the tokens, {list(like.shape)}, found {found}")
    if mask is not None and not (mask.dtype == bool or jnp.issubdtype(mask.dtype, jnp.integer)):
        raise JpeftError(f"{name}: expected 1 at tokens and 0 at padding, as integers or booleans, found {mask.dtype}")


def last_token(hidden: jax.Array, input_ids: jax.Array, mask: jax.Array | None, pad_token_id: int | None) -> jax.Array:
    """The hidden state [B, D] of the last real token, as Hugging Face's classifiers on decoders pool.

    Real are the tokens that `mask` [B, T] attends to, or else those that are not `pad_token_id`; without either, the
    last one is taken.
    """
    if mask is not None:
        real = mask.astype(bool)
    elif pad_token_id is not None:
        real = input_ids != pad_token_id
    else:
        return hidden[:, -1]
    last = jnp.argmax(jnp.arange(real.shape[1]) * real, axis=1)
    return jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]


def mean_token(hidden: jax.Array, mask: jax.Array | None) -> jax.Array:
    """The mean [B, D] of the hidden states of the tokens that `mask` [B, T] attends to, summed in float32."""
    if mask is None:
        return jnp.mean(hidden, axis=1)
    weights = mask.astype(bool)[..., None]
    total = jnp.sum(jnp.where(weights, hidden, 0), axis=1, dtype=jnp.float32)
    return (total / jnp.maximum(jnp.sum(weights, axis=1), 1)).astype(hidden.dtype)
