"""report.html from folders that runs leave: finished, killed, empty, hostile."""

from __future__ import annotations

import json
import math
import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from jpeft import JpeftError
from tests.conftest import CHROMIUM
from train import trackers
from train.cli import app
from train.curves import Series, chart, decades, number, smoothed, ticks
from train.report import CONFIG, write_report
from train.samples import Sample, collect, counts, entry, pick, shortened
from train.summary import SUMMARY

VOID = {"meta", "br", "link", "img", "input", "hr"}
HOSTILE = (
    "<script>alert(1)</script> \"double\" 'single' & \x00 \u202e\ud800 </dd></main> {{ 7 * 7 }} {% raw %} " + "w" * 5000
)


class Page(HTMLParser):
    """Reads a page strictly: every element is closed in order. Keeps the elements and the text."""

    def __init__(self, path: Path, source: str | None = None):
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.source = path.read_text(encoding="utf-8") if source is None else source
        self.feed(self.source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data

    def charts(self) -> list[str | None]:
        return [attributes["aria-label"] for tag, attributes in self.elements if tag == "svg"]


def step(number: int, **values: Any) -> dict[str, Any]:
    rate = {"learning_rate": {"lora_a": 1e-3 / number, "lora_b": 1e-3 / number, "head": 1e-2 / number}}
    speed = {"tokens": 100 * number, "tokens_per_second": 50.0, "seconds": 2.0 * number}
    return {"step": number, "loss": 2.0 / number, "gradient_norm": 1.0, **rate, **speed, **values}


def score(number: int, accuracy: float) -> dict[str, Any]:
    return {"step": number, "evaluation": {"accuracy": accuracy, "loss": 2 * (1 - accuracy)}}


SAMPLES = [
    Sample("the sky is", "blue", "red", "blue"),
    Sample("grass is", "green", "red", "blue"),
    Sample("blood is", "red", "red", "green"),
    Sample("a rose is", "red", "red", "red"),
]
FINISHED = {
    "status": "finished",
    "ended": "2026-01-02 03:04:05 +0000",
    "method": "lora (rank 8)",
    "rows": {"to train on": 48, "held out": 12},
    "steps": 30,
    "shapes": [16, 32],
    "parameters": {"trainable": 1_000, "trainable_bytes": 4_000, "frozen": 99_000, "frozen_bytes": 396_000},
    "devices": {"kind": "NVIDIA H100", "platform": "gpu", "count": 8},
    "versions": {"python": "3.11.9", "jax": "0.10.2"},
    "before": {"accuracy": 0.25, "loss": 1.5},
    "after": {"accuracy": 0.875, "loss": 0.25},
    "courses": {"learnt": 8, "still wrong": 1, "lost": 1, "kept right": 2},
    "samples": [entry(sample) for sample in SAMPLES],
    "seconds": {
        "setup": 4.0,
        "compile": 10.0,
        "train": 100.0,
        "evaluation": 5.0,
        "between_steps": 1.5,
        "input": 0.5,
        "total": 125.0,
    },
    "memory": {"process": 3 << 30, "device": 5 << 30},
    "usage": "try it     jpeft generate runs/colours --prompt 'the sky is'",
}
CONFIGURATION = "model:\n  source: HuggingFaceTB/SmolLM2-135M\ndata: {source: /data/colours/rows.jsonl}\n"
CONFIGURATION += "training: {batch_size: 8, accumulation: 2}\n"


def write(folder: Path, records: list[dict[str, Any]] | bytes, summary: Any = None, config: str | None = None) -> Page:
    folder.mkdir(parents=True, exist_ok=True)
    text = records if isinstance(records, bytes) else "".join(json.dumps(r) + "\n" for r in records).encode()
    (folder / trackers.METRICS).write_bytes(text)
    if summary is not None:
        (folder / SUMMARY).write_text(json.dumps(summary))
    if config is not None:
        (folder / CONFIG).write_text(config, encoding="utf-8")
    return Page(write_report(folder))


def test_a_finished_run(tmp_path: Path) -> None:
    records = [score(0, 0.25), *(step(n) for n in range(1, 31)), score(15, 0.5), score(30, 0.875)]
    page = write(tmp_path / "colours", records, FINISHED, CONFIGURATION)
    for part in (
        "colours",
        "HuggingFaceTB/SmolLM2-135M · lora (rank 8) · colours/rows.jsonl",
        "✓ +0.625 better",  # accuracy rises
        "✓ -1.25 better",  # loss falls
        "8 learnt",
        "1,000 parameters (1%, 3.9 KiB)",
        "99,000 parameters (386.7 KiB)",
        "48 to train on, 12 held out",
        "30 of 16 rows",
        "3,000 trained on",
        "8 × NVIDIA H100",  # noqa: RUF001
        "1:40",
        "1.5% of the steps' time",
        "0.5% of the steps' time",
        "3.00 GiB",
        "5.00 GiB",
        "jpeft generate runs/colours --prompt 'the sky is'",
        "source: HuggingFaceTB/SmolLM2-135M",
        "2026-01-02 03:04:05",
    ):
        assert part in page.text, part
    assert page.charts() == [
        "Training loss",
        "Held-out scores",
        "Held-out loss",
        "Learning rate",
        "Gradient norm",
        "Tokens a second",
    ]
    assert "lora_a, lora_b" in page.text  # one curve for the groups with the same rate
    # Right and wrong are said in signs, not in colours alone.
    marks = [attributes["title"] for _, attributes in page.elements if "mark" in (attributes.get("class") or "")]
    assert marks == ["wrong", "right", "wrong", "wrong", "right", "wrong", "right", "right"]
    assert "has not finished" not in page.text
    # One page, with nothing to fetch and nothing that runs.
    assert not [tag for tag, _ in page.elements if tag in ("script", "link", "img", "iframe", "object")]
    assert not [a for _, a in page.elements if {"src", "href", "onclick", "onload"} & a.keys()]
    assert "url(" not in page.source
    assert "@import" not in page.source


def test_a_run_that_went_on_says_so(tmp_path: Path) -> None:
    records = [step(n) for n in range(1, 31)]
    cases: list[tuple[Any, str]] = [
        ([12], "after step 12"),
        ([4, 12, 1200], "after steps 4, 12, 1,200"),
        (list(range(1, 13)), "after steps 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 2 times before"),
        ([], ""),
        (["soon"], ""),
        ("7", ""),
    ]
    for at, (resumed, said) in enumerate(cases):
        page = write(tmp_path / str(at), records, {**FINISHED, "resumed": resumed}, CONFIGURATION)
        row = re.search(r'<th scope="row">Resumed</th><td><bdi>(.*)</bdi>', page.source)
        assert (row[1] if row else "") == said


def test_hostile_text_is_shown_as_text(tmp_path: Path) -> None:
    samples = [dict.fromkeys(("asked", "wanted", "before", "after"), HOSTILE) | {"course": "learnt"}]
    summary = {**FINISHED, "samples": samples, "method": HOSTILE, "usage": HOSTILE, "courses": {HOSTILE: 3}}
    summary["before"] = summary["after"] = {HOSTILE: 1.0}
    records = [
        {"step": 0, "evaluation": {HOSTILE: 1.0}},
        step(1, learning_rate={HOSTILE: 1.0}),
        {"step": 1, "evaluation": {HOSTILE: 0.5, "x" * 9000: 3.0}},
    ]
    page = write(
        tmp_path / "<i>run", records, summary, f"model: {{source: {json.dumps(HOSTILE)}}}\n# {HOSTILE[:90]!a}\n"
    )
    assert "script" not in {tag for tag, _ in page.elements}
    assert "i" not in {tag for tag, a in page.elements if not a}
    assert page.text.count("<script>alert(1)</script> \"double\" 'single' & \\x00 \\u202e\\ud800 </dd></main>") >= 8
    assert "{{ 7 * 7 }}" in page.text
    assert not {"\x00", "\u202e"} & set(page.source)


@pytest.mark.parametrize(
    ("records", "said"),
    [
        (b"", "No step and no score has been recorded yet"),
        ([score(0, 0.5)], "has written 0 steps so far"),
        ([step(1)], "in training, first step and latest"),
        ([step(1), score(1, 1.0)], "has written 1 steps so far"),
        ([step(1, loss=math.nan, gradient_norm=math.inf), step(2, loss=-math.inf)], "infinite"),
        ([step(n, loss=10.0**n, gradient_norm=1e308 * (-1) ** n) for n in range(1, 9)], "logarithmic scale"),
        ([step(1, loss=10**400, tokens="x", seconds=None, learning_rate=[1]), {"step": 2}], "Training loss"),
        ([{"step": 3, "evaluation": {"loss": math.nan, "accuracy": None, "f1": True}}, step(3)], "not a number"),
        ([score(0, 0.5), {"step": 2, "evaluation": "all"}, {"step": 9**9, "loss": 5e-324}], "387,420,489"),
        ([step(2, loss=1.0), step(1), step(2, loss=0.125)], "0.125"),
        (b'{"step": 1, "loss": 0.5}\n{"step": 2, "lo', "cut short or no record: line 2"),
        (b"\x00\xff\n" * 9, "line 1, 2, 3, 4, 5, ..."),
    ],
)
def test_runs_that_have_little_to_show(tmp_path: Path, records: Any, said: str) -> None:
    page = write(tmp_path, records)
    assert said in " ".join(page.text.split()) or said in page.charts()
    assert "This run has not finished" in page.text
    assert f"{SUMMARY} is missing" in page.text
    assert "nan" not in page.source.replace("sans", "")  # no coordinate is one
    for text in page.source.split("<svg")[1:]:
        ElementTree.fromstring("<svg" + text.split("</svg>")[0] + "</svg>")


@pytest.mark.parametrize(
    "summary",
    [
        [],
        {},
        {"status": "finished"},
        {
            "status": "running",
            "steps": 30,
            "seconds": {"train": -1, "total": math.inf},
            "memory": {"process": math.nan},
        },
        dict.fromkeys(FINISHED, "text"),
        dict.fromkeys(FINISHED, 7),
        {key: [1, {}, "x"] for key in FINISHED},
        {key: {"asked": [], "kind": {}, "trainable": "many", "frozen": 1, "train": 0.0} for key in FINISHED},
    ],
)
def test_a_summary_that_says_little_or_nonsense(tmp_path: Path, summary: Any) -> None:
    page = write(tmp_path, [step(1)], summary, "model: [1\n")
    assert "Training loss" in page.charts()
    assert "model: [1" in page.text


# What a page says of itself when it is laid out; the page as it is runs nothing.
PROBE = """<script>
const root = document.documentElement, inside = (e) => e.getBoundingClientRect().right <= root.clientWidth + 0.5;
root.dataset.wide = root.scrollWidth > root.clientWidth;
root.dataset.outside = [...document.querySelectorAll("main *:not(svg *)")].filter((e) => !inside(e)).length;
root.dataset.width = root.clientWidth;
root.dataset.back = getComputedStyle(document.body).backgroundColor;
root.dataset.ink = getComputedStyle(document.body).color;
root.dataset.columns = getComputedStyle(document.querySelector(".pair")).gridTemplateColumns.split(" ").length;
root.dataset.flat = [...document.querySelectorAll("svg")].filter((e) => e.getBBox().height < 150).length;
const seen = (e) => getComputedStyle(e).visibility != "hidden";
root.dataset.tips = [...document.querySelectorAll(".tip")].filter(seen).length;
</script></body>"""


def browse(page: Path, *options: str) -> tuple[str, str]:
    """(the page's elements after Chromium has opened it, what it wrote to its console)."""
    home = f"--user-data-dir={page.parent / 'chromium'}"
    fixed = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", home)
    command = [str(CHROMIUM), *fixed, "--enable-logging=stderr", "--dump-dom", *options, page.as_uri()]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=True, timeout=120)
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


