"""T5 gives what transformers gives, in all its versions, whole and step by step with a cache."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jpeft.models
from jpeft.errors import JpeftError
from jpeft.models.encoder_decoder_layers import relative_buckets
from jpeft.variables import Trainable

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity

TINY: dict[str, Any] = {
    "vocab_size": 37,
    "d_model": 14,
    "d_kv": 5,
    "d_ff": 23,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 3,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 9,
    "decoder_start_token_id": 0,
}
VERSIONS: dict[str, dict[str, Any]] = {
    "1.0": {},
    "1.1": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "gated-silu": {"feed_forward_proj": "gated-silu", "num_decoder_layers": 1},
    "gelu": {"feed_forward_proj": "gelu", "tie_word_embeddings": False, "d_kv": 8},
}
SOURCE, TARGET = 13, 12


def make_peer(name: str = "T5ForConditionalGeneration", **changes: Any) -> Any:
    """A peer with random parameters; one that is meant to be untied really is (transformers ties it all the same)."""
    peer = getattr(transformers, name)(transformers.T5Config(**{**TINY, **changes}))
    if not changes.get("tie_word_embeddings", True) and hasattr(peer, "lm_head"):
        peer.lm_head.weight = torch.nn.Parameter(torch.empty_like(peer.lm_head.weight))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.normal_(std=0.4, generator=generator)
    return peer.eval()


def saved(peer: Any, folder: Path, **config: Any) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer.save_pretrained(folder)
    file = folder / "config.json"
    raw = {**json.loads(file.read_text()), **config}
    file.write_text(json.dumps({name: value for name, value in raw.items() if value != "absent"}))
    return folder


def random_model(raw: dict[str, Any], task: str) -> jpeft.models.Model:
    """Our model with every parameter random."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: jpeft.models.from_config(raw, task=task)))
    rng = np.random.default_rng(0)
    return nnx.merge(
        graphdef, jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.4, leaf.shape), leaf.dtype), state)
    )


def batch(padding: str, seed: int = 0) -> dict[str, np.ndarray]:
    """Three rows of source and target tokens; the second and third are padded on the side asked for."""
    rng = np.random.default_rng(seed)
    made = {}
    for prefix, length in (("", SOURCE), ("decoder_", TARGET)):
        ids = rng.integers(2, 37, (3, length))
        mask = np.ones_like(ids)
        for row, missing in ((1, 4), (2, 7)):
            where = {"left": slice(0, missing), "right": slice(length - missing, None), "none": slice(0, 0)}[padding]
            ids[row, where], mask[row, where] = 0, 0
        made |= {f"{prefix}input_ids": ids, f"{prefix}attention_mask": mask}
    return made


def torch_output(peer: Any, inputs: dict[str, np.ndarray]) -> np.ndarray:
    with torch.no_grad():
        output = peer(**{name: torch.tensor(value) for name, value in inputs.items()})
    return (output.logits if hasattr(output, "logits") else output.last_hidden_state).numpy()


def as_jax(inputs: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    return {name: jnp.asarray(value) for name, value in inputs.items()}


def assert_close(ours: Any, theirs: Any, keep: np.ndarray | None = None, tolerance: float = 1e-5) -> None:
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    if keep is not None:
        ours, theirs = ours[keep.astype(bool)], theirs[keep.astype(bool)]
    np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance * np.abs(theirs).max())


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("version", VERSIONS)
def test_equals_transformers(version: str, padding: str, tmp_path: Path) -> None:
    peer = make_peer(**VERSIONS[version])
    model = jpeft.models.load(saved(peer, tmp_path))
    assert model.task == "seq2seq-lm"
    inputs = batch(padding)
    assert_close(model(**as_jax(inputs)), torch_output(peer, inputs), inputs["decoder_attention_mask"])


