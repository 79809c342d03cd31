"""report.html: one page that shows a run, made from nothing but the files in its folder.

The page needs no network and runs nothing. A run that is going on, or was killed, has a page too: whatever file is
missing or cut short, the rest is shown and the page says what is missing.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from jpeft.errors import JpeftError
from train import trackers
from train.curves import Series, chart, number, smoothed
from train.display import clock, size, visible
from train.summary import SUMMARY

CONFIG, REPORT = "config.yaml", "report.html"
_LOWER_IS_BETTER = {"loss", "perplexity", "error", "mse", "rmse", "mae", "wer", "cer"}


def write_report(folder: Path) -> Path:
    """Writes `folder/report.html` and returns its path.

    Raises JpeftError if the folder holds no run or cannot be written.
    """
    if not any((folder / name).is_file() for name in (CONFIG, trackers.METRICS, SUMMARY)):
        raise JpeftError(f"{folder}: no run here ({CONFIG} is missing); give the output.folder of a jpeft train")
    path = folder / REPORT
    beside = path.with_name(path.name + ".new")
    page = environment().get_template("report.html.j2").render(_page(folder))
    try:
        beside.write_text(page, encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        raise JpeftError(f"{path} cannot be written: {error.strerror or error}") from None
    return path


def environment() -> jinja2.Environment:
    """Templates of this package's pages. What is put into them is escaped, and shown where it would act."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_finalized,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _finalized(value: Any) -> Any:
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _page(folder: Path) -> dict[str, Any]:
    """What the template is filled with."""
    notes: list[str] = []
    summary = _summary(folder / SUMMARY, notes)
    entries, broken = trackers.read(folder / trackers.METRICS)
    if broken:
        listed = ", ".join(map(str, broken[:5])) + (", ..." if len(broken) > 5 else "")
        notes.append(f"Left out of {trackers.METRICS}, because it is cut short or no record: line {listed}.")
    # A step that is there twice was repeated after a restart; the later record counts.
    steps = {entry["step"]: entry for entry in sorted(entries, key=_step) if "evaluation" not in entry}
    scores = {entry["step"]: entry["evaluation"] for entry in entries if isinstance(entry.get("evaluation"), dict)}
    scores = dict(sorted(scores.items()))
    config, text = _configuration(folder / CONFIG, notes)
    finished = summary.get("status") == "finished"
    planned = summary.get("steps")
    last = max([*steps, *scores], default=0)
    if not finished:
        of = f" of {planned:,}" if isinstance(planned, int) else ""
        notes.insert(0, f"This run has not finished: it has written {last:,}{of} steps so far.")
    before, after = _ends(summary, scores)
    return {
        "name": folder.absolute().name,
        "finished": finished,
        "notes": notes,
        "subtitle": _subtitle(summary, config),
        "headline": _headline(before, after, steps),
        "metrics": _metric_rows(before, after),
        "charts": _charts(steps, scores),
        "samples": _samples(summary),
        "facts": _facts(summary, config, steps, last),
        "times": _times(_dict(summary, "seconds")),
        "overheads": _overheads(_dict(summary, "seconds")),
        "memory": _memory(summary),
        "usage": _text(summary.get("usage")),
        "config": text,
        "ended": _text(summary.get("ended")),
    }


def _step(entry: Mapping[str, Any]) -> int:
    return int(entry["step"])


