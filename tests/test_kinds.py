"""What kinds say about a layer's weight."""

import jax.numpy as jnp
from flax import nnx

from jpeft import kinds
from jpeft.stack import Stack


def test_dense_weight_is_float32_of_all_or_some_layers() -> None:
    stack = Stack.create(lambda rngs: nnx.Linear(4, 6, param_dtype=jnp.bfloat16, rngs=rngs), 3, rngs=nnx.Rngs(0))
    kernel = stack.layer.kernel[...]
    whole = kinds.dense_weight(stack.layer)
    assert whole.dtype == jnp.float32
    assert jnp.array_equal(whole, kernel)
    assert jnp.array_equal(kinds.dense_weight(stack.layer, layers=(2, 0)), kernel[jnp.array([2, 0])])
