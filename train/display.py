"""What a person sees while a run goes on: a live line in a terminal, plain lines elsewhere (a log file, CI)."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

_EVERY = 10.0  # seconds between plain lines


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
        self.console.print(Text(text), soft_wrap=True)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Rows under headings; long cells fold, so that it survives a narrow terminal."""
        made = Table(title=title, title_justify="left", title_style="bold", show_edge=False, pad_edge=False)
        for column in columns:
            made.add_column(column, overflow="fold")
        for row in rows:
            made.add_row(*(Text(cell) for cell in row))
        self.console.print()
        self.console.print(made)
        self.console.print()

    @contextmanager
    def progress(self, steps: int) -> Iterator[Meter]:
        """A meter for `steps` steps."""
        if self.plain:
            yield Meter(self, steps, None)
            return
        columns = (BarColumn(bar_width=None), MofNCompleteColumn(), TextColumn("{task.fields[line]}"))
        with Progress(*columns, console=self.console, transient=True) as bar:
            yield Meter(self, steps, bar)


class Meter:
    """Loss, tokens a second and time left of a loop of steps. Time spent outside of steps is not counted."""

    def __init__(self, display: Display, steps: int, bar: Progress | None):
        self._display, self._steps, self._bar = display, steps, bar
        self._task = None if bar is None else bar.add_task("steps", total=steps, line="compiling")
        self._said = 0.0
        self._smooth: float | None = None

    def update(self, step: int, loss: float, tokens_per_second: float, seconds_left: float) -> None:
        """After step number `step`, counted from 1."""
        self._smooth = loss if self._smooth is None else 0.8 * self._smooth + 0.2 * loss
        line = f"loss {self._smooth:.4f}  {tokens_per_second:,.0f} tokens/s  {clock(seconds_left)} left"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step, line=line)
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
