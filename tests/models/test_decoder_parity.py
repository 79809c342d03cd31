"""Decoders against transformers in float32, on tiny random models of every family."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jpeft
import jpeft.models

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity

SMALL = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 37,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GPT2 = {
    "vocab_size": 61,
    "n_embd": 24,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}

CASES = {
    "llama": ("llama", {}),
    "llama-head-dim": ("llama", {"head_dim": 10}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 6}),
    "llama-tied": ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 1, "num_hidden_layers": 1}),
    "llama-gelu": ("llama", {"hidden_act": "gelu", "rms_norm_eps": 1e-3}),
    "llama-rope3": ("llama", {"rope_parameters": LLAMA3, "head_dim": 16}),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 3.0}}),
    "llama-dynamic": (
        "llama",
        {
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0},
            "max_position_embeddings": 8,
            "head_dim": 8,
        },
    ),
    "llama-yarn": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 100.0,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
            },
            "head_dim": 16,
        },
    ),
    "mistral": ("mistral", {"sliding_window": 5}),
    "mistral-full": ("mistral", {"sliding_window": None, "head_dim": 6}),
    "mistral-wide-window": ("mistral", {"sliding_window": 40}),
    "qwen2": ("qwen2", {}),
    "qwen2-window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1, "tie_word_embeddings": True},
    ),
    "qwen3": ("qwen3", {"head_dim": 10}),
    "qwen3-window": (
        "qwen3",
        {
            "head_dim": 6,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "gpt2": ("gpt2", {}),
    "gpt2-untied": ("gpt2", {"tie_word_embeddings": False, "n_inner": 29, "activation_function": "gelu"}),
    "gpt2-scales": ("gpt2", {"scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": False}),
}


def make_peer(case, auto=transformers.AutoModelForCausalLM, **more):
    """The torch model of a case, with every parameter random: norms and biases would hide mistakes at 1 and 0."""
    kind, settings = CASES[case]
    config = transformers.AutoConfig.for_model(kind, **{**(GPT2 if kind == "gpt2" else SMALL), **settings, **more})
    torch.manual_seed(0)
    peer = auto.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.normal_(std=0.3)
    return peer


def tokens(rows=3, length=13, seed=0):
    return np.random.RandomState(seed).randint(3, 61, (rows, length))


def padded(length=13, side="left", counts=(13, 7, 1)):
    """Tokens, mask and the positions that transformers' generate gives them."""
    ids, places = tokens(len(counts), length), np.arange(length)
    mask = np.stack([places >= length - n if side == "left" else places < n for n in counts]).astype(np.int32)
    return np.where(mask, ids, 0), mask, np.maximum(np.cumsum(mask, 1) - 1, 0)


def ask(peer, ids, mask=None, positions=None):
    given = {"attention_mask": mask, "position_ids": positions}
    with torch.no_grad():
        return peer(
            input_ids=torch.tensor(ids), **{k: torch.tensor(v) for k, v in given.items() if v is not None}
        ).logits.numpy()


def check(ours, theirs, tolerance=1e-5):
    assert ours.shape == theirs.shape
    assert np.abs(np.asarray(ours) - theirs).max() <= tolerance * np.abs(theirs).max()


@pytest.fixture
def pair(request, tmp_path):
    peer = make_peer(request.param)
    peer.save_pretrained(tmp_path)
    return peer, jpeft.models.load(tmp_path)


every = pytest.mark.parametrize("pair", CASES, indirect=True)
# Dynamic scaling depends on the longest position in a batch, padding included, and turns keys in a cache differently.
steady = pytest.mark.parametrize("pair", [case for case in CASES if case != "llama-dynamic"], indirect=True)
varied = pytest.mark.parametrize("pair", ["llama-biases", "mistral", "qwen3-window", "gpt2-scales"], indirect=True)


@every
def test_logits(pair):
    peer, model = pair
    ids = tokens()
    check(model(ids), ask(peer, ids))
    check(model(ids, np.ones_like(ids)), ask(peer, ids))


