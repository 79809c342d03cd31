"""The keys and values that a model itself makes of a text, as a prefix to start from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jpeft import paths, surgery
from jpeft.errors import JpeftError
from jpeft.stack import Stack
from jpeft.wrapper import Wrapper

KeysValues = tuple[jax.Array, jax.Array]


def attention_path(node: paths.Node) -> surgery.Path:
    """Where the attention function of the module at `node`, under its wrappers, stands in the tree."""
    path, module = node.path, node.module
    while isinstance(module, Wrapper):
        path, module = (*path, "base"), module.base
    return (*path, "attention_fn")


def keys_values_of(model: nnx.Module, names: Sequence[str], ids: Sequence[int]) -> dict[str, KeysValues]:
    """{expanded name of an attention module: its keys and values [P, K, H]} for a text of P tokens.

    The model runs once, without a batch of data, over layers side by side: nothing can be kept from inside a scan.
    """
    graphdef, state = nnx.split(model)
    text = jnp.asarray(ids, jnp.int32)[None]

    @jax.jit
    def run(state: Any) -> dict[str, KeysValues]:
        listed = surgery.rewrite(
            nnx.merge(graphdef, state), lambda module: module.unstack() if isinstance(module, Stack) else module
        )
        made: dict[str, KeysValues] = {}

        def recorder(name: str) -> Callable[[Any], Any]:
            def wrap(attention: Any) -> Any:
                def attend(q: jax.Array, k: jax.Array, v: jax.Array, **kwargs: Any) -> jax.Array:
                    made[name] = (k[0], v[0])
                    return attention(q, k, v, **kwargs)

                return attend

            return wrap

        found = {node.expanded(): node for node in paths.nodes(listed) if node.expanded() in names}
        watched: Any = surgery.replace(listed, {attention_path(node): recorder(name) for name, node in found.items()})
        further = {"decoder_input_ids": text} if getattr(watched, "has_decoder", False) else {}
        watched(text, **further)
        return made

    made = run(state)
    missing = [name for name in names if name not in made]
    if missing:
        raise JpeftError(f"init='text': running the model on the text did not reach {missing[:4]}; choose another init")
    return made
