"""What a person sees while a run goes on: in terminals of any width, and in log files."""

from __future__ import annotations

import io
import re

import pytest
from rich.cells import cell_len
from rich.console import Console

from train.display import Display, Meter, clock, size, visible

ROWS = [
    ["How long ago did the Anglican church part from the Vatican ?", "number", "description", "number"],
    ["x" * 150, "y" * 60, "\u5b57" * 30, "\x1b[2J[red]z[/red]"],
]


def terminal(width: int) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=True, color_system=None, _environ={"TERM": "xterm"})
    return console, file


def drawn(file: io.StringIO) -> list[str]:
    """The states of all lines, one after another, without what moves the cursor."""
    return re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue()))


@pytest.mark.parametrize(
    ("width", "line"),
    [
        (30, "11999/12000 loss 1.5000 23:4"),
        (40, "11999/12000 loss 1.5000 23:45:01 left"),
        (80, "11999/12000 loss 1.5000  1,234,567 tokens/s  23:45:01 left"),
    ],
)
def test_progress_is_one_line_in_a_terminal_of_any_width(width: int, line: str) -> None:
    console, file = terminal(width)
    with Display(console).progress(12_000) as meter:
        meter.update(11_999, 1.5, 1_234_567.0, 85_501.0)
    states = drawn(file)
    assert any(line in state for state in states)
    assert max(map(cell_len, states)) <= width
    assert file.getvalue().count("\n") == 1  # when all is done; before that, one line that is drawn again


def test_the_terminal_becomes_narrower_while_a_run_goes_on() -> None:
    console, file = terminal(100)
    with Display(console).progress(10) as meter:
        meter.update(1, 1.0, 1.0, 1.0)
        assert meter._bar is not None
        meter._bar.refresh()
        console.width = 40
        meter._bar.refresh()
    assert "1/10 loss 1.0000 0:01 left" in drawn(file)


@pytest.mark.parametrize("width", [20, 40, 100])
def test_tables_fit_and_nothing_of_them_is_lost(width: int) -> None:
    console, file = terminal(width)
    Display(console).table("Held-out rows", ["prompt", "wanted", "before", "after"], ROWS)
    lines = drawn(file)
    assert max(map(cell_len, lines)) <= width
    said = file.getvalue()
    assert said.count("x") == 150 + 1  # the one of the escape
    assert said.count("y") == 60
    assert said.count("\u5b57") == 30
    if width >= 40:
        assert "\\x1b[2J[red]z[/red]" in "".join(line.strip() for line in lines)
    assert "\x1b[2J" not in said


def test_a_log_file_gets_plain_lines() -> None:
    file = io.StringIO()
    display = Display(Console(file=file, width=60, force_terminal=False))
    with display.progress(3) as meter:
        assert isinstance(meter, Meter)
        for step in (1, 2, 3):
            meter.update(step, 2.0, 1234.5, 75.0)
    display.say("a line longer than the log is wide: " + "word " * 30 + "\x1b]0;title\x07")
    lines = file.getvalue().splitlines()
    assert lines[0] == "step 1/3  loss 2.0000  1,234 tokens/s  1:15 left"
    assert lines[1].startswith("step 3/3")
    assert lines[2].endswith("word word \\x1b]0;title\\x07")
    assert len(lines) == 3
    assert "\x1b" not in file.getvalue()


def test_how_values_are_written() -> None:
    assert [clock(seconds) for seconds in (-1, 7, 750, 3723)] == ["0:00", "0:07", "12:30", "1:02:03"]
    assert (size(10), size(3 * 1024), size(5 << 30)) == ("10 B", "3.0 KiB", "5.00 GiB")
    assert visible("a\tb\nc d") == "a\tb\nc d"
    assert visible("\x00\x7f\u202e\ud800") == "\\x00\\x7f\\u202e\\ud800"
    family = "\U0001f468\u200d\U0001f469"
    assert visible(f"{family} \u0645\u0635\u0631\u200f") == f"{family} \u0645\u0635\u0631\u200f"
