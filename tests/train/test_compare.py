"""`jpeft compare`: a whole comparison on a tiny BERT, the choice of rates, the plots, and what is refused."""

from __future__ import annotations

import csv
import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

import jpeft
from jpeft import JpeftError
from tests.train.test_run import COLOURS, entries
from train import config as configs
from train import session
from train.cli import app
from train.compare import measure, table, trials
from train.compare.config import load
from train.compare.measure import Costs
from train.compare.page import plots
from train.compare.pareto import Point, front, plot
from train.compare.run import _identified, _notes, compare, compare_all
from train.compare.table import Entry
from train.compare.trials import Trial
from train.display import Display
from train.folder import Folder
from train.materials import Materials
from train.plan import Plan
from train.run import adapted

METHODS = (
    "{lora: {name: lora, rank: 2, targets: [query, value]}, "
    "biases: {name: bitfit}, "
    "nowhere: {name: lora, rank: 2, targets: [nothing_is_called_so]}}"
)
HEAD = 32 * 3 + 3
BIASES = 32 + 2 * (5 * 32 + 48 + 2 * 32)  # of the embeddings' norm, of two layers' projections and norms


def text(model: Any, rows: Any, folder: Path, methods: str = METHODS, more: str = "") -> str:
    return (
        f"model: {{source: {model}, task: sequence-classification, pooling: mean}}\n"
        f"methods: {methods}\n"
        f"data: {{source: {rows}, text: text, label: answer, test_size: 12, max_length: 16}}\n"
        "training: {epochs: 1, batch_size: 8, max_steps: 2, head_learning_rate: 3e-2}\n"
        "seeds: [0, 1]\n"
        "learning_rates: [1e-2]\n"
        f"output: {{folder: {folder}}}\n{more}"
    )


@pytest.fixture
def rows(jsonl: Callable[..., Path]) -> Path:
    """Questions of one length, so that a run compiles one program."""
    return jsonl([{"text": f"the {COLOURS[number % 3]} is", "answer": COLOURS[number % 3]} for number in range(60)])


def quiet() -> Display:
    return Display(Console(quiet=True))


def test_a_comparison(
    bert: Path, rows: Path, tmp_path: Path, config_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    path = config_file(text(bert, rows, folder, "{}"), "tiny.yaml")
    given = f"methods={METHODS}"
    loaded = []
    base_model = session.base_model
    monkeypatch.setattr(
        session, "base_model", lambda config, *where: loaded.append(config) or base_model(config, *where)
    )

    said = CliRunner().invoke(app, ["compare", str(path), given], catch_exceptions=False)
    assert said.exit_code == 0, said.output
    assert [config.training.seed for config in loaded] == [0, 1]  # once for each head, whatever the number of methods
    assert "nowhere" in said.output
    assert "lora" in said.output
    read = list(csv.DictReader((folder / "table.csv").read_text().splitlines()))
    assert {row["label"] for row in read} == {"lora", "biases", "nowhere"}
    for row in read[:2]:
        runs = [folder / "runs" / row["label"] / f"rate-0.01-seed-{seed}" for seed in (0, 1)]
        scores = [entries(run)[-1]["evaluation"]["accuracy"] for run in runs]
        assert [float(row[f"score_seed_{seed}"]) for seed in (0, 1)] == scores
        assert float(row["score"]) == pytest.approx(np.mean(scores))
        assert float(row["spread"]) == pytest.approx(np.std(scores, ddof=1))
        assert int(row["trainable"]) == {"lora": 4 * 2 * (32 + 32), "biases": BIASES}[row["label"]] + HEAD
        assert row["merged"] == "True"
        assert all(float(row[key]) > 0 for key in ("file_bytes", "step_seconds", "step_bytes", "call_ratio"))
        assert configs.load(runs[1] / session.CONFIG).training.seed == 1
    assert read[2]["label"] == "nowhere"
    assert read[2]["score"] == read[2]["trainable"] == ""
    assert "nothing_is_called_so" in read[2]["failure"]
    page, written = (folder / "compare.html").read_text(), (folder / "table.md").read_text()
    assert "<script" not in page
    assert page.count("<svg") == 4
    for word in ("nowhere failed", "nothing_is_called_so", "12 held-out rows", "none was searched for"):
        assert word in written
        assert word in re.sub(r"</?bdi>", "", page)

    # The same command again trains and measures nothing that is there; a killed one goes on, here with one run less.
    (folder / "runs" / "biases" / "rate-0.01-seed-1" / session.ADAPTER).rename(tmp_path / "gone")
    kept = [folder / "runs" / "biases" / "rate-0.01-seed-0" / session.METRICS, folder / "measured" / "lora.json"]
    before = [file.stat().st_mtime_ns for file in kept]
    again = compare(path, [given], quiet())
    assert [file.stat().st_mtime_ns for file in kept] == before
    assert (folder / "runs" / "biases" / "rate-0.01-seed-1" / session.ADAPTER).exists()
    for entry, row in zip(again, read, strict=True):
        assert entry.label == row["label"]
        assert entry.scores == [float(row[f"score_seed_{seed}"]) for seed in (0, 1) if row[f"score_seed_{seed}"]]

    with pytest.raises(JpeftError, match=r"another configuration:\n  training\.batch_size: 8 -> 4\n.*delete runs/lora"):
        compare(path, [given, "training.batch_size=4"], quiet())

    # One table never mixes rows, also where every run of the old ones is finished.
    with Folder(folder).locked(), pytest.raises(JpeftError, match="another process is writing"):
        compare(path, [given], quiet())
    kept = (folder / "table.md").read_text()
    more = METHODS.replace("nowhere", "another")
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[:50]))
    with pytest.raises(JpeftError, match="holds runs that began with other training rows, held-out rows than"):
        compare(path, [f"methods={more}"], quiet())
    assert (folder / "table.md").read_text() == kept


