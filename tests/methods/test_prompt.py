"""Prompt tuning: initial values, and how virtual tokens come into a batch."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jpeft
from jpeft.virtual_tokens import position_offset
from tests import zoo

V = zoo.VOCABULARY


@functools.cache
def base(name: str) -> Any:
    return zoo.MODELS[name].make("float32")


@functools.cache
def model_of(name: str = "llama", position: Any = "front", **settings: Any) -> Any:
    return jpeft.PromptTuning(num_virtual_tokens=2, position=position, **settings)(base(name), rngs=0)


def placed(position: Any, mask: Any = None, **more: Any) -> dict[str, Any]:
    batch = {"input_ids": np.array([[1, 2, 3, 4]]), **more}
    batch |= {} if mask is None else {"attention_mask": np.array([mask])}
    made = jpeft.insert_prompt(batch, model_of(position=position))
    return {key: np.asarray(value)[0].tolist() for key, value in made.items()}


@pytest.mark.parametrize(
    ("position", "mask", "ids", "masked"),
    [
        ("front", None, [V, V + 1, 1, 2, 3, 4], None),
        ("front", [0, 1, 1, 1], [1, V, V + 1, 2, 3, 4], [0, 1, 1, 1, 1, 1]),
        ("back", [1, 1, 1, 0], [1, 2, 3, V, V + 1, 4], [1, 1, 1, 1, 1, 0]),
        ("back", None, [1, 2, 3, 4, V, V + 1], None),
        ((0, 2), [0, 1, 1, 1], [1, V, 2, 3, V + 1, 4], [0, 1, 1, 1, 1, 1]),
        ((1, 9), [1, 1, 0, 0], [1, V, 2, V + 1, 3, 4], [1, 1, 1, 1, 0, 0]),
    ],
)
def test_places(position: Any, mask: Any, ids: list[int], masked: Any) -> None:
    made = placed(position, mask)
    assert made["input_ids"] == ids
    assert made.get("attention_mask") == masked


def test_labels_and_types_follow() -> None:
    more = {name: np.array([[7, 8, 9, 6]]) for name in ("labels", "token_type_ids")} | {"classes": np.array([3])}
    made = placed((0, 2), **more)
    assert made["labels"] == [-100, 7, 8, -100, 9, 6]
    assert made["token_type_ids"] == [0, 7, 8, 0, 9, 6]
    assert made["classes"] == 3
    assert jpeft.insert_prompt({"input_ids": 1}, base("llama")) == {"input_ids": 1}


@pytest.mark.parametrize("name", ["llama", "gpt2", "roberta"])
def test_a_call_is_the_base_on_the_prompts_embeddings(name: str) -> None:
    """A prompt that is text gives what the base gives for that text, at the given tokens."""
    text, ids = (5, 9), zoo.ids()
    adapted = model_of(name, init="text", text_ids=text)
    whole = jnp.concatenate([jnp.broadcast_to(jnp.array(text), (len(ids), 2)), ids], axis=1)
    assert zoo.relative(adapted(ids), base(name)(whole)[:, 2:]) < 1e-5
    last = model_of(name, position="back", init="text", text_ids=text)
    if name == "roberta":
        whole = jnp.concatenate([ids, whole[:, :2]], axis=1)
        assert zoo.relative(last(ids), base(name)(whole)[:, :-2]) < 1e-5


def test_a_classifier_and_an_encoder_decoder_see_the_prompt_as_text() -> None:
    text, ids = (5, 9), zoo.ids()
    whole = jnp.concatenate([jnp.broadcast_to(jnp.array(text), (len(ids), 2)), ids], axis=1)
    bert, t5 = (model_of(name, init="text", text_ids=text) for name in ("bert-mean-classifier", "t5"))
    assert zoo.relative(bert(ids), base("bert-mean-classifier")(whole)) < 1e-5
    given = {"decoder_input_ids": ids[:, :3]}
    assert zoo.relative(t5(ids, **given), base("t5")(whole, **given)) < 1e-5


def test_lower_calls_and_ones_own_placing() -> None:
    """hidden puts the prompt in, states and a cache take ids as they are, position=None leaves all to the caller."""
    ids = zoo.ids()
    front, own = model_of(), model_of(position=None)
    batch = jpeft.insert_prompt({"input_ids": ids}, own, position="front")
    expected = front(ids)
    assert zoo.relative(front.logits(front.hidden(ids)), expected) < 1e-5
    assert zoo.relative(own(**batch)[:, 2:], expected) < 1e-5
    logits, _ = front(batch["input_ids"], cache=front.init_cache(2, 8))
    assert zoo.relative(logits[:, 2:], expected) < 1e-5
    made = jpeft.generate(own, np.asarray(batch["input_ids"]), max_new_tokens=3, eos_token_id=())
    assert np.array_equal(made[:, 2:], jpeft.generate(front, ids, max_new_tokens=3, eos_token_id=()))
    with pytest.raises(jpeft.JpeftError, match="position=None"):
        jpeft.insert_prompt({"input_ids": ids}, own)
    with pytest.raises(jpeft.JpeftError, match="segment_ids cannot be given"):
        front(ids, segment_ids=jnp.zeros_like(ids))
    assert position_offset(front) == 0


def test_a_users_own_model() -> None:
    """The prompt goes into its batch, and its outputs are as long as that."""
    model = jpeft.PromptTuning(num_virtual_tokens=2, targets="embed")(base("user-stack-remat"), rngs=0)
    batch = jpeft.insert_prompt({"input_ids": zoo.ids()}, model)
    whole = model(batch["input_ids"])
    assert whole.shape == (zoo.BATCH, zoo.TIME + 2, V)
    assert zoo.relative(whole[:, 2:], base("user-stack-remat")(zoo.ids())) < 1e-6


@pytest.mark.parametrize("name", ["llama", "mistral-remat", "gpt2", "t5"])
def test_left_padded_generation_equals_each_row_alone(name: str) -> None:
    adapted = model_of(name, init="random")
    short, long = np.array([[3, 4, 5]]), np.array([[6, 7, 8, 9, 10, 11, 12]])
    both = np.concatenate([np.pad(short, [(0, 0), (4, 0)]), long])
    mask = np.concatenate([np.pad(np.ones_like(short), [(0, 0), (4, 0)]), np.ones_like(long)])
    kw: dict[str, Any] = {"max_new_tokens": 5, "eos_token_id": ()}
    made = jpeft.generate(adapted, both, mask, **kw)
    for row, alone in enumerate((short, long)):
        assert np.array_equal(made[row, -5:], jpeft.generate(adapted, alone, **kw)[0, -5:])


def test_generation_with_rows_of_several_tasks() -> None:
    parts = jpeft.partition(model_of())
    tasks = [(zoo.trained(parts, seed, 1.0), parts.buffers) for seed in range(2)]
    served = jpeft.multi(model_of(), tasks)
    ids = np.asarray(zoo.ids())[[0, 0, 0]]
    made = jpeft.generate(served, ids, max_new_tokens=4, eos_token_id=(), adapter_ids=[1, -1, 0])
    alone = [jpeft.combine(parts.graphdef, *tasks[i], parts.frozen) for i in (1, 0)]
    for row, model in ((0, alone[0]), (1, base("llama")), (2, alone[1])):
        assert np.array_equal(made[row], jpeft.generate(model, ids[:1], max_new_tokens=4, eos_token_id=())[0])


def test_initial_values() -> None:
    rows = base("llama").embed_tokens.embedding.get_value()

    def drawn(**settings: Any) -> jax.Array:
        adapted = jpeft.PromptTuning(num_virtual_tokens=4, **settings)(base("llama"), rngs=0)
        return jpeft.partition(adapted).adapter["embed_tokens/prompt/embeddings"]

    assert all(any(jnp.array_equal(row, known) for known in rows) for row in drawn())
    assert jnp.array_equal(drawn(init="text", text_ids=(3, 1)), rows[jnp.array([3, 1, 3, 1])])
    assert 0.2 < float(jnp.max(jnp.abs(drawn(init="random")))) <= 0.5


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: jpeft.PromptTuning(num_virtual_tokens=2, position=(3, 1)), "rising order"),
        (lambda: jpeft.PromptTuning(position="middle"), "choose"),
        (lambda: jpeft.PromptTuning(init="text"), "belong together"),
        (lambda: jpeft.PromptTuning(init="text", text_ids=[99]), "text_ids holds 99, the vocabulary 31"),
        (lambda: jpeft.compose(jpeft.PromptTuning(), jpeft.PromptTuning(name="b")), "virtual tokens already"),
        (lambda: jpeft.PromptTuning(targets="q_proj"), "can wrap Embed"),
    ],
)
def test_refusals(make: Any, said: str) -> None:
    with pytest.raises(jpeft.JpeftError, match=said):
        make()(base("llama"), rngs=0)


def test_the_context_has_room_for_both() -> None:
    with pytest.raises(jpeft.JpeftError, match="context is 30 beside 2 virtual tokens"):
        jpeft.generate(model_of(), zoo.ids(), max_new_tokens=25)


def test_composes_with_lora_on_the_embedding() -> None:
    lora, prompt = jpeft.LoRA(rank=2, targets=["embed_tokens", "q_proj"]), jpeft.PromptTuning(num_virtual_tokens=2)
    adapted = jpeft.compose(lora, prompt)(base("llama"), rngs=nnx.Rngs(0))
    assert jnp.all(jnp.isfinite(adapted(zoo.ids())))
    wrong = jpeft.compose(prompt, lora)(base("llama"), rngs=0)
    with pytest.raises(jpeft.JpeftError, match="'lora' wraps the embedding .* apply the prompt method last"):
        wrong(zoo.ids())
