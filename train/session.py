"""A configuration as live objects, and a finished run as a model ready for use."""

from __future__ import annotations

import dataclasses
import inspect
import os
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

import jpeft
from jpeft.errors import JpeftError
from jpeft.sharding import Rules
from jpeft.virtual_tokens import places_taken
from train import config as configs
from train import packages, trackers
from train.examples import Reader
from train.folder import ADAPTER, CONFIG
from train.schema import Config
from train.tasks import Task, task_of

METRICS = trackers.METRICS


def keep_compiled() -> None:
    """Keeps compiled programs in the user's cache folder, so that the second run of a configuration starts at once."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jpeft" / "compiled"
    if getattr(jax.config, "jax_compilation_cache_dir", None) is None:
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def check_sources(config: Config) -> None:
    """Raises JpeftError for a package that is missing and for a path that leads nowhere, without reading any file."""
    for key in ("source", "tokenizer"):
        source = getattr(config.model, key)
        if source is None:
            continue
        path = packages.resolve(source)
        # A hub id is a name, or two with a slash between them.
        local = path.count("/") > 1 or path.startswith((".", "/", "~")) or path.endswith(".gguf")
        if local and not Path(path).exists():
            raise JpeftError(f"model.{key}: {source} does not exist (a hub id would be owner/name)")
    begun = config.training.start_from
    if begun is not None and not ((Path(begun) / CONFIG).is_file() and (Path(begun) / ADAPTER).exists()):
        raise JpeftError(f"training.start_from: {begun} is no finished run; give the output.folder of a jpeft train")


def located(config: Config) -> Config:
    """`config` with its local paths made absolute, so that the run can be used from anywhere."""
    model = _absolute(config.model, "source", "tokenizer")
    data = _absolute(config.data, "source", "test_source")
    if data.mix:
        data = data.model_copy(update={"mix": {_located(source): weight for source, weight in data.mix.items()}})
    training = _absolute(config.training, "start_from")
    output = config.output.model_copy(update={"folder": str(Path(config.output.folder).expanduser())})
    return config.model_copy(update={"model": model, "data": data, "training": training, "output": output})


def _absolute(section: Any, *keys: str) -> Any:
    """`section` with the paths under `keys` absolute where something is there; other sources stay as they are."""
    given = {key: getattr(section, key) for key in keys}
    return section.model_copy(update={key: _located(value) for key, value in given.items() if value is not None})


def _located(source: str) -> str:
    """`source` as an absolute path if it is one that exists."""
    if source.startswith(packages.PREFIX):
        return source
    path = Path(source).expanduser()
    return str(path.absolute()) if path.exists() else source


def base_model(config: Config, mesh: Mesh | None = None, rules: Rules | None = None) -> Any:
    """The pretrained model, with a new head of the run's seed where the checkpoint has none, spread over `mesh`."""
    source, settings = _load_arguments(config)
    return jpeft.models.load(source, **settings, rngs=nnx.Rngs(config.training.seed), mesh=mesh, rules=rules)


def abstract_model(config: Config) -> Any:
    """The same model without arrays, from its config.json alone."""
    source, settings = _load_arguments(config)
    return jpeft.models.abstract(source, **settings)


def load_call(config: Config) -> str:
    """The Python call that loads the base of a run, its defaults left out."""
    source, settings = _load_arguments(config)
    defaults = {name: parameter.default for name, parameter in inspect.signature(jpeft.models.load).parameters.items()}
    given = [repr(source), *(f"{name}={value!r}" for name, value in settings.items() if value != defaults[name])]
    return f"jpeft.models.load({', '.join(given)})"


def _load_arguments(config: Config) -> tuple[str, dict[str, Any]]:
    model = config.model
    task = task_of(config.data, model.task)
    settings = {
        "task": task.head,
        "num_labels": task.outputs,
        "dtype": model.dtype,
        "pooling": model.pooling,
        "remat": model.remat,
        "attention": model.attention,
        "quantize": model.base,
    }
    return packages.resolve(model.source), settings


def tokenizer(config: Config) -> Any:
    """The tokenizer that the configuration names, by default the model's own."""
    # transformers advises everyone without PyTorch to install it; only its tokenizers are used here.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from jpeft.models.tokenizer import load_tokenizer

    return load_tokenizer(packages.resolve(config.model.tokenizer or config.model.source))


def takes_types(model: Any) -> bool:
    """Whether the model tells the texts of a pair apart by token types."""
    return "token_type_ids" in inspect.signature(type(model).forward).parameters


def context(model: Any) -> int | None:
    """The most tokens that the model has positions for beside its virtual ones, if there is a limit.

    Raises JpeftError if the virtual ones leave none.
    """
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if not isinstance(limit, int):
        return None
    taken = places_taken(model)
    if taken >= limit:
        raise JpeftError(
            f"method.num_virtual_tokens: {taken} virtual tokens leave no room for text in a model of {limit} positions"
        )
    return limit - taken


def mergeable(model: Any) -> bool:
    """Whether `jpeft.merge` can fold the methods of `model` into its weights."""
    graphdef, *parts = jpeft.partition(model)
    try:
        jax.eval_shape(
            lambda *arrays: nnx.state(jpeft.merge(jpeft.combine(graphdef, *arrays), dequantize=True)), *parts
        )
    except JpeftError:
        return False
    return True


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run: its configuration and the adapted model."""

    config: Config
    model: Any
    reader: Reader

    @property
    def task(self) -> Task:
        """What the run learnt."""
        return task_of(self.config.data, self.config.model.task)


def open_run(folder: Path, *, adapted: bool = True) -> Run:
    """The run in `folder` (or in the folder around an adapter); with `adapted=False`, its base model alone.

    Raises JpeftError if there is no run, or its model or adapter cannot be loaded.
    """
    home = next((place for place in (folder, folder.parent) if (place / CONFIG).is_file()), None)
    if home is None:
        raise JpeftError(f"{folder}: no run here ({CONFIG} is missing); give the output.folder of a jpeft train")
    config = located(configs.load(home / CONFIG))
    check_sources(config)
    if not (home / ADAPTER).exists():
        raise JpeftError(f"{home}: the run has no adapter yet; it was not finished")
    model = base_model(config)
    model = jpeft.load_adapter(home / ADAPTER, model) if adapted else model
    limit = min(config.data.max_length, context(model) or config.data.max_length)
    reader = Reader(tokenizer(config), limit, types=takes_types(model))
    return Run(config, model, reader)
