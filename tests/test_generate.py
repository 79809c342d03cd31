"""Generation: the cache changes nothing, batches change nothing, and few programs are compiled."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jpeft
from jpeft import JpeftError, models
from jpeft.generation import _generate, bucket
from jpeft.sampling import Sampling, filtered, next_tokens

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 80,
    "initializer_range": 0.5,  # so that the likeliest token is likeliest by far
    "eos_token_id": None,
}
CONFIGS = {
    "llama": {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **SIZES},
    "qwen3": {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 12, **SIZES},
    "mistral": {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 5, **SIZES},
    "gpt2": {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": 61,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 40,
        "initializer_range": 0.5,
        "eos_token_id": None,
    },
    "t5": {
        "model_type": "t5",
        "architectures": ["T5ForConditionalGeneration"],
        "vocab_size": 61,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_heads": 4,
        "initializer_factor": 3.0,
        "eos_token_id": None,
    },
}
DECODERS = ("llama", "qwen3", "mistral", "gpt2")


@pytest.fixture(scope="module", params=CONFIGS)
def model(request: pytest.FixtureRequest) -> models.Model:
    return models.from_config(CONFIGS[request.param], rngs=nnx.Rngs(1))


@pytest.fixture(scope="module")
def llama() -> models.Model:
    return models.from_config(CONFIGS["llama"], rngs=nnx.Rngs(1))


def prompts(
    lengths: tuple[int, ...] = (2, 5, 9), *, side: str = "left", seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Random rows of these lengths, padded with id 0."""
    rng = np.random.default_rng(seed)
    ids = np.zeros((len(lengths), max(lengths)), np.int32)
    mask = np.zeros_like(ids)
    for row, length in enumerate(lengths):
        place = slice(max(lengths) - length, None) if side == "left" else slice(length)
        ids[row, place] = rng.integers(3, 61, length)
        mask[row, place] = 1
    return ids, mask


def uncached(model: models.Model, ids: np.ndarray, mask: np.ndarray, steps: int) -> np.ndarray:
    """Greedy tokens by a whole forward pass for each, padded to one length so that it compiles once."""
    seq2seq = hasattr(model, "encode")
    first = np.full((len(ids), 1), model.config.decoder_start_token_id, np.int32) if seq2seq else ids
    seen = np.ones_like(first) if seq2seq else mask
    length = first.shape[1]
    tokens, real = (np.pad(array, [(0, 0), (0, steps)]).astype(np.int32) for array in (first, seen))
    for at in range(length, length + steps):
        if seq2seq:
            logits = model(ids, mask, decoder_input_ids=tokens, decoder_attention_mask=real)
        else:
            logits = model(tokens, attention_mask=real)
        tokens[:, at], real[:, at] = np.asarray(logits[:, at - 1].argmax(-1)), 1
    return tokens


def test_cached_equals_uncached(model):
    ids, mask = prompts()
    made = jpeft.generate(model, ids, attention_mask=mask, max_new_tokens=10)
    assert made.dtype == np.int32
    np.testing.assert_array_equal(made, uncached(model, ids, mask, 10))


def test_a_batch_equals_its_rows_alone(model):
    ids, mask = prompts()
    batch = jpeft.generate(model, ids, mask, max_new_tokens=9)[:, -9:]
    for row, length in enumerate((2, 5, 9)):
        alone = jpeft.generate(model, ids[row : row + 1, -length:], max_new_tokens=9)[0, -9:]
        np.testing.assert_array_equal(batch[row], alone)


def test_padding_may_stand_on_either_side(model):
    left, right = (jpeft.generate(model, *prompts(side=side), max_new_tokens=6) for side in ("left", "right"))
    np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("name", DECODERS)
def test_holes_in_the_mask_are_closed(name):
    model = models.from_config(CONFIGS[name], rngs=nnx.Rngs(1))
    ids = np.array([[5, 0, 6, 7, 0, 8]])
    closed = jpeft.generate(model, ids, np.array([[1, 0, 1, 1, 0, 1]]), max_new_tokens=5, pad_token_id=3)
    np.testing.assert_array_equal(closed[:, :6], [[3, 3, 5, 6, 7, 8]])
    np.testing.assert_array_equal(closed[:, 2:], jpeft.generate(model, ids[ids > 0][None], max_new_tokens=5))


def test_the_mask_decides_what_is_padding_not_the_id(llama):
    ids = np.array([[0, 0, 7, 0, 9]])  # 0 is the padding id
    text = jpeft.generate(llama, ids, max_new_tokens=6, pad_token_id=0)
    np.testing.assert_array_equal(text, jpeft.generate(llama, ids, np.ones_like(ids), max_new_tokens=6, pad_token_id=5))
    padded = jpeft.generate(llama, ids, np.array([[0, 0, 1, 1, 1]]), max_new_tokens=6, pad_token_id=0)
    np.testing.assert_array_equal(padded[:, 2:], jpeft.generate(llama, ids[:, 2:], max_new_tokens=6))
    assert not np.array_equal(padded, text), "this model's continuation should depend on two more tokens"


