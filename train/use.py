"""What is done with a finished run: asking it, merging it into its model, handing its adapter on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jpeft
from jpeft.errors import JpeftError
from train.batches import Window, arrays, edges
from train.data import Template
from train.evaluate import generate_texts
from train.session import Run, keep_compiled, open_run
from train.step import inputs


def generate(
    folder: Path,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    raw: bool = False,
    adapted: bool = True,
    sampling: dict[str, Any] | None = None,
) -> Iterator[str]:
    """One answer for each prompt: what follows it, or the class of the text with its probability.

    raw: the prompt is not put into the run's template. adapted: with the adapter. Raises JpeftError for an empty prompt
    and for a template that needs more than one column.
    """
    for prompt in prompts:
        if not prompt.strip():
            raise JpeftError("--prompt: the prompt is empty")
        if any("\ud800" <= letter <= "\udfff" for letter in prompt):  # bytes that the shell passed on and are no text
            raise JpeftError(f"--prompt: {prompt!r} is not UTF-8 text")
    keep_compiled()
    run = open_run(folder, adapted=adapted)
    if run.form == "classification":
        yield from _classes(run, prompts)
        return
    ids = [_prompt_ids(run, prompt, raw) for prompt in prompts]
    yield from generate_texts(run.model, run.reader, ids, max_new_tokens, chat=run.form == "chat", **(sampling or {}))


def _prompt_ids(run: Run, prompt: str, raw: bool) -> list[int]:
    if run.form == "chat" and not raw:
        return run.reader.chat_prompt([{"role": "user", "content": prompt}])
    if run.form == "completion" and not raw:
        template = Template(str(run.config.data.prompt), "prompt")
        if len(template.columns) > 1:
            raise JpeftError(
                f"the run's template {run.config.data.prompt!r} has several columns; give the whole prompt with --raw"
            )
        prompt = template({template.columns[0]: prompt})
    return run.reader.prompt(prompt)


def _classes(run: Run, texts: Sequence[str]) -> Iterator[str]:
    if run.config.data.text_pair is not None:
        raise JpeftError("the run classifies pairs of texts; use it from Python (jpeft.load_adapter)")
    examples = [example for row, text in enumerate(texts) for example in run.reader.classification(text, None, 0, row)]
    window = Window(tuple(range(len(examples))), edges([len(example) for example in examples], 1)[-1])
    logits = run.model(**inputs(arrays(examples, window, len(examples), 1)))
    for row in np.asarray(jax.nn.softmax(logits.astype(np.float32), -1)):
        yield f"{run.labels[int(row.argmax())]}  {row.max():.3f}"


def merge(folder: Path, target: Path) -> Iterator[str]:
    """Writes the run's model with the adapter folded in, its labels and its tokenizer to `target`.

    Raises JpeftError if the method cannot be merged or `target` holds files already.
    """
    target = target.expanduser()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise JpeftError(f"{target}: exists and is not an empty folder; give a new one")
    run = open_run(folder)
    jpeft.models.save(jpeft.merge(run.model, dequantize=True), target)
    if run.labels:
        path = target / "config.json"
        written = json.loads(path.read_text(encoding="utf-8"))
        written["id2label"] = {str(number): label for number, label in enumerate(run.labels)}
        written["label2id"] = {label: number for number, label in enumerate(run.labels)}
        path.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    run.reader.tokenizer.save_pretrained(target)
    yield f"merged into {target}; load it with jpeft.models.load({str(target)!r}) or with transformers"
    if run.config.model.base is not None:
        yield "note: the base is quantised, which cannot hold an adapter exactly; the merged model is in full precision"
    if run.config.model.pooling is not None:
        yield "note: transformers' own classifiers do not pool by the mean; jpeft does"


def export(folder: Path, target: Path) -> Iterator[str]:
    """Writes the run's adapter to `target` as Hugging Face PEFT stores it.

    Raises JpeftError if PEFT's files cannot hold the method, or `target` exists.
    """
    run = open_run(folder)
    jpeft.save_peft(run.model, target.expanduser(), base_model=run.config.model.source)
    yield f"written to {target}; load it with jpeft.load_peft(base, {str(target)!r}) or with PEFT"
    if run.config.model.pooling is not None:
        yield "note: transformers' own classifiers do not pool by the mean; jpeft does"