@pytest.mark.browser
def test_the_page_in_a_browser(tmp_path: Path) -> None:
    hostile = {**SAMPLES[0].__dict__, "asked": HOSTILE, "after": HOSTILE, "course": "learnt"}
    summary = {**FINISHED, "samples": [*FINISHED["samples"], hostile], "usage": "x" * 999}
    records = [score(0, 0.25), *(step(n) for n in range(1, 31)), score(30, 0.875)]
    page = write(tmp_path, records, summary, CONFIGURATION)
    shown, console = browse(tmp_path / "report.html")
    # Nothing was refused by the page's own policy, nothing ran, and the browser repaired nothing.
    assert console == ""
    kept = Page(tmp_path / "report.html", shown)
    names = [tag for tag, _ in kept.elements]
    assert "script" not in names
    assert names == [tag for tag, _ in page.elements]
    assert " ".join(kept.text.split()) == " ".join(page.text.split())

    policy = re.search(r"<meta http-equiv=.*>\n", page.source)
    assert policy
    probe = tmp_path / "probe.html"
    probe.write_text(page.source.replace(policy[0], "").replace("</body>", PROBE), encoding="utf-8")
    found = {}
    for name, options in {
        "wide": ("--window-size=1280,900",),
        "narrow": ("--window-size=360,700", "--blink-settings=preferredColorScheme=0"),
    }.items():
        root = re.search("<html[^>]*>", browse(probe, *options)[0])
        assert root
        found[name] = dict(re.findall(r'data-(\w+)="([^"]*)"', root[0]))
        assert (found[name]["wide"], found[name]["outside"], found[name]["flat"], found[name]["tips"]) == (
            "false",
            "0",
            "0",
            "0",
        )
    assert int(found["narrow"]["width"]) <= 500
    assert (found["wide"]["columns"], found["narrow"]["columns"]) == ("2", "1")
    # Dark ink on light, light ink on dark.
    light, dark = ([sum(map(int, re.findall(r"\d+", found[n][key]))) for key in ("ink", "back")] for n in found)
    assert light[0] + 450 < light[1]
    assert dark[1] + 450 < dark[0]


