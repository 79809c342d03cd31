"""Training the embeddings of a few tokens: new ones, or words that the task uses in a sense of its own.

The rows of the chosen tokens are replaced by trained copies; all others stay the base's. A head that is tied to the
embedding sees the copies as well. Hugging Face PEFT has the same under this name.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jpeft import kinds
from jpeft.errors import JpeftError
from jpeft.methods import fields
from jpeft.methods.targeted import Targeted, lead_of
from jpeft.paths import Node
from jpeft.targets import Layers
from jpeft.variables import Trainable
from jpeft.wrapper import NotMergeable, Wrapper, of_tasks


class TokenRows(Wrapper):
    """An embedding with trained copies of some of its rows: `rows`, `Trainable`, lead + [n, features].

    tokens: the ids of these rows, in their order.
    """

    takes_many = True

    def __init__(self, base: Any, *, name: str, tokens: tuple[int, ...], lead: tuple[int, ...], layers: Layers):
        super().__init__(base, name=name, layers=layers)
        vocabulary = kinds.own_shape(base)[0]
        if max(tokens) >= vocabulary:
            raise JpeftError(
                f"TrainableTokens: token {max(tokens)} is not in a vocabulary of {vocabulary}; ids go from 0 to "
                f"{vocabulary - 1}"
            )
        value, ids = kinds.weight(base).get_value(), jnp.array(tokens)
        if not isinstance(base, Wrapper):
            rows = jnp.take(value if layers is None else value[jnp.array(layers)], ids, axis=-2)
        elif lead:
            raise JpeftError("TrainableTokens: an embedding in every layer that is adapted already; compose it first")
        else:
            rows = base(ids)  # as the wrappers that are there make them
        self.rows = Trainable(rows.astype(jnp.promote_types(value.dtype, jnp.float32)), group="tokens")
        self.tokens = tokens
        self.leading = len(lead)

    def __call__(self, ids: Int[Array, "*batch"], **kwargs: Any) -> Float[Array, "*batch features"]:
        y = self.base(ids, **kwargs)
        order = np.argsort(self.tokens)
        ordered = jnp.asarray(np.array(self.tokens)[order])
        at = jnp.minimum(jnp.searchsorted(ordered, ids), len(self.tokens) - 1)
        hit, row = ordered[at] == ids, jnp.asarray(order)[at]
        rows = self.rows[...].astype(y.dtype)
        if self.adapter_ids is None:
            made = rows[row]
        else:
            tasks = self.tasks_of(ids)
            hit = hit & (tasks >= 0).reshape(-1, *(1,) * (ids.ndim - 1))
            made = jax.vmap(lambda own, row: own[row])(of_tasks(rows, tasks), row)
        return jnp.where(hit[..., None], made, y)

    def attend(self, query: Float[Array, "*batch features"], **kwargs: Any) -> Float[Array, "*batch vocabulary"]:
        """Inner products with the embedding, the trained rows among it, as `nnx.Embed.attend`."""
        y = self.base.attend(query, **kwargs)
        rows, query = self.rows[...].astype(y.dtype), query.astype(y.dtype)
        columns = jnp.array(self.tokens)
        if self.adapter_ids is None:
            return y.at[..., columns].set(query @ rows.T)
        tasks = self.tasks_of(query)
        made = jax.vmap(lambda own, query: query @ own.T)(of_tasks(rows, tasks), query)
        there = (tasks >= 0).reshape(-1, *(1,) * (query.ndim - 1))
        return y.at[..., columns].set(jnp.where(there, made, y[..., columns]))

    def fold(self, base: Any) -> nnx.Module:
        """`base` with the trained rows written into it, in its dtype."""
        if self.adapter_ids is not None:
            raise NotMergeable("it holds several adapters; merge the tasks one by one")
        if type(base) is not nnx.Embed:
            raise NotMergeable(f"{type(base).__name__} under it is no plain embedding")
        weight, columns = kinds.weight(base), jnp.array(self.tokens)
        value, rows = weight.get_value(), self.rows.get_value().astype(weight.dtype)
        if self.layers is None:
            made = value.at[..., columns, :].set(rows)
        else:
            own = value[jnp.array(self.layers)].at[..., columns, :].set(rows)
            made = value.at[jnp.array(self.layers)].set(own)
        setattr(base, kinds.KINDS[nnx.Embed][0], type(weight)(made, **weight.get_metadata()))
        return base


@dataclasses.dataclass(frozen=True)
class TrainableTokens(Targeted):
    """Trains the embeddings of a few tokens, which start as they are; the rest of the vocabulary stays frozen.

    tokens: their ids, such as `tokenizer.encode("<tool>", add_special_tokens=False)`.
    targets: which embedding; None for the token embedding that the model declares. A head tied to it follows.
    name: `<module path>/<name>/rows`.

    Beside another method's targets, by `jpeft.compose`. On an embedding that LoRA adapts too, what comes later stands
    around what came before.
    """

    kind: ClassVar[str] = "trainable_tokens"
    wraps: ClassVar[tuple[type[nnx.Module], ...]] = (nnx.Embed,)
    role: ClassVar[str | None] = "embedding"

    tokens: Any
    targets: Any = None
    exclude: Any = ()
    layers: Any = None
    name: str = "tokens"

    def __post_init__(self) -> None:
        self.settle_targets()
        tokens = fields.token_ids(self, "tokens", self.tokens)
        twice = sorted({token for token in tokens if tokens.count(token) > 1})
        if twice or not tokens:
            said = f"names {twice[0]} twice" if twice else "is empty"
            raise JpeftError(f"TrainableTokens: tokens={self.tokens!r} {said}; give each token's id once")
        fields.settle(self, tokens=tokens)

    def wrapper(self, base: Any, node: Node, layers: Layers, key: jax.Array) -> TokenRows:
        return TokenRows(base, name=self.name, tokens=self.tokens, lead=lead_of(node, layers), layers=layers)
