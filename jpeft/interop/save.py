"""`save_peft`: an adapter of ours in the files that PEFT reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jpeft.baking import bake
from jpeft.errors import JpeftError
from jpeft.interop import converters, folder, saved, tokens, training
from jpeft.interop.config import TASK_TYPES
from jpeft.interop.links import Link, gathered
from jpeft.interop.names import model_and_family
from jpeft.methods import BitFit, FullTuning, TrainableTokens, applied
from jpeft.methods.method import warn_if_unfinished
from jpeft.models.model import Model
from jpeft.partition import partition


def save_peft(model: Model, path: str | Path, *, base_model: str | None = None, overwrite: bool = False) -> Path:
    """Writes the adapter of `model` to the folder `path` as Hugging Face PEFT 0.21.2 does, which reads it.

    One method that PEFT has too, and beside it trained heads, modules of `FullTuning` (`modules_to_save`) and, with
    LoRA, the biases of `BitFit` and the rows of `TrainableTokens`. base_model: the name of the base for
    `base_model_name_or_path`, which PEFT's `AutoPeftModel` loads; default: the name in the model's config.json, if
    there is one. overwrite: replace an adapter that is there. The folder appears whole or not at all.

    Raises JpeftError, naming modules and methods, for what PEFT's files cannot express.
    """
    model, _ = model_and_family(model, "save_peft")
    target = folder.target(path, overwrite=overwrite)
    every = applied(model)
    methods = [method for method in every if not isinstance(method, BitFit | FullTuning | TrainableTokens)]
    rows = [method for method in every if isinstance(method, TrainableTokens)] if methods else []
    methods = methods or [method for method in every if isinstance(method, TrainableTokens)]
    if len(methods) != 1:
        named = ", ".join(type(method).__name__ for method in methods) or "none"
        raise JpeftError(
            f"save_peft: a PEFT folder holds one adapter, and the model has {named}; apply one method (BitFit and "
            "FullTuning go beside it), or use jpeft.save_adapter"
        )
    method = methods[0]
    converter = converters.for_method(method)
    fields = converter.write(model, method)
    encoded = converter.training(method)
    plain, stored = (bake(model), method.baked()) if encoded else (model, method)
    links = list(converter.links(plain, stored, None))
    targeted = converter.targeted(links)
    beside, tensors = saved.write(model, converter.before, targeted)
    beside |= tokens.write(model, rows)
    odd = {name for name in beside if name not in converter.schema.used}
    if odd:
        raise JpeftError(f"save_peft: PEFT's {converter.peft_type} has no {', '.join(sorted(odd))}")
    others = [*saved.links(model, converter.before, targeted), *tokens.links(model, rows)]
    config: dict[str, Any] = {
        **converter.schema.defaults,
        "base_model_name_or_path": base_model or model.config.raw.get("_name_or_path"),
        "peft_type": converter.peft_type,
        "task_type": TASK_TYPES.get(model.task),
        **fields,
        **beside,
    }
    tensors |= _tensors(plain, [*links, *others])
    warn_if_unfinished(model, "save_peft")
    beside_it = training.contents(model, method, {link.key for link in others}) if encoded else None
    folder.write(target, config, tensors, beside_it)
    return target


def _tensors(model: Any, links: Sequence[Link]) -> dict[str, np.ndarray]:
    """What trains and its buffers. Raises JpeftError for what the file has no place for."""
    _, adapter, buffers, _ = partition(model)
    if any(isinstance(array, jax.ShapeDtypeStruct) for array in adapter.values()):
        raise JpeftError("save_peft: the model is abstract; there are no arrays to save")
    keys = {link.key for link in links}
    left = sorted(adapter.keys() - keys)
    if left:
        raise JpeftError(f"save_peft: PEFT's files have no place for {', '.join(left[:4])}; use jpeft.save_adapter")
    arrays = {key: value for key, value in {**adapter, **buffers}.items() if key in keys}
    return gathered(links, arrays)
