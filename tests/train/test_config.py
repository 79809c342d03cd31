"""Configurations: one rule for scalars in files and on the command line; all faults in one message."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from jpeft import JpeftError
from jpeft.methods import METHODS
from train import config, schema
from train import strict_yaml as sy
from train.other_names import OTHERS

GOOD = """\
model:
  source: some/model
method:
  name: lora
  rank: 4
  targets: [q_proj]
data:
  source: rows.jsonl
  text: text
training:
  learning_rate: 1e-3
output:
  folder: out
"""


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-5", 2e-5),
        ("2E-5", 2e-5),
        (".1", 0.1),
        ("1_000", 1000.0),
        ("+3", 3.0),
        ("0.5", 0.5),
        ("1.", 1.0),
        ("0", 0.0),
    ],
)
def test_numbers(text: str, value: float) -> None:
    assert sy.number(sy.Node(text, "")) == value


@pytest.mark.parametrize(
    "text", ["08", "1e", "e5", ".", "_1", "1_", "0x10", "1:30", "nan", ".inf", "1e999", "three", "", "~"]
)
def test_no_numbers(text: str) -> None:
    with pytest.raises(sy.NotThis):
        sy.number(sy.Node(text, ""))


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("training.learning_rate=2e-5", 2e-5),
        ("training.learning_rate=.1", 0.1),
        ("training.epochs=1_000", 1000),
        ("training.epochs=1e2", 100),
        ("training.clip=~", None),
        ("training.clip=null", None),
        ("model.remat=on", True),
        ("model.remat=no", False),
        ("data.text=on", "on"),
        ("data.text=no", "no"),
        ("data.text=08", "08"),
        ("data.text='~'", "~"),
        ("data.test_size=500", 500),
        ("data.test_size=.25", 0.25),
        ("output.folder=a=b", "a=b"),
    ],
)
def test_one_rule_for_files_and_overrides(config_file: Callable[..., Path], override: str, value: object) -> None:
    key, _, text = override.partition("=")
    section, _, name = key.partition(".")
    made = config.load(config_file(GOOD), [override])
    found = getattr(getattr(made, section), name)
    assert found == value
    assert type(found) is type(value)

    lines = [line for line in GOOD.splitlines() if not line.startswith(f"  {name}:")]
    if f"{section}:" not in lines:
        lines.append(f"{section}:")
    lines.insert(lines.index(f"{section}:") + 1, f"  {name}: {text}")
    assert config.load(config_file("\n".join(lines), "file.yaml")) == made


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("  learning_rate: 1e-3", "  num-epochs: 3", ["line 11: training.num-epochs: unknown key", "training.epochs?"]),
        ("  rank: 4", "  lora_r: 4", ["line 5: method.lora_r", "did you mean method.rank?"]),
        ("  rank: 4", "  lora_alpha: 4", ["method.lora_alpha", "did you mean method.alpha?"]),
        ("  rank: 4", "  rnk: 4", ["method.rnk", "did you mean method.rank?"]),
        ("  text: text", "  text: text\n  rank: 3", ["data.rank", "did you mean method.rank?"]),
        ("  text: text", "  text: text\n  lr: 3", ["data.lr", "did you mean training.learning_rate?"]),
        ("  rank: 4", "  rank: 4\n  rank: 8", ["line 6: method.rank: given twice, first on line 5"]),
        ("  rank: 4", "\trank: 4", ["line 5: a tab in the indentation"]),
        ("  rank: 4", "  rank: four", ["line 5: method.rank: 'four' is not a number"]),
        ("  rank: 4", "  rank: 0", ["line 5: method: LoRA: rank=0"]),
        ("  rank: 4", "  rank: 4.5", ["method.rank: '4.5' is not a whole number"]),
        ("  rank: 4", "  rank: '4'", ["method.rank: '4' is quoted text, not a number; remove the quotes"]),
        ("  rank: 4", "  rank: 04", ["method.rank: '04' has a leading zero; write 4"]),
        ("name: lora", "name: lorra", ["method.name: no method 'lorra'", "did you mean lora?"]),
        ("  name: lora\n", "", ["method.name: required"]),
        ("1e-3", "-1e-3", ["line 11: training.learning_rate: -0.001 must be greater than 0"]),
        ("1e-3", "no", ["training.learning_rate: 'no' is not a number"]),
        ("1e-3", "[1]", ["training.learning_rate: a list is not a number"]),
        (
            "  learning_rate: 1e-3",
            "  groups: {head: {learning_rate: 0, decay: 1}}",
            [
                "training.groups.head.learning_rate: 0.0 must be above 0",
                "head.decay: unknown key; did you mean weight_decay",
            ],
        ),
        ("  learning_rate: 1e-3", "  schedule: cosin", ["'cosin' is not one of constant, linear, cosine", "cosine?"]),
        ("output:\n  folder: out\n", "", ["output: required"]),
        ("  folder: out", "  overwrite: true", ["output.folder: required"]),
        ("  folder: out", "  folder: ~", ["output.folder: nothing is not text", "~"]),
        ("training:", "trainig:", ["trainig: unknown key; did you mean training?"]),
        ("  text: text", "  prompt: p", ["data.prompt: needs data.completion"]),
        ("  text: text", "  split: x", ["data.text: required"]),
        ("  text: text", "  text: text\n  label: l\n  messages: m", ["label and messages are given"]),
        (
            "  text: text",
            "  text: text\n  tags: t",
            ["data.text: does not go with tags", "data.tokens: required beside"],
        ),
        ("  text: text", "  text: text\n  text_pair: t", ["data.text_pair: needs data.label beside it"]),
        ("  text: text", "  text: text\n  tokens: t", ["data.tokens: needs data.tags beside it"]),
        (
            "  text: text",
            "  text: text\n  label: l\n  labels: [a]\n  problem_type: regression",
            ["data.labels: is not for data.problem_type regression"],
        ),
        (
            "  source: some/model",
            "  source: a\n  task: token-classification",
            ["data.text: is for causal-lm or masked-lm; model.task is token-classification"],
        ),
        (
            "  text: text",
            "  text: text\n  label: l\n  problem_type: multilabel",
            ["data.problem_type: 'multilabel' is none of single-label, multi-label, ", "did you mean multi-label?"],
        ),
        ("  text: text", "  messages: m\n  packing: true", ["data.packing: is for plain text"]),
        (
            "training:",
            "evaluation:\n  metrics: [accurcy]\ntraining:",
            ["evaluation.metrics: 'accurcy' is no metric of text; did you mean", "perplexity"],
        ),
        ("training:", "evaluation:\n  best: f1\ntraining:", ["line 11: evaluation.best: 'f1' is no metric of text"]),
        (
            "training:",
            "evaluation:\n  metrics: [loss]\n  best: perplexity\ntraining:",
            ["evaluation.best: perplexity is not among evaluation.metrics"],
        ),
        (
            "  text: text",
            "  prompt: p\n  completion: c\nevaluation:\n  metrics: [bleu, loss]\n  answers: none",
            ["evaluation.metrics: bleu scores answers, and evaluation.answers is none"],
        ),
        ("  text: text", "  text: text\n  test_size: 1.5", ["data.test_size: 1.5 is neither"]),
        ("  source: some/model", "  source: a\n  pooling: mean", ["data.label: required: model.pooling"]),
        ("  targets: [q_proj]", "  targets: &a [q_proj]\n  exclude: *a", ["alias *a"]),
        ("  rank: 4", "  rank: !!int 4", ["tag"]),
        ("  rank: 4", "  rank: [4", ["not valid YAML"]),
        ("  text: text", "  text: text\n  mix: {a.jsonl: 0}", ["line 10: data.mix: 0.0 must be greater than 0"]),
        ("  text: text", "  text: text\n  mix: {a.jsonl: half}", ["data.mix: item 'a.jsonl': 'half' is not a number"]),
        ("  text: text", "  text: text\n  mix: a.jsonl", ["data.mix: 'a.jsonl' is not a mapping"]),
    ],
)
def test_faults(config_file: Callable[..., Path], old: str, new: str, said: list[str]) -> None:
    assert old in GOOD
    path = config_file(GOOD.replace(old, new))
    with pytest.raises(JpeftError) as caught:
        config.load(path)
    assert str(path) in str(caught.value)
    for part in said:
        if part != "~":
            assert part in str(caught.value).replace("'~'", "nothing")


@pytest.mark.parametrize(
    ("section", "line", "said"),
    [
        ("method", "r: 8", "method.r: unknown key; did you mean method.rank?"),
        ("training", "r: 8", "training.r: unknown key here; did you mean method.rank?"),
        ("", "lora_alpha: 16", "lora_alpha: unknown key; did you mean method.alpha?"),
        ("", "learning_rate: 1e-3", "learning_rate: unknown key; did you mean training.learning_rate?"),
        ("", "seed: 1", "seed: unknown key; did you mean data.seed or training.seed?"),
        ("", "num_virtual_tokens: 8", "unknown key; did you mean method.num_virtual_tokens?"),
        ("method", "batch_size: 8", "unknown key here; did you mean training.batch_size or evaluation.batch_size?"),
        ("method", "lora_target_linear: true", "did you mean method.targets: all-linear?"),
        ("method", "modules_to_save: [lm_head]", "method: [{name: lora}, {name: full_tuning, targets: [lm_head]}]"),
        ("training", "num-epochs: 2", "training.num-epochs: unknown key; did you mean training.epochs?"),
        ("training", "micro_batch_size: 2", "did you mean training.batch_size?"),
        ("training", "gradient_checkpointing: true", "did you mean model.remat: true?"),
        ("training", "optim: paged_adamw_8bit", "did you mean training.optimizer: adamw8bit?"),
        ("training", "optim: adamw_torch", "did you mean training.optimizer: adamw?"),
        ("training", "optim: lion", "did you mean training.optimizer?"),
        ("training", "save_steps: 50", "training.save_steps: unknown key here; did you mean checkpoints.every?"),
        ("training", "eval_steps: 50", "did you mean evaluation.every?"),
        ("training", "report_to: tensorboard", "did you mean output.tensorboard: true?"),
        ("training", "report_to: wandb", "did you mean output.wandb: PROJECT?"),
        ("training", "resume_from_checkpoint: last", "unknown key; the same command goes on with a run that was"),
        ("training", "warmup_steps: 100", "training.warmup? (it is the share of the steps"),
        ("training", "bf16: true", "did you mean model.dtype: bfloat16?"),
        ("model", "load_in_4bit: true", "model.load_in_4bit: unknown key; did you mean model.base: nf4?"),
        ("model", "torch_dtype: bfloat16", "did you mean model.dtype?"),
        ("data", "val_set_size: 0.1", "data.val_set_size: unknown key; did you mean data.test_size?"),
        ("data", "max_seq_length: 512", "did you mean data.max_length?"),
        ("output", "output_dir: runs/x", "output.output_dir: unknown key; did you mean output.folder?"),
    ],
)
def test_names_of_other_tools(config_file: Callable[..., Path], section: str, line: str, said: str) -> None:
    text = GOOD.replace(f"{section}:\n", f"{section}:\n  {line}\n", 1) if section else f"{GOOD}{line}\n"
    with pytest.raises(JpeftError) as caught:
        config.load(config_file(text))
    assert "1 fault in" in str(caught.value)
    assert said in str(caught.value)


def test_names_of_other_tools_lead_to_keys_that_there_are() -> None:
    keys = {f"{name}.{key}" for name, section in schema.sections().items() for key in section.model_fields}
    keys |= {"method.name", *(f"method.{key}" for kind in METHODS.values() for key in config.method_keys(kind))}
    for name, ours in OTHERS.items():
        assert name == name.lower()
        assert not any(key.endswith(f".{name}") for key in keys if not key.startswith("method."))
        for entry in (ours.key, *ours.values.values()):
            assert entry.partition(":")[0] in keys or (not entry and ours.hint), name


TWO = GOOD.replace(
    "method:\n  name: lora\n  rank: 4\n  targets: [q_proj]\n",
    "method:\n  - {name: lora, targets: [q_proj]}\n  - {name: bitfit, adapter_name: biases}\n",
)


def test_overrides_of_one_entry_of_a_list(config_file: Callable[..., Path]) -> None:
    path = config_file(TWO)
    for override in ("method.0.rank=2", "method[0].rank=2"):
        made = config.load(path, [override, "method.0.targets.0=v_proj", "method.1.adapter_name=other"])
        assert made.method == [
            {"name": "lora", "targets": ["v_proj"], "rank": 2},
            {"name": "bitfit", "adapter_name": "other"},
        ]
    assert config.load(path, ["method=[{name: ia3}]"]).method == [{"name": "ia3"}]
    assert config.load(path, ["method={name: ia3}"]).method == {"name": "ia3"}


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["method.rank=4"], "method is a list: write method.0.rank with the number of the entry (0 to 1), or give the"),
        (["method.2.rank=4"], "method is a list: write method.0.rank"),
        (["method.0.targets.first=x"], "method.0.targets is a list: write method.0.targets.0 with the number"),
        (["data.text.column=x"], "data.text is 'text', which has no keys; give it as a whole, data.text=..."),
        (["training.epochs=2", "training.epochs=3"], "takes the place of training.epochs=2, given before it"),
        (["training.epochs=2", "training={seed: 3}"], "takes the place of training.epochs=2, given before it"),
        (["method.0.rank=x"], "method[0].rank: 'x' is not a number"),
    ],
)
def test_overrides_that_would_drop_something(config_file: Callable[..., Path], overrides: list[str], said: str) -> None:
    with pytest.raises(JpeftError) as caught:
        config.load(config_file(TWO), overrides)
    assert f"command line, {overrides[-1]}: " in str(caught.value)
    assert said in str(caught.value)


@pytest.mark.parametrize("text", ["a#b", "a #b", "#b", "Question: {text}", "*a", "- a", "~/rows.jsonl", "a: b: c"])
def test_overrides_are_taken_word_for_word(config_file: Callable[..., Path], text: str) -> None:
    path = config_file(GOOD)
    assert config.load(path, [f"data.text={text}"]).data.text == text
    assert config.load(path, [f"data.text='{text}'"]).data.text == text
    assert config.load(config_file(GOOD.replace("text: text", f"text: '{text}'"), "quoted.yaml")).data.text == text


def test_text_in_brackets_needs_quotes(config_file: Callable[..., Path]) -> None:
    path = config_file(GOOD.replace("text: text", "prompt: {question}\n  completion: a"))
    with pytest.raises(JpeftError, match="data.prompt: a mapping is not text; text that begins with a bracket goes "):
        config.load(path)


def test_all_faults_in_one_message(config_file: Callable[..., Path]) -> None:
    text = GOOD.replace("  rank: 4", "  lora_r: 4").replace("1e-3", "fast").replace("  folder: out", "\tfoldr: out")
    with pytest.raises(JpeftError) as caught:
        config.load(config_file(text), ["training.seed=-1", "nothing", "data.txt=a"])
    lines = str(caught.value).splitlines()
    assert "7 faults" in lines[0] or "8 faults" in lines[0]
    for part in (
        "method.lora_r",
        "learning_rate: 'fast'",
        "a tab",
        "output.foldr",
        "seed: -1",
        "command line, nothing",
        "data.txt",
    ):
        assert sum(part in line for line in lines) >= 1, part


def test_missing_and_empty_files(tmp_path: Path, config_file: Callable[..., Path]) -> None:
    config_file(GOOD, "quickstart.yaml")
    with pytest.raises(JpeftError, match=r"no such file; did you mean .*quickstart\.yaml"):
        config.load(tmp_path / "quikstart.yaml")
    with pytest.raises(JpeftError, match="the file is empty; needed are model, method"):
        config.load(config_file("", "empty.yaml"))
    with pytest.raises(JpeftError, match="is not a mapping"):
        config.load(config_file("- a\n", "list.yaml"))


def test_resolved_configuration_reads_back(config_file: Callable[..., Path], tmp_path: Path) -> None:
    overrides = ["data.label=no", "data.labels=[on, '1', 1e3, ~x, 'null']", "method.layers=0:4", "training.clip=~"]
    made = config.load(config_file(GOOD), overrides)
    assert made.data.labels == ["on", "1", "1e3", "~x", "null"]
    config.save(made, tmp_path / "saved.yaml")
    assert config.load(tmp_path / "saved.yaml") == made
    assert config.methods_of(made, list)[0].layers == (0, 1, 2, 3)


def test_difference(config_file: Callable[..., Path]) -> None:
    path = config_file(GOOD)
    old, new = config.load(path), config.load(path, ["method.rank=8", "output.folder=elsewhere"])
    assert config.difference(old, new) == ["method.rank: 4 -> 8"]


def test_methods_compose(config_file: Callable[..., Path]) -> None:
    one = "{name: lora, targets: [q_proj]}"
    other = "{name: lora, adapter_name: second, targets: [v_proj]}"
    head, _, tail = GOOD.partition("method:")
    rest = tail[tail.index("data:") :]
    made = config.load(config_file(f"{head}method:\n  - {one}\n  - {other}\n{rest}"))
    assert [part.name for part in config.methods_of(made, list)] == ["lora", "second"]
    with pytest.raises(JpeftError, match=r"method\[1\]\.rnk"):
        config.load(config_file(f"{head}method:\n  - {one}\n  - {{name: lora, rnk: 2}}\n{rest}"))


@pytest.mark.parametrize("path", sorted(Path("configs").glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_configurations(path: Path) -> None:
    config.load(path)
