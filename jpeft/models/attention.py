"""The one attention function of all models, whose implementation is a setting, and the masks they share."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jpeft.errors import JpeftError
from jpeft.models.attention_step import attend_step

IMPLEMENTATIONS = ("xla", "cudnn", "pallas")
_BACKENDS = {"cudnn": "gpu", "pallas": "tpu"}
_TILE = 128  # tokens in a block of the TPU kernel


@dataclasses.dataclass(frozen=True)
class Attention:
    """Softmax attention over grouped heads.

    implementation: "xla" (everywhere), "cudnn" (NVIDIA GPUs, 16-bit floats) or "pallas" (JAX's flash kernel on TPUs,
    where queries and keys are multiples of 128 tokens; "xla" for others, such as single decoded tokens). A value, so
    that a model that holds it stays hashable where NNX needs it.
    """

    implementation: str = "xla"

    def __post_init__(self) -> None:
        if self.implementation not in IMPLEMENTATIONS:
            raise JpeftError(f"attention={self.implementation!r} is not known; choose one of {list(IMPLEMENTATIONS)}")

    def __call__(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        *,
        mask: jax.Array | None = None,
        bias: jax.Array | None = None,
        is_causal: bool = False,
        scale: float | None = None,
    ) -> jax.Array:
        """Attends with queries [B, T, N, H] over keys and values [B, S, K, H], N a multiple of K; [B, T, N, H] results.

        mask: bool, broadcastable to [B, N, T, S], True where a query may attend. bias: float, likewise, added to the
        scaled scores. is_causal: query t sees keys 0 to t (only for T = S). scale: default 1 / sqrt(H).
        """
        name: Any = self.implementation
        if name in _BACKENDS and jax.default_backend() != _BACKENDS[name]:
            raise JpeftError(
                f"attention={name!r} needs a {_BACKENDS[name].upper()}, this is {jax.default_backend()!r}; "
                'choose attention="xla"'
            )
        if name == "cudnn" and q.dtype not in (jnp.float16, jnp.bfloat16):
            raise JpeftError(f'attention="cudnn" needs dtype="bfloat16" or "float16", the model computes in {q.dtype}')
        if name == "pallas":
            if q.shape[1] % _TILE == 0 and k.shape[1] % _TILE == 0:
                return _flash(q, k, v, mask, bias, is_causal, scale)
            name = "xla"
        if q.dtype == jnp.float16 and jax.default_backend() == "cpu":  # XLA on CPUs has no such product
            q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
            out = self(q, k, v, mask=mask, bias=bias, is_causal=is_causal, scale=scale)
            return out.astype(jnp.float16)
        if q.shape[1] == 1 and not is_causal and name == "xla" and jax.default_backend() == "cpu":
            return attend_step(q, k, v, mask=mask, bias=bias, scale=scale)
        return jax.nn.dot_product_attention(
            q, k, v, bias=bias, mask=mask, is_causal=is_causal, scale=scale, implementation=name
        )


def _flash(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None,
    bias: jax.Array | None,
    is_causal: bool,
    scale: float | None,
) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.flash_attention import flash_attention

    batch, queries, heads, width = q.shape
    group = heads // k.shape[2]
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    k, v = (jnp.repeat(x, group, axis=1) for x in (k, v))
    scale = width**-0.5 if scale is None else scale
    # The kernel knows no boolean masks, and adds the bias before it scales.
    added = None if bias is None else bias / scale
    if mask is not None:
        added = jnp.where(mask, 0.0 if added is None else added, -1e30)
    if added is not None:
        added = jnp.broadcast_to(added, (batch, heads, queries, k.shape[2])).astype(jnp.float32)
    out = flash_attention(q, k, v, ab=added, causal=is_causal, sm_scale=scale)
    return jnp.swapaxes(out, 1, 2)


def padding_mask(mask: jax.Array | None) -> jax.Array | None:
    """The mask [B, 1, 1, S] that hides padded keys, from an attention mask [B, S] of zeros and ones."""
    return None if mask is None else mask.astype(bool)[:, None, None, :]


def causal_mask(queries: int, keys: int, first: jax.Array | int = 0, window: int | None = None) -> jax.Array:
    """The mask [1, 1, T, S] of queries in slots first, first + 1, ... over keys in slots 0 to S - 1.

    window: a query sees that many keys, its own included.
    """
    slots, own = jnp.arange(keys)[None, :], first + jnp.arange(queries)[:, None]
    seen = slots <= own
    if window is not None:
        seen &= slots > own - window
    return seen[None, None]


def segment_mask(segment_ids: jax.Array) -> jax.Array:
    """The mask [B, 1, T, T] under which tokens see their own segment only, from segment numbers [B, T]."""
    return (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]


def token_positions(mask: jax.Array | None, segment_ids: jax.Array | None, shape: tuple[int, ...]) -> jax.Array:
    """Positions [B, T] counted over real tokens, from 0 in every segment; padding before the first token is at 0."""
    real = jnp.ones(shape, jnp.int32) if mask is None else mask.astype(bool).astype(jnp.int32)
    count = jnp.cumsum(real, axis=1)
    if segment_ids is not None:
        starts = jnp.concatenate([jnp.ones((shape[0], 1), bool), segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1)
        count -= jax.lax.cummax(jnp.where(starts, count - real, 0), axis=1)
    return jnp.maximum(count - 1, 0)
