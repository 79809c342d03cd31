"""JAX's splash attention, a kernel for TPUs that skips the blocks that nobody sees and stores no scores."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jpeft.models.attention.blocks import filled
from jpeft.visible import Visible

TILE = 128  # the least block that the kernel takes
_BLOCK = 512


def expressible(queries: int, keys: int, visible: Visible) -> bool:
    """Whether the kernel can apply these rules: its segments are equal numbers, which a prefix for all cannot have."""
    if visible.causal and queries + visible.prefix != keys:
        return False
    return queries >= TILE and visible.first is None and not (visible.prefix and visible.segments is not None)


def attend_splash(
    q: jax.Array, k: jax.Array, v: jax.Array, visible: Visible, scale: float, rows: NamedSharding | None
) -> jax.Array:
    """Attention of queries [B, T, N, H] over keys and values [B, S, K, H] under `visible`; [B, T, N, H] results.

    A padded query sees padding, and its result means nothing. rows: how the rows of a batch lie on a mesh, where the
    compiler cannot divide a kernel by itself: each device then has its rows, along `context` its queries, and along
    `tensor` its heads.
    """
    queries, keys = q.shape[1], k.shape[1]
    along, parts, heads = (None, 1, None) if rows is None else _axes(rows, q.shape[0], k.shape[2], queries)
    q = (q.astype(jnp.float32) * scale).astype(q.dtype)
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (_filled(q, 1, parts), _filled(k, 1), _filled(v, 1)))  # [B, heads, T, H]
    ids = _segments(visible, queries, parts)
    local = q.shape[1] // (1 if rows is None or heads is None else rows.mesh.shape[heads])
    windows = (visible.window,) if visible.slides is None else (visible.window, None)
    kernels = [
        _kernel(local, (q.shape[2], k.shape[2]), (queries, keys), parts, visible.causal, window, visible.prefix)
        for window in windows
    ]
    attend: Any = _attend
    if rows is not None:
        tokens = "context" if parts > 1 else None
        mine, whole = PartitionSpec(along, heads, tokens), PartitionSpec(along, heads)
        blocks = NamedSharding(rows.mesh, PartitionSpec(None, tokens))
        own_ids = None if ids is None else type(ids)(PartitionSpec(along, tokens), PartitionSpec(along))
        attend = jax.shard_map(
            attend,
            mesh=rows.mesh,
            in_specs=(mine, whole, whole, own_ids, PartitionSpec(), [x.manual_sharding_spec(blocks) for x in kernels]),
            out_specs=mine,
            check_vma=False,  # what a kernel gives says nothing about it
        )
    return jnp.swapaxes(attend(q, k, v, ids, visible.slides, kernels), 1, 2)[:, :queries]


def _attend(
    q: jax.Array, k: jax.Array, v: jax.Array, ids: Any, slides: jax.Array | None, kernels: list[Any]
) -> jax.Array:
    def run(kernel: Any) -> jax.Array:
        return jax.vmap(lambda q, k, v, ids: kernel(q, k, v, segment_ids=ids))(q, k, v, ids)

    if slides is None:
        return run(kernels[0])
    return jax.lax.cond(slides, lambda: run(kernels[0]), lambda: run(kernels[1]))


@functools.lru_cache(maxsize=16)
def _kernel(
    heads: int, sizes: tuple[int, int], real: tuple[int, int], parts: int, causal: bool, window: int | None, prefix: int
) -> Any:
    """The kernel of one device for `heads` heads and (queries, keys) of `sizes`, of which `real` are not filling.

    The queries lie in `parts` on as many devices. Which blocks it skips is found out here, on the host.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    rules = Visible(causal=causal, window=window)

    def seen(query: Any, key: Any) -> Any:
        """Queries that only fill up see everything: the kernel leaves no number where it skips all of a row."""
        return ((rules.pairs(query, key - prefix) | (key < prefix)) & (key < real[1])) | (query >= real[0])

    class Rule(masks._ComputableMask):  # evaluated inside the kernel; the ready ones know no prefix
        def __eq__(self, other: object) -> bool:
            return self is other

        def __hash__(self) -> int:
            return id(self)

    own, other = math.gcd(sizes[0] // parts, _BLOCK), math.gcd(sizes[1], _BLOCK)
    blocks = splash.BlockSizes(own, other, other, own, other, other, own, other)
    mask = masks.MultiHeadMask([Rule(sizes, seen)] * heads)
    with jax.ensure_compile_time_eval():
        return splash.make_splash_mha(mask, block_sizes=blocks, head_shards=1, q_seq_shards=parts)


def _segments(visible: Visible, queries: int, parts: int) -> Any:
    """Numbers by which queries and keys belong together: those of segments, padding apart from all of them."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

    real, segments = visible.real, visible.segments
    if real is None and segments is None:
        return None
    if real is None or segments is None:
        ids = jnp.asarray(segments if real is None else real, jnp.int32)
    else:
        ids = jnp.where(real.astype(bool), segments, -1 - segments)
    seen = jnp.pad(ids, ((0, 0), (visible.prefix, 0)), constant_values=1)
    own = ids if ids.shape[1] == queries else jnp.ones((ids.shape[0], queries), jnp.int32)  # queries of another text
    return splash.SegmentIds(_filled(own, 1, parts), _filled(seen, 1))


def _filled(array: jax.Array, axis: int, parts: int = 1) -> jax.Array:
    """With zeros behind, so that the kernel's blocks divide it, in each of `parts`."""
    size = array.shape[axis]
    step = parts * (_BLOCK if size > parts * _BLOCK else TILE)
    return filled(array, axis, size + -size % step)


def _axes(rows: NamedSharding, batch: int, groups: int, queries: int) -> tuple[Any, int, str | None]:
    """The mesh axes along which rows and heads divide evenly, and over how many devices the tokens are dealt out."""
    sizes = dict(rows.mesh.shape)
    along = rows.spec[0] if rows.spec else None
    even = along is not None and batch % math.prod(sizes[axis] for axis in along) == 0
    parts = sizes.get("context", 1)
    heads = "tensor" if "tensor" in sizes and groups % sizes["tensor"] == 0 else None
    return along if even else None, parts if queries % parts == 0 else 1, heads