def test_what_chooses_is_not_changed_midway(tmp_path: Path, bert: Path, rows: Path, config_file: Any) -> None:
    path = config_file(text(bert, rows, tmp_path, "{a: {name: bitfit}}").replace("[1e-2]", "[1e-3, 1e-2]"))
    comparison = load(path, ["validation_size=10"])
    materials = Materials(comparison.base)
    assert _identified(comparison, materials) == ""
    assert _identified(load(path, ["validation_size=11"]), materials) == ""  # there is no run yet
    (tmp_path / "rates" / "a" / "rate-0.01-seed-0").mkdir(parents=True)
    with pytest.raises(JpeftError, match="began with other validation_size"):
        _identified(comparison, materials)
    identity = Folder(tmp_path).identity()
    Folder(tmp_path).identify({**identity, "versions": "of yesterday"})
    assert _identified(load(path, ["validation_size=11"]), materials) == "of yesterday"


def test_files_that_share_a_folder_and_methods_that_all_fail(
    bert: Path, rows: Path, tmp_path: Path, config_file: Callable[..., Path]
) -> None:
    given = text(bert, rows, tmp_path / "out", "{nowhere: {name: lora, targets: [nothing]}}")
    path = config_file(given, "one.yaml")
    with pytest.raises(JpeftError, match=r"two\.yaml: output\.folder .*out is that of .*one\.yaml"):
        compare_all([path, config_file(given, "two.yaml")])
    with pytest.raises(JpeftError, match="unknown key"):
        compare_all([path, config_file(f"{given}sedes: [0]\n", "two.yaml")])
    assert not (tmp_path / "out").exists()
    with pytest.raises(JpeftError, match=r"every method failed; the first: .*nothing"):
        compare_all([path])
    assert "nowhere failed: " in (tmp_path / "out" / "table.md").read_text()