def _summary(path: Path, notes: list[str]) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except FileNotFoundError:
        notes.append(f"{SUMMARY} is missing: parameters, times and memory are not known.")
        return {}
    except (OSError, ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        notes.append(f"{SUMMARY} cannot be read.")
        return {}
    return found


def _configuration(path: Path, notes: list[str]) -> tuple[dict[str, Any], str]:
    """The configuration's sections as far as they can be read, and its text."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        notes.append(f"{CONFIG} is missing.")
        return {}, ""
    try:
        found = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        found = None
    return (found if isinstance(found, dict) else {}), text


def _dict(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    found = values.get(key)
    return found if isinstance(found, dict) else {}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _float(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _numbers(values: Any) -> dict[str, float]:
    found = {str(name): _float(value) for name, value in values.items()} if isinstance(values, dict) else {}
    return {name: value for name, value in found.items() if value is not None}


def _ends(summary: Mapping[str, Any], scores: Mapping[int, Any]) -> tuple[dict[str, float], dict[str, float]]:
    """The scores before training and the latest ones."""
    first = _numbers(summary.get("before")) or _numbers(scores.get(0))
    last = _numbers(summary.get("after")) or (_numbers(list(scores.values())[-1]) if len(scores) > 1 else {})
    return first, last


def _subtitle(summary: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    model, data = _dict(config, "model").get("source"), _dict(config, "data").get("source")
    parts = [_end(_text(model)), _text(summary.get("method")), _end(_text(data))]
    return " · ".join(part for part in parts if part)


def _end(source: str) -> str:
    """A hub id whole; of a path, what tells it from others."""
    return "/".join(source.rstrip("/").split("/")[-2:])


def _change(name: str, before: float | None, after: float | None) -> dict[str, str]:
    """A metric's two values and what became of it, in words and a sign as well as a colour."""
    row = {"name": name.replace("_", " "), "before": "–", "after": "–", "change": "", "course": "same", "sign": ""}  # noqa: RUF001
    if before is not None:
        row["before"] = number(before)
    if after is not None:
        row["after"] = number(after)
    if before is None or after is None or not math.isfinite(before - after):
        return row
    lower = not _LOWER_IS_BETTER.isdisjoint(re.split(r"[^a-z]+", name.lower()))
    if number(before) == number(after):
        return {**row, "change": "unchanged", "sign": "="}
    better = (after < before) == lower
    row["change"] = f"{after - before:+.3g} {'better' if better else 'worse'}"
    row["sign"], row["course"] = ("✓", "better") if better else ("✗", "worse")
    return row


def _metric_rows(before: Mapping[str, float], after: Mapping[str, float]) -> list[dict[str, str]]:
    names = dict.fromkeys((*after, *before))
    return [_change(name, before.get(name), after.get(name)) for name in names]


def _headline(
    before: Mapping[str, float], after: Mapping[str, float], steps: Mapping[int, Mapping[str, Any]]
) -> dict[str, str] | None:
    """The most telling metric: the first that both scores have, else the loss of the steps."""
    for name in after:
        if name in before:
            return {**_change(name, before[name], after[name]), "where": "on held-out rows"}
    losses = [value for value in (_float(entry.get("loss")) for entry in steps.values()) if value is not None]
    if not losses:
        return None
    late = smoothed(losses, max(1, len(losses) / 20))[-1]
    return {**_change("loss", losses[0], late), "where": "in training, first step and latest"}


def _charts(steps: Mapping[int, Mapping[str, Any]], scores: Mapping[int, Any]) -> list[dict[str, Any]]:
    """A heading and a drawing for each curve that has values."""
    made = [("Training loss", _raw_and_smooth(_series("loss", steps, "loss"), "each step"))]
    held: dict[str, Series] = {}
    for name in dict.fromkeys(name for score in scores.values() for name in _numbers(score)):
        held[name] = _series(name.replace("_", " "), scores, name)
    shares = [one for one in held.values() if all(0 <= v <= 1 for v in one.values) and one.name != "loss"]
    for start in range(0, len(shares), 4):
        made.append(("Held-out scores", shares[start : start + 4]))
    made += [(f"Held-out {one.name}", [one]) for one in held.values() if one not in shares]
    made.append(("Learning rate", _rates(steps)))
    made.append(("Gradient norm", _raw_and_smooth(_series("norm", steps, "gradient_norm"), "each step")))
    made.append(("Tokens a second", _raw_and_smooth(_speed(steps), "each step")))
    drawn = [{"title": title, "svg": chart(title, [_clean(one) for one in series])} for title, series in made]
    return [entry for entry in drawn if entry["svg"]]


def _series(shown: str, records: Mapping[int, Any], key: str) -> Series:
    found = [(step, _float(record.get(key))) for step, record in records.items()]
    kept = [(step, value) for step, value in found if value is not None]
    return Series(shown, [step for step, _ in kept], [value for _, value in kept])


def _clean(one: Series) -> Series:
    return Series(visible(one.name), one.steps, one.values, one.faint)


def _raw_and_smooth(one: Series, name: str) -> list[Series]:
    if len(one.values) < 10:
        return [one]
    smooth = Series("smoothed", one.steps, smoothed(one.values, max(3.0, len(one.values) / 30)))
    return [Series(name, one.steps, one.values, faint=True), smooth]


def _rates(steps: Mapping[int, Mapping[str, Any]]) -> list[Series]:
    """One curve for each course of the rate, under the names of the groups that share it."""
    groups = dict.fromkeys(name for entry in steps.values() for name in _numbers(entry.get("learning_rate")))
    shared: dict[tuple[float, ...], list[Series]] = {}
    for name in groups:
        one = _series(name, {step: _numbers(entry.get("learning_rate")) for step, entry in steps.items()}, name)
        shared.setdefault((*one.steps, *one.values), []).append(one)
    merged = [Series(", ".join(one.name for one in same), same[0].steps, same[0].values) for same in shared.values()]
    return merged[:4]


def _speed(steps: Mapping[int, Mapping[str, Any]]) -> Series:
    """Tokens a second of each step, from the totals that the records hold."""
    at, rates = [], []
    before = (0.0, 0.0)
    for step, entry in steps.items():
        tokens, seconds = _float(entry.get("tokens")), _float(entry.get("seconds"))
        if tokens is None or seconds is None:
            continue
        if tokens > before[0] and seconds > before[1]:
            at.append(step)
            rates.append((tokens - before[0]) / (seconds - before[1]))
        before = (tokens, seconds)
    return Series("tokens a second", at, rates)


def _samples(summary: Mapping[str, Any]) -> dict[str, Any]:
    found, keys = summary.get("samples"), ("asked", "wanted", "before", "after", "course")
    rows = [row for row in found if isinstance(row, dict)] if isinstance(found, list) else []
    rows = [row for row in rows if all(isinstance(row.get(key), str) for key in keys)]
    counts = {name: int(value) for name, value in _numbers(summary.get("courses")).items() if math.isfinite(value)}
    total = sum(counts.values())
    bars = [{"name": name, "count": f"{n:,}", "share": f"{100 * n / total:.2f}"} for name, n in counts.items() if n > 0]
    courses = dict.fromkeys(row["course"] for row in rows)
    return {"groups": [(one, [row for row in rows if row["course"] == one]) for one in courses], "bars": bars}


def _facts(
    summary: Mapping[str, Any], config: Mapping[str, Any], steps: Mapping[int, Any], last: int
) -> list[tuple[str, str]]:
    """What is known of the run, as (what, value)."""
    facts: list[tuple[str, str]] = []
    parameters, devices = _numbers(summary.get("parameters")), _dict(summary, "devices")
    trainable, frozen = parameters.get("trainable"), parameters.get("frozen")
    if trainable is not None and frozen is not None and trainable + frozen > 0:
        share = 100 * trainable / (trainable + frozen)
        held = f", {size(parameters['trainable_bytes'])}" if "trainable_bytes" in parameters else ""
        facts.append(("Trained", f"{trainable:,.0f} parameters ({share:.3g}%{held})"))
        held = f" ({size(parameters['frozen_bytes'])})" if "frozen_bytes" in parameters else ""
        facts.append(("Frozen", f"{frozen:,.0f} parameters{held}"))
    rows = _numbers(summary.get("rows"))
    if rows:
        facts.append(("Rows", ", ".join(f"{count:,.0f} {name}" for name, count in rows.items())))
    batch = _numbers(_dict(config, "training"))
    each = f" of {batch['batch_size'] * batch.get('accumulation', 1):,.0f} rows" if "batch_size" in batch else ""
    facts.append(("Steps", f"{last:,}{each}"))
    resumed = summary.get("resumed")
    if isinstance(resumed, list) and resumed and all(isinstance(step, int) for step in resumed):
        listed = ", ".join(f"{step:,}" for step in resumed[-10:])
        earlier = f", {len(resumed) - 10:,} times before" if len(resumed) > 10 else ""
        facts.append(("Resumed", f"after step{'s' * (len(resumed) > 1)} {listed}{earlier}"))
    tokens = _float(steps[max(steps)].get("tokens")) if steps else None
    if tokens is not None:
        facts.append(("Tokens", f"{tokens:,.0f} trained on"))
    shapes = summary.get("shapes")
    if isinstance(shapes, list) and shapes:
        facts.append(("Shapes", f"rows padded to {', '.join(map(str, shapes))} tokens"))
    if devices:
        count, kind = _float(devices.get("count")) or 1, devices.get("kind") or devices.get("platform")
        facts.append(("Device", f"{count:.0f} × {kind}" if count > 1 else str(kind)))  # noqa: RUF001
    versions = _dict(summary, "versions")
    if versions:
        facts.append(("Versions", ", ".join(f"{name} {version}" for name, version in versions.items())))
    return facts


# What the whole of a run's time is divided into; and what of the training time the devices may have waited for.
_PARTS = {
    "setup": "reading data, loading the model",
    "compile": "first step of each shape, which compiles it",
    "train": "all other steps",
    "evaluation": "scoring held-out rows",
}
_OVERHEADS = {
    "between_steps": "host time between steps",
    "input": "of that, waiting for input",
}


def _times(seconds: Mapping[str, Any]) -> list[dict[str, str]]:
    spent = {name: value for name, value in _numbers(seconds).items() if math.isfinite(value) and value >= 0}
    total = max(spent.get("total", 0.0), sum(spent.get(name, 0.0) for name in _PARTS))
    if total <= 0:
        return []
    rows = [(text, spent[name]) for name, text in _PARTS.items() if name in spent]
    rows += [("everything else", total - sum(value for _, value in rows))]
    shown = [{"name": text, "clock": _clock(value), "share": f"{100 * value / total:.2f}"} for text, value in rows]
    return [*shown, {"name": "in all", "clock": _clock(total), "share": ""}]


def _overheads(seconds: Mapping[str, Any]) -> list[dict[str, str]]:
    spent = _numbers(seconds)
    train = spent.get("train", 0.0)
    if not train > 0:
        return []
    return [
        {"name": text, "share": f"{100 * spent[name] / train:.2g}% of the steps' time"}
        for name, text in _OVERHEADS.items()
        if name in spent and math.isfinite(spent[name])
    ]


def _clock(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else clock(seconds)


def _memory(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    names = {"process": "process, at its peak", "device": "fullest device, at its peak"}
    found = _numbers(summary.get("memory"))
    return [(text, size(found[name])) for name, text in names.items() if math.isfinite(found.get(name, math.nan))]