@pytest.mark.parametrize("version", VERSIONS)
def test_without_masks(version: str, tmp_path: Path) -> None:
    peer = make_peer(**VERSIONS[version])
    model = jpeft.models.load(saved(peer, tmp_path))
    inputs = {name: value for name, value in batch("none").items() if "mask" not in name}
    assert_close(model(**as_jax(inputs)), torch_output(peer, inputs))


def test_base(tmp_path: Path) -> None:
    peer = make_peer("T5Model")
    model = jpeft.models.load(saved(peer, tmp_path))
    assert model.task == "base"
    inputs = batch("right")
    assert_close(model(**as_jax(inputs)), torch_output(peer, inputs), inputs["decoder_attention_mask"])


@pytest.mark.parametrize("padding", ["left", "right"])
def test_sequence_classification(padding: str, tmp_path: Path) -> None:
    peer = make_peer("T5ForSequenceClassification", num_labels=4)
    model = jpeft.models.load(saved(peer, tmp_path / "peer"))
    inputs = {name: value for name, value in batch(padding).items() if "decoder" not in name}
    inputs["input_ids"][np.arange(3), [12, 8 if padding == "right" else 12, 5 if padding == "right" else 12]] = 1
    theirs = torch_output(peer, inputs)
    assert_close(model(**as_jax(inputs)), theirs)
    folder = jpeft.models.save(model, tmp_path / "ours")
    again = transformers.T5ForSequenceClassification.from_pretrained(folder).eval()
    assert_close(torch_output(again, inputs), theirs)


def test_token_classification(tmp_path: Path) -> None:
    peer = make_peer("T5ForTokenClassification", num_labels=4)
    model = jpeft.models.load(saved(peer, tmp_path / "peer"))
    inputs = {name: value for name, value in batch("right").items() if "decoder" not in name}
    theirs = torch_output(peer, inputs)
    assert_close(model(**as_jax(inputs)), theirs, inputs["attention_mask"])
    folder = jpeft.models.save(model, tmp_path / "ours")
    again = transformers.T5ForTokenClassification.from_pretrained(folder).eval()
    assert_close(torch_output(again, inputs), theirs, inputs["attention_mask"])


@pytest.mark.parametrize(
    ("task", "pooling", "head", "shape"),
    [
        ("sequence-classification", None, "classification_head", (3, 5)),
        ("sequence-classification", "mean", "classifier", (3, 5)),
        ("token-classification", None, "classifier", (3, SOURCE, 5)),
    ],
)
def test_new_heads_on_a_language_model(
    task: str, pooling: str | None, head: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    folder = saved(make_peer(), tmp_path)
    model = jpeft.models.load(folder, task=task, pooling=pooling, num_labels=5)
    trained = {path[0] for path, v in nnx.to_flat_state(nnx.state(model)) if isinstance(v, Trainable)}
    assert trained == {head}
    assert hasattr(model, "decoder") == (head == "classification_head")
    inputs = {name: value for name, value in batch("right").items() if "decoder" not in name}
    assert model(**as_jax(inputs)).shape == shape


@pytest.mark.parametrize(
    ("written", "untied", "config"),
    [
        # Version 1.1 as published: the flag means both an own output layer and no scaling.
        ("1.1", True, {"tie_word_embeddings": False, "scale_decoder_outputs": "absent"}),
        # As transformers 5 writes it: the flag says tied, the file has the layer.
        ("1.1", True, {}),
        # Version 1.0 as published, and as transformers 5 makes an untied configuration: tied, without scaling.
        ("1.0", False, {"tie_word_embeddings": "absent", "scale_decoder_outputs": "absent"}),
        ("tied 1.1", False, {}),
    ],
)
def test_the_file_decides_about_tying(written: str, untied: bool, config: dict[str, Any], tmp_path: Path) -> None:
    peer = make_peer(**VERSIONS[written.removeprefix("tied ")])
    if written.startswith("tied"):
        peer.lm_head.weight = peer.shared.weight
    model = jpeft.models.load(saved(peer, tmp_path / "peer", **config))
    assert hasattr(model, "lm_head") == untied
    inputs = batch("right")
    theirs = torch_output(peer, inputs)
    assert_close(model(**as_jax(inputs)), theirs, inputs["decoder_attention_mask"])
    folder = jpeft.models.save(model, tmp_path / "ours")
    again = transformers.T5ForConditionalGeneration.from_pretrained(folder).eval()
    assert_close(torch_output(again, inputs), theirs)
    assert_close(jpeft.models.load(folder)(**as_jax(inputs)), theirs, inputs["decoder_attention_mask"])


@pytest.mark.parametrize("version", VERSIONS)
def test_saved_model_loads_in_transformers(version: str, tmp_path: Path) -> None:
    raw = {**TINY, "model_type": "t5", **VERSIONS[version]}
    model = random_model(raw, "seq2seq-lm")
    folder = jpeft.models.save(model, tmp_path)
    peer, info = transformers.T5ForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not info["unexpected_keys"]
    assert not info["missing_keys"]
    inputs = batch("right")
    ours = model(**as_jax(inputs))
    assert_close(ours, torch_output(peer.eval(), inputs), inputs["decoder_attention_mask"])
    np.testing.assert_array_equal(jpeft.models.load(folder)(**as_jax(inputs)), ours)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "distance"), [(32, 128), (8, 9), (16, 20), (64, 200), (6, 50)])
