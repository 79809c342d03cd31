"""Tokenizers: built from a GGUF file's metadata without torch, or read from a folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from gguf import GGUFWriter
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from jpeft import JpeftError
from jpeft.models.tokenizer import load_tokenizer

CORPUS = [
    "a cat sat on a mat, and the cat's hat was 1234 times as flat as that",
    "Wo die Wörter Umlaute haben: über, Äpfel, süß; and 50,000 more.",
    "def f(x):\n    return x + 1\n\n\n# the end\t!",
]
TEXTS = [*CORPUS, "", " ", "  two  spaces ", "naïve café 北京 🙂", "<|end|>a<|end|> b", "it'S WE'LL x1y22z333"]
SPECIAL = ["<|unk|>", "<|start|>", "<|end|>"]
TEMPLATE = "{% for m in messages %}<|start|>{{ m['role'] }}: {{ m['content'] }}<|end|>{% endfor %}"


def trained(pre: object) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS * 20, trainer)
    return tokenizer


def write(path: Path, tokens: list[str], *, model: str = "gpt2", **settings: object) -> Path:
    """A GGUF file with a tokenizer and nothing else; `settings` are keys under tokenizer.ggml, None leaves one out."""
    writer = GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIAL else 4 if token == "zzz" else 1 for token in tokens])
    writer.add_chat_template(TEMPLATE)
    defaults = {"unknown_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "padding_token_id": 2}
    for key, value in {**defaults, **settings}.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string, list: writer.add_array}
        if value is not None:
            add[type(value)](f"tokenizer.ggml.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def parts(tokenizer: Tokenizer) -> tuple[list[str], list[str]]:
    import json

    vocabulary = tokenizer.get_vocab()
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return sorted(vocabulary, key=vocabulary.__getitem__), [" ".join(merge) for merge in merges]


@pytest.fixture(scope="module")
def original() -> Tokenizer:
    return trained(pre_tokenizers.ByteLevel(add_prefix_space=False))


@pytest.fixture(scope="module")
def path(original: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokens, merges = parts(original)
    return write(tmp_path_factory.mktemp("gguf") / "t.gguf", tokens, merges=merges, pre="smollm")


def test_byte_level(path, original):
    tokenizer = load_tokenizer(path)
    for text in TEXTS:
        ids = tokenizer(text).input_ids
        assert ids == original.encode(text).ids
        assert tokenizer.decode(ids) == text
    assert len(tokenizer) == original.get_vocab_size()


def test_special_tokens_and_template(path):
    tokenizer = load_tokenizer(str(path))
    names = (tokenizer.unk_token, tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token)
    assert names == ("<|unk|>", "<|start|>", "<|end|>", "<|end|>")
    assert tokenizer("a<|end|>").input_ids[-1] == tokenizer.eos_token_id == 2
    assert tokenizer.decode(tokenizer("cat<|end|>").input_ids, skip_special_tokens=True) == "cat"
    assert tokenizer("cat").input_ids[0] != tokenizer.bos_token_id
    said = tokenizer.apply_chat_template([{"role": "user", "content": "hat"}], tokenize=False)
    assert said == "<|start|>user: hat<|end|>"


def test_bos_and_eos_are_added_when_the_file_says_so(original, tmp_path):
    tokens, merges = parts(original)
    both = load_tokenizer(write(tmp_path / "b.gguf", tokens, merges=merges, add_bos_token=True, add_eos_token=True))
    ids = both("cat").input_ids
    assert (ids[0], ids[-1], ids.count(1), ids.count(2)) == (1, 2, 1, 1)
    assert both("cat", add_special_tokens=False).input_ids == ids[1:-1]


def test_the_split_that_the_file_names_is_used(tmp_path):
    from tokenizers import Regex

    llama3 = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    split = pre_tokenizers.Split(Regex(llama3), behavior="isolated")
    whole = trained(pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]))
    tokens, merges = parts(whole)
    ours = load_tokenizer(write(tmp_path / "l.gguf", tokens, merges=merges, pre="llama-bpe"))
    for text in TEXTS:
        assert ours(text).input_ids == whole.encode(text).ids
    with pytest.raises(JpeftError, match=r"pre = 'jina-v9'.*is not known here"):
        load_tokenizer(write(tmp_path / "j.gguf", tokens, merges=merges, pre="jina-v9"))


def sentencepiece_tokens() -> tuple[list[str], list[float]]:
    letters = sorted({letter for text in CORPUS for letter in text.replace(" ", "▁")})
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    words = ["at", "▁a", "▁c", "▁cat", "cat", "▁m", "▁mat", "th", "the", "▁the", "▁▁", "er", "ürt"]
    return tokens + words, [0.0] * (3 + 256) + [-1e9] * len(letters) + [-float(i) for i in range(len(words))]


def test_sentencepiece(tmp_path):
    tokens, scores = sentencepiece_tokens()
    path = write(tmp_path / "s.gguf", tokens, model="llama", scores=scores, padding_token_id=None)
    tokenizer = load_tokenizer(path)
    spoken = tokenizer.tokenize("the cat")
    assert spoken == ["▁the", "▁cat"]
    ids = tokenizer("the cat 北").input_ids
    assert ids[0] == 1, "files of this kind begin texts with bos unless they say otherwise"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the cat 北"
    assert tokenizer.pad_token is None
    bare = write(tmp_path / "n.gguf", tokens, model="llama", scores=scores, add_bos_token=False, add_space_prefix=False)
    assert load_tokenizer(bare).tokenize("the cat")[0] == "the"
    assert load_tokenizer(bare)("the cat").input_ids[0] != 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"merges": None}, r"tokenizer\.ggml\.merges is missing"),
        ({"merges": ["a b c"]}, "not two tokens"),
        ({"merges": ["zq qz"]}, "cannot be built"),
        ({"eos_token_id": 10**6}, r"eos_token_id = 1000000: expected an id below"),
        ({"add_bos_token": True, "bos_token_id": None}, "names no such token"),
        ({"add_bos_token": 1}, "add_bos_token = 1: expected true or false"),
        ({"model": "rwkv"}, "ggml.model = 'rwkv'"),
        ({"model": "llama", "merges": None}, r"ggml\.scores: expected a number for each"),
    ],
)
def test_files_that_make_no_sense(settings, message, original, tmp_path):
    tokens, merges = parts(original)
    with pytest.raises(JpeftError, match=message):
        load_tokenizer(write(tmp_path / "x.gguf", tokens, **{"merges": merges, **settings}))


def test_repeated_tokens_are_refused(original, tmp_path):
    tokens, merges = parts(original)
    with pytest.raises(JpeftError, match=r"\['a'\] stand twice"):
        load_tokenizer(write(tmp_path / "x.gguf", [*tokens, "a"], merges=merges))


def test_folder(path, tmp_path):
    whole = load_tokenizer(path)
    whole.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    for text in TEXTS:
        assert again(text).input_ids == whole(text).input_ids
    assert again.chat_template == TEMPLATE


def test_no_tokenizer_there(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(JpeftError, match=r"empty: no tokenizer could be loaded"):
        load_tokenizer(tmp_path / "empty")
    with pytest.raises(JpeftError, match="cannot be read"):
        load_tokenizer(tmp_path / "absent.gguf")


def test_code_in_the_folder_is_not_run(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["evil.Evil", null]}}')
    (tmp_path / "config.json").write_text('{"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}}')
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\nclass Config: pass\n")
    with pytest.raises(JpeftError, match="no tokenizer could be loaded"):
        load_tokenizer(tmp_path)
    assert not (tmp_path / "ran").exists()