def test_rows_end_on_their_own(model):
    ids, mask = prompts()
    free = jpeft.generate(model, ids, mask, max_new_tokens=12)
    start = free.shape[1] - 12
    ends = [int(free[0, start + 3]), int(free[1, start + 6])]
    made = jpeft.generate(model, ids, mask, max_new_tokens=12, eos_token_id=ends, pad_token_id=60)
    lengths = []
    for row, tokens in enumerate(free[:, start:]):
        hits = np.flatnonzero(np.isin(tokens, ends))
        lengths.append(int(hits[0]) + 1 if hits.size else 12)
        got = made[row, start:]
        np.testing.assert_array_equal(got[: lengths[-1]], tokens[: lengths[-1]])
        assert (got[lengths[-1] :] == 60).all(), "after its end a row holds padding only"
    assert lengths[0] <= 4
    assert made.shape[1] == start + max(lengths), "nothing is decoded once all rows have ended"


def test_end_tokens_are_given_in_any_form(llama):
    ids, _ = prompts((4,))
    free = jpeft.generate(llama, ids, max_new_tokens=8)[0, 4:]
    end = int(free[2])
    expected = free[: int(np.flatnonzero(free == end)[0]) + 1]
    unused = next(token for token in range(60) if token not in free)
    for given in (end, np.int64(end), [end], (unused, end), np.array([end])):
        made = jpeft.generate(llama, ids, max_new_tokens=8, eos_token_id=given)
        np.testing.assert_array_equal(made[0, 4:], expected)


def test_the_end_tokens_of_the_model_are_the_default():
    free = models.from_config(CONFIGS["llama"], rngs=nnx.Rngs(1))
    ids, _ = prompts((4,))
    end = int(jpeft.generate(free, ids, max_new_tokens=3)[0, -1])
    ending = models.from_config({**CONFIGS["llama"], "eos_token_id": [59, end]}, rngs=nnx.Rngs(1))
    assert jpeft.generate(ending, ids, max_new_tokens=20)[0, -1] in (end, 59)
    assert jpeft.generate(ending, ids, max_new_tokens=20).shape[1] <= 7
    assert jpeft.generate(ending, ids, max_new_tokens=20, eos_token_id=()).shape[1] == 24


def test_lengths_of_one_bucket_share_a_program(model):
    before = _generate._cache_size()
    for length, new in ((3, 5), (16, 16), (9, 1), (12, 13)):
        ids, mask = prompts((length, 2))
        jpeft.generate(model, ids, mask, max_new_tokens=new, eos_token_id=[60], pad_token_id=1)
    assert _generate._cache_size() == before + 1
    jpeft.generate(model, *prompts((17, 2)), max_new_tokens=4, eos_token_id=[60])
    assert _generate._cache_size() == before + 2


def test_buckets():
    assert [bucket(n) for n in (1, 16, 17, 33, 48, 49, 65, 97, 129, 193, 257, 700)] == [
        16, 16, 32, 48, 48, 64, 96, 128, 192, 256, 384, 768,
    ]  # fmt: skip


def adapted(model: models.Model, seed: int) -> models.Model:
    """A LoRA whose B is not zero."""
    made = jpeft.LoRA(rank=2, targets="all-linear")(model, rngs=nnx.Rngs(seed))
    graphdef, adapter, buffers, frozen = jpeft.partition(made)
    moved = {
        key: jax.random.normal(jax.random.fold_in(jax.random.key(seed), i), value.shape)
        for i, (key, value) in enumerate(adapter.items())
    }
    return jpeft.combine(graphdef, moved, buffers, frozen)


def test_with_an_adapter(model):
    ids, mask = prompts()
    first, second = adapted(model, 1), adapted(model, 2)
    made = jpeft.generate(first, ids, mask, max_new_tokens=8)
    np.testing.assert_array_equal(made, uncached(first, ids, mask, 8))
    before = _generate._cache_size()
    other = jpeft.generate(second, ids, mask, max_new_tokens=8)
    assert _generate._cache_size() == before, "another adapter of the same structure needs no compilation"
    assert not np.array_equal(made, other)
    assert not np.array_equal(made, jpeft.generate(model, ids, mask, max_new_tokens=8))


def test_a_model_in_training_mode_generates_without_dropout(llama):
    made = jpeft.LoRA(rank=2, targets="all-linear", dropout=0.5)(llama, rngs=nnx.Rngs(0))
    training = jpeft.combine(*jpeft.partition(made), dropout=jax.random.key(0))
    ids, mask = prompts()
    calm, lively = (jpeft.generate(m, ids, mask, max_new_tokens=6) for m in (made, training))
    np.testing.assert_array_equal(calm, lively)


