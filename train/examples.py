"""From text to token ids and what is learnt of them: one tokenisation for training, evaluation and generation.

- Where a completion begins is decided by character offsets, never by looking for token sequences.
- Of a chat, one rendering of the whole conversation is tokenised; assistant turns are found in it by rendering it again
  with marks in place of their text.
- Exactly one bos if the tokenizer or the template writes one, and the real end token is learnt. What is padding is
  decided by the mask, never by an id.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jpeft.errors import JpeftError


@dataclasses.dataclass(frozen=True)
class Example:
    """A row as the model sees it.

    ids: [T]. targets: [T] bool, the tokens that a language model learns to predict. row: which row of the data.
    label: what other tasks are to find, in a form of their own. types: [T] token types of a sentence pair, or None.
    segments: [T] numbers of the texts that are packed into one row, or None.
    """

    ids: np.ndarray
    targets: np.ndarray
    row: int
    label: Any = None
    types: np.ndarray | None = None
    segments: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.ids)


class Tags(NamedTuple):
    """The tags of words. tags, words: int32 [T], at a word's first sub-word its tag and its number, elsewhere -100.

    all: int32 [W], the tag of every word, also of those that no token stands for.
    """

    tags: np.ndarray
    words: np.ndarray
    all: np.ndarray


class Reader:
    """Makes examples with one tokenizer (a fast `transformers` one) and counts what it had to change.

    types: whether the model takes token types. counts: {what happened: how many rows}.
    """

    def __init__(self, tokenizer: Any, max_length: int, *, types: bool = False):
        self.tokenizer = tokenizer
        # Without its warnings of a limit of its own: `max_length` is the one that counts, and what it cuts is counted.
        self._tokens = functools.partial(tokenizer, verbose=False)
        self.max_length = max_length
        self.types = types
        self.counts: Counter[str] = Counter()
        if not getattr(tokenizer, "is_fast", False):
            raise JpeftError("the tokenizer gives no character offsets; a fast one (tokenizer.json) is needed")

    @functools.cached_property
    def bos(self) -> int | None:
        """The id that the tokenizer puts in front of a text by itself."""
        ids = self._tokens("a").input_ids
        return ids[0] if ids and ids[0] == self.tokenizer.bos_token_id else None

    @functools.cached_property
    def eos(self) -> int:
        """The id that ends a text."""
        if self.tokenizer.eos_token_id is None:
            raise JpeftError("the tokenizer has no end token (eos_token); a language model needs one to learn to stop")
        return int(self.tokenizer.eos_token_id)

    def ends(self, *, chat: bool = False) -> tuple[int, ...]:
        """The ids that end what the model writes: the tokenizer's end token and, in a chat, a turn's."""
        turn = self.encode(self._chat_form[1].strip(), bos=False)[0][-1:] if chat else []
        return tuple(dict.fromkeys([self.eos, *turn]))

    def encode(self, text: str, *, bos: bool = True) -> tuple[list[int], list[tuple[int, int]]]:
        """(ids, character spans) of a text, with one bos where the tokenizer wants one and the text has none."""
        made = self._tokens(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, spans = list(made.input_ids), [(int(a), int(b)) for a, b in made.offset_mapping]
        if bos and self.bos is not None and (not ids or ids[0] != self.bos):
            ids, spans = [self.bos, *ids], [(0, 0), *spans]
        return ids, spans

    def prompt(self, text: str) -> list[int]:
        """The ids of a prompt to go on from; those that training saw."""
        return self.encode(text)[0]

    def chat_prompt(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The ids of a conversation that the assistant is to answer."""
        return self.encode(self._render(messages, add_generation_prompt=True), bos=False)[0]

    def text(self, text: str, row: int) -> list[Example]:
        """A whole text, learnt token by token; one longer than `max_length` becomes several examples."""
        ids = self.encode(text)[0]
        if not ids or (len(ids) == 1 and ids[0] == self.bos):
            self.counts["rows without text left out"] += 1
            return []
        if ids[-1] != self.eos:
            ids.append(self.eos)
        pieces = [ids[start : start + self.max_length] for start in range(0, len(ids), self.max_length)]
        self.counts["rows longer than data.max_length, split"] += len(pieces) > 1
        made = []
        for piece in pieces:
            targets = np.ones(len(piece), bool)
            targets[0] = False  # nothing comes before it that could predict it
            if targets.any():
                made.append(Example(np.asarray(piece, np.int32), targets, row))
        self.counts["rows of a single token, which nothing comes before, left out"] += not made
        return made

    def completion(self, prompt: str, completion: str, row: int) -> list[Example]:
        """A prompt and what follows it, of which only the completion and the end token are learnt."""
        ids, spans = self.encode(prompt + completion)
        border = len(prompt)
        start = next((i for i, (a, b) in enumerate(spans) if b > max(a, border)), len(ids))
        if start < len(ids) and spans[start][0] < border:
            # What training sees is then not what generation starts from.
            self.counts[
                "rows whose prompt ends inside a token: move the space or line break at the end of data.prompt to the "
                "start of data.completion"
            ] += 1
        ids = [*ids, self.eos] if start == len(ids) or ids[-1] != self.eos else ids
        surplus = len(ids) - self.max_length
        if surplus > 0:
            first = 1 if ids[0] == self.bos else 0
            if start - first < surplus:
                self.counts["rows whose completion alone is longer than data.max_length, left out"] += 1
                return []
            self.counts["rows longer than data.max_length, cut at the start of the prompt"] += 1
            ids, start = ids[:first] + ids[first + surplus :], start - surplus
        targets = np.arange(len(ids)) >= max(start, 1)
        if not targets.any():
            self.counts["rows with neither prompt nor completion, left out"] += 1
            return []
        self.counts["rows with an empty completion, of which only the end is learnt"] += not completion
        return [Example(np.asarray(ids, np.int32), targets, row)]

    def chat(self, messages: Any, row: int, place: Callable[[], str]) -> list[Example]:
        """A conversation, of which the assistant's turns and their end tokens are learnt.

        Raises JpeftError naming `place()` when the messages or the template do not allow it.
        """
        check_messages(messages, place)
        text = self._render(messages, place)
        regions = self._assistant_regions(messages, text, place)
        ids, spans = self.encode(text, bos=False)
        if self.bos is not None and ids[:2] == [self.bos, self.bos]:
            ids, spans = ids[1:], spans[1:]
        targets = np.array([any(a < end and b > start for start, end in regions) for a, b in spans], bool)
        if messages[-1]["role"] == "assistant" and not self._chat_form[1] and ids[-1] != self.eos:
            ids, targets = [*ids, self.eos], np.append(targets, True)
        self.counts["rows longer than data.max_length, cut at the end"] += len(ids) > self.max_length
        ids, targets = ids[: self.max_length], targets[: self.max_length]
        targets[:1] = False
        if not targets.any():
            self.counts["rows in which nothing of the assistant is left to learn, left out"] += 1
            return []
        return [Example(np.asarray(ids, np.int32), targets, row)]

    def classification(self, text: str, pair: str | None, label: Any, row: int) -> list[Example]:
        """A text or pair with its label."""
        made = self._tokens(
            text, pair, truncation="longest_first", max_length=self.max_length, return_token_type_ids=self.types
        )
        whole = self._tokens(text, pair)
        self.counts["rows longer than data.max_length, cut"] += len(whole.input_ids) > len(made.input_ids)
        if not text.strip():
            self.counts["rows without text left out"] += 1
            return []
        ids = np.asarray(made.input_ids, np.int32)
        types = made.get("token_type_ids") if self.types else None
        return [
            Example(ids, np.zeros(len(ids), bool), row, label, None if types is None else np.asarray(types, np.int32))
        ]

    def source(self, prompt: str) -> list[int]:
        """The ids of a prompt for an encoder, with the tokenizer's own end, at most `max_length`."""
        made = self._tokens(prompt, truncation=True, max_length=self.max_length)
        return list(made.input_ids)

    def pair(self, prompt: str, completion: str, row: int) -> list[Example]:
        """A prompt for an encoder; label: what its decoder learns, the completion's ids and the end token."""
        ids = self.source(prompt)
        self.counts["rows whose prompt is longer than data.max_length, cut at its end"] += (
            len(ids) == self.max_length and len(self._tokens(prompt).input_ids) > self.max_length
        )
        label = list(self._tokens(text_target=completion, add_special_tokens=False).input_ids)
        label = label if label and label[-1] == self.eos else [*label, self.eos]
        if not ids:
            self.counts["rows without a prompt left out"] += 1
            return []
        if len(label) > self.max_length:
            self.counts["rows whose completion alone is longer than data.max_length, left out"] += 1
            return []
        self.counts["rows with an empty completion, of which only the end is learnt"] += not completion
        return [Example(np.asarray(ids, np.int32), np.zeros(len(ids), bool), row, np.asarray(label, np.int32))]

    def pieces(self, text: str, row: int) -> list[tuple[Example, np.ndarray]]:
        """A text in pieces of at most `max_length` tokens with the tokenizer's special tokens around each.

        Beside each, the places of tokens that are not special.
        """
        room = self.max_length - self.tokenizer.num_special_tokens_to_add()
        if room < 1:
            raise JpeftError(f"data.max_length: {self.max_length} leaves no room beside the special tokens; give more")
        pieces = self._tokens(
            text, truncation=True, max_length=self.max_length, return_overflowing_tokens=True
        ).input_ids
        made = []
        for ids in pieces:
            places = np.flatnonzero(~np.isin(ids, self.tokenizer.all_special_ids))
            if len(places):
                made.append((Example(np.asarray(ids, np.int32), np.zeros(len(ids), bool), row), places))
        self.counts["rows without text left out"] += not made
        self.counts["rows longer than data.max_length, split"] += len(pieces) > 1
        return made

    def tagged(self, words: Sequence[str], tags: Sequence[int], row: int) -> list[Example]:
        """Words with the number of a tag each. label: `Tags`."""
        if not words:
            self.counts["rows without words left out"] += 1
            return []
        made = self._tokens(
            " ".join(words),
            truncation=True,
            max_length=self.max_length,
            return_offsets_mapping=True,
            return_token_type_ids=self.types,
        )
        tokens = np.full((2, len(made.input_ids)), -100, np.int32)
        begins = np.cumsum([0, *(len(word) + 1 for word in words)])  # of each word in the text
        seen, last = 0, -1
        for at, (begin, end) in enumerate(made.offset_mapping):
            # A token may begin with the blank before its word, and special tokens are of no characters.
            word = int(np.searchsorted(begins, end, side="left")) - 1
            if end > begin and word > last:
                tokens[:, at] = tags[word], word
                seen, last = seen + 1, word
        whole = len(made.input_ids) < self.max_length or len(self._tokens(" ".join(words)).input_ids) <= self.max_length
        read = len(words) if whole else last + 1
        self.counts["words behind data.max_length, cut"] += len(words) - read
        self.counts["words without a token of their own, whose tags are not learnt"] += read - seen
        if not seen:
            self.counts["rows without a word that has a token left out"] += 1
            return []
        ids, types = np.asarray(made.input_ids, np.int32), made.get("token_type_ids") if self.types else None
        label = Tags(tokens[0], tokens[1], np.asarray(tags, np.int32))
        types = None if types is None else np.asarray(types, np.int32)
        return [Example(ids, np.zeros(len(ids), bool), row, label, types)]

    def _render(
        self,
        messages: Sequence[Mapping[str, str]],
        place: Callable[[], str] = lambda: "a short conversation",
        *,
        add_generation_prompt: bool = False,
    ) -> str:
        if not getattr(self.tokenizer, "chat_template", None):
            raise JpeftError("the tokenizer has no chat template; train with data.prompt and data.completion instead")
        try:
            rendered: str = self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except ImportError as error:
            raise JpeftError(f"chat templates need jinja2 (pip install jinja2): {error}") from error
        except Exception as error:  # templates refuse messages with errors of their own, and fail with Python's
            raise JpeftError(
                f"{place()}: the tokenizer's chat template does not take these messages "
                f"({', '.join(str(message['role']) for message in messages)}): {str(error) or type(error).__name__}"
            ) from error
        return rendered

    @functools.cached_property
    def _chat_form(self) -> tuple[str, str]:
        """(what the template puts before an answer, what it puts behind one up to its end token), from a small chat."""
        question = [{"role": "user", "content": "a"}]
        before, after = self._render(question), self._render(question, add_generation_prompt=True)
        opening = after[len(before) :] if after.startswith(before) else ""
        whole = self._render([*question, {"role": "assistant", "content": _mark(0)}])
        tail = whole.partition(_mark(0))[2]
        ends = [tail.index(t) + len(t) for t in self._specials() if t in tail and not tail[: tail.index(t)].strip()]
        return opening, tail[: min(ends)] if ends else ""

    def _specials(self) -> set[str]:
        added = getattr(self.tokenizer, "added_tokens_decoder", {})
        return {*self.tokenizer.all_special_tokens, *(str(token) for token in added.values() if token.special)}

    def _assistant_regions(self, messages: Any, text: str, place: Callable[[], str]) -> list[tuple[int, int]]:
        """Character spans of `text` that the assistant writes, end tokens included."""
        pieces: list[str] = []
        owners: list[int] = []
        marked = []
        for turn, message in enumerate(messages):
            content = message["content"]
            if message["role"] == "assistant":
                content = _marked(content, pieces)
                owners += [turn] * (len(pieces) - len(owners))
            marked.append({**message, "content": content})
        regions: dict[int, list[int]] = {}
        built, at = "", 0
        template = self._render(marked, place)
        for found in _MARK.finditer(template):
            built += template[at : found.start()]
            index = int(found[1])
            start = len(built)
            built += pieces[index]
            span = regions.setdefault(owners[index], [start, start])
            span[1] = len(built)
            at = found.end()
        built += template[at:]
        if built != text:
            raise JpeftError(
                f"{place()}: the chat template changes the assistant's text in a way that cannot be followed, so what "
                "is to be learnt cannot be told from the rest; use another template, or data.prompt and data.completion"
            )
        opening, closing = self._chat_form
        made, previous = [], 0
        for start, end in regions.values():
            # What the template writes before the text but after the opening (an empty thought) is generated as well.
            opened = text.rfind(opening, previous, start) if opening else -1
            begin = start if opened < 0 else opened + len(opening)
            previous = end + (len(closing) if text.startswith(closing, end) else 0)
            made.append((begin, previous))
        return made


_MARK = re.compile("\ue0f0([0-9]+)\ue0f1")
_TAG = re.compile(r"(</?[A-Za-z_|]+>)")


def _mark(index: int) -> str:
    return f"\ue0f0{index}\ue0f1"


def _marked(content: str, pieces: list[str]) -> str:
    """`content` with marks for its text; tags such as <think> and outer blanks stay, since templates act on them."""
    made = ""
    for part in _TAG.split(content):
        inner = part.strip()
        if not inner or _TAG.fullmatch(part):
            made += part
            continue
        lead = part[: len(part) - len(part.lstrip())]
        made += lead + _mark(len(pieces)) + part[len(lead) + len(inner) :]
        pieces.append(inner)
    return made


def check_messages(messages: Any, place: Callable[[], str]) -> None:
    """Raises JpeftError naming `place()` for what is no list of messages with a role and text."""
    if not isinstance(messages, list) or not messages:
        raise JpeftError(f"{place()}: the messages are not a list of {{role, content}}")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise JpeftError(f"{place()}: message {number} has no role")
        if not isinstance(message.get("content"), str):
            raise JpeftError(f"{place()}: message {number} has no text in content")
