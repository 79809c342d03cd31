"""Tasks beside classification and language modelling: rows, labels, losses, and whole runs on tiny random models."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

import jpeft
from jpeft import JpeftError
from tests.train.conftest import make_tokenizer
from train import data as task_data
from train import session, use
from train.batches import Batches, Window, arrays
from train.cli import app
from train.display import Display
from train.examples import Reader
from train.run import Result, train
from train.schema import DataConfig
from train.tasks import TASKS, task_of

WORDS = ("red", "two", "blue")  # a token each


def run(
    config_file: Callable[..., Path],
    model: Path,
    data: str,
    folder: Path,
    more: str = "",
    task: str = "",
    *overrides: str,
) -> Result:
    text = (
        f"model: {{source: {model}{task}}}\n"
        "method: {name: lora, rank: 4, targets: all-linear}\n"
        f"data: {{{data}, test_size: 12, max_length: 32}}\n"
        "training: {epochs: 4, batch_size: 8, learning_rate: 2e-2}\n"
        f"{more}"
        f"output: {{folder: {folder}}}\n"
    )
    return train(config_file(text), overrides, Display(Console(quiet=True)))


def prepared(max_length: int = 64, head: str | None = None, **given: Any) -> task_data.TaskData:
    data, train_rows, test_rows = task_data.read(DataConfig(**given), head)
    return task_data.prepare(task_of(data, head), train_rows, test_rows, make_tokenizer(), max_length, types=False)


def test_the_first_sub_word_carries_the_tag() -> None:
    for bos in (False, True):
        reader = Reader(make_tokenizer(bos=bos), 64)
        (example,) = reader.tagged(["the", "zebra", "xx", "red"], [3, 1, 2, 0], 7)
        tokens = reader.tokenizer.convert_ids_to_tokens(example.ids)
        tags, words, wanted = example.label
        assert wanted.tolist() == [3, 1, 2, 0]
        carrying = [(tokens[at], int(tags[at]), int(words[at])) for at in np.flatnonzero(tags >= 0)]
        assert [(tag, word) for _, tag, word in carrying] == [(3, 0), (1, 1), (2, 2), (0, 3)]
        assert carrying[0][0] == "the"
        assert carrying[3][0] == "\u0120red"
        assert len(tokens) > 8  # the words in between have several tokens each
        assert not example.targets.any()
        assert not +reader.counts


@pytest.mark.parity
def test_sub_words_are_aligned_as_transformers_aligns_them() -> None:
    """Word pieces, as of BERT: the first token of each word by transformers' own count of split words."""
    alphabet = "abcdefgh"
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *alphabet, *(f"##{letter}" for letter in alphabet), "ab", "##cd", "-"]
    made = Tokenizer(models.WordPiece({piece: number for number, piece in enumerate(pieces)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]", pad_token="[PAD]"
    )
    random = np.random.default_rng(0)
    for length in (6, 64):
        reader = Reader(tokenizer, length)
        for row in range(30):
            words = ["".join(random.choice([*alphabet, "-", "x"], size=random.integers(1, 6))) for _ in range(8)]
            (example,) = reader.tagged(words, range(8), row)
            theirs = tokenizer(words, is_split_into_words=True, truncation=True, max_length=length)
            numbers = theirs.word_ids()
            first = [n if n is not None and n not in numbers[:at] else -100 for at, n in enumerate(numbers)]
            assert example.ids.tolist() == theirs.input_ids
            assert example.label.words.tolist() == example.label.tags.tolist() == first


def test_words_that_are_not_seen_are_counted_and_scored_as_outside(jsonl: Callable[..., Path]) -> None:
    rows = [{"words": ["red", "blue", "the"] * 3, "tags": ["B-x", "I-x", "O"] * 3} for _ in range(6)]
    task = prepared(4, source=str(jsonl(rows)), tokens="words", tags="tags", test_size=2)
    assert task.kind.labels == ("B-x", "I-x", "O")
    assert task.counts["training"] == {"words behind data.max_length, cut": 4 * 5}
    assert task.right[0] == ["B-x", "I-x", "O"] * 3
    output = np.array([0, 1, 0, 1])
    assert task.guesses([output, output])[0] == ["B-x", "I-x", "B-x", "I-x", "O", "O", "O", "O", "O"]
    assert task.shown([["B-x", "I-x", "O"] * 3] * 2)[0] == "red blue [x], red blue [x], red blue [x]"
    assert task.kind.default_metrics == ("span_f1", "token_accuracy")
    reader = Reader(make_tokenizer(), 8)
    assert reader.tagged([], [], 0) == []
    assert +reader.counts == {"rows without words left out": 1}


def test_tags_are_text_or_numbers_of_names(tmp_path: Path) -> None:
    names = ["O", "B-x", "I-x"]
    features = datasets.Features(
        {"words": datasets.List(datasets.Value("string")), "tags": datasets.List(datasets.ClassLabel(names=names))}
    )
    rows = [{"words": ["the", "red", "one"], "tags": [0, 1, 2]} for _ in range(8)]
    path = tmp_path / "rows.parquet"
    datasets.Dataset.from_list(rows, features=features).to_parquet(path)
    task = prepared(source=str(path), tokens="words", tags="tags", test_size=2)
    assert task.kind.labels == tuple(names)
    assert task.right[0] == ["O", "B-x", "I-x"]
    assert task.train[0].label.tags.max() == 2
    moved = prepared(source=str(path), tokens="words", tags="tags", test_size=2, labels=["I-x", "B-x", "O"])
    assert moved.right == task.right
    assert moved.train[0].label.all.tolist() == [2, 1, 0]


@pytest.mark.parametrize(
    ("row", "given", "said"),
    [
        ({"words": ["a", "the"], "tags": ["O"]}, {}, "line 9: 2 words in column 'words', 1 tags in column 'tags'"),
        ({"words": ["a"], "tags": None}, {}, "line 9: 1 words in column 'words', 0 tags"),
        ({"words": [None], "tags": ["O"]}, {}, "line 9: column 'words' has null among its words"),
        ({"words": ["a"], "tags": ["Q"]}, {"labels": ["O", "B-x"]}, "line 9: unknown label 'Q'; the labels are O, B-x"),
        ({"words": ["a"], "tags": ["O"]}, {"tokens": "text"}, "column 'text', which data.tokens uses, holds text, not"),
    ],
)
def test_faults_in_tagged_rows(jsonl: Callable[..., Path], row: Any, given: Any, said: str) -> None:
    good = {"words": ["a", "red"], "tags": ["O", "B-x"], "text": "a"}
    path, held = jsonl([*[good] * 8, row]), jsonl([good], "held.jsonl")
    with pytest.raises(JpeftError) as caught:
        prepared(**{"source": str(path), "test_source": str(held), "tokens": "words", "tags": "tags", **given})
    assert said in str(caught.value)


def test_a_run_that_tags_words(bert: Path, jsonl: Callable[..., Path], config_file: Any, tmp_path: Path) -> None:
    rows = []
    for number in range(48):
        colour = WORDS[number % 3]
        tag = {"red": "B-warm", "two": "O", "blue": "B-cold"}[colour]
        rows.append({"words": ["is", "the", colour, "xq", "one"], "tags": ["O", "O", tag, f"I{tag[1:]}", "O"]})
        if tag == "O":
            rows[-1]["tags"][3] = "O"
    folder = tmp_path / "run"
    result = run(config_file, bert, f"source: {jsonl(rows)}, tokens: words, tags: tags", folder)
    assert list(result.after.metrics) == ["span_f1", "token_accuracy", "loss"]
    assert result.after.metrics["span_f1"] > max(0.9, result.before.metrics["span_f1"])
    assert list(use.generate(folder, ["is the red xq one"])) == ["red xq [warm]"]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["courses"]["learnt"] > 0
    assert "red xq [warm]" in {sample["wanted"] for sample in summary["samples"]}
    list(use.merge(folder, tmp_path / "merged"))
    written = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert written["id2label"] == {"0": "B-cold", "1": "B-warm", "2": "I-cold", "3": "I-warm", "4": "O"}


def test_a_run_with_several_labels(bert: Path, jsonl: Callable[..., Path], config_file: Any, tmp_path: Path) -> None:
    choices = [[], ["red"], ["blue"], ["blue", "red"]]
    rows = [{"text": " ".join(["is", *(labels := choices[n % 4])]), "label": labels} for n in range(48)]
    data = f"source: {jsonl(rows)}, text: text, label: label"
    with pytest.raises(JpeftError, match=r"holds a list, .*data\.problem_type: multi-label"):
        run(config_file, bert, data, tmp_path / "run")
    result = run(config_file, bert, f"{data}, problem_type: multi-label", tmp_path / "run", task=", pooling: mean")
    assert list(result.after.metrics) == ["micro_f1", "macro_f1", "exact_match", "loss"]
    assert result.after.metrics["micro_f1"] > max(0.9, result.before.metrics["micro_f1"])
    (said,) = use.generate(tmp_path / "run", ["is blue red"])
    assert said.split()[::2] == ["blue", "red"]
    list(use.merge(tmp_path / "run", tmp_path / "merged"))
    written = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert written["problem_type"] == "multi_label_classification"
    null = jsonl([*rows, {"text": "a", "label": None}], "null.jsonl")
    with pytest.raises(JpeftError, match=r"null\.jsonl, line 49: the labels are missing"):
        prepared(source=str(null), test_source=str(jsonl(rows)), text="text", label="label", problem_type="multi-label")


def test_a_run_on_pairs_is_asked_with_two_texts(
    bert: Path, jsonl: Callable[..., Path], config_file: Any, tmp_path: Path
) -> None:
    rows = [{"first": "is red", "second": f"two {WORDS[n % 2]}", "label": "ab"[n % 2]} for n in range(24)]
    data = f"source: {jsonl(rows)}, text: first, text_pair: second, label: label"
    folder, more = tmp_path / "run", "evaluation: {samples: 0}\n"
    run(config_file, bert, data, folder, more, ", pooling: mean", "training.max_steps=1")
    # What the run says can be typed is typed.
    line = next(
        line for line in json.loads((folder / "summary.json").read_text())["usage"].splitlines() if "try" in line
    )
    command = shlex.split(line.partition(" generate ")[2])
    assert command[1:4] == ["--prompt", "is red", "--text-pair"]
    made = CliRunner().invoke(app, ["generate", *command], catch_exceptions=False)
    found = session.open_run(folder)
    (example,) = found.reader.classification("is red", command[4], None, 0)
    logits = found.model(**arrays([example], len(example), 1))
    share = float(nnx.softmax(logits).max())
    assert made.output.split() == ["ab"[int(logits.argmax())], f"{share:.3f}"]
    with pytest.raises(JpeftError, match="give one for each --prompt .there are 2 and 1"):
        list(use.generate(folder, ["is red", "is blue"], pairs=["two"]))
    with pytest.raises(JpeftError, match="--text-pair: the text is empty"):
        list(use.generate(folder, ["is red"], pairs=[" "]))


def test_a_run_that_predicts_numbers(bert: Path, jsonl: Callable[..., Path], config_file: Any, tmp_path: Path) -> None:
    rows = [{"text": f"is {WORDS[n % 3]}", "label": str(0.5 * (n % 3))} for n in range(48)]
    data = f"source: {jsonl(rows)}, text: text, label: label, problem_type: regression"
    more = "evaluation: {metrics: [rmse, pearson]}\n"
    result = run(config_file, bert, data, tmp_path / "run", more, task=", pooling: mean")
    assert list(result.after.metrics) == ["rmse", "pearson", "loss"]
    assert result.after.metrics["pearson"] > max(0.9, result.before.metrics["pearson"])
    assert result.after.metrics["rmse"] ** 2 == pytest.approx(result.after.metrics["loss"], rel=1e-4)
    with pytest.raises(JpeftError, match="--text-pair: the run's task is regression without data.text_pair; leave it"):
        list(use.generate(tmp_path / "run", ["is blue"], pairs=["is red"]))
    (said,) = use.generate(tmp_path / "run", ["is blue"])
    assert abs(float(said) - 1.0) < 0.3
    odd = jsonl([*rows, {"text": "a", "label": "much"}], "odd.jsonl")
    with pytest.raises(JpeftError, match=r"odd\.jsonl, line 49: column 'label' holds 'much', not a number"):
        prepared(source=str(odd), test_source=str(jsonl(rows)), text="text", label="label", problem_type="regression")


def test_the_losses_are_the_plain_formulas(bert: Path, jsonl: Callable[..., Path]) -> None:
    """And a row that only fills up a batch weighs nothing."""
    rows = [
        {"text": "is red", "set": ["x"], "number": 0.5, "words": ["is", "xq"], "tags": ["O", "B-x"]},
        {"text": "blue", "set": ["x", "y"], "number": -1.0, "words": ["red", "one"], "tags": ["B-x", "O"]},
        {"text": "the", "set": [], "number": 2.0, "words": ["a"], "tags": ["O"]},
    ]
    path, held = str(jsonl(rows)), str(jsonl(rows[:1], "held.jsonl"))
    shared = {"source": path, "test_source": held}
    kinds: dict[str, dict[str, Any]] = {
        "multi-label": {"text": "text", "label": "set", "problem_type": "multi-label"},
        "regression": {"text": "text", "label": "number", "problem_type": "regression"},
        "token-classification": {"tokens": "words", "tags": "tags"},
    }
    for name, given in kinds.items():
        task = prepared(**shared, **given)
        assert type(task.kind) is TASKS[name]
        model = jpeft.models.load(bert, task=task.kind.head, num_labels=task.kind.outputs, rngs=nnx.Rngs(0))
        batch = Batches(task.kind, task.train)(Window((0, 1, 2), 16), 4)
        losses, found = task.kind.losses(model, {key: jnp.asarray(value) for key, value in batch.items()})
        assert float(losses[3]) == batch["weights"][3] == 0.0
        for at, example in enumerate(task.train):
            logits = np.asarray(model(jnp.asarray(example.ids)[None])[0], np.float64)
            if name == "regression":
                wanted, weight = (logits[0] - example.label) ** 2, 1
            elif name == "multi-label":
                shares, weight = 1 / (1 + np.exp(-logits)), 1
                wanted = -np.mean(np.log(np.where(example.label > 0, shares, 1 - shares)))
                assert found[at].tolist() == (logits > 0).tolist()
            else:
                learnt = np.flatnonzero(example.label.tags >= 0)
                shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
                wanted, weight = -np.log(shares[learnt, example.label.tags[learnt]]).sum(), len(learnt)
            np.testing.assert_allclose(losses[at], wanted, rtol=1e-4)
            assert batch["weights"][at] == weight
