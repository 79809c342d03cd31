"""Adam with 8-bit moments."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jpeft.quant import adam8bit
from jpeft.quant.adam8bit import Blockwise

PARAMS = {"large": jnp.ones((50, 100)), "small": jnp.ones((7,))}


def gradients(step: int) -> dict[str, jax.Array]:
    keys = jax.random.split(jax.random.fold_in(jax.random.key(0), step))
    return {
        "large": 0.1 + jax.random.normal(keys[0], (50, 100)) * jnp.logspace(-2, 2, 50)[:, None],
        "small": jax.random.normal(keys[1], (7,)),
    }


def after(optimizer: Any, steps: int = 20) -> tuple[Any, Any]:
    @jax.jit
    def step(params: Any, state: Any, gradient: Any) -> Any:
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    params, state = PARAMS, optimizer.init(PARAMS)
    for number in range(steps):
        params, state = step(params, state, gradients(number))
    return params, state


def test_it_follows_adam_with_a_byte_for_each_moment() -> None:
    ours, state = after(adam8bit(1e-2, weight_decay=0.1))
    exact, _ = after(optax.adamw(1e-2, weight_decay=0.1))
    assert np.allclose(ours["small"], exact["small"], rtol=1e-6)  # float32, as it is small
    moved, wanted = (np.asarray(tree["large"] - PARAMS["large"]) for tree in (ours, exact))
    assert np.linalg.norm(moved - wanted) < 0.03 * np.linalg.norm(wanted)
    assert isinstance(state[0].mu["large"], Blockwise)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves((state[0].mu["large"], state[0].nu["large"])))
    assert held / 5000 == pytest.approx(2 * (1 + 4 / 256), rel=0.03)


def test_a_second_moment_never_vanishes() -> None:
    optimizer = adam8bit(1.0)
    params = jnp.zeros(4096)
    gradient = jnp.full(4096, 1e-5).at[0].set(1.0)  # its square is 1e-10 of the largest in the block
    state = optimizer.init(params)
    for _ in range(3):
        updates, state = optimizer.update(gradient, state, params)
    assert float(jnp.abs(updates).max()) < 1.5


@pytest.mark.parity
def test_it_follows_bitsandbytes() -> None:
    torch, bnb = pytest.importorskip("torch"), pytest.importorskip("bitsandbytes")
    theirs = [torch.nn.Parameter(torch.from_numpy(np.array(PARAMS[name]))) for name in PARAMS]
    peer = bnb.optim.AdamW8bit(theirs, lr=1e-2, weight_decay=0.1)
    for number in range(20):
        for parameter, gradient in zip(theirs, gradients(number).values(), strict=True):
            parameter.grad = torch.from_numpy(np.array(gradient))
        peer.step()
    ours, _ = after(adam8bit(1e-2, weight_decay=0.1))
    for parameter, name in zip(theirs, PARAMS, strict=True):
        moved, wanted = np.asarray(ours[name] - 1), parameter.detach().numpy() - 1
        assert np.linalg.norm(moved - wanted) < 0.03 * np.linalg.norm(wanted)
