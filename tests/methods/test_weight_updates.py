"""VeRA, LoHa, LoKr and OFT: what they are made of, and what is refused."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jpeft
from jpeft.methods.weight_updates import split
from tests import zoo


def model() -> Any:
    return zoo.UserModel(nnx.Rngs(0), stacked=True)


def test_veras_projections_are_one_for_all_layers_and_modules() -> None:
    parts = jpeft.partition(jpeft.VeRA(rank=4)(model(), rngs=0))
    assert {key: value.shape for key, value in parts.adapter.items()} == {
        "layers/down/vera/b": (3, zoo.WIDTH),
        "layers/down/vera/d": (3, 4),
        "layers/up/vera/b": (3, 20),
        "layers/up/vera/d": (3, 4),
    }
    down = {key: parts.buffers[f"layers/{key}/vera/down"] for key in ("up", "down")}
    assert (down["up"].shape, down["down"].shape) == ((zoo.WIDTH, 4), (20, 4))
    assert jnp.array_equal(down["up"], down["down"][: zoo.WIDTH])


def test_a_rotation_keeps_lengths() -> None:
    """The Cayley transform exactly, its series nearly."""
    x = jnp.ones((1, zoo.WIDTH))
    for terms, tolerance in ((None, 1e-5), (9, 1e-3)):
        parts = jpeft.partition(jpeft.OFT(block_size=4, terms=terms, targets="up")(model(), rngs=0))
        turned = jpeft.combine(parts.graphdef, zoo.trained(parts), *parts[2:]).layers.at(0).up
        rotations = turned._rotations(turned.skew[...])
        assert jnp.abs(rotations - jnp.eye(4)).max() > 0.1
        assert np.allclose(rotations @ rotations.swapaxes(1, 2), jnp.eye(4), atol=tolerance)
        assert turned(x).shape == (1, 20)


@pytest.mark.parametrize("rank", [2, 4])
def test_loha_with_and_without_forming_the_change(rank: int) -> None:
    base = nnx.Linear(24, 36, rngs=nnx.Rngs(0))
    parts = jpeft.partition(jpeft.LoHa(rank=rank, alpha=3.0)(base, rngs=0))
    values = zoo.trained(parts, size=0.5)
    x = jnp.linspace(-1, 1, 5 * 24).reshape(5, 24)
    run = jax.jit(lambda adapter: jpeft.combine(parts.graphdef, adapter, *parts[2:])(x))
    formed = "f32[24,36] = dot_general" in str(jax.make_jaxpr(run)(values))
    assert formed == (rank == 4)  # 16 products of columns are as much work as the change itself
    a1, b1, a2, b2 = (np.asarray(values[f"loha/{name}"]) for name in ("a1", "b1", "a2", "b2"))
    expected = np.asarray(base(x)) + np.asarray(x) @ (3 / rank * (a1 @ b1) * (a2 @ b2))
    np.testing.assert_allclose(run(values), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "factor", "expected"), [(256, -1, (16, 16)), (128, -1, (8, 16)), (127, -1, (1, 127)), (128, 4, (4, 32))]
)
def test_factors_of_a_size(size: int, factor: int, expected: tuple[int, int]) -> None:
    assert split(size, factor) == expected


REFUSED: dict[str, tuple[Any, str]] = {
    "a block that does not divide": (
        lambda: jpeft.OFT(block_size=8)(model(), rngs=0),
        r"block_size=8 does not divide the (12|20) inputs of this layer \('layers/(up|down)'\)",
    ),
    "too few terms": (lambda: jpeft.OFT(terms=2), "terms=2 is not a whole number of at least 3"),
    "a factor of zero": (lambda: jpeft.LoKr(factor=0), "factor=0 is not a whole number of at least 1"),
    "a rank of zero": (lambda: jpeft.VeRA(rank=0), "rank=0"),
    "an embedding": (lambda: jpeft.LoHa(targets="embed")(model(), rngs=0), "'embed', a Embed; LoHa can wrap Linear"),
    "PEFT's LoHa on GPT-2": (
        lambda: jpeft.save_peft(jpeft.LoHa(rank=1)(zoo.MODELS["gpt2"].make("float32"), rngs=0), "nowhere"),
        r"PEFT's LoHa does not know layers such as 'transformer.h.0.*' \(Conv1D\)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused(case: str) -> None:
    make, message = REFUSED[case]
    with pytest.raises(jpeft.JpeftError, match=message):
        make()
