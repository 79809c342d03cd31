"""Tiny tokenizers and model folders, made here; nothing is downloaded."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flax import nnx
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import jpeft.models

SPECIALS = ["<pad>", "<s>", "</s>", "<|start|>", "<|end|>"]
WORDS = tuple("yes no maybe red green blue one two three four the a is what who where Answer Question".split())  # noqa: SIM905

CHAT = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


@pytest.fixture(autouse=True, scope="session")
def own_caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What the application caches goes into a folder of the test session."""
    import datasets

    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache / "datasets")
        yield


def make_tokenizer(*, bos: bool = False, template: str | None = CHAT, pad: bool = True) -> PreTrainedTokenizerFast:
    """Byte-level, one token per byte and per common word with or without a space before it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*SPECIALS, *alphabet])}
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        built = word[0]
        for char in word[1:]:
            if (built, char) not in merges:
                merges.append((built, char))
            built += char
            vocabulary.setdefault(built, len(vocabulary))
    for word in WORDS:
        merges.append(("\u0120", word))
        vocabulary.setdefault(f"\u0120{word}", len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIALS)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B:1", special_tokens=[("<s>", vocabulary["<s>"])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        chat_template=template,
        clean_up_tokenization_spaces=False,
        **({"pad_token": "<pad>"} if pad else {}),
    )


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


def _folder(path: Path, config: dict[str, Any], task: str) -> Path:
    tokenizer = make_tokenizer()
    config = {**config, "vocab_size": len(tokenizer), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    jpeft.models.save(jpeft.models.from_config(config, task=task, rngs=nnx.Rngs(0)), path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers as a Hugging Face folder."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "initializer_range": 0.1,
    }
    folder = _folder(tmp_path_factory.mktemp("llama"), config, "causal-lm")
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 4], "temperature": 0.6}')
    return folder


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT of two layers as a Hugging Face folder."""
    config = {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "type_vocab_size": 2,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "initializer_range": 0.1,
    }
    return _folder(tmp_path_factory.mktemp("bert"), config, "base")


@pytest.fixture(scope="session")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random T5 of two layers as a Hugging Face folder."""
    config = {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_heads": 4,
        "feed_forward_proj": "gated-gelu",
        "decoder_start_token_id": 0,
        "tie_word_embeddings": True,
    }
    return _folder(tmp_path_factory.mktemp("t5"), config, "seq2seq-lm")


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., Path]:
    """Writes rows, one a line, and gives the file."""

    def write(rows: list[Any], name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture
def config_file(tmp_path: Path) -> Callable[..., Path]:
    """Writes a configuration (plain YAML text)."""

    def write(text: str, name: str = "run.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write
