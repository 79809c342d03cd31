"""The command line: `jpeft train`, `jpeft compare`, `jpeft eval`, `jpeft generate`, ..., `jpeft report`.

JAX and everything that brings it are imported inside the commands, so that help appears at once.
"""

from __future__ import annotations

import errno
import io
import os
import re
import shutil
import sys
import textwrap
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Parameter-efficient fine-tuning in JAX: train an adapter, try it, merge it into the model.\n\n"
    "Start with: jpeft train configs/quickstart.yaml",
)


def _version(asked: bool) -> None:
    """Says the version and ends."""
    if asked:
        from importlib.metadata import version

        typer.echo(f"jpeft {version('jpeft')}")
        raise typer.Exit


@app.callback()
def _jpeft(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say the version.")
    ] = False,
) -> None:
    pass


class _Train(typer.core.TyperCommand):
    """Prints the keys of the configuration behind the options."""

    def format_help(self, ctx: typer.Context, formatter: object) -> None:  # type: ignore[override]
        super().format_help(ctx, formatter)  # type: ignore[arg-type]
        from train.schema import describe

        formatter.write("\nKeys of the configuration:\n")  # type: ignore[attr-defined]
        with formatter.indentation():  # type: ignore[attr-defined]
            rows = [(key, f"{meaning} ({kind}; {_default(default)})") for key, kind, default, meaning in describe()]
            formatter.write_dl(rows)  # type: ignore[attr-defined]
        from train.methods import names

        listed = ", ".join(names())
        formatter.write("\nMethods (jpeft methods NAME lists the keys of one):\n")  # type: ignore[attr-defined]
        with formatter.indentation():  # type: ignore[attr-defined]
            formatter.write_text(listed)  # type: ignore[attr-defined]


def _default(default: str) -> str:
    return default if default == "required" else f"default {default}"


@app.command(cls=_Train)
def train(
    config: Annotated[Path, typer.Argument(help="YAML file that describes the run.", metavar="CONFIG.yaml")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Keys of the file to set otherwise.", metavar="[KEY=VALUE ...]")
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Check everything, say what the run takes, train nothing and load no weights."),
    ] = False,
    processes: Annotated[
        str | None,
        typer.Option(
            help="How many processes run this command as one; auto on TPU virtual machines. Default: as SLURM, Open "
            "MPI or GKE has started them.",
            envvar="JAX_NUM_PROCESSES",
            metavar="N|auto",
        ),
    ] = None,
    process_id: Annotated[
        int | None,
        typer.Option(help="Which of them this is, from 0. Default: from the launcher.", envvar="JAX_PROCESS_ID"),
    ] = None,
    coordinator: Annotated[
        str | None,
        typer.Option(
            help="Host of process 0 and a free port on it. Default: from the launcher.",
            envvar="JAX_COORDINATOR_ADDRESS",
            metavar="HOST:PORT",
        ),
    ] = None,
) -> None:
    """Fine-tune a model as CONFIG.yaml describes, and score it before, during and after.

    The same command again goes on where a run was stopped or killed, and says so when the run is finished. Exit codes:
    0 finished, 2 a mistake to mend (the message says which), 130 stopped by Ctrl-C, 143 stopped by SIGTERM; a stopped
    run is saved first. 75: another process of the run ended.

    Several processes run the same command with a mesh, such as mesh.data=-1, and a folder that all can write. srun,
    mpirun and GKE's TPU slices need no option; TPU virtual machines take --processes auto; with any other launcher give
    all three (torchrun: $WORLD_SIZE, $RANK, and $MASTER_ADDR with a port other than its own). docs/pods.md has recipes.

    Example: jpeft train configs/quickstart.yaml training.learning_rate=1e-3 method.rank=16
    """
    from train.launch import group_of, supervised
    from train.stopping import Stopped

    try:
        group = group_of(processes, process_id, coordinator, os.environ)
    except ValueError as fault:
        raise typer.BadParameter(str(fault)) from None
    code = None if group is None else supervised()
    if code is not None:
        raise typer.Exit(code)
    try:
        from train import run

        (run.plan if dry_run else run.train)(config, overrides or [], group=group)
    except Stopped as stop:
        raise typer.Exit(stop.exit_code) from None
    except KeyboardInterrupt:
        # Caught here: typer would end the program without a word.
        typer.echo("\nstopped before the first step: nothing was written", err=True)
        raise typer.Exit(130) from None


@app.command()
def compare(
    configs: Annotated[
        list[str],
        typer.Argument(
            help="YAML files that describe a comparison each, and keys to set otherwise in all of them.",
            metavar="CONFIG.yaml ... [KEY=VALUE ...]",
        ),
    ],
) -> None:
    """Train several methods on the same rows with several seeds and write one table of scores and costs.

    The learning rate of each method is chosen from the same few by a part of the training rows. The same command again
    goes on where it was stopped. Exit codes are those of train; a method that fails is a line of the table, and all of
    them failing is a mistake to mend.

    Example: jpeft compare configs/compare/small.yaml
    """
    from train.stopping import Stopped

    # A file whose name has an equals sign can be given as ./NAME.
    overrides = [text for text in configs if re.match(r"[\w.\[\]-]+=", text)]
    if len(overrides) == len(configs):
        raise typer.BadParameter("give the YAML file of a comparison, such as configs/compare/small.yaml")
    try:
        from train.compare import run

        run.compare_all([Path(config) for config in configs if config not in overrides], overrides)
    except Stopped as stop:
        raise typer.Exit(stop.exit_code) from None
    except KeyboardInterrupt:
        typer.echo("\nstopped between two runs; the same command goes on from there", err=True)
        raise typer.Exit(130) from None


