"""Greedy tokens against transformers' generate, one by one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import jpeft
from jpeft import models

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.parity

SIZES = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "initializer_range": 0.4,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MODELS = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", SIZES),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**SIZES, "head_dim": 12}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**SIZES, "sliding_window": 6}),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            "vocab_size": 67,
            "n_embd": 32,
            "n_layer": 3,
            "n_head": 4,
            "n_positions": 40,
            "initializer_range": 0.4,
            "bos_token_id": None,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
    ),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": 67,
            "d_model": 32,
            "d_kv": 12,
            "d_ff": 48,
            "num_layers": 3,
            "num_decoder_layers": 2,  # with more than num_layers, the peer's own cache is too short
            "num_heads": 4,
            "initializer_factor": 3.0,
            "feed_forward_proj": "gated-gelu",
            "tie_word_embeddings": False,
            "decoder_start_token_id": 0,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
    ),
}


@pytest.fixture(scope="module", params=MODELS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    import transformers

    name, config, settings = MODELS[request.param]
    torch.manual_seed(0)
    peer = getattr(transformers, name)(getattr(transformers, config)(**settings)).eval()
    folder: Path = tmp_path_factory.mktemp(request.param)
    peer.save_pretrained(folder)
    return models.load(folder, dtype="float32"), peer


def batch(lengths: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(len(lengths))
    ids, mask = np.zeros((2, len(lengths), max(lengths)), np.int64)
    for row, length in enumerate(lengths):
        ids[row, -length:] = rng.integers(3, 67, length)
        mask[row, -length:] = 1
    return ids, mask


def expected(peer, ids: np.ndarray, mask: np.ndarray, **settings) -> np.ndarray:
    with torch.no_grad():
        made = peer.generate(
            torch.from_numpy(ids), attention_mask=torch.from_numpy(mask), do_sample=False, num_beams=1, **settings
        )
    return made.numpy()


@pytest.mark.parametrize("lengths", [(7,), (2, 5, 9)])
def test_greedy(pair, lengths):
    ours, peer = pair
    ids, mask = batch(lengths)
    peers = expected(peer, ids, mask, max_new_tokens=20, eos_token_id=None, min_new_tokens=0)
    if peer.config.model_type != "t5":
        assert peers.shape[1] == ids.shape[1] + 20
    made = jpeft.generate(ours, ids, mask, max_new_tokens=20, eos_token_id=())
    np.testing.assert_array_equal(made[:, : peers.shape[1]], peers)


def test_rows_end_alike(pair):
    ours, peer = pair
    ids, mask = batch((2, 5, 9))
    free = jpeft.generate(ours, ids, mask, max_new_tokens=16, eos_token_id=())
    start = free.shape[1] - 16
    ends = [int(free[0, start + 2]), int(free[2, start + 7])]
    made = jpeft.generate(ours, ids, mask, max_new_tokens=16, eos_token_id=ends, pad_token_id=1)
    peers = expected(peer, ids, mask, max_new_tokens=16, eos_token_id=ends, pad_token_id=1)
    # The prompts' own padding differs: ours is written anew, theirs is what was given.
    np.testing.assert_array_equal(made[:, start:], peers[:, start:])


def test_defaults_come_from_the_configuration(pair):
    ours, peer = pair
    ids, mask = batch((4, 6))
    np.testing.assert_array_equal(
        jpeft.generate(ours, ids, mask, max_new_tokens=25), expected(peer, ids, mask, max_new_tokens=25)
    )


def test_warpers_allow_the_same_tokens():
    from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

    from jpeft.sampling import Sampling, filtered

    logits = np.random.default_rng(1).normal(size=(8, 50)).astype(np.float32) * 3
    for top_k, top_p in ((5, None), (None, 0.7), (12, 0.6), (None, 0.05)):
        scores = torch.from_numpy(logits)
        if top_k is not None:
            scores = TopKLogitsWarper(top_k)(None, scores)
        if top_p is not None:
            scores = TopPLogitsWarper(top_p)(None, scores)
        ours = filtered(logits, Sampling(False, top_k, top_p is not None), np.float32(top_p or 1))
        np.testing.assert_array_equal(np.asarray(ours), scores.numpy())
