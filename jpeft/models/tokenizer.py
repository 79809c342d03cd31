"""The tokenizer that belongs to a model: a Hugging Face folder's or hub id's, or built from a .gguf file's metadata."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from jpeft.errors import JpeftError
from jpeft.models.gguf_file import GGUFFile

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

_CONTROL, _USER_DEFINED = 3, 4
_BYTE_LEVEL, _SENTENCEPIECE = "gpt2", "llama"

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_TAIL}"
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_TAIL}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How text is split before merging, by the name in tokenizer.ggml.pre; None is GPT-2's own rule. Names that differ from
# these only in normalisation or in rules that were never published are left out: a wrong split goes unnoticed.
_SPLITS: dict[str, str | None] = {
    "default": None,
    "gpt-2": None,
    "smollm": None,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama-bpe": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "tekken": _TEKKEN,
}


def load_tokenizer(source: str | Path, *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a local folder, a hub id or a .gguf file, as transformers' fast tokenizer.

    Code that a folder brings along is never run. From a .gguf file come the vocabulary, merges, special tokens and chat
    template; it equals what transformers builds from that file, and needs no torch.

    Raises JpeftError where there is no tokenizer, or one of a kind not known here.
    """
    path = Path(source)
    if path.suffix == ".gguf":
        return _from_gguf(path)
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False, revision=revision)
    except Exception as error:  # the library raises whatever a malformed file makes it raise
        raise JpeftError(
            f"{source}: no tokenizer could be loaded from there ({type(error).__name__}: {error}). A model folder "
            "holds tokenizer.json and tokenizer_config.json; a .gguf file carries its own"
        ) from error


def _from_gguf(path: Path) -> PreTrainedTokenizerBase:
    from transformers import PreTrainedTokenizerFast

    metadata = {
        key.removeprefix("tokenizer."): value
        for key, value in GGUFFile(path).metadata.items()
        if key.startswith("tokenizer.")
    }
    where = str(path)
    tokens = _texts(metadata, "ggml.tokens", where)
    kind = metadata.get("ggml.model")
    try:
        if kind == _BYTE_LEVEL:
            tokenizer = _byte_level(metadata, tokens, where)
        elif kind == _SENTENCEPIECE:
            tokenizer = _sentencepiece(metadata, tokens, where)
        else:
            raise JpeftError(f"{where}: tokenizer.ggml.model = {kind!r}: expected 'gpt2' or 'llama'")
        _add_marked(tokenizer, metadata, tokens, byte_level=kind == _BYTE_LEVEL)
        special = {
            f"{name}_token": _token(metadata, f"ggml.{key}_token_id", tokens, where)
            for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        }
        template = metadata.get("chat_template")
        if template is not None and not isinstance(template, str):
            raise JpeftError(f"{where}: tokenizer.chat_template is a {type(template).__name__}: expected a string")
        # Files of the older kind carry no flag, and their models were trained with a first token.
        flags = {"add_bos_token": metadata.get("ggml.add_bos_token", kind == _SENTENCEPIECE)}
        flags["add_eos_token"] = metadata.get("ggml.add_eos_token", False)
        for name, flag in flags.items():
            if not isinstance(flag, bool):
                raise JpeftError(f"{where}: tokenizer.ggml.{name} = {flag!r}: expected true or false")
            if flag and special[name[4:]] is None:
                raise JpeftError(f"{where}: tokenizer.ggml.{name} is set, but the file names no such token")
        made = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            clean_up_tokenization_spaces=False,
            chat_template=template,
            **flags,
            **{name: token for name, token in special.items() if token is not None},
        )
    except JpeftError:
        raise
    except Exception as error:  # the tokenizers library raises bare exceptions for vocabularies that do not fit
        raise JpeftError(f"{where}: its tokenizer cannot be built: {error}") from error
    made.name_or_path = where
    return made


def _texts(metadata: dict[str, Any], key: str, where: str) -> list[str]:
    value = metadata.get(key)
    if not isinstance(value, list) or not value or not all(isinstance(entry, str) for entry in value):
        raise JpeftError(f"{where}: tokenizer.{key} is missing or not a list of strings, so it has no tokenizer")
    return value


def _token(metadata: dict[str, Any], key: str, tokens: list[str], where: str) -> str | None:
    value = metadata.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < len(tokens):
        raise JpeftError(f"{where}: tokenizer.{key} = {value!r}: expected an id below {len(tokens)}")
    return tokens[value]


