"""Plain text, learnt token by token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jpeft.errors import JpeftError
from jpeft.virtual_tokens import prompt_of
from train.examples import Example, Reader
from train.files import Rows
from train.generation import generate_texts
from train.packing import pack
from train.tasks.language import LanguageTask
from train.tasks.task import Read, text_of

if TYPE_CHECKING:
    from train.session import Run


class Text(LanguageTask):
    """Each token from those before it."""

    name = "text"
    required = ("text",)
    settings = ("packing",)

    def reader(self, rows: Rows, reader: Reader) -> Read:
        return lambda row, index: reader.text(text_of(row[str(self.data.text)]), index)

    def examples(self, rows: Rows, reader: Reader) -> list[Example]:
        made = super().examples(rows, reader)
        return pack(made, reader.max_length) if self.data.packing else made

    def check_model(self, model: Any) -> None:
        prompt = prompt_of(model)
        if self.data.packing and prompt is not None and prompt.position is not None:
            raise JpeftError(
                "data.packing: the method puts virtual tokens into each row, and every text of a packed row would need "
                "its own; leave packing out"
            )

    def example_prompt(self, row: Mapping[str, Any]) -> tuple[str, bool] | None:
        return " ".join(text_of(row[str(self.data.text)]).split()[:12]), False

    def answers(self, run: Run, prompts: Sequence[str], **settings: Any) -> Iterator[str]:
        settings.pop("raw", None)
        yield from generate_texts(run.model, run.reader, [run.reader.prompt(prompt) for prompt in prompts], **settings)
