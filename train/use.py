"""What is done with a finished run: asking it, merging it into its model, handing its adapter on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jpeft
from jpeft.errors import JpeftError
from jpeft.models.loading import local_folder
from train import packages
from train.session import keep_compiled, open_run


def generate(
    folder: Path,
    prompts: Sequence[str],
    *,
    pairs: Sequence[str] = (),
    max_new_tokens: int = 64,
    raw: bool = False,
    adapted: bool = True,
    sampling: dict[str, Any] | None = None,
) -> Iterator[str]:
    """One answer for each prompt: what follows it, or the class of the text with its probability.

    pairs: the second text for each prompt, of runs that classify pairs. raw: the prompt is not put into the run's
    template. adapted: with the adapter. Raises JpeftError for an empty prompt, for a template that needs more than one
    column, and for second texts that are missing or not asked for.
    """
    for option, text in [*(("--prompt", text) for text in prompts), *(("--text-pair", text) for text in pairs)]:
        if not text.strip():
            raise JpeftError(f"{option}: the {'prompt' if option == '--prompt' else 'text'} is empty")
        if any("\ud800" <= letter <= "\udfff" for letter in text):  # bytes that the shell passed on and are no text
            raise JpeftError(f"{option}: {text!r} is not UTF-8 text")
    keep_compiled()
    run = open_run(folder, adapted=adapted)
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "raw": raw, **(sampling or {})}
    if run.config.data.text_pair is not None:
        if len(pairs) != len(prompts):
            raise JpeftError(
                f"--text-pair: the run classifies pairs of texts; give one for each --prompt (there are {len(prompts)} "
                f"and {len(pairs)})"
            )
        settings["pairs"] = pairs
    elif pairs:
        raise JpeftError(f"--text-pair: the run's task is {run.task.name} without data.text_pair; leave it out")
    yield from run.task.answers(run, prompts, **settings)


def merge(folder: Path, target: Path) -> Iterator[str]:
    """Writes the run's model with the adapter folded in, its labels, tokenizer and settings of generation to `target`.

    Raises JpeftError if the method cannot be merged or `target` holds files already.
    """
    target = target.expanduser()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise JpeftError(f"{target}: exists and is not an empty folder; give a new one")
    run = open_run(folder)
    # Beside it until it is whole: a model without its tokenizer would look like one that is.
    new = target.absolute().with_name(f".{target.absolute().name}.new")
    shutil.rmtree(new, ignore_errors=True)
    rounding = jpeft.models.save_merged(run.model, new, dequantize=True)
    path = new / "config.json"
    written = {**json.loads(path.read_text(encoding="utf-8")), **run.task.saved_config}
    path.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    run.reader.tokenizer.save_pretrained(new)
    source = packages.resolve(run.config.model.source)
    if not source.endswith(".gguf"):
        settings = local_folder(source) / "generation_config.json"
        if settings.is_file():  # how transformers is to write with it
            shutil.copyfile(settings, new / settings.name)
    target.mkdir(exist_ok=True)
    for file in sorted(new.iterdir(), key=lambda file: file.name == "config.json"):
        file.rename(target / file.name)
    new.rmdir()
    yield f"merged into {target}; load it with jpeft.models.load({str(target)!r}) or with transformers"
    if rounding.tensor is not None:
        yield (
            f"rounding merged weights to {rounding.dtype} changed them by at most {rounding.largest:.2g}; it takes "
            f"{rounding.share:.1%} of the adapter's change where that is most, in {rounding.tensor}"
        )
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