def _vocabulary(tokens: list[str], where: str) -> dict[str, int]:
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        twice = sorted({token for index, token in enumerate(tokens) if vocabulary[token] != index})
        raise JpeftError(f"{where}: the tokens {twice[:5]} stand twice in tokenizer.ggml.tokens")
    return vocabulary


def _byte_level(metadata: dict[str, Any], tokens: list[str], where: str) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    pre = metadata.get("ggml.pre", "default")
    if pre not in _SPLITS:
        raise JpeftError(
            f"{where}: tokenizer.ggml.pre = {pre!r}: the way this file splits text is not known here, only "
            f"{sorted(_SPLITS)}; use the tokenizer of the model's Hugging Face folder"
        )
    merges = _merges(metadata, where)
    vocabulary = _vocabulary(_spelled(tokens), where)
    affixes = {"continuing_subword_prefix": "", "end_of_word_suffix": ""}
    model: Any = models.BPE(vocab=vocabulary, merges=merges, fuse_unk=False, **affixes)
    tokenizer = Tokenizer(model)
    split = _SPLITS[pre]
    if split is None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(split), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _merges(metadata: dict[str, Any], where: str) -> list[tuple[str, str]]:
    pairs = [merge.partition(" ") for merge in _texts(metadata, "ggml.merges", where)]
    odd = [left + space + right for left, space, right in pairs if not left or not right or " " in right]
    if odd:
        raise JpeftError(f"{where}: tokenizer.ggml.merges: {odd[0]!r} is not two tokens with a space between them")
    return [(left, right) for left, _, right in pairs]


def _byte_alphabet() -> dict[int, str]:
    """GPT-2's printable character for each byte: itself where it is printable, else one from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + i) for i, byte in enumerate(others)}


def _spelled(tokens: list[str]) -> list[str]:
    """Tokens in the byte alphabet; some files spell added tokens in plain text."""
    alphabet = _byte_alphabet()
    letters = set(alphabet.values())
    return [t if letters.issuperset(t) else "".join(alphabet[byte] for byte in t.encode()) for t in tokens]


def _sentencepiece(metadata: dict[str, Any], tokens: list[str], where: str) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = _vocabulary(tokens, where)
    if "ggml.merges" in metadata:
        merges = _merges(metadata, where)
    else:
        merges = _merges_from_scores(metadata.get("ggml.scores"), tokens, vocabulary, where)
    model: Any = models.BPE(vocab=vocabulary, merges=merges, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    prefix = metadata.get("ggml.add_space_prefix", True)
    scheme: Any = "first" if prefix else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(content=" ", left=1)] if prefix else steps)
    return tokenizer


def _merges_from_scores(
    scores: Any, tokens: list[str], vocabulary: dict[str, int], where: str
) -> list[tuple[str, str]]:
    """The merges that a sentencepiece vocabulary implies: every way to put a token together, best score first."""
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise JpeftError(f"{where}: tokenizer.ggml.scores: expected a number for each of the {len(tokens)} tokens")
    found = []
    for token, score in zip(tokens, scores, strict=True):
        pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        known = [pair for pair in pairs if pair[0] in vocabulary and pair[1] in vocabulary]
        known.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        found += [(score, len(left), len(right), left, right) for left, right in known]
    found.sort(key=lambda entry: entry[:3], reverse=True)
    return [(left, right) for *_, left, right in found]


def _add_marked(tokenizer: Tokenizer, metadata: dict[str, Any], tokens: list[str], *, byte_level: bool) -> None:
    """Tokens that the file marks as control or user-defined stay whole in text."""
    from tokenizers import AddedToken

    types = metadata.get("ggml.token_type") or []
    letters = set(_byte_alphabet().values())
    control, defined = [], []
    for token, kind in zip(tokens, types, strict=False):
        # A control token spelled outside the byte alphabet is not in the vocabulary under that name.
        if kind == _CONTROL and (not byte_level or letters.issuperset(token)):
            control.append(AddedToken(token, normalized=False, special=True))
        elif kind == _USER_DEFINED and tokenizer.token_to_id(token) is not None:
            defined.append(AddedToken(token, normalized=False, special=False))
    tokenizer.add_special_tokens(control)
    tokenizer.add_tokens(defined)