def test_draws_depend_on_seed_row_and_step_only(llama):
    ids, mask = prompts((5, 5, 5))
    draw = {"temperature": 2.0, "max_new_tokens": 12}
    made = jpeft.generate(llama, ids, mask, seed=3, **draw)
    np.testing.assert_array_equal(made, jpeft.generate(llama, ids, mask, seed=3, **draw))
    assert not np.array_equal(made, jpeft.generate(llama, ids, mask, seed=4, **draw))
    np.testing.assert_array_equal(made[:2], jpeft.generate(llama, ids[:2], mask[:2], seed=3, **draw))
    wide = np.pad(ids, [(0, 0), (20, 0)])
    padded = jpeft.generate(llama, wide, np.pad(mask, [(0, 0), (20, 0)]), seed=3, **draw)
    np.testing.assert_array_equal(padded[:, 20:], made)
    same = jpeft.generate(llama, np.repeat(ids[:1], 3, 0), seed=3, **draw)[:, 5:]
    assert len({row.tobytes() for row in same}) == 3, "rows draw independently"
    longer = jpeft.generate(llama, ids, mask, seed=3, temperature=2.0, max_new_tokens=16)
    np.testing.assert_array_equal(longer[:, : made.shape[1]], made)


def reference(logits: np.ndarray, top_k: int | None, top_p: float | None) -> np.ndarray:
    """Which tokens may be drawn, one row at a time, by the definitions."""
    allowed = np.zeros(logits.shape, bool)
    for row, values in enumerate(logits.astype(np.float64)):
        order = np.argsort(-values)[:top_k]
        probability = np.exp(values[order] - values[order].max())
        probability /= probability.sum()
        count = len(order)
        if top_p is not None:
            count = int(np.searchsorted(np.cumsum(probability), top_p) + 1)
        allowed[row, order[:count]] = True
    return allowed


@pytest.mark.parametrize("top_k", [None, 1, 4, 40, 99])
@pytest.mark.parametrize("top_p", [None, 1e-6, 0.3, 0.9])
def test_top_k_and_top_p_against_numpy(top_k, top_p):
    logits = np.random.default_rng(0).normal(size=(6, 40)).astype(np.float32) * 2
    sampling = Sampling(False, top_k, top_p is not None)
    kept = np.asarray(filtered(jnp.asarray(logits), sampling, jnp.float32(top_p or 1)))
    allowed = reference(logits, top_k, top_p)
    np.testing.assert_array_equal(np.isfinite(kept), allowed)
    np.testing.assert_array_equal(kept[allowed], logits[allowed])


def test_draws_follow_the_probabilities():
    logits = np.array([[2.0, 1.0, 0.0, -1.0]], np.float32)
    draw = jax.jit(jax.vmap(lambda step: next_tokens(logits, Sampling(False), 0.7, 1.0, jax.random.key(0), step)[0]))
    counts = np.bincount(np.asarray(draw(jnp.arange(20000))), minlength=4) / 20000
    expected = np.exp(logits[0] / 0.7) / np.exp(logits[0] / 0.7).sum()
    np.testing.assert_allclose(counts, expected, atol=0.01)


def test_settings_of_a_draw_need_no_compilation(llama):
    ids, mask = prompts()
    jpeft.generate(llama, ids, mask, max_new_tokens=4, temperature=1.0, top_p=0.5)
    before = _generate._cache_size()
    jpeft.generate(llama, ids, mask, max_new_tokens=4, temperature=0.3, top_p=0.9, seed=8)
    assert _generate._cache_size() == before
    tight = jpeft.generate(llama, ids, mask, max_new_tokens=4, temperature=1.0, top_p=1e-9)
    np.testing.assert_array_equal(tight, jpeft.generate(llama, ids, mask, max_new_tokens=4))
    one = jpeft.generate(llama, ids, mask, max_new_tokens=4, temperature=5.0, top_k=1)
    np.testing.assert_array_equal(one, tight)
    cold = jpeft.generate(llama, ids, mask, max_new_tokens=4, temperature=1e-37)
    np.testing.assert_array_equal(cold, tight)


def test_the_context_is_not_exceeded(llama):
    ids, mask = prompts((30, 12))
    assert jpeft.generate(llama, ids, mask, max_new_tokens=50).shape == (2, 80)
    with pytest.raises(JpeftError, match=r"longest prompt has 30 tokens and max_new_tokens is 51: 81 .* context is 80"):
        jpeft.generate(llama, ids, mask, max_new_tokens=51)
    learned = models.from_config(CONFIGS["gpt2"], rngs=nnx.Rngs(1))
    made = jpeft.generate(learned, ids[:, :35], max_new_tokens=10)
    np.testing.assert_array_equal(made, uncached(learned, ids, np.ones_like(ids), 10))


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_half_precision(kind):
    model = models.from_config(CONFIGS["llama"], dtype=kind, rngs=nnx.Rngs(1))
    ids, mask = prompts()
    assert jpeft.generate(model, ids, mask, max_new_tokens=5).shape == (3, 14)


