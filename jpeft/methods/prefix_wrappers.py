"""Keys and values before those of the tokens, inside an attention function.

The contract, whatever the model does around it:

- keys and values are put in front at every call, behind rotary positions and the KV cache, which never hold them;
- `is_causal` becomes an explicit mask first: JAX aligns causal order at the top left, where the prefix now stands;
- masks (padding, causal order, windows) are about real keys: every query sees the whole prefix. As rules they stay
  rules, where the attention function takes them;
- an additive bias is 0 at the prefix;
- real tokens have the positions behind it (`positions_taken`), as if the prefix were text.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jpeft.variables import Trainable
from jpeft.visible import Visible
from jpeft.wrapper import Wrapper, innermost, of_tasks


class PrefixWrapper(Wrapper):
    """An attention function that attends to P more keys and values. Subclasses say what they are."""

    takes_many = True
    weights: jax.Array | None = None  # [..., T]: logarithms of factors on the prefix's attention weights

    def __init__(self, base: Any, *, name: str, count: int, leading: int, layers: tuple[int, ...] | None):
        super().__init__(base, name=name, layers=layers)
        self.positions_taken = count
        self.leading = leading

    def prefix(self) -> tuple[jax.Array, jax.Array]:
        """Keys and values [P, K, H]; with several tasks [tasks, P, K, H]."""
        raise NotImplementedError(type(self).__name__)

    @contextlib.contextmanager
    def weighted(self, weights: jax.Array) -> Iterator[None]:
        """Within, queries weigh the prefix exp(weights) [..., T] times as much, before weights are normalised."""
        object.__setattr__(self, "weights", weights)  # an argument in disguise: nothing that NNX should track
        try:
            yield
        finally:
            object.__delattr__(self, "weights")

    def __call__(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        *,
        mask: jax.Array | Visible | None = None,
        bias: jax.Array | None = None,
        is_causal: bool | None = None,
        **kwargs: Any,
    ) -> jax.Array:
        """q [..., T, N, H] over k, v [..., S, K, H]; mask and bias broadcast to [..., N, T, S]."""
        queries, keys = q.shape[-3], k.shape[-3]
        own_k, own_v = (self._rows(rows, k) for rows in self.prefix())
        with_k, with_v = jnp.concatenate([own_k, k], axis=-3), jnp.concatenate([own_v, v], axis=-3)
        plain = bias is None and self.weights is None and self.adapter_ids is None
        if is_causal and mask is None and getattr(innermost(self), "takes_rules", False):
            mask, is_causal = Visible(causal=True), False
        if isinstance(mask, Visible):
            if plain:
                return self.base(q, with_k, with_v, mask=mask.behind(self.positions_taken), **kwargs)
            mask = mask.array(queries, keys)
        if is_causal:
            causal = jnp.arange(keys)[None, :] <= jnp.arange(queries)[:, None]
            causal = causal.reshape((1,) * (k.ndim - 2) + causal.shape)
            mask = causal if mask is None else mask.astype(bool) & causal
        if is_causal is not None:
            kwargs["is_causal"] = False
        seen = None
        if self.adapter_ids is not None:
            seen = (self.tasks_of(k) >= 0).reshape(-1, *(1,) * (k.ndim - 1))
            mask = jnp.ones((1,) * (k.ndim - 2) + (queries, keys), bool) if mask is None else mask
        if mask is not None:
            mask = _widened(mask.astype(bool), self.positions_taken, keys, True if seen is None else seen)
        if bias is None and self.weights is not None:
            bias = jnp.zeros((1,) * (k.ndim - 2) + (queries, keys), q.dtype)
        if bias is not None:
            own = 0 if self.weights is None else self.weights[..., None, :, None]
            kwargs["bias"] = _widened(bias, self.positions_taken, keys, own)
        return self.base(q, with_k, with_v, mask=mask, **kwargs)

    def _rows(self, rows: jax.Array, like: jax.Array) -> jax.Array:
        """`rows` in the dtype and for the rows of `like`, [..., S, K, H]: [..., P, K, H]."""
        rows = rows.astype(like.dtype)
        if self.adapter_ids is not None:
            rows = of_tasks(rows, self.adapter_ids[...])
            rows = rows.reshape(rows.shape[0], *(1,) * (like.ndim - 4), *rows.shape[1:])
        return jnp.broadcast_to(rows, (*like.shape[:-3], *rows.shape[-3:]))


def _widened(array: jax.Array, count: int, keys: int, value: Any) -> jax.Array:
    """[..., T, S or 1] with `count` columns of `value` in front of its S columns."""
    value = jnp.asarray(value, array.dtype)
    outer = jnp.broadcast_shapes(array.shape[:-1], value.shape[:-1])
    parts = [jnp.broadcast_to(value, (*outer, count)), jnp.broadcast_to(array, (*outer, keys))]
    return jnp.concatenate(parts, axis=-1)


class Prefix(PrefixWrapper):
    """Trained directly. `keys`, `values`: `Trainable`, lead + [P, K, H]."""

    def __init__(
        self, base: Any, *, name: str, keys: jax.Array, values: jax.Array, layers: tuple[int, ...] | None = None
    ):
        super().__init__(base, name=name, count=keys.shape[-3], leading=keys.ndim - 3, layers=layers)
        self.keys = Trainable(keys, group="prompt")
        self.values = Trainable(values, group="prompt")

    def variable_axes(self) -> Mapping[str, tuple[str | None, ...]]:
        return dict.fromkeys(("keys", "values"), ("heads", None))

    def prefix(self) -> tuple[jax.Array, jax.Array]:
        return self.keys[...], self.values[...]


class ReparameterizedPrefix(PrefixWrapper):
    """Trained through an MLP: keys and values are tanh(embedding W_in + b_in) W_out + b_out.

    `embedding` [P, E], `w_in` [E, M] and `b_in` [M] are one for all layers of a `Stack` (`shared=True`); `w_out`, lead
    + [M, 2, K, H], and `b_out`, lead + [2, K, H], are each layer's rows of the last matrix. So each layer makes its own
    keys and values inside the scan, from variables that are where they are used, whichever of the model's methods is
    called; the price is the first product once per layer, which is small. Layers in a plain list have an MLP each,
    with equal initial values: in NNX's tree mode no two modules can hold one Variable.
    """

    def __init__(
        self, base: Any, *, name: str, values: dict[str, jax.Array], leading: int, layers: tuple[int, ...] | None
    ):
        super().__init__(base, name=name, count=values["embedding"].shape[0], leading=leading, layers=layers)
        self.embedding = Trainable(values["embedding"], group="prompt", shared=True)
        self.w_in = Trainable(values["w_in"], group="prompt", shared=True)
        self.b_in = Trainable(values["b_in"], group="prompt", shared=True)
        self.w_out = Trainable(values["w_out"], group="prompt")
        self.b_out = Trainable(values["b_out"], group="prompt")

    def variable_axes(self) -> Mapping[str, tuple[str | None, ...]]:
        return dict.fromkeys(("w_out", "b_out"), ("heads", None))

    def prefix(self) -> tuple[jax.Array, jax.Array]:
        inner = self.embedding[...] @ self.w_in[...] + self.b_in[...][..., None, :]  # [(tasks,) P, M]
        made = jnp.einsum("...pm,...mckh->c...pkh", jnp.tanh(inner), self.w_out[...])
        made += jnp.expand_dims(jnp.moveaxis(self.b_out[...], -3, 0), -3)
        return made[0], made[1]

    def baked(self) -> Prefix:
        keys, values = self.prefix()  # lead (+ tasks) + [P, K, H]: einsum broadcasts over the layers too
        plain = Prefix(self.base, name=self.name, keys=keys, values=values, layers=self.layers)
        plain.leading, plain.adapter_ids = self.leading, self.adapter_ids
        return plain
