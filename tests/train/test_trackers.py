"""The numbers of a run: one flow of records to metrics.jsonl, TensorBoard and Weights & Biases."""

from __future__ import annotations

import json
import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jpeft import JpeftError
from train import trackers
from train.optimizers import rates, recipe
from train.schema import Config, DataConfig, ModelConfig, OutputConfig, TrainingConfig


def config(**output: Any) -> Config:
    return Config(
        model=ModelConfig(source="./model"),
        method={"name": "lora"},
        data=DataConfig(source="rows.jsonl", text="text"),
        output=OutputConfig(folder="run", **output),
    )


def step(number: int) -> dict[str, Any]:
    return {
        "step": number,
        "loss": 2.0 / number,
        "learning_rate": {"lora_a": 1e-3, "head": 1e-2},
        "tokens": 7 * number,
        "seconds": 0.5 * number,
    }


def score(number: int) -> dict[str, Any]:
    return {"step": number, "evaluation": {"accuracy": 0.25 * number}}


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / trackers.METRICS).read_text().splitlines()]


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard itself reads from the event files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder / trackers.TENSORBOARD), size_guidance={"scalars": 0}).Reload()
    return {tag: [(event.step, event.value) for event in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def test_a_run_that_goes_on_has_every_step_once_in_every_tracker(tmp_path: Path) -> None:
    given = config(tensorboard=True)
    with trackers.open_trackers(given, tmp_path) as log:
        for entry in (score(0), step(1), step(2), score(2), step(3)):
            log.record(entry)
    assert lines(tmp_path) == [score(0), step(1), step(2), score(2), step(3)]

    # A kill while step 4 is written; the last checkpoint is of step 2.
    with (tmp_path / trackers.METRICS).open("a") as file:
        file.write('{"step": 4, "lo')
    assert trackers.read(tmp_path / trackers.METRICS)[1] == [6]
    with trackers.open_trackers(given, tmp_path, after=2) as log:
        log.record(score(2))  # scored again after the checkpoint: it is there already
        log.record(step(3))
        log.record(step(4))
        log.record(score(4))
    assert lines(tmp_path) == [score(0), step(1), step(2), score(2), step(3), step(4), score(4)]
    assert events(tmp_path) == {
        "train/loss": [(n, float(np.float32(2.0 / n))) for n in (1, 2, 3, 4)],
        "train/learning_rate/lora_a": [(n, float(np.float32(1e-3))) for n in (1, 2, 3, 4)],
        "train/learning_rate/head": [(n, float(np.float32(1e-2))) for n in (1, 2, 3, 4)],
        "evaluation/accuracy": [(0, 0.0), (2, 0.5), (4, 1.0)],
    }

    # Another run in the same folder shows nothing of the first, in files that it does not write either.
    with trackers.open_trackers(config(), tmp_path) as log:
        log.record(step(1))
    assert lines(tmp_path) == [step(1)]
    assert not (tmp_path / trackers.TENSORBOARD).exists()


def test_an_evaluation_is_seen_at_once(tmp_path: Path) -> None:
    with trackers.open_trackers(config(tensorboard=True), tmp_path) as log:
        log.record(score(1))
        assert events(tmp_path) == {"evaluation/accuracy": [(1, 0.25)]}


def test_weights_and_biases_goes_on_under_the_same_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[dict[str, Any]] = []
    sent: list[tuple[int, dict[str, float]] | str] = []
    run = types.SimpleNamespace(
        log=lambda values, step: sent.append((step, values)), finish=lambda: sent.append("finished")
    )
    module = types.ModuleType("wandb")
    module.__dict__["init"] = lambda **settings: begun.append(settings) or run
    module.__spec__ = ModuleSpec("wandb", None, origin="wandb")
    monkeypatch.setitem(sys.modules, "wandb", module)
    for after in (0, 2, 0):
        with trackers.open_trackers(config(wandb="colours"), tmp_path, after=after) as log:
            log.record(score(3))
    assert sent[:2] == [(3, {"evaluation/accuracy": 0.75}), "finished"]
    first, resumed, other = (settings["id"] for settings in begun)
    assert first == resumed != other
    assert begun[0]["project"] == "colours"
    assert begun[0]["config"]["model"]["source"] == "./model"

    def refused(**settings: Any) -> None:
        raise RuntimeError("no API key")

    module.__dict__["init"] = refused
    with pytest.raises(JpeftError, match=r"output\.wandb: .*no API key.*wandb login"):
        trackers.open_trackers(config(wandb="colours"), tmp_path)


@pytest.mark.parametrize("spec", [None, ModuleSpec("a folder of that name", None, is_package=True)])
@pytest.mark.parametrize(("name", "value"), [("tensorboard", True), ("wandb", "colours")])
def test_a_tracker_that_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: bool | str, spec: ModuleSpec | None
) -> None:
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda wanted: spec)
    with pytest.raises(JpeftError, match=rf"output\.{name}: .*pip install {name}"):
        trackers.open_trackers(config(**{name: value}), tmp_path)
    assert not list(tmp_path.iterdir())
    trackers.check(config().output)


def test_what_is_no_record_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / trackers.METRICS
    assert trackers.read(path) == ([], [])
    path.write_bytes(
        b'{"step": 1, "loss": NaN}\n\n[1]\n{"loss": 1}\n{"step": "2"}\n\xff\xfe\n{"step": true}\n{"step": -1}\n'
    )
    entries, broken = trackers.read(path)
    assert [entry["step"] for entry in entries] == [1]
    assert broken == [3, 4, 5, 6, 7, 8]
    with pytest.raises(JpeftError, match="cannot be read"):
        trackers.read(tmp_path)
    with pytest.raises(JpeftError, match=r"metrics\.jsonl cannot be written"):
        trackers.open_trackers(config(), tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_the_rates_logged_are_those_the_optimizer_uses(name: Any) -> None:
    training = TrainingConfig(
        learning_rate=0.1, head_learning_rate=0.3, schedule=name, warmup=0.4, clip=None, weight_decay=0.0
    )  # type: ignore[call-arg]
    labels = {"x/lora/a": "lora_a", "head/kernel": "head"}
    logged = rates(training, 5, labels, np.arange(5))
    transform = recipe(training, 5, labels, dict.fromkeys(labels, True)).plain()
    arrays = {key: np.zeros(1, np.float32) for key in labels}
    state = transform.init(arrays)
    for number in range(5):
        # Adam's update of a gradient that never changes is minus the rate.
        now = {group: values[number] for group, values in logged.items()}
        gradient = {key: np.ones(1, np.float32) for key in labels}
        updates, state = transform.update(gradient, state, arrays, rates=now)
        for key, group in labels.items():
            np.testing.assert_allclose(-updates[key][0], logged[group][number], rtol=1e-4)
