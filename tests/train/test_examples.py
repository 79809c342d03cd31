"""What is tokenised and what of it is learnt."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from jpeft import JpeftError
from tests.train.conftest import make_tokenizer
from train.batches import Batches, Window
from train.examples import Example, Reader
from train.tasks import TASKS

THINK = (
    "{% for m in messages %}<|start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and not loop.last and '</think>' in m.content %}"
    "{{ m.content.split('</think>')[-1].lstrip('\n') }}"
    "{% elif m.role == 'assistant' and '</think>' not in m.content and loop.last %}"
    "<think>\n\n</think>\n\n{{ m.content }}"
    "{% else %}{{ m.content }}{% endif %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def learnt(reader: Reader, example: Example) -> str:
    return reader.tokenizer.decode(example.ids[example.targets])


def whole(reader: Reader, example: Example) -> str:
    return reader.tokenizer.decode(example.ids)


@pytest.mark.parametrize(
    ("prompt", "completion", "target"),
    [
        ("Answer:", " yes", " yes</s>"),
        ("Answer: ", "yes", " yes</s>"),  # one token holds the space and the word, as at inference after a joint prompt
        ("Answer:\n", "yes", "yes</s>"),
        ("Answer:", "", "</s>"),
        ("", "yes", "yes</s>"),
        ("yes yes", " yes", " yes</s>"),
        ("Question: is x\nAnswer:", " Answer: no", " Answer: no</s>"),
        ("é", "é", "é</s>"),
    ],
)
def test_the_completion_begins_at_its_first_character(
    tokenizer: Any, prompt: str, completion: str, target: str
) -> None:
    reader = Reader(tokenizer, 64)
    (example,) = reader.completion(prompt, completion, 0)
    assert whole(reader, example) == f"{prompt}{completion}</s>"
    if prompt:
        assert learnt(reader, example) == target
    else:
        assert not example.targets[0]  # nothing comes before it that could predict it
        assert example.targets[1:].all()


def test_a_prompt_that_ends_inside_a_token_is_counted(tokenizer: Any) -> None:
    reader = Reader(tokenizer, 64)
    reader.completion("Answer:", " yes", 0)
    assert not +reader.counts
    reader.completion("Answer: ", "yes", 0)
    assert [count for what, count in reader.counts.items() if "ends inside a token" in what] == [1]


def test_prompts_are_tokenised_as_in_training(tokenizer: Any) -> None:
    for bos in (False, True):
        reader = Reader(make_tokenizer(bos=bos), 64)
        (example,) = reader.completion("Question: what\nAnswer:", " one two", 0)
        prompt = reader.prompt("Question: what\nAnswer:")
        assert list(example.ids[: len(prompt)]) == prompt
        assert not example.targets[: len(prompt)].any()
        assert example.targets[len(prompt) :].all()


@pytest.mark.parametrize("text", ["the red", "<s>the red"])
def test_one_bos_and_a_trained_end(text: str) -> None:
    reader = Reader(make_tokenizer(bos=True), 64)
    for made in (reader.text(text, 0), reader.completion(text, " one", 0)):
        ids = list(made[0].ids)
        assert ids.count(1) == 1
        assert ids[0] == 1
        assert ids[-1] == 2
        assert made[0].targets[-1]
    assert reader.prompt(text).count(1) == 1


def test_no_second_end_and_no_pad_token_needed() -> None:
    reader = Reader(make_tokenizer(pad=False), 64)
    (example,) = reader.text("the red</s>", 0)
    assert list(example.ids).count(2) == 1
    (example,) = reader.completion("the", " red</s>", 0)
    assert list(example.ids).count(2) == 1


def test_an_end_that_pads_as_well_is_learnt_where_it_ends() -> None:
    tokenizer = make_tokenizer()
    tokenizer.pad_token = "</s>"
    reader = Reader(tokenizer, 64)
    (short,), (long,) = reader.completion("the", " red", 0), reader.completion("the", " red green blue", 1)
    assert len(short) < len(long)
    batch = Batches(TASKS["text"], [short, long])(Window((0, 1), len(long)), 2)
    at = len(short) - 1
    assert batch["input_ids"][0, at] == 2
    assert batch["attention_mask"].sum(1).tolist() == [len(short), len(long)]
    assert batch["labels"][0].tolist().count(2) == 1
    assert batch["weights"].tolist() == [2, long.targets.sum()]  # one for " red", one for the end


def test_the_tokenizers_own_limit_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = 2
    long = " one two three four red green blue"
    tokenizer(long)
    assert "longer than the specified maximum" in caplog.text
    caplog.clear()
    reader = Reader(make_tokenizer(), 5)
    reader.tokenizer.model_max_length = 2
    assert reader.completion("", long, 0) == []
    for made in (reader.text(long, 0), reader.classification(long, None, 0, 0), reader.pair(long, "yes", 0)):
        assert len(made[0]) == 5
    assert len(reader.tagged(long.split(), [0] * 7, 0)[0]) == 5
    assert caplog.text == ""


def test_long_rows(tokenizer: Any) -> None:
    reader = Reader(make_tokenizer(bos=True), 8)
    (example,) = reader.completion(" one two three four red green blue", " yes no", 0)
    assert len(example) == 8
    assert example.ids[0] == 1
    assert " one two three four red green blue yes no</s>".endswith(whole(reader, example).removeprefix("<s>"))
    assert learnt(reader, example) == " yes no</s>"
    assert reader.completion("a", " one two three four red green blue", 0) == []
    assert [count for what, count in reader.counts.items() if "completion alone" in what] == [1]
    reader = Reader(tokenizer, 4)
    pieces = reader.text(" one two yes no red blue", 0)
    assert "".join(whole(reader, piece) for piece in pieces) == " one two yes no red blue</s>"
    assert [len(piece) for piece in pieces] == [4, 3]
    assert not any(piece.targets[0] for piece in pieces)
    assert reader.text("", 1) == []
    assert reader.counts["rows without text left out"] == 1


MESSAGES = [
    {"role": "user", "content": "is the red blue"},
    {"role": "assistant", "content": "no the"},
    {"role": "user", "content": "no the"},
    {"role": "assistant", "content": "yes"},
]


def test_chat_learns_the_assistants_turns_and_their_ends(tokenizer: Any) -> None:
    reader = Reader(tokenizer, 128)
    (example,) = reader.chat(MESSAGES, 0, str)
    assert whole(reader, example) == tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    assert learnt(reader, example) == "no the<|end|>yes<|end|>"
    # An answer is generated from the ids that training saw before it.
    prompt = reader.chat_prompt(MESSAGES[:3])
    assert list(example.ids[: len(prompt)]) == prompt
    assert example.targets[len(prompt)]


def test_chat_template_that_removes_earlier_thoughts() -> None:
    reader = Reader(make_tokenizer(template=THINK), 256)
    thoughts = [
        MESSAGES[0],
        {"role": "assistant", "content": "<think>maybe</think>\n\nno"},
        MESSAGES[2],
        {"role": "assistant", "content": "<think>three</think>\n\nyes"},
    ]
    (example,) = reader.chat(thoughts, 0, str)
    assert "maybe" not in whole(reader, example)
    assert learnt(reader, example) == "no<|end|><think>three</think>\n\nyes<|end|>"
    (example,) = reader.chat(MESSAGES, 0, str)
    assert learnt(reader, example) == "no the<|end|><think>\n\n</think>\n\nyes<|end|>"


def test_chat_template_without_an_end_gets_the_tokenizers() -> None:
    turns = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    template = turns + "{% if add_generation_prompt %}assistant:{% endif %}"
    reader = Reader(make_tokenizer(template=template), 128)
    (example,) = reader.chat(MESSAGES, 0, str)
    assert learnt(reader, example) == " no the yes</s>"


def test_chat_template_with_its_own_bos() -> None:
    reader = Reader(make_tokenizer(bos=True, template="{{ bos_token }}" + THINK), 128)
    (example,) = reader.chat(MESSAGES, 0, str)
    assert list(example.ids).count(1) == 1
    assert reader.chat_prompt(MESSAGES[:1]).count(1) == 1


def test_chat_that_cannot_be_followed_is_refused() -> None:
    shout = "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content | upper }}<|end|>\n{% endfor %}"
    reader = Reader(make_tokenizer(template=shout), 128)
    with pytest.raises(JpeftError, match=r"rows\.jsonl, line 3: the chat template changes"):
        reader.chat(MESSAGES, 0, lambda: "rows.jsonl, line 3")
    with pytest.raises(JpeftError, match="no chat template"):
        Reader(make_tokenizer(template=None), 128).chat(MESSAGES, 0, str)


def test_chat_template_that_fails_names_the_row() -> None:
    refuses = "{% for m in messages %}{{ raise_exception('roles must alternate') }}{% endfor %}"
    for template, said in (
        (refuses, r"\(user, assistant, user, assistant\): roles must alternate"),
        ("{{ messages[0].nothing.there }}", "no attribute 'nothing'"),
        ("{{ messages[0].content + 1 }}", "concatenate"),
        ("{% for %}", "does not take these messages"),
    ):
        reader = Reader(make_tokenizer(template=template), 128)
        with pytest.raises(JpeftError, match=rf"rows\.jsonl, line 3: the tokenizer's chat template .*{said}"):
            reader.chat(MESSAGES, 0, lambda: "rows.jsonl, line 3")


def test_rows_with_little_to_learn_are_counted(tokenizer: Any) -> None:
    reader = Reader(tokenizer, 64)
    reader.completion("Answer:", "", 0)
    assert +reader.counts == {"rows with an empty completion, of which only the end is learnt": 1}
    reader = Reader(tokenizer, 64)
    assert reader.completion("", "", 0) == []
    assert +reader.counts == {"rows with neither prompt nor completion, left out": 1}
    reader = Reader(tokenizer, 64)
    assert reader.text("</s>", 0) == []
    assert +reader.counts == {"rows of a single token, which nothing comes before, left out": 1}


@pytest.mark.parametrize(
    "messages", [None, [], "hello", [{"role": "user"}], [{"content": "a"}], [{"role": "user", "content": 1}]]
)
def test_bad_messages(tokenizer: Any, messages: Any) -> None:
    with pytest.raises(JpeftError, match="line 7: "):
        Reader(tokenizer, 64).chat(messages, 0, lambda: "rows.jsonl, line 7")


def test_chat_rows_left_without_targets_are_counted(tokenizer: Any) -> None:
    reader = Reader(tokenizer, 6)
    assert reader.chat(MESSAGES, 0, str) == []
    assert [count for what, count in reader.counts.items() if "left to learn" in what] == [1]


def test_pairs_have_types_only_where_the_model_takes_them(tokenizer: Any) -> None:
    (example,) = Reader(tokenizer, 64, types=False).classification("red", "blue", 1, 0)
    assert example.types is None
    (example,) = Reader(make_tokenizer(bos=True), 64, types=True).classification("red", "blue", 1, 0)
    assert example.types is not None
    assert np.asarray(example.types).max() == 1
