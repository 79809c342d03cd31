"""`load_peft`: an adapter that PEFT, or `save_peft`, wrote, on a model of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx

from jpeft.checkpoint import sharding_of
from jpeft.errors import JpeftError
from jpeft.interop import converters, folder, saved, tokens, training
from jpeft.interop.config import TASK_TYPES, Settings
from jpeft.interop.links import check, filled
from jpeft.interop.names import model_and_family
from jpeft.methods import Method, compose
from jpeft.models.model import Model
from jpeft.partition import Arrays, combine, partition

_M = TypeVar("_M", bound=Model)


def load_peft(model: _M, path: str | Path) -> _M:
    """`model` with the adapter that Hugging Face PEFT (0.21.2) or `save_peft` wrote to the folder `path`.

    model: a base from `jpeft.models.load`, for the task of the adapter. It is not changed; the result shares its
    arrays, and computes what PEFT's model does. Adapters, heads and biases become `Trainable`, as in training.

    Fields that this PEFT does not know are named in one warning.

    Raises JpeftError, naming fields, tensors and files, for what is no adapter or damaged, for a file whose tensors do
    not fit its configuration and the model (missing, unexpected, of the wrong shape or type, not finite), for fields
    that change the result and are not supported here, for pickles, and for regular expressions that could run forever.
    """
    model, _ = model_and_family(model, "load_peft")  # type: ignore[assignment]
    where = Path(path)
    settings = Settings(folder.read_config(where), str(where / folder.CONFIG))
    converter = converters.for_settings(settings)
    settings.conform(converter.schema)
    file = folder.read_weights(where)

    def read(name: str) -> np.ndarray:
        return folder.read_tensor(file, name)

    encoded = training.read(where)
    method = converter.read(settings, model, file.tensors)
    beside = saved.read(settings, model, converter.before, file.tensors.keys(), read)
    further = (*beside.methods, *tokens.read_beside(settings, model))
    methods = (encoded[0] if encoded else method, *further)
    adapted = abstract(methods, model, str(where))

    # What the files have to hold is told by the model without encoders.
    plain = abstract((method, *further), model, str(where)) if encoded else adapted
    own = list(converter.links(plain, method, settings))
    others = [*saved.links(adapted, converter.before, converter.targeted(own)), *tokens.links(adapted, further)]
    check([*own, *others], file.tensors, beside.accounted, file.where, hint=_hint(settings, model))
    graphdef, adapter, buffers, _ = partition(adapted)
    shapes = {**adapter, **buffers}
    if encoded:
        values = training.values(encoded[1], shapes, partition(model), {link.key for link in others})
    else:
        values = filled(own, shapes, read)
    made = combined(methods, model, graphdef, adapter, buffers, {**values, **filled(others, shapes, read)})
    if encoded:
        baked = encoded[0].baked()
        training.check(made, lambda model: list(converter.links(model, baked, settings)), read, where)
    return made


def abstract(methods: tuple[Method, ...], model: Any, where: str) -> Any:
    """`model` with `methods`, without arrays. where: the file that asks for them, for errors."""
    try:
        return nnx.eval_shape(lambda: compose(*methods)(model, rngs=0))
    except JpeftError as error:
        raise JpeftError(f"load_peft: {where!r} does not fit this model: {error}") from error


def combined(
    methods: tuple[Method, ...],
    model: Any,
    graphdef: Any,
    adapter: Arrays,
    buffers: Arrays,
    values: dict[str, np.ndarray],
) -> Any:
    """The adapted model: arrays from the file (`values`), scales and masks by the methods, the rest the base's."""
    base = partition(model)

    def computed(*arrays: Arrays) -> Arrays:
        return partition(compose(*methods)(combine(base.graphdef, *arrays), rngs=0)).buffers

    held = {**base.adapter, **base.buffers}  # a new head, another adapter: they stay where they are
    made: dict[str, Any] = dict(values)
    if not buffers.keys() <= held.keys() | made.keys():
        # Compiled, so that initial values that nobody needs are not drawn.
        made = {**{k: v for k, v in jax.jit(computed)(*base[1:]).items() if k not in held}, **made}
    put = {**held, **jax.device_put(made, sharding_of(base.frozen))}
    return combine(graphdef, {k: put[k] for k in adapter}, {k: put[k] for k in buffers}, base.frozen)


def _hint(settings: Settings, model: Model) -> str:
    ours = TASK_TYPES.get(model.task)
    if settings.task_type in (None, ours):
        return ""
    task = next((task for task, name in TASK_TYPES.items() if name == settings.task_type), None)
    return f"the adapter is for {settings.task_type}, the model for {model.task!r}" + (
        f"; load it with jpeft.models.load(..., task={task!r})" if task else ""
    )