@steady
def test_padding(pair):
    peer, model = pair
    for side in ("left", "right"):
        ids, mask, positions = padded(side=side)
        real = mask.astype(bool)
        check(np.asarray(model(ids, mask))[real], ask(peer, ids, mask, positions)[real])


@varied
def test_cache(pair):
    _, model = pair
    ids, mask, _ = padded()
    real = mask.astype(bool)
    whole = np.asarray(model(ids, mask))
    cache, parts = model.init_cache(3, 16), []
    for start, stop in ((0, 6), (6, 7), (7, 13)):
        logits, cache = model(ids[:, start:stop], attention_mask=mask[:, start:stop], cache=cache)
        parts.append(np.asarray(logits))
    check(np.concatenate(parts, 1)[real], whole[real])
    assert int(cache["index"]) == 13
    np.testing.assert_array_equal(cache["positions"], mask.sum(1))


@varied
def test_packed_segments_equal_rows(pair):
    _, model = pair
    ids = tokens(1, 12)
    segments = np.array([[4] * 5 + [9] * 5 + [2] * 2])
    packed = np.asarray(model(ids, segment_ids=segments))
    apart = [np.asarray(model(ids[:, a:b])) for a, b in ((0, 5), (5, 10), (10, 12))]
    check(packed, np.concatenate(apart, 1))


@every
def test_saved_model_has_the_same_logits(pair, tmp_path):
    peer, model = pair
    folder = jpeft.models.save(model, tmp_path / "saved")
    again = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    assert type(again) is type(peer)
    ids = tokens()
    np.testing.assert_array_equal(ask(again, ids), ask(peer, ids))


@pytest.mark.parametrize("case", ["llama-biases", "gpt2-untied"])
def test_a_merged_adapter_is_saved_as_part_of_the_weights(case, tmp_path):
    make_peer(case).save_pretrained(tmp_path)
    model = jpeft.LoRA(rank=3, targets="all-linear")(jpeft.models.load(tmp_path), rngs=nnx.Rngs(0))
    graphdef, adapter, buffers, frozen = jpeft.partition(model)
    random = np.random.RandomState(0)
    adapter = jax.tree.map(lambda a: jnp.asarray(random.normal(size=a.shape, scale=0.1), a.dtype), adapter)
    model = jpeft.combine(graphdef, adapter, buffers, frozen)
    ids = tokens()
    with pytest.raises(jpeft.JpeftError, match=r"jpeft\.merge"):
        jpeft.models.save(model, tmp_path / "saved")
    folder = jpeft.models.save(jpeft.merge(model), tmp_path / "saved")
    peer = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    check(model(ids), ask(peer, ids))


def test_the_cache_is_written_in_place(tmp_path):
    make_peer("llama").save_pretrained(tmp_path)
    model = jpeft.models.load(tmp_path)
    cache = model.init_cache(2, 4096)
    graphdef, state = nnx.split(model)
    step = jax.jit(lambda s, ids, cache: nnx.merge(graphdef, s)(ids, cache=cache), donate_argnums=2)
    memory = step.lower(state, jnp.ones((2, 1), jnp.int32), cache).compile().memory_analysis()
    held = cache["k"].nbytes + cache["v"].nbytes
    assert memory.alias_size_in_bytes >= held
    assert memory.temp_size_in_bytes < held / 2


@pytest.mark.parametrize("case", ["llama", "mistral", "qwen2", "qwen3", "gpt2"])
def test_sequence_classification(case, tmp_path):
    names = {0: "low", 1: "middle", 2: "high"}
    peer = make_peer(case, transformers.AutoModelForSequenceClassification, id2label=names)
    peer.save_pretrained(tmp_path)
    model = jpeft.models.load(tmp_path)
    assert model.config.labels == ("low", "middle", "high")
    for side in ("left", "right"):
        ids, mask, positions = padded(side=side)
        theirs = ask(peer, ids, mask, positions)
        check(model(ids, mask), theirs)
        if side == "right":
            check(model(ids), ask(peer, ids))
    folder = jpeft.models.save(model, tmp_path / "saved")
    again = transformers.AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation="eager").eval()
    assert again.config.id2label == names
    np.testing.assert_array_equal(ask(again, ids, mask, positions), theirs)


