"""A model's shapes and dtypes from its config.json alone, for plans that must not cost its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flax import nnx

from jpeft.errors import JpeftError
from jpeft.models.loading import DTYPES, from_config, load
from jpeft.models.model import Model
from jpeft.models.tensors import read_json
from jpeft.quant import Format, format_of
from jpeft.quant import quantize as quantized


def abstract(source: str | Path, *, quantize: Format | str | None = None, dtype: Any = None, **settings: Any) -> Model:
    """The model that `load` would give, with `jax.ShapeDtypeStruct`s in place of arrays.

    Of a folder or hub id only config.json is read. A .gguf file and a checkpoint that is quantised already are loaded,
    since only their tensors say how they are stored. settings: as of `load` (task, num_labels, pooling, remat,
    attention). Raises JpeftError as `load` does.
    """
    path = Path(source)
    raw = {} if path.suffix == ".gguf" else read_json(_config(source))
    if path.suffix == ".gguf" or "quantization_config" in raw:
        made = load(source, quantize=quantize, dtype=dtype, **settings)
        return nnx.eval_shape(lambda: made)
    stored = str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch.")
    dtype = dtype or (stored if stored in DTYPES else "float32")

    def make() -> Model:
        model = from_config(raw, dtype=dtype, **settings)
        return model if quantize is None else quantized(model, format_of(quantize))

    return nnx.eval_shape(make)


def _config(source: str | Path) -> Path:
    path = Path(source)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise JpeftError(f"{path}: has no config.json")
        return path / "config.json"
    if path.exists() or isinstance(source, Path) or str(source).count("/") > 1:
        raise JpeftError(f"{source}: no such folder")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(str(source), "config.json"))
    except Exception as error:  # the hub's client raises its own, httpx's and the system's errors
        raise JpeftError(
            f"{source}: no such folder here, and the hub did not give its config.json ({type(error).__name__}: {error})"
        ) from error
