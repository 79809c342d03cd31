"""The one attention function of all models, whose implementation is a setting, and the masks they share.

masks.py    masks as arrays; as rules they are `jpeft.visible.Visible`
step.py     one query per row, as decoding needs it, on CPUs
blocks.py   a block of queries at a time, for long texts everywhere
splash.py   JAX's kernel for TPUs
cudnn.py    NVIDIA's kernel, through JAX
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jpeft.errors import JpeftError
from jpeft.models.attention.blocks import attend_blocks
from jpeft.models.attention.cudnn import attend_cudnn, cudnn_takes, needs_no_array
from jpeft.models.attention.masks import causal_mask
from jpeft.models.attention.splash import attend_splash, expressible
from jpeft.models.attention.step import attend_step
from jpeft.platforms import platform_of
from jpeft.visible import Visible
from jpeft.wrapper import Wrapper

IMPLEMENTATIONS = ("auto", "xla", "blocks", "cudnn", "pallas")
_PLATFORMS = {"cudnn": "gpu", "pallas": "tpu"}
_LONG = 4096 * 4096  # scores of a head beyond which "auto" does not let XLA have them all at once


@dataclasses.dataclass(frozen=True)
class Attention:
    """Softmax attention over grouped heads.

    implementation: "xla" (everywhere; memory for all scores), "blocks" (everywhere; memory linear in the length, scores
    computed twice), "cudnn" (NVIDIA GPUs, 16-bit floats), "pallas" (JAX's splash kernel on TPUs) or "auto": the kernel
    of the platform where it can do what is asked, else "xla", and "blocks" from 4096 times 4096 tokens on. Kernels
    cannot add a bias, nor serve a KV cache; what "pallas" cannot do goes as under "auto".

    rows: how the rows of a batch lie on a mesh, as `jpeft.shard` tells it. A value, so that a model that holds it stays
    hashable where NNX needs it.
    """

    takes_rules: ClassVar[bool] = True  # `mask` may be `Visible`

    implementation: str = "auto"
    rows: NamedSharding | None = None

    def __post_init__(self) -> None:
        if self.implementation not in IMPLEMENTATIONS:
            raise JpeftError(f"attention={self.implementation!r} is not known; choose one of {list(IMPLEMENTATIONS)}")

    @property
    def platform(self) -> str:
        """Where it computes: "cpu", "gpu" or "tpu"."""
        return platform_of(self.rows)

    def prefers_rules(self, queries: int, keys: int) -> bool:
        """Whether a mask of these sizes should be rules: kernels, and scores in blocks, need no array of it."""
        if self.implementation == "auto":
            return self.platform != "cpu" or queries * keys > _LONG
        return self.implementation != "xla"

    def __call__(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        *,
        mask: jax.Array | Visible | None = None,
        bias: jax.Array | None = None,
        is_causal: bool = False,
        scale: float | None = None,
    ) -> jax.Array:
        """Attends with queries [B, T, N, H] over keys and values [B, S, K, H], N a multiple of K; [B, T, N, H] results.

        mask: bool, broadcastable to [B, N, T, S], True where a query may attend, or rules. bias: float, likewise, added
        to the scaled scores. is_causal: query t sees keys 0 to t (only for T = S). scale: default 1 / sqrt(H).
        """
        self._check(q.dtype)
        if q.dtype == jnp.float16 and self.platform == "cpu":  # XLA on CPUs has no such product
            q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
            return self(q, k, v, mask=mask, bias=bias, is_causal=is_causal, scale=scale).astype(jnp.float16)
        sizes = (q.shape[1], k.shape[1])
        rules, long = _rules(mask, is_causal, k), sizes[0] * sizes[1] > _LONG
        if bias is None and rules is not None and self._may("pallas") and expressible(*sizes, rules):
            return attend_splash(q, k, v, rules, q.shape[-1] ** -0.5 if scale is None else scale, self.rows)
        if self._may("cudnn"):
            array = functools.partial(_array, mask, *sizes, is_causal)
            fused = functools.partial(attend_cudnn, rules=rules, mask=array, bias=bias, scale=scale)
            known = not long or needs_no_array(*sizes, rules)
            if self.implementation == "cudnn" or (bias is None and known and cudnn_takes(fused, q, k, v)):
                return fused(q, k, v)
        if self.implementation == "blocks" or (long and self.implementation != "xla"):
            mask = _array(mask, *sizes, is_causal) if rules is None else rules
            return attend_blocks(q, k, v, mask=mask, bias=bias, scale=scale)
        if isinstance(mask, Visible):
            mask = mask.array(*sizes)
        if sizes[0] == 1 and not is_causal and self.platform == "cpu":
            return attend_step(q, k, v, mask=mask, bias=bias, scale=scale)
        return jax.nn.dot_product_attention(
            q, k, v, bias=bias, mask=mask, is_causal=is_causal, scale=scale, implementation="xla"
        )

    def _may(self, kernel: str) -> bool:
        return self.implementation in ("auto", kernel) and self.platform == _PLATFORMS[kernel]

    def _check(self, dtype: Any) -> None:
        name = self.implementation
        if name in _PLATFORMS and self.platform != _PLATFORMS[name]:
            raise JpeftError(
                f"attention={name!r} needs a {_PLATFORMS[name].upper()}, this is {self.platform!r}; "
                'choose attention="auto"'
            )
        if name == "cudnn" and dtype not in (jnp.float16, jnp.bfloat16):
            raise JpeftError(f'attention="cudnn" needs dtype="bfloat16" or "float16", the model computes in {dtype}')


class Attends(nnx.Module):
    """A module that calls an `Attention`, its `attention_fn`, which may be under wrappers such as a prefix."""

    attention_fn: Any

    def on_mesh(self, rows: NamedSharding, own: Mapping[str, PartitionSpec]) -> None:
        """Told by `jpeft.shard` how the rows of a batch lie."""
        holder, name = self, "attention_fn"
        while isinstance(getattr(holder, name), Wrapper):
            holder, name = getattr(holder, name), "base"
        innermost = getattr(holder, name)
        if isinstance(innermost, Attention):
            setattr(holder, name, dataclasses.replace(innermost, rows=rows))


def _rules(mask: jax.Array | Visible | None, is_causal: bool, k: jax.Array) -> Visible | None:
    """The mask and causal order as rules, where they can be said so; an array that hides whole keys can."""
    if mask is None or isinstance(mask, Visible):
        return mask or Visible(causal=is_causal)
    if mask.ndim == 4 and mask.shape[1:3] == (1, 1):
        return Visible(causal=is_causal, real=jnp.broadcast_to(mask[:, 0, 0], k.shape[:2]))
    return None


def _array(mask: jax.Array | Visible | None, queries: int, keys: int, is_causal: bool) -> jax.Array | None:
    """The mask and causal order as an array."""
    if isinstance(mask, Visible):
        return mask.array(queries, keys)
    order = causal_mask(queries, keys) if is_causal else None
    return order if mask is None else mask if order is None else mask & order