def test_the_command_writes_the_page_again(tmp_path: Path) -> None:
    runner = CliRunner()
    write(tmp_path, [step(1)])
    (tmp_path / trackers.METRICS).write_text(json.dumps(step(7)) + "\n")
    done = runner.invoke(app, ["report", str(tmp_path)], catch_exceptions=False)
    assert done.output.strip().endswith("report.html")
    assert "has written 7 steps" in Page(tmp_path / "report.html").text
    with pytest.raises(JpeftError, match="no run here"):
        write_report(tmp_path / "nowhere")
    (tmp_path / "report.html").unlink()
    (tmp_path / "report.html").mkdir()
    with pytest.raises(JpeftError, match="cannot be written"):
        write_report(tmp_path)


def test_samples_are_of_every_course() -> None:
    texts = [[getattr(sample, name) for sample in SAMPLES] for name in ("asked", "wanted", "before", "after")]
    rows = collect(*texts)
    assert rows == SAMPLES
    assert counts(rows) == {"learnt": 1, "still wrong": 1, "lost": 1, "kept right": 1}
    assert collect(*texts[:2], [], []) == []
    many = [SAMPLES[0]] * 50 + [SAMPLES[3]] * 50 + [Sample("x", "y", "z", "z"), SAMPLES[1]]
    chosen = pick(many, 6)
    assert [sample.course for sample in chosen] == ["learnt"] * 2 + ["still wrong"] * 2 + ["kept right"] * 2
    assert chosen[2] == SAMPLES[1]  # its answer changed
    assert pick(many, 0) == []
    assert len(pick(many, 1000)) == len(many)
    assert shortened("a " * 300).count("a") < 60
    assert len(entry(Sample("a" * 9999, "", "", ""))["asked"]) < 3100