def test_buckets(buckets: int, distance: int, bidirectional: bool) -> None:
    from transformers.models.t5.modeling_t5 import T5Attention

    relative = torch.arange(-distance, distance + 1)
    theirs = T5Attention._relative_position_bucket(relative, bidirectional, buckets, distance)
    np.testing.assert_array_equal(relative_buckets(buckets, distance, bidirectional=bidirectional), theirs.numpy())


@pytest.mark.parametrize("chunks", [[12], [5, 1, 1, 3, 1, 1], [1] * 12], ids=str)
@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_cached_equals_uncached(version: str, chunks: list[int], tmp_path: Path) -> None:
    model = jpeft.models.load(saved(make_peer(**VERSIONS[version]), tmp_path))
    inputs = as_jax(batch("left"))
    whole = model(**inputs)
    encoded = model.encode(inputs["input_ids"], inputs["attention_mask"])
    cache = model.init_cache(3, 15)
    pieces, start = [], 0
    for number, size in enumerate(chunks):
        rows = slice(start, start + size)
        logits, cache = model.decode(
            inputs["decoder_input_ids"][:, rows],
            encoded=encoded if number == 0 else None,
            encoder_mask=inputs["attention_mask"],
            decoder_attention_mask=inputs["decoder_attention_mask"][:, rows],
            cache=cache,
        )
        pieces.append(logits)
        start += size
    keep = np.asarray(inputs["decoder_attention_mask"])
    assert_close(jnp.concatenate(pieces, axis=1), whole, keep)
    assert int(cache["index"]) == TARGET
    np.testing.assert_array_equal(cache["positions"], keep.sum(axis=1))


def test_the_encoder_is_projected_once(tmp_path: Path) -> None:
    model = jpeft.models.load(saved(make_peer(), tmp_path))
    inputs = as_jax(batch("right"))
    encoded = model.encode(inputs["input_ids"], inputs["attention_mask"])
    first, mask = inputs["decoder_input_ids"][:, :1], inputs["attention_mask"]
    _, cache = model.decode(first, encoded=encoded, encoder_mask=mask, cache=model.init_cache(3, 4))
    again, _ = model.decode(first, encoded=encoded, encoder_mask=mask, cache=cache)
    other, _ = model.decode(first, encoded=0 * encoded, encoder_mask=mask, cache=cache)
    np.testing.assert_array_equal(again, other)


