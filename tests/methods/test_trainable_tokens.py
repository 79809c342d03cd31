"""Rows of an embedding that train while the others stay."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from tests import zoo

TOKENS = [9, 2, 30]


@pytest.mark.parametrize("layers", [(), (jpeft.LoRA(rank=2, targets="wte"),)], ids=["alone", "on a LoRA"])
def test_the_rows_are_the_tokens_as_input_and_in_a_tied_head(layers: tuple[jpeft.Method, ...]) -> None:
    base = zoo.MODELS["gpt2"].make("bfloat16")
    made = jpeft.compose(*layers, jpeft.TrainableTokens(tokens=TOKENS))(base, rngs=0)
    parts = jpeft.partition(made)
    embedding = parts.frozen["wte/embedding"]
    rows = parts.adapter["wte/tokens/rows"]
    assert rows.dtype == jnp.float32
    assert jnp.array_equal(rows, embedding[jnp.array(TOKENS)].astype(jnp.float32))
    values = {**parts.adapter, "wte/tokens/rows": jax.random.normal(jax.random.key(0), rows.shape)}
    moved = jpeft.combine(parts.graphdef, values, *parts[2:])
    expected = np.array(embedding)
    expected[TOKENS] = values["wte/tokens/rows"].astype(jnp.bfloat16)
    ids = jnp.arange(zoo.VOCABULARY).reshape(1, -1)
    assert jnp.array_equal(moved.wte(ids)[0], expected)
    query = jax.random.normal(jax.random.key(1), (2, 3, zoo.WIDTH), jnp.bfloat16)
    assert zoo.relative(moved.wte.attend(query), query @ expected.T) < 1e-2
    merged = jpeft.partition(jpeft.merge(moved)).frozen["wte/embedding"]
    assert jnp.array_equal(merged, expected)


REFUSED: dict[str, tuple[Any, str]] = {
    "a token beyond the vocabulary": ([3, 31], r"token 31 is not in a vocabulary of 31; ids go from 0 to 30 \('wte'\)"),
    "a token twice": ([3, 1, 3], "names 3 twice"),
    "no token": ([], "is empty"),
    "a text": ("cat", "give token ids"),
    "a negative id": ([-1], "give token ids"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused(case: str) -> None:
    tokens, message = REFUSED[case]
    with pytest.raises(jpeft.JpeftError, match=message):
        jpeft.TrainableTokens(tokens=tokens)(zoo.MODELS["gpt2"].make("float32"), rngs=0)


def test_files_of_peft_say_which_embedding() -> None:
    model = zoo.MODELS["t5"].make("float32")
    made = jpeft.compose(jpeft.LoRA(rank=2), jpeft.TrainableTokens(tokens=TOKENS))(model, rngs=0)
    with pytest.raises(jpeft.JpeftError, match="does not tie the trainable tokens of an encoder-decoder beside LoRA"):
        jpeft.save_peft(made, "nowhere")