def test_axes() -> None:
    assert ticks(0, 100) == [0, 20, 40, 60, 80, 100]
    assert ticks(0.0, 0.35) == [0, 0.1, 0.2, 0.3]
    assert ticks(-3.0, 3.0) == [-2, 0, 2]
    assert ticks(5, 5) == [5]
    for low, high in ((1e-9, 3e-9), (-1e300, 1e300), (99.7, 100.3), (0, 7)):
        marks = ticks(low, high)
        assert 2 <= len(marks) <= 6
        assert all(low <= mark <= high for mark in marks)
    assert decades(0.03, 40) == [0.1, 1, 10]
    assert decades(1, 20) == [1, 2, 5, 10, 20]
    assert len(decades(1e-30, 1e30)) <= 7
    assert [number(x) for x in (0.91666, 1.5e-5, 12345.6, math.nan, math.inf, 3)] == [
        "0.9167",
        "1.5e-5",
        "12,346",
        "not a number",
        "infinite",
        "3",
    ]
    assert smoothed([2.0, math.nan, 2.0, math.inf], 5) == pytest.approx([2.0] * 4)
    assert smoothed([1.0, 3.0], 1) == [1.0, 3.0]
    assert math.isnan(smoothed([math.nan], 5)[0])


@pytest.mark.parametrize(
    "values", [[4500.0, 4500.0 * (1 + 1e-12)], [0.0], [-3.0, -3.0], [1e308, -1e308], [1e-300, 5e-324], [99.9, 100.1]]
)
def test_ticks_can_be_told_apart(values: list[float]) -> None:
    svg = ElementTree.fromstring(chart("loss", [Series("loss", range(7, 7 + len(values)), values)]))
    texts = [(entry.get("text-anchor"), entry.text) for entry in svg.findall("g[@class='axes']/text")]
    for anchor in ("end", "middle"):
        labels = [text for where, text in texts if where == anchor]
        assert len(set(labels)) == len(labels) >= 2
    for dot in svg.findall("circle"):
        assert 0 <= float(dot.get("cx", "")) <= 480
        assert 0 <= float(dot.get("cy", "")) <= 264


def test_a_long_curve_keeps_its_extremes_and_stays_small() -> None:
    values = [1.0] * 100_000
    values[77_777], values[12_345] = 2.0, math.nan
    svg = str(chart("loss", [Series("loss", range(1, 100_001), values)]))
    assert len(svg) < 60_000
    assert "step 12,346: not a number" in svg
    top = min(float(pair.split(",")[1]) for line in svg.split('points="')[1:] for pair in line.split('"')[0].split())
    assert top < 50  # the one peak, at the upper edge
    assert chart("nothing", [Series("nothing", [], [])]) == ""
