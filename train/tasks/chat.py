"""Conversations, of which the assistant's turns are learnt."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from train.examples import Reader, check_messages
from train.files import Rows
from train.generation import generate_texts
from train.tasks.language import LanguageTask
from train.tasks.task import Read

if TYPE_CHECKING:
    from train.session import Run


class Chat(LanguageTask):
    """Messages in the tokenizer's chat template."""

    name = "chat"
    required = ("messages",)
    lists = ("messages",)

    def check(self, rows: Rows) -> None:
        for index, messages in enumerate(rows.dataset[str(self.data.messages)]):
            check_messages(messages, functools.partial(rows.place, index))

    def reader(self, rows: Rows, reader: Reader) -> Read:
        messages = str(self.data.messages)
        return lambda row, index: reader.chat(row[messages], index, functools.partial(rows.place, index))

    def example_prompt(self, row: Mapping[str, Any]) -> tuple[str, bool] | None:
        messages = row[str(self.data.messages)]
        return next((message["content"] for message in messages if message["role"] == "user"), "Hello"), False

    def answers(self, run: Run, prompts: Sequence[str], *, raw: bool = False, **settings: Any) -> Iterator[str]:
        def ids(prompt: str) -> list[int]:
            return run.reader.prompt(prompt) if raw else run.reader.chat_prompt([{"role": "user", "content": prompt}])

        yield from generate_texts(run.model, run.reader, [ids(prompt) for prompt in prompts], chat=True, **settings)
