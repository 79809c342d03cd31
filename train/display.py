"""What a person sees while a run goes on: a live line in a terminal, plain lines elsewhere (a log file, CI)."""

from __future__ import annotations

import time
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column, Table
from rich.text import Text

_EVERY = 10.0  # seconds between plain lines
_HARMLESS = "\u00ad\u200c\u200d\u200e\u200f"  # soft hyphen, joiners and direction marks, which texts are written with
_NARROW = 72  # columns below which there is no room for a bar or for columns side by side


class Display:
    """Prints to a console; `plain` is on when it is not a terminal."""

    def __init__(self, console: Console | None = None):
        self.console = console or Console(highlight=False)
        self.plain = not self.console.is_terminal
        if self.plain and console is None:
            # A log has no width; the terminal's default of 80 would break sentences.
            self.console = Console(highlight=False, width=200)

    def say(self, text: str) -> None:
        """A line of its own."""
        self.console.print(Text(visible(text)), soft_wrap=True)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Rows under headings, long cells folded; in a narrow terminal, the cells of a row one below the other."""
        if self.console.width < _NARROW:
            self._records(title, columns, rows)
            return
        made = Table(title=title, title_justify="left", title_style="bold", show_edge=False, pad_edge=False)
        for column in columns:
            made.add_column(column, overflow="fold")
        for row in rows:
            made.add_row(*(Text(visible(cell)) for cell in row))
        self.console.print()
        self.console.print(made)
        self.console.print()

    def _records(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        self.console.print()
        self.console.print(Text(title, style="bold"))
        for row in rows:
            made = Table.grid(padding=(0, 1))
            made.add_column(style="dim", no_wrap=True)
            made.add_column(overflow="fold")
            for column, cell in zip(columns, row, strict=True):
                made.add_row(column, Text(visible(cell)))
            self.console.print()
            self.console.print(made)
        self.console.print()

    @contextmanager
    def progress(self, steps: int) -> Iterator[Meter]:
        """A meter for `steps` steps."""
        if self.plain:
            yield Meter(self, steps, None)
            return
        with _Bar(self.console) as bar:
            yield Meter(self, steps, bar)


class _Bar(Progress):
    """One line whatever the width, which may change while a run goes on: without room, no bar and no speed."""

    _WIDE = (BarColumn(bar_width=None), MofNCompleteColumn(), TextColumn("{task.fields[line]}"))
    _TIGHT = (
        TextColumn(
            "{task.completed}/{task.total} {task.fields[short]}",
            table_column=Column(no_wrap=True, overflow="ellipsis"),
        ),
    )

    def __init__(self, console: Console):
        self._screen = console  # the display is drawn once before Progress has its own
        super().__init__(console=console, transient=True)

    def get_renderables(self) -> Iterable[RenderableType]:
        self.columns = self._TIGHT if self._screen.width < _NARROW else self._WIDE
        return super().get_renderables()


class Meter:
    """Loss, tokens a second and time left of a loop of steps. Time spent outside of steps is not counted."""

    def __init__(self, display: Display, steps: int, bar: Progress | None):
        self._display, self._steps, self._bar = display, steps, bar
        self._task = None if bar is None else bar.add_task("steps", total=steps, line="compiling", short="compiling")
        self._said = 0.0
        self._smooth: float | None = None

    def update(self, step: int, loss: float, tokens_per_second: float, seconds_left: float) -> None:
        """After step number `step`, counted from 1."""
        self._smooth = loss if self._smooth is None else 0.8 * self._smooth + 0.2 * loss
        lost, left = f"loss {self._smooth:.4f}", f"{clock(seconds_left)} left"
        line = f"{lost}  {tokens_per_second:,.0f} tokens/s  {left}"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step, line=line, short=f"{lost} {left}")
        elif step == self._steps or time.monotonic() - self._said > _EVERY:
            self._said = time.monotonic()
            self._display.say(f"step {step}/{self._steps}  {line}")


def clock(seconds: float) -> str:
    """`0:07`, `12:30`, `1:02:03`."""
    whole = max(0, round(seconds))
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


def size(count: float) -> str:
    """A number of bytes, to be read."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def visible(text: str) -> str:
    """`text` with an escape for every character that would act on a terminal or a page instead of being seen there."""
    return text if text.isascii() and text.isprintable() else "".join(map(_shown, text))


def _shown(letter: str) -> str:
    if letter in "\n\t" or letter in _HARMLESS or unicodedata.category(letter) not in ("Cc", "Cf", "Cs"):
        return letter
    return repr(letter).strip("'")