def test_base_model(tmp_path):
    peer = make_peer("llama", transformers.AutoModel)
    peer.save_pretrained(tmp_path)
    model = jpeft.models.load(tmp_path)
    assert model.task == "base"
    ids = tokens()
    with torch.no_grad():
        check(model(ids), peer(torch.tensor(ids)).last_hidden_state.numpy())


@pytest.mark.parametrize("case", ["llama-biases", "gpt2"])
def test_gradients(case, tmp_path):
    """Through the custom VJPs, for a norm, an embedding and a projection."""
    peer = make_peer(case)
    peer.save_pretrained(tmp_path)
    model = jpeft.models.load(tmp_path)
    ids, mask, positions = padded(side="right")
    weights = np.random.RandomState(1).normal(size=(*ids.shape, 61)).astype(np.float32) * mask[..., None]
    graphdef, state = nnx.split(model)
    grads = jax.jit(jax.grad(lambda s: jnp.sum(nnx.merge(graphdef, s)(ids, mask) * weights)))(state)
    logits = peer(torch.tensor(ids), attention_mask=torch.tensor(mask), position_ids=torch.tensor(positions)).logits
    (logits * torch.tensor(weights)).sum().backward()
    if case == "gpt2":
        pairs = [
            (grads["ln_f"]["scale"], peer.transformer.ln_f.weight),
            (grads["wte"]["embedding"], peer.transformer.wte.weight),
            (grads["h"]["layer"]["attn"]["c_attn"]["kernel"][1], peer.transformer.h[1].attn.c_attn.weight),
            (grads["h"]["layer"]["mlp"]["c_fc"]["bias"][0], peer.transformer.h[0].mlp.c_fc.bias),
        ]
    else:
        layer, third = grads["layers"]["layer"], peer.model.layers[2]
        pairs = [
            (layer["input_layernorm"]["scale"][2], third.input_layernorm.weight),
            (grads["embed_tokens"]["embedding"], peer.model.embed_tokens.weight),
            (layer["self_attn"]["k_proj"]["kernel"][2].T, third.self_attn.k_proj.weight),
            (layer["mlp"]["gate_proj"]["kernel"][2].T, third.mlp.gate_proj.weight),
            (layer["mlp"]["up_proj"]["bias"][2], third.mlp.up_proj.bias),
        ]
    for ours, theirs in pairs:
        check(ours[...] if hasattr(ours, "get_value") else ours, theirs.grad.numpy(), 3e-5)


def test_real_llama_configuration_of_older_transformers(tmp_path):
    """`rope_theta`, `rope_scaling` and `torch_dtype` as files from before transformers 5 have them."""
    peer = make_peer("llama-rope3")
    peer.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    raw = json.loads(path.read_text())
    scaling = raw.pop("rope_parameters")
    raw |= {"rope_theta": scaling.pop("rope_theta"), "rope_scaling": scaling, "torch_dtype": raw.pop("dtype")}
    path.write_text(json.dumps(raw))
    ids = tokens()
    check(jpeft.models.load(tmp_path)(ids), ask(peer, ids))


@pytest.mark.parametrize("remat", [False, True])
def test_unstacked_layers_and_remat_change_nothing(remat, tmp_path):
    peer = make_peer("qwen3-window")
    peer.save_pretrained(tmp_path)
    model = jpeft.models.load(tmp_path, remat=remat)
    ids = tokens()
    before = np.asarray(model(ids))
    check(before, ask(peer, ids))
    model.layers = model.layers.unstack()
    check(model(ids), before)
    folder = jpeft.models.save(model, tmp_path / "saved")
    again = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    check(ask(again, ids), before)