def test_decode_without_a_cache_is_the_model(tmp_path: Path) -> None:
    model = jpeft.models.load(saved(make_peer(), tmp_path))
    inputs = as_jax(batch("right"))
    encoded = model.encode(inputs["input_ids"], inputs["attention_mask"])
    logits = model.decode(
        inputs["decoder_input_ids"],
        encoded=encoded,
        encoder_mask=inputs["attention_mask"],
        decoder_attention_mask=inputs["decoder_attention_mask"],
    )
    assert_close(logits, model(**inputs))
    hidden = model.hidden(**inputs)
    assert_close(model.logits(hidden), logits)


def test_greedy_decoding_equals_transformers(tmp_path: Path) -> None:
    # As deep as the encoder: transformers 5.24 sizes its cache by the encoder and fails on deeper decoders.
    peer = make_peer(**VERSIONS["1.1"], num_decoder_layers=2)
    model = jpeft.models.load(saved(peer, tmp_path))
    inputs = batch("left")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    theirs = peer.generate(
        torch.tensor(ids), attention_mask=torch.tensor(mask), max_new_tokens=9, do_sample=False, eos_token_id=None
    ).numpy()
    encoded = model.encode(jnp.asarray(ids), jnp.asarray(mask))
    cache, token = model.init_cache(3, 10), jnp.zeros((3, 1), jnp.int32)
    made = [token]
    for _ in range(9):
        logits, cache = model.decode(token, encoded=encoded, encoder_mask=jnp.asarray(mask), cache=cache)
        token = logits[:, -1:].argmax(axis=-1).astype(jnp.int32)
        made.append(token)
    np.testing.assert_array_equal(jnp.concatenate(made, axis=1), theirs)


def test_shift_right(tmp_path: Path) -> None:
    peer = make_peer()
    model = jpeft.models.load(saved(peer, tmp_path))
    labels = np.array([[3, 4, 5, 1], [6, 1, -100, -100]])
    np.testing.assert_array_equal(
        model.shift_right(jnp.asarray(labels)), peer.prepare_decoder_input_ids_from_labels(torch.tensor(labels)).numpy()
    )


def test_remat_and_lists_of_blocks_change_nothing(tmp_path: Path) -> None:
    saved(make_peer(), tmp_path)
    model, remat = jpeft.models.load(tmp_path), jpeft.models.load(tmp_path, remat=True)
    inputs = as_jax(batch("right"))

    def grad(model: nnx.Module) -> Any:
        graphdef, state = nnx.split(model)

        def loss(state: Any) -> jax.Array:
            return (nnx.merge(graphdef, state)(**inputs) ** 2).mean()

        return jax.jit(jax.grad(loss))(state)

    found = grad(model)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, grad(remat))
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(found))
    listed = nnx.clone(model)
    listed.encoder.block = listed.encoder.block.unstack()
    listed.decoder.block = listed.decoder.block.unstack()
    whole = model(**inputs)
    assert_close(listed(**inputs), whole)
    source = {"encoded": listed.encode(inputs["input_ids"], inputs["attention_mask"])}
    logits, _ = listed.decode(
        inputs["decoder_input_ids"],
        **source,
        encoder_mask=inputs["attention_mask"],
        decoder_attention_mask=inputs["decoder_attention_mask"],
        cache=listed.init_cache(3, 14, jnp.bfloat16),
    )
    assert_close(logits, whole, tolerance=0.1)


def test_refusals(tmp_path: Path) -> None:
    model = jpeft.models.load(saved(make_peer(), tmp_path))
    ids = jnp.ones((1, 4), jnp.int32)
    with pytest.raises(JpeftError, match="decoder_input_ids is missing"):
        model(ids)
    with pytest.raises(JpeftError, match="encoded is missing"):
        model.decode(ids, cache=model.init_cache(1, 5))
    with pytest.raises(JpeftError, match="4 tokens do not fit"):
        model.decode(ids, encoded=model.encode(ids), cache=model.init_cache(1, 3))
    raw = json.loads((tmp_path / "config.json").read_text())
    for name, value in (("feed_forward_proj", "gated-gleu"), ("relative_attention_max_distance", 4)):
        with pytest.raises(JpeftError, match=name):
            jpeft.models.from_config({**raw, name: value})
