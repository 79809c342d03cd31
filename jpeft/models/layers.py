"""Layers that the families share: norms, activations, linear and embedding layers with Hugging Face's initial values.

RMSNorm and the elementwise products have custom VJPs whose residuals are their inputs: autodiff would keep every
intermediate of theirs alive until the backward pass.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jpeft.errors import JpeftError, nearest


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """`scale * x / sqrt(mean(x^2) + epsilon)` over the last axis, computed in float32 (Zhang and Sennrich, 2019)."""
    wide = x.astype(jnp.float32)
    rate = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + epsilon)
    return scale * (wide * rate).astype(x.dtype)


def _rms_norm_forward(x: jax.Array, scale: jax.Array, epsilon: float) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return rms_norm(x, scale, epsilon), (x, scale)


def _rms_norm_backward(
    epsilon: float, residuals: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, scale = residuals
    wide, grown = x.astype(jnp.float32), dy.astype(jnp.float32)
    rate = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + epsilon)
    normed, scaled = wide * rate, grown * scale.astype(jnp.float32)
    dx = rate * (scaled - normed * jnp.mean(scaled * normed, axis=-1, keepdims=True))
    dscale = jnp.sum(grown * normed, axis=tuple(range(x.ndim - 1)))
    return dx.astype(x.dtype), dscale.astype(scale.dtype)


rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)


class RMSNorm(nnx.Module):
    """Root mean square norm over the last axis with a learned `scale` [features]."""

    def __init__(self, features: int, *, epsilon: float, param_dtype: Any = jnp.float32):
        self.scale = nnx.Param(jnp.ones((features,), param_dtype))
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.scale[...], self.epsilon)


def recomputed(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """An elementwise function whose backward pass keeps its inputs only and computes the rest again."""

    @jax.custom_vjp
    def call(*args: jax.Array) -> jax.Array:
        return function(*args)

    def forward(*args: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        return function(*args), args

    def backward(args: tuple[jax.Array, ...], dy: jax.Array) -> tuple[jax.Array, ...]:
        return jax.vjp(function, *args)[1](dy)

    call.defvjp(forward, backward)
    return call


def _gelu(x: jax.Array) -> jax.Array:
    # By erf, as torch computes it; jax.nn.gelu goes through erfc, which takes CPUs more than twice as long.
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (0.5 * wide * (1 + jax.lax.erf(wide * 2**-0.5))).astype(x.dtype)


_FORMULAS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": _gelu,
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_fast": functools.partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}
_ACTIVATIONS = {name: recomputed(formula) for name, formula in _FORMULAS.items()}
ACTIVATIONS = tuple(_FORMULAS)


def _gated(formula: Callable[[jax.Array], jax.Array]) -> Callable[..., jax.Array]:
    return recomputed(lambda gate, up: formula(gate) * up)


_GATED = {name: _gated(formula) for name, formula in _FORMULAS.items()}


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
    """The activation of that Hugging Face name (`hidden_act`)."""
    if name not in _ACTIVATIONS:
        raise JpeftError(f"activation {name!r} is not known; the nearest known are {nearest(name, ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def gated(name: str, gate: jax.Array, up: jax.Array) -> jax.Array:
    """`activation(gate) * up` (Shazeer, 2020; SwiGLU for "silu")."""
    activation(name)
    return _GATED[name](gate, up)


@functools.cache
def normal(stddev: float) -> Callable[..., jax.Array]:
    """Initial values from normal(0, stddev); one object per `stddev`."""
    return nnx.initializers.normal(stddev)


def linear(inputs: int, outputs: int, *, bias: bool, stddev: float, param_dtype: Any, rngs: nnx.Rngs) -> nnx.Linear:
    """`nnx.Linear` with a kernel [in, out] from normal(0, stddev) and a zero bias."""
    return nnx.Linear(inputs, outputs, use_bias=bias, kernel_init=normal(stddev), param_dtype=param_dtype, rngs=rngs)


def embed(count: int, features: int, *, stddev: float, param_dtype: Any, rngs: nnx.Rngs) -> nnx.Embed:
    """`nnx.Embed` with rows from normal(0, stddev)."""
    return nnx.Embed(count, features, embedding_init=normal(stddev), param_dtype=param_dtype, rngs=rngs)


def layer_norm(features: int, *, epsilon: float, param_dtype: Any, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """`nnx.LayerNorm` that subtracts the mean before it squares, as the torch peer does."""
    return nnx.LayerNorm(features, epsilon=epsilon, use_fast_variance=False, param_dtype=param_dtype, rngs=rngs)
