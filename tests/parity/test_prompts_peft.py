"""Prefix, prompt and P-tuning beside Hugging Face PEFT, running in the same test on the same weights and prompts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import jpeft

torch = pytest.importorskip("torch")

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # PEFT calls transformers so
    pytest.mark.filterwarnings("ignore:.*past_key_values.*:FutureWarning"),
]

VOCABULARY, WIDTH, LAYERS, P = 31, 16, 3, 4


def tiny(family: str, folder: Any) -> Any:
    import transformers

    torch.manual_seed(0)
    common = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": LAYERS}
    if family == "llama":
        config = transformers.LlamaConfig(
            **common, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False
        )
        model = transformers.LlamaForCausalLM(config)
    elif family == "gpt2":
        config = transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=LAYERS, n_head=4, n_positions=32)
        model = transformers.GPT2LMHeadModel(config)
    elif family == "bert":
        config = transformers.BertConfig(
            **common, num_attention_heads=4, max_position_embeddings=32, type_vocab_size=2, num_labels=3
        )
        model = transformers.BertForSequenceClassification(config)
    else:
        config = transformers.T5Config(
            vocab_size=VOCABULARY, d_model=WIDTH, d_kv=4, d_ff=24, num_layers=2, num_heads=4, decoder_start_token_id=0
        )
        model = transformers.T5ForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.eval().save_pretrained(folder)
    return model


TASKS = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}


def batch(family: str, *, padding: bool = True) -> dict[str, np.ndarray]:
    ids = np.random.default_rng(0).integers(1, VOCABULARY, (2, 7))
    mask = np.ones_like(ids)
    if padding:
        mask[0, 5:] = 0
    given = {"input_ids": ids, "attention_mask": mask}
    return {**given, "decoder_input_ids": ids[:, :4]} if family == "t5" else given


def theirs(model: Any, given: dict[str, np.ndarray]) -> np.ndarray:
    with torch.no_grad():
        return model(**{name: torch.tensor(value) for name, value in given.items()}).logits.numpy()


def difference(ours: Any, expected: np.ndarray, given: dict[str, np.ndarray]) -> float:
    """Relative to the largest, at real tokens."""
    ours = np.asarray(ours)
    assert ours.shape == expected.shape
    gap = np.abs(ours - expected)
    if ours.ndim == 3 and "decoder_input_ids" not in given:
        gap = gap[given["attention_mask"].astype(bool)]
    return float(gap.max() / np.abs(expected).max())


def with_values(adapted: Any, values: dict[str, np.ndarray]) -> Any:
    parts = jpeft.partition(adapted)
    assert values.keys() <= parts.adapter.keys()
    return jpeft.combine(parts.graphdef, {**parts.adapter, **values}, parts.buffers, parts.frozen)


def loaded(family: str, folder: Any) -> Any:
    task = {"CAUSAL_LM": "causal-lm", "SEQ_CLS": "sequence-classification", "SEQ_2_SEQ_LM": "seq2seq-lm"}[TASKS[family]]
    return jpeft.models.load(folder, task=task)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_prefix_tuning(family: str, tmp_path: Any) -> None:
    """PEFT has none for encoders with transformers 5, and its own for T5 leaves parameters unused."""
    import peft

    base = tiny(family, tmp_path)
    config = peft.PrefixTuningConfig(task_type=TASKS[family], num_virtual_tokens=P)
    model = peft.get_peft_model(base, config).eval()
    flat = model.get_prompt_embedding_to_save("default").detach().numpy()  # [P, layers * 2 * key-value width]
    heads = 2 if family == "llama" else 4
    both = flat.reshape(P, LAYERS, 2, heads, -1).transpose(2, 1, 0, 3, 4)  # [2, layers, P, heads, width]

    adapted = jpeft.PrefixTuning(num_virtual_tokens=P, reparameterize=False)(loaded(family, tmp_path), rngs=0)
    at = next(key for key in jpeft.partition(adapted).adapter if key.endswith("prefix/keys")).removesuffix("keys")
    adapted = with_values(adapted, {at + "keys": both[0], at + "values": both[1]})
    given = batch(family)
    assert difference(adapted(**given), theirs(model, given), given) < 1e-5


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
@pytest.mark.parametrize("kind", ["prompt", "p_tuning"])
def test_virtual_tokens(family: str, kind: str, tmp_path: Any) -> None:
    import peft

    base = tiny(family, tmp_path)
    if kind == "prompt":
        config = peft.PromptTuningConfig(task_type=TASKS[family], num_virtual_tokens=P)
    else:
        config = peft.PromptEncoderConfig(task_type=TASKS[family], num_virtual_tokens=P, encoder_hidden_size=8)
    model = peft.get_peft_model(base, config).eval()
    rows = model.get_prompt_embedding_to_save("default").detach().numpy()  # T5: 2 P rows, of which P are used

    adapted = jpeft.PromptTuning(num_virtual_tokens=P)(loaded(family, tmp_path), rngs=0)
    key = next(key for key in jpeft.partition(adapted).adapter if key.endswith("prompt/embeddings"))
    adapted = with_values(adapted, {key: rows[:P]})
    given = batch(family)
    expected = theirs(model, given)
    if expected.ndim == 3 and family != "t5":
        expected = expected[:, P:]  # ours answers for the given tokens
    assert difference(adapted(**given), expected, given) < 1e-5
