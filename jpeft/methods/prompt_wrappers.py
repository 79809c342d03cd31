"""A token embedding that knows virtual tokens: ids behind the vocabulary, looked up in a trained prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jpeft.variables import Trainable
from jpeft.wrapper import Wrapper, of_tasks


class PromptWrapper(Wrapper):
    """An embedding with n more ids, V to V + n - 1. Subclasses say what their rows are."""

    takes_many = True

    def __init__(self, base: Any, *, name: str, count: int, position: Any):
        super().__init__(base, name=name)
        self.virtual_tokens = count
        self.position = position
        self.leading = 0

    def prompt(self) -> jax.Array:
        """The rows [n, D]; with several tasks [tasks, n, D]."""
        raise NotImplementedError(type(self).__name__)

    def __call__(self, ids: jax.Array, **kwargs: Any) -> jax.Array:
        """ids [...] to embeddings [..., D]."""
        number = ids - self.base.num_embeddings
        x = self.base(jnp.where(number < 0, ids, 0), **kwargs)
        rows, at = self.prompt().astype(x.dtype), jnp.clip(number, 0, self.virtual_tokens - 1)
        if self.adapter_ids is None:
            picked = rows[at]
        else:
            picked = jax.vmap(lambda own, at: own[at])(of_tasks(rows, self.tasks_of(ids)), at)
        return jnp.where((number < 0)[..., None], x, picked)


class Prompt(PromptWrapper):
    """Trained directly. `embeddings`: `Trainable` [n, D]."""

    def __init__(self, base: Any, *, name: str, embeddings: jax.Array, position: Any):
        super().__init__(base, name=name, count=embeddings.shape[-2], position=position)
        self.embeddings = Trainable(embeddings, group="prompt")

    def prompt(self) -> jax.Array:
        return self.embeddings[...]


class EncodedPrompt(PromptWrapper):
    """What an encoder makes of `inputs` [n, D], once per call, whatever the number of rows.

    Its variables, all `Trainable`, stand beside `inputs` under the names of `weights`.
    """

    def __init__(self, base: Any, *, name: str, weights: Mapping[str, jax.Array], position: Any):
        super().__init__(base, name=name, count=weights["inputs"].shape[-2], position=position)
        self.parts = tuple(sorted(weights))
        for part in self.parts:
            setattr(self, part, Trainable(weights[part], group="prompt"))

    def prompt(self) -> jax.Array:
        weights = {part: getattr(self, part)[...] for part in self.parts}
        return encoded(weights) if self.adapter_ids is None else jax.vmap(encoded)(weights)

    def baked(self) -> Prompt:
        plain = Prompt(self.base, name=self.name, embeddings=self.prompt(), position=self.position)
        plain.adapter_ids = self.adapter_ids
        return plain


def encoded(weights: Mapping[str, jax.Array]) -> jax.Array:
    """The prompt [n, D]: `inputs` through the bidirectional LSTM layers that there are, then linear layers and ReLU."""
    x, layer = weights["inputs"], 0
    while f"lstm{layer}_forward_input" in weights:
        sides = [
            _lstm(x[::step], *(weights[f"lstm{layer}_{side}_{part}"] for part in ("input", "hidden", "bias")))[::step]
            for side, step in (("forward", 1), ("backward", -1))
        ]
        x, layer = jnp.concatenate(sides, axis=-1), layer + 1
    last = max(int(name.removeprefix("linear")[0]) for name in weights if name.startswith("linear"))
    for number in range(last + 1):
        x = x @ weights[f"linear{number}_kernel"] + weights[f"linear{number}_bias"]
        x = x if number == last else jax.nn.relu(x)
    return x


def _lstm(x: jax.Array, w_input: jax.Array, w_hidden: jax.Array, bias: jax.Array) -> jax.Array:
    """The hidden states [n, M] of x [n, D]; gates stand as input, forget, cell, output in the last axis [4 M]."""
    width = w_hidden.shape[0]

    def step(carry: tuple[jax.Array, jax.Array], row: jax.Array) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        hidden, cell = carry
        i, f, g, o = jnp.split(row + hidden @ w_hidden, 4)
        cell = jax.nn.sigmoid(f) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
        hidden = jax.nn.sigmoid(o) * jnp.tanh(cell)
        return (hidden, cell), hidden

    zero = jnp.zeros((width,), x.dtype)
    return jax.lax.scan(step, (zero, zero), x @ w_input + bias)[1]