@app.command()
def generate(
    run: Annotated[Path, typer.Argument(help="Folder of a run, or of its adapter.", metavar="RUN_OR_ADAPTER")],
    prompt: Annotated[list[str], typer.Option(help="What to answer; may be given several times.")],
    text_pair: Annotated[
        list[str] | None, typer.Option(help="The second text of a pair, one for each prompt (data.text_pair).")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token every time.", min=0.0)] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Choose among the k likeliest tokens only.", min=1)] = None,
    top_p: Annotated[float | None, typer.Option(help="Choose among the likeliest tokens of this total.")] = None,
    seed: Annotated[int, typer.Option(help="Of the choice, when the temperature is above 0.")] = 0,
    raw: Annotated[bool, typer.Option("--raw", help="Use the prompt as it is, without the run's template.")] = False,
    base: Annotated[bool, typer.Option("--base", help="Ask the model without the adapter.")] = False,
) -> None:
    """Ask a trained model: it goes on from the prompt, or names the class of the text.

    The prompt is put into the template that the run was trained with.

    Example: jpeft generate runs/quickstart --prompt "Who wrote Hamlet ?"
    """
    from train.use import generate as answers

    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    settings = {"max_new_tokens": max_new_tokens, "raw": raw, "adapted": not base, "sampling": sampling}
    for line in answers(run, prompt, pairs=text_pair or (), **settings):  # type: ignore[arg-type]
        typer.echo(line)


@app.command(name="eval")
def evaluate(
    run: Annotated[Path, typer.Argument(help="Folder of a run, or of its adapter.", metavar="RUN_OR_ADAPTER")],
    data: Annotated[
        str | None,
        typer.Option(help="File, package or hub id of the rows to score; default: those held out from the training."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="New .jsonl file for the predictions.")] = None,
    limit: Annotated[int | None, typer.Option(help="Score this many rows at most.", min=1)] = None,
    base: Annotated[bool, typer.Option("--base", help="Score the model without the adapter.")] = False,
) -> None:
    """Score a trained model on any rows, with the metrics of its run, and write what it says to each.

    The rows have the columns that the run was trained on.

    Example: jpeft eval runs/quickstart --data test.jsonl --output predictions.jsonl
    """
    from train.scoring import evaluate as scored

    for line in scored(run, data, adapted=not base, limit=limit, output=output):
        typer.echo(line)


@app.command()
def merge(
    run: Annotated[Path, typer.Argument(help="Folder of a run.", metavar="RUN")],
    folder: Annotated[Path, typer.Argument(help="New folder for the merged model.", metavar="FOLDER")],
) -> None:
    """Fold the adapter into the model and write it as a Hugging Face folder, tokenizer included.

    Example: jpeft merge runs/smollm2 merged, then AutoModelForCausalLM.from_pretrained("merged")
    """
    from train.use import merge as write

    for line in write(run, folder):
        typer.echo(line)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Folder of a run.", metavar="RUN")],
    folder: Annotated[Path, typer.Argument(help="New folder for the adapter.", metavar="FOLDER")],
) -> None:
    """Write the adapter alone as Hugging Face PEFT stores it.

    Example: jpeft export runs/smollm2 adapter, then PeftModel.from_pretrained(base, "adapter")
    """
    from train.use import export as write

    for line in write(run, folder):
        typer.echo(line)


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="One of them, for its keys.", metavar="[NAME]")] = None,
) -> None:
    """List the methods, or the keys of one with their types, defaults and meaning.

    Example: jpeft methods lora
    """
    from train.methods import describe, overview

    if name is None:
        _listed(list(overview()))
        return
    first, rows = describe(name)
    typer.echo(f"{first}\n")
    _listed([(key, f"{said} ({kind}; {_default(default)})".strip()) for key, kind, default, said in rows])


def _listed(rows: list[tuple[str, str]]) -> None:
    """Two columns, the second of them folded."""
    margin = max(len(first) for first, _ in rows) + 4
    width = max(margin + 20, min(120, shutil.get_terminal_size().columns))
    for first, second in rows:
        lead = f"  {first}".ljust(margin)
        typer.echo(textwrap.fill(second, width, initial_indent=lead, subsequent_indent=" " * margin))


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Folder of a run, be it finished or not.", metavar="RUN")],
) -> None:
    """Write RUN/report.html again from the files in the folder: one page with the result, curves and predictions.

    Example: jpeft report runs/smollm2
    """
    from train.report import write_report

    typer.echo(write_report(run.expanduser()))


def main() -> None:
    """Runs the command line; what the user can mend is one message on standard error and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that knows fewer letters shows a mark for the others
    try:
        app()
    except ValueError as error:
        if "JpeftError" not in (kind.__name__ for kind in type(error).__mro__):
            raise
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
    except OSError as error:
        if error.filename is None and error.errno != errno.ENOSPC:
            raise
        named = f"{error.filename}: " if error.filename is not None else ""
        typer.echo(f"error: {named}{error.strerror or error}", err=True)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        # A device's full memory is a RuntimeError of JAX that says so in its text, the host's a MemoryError.
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = (str(error) or "no more can be had").splitlines()[0]
        typer.echo(
            f"error: out of memory: {reason}. A smaller training.batch_size (training.accumulation makes up for it), a "
            "smaller data.max_length, model.remat=true or model.base=nf4 takes less; --dry-run says how much a run "
            "takes",
            err=True,
        )
        sys.exit(2)