def test_rates_are_chosen_by_training_rows(
    bert: Path, rows: Path, tmp_path: Path, config_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = config_file(text(bert, rows, tmp_path / "out", "{a: {name: bitfit}, b: {name: bitfit}}"))
    comparison = load(path, ["learning_rates=[1e-3, 1e-2]", "validation_size=10", "seeds=[4, 5]"])
    materials = Materials(comparison.base)
    seen = []

    def tried(config: Any, label: str, parts: Materials, display: Display) -> Trial:
        seen.append(parts)
        rate = config.training.learning_rate
        score = {"a": {1e-3: 0.5, 1e-2: 0.5}, "b": {1e-3: 0.25, 1e-2: 0.75}}[label][rate]
        broken = "diverged" if label == "b" and rate == 1e-3 else None
        metrics = {} if broken else {"accuracy": score, "loss": 1.0}
        return Trial(label, rate, config.training.seed, Path(config.output.folder), {}, metrics, broken)

    monkeypatch.setattr(trials, "_tried", tried)
    ran = trials.searched(comparison, materials, quiet())
    assert [(trial.label, trial.rate, trial.seed) for trial in ran] == [
        (label, rate, 4) for label in "ab" for rate in (1e-3, 1e-2)
    ]
    assert trials.chosen(comparison, ran) == {"a": 1e-3, "b": 1e-2}
    assert table.rates(ran) == (["method", "0.001", "0.01"], [["a", "0.5", "0.5"], ["b", "failed", "0.75"]])
    places = {
        name: {rows.place(at) for at in range(len(rows))}
        for name, rows in (
            ("train", seen[0].train_rows),
            ("chooses", seen[0].test_rows),
            ("all", materials.train_rows),
            ("held out", materials.test_rows),
        )
    }
    assert len(places["chooses"]) == 10
    assert places["train"] | places["chooses"] == places["all"]
    assert not places["train"] & places["chooses"]
    assert not places["all"] & places["held out"]
    assert all(parts is seen[0] for parts in seen)
    final = trials.final(comparison, {"b": 1e-2}, materials, quiet())
    assert [(trial.rate, trial.seed) for trial in final] == [(1e-2, 4), (1e-2, 5)]
    assert seen[-1] is materials
    said = " ".join(_notes(comparison, materials, {"a": 1e-3, "b": 1e-2}, final))
    assert (
        "The lowest rate was best for a, so one beyond it may be better still. The highest rate was best for b" in said
    )
    with pytest.raises(JpeftError, match="validation_size: 48 of the 48 training rows"):
        materials.validating(48)


def test_faults_come_in_one_message(tmp_path: Path, config_file: Callable[..., Path]) -> None:
    wrong = (
        "model: {source: here, pooling: mean}\n"
        "method: {name: lora}\n"
        "methods:\n"
        "  a/b: {name: lora}\n"
        "  ranks: {name: lora, rnak: 3}\n"
        "data: {source: rows.jsonl, text: text, label: answer}\n"
        "training: {learning_rate: 1e-3, epohcs: 2}\n"
        "seeds: [1, -1]\n"
        "learning_rate: [1e-3]\n"
        "output: {folder: out, overwrite: true}\n"
        "epochs: 3\n"
    )
    with pytest.raises(JpeftError) as caught:
        load(config_file(wrong))
    lines = str(caught.value).splitlines()
    for start in (
        "line 2: method: unknown key; did you mean methods?",
        "line 4: methods.a/b: a label has letters",
        "line 5: methods.ranks.rnak: unknown key; did you mean methods.ranks.rank?",
        "line 7: training.epohcs: unknown key; did you mean training.epochs?",
        "line 7: training.learning_rate: learning_rates sets it",
        "line 8: seeds: -1 must be greater than or equal to 0",
        "line 9: learning_rate: unknown key; did you mean learning_rates?",
        "line 11: epochs: unknown key; did you mean training.epochs?",
        "line 10: output.overwrite: a comparison goes on",
    ):
        assert any(line.strip().startswith(start) for line in lines), (start, lines)
    good = config_file(text("here", "rows.jsonl", tmp_path))
    for override, said in {
        "seeds=[1, 1]": "seeds: a value is given twice",
        "methods={}": "methods: a mapping is not a mapping of methods",
        "forgetting={source: a, text: b}": "forgetting: is for causal-lm",
        "validation_size=1.5": "validation_size: 1.5 is neither",
        "learning_rates=[0.0123456, 0.01234561]": "learning_rates: a value is given twice (six digits count)",
        "evaluation.best=accuracy": "evaluation.best: the held-out rows would choose",
        f"methods={{{'a' * 65}: {{name: bitfit}}}}": "a label has letters",
        "methods={a: {name: lora, init: loftq}}": "methods.a: init=loftq makes up for what quantisation loses",
        "seeds=[]": "seeds: ",
    }.items():
        with pytest.raises(JpeftError, match=re.escape(said)):
            load(good, [override])
    assert "give the YAML file" in CliRunner().invoke(app, ["compare", "seeds=[1]"]).output
    assert load(good).run("biases", 0.5, 7).method == {"name": "bitfit"}


@pytest.mark.parametrize("path", sorted(Path("configs/compare").glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_comparisons_are_right(path: Path) -> None:
    comparison = load(path)
    assert len(comparison.grid.seeds) >= 3
    assert str(path) in path.read_text()
    assert comparison.folder == Path("runs") / f"compare-{path.stem}"


@pytest.mark.parametrize("name", ["classification", "labelling", "generation"])
def test_every_method_of_the_shipped_comparisons_has_a_plan(
    name: str, bert: Path, llama: Path, jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    sentences = jsonl([{"sentence": f"the {colour} is", "label": colour} for colour in COLOURS * 8], "sentences.jsonl")
    tagged = jsonl([{"tokens": ["the", colour], "tags": ["O", "B-C"]} for colour in COLOURS * 8], "tagged.jsonl")
    pairs = jsonl([{"mr": colour, "ref": f"it is {colour}"} for colour in COLOURS * 8], "pairs.jsonl")
    given = {
        "classification": [f"data.source={sentences}", f"model.source={bert}", "data.subset=~"],
        "labelling": [f"data.source={tagged}", f"model.source={bert}", "data.tags=tags"]
        + [f"methods.{label}.num_virtual_tokens=20" for label in ("prompt-tuning", "p-tuning", "p-tuning-v2")]
        + [f"methods.{label}.num_virtual_tokens=20" for label in ("prefix-tuning", "mam")],
        "generation": [
            f"data.source={pairs}",
            f"model.source={llama}",
            'data.prompt="{mr}:"',
            'data.completion=" {ref}"',
        ],
    }[name]
    few = ["data.test_split=~", "training.max_steps=500", "training.epochs=~", f"output.folder={tmp_path / 'out'}"]
    comparison = load(Path(f"configs/compare/{name}.yaml"), [*given, *few])
    materials = Materials(comparison.base, abstract=True)
    trained = {}
    for label in comparison.methods:
        config = comparison.run(label, 1e-3, 0).model_copy(update={"data": materials.data})
        model = adapted(config, materials)
        assert Plan(config, model, materials.examples(model)).steps == 500
        trained[label] = jpeft.describe(model).trainable
    assert trained["lora"] < trained["lora-all"]
    assert {
        "prompt-tuning",
        "p-tuning",
        "p-tuning-v2",
        "houlsby",
        "pfeiffer",
        "lora",
        "adalora",
        "mam",
    } <= trained.keys()


def test_forgetting_of_a_language_model(
    llama: Path, jsonl: Callable[..., Path], tmp_path: Path, config_file: Callable[..., Path], monkeypatch: Any
) -> None:
    texts = jsonl([{"text": f"the {word} is one two"} for word in ("red", "green", "blue", "four") * 6], "texts.jsonl")
    other = jsonl([{"body": body} for body in ("who is three what", "one")], "other.jsonl")
    path = config_file(
        f"model: {{source: {llama}}}\nmethods: {{prompt: {{name: prompt_tuning, num_virtual_tokens: 2}}}}\n"
        f"data: {{source: {texts}, text: text, test_size: 4, max_length: 16}}\n"
        "seeds: [3]\nlearning_rates: [0.1]\n"
        f"forgetting: {{source: {other}, text: body}}\noutput: {{folder: {tmp_path / 'out'}}}\n"
    )
    comparison = load(path)
    materials = Materials(comparison.base)
    config = comparison.run("prompt", 0.1, 3)
    folder = Path(config.output.folder)
    jpeft.save_adapter(folder / session.ADAPTER, adapted(config, materials))
    monkeypatch.setattr(measure, "_step", lambda *_: (0.1, None))
    monkeypatch.setattr(measure, "_in_turns", lambda calls: [1.0, 2.0])
    trial = Trial("prompt", 0.1, 3, folder, {"loss": 2.0}, {"loss": 0.5})
    with pytest.raises(JpeftError, match=r"no column 'bodyy' \(nearest: body\)"):
        compare(path, ["forgetting.text=bodyy"], quiet())
    assert comparison.forgetting is not None
    text = measure.OtherText.read(comparison.forgetting)
    costs = measure.measured(comparison, [trial], materials, text)
    assert costs.perplexity is not None
    lost, count = 0.0, 0
    model, reader = materials.base.model(3), materials.reader(materials.base.model(3))
    for body in ("who is three what", "one"):
        ids = np.asarray(reader.text(body, 0)[0].ids)
        logits = np.asarray(model(ids[None])[0, :-1], np.float64)
        lost -= (logits - np.log(np.exp(logits).sum(-1, keepdims=True)))[np.arange(len(ids) - 1), ids[1:]].sum()
        count += len(ids) - 1
    assert costs.perplexity[0] == pytest.approx(np.exp(lost / count), rel=1e-4)
    assert costs.perplexity[1] != pytest.approx(costs.perplexity[0], rel=1e-4)
    assert (costs.call_ratio, costs.merged) == (2.0, False)
    monkeypatch.setattr(measure, "_in_turns", lambda calls: [1.0, 3.0])
    assert measure.measured(comparison, [trial], materials, text) == costs  # as it was written
    other.write_text(other.read_text().replace("three", "four"))
    assert measure.measured(comparison, [trial], materials, measure.OtherText.read(text.settings)).call_ratio == 3.0

    entry = Entry("prompt", "prompt_tuning", 0.1, [trial], costs)
    assert table.columns([entry])[1::8] == ["loss", "other text"]
    assert entry.merit == -entry.mean == -0.5
    shown = table.cells(entry, [entry])
    assert shown[1] == "0.5"  # one seed has no spread
    assert " → " in shown[-1]
    unmeasured = dataclasses.replace(entry, costs=None, unmeasured="a reason")
    assert table.cells(unmeasured, [unmeasured])[1] == "0.5"  # its scores stay
    assert "The costs of prompt could not be measured: a reason" in table.markdown([unmeasured], [], [])
    assert "a reason" in table.separated([unmeasured])
    slow = dataclasses.replace(costs, step_seconds=1.1712, call_seconds=0.03021)
    assert {"1,170 ms", "30.2 ms"} <= set(table.cells(dataclasses.replace(entry, costs=slow), [entry]))


def test_the_front_and_its_drawing() -> None:
    points = [Point("a", 10, 0.5), Point("b", 100, 0.9, 0.01), Point("c", 1000, 0.8), Point("d", 10, 0.4)]
    assert [point.name for point in front(points)] == ["a", "b"]
    assert [point.name for point in front(points, lower_is_better=True)] == ["d"]
    svg = ElementTree.fromstring(plot("score", "cost", [*points, Point("<e>", 0, 0.5)]))
    names = {one.text: one for one in svg.iter("text") if one.get("class") == "name"}
    assert names.keys() == set("abcd")  # a cost that is not known has no place
    marked = {one.get("class") for one in svg.iter("circle")}
    assert marked == {"dot c0", "dot beaten"}
    places = [(float(one.get("x", "")), float(one.get("y", ""))) for one in names.values()]
    assert len({(x, y) for x, y in places}) == 4
    assert plot("score", "cost", []) == ""
    assert "cost (logarithmic)" in plot("score", "cost", points)
    assert "logarithmic" not in plot("score", "cost", points[:1])  # a narrow range has round numbers in even steps

    # A hundred methods at one place still have a page.
    costs = Costs(10, 10, 0.1, None, 0.1, 1.0, merged=False, tokens=8)
    trial = Trial("x", 0.1, 0, Path("x"), {}, {"loss": 0.5})
    same = [Entry(f"m{number}", "m", 0.1, [trial], costs) for number in range(100)]
    drawn = plots(same)
    assert [title for title, _ in drawn] == [
        "Loss against trained parameters",
        "Loss against time of a step",
        "Loss against time of inference",
    ]
    assert table.ordered([dataclasses.replace(same[0], message="broken"), same[1]])[0].label == "m1"