IDS = np.array([[3, 4, 5]])


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((IDS[0],), {}, r"found int64\[3\]; give one row as input_ids\[None\]"),
        ((IDS.astype(float),), {}, r"expected an integer array .* found float64\[1, 3\]"),
        ((np.zeros((0, 3), int),), {}, "have a real token"),
        ((np.zeros((2, 0), int),), {}, "have a real token"),
        ((np.array([[3, 61]]),), {}, r"input_ids\[0, 1\] = 61: the vocabulary has the ids 0 to 60"),
        ((np.array([[-1, 6]]),), {}, r"input_ids\[0, 0\] = -1"),
        ((IDS, np.ones((1, 2), int)), {}, r"attention_mask: expected .* \[1, 3\], found int64\[1, 2\]"),
        ((IDS, np.ones((1, 3))), {}, "attention_mask: expected integers or booleans"),
        ((IDS, np.zeros((1, 3), int)), {}, r"rows \[0\] .* have a real token"),
        ((IDS,), {"temperature": -0.1}, r"temperature=-0\.1"),
        ((IDS,), {"temperature": float("nan")}, "temperature=nan"),
        ((IDS,), {"temperature": 1.0, "top_k": 0}, "top_k=0"),
        ((IDS,), {"temperature": 1.0, "top_k": 2.5}, r"top_k=2\.5"),
        ((IDS,), {"temperature": 1.0, "top_p": 0.0}, r"top_p=0\.0"),
        ((IDS,), {"temperature": 1.0, "top_p": 1.1}, r"top_p=1\.1"),
        ((IDS,), {"max_new_tokens": 0}, "max_new_tokens=0"),
        ((IDS,), {"max_new_tokens": 1.0}, r"max_new_tokens=1\.0"),
        ((IDS,), {"eos_token_id": "x"}, "eos_token_id='x'"),
        ((IDS,), {"eos_token_id": [1, -2]}, r"eos_token_id=\[1, -2\]"),
        ((IDS,), {"pad_token_id": [1, 2]}, r"pad_token_id=\[1, 2\]"),
        ((IDS,), {"seed": 1.5}, r"seed=1\.5"),
    ],
)
def test_arguments_that_make_no_sense(args, kwargs, message, llama):
    with pytest.raises(JpeftError, match=message):
        jpeft.generate(llama, *args, **kwargs)


def test_ids_under_the_mask_do_not_matter(llama):
    ids, mask = prompts((5, 3))
    odd = np.where(mask, ids, -100)
    np.testing.assert_array_equal(
        jpeft.generate(llama, odd, mask, max_new_tokens=4), jpeft.generate(llama, ids, mask, max_new_tokens=4)
    )


def test_models_that_cannot_generate():
    classifier = models.from_config(CONFIGS["llama"], task="sequence-classification", num_labels=2)
    with pytest.raises(JpeftError, match=r"DecoderClassifier is not a language model .*task='sequence-classification'"):
        jpeft.generate(classifier, IDS)
    with pytest.raises(JpeftError, match="Linear is not a language model"):
        jpeft.generate(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), IDS)
    headless = models.from_config({**CONFIGS["t5"], "decoder_start_token_id": None, "pad_token_id": None})
    with pytest.raises(JpeftError, match="decoder_start_token_id"):
        jpeft.generate(headless, IDS)


def test_rows_with_adapters_of_their_own(llama):
    adapted = jpeft.LoRA(rank=2)(llama, rngs=0)
    graphdef, adapter, buffers, frozen = jpeft.partition(adapted)
    tasks = [
        ({k: jax.random.normal(jax.random.key(seed), v.shape) * 0.3 for k, v in adapter.items()}, buffers)
        for seed in range(2)
    ]
    ids = np.arange(1, 13).reshape(3, 4)
    mixed = jpeft.generate(jpeft.multi(adapted, tasks), ids, max_new_tokens=8, adapter_ids=[1, -1, 0])
    for row, task in enumerate((1, None, 0)):
        model = llama if task is None else jpeft.combine(graphdef, *tasks[task], frozen)
        assert np.array_equal(jpeft.generate(model, ids[row : row + 1], max_new_tokens=8)[0], mixed[row])
    with pytest.raises(jpeft.JpeftError, match="pass adapter_ids="):
        jpeft.generate(jpeft.multi(adapted, tasks), ids, max_new_tokens=8)
